"""Processes that each own one Context, in the place of the threads of `Workers`.

Where a frame takes microseconds (small molecules on the Reference platform), threads wait for Python's lock between any
two frames, and some of the Reference platform's kernels wait for each other's memory. Processes share neither.

They are started afresh by the Python that runs here, not forked (a fork of a process with threads or a GPU context is
broken), and not by `multiprocessing`, which would run the user's main script again. Positions, energies and forces lie
in shared memory without a name, so that nothing is left behind. A process ends when its pipe to this one does, however
this one ends.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip

from ..errors import EnergyError
from .clone import cores_of_workers, share_size
from .process_child import TICKET, Layout
from .snapshot import ContextState, is_double
from .workers import CLOSED_MEANWHILE

#: Bytes of shared memory, of which only what batches have used is ever taken; longer batches go in several parts.
MEMORY = 64 * 2**20
#: Tickets that fit a pipe of one page, the least that a system may give.
MOST_TICKETS = 1024
#: Seconds that closing waits for a process before it is killed.
END_SECONDS = 5.0
#: Bits of the energy of a frame that no process has evaluated: a NaN, but none that arithmetic makes.
UNTOUCHED = 0x7FF8_6F70_656E_6267

# The child must not run this package's __init__, which imports torch: a bare package with the same folder stands in.
_START = (
    "import sys, types; package = types.ModuleType('openmm_bg.energy'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['openmm_bg.energy'] = package; from openmm_bg.energy.process_child import main; main()"
)


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose ends are closed with these."""
    read, write = os.pipe()
    reading.callback(os.close, read)
    writing.callback(os.close, write)
    return read, write


class _Process:
    """One worker process and the pipes to it."""

    def __init__(self, tickets: int, life: int, memory: int) -> None:
        self._buffer = b""
        self._poll = select.poll()
        folder = str(Path(__file__).parent)
        # Ours are closed here only if something fails; those of the process always, once it has them.
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as its:
            commands, self._commands = _pipe(its, ours)
            self._replies, replies = _pipe(ours, its)
            self._errors: BinaryIO = ours.enter_context(tempfile.TemporaryFile())
            self._poll.register(self._replies, select.POLLIN)
            inherited = (commands, replies, tickets, life, memory)
            self._popen = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-W", "ignore", "-c", _START, folder),
                    *map(str, inherited),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=inherited,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
                start_new_session=True,  # Ctrl-C is for this process, which tells the others what to do
            )
            ours.pop_all()

    def send(self, order: Mapping[str, Any]) -> None:
        """Write a command.

        Raises
        ------
        OSError
            The process has ended, or was dismissed.
        """
        line = memoryview(json.dumps(order).encode() + b"\n")
        while line:
            line = line[os.write(self._commands, line) :]

    def answer(self, number: int) -> dict[str, Any] | None:
        """The answer to the command of this number, which was sent; None if the process has ended."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                found: dict[str, Any] = json.loads(line)
                if found["id"] == number:
                    return found
                continue  # of a call that was interrupted
            try:
                # The end of the pipe tells, unless a fork of this process holds its other end.
                while not self._poll.poll(1000) and self._popen.poll() is None:
                    pass
                chunk = os.read(self._replies, 65536) if self._poll.poll(0) else b""
            except OSError:  # closed meanwhile by another thread
                chunk = b""
            if not chunk:
                return None
            self._buffer += chunk

    def how_it_ended(self) -> str:
        """Exit status or signal, and the last line that it wrote."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)
        code = self._popen.poll()
        how = "it hung up" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1].strip().rstrip('.')}" if lines else how

    def dismiss(self) -> None:
        """Let it end: no more commands will come."""
        with contextlib.suppress(OSError):
            self.send({"do": "end"})  # said in words, for a fork of this process may hold the pipe open
        commands, self._commands = self._commands, -1  # another thread must not write to whatever gets this number next
        self._close_pipes(commands)

    def wait(self) -> None:
        """Wait until it has ended, or kill it."""
        try:
            self._popen.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def close(self) -> None:
        """Close what is left once it has ended."""
        self._close_pipes(self._replies)
        self._errors.close()

    @staticmethod
    def _close_pipes(*pipes: int) -> None:
        for pipe in pipes:
            with contextlib.suppress(OSError):
                os.close(pipe)


