"""One frame of a small molecule, in Python's own floats.

A move on a Context takes one frame to internal coordinates and one back. For that torch needs two hundred calls of a
microsecond each, or of five where a flow's pass has just driven their code out of the caches; the arithmetic itself
takes Python a third of it for a dipeptide. Formulas and notation are those of `openmm_bg.coordinates.transform`,
`frames` and `representation`, which serve all batches; here are no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from math import atan2, cos, hypot, sin
from operator import itemgetter

from openmm_bg.coordinates.constraints import FixmanTerm
from openmm_bg.coordinates.zmatrix import ZMatrix

Values = Sequence[float]


def _wrap(angle: float) -> float:
    """Angle to [-π, π), rad."""
    turned = (angle + math.pi) % (2 * math.pi) - math.pi
    return turned - 2 * math.pi if turned >= math.pi else turned


def _log(value: float) -> float:
    """Logarithm; -inf of 0 and NaN of negative numbers, as torch has them."""
    if value > 0.0:
        return math.log(value)
    return -math.inf if value == 0.0 else math.nan


class SingleFrame:
    """Positions ↔ (y, s) with log J + Φ, and the domain, for lists of floats.

    Parameters
    ----------
    zmatrix
        Of N atoms; K = N - 3 rows.
    fixman
        Φ.
    columns
        For y, then s: the column of each coordinate in (r_1, r_2, θ_2, r [K], θ [K], φ [K]).
    wrap_centre
        [K] angle about which each row's dihedral or offset wraps.
    bounds
        Open intervals of the domain, for y, then s.
    """

    def __init__(
        self,
        zmatrix: ZMatrix,
        fixman: FixmanTerm,
        columns: Sequence[int],
        wrap_centre: Iterable[float],
        bounds: Iterable[tuple[float, float]],
    ) -> None:
        first, middle, last = zmatrix.seed
        self._seed = zmatrix.seed
        # the seed's two bonds and its angle are those of two more rows
        self._chains = [(middle, first, last, middle), (last, middle, first, last), *zmatrix.rows]
        self._siblings = [(row, carrier) for row, carrier in enumerate(zmatrix.carrier) if carrier not in (row, -1)]
        self._triples = zmatrix.triple
        self._centre = list(wrap_centre)
        self._bounds = list(bounds)
        self._fixman = fixman
        self._values_of = itemgetter(*columns)
        self._raw_of = itemgetter(*sorted(range(len(columns)), key=columns.__getitem__))
        # atoms placed from others, and whether others are placed from them
        parents = {parent for _, parent, *_ in zmatrix.rows}
        self._placed = [(a, parent, a in parents) for a, parent, *_ in self._chains[1:]]

    def in_domain(self, values: Values) -> bool:
        """Whether (y, s) lies in the domain."""
        return all([low < value < high for value, (low, high) in zip(values, self._bounds, strict=True)])

    def to_internal(self, x: Sequence[Values]) -> tuple[Values, float]:
        """(y, s) and log J + Φ of positions [N, 3] in nm."""
        r, theta, phi = [], [], []
        for a, b, c, d in self._chains:
            (ax, ay, az), (bx, by, bz), (cx, cy, cz), (dx, dy, dz) = x[a], x[b], x[c], x[d]
            ux, uy, uz = ax - bx, ay - by, az - bz
            wx, wy, wz = cx - bx, cy - by, cz - bz
            vx, vy, vz = dx - cx, dy - cy, dz - cz
            # two planes' normals u × w and v × w, and (u × w) × (v × w)·w, which is |w| times the sine of φ
            px, py, pz = uy * wz - uz * wy, uz * wx - ux * wz, ux * wy - uy * wx
            ox, oy, oz = vy * wz - vz * wy, vz * wx - vx * wz, vx * wy - vy * wx
            along = (py * oz - pz * oy) * wx + (pz * ox - px * oz) * wy + (px * oy - py * ox) * wz
            r.append(hypot(ux, uy, uz))
            theta.append(atan2(hypot(px, py, pz), ux * wx + uy * wy + uz * wz))
            phi.append(atan2(along / max(hypot(wx, wy, wz), 1e-15), px * ox + py * oy + pz * oz))
        phi = phi[2:]
        log_volume = self._log_volume(r, theta, phi)
        for row, carrier in self._siblings:
            phi[row] -= phi[carrier]
        phi = [_wrap(angle - centre) + centre for angle, centre in zip(phi, self._centre, strict=True)]
        for first, second, third in self._triples:
            phi[first] = _wrap(phi[first] + (phi[second] + phi[third]) / 3)
        return self._values_of((*r[:2], theta[1], *r[2:], *theta[2:], *phi)), log_volume

    def to_positions(self, values: Values) -> tuple[list[Values], float]:
        """Positions [N, 3] in nm, in the canonical frame of the seed, and log J + Φ of finite (y, s)."""
        raw, rows = self._raw_of(values), len(self._centre)
        r = (*raw[:2], *raw[3 : 3 + rows])
        theta = (math.nan, raw[2], *raw[3 + rows : 3 + 2 * rows])
        phi = list(raw[3 + 2 * rows :])
        for first, second, third in self._triples:
            phi[first] -= (phi[second] + phi[third]) / 3
        for row, carrier in self._siblings:
            phi[row] += phi[carrier]
        first, middle, _ = self._seed
        x: list[Values] = [(0.0, 0.0, 0.0)] * (rows + 3)
        x[middle] = (r[0], 0.0, 0.0)
        # e, m, n of each atom; seed atom 2 has φ = 0
        frames: dict[int, tuple[Values, Values, Values]] = {
            first: ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
            middle: ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        }
        bonds = zip(self._placed, r[1:], theta[1:], (0.0, *phi), strict=True)
        for (atom, parent, is_parent), length, angle, turn in bonds:
            (ex, ey, ez), (mx, my, mz), (nx, ny, nz) = frames[parent]
            cosine, sine, c, s = cos(angle), sin(angle), cos(turn), sin(turn)
            px, py, pz = c * mx + s * nx, c * my + s * ny, c * mz + s * nz
            bx, by, bz = sine * px - cosine * ex, sine * py - cosine * ey, sine * pz - cosine * ez
            ax, ay, az = x[parent]
            x[atom] = (ax + length * bx, ay + length * by, az + length * bz)
            if is_parent:
                m = (-sine * ex - cosine * px, -sine * ey - cosine * py, -sine * ez - cosine * pz)
                frames[atom] = (bx, by, bz), m, (c * nx - s * mx, c * ny - s * my, c * nz - s * mz)
        return x, self._log_volume(r, theta, phi)

    def _log_volume(self, r: Values, theta: Values, phi: Values) -> float:
        """log J + Φ of the lengths r_1, r_2, r, the angles (unused), θ_2, θ and the dihedrals φ."""
        lengths = zip((r[0] * r[1], *r[2:]), theta[1:], strict=True)
        log_jacobian = sum([_log(length * length * sin(angle)) for length, angle in lengths])
        return log_jacobian + self._fixman.of_frame(theta[2:], phi)
