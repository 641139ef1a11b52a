"""The losses as pure functions of a density, samples and a target. Sources: docs/theory.md, Losses.

Samples that are left out are masked, not cut away: the shapes of a step are then the same every time and nothing waits
for a GPU to count them, as a recorded step (`openmm_bg.training.graphs`) must not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openmm_bg.training.graphs import Outside, called

Regulariser = Callable[[Tensor], Tensor]


class Evaluation(NamedTuple):
    """Target at detached samples: what `evaluate_target` returns, all float64 and without a graph."""

    log_density: Tensor  # [B] log π, unregularised, -inf or NaN where it does not exist
    energy: Tensor  # [B] regularised -log π
    gradient: Tensor  # [B, D] gradient of `energy` in y; 0 where not finite
    finite: Tensor  # [B] bool: log π and the gradient both finite


class KLResult(NamedTuple):
    """Reverse KL of a batch."""

    loss: Tensor  # scalar with a graph, NaN if no sample is finite
    n_dropped: Tensor  # scalar int64: samples left out
    log_weights: Tensor  # [B] log π - log q + log-normalisers, unregularised, float64, detached


class PathResult(NamedTuple):
    """Path-gradient surrogate of a batch."""

    loss: Tensor  # scalar: value 0, gradient that of the KL divergence
    mismatch: Tensor  # scalar: weighted mean of |∇log π - ∇log q|², 0 at the optimum
    n_dropped: Tensor  # scalar int64


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; the flag of the module before it is put back afterwards."""
    was_training = module.training
    if was_training:
        module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()


