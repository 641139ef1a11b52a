"""ΔD: how far the backbone distances of generated frames lie from those of data, frame against frame."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]

#: Frames in a batch (Kim et al. 2024).
BATCH = 1000
ANGSTROM = 10.0  # per nm
#: Distances that are held at once.
_PIECE = 4_000_000


def backbone_atoms(topology: Any) -> tuple[NDArray[np.int64], str]:
    """The atoms whose distances ΔD compares, and what they are.

    Parameters
    ----------
    topology : openmm.app.Topology
        Of one molecule, with bonds.

    Returns
    -------
    atoms : ndarray of int
        N, CA and C of amino acids with the heavy chain of their caps, as in the W2 loss; of a molecule without amino
        acids its longest chain of heavy atoms.
    name : str
        Which of the two.
    """
    graph = MoleculeGraph(topology)
    peptide = graph.peptide_backbone()
    flags, name = (peptide, "N, CA, C") if any(peptide) else (graph.backbone(), "longest chain of heavy atoms")
    return np.flatnonzero(flags), name


def pair_distances(positions: ArrayLike, atoms: ArrayLike) -> FloatArray:
    """Distances of all pairs of the chosen atoms, in the order of the upper triangle.

    Parameters
    ----------
    positions : array_like, shape [n, N, 3]
        nm.
    atoms : array_like of int, shape [a]

    Returns
    -------
    ndarray, shape [n, a (a - 1) / 2]
        nm.
    """
    chosen = np.asarray(positions)[:, np.asarray(atoms, int)].astype(np.float64)
    i, j = np.triu_indices(chosen.shape[1], k=1)
    found = np.empty((len(chosen), i.size))
    step = max(1, _PIECE // max(1, 6 * i.size))  # the difference vectors are what would fill the memory
    for start in range(0, len(chosen), step):
        rows = slice(start, start + step)
        found[rows] = np.linalg.norm(chosen[rows, i] - chosen[rows, j], axis=-1)
    return found


def mean_distances(positions: ArrayLike, atoms: ArrayLike) -> FloatArray:
    """Mean distance matrix of the chosen atoms over frames, in Å.

    Parameters
    ----------
    positions : array_like, shape [n, N, 3]
        nm.
    atoms : array_like of int, shape [a]

    Returns
    -------
    ndarray, shape [a, a]
    """
    x, index = np.asarray(positions), np.asarray(atoms, int)
    i, j = np.triu_indices(index.size, k=1)
    step = max(1, _PIECE // max(1, i.size))
    total = np.zeros(i.size)
    for start in range(0, len(x), step):
        total += pair_distances(x[start : start + step], index).sum(0)
    found = np.zeros((index.size, index.size))
    found[i, j] = found[j, i] = ANGSTROM * total / len(x)
    return found


def _batch_difference(a: NDArray[np.floating], b: NDArray[np.floating], atoms: NDArray[np.int64]) -> float:
    """Mean over rows and pairs of atoms of |d_a - d_b|, nm."""
    step = max(1, _PIECE // (atoms.size * atoms.size))
    total = 0.0
    for k in range(0, len(a), step):
        rows = slice(k, k + step)
        total += float(np.abs(pair_distances(a[rows], atoms) - pair_distances(b[rows], atoms)).mean(1).sum())
    return total / len(a)


def delta_d(
    generated: ArrayLike,
    data: ArrayLike,
    atoms: ArrayLike,
    *,
    training: ArrayLike | None = None,
    batch: int = BATCH,
    seed: int = 0,
) -> dict[str, Any]:
    """ΔD of generated frames against data, with data against data beside it.

    Batches of generated and of data frames are paired at random; ΔD is the mean over the pairs of frames of the mean
    over all pairs of atoms of abs(d_generated - d_data). It has no lower bound of zero: two sets of the same spread
    have the value of data against data, and a value *below* that means that the generated frames spread too little.

    Parameters
    ----------
    generated, data : array_like, shape [n, N, 3] and [m, N, 3]
        nm; data need at least two frames.
    atoms : array_like of int
        From `backbone_atoms`.
    training : array_like, shape [k, N, 3], optional
        nm; frames that the flow was trained on. Their ΔD against the data is what a flow that repeats them has:
        where it lies above data against data, the MD is too short to agree with itself.
    batch : int
        Frames in a batch; fewer if there are fewer.
    seed : int
        Of the pairing.

    Returns
    -------
    dict
        ``generated``, ``generated_sd``, ``data``, ``data_sd`` (Å; mean and standard deviation over batches, the latter
        NaN for one batch), ``training`` and ``training_sd`` (NaN without training frames), ``ratio`` of generated to
        data, ``batch`` and ``batches``.

    Raises
    ------
    InputError
        No generated frame, fewer than two data frames, fewer than two atoms, or a batch below 1.

    References
    ----------
    Kim et al., arXiv 2401.04246 (2024), Table 1.
    """
    x, y, index = np.asarray(generated), np.asarray(data), np.asarray(atoms, int)
    if len(x) < 1 or len(y) < 2 or index.size < 2 or batch < 1:
        raise InputError(
            f"ΔD needs a generated frame, two data frames, two atoms and a batch of at least 1, got {len(x)}, "
            f"{len(y)}, {index.size} and {batch}."
        )
    size = min(batch, len(x), len(y))
    rng = np.random.default_rng(seed)

    def against_data(frames: NDArray[np.floating]) -> list[float]:
        order = rng.permutation(len(frames))
        n = min(size, len(frames))
        return [
            _batch_difference(frames[order[k : k + n]], y[rng.permutation(len(y))[:n]], index)
            for k in range(0, len(frames) - n + 1, n)
        ]

    found = against_data(x)
    baseline = []
    for _ in found:
        mixed = rng.permutation(len(y))
        # Two halves without a common frame where there are enough; else a ring, where no frame meets itself.
        other = mixed[size : 2 * size] if len(y) >= 2 * size else np.roll(mixed, 1)[:size]
        baseline.append(_batch_difference(y[mixed[:size]], y[other], index))
    known = [] if training is None or len(np.asarray(training)) == 0 else against_data(np.asarray(training))
    ours, theirs = ANGSTROM * np.array(found), ANGSTROM * np.array(baseline)
    several = len(ours) > 1
    return {
        "generated": float(ours.mean()),
        "generated_sd": float(ours.std(ddof=1)) if several else float("nan"),
        "data": float(theirs.mean()),
        "data_sd": float(theirs.std(ddof=1)) if several else float("nan"),
        "training": float(ANGSTROM * np.mean(known)) if known else float("nan"),
        "training_sd": float(ANGSTROM * np.std(known, ddof=1)) if len(known) > 1 else float("nan"),
        "ratio": float(ours.mean() / theirs.mean()) if theirs.mean() > 0 else float("nan"),
        "batch": size,
        "batches": len(ours),
    }
