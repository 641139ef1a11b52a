"""MD with exact Metropolis moves between its steps, on the Context of an openmm.app.Simulation.

    python metropolis_moves.py [--rounds 200] [--proposals 1]

The moves cross the barrier, the MD moves everything that a move keeps; together they sample the force field. The
Langevin integrator's own time-step error stays: compare two time steps when it matters.
"""

import argparse

import numpy as np
from openmm import LangevinMiddleIntegrator, app, unit

import openmm_bg as bg
from openmm_bg.simulate import torsion_angle

PHI = (4, 6, 8, 14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="rounds of MD and moves (default: %(default)s)")
    parser.add_argument("--md-steps", type=int, default=100, help="MD steps a round (default: %(default)s)")
    parser.add_argument("--moves", type=int, default=4, help="Metropolis steps a round (default: %(default)s)")
    parser.add_argument(
        "--proposals",
        type=int,
        default=1,
        help="proposals that a Metropolis step chooses from: 1 is formula D of docs/theory.md, more are formula E",
    )
    arguments = parser.parse_args()

    molecule = bg.load_alanine_dipeptide()
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 2 * unit.femtoseconds)
    simulation = app.Simulation(molecule.topology, molecule.system, integrator)
    simulation.context.setPositions(molecule.positions)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin)

    phi = np.empty(arguments.rounds)
    with bg.BoltzmannGeneratorSampler(
        molecule.flow, simulation.context, n_proposals=arguments.proposals, seed=1
    ) as sampler:
        for i in range(arguments.rounds):
            simulation.step(arguments.md_steps)
            sampler.step(arguments.moves)  # on acceptance new positions, otherwise nothing changes
            state = simulation.context.getState(positions=True)
            phi[i] = torsion_angle(state.getPositions(asNumpy=True)._value[None], PHI)[0]
        statistics = sampler.statistics

    inside = (phi > 0.0) & (phi < 2.0)
    print(f"accepted {statistics['n_accepted']} of {statistics['n_proposed']} moves")
    print(f"longest streak of rejections: {statistics['longest_rejection_streak']}")
    print(f"passages between the phi basins: {np.count_nonzero(inside[1:] != inside[:-1])}")
    print(f"share of the phi > 0 basin: {inside.mean():.3f}")


if __name__ == "__main__":
    main()
