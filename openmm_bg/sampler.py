"""`BoltzmannGeneratorSampler`: a flow paired with an OpenMM Context.

Formulas A, B and C (weights), D and E (moves) of docs/theory.md meet here; the rules themselves are in `weights` and
`moves`, the energies in `energy`, the checks of what comes in in `matching`. Every move on a Context, here and in other
modules, stands on the same three steps: `stand` where it is, `weigh` proposals there, `settle` what was decided.
"""

from __future__ import annotations

import logging
import os
import threading
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.artifact import Flow, load
from openmm_bg.energy import ContextPool, Target, thermal_energy
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.latent_space import CHUNK, FEW, LatentSpace
from openmm_bg.matching import (
    context_positions,
    match_system,
    require_all_forces,
    require_count,
    target_temperature,
    usable_device,
)
from openmm_bg.rules import metropolis
from openmm_bg.standing import Report, Standing, counts, place, seed_frame
from openmm_bg.velocities import carry_velocities, local_frames

__all__ = ["CHUNK", "FEW", "BoltzmannGeneratorSampler"]

logger = logging.getLogger(__name__)

#: torch has one global generator: samplers in several threads take turns, or they would share draws.
_STREAM = threading.Lock()


class BoltzmannGeneratorSampler:
    """Exact sampling of a Context's ensemble with a flow's proposals.

    Parameters
    ----------
    flow
        Path of an artifact, or a `Flow`.
    context
        ``openmm.Context`` with positions set. `sample` leaves it alone; `step` moves its positions.
    temperature
        Of the target, K or Quantity; None takes the integrator's, anew at every call. One other than the flow's is
        exact.
    device
        Torch device of the flow; None takes CUDA where torch has it. A device that cannot be used is replaced by
        the CPU with a logged note.
    n_proposals
        Proposals a Metropolis step chooses from: 1 is formula D, more are formula E.
    seed
        Of proposals, choices and velocities.
    platform, n_workers
        Platform and number of the Contexts that evaluate energies; None chooses by timing. "twin": a torch twin of the
        System evaluates them; "twin:cuda": on a GPU.
    tune
        "full" tries worker processes too, and the twin on the CPU and on a GPU if torch has one; it takes longer and is
        remembered (see `openmm_bg.energy.tune`).

    Attributes
    ----------
    space
        The latent side of the flow, which moves walk in.
    statistics
        ``n_proposed``, ``n_accepted`` (Metropolis steps and those that moved), ``n_energies``,
        ``longest_rejection_streak``.

    Raises
    ------
    InputError
        The System is not the flow's: particle count, bonds, constraints; a bad temperature or n_proposals; an
        integrator that leaves out forces.
    ArtifactError
        The flow cannot be read.
    """

    def __init__(
        self,
        flow: Flow | str | os.PathLike[str],
        context: openmm.Context,
        temperature: Any = None,
        *,
        device: str | torch.device | None = None,
        n_proposals: int = 1,
        seed: int | None = None,
        platform: str | None = None,
        n_workers: int | None = None,
        tune: Literal["quick", "full"] = "quick",
    ) -> None:
        require_count("n_proposals", n_proposals)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
            raise InputError(f"The seed must be a whole number of at least 0, got {seed!r}.")
        if not isinstance(context, openmm.Context):
            kind = type(context).__name__
            raise InputError(f"The sampler needs an openmm.Context (simulation.context), got a {kind}.")
        self.flow = flow if isinstance(flow, Flow) else load(flow)
        self.context = context
        self._asked_temperature = temperature
        self.temperature = target_temperature(temperature, context)
        require_all_forces(context)
        self.n_proposals = int(n_proposals)
        self.device = usable_device(device)
        self.flow.density.to(self.device)
        if self.flow.completion is not None:
            self.flow.completion.to(self.device)
        self.space = LatentSpace(self.flow, self.device)
        self._frames = local_frames(self.flow.bonds)
        self._system = context.getSystem()
        self._match()
        self._rng = np.random.default_rng(seed)
        if abs(self.temperature - self.flow.temperature) > 1e-6:
            logger.info(
                "The target is at %g K, the flow was trained at %g K: results are exact, fewer samples count.",
                self.temperature,
                self.flow.temperature,
            )
        self.pool = ContextPool(context, platform=platform, n_workers=n_workers, tune=tune)
        self.target = Target(self.coordinates, self.pool, self.temperature)
        self._info: metropolis.Info | None = None

    # ---------------------------------------------------------------- housekeeping

    def close(self) -> None:
        """End the energy workers; also done when the sampler is collected."""
        self.pool.close()

    def __enter__(self) -> BoltzmannGeneratorSampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def statistics(self) -> dict[str, int]:
        """Counts since construction; ``n_energies`` includes those of `sample` and `reverse_kl`.

        Every call of these spends one or two more that are not counted, comparing the clones with the Context.
        """
        return counts(self._info) | {"n_energies": self.pool.n_energies}

    @property
    def info(self) -> metropolis.Info | None:
        """All steps of `step` since construction, joined; None before the first."""
        return self._info

    @property
    def rng(self) -> np.random.Generator:
        """This sampler's random stream, which moves on it share."""
        return self._rng

    @property
    def label(self) -> Literal["exact", "rigid"]:
        """What weights at s = s0 are exact for: the force field (A), or the manifold s = s0 (B, a `reduced` flow).

        An `Ensemble` of formula C, whose s a completion has drawn, says "exact" itself.
        """
        rest = (c for c in self.coordinates.coordinates if not c.modelled)
        return "exact" if all(c.constrained for c in rest) else "rigid"

    def _draw(self, n: int) -> tuple[Tensor, Tensor]:
        """n samples y and log q in float64 on the CPU."""
        return self.space.sample(n, self._rng)

    def draw_completed(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """s ~ g(s|y) with the System's constrained lengths, and log g, in float64 on the CPU.

        From this sampler's seed; torch's global generator is left as it was.
        """
        cuda = self.device.type == "cuda"
        with _STREAM, torch.random.fork_rng(devices=[self.device] if cuda else []):
            # On a CPU not torch.manual_seed: it looks for accelerators, for longer than an energy takes.
            seed = torch.manual_seed if cuda else torch.default_generator.manual_seed
            seed(int(self._rng.integers(2**62)))
            s, log_g = self.flow.complete(y.to(self.device), self.coordinates.reference_fixed)
        return s.cpu(), log_g.cpu()

    # ---------------------------------------------------------------- weights: formulas A, B and C

    def sample(self, n: int, *, completion: bool | None = None) -> Ensemble:
        """n independent samples of the flow with their importance weights.

        A `full` flow's weights are formula A's. A `reduced` flow with a completion draws s as well and has those of
        formula C, exact for the force field; without one s stays at its reference values and they are formula B's.

        Parameters
        ----------
        n
            Number of samples, at least 1. Memory beyond the result itself does not grow with n.
        completion
            False leaves the completion out (formula B), True insists on one; None uses it where the flow has one.

        Returns
        -------
        Ensemble
            Weight zero where a sample lies outside the coordinates' domain or has no finite energy. Its ``log_q`` is
            log q, with a completion log q + log g; its ``label`` is "exact" (A, C) or "rigid" (B).

        Raises
        ------
        InputError
            n < 1; a barostat; lengths that the flow keeps fixed but the System does not; forces that depend on where
            the molecule stands; ``completion=True`` and a `reduced` flow without one.
        EnergyError
            The Context no longer has the energies of its System.
        """
        require_count("The number of samples", n)
        if completion and not self.flow.is_complete:
            raise InputError("This reduced flow has no completion: train it anew, or leave completion=True out.")
        self._follow()
        self._refuse_sampling()
        self._require_invariance()
        drawn = self.flow.completion is not None and completion is not False
        try:
            positions = np.empty((n, self.coordinates.n_atoms, 3))
            reduced, log_q, log_weights = np.empty(n), np.empty(n), np.empty(n)
        except MemoryError:
            size = n * (self.coordinates.n_atoms * 3 + 3) * 8 / 1024**3
            raise InputError(f"{n} samples take {size:.3g} GiB, more than there is: draw them in parts.") from None
        s = self.coordinates.reference_fixed
        for start in range(0, n, CHUNK):
            stop = min(n, start + CHUNK)
            y, lq = self._draw(stop - start)
            fixed = s.expand(len(y), -1)
            if drawn:
                fixed, log_g = self.draw_completed(y)
                lq = lq + log_g
            log_density, x = self.target.log_density_and_positions(y, fixed)
            u = self._reduced_potential(y, fixed, log_density)
            weight = (log_density - lq).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
            positions[start:stop] = x.numpy()
            reduced[start:stop], log_q[start:stop] = u.numpy(), lq.numpy()
            log_weights[start:stop] = weight.numpy()
        return Ensemble(
            positions=positions,
            reduced_potentials=reduced,
            log_q=log_q,
            log_weights=log_weights,
            n_nonfinite=int(np.isneginf(log_weights).sum()),
            label="exact" if drawn else self.label,
            topology=self.flow.topology,
        )

    def _reduced_potential(self, y: Tensor, s: Tensor, log_density: Tensor) -> Tensor:
        """u [B] out of log π = -u + log J + Φ; +inf where π = 0."""
        u = self.coordinates.log_volume(y, s) - log_density
        return u.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _follow(self) -> tuple[np.ndarray, float]:
        """Catch up with the Context: parameters, box, forces, and after a reinitialisation constraints and masses.

        Returns its positions [N, 3] in nm, and the pool's energy there, kJ/mol.
        """
        self.space.eval()  # dropout would void every density
        require_all_forces(self.context)
        found = self.pool.sync()
        self._system = self.context.getSystem()
        if _kinematics(self._system) != self._matched:
            self._match()
        self.temperature = target_temperature(self._asked_temperature, self.context)
        self.target = Target(self.coordinates, self.pool, self.temperature)
        return found

    def _match(self) -> None:
        """Coordinates with the constraints and masses of the Context's System."""
        self.coordinates, self._freed = match_system(self.flow, self._system)
        self._matched = _kinematics(self._system)

    def _refuse_sampling(self) -> None:
        kinds = [type(force).__name__ for force in self._system.getForces()]
        barostats = [kind for kind in kinds if "Barostat" in kind]
        if barostats:
            raise InputError(
                f"The System has a {barostats[0]}: independent samples need a fixed volume, remove it or use step()."
            )
        images = (openmm.NonbondedForce.Ewald, openmm.NonbondedForce.PME, openmm.NonbondedForce.LJPME)
        nonbonded = (force for force in self._system.getForces() if isinstance(force, openmm.NonbondedForce))
        if any(force.getNonbondedMethod() in images for force in nonbonded):
            raise InputError(
                "The System sums electrostatics over periodic images, so that its energy depends on how the molecule "
                "is turned: sample() needs the molecule alone, use step()."
            )
        if self._freed:
            raise InputError(
                f"The flow keeps {len(self._freed)} bond lengths fixed that this System does not constrain: "
                "use step(), or a System with the flow's constraints."
            )

    def _require_invariance(self) -> None:
        """Formula A integrates over rigid motion: the energy must not depend on where the molecule stands."""
        x = context_positions(self.context)
        turned = x - x.mean(0)
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation))
        moved = turned @ rotation.T + np.array([0.31, -0.17, 0.23])
        energy, other, force = *self.pool.energies(np.stack((x, moved))), self.pool.energies_and_forces(x[None])[1]
        # A rounding error of the positions, times the forces, is what single precision may change.
        slack = 1e-4 * thermal_energy(self.temperature) + 1e-5 * abs(energy) + 1e-6 * np.abs(force).sum()
        if not abs(other - energy) <= slack:
            raise InputError(
                "The System's energy depends on where the molecule stands (an external force or a box smaller than the "
                "cutoff): sample() needs the molecule alone, use step()."
            )

    # ---------------------------------------------------------------- training signal

    def reverse_kl(self, n: int) -> Tensor:
        """Reverse Kullback-Leibler divergence to the target up to log Z, kT: mean of log q - log π over n samples.

        ``.backward()`` fills the gradients of the flow's parameters, through OpenMM's forces. Samples without a finite
        energy are left out of the mean and counted in ``pool.n_nonfinite``. Nothing is clipped: a steric clash
        dominates the value, so that training uses `openmm_bg.training` with its energy regulariser. What a `reduced`
        flow does not model stands at its reference values, completion or not.

        Parameters
        ----------
        n
            Number of samples; all of them are held in memory with their graph.

        Returns
        -------
        Tensor
            Scalar, float64.

        Raises
        ------
        InputError
            n < 1, or a System that `sample` refuses.
        EnergyError
            Not one of the n samples has a finite energy.
        """
        require_count("The number of samples", n)
        self._follow()
        self._refuse_sampling()
        self._require_invariance()
        z = torch.from_numpy(self.space.draw(n, self._rng)).to(self.device)
        y, log_det = self.flow.forward(z)
        base = self.flow.density.base_log_prob(z)  # type: ignore[operator]
        log_density = self.target.log_density(y.cpu(), self.coordinates.reference_fixed.expand(n, -1))
        finite = torch.isfinite(log_density)
        if not finite.any():
            raise EnergyError(f"None of {n} samples has a finite energy: is it untrained, or of another molecule?")
        log_q = (base - log_det).cpu()
        return (log_q[finite] - log_density[finite]).mean()

    # ---------------------------------------------------------------- moves: what they share

    def stand(self) -> Standing:
        """Where the Context stands, weighed anew (nothing is taken over from earlier moves).

        Raises
        ------
        InputError
            NaN positions, or lengths that no simulation has.
        EnergyError
            The Context no longer has the energies of its System.
        """
        before = self.pool.n_energies
        positions, energy = self._follow()
        current = torch.from_numpy(positions)
        with torch.no_grad():
            y, s, log_volume = self.coordinates.to_internal_and_log_volume(current[None])
            self.coordinates.require_lengths(y, s)
            inside = bool(self.coordinates.in_domain(y, s))
        frame = seed_frame(current, self.coordinates.zmatrix.seed)  # before the flow takes the caches
        log_w = float("inf")  # q = 0: no proposal reaches this state, so detailed balance keeps the chain there
        if not inside:
            z = np.full(tuple(y.shape), np.nan)
        else:
            z, found = self.space.inverse(y)
            log_q = float(found)
            if log_q > -float("inf"):
                self.pool.n_energies += 1  # the comparison with the Context, made anyway, has it
                log_w = float(log_volume) - energy / self.target.kT - log_q
        return Standing(current, y, s, log_w, before, z, frame)

    def weigh(self, standing: Standing, y: Tensor, log_q: Tensor) -> tuple[Tensor, np.ndarray]:
        """Positions [B, N, 3] and log π - log q [B] of proposals y [B, D] at the s and place of where a move began.

        Outside the domain, which is decided on (y, s), positions are NaN and the weight is -inf; so is that of an
        energy that is not finite.
        """
        x, log_volume = place(self.coordinates, standing, y)
        weights = (log_volume - log_q).numpy() - self.pool.energies(x) / self.target.kT
        return x, np.where(np.isfinite(weights), weights, -np.inf)

    def settle(self, standing: Standing, info: metropolis.Info, positions: Tensor | None) -> Report:
        """Give the Context the positions [N, 3] that were accepted, with its velocities; None leaves it untouched."""
        if positions is not None:
            old, new = standing.positions.numpy(), positions.numpy()
            carry_velocities(self.context, old, new, self.temperature, self._rng, self._frames)
        return {
            "n_proposed": info.n_proposed,
            "n_accepted": info.n_accepted,
            "n_energies": self.pool.n_energies - standing.n_energies,
            "longest_rejection_streak": info.longest_rejection_streak,
            "acceptance_probability": info.acceptance_probability,
            "accepted": positions is not None,
            "inside": standing.inside,
        }

    # ---------------------------------------------------------------- moves: formulas D and E

    def step(self, n: int = 1) -> Report:
        """n exact Metropolis steps on the Context's own positions (formula D; n_proposals > 1: formula E).

        What the flow does not model (s) stays as it is, and so do seed atom 0, the direction to seed atom 1 and the
        half-plane of seed atom 2; alternate with MD, which moves them. Velocities are carried over to accepted
        positions (`velocities`); if nothing was accepted the Context is not touched at all.

        Parameters
        ----------
        n
            Number of steps, at least 1.

        Returns
        -------
        Report
            ``n_proposed``, ``n_accepted``, ``n_energies``, ``longest_rejection_streak`` and
            ``acceptance_probability`` of this call, ``accepted`` (did the Context move), ``inside`` (False where the
            current state has q = 0, so that the chain stays).

        Raises
        ------
        InputError
            n < 1, NaN positions.
        EnergyError
            The Context no longer has the energies of its System.
        """
        require_count("The number of steps", n)
        standing = self.stand()
        log_w = standing.log_w
        chosen: Tensor | None = None
        info: metropolis.Info | None = None
        per_chunk = max(1, CHUNK // self.n_proposals)
        for start in range(0, n, per_chunk):
            count = min(per_chunk, n - start)
            if standing.inside:
                x, weights = self.weigh(standing, *self._draw(count * self.n_proposals))
            else:  # nothing can be accepted: the rule is told so, and energies are saved
                x, weights = standing.positions[None], np.full(count * self.n_proposals, -np.inf)
            if self.n_proposals == 1:
                index, part = metropolis.independence_chain(log_w, weights, self._rng)
            else:
                index, part = metropolis.multiple_proposal_chain(log_w, weights.reshape(count, -1), self._rng)
            info = part if info is None else info + part
            last = int(index[-1])
            if last >= 0:
                chosen, log_w = x[last], float(weights[last])
        assert info is not None
        self._info = info if self._info is None else self._info + info
        return self.settle(standing, info, chosen)


def _kinematics(system: openmm.System) -> tuple[int, list[float], list[tuple[int, int, float]]]:
    """What tells that coordinates and Φ need to be matched anew: number of forces, masses, constraints of a System.

    A tenth of the time that matching takes, for it is read before every move.
    """
    masses = [system.getParticleMass(i)._value for i in range(system.getNumParticles())]
    found = [system.getConstraintParameters(k) for k in range(system.getNumConstraints())]
    return system.getNumForces(), masses, [(i, j, length._value) for i, j, length in found]
