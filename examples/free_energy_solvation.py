"""Free energy of moving alanine dipeptide from vacuum into implicit solvent (OBC2), from a flow trained in vacuum.

    python free_energy_solvation.py [--quick]

The same samples of the flow get weights in both Systems, and what they share cancels. Beside it, the same with MD
frames on the solvent's side alone. The reference knows no flow: MD at five strengths of the solvent, joined by MBAR.

MD at 300 K stays where it starts, φ outside (0, 2) rad and both amides trans: all three estimates are of that state.
z, at the end, is an estimate's deviation from the reference in standard errors of the two together.
"""

import argparse
import copy
import math
from dataclasses import replace

import numpy as np
import openmm
from openmm import app
from openmmtools.testsystems import get_data_filename
from tqdm.auto import tqdm

import openmm_bg as bg
from openmm_bg import free_energy
from openmm_bg.analysis.quality import frame_log_weights
from openmm_bg.analysis.torsions import dihedral_atoms, is_trans, phi_basin, torsion

TEMPERATURE = 300.0
KT = openmm.unit.MOLAR_GAS_CONSTANT_R.value_in_unit(openmm.unit.kilojoule_per_mole / openmm.unit.kelvin) * TEMPERATURE


def solvated(system: openmm.System, scale: float) -> openmm.System:
    """The System with a share of the OBC2 solvent: same atoms, masses and constraints, as formula J asks for."""
    parameters = app.AmberPrmtopFile(get_data_filename("data/alanine-dipeptide-gbsa/alanine-dipeptide.prmtop"))
    whole = parameters.createSystem(implicitSolvent=app.OBC2)
    solvent = copy.deepcopy(next(f for f in whole.getForces() if isinstance(f, openmm.GBSAOBCForce)))
    # The energy is quadratic in the charges and linear in the surface tension.
    solvent.setSurfaceAreaEnergy(solvent.getSurfaceAreaEnergy() * scale)
    for i in range(solvent.getNumParticles()):
        charge, radius, factor = solvent.getParticleParameters(i)
        solvent.setParticleParameters(i, charge * math.sqrt(scale), radius, factor)
    result = copy.deepcopy(system)
    result.addForce(solvent)
    return result


def context_of(system: openmm.System, positions: np.ndarray, seed: int) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.002)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    context.setVelocitiesToTemperature(TEMPERATURE, seed)
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
    n_samples, n_frames, every = (8_000, 300, 100) if arguments.quick else (100_000, 2_500, 200)

    molecule = bg.load_alanine_dipeptide()
    strengths = [0.0, 0.25, 0.5, 0.75, 1.0]
    systems = [solvated(molecule.system, scale) for scale in strengths]

    # MD at every strength. Energies are linear in it, so that two of them per frame make the matrix of MBAR.
    vacuum, solvent = (context_of(systems[i], molecule.positions, arguments.seed) for i in (0, -1))
    frames = []
    for k, system in enumerate(tqdm(systems, desc="MD", unit="strength", leave=False)):
        context = context_of(system, molecule.positions, arguments.seed + k)
        context.getIntegrator().step(20 * every)
        x = np.empty((n_frames, *molecule.positions.shape))
        for row in x:
            context.getIntegrator().step(every)
            row[:] = context.getState(positions=True).getPositions(asNumpy=True)._value
        frames.append(x[in_state(molecule.topology, x)])
    md_energies = len(systems) * (n_frames + 20) * every

    ends = []
    for x in tqdm(frames, desc="energies", unit="strength", leave=False):
        pair = np.empty((2, len(x)))
        for i, positions in enumerate(x):
            for j, context in enumerate((vacuum, solvent)):
                context.setPositions(positions)
                pair[j, i] = context.getState(energy=True).getPotentialEnergy()._value / KT
        ends.append(pair)
    kept = [free_energy.decorrelated(pair[1] - pair[0], pair[0]) for pair in ends]
    pooled = np.concatenate([pair[:, rows] for pair, rows in zip(ends, kept, strict=True)], axis=1)
    u = [pooled[0] + scale * (pooled[1] - pooled[0]) for scale in strengths]
    many = free_energy.mbar(u, [len(rows) for rows in kept])
    reference = many.between(0, len(strengths) - 1)
    md_energies += 2 * sum(len(x) for x in frames)

    options = {"seed": arguments.seed, "platform": "Reference", "n_workers": 1}
    with (
        bg.BoltzmannGeneratorSampler(molecule.flow, vacuum, **options) as here,
        bg.BoltzmannGeneratorSampler(molecule.flow, solvent, **options) as there,
    ):
        in_vacuum = here.sample(n_samples)
        inside = in_state(molecule.topology, np.nan_to_num(in_vacuum.positions))
        in_vacuum.log_weights[~inside] = -np.inf
        in_solvent = free_energy.reweight(in_vacuum, there)
        common = free_energy.difference(in_vacuum, in_solvent)
        n_flow = here.statistics["n_energies"] + there.statistics["n_energies"]

        x = frames[-1][kept[-1]]
        log_w_md = [frame_log_weights(molecule.flow, s.coordinates, s.target, x)[0] for s in (here, there)]
        log_w_flow = [in_vacuum.log_weights, in_solvent.log_weights]
        states = free_energy.mbar_with_flow(log_w_flow, [None, np.stack(log_w_md)])
        # The vacuum has no frames of its own: the overlap that counts is that of the flow with MD in the solvent.
        one_side = replace(states.between(1, 2), overlap=states.between(0, 2).overlap)
        n_both = here.statistics["n_energies"] + there.statistics["n_energies"] + (n_frames + 20) * every

    print("F(OBC2) - F(vacuum) of alanine dipeptide at 300 K, φ outside (0, 2) rad")
    print(line("flow, both sides", common, n_flow))
    print(f"{'':<22} worth {common.effective:.0f} samples in the solvent, k-hat {common.khat:.2f}")
    print(line("flow + MD in solvent", one_side, n_both))
    print(line("MD at 5 strengths", reference, md_energies))
    print(f"{'':<22} overlap of neighbours at least {min(np.diag(many.overlap_matrix, 1)):.3f}")
    for name, found in (("flow", common), ("flow + MD", one_side)):
        z = (found.delta_f - reference.delta_f) / math.hypot(found.error, reference.error)
        print(f"z({name}) = {z:.2f}")


if __name__ == "__main__":
    main()
