"""Threads that each own one Context and evaluate frames with it.

OpenMM releases Python's lock while it computes, so threads suffice. Each thread pins itself to a core
*before* it creates its Context: on the CPU platform a Context hands its work to a thread of its own, which
inherits the pin, and waking that thread on another core would cost more than a small molecule's forces.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip
from openmm import unit  # isort: skip

from ..errors import EnergyError
from .snapshot import Box, ContextState, is_double

logger = logging.getLogger(__name__)

#: Seconds that closing waits for a thread to finish its current frame.
JOIN_SECONDS = 5.0


@dataclass
class _Job:
    """One batch; `blocks` holds the first row of each share that no thread has taken yet."""

    positions: NDArray[np.float64]
    energies: NDArray[np.float64]
    forces: NDArray[np.float64] | None
    rows: list[int]
    size: int
    blocks: deque[int] = field(default_factory=deque)
    cancelled: bool = False


class Clone:
    """A Context of its own for one thread: created, used and destroyed in that thread."""

    def __init__(self, system: openmm.System, platform: str, properties: Mapping[str, str]) -> None:
        self._arguments = (system, platform, dict(properties))
        self._state: ContextState | None = None
        self.context = self._create()

    def _create(self) -> openmm.Context:
        system, platform, properties = self._arguments
        # The integrator is never stepped; a Context just needs one.
        integrator = openmm.VerletIntegrator(1.0 * unit.femtosecond)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties)
        self._box: Box | None = None
        self._parameters: dict[str, float] = dict(context.getParameters())
        return context

    def apply(self, state: ContextState) -> None:
        """Take over the box and those global parameters that this System defines."""
        self._state = state
        if self._box != state.box:
            self.context.setPeriodicBoxVectors(*(openmm.Vec3(*vector) for vector in state.box))
            self._box = state.box
        for name, value in state.parameters.items():
            if name in self._parameters and self._parameters[name] != value:
                self.context.setParameter(name, value)
                self._parameters[name] = value

    def recreate(self) -> None:
        """Replace the Context after OpenMM raised in it, for nothing says what state that left behind."""
        del self.context
        self.context = self._create()
        if self._state is not None:
            self.apply(self._state)

    def evaluate(self, job: _Job) -> str | None:
        """Take shares of a job until none is left; returns OpenMM's message if a frame made it raise."""
        positions, energies, forces = job.positions, job.energies, job.forces
        wants_forces = forces is not None
        set_positions, get_state = self.context.setPositions, self.context.getState
        failure: str | None = None
        while not job.cancelled:
            try:
                start = job.blocks.popleft()  # atomic: deques are safe between threads
            except IndexError:
                break
            for row in job.rows[start : start + job.size]:
                if job.cancelled:
                    break
                try:
                    set_positions(positions[row])
                    state = get_state(energy=True, forces=wants_forces)
                    energies[row] = state.getPotentialEnergy()._value
                    if forces is not None:
                        _copy_forces(state, forces[row])
                except openmm.OpenMMException as error:
                    failure = str(error)
                    energies[row] = np.inf
                    del set_positions, get_state  # bound methods would keep the old Context alive
                    self.recreate()
                    set_positions, get_state = self.context.setPositions, self.context.getState
        return failure

    def group_energies(self, positions: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Energy of one frame [N, 3], and the energies of the force groups in use, kJ/mol."""
        self.context.setPositions(positions)
        total = self.context.getState(energy=True).getPotentialEnergy()._value
        groups: set[int] = set()
        for force in self.context.getSystem().getForces():
            groups.add(force.getForceGroup())
            if isinstance(force, openmm.NonbondedForce) and force.getReciprocalSpaceForceGroup() >= 0:
                groups.add(force.getReciprocalSpaceForceGroup())
        if len(groups) <= 1:
            return total, np.array([total])
        parts = [
            self.context.getState(energy=True, groups={group}).getPotentialEnergy()._value for group in sorted(groups)
        ]
        return total, np.array(parts)


def _copy_forces_fast(state: openmm.State, out: NDArray[np.float64]) -> None:
    # Twenty times cheaper than getForces, but checks neither type nor order: a wrong array corrupts memory.
    if out.dtype != np.float64 or not out.flags.c_contiguous:
        raise TypeError("forces must be written into C-contiguous float64 rows")
    state._getVectorAsNumpy(openmm.State.Forces, out)


def _copy_forces_public(state: openmm.State, out: NDArray[np.float64]) -> None:
    out[...] = state.getForces(asNumpy=True)._value


_copy_forces = _copy_forces_fast if hasattr(openmm.State, "_getVectorAsNumpy") else _copy_forces_public


def usable_cores() -> list[int]:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _pin(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, {core})  # on Linux, 0 is the calling thread and not the process
        except OSError as error:
            logger.debug("A worker thread could not be pinned to core %d (%s).", core, error)


def _serve(tasks: SimpleQueue[Any], ready: SimpleQueue[Any], make: Callable[[], Clone], core: int | None) -> None:
    """Body of a worker thread; it takes no reference to its pool, which could never be collected then."""
    if core is not None:
        _pin(core)
    try:
        clone = make()
    except BaseException as error:
        ready.put(error)
        return
    ready.put(None)
    outcome: tuple[Any, BaseException | None]
    while (task := tasks.get()) is not None:
        function, done = task
        try:
            outcome = (function(clone), None)
        except BaseException as error:
            outcome = (None, error)
        done.put(outcome)
        del task, function, done, outcome  # an idle thread holds no batch


class _Shared:
    """What the finaliser needs: threads, their queues, and the job now in progress."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.threads: list[threading.Thread] = []
        self.queues: list[SimpleQueue[Any]] = []
        self.job: _Job | None = None


def _stop(shared: _Shared) -> None:
    if shared.pid != os.getpid():
        return  # a forked child has the objects but not the threads
    if shared.job is not None:
        shared.job.cancelled = True
    for queue in shared.queues:
        queue.put(None)
    for thread in shared.threads:
        # The garbage collector may run this inside one of the threads themselves.
        if thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)


