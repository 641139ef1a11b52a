"""A flow's proposals for one System, weighed with whatever energy a host computes.

openmmtools and OpenMM's replica exchange own their Contexts and define their own reduced potentials. What their moves
have in common lies here: formulas D and E of docs/theory.md on one set of positions. The rules are those of `moves`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg import moves
from openmm_bg.artifact import Flow
from openmm_bg.coordinates import place_like
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.sampler import CHUNK, match_system

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
    info: moves.Info
    inside: bool


class FlowProposals:
    """A flow matched to a System: exact steps from given positions.

    Parameters
    ----------
    flow
        The flow of the System's one molecule.
    system
        Its constraints and masses enter Φ; its forces do not matter here.

    Raises
    ------
    InputError
        The System is not the flow's: particle count, bonds, constraints.
    """

    def __init__(self, flow: Flow, system: openmm.System) -> None:
        self.flow = flow
        # Lengths that the System frees are kept by every step and moved by the MD in between.
        self.coordinates, _ = match_system(flow, system)

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
        current = torch.from_numpy(np.array(positions, dtype=np.float64))
        if not bool(torch.isfinite(current).all()):
            raise InputError("The current positions contain NaN or infinite values: set them before a move.")
        y0, s = self.coordinates.to_internal(current[None])
        self.coordinates.require_lengths(y0, s)
        log_w = self._current_log_weight(y0, s, current, reduced_potential)
        inside = log_w != np.inf
        chosen: Tensor | None = None
        info: moves.Info | None = None
        per_chunk = max(1, CHUNK // n_proposals)
        for start in range(0, n_steps, per_chunk):
            count = min(per_chunk, n_steps - start)
            if inside:
                x, weights = self._propose(count * n_proposals, s, current, reduced_potential, rng)
            else:  # nothing can be accepted: the rule below is told so, and energies are saved
                x, weights = current.expand(count * n_proposals, -1, -1), np.full(count * n_proposals, -np.inf)
            if n_proposals == 1:
                index, part = moves.independence_chain(log_w, weights, rng)
            else:
                index, part = moves.multiple_proposal_chain(log_w, weights.reshape(count, -1), rng)
            info = part if info is None else info + part
            last = int(index[-1])
            if last >= 0:
                chosen, log_w = x[last], float(weights[last])
        assert info is not None
        return Outcome(None if chosen is None else chosen.numpy().copy(), info, inside)

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

    def _propose(
        self,
        n: int,
        s: Tensor,
        current: Tensor,
        reduced_potential: Callable[[FloatArray], float],
        rng: np.random.Generator,
    ) -> tuple[Tensor, FloatArray]:
        """Positions [n, N, 3] of fresh proposals at this s, and their log-weights [n], -inf outside the domain."""
        y, log_q = self._draw(n, rng)
        fixed = s.expand(n, -1)
        # Before positions exist: the map from internal coordinates would fold a forbidden angle back inside.
        inside = self.coordinates.in_domain(y, fixed)
        x = torch.full((n, self.coordinates.n_atoms, 3), torch.nan, dtype=torch.float64)
        weights = np.full(n, -np.inf)
        if not bool(inside.any()):
            return x, weights
        y_in, s_in = y[inside], fixed[inside]
        x[inside] = place_like(self.coordinates.to_positions(y_in, s_in), current, self.coordinates.zmatrix.seed)
        u = np.array([_energy(frame, reduced_potential) for frame in x[inside].numpy()])
        log_w = self.coordinates.log_volume(y_in, s_in).numpy() - u - log_q[inside].numpy()
        weights[inside.numpy()] = np.where(np.isfinite(log_w), log_w, -np.inf)
        return x, weights

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """n samples y and log q, float64 on the CPU."""
        device = next(iter(self.flow.parameters())).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(rng.integers(2**62)))
            y, log_q = self.flow.sample(n)
        return y.to("cpu", torch.float64), log_q.to("cpu", torch.float64)

    def _log_q(self, y: Tensor) -> Tensor:
        device = next(iter(self.flow.parameters())).device
        with torch.no_grad():
            return self.flow.log_prob(y.to(device, torch.float64)).to("cpu", torch.float64)


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
    for name, value in (("n_steps", n_steps), ("n_proposals", n_proposals)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}.")


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
