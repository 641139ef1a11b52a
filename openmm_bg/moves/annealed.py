"""Annealed importance sampling for a sampler's flow and System, with s frozen (formula H of docs/theory.md)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.matching import require_count
from openmm_bg.moves.latent import require_steps
from openmm_bg.rules.annealing import annealed_importance_sampling, check_schedule, latent_kernel
from openmm_bg.rules.metropolis import Info
from openmm_bg.sampler import CHUNK, BoltzmannGeneratorSampler

FloatArray = NDArray[np.float64]


def anneal(
    sampler: BoltzmannGeneratorSampler,
    n: int,
    schedule: ArrayLike,
    *,
    a: float = 0.3,
    width: float = 0.3,
    n_steps: int = 1,
    seed: int | None = None,
) -> tuple[Ensemble, Info]:
    """Formula H for a sampler's flow and System: what `sampler.sample(n)` gives, with annealed weights.

    The target, its label ("exact" or "rigid") and what is refused are those of `sampler.sample`. It costs about
    n · n_steps · (len(schedule) - 1) energies; the Context is left alone, the sampler's own random stream moves on.

    Parameters
    ----------
    sampler : BoltzmannGeneratorSampler
    n : int
        Number of walkers. All of them advance together; besides the result memory holds a few [n, D] arrays.
    schedule : array_like
        Increasing λ from 0 to 1.
    a, width, n_steps
        Of `latent_kernel`. An acceptance rate below 0.2 asks for smaller steps in a *new* run.
    seed : int, optional

    Returns
    -------
    ensemble : Ensemble
        At the walkers' last positions; its log_weights are log W, its log_q and reduced potentials are of those
        positions and do not enter the weights again.
    info : Info
        Of the kernels' steps.

    Raises
    ------
    InputError
        As `sampler.sample` and `annealed_importance_sampling`; a seed that is no whole number of at least 0.
    EnergyError
        The Context no longer has the energies of its System.
    """
    require_count("The number of walkers", n)
    require_count("n_steps", n_steps)
    require_steps(a, width)
    check_schedule(schedule)
    try:
        rng = np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise InputError(f"The seed must be a whole number of at least 0, got {seed!r}.") from error
    sampler.sample(1)  # refuses what formula A refuses, and fetches the parameters and box of the Context
    coordinates, space = sampler.coordinates, sampler.space
    fixed = coordinates.reference_fixed

    def evaluate(z: FloatArray, keep: bool = False) -> tuple[FloatArray, ...]:
        """log π + log|det|, and with `keep` log|det|, u and positions."""
        out: list[list[FloatArray]] = []
        for start in range(0, len(z), CHUNK):
            y, log_det = space.forward(z[start : start + CHUNK])
            s = fixed.expand(len(y), -1)
            log_pi, x = sampler.target.log_density_and_positions(y, s)
            row = [(log_pi + log_det).numpy()]
            if keep:
                u = (coordinates.log_volume(y, s) - log_pi).nan_to_num(nan=torch.inf, posinf=torch.inf)
                row += [log_det.numpy(), u.numpy(), x.numpy()]
            out.append(row)
        return tuple(np.concatenate(column) for column in zip(*out, strict=True))

    kernel = latent_kernel(**space.base, a=a, width=width, n_steps=n_steps)
    z, log_w, info = annealed_importance_sampling(
        space.log_base, lambda z: evaluate(z)[0], space.draw, kernel, schedule, n, rng
    )
    _, log_det, reduced, positions = evaluate(z, keep=True)
    return (
        Ensemble(
            positions=positions,
            reduced_potentials=reduced,
            log_q=space.log_base(z) - log_det,
            log_weights=log_w,
            n_nonfinite=int(np.isneginf(log_w).sum()),
            label=sampler.label,
            topology=sampler.flow.topology,
        ),
        info,
    )
