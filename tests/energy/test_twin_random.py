"""Formulas made at random, in a twin and in OpenMM: what no list of cases has thought of."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_bg.energy.twin import SystemTwin, algebra
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

UNARY = [
    "sqrt({})", "exp({})", "log({})", "sin({})", "cos({})", "sec({})", "tan({})", "atan({})", "sinh({})", "cosh({})",
    "tanh({})", "erf({})", "erfc({})", "step({})", "delta({})", "square({})", "cube({})", "recip({})", "abs({})",
    "floor({})", "ceil({})", "-({})", "({})^2", "({})^-1", "({})^0.5", "({})^3", "asin(0.3*sin({}))",
    "acos(0.3*cos({}))",
]  # fmt: skip
BINARY = [
    "({})+({})", "({})-({})", "({})*({})", "({})/({})", "min({},{})", "max({},{})", "atan2({},{})", "abs({})^({})",
    "{}*{}", "{}-{}", "{}/{}",
]  # fmt: skip
#: Constants are positive: OpenMM waits for ever where those of a formula make what is no number, as 0/0 does.
CONSTANTS = [0.5, 1.0, 1.7, 2.0, 3.0, 10.0]
N = 4


def formula(rng: np.random.Generator, depth: int, names: list[str]) -> str:
    if depth == 0 or rng.random() < 0.12:
        return str(rng.choice(names)) if rng.random() < 0.8 else str(rng.choice(CONSTANTS))
    parts = [formula(rng, depth - 1, names) for _ in range(3)]
    kind = rng.random()
    if kind < 0.4:
        return str(rng.choice(UNARY)).format(parts[0])
    return str(rng.choice(BINARY)).format(*parts[:2]) if kind < 0.9 else f"select({','.join(parts)})"


def nonbonded(rng: np.random.Generator) -> openmm.CustomNonbondedForce:
    names = ["r", "r", "q1", "q2", "s1", "s2", "g"]
    text = formula(rng, 4, names)
    if rng.random() < 0.3:  # a definition hides the global parameter
        text += f"; g={formula(rng, 2, ['r', 'q1', 's2'])}"
    force = openmm.CustomNonbondedForce(text)
    force.addExclusion(0, 3)
    return force


def solvent(rng: np.random.Generator) -> openmm.CustomGBForce:
    force = openmm.CustomGBForce()
    force.addComputedValue("I", formula(rng, 3, ["r", "r", "q1", "q2", "s1", "s2"]), force.ParticlePair)
    force.addComputedValue("B", formula(rng, 3, ["I", "q", "s", "x", "y"]), force.SingleParticle)
    force.addComputedValue("C", formula(rng, 2, ["I", "B", "z"]), force.SingleParticle)
    force.addEnergyTerm(formula(rng, 2, ["I", "B", "C", "q", "x"]), force.SingleParticle)
    force.addEnergyTerm(formula(rng, 3, ["r", "I1", "B2", "C1", "C2", "q1", "B1"]), force.ParticlePair)
    force.addExclusion(0, 1)
    return force


def tried(make, seed: int, count: int) -> int:
    """Of so many Systems, those that have finite energies: with a twin, each."""
    rng, found = np.random.default_rng(seed), 0
    for _ in range(count):
        force, system = make(rng), openmm.System()
        for name in "qs":
            force.addPerParticleParameter(name)
        force.addGlobalParameter("g", 0.7)
        for _ in range(N):
            system.addParticle(1.0), force.addParticle(list(rng.uniform(0.2, 1.5, size=2)))
        frames = rng.normal(scale=0.5, size=(3, N, 3))
        system.addForce(force)
        try:
            twin = SystemTwin(system, frames)
        except InputError as error:
            assert "no finite energy" in str(error)
            continue
        found += 1
        assert twin.deviation.relative_energy < 1e-8 and twin.deviation.relative_force < 1e-7
    return found


@pytest.mark.parametrize("make, seed, least", [(nonbonded, 4, 45), (solvent, 3, 18)])
def test_random_formulas_are_openmms(make, seed, least):
    assert tried(make, seed, 60 if make is nonbonded else 40) >= least


def test_a_wrong_rule_is_found(monkeypatch):
    plain = algebra._slope

    def wrong(name, x, node):
        return plain(name, x, node) * (1.1 if name == "atan" else 1.0)

    monkeypatch.setattr(algebra, "_slope", wrong)
    with pytest.raises((EnergyError, AssertionError)):  # by its own tolerance or by ours
        tried(nonbonded, 4, 60)
