"""The target density in internal coordinates, log π(y, s) up to a constant (docs/theory.md, notation)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .pool import ContextPool
from .reduced import reduced_energy, thermal_energy


class Coordinates(Protocol):
    """What is asked of a coordinate map; `openmm_bg.coordinates.CoordinateMap` is the one in use."""

    def to_positions(self, y: Tensor, s: Tensor) -> Tensor: ...

    def log_volume(self, y: Tensor, s: Tensor) -> Tensor: ...

    def in_domain(self, y: Tensor, s: Tensor) -> Tensor: ...


class Target:
    """log π(y, s) = -u(x(y, s)) + log J + Φ: the density that flow samples are weighed against.

    Parameters
    ----------
    coordinates
        Map between positions and (y, s), with its log-volume log J + Φ and its domain.
    pool
        Source of energies.
    temperature
        The target's temperature: kelvin, or a Quantity.

    Raises
    ------
    InputError
        The temperature is not positive.
    """

    def __init__(self, coordinates: Coordinates, pool: ContextPool, temperature: Any) -> None:
        self.coordinates = coordinates
        self.pool = pool
        self.kT = thermal_energy(temperature)
        self.temperature = temperature

    def log_density(self, y: Tensor, s: Tensor) -> Tensor:
        """log π(y, s), unnormalised.

        Parameters
        ----------
        y, s
            Modelled and kept coordinates, [B, D] and [B, S].

        Returns
        -------
        Tensor
            [B] float64: -inf outside the coordinates' domain and where the energy is not finite.
            Differentiable; rows at -inf have gradient zero.

        Raises
        ------
        InputError
            y and s are not matrices of equally many rows, or complex.
        """
        return self.log_density_and_positions(y, s)[0]

    def log_density_and_positions(self, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """As `log_density`, with the positions x(y, s) it was evaluated at.

        Returns
        -------
        tuple
            log π [B] float64, and positions [B, N, 3] float64 in nm: NaN for rows outside the domain, where
            the map from internal coordinates would fold them back inside; detached from the graph.
        """
        if y.ndim != 2 or s.ndim != 2 or len(y) != len(s):
            raise InputError(f"y and s must be of shape [B, D] and [B, S], not {tuple(y.shape)} and {tuple(s.shape)}.")
        if y.is_complex() or s.is_complex():
            raise InputError("y and s must be real numbers, not complex ones.")
        # Whatever enters a weight is computed in double precision.
        y, s = y.to(torch.float64), s.to(torch.float64)
        with torch.no_grad():
            # Before q -> x, which would give a forbidden angle the energy of its mirror image and a finite
            # weight.
            inside = self.coordinates.in_domain(y, s)
            inside = inside & torch.isfinite(y).all(dim=1) & torch.isfinite(s).all(dim=1)
        y_in, s_in = y[inside], s[inside]
        good = torch.ones(len(y_in), dtype=torch.bool, device=y.device)
        for part in (y_in, s_in):
            if part.requires_grad:
                # `good` is filled in below, before anything runs backwards. Masking the sum of all paths is
                # the one place that stops a NaN of any of them (0 * inf) from reaching the caller's gradient.
                part.register_hook(lambda grad, good=good: torch.where(good[:, None], grad, 0.0))
        x = self.coordinates.to_positions(y_in, s_in)
        density = self.coordinates.log_volume(y_in, s_in).to(torch.float64) - reduced_energy(
            x, self.pool, self.temperature
        )
        good.copy_(torch.isfinite(density.detach()))
        density = torch.where(good, density, -torch.inf)
        if bool(inside.all()):
            return density, x.detach()
        log_density = torch.full((len(y),), -torch.inf, dtype=torch.float64, device=y.device)
        positions = torch.full((len(y), *x.shape[1:]), torch.nan, dtype=torch.float64, device=y.device)
        positions[inside] = x.detach()
        return log_density.index_put((inside,), density), positions
