"""Least-squares superposition of frames, in pieces of bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]

#: Bytes of float64 positions that are handled at once.
PIECE_BYTES = 16 * 1024**2


def pieces(positions: NDArray[np.floating]) -> list[slice]:
    """Slices over the frames of positions [n, N, 3], each of at most about 16 MiB in float64."""
    step = max(1, PIECE_BYTES // (24 * max(1, positions.shape[1])))
    return [slice(start, min(start + step, len(positions))) for start in range(0, len(positions), step)]


def superpose(positions: ArrayLike, reference: ArrayLike, atoms: ArrayLike) -> FloatArray:
    """Frames moved rigidly so that the chosen atoms lie closest to those of a reference.

    Parameters
    ----------
    positions : array_like, shape [n, N, 3]
        nm.
    reference : array_like, shape [N, 3]
        nm.
    atoms : array_like of int, shape [a]
        Atoms that are fitted, each with the same weight.

    Returns
    -------
    ndarray, shape [n, N, 3]
        nm; never a mirror image.

    Raises
    ------
    InputError
        No atom to fit, or a shape that does not match.

    References
    ----------
    Kabsch, Acta Cryst. A 32, 922 (1976).
    """
    x, target, index = np.asarray(positions, np.float64), np.asarray(reference, np.float64), np.asarray(atoms, int)
    if x.ndim != 3 or target.shape != x.shape[1:]:
        raise InputError(f"Frames [n, N, 3] and a reference [N, 3] are needed, got {x.shape} and {target.shape}.")
    if index.size == 0:
        raise InputError("There is no atom to superpose frames on.")
    x = x - x[:, index].mean(1, keepdims=True)
    centre = target[index].mean(0)
    u, _, vt = np.linalg.svd(np.swapaxes(x[:, index], 1, 2) @ (target[index] - centre))
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]  # a rotation, not a reflection
    return x @ (u @ vt) + centre


def rmsf(positions: ArrayLike, atoms: ArrayLike, iterations: int = 4) -> FloatArray:
    """Root mean square fluctuation of every atom about its mean, after superposition on the mean structure.

    Parameters
    ----------
    positions : array_like, shape [n, N, 3]
        nm.
    atoms : array_like of int
        Atoms that are superposed.
    iterations : int
        The mean depends on the superposition and this on the mean: how often both are repeated.

    Returns
    -------
    ndarray, shape [N]
        nm.
    """
    x = np.asarray(positions)
    mean = np.asarray(x[0], np.float64)
    for _ in range(iterations):
        mean = sum((superpose(x[part], mean, atoms).sum(0) for part in pieces(x)), np.zeros_like(mean)) / len(x)
    square = np.zeros(x.shape[1])
    for part in pieces(x):
        square += ((superpose(x[part], mean, atoms) - mean) ** 2).sum((0, 2))
    return np.sqrt(square / len(x))
