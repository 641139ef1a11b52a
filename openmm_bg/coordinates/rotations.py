"""Vectors and axes of rotations in batches, the batch last: [M, 3, B], and quaternions α + βk as [M, 4, B].

A quaternion is stored as Re α, Im α, Re β, Im β; it turns x, y, z into the axes e, m, n of
`openmm_bg.coordinates.frames`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bond_axis(quaternions: Tensor) -> Tensor:
    """e [M, 3, B] of unit quaternions [M, 4, B]: (|α|² - |β|², 2 Re αβ, 2 Im αβ)."""
    w, x, p, q = quaternions.unbind(1)
    axis = quaternions.new_empty((len(quaternions), 3, quaternions.shape[-1]))
    e1, e2, e3 = axis.unbind(1)
    torch.mul(w, w, out=e1).addcmul_(x, x).addcmul_(p, p, value=-1).addcmul_(q, q, value=-1)
    torch.mul(w, p, out=e2).addcmul_(x, q, value=-1)
    torch.mul(w, q, out=e3).addcmul_(x, p)
    axis[:, 1:].mul_(2)
    return axis


def plane_axis(quaternions: Tensor) -> Tensor:
    """n [M, 3, B] of unit quaternions [M, 4, B]: (2 Im αβ*, -Im (α² + β²), Re (α² + β²))."""
    w, x, p, q = quaternions.unbind(1)
    axis = quaternions.new_empty((len(quaternions), 3, quaternions.shape[-1]))
    n1, n2, n3 = axis.unbind(1)
    torch.mul(x, p, out=n1).addcmul_(w, q, value=-1).mul_(2)
    torch.mul(w, x, out=n2).addcmul_(p, q).mul_(-2)
    torch.mul(w, w, out=n3).addcmul_(x, x, value=-1).addcmul_(p, p).addcmul_(q, q, value=-1)
    return axis


def dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a·b [M, B] of vectors [M, 3, B]."""
    (a1, a2, a3), (b1, b2, b3) = a.unbind(1), b.unbind(1)
    return torch.mul(a1, b1, out=out).addcmul_(a2, b2).addcmul_(a3, b3)


def cross(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a × b into ``out``, all [M, 3, B]."""
    (a1, a2, a3), (b1, b2, b3), (c1, c2, c3) = a.unbind(1), b.unbind(1), out.unbind(1)
    torch.mul(a2, b3, out=c1).addcmul_(a3, b2, value=-1)
    torch.mul(a3, b1, out=c2).addcmul_(a1, b3, value=-1)
    torch.mul(a1, b2, out=c3).addcmul_(a2, b1, value=-1)
