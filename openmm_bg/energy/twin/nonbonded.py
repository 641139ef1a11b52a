"""NonbondedForce and CustomNonbondedForce without cutoff, as formulas of pairs."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ..implicit_solvent import COULOMB_OF_OPENMM
from .algebra import ZERO, Node, select, symbol
from .formula import Formula, Globals, Reader, Values, as_float64, plain
from .pairs import COLUMN, PAIR, ROW, PairFormula, both_sides, upper
from .program import swap
from .terms import ExpressionTerm

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)


def lennard_jones_coulomb(prefix: str) -> Node:
    """Energy of a pair from ``qq``, ``c6`` and ``c12``: qq/r + c12/r^12 - c6/r^6."""
    r = symbol("r")
    return symbol(prefix + "qq") / r + symbol(prefix + "c12") / r**12 - symbol(prefix + "c6") / r**6


class _NonbondedParameters:
    """Parameters of a NonbondedForce, offsets included, for any global parameters."""

    def __init__(self, force: openmm.NonbondedForce) -> None:
        particles = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        exceptions = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
        self.particles = np.array([[plain(v) for v in p] for p in particles]).reshape(-1, 3)
        self.exceptions = np.array([[plain(v) for v in p[2:]] for p in exceptions]).reshape(-1, 3)
        self.pairs = np.array([p[:2] for p in exceptions], dtype=np.int64).reshape(-1, 2)
        self.particle_offsets = [
            force.getParticleParameterOffset(i) for i in range(force.getNumParticleParameterOffsets())
        ]
        self.exception_offsets = [
            force.getExceptionParameterOffset(i) for i in range(force.getNumExceptionParameterOffsets())
        ]
        moved = {offset[1] for offset in self.exception_offsets}
        named = {int(i) for i in self.pairs.flat} | {offset[1] for offset in self.particle_offsets}
        if max(named, default=-1) >= len(self.particles) or max(moved, default=-1) >= len(self.exceptions):
            raise IndexError("An exception or an offset is of a particle or an exception that there is not.")
        # Most exceptions are plain exclusions.
        self.kept = [i for i, (qq, _, epsilon) in enumerate(self.exceptions) if qq != 0 or epsilon != 0 or i in moved]

    @staticmethod
    def _shifted(
        base: np.ndarray, offsets: list[tuple[str, int, float, float, float]], parameters: Globals
    ) -> np.ndarray:
        found = base.copy()
        for name, index, *scales in offsets:
            found[index] += parameters[name] * np.array(scales, dtype=np.float64)
        return found

    def of_pairs(self, parameters: Globals, prefix: str) -> dict[str, Tensor]:
        """Tables [N, N], zero where there is an exception and outside the upper triangle."""
        q, sigma, epsilon = self._shifted(self.particles, self.particle_offsets, parameters).T
        with np.errstate(invalid="ignore"):  # an offset may make it negative, whose energy is none in OpenMM either
            root = np.sqrt(epsilon)
        tables = _coefficients(q[:, None] * q, 0.5 * (sigma[:, None] + sigma), root[:, None] * root, prefix)
        for name, value in tables.items():
            value[self.pairs[:, 0], self.pairs[:, 1]] = 0.0
            value[self.pairs[:, 1], self.pairs[:, 0]] = 0.0
            tables[name] = upper(value)
        return tables

    def of_exceptions(self, parameters: Globals, prefix: str) -> dict[str, Tensor]:
        """The exceptions that are not mere exclusions, each [rows, 1]."""
        shifted = self._shifted(self.exceptions, self.exception_offsets, parameters)[self.kept]
        charges, sigma, epsilon = (column[:, None] for column in shifted.T)
        return _coefficients(charges, sigma, epsilon, prefix)


def _coefficients(charges: np.ndarray, sigma: np.ndarray, epsilon: np.ndarray, prefix: str) -> dict[str, Tensor]:
    sixth = sigma**6
    return {
        prefix + "qq": as_float64(COULOMB_OF_OPENMM * charges),
        prefix + "c6": as_float64(4.0 * epsilon * sixth),
        prefix + "c12": as_float64(4.0 * epsilon * sixth**2),
    }


def read_nonbonded(force: openmm.NonbondedForce, prefix: str) -> tuple[PairFormula, np.ndarray, ExpressionTerm]:
    """Pairs, atoms [rows, 2] of exceptions that interact, and the term of those."""
    given = _NonbondedParameters(force)
    names = [prefix + name for name in ("qq", "c6", "c12")]
    energy = lennard_jones_coulomb(prefix)
    pairs = PairFormula(energy, dict.fromkeys(names, PAIR), lambda p: given.of_pairs(p, prefix))
    term = ExpressionTerm(energy, "r", len(given.kept), lambda p: given.of_exceptions(p, prefix), {})
    return pairs, given.pairs[given.kept], term


def oriented(node: Node, names: list[str], counts: np.ndarray, prefix: str) -> PairFormula:
    """A pair's formula times how often each ordered pair counts.

    Parameters
    ----------
    node
        Formula in ``r`` and in ``name1``, ``name2`` for each of ``names``.
    counts
        [N, N]: how often the pair is to be counted with particle i as the first and j as the second.
    """
    tables: dict[str, Tensor] = {}
    mirrored = swap(node, both_sides(names))
    if mirrored == node:
        sides = [(node, np.triu(counts + counts.T, 1))]
    else:
        sides = [(node, np.triu(counts, 1)), (mirrored, np.triu(counts.T, 1))]
    energy = ZERO
    for k, (side, table) in enumerate(sides):
        if not table.any():
            continue
        name = f"{prefix}count{k}"
        tables[name] = as_float64(table)
        # Selected and not only multiplied: what does not count may be infinite.
        energy = energy + select(symbol(name), side if table.max() == 1 else symbol(name) * side, ZERO)
    axes = dict.fromkeys(tables, PAIR)
    return PairFormula(energy, axes, lambda _: tables)


def excluded(n_atoms: int, exclusions: list[tuple[int, int]]) -> np.ndarray:
    """[N, N]: 1 for i < j but for the pairs excluded."""
    counts = np.triu(np.ones((n_atoms, n_atoms)), 1)
    for i, j in exclusions:
        counts[min(i, j), max(i, j)] = 0.0
    return counts


def _counts(force: openmm.CustomNonbondedForce) -> np.ndarray:
    n_atoms = force.getNumParticles()
    exclusions = [tuple(force.getExclusionParticles(i)) for i in range(force.getNumExclusions())]
    if not force.getNumInteractionGroups():
        return excluded(n_atoms, exclusions)
    allowed = excluded(n_atoms, exclusions)
    allowed = allowed + allowed.T
    counts = np.zeros((n_atoms, n_atoms))
    for group in range(force.getNumInteractionGroups()):
        first, second = (set(members) for members in force.getInteractionGroupParameters(group))
        for i, j in itertools.product(first, second):
            # A pair both of whose particles are in both sets counts once.
            if allowed[i, j] and not (i > j and j in first and i in second):
                counts[i, j] += 1.0
    return counts


def read_custom_nonbonded(force: openmm.CustomNonbondedForce, prefix: str) -> PairFormula:
    """A CustomNonbondedForce's pairs."""
    reader = Reader(force, prefix)
    names = [force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())]
    parameters = as_float64([force.getParticleParameters(i) for i in range(force.getNumParticles())])
    parameters = parameters.reshape(force.getNumParticles(), len(names))
    computed: dict[str, Node] = {}
    for i in range(force.getNumComputedValues()):
        name, text = force.getComputedValueParameters(i)
        computed[name] = reader.read(text, names, ())
    everything = [*names, *computed]
    node = reader.read(force.getEnergyFunction(), [name + side for name in everything for side in "12"], ("r",))
    local = [prefix + name for name in everything]
    pairs = oriented(node, local, _counts(force), prefix)
    values = _computed_values(
        {prefix + n: v for n, v in zip(names, parameters.T, strict=True)}, computed, prefix, reader
    )
    tables = pairs.values

    def all_values(given: Globals) -> dict[str, Tensor]:
        own = values(given)
        return tables(given) | {name + side: value for name, value in own.items() for side in "12"}

    sides = {name + "1": ROW for name in local} | {name + "2": COLUMN for name in local}
    return PairFormula(pairs.node, pairs.axes | sides, all_values, reader.tables)


def _computed_values(parameters: dict[str, Tensor], computed: dict[str, Node], prefix: str, reader: Reader) -> Values:
    """Per-particle parameters, and what is computed from them alone."""
    formula = Formula({prefix + name: node for name, node in computed.items()}, {}, lambda _: parameters, reader.tables)

    def values(given: Globals) -> dict[str, Tensor]:
        formula.prepare(given, torch.float64, torch.device("cpu"))
        shape = next(iter(parameters.values())).shape if parameters else ()
        return parameters | {name: value.expand(shape) for name, value in formula().items()}

    return values
