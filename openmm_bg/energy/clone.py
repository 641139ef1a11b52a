"""One Context for one worker, and the loop that evaluates frames with it.

A worker is a thread of this process or a process of its own; both import this module, and a process must start
quickly: nothing here needs torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import openmm  # isort: skip
from openmm import unit  # isort: skip

if TYPE_CHECKING:
    from .snapshot import Box

logger = logging.getLogger(__name__)

_STATE = openmm.State.Energy
_STATE_WITH_FORCES = openmm.State.Energy | openmm.State.Forces


def _one_frame_public(context: openmm.Context) -> Callable[..., float]:
    def one_frame(positions: NDArray[np.float64], forces: NDArray[np.float64] | None) -> float:
        context.setPositions(positions)
        state = context.getState(energy=True, forces=forces is not None)
        if forces is not None:
            forces[...] = state.getForces(asNumpy=True)._value
        energy: float = state.getPotentialEnergy()._value
        return energy

    return one_frame


def _one_frame_fast(context: openmm.Context) -> Callable[..., float]:
    # What the public methods call, without keywords and units, which cost as much as a fifth of a small molecule's
    # forces; and forces are copied twenty times faster. `_getVectorAsNumpy` checks neither type, order nor size of what
    # it writes to: `Clone.evaluate` does.
    from openmm import _openmm as calls

    set_positions, get_state = calls.Context_setPositions, calls.Context_getState
    get_energy, copy_vectors = calls.State_getPotentialEnergy, calls.State__getVectorAsNumpy
    kind = openmm.State.Forces

    def one_frame(positions: NDArray[np.float64], forces: NDArray[np.float64] | None) -> float:
        set_positions(context, positions)
        if forces is None:
            energy: float = get_energy(get_state(context, _STATE, False, -1))
            return energy
        state = get_state(context, _STATE_WITH_FORCES, False, -1)
        copy_vectors(state, kind, forces)
        energy = get_energy(state)
        return energy

    return one_frame


def _has_fast_calls() -> bool:
    calls = getattr(openmm, "_openmm", None)
    return all(
        hasattr(calls, name)
        for name in (
            "Context_setPositions",
            "Context_getState",
            "State_getPotentialEnergy",
            "State__getVectorAsNumpy",
        )
    )


#: Makes of a Context a function that sets positions [N, 3], writes forces [N, 3] or not, and returns the energy.
_one_frame = _one_frame_fast if _has_fast_calls() else _one_frame_public


class Clone:
    """A Context of its own for one worker: created, used and destroyed there.

    Raises
    ------
    openmm.OpenMMException
        A Context cannot be created on this platform.
    """

    def __init__(self, system: openmm.System, platform: str, properties: Mapping[str, str]) -> None:
        self._arguments = (system, platform, dict(properties))
        self._n_atoms = system.getNumParticles()
        self._settings: tuple[Box, Mapping[str, float]] | None = None
        self._lost = ""  # why there is no Context any more
        self._context: openmm.Context | None = self._create()

    @property
    def context(self) -> openmm.Context:
        """The Context.

        Raises
        ------
        openmm.OpenMMException
            It could not be made again after OpenMM raised in it.
        """
        if self._context is None:
            raise openmm.OpenMMException(self._lost)
        return self._context

    def _create(self) -> openmm.Context:
        system, platform, properties = self._arguments
        # The integrator is never stepped; a Context just needs one.
        integrator = openmm.VerletIntegrator(1.0 * unit.femtosecond)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties)
        self._box: Box | None = None
        self._parameters: dict[str, float] = dict(context.getParameters())
        return context

    def apply(self, box: Box, parameters: Mapping[str, float]) -> None:
        """Take over the box, nm, and those global parameters that this System defines."""
        self._settings = (box, parameters)
        if self._box != box:
            self.context.setPeriodicBoxVectors(*(openmm.Vec3(*vector) for vector in box))
            self._box = box
        for name, value in parameters.items():
            if name in self._parameters and self._parameters[name] != value:
                self.context.setParameter(name, value)
                self._parameters[name] = value

    def _recreate(self) -> None:
        """Replace the Context after OpenMM raised in it, for nothing says what state that left behind."""
        self._context = None  # first, for memory may not hold both
        try:
            self._context = self._create()
            if self._settings is not None:
                self.apply(*self._settings)
        except Exception as error:
            self._context = None
            reason = str(error).rstrip(".")
            self._lost = f"A Context could not be made again after OpenMM raised in it ({reason}): make another pool."
            raise openmm.OpenMMException(self._lost) from error

    def evaluate(
        self,
        positions: NDArray[np.float64],
        energies: NDArray[np.float64],
        forces: NDArray[np.float64] | None,
        shares: Iterable[Sequence[int]],
        stop: Sequence[Any] | memoryview,
    ) -> str | None:
        """Evaluate rows of a batch.

        Parameters
        ----------
        positions, energies, forces
            [B, N, 3] nm to read, [B] kJ/mol and [B, N, 3] kJ/mol/nm (or None) to write; float64, C-contiguous.
        shares
            Rows to evaluate, a few at a time; each share is asked for when the one before is done.
        stop
            Its first entry turns true when nobody wants the rest any more.

        Returns
        -------
        str or None
            OpenMM's message if a frame made it raise; that frame's energy is +inf.

        Raises
        ------
        openmm.OpenMMException
            The Context could not be made again after that, now or earlier.
        """
        shape = (len(energies), self._n_atoms, 3)
        for array in (positions, forces):
            if array is not None and not (
                array.dtype == np.float64 and array.flags.c_contiguous and array.shape == shape
            ):
                raise TypeError(f"positions and forces must be C-contiguous float64 arrays of shape {list(shape)}")
        failure: str | None = None
        one_frame = _one_frame(self.context)
        for rows in shares:
            for row in rows:
                if stop[0]:
                    return failure
                try:
                    energies[row] = one_frame(positions[row], None if forces is None else forces[row])
                except openmm.OpenMMException as error:
                    failure = str(error)
                    energies[row] = np.inf
                    del one_frame  # it would keep the old Context alive
                    self._recreate()
                    one_frame = _one_frame(self.context)
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


def usable_cores() -> list[int]:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_of_workers(platform: str, n: int) -> list[int | None]:
    """The core that each of `n` workers is pinned to; None where it is not."""
    # Threads of a GPU driver would inherit the pin and gain nothing from it.
    cores = usable_cores() if platform in ("CPU", "Reference") else []
    # Ranks of one machine (torchrun) must not crowd onto the same cores.
    first = int(os.environ.get("LOCAL_RANK", "0")) * n
    return [cores[(first + index) % len(cores)] if cores else None for index in range(n)]


def pin(core: int | None) -> None:
    """Bind the calling thread to a core, where that exists and is wanted.

    To be done *before* a Context is created: on the CPU platform it hands its work to a thread of its own, which
    inherits the pin, and waking that thread on another core would cost more than a small molecule's forces.
    """
    if core is not None and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, {core})  # on Linux, 0 is the calling thread and not the process
        except OSError as error:
            logger.debug("A worker could not be pinned to core %d (%s).", core, error)


def share_size(n_rows: int, n_workers: int) -> int:
    """Rows of a share: small enough that a worker on a busy core does not keep the others waiting for long."""
    return max(1, n_rows // (8 * n_workers)) if n_workers > 1 else max(1, n_rows)
