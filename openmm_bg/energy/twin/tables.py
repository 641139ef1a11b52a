"""Tabulated functions, with the splines and the rounding of OpenMM."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from ...errors import InputError

#: Cubic Hermite basis on [0, 1]: coefficients of 1, t, t², t³ from the values and slopes (f0, f1, f0', f1').
HERMITE = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], dtype=np.float64)


def spline_slopes(values: NDArray[np.float64], step: float, periodic: bool) -> NDArray[np.float64]:
    """Slopes at the knots of the interpolating cubic spline on a uniform grid, along the first axis.

    Parameters
    ----------
    values
        [n, ...] values at the knots; if periodic, the first one is not repeated at the end.
    step
        Distance of the knots.
    periodic
        Whether the spline closes on itself; otherwise its second derivative vanishes at both ends (natural spline).

    Returns
    -------
    ndarray
        As ``values``. They solve m[i-1] + 4 m[i] + m[i+1] = 3 (f[i+1] - f[i-1]) / step.
    """
    n = len(values)
    matrix = 4.0 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)
    right = np.zeros_like(values)
    if periodic:
        if n == 1:
            return right
        # += : with two knots, both neighbours of a knot are the same one
        matrix = 4.0 * np.eye(n)
        for i in range(n):
            matrix[i, (i + 1) % n] += 1.0
            matrix[i, (i - 1) % n] += 1.0
        right[:] = 3.0 * (np.roll(values, -1, axis=0) - np.roll(values, 1, axis=0)) / step
    else:
        matrix[0, 0] = matrix[-1, -1] = 2.0
        right[1:-1] = 3.0 * (values[2:] - values[:-2]) / step
        right[0] = 3.0 * (values[1] - values[0]) / step
        right[-1] = 3.0 * (values[-1] - values[-2]) / step
    return np.linalg.solve(matrix, right.reshape(n, -1)).reshape(values.shape).astype(np.float64, copy=False)


def bicubic_patches(values: NDArray[np.float64], steps: tuple[float, float], periodic: bool) -> NDArray[np.float64]:
    """Coefficients [cells, cells, 4, 4] of t^a u^b on every cell of a grid, t and u in [0, 1].

    Slopes along each axis and the mixed derivative come from cubic splines; OpenMM has them so for its
    two-dimensional functions and for CMAP.
    """
    dx = spline_slopes(values, steps[0], periodic) * steps[0]
    dy = spline_slopes(values.T, steps[1], periodic).T * steps[1]
    dxy = spline_slopes(dy, steps[0], periodic) * steps[0]
    if periodic:
        values, dx, dy, dxy = (np.pad(a, ((0, 1), (0, 1)), mode="wrap") for a in (values, dx, dy, dxy))

    def corners(a: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([[a[:-1, :-1], a[:-1, 1:]], [a[1:, :-1], a[1:, 1:]]])

    given = np.concatenate(
        (
            np.concatenate((corners(values), corners(dy)), axis=1),
            np.concatenate((corners(dx), corners(dxy)), axis=1),
        ),
        axis=0,
    )
    return np.einsum("ac,bd,cdij->ijab", HERMITE, HERMITE, given)


class Table:
    """A tabulated function of one to three variables.

    ``evaluate(orders, *arguments)`` gives the function, or the derivative of these orders in each argument. Continuous
    functions vanish outside their range, discrete ones have no value there: NaN.
    """

    def __init__(self, n_arguments: int) -> None:
        self.n_arguments = n_arguments
        self._copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.coefficients: NDArray[np.float64] = np.zeros(0)

    def _on(self, like: Tensor) -> Tensor:
        where = (like.dtype, like.device)
        if where not in self._copies:
            self._copies[where] = torch.tensor(self.coefficients, dtype=like.dtype, device=like.device)
        return self._copies[where]

    def evaluate(self, orders: tuple[int, ...], *arguments: Any) -> Tensor:
        """Values of the function or of a derivative, for tensors that broadcast with each other."""
        raise NotImplementedError


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    like = next((a for a in arguments if isinstance(a, Tensor)), torch.zeros((), dtype=torch.float64))
    return list(torch.broadcast_tensors(*(torch.as_tensor(a, dtype=like.dtype, device=like.device) for a in arguments)))


def _horner(coefficients: list[Tensor], t: Tensor, order: int) -> Tensor:
    """Derivative of Σ c[k] t^k."""
    for _ in range(order):
        coefficients = [k * c for k, c in enumerate(coefficients)][1:]
    result = torch.zeros_like(t)
    for c in reversed(coefficients):
        result = result * t + c
    return result


class Discrete(Table):
    """Values at whole numbers; arguments are rounded."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        """``values`` [n0, n1, ...], the first argument counting along the first axis."""
        super().__init__(values.ndim)
        self.coefficients = values

    def evaluate(self, orders: tuple[int, ...], *arguments: Any) -> Tensor:
        given = _tensors(arguments)
        if any(orders):
            return torch.zeros_like(given[0])
        flat, inside = torch.zeros_like(given[0], dtype=torch.long), torch.ones_like(given[0], dtype=torch.bool)
        for size, argument in zip(self.coefficients.shape, given, strict=True):
            index = torch.floor(argument + 0.5)
            inside = inside & (index >= 0) & (index < size)
            flat = flat * size + torch.where(inside, index, 0.0).long()
        return torch.where(inside, self._on(given[0]).reshape(-1)[torch.where(inside, flat, 0)], torch.nan)


class Continuous1D(Table):
    """A cubic spline."""

    def __init__(self, values: NDArray[np.float64], low: float, high: float, periodic: bool) -> None:
        super().__init__(1)
        self.low, self.high, self.periodic = low, high, periodic
        self.step = (high - low) / (len(values) - 1)
        if periodic:  # the last value repeats the first
            slopes = spline_slopes(values[:-1], self.step, True)
            slopes = np.append(slopes, slopes[0])
        else:
            slopes = spline_slopes(values, self.step, False)
        slopes = slopes * self.step
        self.coefficients = HERMITE @ np.array([values[:-1], values[1:], slopes[:-1], slopes[1:]])

    def evaluate(self, orders: tuple[int, ...], *arguments: Any) -> Tensor:
        (x,) = _tensors(arguments)
        if self.periodic:
            x = self.low + torch.remainder(x - self.low, self.high - self.low)
        inside = (x >= self.low) & (x <= self.high)
        t = torch.where(inside, (x - self.low) / self.step, 0.0)
        cell = torch.clamp(torch.floor(t), max=self.coefficients.shape[1] - 1)
        picked = self._on(x)[:, cell.long()]
        value = _horner(list(picked), t - cell, orders[0]) / self.step ** orders[0]
        return torch.where(inside, value, torch.where(torch.isnan(x), torch.nan, 0.0))


class Continuous2D(Table):
    """A bicubic spline."""

    def __init__(
        self, values: NDArray[np.float64], ranges: tuple[tuple[float, float], tuple[float, float]], periodic: bool
    ) -> None:
        """``values`` [nx, ny]; if periodic, the last row and column repeat the first."""
        super().__init__(2)
        self.ranges, self.periodic = ranges, periodic
        shape = values.shape
        self.steps = tuple((high - low) / (n - 1) for (low, high), n in zip(ranges, shape, strict=True))
        grid = values[:-1, :-1] if periodic else values
        self.coefficients = bicubic_patches(grid, (self.steps[0], self.steps[1]), periodic)

    def evaluate(self, orders: tuple[int, ...], *arguments: Any) -> Tensor:
        given = _tensors(arguments)
        inside = torch.ones_like(given[0], dtype=torch.bool)
        bad = torch.isnan(given[0]) | torch.isnan(given[1])
        cells, fractions = [], []
        for (low, high), step, x, n in zip(self.ranges, self.steps, given, self.coefficients.shape[:2], strict=True):
            if self.periodic:
                x = low + torch.remainder(x - low, high - low)
            inside = inside & (x >= low) & (x <= high)
            t = torch.where(inside, (x - low) / step, 0.0)
            cell = torch.clamp(torch.floor(t), max=n - 1)
            cells.append(cell.long())
            fractions.append(t - cell)
        picked = self._on(given[0])[cells[0], cells[1]]
        rows = [_horner(list(picked[..., a, :].unbind(-1)), fractions[1], orders[1]) for a in range(4)]
        value = _horner(rows, fractions[0], orders[0])
        value = value / (self.steps[0] ** orders[0] * self.steps[1] ** orders[1])
        return torch.where(inside, value, torch.where(bad, torch.nan, 0.0))


def read_table(name: str, function: openmm.TabulatedFunction) -> Table:
    """OpenMM's tabulated function as a `Table`.

    Raises
    ------
    InputError
        A continuous function of three variables.
    """
    if isinstance(function, openmm.Discrete1DFunction):
        return Discrete(np.array(function.getFunctionParameters()))
    if isinstance(function, openmm.Discrete2DFunction):
        nx, ny, values = function.getFunctionParameters()
        return Discrete(np.array(values).reshape(ny, nx).T)
    if isinstance(function, openmm.Discrete3DFunction):
        nx, ny, nz, values = function.getFunctionParameters()
        return Discrete(np.array(values).reshape(nz, ny, nx).transpose(2, 1, 0))
    if isinstance(function, openmm.Continuous1DFunction):
        values, low, high = function.getFunctionParameters()
        return Continuous1D(np.array(values), low, high, function.getPeriodic())
    if isinstance(function, openmm.Continuous2DFunction):
        nx, ny, values, xlow, xhigh, ylow, yhigh = function.getFunctionParameters()
        grid = np.array(values).reshape(ny, nx).T
        return Continuous2D(grid, ((xlow, xhigh), (ylow, yhigh)), function.getPeriodic())
    raise InputError(
        f"The twin knows no tabulated function of the kind {type(function).__name__} ({name}): use the Context pool."
    )
