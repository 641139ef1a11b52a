"""What a simulation must not change by accident: chirality of tetrahedral centres, isomers of amide bonds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.simulate.tempering import torsion_angle


class Stereochemistry:
    """Signs of all centres with three heavy neighbours, and cis or trans of all amide bonds.

    Parameters
    ----------
    topology
        Of one molecule, with all bonds.
    reference
        [N, 3] nm: the geometry that frames are compared with.
    """

    def __init__(self, topology: Any, reference: NDArray[np.floating[Any]]) -> None:
        graph = MoleculeGraph(topology)
        self._graph = graph
        self.centres: list[tuple[int, int, int, int]] = []
        self.amides: list[tuple[int, int, int, int]] = []
        for atom in range(graph.n_atoms):
            heavy = graph.heavy_neighbours(atom)
            if graph.elements[atom] == "C" and len(graph.neighbours[atom]) == 4 and len(heavy) >= 3:
                self.centres.append((atom, heavy[0], heavy[1], heavy[2]))
            for other in heavy:
                if graph.elements[atom] != "C" or not graph.is_amide(atom, other):
                    continue
                before = [a for a in heavy if a != other and graph.elements[a] == "C"]
                after = [a for a in graph.heavy_neighbours(other) if a != atom]
                # Proline's nitrogen has two carbons: CA, not CD, says what is called cis.
                after.sort(key=lambda a: (graph.names[a] != "CA", a))
                if before and after:
                    self.amides.append((before[0], atom, other, after[0]))
        frame = np.asarray(reference, dtype=np.float64)[None]
        self._signs = self._chirality(frame)[0]
        self._trans = self._isomers(frame)[0]

    def _chirality(self, positions: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[n, centres] handedness."""
        signs = np.empty((len(positions), len(self.centres)), dtype=bool)
        for k, (c, i, j, m) in enumerate(self.centres):
            a, b, d = (positions[:, x] - positions[:, c] for x in (i, j, m))
            signs[:, k] = np.einsum("ni,ni->n", np.cross(a, b), d) > 0
        return signs

    def _isomers(self, positions: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[n, amides] whether trans."""
        trans = np.empty((len(positions), len(self.amides)), dtype=bool)
        for k, atoms in enumerate(self.amides):
            trans[:, k] = np.cos(torsion_angle(positions, atoms)) < 0
        return trans

    def unchanged(self, positions: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """[n] whether frames [n, N, 3] have the reference's chirality and amide isomers."""
        x = np.asarray(positions, dtype=np.float64)
        return (self._chirality(x) == self._signs).all(1) & (self._isomers(x) == self._trans).all(1)

    def difference(self, positions: NDArray[np.floating[Any]]) -> str | None:
        """What one frame [N, 3] has different, named by its first place; None if nothing."""
        x = np.asarray(positions, dtype=np.float64)[None]
        for k in np.flatnonzero(self._chirality(x)[0] != self._signs):
            return f"the chirality at {self._graph.label(self.centres[k][0])}"
        for k in np.flatnonzero(self._isomers(x)[0] != self._trans):
            return f"the cis or trans isomer at {self._graph.label(self.amides[k][2])}"
        return None

    def notes(self) -> list[str]:
        """Peculiarities of the reference: D amino acids, and cis bonds before other residues than proline."""
        found = []
        names = self._graph.names
        for atom, *_ in self.centres:
            around = {names[a]: a for a in self._graph.neighbours[atom]}
            if names[atom] != "CA" or not {"N", "C", "CB"} <= around.keys():
                continue
            k = next(i for i, centre in enumerate(self.centres) if centre[0] == atom)
            order = [names[a] for a in self.centres[k][1:]]
            # Seen from HA an L amino acid reads CO, R, N clockwise: (N, C, CB) has a positive triple product.
            parity = np.linalg.det(np.eye(3)[[["N", "C", "CB"].index(n) for n in order]])
            if self._signs[k] != (parity > 0):
                found.append(f"{self._graph.label(atom)} has the chirality of a D amino acid.")
        for (_, _, nitrogen, _), trans in zip(self.amides, self._trans, strict=True):
            if not trans and self._graph.residues[nitrogen] != "PRO":
                found.append(f"The amide bond at {self._graph.label(nitrogen)} is cis.")
        return found
