"""The reduced potential u = U/kT as a differentiable torch function."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from openmm import unit  # isort: skip  (torch first: OpenMM's torch plugin loads only then)

from ..errors import InputError
from .pool import ContextPool

#: Molar gas constant R in kJ/mol/K, as OpenMM has it (Boltzmann's constant per mole).
BOLTZMANN: float = float(unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin))


def in_kelvin(temperature: Any) -> float:
    """A temperature, however it is given, as a positive number of kelvin.

    Parameters
    ----------
    temperature
        A positive number of kelvin, or an `openmm.unit.Quantity`.

    Raises
    ------
    InputError
        Not a temperature, or not positive and finite.
    """
    value = temperature
    if unit.is_quantity(value):
        if not value.unit.is_compatible(unit.kelvin):
            raise InputError(f"The temperature must be in kelvin, not in {value.unit}.")
        value = value.value_in_unit(unit.kelvin)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"The temperature must be a number of kelvin or a Quantity, not {temperature!r}.")
    kelvin = float(value)
    if not (math.isfinite(kelvin) and kelvin > 0.0):
        raise InputError(f"The temperature must be positive and finite, not {temperature}.")
    return kelvin


def thermal_energy(temperature: Any) -> float:
    """kT in kJ/mol, of what `in_kelvin` accepts."""
    return BOLTZMANN * in_kelvin(temperature)


class _ReducedEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, pool: ContextPool, kT: float) -> Tensor:
        energies, forces = pool.evaluate_on_device(positions)
        assert forces is not None
        u = energies / kT
        # In double precision to the end: the slopes of clashes overflow single precision, their products with
        # the small factor that a regulariser sends back do not.
        ctx.save_for_backward(forces / -kT, torch.isfinite(u))
        ctx.dtype = positions.dtype
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        slope, finite = ctx.saved_tensors
        # The slope is zero where u is not finite, but 0 times an infinite or NaN `grad` would be NaN.
        product = torch.where(finite, grad, 0.0)[:, None, None] * slope
        return product.to(ctx.dtype), None, None


def reduced_energy(positions: Tensor, pool: ContextPool, temperature: Any) -> Tensor:
    """Reduced potential u(x) = U(x)/kT, with du/dx = -F/kT (notation of docs/theory.md).

    Parameters
    ----------
    positions
        [B, N, 3] nm, any floating type.
    pool
        Where the energies come from.
    temperature
        The target's temperature: kelvin, or a Quantity.

    Returns
    -------
    Tensor
        [B] float64 on the device of the positions; +inf where the energy is not finite, with gradient zero there.
        Differentiable once. Nothing leaves a GPU that holds the pool's twin as well.

    Raises
    ------
    InputError
        A wrong shape or temperature.
    """
    kT = thermal_energy(temperature)
    if not isinstance(positions, Tensor):
        raise InputError(f"positions must be a torch tensor, not {type(positions).__name__}.")
    if torch.is_grad_enabled() and positions.requires_grad:
        result: Tensor = _ReducedEnergy.apply(positions, pool, kT)
        return result
    return pool.evaluate_on_device(positions, forces=False)[0] / kT
