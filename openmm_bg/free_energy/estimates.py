"""-log Z of one state: from flow samples alone, or from flow samples beside MD frames (formula J of docs/theory.md)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.weights import effective_sample_size, khat_threshold, log_mean_weight, pareto_khat

__all__ = ["MAX_CONTRADICTION", "MIN_EFFECTIVE", "MIN_LINK", "MIN_OVERLAP", "FreeEnergy", "bar", "one_sided"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

#: Smallest entry of the overlap matrix between two states with samples that counts as a link between them:
#: Klimovich, Shirts and Mobley, J. Comput. Aided Mol. Des. 29, 397 (2015).
MIN_LINK = 0.03
#: The same of the scalar overlap of two states, which is the sum of the two off-diagonal entries.
MIN_OVERLAP = 2 * MIN_LINK
#: Fewest samples, in effect, that support an error bar: the number of uncorrelated samples below which, by default,
#: alchemical-analysis (the code of the paper above) holds that decorrelating leaves too little to go by.
MIN_EFFECTIVE = 50
#: Flow samples and MD frames that differ from what their weights promise by more standard errors contradict each
#: other. Right input gets there in less than one case of a million; a trajectory thinned too little comes near sooner.
MAX_CONTRADICTION = 5.0
# Log-weights that spread by less (kT) are equal: what is left is rounding, and of no matter for a free energy.
_EQUAL = 1e-3
# With fewer, `pareto_khat` fits no tail.
_FEWEST_FOR_KHAT = 25
# Stands for an infinite work value, where pymbar would form inf - inf: exp(-IMPOSSIBLE) is zero.
IMPOSSIBLE = 1.0e5


@dataclass(frozen=True)
class FreeEnergy:
    """A free energy with what one needs to judge it.

    Attributes
    ----------
    delta_f : float
        kT.
    error : float
        Standard error, kT.
    method : str
        "one-sided", "BAR", "MBAR", "common samples" or "difference" (of two independent estimates).
    bias : float or None
        Estimated systematic error of an estimate from weights alone, kT (positive: the estimate is too high). It is
        not subtracted.
    overlap : float or None
        0 for none, 1 for two identical distributions (pymbar's scalar overlap: 1 minus the second eigenvalue of the
        overlap matrix).
    overlap_matrix : ndarray, shape [2, 2], or None
        Of the two states of the estimate, as pymbar's `compute_overlap` has it: entry i, j is the probability with
        which a sample of state i could have come from state j. For "common samples", which none of the two states
        drew, that of equally many samples of both.
    khat : float or None
        Largest Pareto k̂ of the weights behind an estimate from weights alone.
    effective : float or None
        Smallest effective number of samples (Kish) behind it.
    n_outside : int
        For BAR and MBAR: MD frames left out because q = 0 there.
    trustworthy : bool
        False where a warning has been logged: overlap below `MIN_OVERLAP`, fewer than `MIN_EFFECTIVE` samples in
        effect, k̂ not below `khat_threshold`, or flow samples and MD frames that contradict each other.
    """

    delta_f: float
    error: float
    method: str
    bias: float | None = None
    overlap: float | None = None
    overlap_matrix: FloatArray | None = field(default=None, compare=False)
    khat: float | None = None
    effective: float | None = None
    n_outside: int = 0
    trustworthy: bool = True


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silence a library's notices (pymbar announces at import that JAX is missing); errors still pass."""
    library = logging.getLogger(name)
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)


def import_pymbar() -> Any:
    """pymbar, loaded at first use and without its notices."""
    with quiet("pymbar"):
        import pymbar
        from pymbar import timeseries  # noqa: F401  (makes pymbar.timeseries an attribute)
    return pymbar


def numbers(name: str, values: Any) -> FloatArray:
    """Log-weights as float64 of any shape, or one sentence that says what was given instead."""
    if isinstance(values, Ensemble):
        raise InputError(f"{name} must be log-weights, not an Ensemble: pass ensemble.log_weights.")
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as failure:
        raise InputError(f"{name} must be an array of log-weights, not {type(values).__name__}.") from failure


def describe_khat(khat: float, n: int) -> str:
    """Say in what way k̂ of n weights is not below its threshold."""
    if n < _FEWEST_FOR_KHAT:
        return f"{n} weights are too few samples for k-hat"
    if np.isinf(khat):
        return f"no Pareto tail fits the {n} weights"
    threshold = khat_threshold(n)
    digits = next((d for d in range(2, 16) if f"{khat:.{d}f}" != f"{threshold:.{d}f}"), 2)
    return f"Pareto k-hat {khat:.{digits}f} of {n} weights is not below {threshold:.{digits}f}"


