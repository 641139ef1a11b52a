"""What a chain carries from step to step (`State`), and what it reports of its steps (`Info`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def largest(values: FloatArray) -> float:
    """Largest entry; NaN if there is one. Numpy's reductions look for long at the one number of a Context's chain."""
    return float(values.item() if values.size == 1 else values.max(initial=-np.inf))


@dataclass(frozen=True, eq=False)
class State:
    """What a chain carries from one step to the next.

    Parameters
    ----------
    value : ndarray, shape [..., D]
        Whatever moves: y, or the latent z of formula F.
    log_w : ndarray, shape [...]
        log π - log q there, with the constant common to all states left free.
    """

    value: FloatArray
    log_w: FloatArray

    def __post_init__(self) -> None:
        log_w = np.asarray(self.log_w, dtype=np.float64)
        value = np.asarray(self.value)
        if value.shape[: log_w.ndim] != log_w.shape:
            raise InputError(f"value must begin with the axes of log_w {log_w.shape}, got shape {value.shape}.")
        if math.isnan(largest(log_w)):
            raise InputError("log_w holds NaN: give a state that must never be visited as -inf.")
        object.__setattr__(self, "log_w", log_w)
        object.__setattr__(self, "value", value)


@dataclass(frozen=True, eq=False)
class Info:
    """What a chain reports about the steps it has made; ``info_1 + info_2`` joins consecutive pieces.

    Attributes
    ----------
    n_proposed : int
        Steps, over all chains.
    n_accepted : int
        Steps that left the state they started from.
    n_energies : int
        Proposals that were weighed: n_proposed for formulas D and F, K times as many for E.
    acceptance_probability : float
        Mean over steps of the probability to move, less noisy than n_accepted / n_proposed; NaN if no step.
    longest_rejection_streak : int
        Longest run of steps without a move in any chain.
    leading_rejections, trailing_rejections : ndarray of int, shape [chains]
        Steps before the first move and after the last one, so that a streak is followed across pieces.
    """

    n_proposed: int
    n_accepted: int
    n_energies: int
    acceptance_probability: float
    longest_rejection_streak: int
    leading_rejections: IntArray
    trailing_rejections: IntArray

    @property
    def acceptance_rate(self) -> float:
        """n_accepted / n_proposed; NaN if no step was made."""
        return self.n_accepted / self.n_proposed if self.n_proposed else float("nan")

    def __add__(self, later: Info) -> Info:
        if not isinstance(later, Info):
            return NotImplemented
        if self.leading_rejections.shape != later.leading_rejections.shape:
            raise InputError("Only reports on the same chains can be added.")
        if self.n_proposed == 0:
            return later
        if later.n_proposed == 0:
            return self
        total = self.n_proposed + later.n_proposed
        chains = self.leading_rejections.size
        joined = self.trailing_rejections + later.leading_rejections
        never_before = self.leading_rejections == self.n_proposed // chains
        never_after = later.leading_rejections == later.n_proposed // chains
        return Info(
            n_proposed=total,
            n_accepted=self.n_accepted + later.n_accepted,
            n_energies=self.n_energies + later.n_energies,
            acceptance_probability=(
                self.acceptance_probability * self.n_proposed + later.acceptance_probability * later.n_proposed
            )
            / total,
            longest_rejection_streak=int(
                max(self.longest_rejection_streak, later.longest_rejection_streak, joined.max(initial=0))
            ),
            leading_rejections=np.where(never_before, joined, self.leading_rejections),
            trailing_rejections=np.where(never_after, joined, later.trailing_rejections),
        )
