"""What must not happen in a molecule: atoms inside one another, inverted centres, amides turned to cis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis.residues import residue_label
from openmm_bg.analysis.torsions import dihedral_atoms, torsion
from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.coordinates.chirality import hand, is_amino, stereocentres
from openmm_bg.errors import InputError

BoolArray = NDArray[np.bool_]

#: nm. Below any distance of two heavy atoms more than three bonds apart in MD at 300 K (hydrogen bonds: 0.25).
HEAVY_CLASH = 0.24
#: nm, where one of the two is a hydrogen: below the shortest hydrogen bonds of fixed-charge force fields.
HYDROGEN_CLASH = 0.13
#: Bonds between two atoms from which on they count as not bonded.
SEPARATION = 4
_PIECE = 8_000_000


def _separated(graph: MoleculeGraph) -> BoolArray:
    """[N, N] upper triangle of the pairs that are at least `SEPARATION` bonds apart."""
    found = np.triu(np.ones((graph.n_atoms, graph.n_atoms), dtype=np.bool_), k=1)
    for atom in range(graph.n_atoms):
        near = {atom}
        for _ in range(SEPARATION - 1):
            near |= {other for a in near for other in graph.neighbours[a]}
        found[atom, sorted(near)] = False
    return found


def count_clashes(
    positions: ArrayLike, topology: Any, advance: Callable[[int], object] | None = None
) -> dict[str, float]:
    """Pairs of atoms, four or more bonds apart, that are closer than any in MD.

    Parameters
    ----------
    positions : array_like, shape [n, N, 3]
        nm.
    topology : openmm.app.Topology
        With bonds; those of a disulfide count.
    advance : callable, optional
        Told the number of frames of each piece that is done.

    Returns
    -------
    dict
        ``heavy`` and ``hydrogen``: pairs per frame below `HEAVY_CLASH` (both heavy) and `HYDROGEN_CLASH` (at least one
        hydrogen); ``heavy_frames`` and ``hydrogen_frames``: share of frames with any; ``frames``.

    Raises
    ------
    InputError
        No frame, or another number of atoms.
    """
    graph = MoleculeGraph(topology)
    x = np.asarray(positions)
    if x.ndim != 3 or len(x) == 0 or x.shape[1:] != (graph.n_atoms, 3):
        raise InputError(f"Frames [n >= 1, {graph.n_atoms}, 3] are needed, got {x.shape}.")
    hydrogen = np.array([graph.is_hydrogen(a) for a in range(graph.n_atoms)])
    apart = _separated(graph)
    both = ~hydrogen[:, None] & ~hydrogen[None]
    limit = torch.from_numpy(np.where(apart, np.where(both, HEAVY_CLASH, HYDROGEN_CLASH), -1.0).astype(np.float32))
    heavy_pair = both.ravel()
    heavy, light = np.empty(len(x)), np.empty(len(x))
    step = max(1, _PIECE // graph.n_atoms**2)
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        frames = torch.from_numpy(np.ascontiguousarray(x[rows], dtype=np.float32))
        # The fast way through scalar products rounds short distances away from the origin.
        close = torch.cdist(frames, frames, compute_mode="donot_use_mm_for_euclid_dist") < limit
        # Few are close: to find them is five times quicker than to add up booleans.
        frame, pair = np.divmod(np.flatnonzero(close.numpy()), graph.n_atoms**2)
        heavy[rows] = np.bincount(frame[heavy_pair[pair]], minlength=len(frames))
        light[rows] = np.bincount(frame[~heavy_pair[pair]], minlength=len(frames))
        if advance is not None:
            advance(len(frames))
    return {
        "heavy": float(heavy.mean()),
        "hydrogen": float(light.mean()),
        "heavy_frames": float((heavy > 0).mean()),
        "hydrogen_frames": float((light > 0).mean()),
        "frames": len(x),
    }


def chirality(generated: ArrayLike, data: ArrayLike, topology: Any) -> dict[str, Any]:
    """Share of frames whose stereocentres have another hand than the molecule's.

    CA of amino acids are held against L; of other centres (CB of THR and ILE, other molecules) the hand that most
    data frames have is the right one.

    Parameters
    ----------
    generated, data : array_like, shape [n, N, 3] and [m, N, 3]
    topology : openmm.app.Topology

    Returns
    -------
    dict
        ``generated`` and ``data``: share of frames with any wrong centre; ``centres``, a list of dicts with
        ``residue``, ``atom``, ``rule`` ("L" or "data"), ``generated`` and ``data`` (shares of wrong frames).
    """
    x, y, atoms = np.asarray(generated), np.asarray(data), list(topology.atoms())
    any_x, any_y = np.zeros(len(x), dtype=np.bool_), np.zeros(len(y), dtype=np.bool_)
    rows = []
    for centre, three in stereocentres(topology):
        amino = is_amino(atoms, centre, three)
        ours, theirs = hand(x, centre, three), hand(y, centre, three)
        right = True if amino else bool(theirs.mean() >= 0.5)
        any_x |= ours != right
        any_y |= theirs != right
        rows.append(
            {
                "residue": residue_label(atoms[centre].residue),
                "atom": atoms[centre].name,
                "rule": "L" if amino else "data",
                "generated": float((ours != right).mean()),
                "data": float((theirs != right).mean()),
            }
        )
    return {"generated": float(any_x.mean()), "data": float(any_y.mean()), "centres": rows}


def cis_amides(generated: ArrayLike, data: ArrayLike, topology: Any) -> dict[str, Any]:
    """Share of frames with cis amide bonds, abs(ω) < π/2.

    Parameters
    ----------
    generated, data : array_like, shape [n, N, 3] and [m, N, 3]
    topology : openmm.app.Topology

    Returns
    -------
    dict
        ``generated`` and ``data``: share of frames with any; ``bonds``, a list of dicts with ``residue`` (that of the
        nitrogen), ``generated`` and ``data``.
    """
    atoms = list(topology.atoms())
    x, y = np.asarray(generated), np.asarray(data)
    any_x, any_y = np.zeros(len(x), dtype=np.bool_), np.zeros(len(y), dtype=np.bool_)
    rows = []
    for omega in dihedral_atoms(topology)["omega"]:
        ours, theirs = (np.abs(torsion(frames, omega)) < 0.5 * np.pi for frames in (x, y))
        any_x |= ours
        any_y |= theirs
        residue = residue_label(atoms[omega[2]].residue)
        rows.append({"residue": residue, "generated": float(ours.mean()), "data": float(theirs.mean())})
    return {"generated": float(any_x.mean()), "data": float(any_y.mean()), "bonds": rows}
