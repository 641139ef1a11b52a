"""What openmmtools' flow moves have in common: the flow's file, the molecule, counters, and how they are stored."""

from __future__ import annotations

import hashlib
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
import openmm  # isort: skip
from openmm import unit  # isort: skip
from openmmtools.mcmc import MCMCMove  # isort: skip  (the base class: whoever imports this room wants openmmtools)
from openmmtools.states import SamplerState, ThermodynamicState  # isort: skip

from openmm_bg.artifact import Flow, load
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.matching import require_count
from openmm_bg.proposals import FlowProposals, Outcome, check_step
from openmm_bg.surroundings import check_atoms, require_molecule
from openmm_bg.velocities import carry_velocities

STATE_VERSION = 2  # 1 had no atom_subset
_COUNTS = ("n_accepted", "n_proposed", "n_outside")

ReducedPotential = Callable[[np.ndarray], float]
#: Name of an option to what checks its value and makes it one that JSON can hold.
Options = Mapping[str, Callable[[str, Any], Any]]

# Moves are copied at every iteration and written at every checkpoint, so that neither flow nor coordinates belong to
# them: one copy per process, found again by the file's digest.
_flows: dict[str, Flow] = {}
_Key = tuple[str, tuple[int, ...] | None]
_proposals: WeakKeyDictionary[openmm.Context, dict[_Key, FlowProposals]] = WeakKeyDictionary()


def checked_count(name: str, value: Any) -> int:
    """A whole number of at least 1, or `InputError`."""
    require_count(name, value)
    return int(value)


def checked_step(name: str, value: Any) -> float:
    """A latent step in (0, 1], or `InputError`."""
    return check_step(value)


