"""What becomes of MD between moves when velocities are carried over, or drawn anew, as rows of docs/benchmarks.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/velocities.py
    OMP_NUM_THREADS=1 python tests/benchmarks/velocities.py --ns 5 --moves 15000

Alanine dipeptide on the Reference platform: MD alone; MD whose velocities are drawn anew every so many steps, without
any move; MD with a latent move every so many steps that draws them anew, or carries them over as the package does. The
mean potential energy is held against that of weighted samples of the shipped flow, which know no time step. Errors:
blocks of the trajectory, and the delta method for weights.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

import openmm_bg as bg
from openmm_bg.energy import thermal_energy

KELVIN = 300.0
FRICTION = 1.0
BLOCKS = 50
EQUILIBRATION_PS = 20.0


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of a time series, and its error from blocks."""
    blocks = np.array([block.mean() for block in np.array_split(values, BLOCKS)])
    return float(blocks.mean()), float(blocks.std(ddof=1) / BLOCKS**0.5)


def trajectory(context: openmm.Context, n: int, every: int, seed: int, act: Callable[[], object]) -> np.ndarray:
    """n potential energies, kT, every so many steps of MD; ``act`` is called after each is read."""
    integrator = context.getIntegrator()
    step = integrator.getStepSize()._value
    context.setVelocitiesToTemperature(KELVIN, seed + 1)
    integrator.step(int(EQUILIBRATION_PS / step))
    found = np.empty(n)
    for k in tqdm(range(len(found)), leave=False):
        integrator.step(every)
        # Read before the move, which would put the positions right again that MD has heated.
        found[k] = context.getState(energy=True).getPotentialEnergy()._value
        act()
    return found / thermal_energy(KELVIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ns", type=float, default=4.0, help="of every trajectory without moves")
    parser.add_argument("--moves", type=int, default=15_000, help="of every trajectory with moves")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    molecule = bg.load_alanine_dipeptide()
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
    w, u = w[kept] / w.sum(), ensemble.reduced_potentials[kept]
    mean = float(w @ u)
    error = float(np.sqrt((w**2 * (u - mean) ** 2).sum()))
    print("| time step, fs | what happens | steps between | mean energy, kT | above the weights', kT |")
    print(f"|---|---|---|---|---|\n| | weights of {options.samples} samples | | {mean:.2f} ± {error:.2f} | |")

    def row(step: float, every: int, what: str, run: Callable[[openmm.Context], np.ndarray]) -> None:
        value, spread = mean_and_error(run(context_of(step)))
        gap = f"{value - mean:+.2f} ± {np.hypot(spread, error):.2f}"
        print(f"| {1e3 * step:g} | {what} | {every} | {value:.2f} ± {spread:.2f} | {gap} |", flush=True)

    def length(context: openmm.Context) -> int:
        return int(1e3 * options.ns / context.getIntegrator().getStepSize()._value / every)

    def alone(context: openmm.Context) -> np.ndarray:
        return trajectory(context, length(context), every, options.seed, lambda: None)

    def drawn(context: openmm.Context) -> np.ndarray:
        seeds = itertools.count(options.seed + 2)
        draw = functools.partial(context.setVelocitiesToTemperature, KELVIN)
        return trajectory(context, length(context), every, options.seed, lambda: draw(next(seeds)))

    def moved(context: openmm.Context, carried: bool) -> np.ndarray:
        seeds = itertools.count(options.seed + 2)
        with sampler_on(context) as sampler:
            move = bg.LatentMove(sampler, a=0.6, width=0.6)

            def act() -> None:
                if move.step(1)["accepted"] and not carried:
                    context.setVelocitiesToTemperature(KELVIN, next(seeds))

            return trajectory(context, options.moves, every, options.seed, act)

    every = 100
    row(0.002, every, "MD alone", alone)
    for step, every in ((0.002, 10), (0.002, 100), (0.002, 500), (0.001, 20)):
        row(step, every, "velocities drawn anew, no move", drawn)
    for every in (10, 100):
        row(0.002, every, "latent moves, velocities drawn anew", functools.partial(moved, carried=False))
        row(0.002, every, "latent moves, velocities carried over", functools.partial(moved, carried=True))


if __name__ == "__main__":
    main()
