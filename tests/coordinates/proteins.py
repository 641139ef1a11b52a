"""Proteins for the tests of the coordinates: peptides built from force-field templates, and structures on this machine.

A peptide's atoms and bonds come from the templates of an OpenMM force field; its geometry is idealised (tetrahedral or
planar centres, regular rings, an extended backbone of L amino acids), so that no minimisation is needed.
"""

from __future__ import annotations

import itertools
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
from openmm import app, unit

from openmm_bg.coordinates import build_zmatrix

SOLVENT = {"HOH", "WAT", "Na+", "Cl-", "NA", "CL"}
PROTEIN_G = Path(__file__).parents[2].parent / "shared" / "structures" / "1pga.pdb"


class MissingStructure(Exception):
    """The file of a structure is not on this machine."""


# ---------------------------------------------------------------- peptides from templates


@cache
def force_field(name: str) -> app.ForceField:
    return app.ForceField(name)


def template(field: str, name: str):
    """Template of a residue; "ASP+ASPP+NTER" applies CHARMM's patches."""
    base, *patches = name.split("+")
    found = force_field(field)._templates[base]
    for patch in patches:
        (found,) = force_field(field)._patches[patch].createPatchedTemplates((found,))
    return found


def residue_name(field: str, name: str) -> str:
    """Amber's NALA and CALA are ALA at an end of the chain."""
    return name[1:] if field.startswith("amber") and len(name) == 4 else name.split("+")[0]


def build_topology(field: str, names: list[str], disulfides: list[tuple[int, int]] | None = None) -> app.Topology:
    """One chain of residues, by template name, with peptide bonds and disulfides between residues (i, j)."""
    topology = app.Topology()
    chain = topology.addChain()
    by_name: list[dict[str, app.topology.Atom]] = []
    for name in names:
        found = template(field, name)
        residue = topology.addResidue(residue_name(field, name), chain)
        atoms = [topology.addAtom(a.name, a.element, residue) for a in found.atoms]
        for i, j in found.bonds:
            topology.addBond(atoms[i], atoms[j])
        by_name.append({a.name: a for a in atoms})
    for before, after in itertools.pairwise(by_name):
        topology.addBond(before["C"], after["N"])
    for i, j in disulfides or []:
        topology.addBond(by_name[i]["SG"], by_name[j]["SG"])
    return topology


def neighbours_of(topology: app.Topology) -> list[set[int]]:
    """Bonded atoms of each atom, by index."""
    found: list[set[int]] = [set() for _ in topology.atoms()]
    for a, b in topology.bonds():
        found[a.index].add(b.index)
        found[b.index].add(a.index)
    return found


def smallest_ring(neighbours: list[set[int]], a: int, b: int) -> set[int]:
    """Atoms of the smallest ring through the bond a-b; empty without one of at most eight atoms."""
    previous = {a: -1}
    front = [a]
    for _ in range(7):
        after = []
        for atom in front:
            for other in sorted(neighbours[atom]):
                if {atom, other} == {a, b} or other in previous:
                    continue
                previous[other] = atom
                after.append(other)
        front = after
    if b not in previous:
        return set()
    ring, atom = set(), b
    while atom >= 0:
        ring.add(atom)
        atom = previous[atom]
    return ring


