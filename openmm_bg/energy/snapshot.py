"""What is read from the user's Context: its System, platform, box, parameters, and one energy to compare
with.

Nothing here writes to the Context: reading a State changes neither its positions, parameters nor step count.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip
from openmm import unit  # isort: skip

from ..errors import EnergyError, InputError

logger = logging.getLogger(__name__)

Box = tuple[tuple[float, float, float], ...]

#: Unit roundoff of the two arithmetics a platform may use for forces.
EPSILON_DOUBLE = 2.0**-53
EPSILON_SINGLE = 2.0**-24

#: Energy (kJ/mol) of two unit charges 0.1 nm apart, 138.935 / 0.1: the size of the largest single terms of a
#: molecular force field, which the total energy hides because they cancel.
LARGEST_TERM = 1389.35


@dataclass(frozen=True)
class ContextState:
    """Positions, energy, box and parameters of a Context at one moment.

    Attributes
    ----------
    positions
        [N, 3] nm, finite.
    energy
        kJ/mol, finite.
    force_work
        Σ_i |F_i| |x_i|, kJ/mol: how far the energy moves per unit of relative rounding of the positions.
    box
        Periodic box vectors, nm.
    parameters
        Global parameters of the Context.
    """

    positions: NDArray[np.float64]
    energy: float
    force_work: float
    box: Box
    parameters: Mapping[str, float]


def read_state(context: openmm.Context) -> ContextState:
    """Read a Context whose positions are set and whose energy there is finite.

    Raises
    ------
    InputError
        Positions not set or not finite, or an energy that is not finite.
    EnergyError
        The Context cannot evaluate its own energy.
    """
    try:
        state = context.getState(positions=True, forces=True, energy=True)
    except openmm.OpenMMException as error:
        message = str(error)
        # An unset Context hands out zeros as positions, so only this message tells.
        if "positions have not been set" in message:
            raise InputError("The Context has no positions: call context.setPositions first.") from None
        if "NaN" in message:
            raise InputError("The Context's positions are not finite: call context.setPositions first.") from None
        raise EnergyError(f"The Context cannot evaluate its energy ({message.rstrip('.')}).") from error
    positions = np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
    if not np.isfinite(positions).all():
        raise InputError("The Context's positions are not finite: call context.setPositions first.")
    energy = float(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
    if not np.isfinite(energy):
        raise InputError(f"The Context's potential energy at its positions is {energy}: minimise it or set others.")
    forces = np.asarray(state.getForces(asNumpy=True)._value)
    work = float((np.linalg.norm(forces, axis=1) * np.linalg.norm(positions, axis=1)).sum())
    vectors = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer)
    return ContextState(
        positions=positions,
        energy=energy,
        force_work=work if np.isfinite(work) else 0.0,
        box=tuple((float(a), float(b), float(c)) for a, b, c in vectors),
        parameters=dict(context.getParameters()),
    )


def clone_system(context: openmm.Context) -> openmm.System:
    """Copy the Context's System, so that later edits of the original reach nobody by accident.

    A System that cannot be copied (a PythonForce around a lambda) is shared; `fingerprint` then says
    nothing of that force, and only the comparison of energies guards it.
    """
    system = context.getSystem()
    try:
        return copy.copy(system)
    except Exception as error:
        logger.info("The System cannot be copied (%s) and is shared with its Context.", error)
        return system


def digest_system(context: openmm.Context) -> str | None:
    """Digest of the Context's System as it is now, or None if it cannot be serialised."""
    try:
        text = openmm.XmlSerializer.serialize(context.getSystem())
    except Exception:  # whatever pickling a PythonForce raises
        return None
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def platform_properties(name: str, context: openmm.Context) -> dict[str, str]:
    """Platform properties of a clone on platform `name`.

    On the Context's own platform its properties are kept. Elsewhere the defaults hold, but for mixed
    precision where there is a choice. Clones on the CPU platform run one thread each, for they run beside
    each other.
    """
    platform = openmm.Platform.getPlatformByName(name)
    names = platform.getPropertyNames()
    own = context.getPlatform()
    properties: dict[str, str] = {}
    if own.getName() == name:
        values = {key: own.getPropertyValue(context, key) for key in names}
        properties = {key: value for key, value in values.items() if value != ""}
    elif "Precision" in names:
        properties = {"Precision": "mixed"}
    if name == "CPU":
        properties["Threads"] = "1"
    return properties


def is_double(name: str, properties: Mapping[str, str]) -> bool:
    """Whether forces and energies on this platform are computed in double precision."""
    return name == "Reference" or properties.get("Precision") == "double"


def energy_tolerance(
    state: ContextState, group_energies: NDArray[np.float64], *, double: bool, same_platform: bool
) -> float:
    """Largest difference, kJ/mol, that rounding can make between two evaluations of one System.

    The sum of three parts, with ε the unit roundoff of the *coarser* of the two evaluations:

    * a fraction of Σ_g |E_g| over force groups (a sum of magnitudes: groups cancel in the total). In double
      precision 1e-9. In single precision 1e-5 on one and the same platform (sums in another order), and 1e-4
      between platforms, whose Ewald grids and interpolation tables differ (2e-5 seen on a small water box).
    * 8 ε Σ_i |F_i| |x_i|: positions rounded to relative ε move the energy by this much at most, times a
      margin.
    * 8 ε N · 1389 kJ/mol: one close pair of unit charges per atom, rounded; it covers terms that cancel
      within a group, and systems whose energy and forces happen to vanish.
    """
    epsilon = EPSILON_DOUBLE if double else EPSILON_SINGLE
    fraction = 1e-9 if double else 1e-5 if same_platform else 1e-4
    magnitude = float(np.abs(group_energies).sum())
    rounding = state.force_work + LARGEST_TERM * len(state.positions)
    return fraction * magnitude + 8.0 * epsilon * rounding


def make_context(system: openmm.System, platform: openmm.Platform | None = None) -> openmm.Context:
    """A Context that holds a System for energies, on Reference unless told otherwise.

    Raises
    ------
    InputError
        OpenMM refuses the System (a barostat without a periodic box, say).
    """
    chosen = openmm.Platform.getPlatformByName("Reference") if platform is None else platform
    try:
        return openmm.Context(system, openmm.VerletIntegrator(0.001), chosen)
    except openmm.OpenMMException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"OpenMM cannot make a Context of the System: {reason}.") from error
