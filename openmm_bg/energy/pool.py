"""Energies and forces of batches of frames, in copies of the user's Context or in the torch twin of its System."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from ..errors import EnergyError, InputError
from .arrays import as_frames, sound_rows
from .fingerprint import Fingerprint, fingerprint
from .implicit_solvent import EqualSolvent
from .process_workers import ProcessWorkers
from .snapshot import (
    ContextState,
    clone_system,
    energy_tolerance,
    is_double,
    platform_properties,
    read_state,
)
from .tuning import Effort, check_choice, find_equal, find_fastest
from .tuning_report import Tuning
from .twin_workers import TWINS, TwinWorkers, default_threads
from .workers import Workers

logger = logging.getLogger(__name__)


class ContextPool:
    """Evaluates batches of positions in clones of a Context, one per worker: a thread, or a process.

    The clones have the Context's System, box, global parameters and, on its platform, its platform
    properties. The Context itself is only read: its positions, parameters and step count stay as they are.
    Where a CustomGBForce is that of OBC2, clones may hold the equal, faster GBSAOBCForce (`implicit_solvent`), verified
    on the spot; one sentence is logged.
    Where that is faster, a torch twin of the System takes the place of the clones, of all of them. All energies
    of one pool count as one energy function (docs/theory.md): compare old and new states with the same pool.

    Several threads may call one pool: a call waits until the one before it is done, `sync` for a batch too. Only
    `close` does not wait, and what is under way ends in an error.

    Parameters
    ----------
    context
        The user's Context, with positions set and a finite energy.
    platform
        Platform of the clones; or "twin", on the CPU, or "twin:cuda", on torch's current CUDA device (which has never
        been tried on a GPU). None: timed (see `tune`), and possibly another than the Context's own. Where no twin can
        be made of the System, or it differs from the Context, clones are used, and one sentence says so.
    n_workers
        Number of clones, or threads of the twin; one on a GPU. None: timed; for ``platform="twin"``, all usable cores.
    positions
        [F, N, 3] nm, frames to time on; default the Context's own.
    processes
        Whether each clone has a process of its own instead of a thread. None: threads, unless a full tuning has found
        processes faster, as they are for small molecules on the Reference platform. A PythonForce stays in threads.
    equal_solvent
        True: obc2.xml's CustomGBForce is evaluated as the equal, faster GBSAOBCForce, once both were seen to agree.
        False: as it is.
    tune
        "full" times processes and the twin (on a GPU too, if torch has one) as well, takes longer, and keeps what it
        finds for later pools of the same System on the same machine (see `tune`); "quick" takes that up, or times
        clones in a second or two.

    Attributes
    ----------
    n_atoms, platform, n_workers, processes, equal_solvent
        What was chosen; of the twin, "twin" and its number of threads, or "twin:cuda" and 1.
    tuning
        Report of the timing, or None if there was none.
    generation
        How often `sync` has made the clones afresh.
    n_energies
        Frames that were evaluated.
    n_nonfinite
        Frames whose energy came out as +inf: positions not finite, energy not finite, or OpenMM raised. To ask for
        either count waits for a GPU that is at work for `evaluate_on_device`.

    Raises
    ------
    InputError
        A wrong argument, or a Context without finite positions and energy.
    EnergyError
        The System cannot be evaluated in a clone, or energies there differ from the Context's own. Later: the pool is
        closed, or one of its processes has ended.

    Examples
    --------
    >>> with ContextPool(simulation.context) as pool:  # doctest: +SKIP
    ...     energies, forces = pool.energies_and_forces(positions)
    """

    def __init__(
        self,
        context: openmm.Context,
        *,
        platform: str | None = None,
        n_workers: int | None = None,
        positions: ArrayLike | torch.Tensor | None = None,
        processes: bool | None = None,
        equal_solvent: bool = True,
        tune: Effort = "quick",
    ) -> None:
        check_choice(platform, n_workers, tune)
        if processes and platform in TWINS:
            raise InputError(
                "processes are for Contexts: name another platform than 'twin', or let threads do the work."
            )
        self.context = context
        self.n_atoms: int = context.getSystem().getNumParticles()
        self.tuning: Tuning | None = None
        self._lock, self._pid, self._closed = threading.Lock(), os.getpid(), False
        self._counts = [0, 0]
        self._counts_there: Tensor | None = None  # those to be added, on the device where they were made
        self._warned_failure = False
        self._warned_unpushed = False
        self.generation = 0
        self._fingerprint = fingerprint(context.getSystem())
        self._unpushed: Fingerprint | None = None  # an edit that the Context was seen not to know
        self._workers: Workers | ProcessWorkers | TwinWorkers
        self._slack = 0.0  # of the equal solvent, kJ/mol
        state = read_state(context)
        self._equal = find_equal(context, state, positions) if equal_solvent and platform not in TWINS else None
        self._wants_equal = self._equal is not None
        self.equal_solvent = False
        self._in_processes = bool(processes)
        name, count, ready = platform, n_workers, None
        if platform in TWINS:
            count = n_workers or default_threads()
        elif name is None or count is None:
            self.tuning, ready = find_fastest(
                context,
                platform=platform,
                n_workers=n_workers,
                positions=positions,
                effort=tune,
                kept=equal_solvent,
                processes=processes,
                equal=self._equal,
            )
            name, count = self._take(self.tuning)
        assert name is not None and count is not None
        if name in TWINS:
            try:
                self._start(name, count, state, ready)
                return
            except EnergyError as error:
                logger.warning("Contexts evaluate energies instead of a torch twin: %s", error)
            self._equal = find_equal(context, state, positions) if equal_solvent else None
            self.tuning, ready = find_fastest(
                context, n_workers=n_workers, positions=positions, kept=False, processes=processes, equal=self._equal
            )
            name, count = self._take(self.tuning)
            platform = None
        own = context.getPlatform().getName()
        if self._in_processes and processes is None:
            try:
                self._start(name, count, state, ready)
                return
            except EnergyError as error:
                logger.warning("Threads evaluate energies instead of processes: %s", error)
                self._in_processes = False
        try:
            self._start(name, count, state)
        except EnergyError as error:
            if platform is not None or name == own:
                raise
            logger.warning("The %s platform is not used (%s)", name, error)
            self._start(own, count, state)

    def _take(self, tuning: Tuning) -> tuple[str, int]:
        """Platform and number of workers that were chosen; the rest of the choice is remembered."""
        chosen = tuning.chosen
        self._in_processes, self._wants_equal = chosen.processes, chosen.equal_solvent
        return chosen.platform, chosen.n_workers

    def _start(
        self, name: str, count: int, state: ContextState, ready: TwinWorkers | ProcessWorkers | None = None
    ) -> None:
        """Make the workers, unless they are ready, and compare them with the Context."""
        if ready is None:
            self._workers = self._make_workers(name, count, state)
        else:
            self._workers = ready
            self._solvent_of_clones(state)
        try:
            self._synchronise(state)
        except BaseException:
            self._workers.close()
            raise

    def _solvent_of_clones(self, state: ContextState) -> EqualSolvent | None:
        """The form of the System that clones made now have, or None for its own."""
        # What was verified at the beginning serves once: clones are made again when the System has changed.
        verified, self._equal = self._equal, None
        equal = (verified or find_equal(self.context, state)) if self._wants_equal else None
        self.equal_solvent = equal is not None
        self._slack = 0.0 if equal is None else 4.0 * equal.agreement.energy
        return equal

    @property
    def platform(self) -> str:
        """Name of the clones' platform, or "twin", or "twin:cuda"."""
        return self._workers.platform

    @property
    def n_workers(self) -> int:
        """Number of clones, each in its own thread or process, or of the twin's threads."""
        return self._workers.n

    @property
    def processes(self) -> bool:
        """Whether each clone has a process of its own."""
        return isinstance(self._workers, ProcessWorkers)

    @property
    def n_energies(self) -> int:
        """Frames that were evaluated."""
        return self._counted()[0]

    @n_energies.setter
    def n_energies(self, count: int) -> None:
        self._counted()[0] = count

    @property
    def n_nonfinite(self) -> int:
        """Frames whose energy came out as +inf."""
        return self._counted()[1]

    @n_nonfinite.setter
    def n_nonfinite(self, count: int) -> None:
        self._counted()[1] = count

    def _counted(self) -> list[int]:
        """Both counts, with those that lay on a device."""
        if self._counts_there is not None:
            there, self._counts_there = self._counts_there, None
            self._counts = [count + more for count, more in zip(self._counts, there.tolist(), strict=True)]
        return self._counts

    def __enter__(self) -> ContextPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker threads or processes and destroy clones or twin. Also done on collection and at exit."""
        self._closed = True
        self._workers.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, or `sync` could end workers that a batch is with."""
        if self._pid != os.getpid():  # another thread may have had its turn when this process was forked, for ever
            raise EnergyError("A pool does not survive a fork: make one in each process.")
        with self._lock:
            yield

    def energies(self, positions: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Potential energies.

        Parameters
        ----------
        positions
            [B, N, 3] nm; numpy array or torch tensor of any numeric type.

        Returns
        -------
        ndarray
            [B] float64 kJ/mol; +inf where positions or energy are not finite or OpenMM raised.

        Raises
        ------
        InputError
            A wrong shape, or no real numbers.
        EnergyError
            The pool is closed.
        """
        return self._evaluate(positions, forces=False)[0]

    def energies_and_forces(
        self, positions: ArrayLike | torch.Tensor
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Potential energies [B] in kJ/mol, and forces [B, N, 3] in kJ/mol/nm, as `energies`.

        Forces are zero where the energy is +inf, and in a frame any of whose forces is not finite.
        """
        energies, forces = self._evaluate(positions, forces=True)
        assert forces is not None
        return energies, forces

    def evaluate_on_device(self, positions: Tensor, *, forces: bool = True) -> tuple[Tensor, Tensor | None]:
        """As `energies_and_forces`, in tensors on the device of the positions, outside of any graph.

        Where the pool's twin is on that device, a GPU, nothing leaves it and nothing waits for it. Everything else is
        evaluated on the host, and sent there.

        Parameters
        ----------
        positions
            [B, N, 3] nm.
        forces
            Whether forces are wanted.

        Returns
        -------
        tuple
            Energies [B] in kJ/mol, and forces [B, N, 3] in kJ/mol/nm or None, both float64.

        Raises
        ------
        InputError
            No tensor, a wrong shape, or complex numbers.
        EnergyError
            The pool is closed.
        """
        if not isinstance(positions, Tensor):
            raise InputError(f"positions must be a torch tensor, not {type(positions).__name__}.")
        with self._turn():
            workers = self._workers
            if isinstance(workers, TwinWorkers) and workers.holds(positions):
                found, found_forces, counts = workers.evaluate_on_device(positions, forces=forces)
                self._counts_there = counts if self._counts_there is None else self._counts_there + counts
                return found, found_forces
        energies, out = self._evaluate(positions, forces=forces)
        device = positions.device
        return torch.from_numpy(energies).to(device), None if out is None else torch.from_numpy(out).to(device)

    def sync(self) -> tuple[NDArray[np.float64], float]:
        """Follow the user's Context: global parameters, box, and force parameters.

        Global parameters and box are copied. Force parameters cannot be read from a Context, so the energy of
        the Context's positions is compared in both (`energy_tolerance`, for the coarser of the two
        precisions), and the System is compared with the one that the clones were made from. If either
        differs, the clones are made afresh from the Context's System and compared once more. A System that
        was changed but not pushed into its Context (`updateParametersInContext`, `reinitialize`) leaves the
        clones as they are as long as they agree with the Context, for it is the Context that is being
        sampled. Where neither tells (a change that does not show at these positions), it counts as known to the
        Context, as an edited System normally is, unless it was seen before that the Context does not know it.
        All of this holds for the twin as well, but for the box, which it does not have.

        A batch that another thread has begun is waited for: it ends with the energies of before.

        Returns
        -------
        tuple
            Positions [N, 3] of the Context in nm, and their energy in kJ/mol as this pool evaluates it, which
            `n_energies` does not count.

        Raises
        ------
        InputError
            The Context's positions are unset or not finite, or its energy is not finite.
        EnergyError
            Clones (or the twin) of the Context's System do not have the Context's energy, or no twin can be made of the
            System as it is now.
        """
        with self._turn():
            state = read_state(self.context)
            return state.positions, self._synchronise(state)

    def _synchronise(self, state: ContextState) -> float:
        """As `sync`; the energy."""
        if len(state.positions) != self.n_atoms:
            raise EnergyError(
                f"The Context now has {len(state.positions)} particles instead of {self.n_atoms}: make another pool."
            )
        self._workers.apply(state)
        energy, tolerance = self._evaluate_state(self._workers, state)
        agrees = abs(energy - state.energy) <= tolerance  # False for NaN
        found = fingerprint(self.context.getSystem())
        if agrees and found in (self._fingerprint, self._unpushed):
            return energy
        before = self.equal_solvent, self._slack
        fresh = self._make_workers(self.platform, self.n_workers, state)
        try:
            fresh.apply(state)
            fresh_energy, fresh_tolerance = self._evaluate_state(fresh, state)
        except BaseException:
            self.equal_solvent, self._slack = before
            fresh.close()
            raise
        if abs(fresh_energy - state.energy) <= fresh_tolerance:
            # Also if the old clones agree: the change may not show at these positions, and a System that is
            # edited is normally pushed.
            self._counted()  # those that wait on a device, for the next twin may be on another
            old, self._workers, self._fingerprint, self._unpushed = self._workers, fresh, found, None
            self.generation += 1
            old.close()
            if self._closed:  # meanwhile, and knew of the old ones only
                fresh.close()
                raise EnergyError("The pool was closed while it followed its Context.")
            logger.info("The Context's System has changed: energies follow it from now on.")
            return fresh_energy
        self.equal_solvent, self._slack = before
        fresh.close()
        if agrees:
            self._unpushed = found
            if not self._warned_unpushed:
                self._warned_unpushed = True
                logger.warning(
                    "The System was changed without telling its Context (by updateParametersInContext or "
                    "reinitialize); energies follow the Context."
                )
            return energy
        copy = "torch twin" if self.platform in TWINS else "copy"
        where = "" if self.platform in TWINS else f" on {self.platform}"
        raise EnergyError(
            f"A {copy} of the Context's System{where} differs from the Context by {fresh_energy - state.energy:.6g} "
            f"kJ/mol at its positions (rounding allows {fresh_tolerance:.2g}): call updateParametersInContext "
            "on the forces that were changed, or context.reinitialize(preserveState=True)."
        )

    def _evaluate_state(
        self, workers: Workers | ProcessWorkers | TwinWorkers, state: ContextState
    ) -> tuple[float, float]:
        """Energy of a clone or the twin at the Context's positions, and how far rounding may take it from its own."""
        try:
            energy, groups = workers.group_energies(state.positions)
        except openmm.OpenMMException as error:
            message = str(error).rstrip(".")
            raise EnergyError(f"The {workers.platform} platform cannot evaluate the System ({message}).") from error
        own = self.context.getPlatform().getName()
        double = is_double(own, platform_properties(own, self.context)) and workers.double
        equal = self.equal_solvent and not isinstance(workers, TwinWorkers)
        # In single precision, other kernels round a form of the solvent differently, as those of other platforms do.
        same = own == workers.platform and not equal
        slack = self._slack if equal else 0.0
        return energy, energy_tolerance(state, groups, double=double, same_platform=same) + slack

    def _make_workers(self, platform: str, count: int, state: ContextState) -> Workers | ProcessWorkers | TwinWorkers:
        if platform in TWINS:
            try:
                return TwinWorkers(clone_system(self.context), state, count, platform)
            except InputError as error:
                raise EnergyError(str(error)) from error
        equal = self._solvent_of_clones(state)
        system = clone_system(self.context) if equal is None else equal.system
        kind = ProcessWorkers if self._in_processes else Workers
        try:
            return kind(system, platform, platform_properties(platform, self.context), count)
        except openmm.OpenMMException as error:
            message = str(error).rstrip(".")
            raise EnergyError(f"The {platform} platform cannot hold the System ({message}).") from error

    def _evaluate(self, positions: Any, *, forces: bool) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        array = as_frames(positions, self.n_atoms)
        rows = sound_rows(array)
        with self._turn():
            workers = self._workers
            energies, out = workers.evaluate(array, rows, forces=forces)
            bad = ~np.isfinite(energies)
            self._counts[0] += len(rows)
            self._counts[1] += int(bad.sum())
            if workers.failure is not None and not self._warned_failure:
                self._warned_failure = True
                logger.warning("OpenMM could not evaluate a frame, which counts as +inf: %s", workers.failure)
        energies[bad] = np.inf
        if out is not None and (bad.any() or not np.isfinite(out).all()):
            out[bad | ~np.isfinite(out).all(axis=(1, 2))] = 0.0
        return energies, out
