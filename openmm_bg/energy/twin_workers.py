"""A torch twin in the place of a pool's Contexts, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from ..errors import EnergyError, InputError
from .arrays import FARTHEST
from .snapshot import ContextState
from .twin import SystemTwin
from .workers import usable_cores

logger = logging.getLogger(__name__)

#: What a pool calls the twin where it would name a platform: on the CPU, and on torch's current CUDA device.
TWIN = "twin"
TWIN_ON_GPU = "twin:cuda"
TWINS = (TWIN, TWIN_ON_GPU)

#: Displacement of the second frame that a twin is compared with OpenMM on, nm: the first may lie in a minimum, where
#: forces vanish.
JITTER = 0.002


def default_threads() -> int:
    """This process's share of the usable cores, if several processes of one training run on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(usable_cores()) // processes)


def gpu() -> torch.device | None:
    """Torch's current CUDA device, by its number, or None if there is none that can be used."""
    if not torch.cuda.is_available():
        return None
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device)
    except RuntimeError as error:
        logger.debug("Torch's CUDA device cannot be used: %s", error)
        return None
    return device


def gpu_name() -> str:
    """What torch's current CUDA device is called, without any work or memory on it; empty if there is none."""
    try:
        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""
    except RuntimeError as error:
        logger.debug("Torch's CUDA device has no name: %s", error)
        return ""


def twin_names() -> list[str]:
    """The twins that can be had here, by the names that a pool has for them."""
    return [TWIN] if gpu() is None else [TWIN, TWIN_ON_GPU]


class TwinWorkers:
    """A float64 twin behind the methods of `Workers`, its loops over pairs compiled where that is possible.

    On a GPU it is float64 too, though single precision is faster there: exact weights are made of small differences of
    energies, and a pool holds a double twin to the rounding of double precision (`energy_tolerance`), wherever it is.
    **None has ever run on a GPU**: what is here has been run with the CPU in its place.

    Parameters
    ----------
    system
        What to make a twin of; read now, and not again.
    state
        Positions on which the twin is compared with OpenMM, and global parameters.
    n
        Threads; of no meaning on a GPU.
    platform
        Which of `TWINS`.

    Raises
    ------
    InputError
        A System that no twin can be made of.
    EnergyError
        The twin differs from OpenMM, the GPU cannot be used, or memory does not hold what the twin knows of all pairs.
    """

    double = True
    failure: str | None = None

    def __init__(self, system: openmm.System, state: ContextState, n: int, platform: str = TWIN) -> None:
        self.platform = platform
        self.on_gpu = platform == TWIN_ON_GPU
        self.n = 1 if self.on_gpu else n
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        noise = np.random.default_rng(0).normal(scale=JITTER, size=state.positions.shape)
        frames = np.stack((state.positions, state.positions + noise))
        known = _global_parameters(system)
        parameters = {name: value for name, value in state.parameters.items() if name in known}
        device = gpu() if self.on_gpu else torch.device("cpu")
        if device is None:
            raise EnergyError("Torch has no CUDA device here that can be used.")
        with self._telling():
            self.twin = SystemTwin(
                system,
                frames,
                dtype=torch.float64,
                device=device,
                compile=None if self.on_gpu else True,  # None: with Triton
                n_threads=self.n,
                parameters=parameters,
            )

    def set_threads(self, n: int) -> None:
        """Use another number of threads; on a GPU it stays at one."""
        with self._lock:
            self.twin.close()
            self.twin.n_threads = self.n = 1 if self.on_gpu else n

    def close(self) -> None:
        """End the threads. Safe to repeat."""
        self._closed = True
        self.twin.close()

    def apply(self, state: ContextState) -> None:
        """Take over those global parameters that the System defines. A twin has no box."""
        now = self.twin.parameters
        changed = {name: v for name, v in state.parameters.items() if name in now and now[name] != v}
        if changed:
            with self._lock, self._telling():
                self.twin.set_parameters(changed)

    def group_energies(self, positions: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Energy of one frame [N, 3], kJ/mol, as the one force group that a twin has."""
        energies, _ = self.evaluate(positions[None], [0], forces=False)
        return float(energies[0]), energies

    def evaluate(
        self, positions: NDArray[np.float64], rows: list[int], *, forces: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Evaluate the given rows of a batch; all others get +inf and zero forces. As `Workers.evaluate`."""
        self._require_alive()
        if len(rows) < len(positions):
            energies = np.full(len(positions), np.inf)
            out = np.zeros(positions.shape) if forces else None
            if rows:
                energies[rows], found = self.evaluate(positions[rows], list(range(len(rows))), forces=forces)
                if out is not None:
                    out[rows] = found
            return energies, out
        with self._lock, self._telling():
            return self.twin.energies_and_forces(positions) if forces else (self.twin.energies(positions), None)

    def holds(self, positions: Tensor) -> bool:
        """Whether the twin is on a GPU, and positions are there too."""
        return self.on_gpu and positions.device == self.twin.device

    def evaluate_on_device(self, positions: Tensor, *, forces: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Evaluate positions that the twin `holds`, without waiting for the GPU.

        Returns
        -------
        tuple
            Energies [B] float64 in kJ/mol, +inf where positions or energy are not finite; forces [B, N, 3] float64 in
            kJ/mol/nm (zero there) or None; and int64 [2], how many frames had finite positions, and how many came out
            as +inf. All on the GPU.

        Raises
        ------
        InputError
            A wrong shape, or complex numbers.
        """
        self._require_alive()
        if positions.is_complex():  # or float64 would drop what is imaginary
            raise InputError(f"positions must be real numbers of shape [B, {self.twin.n_atoms}, 3], not complex ones.")
        # First of all: the twin moves a molecule to the origin, and single precision would round it again there.
        frames = positions.detach().to(torch.float64)
        with self._lock, self._telling():
            energies, found = self.twin.evaluate(frames, forces=forces)
        sound = (frames.abs() < FARTHEST).flatten(1).all(dim=1)  # NaN compares as False
        return energies, found, torch.stack((sound.sum(), torch.isinf(energies).sum()))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Say of errors of a GPU, be they its driver's, Triton's or torch's, that they are, and what memory lacks."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            lacking = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)  # numpy's, and torch's
            if isinstance(error, EnergyError) or not (lacking or self.on_gpu):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            what = "Memory is too small for a torch twin of" if lacking else "The GPU cannot evaluate"
            raise EnergyError(f"{what} the System ({lines[0].rstrip('.')}).") from error

    def _require_alive(self) -> None:
        if self._closed:
            raise EnergyError("The pool is closed: make another one.")
        if self._pid != os.getpid():
            raise EnergyError("A pool does not survive a fork: make one in each process.")


def _global_parameters(system: openmm.System) -> set[str]:
    return {
        force.getGlobalParameterName(i)
        for force in system.getForces()
        for i in range(getattr(force, "getNumGlobalParameters", lambda: 0)())
    }
