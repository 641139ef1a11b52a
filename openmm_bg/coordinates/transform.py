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


def _step(theta: Tensor, phi: Tensor) -> Tensor:
    """T(θ, φ) [..., 3, 3]: the child's frame in its parent's."""
    ct, st, cp, sp = theta.cos(), theta.sin(), phi.cos(), phi.sin()
    zero = torch.zeros_like(ct)
    rows = (-ct, -st, zero, st * cp, -ct * cp, -sp, st * sp, -ct * sp, cp)
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


class InternalCoordinates(nn.Module):
    """x [B, N, 3] ↔ raw internal coordinates of a Z-matrix.

    Raw means: every row has its own length r, angle θ and dihedral φ; siblings, methyl groups and what is modelled
    are the representation's business.

    Parameters
    ----------
    zmatrix
        The Z-matrix of N atoms; K = N - 3 rows.
    """

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        self.zmatrix = zmatrix
        self.register_buffer("_seed", torch.tensor(zmatrix.seed), persistent=False)
        rows = torch.tensor(zmatrix.rows, dtype=torch.long).reshape(-1, 4)
        self.register_buffer("_rows", rows, persistent=False)
        placed = {atom: i for i, atom in enumerate(zmatrix.seed)}  # atom -> index within its level
        level_of = {atom: 0 for atom in zmatrix.seed}
        self._slices: list[tuple[int, int]] = []
        start = 0
        while start < len(zmatrix.rows):
            level = zmatrix.levels[start]
            stop = start
            while stop < len(zmatrix.rows) and zmatrix.levels[stop] == level:
                stop += 1
            parents = [placed[zmatrix.rows[row][1]] for row in range(start, stop)]
            for row in range(start, stop):
                assert level_of[zmatrix.rows[row][1]] == level - 1
                placed[zmatrix.rows[row][0]] = row - start
                level_of[zmatrix.rows[row][0]] = level
            self.register_buffer(f"_parents{len(self._slices)}", torch.tensor(parents), persistent=False)
            self._slices.append((start, stop))
            start = stop
        order = list(zmatrix.seed) + [row[0] for row in zmatrix.rows]
        self.register_buffer("_unsort", torch.argsort(torch.tensor(order)), persistent=False)

    def to_internal(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions [B, N, 3] (nm) to seed [B, 3] = (r_1, r_2, θ_2), r [B, K] (nm), θ [B, K], φ [B, K] (rad)."""
        x0, x1, x2 = (positions[:, atom] for atom in self.zmatrix.seed)
        seed = torch.stack(
            (torch.linalg.norm(x1 - x0, dim=-1), torch.linalg.norm(x2 - x1, dim=-1), bond_angle(x2, x1, x0)), dim=-1
        )
        a, b, c, d = (positions.index_select(1, self._rows[:, i]) for i in range(4))
        return seed, torch.linalg.norm(a - b, dim=-1), bond_angle(a, b, c), dihedral_angle(a, b, c, d)

    def to_positions(self, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        """Inverse of `to_internal`, in the canonical frame: seed atom 0 at the origin, 1 on +x, 2 at y > 0."""
        r1, r2, theta2 = seed.unbind(-1)
        zero = torch.zeros_like(r1)
        middle = torch.eye(3, dtype=seed.dtype, device=seed.device).expand(len(seed), 3, 3)
        first = torch.diag(torch.tensor([-1.0, 1.0, -1.0], dtype=seed.dtype, device=seed.device)).expand_as(middle)
        last = _step(theta2, zero)
        x1 = torch.stack((r1, zero, zero), dim=-1)
        x = torch.stack((torch.zeros_like(x1), x1, x1 + r2[:, None] * last[:, :, 0]), dim=1)
        frames = torch.stack((first, middle, last), dim=1)
        steps = _step(theta, phi)
        placed = [x]
        for level, (start, stop) in enumerate(self._slices):
            parents = getattr(self, f"_parents{level}")
            frames = frames.index_select(1, parents) @ steps[:, start:stop]
            x = x.index_select(1, parents) + r[:, start:stop, None] * frames[..., 0]
            placed.append(x)
        return torch.cat(placed, dim=1).index_select(1, self._unsort)


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
