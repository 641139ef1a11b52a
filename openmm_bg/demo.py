"""`openmm-bg demo`: alanine dipeptide from nothing to exact free energies, on two CPU cores, in minutes.

Tempered MD under a well in φ that balances the two basins; a flow trained on it and on the force field; weights that
take the well away again; Metropolis moves between MD steps. Three estimates of one free-energy difference must agree.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_bg.progress import progress_bar

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.analysis import torsions
from openmm_bg.analysis.torsions import phi_basin
from openmm_bg.artifact import Flow, compress_text
from openmm_bg.energy import thermal_energy
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.free_energy import chain_state_difference, state_difference
from openmm_bg.sampler import BoltzmannGeneratorSampler
from openmm_bg.simulate import TemperedTrajectory, TorsionBias, temperature_ladder, tempered_md, torsion_angle
from openmm_bg.training.config import TrainingConfig
from openmm_bg.training.run import train
from openmm_bg.weights import effective_sample_size

logger = logging.getLogger(__name__)

TEMPERATURE = 300.0
#: φ, ψ and the two amide dihedrals ω of ACE-ALA-NME in openmmtools' atom order.
PHI, PSI = (4, 6, 8, 14), (6, 8, 14, 16)
OMEGA = ((1, 4, 6, 8), (8, 14, 16, 18))
#: Centre of the well in φ: the C7ax basin.
WELL = TorsionBias(PHI, centre=1.1, sharpness=3.0, depth=12.0)


@dataclass(frozen=True)
class DemoSettings:
    """How much of everything; seconds are wall time on the machine at hand.

    ``population`` is the share of the φ > 0 basin that the well in φ is tuned to.
    """

    seconds_pilot: float = 15.0
    seconds_md: float = 120.0
    seconds_likelihood: float = 60.0
    seconds_energies: float = 300.0
    n_samples: int = 100_000
    n_rounds: int = 2_500
    md_steps: int = 50
    moves_per_round: int = 16
    population: float = 0.5
    seed: int = 0
    quick: bool = False


#: The short form for continuous integration: every step is taken, none far enough for good figures.
QUICK = DemoSettings(
    seconds_pilot=8.0,
    seconds_md=10.0,
    seconds_likelihood=18.0,
    seconds_energies=12.0,
    n_samples=8_000,
    n_rounds=400,
    quick=True,
)


def is_trans(positions: np.ndarray) -> np.ndarray:
    """Frames [n] whose two amide bonds are trans, the state that the flow models."""
    return torsions.is_trans(positions, OMEGA)


@dataclass
class DemoData:
    """MD of the demo: its frames (trans only), the System with a well that balances them, and what was counted.

    The frames were run under the well that a pilot run proposed; ``well``, that of ``biased``, is the one that they ask
    for themselves.
    """

    well: TorsionBias
    system: openmm.System
    biased: openmm.System
    topology: Any
    positions: np.ndarray
    trajectory: TemperedTrajectory
    n_cis: int
    n_energies: int

    def log_weights(self, well: TorsionBias) -> np.ndarray:
        """[n] log-weights that make the frames those of the System with this well."""
        phi = torsion_angle(self.trajectory.positions, PHI)
        return self.trajectory.log_weights - well.energy(phi) / thermal_energy(TEMPERATURE)


def make_data(settings: DemoSettings, progress: bool = True) -> DemoData:
    """Tempered MD of alanine dipeptide in vacuum, with a pilot run that finds the depth of the well.

    Raises
    ------
    InputError
        The pilot run, or the run after it, saw one basin only.
    """
    from openmmtools.testsystems import AlanineDipeptideVacuum

    test = AlanineDipeptideVacuum()  # its default: amber ff96, HBonds constraints
    positions = np.asarray(test.positions._value, dtype=np.float64)
    ladder = temperature_ladder(TEMPERATURE, 900.0, 5)

    def run(what: str, seconds: float, well: TorsionBias, seed: int) -> TemperedTrajectory:
        with _seconds_bar(what, seconds, progress) as update:
            return tempered_md(
                test.system, test.topology, positions, ladder, seconds=seconds, bias=well, seed=seed, progress=update
            )

    pilot = run("MD, pilot", settings.seconds_pilot, WELL, settings.seed)
    phi = torsion_angle(pilot.positions, PHI)
    well = WELL.balanced(phi, phi_basin(phi), TEMPERATURE, settings.population)
    found = run("MD, tempered", settings.seconds_md, well, settings.seed + 1000)
    trans = is_trans(found.positions)
    kept = replace(
        found,
        positions=found.positions[trans],
        log_weights=found.log_weights[trans],
        ladder=found.ladder[trans],
    )
    # Seconds of pilot run leave an error of kT in the depth; the frames know better, and are weighed accordingly.
    phi = torsion_angle(kept.positions, PHI)
    tuned = well.balanced(phi, phi_basin(phi), TEMPERATURE, settings.population)
    biased = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(test.system))
    biased.addForce(tuned.force())
    return DemoData(
        well=tuned,
        system=test.system,
        biased=biased,
        topology=test.topology,
        positions=positions,
        trajectory=kept,
        n_cis=int((~trans).sum()),
        n_energies=pilot.n_energies + found.n_energies,
    )


def training_config(settings: DemoSettings) -> TrainingConfig:
    """The "cpu" preset with this demo's durations."""
    config = TrainingConfig.preset("cpu").model_dump()
    durations = (settings.seconds_likelihood, settings.seconds_energies)
    for stage, seconds in zip(config["stages"], durations, strict=True):
        stage["seconds"] = seconds  # the likelihood stage keeps its bound in epochs: beyond it, it overfits
    return TrainingConfig.load({**config, "seed": settings.seed})