class FlowMove(MCMCMove):
    """What the flow moves of this module share: the flow's file, the molecule, counters, and how they are stored.

    Parameters
    ----------
    flow_path
        Path of an artifact (`Flow.save`).
    n_steps
        Metropolis steps at each application.
    atom_subset
        Particles of the flow's molecule, in the order of its atoms; None if it is the whole System.
    options
        Those that `_OPTIONS` names, all of them.
    """

    #: What a subclass adds: the name of each option, and what checks its value and makes it one that JSON can hold.
    _OPTIONS: ClassVar[Options] = {}

    def __init__(
        self,
        flow_path: str | os.PathLike[str],
        n_steps: int = 1,
        atom_subset: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._set_options(options)
        if not isinstance(flow_path, (str, os.PathLike)):
            raise InputError(
                f"A move takes the path of a saved flow, not a {type(flow_path).__name__}: save() it and pass the path."
            )
        self.n_steps = checked_count("n_steps", n_steps)
        self.atom_subset = None if atom_subset is None else check_atoms(atom_subset)
        self.flow_path = sys.intern(str(Path(flow_path).absolute()))
        self.flow_sha256 = sys.intern(_digest(self.flow_path))
        _flow(self.flow_path, self.flow_sha256)  # a foreign file shows here, not after hours of MD
        self._counts = dict.fromkeys(_COUNTS, 0)

    @property
    def n_accepted(self) -> int:
        """Steps that moved, as openmmtools' own moves have it."""
        return self._counts["n_accepted"]

    @property
    def n_proposed(self) -> int:
        """Steps, as openmmtools' own moves have it."""
        return self._counts["n_proposed"]

    @property
    def statistics(self) -> dict[str, int]:
        """Counts since construction or since they were last set, as a new dict."""
        return dict(self._counts)

    @statistics.setter
    def statistics(self, value: Mapping[str, int]) -> None:
        self._counts = _read_counts(value)

    @abstractmethod
    def _walk(
        self,
        proposals: FlowProposals,
        positions: np.ndarray,
        reduced_potential: ReducedPotential,
        rng: np.random.Generator,
    ) -> Outcome:
        """n_steps of the subclass's rule from these positions (nm)."""

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """Make n_steps exact steps on the sampler state.

        Parameters
        ----------
        thermodynamic_state
            ``openmmtools.states.ThermodynamicState`` or a compound one; not changed.
        sampler_state
            ``openmmtools.states.SamplerState``; positions and velocities are replaced if a step was accepted (its
            energies are then None, for openmmtools to compute when asked). Untouched if an error is raised.
        context_cache
            ``openmmtools.cache.ContextCache``; None takes the global one.

        Raises
        ------
        InputError
            States of other types, or in the wrong order; a state of another System than the flow's, positions that are
            not finite, a periodic System in which OpenMM does not see the molecule as one, or a cached Context that was
            reinitialised with another System.
        ArtifactError
            The flow's file is gone, or has changed since the move was made.
        EnergyError
            The energy of the current positions cannot be computed.
        """
        for found, kind in ((thermodynamic_state, ThermodynamicState), (sampler_state, SamplerState)):
            if not isinstance(found, kind):
                raise InputError(
                    f"apply() takes a ThermodynamicState and a SamplerState, in this order, not a "
                    f"{type(found).__name__} for the {kind.__name__}."
                )
        flow = _flow(self.flow_path, self.flow_sha256)
        n_atoms = flow.coordinates.n_atoms
        if self.atom_subset is None:
            for state in (thermodynamic_state, sampler_state):
                if state.n_particles != n_atoms:
                    raise InputError(
                        f"The {type(state).__name__} has {state.n_particles} particles, the flow's molecule {n_atoms}: "
                        "name the molecule's particles in atom_subset."
                    )
        elif thermodynamic_state.n_particles != sampler_state.n_particles:
            raise InputError(
                f"The SamplerState has {sampler_state.n_particles} particles, the ThermodynamicState "
                f"{thermodynamic_state.n_particles}: they belong to different Systems."
            )
        context, _ = self._get_context_cache(context_cache).get_context(thermodynamic_state)
        n_particles = context.getSystem().getNumParticles()
        if n_particles != sampler_state.n_particles:
            raise InputError(
                f"The cached Context has {n_particles} particles, the states {sampler_state.n_particles} (was it "
                "reinitialised with another System?): empty the context cache."
            )
        proposals = _matched(flow, self.flow_sha256, self.atom_subset, context)
        sampler_state.apply_to_context(context, ignore_velocities=True)

        def reduced_potential(x: np.ndarray) -> float:
            context.setPositions(x)
            return thermodynamic_state.reduced_potential(context)

        # A generator kept by the move would be copied along with it, and the copies would repeat each other's draws.
        rng = np.random.default_rng(np.random.randint(2**32, size=4, dtype=np.uint32))  # noqa: NPY002
        positions = sampler_state.positions.value_in_unit(unit.nanometer)
        outcome = self._walk(proposals, positions, reduced_potential, rng)
        if outcome.positions is not None:
            # A cached Context has the velocities of whatever ran in it last.
            known = sampler_state.velocities
            context.setVelocities(np.zeros_like(positions) if known is None else known)
            kelvin = thermodynamic_state.temperature.value_in_unit(unit.kelvin)
            velocities = carry_velocities(context, positions, outcome.positions, kelvin, rng, proposals.frames)
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
            "atom_subset": None if self.atom_subset is None else list(self.atom_subset),
            **{name: getattr(self, name) for name in self._OPTIONS},
            **self._counts,
        }

    def __setstate__(self, serialization: Mapping[str, Any]) -> None:
        # Never a KeyError: openmmtools turns one into a warning and goes on with half a move. The file itself is asked
        # for when the move is applied, so that stored runs can be analysed without it.
        version = serialization.get("version")
        if version not in (1, STATE_VERSION):
            raise ArtifactError(
                f"A stored flow move has version {version}, this openmm_bg reads {STATE_VERSION}: "
                "use the version that wrote it."
            )
        needed = ("flow_path", "flow_sha256", "n_steps", *self._OPTIONS, *_COUNTS)
        missing = [name for name in needed if name not in serialization]
        if missing:
            raise ArtifactError(f"A stored flow move lacks {', '.join(missing)}: its file is damaged.")
        atoms = serialization.get("atom_subset")
        # A run has hundreds of moves with the same path: copies share it, and so do those that are read back.
        self.flow_path = sys.intern(str(serialization["flow_path"]))
        self.flow_sha256 = sys.intern(str(serialization["flow_sha256"]))
        self.n_steps = checked_count("n_steps", serialization["n_steps"])
        self.atom_subset = None if atoms is None else check_atoms(atoms)
        self._set_options(serialization)
        self._counts = _read_counts(serialization)

    def _set_options(self, options: Mapping[str, Any]) -> None:
        """Check and take what `_OPTIONS` names; other entries do not matter."""
        for name, checked in self._OPTIONS.items():
            setattr(self, name, checked(name, options[name]))

    def __repr__(self) -> str:
        options = "".join(f", {name}={getattr(self, name)}" for name in self._OPTIONS)
        subset = "" if self.atom_subset is None else f", {len(self.atom_subset)} particles"
        return (
            f"{type(self).__name__}({self.flow_path!r}, n_steps={self.n_steps}{options}{subset}, "
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


def _matched(flow: Flow, sha256: str, atoms: Sequence[int] | None, context: openmm.Context) -> FlowProposals:
    """The flow matched to a Context's System, remembered for as long as the Context lives and its System stays.

    A Context that is reinitialised after its System was changed is the same object with another Φ.
    """
    known = _proposals.setdefault(context, {})
    key = (sha256, None if atoms is None else tuple(atoms))
    if key not in known or not known[key].fits(context.getSystem()):
        known.pop(key, None)  # what no longer holds must not be found after a refusal either
        found = FlowProposals(flow, context.getSystem(), atoms)
        require_molecule(context, found.particles)
        known[key] = found
    return known[key]
