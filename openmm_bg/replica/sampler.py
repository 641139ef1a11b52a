"""Exact flow moves and learned swaps inside OpenMM's own replica exchange (formulas D to G and I of docs/theory.md)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.artifact import Flow, load
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import InputError
from openmm_bg.matching import first_line, require_all_forces, require_count
from openmm_bg.proposals import FlowProposals, Outcome, check_counts, check_step
from openmm_bg.rules.annealing import check_schedule
from openmm_bg.surroundings import require_molecule
from openmm_bg.swaps import FlowSwap
from openmm_bg.velocities import carry_velocities

_NO_STEPS = {"n_proposed": 0, "n_accepted": 0, "n_outside": 0}


class FlowReplicaExchangeSampler(app.ReplicaExchangeSampler):
    """`openmm.app.ReplicaExchangeSampler` whose replicas also make flow moves and learned swaps.

    After the MD of each iteration, a replica in one of ``flow_states`` makes ``n_steps`` exact Metropolis steps. Their
    target is exp(-U/kT) with the energy (force groups, parameters) and temperature that the state defines, the ones
    that decide its exchanges as well; a flow serves states other than the one it was trained for at a lower
    acceptance. States that differ in ``groups`` need an integrator whose MD samples them, as in OpenMM's own class.

    Before the ordinary exchanges each pair of ``swaps`` tries a learned one: the flows of the two states carry either
    conformation into the other's ensemble, so that states far apart in temperature need no ladder between them. A
    replica then keeps its state and takes over the conformation that the other's became.

    Parameters
    ----------
    states, simulation, stepsPerIteration, reinitializeVelocities
        As in OpenMM's class.
    flow
        `Flow`, or the path of an artifact, of all states that ``state_flows`` does not name.
    flow_states
        Indices of the states in which flow moves are made; None stands for all, an empty list for none.
    n_steps
        Metropolis steps (candidate moves with ``schedule``) per replica and iteration.
    n_proposals
        Proposals that a step chooses from: 1 is formula D, more are formula E.
    step
        Makes latent steps (formula F) of this size in place of fresh proposals: a of the Gaussian dimensions, in
        (0, 1], and width (rad) on the circular ones.
    schedule
        Increasing λ from 0 to 1: makes nonequilibrium candidate moves (formula G), whose latent steps at every λ are
        of size ``step`` (0.3 if left out).
    n_kernel_steps
        Latent steps at each λ of ``schedule``.
    seed
        Of proposals, choices, learned swaps and velocities. Exchanges draw from Python's ``random``.
    state_flows
        Flows of single states, by index: one trained on MD at the state's own temperature.
    swaps
        Pairs of states (a, b) that try a learned swap in each iteration.
    swap_travels
        Whether what the flows do not model travels in a swap; by default it stays with its state.
    atom_subset
        Particles of the flow's molecule, in the order of the flow's atoms; None if it is the whole System. The others
        do not move in flow moves and stay with their state in swaps.

    Attributes
    ----------
    proposals
        The flow of each state, matched to the System.
    flow_statistics
        For each state ``n_proposed``, ``n_accepted`` (steps and those that moved) and ``n_outside`` (steps from a
        state with q = 0, which no flow move can leave).
    swap_statistics
        The same for each pair of ``swaps``; ``n_outside`` counts tries from outside a flow's domain.

    Raises
    ------
    InputError
        Arguments of another type, a Simulation without positions, the System is not the flow's, a state that does not
        exist, n_steps or n_proposals below 1, options of different kinds of moves together, a temperature that is not
        positive, flows of different coordinates to swap between.
    ArtifactError
        A flow cannot be read.
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
        step: float | None = None,
        schedule: ArrayLike | None = None,
        n_kernel_steps: int = 1,
        seed: int | None = None,
        state_flows: Mapping[int, Flow | str | os.PathLike[str]] | None = None,
        swaps: Iterable[tuple[int, int]] = (),
        swap_travels: bool = False,
        atom_subset: Sequence[int] | None = None,
    ) -> None:
        check_counts(n_steps, n_proposals)
        require_count("n_kernel_steps", n_kernel_steps)
        if n_proposals > 1 and not (step is None and schedule is None):
            raise InputError("n_proposals chooses among fresh proposals: leave it out beside step or schedule.")
        if n_kernel_steps > 1 and schedule is None:
            raise InputError("n_kernel_steps counts the latent steps at each λ: give a schedule as well.")
        self.step = None if step is None else check_step(step)
        self.schedule = None if schedule is None else [float(lam) for lam in check_schedule(schedule)]
        self.n_kernel_steps = int(n_kernel_steps)
        _require_run(states, simulation)
        chosen = set(range(len(states)) if flow_states is None else _indices("flow_states", flow_states))
        if state_flows is not None and not isinstance(state_flows, Mapping):
            raise InputError(
                f"state_flows must be a dict of states and their flows, such as {{3: 'hot.bg'}}, got {state_flows!r}."
            )
        own_flows = dict(state_flows or {})
        _indices("state_flows", own_flows)
        pairs = _pairs(swaps)
        for name, named in (
            ("flow_states", chosen),
            ("state_flows", set(own_flows)),
            ("swaps", {state for pair in pairs for state in pair}),
        ):
            unknown = sorted(named - set(range(len(states))))
            if unknown:
                raise InputError(f"{name} names state {unknown[0]}, there are states 0 to {len(states) - 1}.")
        for state in states:
            if "temperature" in state:
                thermal_energy(state["temperature"])
        common = FlowProposals(_read_flow("flow", flow), simulation.system, atom_subset)
        proposals = [common] * len(states)
        for index, own in own_flows.items():
            proposals[index] = FlowProposals(_read_flow("state_flows", own), simulation.system, atom_subset)
        require_molecule(simulation.context, common.particles)
        require_all_forces(simulation.context)
        self._swaps = {(a, b): FlowSwap(proposals[a], proposals[b], swap_travels) for a, b in pairs}
        try:
            rng = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            raise InputError(f"The seed must be a whole number of at least 0, got {seed!r}.") from error
        super().__init__(states, simulation, stepsPerIteration, reinitializeVelocities)
        self.flow_states = frozenset(chosen)
        self.n_steps = int(n_steps)
        self.n_proposals = int(n_proposals)
        self.flow_statistics = [dict(_NO_STEPS) for _ in states]
        self.swap_statistics = {pair: dict(_NO_STEPS) for pair in self._swaps}
        self.proposals = tuple(proposals)
        self.swap_travels = bool(swap_travels)
        self._rng = rng

    def simulate(self, iterations: int) -> None:
        """MD, flow moves, learned swaps and exchanges, as in OpenMM's class.

        Parameters
        ----------
        iterations
            How many of each.

        Raises
        ------
        InputError
            Replicas that a reporter has resumed from a run of another molecule or other states; a Context reinitialised
            with other particles, constraints or masses; a reporter made for another sampler. Nothing has been simulated
            then.
        EnergyError
            The energy of a conformation cannot be computed.
        """
        self._require_same_run()
        for reporter in self.reporters:
            # Those of this room know whose files they write; any other function may report on any sampler.
            if hasattr(reporter, "require_own"):
                reporter.require_own(self)
        super().simulate(iterations)

    def _require_same_run(self) -> None:
        system = self.simulation.context.getSystem()
        n, states = system.getNumParticles(), list(range(len(self.states)))
        if sorted(self.replicaStateIndex) != states:
            raise InputError(
                f"The replicas are in states {self.replicaStateIndex}, there are states 0 to {states[-1]}, one each: "
                "resume with the states of the run that wrote the files."
            )
        for proposals in self.proposals:
            proposals.require_same_system(system)
        for index, conformation in enumerate(self.replicaConformation):
            x = conformation.getPositions(asNumpy=True)._value
            if len(x) != n:
                raise InputError(
                    f"Replica {index} has {len(x)} particles, the System {n}: its checkpoint is from another run."
                )
            try:
                self.proposals[0].split(x)
            except InputError as error:
                raise InputError(f"Replica {index} cannot be of the flow's molecule ({error})") from error

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

    def exchangeReplicas(self) -> None:
        """Learned swaps, then the exchanges of OpenMM's class.

        Raises
        ------
        EnergyError
            The energy of a current conformation cannot be computed.
        """
        # In this order each replica's velocities belong to its state when a swap carries them over: OpenMM rescales
        # them for an exchange only when the replica is simulated next.
        for (a, b), swap in self._swaps.items():
            self._swap(a, b, swap)
        super().exchangeReplicas()

    def _move(self, index: int, state: int) -> None:
        before = self.replicaConformation[index].getPositions(asNumpy=True)._value
        with self._restored(index):
            outcome = self._walk(state, before)
        if outcome.positions is None:
            # The energies of all states are computed next, from what stands in the Context.
            self.simulation.context.setPositions(before)
        else:
            with self._restored(index):
                self.replicaConformation[index] = self._moved(index, state, outcome.positions)
        counts = self.flow_statistics[state]
        counts["n_proposed"] += outcome.info.n_proposed
        counts["n_accepted"] += outcome.info.n_accepted
        if not outcome.inside:
            counts["n_outside"] += outcome.info.n_proposed

    def _walk(self, state: int, positions: np.ndarray) -> Outcome:
        """n_steps of the kind of move that the options name."""
        proposals, u = self.proposals[state], self._reduced_potential(state)
        if self.schedule is not None:
            return proposals.switching_chain(
                positions,
                u,
                self._rng,
                schedule=self.schedule,
                n_steps=self.n_steps,
                step=0.3 if self.step is None else self.step,
                n_kernel_steps=self.n_kernel_steps,
            )
        if self.step is not None:
            return proposals.latent_chain(positions, u, self._rng, n_steps=self.n_steps, step=self.step)
        return proposals.chain(positions, u, self._rng, n_steps=self.n_steps, n_proposals=self.n_proposals)

    @contextmanager
    def _restored(self, index: int) -> Iterator[None]:
        """Puts the replica back into the Context if a move fails half-way."""
        try:
            yield
        except BaseException:
            self.simulation.context.setState(self.replicaConformation[index])
            raise

    def _swap(self, a: int, b: int, swap: FlowSwap) -> None:
        context = self.simulation.context
        replicas = {state: self.replicaStateIndex.index(state) for state in (a, b)}
        x_a, x_b = (self.replicaConformation[replicas[s]].getPositions(asNumpy=True)._value for s in (a, b))

        def in_its_box(state: int) -> Callable[[np.ndarray], float]:
            u = self._reduced_potential(state)

            def reduced_potential(x: np.ndarray) -> float:
                context.setPeriodicBoxVectors(*self.replicaConformation[replicas[state]].getPeriodicBoxVectors())
                return u(x)

            return reduced_potential

        with self._restored(replicas[b]):
            proposal = swap.propose(x_a, x_b, in_its_box(a), in_its_box(b))
        counts = self.swap_statistics[a, b]
        counts["n_proposed"] += 1
        counts["n_outside"] += not proposal.inside
        # Strict, so that -inf is never accepted.
        if not -self._rng.standard_exponential() < proposal.log_ratio:
            return
        moved = []
        with self._restored(replicas[b]):
            for state, x in ((a, proposal.positions_a), (b, proposal.positions_b)):
                replica = replicas[state]
                context.setState(self.replicaConformation[replica])
                self._sampler.applyState(state)
                conformation = self._moved(replica, state, x)
                # The exchanges that follow need the energies of the new conformations.
                known = None if self.replicaStateEnergy is None else self._sampler.computeAllEnergies()
                moved.append((replica, conformation, known))
        counts["n_accepted"] += 1
        for replica, conformation, energies in moved:  # both or neither
            self.replicaConformation[replica] = conformation
            if energies is not None:
                self.replicaStateEnergy[replica] = energies

    def _moved(self, index: int, state: int, positions: np.ndarray) -> openmm.State:
        """A replica at these positions, with its velocities there; the Context holds the rest of it."""
        context = self.simulation.context
        before = self.replicaConformation[index].getPositions(asNumpy=True)._value
        frames = self.proposals[state].frames
        carry_velocities(context, before, positions, self._state_temperature(state), self._rng, frames)
        return context.getState(positions=True, velocities=True, parameters=True, integratorParameters=True)

    def _reduced_potential(self, state: int) -> Callable[[np.ndarray], float]:
        """u of a state at given positions and the Context's box."""
        context, kT = self.simulation.context, thermal_energy(self._state_temperature(state))
        require_all_forces(context)

        def reduced_potential(x: np.ndarray) -> float:
            context.setPositions(x)
            return self._sampler.computeEnergy(state).value_in_unit(unit.kilojoule_per_mole) / kT

        return reduced_potential

    def _state_temperature(self, state: int) -> float:
        """Temperature of a state, K."""
        value = self.states[state].get("temperature", None)
        if value is None:
            value = self.simulation.integrator.getTemperature()
        return float(value.value_in_unit(unit.kelvin) if unit.is_quantity(value) else value)


