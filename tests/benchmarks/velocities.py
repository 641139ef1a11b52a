"""What becomes of MD between moves when velocities are carried over, or drawn anew, as rows of docs/benchmarks.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/velocities.py
    OMP_NUM_THREADS=1 python tests/benchmarks/velocities.py --ns 5 --moves 15000

Alanine dipeptide on the Reference platform: MD alone; MD whose velocities are drawn anew every so many steps, without
any move; MD with a latent move every so many steps that draws them anew, carries them over without turning them, or
carries them over as the package does. The mean potential energy, and that of the stiff terms, bonds and angles, are
held against those of weighted samples of the shipped flow, which know no time step. Errors: blocks of the trajectory,
and the delta method for weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from tqdm.auto import tqdm

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

import openmm_bg as bg
import openmm_bg.velocities
from openmm_bg.energy import thermal_energy

KELVIN = 300.0
FRICTION = 1.0
BLOCKS = 50
EQUILIBRATION_PS = 20.0
STIFF = 1  # their force group


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of a time series, and its error from blocks."""
    blocks = np.array([block.mean() for block in np.array_split(values, BLOCKS)])
    return float(blocks.mean()), float(blocks.std(ddof=1) / BLOCKS**0.5)


def energies(context: openmm.Context) -> np.ndarray:
    """All of it, that of bonds and angles, and the rest [3], kT."""
    every, stiff = (context.getState(energy=True, groups=g).getPotentialEnergy()._value for g in (-1, {STIFF}))
    return np.array([every, stiff, every - stiff]) / thermal_energy(KELVIN)


def trajectory(context: openmm.Context, n: int, every: int, seed: int, act: Callable[[], object]) -> np.ndarray:
    """`energies` [n, 3] every so many steps of MD; ``act`` is called after each is read."""
    integrator = context.getIntegrator()
    step = integrator.getStepSize()._value
    context.setVelocitiesToTemperature(KELVIN, seed + 1)
    integrator.step(int(EQUILIBRATION_PS / step))
    found = np.empty((n, 3))
    for k in tqdm(range(len(found)), leave=False):
        integrator.step(every)
        # Read before the move, which would put the positions right again that MD has heated.
        found[k] = energies(context)
        act()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ns", type=float, default=4.0, help="of every trajectory without moves")
    parser.add_argument("--moves", type=int, default=15_000, help="of every trajectory with moves")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    molecule = bg.load_alanine_dipeptide()
    for force in molecule.system.getForces():
        force.setForceGroup(STIFF * isinstance(force, (openmm.HarmonicBondForce, openmm.HarmonicAngleForce)))
    reference = openmm.Platform.getPlatformByName("Reference")

    def context_of(step: float) -> openmm.Context:
        integrator = openmm.LangevinMiddleIntegrator(KELVIN, FRICTION, step)
        integrator.setRandomNumberSeed(options.seed + 1)
        context = openmm.Context(openmm.XmlSerializer.clone(molecule.system), integrator, reference)
        context.setPositions(molecule.positions)
        return context

    def sampler_on(context: openmm.Context) -> bg.BoltzmannGeneratorSampler:
        return bg.BoltzmannGeneratorSampler(
            molecule.flow, context, seed=options.seed, platform="Reference", n_workers=1
        )

    with sampler_on(context_of(0.002)) as sampler:
        ensemble = sampler.sample(options.samples)
    w = np.exp(ensemble.log_weights - ensemble.log_weights.max())
    kept = w > 0
    w = w[kept] / w.sum()
    frames, found = context_of(0.002), []
    for x in tqdm(ensemble.positions[kept], leave=False):
        frames.setPositions(x)
        found.append(energies(frames))
    u = np.array(found)
    mean = w @ u
    error = np.sqrt(w**2 @ (u - mean) ** 2)
    print(f"Above {mean[0]:.2f} ± {error[0]:.2f} kT, which {options.samples} weighted samples have:\n")
    print("| time step, fs | what happens | steps between | all energy, kT | bonds and angles | the rest |")
    print("|---|---|---|---|---|---|")

    def row(step: float, every: int, what: str, run: Callable[[openmm.Context], np.ndarray]) -> None:
        cells = []
        for values, at, spread_at in zip(run(context_of(step)).T, mean, error, strict=True):
            value, spread = mean_and_error(values)
            cells.append(f"{value - at:+.2f} ± {np.hypot(spread, spread_at):.2f}")
        print(f"| {1e3 * step:g} | {what} | {every} | {' | '.join(cells)} |", flush=True)

    def length(context: openmm.Context) -> int:
        return int(1e3 * options.ns / context.getIntegrator().getStepSize()._value / every)

    def alone(context: openmm.Context) -> np.ndarray:
        return trajectory(context, length(context), every, options.seed, lambda: None)

    def drawn(context: openmm.Context) -> np.ndarray:
        seeds = itertools.count(options.seed + 2)
        draw = functools.partial(context.setVelocitiesToTemperature, KELVIN)
        return trajectory(context, length(context), every, options.seed, lambda: draw(next(seeds)))

    def moved(context: openmm.Context, how: str) -> np.ndarray:
        seeds = itertools.count(options.seed + 2)
        straight = mock.patch.object(openmm_bg.velocities, "_turned", lambda v, *_: v)
        with sampler_on(context) as sampler, straight if how == "straight" else contextlib.nullcontext():
            move = bg.LatentMove(sampler, a=0.6, width=0.6)

            def act() -> None:
                if move.step(1)["accepted"] and how == "drawn":
                    context.setVelocitiesToTemperature(KELVIN, next(seeds))

            return trajectory(context, options.moves, every, options.seed, act)

    every = 100
    row(0.002, every, "MD alone", alone)
    for step, every in ((0.002, 10), (0.002, 100), (0.002, 500), (0.001, 20)):
        row(step, every, "velocities drawn anew, no move", drawn)
    for every in (10, 100):
        row(0.002, every, "latent moves, velocities drawn anew", functools.partial(moved, how="drawn"))
        row(0.002, every, "latent moves, carried over, not turned", functools.partial(moved, how="straight"))
        row(0.002, every, "latent moves, velocities carried over", functools.partial(moved, how="turned"))


if __name__ == "__main__":
    main()
