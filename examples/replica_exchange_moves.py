"""OpenMM's own replica exchange with a flow's moves in every state, and learned swaps if there is a flow for the top.

    python replica_exchange_moves.py [--iterations 100] [--temperatures 300 350 410 480]
    python replica_exchange_moves.py --temperatures 300 480 --hot-flow adp_480K.bg
    python replica_exchange_moves.py -o run/ && python replica_exchange_moves.py -o run/ --resume

One flow serves all temperatures, with fewer acceptances the further they are from its own. With a second flow, trained
on MD at the highest temperature, the two carry conformations between bottom and top, which then need no states between.
"""

import argparse
from pathlib import Path

import numpy as np
from openmm import LangevinMiddleIntegrator, app, unit

import openmm_bg as bg
from openmm_bg.replica import FlowReplicaExchangeReporter, FlowReplicaExchangeSampler
from openmm_bg.simulate import torsion_angle

PHI = (4, 6, 8, 14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100, help="of MD, moves and exchanges (default: %(default)s)")
    parser.add_argument("--md-steps", type=int, default=50, help="per replica and iteration (default: %(default)s)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 350.0, 410.0, 480.0], help="K")
    parser.add_argument("--proposals", type=int, default=8, help="that a move chooses from (default: %(default)s)")
    parser.add_argument("--hot-flow", help="a flow of the same molecule, trained at the last temperature")
    parser.add_argument("-o", "--output", help="folder for the log, checkpoints and a record of the flows")
    parser.add_argument("--resume", action="store_true", help="continue from the folder of --output")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.output:
        parser.error("--resume continues the run in a folder: name it with --output")
    if arguments.output and not arguments.resume and Path(arguments.output).is_dir():
        if any(Path(arguments.output).iterdir()):
            parser.error(f"{arguments.output} is not empty: --resume continues its run, another one needs a new folder")

    molecule = bg.load_alanine_dipeptide()
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 1 * unit.femtoseconds)
    simulation = app.Simulation(molecule.topology, molecule.system, integrator)
    simulation.context.setPositions(molecule.positions)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin)

    states = [{"temperature": t * unit.kelvin} for t in arguments.temperatures]
    top = len(states) - 1
    learned = {"state_flows": {top: arguments.hot_flow}, "swaps": [(top, 0)]} if arguments.hot_flow else {}
    sampler = FlowReplicaExchangeSampler(
        states, simulation, arguments.md_steps, flow=molecule.flow, n_proposals=arguments.proposals, seed=1, **learned
    )
    phi = []

    def record(sampler: FlowReplicaExchangeSampler) -> None:
        lowest = sampler.replicaConformation[sampler.replicaStateIndex.index(0)]
        phi.append(torsion_angle(lowest.getPositions(asNumpy=True)._value[None], PHI)[0])

    sampler.reporters.append(record)
    if arguments.output:
        files = FlowReplicaExchangeReporter(
            arguments.output, 1, sampler, energy=True, checkpoints=True, resume=arguments.resume
        )
        sampler.reporters.append(files)
    sampler.simulate(arguments.iterations)

    for temperature, counts in zip(arguments.temperatures, sampler.flow_statistics, strict=True):
        print(f"{temperature:g} K: accepted {counts['n_accepted']} of {counts['n_proposed']} moves")
    for pair, counts in sampler.swap_statistics.items():
        print(f"states {pair}: accepted {counts['n_accepted']} of {counts['n_proposed']} learned swaps")
    inside = (np.array(phi) > 0.0) & (np.array(phi) < 2.0)
    print(f"passages between the phi basins at {arguments.temperatures[0]:g} K: {(inside[1:] != inside[:-1]).sum()}")
    print(f"share of the phi > 0 basin: {inside.mean():.3f}")


if __name__ == "__main__":
    main()