class _Shared:
    """What the finaliser needs."""

    def __init__(self, size: int) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.processes: list[_Process] = []
        with contextlib.ExitStack() as opened:
            # Without a name, it goes with the last process that has it.
            if hasattr(os, "memfd_create"):
                self.file = os.memfd_create("openmm_bg")
            else:
                with tempfile.TemporaryFile() as file:
                    self.file = os.dup(file.fileno())
            opened.callback(os.close, self.file)
            os.ftruncate(self.file, size)
            self.memory = opened.enter_context(mmap.mmap(self.file, size))
            self.take, self.give = _pipe(opened, opened)  # tickets: first rows of shares
            os.set_blocking(self.take, False)
            self.life_here, self.life_there = _pipe(opened, opened)
            opened.pop_all()


def _stop(shared: _Shared) -> None:
    if shared.pid != os.getpid():
        return  # a forked child has the objects but not the processes
    shared.memory[0] = 1
    os.close(shared.life_there)
    for process in shared.processes:
        process.dismiss()
    for process in shared.processes:
        process.wait()
    # Another thread may wait for an answer; it sees that none will come.
    if shared.lock.acquire(timeout=END_SECONDS):
        for process in shared.processes:
            process.close()
        for pipe in (shared.take, shared.give, shared.life_here, shared.file):
            os.close(pipe)
        shared.lock.release()


def serialise(system: openmm.System) -> str:
    """The System as text, for a worker process.

    Raises
    ------
    EnergyError
        It has a PythonForce, whose function may need what only this process has: a main script, a module's variables,
        torch loaded before OpenMM. Or it cannot be written.
    """
    python_force = getattr(openmm, "PythonForce", None)
    found = python_force is not None and any(isinstance(force, python_force) for force in system.getForces())
    if not found:
        try:
            text: str = openmm.XmlSerializer.serialize(system)
        except Exception as error:  # whatever pickling the PythonForce of an ATMForce raises, say
            reason = str(error).rstrip(".")
            raise EnergyError(
                f"Worker processes cannot have this System ({reason}): let threads do the work."
            ) from error
        found = ' type="PythonForce"' in text  # inside another force
    if found:
        raise EnergyError("Worker processes cannot evaluate a PythonForce: let threads do the work.")
    return text


