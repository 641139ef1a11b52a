"""Local steps in a flow's latent space in openmmtools (formula F of docs/theory.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from openmm_bg.mcmc.base import FlowMove, Options, ReducedPotential, checked_step
from openmm_bg.proposals import FlowProposals, Outcome


class LatentFlowMove(FlowMove):
    """Local Metropolis steps in a flow's latent space (formula F), exact like `BoltzmannGeneratorMove`.

    A step moves all modelled coordinates a little, along the flow's own directions: what is left to do where fresh
    proposals are hardly ever accepted, as for larger molecules or a molecule among others.

    Parameters
    ----------
    flow_path, n_steps, atom_subset
        As for `BoltzmannGeneratorMove`.
    step
        a of the Gaussian dimensions, in (0, 1], and width (rad) of the walk on the circular ones. Choose it in a run of
        its own (an acceptance between a quarter and a half serves well) and leave it alone: the move never adapts it.

    Attributes
    ----------
    statistics
        As for `BoltzmannGeneratorMove`.

    Raises
    ------
    ArtifactError, InputError
        As for `BoltzmannGeneratorMove`; a step outside (0, 1].
    """

    __module__ = "openmm_bg.mcmc"  # the path that openmmtools stores
    _OPTIONS: ClassVar[Options] = {"step": checked_step}
    step: float

    def __init__(
        self,
        flow_path: str | os.PathLike[str],
        n_steps: int = 1,
        step: float = 0.3,
        atom_subset: Sequence[int] | None = None,
    ) -> None:
        super().__init__(flow_path, n_steps, atom_subset, step=step)

    def _walk(
        self,
        proposals: FlowProposals,
        positions: np.ndarray,
        reduced_potential: ReducedPotential,
        rng: np.random.Generator,
    ) -> Outcome:
        return proposals.latent_chain(positions, reduced_potential, rng, n_steps=self.n_steps, step=self.step)
