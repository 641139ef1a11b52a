"""Free energies between conformational states of one ensemble, from weights and from chains (formula J).

Errors of correlated data come from the statistical inefficiency (rule 9 of docs/theory.md).
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError
from openmm_bg.free_energy.estimates import MIN_EFFECTIVE, import_pymbar, log_ratio, numbers, quiet
from openmm_bg.weights import effective_sample_size

__all__ = ["chain_state_difference", "decorrelated", "state_difference", "statistical_inefficiency"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Fewer passages between two states than this, and an autocorrelation time cannot be estimated.
MIN_PASSAGES = 10


def _influence(log_w: FloatArray, in_a: BoolArray, in_b: BoolArray) -> tuple[float, FloatArray]:
    """ΔF = -log(Σ_b w / Σ_a w), and the share of each sample in it (`log_ratio`)."""
    if np.any(np.isnan(log_w) | (log_w == np.inf)):
        raise InputError("log_w holds NaN or +inf: give weights of zero as -inf and mend the others.")
    for name, mask in (("in_a", in_a), ("in_b", in_b)):
        if mask.shape != log_w.shape:
            raise InputError(f"{name} must have one entry per sample {log_w.shape}, got shape {mask.shape}.")
        if not np.any(log_w[mask] > -np.inf):
            raise InputError(f"No sample of non-zero weight has {name} set: draw more samples or widen the state.")
    if np.array_equal(in_a, in_b):
        raise InputError("in_a and in_b are the same state: pass two states, as in_a and ~in_a.")
    if np.any(in_a & in_b) and np.any(in_a & ~in_b) and np.any(in_b & ~in_a):
        raise InputError(
            f"in_a and in_b share {np.count_nonzero(in_a & in_b)} samples: states must be apart, or one lie within the "
            "other."
        )
    return log_ratio(np.where(in_a, log_w, -np.inf), np.where(in_b, log_w, -np.inf))


def state_difference(log_w: ArrayLike, in_a: ArrayLike, in_b: ArrayLike) -> tuple[float, float]:
    """Conformational free energy F_b - F_a from independent weighted samples.

    Parameters
    ----------
    log_w : array_like, shape [n]
        Log-weights up to a common constant.
    in_a, in_b : array_like of bool, shape [n]
        Which samples lie in each state. The states are apart, or one lies within the other: all samples as in_a give
        minus the logarithm of the share of in_b.

    Returns
    -------
    delta_f, error : float
        kT; the error by the delta method, with the covariance of numerator and denominator. A warning is logged if
        fewer than `MIN_EFFECTIVE` samples in effect stand for a state.

    Raises
    ------
    InputError
        If shapes disagree, a log-weight is NaN or +inf, a state holds no sample of non-zero weight, or the states are
        identical or overlap in part.
    """
    array = numbers("log_w", log_w)
    if array.ndim != 1:
        raise InputError(f"log_w must be one-dimensional, got shape {array.shape}.")
    masks = np.asarray(in_a, dtype=np.bool_), np.asarray(in_b, dtype=np.bool_)
    delta_f, d = _influence(array, *masks)
    fewest = min(effective_sample_size(array[mask]) * np.count_nonzero(mask) for mask in masks)
    if fewest < MIN_EFFECTIVE:
        logger.warning(
            "One of the two states is worth %.1f samples, fewer than %d: the error of this difference cannot be "
            "trusted; draw more samples.",
            fewest,
            MIN_EFFECTIVE,
        )
    if d.size < 2:
        return delta_f, np.inf
    return delta_f, float(d.std(ddof=1) / np.sqrt(d.size))


def statistical_inefficiency(series: ArrayLike) -> float:
    """g = 1 + 2τ of a time series, so that n frames are worth n/g independent ones; 1 for a constant series.

    Parameters
    ----------
    series : array_like, shape [t]

    Raises
    ------
    InputError
        If the series has fewer than two entries or one is not finite.

    References
    ----------
    Chodera et al., J. Chem. Theory Comput. 3, 26 (2007), in pymbar.timeseries.
    """
    array = np.asarray(series, dtype=np.float64)
    if array.ndim != 1 or array.size < 2 or not np.all(np.isfinite(array)):
        raise InputError("A time series must be one-dimensional, finite and have at least two entries.")
    if np.ptp(array) == 0:
        return 1.0
    with quiet("pymbar"):
        return float(import_pymbar().timeseries.statistical_inefficiency(array))


def decorrelated(*series: ArrayLike) -> NDArray[np.intp]:
    """Indices of frames far enough apart to count as independent, for `bar` and `mbar`.

    Parameters
    ----------
    *series : array_like, shape [t]
        Observables of one trajectory in the order of time; the slowest of them decides. Give those that the free
        energy depends on: log w or u, and the indicator of a state behind a slow barrier.

    Returns
    -------
    ndarray of int, shape [about t/g]

    Raises
    ------
    InputError
        No series, series of different lengths, or one that `statistical_inefficiency` refuses.
    """
    lengths = {np.size(one) for one in series}
    if len(lengths) != 1:
        raise InputError(f"decorrelated() needs one or more series of one length, got lengths {sorted(lengths)}.")
    g = max(statistical_inefficiency(one) for one in series)
    n = lengths.pop()
    return np.unique(np.floor(np.arange(0.0, n, g)).astype(np.intp))


def chain_state_difference(
    in_a: ArrayLike, in_b: ArrayLike, log_w: ArrayLike | None = None, chains: ArrayLike | None = None
) -> tuple[float, float]:
    """Conformational free energy F_b - F_a from correlated chains, biased or not.

    Parameters
    ----------
    in_a, in_b : array_like of bool, shape [t]
        Whether each frame of the chain, in the order of time, lies in the state.
    log_w : array_like, shape [t], optional
        Log-weights that undo the bias of a chain run under a biased potential: (U_biased - U)/kT.
    chains : array_like, shape [t], optional
        Which of several independent chains each frame belongs to; one chain if left out. The estimate pools all
        frames, the error sums the chains' own.

    Returns
    -------
    delta_f, error : float
        kT; delta method with the statistical inefficiency of each frame's share in ΔF. A warning is logged if
        the chain has passed between the states so seldom that neither can be trusted.

    Raises
    ------
    InputError
        As `state_difference`.
    """
    a = np.asarray(in_a, dtype=np.bool_)
    b = np.asarray(in_b, dtype=np.bool_)
    if a.ndim != 1:
        raise InputError(f"in_a must be one-dimensional, got shape {a.shape}.")
    array = np.zeros(a.size) if log_w is None else numbers("log_w", log_w)
    label = np.zeros(a.size) if chains is None else np.asarray(chains)
    for name, given in (("in_b", b), ("log_w", array), ("chains", label)):
        if given.shape != a.shape:
            raise InputError(
                f"{name} must have one entry for each of the {a.size} frames of in_a, got shape {given.shape}: pass "
                "the whole chain, in order, for all of them."
            )
    delta_f, d = _influence(array, a, b)
    parts = [label == name for name in np.unique(label)]
    passages = 0
    for part in parts:
        visits = b[part & (a ^ b)]  # the sequence of states, with frames in neither or both left out
        passages += int(np.count_nonzero(visits[1:] != visits[:-1]))
    if passages < MIN_PASSAGES:
        logger.warning(
            "The chain passed between the two states %d times, fewer than %d: this free energy and its error "
            "cannot be trusted; run a longer chain.",
            passages,
            MIN_PASSAGES,
        )
    if d.size < 2:
        return delta_f, np.inf
    variance = sum(statistical_inefficiency(d[part]) * d[part].var(ddof=1) * part.sum() for part in parts)
    return delta_f, float(np.sqrt(variance) / d.size)
