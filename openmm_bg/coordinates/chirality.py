"""The hands of a molecule's stereocentres, and what frames must have of them before a flow is trained."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.errors import InputError

logger = logging.getLogger(__name__)

#: Share of frames with the rarer hand of a centre from which on the data are of two stereoisomers. Fewer (inverted by
#: hot MD) are left out of training, with the note of `CoordinateMap.fit`.
MIXED = 0.05


def stereocentres(topology: Any) -> list[tuple[int, tuple[int, int, int]]]:
    """Tetrahedral carbons with four different substituents, and three of these by which the hand is told.

    Substituents are told apart by their bonds alone (refinement of classes of atoms over the whole molecule), so that
    no names are needed.

    Returns
    -------
    list
        (atom, (a, b, c)): N, C and CB of the CA of an amino acid, elsewhere the first three neighbours, heavy first.
    """
    graph = MoleculeGraph(topology)
    colour = [hash((graph.elements[a], len(graph.neighbours[a]))) for a in range(graph.n_atoms)]
    classes = 0
    while len(set(colour)) > classes:
        classes = len(set(colour))
        colour = [
            hash((colour[a], tuple(sorted(colour[b] for b in graph.neighbours[a])))) for a in range(graph.n_atoms)
        ]
    peptide = graph.peptide_backbone()
    found = []
    for atom in range(graph.n_atoms):
        around = graph.neighbours[atom]
        if graph.elements[atom] != "C" or len(around) != 4 or len({colour[b] for b in around}) < 4:
            continue
        named = {graph.names[b]: b for b in around}
        if peptide[atom] and {"N", "C", "CB"} <= named.keys():
            a, b, c = named["N"], named["C"], named["CB"]
        else:
            a, b, c, _ = sorted(around, key=lambda other: (graph.is_hydrogen(other), other))
        found.append((atom, (a, b, c)))
    return found


def is_amino(atoms: list[Any], centre: int, three: tuple[int, int, int]) -> bool:
    """Whether a centre, as `stereocentres` has it, is the CA of an amino acid: its positive hand is L."""
    return [atoms[k].name.strip() for k in (centre, *three)] == ["CA", "N", "C", "CB"]


def hand(positions: NDArray[np.floating[Any]], centre: int, three: tuple[int, int, int]) -> NDArray[np.bool_]:
    """[n] whether (a × b) · c about the centre is positive: L for N, C, CB of an amino acid (the CORN rule)."""
    a, b, c = (positions[:, k].astype(np.float64) - positions[:, centre] for k in three)
    return (np.cross(a, b) * c).sum(-1) > 0


def check_hands(positions: NDArray[np.floating[Any]], topology: Any) -> None:
    """Refuse frames of two stereoisomers, of which the coordinates can model one; warn of D amino acids.

    Parameters
    ----------
    positions
        [n, N, 3] nm.
    topology : openmm.app.Topology
        With bonds.

    Raises
    ------
    InputError
        At least `MIXED` of the frames have another hand at a centre than the rest.
    """
    atoms = list(topology.atoms())
    inverted, n_amino = [], 0
    for centre, three in stereocentres(topology):
        residue = atoms[centre].residue
        positive = float(hand(positions, centre, three).mean())
        rare = min(positive, 1.0 - positive)
        if rare >= MIXED:
            raise InputError(
                f"{rare:.0%} of the frames have another chirality at {atoms[centre].name} of {residue.name} "
                f"{residue.id} than the others: coordinates model one stereoisomer, give frames of one."
            )
        if is_amino(atoms, centre, three):
            n_amino += 1
            if positive < 0.5:
                inverted.append(f"{residue.name} {residue.id}")
    if inverted and len(inverted) == n_amino > 1:
        logger.warning(
            "All %d amino acids with a side chain are D amino acids in the frames (the first is %s): the trajectory is "
            "a mirror image, unless the molecule is meant so.",
            n_amino,
            inverted[0],
        )
    elif inverted:
        logger.warning(
            "In the frames %s %s the chirality of D amino acids: an error of the trajectory, unless meant so.",
            ", ".join(inverted[:5]) + (f" and {len(inverted) - 5} others" * (len(inverted) > 5)),
            "has" if len(inverted) == 1 else "have",
        )
