"""Many states at once: pymbar's MBAR over MD frames, with flows among the states (formula J).

A flow is a state like any other, with u = -log q - log g and Z = 1. Beside it, MD frames on one side are enough: the
flow's samples stand for the other state, frames tell where the two disagree.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError
from openmm_bg.free_energy.estimates import (
    IMPOSSIBLE,
    MAX_CONTRADICTION,
    MIN_EFFECTIVE,
    MIN_OVERLAP,
    FreeEnergy,
    bar_root,
    contradiction,
    describe_khat,
    import_pymbar,
    numbers,
    quiet,
    warn_contradiction,
    warn_outside,
)
from openmm_bg.weights import khat_threshold, pareto_khat

__all__ = ["Multistate", "mbar", "mbar_with_flow"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Multistate:
    """Free energies between K states.

    Attributes
    ----------
    delta_f, error : ndarray, shape [K, K]
        f_j - f_i and its standard error, kT.
    overlap_matrix : ndarray, shape [K, K]
        pymbar's: entry i, j is the probability with which a sample of state i could have come from state j. Columns of
        states without samples are zero.
    effective : ndarray, shape [K]
        Effective number of samples (Kish) behind each state's averages.
    khat : ndarray, shape [K]
        Pareto k̂ of each state's weights over all samples.
    n_samples : ndarray of int, shape [K]
    group : ndarray of int, shape [K]
        States with samples that are linked by overlaps of at least `MIN_OVERLAP` (both off-diagonal entries together:
        one alone says more about numbers of samples), directly or through others, share a number. A state without
        samples has 0 if they all do, else -1.
    sound : ndarray of bool, shape [K]
        Whether at least `MIN_EFFECTIVE` samples in effect stand behind a state and, where it drew none itself, k̂ lies
        below `khat_threshold`; of `mbar_with_flow` also, that the state's frames do not contradict the flow's samples.
    n_outside : int
        MD frames left out because q = 0 there.
    """

    delta_f: FloatArray
    error: FloatArray
    overlap_matrix: FloatArray
    effective: FloatArray
    khat: FloatArray
    n_samples: NDArray[np.int64]
    group: NDArray[np.int64]
    sound: NDArray[np.bool_]
    n_outside: int = 0

    @property
    def trustworthy(self) -> bool:
        """Whether every state is sound and linked to every other."""
        return bool(np.all(self.group == 0) and np.all(self.sound))

    def between(self, a: int, b: int) -> FreeEnergy:
        """F_b - F_a with the part of the overlap matrix that concerns the two.

        `overlap` is the sum of its two off-diagonal entries. A small one is no harm where other states lie between:
        look at `trustworthy`.

        Raises
        ------
        InputError
            There is no such state.
        """
        k = len(self.n_samples)
        for state in (a, b):
            if not 0 <= state < k:
                raise InputError(f"There is no state {state}: number the states from 0 to {k - 1}.")
        both = bool(self.n_samples[a] and self.n_samples[b])
        return FreeEnergy(
            float(self.delta_f[a, b]),
            float(self.error[a, b]),
            "MBAR",
            overlap=float(self.overlap_matrix[a, b] + self.overlap_matrix[b, a]) if both else None,
            overlap_matrix=self.overlap_matrix[np.ix_([a, b], [a, b])] if both else None,
            khat=float(max(self.khat[a], self.khat[b])),
            effective=float(min(self.effective[a], self.effective[b])),
            n_outside=self.n_outside,
            trustworthy=bool(self.group[a] == self.group[b] >= 0 and self.sound[a] and self.sound[b]),
        )


def mbar(reduced_potentials: ArrayLike, n_samples: ArrayLike) -> Multistate:
    """Free energies between K states from decorrelated samples of some or all of them.

    Parameters
    ----------
    reduced_potentials : array_like, shape [K, n]
        u of every sample in every state, samples in the order of the states that drew them. Of one sample only
        differences between states matter, so that u may be counted from that of a flow (`mbar_with_flow`). +inf where
        a state has no density.
    n_samples : array_like of int, shape [K]
        How many samples each state has drawn; 0 for states that are asked for only.

    Returns
    -------
    Multistate
        A warning is logged if states are not linked by overlap, or a state without samples is worth too little.

    Raises
    ------
    InputError
        If shapes disagree, a potential is NaN or -inf, or a sample has +inf in the state that drew it.

    References
    ----------
    Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), in pymbar.
    """
    u = np.array(reduced_potentials, dtype=np.float64)
    counts = np.asarray(n_samples)
    if u.ndim != 2 or counts.shape != (len(u),) or not np.issubdtype(counts.dtype, np.integer) or np.any(counts < 0):
        raise InputError(
            f"mbar() needs reduced potentials [K, n] and K whole numbers of samples, got shapes {u.shape} and "
            f"{counts.shape}."
        )
    if counts.sum() != u.shape[1] or u.shape[1] == 0:
        raise InputError(f"The states have {counts.sum()} samples in all, the potentials are of {u.shape[1]}.")
    if np.any(np.isnan(u) | (u == -np.inf)):
        raise InputError("The reduced potentials hold NaN or -inf: leave out samples whose energy is not finite.")
    source = np.repeat(np.arange(len(u)), counts)
    if not np.all(np.isfinite(u[source, np.arange(u.shape[1])])):
        raise InputError("A sample has no density in the state that drew it: leave such frames out.")
    if not np.all(np.isfinite(u).any(axis=1)):
        raise InputError("A state has no density at any sample: check that all states are of one molecule.")
    # Offsets of rows (they are parts of the free energies) and of columns (they are nobody's) keep every finite
    # number small beside IMPOSSIBLE.
    offsets = np.array([np.median(row[source == k] if counts[k] else row[np.isfinite(row)]) for k, row in enumerate(u)])
    shifted = u - offsets[:, None]
    shifted = np.minimum(shifted - shifted.min(axis=0), IMPOSSIBLE)
    pymbar = import_pymbar()
    with quiet("pymbar"), np.errstate(all="ignore"):
        solver = pymbar.MBAR(shifted, counts)
        found = solver.compute_free_energy_differences()
        matrix = np.real(np.asarray(solver.compute_overlap()["matrix"], dtype=np.float64))
        log_w = np.asarray(solver.Log_W_nk, dtype=np.float64).T
    if not np.all(np.isfinite(found["Delta_f"])):
        raise InputError("MBAR finds no free energies because the states do not overlap: put states between them.")
    delta_f = np.asarray(found["Delta_f"]) + offsets[None, :] - offsets[:, None]
    # exp(-IMPOSSIBLE) is zero, and so are the weights of samples where a state has no density.
    log_w = np.where(log_w > -0.5 * IMPOSSIBLE, log_w, -np.inf)
    khat = np.array([pareto_khat(row) for row in log_w])
    effective = np.array([np.exp(-np.logaddexp.reduce(2 * (row - np.logaddexp.reduce(row)))) for row in log_w])
    sound = (effective >= MIN_EFFECTIVE) & ((counts > 0) | (khat < khat_threshold(u.shape[1])))
    result = Multistate(
        delta_f, np.asarray(found["dDelta_f"]), matrix, effective, khat, counts, _groups(matrix, counts), sound
    )
    _warn(result)
    return result


def _groups(matrix: FloatArray, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """See `Multistate.group`."""
    group = np.full(len(counts), -1, dtype=np.int64)
    number = 0
    for first in np.flatnonzero(counts):
        if group[first] >= 0:
            continue
        todo = [first]
        while todo:
            state = todo.pop()
            group[state] = number
            linked = (matrix[state] + matrix[:, state] >= MIN_OVERLAP) & (group < 0) & (counts > 0)
            todo.extend(np.flatnonzero(linked))
        number += 1
    if number == 1:
        group[:] = 0
    return group


def _warn(found: Multistate) -> None:
    parts = [np.flatnonzero(found.group == number).tolist() for number in range(int(found.group.max()) + 1)]
    if len(parts) > 1:
        logger.warning(
            "The states %s are not linked by overlaps of at least %.2f: free energies between these groups and their "
            "errors cannot be trusted; put states between them.",
            " and ".join(str(part) for part in parts),
            MIN_OVERLAP,
        )
    weak = np.flatnonzero(~found.sound)
    if weak.size:
        logger.warning(
            "Free energies and errors of these states cannot be trusted, give them more samples: %s (at least %d in "
            "effect are asked for, and where a state drew none itself a Pareto k-hat below its threshold).",
            ", ".join(f"{k} ({_weakness(found, int(k))})" for k in weak),
            MIN_EFFECTIVE,
        )


def _weakness(found: Multistate, k: int) -> str:
    n, worth = int(found.n_samples.sum()), f"worth {found.effective[k]:.1f}"
    judged = found.n_samples[k] == 0 and not found.khat[k] < khat_threshold(n)
    return f"{worth}, {describe_khat(float(found.khat[k]), n)}" if judged else worth


def mbar_with_flow(log_w_flow: ArrayLike, log_w_md: Sequence[ArrayLike | None]) -> Multistate:
    """MBAR between a flow and K states of its molecule, with MD frames of some of them.

    Parameters
    ----------
    log_w_flow : array_like, shape [K, n]
        log w of the same independent flow samples in each of the K states; -inf where one has no density.
    log_w_md : sequence of K array_like [K, m_k] or None
        log w, in each of the K states, of decorrelated MD frames that the k-th state drew; None for a state without
        frames. +inf marks a frame with q = 0; it is left out and counted (rule 6 of docs/theory.md).

    Returns
    -------
    Multistate
        Of K + 1 states: 0 is the flow, with Z = 1, so that ``between(0, k)`` is -log Z of the k-th state (counted from
        1), as `bar` has it, and ``between(j, k)`` the difference of two. A warning is logged for a state whose frames
        and flow samples contradict each other, as `bar` does; it is then not `sound`.

    Raises
    ------
    InputError
        As `mbar`; a wrong number of rows; no MD frame left of a state.
    """
    flow = numbers("log_w_flow", log_w_flow)
    if flow.ndim != 2 or len(log_w_md) != len(flow):
        raise InputError(
            f"mbar_with_flow() needs log-weights [K, n] and MD frames (or None) for each of the K states, got shape "
            f"{flow.shape} and {len(log_w_md)} sets of frames."
        )
    if np.any(np.isnan(flow) | (flow == np.inf)):
        raise InputError("log_w_flow must be free of NaN and +inf: give weights of zero as -inf.")
    blocks, counts, outside, total = [flow], [flow.shape[1]], 0, 0
    for k, given in enumerate(log_w_md, start=1):
        if given is None:
            counts.append(0)
            continue
        frames = numbers(f"log_w_md of state {k}", given)
        if frames.ndim != 2 or len(frames) != len(flow):
            raise InputError(f"Frames of state {k} need log-weights [{len(flow)}, m], got shape {frames.shape}.")
        inside = ~np.any(frames == np.inf, axis=0)
        if not inside.any():
            raise InputError(f"No MD frame of state {k} lies where the flow has density: are they of one molecule?")
        outside, total = outside + int(np.count_nonzero(~inside)), total + inside.size
        blocks.append(frames[:, inside])
        counts.append(int(np.count_nonzero(inside)))
    if outside:
        warn_outside(outside, total)
    log_w = np.concatenate(blocks, axis=1)
    result = mbar(np.concatenate([np.zeros((1, log_w.shape[1])), -log_w]), counts)
    result = replace(result, n_outside=outside)
    first = flow.shape[1]
    for k, m in enumerate(counts[1:], start=1):
        if m < MIN_EFFECTIVE or result.overlap_matrix[0, k] + result.overlap_matrix[k, 0] < MIN_OVERLAP:
            first += m
            continue
        z = contradiction(*bar_root(flow[k - 1], log_w[k - 1, first : first + m])[1:])
        if abs(z) > MAX_CONTRADICTION:
            warn_contradiction(z, f" of state {k}")
            result.sound[k] = False
        first += m
    return result
