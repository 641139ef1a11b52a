"""Nonequilibrium candidate moves on a Context, with s frozen (formula G of docs/theory.md).

The rule and its legs are those of `annealing`; here they walk in the latent variables of a sampler's flow, at the s and
the place of the Context's own positions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from openmm_bg.matching import require_count
from openmm_bg.moves.base import ContextMove
from openmm_bg.moves.latent import require_steps
from openmm_bg.rules import annealing, metropolis
from openmm_bg.sampler import BoltzmannGeneratorSampler
from openmm_bg.standing import Report, Standing, place

FloatArray = NDArray[np.float64]


class NonequilibriumMove(ContextMove):
    """Formula G on a sampler's Context: down to the flow, a fresh draw, up to the target; α = min(1, W_up / W_down).

    Between two values of λ the state relaxes by Metropolised latent steps, so that more is accepted than of the fresh
    draws of formula D. One move costs about 2 · n_kernel_steps · (len(schedule) - 1) energies, one after the other.
    What the flow does not model stays, as in `BoltzmannGeneratorSampler.step`.

    Parameters
    ----------
    sampler
        Its Context, flow, target and random stream are used.
    schedule
        Increasing λ from 0 to 1, such as ``numpy.linspace(0, 1, 11)``. Choose it, and the steps, before the run.
    a, width
        Steps of Gaussian latent coordinates, in (0, 1], and of circular ones (rad).
    n_kernel_steps
        Latent steps at each λ.

    Attributes
    ----------
    info
        All moves so far, joined; None before the first. Its n_energies counts all evaluations of both legs.

    Raises
    ------
    InputError
        A schedule that does not lead from 0 to 1; steps out of range.

    References
    ----------
    Nilmeier, Crooks, Minh and Chodera, Proc. Natl. Acad. Sci. USA 108, E1009 (2011).

    Examples
    --------
    >>> move = bg.NonequilibriumMove(sampler, numpy.linspace(0, 1, 11))  # doctest: +SKIP
    >>> simulation.reporters.append(bg.MoveReporter(move, 500))  # doctest: +SKIP
    """

    def __init__(
        self,
        sampler: BoltzmannGeneratorSampler,
        schedule: ArrayLike,
        *,
        a: float = 0.3,
        width: float = 0.3,
        n_kernel_steps: int = 1,
    ) -> None:
        super().__init__(sampler)
        require_count("n_kernel_steps", n_kernel_steps)
        require_steps(a, width)
        self.schedule = annealing.check_schedule(schedule)
        self._kernel = annealing.latent_kernel(**sampler.space.base, a=a, width=width, n_steps=n_kernel_steps)

    def step(self, n: int = 1) -> Report:
        """n moves on the Context's own positions.

        Velocities are carried over to accepted positions (`velocities`); if nothing was accepted the Context is not
        touched at all.

        Raises
        ------
        InputError
            n < 1, NaN positions.
        EnergyError
            The Context no longer has the energies of its System.
        """
        require_count("The number of moves", n)
        standing = self.sampler.stand()
        z = standing.z
        total: metropolis.Info | None = None
        chosen: Tensor | None = None
        for _ in range(n):
            state, info = self._move(z, standing)
            if info.n_accepted:
                z = state.value
                chosen = place(self.sampler.coordinates, standing, self.sampler.space.forward(z)[0])[0][0]
            total = info if total is None else total + info
        assert total is not None
        self._count(total)
        return self.sampler.settle(standing, total, chosen)

    def _move(self, z: FloatArray, standing: Standing) -> tuple[metropolis.State, metropolis.Info]:
        if not standing.inside:  # q = 0: no leg is worth its energies, the rule keeps the state
            state = metropolis.State(z, np.array([np.inf]))
            return metropolis.metropolis_step(state, metropolis.State(z, np.array([-np.inf])), self.sampler.rng)

        space = self.sampler.space

        def log_target(z: FloatArray) -> FloatArray:
            """log π(f(z), s) + log |det|."""
            y, log_det = space.forward(z)
            zero = torch.zeros(len(y), dtype=torch.float64)
            return self.sampler.weigh(standing, y, zero)[1] + log_det.numpy()

        return annealing.nonequilibrium_candidate_move(
            z, space.log_base, log_target, space.draw, self._kernel, self.schedule, self.sampler.rng
        )
