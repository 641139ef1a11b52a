"""Internal coordinates and frames along the tree of a small molecule, in as few calls as possible.

A batch of a dipeptide takes torch less time to compute than to be told what to compute. Here sums along the tree are
one product with a matrix of zeros and ones instead of rounds, and all arithmetic is real. It costs more operations than
`openmm_bg.coordinates.frames` and `transform`, whose notation it shares, and would be slower for large molecules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_bg.coordinates.rotations import bond_axis, cross, plane_axis

#: Component b of (unit a)·right is SIGNS[4 a + b] times component COMPONENTS[4 a + b] of right, the units being 1, i, k
#: and i k.
COMPONENTS = [0, 1, 2, 3, 1, 0, 3, 2, 2, 3, 0, 1, 3, 2, 1, 0]
SIGNS = [1, 1, 1, 1, -1, 1, -1, 1, -1, 1, 1, -1, -1, -1, 1, 1]
#: The first two seed atoms: half a turn about y, so that the bond points away from atom 1, and none.
SEED_FRAMES = [[0, 0, 0, -1], [1, 0, 0, 0]]


def measure(ends: Tensor, starts: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r, θ and φ [M, B] of M chains a-b-c-d of atoms, from positions [B, N, 3].

    Parameters
    ----------
    ends, starts
        [3 M] atoms: vectors from b to a, from b to c and from c to d.
    """
    batch, n = positions.shape[:2]
    atoms = positions.reshape(batch, 3 * n).t().contiguous().view(n, 3, batch)
    vectors = (atoms.index_select(0, ends) - atoms.index_select(0, starts)).view(3, len(ends) // 3, 3, batch)
    u, w, _ = vectors.unbind(0)
    planes = torch.linalg.cross(vectors[::2], w.expand(2, *w.shape), dim=2)
    plane, other = planes.unbind(0)
    sine = torch.linalg.cross(plane, other, dim=1)
    left = torch.stack((u, plane, u, sine, w, plane))
    right = torch.stack((u, plane, w, w, w, other))
    uu, plane_square, uw, along, ww, cosine = (left * right).sum(2).unbind(0)
    theta = torch.atan2(plane_square.sqrt(), uw)
    return uu.sqrt(), theta, torch.atan2(along / ww.clamp(min=1e-30).sqrt(), cosine)


def factors(n: int) -> list[int]:
    """Rows of n quaternions [4 n, B] that, times `SIGNS`, are (each unit)·(each quaternion) [n, 4, 4, B]."""
    return [4 * i + component for i in range(n) for component in COMPONENTS]


def path_matrix(above: Sequence[int], atoms: Sequence[int]) -> Tensor:
    """[N, N] with 1 in row ``atoms[slot]`` of every slot whose bond lies on the way to that atom.

    Parameters
    ----------
    above
        [N] slot that each slot hangs on, -1 for the first.
    atoms
        [N] atom in each slot.
    """
    matrix = torch.zeros(len(atoms), len(atoms))
    for slot, atom in enumerate(atoms):
        while slot >= 0:
            matrix[atom, slot] = 1.0
            slot = above[slot]
    return matrix


def _summed(paths: Tensor, values: Tensor) -> Tensor:
    """Product of [N, N] and [N, c, B], in float64: torch may be told to round float32 factors to bfloat16 or TF32."""
    product = torch.mm(paths, values.view(len(values), values.shape[1] * values.shape[2]).to(torch.float64))
    return product.to(values.dtype).view(values.shape)


def place(tree: Any, internal: Tensor) -> tuple[list[Tensor], Tensor]:
    """What `turn` needs (quaternions and axes e of the slots, positions), and positions [N, 3, B] of the atoms.

    ``internal`` is (seed, r, θ, φ) [B, 3 + 3 K].
    """
    batch, n, dtype = len(internal), tree.n_atoms, internal.dtype
    values = internal.t().contiguous().index_select(0, tree._inputs)
    r = values[: n - 1]
    half = values[n - 1 :].mul_(0.5)
    half[n - 2].zero_()  # φ of seed atom 2
    parts = half.new_empty((2, 2, n - 2, 1, batch))  # (sin, cos) of (θ, φ)
    flat = parts.view(2, 2 * n - 4, batch)
    torch.sin(half, out=flat[0])
    torch.cos(half, out=flat[1])
    (sin_theta, sin_phi), (cos_theta, cos_phi) = parts[0].unbind(0), parts[1].unbind(0)
    theta, phi = torch.cat((sin_theta, cos_theta), 1), torch.cat((cos_phi, sin_phi), 1)
    frames = half.new_empty((n, 4, batch))
    frames[:2] = tree._seed_frames.to(dtype)
    steps = frames[2:]
    torch.mul(theta.unsqueeze(2), phi.unsqueeze(1), out=steps.view(n - 2, 2, 2, batch))
    # a slot's step is multiplied from the left by its parent's frame, level by level
    products = steps.view(4 * n - 8, batch).index_select(0, tree._factors).mul_(tree._signs.to(dtype))
    products = products.view(n - 2, 4, 4, batch)
    columns = frames.unsqueeze(2)
    for start, stop, sources in tree.rounds():
        torch.sum(columns.index_select(0, sources) * products[start - 2 : stop - 2], 1, out=frames[start:stop])
    axis = bond_axis(frames)
    bonds = half.new_empty((n, 3, batch))
    bonds[0].zero_()
    torch.mul(axis[1:], r.unsqueeze(1), out=bonds[1:])
    x = _summed(tree._paths, bonds)
    return [frames, axis, x], x


def turn(tree: Any, frames: Tensor, axis: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradients [4 + 3 K, B] by r_1 and by r, θ, φ of the slots from seed atom 2, from those by positions [B, N, 3]."""
    n, _, batch = x.shape
    both = x.new_empty((n, 6, batch))
    force, torque = both.split(3, dim=1)
    force.copy_(gradient.reshape(batch, 3 * n).t().contiguous().view(n, 3, batch))
    cross(x, force, out=torque)
    # force and torque about the origin, summed over each slot's subtree
    sums = _summed(tree._paths.t(), both)
    force, torque = sums[2:].split(3, dim=1)
    arms = torch.empty_like(torque)
    cross(x.index_select(0, tree._arms), force, out=arms)
    torque.sub_(arms)  # about the parent
    found = x.new_empty((3 * n - 5, batch))
    found[0].copy_(sums[1, 0])
    dr, dtheta, dphi = found[1:].view(3, n - 2, batch).unbind(0)
    torch.sum(axis[2:] * force, 1, out=dr)
    torch.sum(plane_axis(frames[2:]) * torque, 1, out=dtheta).neg_()
    torch.sum(axis.index_select(0, tree._parents) * torque, 1, out=dphi)
    return found
