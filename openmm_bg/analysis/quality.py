"""How good a flow is: its weights in total and inside states, on fresh samples and on MD frames it never saw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from openmm_bg.coordinates import CoordinateMap
from openmm_bg.energy import Target
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.free_energy import state_difference, statistical_inefficiency
from openmm_bg.rules import metropolis
from openmm_bg.weights import effective_sample_size, forward_ess


def reverse_figures(ensemble: Ensemble, inside: ArrayLike) -> dict[str, float]:
    """Figures of fresh samples (docs/theory.md, rule 8), in total and inside and outside one state.

    Parameters
    ----------
    ensemble
        What `BoltzmannGeneratorSampler.sample` returns.
    inside
        [n] bool, which samples lie in the state.

    Returns
    -------
    dict
        ``samples``, ``ess``, ``ess_inside``, ``ess_outside`` (fractions), ``khat``, ``max_weight``, ``n_nonfinite``,
        and ``delta_f``, ``delta_f_error`` of the state against the rest, kT.
    """
    mask = np.asarray(inside, dtype=bool)
    value, error = state_difference(ensemble.log_weights, ~mask, mask)
    return {
        "samples": ensemble.n,
        "ess": ensemble.ess,
        "ess_inside": effective_sample_size(ensemble.log_weights[mask]),
        "ess_outside": effective_sample_size(ensemble.log_weights[~mask]),
        "khat": ensemble.khat,
        "max_weight": ensemble.max_weight,
        "n_nonfinite": ensemble.n_nonfinite,
        "delta_f": value,
        "delta_f_error": error,
    }


def frame_log_weights(
    density: Any, coordinates: CoordinateMap, target: Target, positions: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """log w [n] of MD frames [n, N, 3] (nm), and whether each lies in the sector that the flow models [n].

    log π - log q, and of a `reduced` flow with a completion log π - log q - log g: what `free_energy.bar` needs beside
    the weights of `BoltzmannGeneratorSampler.sample`. +inf where q = 0, inside the sector or outside.

    Parameters
    ----------
    density
        A `Flow`; of a `full` one its density does as well.
    coordinates, target
        Those of a sampler: the System's masses and constraints, its energies and temperature.
    positions
        [n, N, 3] nm; decorrelated for BAR.

    Raises
    ------
    InputError
        A `reduced` flow without a completion: its density is not one of all coordinates. Positions that are not
        [n, N, 3] of the molecule's atoms, not finite, or, going by the first frame, not in nm or not whole.
    """
    completed = getattr(density, "completion", None) is not None
    if not completed and not all(c.constrained or c.modelled for c in coordinates.coordinates):
        raise InputError(
            "A reduced flow without a completion has no forward weights: they need a density of every coordinate."
        )
    x = _frames(coordinates, positions)
    found, sector = np.full(len(x), np.inf), np.zeros(len(x), dtype=bool)
    for start in range(0, len(x), 2048):
        y, s = coordinates.to_internal(x[start : start + 2048])
        inside = coordinates.in_domain(y, s)
        rows = start + np.flatnonzero(inside.numpy())
        sector[rows] = True
        if len(rows):
            y, s = y[inside], s[inside]
            with torch.no_grad():
                log_q = density.joint_log_prob(y, s) if completed else density.log_prob(y)
                found[rows] = (target.log_density(y, s) - log_q).numpy()
    return found, sector


def _frames(coordinates: CoordinateMap, positions: ArrayLike) -> torch.Tensor:
    """Positions [n, N, 3] in float64 that can be those of MD frames of the molecule."""
    try:
        array = np.array(positions, dtype=np.float64, order="C")  # a copy, for torch takes no views or read-only arrays
    except (TypeError, ValueError) as failure:
        raise InputError(
            f"positions must be plain numbers [n, {coordinates.n_atoms}, 3] in nm, not {type(positions).__name__}."
        ) from failure
    if array.ndim != 3 or array.shape[1:] != (coordinates.n_atoms, 3) or len(array) == 0:
        hint = " (of a single frame x, pass x[None])" if array.shape == (coordinates.n_atoms, 3) else ""
        raise InputError(
            f"positions must have shape [n, {coordinates.n_atoms}, 3], those of the flow's molecule, got "
            f"{list(array.shape)}{hint}."
        )
    broken = np.flatnonzero(~np.isfinite(array).all(axis=(1, 2)))
    if broken.size:
        raise InputError(
            f"{broken.size} frames hold positions that are not finite, first frame {broken[0]}: leave them out."
        )
    x = torch.from_numpy(array)
    # A wrong unit shows in any frame; one is looked at, as `BoltzmannGeneratorSampler.stand` does.
    coordinates.require_lengths(*coordinates.to_internal(x[:1]))
    return x


def forward_figures(log_w: ArrayLike, inside: ArrayLike) -> dict[str, float]:
    """Forward ESS over decorrelated MD frames of the sector, and how many frames lay outside it.

    Parameters
    ----------
    log_w, inside
        [n], from `frame_log_weights`. A frame of the sector with q = 0 makes the forward ESS zero.

    Raises
    ------
    InputError
        No frame lies in the sector.
    """
    mask = np.asarray(inside, dtype=bool)
    if not mask.any():
        raise InputError("No MD frame lies in the sector that the flow models.")
    kept = np.asarray(log_w, dtype=np.float64)[mask]
    return {"frames": kept.size, "frames_outside": int((~mask).sum()), "forward_ess": forward_ess(kept)}


def chain_figures(log_weights: ArrayLike, inside: ArrayLike, seed: int = 0) -> dict[str, float]:
    """A pure chain of formula D through independent samples, each offered once.

    Parameters
    ----------
    log_weights, inside
        [n] of the samples: log-weights, and whether they lie in the state whose visits are timed.
    seed
        Of the accept/reject draws.

    Returns
    -------
    dict
        ``acceptance``, ``longest_rejection_streak``, and ``energies_per_independent_sample``: the statistical
        inefficiency of the state's indicator, one energy a step.
    """
    log_w, mask = np.asarray(log_weights, dtype=np.float64), np.asarray(inside, dtype=bool)
    index, info = metropolis.independence_chain(log_w[0], log_w[1:], np.random.default_rng(seed))
    visited = mask[np.where(index < 0, 0, index + 1)]
    return {
        "steps": info.n_proposed,
        "acceptance": info.acceptance_rate,
        "longest_rejection_streak": info.longest_rejection_streak,
        "energies_per_independent_sample": statistical_inefficiency(visited),
    }