def idealised(topology: app.Topology) -> np.ndarray:
    """Positions [N, 3] nm."""
    atoms = list(topology.atoms())
    neighbours = neighbours_of(topology)
    zmatrix = build_zmatrix(topology)
    rings = {
        frozenset(bond): ring
        for bond in ((a.index, b.index) for a, b in topology.bonds())
        if 0 < len(ring := smallest_ring(neighbours, *bond)) <= 6
    }

    def ring_of(*members: int) -> set[int]:
        """A small ring that holds all of them."""
        return next((ring for ring in rings.values() if ring.issuperset(members)), set())

    def planar(atom: int) -> bool:
        symbol, n = atoms[atom].element.symbol, len(neighbours[atom])
        amine = symbol == "N" and sum(atoms[o].element.symbol == "H" for o in neighbours[atom]) == 2
        conjugated = any(atoms[o].element.symbol == "C" and len(neighbours[o]) == 3 for o in neighbours[atom])
        return n == 3 and (symbol == "C" or (symbol == "N" and (conjugated or not amine)))

    def length(a: int, b: int) -> float:
        symbols = {atoms[a].element.symbol, atoms[b].element.symbol}
        return 0.1 if "H" in symbols else 0.18 if "S" in symbols else 0.142

    def angle(a: int, b: int, c: int) -> float:
        if len(ring_of(a, b, c)) == 5:
            return math.radians(107)
        return math.radians(122 if planar(b) else 110)

    x = np.zeros((len(atoms), 3))
    first, middle, last = zmatrix.seed
    turn = angle(first, middle, last)
    x[middle, 0] = length(first, middle)
    x[last] = x[middle] + length(middle, last) * np.array([-math.cos(turn), math.sin(turn), 0.0])
    zero: dict[int, float] = {}
    seen: dict[int, int] = {}
    for atom, parent, grandparent, great in zmatrix.rows:
        alpha = atoms[parent].name == "CA"
        sign = -1.0 if not alpha or atoms[grandparent].name == "N" else 1.0  # L amino acids
        if parent not in seen:
            ring = rings.get(frozenset((parent, grandparent)), set())
            if not ring or (atom in ring) != (great in ring):
                zero[parent] = math.pi
            elif atom in ring or (planar(parent) and planar(grandparent)):
                zero[parent] = 0.0
            else:
                zero[parent] = sign * math.pi / 3
        k = seen.setdefault(parent, 1 if parent == middle else 0)
        offset = math.pi * k if planar(parent) else sign * k * 2 * math.pi / 3
        seen[parent] = k + 1
        phi = (0.0 if parent == middle else zero[parent]) + offset
        e = x[parent] - x[grandparent]
        e /= np.linalg.norm(e)
        m = x[great] - x[grandparent]  # cis: the side of the great-grandparent
        m = m - (m @ e) * e
        m /= np.linalg.norm(m)
        n = np.cross(e, m)
        theta = angle(atom, parent, grandparent)
        across = math.cos(phi) * m + math.sin(phi) * n
        x[atom] = x[parent] + length(atom, parent) * (-math.cos(theta) * e + math.sin(theta) * across)
    return x


# ---------------------------------------------------------------- structures


def without(topology: app.Topology, positions, unwanted) -> tuple[app.Topology, np.ndarray]:
    """Topology and positions [N, 3] nm without the residues for which ``unwanted`` is true."""
    modeller = app.Modeller(topology, positions)
    modeller.delete([residue for residue in topology.residues() if unwanted(residue)])
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


def openmmtools_data(*parts: str) -> str:
    import openmmtools

    path = os.path.join(os.path.dirname(openmmtools.__file__), "data", *parts)
    if not os.path.exists(path):
        raise MissingStructure(f"openmmtools has no file {os.path.join(*parts)}")
    return path


@cache
def structure(name: str) -> tuple[app.Topology, np.ndarray]:
    """Topology and positions [N, 3] nm of one chain; MissingStructure if its file is not here."""
    if name == "hp35":
        pdb = app.PDBFile(os.path.join(os.path.dirname(app.__file__), "data", "test.pdb"))
        return without(pdb.topology, pdb.positions, lambda residue: residue.index > 34)
    if name == "protein-g":
        if not PROTEIN_G.exists():
            raise MissingStructure("1pga.pdb is not beside this checkout; PDBFixer fetches it")
        pdb = app.PDBFile(str(PROTEIN_G))
        modeller = app.Modeller(pdb.topology, pdb.positions)
        modeller.deleteWater()
        modeller.addHydrogens(force_field("amber14-all.xml"), platform=_reference())
        return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))
    if name == "t4-lysozyme":
        topology = app.AmberPrmtopFile(openmmtools_data("T4-lysozyme-L99A-implicit", "receptor.prmtop")).topology
        positions = app.AmberInpcrdFile(openmmtools_data("T4-lysozyme-L99A-implicit", "receptor.crd")).positions
        return without(topology, positions, lambda residue: residue.name in SOLVENT)
    if name == "dhfr":
        topology = app.AmberPrmtopFile(openmmtools_data("dhfr", "JAC.prmtop")).topology
        positions = app.AmberInpcrdFile(openmmtools_data("dhfr", "JAC.inpcrd")).positions
        return without(topology, positions, lambda residue: residue.name in SOLVENT)
    if name == "trpzip2":  # a prmtop of before Amber 7, which OpenMM does not read; its names are padded
        from parmed.amber import AmberParm

        topology = AmberParm(openmmtools_data("trpzip2-explicit", "trpzip2.prmtop")).topology
        with open(openmmtools_data("trpzip2-explicit", "trpzip2.crd")) as file:
            lines = file.read().splitlines()[2:]
        numbers = [float(line[i : i + 12]) for line in lines for i in range(0, len(line.rstrip()), 12)]
        x = np.array(numbers[: 3 * topology.getNumAtoms()]).reshape(-1, 3) / 10
        return without(topology, x * unit.nanometer, lambda residue: residue.name.strip() in SOLVENT)
    raise KeyError(name)


def _reference():
    import openmm

    return openmm.Platform.getPlatformByName("Reference")
