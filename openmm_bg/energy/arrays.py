"""Positions as callers have them, made into what OpenMM takes fastest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openmm import unit  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from ..errors import InputError

#: Coordinates beyond this are not sent to OpenMM, nm: their squares overflow single precision, and the tests
#: on squared displacements by which a platform notices that its neighbour list is stale would fail.
FARTHEST = 1.0e18


def as_frames(positions: Any, n_atoms: int) -> NDArray[np.float64]:
    """Positions as a C-contiguous float64 array [B, N, 3] in nm, not copied if they are one already.

    Parameters
    ----------
    positions
        Numpy array, torch tensor, Quantity or nested sequence, [B, N, 3].
    n_atoms
        N.

    Raises
    ------
    InputError
        Another shape, or not numbers.
    """
    if isinstance(positions, torch.Tensor):
        # OpenMM crashes on a tensor; numpy shares its memory.
        positions = positions.detach().cpu().numpy()
    elif unit.is_quantity(positions):
        positions = positions.value_in_unit(unit.nanometer)
    try:
        array = np.ascontiguousarray(positions, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"positions must be numbers of shape [B, {n_atoms}, 3].") from None
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
