"""Exact flow moves while ``simulation.step`` runs: one line more than plain MD, beside the usual reporters.

    python moves_with_reporter.py [--steps 20000] [--interval 200] [--move latent]

``independence`` draws every coordinate afresh (formula D of docs/theory.md), ``latent`` steps from where the chain
stands (formula F), ``nonequilibrium`` relaxes the draw on its way to the force field (formula G). All three sample the
same ensemble; what differs is the price of a move and how often one is accepted.
"""

import argparse
import sys

import numpy as np
from openmm import LangevinMiddleIntegrator, app, unit

import openmm_bg as bg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="MD steps (default: %(default)s)")
    parser.add_argument("--interval", type=int, default=200, help="MD steps between moves (default: %(default)s)")
    parser.add_argument(
        "--move",
        choices=("independence", "latent", "nonequilibrium"),
        default="independence",
        help="kind of move (default: %(default)s)",
    )
    arguments = parser.parse_args()

    molecule = bg.load_alanine_dipeptide()
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 2 * unit.femtoseconds)
    simulation = app.Simulation(molecule.topology, molecule.system, integrator)
    simulation.context.setPositions(molecule.positions)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin)

    with bg.BoltzmannGeneratorSampler(molecule.flow, simulation.context, seed=1) as sampler:
        move: bg.BoltzmannGeneratorSampler | bg.LatentMove | bg.NonequilibriumMove = sampler
        if arguments.move == "latent":
            move = bg.LatentMove(sampler)
            move.burn_in(20)  # adapts the steps; left out of the production run below
        elif arguments.move == "nonequilibrium":
            move = bg.NonequilibriumMove(sampler, np.linspace(0, 1, 4))
        report = app.StateDataReporter(
            sys.stdout, arguments.interval, step=True, potentialEnergy=True, temperature=True
        )
        simulation.reporters.append(report)
        simulation.reporters.append(bg.MoveReporter(move, arguments.interval))
        simulation.step(arguments.steps)
        statistics = move.statistics

    print(f"accepted {statistics['n_accepted']} of {statistics['n_proposed']} moves")
    print(f"longest streak of rejections: {statistics['longest_rejection_streak']}")


if __name__ == "__main__":
    main()
