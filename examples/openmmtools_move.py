"""An openmmtools sampling scheme with a flow's moves beside its dynamics: three lines more than without.

    python openmmtools_move.py [--iterations 200] [--proposals 8]

GHMC is Metropolised, so that the scheme as a whole has no time-step error.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from openmm import unit
from openmmtools.mcmc import GHMCMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState

import openmm_bg as bg
from openmm_bg.mcmc import BoltzmannGeneratorMove  # line one
from openmm_bg.simulate import torsion_angle

PHI = (4, 6, 8, 14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200, help="of dynamics and moves (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=300.0, help="of the state, K (default: %(default)s)")
    parser.add_argument(
        "--proposals",
        type=int,
        default=8,
        help="proposals that a step chooses from: 1 is formula D of docs/theory.md, more are formula E",
    )
    arguments = parser.parse_args()

    molecule = bg.load_alanine_dipeptide()
    state = ThermodynamicState(molecule.system, arguments.temperature * unit.kelvin)
    dynamics = GHMCMove(timestep=1 * unit.femtosecond, collision_rate=5 / unit.picosecond, n_steps=20)
    phi = np.empty(arguments.iterations)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adp.bg"
        molecule.flow.save(path)  # a flow of your own is a file already
        flow_move = BoltzmannGeneratorMove(path, n_steps=4, n_proposals=arguments.proposals)  # line two
        scheme = SequenceMove([dynamics, flow_move])  # line three, instead of dynamics alone
        sampler = MCMCSampler(state, SamplerState(molecule.positions * unit.nanometer), move=scheme)
        for i in range(arguments.iterations):
            sampler.run()
            positions = sampler.sampler_state.positions.value_in_unit(unit.nanometer)
            phi[i] = torsion_angle(np.array(positions)[None], PHI)[0]

    statistics = flow_move.statistics
    inside = (phi > 0.0) & (phi < 2.0)
    print(f"accepted {statistics['n_accepted']} of {statistics['n_proposed']} moves at {arguments.temperature:g} K")
    print(f"passages between the phi basins: {np.count_nonzero(inside[1:] != inside[:-1])}")
    print(f"share of the phi > 0 basin: {inside.mean():.3f}")


if __name__ == "__main__":
    main()
