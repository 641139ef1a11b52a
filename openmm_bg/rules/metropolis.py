"""The rules of exact Metropolis moves: who is accepted, who is chosen.

Pure functions on arrays of log-weights. They know nothing of molecules, flows, Contexts or files; whoever
calls them computes log w = log π(y, s) - log q(y) of the current state and of fresh proposals with *one*
energy function, and moves positions according to the indices that come back.

Conventions, the same for every rule:

- leading axes are independent chains and may be absent: ``log_w_current`` [...], ``log_w_proposed`` [..., n];
- a proposal with -inf (outside the domain, energy not finite) is never chosen;
- a current state with +inf (q = 0: the flow cannot produce it) stays for ever, as detailed balance demands of
  a state that no proposal can reach;
- a current state with -inf (π = 0: a bad start) is left for any proposal with a finite weight;
- NaN anywhere, or +inf in a proposal, is the caller's mistake.

A rejection repeats the old state: index unchanged, nothing recomputed. Formulas D, E and F of docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.errors import InputError
from openmm_bg.rules.state import BoolArray, FloatArray, Info, IntArray, State, largest

__all__ = [
    "Info",
    "State",
    "independence_chain",
    "latent_log_ratio",
    "latent_proposal",
    "log_acceptance",
    "metropolis_step",
    "multiple_proposal_chain",
]


def _report(moved: BoolArray, probability: FloatArray, energies_per_step: int) -> Info:
    """Info of steps [chains, n]."""
    chains, n = moved.shape
    steps = np.arange(1, n + 1)
    last_move = np.maximum.accumulate(np.where(moved, steps, 0), axis=1)
    run = steps - last_move
    none = np.zeros(chains, dtype=np.int64)
    return Info(
        n_proposed=moved.size,
        n_accepted=int(moved.sum()),
        n_energies=moved.size * energies_per_step,
        acceptance_probability=float(probability.mean()) if moved.size else float("nan"),
        longest_rejection_streak=int(run.max(initial=0)),
        leading_rejections=np.where(moved.any(axis=1), moved.argmax(axis=1), n) if n else none,
        trailing_rejections=run[:, -1] if n else none,
    )


def _check(
    log_w_current: ArrayLike, log_w_proposed: ArrayLike, extra_axes: int
) -> tuple[FloatArray, FloatArray, tuple[int, ...]]:
    """Current [C] and proposed [C, ...] as float64, with the shape of the chains' axes."""
    current = np.asarray(log_w_current, dtype=np.float64)
    proposed = np.asarray(log_w_proposed, dtype=np.float64)
    if proposed.ndim != current.ndim + extra_axes or proposed.shape[: current.ndim] != current.shape:
        raise InputError(
            f"log_w_proposed must have the axes of log_w_current {current.shape} and {extra_axes} more, "
            f"got shape {proposed.shape}."
        )
    top = largest(proposed)
    if math.isnan(largest(current)) or math.isnan(top):
        raise InputError("A log-weight is NaN: give a state whose energy is not finite as -inf.")
    if top == math.inf:
        raise InputError("A proposal has a log-weight of +inf, which means that it was not drawn from the flow.")
    shape = current.shape
    return current.reshape(-1), proposed.reshape(current.size, *proposed.shape[current.ndim :]), shape


def log_acceptance(log_w_current: ArrayLike, log_w_proposed: ArrayLike) -> FloatArray:
    """log min(1, w'/w), elementwise, without an inf - inf.

    -inf where the current state has q = 0 (+inf) or the proposal has π = 0 (-inf); 0 where the current state
    has π = 0 and the proposal has not.
    """
    current, proposed = np.broadcast_arrays(
        np.asarray(log_w_current, dtype=np.float64), np.asarray(log_w_proposed, dtype=np.float64)
    )
    difference = np.where(np.isfinite(proposed), proposed, 0.0) - np.where(np.isfinite(current), current, 0.0)
    out = np.where(current == -np.inf, 0.0, np.minimum(difference, 0.0))
    return np.where((current == np.inf) | (proposed == -np.inf), -np.inf, out)


def _one_chain(current: float, proposed: Sequence[float], rng: np.random.Generator) -> tuple[list[int], Info]:
    """`independence_chain` of one chain, after its checks, in floats: numpy is slow where arrays have one number."""
    index: list[int] = []
    at, n_accepted, streak, longest, probability = -1, 0, 0, 0, 0.0
    exponentials = rng.standard_exponential(len(proposed)).tolist()
    for k, (log_w, exponential) in enumerate(zip(proposed, exponentials, strict=True)):
        if current < math.inf and log_w > -math.inf:
            probability += math.exp(min(log_w - current, 0.0))
        streak += 1
        if log_w > current - exponential:
            at, current, streak = k, log_w, 0
            n_accepted += 1
        longest = max(longest, streak)
        index.append(at)
    n = len(index)
    return index, Info(
        n_proposed=n,
        n_accepted=n_accepted,
        n_energies=n,
        acceptance_probability=probability / n if n else math.nan,
        longest_rejection_streak=longest,
        leading_rejections=np.array([index.count(-1)]),
        trailing_rejections=np.array([streak]),
    )


