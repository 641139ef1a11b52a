"""Free energy of the φ basins of alanine dipeptide: from a flow's weights, MD with its moves, and tempered MD.

    python free_energy_basins.py [--quick]

F(0 < φ < 2 rad) - F(rest), trans amides, in vacuum at 300 K. Weights answer from samples alone (formula A of
docs/theory.md), moves carry MD over the barrier (D). The reference knows no flow: replica exchange in temperature under
a well in φ that about balances the basins, its bias taken away by weights. (Umbrella windows in φ would not do: where
they cross its barriers, ψ has to cross one of its own.) z, at the end, is the deviation from the reference in standard
errors of the two together.
"""

import argparse
import math

import numpy as np
import openmm
from tqdm.auto import tqdm

import openmm_bg as bg
from openmm_bg import free_energy
from openmm_bg.analysis.torsions import dihedral_atoms, is_trans, phi_basin, torsion
from openmm_bg.simulate import TorsionBias, temperature_ladder, tempered_md
from openmm_bg.weights import effective_sample_size

TEMPERATURE = 300.0


def context_of(system: openmm.System, positions: np.ndarray, seed: int) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.002)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    context.setVelocitiesToTemperature(TEMPERATURE, seed)
    return context


def line(name: str, found: tuple[float, float], energies: int) -> str:
    return f"{name:<16} {found[0]:.3f} ± {found[1]:.3f} kT   {energies:>10,} energies"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, and errors to match")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    n_samples, n_rounds, n_iterations = (8_000, 700, 250) if arguments.quick else (100_000, 3_000, 9_000)
    md_steps, moves, exchange = 10, 4, 200

    molecule = bg.load_alanine_dipeptide()
    atoms = dihedral_atoms(molecule.topology)

    def basins(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which frames lie in the rest, and which in the basin; cis amides in neither."""
        inside, trans = phi_basin(torsion(x, atoms["phi"][0])), is_trans(x, atoms["omega"])
        return ~inside & trans, inside & trans

    # weights
    context = context_of(molecule.system, molecule.positions, arguments.seed)
    with bg.BoltzmannGeneratorSampler(
        molecule.flow, context, seed=arguments.seed, platform="Reference", n_workers=1
    ) as sampler:
        ensemble = sampler.sample(n_samples)
        rest, basin = basins(np.nan_to_num(ensemble.positions))
        by_weights = free_energy.state_difference(ensemble.log_weights, rest, basin)
        worth = [effective_sample_size(ensemble.log_weights[mask]) * mask.sum() for mask in (rest, basin)]
        n_weights = sampler.statistics["n_energies"]

        # MD with moves
        frames = np.empty((n_rounds, *molecule.positions.shape))
        for row in tqdm(frames, desc="MD + moves", unit="round", leave=False):
            context.getIntegrator().step(md_steps)
            sampler.step(moves)
            row[:] = context.getState(positions=True).getPositions(asNumpy=True)._value
        chain = basins(frames)
        by_moves = free_energy.chain_state_difference(*chain)
        # two more a round: the comparison of the sampler's Context with ours
        n_moves = sampler.statistics["n_energies"] - n_weights + n_rounds * (md_steps + 2)

    # tempered MD
    with tqdm(total=n_iterations, desc="tempered MD", unit="exchange", leave=False) as bar:
        tempered = tempered_md(
            molecule.system,
            molecule.topology,
            molecule.positions,
            temperature_ladder(TEMPERATURE, 900.0, 5),
            iterations=n_iterations,
            bias=TorsionBias(atoms["phi"][0], centre=1.1, sharpness=3.0, depth=12.0),
            n_ladders=1,
            steps_per_exchange=exchange,
            steps_per_frame=exchange,
            seed=arguments.seed,
            progress=lambda fraction, frames: bar.update(round(fraction * n_iterations) - bar.n),
        )
    visited = basins(tempered.positions)
    reference = free_energy.chain_state_difference(*visited, tempered.log_weights)

    def passages(inside: np.ndarray) -> int:
        return int(np.count_nonzero(inside[1:] != inside[:-1]))

    print("F(0 < φ < 2) - F(rest) of alanine dipeptide in vacuum at 300 K, trans amides")
    print(line("flow, weights", by_weights, n_weights), end="   ")
    print(f"worth {worth[0]:.0f} samples outside and {worth[1]:.0f} inside, k-hat {ensemble.khat:.2f}")
    print(line("MD + moves", by_moves, n_moves), f"  {passages(chain[1])} passages")
    print(line("tempered MD", reference, tempered.n_energies), f"  {passages(visited[1])} passages")
    for name, (value, error) in (("weights", by_weights), ("moves", by_moves)):
        print(f"z({name}) = {(value - reference[0]) / math.hypot(error, reference[1]):.2f}")


if __name__ == "__main__":
    main()
