"""Figures that need densities and energies: likelihood, weights of formulas A to C, acceptance of partial moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from openmm_bg.artifact import Flow
from openmm_bg.errors import InputError
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.rules import metropolis
from openmm_bg.sampler import BoltzmannGeneratorSampler
from openmm_bg.weights import effective_sample_size, khat_threshold, max_weight, pareto_khat

FloatArray = NDArray[np.float64]
Advance = Callable[[int], object]

KCAL = 4.184  # kJ
#: Frames that go through the flow at once.
_CHUNK = 512
#: Samples drawn at once, between two steps of a progress bar.
_SAMPLES = 1000


@dataclass(frozen=True)
class Samples:
    """Positions [m, N, 3] nm (float32) of the n samples that lie in the domain, and of all n: energies, log-weights.

    ``energies`` [n] kcal/mol, +inf where there is none; ``log_weights`` [n]; ``label`` as `Ensemble.label`.
    """

    positions: NDArray[np.float32]
    energies: FloatArray
    log_weights: FloatArray
    label: str


def draw(
    sampler: BoltzmannGeneratorSampler, n: int, *, completion: bool | None = None, advance: Advance | None = None
) -> Samples:
    """n samples with their energies and weights, in pieces; what is kept is 12 N + 16 bytes a sample.

    Parameters
    ----------
    sampler, n, completion
        As in `BoltzmannGeneratorSampler.sample`.
    advance
        Told the number of samples of each piece that is done.
    """
    parts, energies, log_w = [], [], []
    label: str = sampler.label
    for start in range(0, n, _SAMPLES):
        ensemble = sampler.sample(min(_SAMPLES, n - start), completion=completion)
        keep = np.isfinite(ensemble.positions).all((1, 2))
        parts.append(ensemble.positions[keep].astype(np.float32))
        energies.append(ensemble.reduced_potentials * sampler.target.kT / KCAL)
        log_w.append(ensemble.log_weights)
        label = ensemble.label
        if advance is not None:
            advance(ensemble.n)
    return Samples(np.concatenate(parts), np.concatenate(energies), np.concatenate(log_w), label)


def frame_energies(
    sampler: BoltzmannGeneratorSampler, positions: ArrayLike, advance: Advance | None = None
) -> FloatArray:
    """Potential energies [n] in kcal/mol of frames [n, N, 3] (nm)."""
    x = np.asarray(positions)
    found = np.empty(len(x))
    for start in range(0, len(x), _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(x)))
        found[rows] = sampler.pool.energies(x[rows].astype(np.float64)) / KCAL
        if advance is not None:
            advance(rows.stop - rows.start)
    return found


def energy_figures(energies: ArrayLike) -> dict[str, float]:
    """Median of energies, and mean and standard deviation of those below it.

    A handful of clashes owns the mean of all energies, so the paper gives the mean below the median.

    Parameters
    ----------
    energies : array_like, shape [n]
        +inf counts as above every other.

    Returns
    -------
    dict
        ``median``, ``below_median_mean`` and ``below_median_sd`` in the unit of the energies; ``nonfinite``, how many
        are not finite.

    Raises
    ------
    InputError
        There is none.

    References
    ----------
    Kim et al., arXiv 2401.04246 (2024), Table 1.
    """
    array = np.asarray(energies, np.float64)
    array = np.sort(np.where(np.isfinite(array), array, np.inf))
    if array.size == 0:
        raise InputError("There are no energies.")
    lower = array[: max(1, array.size // 2)]
    lower = lower[np.isfinite(lower)]
    return {
        "median": _median(array),
        "below_median_mean": float(lower.mean()) if lower.size else float("inf"),
        "below_median_sd": float(lower.std(ddof=1)) if lower.size > 1 else float("nan"),
        "nonfinite": int((~np.isfinite(array)).sum()),
    }


def _median(ordered: FloatArray) -> float:
    low, high = ordered[(ordered.size - 1) // 2], ordered[ordered.size // 2]
    return float(high if np.isinf(high) else 0.5 * (low + high))


def weight_figures(log_weights: ArrayLike, formula: str, label: str) -> dict[str, Any]:
    """ESS, Pareto k̂ and largest share of the weights of one formula of docs/theory.md.

    Parameters
    ----------
    log_weights : array_like, shape [n]
    formula : {"A", "B", "C"}
    label : {"exact", "rigid"}
        What the weights are exact for.
    """
    array = np.asarray(log_weights, np.float64)
    return {
        "formula": formula,
        "label": label,
        "samples": array.size,
        "ess": effective_sample_size(array),
        "khat": pareto_khat(array),
        "khat_threshold": khat_threshold(array.size),
        "max_weight": max_weight(array),
        "weight_zero": int(np.isneginf(array).sum()),
    }


def _log_q(flow: Flow, y: Tensor, device: torch.device) -> FloatArray:
    with torch.no_grad():
        return flow.log_prob(y.to(device, torch.float64)).to("cpu", torch.float64).numpy()


def held_out_nll(
    flow: Flow, positions: ArrayLike, device: torch.device | None = None, advance: Advance | None = None
) -> dict[str, Any]:
    """Negative log-likelihood of frames under the flow, in nats.

    It is that of the density in the modelled internal coordinates themselves (rad and nm, not standardised), so that
    values of flows of one representation compare, and those of `full` and `reduced` do not.

    Parameters
    ----------
    flow : Flow
        On ``device``.
    positions : array_like, shape [n, N, 3]
        nm, in the order of time.
    device
        Where the flow is; None is the CPU.
    advance
        Told the number of frames of each piece that is done.

    Returns
    -------
    dict
        ``total`` and its standard error ``total_error`` (from the statistical inefficiency of the frames), ``per_dof``
        and ``per_dof_error`` (divided by ``dof``, the modelled degrees of freedom), ``frames`` that count, and
        ``outside``, those outside the sectors that the flow models; +inf if the flow cannot produce one that counts.

    Raises
    ------
    InputError
        No frame lies in the sectors.
    """
    x = np.asarray(positions)
    values = []
    for start in range(0, len(x), _CHUNK):
        frames = torch.as_tensor(x[start : start + _CHUNK], dtype=torch.float64)
        y, s = flow.coordinates.to_internal(frames)
        inside = flow.coordinates.in_domain(y, s)
        if bool(inside.any()):
            values.append(-_log_q(flow, y[inside], device or torch.device("cpu")))
        if advance is not None:
            advance(len(frames))
    if not values:
        raise InputError("None of the frames lies in the sectors that the flow models: are they of its molecule?")
    nll = np.concatenate(values)
    dof = flow.coordinates.n_modelled
    total = float(nll.mean())
    error = float("nan")
    if nll.size > 1 and np.isfinite(nll).all():
        error = float(nll.std(ddof=1) * np.sqrt(statistical_inefficiency(nll) / nll.size))
    return {
        "total": total,
        "total_error": error,
        "per_dof": total / dof,
        "per_dof_error": error / dof,
        "dof": dof,
        "frames": nll.size,
        "outside": len(x) - nll.size,
    }


def partial_move_acceptance(
    sampler: BoltzmannGeneratorSampler,
    positions: ArrayLike,
    n_proposals: int = 256,
    seed: int = 0,
    advance: Advance | None = None,
) -> dict[str, float]:
    """Acceptance of formula D of docs/theory.md from equilibrium frames, a batch of proposals for each.

    Each frame keeps its own s. The mean of min(1, w'/w) over frames and proposals is the acceptance rate of the
    chain in equilibrium; a chain that leaves its first frame would mix proposals into the starts.

    Parameters
    ----------
    sampler : BoltzmannGeneratorSampler
    positions : array_like, shape [n, N, 3]
        nm; frames of the target's ensemble, decorrelated.
    n_proposals : int
        A frame.
    seed : int
    advance
        Told 1 for every frame that is done.

    Returns
    -------
    dict
        ``acceptance`` and its standard error over frames ``acceptance_error`` (NaN for one frame), ``expected`` number
        of proposals to an acceptance (+inf if none), ``frames``, ``proposals`` (a frame), ``outside`` (frames that the
        flow cannot produce; they stay, and count with zero).
    """
    x, flow, coordinates = np.asarray(positions), sampler.flow, sampler.coordinates
    rng = np.random.default_rng(seed)
    rates, outside = np.zeros(len(x)), 0
    for k in range(len(x)):
        y0, s = coordinates.to_internal(torch.as_tensor(x[k : k + 1], dtype=torch.float64))
        log_q = _log_q(flow, y0, sampler.device)[0] if bool(coordinates.in_domain(y0, s)[0]) else -np.inf
        if log_q > -np.inf:
            devices = [sampler.device] if sampler.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(int(rng.integers(2**62)))
                y, lq = (part.to("cpu", torch.float64) for part in flow.sample(n_proposals))
            log_w = (sampler.target.log_density(y, s.expand(len(y), -1)) - lq).numpy()
            log_w = np.where(np.isfinite(log_w), log_w, -np.inf)
            current = float(sampler.target.log_density(y0, s)[0]) - log_q
            rates[k] = np.exp(metropolis.log_acceptance(np.full(n_proposals, current), log_w)).mean()
        else:
            outside += 1
        if advance is not None:
            advance(1)
    mean = float(rates.mean())
    return {
        "acceptance": mean,
        "acceptance_error": float(rates.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan"),
        "expected": 1.0 / mean if mean > 0 else float("inf"),
        "frames": len(x),
        "proposals": n_proposals,
        "outside": outside,
    }
