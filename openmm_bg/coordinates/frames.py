"""Positions from internal coordinates: frames composed along the tree, with the gradient in closed form.

A placed atom carries a right-handed frame R = [e, m, n]: e points along its bond from the parent, m lies in the
half-plane of the grandparent. A child at (r, θ, φ) has the frame R·T(θ, φ), T = Rx(φ) Rz(π - θ), and stands r along
its first axis. Rotations are unit quaternions α + βj with complex α, β (four numbers and sixteen products where a
matrix has nine and twenty-seven), composed by the rounds of `openmm_bg.coordinates.prefix`; the bonds, once turned,
are summed by the same rounds.

Everything below an atom turns rigidly with its φ (about its parent's e) and θ (about its own -n), so the gradient
needs forces and torques summed over subtrees: the transpose of that sum, the same rounds backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openmm_bg.coordinates.prefix import build_schedule
from openmm_bg.coordinates.zmatrix import ZMatrix

#: A CPU places the atoms of so many frames at a time: what they need then fits its last cache.
CPU_ATOMS = 393_216
#: Seed atoms, which come first in memory: 0 at the origin, 1 on +x, 2 at y > 0.
FIRST, MIDDLE, LAST = 0, 1, 2


def _steps(theta: Tensor, phi: Tensor, out: Tensor) -> None:
    """Quaternions of T(θ, φ) [M, B] into ``out`` [M, 2, B] complex: α = sin(θ/2) e^{iφ/2}, β = i cos(θ/2) e^{iφ/2}."""
    half = 0.5 * theta
    st, ct = half.sin(), half.cos()
    half = 0.5 * phi
    sp, cp = half.sin(), half.cos()
    real = torch.view_as_real(out)
    torch.mul(st, cp, out=real[:, 0, :, 0])
    torch.mul(st, sp, out=real[:, 0, :, 1])
    torch.mul(ct, sp, out=real[:, 1, :, 0]).neg_()
    torch.mul(ct, cp, out=real[:, 1, :, 1])


def _compose(left: Tensor, right: Tensor) -> None:
    """``right`` [M, 2, B] becomes left·right: (αα' - ββ'*, αβ' + βα'*)."""
    other = right.conj_physical()
    alpha, beta = left[:, 0], left[:, 1]
    right.mul_(alpha[:, None])
    right[:, 0].addcmul_(beta, other[:, 1], value=-1)
    right[:, 1].addcmul_(beta, other[:, 0])


def _planar(frames: Tensor) -> Tensor:
    """Quaternions [M, 2, B] as w, x, y, z [M, 4, B], whose rows of the batch are contiguous."""
    return torch.view_as_real(frames).transpose(2, 3).contiguous().view(len(frames), 4, -1)


def _bond_axis(quaternions: Tensor) -> Tensor:
    """e [M, 3, B] of unit quaternions [M, 4, B]: (w² + x² - y² - z², 2(xy + wz), 2(xz - wy))."""
    w, x, y, z = quaternions.unbind(1)
    axis = quaternions.new_empty((len(quaternions), 3, quaternions.shape[-1]))
    torch.mul(w, w, out=axis[:, 0]).addcmul_(x, x).addcmul_(y, y, value=-1).addcmul_(z, z, value=-1)
    torch.mul(x, y, out=axis[:, 1]).addcmul_(w, z)
    torch.mul(x, z, out=axis[:, 2]).addcmul_(w, y, value=-1)
    axis[:, 1:] *= 2
    return axis


def _plane_axis(quaternions: Tensor) -> Tensor:
    """n [M, 3, B] of unit quaternions [M, 4, B]: (2(xz + wy), 2(yz - wx), w² - x² - y² + z²)."""
    w, x, y, z = quaternions.unbind(1)
    axis = quaternions.new_empty((len(quaternions), 3, quaternions.shape[-1]))
    torch.mul(x, z, out=axis[:, 0]).addcmul_(w, y)
    torch.mul(y, z, out=axis[:, 1]).addcmul_(w, x, value=-1)
    axis[:, :2] *= 2
    torch.mul(w, w, out=axis[:, 2]).addcmul_(x, x, value=-1).addcmul_(y, y, value=-1).addcmul_(z, z)
    return axis


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """a·b [M, B] of vectors [M, 3, B]."""
    return (a[:, 0] * b[:, 0]).addcmul_(a[:, 1], b[:, 1]).addcmul_(a[:, 2], b[:, 2])


def _cross(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a × b into ``out``, all [M, 3, B]."""
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        torch.mul(a[:, j], b[:, k], out=out[:, i]).addcmul_(a[:, k], b[:, j], value=-1)


