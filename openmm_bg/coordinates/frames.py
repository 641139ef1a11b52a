"""Positions from internal coordinates: frames composed along the tree, with the gradient in closed form.

A placed atom carries a right-handed frame R = [e, m, n]: e points along its bond from the parent, m lies in the
half-plane of the grandparent. A child at (r, θ, φ) has the frame R·T(θ, φ), T = Rx(φ) Rz(π - θ), and stands r along
its first axis. Rotations are unit quaternions α + βk with complex α, β (four numbers and sixteen products where a
matrix has nine and twenty-seven), composed by the rounds of `openmm_bg.coordinates.prefix`; the bonds, once turned,
are summed by the same rounds.

Everything below an atom turns rigidly with its φ (about its parent's e) and θ (about its own -n), so the gradient
needs forces and torques summed over subtrees: the transpose of that sum, the same rounds backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openmm_bg.coordinates import dense
from openmm_bg.coordinates.prefix import LONG, build_schedule
from openmm_bg.coordinates.rotations import bond_axis, cross, dot, plane_axis
from openmm_bg.coordinates.zmatrix import ZMatrix

#: A CPU places the atoms of so many frames at a time: what they need then fits its last cache.
CPU_ATOMS = 131_072
#: Batches of up to so many atoms in all, of molecules of up to so many, are left to `openmm_bg.coordinates.dense`.
DENSE_BATCH, DENSE = 8_192, 64
#: Seed atoms, which come first in memory: 0 at the origin, 1 on +x, 2 at y > 0.
FIRST, MIDDLE, LAST = 0, 1, 2


def _steps(half: Tensor, out: Tensor) -> None:
    """Quaternions of T(θ, φ) into ``out`` [M, 2, B] complex: α = sin(θ/2) e^{iφ/2}, β = cos(θ/2) e^{iφ/2}.

    ``half`` [2, M, B] are θ/2 and φ/2.
    """
    (sin_theta, sin_phi), (cos_theta, cos_phi) = half.sin().unbind(0), half.cos().unbind(0)
    alpha, beta = torch.view_as_real(out).unbind(1)
    for size, into in ((sin_theta, alpha), (cos_theta, beta)):
        real, imaginary = into.unbind(-1)
        torch.mul(size, cos_phi, out=real)
        torch.mul(size, sin_phi, out=imaginary)


def _compose(left: Tensor, right: Tensor) -> None:
    """``right`` [M, 2, B] becomes left·right: (αα' - ββ'*, αβ' + βα'*)."""
    other_alpha, other_beta = right.conj_physical().unbind(1)
    alpha, beta = left.unbind(1)
    right.mul_(alpha.unsqueeze(1))
    right_alpha, right_beta = right.unbind(1)
    right_alpha.addcmul_(beta, other_beta, value=-1)
    right_beta.addcmul_(beta, other_alpha)


def _planar(frames: Tensor) -> Tensor:
    """Quaternions [M, 2, B] as Re α, Im α, Re β, Im β [M, 4, B], whose rows of the batch are contiguous."""
    return torch.view_as_real(frames).transpose(2, 3).contiguous().view(len(frames), 4, -1)


class FrameTree(nn.Module):
    """(seed, r, θ, φ) to positions for one Z-matrix.

    Parameters
    ----------
    zmatrix
        The Z-matrix of N atoms; K = N - 3 rows.
    """

    _inputs: Tensor
    _outputs: Tensor
    _parents: Tensor
    _arms: Tensor
    _atoms: Tensor
    _unsort: Tensor
    _seed_frames: Tensor
    _factors: Tensor
    _signs: Tensor
    _paths: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        node_of = {atom: i for i, atom in enumerate(zmatrix.seed)}
        parent = [-1, -1, -1]
        for atom, above, *_ in zmatrix.rows:
            parent.append(node_of[above])
            node_of[atom] = len(node_of)
        n = self.n_atoms = len(parent)
        self.dense = n <= DENSE
        schedule = build_schedule(parent, n + 1 if self.dense else LONG)
        rows = n - 3
        slot_of = {node: slot for slot, node in enumerate(schedule.slots)}
        self._bounds = [(start, stop) for start, stop, _ in schedule.rounds]
        for k, (_, _, sources) in enumerate(schedule.rounds):
            self._index(f"_sources{k}", sources)
        # A column of (seed, r, θ, φ) [3 + 3 K] for r of the slots from MIDDLE, θ and φ of those from LAST, whose φ,
        # given column 0 here, is none of them.
        row_in_slot = [node - 3 for node in schedule.slots[3:]]
        r, theta, phi = ([3 + block * rows + row for row in row_in_slot] for block in range(3))
        self._index("_inputs", [0, 1, *r, 2, *theta, 0, *phi])
        # And back: the x of the force on MIDDLE, then the gradients by r, θ and φ of the slots from LAST.
        slots = [slot_of[row + 3] - LAST for row in range(rows)]
        blocks = [1 + block * (rows + 1) + slot for block in range(3) for slot in slots]
        self._index("_outputs", [0, 1, 2 + rows, *blocks])
        atoms = list(zmatrix.seed) + [row[0] for row in zmatrix.rows]
        atom_in_slot = [atoms[node] for node in schedule.slots]
        slot_of_atom = {atom: slot for slot, atom in enumerate(atom_in_slot)}
        # the slot of the parent of seed atom 2 and of every row's atom
        parents = [MIDDLE] + [slot_of[parent[row + 3]] for row in row_in_slot]
        self._index("_parents", parents)
        self._index("_arms", [atom_in_slot[slot] for slot in parents])
        self._index("_atoms", atom_in_slot)
        self._index("_unsort", [slot_of_atom[atom] for atom in range(n)])
        if self.dense:
            self._index("_factors", dense.factors(n - LAST))
            self._real("_signs", torch.tensor(dense.SIGNS).repeat(n - LAST).unsqueeze(-1))
            self._real("_seed_frames", torch.tensor(dense.SEED_FRAMES).unsqueeze(-1))
            self._real("_paths", dense.path_matrix([-1, FIRST, *parents], atom_in_slot))

    def _real(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.double(), persistent=False)

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
        if not torch.is_grad_enabled():  # what a gradient would need is not kept, nor is a node of the graph made
            return _reconstruct(self, seed, r, theta, phi)[0]
        positions: Tensor = _Reconstruction.apply(self, seed, r, theta, phi)
        return positions


def _pieces(tree: FrameTree, like: Tensor) -> list[slice]:
    """Equal parts of the batch of ``like`` [B, ...] for a CPU to work on one by one; a GPU takes all at once."""
    batch, n = len(like), tree.n_atoms
    parts = 1 if like.device.type != "cpu" else max(1, -(-batch * n // CPU_ATOMS))
    size = max(1, -(-batch // parts))
    return [slice(start, min(start + size, batch)) for start in range(0, max(batch, 1), size)]


def _is_small(tree: FrameTree, like: Tensor) -> bool:
    """Whether `dense` serves the batch of ``like`` [B, ...]."""
    return tree.dense and len(like) * tree.n_atoms <= DENSE_BATCH


def _reconstruct(
    tree: FrameTree, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor
) -> tuple[Tensor, list[slice], list[Tensor]]:
    """Positions [B, N, 3], and what their gradient needs of each of the pieces; slots come first and the batch last."""
    n = tree.n_atoms
    positions = seed.new_empty((len(seed), n, 3))
    pieces, kept = _pieces(tree, seed), []
    place = dense.place if _is_small(tree, seed) else _place
    for piece in pieces:
        found, x = place(tree, torch.cat((seed[piece], r[piece], theta[piece], phi[piece]), dim=1))
        batch = x.shape[-1]
        positions[piece].view(batch, 3 * n).copy_(x.view(3 * n, batch).t())
        kept += found
    return positions, pieces, kept


class _Reconstruction(torch.autograd.Function):
    """Positions and their vector-Jacobian product."""

    @staticmethod
    def forward(ctx: Any, tree: FrameTree, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        positions, pieces, kept = _reconstruct(tree, seed, r, theta, phi)
        ctx.tree, ctx.pieces, ctx.small = tree, pieces, _is_small(tree, seed)
        ctx.save_for_backward(*kept)
        return positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tree: FrameTree = ctx.tree
        rows = tree.n_atoms - 3
        found = gradient.new_empty((len(gradient), 3 + 3 * rows))
        n_kept = len(ctx.saved_tensors) // len(ctx.pieces)
        turn: Callable[..., Tensor] = dense.turn if ctx.small else _turn
        for k, piece in enumerate(ctx.pieces):
            values = turn(tree, *ctx.saved_tensors[n_kept * k : n_kept * (k + 1)], gradient[piece])
            found[piece].copy_(values.index_select(0, tree._outputs).t())
        return None, *found.split((3, rows, rows, rows), dim=1)


def _place(tree: FrameTree, internal: Tensor) -> tuple[list[Tensor], Tensor]:
    """Quaternions [N, 4, B] and positions [N, 3, B] of the slots, and positions [N, 3, B] of the atoms.

    ``internal`` is (seed, r, θ, φ) [B, 3 + 3 K].
    """
    batch, n = len(internal), tree.n_atoms
    values = internal.t().contiguous().index_select(0, tree._inputs)
    r, half = values[: n - 1], values[n - 1 :].mul_(0.5).view(2, n - LAST, batch)
    half[1, 0] = 0.0
    frames = torch.empty((n, 2, batch), dtype=internal.dtype.to_complex(), device=internal.device)
    # The frames (α, β) of the first two: half a turn about y, so that the bond points away from atom 1, and none. They
    # are filled in as numbers, for a tensor would have to be brought to a GPU.
    frames[:LAST] = 0.0
    frames[FIRST, 1].fill_(-1.0j)
    frames[MIDDLE, 0].fill_(1.0)
    _steps(half, frames[LAST:])
    rounds = tree.rounds()
    for start, stop, sources in rounds:
        _compose(frames.index_select(0, sources), frames[start:stop])
    quaternions = _planar(frames)
    x = torch.empty((n, 3, batch), dtype=internal.dtype, device=internal.device)
    x[FIRST] = 0.0
    torch.mul(bond_axis(quaternions[MIDDLE:]), r.unsqueeze(1), out=x[MIDDLE:])  # the bonds
    x[LAST].add_(x[MIDDLE])
    for start, stop, sources in rounds:
        x[start:stop].add_(x.index_select(0, sources))
    return [quaternions, x], x.index_select(0, tree._unsort)


def _turn(tree: FrameTree, quaternions: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradients [4 + 3 K, B] by r_1 and by r, θ, φ of the slots from LAST, from those by positions [B, N, 3]."""
    n, _, batch = x.shape
    # force and torque about the origin, summed over each atom's subtree
    of_atoms = gradient.reshape(batch, 3 * n).t().contiguous().view(n, 3, batch)
    sums = torch.empty((n, 6, batch), dtype=x.dtype, device=x.device)
    force, torque = sums.split(3, dim=1)
    force.copy_(of_atoms.index_select(0, tree._atoms))
    cross(x, force, out=torque)
    for start, stop, sources in reversed(tree.rounds()):
        sums.index_add_(0, sources, sums[start:stop].clone())
    sums[MIDDLE].add_(sums[LAST])
    found = torch.empty((1 + 3 * (n - LAST), batch), dtype=x.dtype, device=x.device)
    found[0] = force[MIDDLE, 0]
    force, torque = force[LAST:], torque[LAST:]
    turn = torch.empty_like(x[LAST:])
    cross(x.index_select(0, tree._parents), force, out=turn)
    torch.sub(torque, turn, out=turn)  # about the parent
    dr, dtheta, dphi = found[1:].view(3, n - LAST, batch).unbind(0)
    axis = bond_axis(quaternions)
    dot(axis[LAST:], force, out=dr)
    dot(plane_axis(quaternions[LAST:]), turn, out=dtheta).neg_()
    dot(axis.index_select(0, tree._parents), turn, out=dphi)
    return found
