"""Formulas G and H of docs/theory.md in Cartesian coordinates, where s moves too, for a sampler's flow and System."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.artifact import Flow
from openmm_bg.coordinates import place_like
from openmm_bg.energy import thermal_energy
from openmm_bg.energy.snapshot import platform_properties
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.force import FlowPotential
from openmm_bg.matching import first_line, require_count
from openmm_bg.moves.base import ContextMove
from openmm_bg.moves.bridge import CartesianBridge
from openmm_bg.rules import annealing, metropolis
from openmm_bg.sampler import FEW, BoltzmannGeneratorSampler
from openmm_bg.standing import Report

FloatArray = NDArray[np.float64]

#: Largest difference of a frame's reduced potential between the bridge and the sampler's clones, and the part of the
#: energy that single precision adds to it.
ENERGY_SLACK, RELATIVE_SLACK = 1e-3, 1e-5
SCALE = "bridge_scale"


@dataclass(frozen=True, eq=False)
class HeldPotential(FlowPotential):
    """-kT (log q + log g - log J - Φ) of a flow in memory: `FlowForce` without a file.

    Parameters
    ----------
    held
        A flow whose ``coordinates`` have the masses and constraints of the System at hand.
    """

    held: Flow

    @property
    def flow(self) -> Flow:
        """The flow."""
        return self.held

    def __reduce__(self) -> Any:
        raise TypeError("A flow in memory is not serialised.")  # OpenMM tries, and does without


def _require_usable(sampler: BoltzmannGeneratorSampler) -> None:
    """Raise `InputError` unless the flow has a density of everything, on the CPU."""
    if not sampler.flow.is_complete:
        raise InputError(
            "This reduced flow has no completion, hence no density in Cartesian coordinates: train it anew, or take "
            "NonequilibriumMove or anneal, which keep s."
        )
    if sampler.device.type != "cpu":
        raise InputError(
            f"A Cartesian bridge evaluates the flow on the CPU, this sampler has it on {sampler.device}: make the "
            "sampler with device='cpu'."
        )


def _bind(sampler: BoltzmannGeneratorSampler, timestep: float, platform: str | None) -> CartesianBridge:
    """A bridge from the sampler's flow to its System, as its Context is now."""
    flow, context = sampler.flow, sampler.context
    held = Flow(flow.density, sampler.coordinates, flow.metadata, flow.completion)
    # A FlowForce of the user's is part of U and has a scale of its own, which must not become that of U_0.
    scale = SCALE
    while scale in context.getParameters():
        scale += "_"
    potential = HeldPotential("", "", thermal_energy(sampler.temperature), scale, held)
    name = context.getPlatform().getName() if platform is None else platform
    try:
        properties = platform_properties(name, context)
    except openmm.OpenMMException as error:
        raise InputError(f"There is no platform {name!r} ({first_line(error)}): leave platform out.") from error
    bridge = CartesianBridge(
        context.getSystem(),
        openmm.PythonForce(potential, {scale: 1.0}),
        sampler.temperature,
        timestep=timestep,
        platform=name,
        properties=properties,
    )
    bridge.follow(context)
    return bridge


def _agrees(bridge: CartesianBridge, sampler: BoltzmannGeneratorSampler, x: FloatArray) -> bool:
    """Whether bridge and clones have the same u at positions [N, 3]."""
    expected = float(sampler.pool.energies(x[None])[0]) / thermal_energy(sampler.temperature)
    found = bridge.energies(x.reshape(-1))[1]
    return abs(found - expected) <= ENERGY_SLACK + RELATIVE_SLACK * abs(expected)


# ------------------------------------------------------------------------------------------------- formula H


