"""The bond graph of one molecule, read from a Topology: fragments, rings, amide bonds, the backbone."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

from openmm_bg.errors import InputError

_BACKBONE_NAMES = {"N", "CA", "C"}
_CAPS = {"ACE", "NME", "NMA", "NH2", "NHE"}
#: CHARMM's patches ACE, CT2 and CT3 put the cap into the residue that they cap.
_CAP_NAMES = {"CAY", "CY", "NT", "CAT"}
#: The smallest ring that a disulfide between two cysteines closes (neighbours in the sequence) has eight atoms; a
#: smaller one, such as lipoic acid's, is rigid and belongs to its molecule's rings.
_DISULFIDE_RING = 8


class MoleculeGraph:
    """Bonds, elements and names of a single molecule.

    Parameters
    ----------
    topology
        An ``openmm.app.Topology`` with all bonds of exactly one molecule.

    Raises
    ------
    InputError
        No bonds, more than one fragment (a second molecule, or a missing bond), amino acids in more than one chain,
        or fewer than three atoms.
    """

    def __init__(self, topology: Any) -> None:
        atoms = list(topology.atoms())
        self.n_atoms = len(atoms)
        self.names = [atom.name.strip() for atom in atoms]  # old prmtop files pad them
        self.elements = ["" if atom.element is None else atom.element.symbol for atom in atoms]
        self.residues = [atom.residue.name.strip() for atom in atoms]
        self.residue_index = [atom.residue.index for atom in atoms]
        neighbours: list[set[int]] = [set() for _ in atoms]
        for a, b in topology.bonds():
            neighbours[a.index].add(b.index)
            neighbours[b.index].add(a.index)
        self.neighbours = [sorted(found) for found in neighbours]
        if self.n_atoms < 3:
            raise InputError(f"The topology has {self.n_atoms} atoms: internal coordinates need at least three.")
        if not any(self.neighbours):
            raise InputError("The topology has no bonds: add them (CONECT records, or Topology.addBond).")
        self._refuse_chains(atoms)
        reached = self.distances(0)
        if len(reached) != self.n_atoms:
            missing = next(i for i in range(self.n_atoms) if i not in reached)
            raise InputError(
                "The topology is not one molecule: its bonds do not link atom "
                f"{missing} ({self.label(missing)}) to atom 0 ({self.label(0)}); give a single molecule with all bonds"
                f"{self._unknown_name(missing)}."
            )
        #: Bonds that close a ring and carry no coordinate of their own: disulfides between parts linked otherwise.
        self.disulfides = self._ring_closing_disulfides()
        self.tree_neighbours = [
            [b for b in found if (min(a, b), max(a, b)) not in self.disulfides]
            for a, found in enumerate(self.neighbours)
        ]
        self._bridges = self._find_bridges()

    def _unknown_name(self, atom: int) -> str:
        """The cause of missing bonds, for a message, if the atom's residue has none at all."""
        index = self.residue_index
        inside = [a for a in range(self.n_atoms) if index[a] == index[atom]]
        if len(inside) == 1 or any(index[b] == index[atom] for a in inside for b in self.neighbours[a]):
            return ""
        return f" (OpenMM's readers know none of residues called {self.residues[atom]})"

    def _refuse_chains(self, atoms: list[Any]) -> None:
        """Several proteins at once, whether or not a disulfide links them."""
        flags = self.peptide_backbone()
        chains: dict[int, Any] = {}
        for atom, yes in zip(atoms, flags, strict=True):
            if yes:
                chains.setdefault(atom.residue.chain.index, atom)
        if len(chains) > 1:
            first, second = list(chains.values())[:2]
            raise InputError(
                f"The topology has {len(chains)} protein chains (the second begins at residue "
                f"{second.residue.name}{second.residue.index + 1}, the first at "
                f"{first.residue.name}{first.residue.index + 1}): give a topology of one chain."
            )

    def _ring_closing_disulfides(self) -> set[tuple[int, int]]:
        """S-S bonds of large rings, as many as can be taken out with every atom still linked to every other."""
        found: set[tuple[int, int]] = set()
        bonds = [
            (a, b)
            for a in range(self.n_atoms)
            for b in self.neighbours[a]
            if a < b and self.elements[a] == self.elements[b] == "S"
        ]
        for bond in bonds:
            around = self.distances(bond[0], without=found | {bond}).get(bond[1])
            if around is not None and around + 1 >= _DISULFIDE_RING:
                found.add(bond)
        return found

    def label(self, atom: int) -> str:
        """Residue and atom name, for messages."""
        return f"{self.residues[atom]}{self.residue_index[atom] + 1}-{self.names[atom]}"

    def is_hydrogen(self, atom: int) -> bool:
        return self.elements[atom] in ("H", "D")

    def heavy_neighbours(self, atom: int) -> list[int]:
        return [other for other in self.neighbours[atom] if not self.is_hydrogen(other)]

    def distances(self, start: int, without: Collection[tuple[int, int]] = ()) -> dict[int, int]:
        """Bonds between ``start`` and every atom it reaches, not counting the bonds (a, b), a < b, in ``without``."""
        found = {start: 0}
        queue = deque([start])
        while queue:
            atom = queue.popleft()
            for other in self.neighbours[atom]:
                if other not in found and not (without and (min(atom, other), max(atom, other)) in without):
                    found[other] = found[atom] + 1
                    queue.append(other)
        return found

    def in_ring(self, a: int, b: int) -> bool:
        """True if the bond a-b is part of a ring, so that nothing can turn about it freely.

        A ring that only a disulfide closes does not count: it is large, and its bonds do turn.
        """
        return (min(a, b), max(a, b)) not in self._bridges

    def is_amide(self, a: int, b: int) -> bool:
        """True for the C-N bond of a carbonyl carbon and a three-coordinate nitrogen (peptide, amide, urea)."""
        for carbon, nitrogen in ((a, b), (b, a)):
            if self.elements[carbon] == "C" and self.elements[nitrogen] == "N":
                if (
                    len(self.neighbours[carbon]) == 3
                    and len(self.neighbours[nitrogen]) <= 3
                    and any(self.elements[o] == "O" and len(self.neighbours[o]) == 1 for o in self.neighbours[carbon])
                ):
                    return True
        return False

    def is_invertible(self, atom: int) -> bool:
        """True for a three-coordinate nitrogen: pyramidal or flat, it may swing through its plane in a simulation."""
        return self.elements[atom] == "N" and len(self.neighbours[atom]) == 3

    def ring_systems(self) -> list[int]:
        """For each atom the number of the ring system (rings that share bonds or atoms) it belongs to, or -1."""
        system = [-1] * self.n_atoms
        for start in range(self.n_atoms):
            if system[start] >= 0 or not any(self.in_ring(start, o) for o in self.tree_neighbours[start]):
                continue
            system[start] = max(system) + 1
            queue = deque([start])
            while queue:
                atom = queue.popleft()
                for other in self.tree_neighbours[atom]:
                    if system[other] < 0 and self.in_ring(atom, other):
                        system[other] = system[start]
                        queue.append(other)
        return system

    def peptide_backbone(self) -> list[bool]:
        """N, CA, C of amino acids and the heavy chain of their caps; all False for other molecules."""
        by_residue: dict[int, dict[str, int]] = {}
        for atom, name in enumerate(self.names):
            by_residue.setdefault(self.residue_index[atom], {})[name] = atom
        flags = [False] * self.n_atoms
        amino_acids = set()
        for residue, names in by_residue.items():
            if _BACKBONE_NAMES <= names.keys():
                bonded = self.neighbours[names["CA"]]  # a ligand may use the same names for something else
                if names["N"] in bonded and names["C"] in bonded:
                    amino_acids.add(residue)
                    for name in _BACKBONE_NAMES:
                        flags[names[name]] = True
        if any(flags):
            for atom in range(self.n_atoms):  # caps: ACE's C and CH3, NME's N and C
                inside = self.residue_index[atom] in amino_acids and self.names[atom] in _CAP_NAMES
                if self.residues[atom] in _CAPS or inside:
                    flags[atom] = self.elements[atom] in ("C", "N")
        return flags

    def backbone(self) -> list[bool]:
        """Atoms of the backbone: N, CA, C of amino acids and the heavy chain of their caps.

        A molecule without amino acids has none; there the longest chain of heavy atoms takes its place.
        """
        flags = self.peptide_backbone()
        if not any(flags):
            for atom in self._longest_heavy_chain():
                flags[atom] = True
        return flags

    def _longest_heavy_chain(self) -> list[int]:
        def farthest(start: int) -> list[int]:
            previous = {start: start}
            queue = deque([start])
            last = start
            while queue:
                last = queue.popleft()
                for other in self.heavy_neighbours(last):
                    if other not in previous:
                        previous[other] = last
                        queue.append(other)
            path = [last]
            while path[-1] != start:
                path.append(previous[path[-1]])
            return path

        heavy = [atom for atom in range(self.n_atoms) if not self.is_hydrogen(atom)]
        return farthest(farthest(heavy[0])[0]) if heavy else []

    def _find_bridges(self) -> set[tuple[int, int]]:
        """Bonds outside every ring (Tarjan's bridges, without recursion: proteins are deep)."""
        index: dict[int, int] = {}
        low: dict[int, int] = {}
        bridges: set[tuple[int, int]] = set()
        stack: list[tuple[int, int, int]] = [(0, -1, 0)]
        while stack:
            atom, parent, position = stack.pop()
            if position == 0:
                index[atom] = low[atom] = len(index)
            if position < len(self.tree_neighbours[atom]):
                stack.append((atom, parent, position + 1))
                other = self.tree_neighbours[atom][position]
                if other not in index:
                    stack.append((other, atom, 0))
                elif other != parent:
                    low[atom] = min(low[atom], index[other])
            elif parent >= 0:
                low[parent] = min(low[parent], low[atom])
                if low[atom] > index[parent]:
                    bridges.add((min(atom, parent), max(atom, parent)))
        return bridges
