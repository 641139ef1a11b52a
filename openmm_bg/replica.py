"""Exact flow moves inside OpenMM's own replica exchange (formulas D and E of docs/theory.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
from openmm import app, unit  # isort: skip

from openmm_bg.artifact import Flow, load
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import InputError
from openmm_bg.proposals import FlowProposals, check_counts, redraw_velocities


class FlowReplicaExchangeSampler(app.ReplicaExchangeSampler):
    """`openmm.app.ReplicaExchangeSampler` whose replicas also make flow moves.

    After the MD of each iteration, a replica in one of ``flow_states`` makes ``n_steps`` exact Metropolis steps. Their
    target is exp(-U/kT) with the energy (force groups, parameters) and temperature that the state defines, the ones
    that decide its exchanges as well; a flow serves states other than the one it was trained for at a lower
    acceptance. States that differ in ``groups`` need an integrator whose MD samples them, as in OpenMM's own class.

    Parameters
    ----------
    states, simulation, stepsPerIteration, reinitializeVelocities
        As in OpenMM's class.
    flow
        `Flow`, or the path of an artifact; its molecule has to be the whole System.
    flow_states
        Indices of the states in which flow moves are made; None stands for all.
    n_steps
        Metropolis steps per replica and iteration.
    n_proposals
        Proposals that a step chooses from: 1 is formula D, more are formula E.
    seed
        Of proposals, choices and redrawn velocities. Exchanges draw from Python's ``random``.

    Attributes
    ----------
    flow_statistics
        For each state ``n_proposed``, ``n_accepted`` (steps and those that moved) and ``n_outside`` (steps from a
        state with q = 0, which no flow move can leave).

    Raises
    ------
    InputError
        The System is not the flow's, a state that does not exist, n_steps or n_proposals below 1, a temperature that
        is not positive.
    ArtifactError
        The flow cannot be read.
    """

    def __init__(
        self,
        states: list[dict[str, Any]],
        simulation: app.Simulation,
        stepsPerIteration: int,
        reinitializeVelocities: bool = False,
        *,
        flow: Flow | str | os.PathLike[str],
        flow_states: Iterable[int] | None = None,
        n_steps: int = 1,
        n_proposals: int = 1,
        seed: int | None = None,
    ) -> None:
        check_counts(n_steps, n_proposals)
        chosen = set(range(len(states)) if flow_states is None else flow_states)
        unknown = sorted(chosen - set(range(len(states))))
        if unknown:
            raise InputError(f"flow_states names state {unknown[0]}, there are states 0 to {len(states) - 1}.")
        for state in states:
            if "temperature" in state:
                thermal_energy(state["temperature"])
        flow = flow if isinstance(flow, Flow) else load(flow)
        proposals = FlowProposals(flow, simulation.system)
        super().__init__(states, simulation, stepsPerIteration, reinitializeVelocities)
        self.flow_states = frozenset(chosen)
        self.n_steps = int(n_steps)
        self.n_proposals = int(n_proposals)
        self.flow_statistics = [{"n_proposed": 0, "n_accepted": 0, "n_outside": 0} for _ in states]
        self._proposals = proposals
        self._rng = np.random.default_rng(seed)

    def simulateReplica(self, index: int, steps: int | None = None) -> None:
        """MD of one replica as in OpenMM's class, then its flow moves.

        Parameters
        ----------
        index
            The replica.
        steps
            MD steps; None takes stepsPerIteration.

        Raises
        ------
        EnergyError
            The energy after the MD cannot be computed.
        """
        super().simulateReplica(index, steps)
        state = self.replicaStateIndex[index]
        if state in self.flow_states:
            self._move(index, state)

    def _move(self, index: int, state: int) -> None:
        context = self.simulation.context
        before = self.replicaConformation[index].getPositions(asNumpy=True)._value
        temperature = self._state_temperature(state)
        kT = thermal_energy(temperature)

        def reduced_potential(x: np.ndarray) -> float:
            context.setPositions(x)
            return self._sampler.computeEnergy(state).value_in_unit(unit.kilojoule_per_mole) / kT

        outcome = self._proposals.chain(
            before, reduced_potential, self._rng, n_steps=self.n_steps, n_proposals=self.n_proposals
        )
        if outcome.positions is None:
            # The energies of all states are computed next, from what stands in the Context.
            context.setPositions(before)
        else:
            context.setPositions(outcome.positions)
            redraw_velocities(context, temperature, self._rng)
            self.replicaConformation[index] = context.getState(
                positions=True, velocities=True, parameters=True, integratorParameters=True
            )
        counts = self.flow_statistics[state]
        counts["n_proposed"] += outcome.info.n_proposed
        counts["n_accepted"] += outcome.info.n_accepted
        if not outcome.inside:
            counts["n_outside"] += outcome.info.n_proposed

    def _state_temperature(self, state: int) -> float:
        """Temperature of a state, K."""
        value = self.states[state].get("temperature", None)
        if value is None:
            value = self.simulation.integrator.getTemperature()
        return float(value.value_in_unit(unit.kelvin) if unit.is_quantity(value) else value)
