"""Nonequilibrium candidate moves through a flow in openmmtools (formula G of docs/theory.md, s frozen)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.errors import InputError
from openmm_bg.mcmc.base import FlowMove, Options, ReducedPotential, checked_count, checked_step
from openmm_bg.proposals import FlowProposals, Outcome
from openmm_bg.rules.annealing import check_schedule

#: λ of the default protocol.
SCHEDULE = tuple(k / 10 for k in range(11))


def _checked_schedule(name: str, value: Any) -> list[float]:
    """λ as plain floats, or `InputError`."""
    try:
        return [float(lam) for lam in check_schedule(value)]
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The {name} must be a list of λ, got {value!r}.") from error


class NonequilibriumFlowMove(FlowMove):
    """Nonequilibrium candidate moves (formula G), exact like `BoltzmannGeneratorMove`.

    Each leads down from the force field to the flow, draws afresh and leads up again, with Metropolised latent steps
    at every λ on either way; α = min(1, W_up / W_down). Worth its energies where fresh proposals are hardly ever
    accepted: it costs about 2 · n_kernel_steps · (len(schedule) - 1) of them, one after the other. What the flow does
    not model stays, as in the other moves; the work is that of the state's own reduced potential.

    Parameters
    ----------
    flow_path, atom_subset
        As for `BoltzmannGeneratorMove`.
    n_steps
        Candidate moves at each application.
    schedule
        Increasing λ from 0 to 1, such as ``numpy.linspace(0, 1, 21)``. Choose it, and the steps, before the run.
    step
        Of the latent steps at every λ, as for `LatentFlowMove`.
    n_kernel_steps
        Latent steps at each λ.

    Attributes
    ----------
    statistics
        As for `BoltzmannGeneratorMove`, of candidate moves.

    Raises
    ------
    ArtifactError, InputError
        As for `BoltzmannGeneratorMove`; a schedule that does not lead from 0 to 1, a step outside (0, 1],
        n_kernel_steps below 1.

    References
    ----------
    Nilmeier, Crooks, Minh and Chodera, Proc. Natl. Acad. Sci. USA 108, E1009 (2011).
    """

    __module__ = "openmm_bg.mcmc"  # the path that openmmtools stores
    _OPTIONS: ClassVar[Options] = {"schedule": _checked_schedule, "step": checked_step, "n_kernel_steps": checked_count}
    schedule: list[float]
    step: float
    n_kernel_steps: int

    def __init__(
        self,
        flow_path: str | os.PathLike[str],
        n_steps: int = 1,
        schedule: ArrayLike = SCHEDULE,
        step: float = 0.3,
        n_kernel_steps: int = 1,
        atom_subset: Sequence[int] | None = None,
    ) -> None:
        super().__init__(flow_path, n_steps, atom_subset, schedule=schedule, step=step, n_kernel_steps=n_kernel_steps)

    def _walk(
        self,
        proposals: FlowProposals,
        positions: np.ndarray,
        reduced_potential: ReducedPotential,
        rng: np.random.Generator,
    ) -> Outcome:
        return proposals.switching_chain(
            positions,
            reduced_potential,
            rng,
            schedule=self.schedule,
            n_steps=self.n_steps,
            step=self.step,
            n_kernel_steps=self.n_kernel_steps,
        )
