"""Backbone torsions of a Topology, their basins, and free energies over them.

φ, ψ and ω are found by bonds, not by names: a peptide bond is a C-N bond between two residues whose carbon carries an
oxygen, and everything else follows from the atoms around it. Caps (ACE, NME, NH2) and non-standard names need no
special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Quadruple = tuple[int, int, int, int]

__all__ = [
    "dihedral_atoms",
    "is_trans",
    "phi_basin",
    "ramachandran_free_energy",
    "torsion",
    "torsion_free_energy",
]

#: The basin of alanine dipeptide whose free energy the demo asks for (C7ax), rad.
PHI_BASIN = (0.0, 2.0)


class _Bonds:
    """Neighbours of the atoms of a Topology, by element and residue."""

    def __init__(self, topology: Any) -> None:
        self.atoms = list(topology.atoms())
        self._neighbours: list[list[int]] = [[] for _ in self.atoms]
        n_bonds = 0
        for bond in topology.bonds():
            a, b = bond[0].index, bond[1].index
            self._neighbours[a].append(b)
            self._neighbours[b].append(a)
            n_bonds += 1
        if n_bonds == 0 and len(self.atoms) > 1:
            raise InputError(
                "The topology has no bonds: give it some, e.g. with topology.createStandardBonds() or CONECT records."
            )

    def symbol(self, atom: int) -> str:
        element = self.atoms[atom].element  # None for virtual sites
        return "" if element is None else element.symbol

    def around(self, atom: int, symbol: str, *, residue: Any = None) -> list[int]:
        """Neighbours of an element, within a residue if one is given, by index."""
        return sorted(
            other
            for other in self._neighbours[atom]
            if self.symbol(other) == symbol and (residue is None or self.atoms[other].residue is residue)
        )

    def is_carbonyl(self, atom: int) -> bool:
        """A carbon with an oxygen that has no other neighbour (=O or -O⁻, but not a hydroxyl group's)."""
        return self.symbol(atom) == "C" and any(len(self._neighbours[o]) == 1 for o in self.around(atom, "O"))


def dihedral_atoms(topology: Any) -> dict[str, list[Quadruple]]:
    """The backbone dihedrals φ, ψ and ω of every residue that has them.

    Parameters
    ----------
    topology : openmm.app.Topology
        With bonds; caps such as ACE, NME and NH2 count as neighbours.

    Returns
    -------
    dict
        ``"phi"``: C(i-1), N, CA, C; ``"psi"``: N, CA, C, N(i+1); ``"omega"``: CA(i-1), C(i-1), N, CA, where a cap's
        methyl carbon stands for CA. Atom indices (0-based), in the order of the residues; empty lists if the molecule
        has no peptide bond.

    Raises
    ------
    InputError
        The topology has no bonds.

    References
    ----------
    IUPAC-IUB Commission on Biochemical Nomenclature, Biochemistry 9, 3471 (1970).
    """
    bonds = _Bonds(topology)
    found: dict[str, list[Quadruple]] = {"phi": [], "psi": [], "omega": []}
    for nitrogen in (atom for atom in bonds.atoms if bonds.symbol(atom.index) == "N"):
        n, residue = nitrogen.index, nitrogen.residue
        for c in bonds.around(n, "C"):
            previous = bonds.atoms[c].residue
            if previous is residue or not bonds.is_carbonyl(c):
                continue
            before = bonds.around(c, "C", residue=previous)
            after = bonds.around(n, "C", residue=residue)
            # Proline's nitrogen has a second carbon, CD; CA is the one with the carboxyl carbon.
            alphas = [a for a in after if any(map(bonds.is_carbonyl, bonds.around(a, "C", residue=residue)))] or after
            for alpha in before[:1]:
                for own_n in bonds.around(alpha, "N", residue=previous)[:1]:
                    found["psi"].append((own_n, alpha, c, n))
                if alphas:
                    found["omega"].append((alpha, c, n, alphas[0]))
            for alpha in alphas[:1]:
                ends = [e for e in bonds.around(alpha, "C", residue=residue) if bonds.is_carbonyl(e)]
                if ends:
                    found["phi"].append((c, n, alpha, ends[0]))
    return found


def torsion(positions: ArrayLike, atoms: Sequence[int]) -> FloatArray:
    """Torsion of four atoms in every frame, in [-π, π].

    Parameters
    ----------
    positions : array_like, shape [n, N, 3]
        Any unit of length.
    atoms : sequence of four int

    Returns
    -------
    ndarray, shape [n]
        rad, IUPAC sign; NaN for frames with non-finite positions of these atoms.

    Raises
    ------
    InputError
        The shape is another, or an atom is not among the N.
    """
    from openmm_bg.simulate import torsion_angle

    array = np.asarray(positions)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise InputError(f"positions must have the shape [n, N, 3], got {array.shape}.")
    if len(atoms) != 4 or min(atoms) < 0 or max(atoms) >= array.shape[1]:
        raise InputError(f"A torsion needs four atoms among 0 to {array.shape[1] - 1}, got {tuple(atoms)}.")
    with np.errstate(invalid="ignore"):
        return torsion_angle(array, atoms)


def is_trans(positions: ArrayLike, omega: Iterable[Sequence[int]]) -> BoolArray:
    """Whether every amide bond of a frame is trans, |ω| > π/2.

    Parameters
    ----------
    positions : array_like, shape [n, N, 3]
    omega : iterable of four int
        As ``dihedral_atoms(topology)["omega"]``; none at all makes every frame trans.

    Returns
    -------
    ndarray of bool, shape [n]
        False for frames with non-finite positions.
    """
    result = np.ones(len(np.asarray(positions)), dtype=np.bool_)
    for atoms in omega:
        result &= np.abs(torsion(positions, atoms)) > 0.5 * np.pi
    return result


def phi_basin(phi: ArrayLike) -> BoolArray:
    """Which φ [n] (rad) lie in the basin 0 < φ < 2 rad; NaN does not."""
    array = np.asarray(phi, dtype=np.float64)
    return (array > PHI_BASIN[0]) & (array < PHI_BASIN[1])


def _weights(log_weights: ArrayLike | None, keep: BoolArray) -> FloatArray:
    """Weights of the frames that are kept, largest 1; zeros if all are zero."""
    if log_weights is None:
        return np.ones(int(keep.sum()))
    array = np.asarray(log_weights, dtype=np.float64)
    if array.shape != keep.shape:
        raise InputError(f"log_weights must have one value a frame, {keep.shape}, got {array.shape}.")
    if np.any(np.isnan(array) | (array == np.inf)):
        raise InputError("log_weights holds NaN or +inf: give weights of zero as -inf, mend the others.")
    array = array[keep]
    top = array.max(initial=-np.inf)
    return np.zeros(array.size) if top == -np.inf else np.exp(array - top)


def ramachandran_free_energy(
    phi: ArrayLike, psi: ArrayLike, log_weights: ArrayLike | None = None, bins: int = 60
) -> FloatArray:
    """Free energy over the (φ, ψ) plane, -ln p, its minimum at zero.

    Parameters
    ----------
    phi, psi : array_like, shape [n]
        rad in [-π, π]; frames with a NaN are left out.
    log_weights : array_like, shape [n], optional
        Up to a common constant; -inf is a weight of zero. Default: equal weights.
    bins : int
        Along each axis, over [-π, π].

    Returns
    -------
    ndarray, shape [bins, bins]
        kT; first axis φ, second ψ. NaN where no frame of non-zero weight lies.

    Raises
    ------
    InputError
        Shapes disagree, or a log-weight is NaN or +inf.
    """
    x, y = np.asarray(phi, dtype=np.float64), np.asarray(psi, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"phi and psi must be one-dimensional and equally long, got {x.shape} and {y.shape}.")
    keep = np.isfinite(x) & np.isfinite(y)
    weights = _weights(log_weights, keep)
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    mass, _, _ = np.histogram2d(x[keep], y[keep], bins=(edges, edges), weights=weights)
    free_energy = np.full(mass.shape, np.nan)
    occupied = mass > 0
    free_energy[occupied] = -np.log(mass[occupied])
    return free_energy - free_energy[occupied].min() if occupied.any() else free_energy


def torsion_free_energy(
    phi: ArrayLike, log_weights: ArrayLike | None = None, bins: int = 48, n_blocks: int = 20
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Free energy along one torsion, with errors from a jackknife over blocks.

    Parameters
    ----------
    phi : array_like, shape [n]
        rad in [-π, π], in the order of time if the frames are correlated; NaN is left out.
    log_weights : array_like, shape [n], optional
        Up to a common constant; -inf is a weight of zero.
    bins : int
        Over [-π, π].
    n_blocks : int
        Contiguous blocks of frames; each should be longer than the correlation time.

    Returns
    -------
    centres, free_energy, error : ndarray, shape [bins]
        rad, kT, kT. The free energy is -ln of the normalised density per rad, so that profiles of several methods
        compare without a shift. NaN where no weight lies; the error is NaN also where one block holds all the weight.

    Raises
    ------
    InputError
        Shapes disagree, or a log-weight is NaN or +inf.

    References
    ----------
    Delete-one-block jackknife: Künsch, Ann. Statist. 17, 1217 (1989).
    """
    x = np.asarray(phi, dtype=np.float64)
    if x.ndim != 1:
        raise InputError(f"phi must be one-dimensional, got shape {x.shape}.")
    if n_blocks < 2:
        raise InputError(f"A jackknife needs at least two blocks, got {n_blocks}.")
    keep = np.isfinite(x)
    weights = _weights(log_weights, keep)
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    where = np.clip(np.digitize(x[keep], edges) - 1, 0, bins - 1)  # φ = π belongs to the last bin
    block = np.arange(where.size) * n_blocks // max(1, where.size)
    mass = np.bincount(block * bins + where, weights, minlength=n_blocks * bins).reshape(n_blocks, bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        full = -np.log(mass.sum(0) / mass.sum() / (edges[1] - edges[0]))
        rest = mass.sum(0) - mass
        # Differences of sums leave rounding errors where a block held everything; they are no mass.
        rest[rest < 1e-12 * mass.sum(0)] = 0.0
        without = -np.log(rest / rest.sum(1, keepdims=True) / (edges[1] - edges[0]))
        error = np.sqrt((n_blocks - 1) * np.var(without, axis=0))
    full[~np.isfinite(full)] = np.nan
    error[~np.isfinite(error) | np.isnan(full)] = np.nan
    return 0.5 * (edges[1:] + edges[:-1]), full, error