def tempered_difference(trajectory: TemperedTrajectory) -> tuple[float, float]:
    """ΔF of the φ > 0 basin from the tempered MD alone, all ladders pooled, kT."""
    inside = phi_basin(torsion_angle(trajectory.positions, PHI))
    return chain_state_difference(~inside, inside, trajectory.log_weights, chains=trajectory.ladder)


@dataclass
class Chain:
    """MD with Metropolis moves between its steps: φ after every round (NaN where an amide is cis)."""

    phi: np.ndarray
    n_energies: int
    n_cis: int
    acceptance: float
    longest_rejection_streak: int


def run_chain(flow: Flow, data: DemoData, settings: DemoSettings, progress: bool = True) -> Chain:
    """``n_rounds`` of ``md_steps`` MD steps and ``moves_per_round`` Metropolis steps on one Context."""
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.002)
    integrator.setRandomNumberSeed(settings.seed + 7)
    context = openmm.Context(data.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(data.trajectory.positions[0].astype(np.float64))
    context.setVelocitiesToTemperature(TEMPERATURE, settings.seed + 7)
    frames = np.empty((settings.n_rounds, len(data.positions), 3), dtype=np.float32)
    with BoltzmannGeneratorSampler(flow, context, seed=settings.seed + 8) as sampler:
        for i in progress_bar(range(settings.n_rounds), desc="MD + moves", unit="round", shown=progress, leave=False):
            integrator.step(settings.md_steps)
            sampler.step(settings.moves_per_round)
            frames[i] = context.getState(positions=True).getPositions(asNumpy=True)._value
        statistics = sampler.statistics
    trans = is_trans(frames)
    return Chain(
        phi=np.where(trans, torsion_angle(frames, PHI), np.nan),
        # two more a round: the comparison of the clones with the Context
        n_energies=settings.n_rounds * (settings.md_steps + 2) + statistics["n_energies"],
        n_cis=int((~trans).sum()),
        acceptance=statistics["n_accepted"] / statistics["n_proposed"],
        longest_rejection_streak=statistics["longest_rejection_streak"],
    )


def draw(flow: Flow, data: DemoData, n: int, seed: int) -> tuple[Ensemble, np.ndarray, int]:
    """n weighted samples of the plain target, their log-weights on the balanced one, and the energies spent.

    Samples with a cis amide are outside the state that is asked for: weight zero.
    """
    context = openmm.Context(
        data.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(data.positions)
    with BoltzmannGeneratorSampler(flow, context, TEMPERATURE, seed=seed) as sampler:
        ensemble = sampler.sample(n)
        n_energies = sampler.statistics["n_energies"]
    trans = is_trans(np.nan_to_num(ensemble.positions))
    ensemble = replace(ensemble, log_weights=np.where(trans, ensemble.log_weights, -np.inf))
    well = data.well.energy(torsion_angle(ensemble.positions, PHI)) / thermal_energy(TEMPERATURE)
    # The balanced target's u is larger by V_bias/kT; rows of weight zero stay so.
    balanced = np.where(np.isfinite(ensemble.log_weights), ensemble.log_weights - np.nan_to_num(well), -np.inf)
    return ensemble, balanced, n_energies


def summary(result: Any) -> str:
    """The figures that matter, as text.

    Parameters
    ----------
    result
        The `openmm_bg.analysis.demo_report.DemoResult` of `run_demo`.
    """
    lines = ["Free energy of the basin 0 < φ < 2 against the rest (trans amides), kT:"]
    for row in result.rows:
        value = f"{row.value_kT:7.3f} ± {row.error_kT:.3f}"
        lines.append(f"  {row.method:<12} {value}   {row.n_energies:>12,} energy evaluations   {row.note}")
    inside = result.flow_in_basin
    targets = {"plain": result.flow_log_weights, "balanced": result.flow_log_weights_balanced}
    lines.append(f"Effective sample size of {len(inside):,} samples: total, φ > 0 basin, the rest")
    for name, log_w in targets.items():
        shares = [effective_sample_size(w) for w in (log_w, log_w[inside], log_w[~inside])]
        lines.append(f"  {name + ' target':<16} " + "  ".join(f"{share:6.1%}" for share in shares))
    lines.append(f"{result.seconds:.0f} s in all.")
    return "\n".join(lines)


def run_demo(output: str | Path, settings: DemoSettings | None = None, progress: bool = True) -> Any:
    """The whole demo; writes ``flow.bg``, ``losses.csv`` and ``demo.html`` into ``output``.

    Parameters
    ----------
    output
        A folder; made if absent. One that holds an earlier run is refused.
    settings
        `DemoSettings`; `QUICK` for the short form.
    progress
        Show progress bars.

    Returns
    -------
    openmm_bg.analysis.demo_report.DemoResult
        Every figure that the page shows.
    """
    from openmm_bg.analysis.demo_report import DemoResult, FreeEnergyRow, demo_page

    settings = settings or DemoSettings()
    output = Path(output)
    if (output / "flow.bg").exists():
        raise InputError(f"{output} already holds a demo: choose another folder with --output, or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        result = function()
        seconds[name] = time.monotonic() - begin
        return result

    data: DemoData = timed("MD", lambda: make_data(settings, progress))
    flow: Flow = timed(
        "training",
        lambda: train(
            data.biased,
            data.topology,
            data.trajectory.positions,
            TEMPERATURE,
            log_weights=data.log_weights(data.well),
            config=training_config(settings),
            directory=output,
            progress=progress,
        ),
    )
    # The well was a means of training: who samples this artifact later means the plain force field.
    flow.metadata["system"] = compress_text(openmm.XmlSerializer.serialize(data.system))
    flow.metadata["training"]["well_kJ_mol"] = data.well.depth
    flow.save(output / "flow.bg")
    md_value = tempered_difference(data.trajectory)
    ensemble, balanced, n_sampling = timed("sampling", lambda: draw(flow, data, settings.n_samples, settings.seed + 1))
    chain: Chain = timed("MD + moves", lambda: run_chain(flow, data, settings, progress))

    phi = torsion_angle(ensemble.positions, PHI)
    inside = phi_basin(phi)
    weights_value = state_difference(ensemble.log_weights, ~inside, inside)
    visited = chain.phi[~np.isnan(chain.phi)]
    chain_value = chain_state_difference(~phi_basin(visited), phi_basin(visited))
    record = flow.metadata["training"]
    rows = [
        FreeEnergyRow("weights", *weights_value, n_sampling, f"after training with {record['n_energies']:,} energies"),
        FreeEnergyRow("MD + moves", *chain_value, chain.n_energies, f"acceptance {chain.acceptance:.0%}"),
        FreeEnergyRow("tempered MD", *md_value, data.n_energies, "pilot run included"),
    ]
    md = data.trajectory
    result = DemoResult(
        md_phi=torsion_angle(md.positions, PHI),
        md_psi=torsion_angle(md.positions, PSI),
        md_log_weights=md.log_weights,
        md_reduced_potentials=_reduced_potentials(data, md.positions[:: max(1, len(md.positions) // 20_000)]),
        flow_phi=phi,
        flow_psi=torsion_angle(ensemble.positions, PSI),
        flow_log_weights=ensemble.log_weights,
        flow_log_weights_balanced=balanced,
        flow_reduced_potentials=ensemble.reduced_potentials,
        flow_in_basin=inside,
        history=_read_history(output),
        chain_phi=chain.phi,
        rows=rows,
        figures={
            "k-hat": ensemble.khat,
            "largest weight": ensemble.max_weight,
            "samples": settings.n_samples,
            "samples without weight": ensemble.n_nonfinite,
            "acceptance": chain.acceptance,
            "longest rejection streak": chain.longest_rejection_streak,
            "cis frames, tempered MD": data.n_cis,
            "cis frames, MD + moves": chain.n_cis,
            **{f"seconds, {name}": value for name, value in seconds.items()},
            "machine": _machine(),
        },
        quick=settings.quick,
        seconds=time.monotonic() - started,
    )
    demo_page(output / "demo.html", result)
    return result


def _reduced_potentials(data: DemoData, positions: np.ndarray) -> np.ndarray:
    from openmm_bg.energy import ContextPool

    context = openmm.Context(
        data.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(data.positions)
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        return pool.energies(positions) / thermal_energy(TEMPERATURE)


def _read_history(directory: Path) -> list[dict[str, Any]]:
    from openmm_bg.training.history import read_losses

    return read_losses(directory / "losses.csv")


def _machine() -> str:
    import os
    import platform

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


class _seconds_bar:
    """A progress bar in seconds of wall time that shows how many frames there are."""

    def __init__(self, what: str, seconds: float, show: bool) -> None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
        self._bar = progress_bar(total=seconds, desc=what, bar_format=form, shown=show, leave=False)
        self._seconds = seconds

    def __enter__(self) -> Callable[[float, int], None]:
        def update(fraction: float, frames: int) -> None:
            self._bar.set_postfix_str(f"{frames} frames", refresh=False)
            self._bar.update(fraction * self._seconds - self._bar.n)

        return update

    def __exit__(self, *_: object) -> None:
        self._bar.close()
