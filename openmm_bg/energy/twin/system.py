"""Forces of an OpenMM System, sorted into what a twin evaluates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip

from ...errors import InputError
from ..snapshot import make_context
from .algebra import Node, function, symbol
from .formula import Reader, as_float64, plain
from .gb import GeneralisedBorn, as_custom
from .nonbonded import read_custom_nonbonded, read_nonbonded
from .pairs import PairFormula
from .terms import Angles, CmapTerm, Distances, ExpressionTerm, External, Listed, Torsions

#: Forces without energy.
SILENT = (openmm.CMMotionRemover, openmm.AndersenThermostat)


def unsupported(what: str) -> InputError:
    """The error of everything a twin does not know."""
    return InputError(f"A torch twin cannot be made of a System with {what}: use the Context pool.")


class Forces:
    """The terms of a System.

    Attributes
    ----------
    distances, angles, torsions, external
        Terms of listed atoms.
    pairs
        Energies of all pairs.
    solvents
        Generalised Born models.
    parameters
        Global parameters with their defaults.

    Raises
    ------
    InputError
        A force, method or particle that a twin does not know, or that OpenMM refuses.
    """

    def __init__(self, system: openmm.System) -> None:
        self.n_atoms: int = system.getNumParticles()
        self.distances, self.angles, self.torsions = Distances(), Angles(), Torsions()
        self.external: list[External] = []
        self.pairs: list[PairFormula] = []
        self.solvents: list[GeneralisedBorn] = []
        self.parameters: dict[str, float] = {}
        if any(system.isVirtualSite(i) for i in range(self.n_atoms)):
            raise unsupported("virtual sites")
        for index, force in enumerate(system.getForces()):
            if isinstance(force, SILENT):
                continue
            kind = type(force)
            if kind not in READERS:
                raise unsupported(f"a {kind.__name__}")
            if force.usesPeriodicBoundaryConditions():
                raise unsupported(f"periodic boundary conditions ({kind.__name__})")
            method = getattr(force, "getNonbondedMethod", lambda: 0)()
            if method != 0:  # NoCutoff, in every class that has methods
                raise unsupported(f"a cutoff ({kind.__name__})")
            if hasattr(force, "getNonbondedMethod") and force.getNumParticles() != self.n_atoms:
                counts = f"{force.getNumParticles()} particles, the System {self.n_atoms}"
                raise InputError(f"The {kind.__name__} has {counts}: make them equal.")
            for i in range(getattr(force, "getNumGlobalParameters", lambda: 0)()):
                self.parameters[force.getGlobalParameterName(i)] = force.getGlobalParameterDefaultValue(i)
            try:
                READERS[kind](self, force, f"{index}:")
            except (IndexError, RuntimeError, ValueError) as error:
                if not isinstance(error, InputError):
                    make_context(system)  # which says it better, if it is OpenMM that cannot hold such a force
                raise

    @property
    def translation_invariant(self) -> bool:
        """Whether no energy depends on where the molecule is."""
        return not self.external and not any(solvent.depends_on_place for solvent in self.solvents)

    def listed(self) -> list[Listed]:
        """Groups of terms of listed atoms that are not empty."""
        return [group for group in (self.distances, self.angles, self.torsions) if group.terms]


def _plain_terms(
    group: str, coordinate: str, names: tuple[str, ...], count: str, get: str, n_atoms: int, energy: Callable[..., Node]
) -> Callable[[Forces, Any, str], None]:
    """Reader of a force whose every term has ``n_atoms`` atoms and the parameters ``names``."""

    def read(forces: Forces, force: Any, prefix: str) -> None:
        rows = [getattr(force, get)(i) for i in range(getattr(force, count)())]
        if rows:
            columns = np.array([[plain(v) for v in row[n_atoms:]] for row in rows]).T
            values = {prefix + name: as_float64(c)[:, None] for name, c in zip(names, columns, strict=True)}
            node = energy(symbol(coordinate), *(symbol(prefix + name) for name in names))
            term = ExpressionTerm(node, coordinate, len(rows), lambda _: values, {})
            getattr(forces, group).add([row[:n_atoms] for row in rows], term)

    return read


def _custom_terms(group: str, coordinate: str, what: str, n_atoms: int) -> Callable[[Forces, Any, str], None]:
    """Reader of a CustomBondForce, CustomAngleForce or CustomTorsionForce."""

    def read(forces: Forces, force: Any, prefix: str) -> None:
        reader = Reader(force, prefix)
        count = getattr(force, f"getNumPer{what}Parameters")()
        names = [getattr(force, f"getPer{what}ParameterName")(i) for i in range(count)]
        energy = reader.read(force.getEnergyFunction(), names, (coordinate,))
        rows = [getattr(force, f"get{what}Parameters")(i) for i in range(getattr(force, f"getNum{what}s")())]
        if rows:
            columns = np.array([row[n_atoms] for row in rows]).reshape(len(rows), count).T
            values = {prefix + name: as_float64(c)[:, None] for name, c in zip(names, columns, strict=True)}
            term = ExpressionTerm(energy, coordinate, len(rows), lambda _: values, reader.tables)
            getattr(forces, group).add([row[:n_atoms] for row in rows], term)

    return read


def _rb(theta: Node, *c: Node) -> Node:
    cosine = -function("cos", theta)  # of the angle's complement, which OpenMM's definition uses
    energy = c[5]
    for coefficient in reversed(c[:5]):
        energy = energy * cosine + coefficient
    return energy


def _cmap(forces: Forces, force: openmm.CMAPTorsionForce, prefix: str) -> None:
    maps = []
    for i in range(force.getNumMaps()):
        size, energies = force.getMapParameters(i)
        # The first torsion runs fastest.
        maps.append(np.array([plain(e) for e in energies]).reshape(size, size).T)
    rows = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
    if rows:
        atoms = [row[1:5] for row in rows] + [row[5:9] for row in rows]
        forces.torsions.add(atoms, CmapTerm(maps, [row[0] for row in rows]))


def _nonbonded(forces: Forces, force: openmm.NonbondedForce, prefix: str) -> None:
    if not force.getIncludeDirectSpace():
        raise unsupported("a NonbondedForce without its direct space")
    pairs, atoms, term = read_nonbonded(force, prefix)
    forces.pairs.append(pairs)
    forces.distances.add(atoms, term)


def _custom_nonbonded(forces: Forces, force: openmm.CustomNonbondedForce, prefix: str) -> None:
    forces.pairs.append(read_custom_nonbonded(force, prefix))


def _custom_gb(forces: Forces, force: openmm.CustomGBForce, prefix: str) -> None:
    if not force.getNumComputedValues():  # OpenMM's Reference platform, which the twin is compared with, would crash
        raise unsupported("a CustomGBForce without computed values")
    of_pairs, *others = [force.getComputedValueParameters(i)[2] for i in range(force.getNumComputedValues())]
    single = openmm.CustomGBForce.SingleParticle
    if of_pairs == single or any(kind != single for kind in others):  # which no platform takes
        raise unsupported("a CustomGBForce whose computed values are not one of pairs, then others of single particles")
    solvent = GeneralisedBorn(force, prefix)
    forces.solvents.append(solvent)
    forces.pairs.extend(solvent.pairs)


def _gbsa(forces: Forces, force: openmm.GBSAOBCForce, prefix: str) -> None:
    _custom_gb(forces, as_custom(force), prefix)


def _external(forces: Forces, force: openmm.CustomExternalForce, prefix: str) -> None:
    reader = Reader(force, prefix)
    count = force.getNumPerParticleParameters()
    names = [force.getPerParticleParameterName(i) for i in range(count)]
    energy = reader.read(force.getEnergyFunction(), names, "xyz")
    rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
    if rows:
        columns = np.array([row[1] for row in rows]).reshape(len(rows), count).T
        values = {prefix + name: as_float64(c)[:, None] for name, c in zip(names, columns, strict=True)}
        forces.external.append(External([row[0] for row in rows], energy, lambda _: values, reader.tables))


READERS: dict[type, Callable[[Forces, Any, str], None]] = {
    openmm.HarmonicBondForce: _plain_terms(
        "distances", "r", ("r0", "k"), "getNumBonds", "getBondParameters", 2, lambda r, r0, k: 0.5 * k * (r - r0) ** 2
    ),
    openmm.HarmonicAngleForce: _plain_terms(
        "angles", "theta", ("theta0", "k"), "getNumAngles", "getAngleParameters", 3,
        lambda theta, theta0, k: 0.5 * k * (theta - theta0) ** 2,
    ),
    openmm.PeriodicTorsionForce: _plain_terms(
        "torsions", "theta", ("n", "phase", "k"), "getNumTorsions", "getTorsionParameters", 4,
        lambda theta, n, phase, k: k * (1.0 + function("cos", n * theta - phase)),
    ),
    openmm.RBTorsionForce: _plain_terms(
        "torsions", "theta", tuple(f"c{i}" for i in range(6)), "getNumTorsions", "getTorsionParameters", 4, _rb
    ),
    openmm.CMAPTorsionForce: _cmap,
    openmm.CustomBondForce: _custom_terms("distances", "r", "Bond", 2),
    openmm.CustomAngleForce: _custom_terms("angles", "theta", "Angle", 3),
    openmm.CustomTorsionForce: _custom_terms("torsions", "theta", "Torsion", 4),
    openmm.CustomExternalForce: _external,
    openmm.NonbondedForce: _nonbonded,
    openmm.CustomNonbondedForce: _custom_nonbonded,
    openmm.CustomGBForce: _custom_gb,
    openmm.GBSAOBCForce: _gbsa,
}  # fmt: skip