class FrameTree(nn.Module):
    """(seed, r, θ, φ) to positions for one Z-matrix.

    Parameters
    ----------
    zmatrix
        The Z-matrix of N atoms; K = N - 3 rows.
    """

    _order: Tensor
    _back: Tensor
    _parents: Tensor
    _atoms: Tensor
    _unsort: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        node_of = {atom: i for i, atom in enumerate(zmatrix.seed)}
        parent = [-1, -1, -1]
        for atom, above, *_ in zmatrix.rows:
            parent.append(node_of[above])
            node_of[atom] = len(node_of)
        schedule = build_schedule(parent)
        slot_of = {node: slot for slot, node in enumerate(schedule.slots)}
        self._bounds = [(start, stop) for start, stop, _ in schedule.rounds]
        for k, (_, _, sources) in enumerate(schedule.rounds):
            self._index(f"_sources{k}", sources)
        rows = [node - 3 for node in schedule.slots[3:]]
        self._index("_order", [0] + [row + 1 for row in rows])  # row, from 1, in each slot; 0 is seed atom 2
        self._index("_back", [slot_of[row + 3] - 3 for row in range(len(rows))])
        # the parent's slot of seed atom 2 and of every row
        self._index("_parents", [MIDDLE] + [slot_of[parent[row + 3]] for row in rows])
        atoms = list(zmatrix.seed) + [row[0] for row in zmatrix.rows]
        atom_in_slot = [atoms[node] for node in schedule.slots]
        self._index("_atoms", atom_in_slot)
        slot_of_atom = {atom: slot for slot, atom in enumerate(atom_in_slot)}
        self._index("_unsort", [slot_of_atom[atom] for atom in range(len(atoms))])

    def _index(self, name: str, values: list[int]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)

    @property
    def n_rounds(self) -> int:
        """Rounds of one reconstruction."""
        return len(self._bounds)

    def rounds(self) -> list[tuple[int, int, Tensor]]:
        return [(start, stop, getattr(self, f"_sources{k}")) for k, (start, stop) in enumerate(self._bounds)]

    def forward(self, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        """Positions [B, N, 3] in the canonical frame from seed [B, 3], r, θ, φ [B, K]; once differentiable."""
        positions: Tensor = _Reconstruction.apply(self, seed, r, theta, phi)
        return positions

    def to_slots(self, of_last: Tensor, values: Tensor) -> Tensor:
        """Values of seed atom 2 [B, 1] and of the rows [B, K] to their slots [K + 1, B]."""
        return torch.cat((of_last, values), dim=1).t().contiguous().index_select(0, self._order)


def _pieces(tree: FrameTree, like: Tensor) -> list[slice]:
    """Equal parts of the batch of ``like`` [B, ...] for a CPU to work on one by one; a GPU takes all at once."""
    batch, n = len(like), len(tree._atoms)
    parts = 1 if like.device.type != "cpu" else max(1, -(-batch * n // CPU_ATOMS))
    size = max(1, -(-batch // parts))
    return [slice(start, min(start + size, batch)) for start in range(0, max(batch, 1), size)]


class _Reconstruction(torch.autograd.Function):
    """Positions and their vector-Jacobian product; in memory slots come first and the batch last."""

    @staticmethod
    def forward(ctx: Any, tree: FrameTree, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        n = r.shape[1] + 3
        positions = seed.new_empty((len(seed), n, 3))
        pieces, kept = _pieces(tree, seed), []
        for piece in pieces:
            quaternions, x = _place(tree, seed[piece], r[piece], theta[piece], phi[piece])
            batch = x.shape[-1]
            positions[piece].view(batch, 3 * n).copy_(x.index_select(0, tree._unsort).view(3 * n, batch).t())
            kept += [quaternions, x]
        ctx.tree, ctx.pieces = tree, pieces
        ctx.save_for_backward(*kept)
        return positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tree: FrameTree = ctx.tree
        rows = len(tree._atoms) - 3
        dseed = gradient.new_empty((len(gradient), 3))
        dr, dtheta, dphi = gradient.new_empty((3, len(gradient), rows)).unbind(0)
        for k, piece in enumerate(ctx.pieces):
            quaternions, x = ctx.saved_tensors[2 * k : 2 * k + 2]
            *of_seed, of_r, of_theta, of_phi = _turn(tree, quaternions, x, gradient[piece])
            for column, values in enumerate(of_seed):
                dseed[piece, column] = values
            for out, values in ((dr, of_r), (dtheta, of_theta), (dphi, of_phi)):
                out[piece] = values.index_select(0, tree._back).t()
        return None, dseed, dr, dtheta, dphi


def _place(tree: FrameTree, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Quaternions [N, 4, B] and positions [N, 3, B] of all slots."""
    batch, n = len(seed), r.shape[1] + 3
    kind = torch.complex(seed[:0, 0], seed[:0, 0]).dtype
    frames = torch.empty((n, 2, batch), dtype=kind, device=seed.device)
    frames[FIRST, 0], frames[FIRST, 1] = 0.0, 1.0  # half a turn about y: its bond points away from atom 1
    frames[MIDDLE, 0], frames[MIDDLE, 1] = 1.0, 0.0
    r1, r2, angle = seed[:, :1], seed[:, 1:2], seed[:, 2:]
    _steps(tree.to_slots(angle, theta), tree.to_slots(torch.zeros_like(angle), phi), frames[LAST:])
    rounds = tree.rounds()
    for start, stop, sources in rounds:
        _compose(frames.index_select(0, sources), frames[start:stop])
    x = torch.empty((n, 3, batch), dtype=seed.dtype, device=seed.device)
    x[:LAST] = 0.0
    x[MIDDLE, 0] = r1[:, 0]
    quaternions = _planar(frames)
    torch.mul(_bond_axis(quaternions[LAST:]), tree.to_slots(r2, r)[:, None], out=x[LAST:])
    x[LAST] += x[MIDDLE]
    for start, stop, sources in rounds:
        x[start:stop] += x.index_select(0, sources)
    return quaternions, x


def _turn(tree: FrameTree, quaternions: Tensor, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Gradients by r_1, r_2, θ_2 [B] and by r, θ, φ of the rows' slots [K, B], from those by positions [B, N, 3]."""
    n, batch = len(x), x.shape[-1]
    # force and torque about the origin, summed over each atom's subtree
    sums = torch.empty((n, 6, batch), dtype=x.dtype, device=x.device)
    force, torque = sums[:, :3], sums[:, 3:]
    sums[:, :3] = gradient.reshape(batch, 3 * n).t().contiguous().view(n, 3, batch).index_select(0, tree._atoms)
    _cross(x, force, out=torque)
    for start, stop, sources in reversed(tree.rounds()):
        sums.index_add_(0, sources, sums[start:stop].clone())
    sums[MIDDLE] += sums[LAST]
    arm = torch.empty_like(x[LAST:])
    _cross(x.index_select(0, tree._parents), force[LAST:], out=arm)
    turn = torque[LAST:] - arm  # about the parent
    axis = _bond_axis(quaternions)
    dr = _dot(axis[LAST:], force[LAST:])
    dtheta = _dot(_plane_axis(quaternions[LAST:]), turn).neg_()
    dphi = _dot(axis.index_select(0, tree._parents[1:]), turn[1:])
    return force[MIDDLE, 0], dr[0], dtheta[0], dr[1:], dtheta[1:], dphi
