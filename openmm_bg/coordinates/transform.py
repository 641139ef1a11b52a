"""Cartesian positions to internal coordinates and back, in batches, differentiable both ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from openmm_bg.coordinates.dense import measure
from openmm_bg.coordinates.frames import FrameTree
from openmm_bg.coordinates.zmatrix import ZMatrix
from openmm_bg.errors import InputError

#: Positions are read in pieces of so many atoms on a CPU. The thirty temporaries of a larger piece outgrow what the
#: allocator keeps, and mapping their memory anew each time costs three times the arithmetic.
CPU_ATOMS = 65_536
#: Atoms in a batch up to which fewer calls are worth more operations.
DENSE_ATOMS = 1_500


def wrap(angle: Tensor) -> Tensor:
    """Angle to [-π, π), rad."""
    turned = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    return torch.where(turned >= math.pi, turned - 2 * math.pi, turned)  # rounding turned -π - 1e-16 into π


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(a, b, dim=-1)


def bond_angle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Angle a-b-c in (0, π), from atan2 (no clamp: arccos loses half the digits near 0 and π)."""
    u, v = a - b, c - b
    return torch.atan2(torch.linalg.norm(_cross(u, v), dim=-1), (u * v).sum(-1))


def dihedral_angle(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """IUPAC dihedral a-b-c-d in [-π, π): cis is 0."""
    axis = c - b
    first, last = _cross(a - b, axis), _cross(d - c, axis)
    sine = (_cross(first, last) * axis).sum(-1) / torch.linalg.norm(axis, dim=-1)
    return torch.atan2(sine, (first * last).sum(-1))


Rows = tuple[Tensor, ...]  # x, y and z of many vectors, each [K, B]


def _dot_rows(a: Rows, b: Rows) -> Tensor:
    return torch.addcmul(torch.addcmul(a[0] * b[0], a[1], b[1]), a[2], b[2])


def _cross_rows(a: Rows, b: Rows) -> Rows:
    return tuple(torch.addcmul(a[j] * b[k], a[k], b[j], value=-1) for j, k in ((1, 2), (2, 0), (0, 1)))


class InternalCoordinates(nn.Module):
    """x [B, N, 3] ↔ raw internal coordinates of a Z-matrix.

    Raw means: every row has its own length r, angle θ and dihedral φ; siblings, methyl groups and what is modelled
    are the representation's business.

    Parameters
    ----------
    zmatrix
        The Z-matrix of N atoms; K = N - 3 rows.

    Raises
    ------
    InputError
        A row's grandparent and great-grandparent are not those that its parent was placed from.
    """

    _rows: Tensor
    _ends: Tensor
    _starts: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        self.zmatrix = zmatrix
        first, middle, last = zmatrix.seed
        above = {first: (middle, last), middle: (first, last), last: (middle, first)}
        for atom, parent, grandparent, great in zmatrix.rows:
            if above.get(parent) != (grandparent, great):  # frames are carried along bonds
                raise InputError(f"The Z-matrix measures atom {atom} from an axis that is not its parent's own bond.")
            above[atom] = (parent, grandparent)
        rows = torch.tensor(zmatrix.rows, dtype=torch.long).reshape(-1, 4)
        self.register_buffer("_rows", rows.T.contiguous(), persistent=False)
        # for `measure`; the seed's two bonds and its angle are those of two more rows
        a, b, c, d = torch.tensor([(middle, first, last, middle), (last, middle, first, last), *zmatrix.rows]).T
        self.register_buffer("_ends", torch.cat((a, c, d)), persistent=False)
        self.register_buffer("_starts", torch.cat((b, b, c)), persistent=False)
        self._tree = FrameTree(zmatrix)

    def to_internal(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions [B, N, 3] (nm) to seed [B, 3] = (r_1, r_2, θ_2), r [B, K] (nm), θ [B, K], φ [B, K] (rad)."""
        if len(positions) * self.zmatrix.n_atoms <= DENSE_ATOMS:
            r, theta, phi = (values.t() for values in measure(self._ends, self._starts, positions))
            seed = torch.cat((r[:, :2], theta[:, 1:2]), dim=1)
            return seed, r[:, 2:].contiguous(), theta[:, 2:].contiguous(), phi[:, 2:].contiguous()
        piece = max(1, CPU_ATOMS // self.zmatrix.n_atoms)
        if positions.device.type != "cpu" or len(positions) <= piece:
            seed, r, theta, phi = self._to_internal(positions)
            return seed, r.contiguous(), theta.contiguous(), phi.contiguous()
        parts = [self._to_internal(frames) for frames in positions.split(piece)]
        seed, r, theta, phi = (torch.cat(part) for part in zip(*parts, strict=True))
        return seed, r, theta, phi

    def _to_internal(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x0, x1, x2 = (positions[:, atom] for atom in self.zmatrix.seed)
        seed = torch.stack(
            (torch.linalg.norm(x1 - x0, dim=-1), torch.linalg.norm(x2 - x1, dim=-1), bond_angle(x2, x1, x0)), dim=-1
        )
        # components first and the batch last: rows are gathered whole, and each component is one contiguous run of all
        # rows, however few frames of a large molecule make a piece
        atoms = positions.permute(2, 1, 0).contiguous()
        a, b, c, d = (atoms.index_select(1, column) for column in self._rows)
        u, w, v = (vector.unbind(0) for vector in (a - b, c - b, d - c))
        # bond_angle and dihedral_angle with what they share computed once. The rounding of this sine
        # grows with 1 / sin θ where atoms are nearly in line; that of the cheaper -(plane · v) |w| with 1 / sin² θ.
        plane, other = _cross_rows(u, w), _cross_rows(v, w)
        theta = torch.atan2(_dot_rows(plane, plane).sqrt(), _dot_rows(u, w))
        sine = _dot_rows(_cross_rows(plane, other), w) / _dot_rows(w, w).clamp(min=1e-30).sqrt()
        phi = torch.atan2(sine, _dot_rows(plane, other))
        r = _dot_rows(u, u).sqrt()
        return seed, r.t(), theta.t(), phi.t()

    def to_positions(self, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        """Inverse of `to_internal`, in the canonical frame: seed atom 0 at the origin, 1 on +x, 2 at y > 0."""
        return self._tree(seed, r, theta, phi)


def log_jacobian(seed: Tensor, r: Tensor, theta: Tensor) -> Tensor:
    """log J [B] of docs/theory.md: 2 log r_1 + 2 log r_2 + log sin θ_2 + Σ (2 log r_i + log sin θ_i)."""
    first, last, angle = seed.unbind(-1)
    return (r.square() * theta.sin()).log().sum(-1) + ((first * last).square() * angle.sin()).log()


def place_like(positions: Tensor, reference: Tensor, seed: tuple[int, int, int]) -> Tensor:
    """Move positions [B, N, 3] rigidly so that the seed atoms stand as in ``reference`` [N, 3].

    Kept are seed atom 0, the direction 0→1 and the half-plane of atom 2: the rule of formulas D, E and F.
    """

    def frame(x: Tensor) -> Tensor:
        e = x[..., 1, :] - x[..., 0, :]
        e = e / torch.linalg.norm(e, dim=-1, keepdim=True)
        n = _cross(e, x[..., 2, :] - x[..., 1, :])
        n = n / torch.linalg.norm(n, dim=-1, keepdim=True)
        return torch.stack((e, _cross(n, e), n), dim=-1)

    index = list(seed)
    rotation = frame(reference[index]) @ frame(positions[:, index]).transpose(-1, -2)
    return (positions - positions[:, seed[0], None]) @ rotation.transpose(-1, -2) + reference[seed[0]]
