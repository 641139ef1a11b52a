"""Positions as callers have them, made into what OpenMM takes fastest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..lengths import in_nanometers, tensor_to_array

#: Coordinates beyond this are not sent to OpenMM, nm: their squares overflow single precision, and the tests
#: on squared displacements by which a platform notices that its neighbour list is stale would fail.
FARTHEST = 1.0e18


def as_frames(positions: Any, n_atoms: int) -> NDArray[np.float64]:
    """Positions as a C-contiguous float64 array [B, N, 3] in nm, not copied if they are one already.

    Parameters
    ----------
    positions
        Numpy array, torch tensor, Quantity or nested sequence of any of these, [B, N, 3].
    n_atoms
        N.

    Raises
    ------
    InputError
        Another shape, not real numbers, not lengths, or masked entries.
    """
    numbers = in_nanometers(positions, f"[B, {n_atoms}, 3]")
    # OpenMM crashes on a tensor.
    array = np.ascontiguousarray(tensor_to_array(numbers) if isinstance(numbers, Tensor) else numbers)
    if array.ndim != 3 or array.shape[1:] != (n_atoms, 3):
        raise InputError(f"positions must have shape [B, {n_atoms}, 3], not {list(array.shape)}.")
    return array


def sound_rows(frames: NDArray[np.float64]) -> list[int]:
    """Rows all of whose coordinates are finite (and the root of the sum of their squares is below `FARTHEST`).

    Of others OpenMM's platforms make exceptions, stale energies or zeros.
    """
    if frames.shape[1] == 0:
        return list(range(len(frames)))
    squares = np.einsum("bni,bni->b", frames, frames)  # in one pass, without a copy
    rows: list[int] = np.flatnonzero(squares < FARTHEST**2).tolist()  # NaN compares as False
    return rows
