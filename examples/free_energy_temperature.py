"""Free energy of alanine dipeptide in vacuum from 300 to 400 K, from a flow trained at 300 K.

    python free_energy_temperature.py [--quick]

The difference is that of -log Z = -log ∫ exp(-U/kT), in kT of either state; momenta are left out. The same samples of
the flow carry weights at both temperatures and need no further energy. Beside it, the same with MD frames at 400 K
alone. The reference knows no flow: MD at five temperatures, joined by MBAR.

MD of this length stays where it starts, φ outside (0, 2) rad and both amides trans, or leaves it for moments: all
three estimates are of that state.
z, at the end, is an estimate's deviation from the reference in standard errors of the two together.
"""

import argparse
import math
from dataclasses import replace

import numpy as np
import openmm
from openmm import app
from tqdm.auto import tqdm

import openmm_bg as bg
from openmm_bg import free_energy
from openmm_bg.analysis.quality import frame_log_weights
from openmm_bg.analysis.torsions import dihedral_atoms, is_trans, phi_basin, torsion
from openmm_bg.energy import BOLTZMANN

LOW, HIGH = 300.0, 400.0


def context_of(molecule: object, temperature: float, seed: int) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.002)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(molecule.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(temperature, seed)
    return context


def in_state(topology: app.Topology, x: np.ndarray) -> np.ndarray:
    """Which frames lie where MD stays."""
    atoms = dihedral_atoms(topology)
    return ~phi_basin(torsion(x, atoms["phi"][0])) & is_trans(x, atoms["omega"])


def line(name: str, found: free_energy.FreeEnergy, energies: int) -> str:
    value = f"{name:<22} {found.delta_f:8.3f} ± {found.error:.3f} kT"
    return f"{value}   {energies:>10,} energies   overlap {found.overlap:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, and errors to match")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    n_samples, n_frames, every = (8_000, 500, 100) if arguments.quick else (100_000, 10_000, 200)

    molecule = bg.load_alanine_dipeptide()
    temperatures = np.linspace(LOW, HIGH, 5)
    frames, energies = [], []
    for k, temperature in enumerate(tqdm(temperatures, desc="MD", unit="temperature", leave=False)):
        context = context_of(molecule, temperature, arguments.seed + k)
        context.getIntegrator().step(20 * every)
        x, energy = np.empty((n_frames, *molecule.positions.shape)), np.empty(n_frames)
        for i in range(n_frames):
            context.getIntegrator().step(every)
            state = context.getState(positions=True, energy=True)
            x[i], energy[i] = state.getPositions(asNumpy=True)._value, state.getPotentialEnergy()._value
        inside = in_state(molecule.topology, x)
        frames.append(x[inside])
        energies.append(energy[inside])
    per_temperature = (n_frames + 20) * every + n_frames

    # u = U/kT of every frame at every temperature: one energy serves all.
    kept = [free_energy.decorrelated(energy) for energy in energies]
    pooled = np.concatenate([energy[rows] for energy, rows in zip(energies, kept, strict=True)])
    many = free_energy.mbar(pooled / (BOLTZMANN * temperatures[:, None]), [len(rows) for rows in kept])
    reference = many.between(0, len(temperatures) - 1)

    options = {"seed": arguments.seed, "platform": "Reference", "n_workers": 1}
    context = context_of(molecule, LOW, arguments.seed)
    with (
        bg.BoltzmannGeneratorSampler(molecule.flow, context, LOW, **options) as low,
        bg.BoltzmannGeneratorSampler(molecule.flow, context, HIGH, **options) as high,
    ):
        cold = low.sample(n_samples)
        cold.log_weights[~in_state(molecule.topology, np.nan_to_num(cold.positions))] = -np.inf
        hot = free_energy.at_temperature(cold, LOW, HIGH)
        common = free_energy.difference(cold, hot)
        n_flow = low.statistics["n_energies"]

        x = frames[-1][kept[-1]]
        log_w_md = [frame_log_weights(molecule.flow, s.coordinates, s.target, x)[0] for s in (low, high)]
        states = free_energy.mbar_with_flow([cold.log_weights, hot.log_weights], [None, np.stack(log_w_md)])
        # 300 K has no frames of its own: the overlap that counts is that of the flow with MD at 400 K.
        one_side = replace(states.between(1, 2), overlap=states.between(0, 2).overlap)
        n_both = low.statistics["n_energies"] + high.statistics["n_energies"] + per_temperature

    print("f(400 K) - f(300 K) of alanine dipeptide in vacuum, φ outside (0, 2) rad")
    print(line("flow, both sides", common, n_flow))
    print(f"{'':<22} worth {common.effective:.0f} samples at 400 K, k-hat {common.khat:.2f}")
    print(line("flow + MD at 400 K", one_side, n_both))
    print(line("MD at 5 temperatures", reference, len(temperatures) * per_temperature))
    print(f"{'':<22} overlap of neighbours at least {min(np.diag(many.overlap_matrix, 1)):.3f}")
    for name, found in (("flow", common), ("flow + MD", one_side)):
        z = (found.delta_f - reference.delta_f) / math.hypot(found.error, reference.error)
        print(f"z({name}) = {z:.2f}")


if __name__ == "__main__":
    main()
