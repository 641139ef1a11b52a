"""How MD that begins with fresh velocities again and again heats a molecule, as rows of docs/benchmarks.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/velocity_redraws.py
    OMP_NUM_THREADS=1 python tests/benchmarks/velocity_redraws.py --ns 10

A move that is accepted redraws all velocities. OpenMM's integrators keep velocities of half a step earlier, which a
finite time step correlates with the forces; fresh ones are not. Here no move is made at all: alanine dipeptide runs on
the Reference platform, velocities are drawn anew every so many steps, and the mean potential energy is held against
that of weighted samples of the shipped flow, which know no time step. Errors: blocks of the trajectory, and the delta
method for weights.
"""

from __future__ import annotations

import argparse

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


def trajectory(context: openmm.Context, ns: float, every: int, redraw: bool, seed: int) -> np.ndarray:
    """Potential energies, kT, every so many steps."""
    integrator = context.getIntegrator()
    step = integrator.getStepSize()._value
    context.setVelocitiesToTemperature(KELVIN, seed + 1)
    integrator.step(int(EQUILIBRATION_PS / step))
    found = np.empty(int(1e3 * ns / step / every))
    for k in tqdm(range(len(found)), leave=False):
        integrator.step(every)
        found[k] = context.getState(energy=True).getPotentialEnergy()._value
        if redraw:
            context.setVelocitiesToTemperature(KELVIN, seed + 2 + k)
    return found / thermal_energy(KELVIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ns", type=float, default=4.0, help="of every trajectory")
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

    with bg.BoltzmannGeneratorSampler(
        molecule.flow, context_of(0.002), seed=options.seed, platform="Reference", n_workers=1
    ) as sampler:
        ensemble = sampler.sample(options.samples)
    w = np.exp(ensemble.log_weights - ensemble.log_weights.max())
    kept = w > 0
    w, u = w[kept] / w.sum(), ensemble.reduced_potentials[kept]
    mean = float(w @ u)
    error = float(np.sqrt((w**2 * (u - mean) ** 2).sum()))
    print("| time step, fs | steps between redraws | mean energy, kT | above the weights', kT |\n|---|---|---|---|")
    print(f"| weights of {options.samples} samples | | {mean:.2f} ± {error:.2f} | |")
    rows = [(0.002, 100, False), *((0.002, every, True) for every in (10, 20, 100, 500)), (0.001, 20, True)]
    for step, every, redraw in rows:
        value, spread = mean_and_error(trajectory(context_of(step), options.ns, every, redraw, options.seed))
        between = str(every) if redraw else "never"
        gap = f"{value - mean:+.2f} ± {np.hypot(spread, error):.2f}"
        print(f"| {1e3 * step:g} | {between} | {value:.2f} ± {spread:.2f} | {gap} |", flush=True)


if __name__ == "__main__":
    main()
