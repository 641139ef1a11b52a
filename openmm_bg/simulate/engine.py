"""Which System runs on which platform, in how many Contexts beside each other: compared and timed, then said."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip

from openmm_bg.energy.implicit_solvent import agreement, why_not_obc2, with_equal_solvent
from openmm_bg.energy.tuning import check_choice, platform_names
from openmm_bg.energy.workers import usable_cores
from openmm_bg.errors import EnergyError
from openmm_bg.simulate.protocol import Protocol

logger = logging.getLogger(__name__)

#: Platforms on which the built-in force takes the custom one's place.
ON_CPU = ("CPU", "Reference")
#: Seconds of timing per candidate; atoms above which Reference is no candidate unless asked for.
CANDIDATE_SECONDS = 0.4
REFERENCE_ATOMS = 400


@dataclass(frozen=True)
class Engine:
    """A platform with its properties, and the Contexts that run on it beside each other."""

    platform: str
    threads: int | None
    workers: int
    cores: tuple[int, ...] = ()

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" with {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.platform}, {self.workers} at a time{threads}"

    def context(self, xml: str, protocol: Protocol, seed: int) -> openmm.Context:
        """A Context with an integrator of its own.

        Raises
        ------
        EnergyError
            The platform refuses the System.
        """
        integrator = openmm.LangevinMiddleIntegrator(protocol.temperature, protocol.friction, protocol.time_step)
        integrator.setRandomNumberSeed(seed)
        integrator.setConstraintTolerance(1e-6)
        platform = openmm.Platform.getPlatformByName(self.platform)
        properties: dict[str, str] = {}
        if self.platform == "CPU" and self.threads is not None:
            properties["Threads"] = str(self.threads)
        elif "Precision" in platform.getPropertyNames():
            properties["Precision"] = "mixed"
        try:
            return openmm.Context(openmm.XmlSerializer.deserialize(xml), integrator, platform, properties)
        except openmm.OpenMMException as error:
            raise EnergyError(f"The platform {self.platform} cannot hold the System ({error}).") from error

    def pin(self, which: int) -> None:
        """Bind the calling thread to its core, before it makes a Context: waking another core costs up to 0.5 ms."""
        if self.cores and self.threads == 1 and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {self.cores[which % len(self.cores)]})


def equal_solvent(
    system: openmm.System, positions: NDArray[np.float64], protocol: Protocol
) -> tuple[openmm.System | None, str | None]:
    """The System with the built-in OBC2 force, verified, and one sentence; (None, ...) leaves the System as it is.

    Parameters
    ----------
    system
        As the force field made it.
    positions
        [N, 3] nm, minimised.

    Returns
    -------
    tuple
        The copy of the System or None, and what to say about it or None.
    """
    custom = [force for force in system.getForces() if isinstance(force, openmm.CustomGBForce)]
    twin = with_equal_solvent(system)
    if twin is None:
        reasons = [why_not_obc2(force) for force in custom]
        return None, f"The CustomGBForce stays, which is slow on a CPU: {reasons[0]}." if reasons else None
    frames = _few_frames(twin, positions, protocol)
    found = agreement(system, twin, frames)
    frames_compared = f"{found.n_frames} frame{'s' if found.n_frames > 1 else ''}"
    if not found.holds:
        return None, (
            "The CustomGBForce stays, though its expressions are OBC2's: the built-in force differs from it by "
            f"{found.energy:.2g} kJ/mol on {frames_compared}."
        )
    return twin, (
        "The CustomGBForce of OBC2 is replaced by the equal, faster GBSAOBCForce: on "
        f"{frames_compared} energies agree to {found.relative_energy:.0e} and forces to "
        f"{found.relative_force:.0e} of the solvent's own."
    )


def minimise(system: openmm.System, positions: NDArray[np.float64], protocol: Protocol) -> NDArray[np.float64]:
    """Positions [N, 3] nm of a local minimum.

    Raises
    ------
    EnergyError
        The energy of the minimum is not finite, or far above any molecule's.
    """
    context = _quick(system, positions, protocol)
    try:
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, 2000)
        state = context.getState(positions=True, energy=True)
    except openmm.OpenMMException as error:
        raise EnergyError(f"The structure cannot be minimised ({error}): atoms overlap in it, repair it.") from error
    found = np.array(state.getPositions(asNumpy=True)._value, dtype=np.float64)
    energy = state.getPotentialEnergy()._value
    if not np.isfinite(found).all() or not np.isfinite(energy) or energy > 1000.0 * len(found):
        raise EnergyError(
            f"Minimisation ended at an energy of {energy:.3g} kJ/mol: atoms overlap in the structure, repair it first."
        )
    return found


def choose(
    system: openmm.System,
    twin: openmm.System | None,
    positions: NDArray[np.float64],
    protocol: Protocol,
    platform: str | None = None,
) -> tuple[Engine, openmm.System, str]:
    """The fastest engine by timing, the System that it runs, and one sentence.

    Raises
    ------
    InputError
        No such platform.
    EnergyError
        No platform can run the System.
    """
    check_choice(platform, None)
    cores = tuple(sorted(usable_cores()))
    n = len(protocol.names)
    candidates: list[Engine] = []
    for name in [platform] if platform is not None else platform_names():
        if name == "CPU":
            if min(n, len(cores)) > 1:
                candidates.append(Engine(name, 1, min(n, len(cores)), cores))
            candidates.append(Engine(name, len(cores), 1, cores))
        elif name == "Reference":
            if platform is not None or len(positions) <= REFERENCE_ATOMS:
                candidates.append(Engine(name, 1, min(n, len(cores)), cores))
        else:
            candidates.append(Engine(name, None, 1))
    rates: list[tuple[float, Engine, openmm.System]] = []
    problems = []
    for engine in candidates:
        own = twin if twin is not None and engine.platform in ON_CPU else system
        try:
            rates.append((_rate(engine, own, positions, protocol), engine, own))
        except (EnergyError, openmm.OpenMMException) as error:
            problems.append(f"{engine.platform}: {error}")
    if not rates:
        raise EnergyError(f"No platform can run the System ({'; '.join(problems)}).")
    rates.sort(key=lambda row: -row[0])
    per_day = [f"{engine} {rate * protocol.time_step * 86.4:.3g}" for rate, engine, _ in rates]
    others = f" (others: {', '.join(per_day[1:])})" if per_day[1:] else ""
    return rates[0][1], rates[0][2], f"Platform {per_day[0]} ns/day in all{others}."


def _quick(system: openmm.System, positions: NDArray[np.float64], protocol: Protocol) -> openmm.Context:
    """A Context for short work on all cores, which prefers the CPU platform."""
    engine = Engine("CPU" if "CPU" in platform_names() else "Reference", len(usable_cores()), 1)
    context = engine.context(openmm.XmlSerializer.serialize(system), protocol, seed=1)
    context.setPositions(positions)
    return context


def _few_frames(system: openmm.System, positions: NDArray[np.float64], protocol: Protocol) -> NDArray[np.float64]:
    """[4, N, 3] the minimum, and frames on the way from it to the temperature of interest."""
    context = _quick(system, positions, protocol)
    context.setVelocitiesToTemperature(protocol.temperature, 1)
    frames = [positions]
    try:
        for _ in range(3):
            context.getIntegrator().step(50)
            frames.append(np.array(context.getState(positions=True).getPositions(asNumpy=True)._value))
    except openmm.OpenMMException as error:
        raise EnergyError(
            f"The simulation becomes unstable within its first steps ({error}): shorten the time step, or look at the "
            "structure."
        ) from error
    return np.stack(frames)


def _rate(engine: Engine, system: openmm.System, positions: NDArray[np.float64], protocol: Protocol) -> float:
    """Steps per second of all workers together."""
    xml = openmm.XmlSerializer.serialize(system)
    rates = [0.0] * engine.workers
    failures: list[BaseException] = []
    ready = threading.Barrier(engine.workers)

    def run(which: int) -> None:
        try:
            engine.pin(which)
            context = engine.context(xml, protocol, which + 1)
            context.setPositions(positions)
            context.setVelocitiesToTemperature(protocol.temperature, which + 1)
            integrator: Any = context.getIntegrator()
            integrator.step(3)  # the first steps compile kernels and build neighbour lists
            ready.wait(60.0)
            begin, steps, chunk = time.perf_counter(), 0, 1
            while (elapsed := time.perf_counter() - begin) < CANDIDATE_SECONDS:
                integrator.step(chunk)
                context.getState(energy=True)  # a GPU returns from step before it is done
                steps += chunk
                chunk = min(2 * chunk, 256)
            rates[which] = steps / elapsed
        except BaseException as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(engine.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        first = next((e for e in failures if not isinstance(e, threading.BrokenBarrierError)), failures[0])
        raise first if isinstance(first, Exception) else EnergyError(str(first))
    return sum(rates)
