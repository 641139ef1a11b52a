"""Tabulated functions, with the splines and the rounding of OpenMM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
    functions vanish outside their range; discrete ones go on beyond it with the value at its end, each argument for
    itself.
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
    """Tensors of one shape; numbers are written on the device, for to copy them there would wait for it."""
    like = next((a for a in arguments if isinstance(a, Tensor)), torch.zeros((), dtype=torch.float64))
    given = (a.to(like) if isinstance(a, Tensor) else like.new_full((), a) for a in arguments)
    return list(torch.broadcast_tensors(*given))


def _horner(coefficients: list[Tensor], t: Tensor, order: int) -> Tensor:
    """Derivative of Σ c[k] t^k."""
    for _ in range(order):
        coefficients = [k * c for k, c in enumerate(coefficients)][1:]
    result = torch.zeros_like(t)
    for c in reversed(coefficients):
        result = result * t + c
    return result


def _locate(x: Tensor, bounds: tuple[float, float], cells: int, periodic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cell of each argument, the place in it (0 to 1; NaN stays NaN), and whether the argument is out of range."""
    low, high = bounds
    if periodic:
        x = low + torch.remainder(x - low, high - low)
    outside = (x < low) | (x > high)
    t = torch.where(outside, 0.0, (x - low) / ((high - low) / cells))
    cell = torch.clamp(torch.floor(t), max=cells - 1)
    return torch.nan_to_num(cell).long(), t - cell, outside


