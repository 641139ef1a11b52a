"""Molecular dynamics that makes training data and references: replica exchange in temperature, with an optional bias.

The reference that every flow is compared with is tempered MD of the same System. A bias potential on one torsion
may balance two basins of unequal weight; each frame then carries the log-weight ``+V_bias/kT`` that takes the bias
away again (docs/theory.md, notation: a biased ensemble is one more proposal with a known density ratio).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch  # noqa: F401  (before openmm: its torch plugin loads only then)

import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.energy import BOLTZMANN
from openmm_bg.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TorsionBias:
    """A well ``V = -depth · exp(sharpness · (cos(φ - centre) - 1))`` on one torsion.

    Parameters
    ----------
    atoms
        The four atom indices of the torsion.
    centre
        Where the well lies, rad.
    sharpness
        κ of the well's von Mises shape, dimensionless.
    depth
        kJ/mol; 0 switches the bias off.
    """

    atoms: tuple[int, int, int, int]
    centre: float
    sharpness: float = 3.0
    depth: float = 0.0

    def shape(self, torsion: np.ndarray) -> np.ndarray:
        """The well's shape between 0 and 1 at torsions [n] in rad."""
        return np.exp(self.sharpness * (np.cos(torsion - self.centre) - 1.0))

    def energy(self, torsion: np.ndarray) -> np.ndarray:
        """V_bias [n] in kJ/mol at torsions [n] in rad."""
        return -self.depth * self.shape(torsion)

    def force(self) -> openmm.CustomTorsionForce:
        """The same well as an OpenMM force."""
        force = openmm.CustomTorsionForce("-bias_depth*exp(bias_kappa*(cos(theta-bias_centre)-1))")
        force.addGlobalParameter("bias_depth", self.depth)
        force.addGlobalParameter("bias_kappa", self.sharpness)
        force.addGlobalParameter("bias_centre", self.centre)
        force.addTorsion(*self.atoms, [])
        return force

    def balanced(
        self, torsion: np.ndarray, in_basin: np.ndarray, temperature: float, population: float = 0.5
    ) -> TorsionBias:
        """The depth at which frames sampled *with this bias* would populate ``in_basin`` by ``population``.

        Parameters
        ----------
        torsion
            [n] rad, frames of a pilot run under this bias.
        in_basin
            [n] bool.
        temperature
            K.
        population
            Share of the basin that is asked for.

        Raises
        ------
        InputError
            The pilot run saw one basin only.
        """
        if not in_basin.any() or in_basin.all():
            raise InputError("The pilot run saw only one of the two basins: give it more time or more tempering.")
        kt = BOLTZMANN * temperature
        shape = self.shape(torsion)
        low, high = -100.0 * kt, 100.0 * kt  # negative: a barrier where a well would overshoot
        for _ in range(60):  # the population grows monotonically with the depth, so bisection is safe
            depth = 0.5 * (low + high)
            exponent = (depth - self.depth) / kt * shape
            weight = np.exp(exponent - exponent.max())
            if weight[in_basin].sum() < population * weight.sum():
                low = depth
            else:
                high = depth
        return replace(self, depth=depth)


@dataclass
class TemperedTrajectory:
    """Frames of the lowest temperature of one or more ladders, in time order within each ladder.

    ``positions`` [n, N, 3] nm float32; ``log_weights`` [n] take the bias away (zeros without one); ``ladder`` [n]
    says which independent ladder a frame comes from; ``n_energies`` counts force evaluations of *all* temperatures.
    """

    positions: np.ndarray
    log_weights: np.ndarray
    ladder: np.ndarray
    n_energies: int
    seconds: float


def temperature_ladder(lowest: float, highest: float, n: int) -> list[float]:
    """``n`` temperatures in geometric progression, K."""
    if not 0 < lowest <= highest or n < 1:
        raise InputError(f"A ladder needs 0 < lowest <= highest and n >= 1, got {lowest}, {highest}, {n}.")
    return [float(t) for t in np.geomspace(lowest, highest, n)]


