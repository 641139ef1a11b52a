"""Caps as residues of their own, for force fields that describe them by patches of the residue they cap (CHARMM's).

PDB files have ACE, NME and NH2 as residues, and so do Amber's templates. CHARMM's ACE, CT3 and CT2 are patches: their
atoms belong to the amino acid. The force field therefore sees a Topology in which they do; everybody else keeps the
file's, whose names and bonds every reader of PDB files knows. Atoms have the same order in both.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip
from openmm import app  # isort: skip

#: Names of templates that describe a cap as a residue; NMA is not among them, for CHARMM's is N-methylacetamide.
TEMPLATES = {"ACE": {"ACE"}, "NME": {"NME"}, "NMA": {"NME"}, "NH2": {"NH2", "NHE"}}
#: CHARMM's file has the alanine dipeptide twice, as a residue of the protein force field and of CGenFF.
WHOLE = {("ACE", "ALA", "NME"): "ALAD"}


class CapsInside:
    """A force field that is handed caps inside the residues they cap.

    Parameters
    ----------
    forcefield
        The ForceField.
    """

    def __init__(self, forcefield: app.ForceField) -> None:
        self.forcefield = forcefield

    def createSystem(self, topology: app.Topology, **options: Any) -> openmm.System:
        """As ForceField's; residueTemplates are chosen here."""
        merged = app.Topology()
        merged.setPeriodicBoxVectors(topology.getPeriodicBoxVectors())
        atoms: dict[Any, Any] = {}
        chosen: dict[Any, str] = {}
        for chain in topology.chains():
            new_chain = merged.addChain(chain.id)
            for group in groups(list(chain.residues())):
                capped = main(group)
                new = merged.addResidue(capped.name, new_chain, capped.id, capped.insertionCode)
                for residue in group:
                    for atom in residue.atoms():
                        atoms[atom] = merged.addAtom(atom.name, atom.element, new, atom.id)
                whole = WHOLE.get(tuple(r.name for r in group))
                if whole is not None and whole in self.forcefield._templates:  # no public list of template names exists
                    chosen[new] = whole
        for bond in topology.bonds():
            merged.addBond(atoms[bond[0]], atoms[bond[1]], bond.type, bond.order)
        return self.forcefield.createSystem(merged, **{**options, "residueTemplates": chosen})


def groups(residues: list[Any]) -> list[list[Any]]:
    """The residues of a chain, caps together with their neighbour."""
    found: list[list[Any]] = []
    front: list[Any] = []
    for residue in residues:
        if residue.name == "ACE":
            front.append(residue)
        elif residue.name in TEMPLATES and found:
            found[-1].append(residue)
        else:
            found.append([*front, residue])
            front = []
    return [*found, front] if front else found


def main(group: list[Any]) -> Any:
    """The residue of a group that is no cap."""
    return next((r for r in group if r.name not in TEMPLATES), group[0])


def knowing_caps(forcefield: app.ForceField, topology: app.Topology) -> Any:
    """The force field, or a `CapsInside` of it where it has no template for a cap of the topology."""
    names = forcefield._templates.keys()
    foreign = any(r.name in TEMPLATES and not TEMPLATES[r.name] & names for r in topology.residues())
    return CapsInside(forcefield) if foreign else forcefield
