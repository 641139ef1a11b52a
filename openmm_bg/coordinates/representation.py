"""What the flow models (y) and what it keeps (s): the two representations of one molecule, `full` and `reduced`."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from openmm_bg.coordinates.constraints import Constraints, FixmanTerm
from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.coordinates.transform import InternalCoordinates, log_jacobian, wrap
from openmm_bg.coordinates.zmatrix import ZMatrix, build_zmatrix
from openmm_bg.errors import InputError
from openmm_bg.flow.layout import FeatureLayout

logger = logging.getLogger(__name__)

Kind = Literal["length", "angle", "dihedral", "offset", "amide"]
Representation = Literal["full", "reduced"]

#: Half the width of the sector of a linear angle (offset, amide dihedral) about its mean, rad.
SECTOR = 0.5 * math.pi
#: A dihedral whose data are at least this concentrated (mean resultant length) gets a von Mises base.
CONCENTRATED = 0.75


@dataclass(frozen=True)
class Coordinate:
    """One of the 3N-6 internal coordinates.

    ``row`` counts Z-matrix rows; -1 and -2 are the seed's r_1 and (r_2, θ_2). ``fold`` is 3 for the dihedral of three
    identical hydrogens, ``constrained`` marks a length that the System fixes.
    """

    atom: int
    row: int
    kind: Kind
    backbone: bool
    fold: int
    constrained: bool
    modelled: bool


@dataclass(frozen=True)
class Statistics:
    """What data fix about the coordinates: standardisation, cuts and the values of s.

    ``layout`` describes y; ``centre`` [3N-6] is the mean of every coordinate (circular mean for dihedrals),
    ``n_outside`` counts data frames outside the sectors and ``n_frames`` all of them.
    """

    layout: FeatureLayout
    centre: list[float]
    n_outside: int
    n_frames: int


def describe_coordinates(
    topology: Any, zmatrix: ZMatrix, constrained: set[tuple[int, int]], representation: Representation
) -> list[Coordinate]:
    """All 3N-6 coordinates in the order of their atoms, each with its kind and its channel."""
    graph = MoleculeGraph(topology)
    backbone = graph.backbone()
    full = representation == "full"
    folded = {triple[0] for triple in zmatrix.triple}

    def length(atom: int, other: int, row: int) -> Coordinate:
        fixed = (min(atom, other), max(atom, other)) in constrained
        return Coordinate(atom, row, "length", backbone[atom], 1, fixed, full and not fixed)

    first, middle, last = zmatrix.seed
    found = [length(middle, first, -1), length(last, middle, -2)]
    found.append(Coordinate(last, -2, "angle", backbone[last], 1, False, full or backbone[last]))
    for row, (atom, parent, grandparent, _) in enumerate(zmatrix.rows):
        found.append(length(atom, parent, row))
        found.append(Coordinate(atom, row, "angle", backbone[atom], 1, False, full or backbone[atom]))
        kind: Kind = "offset"
        if zmatrix.carrier[row] == row:
            kind = "amide" if graph.is_amide(parent, grandparent) else "dihedral"
        rigid = kind == "offset" or (graph.in_ring(parent, grandparent) and not backbone[atom])
        fold = 3 if row in folded and kind == "dihedral" else 1
        found.append(Coordinate(atom, row, kind, backbone[atom], fold, False, full or not rigid))
    order = sorted(range(len(found)), key=lambda i: (found[i].atom, i))
    return [found[i] for i in order]


class CoordinateMap(nn.Module):
    """Positions ↔ (y, s), with log J + Φ and the domain on which the map is one to one.

    Built by `CoordinateMap.fit` from data, or by `from_dict` from an artifact. y [B, D] is what the flow models,
    s [B, S] the rest: constrained lengths (`full`), and in `reduced` also the other lengths, angles, offsets and ring
    dihedrals. Angles in rad, lengths in nm. Siblings carry their offset to the dihedral of their group, methyl groups
    t' = t + (δ1 + δ2)/3; both are shears, so |det| = 1.

    Parameters
    ----------
    zmatrix
        Placement of the atoms.
    coordinates
        The 3N-6 coordinates, as `describe_coordinates` returns them.
    statistics
        Layout of y and centres of all coordinates.
    constraints
        Constrained bonds and masses of the System at hand, for Φ and the reference lengths.
    representation
        "full" or "reduced".
    """

    def __init__(
        self,
        zmatrix: ZMatrix,
        coordinates: list[Coordinate],
        statistics: Statistics,
        constraints: Constraints,
        representation: Representation,
    ) -> None:
        super().__init__()
        self.zmatrix, self.coordinates, self.statistics = zmatrix, coordinates, statistics
        self.constraints, self.representation = constraints, representation
        self.layout = statistics.layout
        self.n_atoms = zmatrix.n_atoms
        self.internal = InternalCoordinates(zmatrix)
        rows = len(zmatrix.rows)
        # Raw vector: r_1, r_2, θ_2, then r, θ, φ of the K rows; `_columns` says where each coordinate stands in it.
        columns = []
        for c in coordinates:
            block = {"length": 0, "angle": 1}.get(c.kind, 2)
            if c.row >= 0:
                columns.append(3 + block * rows + c.row)
            else:
                columns.append(0 if c.row == -1 else 1 + block)
        modelled = [i for i, c in enumerate(coordinates) if c.modelled]
        fixed = [i for i, c in enumerate(coordinates) if not c.modelled]
        self.n_modelled, self.n_fixed = len(modelled), len(fixed)

        def buffer(name: str, values: Any, dtype: torch.dtype = torch.long) -> None:
            self.register_buffer(name, torch.as_tensor(values, dtype=dtype), persistent=False)

        buffer("_modelled", [columns[i] for i in modelled])
        buffer("_fixed", [columns[i] for i in fixed])
        buffer("_unsplit", np.argsort([columns[i] for i in modelled + fixed]))
        carriers = [c if c >= 0 else r for r, c in enumerate(zmatrix.carrier)]
        siblings = [r for r, c in enumerate(zmatrix.carrier) if c not in (r, -1)]
        buffer("_siblings", siblings)
        buffer("_carriers", [carriers[r] for r in siblings])
        buffer("_triples", np.array(zmatrix.triple, dtype=int).reshape(-1, 3))
        # Centres of linear angles: the wrapped value is the one within π of it, so that no coordinate jumps.
        raw_centre = np.zeros(3 + 3 * rows)
        raw_centre[columns] = statistics.centre
        linear = [c.kind in ("offset", "amide") for c in coordinates]
        is_linear = np.zeros(3 + 3 * rows, dtype=bool)
        is_linear[columns] = linear
        # A circular coordinate wraps about zero, a linear angle about its centre.
        wrap_centre = np.where(is_linear, raw_centre, 0.0)[3 + 2 * rows :]
        buffer("_wrap_centre", wrap_centre, torch.float64)
        sector = [k for k, i in enumerate(modelled) if linear[i]]
        buffer("_sector", sector)
        buffer("_sector_centre", [statistics.centre[modelled[k]] for k in sector], torch.float64)
        buffer("_angle", [k for k, i in enumerate(modelled) if coordinates[i].kind == "angle"])
        buffer("_length", [k for k, i in enumerate(modelled) if coordinates[i].kind == "length"])
        self.set_constraints(constraints)

    # ---------------------------------------------------------------- construction

    @classmethod
    def fit(
        cls,
        topology: Any,
        positions: Any,
        constraints: Constraints | None = None,
        representation: Representation = "full",
    ) -> CoordinateMap:
        """Coordinates of a molecule with centres, scales and cuts from data.

        Parameters
        ----------
        topology
            ``openmm.app.Topology`` of one molecule.
        positions
            [n, N, 3] nm, n ≥ 2 frames.
        constraints
            From `read_constraints`; None for an unconstrained System with unit masses.
        representation
            "full" or "reduced".

        Raises
        ------
        InputError
            Unknown representation, not one molecule, wrong shape, non-finite frames.
        """
        if representation not in ("full", "reduced"):
            raise InputError(f"Unknown representation {representation!r}: choose 'full' or 'reduced'.")
        x = torch.as_tensor(np.asarray(positions), dtype=torch.float64)
        n = sum(1 for _ in topology.atoms())
        if x.ndim != 3 or x.shape[1:] != (n, 3) or len(x) < 2:
            raise InputError(f"Data positions must be [frames >= 2, {n}, 3], got {list(x.shape)}.")
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
            raise InputError(f"Frame {bad} of the data has non-finite positions: remove it.")
        constraints = constraints or Constraints([], [], [1.0] * n)
        zmatrix = build_zmatrix(topology, constraints.as_set())
        coordinates = describe_coordinates(topology, zmatrix, constraints.as_set(), representation)
        blank = Statistics(_blank_layout(coordinates), [0.0] * len(coordinates), 0, 0)
        raw = cls(zmatrix, coordinates, blank, constraints, representation)
        values = torch.cat([raw._raw_sorted(x[i : i + 8192]) for i in range(0, len(x), 8192)])
        statistics = _fit_statistics(coordinates, values.numpy())
        if statistics.n_outside:
            logger.warning(
                "%d of %d frames lie outside the modelled sectors (another chirality or amide isomer) and are left out.",
                statistics.n_outside,
                statistics.n_frames,
            )
        return cls(zmatrix, coordinates, statistics, constraints, representation)

    def _raw_sorted(self, positions: Tensor) -> Tensor:
        """All coordinates [B, 3N-6] in the order of ``self.coordinates``, angles wrapped about the centres."""
        y, s = self.to_internal(positions)
        both = torch.cat((y, s), dim=-1)
        modelled = [i for i, c in enumerate(self.coordinates) if c.modelled]
        fixed = [i for i, c in enumerate(self.coordinates) if not c.modelled]
        return both[:, torch.as_tensor(np.argsort(modelled + fixed))]

    def with_constraints(self, constraints: Constraints) -> CoordinateMap:
        """The same map for the masses (and equal constraints) of another System."""
        return CoordinateMap(self.zmatrix, self.coordinates, self.statistics, constraints, self.representation)

    def set_constraints(self, constraints: Constraints) -> None:
        """Build Φ and the reference lengths for the constraints and masses given."""
        known = {(min(p), max(p)): d for p, d in zip(constraints.bonds, constraints.lengths, strict=True)}
        blocks: dict[int, tuple[list[int], list[float], float]] = {}
        row_of = {row[0]: r for r, row in enumerate(self.zmatrix.rows)}
        for hydrogen, heavy in constraints.bonds:
            if hydrogen not in row_of or self.zmatrix.rows[row_of[hydrogen]][1] != heavy:
                raise InputError("A constrained bond is no bond of the Z-matrix: was the model made for this System?")
            rows, masses, _ = blocks.setdefault(heavy, ([], [], constraints.masses[heavy]))
            rows.append(row_of[hydrogen])
            masses.append(constraints.masses[hydrogen])
        self.fixman = FixmanTerm(list(blocks.values()))
        reference = []
        for c, centre in zip(self.coordinates, self.statistics.centre, strict=True):
            if c.modelled:
                continue
            parent = self.zmatrix.rows[c.row][1] if c.row >= 0 else -1
            fixed = known.get((min(c.atom, parent), max(c.atom, parent))) if c.kind == "length" else None
            reference.append(centre if fixed is None else fixed)
        self.register_buffer("reference_fixed", torch.tensor(reference, dtype=torch.float64), persistent=False)

    # ---------------------------------------------------------------- the map

    def to_internal(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, N, 3] (nm) to y [B, D] and s [B, S]; dtype kept."""
        seed, r, theta, phi = self.internal.to_internal(positions)
        if len(self._siblings):
            difference = phi[:, self._siblings] - phi[:, self._carriers]
            phi = phi.index_copy(1, self._siblings, difference)
        centre = self._wrap_centre.to(phi.dtype)
        phi = wrap(phi - centre) + centre
        if len(self._triples):
            first, second, third = self._triples.unbind(-1)
            turned = wrap(phi[:, first] + (phi[:, second] + phi[:, third]) / 3)
            phi = phi.index_copy(1, first, turned)
        raw = torch.cat((seed, r, theta, phi), dim=-1)
        return raw.index_select(1, self._modelled), raw.index_select(1, self._fixed)

    def _raw(self, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Seed [B, 3], r, θ, φ [B, K] of every row, φ without offsets."""
        raw = torch.cat((y, s.expand(len(y), self.n_fixed)), dim=-1).index_select(1, self._unsplit)
        rows = len(self.zmatrix.rows)
        seed, r, theta, phi = raw.split((3, rows, rows, rows), dim=-1)
        if len(self._triples):
            first, second, third = self._triples.unbind(-1)
            phi = phi.index_copy(1, first, phi[:, first] - (phi[:, second] + phi[:, third]) / 3)
        if len(self._siblings):
            phi = phi.index_copy(1, self._siblings, phi[:, self._siblings] + phi[:, self._carriers])
        return seed, r, theta, phi

    def to_positions(self, y: Tensor, s: Tensor) -> Tensor:
        """(y [B, D], s [B, S] or [S]) to positions [B, N, 3] in nm, in the canonical frame of the seed."""
        return self.internal.to_positions(*self._raw(y, s))

    def log_volume(self, y: Tensor, s: Tensor) -> Tensor:
        """log J + Φ [B]; Φ = 0 without constraints. Only meaningful inside the domain."""
        seed, r, theta, phi = self._raw(y, s)
        return log_jacobian(seed, r, theta) + self.fixman(theta, phi)

    def positions_and_log_volume(self, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Both of the above, sharing their work."""
        seed, r, theta, phi = self._raw(y, s)
        volume = log_jacobian(seed, r, theta) + self.fixman(theta, phi)
        return self.internal.to_positions(seed, r, theta, phi), volume

    def in_domain(self, y: Tensor, s: Tensor) -> Tensor:
        """True [B] where lengths are positive, angles in (0, π) and linear angles in their sector."""
        inside = torch.isfinite(y).all(-1)
        if len(self._length):
            inside = inside & (y[:, self._length] > 0).all(-1)
        if len(self._angle):
            angle = y[:, self._angle]
            inside = inside & ((angle > 0) & (angle < math.pi)).all(-1)
        if len(self._sector):
            inside = inside & ((y[:, self._sector] - self._sector_centre.to(y.dtype)).abs() < SECTOR).all(-1)
        return inside

    # ---------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the artifact's metadata."""
        return {
            "representation": self.representation,
            "zmatrix": self.zmatrix.to_dict(),
            "coordinates": [asdict(c) for c in self.coordinates],
            "centre": self.statistics.centre,
            "n_outside": self.statistics.n_outside,
            "n_frames": self.statistics.n_frames,
            "layout": self.layout.to_dict(),
            "constraints": asdict(self.constraints),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CoordinateMap:
        """Inverse of `to_dict`."""
        constraints = data["constraints"]
        statistics = Statistics(
            FeatureLayout.from_dict(data["layout"]), data["centre"], data["n_outside"], data["n_frames"]
        )
        return cls(
            ZMatrix.from_dict(data["zmatrix"]),
            [Coordinate(**c) for c in data["coordinates"]],
            statistics,
            Constraints(
                [(b[0], b[1]) for b in constraints["bonds"]], constraints["lengths"], constraints["masses"]
            ),
            data["representation"],
        )


def _blank_layout(coordinates: list[Coordinate]) -> FeatureLayout:
    modelled = [c for c in coordinates if c.modelled]
    n = len(modelled)
    return FeatureLayout(
        circular=[c.kind == "dihedral" for c in modelled],
        backbone=[c.backbone for c in modelled],
        fold=[c.fold for c in modelled],
        concentration=[0.0] * n,
        shift=[0.0] * n,
        scale=[1.0] * n,
    )


def _emptiest_cut(angle: np.ndarray) -> float:
    """Middle of the emptiest stretch of a circular coordinate [n] (rad): Sittel et al. 2017."""
    bins = 72
    counts = np.histogram(angle, bins=bins, range=(-math.pi, math.pi))[0].astype(float)
    window = np.exp(-0.5 * (np.arange(-6, 7) / 3.0) ** 2)
    smooth = np.convolve(np.concatenate((counts[-6:], counts, counts[:6])), window, mode="valid")
    lowest = np.flatnonzero(smooth <= smooth.min() + 1e-9)
    # of an empty arc, take its middle: average the bins as directions of the longest consecutive run
    runs = np.split(lowest, np.flatnonzero(np.diff(lowest) > 1) + 1)
    if len(runs) > 1 and runs[0][0] == 0 and runs[-1][-1] == bins - 1:
        runs = [np.concatenate((runs[-1] - bins, runs[0])), *runs[1:-1]]
    longest = max(runs, key=len)
    return float((longest.mean() + 0.5) * 2 * math.pi / bins - math.pi)


def _von_mises_concentration(resultant: float) -> float:
    """κ with mean resultant length R (Best & Fisher's approximation for R > 0.53, where it is used)."""
    return min(200.0, 1.0 / (resultant**3 - 4 * resultant**2 + 3 * resultant))


def _fit_statistics(coordinates: list[Coordinate], values: np.ndarray) -> Statistics:
    """Centres, scales, cuts and base densities from data [n, 3N-6]."""
    centre, scale, concentration = [], [], []
    outside = np.zeros(len(values), dtype=bool)
    for j, c in enumerate(coordinates):
        column = values[:, j]
        kappa = 0.0
        if c.kind in ("length", "angle"):
            middle, spread = float(column.mean()), float(column.std())
        else:
            phasor = np.exp(1j * c.fold * column).mean()
            direction = float(np.angle(phasor))
            if c.kind == "dihedral":
                spread = 1.0
                if abs(phasor) > CONCENTRATED:
                    middle, kappa = direction, _von_mises_concentration(float(abs(phasor)))
                else:
                    folded = np.angle(np.exp(1j * c.fold * column))
                    middle = math.remainder(_emptiest_cut(folded) + math.pi, 2 * math.pi)
            else:
                # the majority decides the sector: its mean, then the mean of the frames inside
                distance = np.angle(np.exp(1j * (column - direction)))
                direction += float(np.median(distance))
                distance = np.angle(np.exp(1j * (column - direction)))
                inside = np.abs(distance) < SECTOR
                middle = math.remainder(direction + float(distance[inside].mean()), 2 * math.pi)
                distance = np.angle(np.exp(1j * (column - middle)))
                away = np.abs(distance) >= SECTOR
                outside |= away
                spread = float(distance[~away].std())
        centre.append(middle)
        concentration.append(kappa)
        if c.kind == "dihedral":
            scale.append(1.0)
        else:
            floor = 1e-5 if c.kind == "length" else 1e-4  # a coordinate that never moved still needs a width
            scale.append(max(spread, floor))
    keep = [j for j, c in enumerate(coordinates) if c.modelled]
    layout = FeatureLayout(
        circular=[coordinates[j].kind == "dihedral" for j in keep],
        backbone=[coordinates[j].backbone for j in keep],
        fold=[coordinates[j].fold for j in keep],
        concentration=[concentration[j] for j in keep],
        shift=[centre[j] for j in keep],
        scale=[scale[j] for j in keep],
    )
    return Statistics(layout, centre, int(outside.sum()), len(values))