class ProcessWorkers:
    """`n` processes with one Context each, pinned like the threads of `Workers` and with the same methods.

    Parameters
    ----------
    system, platform, properties, n
        As for `Workers`.

    Raises
    ------
    openmm.OpenMMException
        A Context cannot be created on this platform.
    EnergyError
        Processes cannot be started here, or the System cannot be sent to them: one with a PythonForce never is.
    """

    def __init__(self, system: openmm.System, platform: str, properties: Mapping[str, str], n: int) -> None:
        if os.name != "posix":
            raise EnergyError("Worker processes need a POSIX system: let threads evaluate energies.")
        if not sys.executable or getattr(sys, "frozen", False):
            raise EnergyError("Worker processes need the Python interpreter as a program: let threads do their work.")
        text = serialise(system)
        self.platform = platform
        self.double = is_double(platform, properties)
        self.n = n
        self.n_atoms = system.getNumParticles()
        self.failure: str | None = None
        self._layout = Layout(max(MEMORY // (8 * (6 * self.n_atoms + 1)), 4 * n), self.n_atoms)
        self._number = 0
        self._disturbed = False
        try:
            self._shared = _Shared(self._layout.size)
        except OSError as error:
            raise EnergyError(f"Worker processes cannot be started ({error.strerror or error}).") from error
        self._positions, self._forces, self._energies = self._layout.arrays(self._shared.memory)
        self._finalizer = weakref.finalize(self, _stop, self._shared)
        try:
            self._start(
                [
                    {
                        "system": text,
                        "platform": platform,
                        "properties": dict(properties),
                        "capacity": self._layout.capacity,
                        "core": core,
                    }
                    for core in cores_of_workers(platform, n)
                ]
            )
        except BaseException:
            self.close()
            raise

    def _start(self, orders: list[dict[str, Any]]) -> None:
        shared = self._shared
        try:
            for _ in orders:
                shared.processes.append(_Process(shared.take, shared.life_here, shared.file))
        except OSError as error:
            raise EnergyError(f"Worker processes cannot be started ({error.strerror or error}).") from error
        self._call(orders)

    def set_processes(self, n: int) -> None:
        """Use the first `n` processes only."""
        with self._shared.lock:
            self.n = min(n, len(self._shared.processes))

    def retire(self) -> None:
        """End the processes that are not used."""
        with self._shared.lock:
            surplus, self._shared.processes[self.n :] = self._shared.processes[self.n :], []
        for process in surplus:
            process.dismiss()
        for process in surplus:
            process.wait()
            process.close()

    def close(self) -> None:
        """End the processes. Safe to repeat."""
        self._finalizer()

    def _check(self) -> None:
        if not self._finalizer.alive:
            raise EnergyError("The pool is closed: make another one.")
        if self._shared.pid != os.getpid():
            raise EnergyError("A pool does not survive a fork: make one in each process.")

    def _call(self, orders: list[dict[str, Any]]) -> list[Any]:
        """Give one command to each of the first processes; what they answer.

        Raises
        ------
        EnergyError
            The pool is closed, was forked, or a process has ended.
        openmm.OpenMMException
            One of them raised it.
        """
        self._check()
        self._number += 1  # answers to a command that was interrupted are known by their number
        answers = []
        processes = self._shared.processes[: len(orders)]
        for process, order in zip(processes, orders, strict=True):
            with contextlib.suppress(OSError):  # there will be no answer either
                process.send({"id": self._number, **order})
        for process in processes:
            answer = process.answer(self._number)
            if answer is None:
                if not self._finalizer.alive:
                    raise EnergyError(CLOSED_MEANWHILE)
                how = process.how_it_ended()
                self.close()
                raise EnergyError(f"A worker process of the pool ended ({how}): make another pool.")
            answers.append(answer)
        for answer in answers:
            if "error" in answer:
                message = answer["error"]
                raise openmm.OpenMMException(message) if answer["openmm"] else EnergyError(message)
        return [answer.get("value") for answer in answers]

    def apply(self, state: ContextState) -> None:
        """Give every Context this box and these global parameters."""
        order = {"do": "apply", "box": state.box, "parameters": dict(state.parameters)}
        with self._shared.lock:
            self._call([order] * len(self._shared.processes))

    def group_energies(self, positions: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Energy of one frame [N, 3] in the first Context, total and by force group, kJ/mol."""
        with self._shared.lock:
            self._settle()
            self._positions[0] = positions
            total, parts = self._call([{"do": "group_energies"}])[0]
        return float(total), np.array(parts, dtype=np.float64)

    def evaluate(
        self, positions: NDArray[np.float64], rows: list[int], *, forces: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Evaluate the given rows of a batch; all others get +inf and zero forces. As `Workers.evaluate`."""
        if positions.ndim != 3 or positions.shape[1:] != (self.n_atoms, 3):
            raise TypeError(f"positions must have shape [B, {self.n_atoms}, 3]")
        energies = np.full(len(positions), np.inf)
        out = np.zeros(positions.shape) if forces else None
        with self._shared.lock:
            for start in range(0, len(rows), self._layout.capacity):
                self._evaluate(positions, rows[start : start + self._layout.capacity], energies, out)
        return energies, out

    def _evaluate(
        self,
        positions: NDArray[np.float64],
        rows: list[int],
        energies: NDArray[np.float64],
        out: NDArray[np.float64] | None,
    ) -> None:
        self._settle()
        shared, count = self._shared, len(rows)
        size = max(share_size(count, self.n), -(-count // MOST_TICKETS))
        starts = range(0, count, size)
        whole: Any = slice(None) if count == len(positions) else rows
        self._disturbed = True
        shared.memory[0] = 0
        self._positions[:count] = positions[whole]
        bits = self._energies[:count].view(np.int64)
        bits[:] = UNTOUCHED
        # Tickets first: a process that finds none has nothing to do.
        os.write(shared.give, b"".join(start.to_bytes(TICKET, "little") for start in starts))
        order = {"do": "evaluate", "count": count, "size": size, "forces": out is not None}
        try:
            failures = self._call([order] * min(self.n, len(starts)))
        except BaseException:
            if self._finalizer.alive:
                shared.memory[0] = 1  # e.g. Ctrl-C: they stop after the frame in hand
            raise
        if not self._finalizer.alive:  # they were told to stop, and answer all the same
            raise EnergyError(CLOSED_MEANWHILE)
        if (bits == UNTOUCHED).any():
            self.close()
            raise EnergyError("Worker processes left out frames of a batch: make another pool.")
        self._disturbed = False
        energies[whole] = self._energies[:count]
        if out is not None:
            out[whole] = self._forces[:count]
        self.failure = next((failure for failure in failures if failure is not None), self.failure)

    def _settle(self) -> None:
        """After a call that was interrupted: wait until nobody works on it, and take back what is left of it."""
        self._check()  # before anything is written to pipes that may be closed
        if not self._disturbed:
            return
        self._call([{"do": "ping"}] * len(self._shared.processes))
        with contextlib.suppress(BlockingIOError):
            while os.read(self._shared.take, 65536):
                pass
        self._disturbed = False
