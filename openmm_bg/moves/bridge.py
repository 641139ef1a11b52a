"""A bridge from a flow to a force field in Cartesian coordinates, where everything moves (formulas G and H).

One Context holds both potentials in force groups of their own, U_0 = -kT log π_0 and U, and a `CustomIntegrator` mixes
their forces by λ: MD under U_λ = (1-λ) U_0 + λ U, which every platform of OpenMM can run. In Cartesian measure
log π_0 = log q + log g - log J - Φ beside log π = -u; constraints of the System act on both alike, so that the factor
J √det Z of constrained MD is common to all λ.

π is restricted to where π_0 > 0 (the sectors of docs/theory.md): a state outside counts as π = 0 and is never entered.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
import openmm  # isort: skip

from openmm_bg.energy import thermal_energy
from openmm_bg.errors import InputError
from openmm_bg.matching import first_line, require_count
from openmm_bg.rules.annealing import Kernel, check_schedule
from openmm_bg.rules.metropolis import Info, State, metropolis_step

FloatArray = NDArray[np.float64]

BASE, TARGET = 0, 1  # force groups
#: Relative error of constrained distances: the integrator is reversible to about this.
TOLERANCE = {"Reference": 1e-9, "CPU": 1e-9}
TOLERANCE_SINGLE = 1e-6


def _integrator(timestep: float) -> openmm.CustomIntegrator:
    """Velocity Verlet under U_λ with constraints on positions and velocities, velocities on the step.

    Both forces are kept from one step to the next, so that a step evaluates each of them once; ``stale`` says that
    positions were set from outside.
    """
    integrator = openmm.CustomIntegrator(timestep)
    integrator.addGlobalVariable("lam", 1.0)
    integrator.addGlobalVariable("stale", 1.0)
    for name in ("f_base", "f_target", "x_free"):
        integrator.addPerDofVariable(name, 0.0)
    kick = "v + 0.5*dt*((1 - lam)*f_base + lam*f_target)/m"
    integrator.beginIfBlock("stale > 0.5")
    integrator.addComputePerDof("f_base", f"f{BASE}")
    integrator.addComputePerDof("f_target", f"f{TARGET}")
    integrator.addComputeGlobal("stale", "0")
    integrator.endBlock()
    integrator.addComputePerDof("v", kick)
    integrator.addComputePerDof("x", "x + dt*v")
    integrator.addComputePerDof("x_free", "x")
    integrator.addConstrainPositions()
    integrator.addComputePerDof("v", "v + (x - x_free)/dt")
    integrator.addComputePerDof("f_base", f"f{BASE}")
    integrator.addComputePerDof("f_target", f"f{TARGET}")
    integrator.addComputePerDof("v", kick)
    integrator.addConstrainVelocities()
    return integrator


class CartesianBridge:
    """Energies, kernels and legs of a bridge on one Context of its own; walkers are rows of positions [n, 3N] (nm).

    Parameters
    ----------
    system
        The target's System; a copy is used, without barostats, thermostats and removers of centre-of-mass motion,
        none of which belongs to U.
    base
        Force whose potential is -kT log π_0 in Cartesian measure, normalised if log Z is wanted; taken over.
    temperature
        K or Quantity.
    timestep
        ps.
    platform
        Name of the Context's platform; None takes Reference.
    properties
        Platform properties.

    Attributes
    ----------
    n_energies
        Evaluations of the target's energy or forces so far.

    Raises
    ------
    InputError
        A bad temperature or timestep, a platform that does not exist, a System that cannot be copied or evaluated.
    """

    def __init__(
        self,
        system: openmm.System,
        base: openmm.Force,
        temperature: Any,
        *,
        timestep: float = 0.001,
        platform: str | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(timestep, bool) or not isinstance(timestep, (int, float)) or not 0.0 < timestep < math.inf:
            raise InputError(f"The time step must be a positive number of picoseconds, got {timestep!r}.")
        self.kT = thermal_energy(temperature)
        self.n_energies = 0
        name = "Reference" if platform is None else platform
        try:
            own = copy.copy(system)
        except Exception as error:  # whatever pickling a PythonForce raises
            raise InputError(f"The System cannot be copied ({first_line(error)}): a bridge needs its own.") from error
        for index in reversed(range(own.getNumForces())):
            force = own.getForce(index)
            kind = type(force).__name__
            if "Barostat" in kind or kind in ("CMMotionRemover", "AndersenThermostat"):
                own.removeForce(index)
                continue
            force.setForceGroup(TARGET)
            if isinstance(force, openmm.NonbondedForce):  # Ewald's reciprocal part may have had a group of its own
                force.setReciprocalSpaceForceGroup(-1)
        base.setForceGroup(BASE)
        own.addForce(base)
        masses = [own.getParticleMass(i)._value for i in range(own.getNumParticles())]
        self._masses = np.array(masses, dtype=np.float64)[:, None]
        self._integrator = _integrator(float(timestep))
        tolerance = TOLERANCE.get(name, TOLERANCE_SINGLE)
        self._integrator.setConstraintTolerance(tolerance)
        self._tolerance = tolerance
        try:
            found = openmm.Platform.getPlatformByName(name)
            self.context = openmm.Context(own, self._integrator, found, dict(properties or {}))
        except openmm.OpenMMException as error:
            raise InputError(f"A bridge cannot be made on the platform {name} ({first_line(error)}).") from error

    # ---------------------------------------------------------------- energies

    def follow(self, context: openmm.Context) -> None:
        """Take over another Context's global parameters and box."""
        known = set(self.context.getParameters())
        for name, value in context.getParameters().items():
            if name in known:
                self.context.setParameter(name, value)
        self.context.setPeriodicBoxVectors(*context.getState().getPeriodicBoxVectors())

    def energies(self, row: FloatArray) -> tuple[float, float]:
        """-log π_0 and u at positions [3N]; +inf where one is not finite or OpenMM raises."""
        try:
            self.context.setPositions(row.reshape(-1, 3))
            return self._energies()
        except openmm.OpenMMException:
            return math.inf, math.inf

    def _energies(self) -> tuple[float, float]:
        self.n_energies += 1
        found = []
        for group in (BASE, TARGET):
            value = self.context.getState(energy=True, groups={group}).getPotentialEnergy()._value / self.kT
            found.append(value if math.isfinite(value) else math.inf)
        return found[0], found[1]

    def log_w(self, x: FloatArray) -> FloatArray:
        """log π - log π_0 [n]; -inf where either is zero."""
        pairs = [self.energies(row) for row in x]
        return np.array([u0 - u if math.isfinite(u0) and math.isfinite(u) else -math.inf for u0, u in pairs])

    def _start(self, row: FloatArray, rng: np.random.Generator) -> tuple[float, float, float]:
        """-log π_0, u and K of positions with fresh velocities that obey the constraints."""
        u0, u = self.energies(row)
        spread = np.sqrt(self.kT / self._masses)
        self.context.setVelocities(spread * rng.standard_normal((len(spread), 3)))
        self.context.applyVelocityConstraints(self._tolerance)
        self._integrator.setGlobalVariableByName("stale", 1.0)
        return u0, u, self._kinetic()

    def _kinetic(self) -> float:
        v = self.context.getState(velocities=True).getVelocities(asNumpy=True)._value
        return float(0.5 * (self._masses * v**2).sum() / self.kT)

    def _run(self, lambdas: FloatArray, n: int) -> None:
        """n steps of velocity Verlet at each λ."""
        for lam in lambdas:
            self._integrator.setGlobalVariableByName("lam", float(lam))
            self._integrator.step(n)
            self.n_energies += n

    def _end(self) -> tuple[FloatArray, float, float, float]:
        """Positions [3N], -log π_0, u and K where the Context stands."""
        x = self.context.getState(positions=True).getPositions(asNumpy=True)._value
        u0, u = self._energies()
        return np.array(x, dtype=np.float64).reshape(-1), u0, u, self._kinetic()

    # ---------------------------------------------------------------- Metropolised kernel

    def hmc_kernel(self, n_leapfrog: int = 10, n_steps: int = 1) -> Kernel:
        """Hybrid Monte Carlo under U_λ, for `annealing.up_leg`, `down_leg` and what is made of them.

        Momenta drawn anew, n_leapfrog steps of velocity Verlet, α = min(1, exp(-ΔH)): leaves π_λ invariant and is
        reversible for it, whatever the time step (Duane et al., Phys. Lett. B 195, 216 (1987)).

        Raises
        ------
        InputError
            n_leapfrog or n_steps below 1.
        """
        require_count("n_leapfrog", n_leapfrog)
        require_count("n_steps", n_steps)

        def kernel(state: State, lam: float, log_w: Any, rng: np.random.Generator) -> tuple[State, Info]:
            total: Info | None = None
            for _ in range(n_steps):
                rows = [self._trajectory(row, lam, n_leapfrog, rng) for row in state.value]
                value, weights, ratio = (np.array(column) for column in zip(*rows, strict=True))
                state, info = metropolis_step(state, State(value, weights), rng, log_ratio=ratio)
                total = info if total is None else total + info
            assert total is not None
            return state, total

        return kernel

    def _trajectory(
        self, row: FloatArray, lam: float, n: int, rng: np.random.Generator
    ) -> tuple[FloatArray, float, float]:
        """Proposal, its log w, and the logarithm of the Metropolis ratio."""
        u0, u, kinetic = self._start(row, rng)
        try:
            self._run(np.array([lam]), n)
            x, v0, v, kinetic_end = self._end()
        except openmm.OpenMMException:  # the trajectory has left all bounds
            return row, -math.inf, -math.inf
        if not (math.isfinite(v0) and math.isfinite(v) and math.isfinite(kinetic_end)):
            return row, -math.inf, -math.inf
        before = (1.0 - lam) * u0 + lam * u + kinetic if math.isfinite(u0) and math.isfinite(u) else math.inf
        return x, v0 - v, before - ((1.0 - lam) * v0 + lam * v + kinetic_end)

    # ---------------------------------------------------------------- legs of velocity Verlet

    def verlet_leg(
        self, x: FloatArray, schedule: ArrayLike, n_verlet: int, rng: np.random.Generator, *, down: bool = False
    ) -> tuple[FloatArray, FloatArray]:
        """One leg of formula G without Metropolis tests: n_verlet steps at each λ_k, momenta drawn at its start.

        log W = [log π(x_n) - K(v_n)] - [log π_0(x_0) - K(v_0)], up or down; exact for any time step, since velocity
        Verlet is reversible and keeps volume.

        Parameters
        ----------
        x
            [n, 3N]: x_0 of a leg up, x_n of a leg down.
        schedule
            λ from 0 to 1, given upwards for both.
        n_verlet
            Steps at each λ but the first.
        down
            Walk the reversed protocol.

        Returns
        -------
        tuple
            The other end [n, 3N] and log W [n]: -inf where π(x_n) = 0, +inf where a leg down ends at π_0 = 0.
        """
        lambdas = check_schedule(schedule)[1:]
        require_count("n_verlet", n_verlet)
        ends, work = np.array(x, dtype=np.float64), np.empty(len(x))
        for i, row in enumerate(x):
            u0, u, kinetic = self._start(row, rng)
            try:
                self._run(lambdas[::-1] if down else lambdas, n_verlet)
                end, v0, v, kinetic_end = self._end()
            except openmm.OpenMMException:
                v0, v, kinetic_end = math.inf, math.inf, math.inf
            if not (math.isfinite(v0) and math.isfinite(kinetic_end)):  # the end stays x, for it has to be finite
                work[i] = math.inf if down else -math.inf
                continue
            ends[i] = end
            if down:
                work[i] = v0 + kinetic_end - u - kinetic if math.isfinite(u0) else math.inf
            else:
                work[i] = u0 + kinetic - v - kinetic_end if math.isfinite(u0) else -math.inf
        return ends, work