def _require_run(states: Any, simulation: Any) -> None:
    """States and Simulation of the right types, the latter with positions, or `InputError`."""
    if not isinstance(states, (list, tuple)) or not states or not all(isinstance(state, Mapping) for state in states):
        raise InputError(
            f"states must be a list of dicts, such as [{{'temperature': 300}}, {{'temperature': 400}}], got {states!r}."
        )
    if not isinstance(simulation, app.Simulation):
        raise InputError(f"simulation must be an openmm.app.Simulation, got a {type(simulation).__name__}.")
    try:
        x = simulation.context.getState(positions=True).getPositions(asNumpy=True)._value
    except openmm.OpenMMException as error:
        raise InputError(f"The Simulation has no positions ({first_line(error)}): call setPositions first.") from error
    if len(x) > 1 and not x.any():  # what a Context has before setPositions
        raise InputError("The Simulation has no positions: call simulation.context.setPositions() first.")


def _indices(name: str, value: Any) -> list[int]:
    """Indices of states as they are, or `InputError`."""
    try:
        found = list(value)
    except TypeError as error:
        raise InputError(f"{name} must name states by their indices, such as [0, 1], got {value!r}.") from error
    if any(isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)) for k in found):
        raise InputError(f"{name} must name states by their indices, whole numbers from 0 on, got {value!r}.")
    return found


def _pairs(swaps: Any) -> list[tuple[int, int]]:
    """Pairs of states, or `InputError`."""
    try:
        pairs = [tuple(_indices("swaps", pair)) for pair in swaps]
    except (TypeError, InputError) as error:
        raise InputError(f"swaps must be a list of pairs of states, such as [(1, 0)], got {swaps!r}.") from error
    if any(len(pair) != 2 or pair[0] == pair[1] for pair in pairs):
        raise InputError("Each entry of swaps must be a pair of two different states.")
    return [(a, b) for a, b in pairs]


def _read_flow(name: str, flow: Any) -> Flow:
    """A `Flow`, or what the artifact at a path holds."""
    if isinstance(flow, Flow):
        return flow
    if not isinstance(flow, (str, os.PathLike)):
        raise InputError(f"{name} must be a Flow or the path of a saved one, got {flow!r}.")
    return load(flow)
