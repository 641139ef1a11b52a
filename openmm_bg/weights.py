"""Importance weights: what they say about a set of samples, and how far they can be trusted.

Everything here works on log-weights in float64. A weight is never clipped or smoothed: a figure computed
from altered weights would have to say so in its name. ``-inf`` is a weight of zero and is legitimate (a
sample outside the coordinates' domain, or one whose energy is not finite); NaN and ``+inf`` are mistakes.

Formulas A, B and J and rule 8 of docs/theory.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError

__all__ = [
    "effective_sample_size",
    "expectation",
    "forward_ess",
    "khat_threshold",
    "log_mean_weight",
    "max_weight",
    "normalized_weights",
    "pareto_khat",
    "resample",
]

FloatArray = NDArray[np.float64]

# Log-weights in the tail that differ by less than this are equal for every purpose; fitting a distribution to
# their rounding errors would return noise.
_EQUAL = 1e-9
# Weights of one tail that differ by more underflow to equal zeros, which would look like a light tail.
_WIDEST = 700.0


def check_log_weights(log_w: ArrayLike) -> FloatArray:
    """One-dimensional float64 log-weights without NaN or +inf."""
    array = np.asarray(log_w, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"log_w must be a non-empty one-dimensional array, got shape {array.shape}.")
    bad = int(np.count_nonzero(np.isnan(array) | (array == np.inf)))
    if bad:
        raise InputError(
            f"log_w holds {bad} values that are NaN or +inf: give weights of zero as -inf, mend the others."
        )
    return array


def check_not_all_zero(log_w: ArrayLike) -> FloatArray:
    array = check_log_weights(log_w)
    if not np.any(array > -np.inf):
        raise InputError(
            f"All {array.size} weights are zero, so there is nothing to average: check that flow and System "
            "describe the same molecule."
        )
    return array


def normalized_weights(log_w: ArrayLike) -> FloatArray:
    """Weights that sum to one.

    Parameters
    ----------
    log_w : array_like, shape [n]
        Log-weights up to a common constant; -inf is a weight of zero.

    Returns
    -------
    ndarray, shape [n], float64

    Raises
    ------
    InputError
        If a log-weight is NaN or +inf, or if all weights are zero.
    """
    array = check_not_all_zero(log_w)
    weights = np.exp(array - array.max())
    return weights / weights.sum()


def effective_sample_size(log_w: ArrayLike) -> float:
    """Kish's effective sample size as a fraction of n: (Σw)² / (n Σw²), between 1/n and 1.

    Samples of weight zero count in n. All weights zero give 0.0. The figure within one basin is
    ``effective_sample_size(log_w[mask])``. It cannot see modes that no sample has reached.

    Parameters
    ----------
    log_w : array_like, shape [n]

    Raises
    ------
    InputError
        If a log-weight is NaN or +inf.

    References
    ----------
    Kish, Survey Sampling (1965); rule 8 of docs/theory.md.

    Examples
    --------
    >>> effective_sample_size([0.0, 0.0, float("-inf"), float("-inf")])
    0.5
    """
    array = check_log_weights(log_w)
    top = array.max()
    if top == -np.inf:
        return 0.0
    weights = np.exp(array - top)
    return float(weights.sum() ** 2 / (array.size * np.square(weights).sum()))


def max_weight(log_w: ArrayLike) -> float:
    """The largest share of the total that one sample carries; 1.0 means that one sample decides everything.

    All weights zero give 0.0.

    Raises
    ------
    InputError
        If a log-weight is NaN or +inf.
    """
    array = check_log_weights(log_w)
    top = array.max()
    if top == -np.inf:
        return 0.0
    return float(1.0 / np.exp(array - top).sum())


def khat_threshold(n: int) -> float:
    """Largest Pareto k̂ at which an interval from n samples may be trusted: min(1 - 1/log10 n, 0.7).

    Negative for n < 10: so few samples cannot support an interval.

    References
    ----------
    Vehtari et al., Pareto smoothed importance sampling, JMLR 25 (2024).
    """
    if n < 2:
        return -np.inf
    return float(min(1.0 - 1.0 / np.log10(n), 0.7))


def pareto_khat(log_w: ArrayLike) -> float:
    """Shape k̂ of the generalized Pareto distribution that fits the upper tail of the weights.

    Weights have a finite variance for k < 1/2 and a finite mean for k < 1. Compare with `khat_threshold`.

    Parameters
    ----------
    log_w : array_like, shape [n]
        Log-weights of independent samples.

    Returns
    -------
    float
        ``+inf`` where no tail can be fitted (fewer than 25 samples, fewer non-zero weights than the tail has
        members, a tail wider than double precision, or so many ties that the fit fails): nothing may be trusted
        then. ``-inf`` where the whole tail has one value: such weights are bounded by what has been seen.

    Raises
    ------
    InputError
        If a log-weight is NaN or +inf.

    References
    ----------
    Vehtari et al., Pareto smoothed importance sampling, JMLR 25 (2024), as implemented in arviz-stats.
    """
    from arviz_stats.base import array_stats

    array = check_log_weights(log_w)
    n = array.size
    n_tail = int(3.0 * np.sqrt(n)) if n > 225 else n // 5
    if n_tail < 5 or np.count_nonzero(array > -np.inf) <= n_tail:
        return np.inf
    tail = np.partition(array, n - n_tail)[n - n_tail :]
    if tail.max() - tail.min() < _EQUAL:
        return -np.inf
    if tail.max() - tail.min() > _WIDEST:
        return np.inf
    # r_eff = 1: the samples of a flow are independent. The weights themselves are handed over, for the function's
    # own log_weights=True fits the tail of the logarithms (arviz-stats 0.8), which hides every heavy tail.
    with np.errstate(all="ignore"):  # ties make the fit divide by zero; its NaN is dealt with below
        scaled = np.exp(array - array.max())
        khat = float(array_stats.pareto_khat(scaled, chain_axis=None, r_eff=1.0, tail="right"))
    return khat if np.isfinite(khat) else np.inf


def expectation(values: ArrayLike, log_w: ArrayLike) -> tuple[Any, Any]:
    """Self-normalised importance sampling estimate of a mean, with its standard error.

    μ = Σ wᵢ fᵢ / Σ wᵢ, error² = n/(n-1) Σ ŵᵢ² (fᵢ - μ)² with ŵ normalised to one (delta method). The estimate
    has a bias of order 1/ESS.

    Parameters
    ----------
    values : array_like, shape [n, ...]
        The observable at each sample. Values at samples of weight zero are never looked at.
    log_w : array_like, shape [n]
        Log-weights of independent samples, up to a common constant.

    Returns
    -------
    value, error : ndarray of shape [...], or floats for values of shape [n]

    Raises
    ------
    InputError
        If lengths differ, all weights are zero, a log-weight is NaN or +inf, or a value with a non-zero
        weight is not finite.

    References
    ----------
    Owen, Monte Carlo theory, methods and examples (2013), section 9.2.
    """
    array = check_not_all_zero(log_w)
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim == 0 or samples.shape[0] != array.size:
        raise InputError(
            f"values must have one entry per log-weight ({array.size}) along the first axis, got shape {samples.shape}."
        )
    kept = array > -np.inf
    samples = samples[kept]
    if not np.all(np.isfinite(samples)):
        raise InputError("values must be finite wherever the weight is not zero: mend the observable.")
    weights = normalized_weights(array[kept])
    mean = np.tensordot(weights, samples, axes=1)
    variance = np.tensordot(np.square(weights), np.square(samples - mean), axes=1)
    n = array.size
    # One sample says nothing about its own spread.
    error = np.sqrt(variance * n / (n - 1)) if n > 1 else np.full_like(mean, np.inf)
    if samples.ndim == 1:
        return float(mean), float(error)
    return mean, error


def log_mean_weight(log_w: ArrayLike) -> tuple[float, float]:
    """log Z = log (Σw / n) and its standard error (delta method), formula J of docs/theory.md.

    Parameters
    ----------
    log_w : array_like, shape [n]
        Log-weights *with* their constant: -u + log J + Φ - log q, and zero weights (-inf) included.

    Returns
    -------
    log_z, error : float
        The error is inf for a single sample.

    Raises
    ------
    InputError
        If all weights are zero, or one is NaN or +inf.
    """
    array = check_not_all_zero(log_w)
    n = array.size
    top = array.max()
    weights = np.exp(array - top)
    log_z = float(top + np.log(weights.mean()))
    if n == 1:
        return log_z, np.inf
    return log_z, float(weights.std(ddof=1) / weights.mean() / np.sqrt(n))


def forward_ess(log_w_on_md_frames: ArrayLike) -> float:
    """Effective sample size seen from the target: 1 / (mean_p[w] · mean_p[1/w]) over decorrelated MD frames.

    Under infinite sampling it equals `effective_sample_size` of the flow's samples, but it is measured where
    the target has its mass: a mode that the flow has lost lowers this figure and not the other one.

    Parameters
    ----------
    log_w_on_md_frames : array_like, shape [n]
        Log-weights of MD frames, up to a common constant. ``+inf`` is a frame that the flow cannot produce at
        all (q = 0: another chirality, another amide isomer, outside the domain).

    Returns
    -------
    float
        Between 0 and 1. A single frame with q = 0 makes it 0: such a flow never covers p. Where the target is
        meant to be the flow's own sector (rule 6), leave out the frames of other sectors and report how many.

    Raises
    ------
    InputError
        If a value is NaN, or -inf (an MD frame whose Boltzmann weight is zero cannot be one of this System).
    """
    array = np.asarray(log_w_on_md_frames, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"log_w_on_md_frames must be a non-empty one-dimensional array, got shape {array.shape}.")
    bad = int(np.count_nonzero(np.isnan(array) | (array == -np.inf)))
    if bad:
        raise InputError(
            f"{bad} MD frames have a log-weight of NaN or -inf: leave out frames whose energy is not finite."
        )
    if np.any(array == np.inf):
        return 0.0
    log_mean = array.max() + np.log(np.exp(array - array.max()).mean())
    log_mean_inverse = -array.min() + np.log(np.exp(array.min() - array).mean())
    return float(np.exp(-(log_mean + log_mean_inverse)))


def resample(log_w: ArrayLike, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of n samples of equal weight, drawn by systematic resampling.

    Systematic, because it is unbiased and every sample appears n·ŵ times rounded up or down, which adds less
    noise than independent (multinomial) draws. The samples are shuffled before and after, so that neither
    the order of the input nor that of the output carries meaning. Heavy samples appear more than once:
    resampled frames are not independent, and errors belong to the weighted estimates.

    Parameters
    ----------
    log_w : array_like, shape [n_samples]
    n : int
        How many indices, at least 1; may exceed the number of samples.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of int, shape [n]

    Raises
    ------
    InputError
        If n < 1, all weights are zero, or one is NaN or +inf.

    References
    ----------
    Carpenter, Clifford and Fearnhead, IEE Proc. Radar Sonar Navig. 146, 2 (1999).
    """
    if n < 1:
        raise InputError(f"n must be at least 1 to resample, got {n}.")
    weights = normalized_weights(log_w)
    shuffled = rng.permutation(np.flatnonzero(weights))
    edges = np.cumsum(weights[shuffled])
    points = (np.arange(n) + rng.random()) * (edges[-1] / n)
    chosen = np.searchsorted(edges, points, side="right")
    # A point may round up to the last edge.
    return rng.permutation(shuffled[np.minimum(chosen, shuffled.size - 1)])
