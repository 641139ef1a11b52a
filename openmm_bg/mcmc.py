"""Exact flow moves for openmmtools: `BoltzmannGeneratorMove` (formulas D and E of docs/theory.md)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
import openmm  # isort: skip
from openmm import unit  # isort: skip
from openmmtools.mcmc import MCMCMove  # isort: skip  (the base class: whoever imports this module wants openmmtools)

from openmm_bg.artifact import Flow, load
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.proposals import FlowProposals, check_counts, redraw_velocities

STATE_VERSION = 1
_COUNTS = ("n_accepted", "n_proposed", "n_outside")

# Moves are copied at every iteration and written at every checkpoint, so that neither flow nor coordinates belong to
# them: one copy per process, found again by the file's digest.
_flows: dict[str, Flow] = {}
_proposals: WeakKeyDictionary[openmm.Context, dict[str, FlowProposals]] = WeakKeyDictionary()


class BoltzmannGeneratorMove(MCMCMove):
    """Metropolis steps with a flow's proposals, exact for the thermodynamic state that they are applied in.

    Keeps what the flow does not model; put it beside a move that changes everything, such as MD:
    ``SequenceMove([LangevinDynamicsMove(...), BoltzmannGeneratorMove("adp.bg", n_proposals=8)])``. Temperature,
    pressure, restraints and alchemical parameters are those of the state. The flow's molecule has to be the whole
    System. After an acceptance velocities are drawn anew; without one the sampler state is not touched.

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
        ``flow_path`` is not a path; n_steps or n_proposals below 1.
    """

    def __init__(self, flow_path: str | os.PathLike[str], n_steps: int = 1, n_proposals: int = 1) -> None:
        super().__init__()
        if not isinstance(flow_path, (str, os.PathLike)):
            raise InputError(
                f"A move takes the path of a saved flow, not a {type(flow_path).__name__}: save() it and pass the path."
            )
        check_counts(n_steps, n_proposals)
        self.n_steps = int(n_steps)
        self.n_proposals = int(n_proposals)
        self.flow_path = str(Path(flow_path).absolute())
        self.flow_sha256 = _digest(self.flow_path)
        _flow(self.flow_path, self.flow_sha256)  # a foreign file shows here, not after hours of MD
        self._counts = dict.fromkeys(_COUNTS, 0)

    @property
    def statistics(self) -> dict[str, int]:
        """Counts since construction or since they were last set, as a new dict."""
        return dict(self._counts)

    @statistics.setter
    def statistics(self, value: Mapping[str, int]) -> None:
        self._counts = _read_counts(value)

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """Make n_steps exact steps on the sampler state.

        Parameters
        ----------
        thermodynamic_state
            ``openmmtools.states.ThermodynamicState`` or a compound one; not changed.
        sampler_state
            ``openmmtools.states.SamplerState``; positions and velocities are replaced if a step was accepted (its
            energies are then None, for openmmtools to compute when asked).
        context_cache
            ``openmmtools.cache.ContextCache``; None takes the global one.

        Raises
        ------
        InputError
            A state of another System than the flow's, or positions that are not finite.
        ArtifactError
            The flow's file is gone, or has changed since the move was made.
        EnergyError
            The energy of the current positions cannot be computed.
        """
        flow = _flow(self.flow_path, self.flow_sha256)
        n_atoms = flow.coordinates.n_atoms
        for state in (thermodynamic_state, sampler_state):
            if state.n_particles != n_atoms:
                raise InputError(
                    f"The {type(state).__name__} has {state.n_particles} particles, the flow's molecule {n_atoms}: "
                    "a move works on Systems of that one molecule."
                )
        context, _ = self._get_context_cache(context_cache).get_context(thermodynamic_state)
        sampler_state.apply_to_context(context, ignore_velocities=True)
        proposals = _matched(flow, self.flow_sha256, context)

        def reduced_potential(x: np.ndarray) -> float:
            context.setPositions(x)
            return thermodynamic_state.reduced_potential(context)

        # A generator kept by the move would be copied along with it, and the copies would repeat each other's draws.
        rng = np.random.default_rng(np.random.randint(2**32, size=4, dtype=np.uint32))  # noqa: NPY002
        outcome = proposals.chain(
            sampler_state.positions.value_in_unit(unit.nanometer),
            reduced_potential,
            rng,
            n_steps=self.n_steps,
            n_proposals=self.n_proposals,
        )
        if outcome.positions is not None:
            context.setPositions(outcome.positions)
            velocities = redraw_velocities(context, thermodynamic_state.temperature.value_in_unit(unit.kelvin), rng)
            sampler_state.positions = outcome.positions * unit.nanometer
            sampler_state.velocities = velocities * (unit.nanometer / unit.picosecond)
        self._counts["n_proposed"] += outcome.info.n_proposed
        self._counts["n_accepted"] += outcome.info.n_accepted
        if not outcome.inside:
            self._counts["n_outside"] += outcome.info.n_proposed

    def __getstate__(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "flow_path": self.flow_path,
            "flow_sha256": self.flow_sha256,
            "n_steps": self.n_steps,
            "n_proposals": self.n_proposals,
            **self._counts,
        }

    def __setstate__(self, serialization: Mapping[str, Any]) -> None:
        # Never a KeyError: openmmtools turns one into a warning and goes on with half a move. The file itself is asked
        # for when the move is applied, so that stored runs can be analysed without it.
        version = serialization.get("version")
        if version != STATE_VERSION:
            raise ArtifactError(
                f"A stored flow move has version {version}, this openmm_bg reads {STATE_VERSION}: "
                "use the version that wrote it."
            )
        needed = ("flow_path", "flow_sha256", "n_steps", "n_proposals", *_COUNTS)
        missing = [name for name in needed if name not in serialization]
        if missing:
            raise ArtifactError(f"A stored flow move lacks {', '.join(missing)}: its file is damaged.")
        check_counts(serialization["n_steps"], serialization["n_proposals"])
        self.flow_path = str(serialization["flow_path"])
        self.flow_sha256 = str(serialization["flow_sha256"])
        self.n_steps = int(serialization["n_steps"])
        self.n_proposals = int(serialization["n_proposals"])
        self._counts = _read_counts(serialization)

    def __repr__(self) -> str:
        return (
            f"BoltzmannGeneratorMove({self.flow_path!r}, n_steps={self.n_steps}, n_proposals={self.n_proposals}, "
            f"accepted {self._counts['n_accepted']} of {self._counts['n_proposed']})"
        )


def _read_counts(value: Mapping[str, Any]) -> dict[str, int]:
    """The counts as plain ints; n_outside may be absent, as in statistics summed by other code."""
    if "n_accepted" not in value or "n_proposed" not in value:
        raise InputError("The statistics of a flow move need n_accepted and n_proposed.")
    try:
        return {name: int(value.get(name, 0)) for name in _COUNTS}
    except (TypeError, ValueError) as error:
        raise InputError(f"The statistics of a flow move must be whole numbers ({error}).") from error


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"The flow at {path} cannot be read ({error.strerror}).") from error


def _flow(path: str, sha256: str) -> Flow:
    """The flow with this digest, read from its file once in each process."""
    if sha256 not in _flows:
        if _digest(path) != sha256:
            raise ArtifactError(
                f"The flow at {path} is not the one that the move was made with: restore that file or make a new move."
            )
        _flows[sha256] = load(path)
    return _flows[sha256]


def _matched(flow: Flow, sha256: str, context: openmm.Context) -> FlowProposals:
    """The flow matched to a Context's System, remembered for as long as the Context lives."""
    known = _proposals.setdefault(context, {})
    if sha256 not in known:
        known[sha256] = FlowProposals(flow, context.getSystem())
    return known[sha256]
