"""Annealed importance sampling and the nonequilibrium candidate move, on arrays (formulas G and H).

Both walk along a bridge from the flow to the target, log π_λ = (1-λ) log q + λ log π, that is π_λ ∝ q w^λ with
w = π/q, and pay for every change of λ with work. A better weight than w itself comes out, because between two
changes a kernel lets the state relax.

Everything is written on plain vectorised callables in *one* set of variables x [n, D], one row per walker and always
all rows in their order, so that each row may have its own frozen s. ``log_base(x)`` [n] is log q, normalised if log Z
is wanted; ``log_target(x)`` [n] is log π in the same measure; ``sample(n, rng)`` draws from q. For a flow the
convenient variables are the latent ones: `latent_densities` gives log b(z) and log π(f(z), s) + log|det df/dz|, for
which `latent_kernel` is the kernel; y = f(z) at the end.

Zeros and infinities:

- a target that is -inf, NaN or +inf (outside the domain, energy not finite) is π = 0;
- a walker that starts there has weight zero for ever, because its first increment of work is -inf. A kernel may move it
  on, for it costs nothing and harms nothing; no walker ever moves *into* π = 0, for every λ at which kernels act is
  positive. Hence -inf and a finite number may meet in a sum of work, -inf and +inf never do;
- a current state with q = 0 (w = +inf) stays, as in formula D; q = 0 at a fresh sample is a mistake of the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError
from openmm_bg.rules.metropolis import Info, State, latent_proposal, log_acceptance, metropolis_step

__all__ = [
    "annealed_importance_sampling",
    "check_schedule",
    "down_leg",
    "latent_densities",
    "latent_kernel",
    "moving_candidate_move",
    "nonequilibrium_candidate_move",
    "reversible_kernel",
    "up_leg",
]

FloatArray = NDArray[np.float64]
LogDensity = Callable[[FloatArray], ArrayLike]
#: Draws from q: ``sample(n, rng)`` -> [n, D].
Sample = Callable[[int, np.random.Generator], ArrayLike]
#: ``kernel(state, lam, log_w, rng)`` -> (state, info): leaves q w^lam invariant *and* is reversible for it.
Kernel = Callable[[State, float, Callable[[FloatArray], FloatArray], np.random.Generator], tuple[State, Info]]


# ------------------------------------------------------------------------------------------------- kernels


def reversible_kernel(propose: Callable[[FloatArray, np.random.Generator], ArrayLike], n_steps: int = 1) -> Kernel:
    """Metropolised kernel from a proposal that is reversible for q: α = min(1, [w(x')/w(x)]^λ).

    Since π_λ ∝ q w^λ and the proposal takes care of q, nothing but the power of w is left in the ratio. Repeating one
    reversible step leaves it reversible, so that the kernel is its own reversal (formula G).

    Parameters
    ----------
    propose : callable
        ``propose(x, rng)`` -> x' [n, D] with q(x) T(x'|x) = q(x') T(x|x'), such as a draw from q or
        `metropolis.latent_proposal`. Not a symmetric walk, unless q is uniform.
    n_steps : int
        Steps at each λ, at least 1; each evaluates the target once per walker.

    Raises
    ------
    InputError
        If n_steps < 1.
    """
    if n_steps < 1:
        raise InputError(f"A kernel needs n_steps >= 1, got {n_steps}.")

    def kernel(
        state: State, lam: float, log_w: Callable[[FloatArray], FloatArray], rng: np.random.Generator
    ) -> tuple[State, Info]:
        if not 0.0 < lam <= 1.0:  # at λ = 0 the product 0 · (-inf) has no meaning, and q can be drawn from directly
            raise InputError(f"A kernel acts at 0 < λ <= 1, got {lam}.")
        total: Info | None = None
        for _ in range(n_steps):
            value = np.asarray(propose(state.value, rng), dtype=np.float64)
            proposal = State(value, log_w(value))
            ratio = log_acceptance(lam * state.log_w, lam * proposal.log_w)
            state, info = metropolis_step(state, proposal, rng, log_ratio=ratio)
            total = info if total is None else total + info
        assert total is not None
        return state, total

    return kernel


def latent_kernel(
    *,
    circular: ArrayLike,
    concentration: ArrayLike,
    fold: ArrayLike = 1,
    a: float = 0.5,
    width: float = 0.5,
    n_steps: int = 1,
) -> Kernel:
    """Formula F at every λ, for walkers in the latent variables z of a flow.

    Parameters
    ----------
    circular : array_like of bool, shape [D]
    concentration : array_like, shape [D]
        κ of the von Mises base of circular dimensions, 0 for a uniform one.
    fold : array_like of int, shape [D] or scalar
        n of a base exp(κ cos(n z)).
    a, width : float
        Steps of Gaussian dimensions, in (0, 1], and of circular ones (rad).
    n_steps : int
        Steps at each λ.

    Raises
    ------
    InputError
        If a, width, n_steps or a shape is out of range; those of a, width and shapes when the kernel first acts.
    """
    turns = np.asarray(fold, dtype=np.float64)
    if np.any(turns < 1) or np.any(turns != np.round(turns)):
        raise InputError("fold must hold integers of at least 1.")

    def propose(z: FloatArray, rng: np.random.Generator) -> FloatArray:
        return latent_proposal(z, rng, circular=circular, concentration=concentration, fold=turns, a=a, width=width)

    return reversible_kernel(propose, n_steps)


def latent_densities(
    forward: Callable[[FloatArray], tuple[ArrayLike, ArrayLike]], base_log_prob: LogDensity, log_target: LogDensity
) -> tuple[LogDensity, LogDensity]:
    """log b(z) and log π(f(z)) + log|det df/dz|: flow and target in the measure dz.

    Their difference is log π(y) - log q(y) at y = f(z), whatever the variables.

    Parameters
    ----------
    forward : callable
        z [n, D] -> y [n, D], log|det dy/dz| [n].
    base_log_prob : callable
        z [n, D] -> log b(z) [n].
    log_target : callable
        y [n, D] -> log π(y, s) [n], each row with its own frozen s.
    """

    def pulled_back(z: FloatArray) -> FloatArray:
        y, log_det = forward(z)
        return np.asarray(log_target(np.asarray(y)), dtype=np.float64) + np.asarray(log_det, dtype=np.float64)

    return base_log_prob, pulled_back


# ------------------------------------------------------------------------------------------------- the legs


def check_schedule(schedule: ArrayLike) -> FloatArray:
    """λ as an array; `InputError` unless it increases from 0 to 1."""
    lambdas = np.asarray(schedule, dtype=np.float64)
    if lambdas.ndim != 1 or lambdas.size < 2 or lambdas[0] != 0.0 or lambdas[-1] != 1.0:
        raise InputError("The schedule must be a list of λ that begins with 0 and ends with 1, both exactly.")
    increments = np.diff(lambdas)
    if not np.all(increments > 0.0):
        raise InputError("The schedule must increase from each λ to the next.")
    assert abs(increments.sum() - 1.0) < 1e-12, "increments of λ that miss one give another target's weight"
    return lambdas


def _log_weight(log_base: LogDensity, log_target: LogDensity) -> Callable[[FloatArray], FloatArray]:
    """log w = log π - log q of rows x, with the module's rules for what is not finite."""

    def log_w(x: FloatArray) -> FloatArray:
        base = np.asarray(log_base(x), dtype=np.float64)
        target = np.asarray(log_target(x), dtype=np.float64)
        if base.shape != x.shape[:1] or target.shape != x.shape[:1]:
            raise InputError(
                f"log_base and log_target must return shape {x.shape[:1]}, got {base.shape} and {target.shape}."
            )
        if np.any(np.isnan(base) | (base == np.inf)):
            raise InputError("log_base returned NaN or +inf: it must be a density wherever kernels may go.")
        possible = np.isfinite(target)
        return np.where(possible, np.where(possible, target, 0.0) - base, -np.inf)

    return log_w


def _draw(sample: Sample, n: int, log_w: Callable[[FloatArray], FloatArray], rng: np.random.Generator) -> State:
    """n fresh states from q."""
    value = np.asarray(sample(n, rng), dtype=np.float64)
    if value.ndim != 2 or value.shape[0] != n:
        raise InputError(f"sample must return shape [{n}, D], got {value.shape}.")
    state = State(value, log_w(value))
    if np.any(state.log_w == np.inf):
        raise InputError("log_base is -inf at a fresh sample: sample and log_base do not belong together.")
    return state


def up_leg(
    state: State,
    log_w: Callable[[FloatArray], FloatArray],
    kernel: Kernel,
    schedule: ArrayLike,
    rng: np.random.Generator,
) -> tuple[State, FloatArray, Info]:
    """From λ = 0 to 1: at each k first the work (λ_k - λ_{k-1}) log w(x_{k-1}), then the kernel of λ_k, to x_k.

    Returns
    -------
    state : State
        x_n.
    log_work : ndarray, shape [n]
        log W.
    info : Info
        Of the kernels' steps.
    """
    lambdas = check_schedule(schedule)
    work = np.zeros(state.log_w.shape)
    total: Info | None = None
    for before, lam in pairwise(lambdas):
        work = work + (lam - before) * state.log_w
        state, info = kernel(state, float(lam), log_w, rng)
        total = info if total is None else total + info
    assert total is not None
    return state, work, total


def down_leg(
    state: State,
    log_w: Callable[[FloatArray], FloatArray],
    kernel: Kernel,
    schedule: ArrayLike,
    rng: np.random.Generator,
) -> tuple[State, FloatArray, Info]:
    """The mirror image of `up_leg`, from λ = 1 to 0: first the kernel of λ_k, to x_{k-1}, then the work there.

    Work is counted as in the up direction: log W = Σ (λ_k - λ_{k-1}) log w(x_{k-1}). The schedule is given upwards too;
    the kernel must be reversible, for then it is its own reversal.
    """
    lambdas = check_schedule(schedule)
    work = np.zeros(state.log_w.shape)
    total: Info | None = None
    for before, lam in zip(lambdas[-2::-1], lambdas[:0:-1], strict=True):
        state, info = kernel(state, float(lam), log_w, rng)
        work = work + (lam - before) * state.log_w
        total = info if total is None else total + info
    assert total is not None
    return state, work, total


# ------------------------------------------------------------------------------------------------- formulas


def annealed_importance_sampling(
    log_base: LogDensity,
    log_target: LogDensity,
    sample: Sample,
    kernel: Kernel,
    schedule: ArrayLike,
    n: int,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray, Info]:
    """Formula H in y with s frozen or empty: n independent weighted samples of π(·, s).

    log W = Σ_k (λ_k - λ_{k-1}) [log π - log q](x_{k-1}), x_0 ~ q. Averages Σ W f(x) / Σ W are exact like those of
    formula A (s empty) or B (s frozen), and mean W = Z; only their variance depends on schedule and kernel.

    Parameters
    ----------
    log_base, log_target, sample : callable
        See the module; for a flow, `latent_densities` and draws from its base.
    kernel : callable
        `latent_kernel`, `reversible_kernel`, or any Metropolised kernel that leaves q w^λ invariant.
    schedule : array_like
        Increasing λ from 0 to 1, such as ``numpy.linspace(0, 1, 11)``; [0, 1] has the weights of plain importance
        sampling. Choose it, and the kernel's steps, before the run.
    n : int
        Number of walkers, at least 1.
    rng : numpy.random.Generator

    Returns
    -------
    x : ndarray, shape [n, D]
    log_w : ndarray, shape [n]
        -inf for weight zero; unclipped, for `openmm_bg.weights` and `free_energy.one_sided`.
    info : Info
        Of the kernels' steps; n_energies counts the first evaluation too.

    Raises
    ------
    InputError
        A bad schedule, n < 1, shapes that disagree, or a base density that is NaN, +inf, or zero at its own sample.

    References
    ----------
    Neal, Stat. Comput. 11, 125 (2001), eq. 11; formula H of docs/theory.md.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> normal = latent_kernel(circular=[False], concentration=[0.0])
    >>> x, log_w, _ = annealed_importance_sampling(
    ...     lambda z: -0.5 * z[:, 0] ** 2 - 0.5 * np.log(2 * np.pi),
    ...     lambda z: -2.0 * (z[:, 0] - 1) ** 2,  # Z = sqrt(pi / 2)
    ...     lambda n, rng: rng.standard_normal((n, 1)), normal, np.linspace(0, 1, 9), 20_000, rng)
    >>> bool(abs(np.exp(log_w).mean() / np.sqrt(np.pi / 2) - 1) < 0.03)
    True
    """
    lambdas = check_schedule(schedule)
    if n < 1:
        raise InputError(f"The number of walkers must be at least 1, got {n}.")
    log_w = _log_weight(log_base, log_target)
    state, work, info = up_leg(_draw(sample, n, log_w, rng), log_w, kernel, lambdas, rng)
    return state.value, work, replace(info, n_energies=info.n_energies + n)


def nonequilibrium_candidate_move(
    x: ArrayLike,
    log_base: LogDensity,
    log_target: LogDensity,
    sample: Sample,
    kernel: Kernel,
    schedule: ArrayLike,
    rng: np.random.Generator,
) -> tuple[State, Info]:
    """Formula G with s frozen: one move of every chain that leaves π(·, s) invariant.

    Down from the current state with the reversed protocol, a fresh draw from q, up to the candidate;
    α = min(1, W_up / W_down). W_down comes from a down leg of this very move, and the current state's weight is
    computed anew: nothing is taken over from an earlier move, after which s (in log_target) may have changed.

    Parameters
    ----------
    x : array_like, shape [chains, D]
        Current states, in the variables of the densities (z = f⁻¹(y) for a flow).
    log_base, log_target, sample, schedule, rng
        As for `annealed_importance_sampling`; log_target with the same s in both legs.
    kernel : callable
        Must be *reversible* for q w^λ: a sweep of different steps in a fixed order is not, and would need its own
        reversal on the way down.

    Returns
    -------
    state : State
        A rejected chain's value is x bit for bit.
    info : Info
        Of the move (not of the kernels' steps); n_energies counts all evaluations of both legs.

    Raises
    ------
    InputError
        As `annealed_importance_sampling`.

    References
    ----------
    Nilmeier, Crooks, Minh and Chodera, Proc. Natl. Acad. Sci. USA 108, E1009 (2011); formula G of docs/theory.md.
    """
    lambdas = check_schedule(schedule)
    value = np.array(x, dtype=np.float64)
    if value.ndim != 2 or value.shape[0] < 1:
        raise InputError(f"x must have shape [chains, D], got {value.shape}.")
    log_w = _log_weight(log_base, log_target)
    current = State(value, log_w(value))
    # Where the down leg ends does not matter, only its work: with s frozen the refresh replaces all of y.
    _, work_down, down = down_leg(current, log_w, kernel, lambdas, rng)
    candidate, work_up, up = up_leg(_draw(sample, len(value), log_w, rng), log_w, kernel, lambdas, rng)
    state, info = metropolis_step(current, candidate, rng, log_ratio=log_acceptance(work_down, work_up))
    return state, replace(info, n_energies=2 * len(value) + down.n_energies + up.n_energies)


def moving_candidate_move(
    current: State,
    down: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
    refresh: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
    up: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
    rng: np.random.Generator,
) -> tuple[State, Info]:
    """Formula G with s moving too: α = min(1, (W_up / W_down) · h(s_0|y') / h(s_0|y_0)).

    Parameters
    ----------
    current : State
        value [chains, D]; log_w of +inf for a chain that stands where π_0 = 0, which stays, otherwise finite or -inf.
    down, up : callable
        x -> other end of the leg, log W; both counted upwards, down with the reversed protocol.
    refresh : callable
        x_0 [chains, D] -> x_0' and log h(s_0|y') - log h(s_0|y_0): y' ~ q at the s of x_0. Zero where s is drawn
        anew as well; -inf for an x_0' outside the domain, whose row must still be finite.

    Returns
    -------
    state : State
        A rejected chain's value bit for bit; log_w is then the old one, after an acceptance 0: it is not known.
    info : Info
        Of the move; n_energies is left at one per chain, for the legs are the caller's.
    """
    x_0, work_down = down(current.value)
    start, log_h = refresh(x_0)
    candidate, work_up = up(start)
    # work_up may be -inf where a start is outside, log_h too; never +inf, for up legs begin at π_0 > 0 or count as lost
    ratio = log_acceptance(work_down, np.where(np.isneginf(log_h) | np.isneginf(work_up), -np.inf, work_up + log_h))
    return metropolis_step(current, State(candidate, np.zeros_like(ratio)), rng, log_ratio=ratio)
