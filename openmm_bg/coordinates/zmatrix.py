"""A Z-matrix that follows the bond graph: who is placed from whom, and which sibling carries the torsion.

The rule (docs/theory.md, "Z-matrix rule"): all children of one atom are measured from one axis, the bond of that atom
to its parent, with the grandparent as the zero of the dihedral; the seed holds no hydrogen unless nothing else exists.
So the angle between two hydrogens of one carbon depends on their own angles and offsets alone, and the constraint
determinant does not move when a torsion turns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.errors import InputError


@dataclass(frozen=True)
class ZMatrix:
    """Placement of N atoms: three seed atoms, then one row for each of the others.

    Rows are sorted by level; a row's parent is a seed atom (level 1) or stands exactly one level before it.

    Parameters
    ----------
    seed
        Atoms 0, 1, 2: linked 0-1 and 1-2.
    rows
        [N-3] tuples (atom, parent, grandparent, great-grandparent): length atom-parent, angle
        atom-parent-grandparent, dihedral atom-parent-grandparent-great-grandparent.
    levels
        [N-3] level of each row, from 1.
    carrier
        [N-3] row that carries the dihedral of this row's group of siblings: the row itself for the carrier, -1 for
        a child of the middle seed atom, whose zero is seed atom 2 itself.
    triple
        Rows (carrier, second, third) of groups of exactly three hydrogens of one isotope: methyl, ammonium.
    """

    seed: tuple[int, int, int]
    rows: list[tuple[int, int, int, int]]
    levels: list[int]
    carrier: list[int]
    triple: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def n_atoms(self) -> int:
        return len(self.rows) + 3

    def dihedral_sums(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Each row's φ as a sum over the dihedral coordinates of rows: those rows [P, K] and their weights [P, K].

        A sibling adds its carrier's, which, in a methyl group, is t = t' - (δ1 + δ2)/3.
        """
        sums = [{row: 1.0} for row in range(len(self.rows))]
        for first, second, third in self.triple:
            sums[first] |= {second: -1 / 3, third: -1 / 3}
        carried = [dict(found) for found in sums]
        for row, carrier in enumerate(self.carrier):
            if carrier not in (row, -1):
                for source, weight in sums[carrier].items():
                    carried[row][source] = carried[row].get(source, 0.0) + weight
        n = max((len(found) for found in carried), default=1)
        sources = np.tile(np.arange(len(carried)), (n, 1))
        weights = np.zeros((n, len(carried)))
        for row, found in enumerate(carried):
            sources[: len(found), row], weights[: len(found), row] = list(found), list(found.values())
        return sources, weights

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ZMatrix:
        return cls(
            seed=(data["seed"][0], data["seed"][1], data["seed"][2]),
            rows=[(r[0], r[1], r[2], r[3]) for r in data["rows"]],
            levels=list(data["levels"]),
            carrier=list(data["carrier"]),
            triple=[(t[0], t[1], t[2]) for t in data["triple"]],
        )


def _choose_seed(graph: MoleculeGraph, constrained: set[tuple[int, int]]) -> tuple[int, int, int]:
    backbone = graph.backbone()
    candidates: list[tuple[tuple[bool, bool, bool], tuple[int, int, int]]] = []
    for middle in range(graph.n_atoms):
        heavy = graph.heavy_neighbours(middle)
        if graph.is_hydrogen(middle) or len(heavy) < 2:
            continue
        # Prefer backbone neighbours on both sides, so that the tree's torsions are the field's own (φ, ψ, ω).
        ends = sorted(heavy, key=lambda a: (not backbone[a], a))[:2]
        alpha = graph.names[middle] == "CA" and backbone[middle]
        # At an alkyne's or nitrile's carbon the seed would be straight: no plane for anything else to be measured from.
        straight = graph.elements[middle] == "C" and len(graph.neighbours[middle]) == 2
        rank = (straight, not (backbone[middle] and backbone[ends[0]] and backbone[ends[1]]), not alpha)
        candidates.append((rank, (ends[0], middle, ends[1])))
    if candidates:
        # ... and among those the one nearest to the centre of the molecule: the tree is shallow there.
        best = min(rank for rank, _ in candidates)
        seeds = [seed for rank, seed in candidates if rank == best]
        return min(seeds, key=lambda seed: (max(graph.distances(seed[1], graph.disulfides).values()), seed[1]))
    found: list[tuple[tuple[int, int, int], tuple[int, int, int]]] = []
    for middle in range(graph.n_atoms):  # methanol and the like: hydrogens, as long as no length of theirs is fixed
        if graph.is_hydrogen(middle):
            continue
        free = [
            a
            for a in graph.neighbours[middle]
            if not (graph.is_hydrogen(a) and (min(a, middle), max(a, middle)) in constrained)
        ]
        if len(free) < 2:
            continue
        ends = sorted(free, key=lambda a: (graph.is_hydrogen(a), a))[:2]
        n_hydrogens = sum(map(graph.is_hydrogen, ends))
        # few siblings of the seed's hydrogen, so that a methyl group keeps its three hydrogens together
        found.append(((n_hydrogens, len(graph.neighbours[middle]), middle), (ends[0], middle, ends[1])))
    if found:
        return min(found)[1]
    raise InputError(
        "The molecule has no three linked heavy atoms and its hydrogen bond lengths are constrained: "
        "build its System with constraints=None."
    )


def build_zmatrix(topology: Any, constrained: set[tuple[int, int]] | None = None) -> ZMatrix:
    """Z-matrix of a single molecule.

    Parameters
    ----------
    topology
        ``openmm.app.Topology`` with all bonds.
    constrained
        Pairs (i, j), i < j, whose distance the System fixes; matters for molecules without three heavy atoms only.

    Raises
    ------
    InputError
        Not one molecule, bonds missing, or no usable seed.
    """
    graph = MoleculeGraph(topology)
    backbone = graph.backbone()
    seed = _choose_seed(graph, constrained or set())
    first, middle, last = seed
    # (parent, grandparent) of each placed atom, as its children see them
    above: dict[int, tuple[int, int]] = {first: (middle, last), middle: (first, last), last: (middle, first)}
    rows: list[tuple[int, int, int, int]] = []
    levels: list[int] = []
    carrier: list[int] = []
    triple: list[tuple[int, int, int]] = []
    front, level = [first, middle, last], 1
    while front:
        children: dict[int, list[int]] = {}
        for parent in front:
            for child in graph.tree_neighbours[parent]:
                if child not in above:
                    above[child] = (parent, above[parent][0])
                    children.setdefault(parent, []).append(child)
        front = []
        for parent, found in children.items():
            # The carrier: backbone first, then heavy atoms by the size of what hangs on them, then hydrogens.
            found.sort(key=lambda a: (not backbone[a], graph.is_hydrogen(a), -len(graph.neighbours[a]), a))
            grandparent, great = above[parent]
            start = len(rows)
            for child in found:
                rows.append((child, parent, grandparent, great))
                levels.append(level)
                carrier.append(-1 if parent == middle else start)
            if (
                parent != middle
                and len(found) == 3
                and all(
                    graph.is_hydrogen(c)
                    and graph.elements[c] == graph.elements[found[0]]
                    and len(graph.neighbours[c]) == 1
                    for c in found
                )
            ):
                triple.append((start, start + 1, start + 2))
            front.extend(found)
        level += 1
    return ZMatrix(seed=seed, rows=rows, levels=levels, carrier=carrier, triple=triple)
