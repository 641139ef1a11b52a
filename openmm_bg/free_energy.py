"""Free energies from weights, from flow samples beside MD frames, and from chains.

All results are in kT. Formula J of docs/theory.md: Z = ∫ exp(-u) J √det Z dq. Rigid motion and momenta are
left out of Z, so that only differences between states of *one* molecule (same atoms, masses, constraints and
frame) mean anything. Where the coordinates restrict the target to a sector, Z is the sector's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.weights import khat_threshold, log_mean_weight, pareto_khat

__all__ = [
    "FreeEnergy",
    "bar",
    "chain_state_difference",
    "difference",
    "one_sided",
    "state_difference",
    "statistical_inefficiency",
]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Overlap below which BAR fails: Klimovich, Shirts and Mobley, J. Comput. Aided Mol. Des. 29, 397 (2015)
# ask for 0.03 in each of the two off-diagonal entries of the overlap matrix, whose sum is the scalar overlap.
MIN_OVERLAP = 0.06
# Fewer passages between two states than this, and an autocorrelation time cannot be estimated.
MIN_PASSAGES = 10
# Stands for an infinite work value, where pymbar would form inf - inf: exp(-_IMPOSSIBLE) is zero.
_IMPOSSIBLE = 1.0e5


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
        "one-sided", "BAR" or "difference".
    bias : float or None
        Estimated systematic error of a one-sided estimate, kT (positive: the estimate is too high). It is not
        subtracted.
    overlap : float or None
        For BAR: 0 for none, 1 for two identical distributions (pymbar's scalar overlap).
    n_outside : int
        For BAR: MD frames left out because q = 0 there.
    """

    delta_f: float
    error: float
    method: str
    bias: float | None = None
    overlap: float | None = None
    n_outside: int = 0


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a library's notices (pymbar announces at import that JAX is missing); errors still pass."""
    library = logging.getLogger(name)
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)