def judge_weights(what: str, remedy: str, *log_weights: FloatArray) -> tuple[float, float, bool]:
    """Worst k̂ and effective number of samples of sets of weights, and whether both suffice; warns if not."""
    khat = max(pareto_khat(log_w) for log_w in log_weights)
    n = min(log_w.size for log_w in log_weights)
    effective = min(effective_sample_size(log_w) * log_w.size for log_w in log_weights)
    reasons = []
    if not khat < khat_threshold(n):
        reasons.append(describe_khat(khat, n))
    if effective < MIN_EFFECTIVE:
        reasons.append(f"{n} weights are worth {effective:.1f} samples, fewer than {MIN_EFFECTIVE}")
    if reasons:
        logger.warning("%s: the error of this %s cannot be trusted; %s.", " and ".join(reasons), what, remedy)
    return khat, effective, not reasons


def one_sided(log_weights: ArrayLike) -> FreeEnergy:
    """-log Z from flow samples alone: -log mean w (formula J).

    Parameters
    ----------
    log_weights : array_like, shape [n]
        -u + log J + Φ - log q - log g of independent flow samples, zero weights (-inf) included.

    Returns
    -------
    FreeEnergy
        Its `bias` is Var(w) / (2 n w̄²), the leading term by which the estimate lies too high.

    Raises
    ------
    InputError
        If all weights are zero, one is NaN or +inf, or an `Ensemble` is given in place of its ``log_weights``.

    References
    ----------
    Zwanzig, J. Chem. Phys. 22, 1420 (1954); bias: Zuckerman and Woolf, Phys. Rev. Lett. 89, 180602 (2002).
    """
    array = numbers("log_weights", log_weights)
    log_z, error = log_mean_weight(array)
    khat, effective, sound = judge_weights("free energy", "draw more samples, or use bar() with MD frames", array)
    return FreeEnergy(
        -log_z, error, "one-sided", bias=0.5 * error**2, khat=khat, effective=effective, trustworthy=sound
    )


def bar(log_w_flow: ArrayLike, log_w_md: ArrayLike) -> FreeEnergy:
    """-log Z by the Bennett acceptance ratio between flow samples and MD frames (formula J).

    State 0 is the flow, u_0 = -log q - log g with Z_0 = 1; state 1 the molecule, u_1 = u - log J - Φ, so that
    on both sides u_1 - u_0 = -log w.

    Parameters
    ----------
    log_w_flow : array_like, shape [n]
        log w of independent flow samples; -inf where the target has no density.
    log_w_md : array_like, shape [m]
        log w of *decorrelated* MD frames (see `decorrelated`), in the same measure: a density of every coordinate is
        needed, so log q alone does not do where coordinates are left unmodelled. ``+inf`` marks a frame with q = 0,
        outside the sector to which the coordinates restrict the target; it is left out and counted in `n_outside`, and
        Z is the sector's. (`openmm_bg.analysis.quality.frame_log_weights` computes them.)

    Returns
    -------
    FreeEnergy
        A warning is logged, and it is not `trustworthy`, where the two sets contradict each other (`contradiction`):
        frames of another System or temperature than the weights, swapped arguments, frames that are not
        decorrelated or have not reached equilibrium.

    Raises
    ------
    InputError
        If a value is NaN, all flow weights are zero, an MD frame has -inf, or no MD frame is left.

    References
    ----------
    Bennett, J. Comput. Phys. 22, 245 (1976), solved by pymbar; error as MBAR's for two states.
    """
    flow, md = numbers("log_w_flow", log_w_flow), numbers("log_w_md", log_w_md)
    if flow.ndim != 1 or md.ndim != 1:
        raise InputError(f"log_w_flow and log_w_md must be one-dimensional, got shapes {flow.shape} and {md.shape}.")
    if np.any(np.isnan(flow) | (flow == np.inf)) or not np.any(flow > -np.inf):
        raise InputError("log_w_flow must be free of NaN and +inf and hold at least one non-zero weight.")
    if np.any(np.isnan(md) | (md == -np.inf)):
        raise InputError("log_w_md holds NaN or -inf: leave out MD frames whose energy is not finite.")
    outside = int(np.count_nonzero(md == np.inf))
    md = md[md < np.inf]
    if md.size == 0:
        raise InputError("No MD frame lies where the flow has density: check that both describe the same states.")
    if outside:
        warn_outside(outside, outside + md.size)
    delta_f, logit_flow, logit_md = bar_root(flow, md)
    p_flow, p_md = _logistic(logit_flow), _logistic(logit_md)
    shared = float(np.sum(p_flow * (1 - p_flow)) + np.sum(p_md * (1 - p_md)))
    harmonic = 1 / flow.size + 1 / md.size
    # 1 minus the second eigenvalue of the overlap matrix, and eq. E9 of Shirts and Chodera, J. Chem. Phys.
    # 129, 124105 (2008): for two states both follow from the same sum.
    overlap = shared * harmonic
    error = float(np.sqrt(max(1 / shared - harmonic, 0.0))) if shared > 0 else np.inf
    if overlap < MIN_OVERLAP:
        logger.warning(
            "Overlap between flow samples and MD frames is %.3f, below %.2f: this BAR free energy and its "
            "error cannot be trusted; train the flow further.",
            overlap,
            MIN_OVERLAP,
        )
    fewest = min(flow.size, md.size)
    if fewest < MIN_EFFECTIVE:
        logger.warning(
            "%d flow samples and %d MD frames, of which %d each are the least: the error of this BAR free energy "
            "cannot be trusted; take more.",
            flow.size,
            md.size,
            MIN_EFFECTIVE,
        )
    enough = overlap >= MIN_OVERLAP and fewest >= MIN_EFFECTIVE
    # Without overlap there is nothing to hold the two sets against each other, and the warnings above stand.
    contradicted = enough and abs(contradiction(logit_flow, logit_md)) > MAX_CONTRADICTION
    if contradicted:
        warn_contradiction(contradiction(logit_flow, logit_md))
    return FreeEnergy(
        delta_f,
        error,
        "BAR",
        overlap=overlap,
        overlap_matrix=two_state_matrix(shared / flow.size, shared / md.size),
        n_outside=outside,
        trustworthy=enough and not contradicted,
    )