def anneal_cartesian(
    sampler: BoltzmannGeneratorSampler,
    n: int,
    schedule: ArrayLike,
    *,
    timestep: float = 0.0005,
    n_leapfrog: int = 10,
    n_steps: int = 1,
    platform: str | None = None,
    seed: int | None = None,
) -> tuple[Ensemble, metropolis.Info]:
    """Formula H with every coordinate moving: what `sampler.sample(n)` gives (A, C), with annealed weights.

    Walkers start from q g and are carried to the target by hybrid Monte Carlo under (1-λ) U_0 + λ U, U_0 being
    `FlowForce`'s potential. It costs n · (len(schedule) - 1) · n_steps · n_leapfrog evaluations of the force field and
    of the flow with their gradients, one after the other. The Context is left alone.

    Parameters
    ----------
    sampler
        Its flow must be `full`, or `reduced` with a completion.
    n
        Number of walkers.
    schedule
        Increasing λ from 0 to 1.
    timestep
        Of hybrid Monte Carlo, ps. Any is exact; an acceptance rate below 0.5 asks for a smaller one in a new run.
    n_leapfrog, n_steps
        Length of a trajectory, and trajectories at each λ.
    platform
        Of the bridge's Context; None takes that of the sampler's Context.
    seed
        Of momenta and choices; the draws from the flow are the sampler's.

    Returns
    -------
    ensemble : Ensemble
        At the walkers' last positions, label "exact"; its log_weights are log W, its log_q and reduced potentials are
        of those positions and do not enter the weights again.
    info : Info
        Of the kernels' steps.

    Raises
    ------
    InputError
        As `sampler.sample`; a flow without a density of every coordinate; a bad schedule, time step or platform.
    EnergyError
        The Context no longer has the energies of its System, or the bridge has others; no walker has a finite energy.
    """
    require_count("The number of walkers", n)
    lambdas = annealing.check_schedule(schedule)
    require_count("n_leapfrog", n_leapfrog)
    require_count("n_steps", n_steps)
    _require_usable(sampler)
    start = sampler.sample(n)
    bridge = _bind(sampler, timestep, platform)
    alive = np.flatnonzero(np.isfinite(start.log_weights))
    if not len(alive):
        raise EnergyError(f"None of {n} samples has a finite energy: is the flow untrained, or of another molecule?")
    if not _agrees(bridge, sampler, start.positions[alive[np.argmin(start.reduced_potentials[alive])]]):
        raise EnergyError("A bridge on that platform has other energies than the sampler: choose another platform.")
    x = start.positions[alive].reshape(len(alive), -1)
    state = metropolis.State(x, bridge.log_w(x))
    kernel = bridge.hmc_kernel(n_leapfrog, n_steps)
    state, work, info = annealing.up_leg(state, bridge.log_w, kernel, lambdas, np.random.default_rng(seed))
    positions, log_weights = start.positions.copy(), np.full(n, -np.inf)
    reduced, log_q = start.reduced_potentials.copy(), start.log_q.copy()
    positions[alive] = state.value.reshape(len(alive), -1, 3)
    log_weights[alive] = work
    with torch.jit.optimized_execution(len(alive) > FEW):
        log_q[alive] = sampler.flow.log_prob_positions(positions[alive]).numpy()
    reduced[alive] = [bridge.energies(row)[1] for row in state.value]
    return (
        Ensemble(
            positions=positions,
            reduced_potentials=reduced,
            log_q=log_q,
            log_weights=log_weights,
            n_nonfinite=int(np.isneginf(log_weights).sum()),
            label="exact",
            topology=sampler.flow.topology,
        ),
        info,
    )


# ------------------------------------------------------------------------------------------------- formula G


