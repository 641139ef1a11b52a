"""What moves on a Context share: what they start from (`Standing`), what they report (`Report`), and their counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_bg.coordinates import CoordinateMap
from openmm_bg.rules.metropolis import Info


class Report(TypedDict):
    """What `step` of any move returns: counts of that call (`Info`), and what became of the Context.

    ``n_energies`` is the number of frames whose energy was computed, the current state's included; ``accepted`` says
    whether the Context has moved; ``inside`` is False where the current state has q = 0, so that the chain stays.
    """

    n_proposed: int
    n_accepted: int
    n_energies: int
    longest_rejection_streak: int
    acceptance_probability: float
    accepted: bool
    inside: bool


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a Context stands, in the coordinates of a flow: what a move on it starts from.

    Attributes
    ----------
    positions
        [N, 3] nm, float64.
    y, s
        [1, D] modelled and [1, S] kept coordinates.
    log_w
        log π - log q as `moves` has it: +inf where q = 0, -inf where only π = 0.
    n_energies
        Count of the pool's energies before the move.
    z
        [1, D] latent values of y; NaN outside the domain.
    frame
        [3, 3]: the directions of `seed_frame` as columns.
    """

    positions: Tensor
    y: Tensor
    s: Tensor
    log_w: float
    n_energies: int
    z: NDArray[np.float64]
    frame: Tensor

    @property
    def inside(self) -> bool:
        """Whether q > 0; if not, no flow move can leave this state."""
        return self.log_w < float("inf")


def seed_frame(x: Tensor, seed: tuple[int, int, int]) -> Tensor:
    """Rotation [3, 3] from the coordinates' canonical frame to where the seed atoms of x [N, 3] stand.

    There seed atom 1 lies on +x of atom 0 and atom 2 at y > 0: the columns are the direction 0→1, the half-plane's
    direction normal to it, and their cross product.
    """
    a, b, c = (x[atom].tolist() for atom in seed)
    length = math.dist(a, b)
    e = [(v - u) / length for u, v in zip(a, b, strict=True)]
    n = _cross(e, [v - u for u, v in zip(b, c, strict=True)])
    size = math.hypot(*n)
    n = [v / size for v in n]
    return x.new_tensor([e, _cross(n, e), n]).T


def _cross(a: list[float], b: list[float]) -> list[float]:
    """a × b; numpy takes ten times longer to look at its arguments."""
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def place(coordinates: CoordinateMap, standing: Standing, y: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, N, 3] of y [B, D] at the s and place of where a move began, and their log J + Φ [B].

    Kept are seed atom 0, the direction to seed atom 1 and the half-plane of seed atom 2 (formulas D to G). NaN and -inf
    outside the domain, which is decided before positions exist.
    """
    with torch.no_grad():
        made, log_volume = coordinates.positions_in_domain(y, standing.s)
        return made @ standing.frame.T + standing.positions[coordinates.zmatrix.seed[0]], log_volume


def counts(info: Info | None) -> dict[str, int]:
    """The `statistics` of a move, from its joined reports."""
    return {
        "n_proposed": 0 if info is None else info.n_proposed,
        "n_accepted": 0 if info is None else info.n_accepted,
        "n_energies": 0 if info is None else info.n_energies,
        "longest_rejection_streak": 0 if info is None else info.longest_rejection_streak,
    }
