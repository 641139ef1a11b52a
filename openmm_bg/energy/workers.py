"""Threads that each own one Context and evaluate frames with it.

OpenMM releases Python's lock while it computes, so threads mostly suffice; where a frame takes microseconds, the lock
between frames is what they wait for, and processes (`process_workers`) do not. Each thread pins itself to a core before
it creates its Context.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip

from ..errors import EnergyError
from .clone import Clone, cores_of_workers, pin, share_size, usable_cores
from .snapshot import ContextState, is_double

__all__ = ["CLOSED_MEANWHILE", "JOIN_SECONDS", "Workers", "usable_cores"]

#: What a batch that was under way when its pool was closed ends with: rows that nobody evaluated have no energy.
CLOSED_MEANWHILE = "The pool was closed while it evaluated energies."

#: Seconds that closing waits for a thread to finish its current frame.
JOIN_SECONDS = 5.0


class _Job:
    """One batch; `shares` holds the rows that no thread has taken yet."""

    def __init__(
        self,
        positions: NDArray[np.float64],
        energies: NDArray[np.float64],
        forces: NDArray[np.float64] | None,
        shares: list[list[int]],
    ) -> None:
        self._arrays = (positions, energies, forces)
        self._shares = deque(shares)
        self._cancelled = [False]

    def cancel(self) -> None:
        """Let every thread stop after the frame in hand."""
        self._cancelled[0] = True

    @property
    def cancelled(self) -> bool:
        """Whether rows may have been left out."""
        return self._cancelled[0]

    def run(self, clone: Clone) -> str | None:
        """The task that the job is to each thread."""
        return clone.evaluate(*self._arrays, self._take(), self._cancelled)

    def _take(self) -> Iterator[list[int]]:
        while True:
            try:
                yield self._shares.popleft()  # atomic: deques are safe between threads
            except IndexError:
                return


def _serve(tasks: SimpleQueue[Any], ready: SimpleQueue[Any], make: Callable[[], Clone], core: int | None) -> None:
    """Body of a worker thread; it takes no reference to its pool, which could never be collected then."""
    pin(core)
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
        # Held while tasks are handed out, or else one might come after the order to end, and be waited for in vain.
        # Reentrant, for the garbage collector runs the finaliser wherever it likes.
        self.handing_out = threading.RLock()
        self.threads: list[threading.Thread] = []
        self.queues: list[SimpleQueue[Any]] = []
        self.job: _Job | None = None


def _stop(shared: _Shared) -> None:
    if shared.pid != os.getpid():
        return  # a forked child has the objects but not the threads
    if shared.job is not None:
        shared.job.cancel()
    with shared.handing_out:
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

        try:
            # One after the other: creation is not promised to be thread-safe.
            for index, core in enumerate(cores_of_workers(platform, n)):
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
        if self._shared.pid != os.getpid():
            raise EnergyError("A pool does not survive a fork: make one in each process.")
        done: SimpleQueue[Any] = SimpleQueue()
        with self._shared.handing_out:
            if not self._finalizer.alive:
                raise EnergyError("The pool is closed: make another one.")
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
            self._run(lambda clone: clone.apply(state.box, state.parameters), self.n)

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

        Raises
        ------
        EnergyError
            The pool is closed, was closed meanwhile, or was forked.
        """
        if positions.dtype != np.float64 or not positions.flags.c_contiguous:
            raise TypeError("positions must be a C-contiguous float64 array")
        if positions.ndim != 3 or positions.shape[1:] != (self.n_atoms, 3):
            raise TypeError(f"positions must have shape [B, {self.n_atoms}, 3]")
        energies = np.full(len(positions), np.inf)
        out = np.zeros(positions.shape) if forces else None
        if not rows:
            return energies, out
        size = share_size(len(rows), self.n)
        shares = [rows[start : start + size] for start in range(0, len(rows), size)]
        job = _Job(positions, energies, out, shares)
        with self._lock:
            self._shared.job = job
            try:
                failures = self._run(job.run, min(self.n, len(shares)))
                if job.cancelled:
                    raise EnergyError(CLOSED_MEANWHILE)
            except BaseException:
                job.cancel()  # e.g. Ctrl-C: the threads stop after the frame in hand
                raise
            finally:
                self._shared.job = None
        self.failure = next((failure for failure in failures if failure is not None), self.failure)
        return energies, out