def weighted_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of `values` [B], self-normalised with `weights` [B] >= 0 if given."""
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    return (weights * values).sum() / weights.sum()


def masked_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, ...] again, and a mask [B] of its rows, all True, to be filled in before anything runs backwards.

    What comes back to x through the result is put to 0 in the rows masked by then. A NaN stops here that a mask on the
    values alone would let through (0 times infinity), and it would reach every parameter.
    """
    keep = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    same = x.view_as(x)
    if same.requires_grad:
        same.register_hook(lambda gradient: torch.where(_column(keep, gradient), gradient, 0.0))
    return same, keep


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def nll(density: Any, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Negative log-likelihood ``-E_p[log q(y)]`` of samples y [B, D], weighted if `weights` [B] are given."""
    return -weighted_mean(density.log_prob(y), weights)


def clipped_weights(log_w: Tensor, clip: float = 2.0, median: Tensor | float | None = None) -> Tensor:
    """``exp(min(log w - median, clip))`` [B]: one huge weight must not own a batch. For training only."""
    centre = log_w.median() if median is None else median
    return torch.exp(torch.clamp(log_w - centre, max=clip))


def buffer_nll(
    density: Any, y: Tensor, log_w: Tensor, clip: float = 2.0, median: Tensor | float | None = None
) -> Tensor:
    """NLL of flow samples reweighted to the target, with weights clipped as in `clipped_weights`.

    Parameters
    ----------
    y
        [B, D] samples of the density as it was when `log_w` was evaluated.
    log_w
        [B] finite log importance weights (formulas A and B of docs/theory.md).
    median
        Of log w over all samples kept; that of the batch if None.
    """
    return nll(density, y, clipped_weights(log_w, clip, median))


class VarianceResult(NamedTuple):
    """Surrogate whose gradient is that of the loss, and the mean square residual it stands for."""

    loss: Tensor
    residual: Tensor


def log_variance(
    density: Any,
    y: Tensor,
    log_density: Tensor,
    log_z: Tensor | float,
    clip: float = 2.0,
    keep: Tensor | None = None,
) -> VarianceResult:
    """Mean square of log(π / Z q) over samples of *any* origin: the variance of log π - log q once Z is right.

    A regression of log q on log π (VarGrad: Richter et al., NeurIPS 2020; with a given Z the moment loss of Nüsken and
    Richter, arXiv 2005.05409). It has its minimum at q = π whatever distribution y has (with support there), needs no
    forces, and its gradient vanishes sample by sample at the optimum, where that of a likelihood keeps the noise of
    finite batches. Residuals are clipped: a steric clash must not own a batch.

    Z is not the mean over the batch. Where π vanishes, log π - log q has no value, and a flow that lost a tenth of its
    mass to such places has the same residual, log 10/9, everywhere else: subtract the mean and nothing brings the mass
    back. The right Z leaves that residual in the gradient.

    Parameters
    ----------
    y
        [B, D] samples, from the flow, MD, or both.
    log_density
        [B] log π(y, s) up to a constant, finite where kept, s the same for all samples.
    log_z
        Logarithm of the mean importance weight over *all* samples drawn, those with π = 0 included.
    clip
        Residuals lie within ±clip (kT).
    keep
        [B] bool, the samples that count; all if None.

    Returns
    -------
    VarianceResult
        ``loss`` is the surrogate ``-mean(r log q)`` with r held fixed, half the gradient of mean(r²); both NaN if no
        sample counts.
    """
    if keep is None:
        keep = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
    # In the place of rows that do not count one that does passes the flow: where theirs is infinite the sum were NaN.
    one = y.index_select(0, keep.to(torch.uint8).argmax().reshape(1))
    log_q = density.log_prob(torch.where(keep[:, None], y, one))
    residual = (log_density.double() - log_q.detach().double() - log_z).clamp(-clip, clip).to(log_q.dtype)
    residual = torch.where(keep, residual, 0.0)
    return VarianceResult(-(residual * log_q).sum() / keep.sum(), residual.square().sum() / keep.sum())


def backbone_distances(positions: Tensor, atom_indices: Tensor, offset: int = 1) -> Tensor:
    """Distances between named atoms, the upper triangle of their matrix from diagonal `offset` on.

    Parameters
    ----------
    positions
        [B, N, 3], nm.
    atom_indices
        [n] atoms, usually N, Cα and C of every residue.

    Returns
    -------
    Tensor
        [B, P] nm; P = n (n - 1) / 2 for offset 1.
    """
    atoms = positions[:, atom_indices]
    i, j = torch.triu_indices(atoms.shape[1], atoms.shape[1], offset, device=positions.device)
    return torch.linalg.vector_norm(atoms[:, i] - atoms[:, j], dim=-1)


def w2_distance(xq: Tensor, xp: Tensor, keep: Tensor | None = None, outside: Outside = called) -> Tensor:
    """Squared 2-Wasserstein (Fréchet) distance between Gaussian fits of two batches, in float64.

    With ``A = (X - mean) / sqrt(B - 1)``: ``|Δmean|² + ‖A_q‖²_F + ‖A_p‖²_F - 2 ‖A_q A_pᵀ‖_*``, for the
    nonzero singular values of ``A_q A_pᵀ`` are the square roots of the eigenvalues of Σ_q Σ_p, whose P × P
    matrices are never formed (docs/theory.md, Losses). The gradient of the nuclear norm is the polar factor U Vᵀ over
    the nonzero singular values: no gap between them divides it, so degenerate ones are harmless, and the norm itself is
    the product of the matrix with that factor held fixed.

    Parameters
    ----------
    xq, xp
        [B1, P] and [B2, P]; the numbers of samples may differ, both at least 2.
    keep
        [B1] bool: the rows of `xq` that count, all if None. The distance is NaN if fewer than 2 do; rows that do not
        count may be anything.
    outside
        Calls the decomposition, which waits for a GPU (`openmm_bg.training.graphs`).
    """
    xq, xp = xq.double(), xp.double()
    if keep is None:
        keep = torch.ones(xq.shape[0], dtype=torch.bool, device=xq.device)
    # Rows of zeros, after centring, add nothing to any of the terms.
    n_q = keep.sum().double()
    mean_q, mean_p = torch.where(keep[:, None], xq, 0.0).sum(dim=0) / n_q, xp.mean(dim=0)
    few = torch.where(n_q > 1, 1.0, torch.nan)
    a_q = torch.where(keep[:, None], xq - mean_q, 0.0) / (n_q - 1).sqrt() * few
    a_p = (xp - mean_p) / (xp.shape[0] - 1) ** 0.5
    cross = a_q @ a_p.T
    nuclear = (outside(_polar_factor, cross.detach()) * cross).sum()
    return (mean_q - mean_p).square().sum() + a_q.square().sum() + a_p.square().sum() - 2.0 * nuclear


def _polar_factor(matrix: Tensor) -> Tensor:
    """U Vᵀ over the singular values that are not zero but for rounding; NaN for a matrix that is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.full_like(matrix, torch.nan)
    u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    # A centred batch has a null direction, where U and V are arbitrary: it takes no part.
    return (u * (singular > singular.max() * 1e-12)) @ vh


def evaluate_target(
    target: Any,
    y: Tensor,
    s: Tensor,
    *,
    regulariser: Regulariser | None = None,
    reference: float = 0.0,
    gradient: bool = True,
) -> Evaluation:
    """Target density and the gradient of its regularised energy at y [B, D], s [B, S].

    The energy is ``reference + regulariser(-log π - reference)``. The target is evaluated in float64 on
    detached coordinates: samples whose energy or gradient is not finite can then be left out for good,
    where a NaN inside a larger graph would reach every parameter.
    """
    with torch.enable_grad():
        leaf = y.detach().double().requires_grad_(gradient)
        log_density = target.log_density(leaf, s.detach().double())
        finite = torch.isfinite(log_density.detach())
        # The value of the branch not taken must be finite, or the regulariser's gradient is NaN there.
        raw = torch.where(finite, -log_density, torch.full_like(log_density, reference)) - reference
        energy = reference + (raw if regulariser is None else regulariser(raw))
        slope = torch.zeros_like(leaf)
        if gradient and energy.requires_grad:
            (slope,) = torch.autograd.grad(torch.where(finite, energy, 0.0).sum(), leaf)
    finite = finite & torch.isfinite(slope).all(dim=1)
    slope = torch.where(finite[:, None], slope, torch.zeros_like(slope))
    return Evaluation(log_density.detach().double(), energy.detach().double(), slope.detach(), finite)


def reverse_kl_of_samples(
    y: Tensor,
    log_q: Tensor,
    s: Tensor,
    target: Any,
    *,
    regulariser: Regulariser | None = None,
    reference: float = 0.0,
    outside: Outside = called,
) -> KLResult:
    """`reverse_kl` for samples y [B, D] already pushed through the flow; log_q [B] is their log density.

    Both carry the graph of the flow's parameters. `outside` calls the target, which may be anything but torch.
    """
    evaluation = Evaluation(
        *outside(partial(evaluate_target, target, regulariser=regulariser, reference=reference), y.detach(), s)
    )
    keep = evaluation.finite & torch.isfinite(log_q.detach()) & torch.isfinite(y.detach()).all(dim=1)
    n = keep.sum()
    log_w = evaluation.log_density - log_q.detach().double()
    # Value of the energy, and its gradient handed to the samples as a constant.
    change = torch.where(keep[:, None], y - y.detach(), 0.0).double()
    energy_term = torch.where(keep, evaluation.energy, 0.0).sum() + (evaluation.gradient * change).sum()
    loss = (energy_term + torch.where(keep, log_q, 0.0).double().sum()) / n
    return KLResult(loss.to(y.dtype), keep.numel() - n, log_w)


def reverse_kl(
    density: Any,
    target: Any,
    z: Tensor,
    s: Tensor,
    *,
    regulariser: Regulariser | None = None,
    reference: float = 0.0,
) -> KLResult:
    """Reverse KL up to log Z: ``E_z[u(x) - log J - Φ - log|det dy/dz| + log b(z)]`` (training by energy).

    The term ``log b(z)`` does not depend on the parameters; with it the value is
    ``KL(q || π) - log Z`` of the regularised target. With s fixed the optimum is the conditional π(y|s), with
    s drawn from data an average of conditionals: neither is the marginal that NLL fits.

    Parameters
    ----------
    z
        [B, D] samples of the base, in the dtype of training.
    s
        [B, S] the coordinates that the flow does not model.
    regulariser
        Applied to the reduced energy counted from `reference`; see `openmm_bg.energy.regularise_energy`.

    Returns
    -------
    KLResult
        Samples without a finite energy and force are left out and counted.
    """
    y, logdet = density(z)
    log_q = density.base_log_prob(z).detach() - logdet
    return reverse_kl_of_samples(y, log_q, s, target, regulariser=regulariser, reference=reference)


def path_gradient(
    density: Any,
    y: Tensor,
    target_gradient: Tensor,
    log_w: Tensor | None = None,
    *,
    finite: Tensor | None = None,
) -> PathResult:
    """Path-gradient estimator of the KL divergence for weighted samples of any proposal.

    With ``z = f⁻¹(y)`` and ``g = ∇log π(y) - ∇log q_θ(y)``, both without parameter gradients, the surrogate
    ``-mean_w[g · f_θ(z)]`` has the parameter gradient ``-E_w[gᵀ ∂f_θ(z)/∂θ]``. For unweighted samples of q_θ
    it is that of the reverse KL (Roeder, Wu and Duvenaud 2017), for samples of the target, or reweighted to
    it, that of the forward KL (Vaitl et al. 2022, 2024). At the optimum g = 0 for every sample: no noise.
    For frames (y, s) of the joint target, ``E[∇_y log π(y,s) | y]`` is the score of the marginal of y, so the
    estimate stays unbiased for the marginal, if no longer free of noise.

    Only the derivative of f_θ(z) enters, so the branch of a circular or folded coordinate does not matter.
    Dropout is off: f and its inverse must be the same map.

    Parameters
    ----------
    y
        [B, D] samples in the dtype of training.
    target_gradient
        [B, D] ∇_y log π, any constant factor of π is irrelevant.
    log_w
        [B] log-weights, or None for equal ones; normalised over the batch.
    finite
        [B] samples to keep; others, and those where log q has no finite gradient, are left out.
    """
    with evaluation_mode(density):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_(True)
            z, logdet = density.inverse(leaf)
            log_q = density.base_log_prob(z) + logdet
            (score_q,) = torch.autograd.grad(log_q.sum(), leaf)
        z = z.detach()
        g = target_gradient.to(y.dtype) - score_q
        keep = torch.isfinite(g).all(dim=1) & torch.isfinite(z).all(dim=1)
        if finite is not None:
            keep = keep & finite
        if log_w is not None:
            keep = keep & torch.isfinite(log_w)
        # Rows that are left out pass the flow as 0, for a NaN in its graph would reach every parameter.
        moved, _ = density(torch.where(keep[:, None], z, 0.0))
    g = torch.where(keep[:, None], g, 0.0)
    weights = keep.double()
    if log_w is not None:
        log_w = torch.where(keep, log_w, -torch.inf)
        weights = torch.exp(log_w - log_w.max())  # none is kept: NaN
    surrogate = -weighted_mean((g * (moved - moved.detach())).sum(dim=1), weights)
    return PathResult(surrogate, weighted_mean(g.square().sum(dim=1), weights), keep.numel() - keep.sum())
