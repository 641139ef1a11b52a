"""The command line: ``openmm-bg train | sample | demo | doctor``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from openmm_bg.errors import BGError


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
@click.option("--system", "system_file", required=True, type=click.Path(path_type=Path), help="Serialised System, XML.")
@click.option("--topology", "topology_file", required=True, type=click.Path(path_type=Path), help="PDB or PDBx/mmCIF.")
@click.option(
    "--trajectory",
    "trajectory_files",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Frames in time order, any format MDTraj reads; may be repeated.",
)
@click.option("--temperature", required=True, type=float, help="Kelvin.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the model.")
@click.option("--log-weights", type=click.Path(path_type=Path), help=".npy file [frames] for biased frames.")
@click.option("--representation", type=click.Choice(["full", "reduced"]), default="full", show_default=True)
@click.option("--preset", type=click.Choice(["cpu", "paper"]), default="cpu", show_default=True)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file instead of a preset.")
@click.option("--platform", help="OpenMM platform for energies; default: the fastest, by timing.")
@click.option("--workers", type=int, help="Contexts that evaluate energies; default: by timing.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run in the same folder.")
@_friendly
def train(
    system_file: Path,
    topology_file: Path,
    trajectory_files: tuple[Path, ...],
    temperature: float,
    output: Path,
    log_weights: Path | None,
    representation: Any,
    preset: str,
    config_file: Path | None,
    platform: str | None,
    workers: int | None,
    resume: bool,
) -> None:
    """Train a flow for a single molecule.

    Writes flow.bg, the loss curve and checkpoints; Ctrl-C is safe, --resume continues.

    \b
    Example:
      openmm-bg train --system system.xml --topology top.pdb --trajectory traj.dcd --temperature 300 -o model/
    """
    from openmm_bg.commands import read_log_weights, read_system, read_topology

    system, topology = read_system(system_file), read_topology(topology_file)
    weights = None if log_weights is None else read_log_weights(log_weights)
    from openmm_bg.training.run import train as run

    flow = run(
        system,
        topology,
        [str(path) for path in trajectory_files],
        temperature,
        log_weights=weights,
        representation=representation,
        config=config_file if config_file is not None else preset,
        directory=output,
        resume=resume,
        platform=platform,
        n_workers=workers,
    )
    record = flow.metadata["training"]
    click.echo(
        f"{output / 'flow.bg'}: {flow.coordinates.n_modelled} coordinates, {record['steps']} steps, "
        f"effective sample size {record['reverse_ess']:.1%}"
    )


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
@click.option("--platform", help="OpenMM platform for energies; default: the fastest, by timing.")
@click.option("--workers", type=int, help="Contexts that evaluate energies; default: by timing.")
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
) -> None:
    """Draw samples with exact weights: a trajectory, and .npz with log_weights, reduced_potentials and log_q.

    Samples of weight zero (no finite energy) are kept out of the trajectory and of the .npz, and counted.

    \b
    Example:
      openmm-bg sample model/flow.bg -n 100000 -o out.dcd
    """
    from openmm_bg.commands import sample_to_files

    click.echo(sample_to_files(flow_file, n_samples, output, system_file, temperature, seed, platform, workers))


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
