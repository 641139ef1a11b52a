"""Expressions as OpenMM reads them: every function, precedence, names, definitions, and the algebra's derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openmm_bg.energy.twin import SystemTwin
from openmm_bg.energy.twin.algebra import ONE, ZERO, function, number, select, symbol
from openmm_bg.energy.twin.expressions import FUNCTIONS, parse
from openmm_bg.energy.twin.program import Program
from openmm_bg.errors import InputError

import openmm  # isort: skip

#: Points that lie on both sides of what the expressions branch at, and on it (y = 0).
POINTS = np.array([[0.3, -0.7, 1.2], [1.4, 0.0, 0.2], [-0.45, 0.9, 0.55], [2.2, -1.3, 0.75]])[:, None]


def evaluate(text: str, x: float, y: float, z: float) -> float:
    node = parse(text)
    program = Program({"f": node}, dict.fromkeys("xyz", 1))
    given = {name: torch.tensor([v], dtype=torch.float64) for name, v in zip("xyz", (x, y, z), strict=True)}
    return float(program(given, program.evaluate_statics({}, {}), {})["f"].reshape(-1)[0])


def external(text: str, **parameters: float) -> openmm.System:
    """One particle whose energy is the expression."""
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce(text)
    for name in parameters:
        force.addPerParticleParameter(name)
    force.addParticle(0, list(parameters.values()))
    system.addForce(force)
    return system


#: One expression for each function, inside its domain at every point.
WITH_FUNCTIONS = {
    "sqrt": "sqrt(x^2+0.3)*y",
    "exp": "exp(x*y)",
    "log": "log(x^2+y^2+z)",
    "sin": "sin(3*x+y)",
    "cos": "cos(x*z)",
    "sec": "sec(0.3*x)",
    "csc": "csc(z)*x",
    "tan": "tan(0.5*x)*z",
    "cot": "cot(z)+x*y",
    "asin": "asin(0.4*x)",
    "acos": "acos(0.4*x*z)",
    "atan": "atan(x*y+z)",
    "atan2": "atan2(y-0.1,x)+atan2(1,z)+atan2(z,2)",
    "sinh": "sinh(x)",
    "cosh": "cosh(x-y)",
    "tanh": "tanh(x*z)",
    "erf": "erf(x)",
    "erfc": "erfc(x*y)",
    "step": "step(y)*x^2+step(-y)*z",
    "delta": "x*z+delta(y)*5",
    "square": "square(x-y)*z",
    "cube": "cube(x+z)",
    "recip": "recip(z)*y",
    "min": "min(x,z)*y+min(x,0.5)+min(-0.1,y)",
    "max": "max(x*y,z)+max(0.4,x)+max(y,z)",
    "abs": "abs(x)*z",
    "floor": "floor(3*x)*z",
    "ceil": "ceil(x*2)*y",
    "select": "select(y,x^2,z)+select(step(x-1),3,4)*z+select(delta(y),x,y)+select(floor(z),0.1,0.2)*x",
}

OTHERS = [
    "-x^2", "2^-x", "2^-x^2", "x*-y", "-x*y^2-z", "z^x^2", "z^(x^2)", "(z^x)^2", "x-y-z", "x/z/2", "x/(z*2)",
    "2*x^3/z^2",
    "1.5e-1*x+.5*y+2.*z+1E0*x", "x^0.5*0+z^1.5", "x^-3", "z^-0.5", "x^70*1e-30", "-(-x)", "x - - y", "x+-y", "z^2^0.5",
    "a*x+b; b=c*y; c=a+1; a=2", "a*x; a=y; a=3", "f; f=sqrt(z)*g; g=exp(-h); h=x^2;", "x; y1=2;",
    "  x\n + y ; ", "exp(1)*x+log(2)*y", "0*x+y", "x*y*z/x", "x/x^3", "(x+y)^2*(x+y)^-1*z", "3", "2*3+4^0.5",
    "(2*x-2*x)+z", "sqrt(4)*x^2",
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_is_openmms(name):
    twin = SystemTwin(external(WITH_FUNCTIONS[name]), POINTS)
    assert name + "(" in WITH_FUNCTIONS[name]
    assert twin.deviation.energy < 1e-12 and twin.deviation.force < 1e-11


@pytest.mark.parametrize("text", OTHERS)
def test_precedence_and_definitions_are_openmms(text):
    points = np.abs(POINTS) + 0.01 if "z^x" in text else POINTS
    twin = SystemTwin(external(text), points)
    assert twin.deviation.relative_energy < 1e-13 and twin.deviation.relative_force < 1e-12


def test_words_of_python_are_names():
    system = external("or*x^2+and*y+not-if*lambda+step*z+exp", **{"or": 0.5, "and": 2.0, "not": 3.0, "if": 0.2}, **{
        "lambda": 0.7, "step": 1.1, "exp": 0.1})  # fmt: skip
    assert SystemTwin(system, POINTS).deviation.energy < 1e-13


def test_a_definition_hides_a_parameter():
    twin = SystemTwin(external("k*x; k=3", k=100.0), POINTS)
    np.testing.assert_allclose(twin.energies(POINTS), 3 * POINTS[:, 0, 0])


@pytest.mark.parametrize(
    "text, value",
    [("-x^2", -4.0), ("2^-x", 0.25), ("2^-x^2", 2.0**-4), ("2^x^3", 2.0**8), ("-2*x+y", -1.0), ("x/y/2", 1 / 3),
     ("1-2-3", -4.0), ("select(x-2,1,5)", 5.0), ("step(0)", 1.0), ("delta(x-2)*7", 7.0), ("8/2^2*3", 6.0)],
)  # fmt: skip
def test_values_known_by_hand(text, value):
    assert evaluate(text, 2.0, 3.0, 0.5) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    "text, value",
    [("max(log(0),x)", 2.0), ("y*exp(log(0)+x)", 0.0), ("x+exp(-exp(1000))", 2.0), ("min(0^-0.5,y)", 3.0),
     ("x/(1/0)", 0.0), ("atan(exp(1000))*x", math.pi), ("select(x,y,log(0))", 3.0)],
)  # fmt: skip
def test_infinities_of_numbers_alone_are_numbers(text, value):
    """For which Python's functions raise, and OpenMM's do not."""
    assert evaluate(text, 2.0, 3.0, 0.5) == pytest.approx(value, abs=1e-15)
    twin = SystemTwin(external(text), POINTS[:1] + 1.0)
    assert twin.deviation.energy < 1e-12 and twin.deviation.force < 1e-11


WALLS = [
    "select(step(x),0.1,1/0)*y", "select(step(-x),1/0,0.1)*y", "select(x,0.3,-exp(1000))+y",
    "select(step(-x),log(0),0.3)", "select(x,y,1/0)", "min(x,1/0)+max(-1/0,y)", "1/(1/0+x)+y",
    "select(step(x),1/0,-1/0)",
]  # fmt: skip


@pytest.mark.parametrize("text", WALLS)
def test_walls_of_infinite_height(text):
    points = np.array([[0.3, 0.7, 1.2], [1.4, 0.1, 0.2]])[:, None]
    if "-1/0)" in text and "min" not in text:
        assert evaluate(text, 1.0, 1.0, 1.0) == math.inf == -evaluate(text, -1.0, 1.0, 1.0)
        return
    twin = SystemTwin(external(text), points)
    assert twin.deviation.energy < 1e-15 and twin.deviation.force < 1e-15
    assert (
        math.isfinite(evaluate(text, 1.0, 1.0, 1.0))
        and abs(evaluate("select(step(x),0.1,1/0)", -1.0, 1.0, 1.0)) == math.inf
    )


def test_what_is_no_number_is_read_all_the_same():
    """OpenMM itself waits for ever when it meets one."""
    for text in ("log(-1)+x", "(-8)^(1/3)*x", "x^(0/0)", "select(step(x),acos(2),x)"):
        assert math.isnan(evaluate(text, 2.0, 3.0, 0.5))
    assert evaluate("x^(1/0)", 2.0, 3.0, 0.5) == math.inf


@pytest.mark.parametrize(
    "text, reason",
    [("x+", "ends too early"), ("(x", "early|closed"), ("x)", "unexpected"), ("+x", "unexpected"),
     ("pow(x,2)", "no function pow"), ("sin(x,y)", "1 argument"), ("select(x,y)", "3 arguments"),
     ("sin()", "1 argument"), ("x;y", "defines nothing"), ("", "too early"), ("x $ y", "unexpected"),
     ("x;=3", "defines nothing"), ("3 x", "unexpected"), ("a,b", "unexpected")],
)  # fmt: skip
def test_what_openmm_refuses_is_refused(text, reason):
    with pytest.raises(InputError, match=reason):
        parse(text)


def test_distances_in_a_periodic_box_are_refused():
    with pytest.raises(InputError, match="periodic"):
        SystemTwin(external("periodicdistance(x,y,z,0.1,0.2,0.3)"), POINTS)


def test_an_unknown_name_is_refused():
    force = openmm.CustomExternalForce("x*missing")
    force.addParticle(0, [])
    system = external("x")
    system.addForce(force)
    with pytest.raises(InputError, match="missing"):
        SystemTwin(system, POINTS)


# ---------------------------------------------------------------- algebra


def test_equal_formulas_are_equal_nodes():
    x, y = symbol("x"), symbol("y")
    assert parse("a*b/f; f=sqrt(x+y)") == parse("b*a*(1/sqrt(y+x))")
    assert parse("x*2*y+y*x") == 3 * x * y
    assert x - x == ZERO and x / x == ONE and (x * y) ** 2 == y * x * x * y
    assert parse("r/r^3") == symbol("r") ** -2
    assert parse("x-y") != parse("y-x")
    assert function("exp", number(0.0)) == ONE
    assert select(ONE, x, y) == x and select(ZERO, x, y) == y


@pytest.mark.parametrize("text", [*WITH_FUNCTIONS.values(), "z^(x*0.3+1)", "x^5/y^2+z", "(x*y+z)^-3"])
@pytest.mark.parametrize("name", "xyz")
def test_derivatives_by_differences(text, name):
    point = {"x": 0.37, "y": -0.61, "z": 0.83}
    h = 1e-5
    up, down = ({**point, name: point[name] + s * h} for s in (1, -1))
    slope = (evaluate(text, **up) - evaluate(text, **down)) / (2 * h)
    node = parse(text).derivative(name)
    program = Program({"f": node}, dict.fromkeys("xyz", 1))
    given = {n: torch.tensor([v], dtype=torch.float64) for n, v in point.items()}
    found = float(program(given, program.evaluate_statics({}, {}), {})["f"].reshape(-1)[0])
    assert found == pytest.approx(slope, rel=1e-7, abs=1e-8)


def test_a_wrong_derivative_would_be_noticed():
    with pytest.raises(AssertionError):
        node = parse("sin(x)")  # in place of cos(x)
        program = Program({"f": node}, {"x": 1})
        found = float(program({"x": torch.tensor([0.37], dtype=torch.float64)}, [], {})["f"])
        assert found == pytest.approx(math.cos(0.37), rel=1e-7)


def test_shared_parts_are_computed_once_and_constants_before():
    energy = parse("k1*k2*exp(-r^2/(s1*s2))/r")
    program = Program(
        {"e": energy, "f": energy.derivative("r") / symbol("r")}, {"r": 4}, {"k1": 1, "k2": 2, "s1": 1, "s2": 2}
    )
    assert program.source.count("torch.exp(") == 1
    assert program.source.count("torch.sqrt(") + program.source.count("torch.rsqrt(") == 1
    assert all("r" not in node.symbols for node in program.statics)
    assert len(program.statics) <= 4
