"""The command line: ``openmm-bg simulate | train | sample | evaluate | report | demo | doctor``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from openmm_bg.errors import BGError, InputError


def _friendly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print a user's mistake as one sentence, without a traceback."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
        logging.getLogger("openmm_bg").setLevel(logging.INFO)
        logging.getLogger("pymbar").setLevel(logging.ERROR)  # it advertises JAX to every user of a command
        try:
            return function(*args, **kwargs)
        except BGError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.ClickException("Interrupted.") from None

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="openmm-bg")
def main() -> None:
    """Boltzmann generators for OpenMM: train a flow, sample with exact weights."""


@main.command()
@click.argument("structure", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder, new or empty.")
@click.option(
    "--forcefield",
    multiple=True,
    default=("amber14-all.xml",),
    show_default=True,
    help="OpenMM force field, XML, for .pdb and .cif; may be repeated.",
)
@click.option(
    "--solvent",
    type=click.Choice(["obc2", "none"]),
    default="obc2",
    show_default=True,
    help="Implicit solvent, unless a --forcefield brings one (implicit/gbn2.xml).",
)
@click.option(
    "--positions", type=click.Path(path_type=Path), help="For .prmtop, .top and .psf: .inpcrd, .gro, .pdb ..."
)
@click.option(
    "--parameters", multiple=True, type=click.Path(path_type=Path), help="For .psf: CHARMM's files; may be repeated."
)
@click.option("--chain", help="The chain to keep, where a .pdb or .cif has several.")
@click.option("--ph", type=float, default=7.0, show_default=True, help="For hydrogens that the structure lacks.")
@click.option("--temperature", type=float, default=300.0, show_default=True, help="Kelvin.")
@click.option("--length", type=float, default=5.0, show_default=True, help="Nanoseconds of each replica.")
@click.option("--interval", type=float, default=1.0, show_default=True, help="Picoseconds between frames.")
@click.option("--replicas", type=int, default=4, show_default=True, help="Trajectories for training.")
@click.option(
    "--test/--no-test", default=True, show_default=True, help="One more, test.dcd, that training leaves alone."
)
@click.option("--time-step", type=float, help="Femtoseconds; default 2, or 4 with --hmr.")
@click.option("--hmr", is_flag=True, help="Repartition hydrogen masses (3 dalton), for 4 fs.")
@click.option("--friction", type=float, default=1.0, show_default=True, help="1/ps.")
@click.option("--start-temperature", type=float, default=400.0, show_default=True, help="Kelvin; it sets starts apart.")
@click.option("--heating", type=float, default=20.0, show_default=True, help="Picoseconds at --start-temperature.")
@click.option(
    "--equilibration", type=float, default=100.0, show_default=True, help="Picoseconds before frames are kept."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--platform", help="OpenMM platform; default: the fastest, by timing.")
@click.option("--resume", is_flag=True, help="Continue an interrupted simulation, or one with a longer --length.")
@_friendly
def simulate(
    structure: Path,
    output: Path,
    forcefield: tuple[str, ...],
    solvent: Any,
    positions: Path | None,
    parameters: tuple[Path, ...],
    chain: str | None,
    ph: float,
    temperature: float,
    length: float,
    interval: float,
    replicas: int,
    test: bool,
    time_step: float | None,
    hmr: bool,
    friction: float,
    start_temperature: float,
    heating: float,
    equilibration: float,
    seed: int,
    platform: str | None,
    resume: bool,
) -> None:
    """Make MD data for training from a structure of one chain: a folder for `openmm-bg train`.

    STRUCTURE is a .pdb or .cif file, or a .prmtop, .top or .psf with --positions. Every replica is heated, cooled and
    equilibrated from the minimised structure with velocities of its own. Ctrl-C and kill are safe, --resume continues.

    \b
    Example:
      openmm-bg simulate protein.pdb -o md/
      openmm-bg train md/ -o model/
    """
    from openmm_bg.simulate.protocol import HYDROGEN_MASS, Protocol
    from openmm_bg.simulate.run import simulate as run

    protocol = Protocol(
        temperature=temperature,
        friction=friction,
        time_step=(time_step if time_step is not None else 4.0 if hmr else 2.0) / 1000,
        hydrogen_mass=HYDROGEN_MASS if hmr else None,
        interval=interval,
        length=1000 * length,
        replicas=replicas,
        test=test,
        start_temperature=start_temperature,
        heating=heating,
        equilibration=equilibration,
        seed=seed,
    )
    summary = run(
        structure,
        output,
        protocol,
        forcefield=forcefield,
        solvent=solvent,
        positions=positions,
        parameters=parameters,
        chain=chain,
        ph=ph,
        platform=platform,
        resume=resume,
    )
    click.echo(str(summary))


@main.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--system", "system_file", type=click.Path(path_type=Path), help="Serialised System, XML.")
@click.option("--topology", "topology_file", type=click.Path(path_type=Path), help="PDB or PDBx/mmCIF.")
@click.option(
    "--trajectory",
    "trajectory_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Frames in time order, any format MDTraj reads; may be repeated.",
)
@click.option("--temperature", type=float, help="Kelvin.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the model.")
@click.option("--log-weights", type=click.Path(path_type=Path), help=".npy (or .npz) file [frames] for biased frames.")
@click.option(
    "--representation",
    type=click.Choice(["full", "reduced"]),
    help="Default: full, and reduced for the presets protein and paper.",
)
@click.option("--preset", type=click.Choice(["cpu", "protein", "paper"]), default="cpu", show_default=True)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file instead of a preset.")
@click.option("--platform", help="OpenMM platform for energies, twin, or twin:cuda; default: the fastest, by timing.")
@click.option("--workers", type=int, help="Contexts that evaluate energies; default: by timing.")
@click.option(
    "--tune",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="full: also time worker processes and the System's torch twin (on a GPU too); the choice is remembered.",
)
@click.option("--device", help="Where the flow is trained: cpu (default) or cuda.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run in the same folder.")
@_friendly
def train(
    folder: Path | None,
    system_file: Path | None,
    topology_file: Path | None,
    trajectory_files: tuple[Path, ...],
    temperature: float | None,
    output: Path,
    log_weights: Path | None,
    representation: Any,
    preset: str,
    config_file: Path | None,
    platform: str | None,
    workers: int | None,
    tune: Any,
    device: str | None,
    resume: bool,
) -> None:
    """Train a flow for a single molecule.

    The data are a FOLDER made by `openmm-bg simulate`, or --system, --topology, --trajectory and --temperature. Writes
    flow.bg, the loss curve and checkpoints; Ctrl-C is safe, --resume continues. Started by torchrun, several processes
    share every batch.

    \b
    Example:
      openmm-bg train md/ -o model/ --preset protein
      torchrun --nproc-per-node 2 -m openmm_bg.cli train md/ -o model/ --preset protein
      openmm-bg train --system system.xml --topology top.pdb --trajectory traj.dcd --temperature 300 -o model/
    """
    from openmm_bg.training.config import TrainingConfig
    from openmm_bg.training.parallel import joined_to_tell_once

    if representation is None:
        representation = "reduced" if config_file is None and preset in ("protein", "paper") else "full"
        if config_file is not None:  # a file made from the presets protein or paper says nothing of this choice
            logging.getLogger(__name__).info(
                "%s comes without --representation: every coordinate is modelled (full); the presets protein and paper "
                "take --representation reduced.",
                config_file,
            )
    with joined_to_tell_once(device or "cpu") as ranks:
        if not ranks.is_main:
            logging.getLogger("openmm_bg").setLevel(logging.ERROR)  # the main process says it
        record, n_modelled = _train(
            folder, system_file, topology_file, trajectory_files, temperature, output, log_weights, representation,
            config_file if config_file is not None else TrainingConfig.preset(preset),  # type: ignore[arg-type]
            platform, workers, tune, device, resume,
        )  # fmt: skip
    if ranks.is_main:
        click.echo(
            f"{output / 'flow.bg'}: {n_modelled} coordinates, {record['steps']} steps, "
            f"effective sample size {record.get('completed_ess', record['reverse_ess']):.1%}"
        )


def _train(
    folder: Path | None,
    system_file: Path | None,
    topology_file: Path | None,
    trajectory_files: tuple[Path, ...],
    temperature: float | None,
    output: Path,
    log_weights: Path | None,
    representation: Any,
    config: Any,
    platform: str | None,
    workers: int | None,
    tune: Any,
    device: str | None,
    resume: bool,
) -> tuple[dict[str, Any], int]:
    """Read the data and train: the training record, and the number of modelled coordinates."""
    from openmm_bg.commands import check_resumable, read_log_weights, read_system
    from openmm_bg.simulate.reading import read_topology

    if resume:
        check_resumable(output)
    system: Any
    trajectory: Any
    if folder is not None:
        if system_file or topology_file or trajectory_files or temperature is not None:
            raise InputError(
                f"{folder} brings System, topology, trajectories and temperature: leave out their options."
            )
        from openmm_bg.simulate.folder import read_training_data

        data = read_training_data(folder)
        system, topology, trajectory, temperature = data.system, data.topology, data.positions, data.temperature
    elif system_file is None or topology_file is None or not trajectory_files or temperature is None:
        raise InputError(
            "Give a folder made by openmm-bg simulate, or all of --system, --topology, --trajectory and --temperature."
        )
    else:
        system, topology = read_system(system_file), read_topology(topology_file)
        trajectory = [str(path) for path in trajectory_files]
    weights = None if log_weights is None else read_log_weights(log_weights)
    from openmm_bg.training.run import train as run

    flow = run(
        system,
        topology,
        trajectory,
        temperature,
        log_weights=weights,
        representation=representation,
        config=config,
        directory=output,
        resume=resume,
        platform=platform,
        n_workers=workers,
        tune=tune,
        device=device,
    )
    return flow.metadata["training"], flow.coordinates.n_modelled


@main.command()
@click.argument("flow_file", type=click.Path(path_type=Path))
@click.option("-n", "n_samples", type=int, default=10_000, show_default=True, help="Number of samples.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.dcd"),
    show_default=True,
    help="Trajectory (.dcd, .xtc, .nc, .pdb); it and the .npz beside it are replaced if they exist.",
)
@click.option("--system", "system_file", type=click.Path(path_type=Path), help="Another System (XML) than the flow's.")
@click.option("--temperature", type=float, help="Kelvin; default: the flow's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--platform", help="OpenMM platform for energies, twin, or twin:cuda; default: the fastest, by timing.")
@click.option("--workers", type=int, help="Contexts that evaluate energies; default: by timing.")
@click.option(
    "--tune",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="full: also time worker processes and the System's torch twin (on a GPU too); the choice is remembered.",
)
@_friendly
def sample(
    flow_file: Path,
    n_samples: int,
    output: Path,
    system_file: Path | None,
    temperature: float | None,
    seed: int,
    platform: str | None,
    workers: int | None,
    tune: Any,
) -> None:
    """Draw samples with exact weights: a trajectory, and .npz with log_weights, reduced_potentials and log_q.

    FLOW_FILE is a flow file or a folder of `openmm-bg train`.
    Samples of weight zero (no finite energy) are kept out of the trajectory and of the .npz, and counted.

    \b
    Example:
      openmm-bg sample model/flow.bg -n 100000 -o out.dcd
    """
    from openmm_bg.commands import sample_to_files

    click.echo(sample_to_files(flow_file, n_samples, output, system_file, temperature, seed, platform, workers, tune))


def _evaluating(function: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments and options that `evaluate` and `report` share."""
    workers = "Contexts that evaluate energies; default: by timing."
    for decorate in (
        click.option("--workers", type=int, help=workers),
        click.option("--platform", help="OpenMM platform for energies; default: the fastest, by timing."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--embedding", type=click.Choice(["auto", "umap", "pca"]), default="auto", show_default=True),
        click.option(
            "--system",
            "system_file",
            type=click.Path(path_type=Path),
            help="Another System (XML) than the flow's, for energies, weights and moves.",
        ),
        click.option(
            "--training",
            type=click.Path(path_type=Path),
            help="Training frames, for novelty: a trajectory or a folder of simulate; default: the folder that DATA "
            "lies in.",
        ),
        click.option("-n", "n_samples", type=int, default=10_000, show_default=True, help="Samples of the flow."),
        click.argument("data", type=click.Path(path_type=Path)),
        click.argument("flow_files", metavar="FLOW...", nargs=-1, required=True, type=click.Path(path_type=Path)),
    ):
        function = decorate(function)
    return function


def _evaluation_settings(
    n_samples: int, system_file: Path | None, embedding: Any, seed: int, platform: str | None, workers: int | None
) -> dict[str, Any]:
    from openmm_bg.commands import read_system

    return {
        "n_samples": n_samples,
        "system": None if system_file is None else read_system(system_file),
        "system_source": None if system_file is None else str(system_file),
        "embedding": embedding,
        "seed": seed,
        "platform": platform,
        "n_workers": workers,
    }


@main.command()
@_evaluating
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="JSON file; default: the flow's name, .evaluation.json."
)
@_friendly
def evaluate(
    flow_files: tuple[Path, ...], data: Path, output: Path | None, training: Path | None, **options: Any
) -> None:
    """Hold a flow against MD frames that it has not seen: ΔD, energies, likelihood, weights, acceptance, structure.

    FLOW is a flow file or a folder of `openmm-bg train`. DATA is a trajectory, or a folder made by `openmm-bg
    simulate`, whose test.dcd is taken. With several flows (seeds of one training) the first is evaluated and the
    likelihoods of all are compared. Every figure goes into a JSON file too, those of each residue included.

    \b
    Example:
      openmm-bg evaluate model/flow.bg md/test.dcd
    """
    from openmm_bg.analysis.files import evaluate_files

    result, path = evaluate_files(flow_files, data, output, training, **_evaluation_settings(**options))
    click.echo(str(result))
    click.echo(f"Every figure: {path}")