class CartesianNonequilibriumMove(ContextMove):
    """Formula G on a sampler's Context with every coordinate moving: down to the flow, a fresh y, up to the target.

    Each leg is molecular dynamics under (1-λ) U_0 + λ U while λ changes, U_0 being `FlowForce`'s potential, so that the
    stiff coordinates adapt to what the flow proposes. Other than all other moves of this package it changes s, and the
    place and orientation of the molecule.

    Parameters
    ----------
    sampler
        Its flow must be `full`, or `reduced` with a completion; its Context is moved.
    schedule
        Increasing λ from 0 to 1. Choose it, and the time step, before the run.
    timestep
        ps. Any is exact, large ones are rejected.
    n_verlet
        Steps at each λ but the first.
    metropolised
        True takes hybrid Monte Carlo with n_verlet steps at each λ, and the protocol work; False velocity Verlet
        without tests, whose work includes the kinetic energies.
    keep_s
        True redraws y at the s that the down leg ends with, as formula G has it, and pays with the completion's ratio
        g(s|y')/g(s|y). False draws s from the completion too, and pays nothing.
    platform
        Of the bridge's Context; None takes that of the sampler's Context.

    Attributes
    ----------
    info
        All moves so far, joined; None before the first. Its n_energies counts evaluations in the bridge.

    Raises
    ------
    InputError
        A schedule that does not lead from 0 to 1; a flow without a density of every coordinate; a bad time step, count
        or platform.

    References
    ----------
    Nilmeier, Crooks, Minh and Chodera, Proc. Natl. Acad. Sci. USA 108, E1009 (2011).
    """

    def __init__(
        self,
        sampler: BoltzmannGeneratorSampler,
        schedule: ArrayLike,
        *,
        timestep: float = 0.0005,
        n_verlet: int = 10,
        metropolised: bool = False,
        keep_s: bool = True,
        platform: str | None = None,
    ) -> None:
        super().__init__(sampler)
        require_count("n_verlet", n_verlet)
        _require_usable(sampler)
        self.schedule = annealing.check_schedule(schedule)
        self.timestep, self.n_verlet, self.metropolised = timestep, int(n_verlet), bool(metropolised)
        self.keep_s, self.platform = bool(keep_s), platform
        self._bridge, self._coordinates = _bind(sampler, timestep, platform), sampler.coordinates
        self._generation = sampler.pool.generation

    def step(self, n: int = 1) -> Report:
        """n moves on the Context's own positions.

        Velocities are carried over to accepted positions (`velocities`); if nothing was accepted the Context is not
        touched at all.

        Raises
        ------
        InputError
            n < 1, NaN positions.
        EnergyError
            The Context no longer has the energies of its System, or the bridge has others.
        """
        require_count("The number of moves", n)
        standing = self.sampler.stand()
        here = standing.positions.numpy()
        bridge = self._follow(here)
        inside = standing.inside and np.isfinite(bridge.energies(here.reshape(-1))[0])
        before = bridge.n_energies
        state = metropolis.State(here.reshape(1, -1).copy(), np.array([0.0 if inside else np.inf]))
        total: metropolis.Info | None = None
        for _ in range(n):
            if inside:
                state, info = annealing.moving_candidate_move(
                    state, self._down, self._refresh, self._up, self.sampler.rng
                )
            else:  # π_0 = 0: no leg is worth its energies, the rule keeps the state
                state, info = metropolis.metropolis_step(
                    state, metropolis.State(state.value, np.array([-np.inf])), self.sampler.rng
                )
            total = info if total is None else total + info
        assert total is not None
        spent = bridge.n_energies - before
        total = replace(total, n_energies=spent)
        self._count(total)
        moved = torch.from_numpy(state.value.reshape(-1, 3).copy()) if total.n_accepted else None
        report = self.sampler.settle(standing, total, moved)
        return {**report, "n_energies": report["n_energies"] + spent, "inside": bool(inside)}

    def _follow(self, here: FloatArray) -> CartesianBridge:
        """The bridge with the Context's parameters and box, made anew if the force field has changed.

        As of the sampler's clones, also if the change does not show at these positions. A System that was changed
        without telling its Context leaves the bridge as it is, for it is the Context that is being sampled.
        """
        sampler = self.sampler
        self._bridge.follow(sampler.context)
        stale = abs(self._bridge.kT - thermal_energy(sampler.temperature)) > 1e-9
        stale |= self._coordinates is not sampler.coordinates  # other masses or constraints
        stale |= not _agrees(self._bridge, sampler, here)
        generation = sampler.pool.generation
        if stale or generation != self._generation:
            fresh = _bind(sampler, self.timestep, self.platform)
            if _agrees(fresh, sampler, here):
                self._bridge, self._coordinates, self._generation = fresh, sampler.coordinates, generation
            elif stale:
                raise EnergyError("The move's bridge has other energies than the sampler: choose another platform.")
        return self._bridge

    # ---------------------------------------------------------------- the three parts

    def _leg(self, x: FloatArray, *, down: bool) -> tuple[FloatArray, FloatArray]:
        bridge, rng = self._bridge, self.sampler.rng
        if not self.metropolised:
            return bridge.verlet_leg(x, self.schedule, self.n_verlet, rng, down=down)
        leg = annealing.down_leg if down else annealing.up_leg
        state, work, _ = leg(
            metropolis.State(x, bridge.log_w(x)), bridge.log_w, bridge.hmc_kernel(self.n_verlet), self.schedule, rng
        )
        return state.value, work

    def _down(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        return self._leg(x, down=True)

    def _up(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        return self._leg(x, down=False)

    def _refresh(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Positions [1, 3N] of a fresh y', standing like x_0, and log h(s_0|y') - log h(s_0|y_0)."""
        sampler = self.sampler
        frame = torch.from_numpy(x.reshape(1, -1, 3))
        y_0, s_0 = sampler.coordinates.to_internal(frame)
        y, _ = sampler.space.forward(sampler.space.draw(1, sampler.rng))
        with torch.no_grad(), torch.jit.optimized_execution(False):
            if self.keep_s:
                s, log_h = s_0, self._log_g(y, s_0) - self._log_g(y_0, s_0)
            else:
                s, log_h = sampler.draw_completed(y)[0], torch.zeros(1, dtype=torch.float64)
        if not bool(sampler.coordinates.in_domain(y, s)[0]) or not bool(torch.isfinite(s).all()):
            return x, np.array([-np.inf])
        placed = place_like(sampler.coordinates.to_positions(y, s), frame[0], sampler.coordinates.zmatrix.seed)
        return placed.numpy().reshape(1, -1), log_h.nan_to_num(nan=-torch.inf).numpy()

    def _log_g(self, y: Tensor, s: Tensor) -> Tensor:
        flow = self.sampler.flow
        return (flow.joint_log_prob(y, s) - flow.log_prob(y)).to(torch.float64)
