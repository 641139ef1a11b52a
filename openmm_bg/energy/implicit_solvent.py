"""OBC2 implicit solvent twice: OpenMM's ``implicit/obc2.xml`` as a CustomGBForce, and the equal GBSAOBCForce.

The generalised Born model of Onufriev, Bashford and Case (Proteins 55, 383, 2004; set II: α = 1, β = 0.8, γ = 4.85)
with the surface term called ACE. The custom force interprets expressions and is most of the cost of a protein on the
CPU platform; the built-in force computes the same function several times faster.

Only a force whose every expression is that of OBC2 is replaced, for a model that merely resembles it has another
energy; `agreement` compares both Systems on frames besides.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip

from ..errors import EnergyError, InputError
from .snapshot import make_context

logger = logging.getLogger(__name__)

#: Coulomb's constant in kJ/mol nm/e², as obc2.xml writes it and as GBSAOBCForce has it.
COULOMB_OF_EXPRESSION = 138.935485
COULOMB_OF_OPENMM = 138.93545764438198
#: Dielectric offset of the radii, nm; a constant of GBSAOBCForce.
OFFSET = 0.009
#: 4π times the surface tension, kJ/mol/nm², as obc2.xml writes it.
SURFACE_COEFFICIENT = 28.3919551
#: Largest difference between the two forces, as a fraction of the solvent's own energy and of its largest force
#: component. In double precision they agree to 1e-12; an OpenMM whose Coulomb constant has other last digits would
#: make that 1e-8, another model of the solvent 1e-2.
TOLERANCE = 1e-7

_SINGLE = openmm.CustomGBForce.SingleParticle
_PAIR = openmm.CustomGBForce.ParticlePairNoExclusions
_BORN_INTEGRAL = (
    "select(step(r+sr2-or1),0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r),0)",
    {"U": "r+sr2", "L": "max(or1,D)", "D": "abs(r-sr2)"},
)
_BORN_RADIUS = (
    "1/(1/or-tanh(psi-0.8*psi^2+4.85*psi^3)/radius)",
    {"psi": "I*or", "radius": "or+offset"},
)
_SELF: tuple[str, dict[str, str]] = ("-0.5*138.935485*(1/soluteDielectric-1/solventDielectric)*charge^2/B", {})
_PAIRS = (
    "-138.935485*(1/soluteDielectric-1/solventDielectric)*charge1*charge2/f",
    {"f": "sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))"},
)
_SURFACE = ("28.3919551*(radius+0.14)^2*(radius/B)^6", {"radius": "or+offset"})


class _Different(Exception):
    """What tells a force from OBC2, as the end of a sentence."""


@dataclass(frozen=True)
class Agreement:
    """How well two Systems agree on frames.

    Attributes
    ----------
    energy
        Largest difference of energies, kJ/mol.
    relative_energy
        The same as a fraction of the solvent's energy.
    relative_force
        Largest difference of a force component as a fraction of the solvent's largest one.
    n_frames
        Frames compared.
    """

    energy: float
    relative_energy: float
    relative_force: float
    n_frames: int

    @property
    def holds(self) -> bool:
        """Whether both differences are rounding, and finite."""
        return self.relative_energy <= TOLERANCE and self.relative_force <= TOLERANCE


def why_not_obc2(force: openmm.CustomGBForce) -> str | None:
    """None if the force is OBC2 without salt and cutoff, expression by expression; otherwise what differs."""
    try:
        _read(force)
    except _Different as difference:
        return str(difference)
    return None


def equal_gbsa_force(force: openmm.CustomGBForce) -> openmm.GBSAOBCForce:
    """The GBSAOBCForce whose energy is that of a CustomGBForce with OBC2's expressions.

    They differ only where one atom lies inside another's scaled sphere (a hydrogen within 0.053 nm of a sulphur),
    where the built-in force has one more term.

    Parameters
    ----------
    force
        The force that ``implicit/obc2.xml`` or `openmm.app.internal.customgbforces.GBSAOBC2Force` makes.

    Raises
    ------
    InputError
        An expression, constant, parameter, cutoff or table that is not OBC2's.
    """
    try:
        solute, solvent, surface = _read(force)
    except _Different as difference:
        raise InputError(f"The CustomGBForce is not OBC2 without salt and cutoff: {difference}.") from None
    equal = openmm.GBSAOBCForce()
    equal.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    equal.setSoluteDielectric(solute)
    equal.setSolventDielectric(solvent)
    equal.setSurfaceAreaEnergy(SURFACE_COEFFICIENT / (4.0 * math.pi) if surface else 0.0)
    equal.setForceGroup(force.getForceGroup())
    equal.setName(force.getName())
    scale = math.sqrt(COULOMB_OF_EXPRESSION / COULOMB_OF_OPENMM)
    for i in range(force.getNumParticles()):
        charge, offset_radius, scaled_radius = force.getParticleParameters(i)
        equal.addParticle(charge * scale, offset_radius + OFFSET, scaled_radius / offset_radius)
    return equal


def with_equal_solvent(system: openmm.System) -> openmm.System | None:
    """A copy of the System whose OBC2 CustomGBForces are GBSAOBCForces; None if it has none.

    Nothing is said about a force that is left alone: ask `why_not_obc2`.
    """
    found = [
        index
        for index, force in enumerate(system.getForces())
        if isinstance(force, openmm.CustomGBForce) and why_not_obc2(force) is None
    ]
    if not found:
        return None
    twin = copy.deepcopy(system)
    for index in reversed(found):
        twin.removeForce(index)
        twin.addForce(equal_gbsa_force(system.getForce(index)))
    return twin


def agreement(system: openmm.System, twin: openmm.System, positions: Any) -> Agreement:
    """Compare energies and forces of a System and of its copy by `with_equal_solvent`, in double precision.

    Parameters
    ----------
    system, twin
        With the CustomGBForce, and with the force that took its place.
    positions
        [F, N, 3] nm.

    Raises
    ------
    EnergyError
        Energies that are not finite.
    """
    frames: NDArray[np.float64] = np.asarray(positions, dtype=np.float64)
    contexts = [make_context(system), make_context(twin)]
    if not all(isinstance(force, openmm.GBSAOBCForce) for force in twin.getForces()):
        contexts.append(make_context(_solvent_alone(twin)))
    energy = relative_energy = relative_force = 0.0
    for frame in frames:
        values = []
        for context in contexts:
            context.setPositions(frame)
            state = context.getState(energy=True, forces=True)
            values.append((state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value))
        if not all(math.isfinite(e) and np.isfinite(f).all() for e, f in values):
            raise EnergyError("The System has no finite energy on the frames that its implicit solvent is compared on.")
        (e0, f0), (e1, f1), (e, f) = values[0], values[1], values[-1]
        energy = max(energy, abs(e0 - e1))
        relative_energy = max(relative_energy, abs(e0 - e1) / max(abs(e), 1e-30))
        relative_force = max(relative_force, np.abs(f0 - f1).max() / max(np.abs(f).max(), 1e-30))
    return Agreement(float(energy), float(relative_energy), float(relative_force), len(frames))


@dataclass(frozen=True)
class EqualSolvent:
    """A System whose OBC2 CustomGBForces are GBSAOBCForces, and how well the two forms were found to agree."""

    system: openmm.System
    agreement: Agreement

    def __str__(self) -> str:
        found = self.agreement
        return (
            "The CustomGBForce of OBC2 has an equal, faster form, GBSAOBCForce: on "
            f"{_frames(found.n_frames)} energies agree to {found.relative_energy:.0e} and forces to "
            f"{found.relative_force:.0e} of the solvent's own."
        )


def find_equal_solvent(system: openmm.System, positions: Any) -> EqualSolvent | None:
    """The System with its faster solvent, verified on frames in double precision; one sentence is logged.

    Only the solvent's own energies and forces are compared, for nothing else differs.

    Parameters
    ----------
    system
        Any System; it stays as it is.
    positions
        [F, N, 3] nm.

    Returns
    -------
    EqualSolvent or None
        None if the System has no such force, or if the two forms differ on the frames.
    """
    custom = [force for force in system.getForces() if isinstance(force, openmm.CustomGBForce)]
    if not custom:
        return None
    found = [force for force in custom if why_not_obc2(force) is None]
    if not found:
        logger.info("The CustomGBForce is evaluated as it is: %s.", why_not_obc2(custom[0]))
        return None
    alone = openmm.System()
    for _ in range(system.getNumParticles()):
        alone.addParticle(1.0)
    for force in found:
        alone.addForce(copy.deepcopy(force))
    twin = with_equal_solvent(alone)
    assert twin is not None
    try:
        compared = agreement(alone, twin, positions)
        whole = with_equal_solvent(system) if compared.holds else None
    except Exception as error:  # frames without a finite energy, or a System that cannot be copied
        logger.info("The CustomGBForce is evaluated as it is: %s", error)
        return None
    if whole is None:
        logger.warning(
            "The CustomGBForce is evaluated as it is, though its expressions are OBC2's: the built-in force differs "
            "from it by %.2g kJ/mol on %s.",
            compared.energy,
            _frames(compared.n_frames),
        )
        return None
    equal = EqualSolvent(whole, compared)
    logger.info("%s", equal)
    return equal


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _solvent_alone(system: openmm.System) -> openmm.System:
    alone = copy.deepcopy(system)
    for index in reversed(range(alone.getNumForces())):
        if not isinstance(alone.getForce(index), openmm.GBSAOBCForce):
            alone.removeForce(index)
    return alone


def _read(force: openmm.CustomGBForce) -> tuple[float, float, bool]:
    """Both dielectric constants, and whether there is a surface term; `_Different` for every other model."""
    if force.getNonbondedMethod() != openmm.CustomGBForce.NoCutoff:
        raise _Different("it has a cutoff")
    if force.getNumGlobalParameters() or force.getNumEnergyParameterDerivatives():
        raise _Different("it has global parameters, which a GBSAOBCForce cannot follow")
    if force.getNumTabulatedFunctions():
        raise _Different("it has tabulated functions")
    names = [force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())]
    if names != ["charge", "or", "sr"]:
        raise _Different(f"its parameters are {', '.join(names)}")
    values = [force.getComputedValueParameters(i) for i in range(force.getNumComputedValues())]
    if [(name, kind) for name, _, kind in values] != [("I", _PAIR), ("B", _SINGLE)]:
        raise _Different("it computes other values than Born integrals and radii")
    _same(values[0][1], _BORN_INTEGRAL, "Born integral")
    constants = [_same(values[1][1], _BORN_RADIUS, "Born radius")]
    terms = [force.getEnergyTermParameters(i) for i in range(force.getNumEnergyTerms())]
    if [kind for _, kind in terms] not in ([_SINGLE, _PAIR], [_SINGLE, _SINGLE, _PAIR]):
        raise _Different("it has other energy terms")
    charge = [_same(terms[0][0], _SELF, "self energy"), _same(terms[-1][0], _PAIRS, "pair energy")]
    surface = len(terms) == 3
    if surface:
        constants.append(_same(terms[1][0], _SURFACE, "surface term"))
    for found in constants:
        if not abs(found.get("offset", math.nan) - OFFSET) <= 1e-12:  # the XML writes 0.008999999999999999
            raise _Different(f"its dielectric offset is not {OFFSET} nm")
    dielectric = [(c.get("soluteDielectric", math.nan), c.get("solventDielectric", math.nan)) for c in charge]
    if not all(map(math.isfinite, (*dielectric[0], *dielectric[1]))):
        raise _Different("it does not define both dielectric constants")
    if dielectric[0] != dielectric[1]:
        raise _Different("its self and pair energies have different dielectric constants")
    for i in range(force.getNumParticles()):
        if force.getParticleParameters(i)[1] <= 0.0:
            raise _Different(f"the radius of particle {i} is not above {OFFSET} nm")
    return (*dielectric[0], surface)


def _same(expression: str, wanted: tuple[str, dict[str, str]], name: str) -> dict[str, float]:
    """Constants that the expression defines, if all else is as wanted.

    Definitions that no formula uses are constants too (obc2.xml writes ``kappa=0`` behind formulas without κ).
    """
    main, *definitions = re.sub(r"\s", "", expression).split(";")
    formula, symbols = wanted
    if main != formula:
        raise _Different(f"its {name} is {main}")
    constants: dict[str, float] = {}
    missing = dict(symbols)
    for definition in filter(None, definitions):
        symbol, _, value = definition.partition("=")
        if symbol in constants or (symbol in symbols and symbol not in missing):
            raise _Different(f"its {name} defines {symbol} twice")
        if symbol in symbols:
            if value != missing.pop(symbol):
                raise _Different(f"its {name} has {definition}")
            continue
        try:
            constants[symbol] = float(value)
        except ValueError:
            raise _Different(f"its {name} has {definition}") from None
        if symbol in ("charge", "charge1", "charge2", "or", "or1", "sr2", "r", "B", "B1", "B2", "I"):
            raise _Different(f"its {name} redefines {symbol}")
    if missing:
        raise _Different(f"its {name} does not define {', '.join(missing)}")
    return constants
