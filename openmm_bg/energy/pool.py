"""Energies and forces of batches of frames, in copies of the user's Context or in the torch twin of its System."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from ..errors import EnergyError, InputError
from .arrays import as_frames, sound_rows
from .snapshot import (
    ContextState,
    clone_system,
    digest_system,
    energy_tolerance,
    is_double,
    platform_properties,
    read_state,
)
from .tuning import Effort, Tuning, check_choice, find_fastest
from .twin_workers import TWIN, TwinWorkers, default_threads
from .workers import Workers

logger = logging.getLogger(__name__)


class ContextPool:
    """Evaluates batches of positions in clones of a Context, one per worker thread.

    The clones have the Context's System, box, global parameters and, on its platform, its platform
    properties. The Context itself is only read: its positions, parameters and step count stay as they are.
    Where that is faster, a torch twin of the System takes the place of the clones, of all of them. All energies
    of one pool count as one energy function (docs/theory.md): compare old and new states with the same pool.

    Parameters
    ----------
    context
        The user's Context, with positions set and a finite energy.
    platform
        Platform of the clones, or "twin". None: timed (see `tune`), and possibly another than the Context's own. Where
        no twin can be made of the System, or it differs from the Context, clones are used, and one sentence says so.
    n_workers
        Number of clones, or threads of the twin. None: timed; for ``platform="twin"``, all usable cores.
    positions
        [F, N, 3] nm, frames to time on; default the Context's own.
    tune
        "full" times the twin too, takes longer, and keeps what it finds for later pools of the same System on the same
        machine (see `tune`); "quick" takes that up, or times clones in a second or two.

    Attributes
    ----------
    n_atoms, platform, n_workers
        What was chosen; of the twin, "twin" and its number of threads.
    tuning
        Report of the timing, or None if there was none.
    n_energies
        Frames that were evaluated.
    n_nonfinite
        Frames whose energy came out as +inf: positions not finite, energy not finite, or OpenMM raised.

    Raises
    ------
    InputError
        A wrong argument, or a Context without finite positions and energy.
    EnergyError
        The System cannot be evaluated in a clone, or energies there differ from the Context's own.

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
        tune: Effort = "quick",
    ) -> None:
        check_choice(platform, n_workers, tune)
        self.context = context
        self.n_atoms: int = context.getSystem().getNumParticles()
        self.tuning: Tuning | None = None
        self.n_energies = 0
        self.n_nonfinite = 0
        self._warned_failure = False
        self._warned_unpushed = False
        self._digest = digest_system(context)
        self._workers: Workers | TwinWorkers
        state = read_state(context)
        name, count, twin = platform, n_workers, None
        if platform == TWIN:
            count = n_workers or default_threads()
        elif name is None or count is None:
            self.tuning, twin = find_fastest(
                context, platform=platform, n_workers=n_workers, positions=positions, effort=tune
            )
            name, count = self.tuning.chosen.platform, self.tuning.chosen.n_workers
        assert name is not None and count is not None
        if name == TWIN:
            try:
                self._start(name, count, state, twin)
                return
            except EnergyError as error:
                logger.warning("Contexts evaluate energies instead of a torch twin: %s", error)
            self.tuning, _ = find_fastest(context, n_workers=n_workers, positions=positions, kept=False)
            platform, name, count = None, self.tuning.chosen.platform, self.tuning.chosen.n_workers
        own = context.getPlatform().getName()
        try:
            self._start(name, count, state)
        except EnergyError as error:
            if platform is not None or name == own:
                raise
            logger.warning("The %s platform is not used (%s)", name, error)
            self._start(own, count, state)

    def _start(self, name: str, count: int, state: ContextState, ready: TwinWorkers | None = None) -> None:
        """Make the workers, unless they are ready, and compare them with the Context."""
        self._workers = self._make_workers(name, count, state) if ready is None else ready
        try:
            self._synchronise(state)
        except BaseException:
            self.close()
            raise

    @property
    def platform(self) -> str:
        """Name of the clones' platform, or "twin"."""
        return self._workers.platform

    @property
    def n_workers(self) -> int:
        """Number of clones, each in its own thread, or of the twin's threads."""
        return self._workers.n

    def __enter__(self) -> ContextPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker threads and destroy clones or twin. Also done on collection and at exit."""
        self._workers.close()

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
            A wrong shape.
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

    def sync(self) -> None:
        """Follow the user's Context: global parameters, box, and force parameters.

        Global parameters and box are copied. Force parameters cannot be read from a Context, so the energy of
        the Context's positions is compared in both (`energy_tolerance`, for the coarser of the two
        precisions), and the System is compared with the one that the clones were made from. If either
        differs, the clones are made afresh from the Context's System and compared once more. A System that
        was changed but not pushed into its Context (`updateParametersInContext`, `reinitialize`) leaves the
        clones as they are as long as they agree with the Context, for it is the Context that is being
        sampled. All of this holds for the twin as well, but for the box, which it does not have.

        Raises
        ------
        InputError
            The Context's positions are unset or not finite, or its energy is not finite.
        EnergyError
            Clones (or the twin) of the Context's System do not have the Context's energy, or no twin can be made of the
            System as it is now.
        """
        self._synchronise(read_state(self.context))

    def _synchronise(self, state: ContextState) -> None:
        if len(state.positions) != self.n_atoms:
            raise EnergyError(
                f"The Context now has {len(state.positions)} particles instead of {self.n_atoms}: make another pool."
            )
        self._workers.apply(state)
        gap, tolerance = self._compare(self._workers, state)
        agrees = abs(gap) <= tolerance  # False for NaN
        digest = digest_system(self.context)
        if agrees and digest == self._digest:
            return
        fresh = self._make_workers(self.platform, self.n_workers, state)
        try:
            fresh.apply(state)
            fresh_gap, fresh_tolerance = self._compare(fresh, state)
        except BaseException:
            fresh.close()
            raise
        if abs(fresh_gap) <= fresh_tolerance:
            # Also if the old clones agree: the change may not show at these positions, and a System that is
            # edited is normally pushed.
            self._workers.close()
            self._workers, self._digest = fresh, digest
            logger.debug("Clones or twin were made afresh from the Context's System.")
            return
        fresh.close()
        if agrees:
            if not self._warned_unpushed:
                self._warned_unpushed = True
                logger.warning(
                    "The System was changed without telling its Context (by updateParametersInContext or "
                    "reinitialize); energies follow the Context."
                )
            return
        copy = "torch twin" if self.platform == TWIN else "copy"
        where = "" if self.platform == TWIN else f" on {self.platform}"
        raise EnergyError(
            f"A {copy} of the Context's System{where} differs from the Context by {fresh_gap:.6g} "
            f"kJ/mol at its positions (rounding allows {fresh_tolerance:.2g}): call updateParametersInContext "
            "on the forces that were changed, or context.reinitialize(preserveState=True)."
        )

    def _compare(self, workers: Workers | TwinWorkers, state: ContextState) -> tuple[float, float]:
        """Energy of a clone or the twin minus the Context's own at its positions, and what rounding allows."""
        try:
            energy, groups = workers.group_energies(state.positions)
        except openmm.OpenMMException as error:
            message = str(error).rstrip(".")
            raise EnergyError(f"The {workers.platform} platform cannot evaluate the System ({message}).") from error
        own = self.context.getPlatform().getName()
        double = is_double(own, platform_properties(own, self.context)) and workers.double
        same = own == workers.platform
        return energy - state.energy, energy_tolerance(state, groups, double=double, same_platform=same)

    def _make_workers(self, platform: str, count: int, state: ContextState) -> Workers | TwinWorkers:
        if platform == TWIN:
            try:
                return TwinWorkers(clone_system(self.context), state, count)
            except InputError as error:
                raise EnergyError(str(error)) from error
        try:
            return Workers(clone_system(self.context), platform, platform_properties(platform, self.context), count)
        except openmm.OpenMMException as error:
            message = str(error).rstrip(".")
            raise EnergyError(f"The {platform} platform cannot hold the System ({message}).") from error

    def _evaluate(self, positions: Any, *, forces: bool) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        array = as_frames(positions, self.n_atoms)
        rows = sound_rows(array)
        energies, out = self._workers.evaluate(array, rows, forces=forces)
        bad = ~np.isfinite(energies)
        energies[bad] = np.inf
        if out is not None:
            out[bad | ~np.isfinite(out).all(axis=(1, 2))] = 0.0
        self.n_energies += len(rows)
        self.n_nonfinite += int(bad.sum())
        if self._workers.failure is not None and not self._warned_failure:
            self._warned_failure = True
            logger.warning("OpenMM could not evaluate a frame, which counts as +inf: %s", self._workers.failure)
        return energies, out
