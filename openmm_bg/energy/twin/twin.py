"""A System's energies and forces in batches, by torch instead of OpenMM."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from ...errors import EnergyError, InputError
from ..arrays import FARTHEST, as_frames
from ..memory import available_memory
from ..snapshot import EPSILON_SINGLE, LARGEST_TERM, make_context
from ..workers import usable_cores
from .evaluator import Evaluator
from .system import Forces

logger = logging.getLogger(__name__)

#: Largest difference from OpenMM in float64, as a fraction of the energy and of the largest force component.
TOLERANCE = 1.0e-5
#: Largest difference of a force component in float32, as a fraction of the largest one.
TOLERANCE_SINGLE = 1.0e-3

#: Frames in a chunk: in torch; least and most of them, and atoms of all, where pairs are compiled, and on another
#: device than a CPU, whose memory, not cache, is the limit.
CHUNK = 64
CHUNK_COMPILED, CHUNK_ATOMS = (32, 256), 16_384
CHUNK_DEVICE, CHUNK_DEVICE_ATOMS = (32, 65_536), 2**20

#: Forces with tables of all pairs, and bytes that the tables of one take for each of N² pairs while they are made: 97
#: to 143 were measured.
PAIR_FORCES = (openmm.NonbondedForce, openmm.CustomNonbondedForce, openmm.GBSAOBCForce, openmm.CustomGBForce)
PAIR_BYTES = 150


@dataclass(frozen=True)
class Deviation:
    """How far a twin is from a Context on the Reference platform.

    Attributes
    ----------
    energy, force
        Largest difference of an energy, kJ/mol, and of a force component, kJ/mol/nm.
    relative_energy, relative_force
        The same as fractions of the energy (of 1 kJ/mol, if it is smaller) and of the frame's largest force component.
    of_rounding
        Largest difference of an energy as a fraction of what single precision can make: 1e-4 of the energy, or 8
        units of rounding of the largest single terms and of forces times positions (see `energy_tolerance`).
    n_frames
        Frames compared.
    dtype
        The twin's precision.
    """

    energy: float
    force: float
    relative_energy: float
    relative_force: float
    of_rounding: float
    n_frames: int
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """Whether the twin is right: to `TOLERANCE` in float64. In float32, whether it is not grossly wrong."""
        if self.dtype == torch.float64:
            return self.relative_energy <= TOLERANCE and self.relative_force <= TOLERANCE
        return self.of_rounding <= 1.0 and self.relative_force <= TOLERANCE_SINGLE

    def __str__(self) -> str:
        return (
            f"{self.energy:.2g} kJ/mol and {self.force:.2g} kJ/mol/nm (relative {self.relative_energy:.1g} and "
            f"{self.relative_force:.1g}) in {str(self.dtype).removeprefix('torch.')} on {self.n_frames} frames"
        )


class SystemTwin:
    """Evaluates batches of positions with the formulas of a System, no Context involved.

    The System is read once, when the twin is made; later changes of it do not show. All energies of one twin count as
    one energy function (docs/theory.md): compare old and new states with the same twin.

    Parameters
    ----------
    system
        Without periodic box, cutoffs and virtual sites.
    positions
        [F, N, 3] nm, frames on which the twin is compared with OpenMM's Reference platform, in float64 and in
        ``dtype``.
    dtype
        ``torch.float64``, or ``torch.float32``, in which single terms are evaluated and gradients are added up.
        Energies, and what is summed over an atom's pairs (Born integrals), are added up in float64 all the same; in C++
        from sums of 16 pairs each (`kernels.BLOCK`).
    device
        Where to evaluate, the comparison with OpenMM included.
    parameters
        Global parameters that differ from their defaults.
    compile
        Whether to compile the loops over pairs: in C++ on a CPU (seconds at first, then kept: see `kernels`), with
        Triton on a CUDA device (see `triton_kernels`). ``"c++"`` or ``"triton"`` asks for the one. None: on a CUDA
        device only. Where that is not possible they run in torch, and one sentence is logged.
    n_threads
        Threads that share the chunks of a batch on a CPU. None: as many as torch may use.

    Attributes
    ----------
    n_atoms
        N.
    n_threads
        Threads in use.
    parameters
        Global parameters in use.
    invariant
        Whether no energy depends on where the molecule is.
    backend
        What evaluates the loops over pairs: ``torch``, ``c++`` or ``triton``.
    compiled
        Whether the loops over pairs are compiled, that is, not in torch.
    deviation
        From OpenMM in float64.
    deviation_in_use
        From OpenMM in ``dtype``.
    n_energies, n_nonfinite
        Frames evaluated, and those that came out as +inf: positions or energy not finite. Counted on the device, so
        that an evaluation need not wait for it; asking for them waits.

    Raises
    ------
    InputError
        A force that a twin does not know or OpenMM refuses, wrong frames, an unknown parameter, or too little memory
        for the tables of pairs.
    EnergyError
        The twin differs from OpenMM.

    Examples
    --------
    >>> twin = SystemTwin(system, frames, dtype=torch.float32)  # doctest: +SKIP
    >>> energies, forces = twin.energies_and_forces(positions)  # doctest: +SKIP
    """

    def __init__(
        self,
        system: openmm.System,
        positions: ArrayLike | Tensor,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        parameters: Mapping[str, float] | None = None,
        compile: bool | str | None = None,
        n_threads: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype must be torch.float32 or torch.float64, not {dtype!r}.")
        if n_threads is not None and (isinstance(n_threads, bool) or int(n_threads) != n_threads or n_threads < 1):
            raise InputError(f"n_threads must be a whole number of at least 1, not {n_threads!r}.")
        self.n_threads = n_threads or min(torch.get_num_threads(), len(usable_cores()))
        self._fits = CHUNK_DEVICE[1]  # frames that the device's memory has not been seen to be too small for
        self._executor: tuple[int, ThreadPoolExecutor] | None = None
        self.n_atoms: int = system.getNumParticles()
        self.dtype, self.device = dtype, torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device is {device!r}, but torch finds no CUDA device here: leave it out.")
        self._counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._nine = torch.linspace(0, max(self.n_atoms - 1, 0), 9).round().long().to(self.device)
        frames = as_frames(positions, self.n_atoms)
        if not len(frames) or not np.isfinite(frames).all():
            raise InputError("A twin needs at least one frame of finite positions to be compared with OpenMM on.")
        _require_memory(system)
        forces = Forces(system)
        self.parameters = forces.parameters
        self.invariant = forces.translation_invariant
        self._evaluator = Evaluator(forces, dtype, self.device)
        self.backend, wanted = "torch", backend_for(self.device, compile)
        reason = None if wanted == "torch" else self._evaluator.compile(wanted)
        self._prepare(parameters or {})
        if reason is None and wanted == "triton":
            reason = self._evaluator.trial()
        if reason is None:
            self.backend = wanted
        else:
            logger.warning("The twin's loops over pairs are not compiled and run in torch: %s.", reason)
        exact = self
        if dtype != torch.float64:
            exact = object.__new__(SystemTwin)
            exact.__dict__.update(self.__dict__, dtype=torch.float64, backend="torch", n_threads=1)
            exact._evaluator = Evaluator(Forces(system), torch.float64, self.device)
            exact._evaluator.prepare(self.parameters)
        self.deviation = compare(exact, system, frames)
        self.deviation_in_use = self.deviation if exact is self else compare(self, system, frames)
        for found in (self.deviation, self.deviation_in_use):
            if not found.holds:
                raise EnergyError(f"The twin differs from OpenMM by {found}: use the Context pool.")
        self.n_energies = self.n_nonfinite = 0
        logger.info("A torch twin of the System differs from OpenMM by %s.", self.deviation_in_use)

    @property
    def compiled(self) -> bool:
        """Whether the loops over pairs are compiled."""
        return self.backend != "torch"

    @property
    def n_energies(self) -> int:
        """Frames evaluated whose positions were finite."""
        return int(self._counts[0])

    @n_energies.setter
    def n_energies(self, count: int) -> None:
        self._counts[0] = count

    @property
    def n_nonfinite(self) -> int:
        """Frames that came out as +inf."""
        return int(self._counts[1])

    @n_nonfinite.setter
    def n_nonfinite(self, count: int) -> None:
        self._counts[1] = count

    def set_parameters(self, parameters: Mapping[str, float]) -> None:
        """Change global parameters.

        Raises
        ------
        InputError
            The System has no such parameter.
        """
        self._prepare(parameters)

    def _prepare(self, parameters: Mapping[str, float]) -> None:
        unknown = sorted(parameters.keys() - self.parameters.keys())
        if unknown:
            raise InputError(f"The System has no global parameter {unknown[0]!r}.")
        self.parameters = {**self.parameters, **{name: float(value) for name, value in parameters.items()}}
        self._evaluator.prepare(self.parameters)

    def energies(self, positions: ArrayLike | Tensor) -> NDArray[np.float64]:
        """Potential energies.

        Parameters
        ----------
        positions
            [B, N, 3] nm; numpy array or torch tensor of any numeric type.

        Returns
        -------
        ndarray
            [B] float64 kJ/mol; +inf where positions or energy are not finite, or too large for ``dtype``.

        Raises
        ------
        InputError
            A wrong shape.
        """
        return self._numpy(positions, forces=False)[0]

    def energies_and_forces(self, positions: ArrayLike | Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Potential energies [B] in kJ/mol, and forces [B, N, 3] in kJ/mol/nm, both float64.

        Forces are zero where the energy is +inf, and in a frame any of whose forces is not finite.
        """
        energies, forces = self._numpy(positions, forces=True)
        assert forces is not None
        return energies, forces

    def _numpy(self, positions: Any, *, forces: bool) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        frames = torch.from_numpy(as_frames(positions, self.n_atoms))
        energies = np.empty(len(frames))
        found = np.empty(frames.shape) if forces else None
        # What lies on another device is fetched from it bit by bit, for its memory may not hold all of it.
        size = max(1, len(frames) if self.device.type == "cpu" else self._chunk_size(len(frames)))
        for start in range(0, len(frames), size):
            rows = slice(start, start + size)
            some, own = self.evaluate(frames[rows], forces=forces)
            energies[rows] = some.cpu().numpy()
            if found is not None and own is not None:
                found[rows] = own.cpu().numpy()
        return energies, found

    def evaluate(self, positions: Tensor, *, forces: bool = True) -> tuple[Tensor, Tensor | None]:
        """As `energies_and_forces`, for a tensor on any device, without a graph.

        On another device than a CPU the call returns when the work has been handed over; whatever uses the results
        waits for them. If memory runs out, chunks are halved.

        Parameters
        ----------
        positions
            [B, N, 3] nm.

        Returns
        -------
        tuple
            Energies [B] float64 and forces [B, N, 3] in ``dtype`` (or None), on the twin's device.

        Raises
        ------
        InputError
            A wrong shape, or complex numbers.
        EnergyError
            The device's memory does not hold a single frame.
        """
        if positions.ndim != 3 or positions.shape[1:] != (self.n_atoms, 3):
            raise InputError(f"positions must have shape [B, {self.n_atoms}, 3], not {list(positions.shape)}.")
        if positions.is_complex():
            raise InputError(f"positions must be real numbers of shape [B, {self.n_atoms}, 3], not complex ones.")
        frames = positions.detach()
        if frames.dtype not in (torch.float32, torch.float64):
            frames = frames.double()  # half precision would round what is subtracted from it
        energies = torch.empty(len(frames), dtype=torch.float64, device=self.device)
        found = torch.empty(frames.shape, dtype=self.dtype, device=self.device) if forces else None
        size = self._chunk_size(len(frames))
        chunks = [slice(start, min(start + size, len(frames))) for start in range(0, len(frames), size)]

        @torch.no_grad()  # which holds in one thread only
        def work(rows: slice) -> Tensor:
            return self._chunk(frames[rows], energies[rows], None if found is None else found[rows])

        shared = self.n_threads > 1 and len(chunks) > 1 and self.device.type == "cpu"
        before = torch.get_num_threads()
        try:
            if shared or self.compiled or self.n_threads == 1:
                torch.set_num_threads(1)  # chunks are small: threads that share one operation wait for each other
            counts = list(self._threads().map(work, chunks)) if shared else [self._halving(work, r) for r in chunks]
        finally:
            torch.set_num_threads(before)  # threads to come do as the last call said
        if counts:
            self._counts += torch.stack(counts).sum(0)
        return energies, found

    def evaluate_on_device(self, positions: Tensor, *, forces: bool = True) -> tuple[Tensor, Tensor | None]:
        """As `evaluate`, all in float64 and on the device of the positions: what a pool gives to `reduced_energy`."""
        energies, found = self.evaluate(positions, forces=forces)
        there = None if found is None else found.to(positions.device, torch.float64)
        return energies.to(positions.device), there

    def _halving(self, work: Callable[[slice], Tensor], rows: slice) -> Tensor:
        """Work on rows, or on its halves if memory does not hold them."""
        count = rows.stop - rows.start
        try:
            return work(rows)
        except torch.OutOfMemoryError as error:
            if count == 1:
                raise EnergyError(f"The memory of {self.device} does not hold one frame's energy: {error}") from error
        # Out of the handler, which had kept the failed attempt's arrays alive.
        self._fits = min(self._fits, count // 2)
        logger.info("%d frames at once are too many for the memory of %s: halved.", count, self.device)
        middle = rows.start + count // 2
        return self._halving(work, slice(rows.start, middle)) + self._halving(work, slice(middle, rows.stop))

    def _chunk(self, part: Tensor, energies: Tensor, forces: Tensor | None) -> Tensor:
        """Evaluate a few frames [b, N, 3]; how many of them had finite positions, and how many came out as +inf."""
        part = part.to(self.device)
        count = len(part)
        sound = (part.abs() < FARTHEST).all(dim=2).all(dim=1)  # NaN compares as False
        if self.invariant:
            # Precision must not suffer from where the molecule is, nor from particles that have left it.
            part = part - ninther(part[:, self._nine])
        if missing := -count % self._evaluator.multiple:
            part = torch.cat((part, part[-1:].expand(missing, -1, -1)))
        x = part.to(self.dtype).permute(2, 1, 0).contiguous()
        gradient = None if forces is None else torch.zeros_like(x)
        found = self._evaluator.evaluate(x, gradient)[:count]
        good = sound & torch.isfinite(found)
        energies.copy_(torch.where(good, found, torch.inf))
        if forces is not None and gradient is not None:
            torch.neg(gradient.permute(2, 1, 0)[:count], out=forces)
            bad = ~(good & torch.isfinite(forces).all(dim=2).all(dim=1))
            forces.masked_fill_(bad[:, None, None], 0.0)
        return torch.stack((sound.sum(), (~good).sum()))

    def _chunk_size(self, count: int) -> int:
        """Frames of a batch evaluated together: few, so that temporary arrays stay in the cache."""
        if self.device.type != "cpu":
            wanted = max(CHUNK_DEVICE[0], CHUNK_DEVICE_ATOMS // max(self.n_atoms, 1))
            return min(wanted, CHUNK_DEVICE[1], self._fits)
        if not self.compiled:
            return CHUNK
        share = -(-count // (16 * self.n_threads)) * 16  # so that no thread is left without one
        most = min(CHUNK_COMPILED[1], CHUNK_ATOMS // max(self.n_atoms, 1) // 16 * 16, share)
        return max(CHUNK_COMPILED[0], most)

    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None or self._executor[0] != os.getpid():  # threads do not survive a fork
            executor = ThreadPoolExecutor(self.n_threads, "openmm_bg-twin", torch.set_num_threads, (1,))
            self._executor = os.getpid(), executor
        return self._executor[1]

    def close(self) -> None:
        """End the threads; they start again if the twin is used again."""
        if self._executor is not None and self._executor[0] == os.getpid():
            self._executor[1].shutdown()
        self._executor = None


def ninther(x: Tensor) -> Tensor:
    """The median of the medians of three [B, 1, ...] of nine each [B, 9, ...], which up to three of them cannot move.

    Tukey's: nearly the median, but a few operations on all frames at once, and no sorting of each.
    """

    def middle(triples: Tensor) -> Tensor:
        a, b, c = triples.unbind(2)
        return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))

    return middle(middle(x.unflatten(1, (3, 3)))[:, None])


def _require_memory(system: openmm.System) -> None:
    """Refuse tables of pairs that memory does not hold: the system would end the process, not raise an error."""
    n, free = system.getNumParticles(), available_memory()
    tables = sum(isinstance(force, PAIR_FORCES) for force in system.getForces())
    needed = PAIR_BYTES * tables * n**2
    if free is not None and needed > free:
        raise InputError(
            f"Tables for the pairs of {n} particles take {needed / 2**30:.3g} GiB of memory and {free / 2**30:.3g} GiB "
            "are free: use the Context pool."
        )


def backend_for(device: torch.device, compile: bool | str | None) -> str:
    """What is to evaluate the loops over pairs, if it can: ``torch``, ``c++`` or ``triton`` (see `SystemTwin`).

    Raises
    ------
    InputError
        Another value of ``compile`` than those of `SystemTwin`.
    """
    if compile not in (True, False, None, "c++", "triton"):
        raise InputError(f'compile must be True, False, None, "c++" or "triton", not {compile!r}.')
    if isinstance(compile, str):
        return compile
    on_device = device.type == "cuda"
    if compile is None:
        compile = on_device
    return "torch" if not compile else "triton" if on_device else "c++"


def compare(twin: SystemTwin, system: openmm.System, frames: NDArray[np.float64]) -> Deviation:
    """Compare a twin with a Context on the Reference platform.

    Raises
    ------
    InputError
        Frames at which OpenMM has no finite energy.
    """
    context = make_context(system)
    for name, value in twin.parameters.items():
        context.setParameter(name, value)
    energies, forces = twin.energies_and_forces(frames)
    worst = np.zeros(5)
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        context.setPositions(frame)
        state = context.getState(energy=True, forces=True)
        e, f = state.getPotentialEnergy()._value, np.asarray(state.getForces(asNumpy=True)._value)
        if not (np.isfinite(e) and np.isfinite(f).all()):
            raise InputError("The System has no finite energy on a frame that its twin is to be compared on.")
        gaps = abs(energy - e), np.abs(force - f).max(initial=0.0)
        scales = max(abs(e), 1.0), max(np.abs(f).max(initial=0.0), 1.0)
        work = np.abs(f * (frame - np.median(frame, axis=0) if twin.invariant else frame)).sum()
        rounding = 1e-4 * abs(e) + 8.0 * EPSILON_SINGLE * (LARGEST_TERM * twin.n_atoms + work)
        worst = np.maximum(worst, [*gaps, gaps[0] / scales[0], gaps[1] / scales[1], gaps[0] / rounding])
    energy_gap, force_gap, relative_energy, relative_force, of_rounding = map(float, worst)
    return Deviation(energy_gap, force_gap, relative_energy, relative_force, of_rounding, len(frames), twin.dtype)
