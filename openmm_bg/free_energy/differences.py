"""Differences of -log Z between two states of one molecule: two Systems, two temperatures (formula J).

With a flow for each state, their two estimates are independent. With one flow for both, its samples carry weights in
either state, and what they have in common cancels.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_bg.energy import in_kelvin, thermal_energy
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.free_energy.estimates import (
    MIN_OVERLAP,
    FreeEnergy,
    judge_weights,
    log_ratio,
    numbers,
    one_sided,
    two_state_matrix,
)
from openmm_bg.weights import check_not_all_zero, normalized_weights

if TYPE_CHECKING:
    from openmm_bg.sampler import BoltzmannGeneratorSampler

__all__ = ["at_temperature", "common_difference", "difference", "reweight"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

# log J + Φ of one sample in two states: what is left between them is rounding of positions and of u.
_SAME_VOLUME = 1e-3
_CHUNK = 4096


def difference(a: FreeEnergy | Ensemble, b: FreeEnergy | Ensemble) -> FreeEnergy:
    """F_b - F_a, kT: differences of -log Z between two states.

    Meaningful between states of one molecule only: same atoms, masses, constraints and frame (formula J). Ensembles of
    common samples are checked for it; of independent ensembles and estimates nothing tells which masses and
    constraints their weights had, and the caller must see to it. At two temperatures it is the difference of reduced
    free energies, -log Z_b + log Z_a.

    Parameters
    ----------
    a, b : FreeEnergy or Ensemble
        Results of `bar` (preferred) or `one_sided`, or ensembles. Two ensembles of the *same* samples, as `reweight`
        and `at_temperature` make them, are compared sample by sample (`common_difference`); any other ensemble stands
        for ``one_sided`` of its weights, and errors are added in quadrature.

    Returns
    -------
    FreeEnergy
        Of independent estimates, `overlap` is the smaller one, if both have one; `bias` the difference, where a bias is
        known; k̂ and the effective number of samples are the worse ones.

    Raises
    ------
    InputError
        If a or b is neither a `FreeEnergy` nor an `Ensemble`; if two ensembles carry different labels (an exact Z and
        that of a rigid manifold do not compare), have different numbers of atoms, or are common samples weighed with
        other masses or constraints, where log J + Φ differ.
    """
    for name, given in (("a", a), ("b", b)):
        if not isinstance(given, FreeEnergy | Ensemble):
            raise InputError(
                f"{name} must be a FreeEnergy (of bar() or one_sided()) or an Ensemble, not {type(given).__name__}."
            )
    if isinstance(a, Ensemble) and isinstance(b, Ensemble):
        if a.label != b.label:
            raise InputError(f"The ensembles are labelled {a.label!r} and {b.label!r}: compare ensembles of one kind.")
        if a.positions.shape[1] != b.positions.shape[1]:
            raise InputError(
                f"The ensembles have {a.positions.shape[1]} and {b.positions.shape[1]} atoms: compare states of one "
                "molecule."
            )
        # Independent draws never agree in a density of float64, let alone in all of them.
        if np.array_equal(a.log_q, b.log_q, equal_nan=True):
            _require_common_volume(a, b)
            return common_difference(a.log_weights, b.log_weights)
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
        khat=_worse(max, first.khat, second.khat),
        effective=_worse(min, first.effective, second.effective),
        n_outside=first.n_outside + second.n_outside,
        trustworthy=first.trustworthy and second.trustworthy,
    )


def _worse(choose: Any, *values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def common_difference(log_w_a: Any, log_w_b: Any) -> FreeEnergy:
    """F_b - F_a = -log(Σ w_b / Σ w_a), kT, from common samples with weights in both states.

    Parameters
    ----------
    log_w_a, log_w_b : array_like, shape [n]
        log w of the same independent samples in state a and in state b, each with the constant that belongs to it:
        log π_a - log q and log π_b - log q. -inf is a weight of zero.

    Returns
    -------
    FreeEnergy
        Error by the delta method: w_a and w_b vary together, and only what they differ by counts. The overlap is that
        of a with b, not with the flow.

    Raises
    ------
    InputError
        If shapes disagree, a log-weight is NaN or +inf, or all weights of a state are zero.
    """
    a = check_not_all_zero(numbers("log_w_a", log_w_a))
    b = check_not_all_zero(numbers("log_w_b", log_w_b))
    if a.size != b.size:
        raise InputError(f"Both states need a log-weight for every common sample, got {a.size} and {b.size}.")
    remedy = "draw more samples, or add MD frames with mbar_with_flow()"
    khat, effective, sound = judge_weights("difference", remedy, a, b)
    p_a, p_b = normalized_weights(a), normalized_weights(b)
    total = p_a + p_b
    # Σ p_a p_b / (p_a + p_b): the overlap matrix of MBAR for equally many samples of a and b, as the weights see it.
    shared = float(np.sum(np.divide(p_a * p_b, total, out=np.zeros_like(total), where=total > 0)))
    overlap = 2 * shared
    if overlap < MIN_OVERLAP:
        logger.warning(
            "The overlap between the two states is %.3f, below %.2f: this difference and its error cannot be trusted; "
            "put states between them, or train a flow for each.",
            overlap,
            MIN_OVERLAP,
        )
    delta_f, d = log_ratio(a, b)
    n = d.size
    relative = [float(np.square(n * p - 1).sum() / max(n - 1, 1)) for p in (p_a, p_b)]
    return FreeEnergy(
        delta_f,
        float(d.std(ddof=1) / np.sqrt(n)) if n > 1 else np.inf,
        "common samples",
        bias=0.5 * (relative[1] - relative[0]) / n,
        overlap=overlap,
        overlap_matrix=two_state_matrix(shared, shared),
        khat=khat,
        effective=effective,
        trustworthy=sound and overlap >= MIN_OVERLAP,
    )


def at_temperature(ensemble: Ensemble, sampled: Any, wanted: Any) -> Ensemble:
    """The same samples as an ensemble of the same System at another temperature; costs no energies.

    Parameters
    ----------
    ensemble
        Drawn for a target at ``sampled``.
    sampled, wanted
        Temperature of the ensemble's weights and the other one, K or Quantity. ``sampled`` is believed: an ensemble
        does not know its temperature, and a wrong one gives wrong weights without a word.

    Raises
    ------
    InputError
        A temperature that is not positive, or something that is not an `Ensemble`.
    """
    _require_ensemble(ensemble)
    ratio = in_kelvin(sampled) / in_kelvin(wanted)
    return _with_potentials(ensemble, ensemble.reduced_potentials * ratio)


def reweight(ensemble: Ensemble, sampler: BoltzmannGeneratorSampler) -> Ensemble:
    """The same samples as an ensemble of another sampler's System and temperature; one energy a sample.

    Parameters
    ----------
    ensemble
        Samples of the flow with weights in one state.
    sampler
        A `BoltzmannGeneratorSampler` with the same flow, of the other state.

    Returns
    -------
    Ensemble
        Positions and ``log_q`` are shared with the given one; pass both to `difference`.

    Raises
    ------
    InputError
        Other masses or constraints: then log J + Φ differ, and -log Z of the two do not compare. Other atoms, and
        Systems that `BoltzmannGeneratorSampler.sample` refuses. Arguments of other kinds.
    """
    _require_ensemble(ensemble)
    if not all(hasattr(sampler, name) for name in ("coordinates", "pool", "temperature")):
        raise InputError(
            f"sampler must be a BoltzmannGeneratorSampler of the other state, not {type(sampler).__name__}: its System "
            "and temperature are what the samples are weighed in."
        )
    if ensemble.positions.shape[1] != sampler.coordinates.n_atoms:
        raise InputError(
            f"The ensemble has {ensemble.positions.shape[1]} atoms and the sampler's molecule "
            f"{sampler.coordinates.n_atoms}: reweight states of one molecule."
        )
    sampler.sample(1)  # follows the Context, and refuses every System whose weights would mean nothing
    weighty = np.flatnonzero(ensemble.log_weights > -np.inf)
    if weighty.size == 0:
        raise InputError("All weights of the ensemble are zero: there is nothing to reweight.")
    u = np.full(ensemble.n, np.inf)
    kt = thermal_energy(sampler.temperature)
    for start in range(0, weighty.size, _CHUNK):
        rows = weighty[start : start + _CHUNK]
        _require_same_volume(ensemble, sampler, rows)
        u[rows] = sampler.pool.energies(ensemble.positions[rows]) / kt
    return _with_potentials(ensemble, u)


def _require_ensemble(given: Any) -> None:
    if not isinstance(given, Ensemble):
        raise InputError(
            f"ensemble must be an Ensemble, as BoltzmannGeneratorSampler.sample returns it, not {type(given).__name__}."
        )


def _log_volume_held(ensemble: Ensemble, rows: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """log J + Φ of rows as their weights hold it, and by how much rounding may have moved it."""
    u = ensemble.reduced_potentials[rows]
    # u of a clash swallows small numbers
    return ensemble.log_weights[rows] + u + ensemble.log_q[rows], _SAME_VOLUME + 1e-9 * np.abs(u)


def _require_common_volume(a: Ensemble, b: Ensemble) -> None:
    """log J + Φ of common samples must be one and the same in both ensembles."""
    rows = np.flatnonzero((a.log_weights > -np.inf) & (b.log_weights > -np.inf))
    (here, slack_here), (there, slack_there) = _log_volume_held(a, rows), _log_volume_held(b, rows)
    if not np.all(np.abs(here - there) <= slack_here + slack_there):
        raise InputError(
            "The two ensembles hold the same samples weighed with different masses, constraints or coordinates: free "
            "energies compare between states that share them (formula J)."
        )


def _require_same_volume(ensemble: Ensemble, sampler: BoltzmannGeneratorSampler, rows: NDArray[np.intp]) -> None:
    """log J + Φ of rows, as their weights hold it, must be what it is in the other state."""
    with torch.no_grad():
        y, s = sampler.coordinates.to_internal(torch.from_numpy(ensemble.positions[rows]))
        here = sampler.coordinates.log_volume(y, s).numpy()
    there, slack = _log_volume_held(ensemble, rows)
    if not np.all(np.abs(here - there) <= slack):
        raise InputError(
            "The ensemble was weighed with other masses, constraints or coordinates than the sampler's: free energies "
            "compare between states that share them (formula J)."
        )


def _with_potentials(ensemble: Ensemble, u: FloatArray) -> Ensemble:
    """The ensemble with other reduced potentials; weights of zero stay zero."""
    kept = ensemble.log_weights > -np.inf
    change = np.subtract(ensemble.reduced_potentials, u, out=np.zeros(ensemble.n), where=kept)
    log_w = np.where(kept, ensemble.log_weights + change, -np.inf)
    return replace(
        ensemble, reduced_potentials=u, log_weights=log_w, n_nonfinite=int(np.count_nonzero(np.isneginf(log_w)))
    )
