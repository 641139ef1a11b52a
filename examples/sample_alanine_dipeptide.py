"""Exact samples of alanine dipeptide in seconds, with the flow that ships with the package.

    python sample_alanine_dipeptide.py [-n 10000] [-o out.dcd]

Prints what the weights are worth and the free energy of the φ > 0 basin (C7ax) against the rest. Plain MD at 300 K
would have to wait for that basin for hundreds of nanoseconds.
"""

import argparse

import numpy as np
import openmm
from openmm import unit

import openmm_bg as bg
from openmm_bg.free_energy import state_difference
from openmm_bg.simulate import torsion_angle

PHI = (4, 6, 8, 14)  # C, N, CA, C in the shipped molecule's atom order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=10_000, help="number of samples (default: %(default)s)")
    parser.add_argument("-o", "--output", help="write frames of equal weight here, in any format of MDTraj")
    arguments = parser.parse_args()

    molecule = bg.load_alanine_dipeptide()
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 2 * unit.femtoseconds)
    context = openmm.Context(molecule.system, integrator)
    context.setPositions(molecule.positions)

    with bg.BoltzmannGeneratorSampler(molecule.flow, context, seed=1) as sampler:
        ensemble = sampler.sample(arguments.n)
        energies = sampler.statistics["n_energies"]

    print(f"{len(ensemble)} samples for {energies} energy evaluations, worth {ensemble.ess * len(ensemble):.0f}")
    print(f"Pareto k-hat {ensemble.khat:.2f}, largest weight {ensemble.max_weight:.2g}, label {ensemble.label}")

    phi = torsion_angle(ensemble.positions, PHI)
    inside = (phi > 0.0) & (phi < 2.0)
    value, error = state_difference(ensemble.log_weights, ~inside, inside)
    print(f"F(phi > 0) - F(rest) = {value:.3f} ± {error:.3f} kT")

    # Any observable: a function of positions [m, N, 3] in nm that returns one number, or one array, per frame.
    mean, error = ensemble.expectation(lambda x: np.linalg.norm(x[:, 1] - x[:, 18], axis=-1))
    print(f"end-to-end distance (methyl carbons) = {mean:.4f} ± {error:.4f} nm")

    if arguments.output:
        # to_mdtraj() holds every sample and goes with ensemble.log_weights; frames of equal weight need neither.
        trajectory = ensemble.to_mdtraj()
        trajectory.xyz = ensemble.resample(len(ensemble), seed=2)
        trajectory.save(arguments.output)
        print(f"frames of equal weight written to {arguments.output}")


if __name__ == "__main__":
    main()
