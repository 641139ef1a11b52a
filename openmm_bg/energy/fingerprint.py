"""What tells, before every move, whether a System still has the forces that clones were made with.

`openmm.XmlSerializer` writes all of a System, for as long as a dozen energies of a small molecule take. OpenMM's
getters say the same of the common forces in a quarter of that, as long as their values are not dressed in units: it is
the functions below OpenMM's Python classes that are called here. A force that is not listed, and every force where
those functions are missing, is written as XML.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import repeat
from typing import Any, TypeAlias

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip

#: Equal for Systems with equal forces, as far as these can be written.
Fingerprint: TypeAlias = list[Any]

#: Getters of one argument, the index, after the one that counts them; then getters without arguments.
_LISTS: dict[str, list[tuple[str, ...]]] = {
    "HarmonicBondForce": [("getNumBonds", "getBondParameters")],
    "HarmonicAngleForce": [("getNumAngles", "getAngleParameters")],
    "PeriodicTorsionForce": [("getNumTorsions", "getTorsionParameters")],
    "RBTorsionForce": [("getNumTorsions", "getTorsionParameters")],
    "NonbondedForce": [
        ("getNumParticles", "getParticleParameters"),
        ("getNumExceptions", "getExceptionParameters"),
        ("getNumParticleParameterOffsets", "getParticleParameterOffset"),
        ("getNumExceptionParameterOffsets", "getExceptionParameterOffset"),
        ("getNumGlobalParameters", "getGlobalParameterName", "getGlobalParameterDefaultValue"),
    ],
    "GBSAOBCForce": [("getNumParticles", "getParticleParameters")],
    "CMMotionRemover": [],
}
_SETTINGS: dict[str, tuple[str, ...]] = {
    "HarmonicBondForce": ("usesPeriodicBoundaryConditions",),
    "HarmonicAngleForce": ("usesPeriodicBoundaryConditions",),
    "PeriodicTorsionForce": ("usesPeriodicBoundaryConditions",),
    "RBTorsionForce": ("usesPeriodicBoundaryConditions",),
    "NonbondedForce": (
        "getNonbondedMethod",
        "getCutoffDistance",
        "getUseSwitchingFunction",
        "getSwitchingDistance",
        "getReactionFieldDielectric",
        "getEwaldErrorTolerance",
        "getPMEParameters",
        "getLJPMEParameters",
        "getUseDispersionCorrection",
        "getReciprocalSpaceForceGroup",
        "getIncludeDirectSpace",
        "getExceptionsUsePeriodicBoundaryConditions",
    ),
    "GBSAOBCForce": (
        "getNonbondedMethod",
        "getCutoffDistance",
        "getSoluteDielectric",
        "getSolventDielectric",
        "getSurfaceAreaEnergy",
    ),
    "CMMotionRemover": ("getFrequency",),
}


def fingerprint(system: openmm.System) -> Fingerprint:
    """All that the energy of a System depends on as it is now: number of particles, virtual sites and forces.

    A force that cannot be written (a PythonForce around a lambda) is there as None: only energies tell of its changes.
    """
    n = system.getNumParticles()
    # A virtual site is only ever written as part of its System.
    sites = _written(openmm.XmlSerializer.serialize, system) if any(map(system.isVirtualSite, range(n))) else None
    return [n, sites, *(_written(_reader(type(force).__name__), force) for force in system.getForces())]


def _written(write: Callable[[Any], Any], what: Any) -> Any:
    try:
        return write(what)
    except Exception:  # whatever pickling a PythonForce raises
        return None


@cache
def _reader(name: str) -> Callable[[openmm.Force], Any]:
    """What reads the forces of the class of this name."""
    functions = getattr(openmm, "_openmm", None)
    wanted = [f"{name}_{getter}" for getter in (*sum(_LISTS.get(name, []), ()), *_SETTINGS.get(name, ()))]
    if name not in _LISTS or not all(hasattr(functions, each) for each in (*wanted, "Force_getForceGroup")):
        return openmm.XmlSerializer.serialize

    def function(getter: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(functions, f"{name}_{getter}")
        return found

    lists = [(function(count), [function(getter) for getter in getters]) for count, *getters in _LISTS[name]]
    settings = [functions.Force_getForceGroup, *map(function, _SETTINGS[name])]  # type: ignore[union-attr]

    def read(force: openmm.Force) -> list[Any]:
        found: list[Any] = [name, [setting(force) for setting in settings]]
        for count, getters in lists:
            elements = range(count(force))
            found += [list(map(getter, repeat(force), elements)) for getter in getters]
        return found

    return read
