"""Energies tamed for training. A regularised energy never enters a weight, an acceptance or a mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError


def regularise_energy(energy: Tensor, cut: float = 1.0e3, maximum: float = 1.0e20) -> Tensor:
    """Energy kept as it is up to `cut`, growing as its logarithm above, and held constant beyond `maximum`.

    .. math:: f(u) = u \\;(u \\le c), \\qquad f(u) = c \\, (1 + \\log(\\min(u, u_{max}) / c)) \\;(u > c)

    Value and slope are continuous at the cut. An untrained flow puts atoms on top of each other; without
    this, one such frame would make up the whole gradient (the idea is that of Noé, Olsson, Köhler and Wu, Science
    365, eaaw1147 (2019), supplementary materials; they let an e-fold count one kT, we c kT). A protein that was fitted
    by likelihood has clashes worth 1e9 kT: an e-fold must count more than the entropy that is gained by leaving them.

    For training only: it changes the distribution, so it never enters a weight.

    Parameters
    ----------
    energy
        Reduced energies, any shape; infinite and NaN entries are allowed.
    cut
        Where the logarithm begins, in kT, above 0.
    maximum
        Energies above it count as equal, in kT.

    Returns
    -------
    Tensor
        Same shape and type, finite. Entries at `maximum` or not finite have gradient zero, never NaN.

    Raises
    ------
    InputError
        `cut` and `maximum` are not finite with 0 < cut < maximum.
    """
    if not (math.isfinite(cut) and math.isfinite(maximum) and 0 < cut < maximum):
        raise InputError(f"The regulariser needs finite 0 < cut < maximum, not cut = {cut}, maximum = {maximum}.")
    plain = torch.isfinite(energy) & (energy < maximum)
    # Each branch sees only arguments that are harmless to it: `where` alone would let 0 * inf through
    # backwards.
    inside = torch.where(plain, energy, torch.full_like(energy, cut))
    above = torch.clamp(inside / cut, min=1.0)
    tamed = torch.where(inside > cut, cut * (1.0 + torch.log(above)), inside)
    return torch.where(plain, tamed, torch.full_like(energy, cut * (1.0 + math.log(maximum / cut))))
