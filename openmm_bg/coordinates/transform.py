"""Cartesian positions to internal coordinates and back, in batches, differentiable both ways.

A placed atom carries a right-handed frame R = [e, m, n]: e points along its bond from the parent, m lies in the
half-plane of the grandparent. A child at (r, θ, φ) has the frame R·T(θ, φ) and stands r along its first axis, so
that reconstruction is a product of rigid motions down the tree, one tensor operation for each level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from openmm_bg.coordinates.zmatrix import ZMatrix
from openmm_bg.errors import InputError


def wrap(angle: Tensor) -> Tensor:
    """Angle to [-π, π), rad."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


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


def _bond(theta: Tensor, phi: Tensor) -> Tensor:
    """Direction of the child's bond [..., 3] in its parent's frame."""
    st = theta.sin()
    return torch.stack((-theta.cos(), st * phi.cos(), st * phi.sin()), dim=-1)


def _step(theta: Tensor, phi: Tensor) -> Tensor:
    """T(θ, φ) [..., 3, 3]: the child's frame in its parent's; the first column is its bond."""
    ct, st, cp, sp = theta.cos(), theta.sin(), phi.cos(), phi.sin()
    rows = (-ct, -st, torch.zeros_like(ct), st * cp, -ct * cp, -sp, st * sp, -ct * sp, cp)
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


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
    _inner: Tensor
    _leaves: Tensor
    _holders: Tensor
    _unsort: Tensor

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
        self.register_buffer("_rows", rows.T.reshape(-1), persistent=False)
        # Only atoms with children need a frame, level after level; the leaves are placed in one go at the end.
        parents = {row[1] for row in zmatrix.rows}
        is_inner = [row[0] in parents for row in zmatrix.rows]
        inner = [i for i, yes in enumerate(is_inner) if yes]
        leaves = [i for i, yes in enumerate(is_inner) if not yes]
        frame_of = {atom: i for i, atom in enumerate(zmatrix.seed)}  # atom -> index among all frames
        start_of_level = [0]
        self._widths: list[int] = []  # inner atoms of each level
        for level in sorted({zmatrix.levels[i] for i in inner}):
            rows_here = [zmatrix.rows[i] for i in inner if zmatrix.levels[i] == level]
            before = torch.tensor([frame_of[row[1]] - start_of_level[-1] for row in rows_here])
            start_of_level.append(len(frame_of))
            for row in rows_here:
                frame_of[row[0]] = len(frame_of)
            self.register_buffer(f"_parents{len(self._widths)}", before, persistent=False)
            self._widths.append(len(rows_here))
        self.register_buffer("_inner", torch.tensor(inner, dtype=torch.long), persistent=False)
        self.register_buffer("_leaves", torch.tensor(leaves, dtype=torch.long), persistent=False)
        holders = torch.tensor([frame_of[zmatrix.rows[i][1]] for i in leaves], dtype=torch.long)
        self.register_buffer("_holders", holders, persistent=False)
        order = list(zmatrix.seed) + [zmatrix.rows[i][0] for i in inner + leaves]
        self.register_buffer("_unsort", torch.argsort(torch.tensor(order)), persistent=False)

    def to_internal(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions [B, N, 3] (nm) to seed [B, 3] = (r_1, r_2, θ_2), r [B, K] (nm), θ [B, K], φ [B, K] (rad)."""
        x0, x1, x2 = (positions[:, atom] for atom in self.zmatrix.seed)
        seed = torch.stack(
            (torch.linalg.norm(x1 - x0, dim=-1), torch.linalg.norm(x2 - x1, dim=-1), bond_angle(x2, x1, x0)), dim=-1
        )
        shape = (len(positions), 4, -1, 3)
        a, b, c, d = positions.index_select(1, self._rows).view(shape).unbind(1)
        # bond_angle and dihedral_angle with their common cross product and lengths computed once
        bond, axis, last = a - b, c - b, d - c
        plane, other = _cross(bond, axis), _cross(last, axis)
        theta = torch.atan2(torch.linalg.norm(plane, dim=-1), (bond * axis).sum(-1))
        sine = (_cross(plane, other) * axis).sum(-1) / torch.linalg.norm(axis, dim=-1)
        return seed, torch.linalg.norm(bond, dim=-1), theta, torch.atan2(sine, (plane * other).sum(-1))

    def to_positions(self, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        """Inverse of `to_internal`, in the canonical frame: seed atom 0 at the origin, 1 on +x, 2 at y > 0."""
        r1, r2, theta2 = seed.unbind(-1)
        zero = torch.zeros_like(r1)
        middle = torch.eye(3, dtype=seed.dtype, device=seed.device).expand(len(seed), 3, 3)
        first = torch.diag(seed.new_tensor([-1.0, 1.0, -1.0])).expand_as(middle)
        last = _step(theta2, zero)
        x1 = torch.stack((r1, zero, zero), dim=-1)
        x = torch.stack((torch.zeros_like(x1), x1, x1 + r2[:, None] * last[:, :, 0]), dim=1)
        frame = torch.stack((first, middle, last), dim=1)
        places, frames = [x], [frame]
        theta_in, phi_in = theta.index_select(1, self._inner), phi.index_select(1, self._inner)
        steps = _step(theta_in, phi_in).split(self._widths, dim=1)
        lengths = r.index_select(1, self._inner)[..., None].split(self._widths, dim=1)
        for level, (step, length) in enumerate(zip(steps, lengths, strict=True)):
            parents = getattr(self, f"_parents{level}")
            frame = frame.index_select(1, parents) @ step
            x = x.index_select(1, parents) + length * frame[..., 0]
            places.append(x)
            frames.append(frame)
        theta_out, phi_out = theta.index_select(1, self._leaves), phi.index_select(1, self._leaves)
        bonds = r.index_select(1, self._leaves)[..., None] * _bond(theta_out, phi_out)
        holders = torch.cat(frames, dim=1).index_select(1, self._holders)
        placed = torch.cat(places, dim=1)
        leaves = placed.index_select(1, self._holders) + (holders @ bonds[..., None]).squeeze(-1)
        return torch.cat((placed, leaves), dim=1).index_select(1, self._unsort)


def log_jacobian(seed: Tensor, r: Tensor, theta: Tensor) -> Tensor:
    """log J [B] of docs/theory.md: 2 log r_1 + 2 log r_2 + log sin θ_2 + Σ (2 log r_i + log sin θ_i)."""
    total = 2 * seed[:, 0].log() + 2 * seed[:, 1].log() + seed[:, 2].sin().log()
    return total + (2 * r.log() + theta.sin().log()).sum(-1)


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