@main.command()
@_evaluating
@click.option("-o", "--output", type=click.Path(path_type=Path), help="HTML file; default: the flow's name with .html.")
@_friendly
def report(
    flow_files: tuple[Path, ...], data: Path, output: Path | None, training: Path | None, **options: Any
) -> None:
    """One HTML page that shows how good a flow is: what `evaluate` computes, as pictures, with the training's losses.

    Arguments and options are those of `evaluate`. The page holds everything it shows and loads nothing; the figures
    lie beside it as JSON.

    \b
    Example:
      openmm-bg report model/ md/ -o report.html
    """
    from openmm_bg.analysis.files import report_files

    result, path = report_files(flow_files, data, output, training, **_evaluation_settings(**options))
    click.echo(str(result))
    click.echo(f"Page: {path}")


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--quick", is_flag=True, help="Every step, none far enough for good figures: two minutes.")
@_friendly
def demo(output: Path, quick: bool) -> None:
    """Alanine dipeptide in vacuum, from nothing to exact free energies, on two CPU cores in ten minutes.

    \b
    Example:
      openmm-bg demo -o demo-output
    """
    from openmm_bg.demo import QUICK, DemoSettings, run_demo, summary

    result = run_demo(output, QUICK if quick else DemoSettings())
    click.echo(summary(result))
    click.echo(f"Page: {output / 'demo.html'}")


@main.command()
@_friendly
def doctor() -> None:
    """Try what openmm_bg builds on: platforms, CUDA, openmm-torch, the shipped flow; code 1 if something is broken.

    \b
    Example:
      openmm-bg doctor
    """
    from openmm_bg.doctor import examine

    report = examine()
    click.echo(str(report))
    if not report.ok:
        sys.exit(1)


if __name__ == "__main__":
    main()