def bar_root(flow: FloatArray, md: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """-log Z by BAR, and for samples and frames the logit of having come from the molecule, given both pools.

    Raises
    ------
    InputError
        There is no root because nothing overlaps.
    """
    # A common offset keeps every finite work value small beside IMPOSSIBLE.
    offset = float(np.median(md))
    work_flow = np.minimum(offset - flow, IMPOSSIBLE)
    work_md = np.minimum(md - offset, IMPOSSIBLE)
    pymbar = import_pymbar()
    try:
        # pymbar leaves numpy's error state changed. Its uncertainties underflow once one work value exceeds
        # about 700 kT, as any steric clash among the flow's samples does: only the root is taken from it.
        with quiet("pymbar"), np.errstate(all="ignore"):
            shifted = float(
                pymbar.bar(work_flow, work_md, compute_uncertainty=False, relative_tolerance=1e-10)["Delta_f"]
            )
    except (pymbar.utils.ConvergenceError, pymbar.utils.BoundsError) as failure:
        raise InputError(
            "BAR finds no free energy because flow samples and MD frames do not overlap: train the flow on."
        ) from failure
    log_odds = np.log(md.size / flow.size) + shifted
    return shifted - offset, log_odds - work_flow, log_odds + work_md


def contradiction(logit_flow: FloatArray, logit_md: FloatArray) -> float:
    """By how many standard errors flow samples and MD frames differ from what their weights promise.

    BAR is a logistic regression for whether a configuration came from the flow or from MD, with log w as the only
    variable and its slope held at one, as w = π/q demands: frames weighed in another System or at another temperature
    have another slope, and swapped sets the slope minus one. This is the score of that slope over its standard error;
    standard normal for right input (formula J).

    Parameters
    ----------
    logit_flow, logit_md : ndarray, shapes [n], [m]
        From `bar_root`.

    References
    ----------
    BAR as logistic regression: Shirts, Bair, Hooker and Pande, Phys. Rev. Lett. 91, 140601 (2003); score test: Rao,
    Proc. Cambridge Phil. Soc. 44, 50 (1948).
    """
    logit = np.concatenate([logit_flow, logit_md])
    p = _logistic(logit)
    residual = np.repeat([0.0, 1.0], [logit_flow.size, logit_md.size]) - p
    information = p * (1 - p)
    total = float(information.sum())
    if total == 0:
        return 0.0
    centred = logit - float(information @ logit) / total  # the intercept, log Z, is fitted to the same samples
    variance = float(information @ np.square(centred))
    if variance <= total * _EQUAL**2:
        return 0.0
    return float(residual @ centred) / np.sqrt(variance)


def warn_contradiction(z: float, which: str = "") -> None:
    """Say that the two sets of a BAR estimate do not belong together."""
    logger.warning(
        "Flow samples and MD frames%s contradict each other by %.1f standard errors, so that this free energy cannot "
        "be trusted: are the frames decorrelated and of the System and temperature of the weights, and the arguments "
        "in order?",
        which,
        abs(z),
    )


def warn_outside(outside: int, total: int) -> None:
    """Say how many MD frames rule 6 of docs/theory.md leaves out."""
    logger.warning(
        "%d of %d MD frames lie outside the flow's sector (q = 0) and were left out: Z is the sector's.",
        outside,
        total,
    )


def two_state_matrix(from_first: float, from_second: float) -> FloatArray:
    """Overlap matrix [2, 2] from its off-diagonal entries; rows add up to one."""
    return np.array([[1 - from_first, from_first], [from_second, 1 - from_second]])


def log_ratio(log_w_a: FloatArray, log_w_b: FloatArray) -> tuple[float, FloatArray]:
    """ΔF = -log(Σ w_b / Σ w_a) over common samples, and the share [n] of each sample in it.

    d_i = w_b,i / mean w_b - w_a,i / mean w_a has mean zero; its spread carries numerator, denominator and their
    covariance at once (delta method). Both sums must be above zero.
    """
    top_a, top_b = log_w_a.max(), log_w_b.max()
    a, b = np.exp(log_w_a - top_a), np.exp(log_w_b - top_b)
    delta_f = float(top_a - top_b + np.log(a.mean()) - np.log(b.mean()))
    return delta_f, b / b.mean() - a / a.mean()


def _logistic(x: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0.0, -x))