def independence_chain(
    log_w_current: ArrayLike, log_w_proposed: ArrayLike, rng: np.random.Generator
) -> tuple[IntArray, Info]:
    """Formula D: Metropolised independence sampling through a batch of fresh proposals.

    The proposals do not depend on the state, so all can be drawn and evaluated before the chain runs through
    them one after the other with α = min(1, w'/w).

    Parameters
    ----------
    log_w_current : array_like, shape [...]
        log π(y, s) - log q(y) of the current state, from the same energy function as the proposals'.
    log_w_proposed : array_like, shape [..., n]
        The same for y' ~ q with s kept; each is offered once, in this order.
    rng : numpy.random.Generator

    Returns
    -------
    index : ndarray of int, shape [..., n]
        Where the chain stands after each step: -1 is the initial state, k the k-th proposal.
    info : Info

    Raises
    ------
    InputError
        If shapes disagree, a value is NaN, or a proposal has +inf.

    References
    ----------
    Tierney, Ann. Statist. 22, 1701 (1994); formula D of docs/theory.md.
    """
    current, proposed, shape = _check(log_w_current, log_w_proposed, 1)
    chains, n = proposed.shape
    if chains == 1:
        found, report = _one_chain(current.item(), proposed[0].tolist(), rng)
        return np.array(found, dtype=np.int64).reshape(*shape, n), report
    log_u = -rng.standard_exponential((chains, n))
    before = np.empty((chains, n))
    moved = np.empty((chains, n), dtype=np.bool_)
    for step in range(n):
        before[:, step] = current
        # u < w'/w, written as a strict inequality of logs that holds for infinite values too.
        moved[:, step] = accept = proposed[:, step] > current + log_u[:, step]
        current = np.where(accept, proposed[:, step], current)
    index = np.maximum.accumulate(np.where(moved, np.arange(n), -1), axis=1)
    info = _report(moved, np.exp(log_acceptance(before, proposed)), 1)
    return index.reshape(*shape, n), info


def multiple_proposal_chain(
    log_w_current: ArrayLike, log_w_proposed: ArrayLike, rng: np.random.Generator
) -> tuple[IntArray, Info]:
    """Formula E: at each step choose among the current state and K fresh proposals with probability ∝ w.

    Parameters
    ----------
    log_w_current : array_like, shape [...]
        log π(y, s) - log q(y) of the current state.
    log_w_proposed : array_like, shape [..., n, K]
        The same for n steps' worth of fresh y' ~ q. Row t is used at step t and nowhere else; a pool that is
        offered again would bias the chain. K may not depend on the state.
    rng : numpy.random.Generator

    Returns
    -------
    index : ndarray of int, shape [..., n]
        Where the chain stands after each step: -1 is the initial state, t·K + k the k-th proposal of step t,
        an index into the proposals flattened over their last two axes.
    info : Info
        Its acceptance probability is the share of all weight that lies on the proposals.

    Raises
    ------
    InputError
        If shapes disagree, a value is NaN, or a proposal has +inf.

    References
    ----------
    Andrieu, Doucet and Holenstein, J. R. Stat. Soc. B 72, 269 (2010) (iterated sampling importance
    resampling); formula E of docs/theory.md.
    """
    current, proposed, shape = _check(log_w_current, log_w_proposed, 2)
    chains, n, k = proposed.shape
    if k == 0:
        raise InputError("log_w_proposed must offer at least one proposal per step.")
    uniform = rng.random((chains, n))
    index = np.empty((chains, n), dtype=np.int64)
    moved = np.empty((chains, n), dtype=np.bool_)
    probability = np.empty((chains, n))
    at = np.full(chains, -1, dtype=np.int64)
    rows = np.arange(chains)
    for step in range(n):
        # The candidates' first entry is the current state.
        candidates = np.concatenate([current[:, None], proposed[:, step]], axis=1)
        top = candidates.max(axis=1)
        # Nothing to choose: q = 0 at the current state (+inf), or every candidate has π = 0 (-inf).
        stuck = ~np.isfinite(top)
        shifted = np.where(stuck[:, None], -np.inf, candidates)
        shifted[stuck, 0] = 0.0
        weights = np.exp(shifted - np.where(stuck, 0.0, top)[:, None])
        edges = np.cumsum(weights, axis=1)
        total = edges[:, -1]
        point = np.minimum(uniform[:, step] * total, np.nextafter(total, 0.0))
        choice = (edges <= point[:, None]).sum(axis=1)
        accept = choice > 0
        probability[:, step] = 1.0 - weights[:, 0] / total
        current = candidates[rows, choice]
        at = np.where(accept, step * k + choice - 1, at)
        moved[:, step] = accept
        index[:, step] = at
    return index.reshape(*shape, n), _report(moved, probability, k)


