"""Fresh proposals of a flow in openmmtools (formulas D and E of docs/theory.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from openmm_bg.mcmc.base import FlowMove, Options, ReducedPotential, checked_count
from openmm_bg.proposals import FlowProposals, Outcome


class BoltzmannGeneratorMove(FlowMove):
    """Metropolis steps with a flow's proposals, exact for the thermodynamic state that they are applied in.

    Keeps what the flow does not model; put it beside a move that changes everything, such as MD:
    ``SequenceMove([LangevinDynamicsMove(...), BoltzmannGeneratorMove("adp.bg", n_proposals=8)])``. Temperature,
    pressure, restraints and alchemical parameters are those of the state. Velocities are carried over to accepted
    positions (`openmm_bg.velocities`; without any, they are drawn), as velocities of the integrator in the Context
    that the cache gives, which is that of the dynamics move before. Without an acceptance the sampler state is not
    touched.

    Among other molecules the flow's stands where it stood (seed atom 0, the direction to atom 1 and the half-plane of
    atom 2) and the others do not move. In explicit solvent such proposals run into it and hardly any is accepted.

    Random numbers follow ``numpy.random.seed``, as those of openmmtools' own moves do. openmmtools reads the moves in
    its ``.nc`` files with a YAML loader that can run code: resume only from files you trust.

    Parameters
    ----------
    flow_path
        Path of an artifact (`Flow.save`). Serialised moves hold this path and the file's sha256, never the flow:
        the file has to be there, unchanged, wherever they are applied.
    n_steps
        Metropolis steps at each application.
    n_proposals
        Proposals that a step chooses from: 1 is formula D, more are formula E.
    atom_subset
        Particles of the flow's molecule, in the order of the flow's atoms; None if it is the whole System.

    Attributes
    ----------
    statistics
        ``n_proposed``, ``n_accepted`` (steps and those that moved) and ``n_outside`` (steps from a state with
        q = 0, which no flow move can leave); settable.

    Raises
    ------
    ArtifactError
        There is no file at ``flow_path``, or it cannot be read.
    InputError
        ``flow_path`` is not a path; n_steps or n_proposals below 1; atom_subset no list of particles.
    """

    __module__ = "openmm_bg.mcmc"  # the path that openmmtools stores, and reads back in years to come
    _OPTIONS: ClassVar[Options] = {"n_proposals": checked_count}
    n_proposals: int

    def __init__(
        self,
        flow_path: str | os.PathLike[str],
        n_steps: int = 1,
        n_proposals: int = 1,
        atom_subset: Sequence[int] | None = None,
    ) -> None:
        super().__init__(flow_path, n_steps, atom_subset, n_proposals=n_proposals)

    def _walk(
        self,
        proposals: FlowProposals,
        positions: np.ndarray,
        reduced_potential: ReducedPotential,
        rng: np.random.Generator,
    ) -> Outcome:
        return proposals.chain(positions, reduced_potential, rng, n_steps=self.n_steps, n_proposals=self.n_proposals)
