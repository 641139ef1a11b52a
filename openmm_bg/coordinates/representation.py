"""What the flow models (y) and what it keeps (s): the two representations of one molecule, `full` and `reduced`."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from openmm_bg.coordinates.constraints import Constraints, FixmanTerm
from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.coordinates.single import SingleFrame
from openmm_bg.coordinates.statistics import (
    SECTOR,
    Coordinate,
    Kind,
    Statistics,
    blank_statistics,
    fit_statistics,
)
from openmm_bg.coordinates.transform import InternalCoordinates, log_jacobian, wrap
from openmm_bg.coordinates.zmatrix import ZMatrix, build_zmatrix
from openmm_bg.errors import InputError
from openmm_bg.flow.layout import FeatureLayout

logger = logging.getLogger(__name__)

Representation = Literal["full", "reduced"]

#: Atoms in a molecule up to which one frame is left to `openmm_bg.coordinates.single`.
SINGLE_ATOMS = 100
#: Mean angle (rad) from which a warning is given: 1 / sin θ is 20 there.
LINEAR_ANGLE = math.radians(177.0)
#: rms deviation (nm) of constrained lengths in data from which a warning is given; stored frames round to 1e-3 nm,
#: free bonds to hydrogen vibrate by 3e-3 nm.
LENGTH_SPREAD = 2e-3


def describe_coordinates(
    topology: Any, zmatrix: ZMatrix, constrained: set[tuple[int, int]], representation: Representation
) -> list[Coordinate]:
    """All 3N-6 coordinates in the order of their atoms, each with its kind and its channel."""
    graph = MoleculeGraph(topology)
    backbone = graph.backbone()
    peptide = graph.peptide_backbone()
    rings = graph.ring_systems()
    full = representation == "full"
    folded = {triple[0] for triple in zmatrix.triple}
    first, middle, last = zmatrix.seed
    found: list[Coordinate] = []

    def add(
        row: int, kind: Kind, atom: int, parent: int, reduced: bool = False, fold: int = 1, invertible: bool = False
    ) -> None:
        ring = rings[atom] if graph.in_ring(atom, parent) else -1
        fixed = kind == "length" and (min(atom, parent), max(atom, parent)) in constrained
        modelled = not fixed if full else reduced
        found.append(Coordinate(atom, row, kind, backbone[atom], fold, fixed, modelled, invertible, ring))

    def free_angle(atom: int, parent: int, grandparent: int) -> bool:
        """Does `reduced` model this angle? Those of the backbone do, unless a ring that is no peptide's holds them."""
        in_ring = graph.in_ring(atom, parent) and graph.in_ring(parent, grandparent)
        return backbone[atom] and (peptide[atom] or not in_ring)

    add(-1, "length", middle, first)
    add(-2, "length", last, middle)
    add(-2, "angle", last, middle, free_angle(last, middle, first))
    for row, (atom, parent, grandparent, _) in enumerate(zmatrix.rows):
        add(row, "length", atom, parent)
        add(row, "angle", atom, parent, free_angle(atom, parent, grandparent))
        if zmatrix.carrier[row] != row:
            add(row, "offset", atom, parent, invertible=graph.is_invertible(parent))
            continue
        free = peptide[atom] or not graph.in_ring(parent, grandparent)
        kind: Kind = "amide" if graph.is_amide(parent, grandparent) else "dihedral"
        add(row, kind, atom, parent, free, 3 if row in folded and kind == "dihedral" else 1)
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
        Layout of y, sectors and typical values of all coordinates.
    constraints
        Constrained bonds and masses of the System at hand, for Φ and the reference lengths.
    representation
        "full" or "reduced".
    """

    fixman: FixmanTerm
    reference_fixed: Tensor
    _modelled: Tensor
    _fixed: Tensor
    _siblings: Tensor
    _carriers: Tensor
    _triples: Tensor
    _lengths_and_angles: Tensor
    _dihedral_sources: Tensor
    _dihedral_weights: Tensor
    _wrap_centre: Tensor
    _lower: Tensor
    _upper: Tensor

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
        # Raw vector: r_1, r_2, θ_2, then r, θ, φ of the K rows; `columns` says where each coordinate stands in it.
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
        siblings = [r for r, c in enumerate(zmatrix.carrier) if c not in (r, -1)]
        buffer("_siblings", siblings)
        buffer("_carriers", [zmatrix.carrier[r] for r in siblings])
        buffer("_triples", np.array(zmatrix.triple, dtype=int).reshape(-1, 3).T)
        # Columns of (y, s) to gather from: one for each length and angle, some with weights for each dihedral.
        unsplit = np.argsort([columns[i] for i in modelled + fixed])
        sources, weights = zmatrix.dihedral_sums()
        buffer("_lengths_and_angles", unsplit[: 3 + 2 * rows])
        buffer("_dihedral_sources", unsplit[3 + 2 * rows :][sources].reshape(-1))
        buffer("_dihedral_weights", weights, torch.float64)
        # Raw angles wrap about the centre of their sector, so that none jumps; circular ones about zero.
        wrap_centre = np.zeros(3 + 3 * rows)
        wrap_centre[columns] = statistics.sector
        buffer("_wrap_centre", wrap_centre[3 + 2 * rows :], torch.float64)
        bounds = [_bounds(coordinates[i], statistics.sector[i]) for i in modelled + fixed]
        buffer("_lower", [low for low, _ in bounds], torch.float64)
        buffer("_upper", [high for _, high in bounds], torch.float64)
        self._set_constraints(constraints)
        order = [columns[i] for i in modelled + fixed]
        self._single = SingleFrame(zmatrix, self.fixman, order, self._wrap_centre.tolist(), bounds)

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
            Unknown representation, not one molecule, wrong shape, complex or non-finite frames.
        """
        if representation not in ("full", "reduced"):
            raise InputError(f"Unknown representation {representation!r}: choose 'full' or 'reduced'.")
        if np.iscomplexobj(positions):
            raise InputError("Data positions must be real numbers, not complex ones.")
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
        raw = cls(zmatrix, coordinates, blank_statistics(coordinates), constraints, representation)
        values = torch.cat([raw._raw_sorted(x[i : i + 8192]) for i in range(0, len(x), 8192)])
        statistics = fit_statistics(coordinates, values.numpy())
        if statistics.n_outside:
            logger.warning(
                "%d of %d data frames lie outside the modelled sectors (another chirality or amide isomer).",
                statistics.n_outside,
                statistics.n_frames,
            )
        fitted = cls(zmatrix, coordinates, statistics, constraints, representation)
        fitted._warn_of_unusual(values)
        return fitted

    def _warn_of_unusual(self, values: Tensor) -> None:
        """Say what is allowed and yet likely to disappoint, from data [n, 3N-6]."""
        parent_of = self._parents()
        known = {(min(p), max(p)): d for p, d in zip(self.constraints.bonds, self.constraints.lengths, strict=True)}
        deviations: list[tuple[float, int, int]] = []
        for j, c in enumerate(self.coordinates):
            parent = parent_of[c.row]
            if c.kind == "angle" and float(values[:, j].mean()) > LINEAR_ANGLE:
                logger.warning(
                    "The angle at atom %d, to atom %d, is nearly straight: the torsion about it is ill-defined, so the "
                    "flow will be inefficient there.",
                    parent,
                    c.atom,
                )
            if c.constrained:
                error = values[:, j] - known[min(c.atom, parent), max(c.atom, parent)]
                deviations.append((float(error.square().mean().sqrt()), c.atom, parent))
        if deviations and max(deviations)[0] > LENGTH_SPREAD:
            logger.warning(
                "The data's lengths deviate from the System's constraints by up to %.4f nm rms (bond %d-%d): the data "
                "were made with another System.",
                *max(deviations),
            )

    def _parents(self) -> dict[int, int]:
        """Parent atom of each Z-matrix row, the seed's -1 and -2 included."""
        first, middle, _ = self.zmatrix.seed
        return {-1: first, -2: middle} | {r: row[1] for r, row in enumerate(self.zmatrix.rows)}

    def _raw_sorted(self, positions: Tensor) -> Tensor:
        """All coordinates [B, 3N-6] in the order of ``self.coordinates``."""
        y, s = self.to_internal(positions)
        both = torch.cat((y, s), dim=-1)
        modelled = [i for i, c in enumerate(self.coordinates) if c.modelled]
        fixed = [i for i, c in enumerate(self.coordinates) if not c.modelled]
        return both[:, torch.as_tensor(np.argsort(modelled + fixed))]

    def with_constraints(self, constraints: Constraints) -> CoordinateMap:
        """The same map for the masses and constraints of another System.

        Raises
        ------
        InputError
            It constrains a length that y holds, or a distance that is no length of the Z-matrix.
        """
        return CoordinateMap(self.zmatrix, self.coordinates, self.statistics, constraints, self.representation)

    def _set_constraints(self, constraints: Constraints) -> None:
        """Build Φ and the reference lengths for the constraints and masses given."""
        known = {(min(p), max(p)): d for p, d in zip(constraints.bonds, constraints.lengths, strict=True)}
        if len(constraints.masses) != self.n_atoms:
            raise InputError(f"The constraints have {len(constraints.masses)} masses for {self.n_atoms} atoms.")
        parent_of = self._parents()
        reference = []
        for c, typical in zip(self.coordinates, self.statistics.reference, strict=True):
            parent = parent_of[c.row]
            length = known.get((min(c.atom, parent), max(c.atom, parent))) if c.kind == "length" else None
            if c.modelled and length is not None:
                raise InputError(
                    f"The System constrains the length of bond {c.atom}-{parent}, which the coordinates model: "
                    "use the constraints that they were made for."
                )
            if not c.modelled:
                reference.append(typical if length is None else length)
        blocks: dict[int, tuple[list[int], list[float], float]] = {}
        row_of = {row[0]: r for r, row in enumerate(self.zmatrix.rows)}
        for hydrogen, heavy in constraints.bonds:
            if hydrogen not in row_of or self.zmatrix.rows[row_of[hydrogen]][1] != heavy:
                raise InputError(
                    f"The System constrains the distance of atoms {hydrogen} and {heavy}, which is no length of the "
                    "Z-matrix: use the constraints that the coordinates were made for."
                )
            rows, masses, _ = blocks.setdefault(heavy, ([], [], constraints.masses[heavy]))
            rows.append(row_of[hydrogen])
            masses.append(constraints.masses[hydrogen])
        self.fixman = FixmanTerm(list(blocks.values()))
        self.register_buffer("reference_fixed", torch.tensor(reference, dtype=torch.float64), persistent=False)

    # ---------------------------------------------------------------- the map

    def to_internal(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, N, 3] (nm) to y [B, D] and s [B, S]; dtype kept."""
        return self._split(*self.internal.to_internal(positions))

    def to_internal_and_log_volume(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `to_internal`, and log J + Φ [B], which is cheap while all angles are at hand."""
        if self._is_alone(positions):
            values, volume = self._single.to_internal(positions.tolist()[0])
            n = self.n_modelled
            y, s, log_volume = (positions.new_tensor(part) for part in ([values[:n]], [values[n:]], [volume]))
            return y, s, log_volume
        seed, r, theta, phi = self.internal.to_internal(positions)
        return *self._split(seed, r, theta, phi), log_jacobian(seed, r, theta) + self.fixman(theta, phi)

    def _split(self, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, D] and s [B, S] of raw internal coordinates, φ without offsets."""
        if len(self._siblings):
            difference = phi.index_select(1, self._siblings) - phi.index_select(1, self._carriers)
            phi = phi.index_copy(1, self._siblings, difference)
        centre = self._wrap_centre.to(phi.dtype)
        phi = wrap(phi - centre) + centre
        if self._triples.numel():
            first, second, third = (phi.index_select(1, column) for column in self._triples)
            phi = phi.index_copy(1, self._triples[0], wrap(first + (second + third) / 3))
        raw = torch.cat((seed, r, theta, phi), dim=-1)
        return raw.index_select(1, self._modelled), raw.index_select(1, self._fixed)

    def require_lengths(self, y: Tensor, s: Tensor) -> None:
        """Refuse a state [1, D], [1, S] whose bonds cannot be those of a simulation.

        A constrained length that is off, or another one that is twice or half its usual value, comes from wrong units
        or from positions that no constraint was applied to; every move from there would be rejected without a word.

        Raises
        ------
        InputError
            Names the first such bond.
        """
        values = self._values(y, s)
        for column, a, b, usual, constrained in self._lengths:
            value = values[column]
            if constrained and abs(value / usual - 1.0) > 0.05:
                raise InputError(
                    f"Atoms {a} and {b} are {value:.4f} nm apart, the System constrains them to "
                    f"{usual:.4f} nm: wrong units, or applyConstraints was not called."
                )
            if not 0.5 < value / usual < 2.0:
                raise InputError(
                    f"Atoms {a} and {b} are {value:.4f} nm apart, about {usual:.4f} nm is usual: "
                    "are these positions in nm, and is the molecule whole?"
                )

    @cached_property
    def _lengths(self) -> list[tuple[int, int, int, float, bool]]:
        """Lengths among (y, s): column, atoms in order, usual value (nm), whether it is constrained."""
        modelled = [c for c in self.coordinates if c.modelled]
        fixed = [c for c in self.coordinates if not c.modelled]
        usual = list(self.layout.shift) + self.reference_fixed.reshape(-1).tolist()
        parent_of, constrained = self._parents(), self.constraints.as_set()
        found = []
        for column, (c, length) in enumerate(zip(modelled + fixed, usual, strict=True)):
            if c.kind == "length":
                a, b = sorted((c.atom, parent_of[c.row]))
                found.append((column, a, b, length, (a, b) in constrained))
        return found

    def _raw(self, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Seed [B, 3], r, θ, φ [B, K] of every row, φ without offsets."""
        both = torch.cat((y, s.to(y).expand(len(y), self.n_fixed)), dim=-1)
        rows = len(self.zmatrix.rows)
        seed, r, theta = both.index_select(1, self._lengths_and_angles).split((3, rows, rows), dim=-1)
        weights = self._dihedral_weights.to(both.dtype)
        phi = (both.index_select(1, self._dihedral_sources).view(len(both), *weights.shape) * weights).sum(1)
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
        if self._is_alone(y) and math.isfinite(sum(values := self._values(y, s))):
            return self._single_positions(values)
        seed, r, theta, phi = self._raw(y, s)
        volume = log_jacobian(seed, r, theta) + self.fixman(theta, phi)
        return self.internal.to_positions(seed, r, theta, phi), volume

    def positions_in_domain(self, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """As `positions_and_log_volume`; NaN and -inf outside the domain, which is decided before positions exist."""
        if self._is_alone(y) and self._single.in_domain(values := self._values(y, s)):
            return self._single_positions(values)
        inside = self.in_domain(y, s)
        if bool(inside.all()):
            return self.positions_and_log_volume(y, s)
        positions, volume = y.new_full((len(y), self.n_atoms, 3), math.nan), y.new_full((len(y),), -math.inf)
        if bool(inside.any()):
            s = s.expand(len(y), self.n_fixed)
            positions[inside], volume[inside] = self.positions_and_log_volume(y[inside], s[inside])
        return positions, volume

    def in_domain(self, y: Tensor, s: Tensor) -> Tensor:
        """True [B] where lengths are positive, angles in (0, π) and linear angles in their sector, in y and in s.

        Rule 3 of docs/theory.md: decided on the coordinates, for positions made from them fold back inside.
        """
        if self._is_alone(y):
            return torch.tensor([self._single.in_domain(self._values(y, s))])
        both = torch.cat((y, s.to(y).expand(len(y), self.n_fixed)), dim=-1)
        return ((both > self._lower.to(y.dtype)) & (both < self._upper.to(y.dtype))).all(-1)

    def _is_alone(self, batch: Tensor) -> bool:
        """Whether `SingleFrame` serves a batch: one frame of a small molecule on a CPU, and no gradient wanted."""
        return (
            not torch.jit.is_tracing()
            and not torch.is_grad_enabled()
            and batch.shape[0] == 1
            and self.n_atoms <= SINGLE_ATOMS
            and batch.dtype == torch.float64
            and batch.is_cpu
        )

    def _values(self, y: Tensor, s: Tensor) -> list[float]:
        """(y [1, D], s [1, S] or [S]) as floats."""
        values: list[float] = y.tolist()[0] + s.reshape(-1).tolist()
        return values

    def _single_positions(self, values: list[float]) -> tuple[Tensor, Tensor]:
        x, volume = self._single.to_positions(values)
        return torch.tensor([x], dtype=torch.float64), torch.tensor([volume], dtype=torch.float64)

    # ---------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the artifact's metadata."""
        return {
            "representation": self.representation,
            "zmatrix": self.zmatrix.to_dict(),
            "coordinates": [asdict(c) for c in self.coordinates],
            "sector": self.statistics.sector,
            "reference": self.statistics.reference,
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
            FeatureLayout.from_dict(data["layout"]),
            list(data["sector"]),
            list(data["reference"]),
            data["n_outside"],
            data["n_frames"],
        )
        return cls(
            ZMatrix.from_dict(data["zmatrix"]),
            [Coordinate(**c) for c in data["coordinates"]],
            statistics,
            Constraints([(b[0], b[1]) for b in constraints["bonds"]], constraints["lengths"], constraints["masses"]),
            data["representation"],
        )


def _bounds(coordinate: Coordinate, sector: float) -> tuple[float, float]:
    """Open interval of a coordinate's domain."""
    if coordinate.kind == "length":
        return 0.0, math.inf
    if coordinate.kind == "angle":
        return 0.0, math.pi
    if coordinate.linear_angle:
        return sector - SECTOR, sector + SECTOR
    return -math.inf, math.inf
