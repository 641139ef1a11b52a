"""The flow's molecule among other particles of a System: which they are, and what must not tie them to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # noqa: F401  (before OpenMM, or its torch plugin does not load)
from numpy.typing import NDArray

import openmm  # isort: skip

from openmm_bg.artifact import Flow
from openmm_bg.errors import InputError


def check_atoms(atoms: Sequence[int]) -> list[int]:
    """Particle indices as a list of ints.

    Raises
    ------
    InputError
        They are not whole numbers from 0 on, all different.
    """
    try:
        found = list(atoms)
    except TypeError as error:
        raise InputError(f"atom_subset must be a list of particle indices, got {atoms!r}.") from error
    if any(isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)) or k < 0 for k in found):
        raise InputError("atom_subset must be a list of particle indices, whole numbers from 0 on.")
    if not found or len(set(found)) < len(found):
        raise InputError("atom_subset must name each of the molecule's particles once.")
    return [int(k) for k in found]


def require_molecule(context: openmm.Context, atoms: Sequence[int]) -> None:
    """Refuse a periodic Context that does not see that these particles are one molecule.

    A barostat scales the centres of what it takes for molecules, and periodic wrapping moves them: either would tear
    the flow's molecule apart, and the internal coordinates of the pieces mean nothing.

    Raises
    ------
    InputError
        Two of the particles belong to different molecules.
    """
    if not context.getSystem().usesPeriodicBoundaryConditions():
        return
    home = next(set(molecule) for molecule in context.getMolecules() if atoms[0] in molecule)
    strangers = [k for k in atoms if k not in home]
    if strangers:
        raise InputError(
            f"In this periodic System particles {atoms[0]} and {strangers[0]} are different molecules, which a "
            "barostat or wrapping would part: give the System the bonds of the flow's molecule."
        )


def molecule_alone(flow: Flow, system: openmm.System, atoms: NDArray[np.int64]) -> openmm.System:
    """The molecule as a System of its own: masses, constraints and harmonic bonds among its particles.

    Φ of the whole System is this System's plus a constant, because no constraint leads from the molecule to others.
    """
    total, n = system.getNumParticles(), flow.coordinates.n_atoms
    if len(atoms) != n:
        raise InputError(
            f"atom_subset names {len(atoms)} particles, the flow's molecule has {n}: name all, in its order."
        )
    if atoms.max() >= total:
        raise InputError(f"atom_subset names particle {atoms.max()}, the System has {total} particles.")
    forces = system.getForces()
    if any(isinstance(force, openmm.DrudeForce) for force in forces):
        raise InputError("The System has Drude particles: polarisable models of that kind are not supported.")
    own = {int(particle): k for k, particle in enumerate(atoms)}
    alone = openmm.System()
    for particle in own:
        alone.addParticle(system.getParticleMass(particle))
    for k in range(total):
        if system.isVirtualSite(k):
            site = system.getVirtualSite(k)
            if k in own or any(site.getParticle(i) in own for i in range(site.getNumParticles())):
                raise InputError(f"Particle {k} is a virtual site of the flow's molecule: flows need real atoms only.")
    for k in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(k)
        if (i in own) != (j in own):
            raise InputError(f"A constraint holds particle {i} to {j}, of which atom_subset names one: name them all.")
        if i in own:
            alone.addConstraint(own[i], own[j], length)
    bonded = [force for force in forces if isinstance(force, openmm.HarmonicBondForce)]
    if bonded:
        bonds = openmm.HarmonicBondForce()
        for force in bonded:
            for k in range(force.getNumBonds()):
                i, j, length, strength = force.getBondParameters(k)
                if i in own and j in own:
                    bonds.addBond(own[i], own[j], length, strength)
        alone.addForce(bonds)
    return alone


class Signature:
    """What of a System a match with a flow rests on, read again before every move to see whether it still stands.

    A Context can be reinitialised with a System that was changed in place, and keeps its identity. Compared are the
    numbers of particles, constraints and forces, and of the molecule masses, virtual sites and constraints: little
    enough to cost nothing beside an energy, however many other molecules there are.

    Parameters
    ----------
    system
        The System that was matched.
    atoms
        Particles of the molecule.
    """

    def __init__(self, system: openmm.System, atoms: Sequence[int]) -> None:
        own = {int(k) for k in atoms}
        self._atoms = [int(k) for k in atoms]
        self._held = [k for k in range(system.getNumConstraints()) if own & set(system.getConstraintParameters(k)[:2])]
        self._found = self._read(system)

    def fits(self, system: openmm.System) -> bool:
        """Whether this System still has what the one that was matched had."""
        return self._read(system) == self._found

    def _read(self, system: openmm.System) -> tuple[Any, ...]:
        n, n_constraints = system.getNumParticles(), system.getNumConstraints()
        return (
            (n, n_constraints, system.getNumForces()),
            [(system.getParticleMass(i)._value, system.isVirtualSite(i)) for i in self._atoms if i < n],
            [system.getConstraintParameters(k) for k in self._held if k < n_constraints],
        )