def _pymbar() -> Any:
    with _quiet("pymbar"):
        import pymbar
        from pymbar import timeseries  # noqa: F401  (makes pymbar.timeseries an attribute)
    return pymbar


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
        If all weights are zero, or one is NaN or +inf.

    References
    ----------
    Zwanzig, J. Chem. Phys. 22, 1420 (1954); bias: Zuckerman and Woolf, Phys. Rev. Lett. 89, 180602 (2002).
    """
    log_z, error = log_mean_weight(log_weights)
    n = np.size(log_weights)
    khat = pareto_khat(log_weights)
    if not khat < khat_threshold(n):
        logger.warning(
            "Pareto k-hat %.2f of %d weights is not below %.2f: the error of this free energy cannot "
            "be trusted; draw more samples, or use bar() with MD frames.",
            khat,
            n,
            khat_threshold(n),
        )
    return FreeEnergy(-log_z, error, "one-sided", bias=0.5 * error**2)


def bar(log_w_flow: ArrayLike, log_w_md: ArrayLike) -> FreeEnergy:
    """-log Z by the Bennett acceptance ratio between flow samples and MD frames (formula J).

    State 0 is the flow, u_0 = -log q - log g with Z_0 = 1; state 1 the molecule, u_1 = u - log J - Φ, so that
    on both sides u_1 - u_0 = -log w.

    Parameters
    ----------
    log_w_flow : array_like, shape [n]
        log w of independent flow samples; -inf where the target has no density.
    log_w_md : array_like, shape [m]
        log w of *decorrelated* MD frames (see `statistical_inefficiency`), in the same measure: a density of
        every coordinate is needed, so log q alone does not do where coordinates are left unmodelled. ``+inf``
        marks a frame with q = 0, outside the sector to which the coordinates restrict the target; it is left
        out and counted in `n_outside`, and Z is the sector's.

    Returns
    -------
    FreeEnergy

    Raises
    ------
    InputError
        If a value is NaN, all flow weights are zero, an MD frame has -inf, or no MD frame is left.

    References
    ----------
    Bennett, J. Comput. Phys. 22, 245 (1976), solved by pymbar; error as MBAR's for two states.
    """
    flow = np.asarray(log_w_flow, dtype=np.float64)
    md = np.asarray(log_w_md, dtype=np.float64)
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
        logger.warning(
            "%d of %d MD frames lie outside the flow's sector (q = 0) and were left out: Z is the sector's.",
            outside,
            outside + md.size,
        )
    # A common offset keeps every finite work value small beside _IMPOSSIBLE.
    offset = float(np.median(md))
    work_flow = np.minimum(offset - flow, _IMPOSSIBLE)
    work_md = np.minimum(md - offset, _IMPOSSIBLE)
    pymbar = _pymbar()
    try:
        # pymbar leaves numpy's error state changed. Its uncertainties underflow once one work value exceeds
        # about 700 kT, as any steric clash among the flow's samples does: only the root is taken from it.
        with _quiet("pymbar"), np.errstate(all="ignore"):
            shifted = float(
                pymbar.bar(work_flow, work_md, compute_uncertainty=False, relative_tolerance=1e-10)["Delta_f"]
            )
    except (pymbar.utils.ConvergenceError, pymbar.utils.BoundsError) as failure:
        raise InputError(
            "BAR finds no free energy because flow samples and MD frames do not overlap: train the flow on."
        ) from failure
    # Probability that a sample belongs to the molecule, given that it came from one of the two pools.
    log_ratio = np.log(md.size / flow.size)
    p_flow = _logistic(log_ratio + shifted - work_flow)
    p_md = _logistic(log_ratio + shifted + work_md)
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
    return FreeEnergy(shifted - offset, error, "BAR", overlap=overlap, n_outside=outside)


def _logistic(x: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0.0, -x))


def difference(a: FreeEnergy | Ensemble, b: FreeEnergy | Ensemble) -> FreeEnergy:
    """F_b - F_a (kT) from two independent estimates of -log Z, errors added in quadrature.

    Meaningful between states of one molecule only: same atoms, masses, constraints and frame (formula J).

    Parameters
    ----------
    a, b : FreeEnergy or Ensemble
        Results of `bar` (preferred) or `one_sided`; an Ensemble stands for ``one_sided`` of its weights.

    Returns
    -------
    FreeEnergy
        `overlap` is the smaller one, if both have one; `bias` the difference, where a bias is known.

    Raises
    ------
    InputError
        If two ensembles carry different labels: an exact Z and that of a rigid manifold do not compare.
    """
    if isinstance(a, Ensemble) and isinstance(b, Ensemble) and a.label != b.label:
        raise InputError(f"The ensembles are labelled {a.label!r} and {b.label!r}: compare ensembles of one kind.")
    first = one_sided(a.log_weights) if isinstance(a, Ensemble) else a
    second = one_sided(b.log_weights) if isinstance(b, Ensemble) else b
    biases = (first.bias, second.bias)
    return FreeEnergy(
        second.delta_f - first.delta_f,
        float(np.hypot(first.error, second.error)),
        "difference",
        bias=None if biases == (None, None) else (second.bias or 0.0) - (first.bias or 0.0),
        overlap=min(first.overlap, second.overlap)
        if first.overlap is not None and second.overlap is not None
        else None,
        n_outside=first.n_outside + second.n_outside,
    )


def _influence(log_w: FloatArray, in_a: BoolArray, in_b: BoolArray) -> tuple[float, FloatArray]:
    """ΔF = -log(Σ_b w / Σ_a w), and the share of each sample in it.

    d_i = n w_i (1_b/Σ_b w - 1_a/Σ_a w) has mean zero; its spread carries numerator, denominator and their
    covariance at once (delta method).
    """
    if np.any(np.isnan(log_w) | (log_w == np.inf)):
        raise InputError("log_w holds NaN or +inf: give weights of zero as -inf and mend the others.")
    for name, mask in (("in_a", in_a), ("in_b", in_b)):
        if mask.shape != log_w.shape:
            raise InputError(f"{name} must have one entry per sample {log_w.shape}, got shape {mask.shape}.")
        if not np.any(log_w[mask] > -np.inf):
            raise InputError(f"No sample of non-zero weight has {name} set: draw more samples or widen the state.")
    weights = np.exp(log_w - log_w.max())
    in_state_a = np.where(in_a, weights, 0.0)
    in_state_b = np.where(in_b, weights, 0.0)
    delta_f = -float(np.log(in_state_b.sum() / in_state_a.sum()))
    return delta_f, in_state_b / in_state_b.mean() - in_state_a / in_state_a.mean()


def state_difference(log_w: ArrayLike, in_a: ArrayLike, in_b: ArrayLike) -> tuple[float, float]:
    """Conformational free energy F_b - F_a from independent weighted samples.

    Parameters
    ----------
    log_w : array_like, shape [n]
        Log-weights up to a common constant.
    in_a, in_b : array_like of bool, shape [n]
        Which samples lie in each state; the states may overlap.

    Returns
    -------
    delta_f, error : float
        kT; the error by the delta method, with the covariance of numerator and denominator.

    Raises
    ------
    InputError
        If shapes disagree, a log-weight is NaN or +inf, or a state holds no sample of non-zero weight.
    """
    array = np.asarray(log_w, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"log_w must be one-dimensional, got shape {array.shape}.")
    delta_f, d = _influence(array, np.asarray(in_a, dtype=np.bool_), np.asarray(in_b, dtype=np.bool_))
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
    with _quiet("pymbar"):
        return float(_pymbar().timeseries.statistical_inefficiency(array))


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
    array = np.zeros(a.size) if log_w is None else np.asarray(log_w, dtype=np.float64)
    delta_f, d = _influence(array, a, b)
    label = np.zeros(a.size) if chains is None else np.asarray(chains)
    if label.shape != a.shape:
        raise InputError(f"chains must have one entry per frame {a.shape}, got shape {label.shape}.")
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