def latent_proposal(
    z: ArrayLike,
    rng: np.random.Generator,
    *,
    circular: ArrayLike,
    concentration: ArrayLike,
    a: float,
    width: float,
    fold: ArrayLike,
    mean: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
    chosen: ArrayLike | None = None,
) -> FloatArray:
    """Formula F: a local proposal in latent space that is reversible for the base density b.

    Gaussian dimensions take an autoregressive step z' = μ + √(1-a²)(z-μ) + aσξ, which leaves N(μ, σ²)
    invariant. Circular dimensions take a symmetric random walk wrapped to [-π, π); under a von Mises base
    each of them first passes its own Metropolis test min(1, b(z')/b(z)), else keeps its old value. Being
    reversible for b, the whole proposal needs only α = min(1, w(f(z'))/w(f(z))): `metropolis_step`.

    Parameters
    ----------
    z : array_like, shape [..., D]
        Current latent values; circular ones in [-π, π).
    rng : numpy.random.Generator
    circular : array_like of bool, shape [D]
    concentration : array_like, shape [D]
        κ of the von Mises base of circular dimensions, 0 for a uniform one. Must be the base's own values.
    fold : array_like of int, shape [D] or scalar
        n of a circular base exp(κ cos(n z)), as `openmm_bg.flow.FeatureLayout.fold`; 1 for all others.
    a : float
        Step of the Gaussian dimensions, in (0, 1]; 1 draws them afresh. Adapt during burn-in only.
    width : float
        Standard deviation (rad) of the walk on circular dimensions; infinity draws them afresh from b. Adapt during
        burn-in only.
    mean, scale : array_like, shape [D] or scalar
        μ (also the centre of von Mises dimensions) and σ of the base; 0 and 1 for this package's flows.
    chosen : array_like of bool, shape [D], optional
        Dimensions that move (a block); the others keep their values bit for bit. b is a product over dimensions, so
        that the proposal stays reversible as long as the choice does not depend on z. All if left out.

    Returns
    -------
    ndarray, shape [..., D], float64

    Raises
    ------
    InputError
        If a lies outside (0, 1], width is not positive, or shapes disagree.
    """
    current = np.asarray(z, dtype=np.float64)
    is_circular = np.asarray(circular, dtype=np.bool_)
    kappa = np.asarray(concentration, dtype=np.float64)
    if not 0.0 < a <= 1.0 or not width > 0.0:
        raise InputError(f"A latent move needs 0 < a <= 1 and width > 0, got a = {a} and width = {width}.")
    if current.ndim == 0 or is_circular.shape != current.shape[-1:] or kappa.shape != current.shape[-1:]:
        raise InputError(
            f"circular and concentration must have one entry per latent dimension {current.shape[-1:]}, "
            f"got {is_circular.shape} and {kappa.shape}."
        )
    centre, sigma = np.asarray(mean, dtype=np.float64), np.asarray(scale, dtype=np.float64)
    moving = np.ones(current.shape[-1:], dtype=np.bool_) if chosen is None else np.asarray(chosen, dtype=np.bool_)
    if moving.shape != current.shape[-1:]:
        raise InputError(f"chosen must have one entry per latent dimension {current.shape[-1:]}, got {moving.shape}.")
    turns = np.asarray(fold, dtype=np.float64)
    noise = rng.standard_normal(current.shape)
    gaussian = centre + np.sqrt(1.0 - a * a) * (current - centre) + a * sigma * noise
    if np.isinf(width):
        branch = np.floor(turns * rng.random(current.shape))
        angle = _wrap(centre + (rng.vonmises(0.0, kappa, current.shape) + 2.0 * np.pi * branch) / turns)
    else:
        log_u = -rng.standard_exponential(current.shape)
        walked = _wrap(current + width * noise)
        log_b_ratio = kappa * (np.cos(turns * (walked - centre)) - np.cos(turns * (current - centre)))
        angle = np.where(log_u < log_b_ratio, walked, current)
    return np.where(moving, np.where(is_circular, angle, gaussian), current)


