"""What runs in a worker process: one Context, positions and results in shared memory, commands through a pipe.

Started by `process_workers` and by nobody else. A process must start quickly, and there may be one for each core: torch
is not imported here.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import openmm  # isort: skip

from .clone import Clone, pin

#: Bytes before the arrays; the first one says that nobody wants the rest of a batch any more.
HEADER = 64
#: Bytes of a ticket: the first row of a share, little-endian.
TICKET = 4
#: Characters of a message that are sent, so that a line is one atomic write to a pipe.
MESSAGE = 1000


@dataclass(frozen=True)
class Layout:
    """Where the arrays of at most `capacity` frames of `n_atoms` lie in the shared memory."""

    capacity: int
    n_atoms: int

    @property
    def size(self) -> int:
        """Bytes."""
        return HEADER + 8 * self.capacity * (6 * self.n_atoms + 1)

    def arrays(self, memory: mmap.mmap) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Positions and forces [capacity, N, 3], energies [capacity]."""
        shape = (self.capacity, self.n_atoms, 3)
        count = 3 * self.capacity * self.n_atoms
        positions = np.frombuffer(memory, np.float64, count, HEADER).reshape(shape)
        forces = np.frombuffer(memory, np.float64, count, HEADER + 8 * count).reshape(shape)
        return positions, forces, np.frombuffer(memory, np.float64, self.capacity, HEADER + 16 * count)


def _end_with_parent(life: int, parent: int) -> None:
    """Leave as soon as the parent does, however it ends, also in the middle of a batch."""
    poll = select.poll()
    poll.register(life, select.POLLIN)
    # Nothing is ever written to this pipe; it ends with the last process that holds its other end. A fork of the parent
    # may hold it too, so that the parent is looked for as well.
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    os._exit(0)


def _shares(tickets: int, count: int, size: int) -> Iterator[range]:
    """Rows to evaluate, until the workers have taken all tickets of the batch."""
    while True:
        try:
            ticket = os.read(tickets, TICKET)
        except BlockingIOError:
            return
        if len(ticket) < TICKET:
            return  # the parent has gone
        start = int.from_bytes(ticket, "little")
        yield range(start, min(start + size, count))


class _Server:
    """Carries out commands, one after the other."""

    def __init__(self, tickets: int, memory: int, order: dict[str, Any]) -> None:
        pin(order["core"])
        system = openmm.XmlSerializer.deserialize(order["system"])
        layout = Layout(order["capacity"], system.getNumParticles())
        shared = mmap.mmap(memory, layout.size)
        self._tickets = tickets
        self._stop = memoryview(shared)
        self._positions, self._forces, self._energies = layout.arrays(shared)
        self._clone = Clone(system, order["platform"], order["properties"])

    def obey(self, order: dict[str, Any]) -> Any:
        """The answer to a command, as JSON has it."""
        what = order["do"]
        if what == "evaluate":
            count = order["count"]
            failure = self._clone.evaluate(
                self._positions[:count],
                self._energies[:count],
                self._forces[:count] if order["forces"] else None,
                _shares(self._tickets, count, order["size"]),
                self._stop,
            )
            return None if failure is None else failure[:MESSAGE]
        if what == "apply":
            box = tuple(tuple(vector) for vector in order["box"])
            self._clone.apply(box, order["parameters"])
            return None
        if what == "group_energies":
            total, parts = self._clone.group_energies(self._positions[0])
            return [total, parts.tolist()]
        return None  # "ping"


def main() -> None:
    """Serve commands until there are no more."""
    commands, replies, tickets, life, memory, parent = map(int, sys.argv[2:])
    threading.Thread(target=_end_with_parent, args=(life, parent), daemon=True).start()
    server: _Server | None = None
    with os.fdopen(commands, "rb") as lines:
        for line in lines:
            order = json.loads(line)
            if order.get("do") == "end":
                break
            answer: dict[str, Any] = {"id": order["id"]}
            try:
                if server is None:
                    server = _Server(tickets, memory, order)
                else:
                    answer["value"] = server.obey(order)
            except Exception as error:
                answer["error"] = (str(error) or type(error).__name__)[:MESSAGE]
                answer["openmm"] = isinstance(error, openmm.OpenMMException)
            os.write(replies, json.dumps(answer).encode() + b"\n")
    os._exit(0)
