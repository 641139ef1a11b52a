"""Positions as callers have them, in nm: arrays, tensors, Quantities, and sequences of any of these."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_bg.errors import InputError

__all__ = ["in_nanometers", "tensor_to_array"]


def in_nanometers(positions: Any, shape: str) -> Tensor | NDArray[np.float64]:
    """Positions as plain numbers, nm; what has no unit is in nm already.

    Parameters
    ----------
    positions
        Numpy array, torch tensor, Quantity, or a sequence of these, however deep: OpenMM too converts one by one.
    shape
        What is expected, for the sentence of an error.

    Returns
    -------
    Tensor or ndarray
        A tensor as it came, its graph included; else a float64 array of any shape, not copied if it is one already.

    Raises
    ------
    InputError
        Strings, complex numbers, masked entries, no numbers at all, or units of something else than length.
    """
    while hasattr(positions, "value_in_unit"):
        positions = _strip(positions, shape)
    if isinstance(positions, Tensor):
        if positions.is_complex():
            raise InputError(f"positions must be real numbers of shape {shape}, not complex ones.")
        return positions
    plain = _plain(positions, shape)
    try:
        array = np.asarray(plain)
        # Numpy would make numbers of strings and of None, and drop imaginary parts.
        real = array.dtype.kind in "biuf" or (
            array.dtype.kind == "O" and all(isinstance(value, Real) for value in array.flat)
        )
        if real:
            return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"positions must be real numbers of shape {shape}.") from None
    kind = {"c": "complex ones", "U": "strings", "S": "strings"}.get(array.dtype.kind, f"of type {array.dtype}")
    raise InputError(f"positions must be real numbers of shape {shape}, not {kind}.")


def tensor_to_array(tensor: Tensor) -> NDArray[np.float64]:
    """A real tensor of any type and device as a float64 array; its memory is shared if it is one on the CPU already."""
    try:
        # Via float64: numpy knows no bfloat16.
        array: NDArray[np.float64] = tensor.detach().cpu().to(torch.float64).resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(f"positions must be a dense tensor, not one of {tensor.dtype}, {tensor.layout}.") from error
    return array


def _plain(value: Any, shape: str) -> Any:
    """The same without units, tensors and masks, at any depth."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry, shape) for entry in value]
    if isinstance(value, Tensor):
        return value if value.is_complex() else tensor_to_array(value)
    if hasattr(value, "value_in_unit"):
        return _plain(_strip(value, shape), shape)
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise InputError(f"positions must be real numbers of shape {shape}: fill or leave out the masked ones.")
        return np.ma.getdata(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        return _plain(value.tolist(), shape)
    return value


def _strip(quantity: Any, shape: str) -> Any:
    """The numbers of a Quantity."""
    from openmm import unit  # after torch: OpenMM's torch plugin loads only then

    try:
        return quantity.value_in_unit(unit.nanometer)
    except TypeError:
        where = getattr(quantity, "unit", "another unit")
        raise InputError(f"positions must be lengths of shape {shape}, not in {where}.") from None