def _wrap(angle: FloatArray) -> FloatArray:
    """To [-π, π); the remainder of a tiny negative number rounds to 2π, hence the second line."""
    wrapped = np.mod(angle + np.pi, 2.0 * np.pi) - np.pi
    return np.where(wrapped >= np.pi, -np.pi, wrapped)


def latent_log_ratio(
    log_target_current: ArrayLike,
    log_det_current: ArrayLike,
    log_target_proposed: ArrayLike,
    log_det_proposed: ArrayLike,
    log_forward: ArrayLike,
    log_backward: ArrayLike,
) -> FloatArray:
    """Formula F for any latent proposal T: the logarithm of its Metropolis-Hastings ratio.

    π(f(z')) |det J_f(z')| T(z|z') / [π(f(z)) |det J_f(z)| T(z'|z)], to be handed to `metropolis_step`. All
    six terms are required: a density left out is not the same as a symmetric proposal.

    Parameters
    ----------
    log_target_current, log_target_proposed : array_like, shape [...]
        log π(f(z), s) and log π(f(z'), s); -inf where π = 0.
    log_det_current, log_det_proposed : array_like, shape [...]
        log |det J_f|, the flow's volume change from latent to modelled coordinates.
    log_forward, log_backward : array_like, shape [...]
        log T(z'|z) and log T(z|z').

    Returns
    -------
    ndarray, shape [...]
        -inf where the proposal has π = 0 or cannot be reversed; +inf where only the current state has π = 0.

    Raises
    ------
    InputError
        If a term is NaN, a density is +inf, or log T(z'|z) is not finite (z' could not have been proposed).
    """
    terms = [
        np.asarray(term, dtype=np.float64)
        for term in (
            log_target_current,
            log_det_current,
            log_target_proposed,
            log_det_proposed,
            log_forward,
            log_backward,
        )
    ]
    if any(np.any(np.isnan(term) | (term == np.inf)) for term in terms) or not np.all(np.isfinite(terms[4])):
        raise InputError("The terms of a latent move must be finite or, for impossible states, -inf.")
    target, det, target_new, det_new, forward, backward = terms
    current = target + det + forward
    proposed = target_new + det_new + backward
    difference = proposed - np.where(np.isfinite(current), current, 0.0)
    return np.where((current == -np.inf) & (proposed > -np.inf), np.inf, difference)


def metropolis_step(
    state: State, proposal: State, rng: np.random.Generator, log_ratio: ArrayLike | None = None
) -> tuple[State, Info]:
    """One accept-or-reject step of every chain.

    Parameters
    ----------
    state, proposal : State
        Same shapes. With ``log_ratio=None`` the proposal must be one for which α = min(1, w'/w) holds: a
        fresh draw from q (formula D) or a latent move that is reversible for the base (formula F).
    rng : numpy.random.Generator
    log_ratio : array_like, shape [...], optional
        Logarithm of the full Metropolis-Hastings ratio for any other proposal (`latent_log_ratio`); the rules
        for infinite log-weights still apply.

    Returns
    -------
    state, info
        A rejected chain's value is the old one bit for bit.

    Raises
    ------
    InputError
        If shapes disagree, a value is NaN, or a proposal has +inf.
    """
    if state.value.shape != proposal.value.shape:
        raise InputError(
            f"The proposal's value must have the state's shape {state.value.shape}, got {proposal.value.shape}."
        )
    _check(state.log_w, proposal.log_w, 0)
    if log_ratio is None and state.log_w.size == 1:
        index, info = _one_chain(state.log_w.item(), [proposal.log_w.item()], rng)
        return (state if index[0] < 0 else proposal), info
    log_alpha = log_acceptance(state.log_w, proposal.log_w)
    if log_ratio is not None:
        ratio = np.asarray(log_ratio, dtype=np.float64)
        if ratio.shape != state.log_w.shape or np.any(np.isnan(ratio)):
            raise InputError(f"log_ratio must be free of NaN and have shape {state.log_w.shape}.")
        possible = (state.log_w < np.inf) & (proposal.log_w > -np.inf)
        log_alpha = np.where(possible, np.minimum(ratio, 0.0), -np.inf)
    accept = -rng.standard_exponential(state.log_w.shape) < log_alpha
    spread = np.reshape(accept, accept.shape + (1,) * (state.value.ndim - accept.ndim))
    new = State(np.where(spread, proposal.value, state.value), np.where(accept, proposal.log_w, state.log_w))
    return new, _report(accept.reshape(-1, 1), np.exp(log_alpha), 1)