class Discrete(Table):
    """Values at whole numbers; arguments are rounded, halves up, and NaN has no value."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        """``values`` [n0, n1, ...], the first argument counting along the first axis."""
        super().__init__(values.ndim)
        self.coefficients = values

    def evaluate(self, orders: tuple[int, ...], *arguments: Any) -> Tensor:
        given = _tensors(arguments)
        if any(orders):
            return torch.zeros_like(given[0])
        flat, unknown = torch.zeros_like(given[0], dtype=torch.long), torch.zeros_like(given[0], dtype=torch.bool)
        for size, argument in zip(self.coefficients.shape, given, strict=True):
            index = torch.clamp(torch.floor(argument + 0.5), 0, size - 1)
            unknown = unknown | torch.isnan(argument)
            flat = flat * size + torch.nan_to_num(index).long()
        return torch.where(unknown, torch.nan, self._on(given[0]).reshape(-1)[flat])


class Continuous1D(Table):
    """A cubic spline."""

    def __init__(self, values: NDArray[np.float64], bounds: tuple[float, float], periodic: bool) -> None:
        """``values`` [n]; if periodic, the last one repeats the first."""
        super().__init__(1)
        self.bounds, self.periodic = bounds, periodic
        self.step = (bounds[1] - bounds[0]) / (len(values) - 1)
        if periodic:
            slopes = spline_slopes(values[:-1], self.step, True)
            slopes = np.append(slopes, slopes[0])
        else:
            slopes = spline_slopes(values, self.step, False)
        slopes = slopes * self.step
        self.coefficients = HERMITE @ np.array([values[:-1], values[1:], slopes[:-1], slopes[1:]])

    def evaluate(self, orders: tuple[int, ...], *arguments: Any) -> Tensor:
        (x,) = _tensors(arguments)
        cell, t, outside = _locate(x, self.bounds, self.coefficients.shape[1], self.periodic)
        value = _horner(list(self._on(x)[:, cell]), t, orders[0]) / self.step ** orders[0]
        return torch.where(outside, 0.0, value)


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
        x, y = _tensors(arguments)
        i, t, outside = _locate(x, self.ranges[0], self.coefficients.shape[0], self.periodic)
        j, u, beside = _locate(y, self.ranges[1], self.coefficients.shape[1], self.periodic)
        picked = self._on(x)[i, j]
        rows = [_horner(list(picked[..., a, :].unbind(-1)), u, orders[1]) for a in range(4)]
        value = _horner(rows, t, orders[0])
        value = value / (self.steps[0] ** orders[0] * self.steps[1] ** orders[1])
        return torch.where(outside | beside, 0.0, value)


class Continuous3D(Table):
    """A tricubic spline: the cubic splines along the three axes, one of the other."""

    def __init__(self, values: NDArray[np.float64], ranges: tuple[tuple[float, float], ...], periodic: bool) -> None:
        """``values`` [nx, ny, nz]; if periodic, the last ones along each axis repeat the first.

        Kept are values, slopes along the axes and mixed derivatives at the knots: an eighth of the 64 coefficients of
        every cell.
        """
        super().__init__(3)
        self.ranges, self.periodic, self.cells = ranges, periodic, tuple(n - 1 for n in values.shape)
        self.steps = tuple((high - low) / n for (low, high), n in zip(ranges, self.cells, strict=True))
        knots = values[:-1, :-1, :-1] if periodic else values
        for axis, step in enumerate(self.steps):
            slopes = spline_slopes(np.moveaxis(knots, axis, 0), step, periodic) * step
            knots = np.stack((knots, np.moveaxis(slopes, 0, axis)), axis=-1)
        if periodic:
            knots = np.pad(knots, [(0, 1)] * 3 + [(0, 0)] * 3, mode="wrap")
        # [2, 2, 2, knots]: value or slope along x, along y, along z
        self.coefficients = np.moveaxis(knots, (0, 1, 2), (3, 4, 5)).reshape(2, 2, 2, -1)

    def evaluate(self, orders: tuple[int, ...], *arguments: Any) -> Tensor:
        given = _tensors(arguments)
        cells, weights, outside = [], [], torch.zeros_like(given[0], dtype=torch.bool)
        for x, bounds, n, step, order in zip(given, self.ranges, self.cells, self.steps, orders, strict=True):
            cell, t, beside = _locate(x, bounds, n, self.periodic)
            basis = [_horner(list(powers), t, order) / step**order for powers in HERMITE.T]
            # Of value and slope at the lower end of the cell, and at the upper one.
            weights.append([basis[end::2] for end in (0, 1)])
            cells.append(cell)
            outside = outside | beside
        ny, nz = self.cells[1] + 1, self.cells[2] + 1
        first = (cells[0] * ny + cells[1]) * nz + cells[2]
        knots, value = self._on(given[0]), torch.zeros_like(given[0])
        for i, j, k in itertools.product((0, 1), repeat=3):
            part = knots[..., first + ((i * ny + j) * nz + k)]
            for own, at_value, at_slope in ((2, *weights[2][k]), (1, *weights[1][j]), (0, *weights[0][i])):
                part = torch.addcmul(part.select(own, 0) * at_value, part.select(own, 1), at_slope)
            value = value + part
        return torch.where(outside, 0.0, value)


def read_table(name: str, function: openmm.TabulatedFunction) -> Table:
    """OpenMM's tabulated function as a `Table`.

    Raises
    ------
    InputError
        A kind that is not known here, or a periodic function whose ends differ, at which OpenMM raises or, for three
        variables, ends the process.
    """
    given = function.getFunctionParameters()
    if isinstance(function, openmm.Discrete1DFunction):
        return Discrete(np.array(given))
    if isinstance(function, (openmm.Discrete2DFunction, openmm.Discrete3DFunction)):
        return Discrete(_grid(given[:-1], given[-1]))
    if isinstance(function, openmm.Continuous1DFunction):
        n, values = 1, np.array(given[0])
    elif isinstance(function, (openmm.Continuous2DFunction, openmm.Continuous3DFunction)):
        n = 2 if isinstance(function, openmm.Continuous2DFunction) else 3
        values = _grid(given[:n], given[n])
    else:
        kind = type(function).__name__
        raise InputError(f"The twin knows no tabulated function of the kind {kind} ({name}): use the Context pool.")
    limits, periodic = given[-2 * n :], function.getPeriodic()
    if periodic and any((values.take(0, axis) != values.take(-1, axis)).any() for axis in range(n)):
        raise InputError(f"The periodic tabulated function {name} must have equal values at both ends of its range.")
    ranges = tuple(zip(limits[::2], limits[1::2], strict=True))
    if n == 1:
        return Continuous1D(values, ranges[0], periodic)
    return Continuous2D(values, (ranges[0], ranges[1]), periodic) if n == 2 else Continuous3D(values, ranges, periodic)


def _grid(sizes: Sequence[int], values: Sequence[float]) -> NDArray[np.float64]:
    """Values [n0, n1, ...], of which OpenMM lists the first argument's fastest."""
    return np.array(values).reshape(tuple(reversed(sizes))).T
