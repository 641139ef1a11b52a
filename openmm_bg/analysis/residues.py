"""Residue by residue: fluctuations, and how far φ, ψ and χ of generated frames are distributed like the data's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis.distances import ANGSTROM
from openmm_bg.analysis.superposition import rmsf
from openmm_bg.analysis.torsions import Quadruple, dihedral_atoms, torsion
from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]

#: Bins along each angle: 10 degrees.
BINS = 36
#: Side chain ends whose half turn exchanges equal atoms, unless one of them is protonated: (residue, number of χ).
TWOFOLD = {("PHE", 2), ("TYR", 2), ("ASP", 2), ("GLU", 3)}


def residue_label(residue: Any) -> str:
    """Name and place in the molecule, from 1."""
    return f"{residue.name.strip()}{residue.index + 1}"


def residue_rmsf(generated: ArrayLike, data: ArrayLike, topology: Any, atoms: ArrayLike) -> list[dict[str, Any]]:
    """RMSF per residue of generated and data frames, each superposed on its own mean.

    Parameters
    ----------
    generated, data : array_like, shape [n, N, 3] and [m, N, 3]
        nm.
    topology : openmm.app.Topology
    atoms : array_like of int
        Atoms that are superposed, the backbone.

    Returns
    -------
    list of dict
        ``residue``, ``generated`` and ``data``: Å, root of the mean over the residue's heavy atoms.
    """
    ours, theirs = rmsf(generated, atoms), rmsf(data, atoms)
    rows = []
    for residue in topology.residues():
        heavy = [a.index for a in residue.atoms() if a.element is not None and a.element.symbol not in ("H", "D")]
        if heavy:
            rows.append(
                {
                    "residue": residue_label(residue),
                    "generated": ANGSTROM * float(np.sqrt((ours[heavy] ** 2).mean())),
                    "data": ANGSTROM * float(np.sqrt((theirs[heavy] ** 2).mean())),
                }
            )
    return rows


def js_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """Jensen-Shannon divergence of two histograms of the same bins, in bits: 0 for equal ones, 1 for disjoint ones.

    Parameters
    ----------
    p, q : array_like of equal shape
        Counts; each is normalised.

    Raises
    ------
    InputError
        Shapes differ, or a histogram is empty.

    References
    ----------
    Lin, IEEE Trans. Inf. Theory 37, 145 (1991).
    """
    a, b = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if a.shape != b.shape or not (a.sum() > 0 and b.sum() > 0):
        raise InputError(f"Two histograms of the same bins with counts are needed, got {a.shape} and {b.shape}.")
    a, b = a / a.sum(), b / b.sum()
    middle = 0.5 * (a + b)

    def divergence(x: FloatArray) -> float:
        some = x > 0
        return float((x[some] * np.log2(x[some] / middle[some])).sum())

    return 0.5 * divergence(a) + 0.5 * divergence(b)


def _histogram(angles: FloatArray) -> FloatArray:
    """Counts of angles [n, k] in [-π, π] over k axes."""
    edges = [np.linspace(-np.pi, np.pi, BINS + 1)] * angles.shape[1]
    # float32 trajectories give ±π with a rounding error, which belongs to the last bin
    return np.histogramdd(np.clip(angles, -np.pi, np.pi), bins=edges)[0]


def distribution_distance(generated: FloatArray, data: FloatArray, seed: int = 0) -> dict[str, float]:
    """Jensen-Shannon divergence between angles of generated and data frames, with its finite-sample baselines.

    All three values compare histograms of the same number of frames, since the divergence of finite samples of one
    distribution is positive and falls with their number.

    Parameters
    ----------
    generated, data : ndarray, shape [n, k] and [m, k]
        rad in [-π, π], k angles at once; data in the order of time.
    seed : int
        Of the choice of frames.

    Returns
    -------
    dict
        Bits: ``generated`` (against a random half of the data), ``data`` (that half against the other), ``data_time``
        (the first against the second half in time: what the MD itself does not agree on); ``frames``, the size of each
        sample.

    Raises
    ------
    InputError
        No generated frame, or fewer than two of data.
    """
    if len(generated) < 1 or len(data) < 2:
        raise InputError("Distributions need a generated frame and two data frames.")
    size = min(len(generated), len(data) // 2)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    half = _histogram(data[order[:size]])
    first, second = (rng.permutation(len(data) // 2)[:size] for _ in range(2))
    return {
        "generated": js_divergence(_histogram(generated[rng.permutation(len(generated))[:size]]), half),
        "data": js_divergence(_histogram(data[order[size : 2 * size]]), half),
        "data_time": js_divergence(_histogram(data[first]), _histogram(data[len(data) // 2 + second])),
        "frames": size,
    }


@dataclass(frozen=True)
class ResidueTorsions:
    """Torsions of one residue that are looked at together: (φ, ψ), or one χ.

    ``residue`` is its label, ``number`` that of χ (0 for φ, ψ), ``atoms`` the quadruples [k]; with ``fold`` a half
    turn exchanges equal atoms, and the torsion counts twice, so that it is a full one.
    """

    residue: str
    number: int
    atoms: tuple[Quadruple, ...]
    fold: bool = False

    def angles(self, positions: ArrayLike) -> FloatArray:
        """[n, k] rad in [-π, π] of frames [n, N, 3]."""
        found = np.stack([torsion(positions, q) for q in self.atoms], axis=1)
        return np.angle(np.exp(2j * found)) if self.fold else found


def ramachandran_torsions(topology: Any) -> list[ResidueTorsions]:
    """(φ, ψ) of every residue that has both, in the order of the residues; by bonds, so that names do not matter."""
    found, atoms = dihedral_atoms(topology), list(topology.atoms())
    psi_of = {q[1]: q for q in found["psi"]}
    return [
        ResidueTorsions(residue_label(atoms[phi[2]].residue), 0, (phi, psi_of[phi[2]]))
        for phi in found["phi"]
        if phi[2] in psi_of
    ]


def chi_torsions(topology: Any) -> list[ResidueTorsions]:
    """Each side chain torsion χ1 to χ5, residue by residue; by the usual atom names, as MDTraj has them."""
    import mdtraj
    from mdtraj.geometry import dihedral

    atoms, graph = list(topology.atoms()), MoleculeGraph(topology)
    ours = mdtraj.Topology.from_openmm(topology)
    found: dict[tuple[int, int], ResidueTorsions] = {}
    for number in range(1, 6):
        quadruples = getattr(dihedral, f"indices_chi{number}")(ours).tolist()
        # Hydroxyproline has two χ2 for MDTraj; IUPAC's runs along the chain, not to the hydroxyl.
        for a, b, c, d in sorted(quadruples, key=lambda q: (graph.elements[q[3]] != "C", q)):
            residue = atoms[b].residue
            fold = (residue.name.strip(), number) in TWOFOLD and _equal_ends(graph, b, c, d)
            torsions = ResidueTorsions(residue_label(residue), number, ((a, b, c, d),), fold)
            found.setdefault((residue.index, number), torsions)
    return [found[key] for key in sorted(found)]


def _equal_ends(graph: MoleculeGraph, b: int, c: int, d: int) -> bool:
    """Whether c has one neighbour besides b and d, and that is bonded as d is: names do not tell a protonated acid."""
    others = [k for k in graph.neighbours[c] if k not in (b, d)]
    ends = [(graph.elements[k], sorted(graph.elements[j] for j in graph.neighbours[k])) for k in (d, *others)]
    return len(ends) == 2 and ends[0] == ends[1]


def ramachandran_distances(generated: ArrayLike, data: ArrayLike, topology: Any, seed: int = 0) -> list[dict[str, Any]]:
    """`distribution_distance` of (φ, ψ), bins of 10 degrees, for every residue that has both.

    Parameters
    ----------
    generated, data : array_like, shape [n, N, 3] and [m, N, 3]
    topology : openmm.app.Topology
        With bonds.
    seed : int

    Returns
    -------
    list of dict
        ``residue`` and the values of `distribution_distance`; empty for a molecule without such residues.
    """
    return [
        {"residue": t.residue, **distribution_distance(t.angles(generated), t.angles(data), seed)}
        for t in ramachandran_torsions(topology)
    ]


def chi_distances(generated: ArrayLike, data: ArrayLike, topology: Any, seed: int = 0) -> list[dict[str, Any]]:
    """`distribution_distance` of each side chain torsion χ1 to χ5, bins of 10 degrees.

    χ2 of PHE, TYR and ASP and χ3 of GLU count modulo a half turn, which exchanges equal atoms; not where one of the
    two oxygens is protonated.

    Parameters
    ----------
    generated, data : array_like, shape [n, N, 3] and [m, N, 3]
    topology : openmm.app.Topology
        With the usual atom names, by which MDTraj finds χ.
    seed : int

    Returns
    -------
    list of dict
        ``residue``, ``chi`` (1 to 5) and the values of `distribution_distance`; empty without amino acids.
    """
    return [
        {"residue": t.residue, "chi": t.number, **distribution_distance(t.angles(generated), t.angles(data), seed)}
        for t in chi_torsions(topology)
    ]