class Workers:
    """`n` pinned daemon threads with one Context each.

    Ends on `close`, when collected, and before the interpreter exits (`weakref.finalize` registers for that),
    so that no thread is caught inside OpenMM by the shutdown.

    Raises
    ------
    openmm.OpenMMException
        A Context cannot be created on this platform.
    """

    def __init__(self, system: openmm.System, platform: str, properties: Mapping[str, str], n: int) -> None:
        self.platform = platform
        self.double = is_double(platform, properties)
        self.n = n
        self.n_atoms = system.getNumParticles()
        self.failure: str | None = None
        self._lock = threading.Lock()
        self._shared = _Shared()
        self._finalizer = weakref.finalize(self, _stop, self._shared)

        def make() -> Clone:
            return Clone(system, platform, properties)

        # Threads of a GPU driver would inherit the pin and gain nothing from it.
        cores = usable_cores() if platform in ("CPU", "Reference") else []
        # Ranks of one machine (torchrun) must not crowd onto the same cores.
        first = int(os.environ.get("LOCAL_RANK", "0")) * n
        try:
            for index in range(n):  # one after the other: creation is not promised to be thread-safe
                core = cores[(first + index) % len(cores)] if cores else None
                tasks: SimpleQueue[Any] = SimpleQueue()
                ready: SimpleQueue[Any] = SimpleQueue()
                thread = threading.Thread(
                    target=_serve, args=(tasks, ready, make, core), name=f"openmm_bg-{index}", daemon=True
                )
                thread.start()
                self._shared.threads.append(thread)
                self._shared.queues.append(tasks)
                error = ready.get()
                if error is not None:
                    raise error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the threads and destroy their Contexts. Safe to repeat."""
        self._finalizer()

    def _run(self, function: Callable[[Clone], Any], n: int) -> list[Any]:
        """Run a function of a Clone in the first `n` threads and return what it returned there."""
        if not self._finalizer.alive:
            raise EnergyError("The pool is closed: make another one.")
        if self._shared.pid != os.getpid():
            raise EnergyError("A pool does not survive a fork: make one in each process.")
        done: SimpleQueue[Any] = SimpleQueue()
        for queue in self._shared.queues[:n]:
            queue.put((function, done))
        outcomes = [done.get() for _ in range(n)]
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def apply(self, state: ContextState) -> None:
        """Give every Context this box and these global parameters."""
        with self._lock:
            self._run(lambda clone: clone.apply(state), self.n)

    def group_energies(self, positions: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Energy of one frame [N, 3] in the first Context, total and by force group, kJ/mol."""
        with self._lock:
            return self._run(lambda clone: clone.group_energies(positions), 1)[0]

    def evaluate(
        self, positions: NDArray[np.float64], rows: list[int], *, forces: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Evaluate the given rows of a batch.

        Parameters
        ----------
        positions
            [B, N, 3] nm, float64, C-contiguous.
        rows
            Rows to evaluate; all others get +inf and zero forces.
        forces
            Whether forces are wanted.

        Returns
        -------
        tuple
            Energies [B] in kJ/mol and forces [B, N, 3] in kJ/mol/nm or None, as OpenMM gave them; +inf where
            it raised (`failure` then holds its message).
        """
        if positions.dtype != np.float64 or not positions.flags.c_contiguous:
            raise TypeError("positions must be a C-contiguous float64 array")
        if positions.ndim != 3 or positions.shape[1:] != (self.n_atoms, 3):
            raise TypeError(f"positions must have shape [B, {self.n_atoms}, 3]")
        energies = np.full(len(positions), np.inf)
        out = np.zeros(positions.shape) if forces else None
        if not rows:
            return energies, out
        # Shares small enough that a thread on a busy core does not keep the others waiting for long.
        size = max(1, len(rows) // (8 * self.n)) if self.n > 1 else len(rows)
        job = _Job(positions, energies, out, rows, size, deque(range(0, len(rows), size)))
        n = min(self.n, len(job.blocks))
        with self._lock:
            self._shared.job = job
            try:
                failures = self._run(job_runner(job), n)
            except BaseException:
                job.cancelled = True  # e.g. Ctrl-C: the threads stop after the frame in hand
                raise
            finally:
                self._shared.job = None
        self.failure = next((failure for failure in failures if failure is not None), self.failure)
        return energies, out


def job_runner(job: _Job) -> Callable[[Clone], str | None]:
    """The task that a job is to each thread."""
    return lambda clone: clone.evaluate(job)
