"""What data fix about the coordinates: means, widths, cuts of circular ones, sectors, and reference values of s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from openmm_bg.errors import InputError
from openmm_bg.flow.layout import FeatureLayout

Kind = Literal["length", "angle", "dihedral", "offset", "amide"]

#: Half the width of the sector of a linear angle (offset, amide dihedral) about its centre, rad.
SECTOR = 0.5 * math.pi
#: A dihedral whose data are at least this concentrated (mean resultant length) gets a von Mises base.
CONCENTRATED = 0.75
#: The largest concentration of a von Mises base: a width of 4 degrees.
LARGEST_CONCENTRATION = 200.0


@dataclass(frozen=True)
class Coordinate:
    """One of the 3N-6 internal coordinates.

    ``row`` counts Z-matrix rows; -1 and -2 are the seed's r_1 and (r_2, θ_2). ``fold`` is 3 for the dihedral of three
    identical hydrogens, ``constrained`` marks a length that the System fixes, ``invertible`` an offset at a
    three-coordinate nitrogen, whose two signs are one basin; ``ring`` is the number of the ring system that the
    coordinate belongs to, or -1.
    """

    atom: int
    row: int
    kind: Kind
    backbone: bool
    fold: int
    constrained: bool
    modelled: bool
    invertible: bool = False
    ring: int = -1

    @property
    def linear_angle(self) -> bool:
        """True for an angle on the circle that is kept to a sector and treated as a number on the line."""
        return self.kind in ("offset", "amide")


@dataclass(frozen=True)
class Statistics:
    """What data fix about the 3N-6 coordinates.

    ``layout`` describes y. ``sector`` [3N-6] is the centre of the sector of offsets and amide dihedrals (0 for the
    others), ``reference`` [3N-6] a typical value of every coordinate; ``n_outside`` counts the data frames outside
    the sectors and ``n_frames`` all of them.
    """

    layout: FeatureLayout
    sector: list[float]
    reference: list[float]
    n_outside: int
    n_frames: int


def build_layout(
    coordinates: Sequence[Coordinate], shift: Sequence[float], scale: Sequence[float], concentration: Sequence[float]
) -> FeatureLayout:
    """Layout of the modelled coordinates from values for all 3N-6."""
    keep = [j for j, c in enumerate(coordinates) if c.modelled]
    return FeatureLayout(
        circular=[coordinates[j].kind == "dihedral" for j in keep],
        backbone=[coordinates[j].backbone for j in keep],
        fold=[coordinates[j].fold for j in keep],
        concentration=[float(concentration[j]) for j in keep],
        shift=[float(shift[j]) for j in keep],
        scale=[float(scale[j]) for j in keep],
    )


def blank_statistics(coordinates: Sequence[Coordinate]) -> Statistics:
    """Statistics before any data: every angle is cut at ±π."""
    n = len(coordinates)
    layout = build_layout(coordinates, [0.0] * n, [1.0] * n, [0.0] * n)
    return Statistics(layout, [0.0] * n, [0.0] * n, 0, 0)


def fit_statistics(coordinates: Sequence[Coordinate], values: np.ndarray) -> Statistics:
    """Statistics from data [n, 3N-6], angles cut anywhere.

    Frames outside a sector are counted and take no part in means and widths.

    Raises
    ------
    InputError
        Fewer than two frames lie inside every sector.
    """
    values = np.array(values)
    sector = [_sector_centre(values[:, j], c) if c.linear_angle else 0.0 for j, c in enumerate(coordinates)]
    inside = np.ones(len(values), dtype=bool)
    for j, c in enumerate(coordinates):
        if c.linear_angle:
            values[:, j] = sector[j] + _wrap(values[:, j] - sector[j])
            inside &= np.abs(values[:, j] - sector[j]) < SECTOR
    if inside.sum() < 2:
        raise InputError(
            f"Only {int(inside.sum())} of {len(values)} data frames have the chirality and amide isomers of the "
            "majority: give frames of one stereoisomer."
        )
    values = values[inside]
    shift, scale, concentration, reference = [], [], [], []
    for j, c in enumerate(coordinates):
        column = values[:, j]
        kappa, width = 0.0, 1.0
        if c.kind == "dihedral":
            middle, kappa = _circle(np.asarray(c.fold * column))
            typical = middle / c.fold
        else:
            middle = typical = float(column.mean())
            floor = 1e-5 if c.kind == "length" else 1e-4  # a coordinate that never moved still needs a width
            width = max(float(column.std()), floor)
        shift.append(middle)
        scale.append(width)
        concentration.append(kappa)
        reference.append(typical)
    for system in {c.ring for c in coordinates} - {-1}:
        # A ring's coordinates hang together: their means do not close it, and may lie between two puckers.
        members = [j for j, c in enumerate(coordinates) if c.ring == system]
        frame = values[_typical_frame(coordinates, values, members)]
        for j in members:
            reference[j] = float(frame[j])
    layout = build_layout(coordinates, shift, scale, concentration)
    return Statistics(layout, sector, reference, int((~inside).sum()), len(inside))


def _wrap(angle: np.ndarray) -> np.ndarray:
    """Angle to [-π, π), rad."""
    return np.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _sector_centre(column: np.ndarray, coordinate: Coordinate) -> float:
    """Centre of the sector of an offset or amide dihedral [n] (rad): where the majority is."""
    if coordinate.invertible:
        return math.pi  # planar: both pyramids of a three-coordinate nitrogen lie within ±π/2
    # The median about the circular mean first: the mean of the minority's frames must not pull the sector.
    centre = float(np.angle(np.exp(1j * column).mean()))
    centre += float(np.median(_wrap(column - centre)))
    distance = _wrap(column - centre)
    centre += float(distance[np.abs(distance) < SECTOR].mean())
    return math.remainder(centre, 2 * math.pi)


def _circle(angle: np.ndarray) -> tuple[float, float]:
    """Centre c (rad) of a circular coordinate [n], such that c ± π is its cut, and κ of its base (0: uniform).

    The cut lies in the emptiest region (Sittel et al., J. Chem. Phys. 147, 244101, 2017): opposite the mean if nothing
    lies there, else where a smoothed histogram is lowest.
    """
    bins = 72
    counts = np.histogram(_wrap(angle), bins=bins, range=(-math.pi, math.pi))[0].astype(float)
    window = np.exp(-0.5 * (np.arange(-6, 7) / 3.0) ** 2)
    smooth = np.convolve(np.concatenate((counts[-6:], counts, counts[:6])), window, mode="valid")
    low = smooth <= smooth.min() + 1e-9
    mean = float(np.angle(np.exp(1j * angle).mean()))
    opposite = int((math.remainder(mean + math.pi, 2 * math.pi) + math.pi) / (2 * math.pi) * bins) % bins
    centre = mean if low[opposite] else math.remainder(_middle_of_longest_run(low) + math.pi, 2 * math.pi)
    resultant = float(np.cos(angle - centre).mean())
    return centre, von_mises_concentration(resultant) if resultant > CONCENTRATED else 0.0


def _middle_of_longest_run(low: np.ndarray) -> float:
    """Middle, rad, of the longest run of true bins on a circle of bins that starts at -π."""
    bins = len(low)
    where = np.flatnonzero(low)
    runs = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)
    if len(runs) > 1 and runs[0][0] == 0 and runs[-1][-1] == bins - 1:
        runs = [np.concatenate((runs[-1] - bins, runs[0])), *runs[1:-1]]
    longest = max(runs, key=len)
    return float((longest.mean() + 0.5) * 2 * math.pi / bins - math.pi)


def von_mises_concentration(resultant: float) -> float:
    """κ of the von Mises density with mean resultant length I1(κ)/I0(κ), at most `LARGEST_CONCENTRATION`."""
    low, high = 0.0, LARGEST_CONCENTRATION
    for _ in range(60):  # the ratio grows monotonically with κ
        kappa = 0.5 * (low + high)
        k = torch.tensor(kappa, dtype=torch.float64)
        if float(torch.special.i1e(k) / torch.special.i0e(k)) < resultant:
            low = kappa
        else:
            high = kappa
    return 0.5 * (low + high)


def _typical_frame(coordinates: Sequence[Coordinate], values: np.ndarray, members: list[int]) -> int:
    """The frame in the densest part of the data of some coordinates: nearest to its tenth part of neighbours."""
    rows = np.unique(np.linspace(0, len(values) - 1, 400).astype(int))
    features = []
    for j in members:
        column = values[rows, j]
        if coordinates[j].kind == "length":
            continue
        features += [np.cos(column), np.sin(column)]
    if not features:
        return 0
    points = np.stack(features, axis=1)
    square = (points**2).sum(1)
    distance = square[:, None] + square[None, :] - 2 * points @ points.T
    neighbours = max(1, len(rows) // 10)
    return int(rows[np.argmin(np.sort(distance, axis=1)[:, neighbours])])