def tempered_md(
    system: openmm.System,
    topology: app.Topology,
    positions: np.ndarray,
    temperatures: Sequence[float],
    *,
    seconds: float | None = None,
    iterations: int | None = None,
    bias: TorsionBias | None = None,
    n_ladders: int | None = None,
    steps_per_exchange: int = 500,
    steps_per_frame: int = 50,
    time_step: float = 0.002,
    friction: float = 1.0,
    platform: str = "Reference",
    seed: int = 0,
    progress: Callable[[float, int], None] | None = None,
) -> TemperedTrajectory:
    """Replica exchange in temperature, one independent ladder per core.

    Parameters
    ----------
    system, topology, positions
        The molecule; positions [N, 3] in nm. The System is copied, never modified.
    temperatures
        K, ascending; frames are kept at the first.
    seconds, iterations
        Wall time, or number of exchange iterations a ladder makes; one of the two.
    bias
        A torsion well added to every temperature; its log-weights are returned.
    n_ladders
        Independent ladders, each in a thread pinned to its core; default: the cores this process may use.
    steps_per_exchange, steps_per_frame
        MD steps between exchanges, and between frames kept.
    time_step, friction
        ps and 1/ps of the LangevinMiddleIntegrator.
    platform
        An OpenMM platform name.
    seed
        Of integrators and exchanges. Frames are reproducible with one ladder only: OpenMM's Reference platform has one
        random generator a process, which the ladders' threads share.
    progress
        Called with (fraction done, frames so far) by the first ladder.
    """
    if (seconds is None) == (iterations is None):
        raise InputError("Give tempered_md either seconds or iterations.")
    if not hasattr(app, "ReplicaExchangeSampler"):
        raise InputError(f"Tempered MD needs OpenMM 8.6 or later, this is {openmm.version.version}: update OpenMM.")
    from .ladder import Ladder

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    n_ladders = len(cores) if n_ladders is None else n_ladders
    xml = openmm.XmlSerializer.serialize(system)
    started = time.monotonic()
    ladders: list[Ladder | None] = [None] * n_ladders
    energies = [0] * n_ladders
    failures: list[BaseException] = []
    stop = threading.Event()

    def run(which: int) -> None:
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {cores[which % len(cores)]})
            own = openmm.XmlSerializer.deserialize(xml)
            if bias is not None:
                own.addForce(bias.force())
            integrator = openmm.LangevinMiddleIntegrator(temperatures[0], friction, time_step)
            integrator.setRandomNumberSeed(seed + which + 1)
            simulation = app.Simulation(topology, own, integrator, openmm.Platform.getPlatformByName(platform))
            simulation.context.setPositions(positions)
            simulation.minimizeEnergy(maxIterations=100)
            simulation.context.setVelocitiesToTemperature(temperatures[0], seed + which + 1)
            states = [{"temperature": t * unit.kelvin} for t in temperatures]
            ladder = Ladder(states, simulation, steps_per_exchange, steps_per_frame, [seed, which])
            ladders[which] = ladder
            ladder.simulate(20)  # leave the minimum before anything is kept
            ladder.record = True
            begin, done = time.monotonic(), 0
            while not stop.is_set():
                elapsed = time.monotonic() - begin
                fraction = elapsed / seconds if seconds is not None else done / (iterations or 1)
                if progress is not None and which == 0:
                    progress(min(1.0, fraction), len(ladder.frames))
                if fraction >= 1.0:
                    break
                ladder.simulate(1)
                done += 1
            energies[which] = ladder.currentIteration * len(temperatures) * (steps_per_exchange + 1)
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(n_ladders)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # short joins keep Ctrl-C responsive
    except KeyboardInterrupt:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    frames = [np.stack(ladder.frames) for ladder in ladders if ladder is not None]
    joined = np.concatenate(frames)
    log_weights = np.zeros(len(joined))
    if bias is not None:
        kt = BOLTZMANN * temperatures[0]
        log_weights = bias.energy(torsion_angle(joined, bias.atoms)) / kt
    return TemperedTrajectory(
        positions=joined,
        log_weights=log_weights,
        ladder=np.concatenate([np.full(len(f), i) for i, f in enumerate(frames)]),
        n_energies=sum(energies),
        seconds=time.monotonic() - started,
    )


def torsion_angle(positions: np.ndarray, atoms: Sequence[int]) -> np.ndarray:
    """IUPAC torsion [n] in rad of four atoms in positions [n, N, 3]."""
    a, b, c, d = (np.asarray(positions[:, i], dtype=np.float64) for i in atoms)
    axis = c - b
    first, last = np.cross(a - b, axis), np.cross(d - c, axis)
    # a·b, b·c and c·d conventions: cis is 0, sign as seen along b -> c
    sine = np.einsum("ij,ij->i", np.cross(first, last), axis) / np.linalg.norm(axis, axis=-1)
    return np.arctan2(sine, np.einsum("ij,ij->i", first, last))
