"""A torch twin in the place of a pool's Contexts."""

from __future__ import annotations

import os
import threading

import numpy as np
import torch
from numpy.typing import NDArray

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from ..errors import EnergyError
from .snapshot import ContextState
from .twin import SystemTwin
from .workers import usable_cores

#: What a pool calls the twin where it would name a platform.
TWIN = "twin"

#: Displacement of the second frame that a twin is compared with OpenMM on, nm: the first may lie in a minimum, where
#: forces vanish.
JITTER = 0.002


def default_threads() -> int:
    """This process's share of the usable cores, if several processes of one training run on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(usable_cores()) // processes)


class TwinWorkers:
    """A compiled float64 twin behind the methods of `Workers`.

    Parameters
    ----------
    system
        What to make a twin of; read now, and not again.
    state
        Positions on which the twin is compared with OpenMM, and global parameters.
    n
        Threads.

    Raises
    ------
    InputError
        A System that no twin can be made of.
    EnergyError
        The twin differs from OpenMM.
    """

    platform = TWIN
    double = True
    failure: str | None = None

    def __init__(self, system: openmm.System, state: ContextState, n: int) -> None:
        self.n = n
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        noise = np.random.default_rng(0).normal(scale=JITTER, size=state.positions.shape)
        frames = np.stack((state.positions, state.positions + noise))
        known = _global_parameters(system)
        parameters = {name: value for name, value in state.parameters.items() if name in known}
        self.twin = SystemTwin(system, frames, dtype=torch.float64, compile=True, n_threads=n, parameters=parameters)

    def set_threads(self, n: int) -> None:
        """Use another number of threads."""
        with self._lock:
            self.twin.close()
            self.twin.n_threads = self.n = n

    def close(self) -> None:
        """End the threads. Safe to repeat."""
        self._closed = True
        self.twin.close()

    def apply(self, state: ContextState) -> None:
        """Take over those global parameters that the System defines. A twin has no box."""
        now = self.twin.parameters
        changed = {name: v for name, v in state.parameters.items() if name in now and now[name] != v}
        if changed:
            with self._lock:
                self.twin.set_parameters(changed)

    def group_energies(self, positions: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Energy of one frame [N, 3], kJ/mol, as the one force group that a twin has."""
        energies, _ = self.evaluate(positions[None], [0], forces=False)
        return float(energies[0]), energies

    def evaluate(
        self, positions: NDArray[np.float64], rows: list[int], *, forces: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Evaluate the given rows of a batch; all others get +inf and zero forces. As `Workers.evaluate`."""
        if self._closed:
            raise EnergyError("The pool is closed: make another one.")
        if self._pid != os.getpid():
            raise EnergyError("A pool does not survive a fork: make one in each process.")
        if len(rows) < len(positions):
            energies = np.full(len(positions), np.inf)
            out = np.zeros(positions.shape) if forces else None
            if rows:
                energies[rows], found = self.evaluate(positions[rows], list(range(len(rows))), forces=forces)
                if out is not None:
                    out[rows] = found
            return energies, out
        with self._lock:
            return self.twin.energies_and_forces(positions) if forces else (self.twin.energies(positions), None)


def _global_parameters(system: openmm.System) -> set[str]:
    return {
        force.getGlobalParameterName(i)
        for force in system.getForces()
        for i in range(getattr(force, "getNumGlobalParameters", lambda: 0)())
    }
