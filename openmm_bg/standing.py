"""What moves on a Context share: what they start from (`Standing`), what they report (`Report`), and their counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from openmm_bg.rules.metropolis import Info

if TYPE_CHECKING:
    pass


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
    """

    positions: Tensor
    y: Tensor
    s: Tensor
    log_w: float
    n_energies: int

    @property
    def inside(self) -> bool:
        """Whether q > 0; if not, no flow move can leave this state."""
        return self.log_w < float("inf")


def counts(info: Info | None) -> dict[str, int]:
    """The `statistics` of a move, from its joined reports."""
    return {
        "n_proposed": 0 if info is None else info.n_proposed,
        "n_accepted": 0 if info is None else info.n_accepted,
        "n_energies": 0 if info is None else info.n_energies,
        "longest_rejection_streak": 0 if info is None else info.longest_rejection_streak,
    }
