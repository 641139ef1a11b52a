"""A flow's proposals for one System, weighed with whatever energy a host computes.

openmmtools and OpenMM's replica exchange own their Contexts and define their own reduced potentials. What their moves
have in common lies here: formulas D, E, F and G (s frozen) of docs/theory.md on one set of positions, of the flow's
molecule alone or among others that stay where they are. The rules are those of `rules`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.artifact import Flow
from openmm_bg.coordinates import place_like
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.latent_space import CHUNK, LatentSpace
from openmm_bg.matching import match_system, require_count
from openmm_bg.rules import annealing, metropolis
from openmm_bg.surroundings import Signature, check_atoms, molecule_alone
from openmm_bg.velocities import local_frames

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where a chain of exact steps ended.

    Attributes
    ----------
    positions
        [N, 3] nm if the chain left its initial state, otherwise None: keep the old ones.
    info
        What the steps were.
    inside
        False where the initial state has q = 0, so that the chain stays.
    """

    positions: FloatArray | None
    info: metropolis.Info
    inside: bool


class FlowProposals:
    """A flow matched to a System: exact steps from given positions.

    Parameters
    ----------
    flow
        The flow of the molecule that moves.
    system
        Its constraints and masses enter Φ; its forces do not matter here.
    atoms
        Particles of the molecule, in the order of the flow's atoms; None if it is the whole System. All others stay
        where they are, and u contains what they do to the molecule.

    Raises
    ------
    InputError
        The molecule is not the flow's (particle count, bonds, constraints), or is held to other particles by a
        constraint or a virtual site.
    """

    def __init__(self, flow: Flow, system: openmm.System, atoms: Sequence[int] | None = None) -> None:
        self.flow = flow
        self.space = LatentSpace(flow, next(iter(flow.parameters())).device)
        self.atoms = None if atoms is None else np.array(check_atoms(atoms), dtype=np.int64)
        own = system if self.atoms is None else molecule_alone(flow, system, self.atoms)
        # Lengths that the System frees are kept by every step and moved by the MD in between.
        self.coordinates, _ = match_system(flow, own)
        self._signature = Signature(system, self.particles)
        #: Of the molecule's bonds, for `openmm_bg.velocities.carry_velocities`.
        self.frames = local_frames(np.array(self.particles)[flow.bonds])

    @property
    def particles(self) -> list[int]:
        """The molecule's particles in the System, in the order of the flow's atoms."""
        return list(range(self.coordinates.n_atoms)) if self.atoms is None else self.atoms.tolist()

    def fits(self, system: openmm.System) -> bool:
        """Whether the match still holds: False once the System has other particles, masses or constraints.

        Φ is that of the System that was matched; a Context that is reinitialised may come to have another one.
        """
        return self._signature.fits(system)

    def require_same_system(self, system: openmm.System) -> None:
        """Refuse a System with other particles, constraints or masses than the one matched: Φ would be another's.

        Raises
        ------
        InputError
            They differ, as after a Context was reinitialised with a changed System.
        """
        if not self.fits(system):
            raise InputError(
                "The System's particles, constraints or masses have changed since the flow was matched to it (was the "
                "Context reinitialised?): make a new sampler."
            )

    def chain(
        self,
        positions: FloatArray,
        reduced_potential: Callable[[FloatArray], float],
        rng: np.random.Generator,
        *,
        n_steps: int = 1,
        n_proposals: int = 1,
    ) -> Outcome:
        """n_steps exact Metropolis steps (formula D; n_proposals > 1: formula E).

        What the flow does not model stays, and so do seed atom 0, the direction to seed atom 1 and the half-plane of
        seed atom 2.

        Parameters
        ----------
        positions
            Current positions [N, 3], nm.
        reduced_potential
            u(x), of the target's thermodynamic state, for positions [N, 3]. Serves the current state and all proposals
            alike. `openmm.OpenMMException` and non-finite values mean weight zero for a proposal.
        rng
            Source of proposals and choices; torch's global generator is left as it was.

        Raises
        ------
        InputError
            Fewer than one step or proposal; positions that are not finite.
        EnergyError
            The energy of the current positions cannot be computed.
        """
        check_counts(n_steps, n_proposals)
        current, y0, s = self.split(positions)
        reduced_potential = self.within(positions, reduced_potential)
        log_w = self._current_log_weight(y0, s, current, reduced_potential)
        inside = log_w != np.inf
        chosen: Tensor | None = None
        info: metropolis.Info | None = None
        per_chunk = max(1, CHUNK // n_proposals)
        for start in range(0, n_steps, per_chunk):
            count = min(per_chunk, n_steps - start)
            if inside:
                drawn = self._draw(count * n_proposals, rng)
                x, weights = self._weigh(*drawn, s, current, reduced_potential)
            else:  # nothing can be accepted: the rule below is told so, and energies are saved
                x, weights = current.expand(count * n_proposals, -1, -1), np.full(count * n_proposals, -np.inf)
            if n_proposals == 1:
                index, part = metropolis.independence_chain(log_w, weights, rng)
            else:
                index, part = metropolis.multiple_proposal_chain(log_w, weights.reshape(count, -1), rng)
            info = part if info is None else info + part
            last = int(index[-1])
            if last >= 0:
                chosen, log_w = x[last], float(weights[last])
        assert info is not None
        return Outcome(None if chosen is None else self.merge(positions, chosen.numpy()), info, inside)

    def latent_chain(
        self,
        positions: FloatArray,
        reduced_potential: Callable[[FloatArray], float],
        rng: np.random.Generator,
        *,
        n_steps: int = 1,
        step: float = 0.3,
    ) -> Outcome:
        """n_steps exact local steps in latent space (formula F); what stays is what `chain` keeps.

        Parameters
        ----------
        positions, reduced_potential, rng
            As for `chain`.
        step
            a of the Gaussian dimensions, in (0, 1], and the width (rad) of the walk on the circular ones.

        Raises
        ------
        InputError, EnergyError
            As for `chain`; a step outside (0, 1].
        """
        require_count("n_steps", n_steps)
        current, y, s = self.split(positions)
        reduced_potential = self.within(positions, reduced_potential)
        z, log_q = self.space.inverse(y)
        log_w = self._current_log_weight(y, s, current, reduced_potential, log_q)
        state = metropolis.State(z, np.array([log_w]))
        chosen: FloatArray | None = None
        info: metropolis.Info | None = None
        for _ in range(n_steps):
            z = metropolis.latent_proposal(state.value, rng, **self.space.base, a=step, width=step)
            x, log_w_new = current[None], np.array([-np.inf])
            if log_w != np.inf:  # else the chain stays, and energies are saved
                x, log_w_new = self._weigh(*self._forward(z), s, current, reduced_potential)
            state, part = metropolis.metropolis_step(state, metropolis.State(z, log_w_new), rng)
            info = part if info is None else info + part
            if part.n_accepted:
                chosen = x[0].numpy()
        assert info is not None
        return Outcome(None if chosen is None else self.merge(positions, chosen), info, log_w != np.inf)

    def switching_chain(
        self,
        positions: FloatArray,
        reduced_potential: Callable[[FloatArray], float],
        rng: np.random.Generator,
        *,
        schedule: ArrayLike,
        n_steps: int = 1,
        step: float = 0.3,
        n_kernel_steps: int = 1,
    ) -> Outcome:
        """n_steps nonequilibrium candidate moves (formula G) at this s; what stays is what `chain` keeps.

        Down from the current state to the flow, a fresh draw, up to the candidate, with Metropolised latent steps at
        every λ; α = min(1, W_up / W_down). About 2 · n_kernel_steps · (len(schedule) - 1) energies a move.

        Parameters
        ----------
        positions, reduced_potential, rng
            As for `chain`.
        schedule
            Increasing λ from 0 to 1.
        step
            As for `latent_chain`, of the steps at every λ.
        n_kernel_steps
            Latent steps at each λ.

        Raises
        ------
        InputError, EnergyError
            As for `chain`; a schedule that does not lead from 0 to 1, a step outside (0, 1].
        """
        require_count("n_steps", n_steps)
        lambdas = annealing.check_schedule(schedule)
        kernel = annealing.latent_kernel(**self.space.base, a=step, width=step, n_steps=n_kernel_steps)
        current, y, s = self.split(positions)
        reduced_potential = self.within(positions, reduced_potential)
        z, log_q = self.space.inverse(y)
        inside = self._current_log_weight(y, s, current, reduced_potential, log_q) != np.inf

        def log_target(z: FloatArray) -> FloatArray:
            """log π(f(z), s) + log |det df/dz|."""
            y, log_det = self.space.forward(z)
            return self.log_density(*self.place(y, s.expand(len(y), -1), current), reduced_potential) + log_det.numpy()

        state = metropolis.State(z, np.array([0.0 if inside else np.inf]))
        info: metropolis.Info | None = None
        for _ in range(n_steps):
            if inside:
                state, part = annealing.nonequilibrium_candidate_move(
                    state.value, self.space.log_base, log_target, self.space.draw, kernel, lambdas, rng
                )
            else:  # no leg is worth its energies: the rule keeps a state with q = 0
                state, part = metropolis.metropolis_step(state, metropolis.State(z, np.array([-np.inf])), rng)
            info = part if info is None else info + part
        assert info is not None
        if not info.n_accepted:
            return Outcome(None, info, inside)
        chosen = self.place(self.space.forward(state.value)[0], s, current)[0][0]
        return Outcome(self.merge(positions, chosen.numpy()), info, inside)

    def split(self, positions: FloatArray) -> tuple[Tensor, Tensor, Tensor]:
        """The molecule's own positions [n, 3], y [1, D] and s [1, S] of those of the System [N, 3], checked.

        Raises
        ------
        InputError
            Another number of particles, positions that are complex or not finite, bonds no simulation could have.
        """
        if np.iscomplexobj(positions):
            raise InputError("The current positions are complex numbers: set real ones before a move.")
        x = np.array(positions, dtype=np.float64)
        n = self.coordinates.n_atoms
        if x.ndim != 2 or x.shape[1] != 3 or (len(x) != n if self.atoms is None else len(x) <= self.atoms.max()):
            raise InputError(f"The positions have shape {x.shape}, the flow's molecule {n} atoms: they are another's.")
        self.space.eval()  # dropout would void every density
        current = torch.from_numpy(x if self.atoms is None else x[self.atoms])
        if not bool(torch.isfinite(current).all()):
            raise InputError("The current positions contain NaN or infinite values: set them before a move.")
        y, s = self.coordinates.to_internal(current[None])
        self.coordinates.require_lengths(y, s)
        return current, y, s

    def merge(self, positions: FloatArray, molecule: FloatArray) -> FloatArray:
        """Positions of the whole System [N, 3] with the molecule's [n, 3] in their place, as a new array."""
        if self.atoms is None:
            return np.array(molecule, dtype=np.float64)
        whole = np.array(positions, dtype=np.float64)
        whole[self.atoms] = molecule
        return whole

    def within(
        self, positions: FloatArray, reduced_potential: Callable[[FloatArray], float]
    ) -> Callable[[FloatArray], float]:
        """u as a function of the molecule's positions [n, 3] alone, the others as in ``positions``."""
        if self.atoms is None:
            return reduced_potential
        return lambda molecule: reduced_potential(self.merge(positions, molecule))

    def place(self, y: Tensor, s: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, n, 3] of (y [B, D], s [B, S]), standing as ``current`` [n, 3] does, and log J + Φ [B].

        NaN and -inf outside the domain. That is decided before positions exist: the map from internal coordinates would
        fold a forbidden angle back inside.
        """
        with torch.no_grad():
            made, log_volume = self.coordinates.positions_in_domain(y, s)
            return place_like(made, current, self.coordinates.zmatrix.seed), log_volume

    def log_density(
        self, x: Tensor, log_volume: Tensor, reduced_potential: Callable[[FloatArray], float]
    ) -> FloatArray:
        """log π = -u + log J + Φ [B] of what `place` returned; -inf outside the domain or where u is not finite."""
        found = log_volume.numpy() - np.array([_energy(frame, reduced_potential) for frame in x.numpy()])
        return np.where(np.isfinite(found), found, -np.inf)

    def _current_log_weight(
        self,
        y: Tensor,
        s: Tensor,
        x: Tensor,
        reduced_potential: Callable[[FloatArray], float],
        known_log_q: Tensor | None = None,
    ) -> float:
        """log π - log q of the current state; +inf where q = 0, -inf where only π = 0."""
        if not bool(self.coordinates.in_domain(y, s)[0]):
            return float("inf")
        log_q = float((self._log_q(y) if known_log_q is None else known_log_q)[0])
        if not np.isfinite(log_q):  # decided before the energy, or -inf would be subtracted from -inf
            return float("inf")
        try:
            u = float(reduced_potential(x.numpy()))
        except openmm.OpenMMException as error:
            raise EnergyError(f"OpenMM cannot compute the energy of the current positions: {error}") from error
        log_w = float(self.coordinates.log_volume(y, s)[0]) - u - log_q
        return log_w if np.isfinite(log_w) else float("-inf")

    def _weigh(
        self, y: Tensor, log_q: Tensor, s: Tensor, current: Tensor, reduced_potential: Callable[[FloatArray], float]
    ) -> tuple[Tensor, FloatArray]:
        """Positions [B, n, 3] of y [B, D] at this s [1, S], and log w [B], -inf where it is not finite."""
        fixed = s.expand(len(y), -1)
        x, log_volume = self.place(y, fixed, current)
        log_w = self.log_density(x, log_volume, reduced_potential) - log_q.numpy()
        return x, np.where(np.isfinite(log_w), log_w, -np.inf)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.flow.parameters())).device

    def _forward(self, z: FloatArray) -> tuple[Tensor, Tensor]:
        """y [B, D] and log q [B] of latent z [B, D], float64 on the CPU."""
        y, log_det = self.space.forward(z)
        return y, torch.from_numpy(self.space.log_base(z)) - log_det

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """n samples y and log q, float64 on the CPU."""
        return self.space.sample(n, rng)

    def _log_q(self, y: Tensor) -> Tensor:
        return self.space.inverse(y)[1]


def _energy(frame: FloatArray, reduced_potential: Callable[[FloatArray], float]) -> float:
    if not np.isfinite(frame).all():
        return float("inf")
    try:
        return float(reduced_potential(frame))
    except openmm.OpenMMException as error:
        logger.warning("OpenMM raised for a proposal, which is rejected: %s", error)
        return float("inf")


def check_counts(n_steps: int, n_proposals: int) -> None:
    """Raise `InputError` unless both are at least 1."""
    require_count("n_steps", n_steps)
    require_count("n_proposals", n_proposals)


def check_step(step: Any) -> float:
    """A latent step in (0, 1] as a float, or `InputError`."""
    if isinstance(step, bool) or not isinstance(step, (int, float, np.number)) or not 0.0 < step <= 1.0:
        raise InputError(f"The step of a latent move must be a number in (0, 1], got {step!r}.")
    return float(step)
