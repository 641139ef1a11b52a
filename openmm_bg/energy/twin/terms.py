"""Bonded terms: functions of distances, angles and torsions of listed atoms, and of single positions.

Positions are [3, N, B], the batch last, so that whatever is done to one frame is done to neighbouring numbers.
Gradients are those of the geometry, written out, times the derivative of the term's formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .algebra import Node
from .formula import Formula, Globals, Values
from .program import distance_factor
from .tables import Continuous2D, Table

#: Lower bound of |a x b| of an angle's two arms in its gradient, nm²: as OpenMM bounds it for atoms in a line.
LEAST_CROSS = 1.0e-6


class Term(Protocol):
    """An energy as a function of one internal coordinate of each of its rows."""

    n_rows: int

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None: ...

    def evaluate(self, coordinate: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
        """Energy [B] float64, and its derivative by the coordinate [rows, B] (by r over r, for distances)."""
        ...


def summed(energies: Tensor, like: Tensor) -> Tensor:
    """Sum over the rows of [rows, B] in float64."""
    return energies.expand(like.shape).sum(0, dtype=torch.float64)


class ExpressionTerm:
    """A term given by a formula of the coordinate.

    Parameters
    ----------
    energy
        The formula.
    coordinate
        ``r``, or ``theta``.
    values
        The parameters, each [rows, 1].
    """

    def __init__(self, energy: Node, coordinate: str, n_rows: int, values: Values, tables: dict[str, Table]) -> None:
        self.n_rows, self.coordinate = n_rows, coordinate
        slope = distance_factor(energy) if coordinate == "r" else energy.derivative(coordinate)
        dynamic = {coordinate: 1}
        self._energy = Formula({"energy": energy}, dynamic, values, tables)
        self._both = Formula({"energy": energy, "slope": slope}, dynamic, values, tables)

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None:
        self._energy.prepare(parameters, dtype, device)
        self._both.prepare(parameters, dtype, device)

    def evaluate(self, coordinate: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
        name = "r2" if self.coordinate == "r" else self.coordinate
        found = (self._both if slopes else self._energy)(**{name: coordinate})
        slope = found["slope"].expand(coordinate.shape) if slopes else None
        return summed(found["energy"], coordinate), slope


class CmapTerm:
    """Correction maps: a periodic bicubic function of two torsions.

    The first half of the rows holds the first torsions, the second half the second ones.
    """

    def __init__(self, maps: Sequence[ArrayLike], which: Sequence[int]) -> None:
        self.n_rows = 2 * len(which)
        self._maps = [
            Continuous2D(np.pad(np.asarray(m), ((0, 1), (0, 1)), mode="wrap"), ((0.0, 2 * np.pi),) * 2, True)
            for m in maps
        ]
        self._rows = [
            torch.tensor([k for k, m in enumerate(which) if m == i], dtype=torch.long) for i in range(len(maps))
        ]

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = [rows.to(device) for rows in self._rows]

    def evaluate(self, coordinate: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
        first, second = coordinate.chunk(2)
        energy = coordinate.new_zeros(coordinate.shape[1], dtype=torch.float64)
        slope = torch.zeros_like(coordinate) if slopes else None
        for table, rows in zip(self._maps, self._rows, strict=True):
            if not len(rows):
                continue
            angles = first[rows], second[rows]
            energy += table.evaluate((0, 0), *angles).sum(0, dtype=torch.float64)
            if slope is not None:
                slope[rows] = table.evaluate((1, 0), *angles)
                slope[rows + len(first)] = table.evaluate((0, 1), *angles)
        return energy, slope


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product along the first axis."""
    return torch.addcmul(torch.addcmul(a[0] * b[0], a[1], b[1]), a[2], b[2])


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Vector product along the first axis.

    Both products are rounded before one is subtracted from the other: of vectors in a line nothing must be left.
    """
    return torch.stack((a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]))


class Listed:
    """Terms of listed atoms that share one kind of coordinate.

    Attributes
    ----------
    n_atoms
        Atoms of a coordinate.
    """

    n_atoms = 0

    def __init__(self) -> None:
        self.terms: list[Term] = []
        self._atoms: list[np.ndarray] = []
        self._index: list[Tensor] = []

    def add(self, atoms: ArrayLike, term: Term) -> None:
        """Add a term; ``atoms`` [rows, n_atoms]."""
        rows = np.asarray(atoms, dtype=np.int64).reshape(-1, self.n_atoms)
        if len(rows):
            self.terms.append(term)
            self._atoms.append(rows)

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None:
        """Evaluate what depends on parameters."""
        if self._atoms:
            self._index = [torch.tensor(column, device=device) for column in np.concatenate(self._atoms).T.copy()]
        for term in self.terms:
            term.prepare(parameters, dtype, device)

    def evaluate(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """Energy [B] float64 at positions x [3, N, B]; the gradient is added to ``gradient``."""
        coordinate, vectors = self.measure([x.index_select(1, index) for index in self._index], gradient is not None)
        energy = x.new_zeros(x.shape[2], dtype=torch.float64)
        slopes, at = [], 0
        for term in self.terms:
            own, slope = term.evaluate(coordinate[at : at + term.n_rows], gradient is not None)
            energy += own
            at += term.n_rows
            if slope is not None:
                slopes.append(slope)
        if gradient is not None:
            slope = slopes[0] if len(slopes) == 1 else torch.cat(slopes)
            for index, vector in zip(self._index, self.spread(slope, vectors), strict=True):
                gradient.index_add_(1, index, vector)
        return energy

    def measure(self, x: list[Tensor], vectors: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The coordinate [rows, B], and what `spread` wants to know."""
        raise NotImplementedError

    def spread(self, slope: Tensor, vectors: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients [3, rows, B] by each atom's position."""
        raise NotImplementedError


class Distances(Listed):
    """Terms of distances; the coordinate is the square."""

    n_atoms = 2

    def measure(self, x: list[Tensor], vectors: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        d = x[0] - x[1]
        r2 = dot(d, d)
        return r2, (d, r2)

    def spread(self, slope: Tensor, vectors: tuple[Tensor, ...]) -> list[Tensor]:
        d, r2 = vectors
        g = torch.where(r2 > 0.0, slope, 0.0) * d  # of atoms on one spot OpenMM makes no force
        return [g, -g]


class Angles(Listed):
    """Terms of angles at the second of three atoms."""

    n_atoms = 3

    def measure(self, x: list[Tensor], vectors: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, v = x[0] - x[1], x[2] - x[1]
        normal = cross(u, v)
        sine, cosine = torch.sqrt(dot(normal, normal)), dot(u, v)
        # Of two atoms on one spot, where OpenMM has no energy either; atan2 has zero.
        angle = torch.atan2(sine, cosine).masked_fill_((sine == 0.0) & (cosine == 0.0), torch.nan)
        return angle, (u, v, normal, sine)

    def spread(self, slope: Tensor, vectors: tuple[Tensor, ...]) -> list[Tensor]:
        u, v, normal, sine = vectors
        normal = normal * (slope / torch.clamp(sine, min=LEAST_CROSS))
        first = cross(u, normal) / dot(u, u)
        last = cross(normal, v) / dot(v, v)
        return [first, -(first + last), last]


class Torsions(Listed):
    """Terms of torsions, in (-π, π], IUPAC's sign.

    Where three atoms are in a line, or two on one spot, there is no torsion: as in OpenMM it counts as π/2, with the
    sign that rounding leaves, and its forces are no numbers.
    """

    n_atoms = 4

    def measure(self, x: list[Tensor], vectors: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        a, b, c = x[1] - x[0], x[2] - x[1], x[3] - x[2]
        m, n = cross(a, b), cross(b, c)
        b2 = dot(b, b)
        length = torch.sqrt(b2)
        sine, cosine = dot(a, n) * length, dot(m, n)
        # From the angle's complement, which atan2 has as zero where both are zero; and -0 has no sign.
        angle = torch.copysign(math.pi / 2 - torch.atan2(cosine, sine.abs()), sine + 0.0)
        return angle, (a, b, c, m, n, b2, length)

    def spread(self, slope: Tensor, vectors: tuple[Tensor, ...]) -> list[Tensor]:
        a, b, c, m, n, b2, length = vectors
        first = m * (-slope * length / dot(m, m))
        last = n * (slope * length / dot(n, n))
        # Blondel and Karplus, J. Comput. Chem. 17, 1132 (1996), equations 26 and 27.
        shared = first * (dot(a, b) / b2) - last * (dot(c, b) / b2)
        return [first, -(first + shared), shared - last, last]


class External:
    """A formula of single positions, for listed particles."""

    def __init__(self, particles: ArrayLike, energy: Node, values: Values, tables: dict[str, Table]) -> None:
        self._particles = torch.as_tensor(np.asarray(particles, dtype=np.int64))
        slopes = {name: energy.derivative(name) for name in "xyz"}
        self._formula = Formula({"energy": energy, **slopes}, dict.fromkeys("xyz", 1), values, tables)

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None:
        """Evaluate what depends on parameters."""
        self._particles = self._particles.to(device)
        self._formula.prepare(parameters, dtype, device)

    def evaluate(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """Energy [B] float64 at positions x [3, N, B]; the gradient is added to ``gradient``."""
        own = x.index_select(1, self._particles)
        found = self._formula(x=own[0], y=own[1], z=own[2])
        if gradient is not None:
            slopes = torch.stack([found[name].expand(own.shape[1:]) for name in "xyz"])
            gradient.index_add_(1, self._particles, slopes)
        return summed(found["energy"], own[0])
