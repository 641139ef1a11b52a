"""Exact flow moves for openmmtools: fresh proposals (formulas D and E of docs/theory.md) and latent moves (F)."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
from openmm_bg.matching import require_count
from openmm_bg.proposals import FlowProposals, Outcome, check_atoms, redraw_velocities, require_molecule

STATE_VERSION = 2  # 1 had no atom_subset
_COUNTS = ("n_accepted", "n_proposed", "n_outside")

# Moves are copied at every iteration and written at every checkpoint, so that neither flow nor coordinates belong to
# them: one copy per process, found again by the file's digest.
_flows: dict[str, Flow] = {}
_Key = tuple[str, tuple[int, ...] | None]
_proposals: WeakKeyDictionary[openmm.Context, dict[_Key, FlowProposals]] = WeakKeyDictionary()


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
    """

    #: What a subclass adds to the stored form.
    _OPTIONS: tuple[str, ...] = ()

    def __init__(
        self, flow_path: str | os.PathLike[str], n_steps: int = 1, atom_subset: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(flow_path, (str, os.PathLike)):
            raise InputError(
                f"A move takes the path of a saved flow, not a {type(flow_path).__name__}: save() it and pass the path."
            )
        require_count("n_steps", n_steps)
        self.n_steps = int(n_steps)
        self.atom_subset = None if atom_subset is None else check_atoms(atom_subset)
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

    @abstractmethod
    def _walk(
        self,
        proposals: FlowProposals,
        positions: np.ndarray,
        reduced_potential: Callable[[np.ndarray], float],
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
            A state of another System than the flow's, positions that are not finite, or a periodic System in which
            OpenMM does not see the molecule as one.
        ArtifactError
            The flow's file is gone, or has changed since the move was made.
        EnergyError
            The energy of the current positions cannot be computed.
        """
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
        require_count("n_steps", serialization["n_steps"])
        atoms = serialization.get("atom_subset")
        self.flow_path = str(serialization["flow_path"])
        self.flow_sha256 = str(serialization["flow_sha256"])
        self.n_steps = int(serialization["n_steps"])
        self.atom_subset = None if atoms is None else check_atoms(atoms)
        self._set_options(serialization)
        self._counts = _read_counts(serialization)

    @abstractmethod
    def _set_options(self, options: Mapping[str, Any]) -> None:
        """Check and take what `_OPTIONS` names; other entries do not matter."""

    def __repr__(self) -> str:
        options = "".join(f", {name}={getattr(self, name)}" for name in self._OPTIONS)
        subset = "" if self.atom_subset is None else f", {len(self.atom_subset)} particles"
        return (
            f"{type(self).__name__}({self.flow_path!r}, n_steps={self.n_steps}{options}{subset}, "
            f"accepted {self._counts['n_accepted']} of {self._counts['n_proposed']})"
        )


class BoltzmannGeneratorMove(FlowMove):
    """Metropolis steps with a flow's proposals, exact for the thermodynamic state that they are applied in.

    Keeps what the flow does not model; put it beside a move that changes everything, such as MD:
    ``SequenceMove([LangevinDynamicsMove(...), BoltzmannGeneratorMove("adp.bg", n_proposals=8)])``. Temperature,
    pressure, restraints and alchemical parameters are those of the state. After an acceptance all velocities are drawn
    anew; without one the sampler state is not touched.

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

    _OPTIONS = ("n_proposals",)

    def __init__(
        self,
        flow_path: str | os.PathLike[str],
        n_steps: int = 1,
        n_proposals: int = 1,
        atom_subset: Sequence[int] | None = None,
    ) -> None:
        self._set_options({"n_proposals": n_proposals})
        super().__init__(flow_path, n_steps, atom_subset)

    def _set_options(self, options: Mapping[str, Any]) -> None:
        require_count("n_proposals", options["n_proposals"])
        self.n_proposals = int(options["n_proposals"])

    def _walk(
        self,
        proposals: FlowProposals,
        positions: np.ndarray,
        reduced_potential: Callable[[np.ndarray], float],
        rng: np.random.Generator,
    ) -> Outcome:
        return proposals.chain(positions, reduced_potential, rng, n_steps=self.n_steps, n_proposals=self.n_proposals)


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

    _OPTIONS = ("step",)

    def __init__(
        self,
        flow_path: str | os.PathLike[str],
        n_steps: int = 1,
        step: float = 0.3,
        atom_subset: Sequence[int] | None = None,
    ) -> None:
        self._set_options({"step": step})
        super().__init__(flow_path, n_steps, atom_subset)

    def _set_options(self, options: Mapping[str, Any]) -> None:
        step = options["step"]
        if isinstance(step, bool) or not isinstance(step, (int, float, np.number)) or not 0.0 < step <= 1.0:
            raise InputError(f"The step of a latent move must be a number in (0, 1], got {step!r}.")
        self.step = float(step)

    def _walk(
        self,
        proposals: FlowProposals,
        positions: np.ndarray,
        reduced_potential: Callable[[np.ndarray], float],
        rng: np.random.Generator,
    ) -> Outcome:
        return proposals.latent_chain(positions, reduced_potential, rng, n_steps=self.n_steps, step=self.step)


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
    """The flow matched to a Context's System, remembered for as long as the Context lives."""
    known = _proposals.setdefault(context, {})
    key = (sha256, None if atoms is None else tuple(atoms))
    if key not in known:
        found = FlowProposals(flow, context.getSystem(), atoms)
        require_molecule(context, range(flow.coordinates.n_atoms) if atoms is None else atoms)
        known[key] = found
    return known[key]
