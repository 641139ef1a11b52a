"""What a sampler is given, checked: does the System fit the flow, has the Context positions, is the count a count."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.artifact import Flow
from openmm_bg.coordinates import CoordinateMap, read_constraints
from openmm_bg.energy import in_kelvin
from openmm_bg.errors import InputError

logger = logging.getLogger(__name__)

#: Lengths of constrained bonds must agree between model and System within this, nm.
LENGTH_TOLERANCE = 1e-6


def require_count(name: str, n: Any) -> None:
    """Raise `InputError` unless n is a whole number of at least 1."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise InputError(f"{name} must be a whole number, got {n!r}.")
    if n < 1:
        raise InputError(f"{name} must be at least 1, got {n}.")


def target_temperature(temperature: Any, context: openmm.Context) -> float:
    """K; None takes the integrator's.

    Raises
    ------
    InputError
        The integrator has none, or it is not positive.
    """
    if temperature is None:
        integrator = context.getIntegrator()
        if not hasattr(integrator, "getTemperature"):
            raise InputError(f"A {type(integrator).__name__} has no temperature: pass temperature= to the sampler.")
        temperature = integrator.getTemperature()
    return in_kelvin(temperature)


def require_all_forces(context: openmm.Context) -> None:
    """Refuse an integrator that leaves out forces: MD would sample another energy than the one moves accept on.

    Raises
    ------
    InputError
        A force with an energy is in none of the groups that the integrator propagates.
    """
    groups = context.getIntegrator().getIntegrationForceGroups()
    if groups == -1:
        return
    for force in context.getSystem().getForces():
        kind, group = type(force).__name__, force.getForceGroup()
        without_energy = isinstance(force, (openmm.CMMotionRemover, openmm.AndersenThermostat)) or "Barostat" in kind
        if not without_energy and not groups >> group & 1:
            raise InputError(
                f"The integrator leaves out force group {group} (a {kind}), so that MD samples another energy than the "
                "System's: add the group with setIntegrationForceGroups, or remove the force."
            )


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the CPU with a logged note where it cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
        torch.zeros(1, device=wanted)
        return wanted
    except (RuntimeError, AssertionError) as error:
        logger.warning("The device %s cannot be used (%s): the flow runs on the CPU.", device, first_line(error))
        return torch.device("cpu")


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def context_positions(context: openmm.Context) -> np.ndarray:
    """Positions [N, 3] in nm, float64 and contiguous."""
    try:
        x = context.getState(positions=True).getPositions(asNumpy=True)._value
    except openmm.OpenMMException as error:
        reason = first_line(error)
        raise InputError(f"The Context has no positions yet ({reason}): call setPositions first.") from error
    if not np.isfinite(x).all():
        raise InputError("The Context's positions contain NaN or infinite values: set them before sampling.")
    return np.ascontiguousarray(x, dtype=np.float64)


def match_system(flow: Flow, system: openmm.System) -> tuple[CoordinateMap, set[tuple[int, int]]]:
    """The flow's coordinates with this System's constraints and masses, and the lengths that it leaves free."""
    constraints = read_constraints(system, flow.topology)
    ours = flow.coordinates.constraints
    trained = {(min(p), max(p)): d for p, d in zip(ours.bonds, ours.lengths, strict=True)}
    found = {(min(p), max(p)): d for p, d in zip(constraints.bonds, constraints.lengths, strict=True)}
    extra = sorted(found.keys() - trained.keys())
    if extra:
        raise InputError(
            f"The System constrains {len(extra)} bonds that the flow models (first: atoms {extra[0]}): "
            "use the constraints it was trained with."
        )
    for pair, length in found.items():
        if abs(length - trained[pair]) > LENGTH_TOLERANCE:
            raise InputError(
                f"The System constrains bond {pair} to {length:.6f} nm, the flow to {trained[pair]:.6f} nm: "
                "another force field's lengths need another flow."
            )
    _match_bonds(flow, system, found.keys())
    return flow.coordinates.with_constraints(constraints), trained.keys() - found.keys()


def _match_bonds(flow: Flow, system: openmm.System, constrained: Any) -> None:
    """A System whose bonded terms skip one of the flow's bonds has another molecule, or another atom order."""
    bonded = set(constrained)
    seen = False
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            seen = True
            for k in range(force.getNumBonds()):
                i, j = force.getBondParameters(k)[:2]
                bonded.add((min(i, j), max(i, j)))
    if not seen:
        return
    missing = [(i, j) for i, j in flow.bonds.tolist() if (i, j) not in bonded]
    if missing:
        raise InputError(
            f"The System has no bond between atoms {missing[0]}, the flow's molecule has: "
            "it is another molecule or another atom order."
        )
