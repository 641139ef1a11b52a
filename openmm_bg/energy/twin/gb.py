"""CustomGBForce and GBSAOBCForce without cutoff.

A value of each particle is summed over its pairs (the Born integral), others follow from it (the Born radius), and
energy terms depend on those. Gradients go the same way back: derivatives of the energy by the values that its terms
use, from them by the sum over pairs, and from that by the distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..implicit_solvent import COULOMB_OF_OPENMM, OFFSET
from .algebra import ZERO, Node, symbol
from .formula import Formula, Globals, Reader, Values, as_float64, plain
from .nonbonded import excluded, oriented
from .pairs import COLUMN, ROW, PairFormula, both_sides
from .program import distance_factor, swap

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

_GB = openmm.CustomGBForce

#: Probe radius of the surface term, nm.
PROBE = 0.14


def as_custom(force: openmm.GBSAOBCForce) -> openmm.CustomGBForce:
    """The CustomGBForce with the energy of a GBSAOBCForce.

    OBC2 of Onufriev, Bashford and Case (Proteins 55, 383, 2004), with the term for a particle inside another's
    scaled sphere that the built-in force has and the custom forces of OpenMM's force fields have not.
    """
    custom = openmm.CustomGBForce()
    for name in ("charge", "or", "sr"):
        custom.addPerParticleParameter(name)
    custom.addComputedValue(
        "I",
        "select(step(r+sr2-or1), 0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/U^2-1/L^2)+0.5*log(L/U)/r+C), 0);"
        "C=select(step(sr2-r-or1), 2*(1/or1-1/L), 0); U=r+sr2; L=max(or1, abs(r-sr2))",
        _GB.ParticlePairNoExclusions,
    )
    radius = f"radius=or+{OFFSET!r}"
    custom.addComputedValue(
        "B", f"1/(1/or-tanh(psi-0.8*psi^2+4.85*psi^3)/radius); psi=I*or; {radius}", _GB.SingleParticle
    )
    scale = COULOMB_OF_OPENMM * (1.0 / force.getSoluteDielectric() - 1.0 / force.getSolventDielectric())
    surface = 4.0 * math.pi * plain(force.getSurfaceAreaEnergy())
    custom.addEnergyTerm(
        f"{surface!r}*(radius+{PROBE!r})^2*(radius/B)^6-0.5*{scale!r}*charge^2/B; {radius}", _GB.SingleParticle
    )
    custom.addEnergyTerm(
        f"-{scale!r}*charge1*charge2/sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))", _GB.ParticlePairNoExclusions
    )
    for i in range(force.getNumParticles()):
        charge, radius_i, factor = map(plain, force.getParticleParameters(i))
        custom.addParticle([charge, radius_i - OFFSET, factor * (radius_i - OFFSET)])
    return custom


class GeneralisedBorn:
    """One CustomGBForce.

    Attributes
    ----------
    value
        Name of the field that is summed over pairs.
    fields
        Names of the fields that energies of pairs depend on.
    sums
        The sum over pairs: outputs and parameters for a pass (names ``value + "1"`` and ``value + "2"``).
    slopes
        What the derivatives by the sums, as a field named `adjoint`, make of the distances: the ``factor`` of a pass.
    pairs
        Energies of pairs.
    depends_on_place
        Whether positions themselves enter, and not only distances.
    """

    def __init__(self, force: openmm.CustomGBForce, prefix: str) -> None:
        reader = Reader(force, prefix)
        n_atoms = force.getNumParticles()
        names = [force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())]
        rows = as_float64([force.getParticleParameters(i) for i in range(n_atoms)]).reshape(n_atoms, len(names))
        self._parameters = {prefix + name: value for name, value in zip(names, rows.T, strict=True)}
        self._tables = reader.tables
        self._sided = {name + side: value for name, value in self._parameters.items() for side in "12"}
        exclusions = [tuple(force.getExclusionParticles(i)) for i in range(force.getNumExclusions())]
        counts = {_GB.ParticlePair: excluded(n_atoms, exclusions), _GB.ParticlePairNoExclusions: excluded(n_atoms, [])}

        computed = [force.getComputedValueParameters(i) for i in range(force.getNumComputedValues())]
        known = [name for name, _, _ in computed]
        self.value = prefix + known[0]
        self.adjoint = self.value + ":adjoint"
        everything = [prefix + name for name in (*names, *known)]

        def of_pairs(text: str, available: list[str]) -> Node:
            return reader.read(text, [name + side for name in available for side in "12"], ("r",))

        # Every later value as a formula of the first one, positions and parameters.
        values: dict[str, Node] = {}
        for i, (name, text, _) in enumerate(computed[1:], start=1):
            node = reader.read(text, [*names, *known[:i]], "xyz")
            values[prefix + name] = node.substitute(values)
        energy, pair_energies = ZERO, []
        for i in range(force.getNumEnergyTerms()):
            text, kind = force.getEnergyTermParameters(i)
            if kind == _GB.SingleParticle:
                energy = energy + reader.read(text, [*names, *known], "xyz").substitute(values)
            else:
                pair_energies.append(
                    oriented(of_pairs(text, [*names, *known]), everything, counts[kind], f"{prefix}{i}:")
                )

        axes = {name + "1": ROW for name in self._parameters} | {name + "2": COLUMN for name in self._parameters}
        self.pairs = [
            PairFormula(part.node, part.axes | axes, self._with(part), self._tables) for part in pair_energies
        ]
        used = frozenset().union(*(part.node.symbols for part in pair_energies))
        self.fields = [f for f in (self.value, *values) if {f + "1", f + "2"} & used]

        part = oriented(of_pairs(computed[0][1], names), everything, counts[computed[0][2]], f"{prefix}value:")
        forth, back = part.node, swap(part.node, both_sides(everything))
        self.sums = {self.value + "1": forth, self.value + "2": back}
        self.slopes = symbol(self.adjoint + "1") * distance_factor(forth) + symbol(
            self.adjoint + "2"
        ) * distance_factor(back)
        self.part = PairFormula(forth, part.axes | axes, self._with(part), self._tables)

        # Values and energies of single particles, and their derivatives by the sum and by positions.
        outputs = {f: values[f] for f in self.fields if f != self.value} | {"energy": energy}
        self._plain = self._formula(outputs)
        self._by = [s for s in (self.value, "x", "y", "z") if any(s in node.symbols for node in outputs.values())]
        slopes = {f"{s}|{f}": node.derivative(s) for f, node in outputs.items() for s in self._by}
        self._zero = {name for name, node in slopes.items() if node == ZERO}
        self._both = self._formula(outputs | {name: node for name, node in slopes.items() if node != ZERO})
        self._outputs = list(outputs)
        self.depends_on_place = bool(set(self._by) & set("xyz"))

    def _with(self, part: PairFormula) -> Values:
        sided = self._sided
        return lambda given: part.values(given) | sided

    def _formula(self, outputs: Mapping[str, Node]) -> Formula:
        column = {name: value[:, None] for name, value in self._parameters.items()}
        return Formula(outputs, dict.fromkeys((self.value, "x", "y", "z"), ROW), lambda _: column, self._tables)

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None:
        """Evaluate what depends on parameters."""
        self._plain.prepare(parameters, dtype, device)
        self._both.prepare(parameters, dtype, device)

    def single(self, x: Tensor, value: Tensor, slopes: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Energies of single particles, fields, and the derivatives of both.

        Parameters
        ----------
        x, value
            Positions [3, N, B] and the sum over pairs [N, B].
        slopes
            Whether derivatives are wanted.

        Returns
        -------
        tuple
            Energy [B] float64, `fields` [N, B] by name, and derivatives [N, B] for `pull`.
        """
        formula = self._both if slopes else self._plain
        found = formula(**{self.value: value, "x": x[0], "y": x[1], "z": x[2]})
        found = {name: tensor.expand(value.shape) for name, tensor in found.items()}
        energy = found.pop("energy").sum(0, dtype=torch.float64)
        fields = {name: value if name == self.value else found[name] for name in self.fields}
        return energy, fields, found

    def pull(self, adjoints: Mapping[str, Tensor], slopes: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """Derivative of the energy by the sum over pairs [N, B], from those by the fields.

        What the fields and energies of single particles owe to positions themselves is added to ``gradient``.
        """
        some = next(iter(slopes.values()), None)
        total = adjoints[self.value].clone() if self.value in self.fields else torch.zeros_like(gradient[0])
        if some is None:
            return total
        for name in self._outputs:
            weight = adjoints[name] if name != "energy" else None
            for by in self._by:
                label = f"{by}|{name}"
                if label in self._zero:
                    continue
                slope = slopes[label] if weight is None else slopes[label] * weight
                if by == self.value:
                    total += slope
                else:
                    gradient["xyz".index(by)] += slope
        return total
