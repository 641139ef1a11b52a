"""A flow's proposals for one System, weighed with whatever energy a host computes.

openmmtools and OpenMM's replica exchange own their Contexts and define their own reduced potentials. What their moves
have in common lies here: formulas D, E and F of docs/theory.md on one set of positions, of the flow's molecule alone or
among others that stay where they are. The rules are those of `moves`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.artifact import Flow
from openmm_bg.coordinates import place_like
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.matching import match_system, require_count
from openmm_bg.rules import metropolis
from openmm_bg.sampler import CHUNK, FEW

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
        self.atoms = None if atoms is None else np.array(check_atoms(atoms), dtype=np.int64)
        # Lengths that the System frees are kept by every step and moved by the MD in between.
        self.coordinates, _ = match_system(flow, self._own(system))

    def _own(self, system: openmm.System) -> openmm.System:
        return system if self.atoms is None else _alone(self.flow, system, self.atoms)

    def require_same_system(self, system: openmm.System) -> None:
        """Refuse a System with other constraints or masses than the one matched: Φ would be another's.

        Raises
        ------
        InputError
            They differ, as after a Context was reinitialised with a changed System.
        """
        if match_system(self.flow, self._own(system))[0].constraints != self.coordinates.constraints:
            raise InputError(
                "The System's constraints or masses have changed since the flow was matched to it (was the Context "
                "reinitialised?): make a new sampler."
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
        log_w = self._current_log_weight(y, s, current, reduced_potential)
        layout = self.coordinates.layout
        proposal: dict[str, Any] = {
            "circular": layout.circular,
            "concentration": layout.concentration,
            "fold": layout.fold,
        }
        with torch.no_grad(), torch.jit.optimized_execution(False):
            z = self.flow.inverse(y.to(self._device))[0].cpu().numpy()
        state = metropolis.State(z, np.array([log_w]))
        chosen: FloatArray | None = None
        info: metropolis.Info | None = None
        for _ in range(n_steps):
            z = metropolis.latent_proposal(state.value, rng, **proposal, a=step, width=step)
            x, log_w_new = current[None], np.array([-np.inf])
            if log_w != np.inf:  # else the chain stays, and energies are saved
                x, log_w_new = self._weigh(*self._forward(z), s, current, reduced_potential)
            state, part = metropolis.metropolis_step(state, metropolis.State(z, log_w_new), rng)
            info = part if info is None else info + part
            if part.n_accepted:
                chosen = x[0].numpy()
        assert info is not None
        return Outcome(None if chosen is None else self.merge(positions, chosen), info, log_w != np.inf)

    def split(self, positions: FloatArray) -> tuple[Tensor, Tensor, Tensor]:
        """The molecule's own positions [n, 3], y [1, D] and s [1, S] of those of the System [N, 3], checked.

        Raises
        ------
        InputError
            Another number of particles, positions that are not finite, bonds no simulation could have.
        """
        x = np.array(positions, dtype=np.float64)
        n = self.coordinates.n_atoms
        if x.ndim != 2 or x.shape[1] != 3 or (len(x) != n if self.atoms is None else len(x) <= self.atoms.max()):
            raise InputError(f"The positions have shape {x.shape}, the flow's molecule {n} atoms: they are another's.")
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
        inside, seed = self.coordinates.in_domain(y, s), self.coordinates.zmatrix.seed
        if bool(inside.all()):
            made, log_volume = self.coordinates.positions_and_log_volume(y, s)
            return place_like(made, current, seed), log_volume
        x = torch.full((len(y), self.coordinates.n_atoms, 3), torch.nan, dtype=torch.float64)
        log_volume = torch.full((len(y),), -torch.inf, dtype=torch.float64)
        if bool(inside.any()):
            made, log_volume[inside] = self.coordinates.positions_and_log_volume(y[inside], s[inside])
            x[inside] = place_like(made, current, seed)
        return x, log_volume

    def log_density(
        self, x: Tensor, log_volume: Tensor, reduced_potential: Callable[[FloatArray], float]
    ) -> FloatArray:
        """log π = -u + log J + Φ [B] of what `place` returned; -inf outside the domain or where u is not finite."""
        found = log_volume.numpy() - np.array([_energy(frame, reduced_potential) for frame in x.numpy()])
        return np.where(np.isfinite(found), found, -np.inf)

    def _current_log_weight(
        self, y: Tensor, s: Tensor, x: Tensor, reduced_potential: Callable[[FloatArray], float]
    ) -> float:
        """log π - log q of the current state; +inf where q = 0, -inf where only π = 0."""
        if not bool(self.coordinates.in_domain(y, s)[0]):
            return float("inf")
        log_q = float(self._log_q(y)[0])
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
        latent = torch.from_numpy(z).to(self._device)
        with torch.no_grad(), torch.jit.optimized_execution(len(z) > FEW):
            y, log_det = self.flow.forward(latent)
            log_q = self.flow.density.base_log_prob(latent) - log_det  # type: ignore[operator]
        return y.to("cpu", torch.float64), log_q.to("cpu", torch.float64)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """n samples y and log q, float64 on the CPU."""
        device, seed = self._device, int(rng.integers(2**62))
        few = torch.jit.optimized_execution(n > FEW)
        with few, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if (
                device.type == "cpu"
            ):  # torch.manual_seed takes longer than an energy, for accelerators that are not used
                torch.default_generator.manual_seed(seed)
            else:
                torch.manual_seed(seed)
            y, log_q = self.flow.sample(n)
        return y.to("cpu", torch.float64), log_q.to("cpu", torch.float64)

    def _log_q(self, y: Tensor) -> Tensor:
        with torch.no_grad(), torch.jit.optimized_execution(len(y) > FEW):
            return self.flow.log_prob(y.to(self._device, torch.float64)).to("cpu", torch.float64)


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


def check_atoms(atoms: Sequence[int]) -> list[int]:
    """Particle indices as a list of ints.

    Raises
    ------
    InputError
        They are not whole numbers from 0 on, all different.
    """
    found = list(atoms)
    if any(isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)) or k < 0 for k in found):
        raise InputError("atom_subset must be a list of particle indices, whole numbers from 0 on.")
    if not found or len(set(found)) < len(found):
        raise InputError("atom_subset must name each of the molecule's particles once.")
    return [int(k) for k in found]


def require_molecule(context: openmm.Context, atoms: Sequence[int]) -> None:
    """Refuse a periodic Context that does not see that these particles are one molecule.

    A barostat scales the centres of what it takes for molecules, and periodic wrapping moves them: either would tear
    the flow's molecule apart, and the internal coordinates of the pieces mean nothing.

    Raises
    ------
    InputError
        Two of the particles belong to different molecules.
    """
    if not context.getSystem().usesPeriodicBoundaryConditions():
        return
    home = next(set(molecule) for molecule in context.getMolecules() if atoms[0] in molecule)
    strangers = [k for k in atoms if k not in home]
    if strangers:
        raise InputError(
            f"In this periodic System particles {atoms[0]} and {strangers[0]} are different molecules, which a "
            "barostat or wrapping would part: give the System the bonds of the flow's molecule."
        )


def _alone(flow: Flow, system: openmm.System, atoms: NDArray[np.int64]) -> openmm.System:
    """The molecule as a System of its own: masses, constraints and harmonic bonds among its particles.

    Φ of the whole System is this System's plus a constant, because no constraint leads from the molecule to others.
    """
    total, n = system.getNumParticles(), flow.coordinates.n_atoms
    if len(atoms) != n:
        raise InputError(
            f"atom_subset names {len(atoms)} particles, the flow's molecule has {n}: name all, in its order."
        )
    if atoms.max() >= total:
        raise InputError(f"atom_subset names particle {atoms.max()}, the System has {total} particles.")
    forces = system.getForces()
    if any(isinstance(force, openmm.DrudeForce) for force in forces):
        raise InputError("The System has Drude particles: polarisable models of that kind are not supported.")
    own = {int(particle): k for k, particle in enumerate(atoms)}
    alone = openmm.System()
    for particle in own:
        alone.addParticle(system.getParticleMass(particle))
    for k in range(total):
        if system.isVirtualSite(k):
            site = system.getVirtualSite(k)
            if k in own or any(site.getParticle(i) in own for i in range(site.getNumParticles())):
                raise InputError(f"Particle {k} is a virtual site of the flow's molecule: flows need real atoms only.")
    for k in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(k)
        if (i in own) != (j in own):
            raise InputError(f"A constraint holds particle {i} to {j}, of which atom_subset names one: name them all.")
        if i in own:
            alone.addConstraint(own[i], own[j], length)
    bonded = [force for force in forces if isinstance(force, openmm.HarmonicBondForce)]
    if bonded:
        bonds = openmm.HarmonicBondForce()
        for force in bonded:
            for k in range(force.getNumBonds()):
                i, j, length, strength = force.getBondParameters(k)
                if i in own and j in own:
                    bonds.addBond(own[i], own[j], length, strength)
        alone.addForce(bonds)
    return alone


def redraw_velocities(context: openmm.Context, temperature: float, rng: np.random.Generator) -> FloatArray:
    """Give the Context velocities of this temperature (K) and return them, [N, 3] nm/ps.

    Projected on the constraints at the Context's positions, and freed of the centre's motion if the System has a
    CMMotionRemover.
    """
    context.setVelocitiesToTemperature(temperature, int(rng.integers(1, 2**31 - 1)))
    velocities = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    system = context.getSystem()
    if any(isinstance(force, openmm.CMMotionRemover) for force in system.getForces()):
        masses = np.array([system.getParticleMass(i)._value for i in range(len(velocities))])
        velocities = velocities - (masses[:, None] * velocities).sum(0) / masses.sum()
        context.setVelocities(velocities)
    return np.array(velocities, dtype=np.float64)
