"""Tabulated functions in a twin against OpenMM's Reference platform: on knots, at edges, outside, and in periods."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_bg.energy.twin import SystemTwin, kernels, tables
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

RANGES = ((-0.5, 1.0), (2.0, 2.6), (-3.0, -1.0))
SIZES = (4, 5, 3)


def function(n: int, periodic: bool, sizes: tuple[int, ...] = SIZES) -> openmm.TabulatedFunction:
    """A continuous function of n variables with random values."""
    sizes = sizes[:n]
    values = np.random.default_rng(n).normal(size=[m - periodic for m in reversed(sizes)])
    if periodic:
        values = np.pad(values, (0, 1), mode="wrap")
    limits = [limit for bounds in RANGES[:n] for limit in bounds]
    kind = (openmm.Continuous1DFunction, openmm.Continuous2DFunction, openmm.Continuous3DFunction)[n - 1]
    return kind(*(sizes if n > 1 else ()), values.ravel(), *limits, periodic)


def places(n: int) -> np.ndarray:
    """Points [k, n]: all knots and edges, points between them, and just and far outside."""
    axes = []
    for (low, high), size in zip(RANGES[:n], SIZES, strict=False):
        width = high - low
        axes.append([*np.linspace(low, high, size), low - 1e-9, high + 1e-9, low - 1.3 * width, high + 2.45 * width])
    edges = np.array(list(itertools.product(*axes)))
    low, high = np.array(RANGES[:n]).T
    inner = np.random.default_rng(5).uniform(low, high, size=(40, n))
    return np.concatenate((edges, inner, inner + 3.0 * (high - low)))


def singles(
    n: int, made: openmm.TabulatedFunction, energy: str, points: np.ndarray | None = None
) -> tuple[openmm.System, np.ndarray]:
    """A particle for each point, whose parameters p0, p1, p2 are the point; X, y, z are zero where it is."""
    force, system, points = openmm.CustomGBForce(), openmm.System(), places(n) if points is None else points
    for name in ("o", *(f"p{k}" for k in range(n))):
        force.addPerParticleParameter(name)
    force.addTabulatedFunction("f", made)
    force.addComputedValue("I", "0", force.ParticlePair)
    force.addEnergyTerm(f"{energy}; X=x-o", force.SingleParticle)
    for i, point in enumerate(points):
        system.addParticle(1.0), force.addParticle([i, *point])
    system.addForce(force)
    frames = np.zeros((1, len(points), 3))
    frames[0, :, 0] = np.arange(len(points))
    return system, frames


def value(n: int) -> str:
    """An energy whose force is the function itself, along x."""
    return f"-f({','.join(f'p{k}' for k in range(n))})*X"


def slope(n: int) -> str:
    """An energy whose forces are the function's slopes."""
    return f"f({','.join(f'p{k}+{x}' for k, x in enumerate('Xyz'[:n]))})"


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_values_and_slopes_everywhere(n, periodic):
    outside = np.any([(x < low) | (x > high) for x, (low, high) in zip(places(n).T, RANGES, strict=False)], axis=0)
    assert 20 < outside.sum() < len(outside) - 30
    for energy in (value(n), slope(n)):
        system, frames = singles(n, function(n, periodic), energy)
        twin = SystemTwin(system, frames)
        assert twin.deviation.force < 1e-11 and twin.deviation.energy < 1e-9
        forces = twin.energies_and_forces(frames)[1][0]
        used = 1 if energy == value(n) else n
        assert np.all(np.ptp(forces[~outside], axis=0)[:used] > 0.5)
        assert np.any(forces[outside] != 0.0) == periodic


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 3, 6), (7, 2, 3)])
def test_few_knots(sizes):
    made = function(3, False, sizes)
    assert SystemTwin(*singles(3, made, slope(3))).deviation.force < 1e-11


@pytest.mark.parametrize("n", [1, 2, 3])
def test_discrete_functions_go_on_beyond_their_ends(n):
    """Each argument for itself, on both sides; and halfway between two whole numbers the upper one counts."""
    sizes = (3, 4, 5)[:n]
    values = np.random.default_rng(n).normal(size=sizes)
    kind = (openmm.Discrete1DFunction, openmm.Discrete2DFunction, openmm.Discrete3DFunction)[n - 1]
    made = kind(*(sizes if n > 1 else ()), values.ravel(order="F"))
    axes = [[-1e9, -0.7, -0.5, 0.5, 1.5, size - 0.4, 1e9] for size in sizes]
    points = np.array(list(itertools.product(*axes)))
    system, frames = singles(n, made, value(n), points)
    right = values[tuple(np.clip(np.floor(points + 0.5), 0, np.array(sizes) - 1).astype(int).T)]
    for dtype, digits in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        twin = SystemTwin(system, frames, dtype=dtype)
        assert twin.deviation_in_use.force < digits * 10.0
        np.testing.assert_allclose(twin.energies_and_forces(frames)[1][0, :, 0], right, rtol=digits)


def test_pairs_beyond_the_end_of_a_discrete_function():
    force, system = openmm.CustomNonbondedForce("f(10*r)"), openmm.System()
    force.addTabulatedFunction("f", openmm.Discrete1DFunction([5.0, 6.0, 7.0]))
    for _ in range(2):
        system.addParticle(1.0), force.addParticle([])
    system.addForce(force)
    frames = np.zeros((4, 2, 3))
    frames[:, 1, 0] = [0.04, 0.1, 0.2, 0.5]
    twin = SystemTwin(system, frames)
    assert twin.deviation.energy == 0.0 and twin.energies(frames).tolist() == [5.0, 6.0, 7.0, 7.0]


@pytest.mark.parametrize("factor", [1.0 + 1e-4, -1.0])
def test_wrong_slopes_are_noticed(monkeypatch, factor):
    plain = tables.spline_slopes
    monkeypatch.setattr(tables, "spline_slopes", lambda *given: factor * plain(*given))
    with pytest.raises(EnergyError, match="differs from OpenMM"):
        SystemTwin(*singles(3, function(3, True), slope(3)))


def test_axes_exchanged_are_noticed(monkeypatch):
    plain = tables._grid
    monkeypatch.setattr(tables, "_grid", lambda sizes, values: plain(sizes, values).transpose(1, 0, 2))
    with pytest.raises(EnergyError, match="differs from OpenMM"):
        SystemTwin(*singles(3, function(3, False, (4, 4, 3)), value(3)))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_number_makes_no_number(n):
    """Of a continuous function, unless another argument lies outside, where OpenMM does not look any further."""
    table = tables.read_table("f", function(n, False))
    inside = [torch.tensor([0.5 * (low + high)], dtype=torch.float64) for low, high in RANGES[:n]]
    for k in range(n):
        given = [*inside[:k], torch.tensor([torch.nan], dtype=torch.float64), *inside[k + 1 :]]
        assert torch.isnan(table.evaluate((0,) * n, *given)).all()
        if n > 1:
            given[k - 1] = given[k - 1] + 100.0
            assert table.evaluate((0,) * n, *given) == 0.0


def test_no_number_makes_no_number_of_a_discrete_function():
    table = tables.read_table("f", openmm.Discrete2DFunction(2, 3, np.arange(6.0)))
    x, y = torch.tensor([0.0, torch.nan, 1.0], dtype=torch.float64), torch.tensor([torch.nan, 50.0, 50.0])
    assert torch.isnan(table.evaluate((0, 0), x, y.double())).tolist() == [True, True, False]


class Operations(TorchDispatchMode):
    """Names of the operations that torch hands to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def test_a_number_among_the_arguments_is_written_on_the_device():
    """To copy it there would wait for a GPU at each call; this device has no memory, but takes all operations."""
    x = torch.zeros(5, dtype=torch.float64, device="meta")
    with Operations() as done:
        first, second = tables._tensors((x, 0.2))
    assert first.shape == second.shape == x.shape and second.device == x.device
    assert "new_full" in done.names and not {"_to_copy", "lift_fresh"} & set(done.names)


def solvent() -> tuple[openmm.System, np.ndarray]:
    """Three variables in a value summed over pairs, in one of single particles, and in energies of both kinds."""
    rng, kinds = np.random.default_rng(6), openmm.CustomGBForce
    force = kinds()
    force.addPerParticleParameter("q")
    force.addTabulatedFunction("f", openmm.Continuous3DFunction(3, 4, 5, rng.normal(size=60), 0, 1, 0, 1, -2, 2))
    force.addComputedValue("I", "q2*f(r,q1,q2)", kinds.ParticlePair)
    force.addComputedValue("B", "f(0.5,q,I)+q", kinds.SingleParticle)
    force.addEnergyTerm("q*f(q,I^2,B)", kinds.SingleParticle)
    force.addEnergyTerm("f(r,q1*q2,B1+B2)", kinds.ParticlePair)
    system = openmm.System()
    for _ in range(7):
        system.addParticle(1.0), force.addParticle([rng.uniform(0.1, 0.9)])
    system.addForce(force)
    return system, rng.normal(scale=0.3, size=(6, 7, 3))


def test_in_a_solvent_and_in_single_precision():
    system, frames = solvent()
    twin = SystemTwin(system, frames)
    assert twin.deviation.relative_energy < 1e-11 and twin.deviation.relative_force < 1e-11
    assert np.ptp(twin.energies(frames)) > 0.1
    single = SystemTwin(system, frames, dtype=torch.float32).deviation_in_use
    assert single.of_rounding < 0.1 and single.relative_force < 1e-4


@pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
def test_passes_that_look_up_a_table_stay_in_torch_beside_compiled_ones(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    force = openmm.CustomNonbondedForce("f(r,q1,q2)")
    force.addPerParticleParameter("q")
    force.addTabulatedFunction("f", openmm.Continuous3DFunction(2, 3, 4, np.arange(24.0) % 7, 0, 1, 0, 1, 0, 1))
    born, system = openmm.GBSAOBCForce(), openmm.System()
    for i in range(5):
        system.addParticle(1.0), force.addParticle([0.2 * i]), born.addParticle(0.3, 0.15, 0.8)
    system.addForce(force)
    frames = np.random.default_rng(0).normal(scale=0.3, size=(4, 5, 3))
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        assert not SystemTwin(system, frames, compile=True).compiled
    assert "look up tables" in caplog.text
    system.addForce(born)
    twin = SystemTwin(system, frames, compile=True)
    assert twin.compiled and twin.deviation.relative_force < 1e-11


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_period_whose_ends_differ_is_refused(n):
    """OpenMM raises when the Context is made, or ends the process (three variables): not so here."""
    sizes = SIZES[:n]
    values = np.ones(np.prod(sizes))
    values[-1] = 2.0
    limits = [limit for bounds in RANGES[:n] for limit in bounds]
    kind = (openmm.Continuous1DFunction, openmm.Continuous2DFunction, openmm.Continuous3DFunction)[n - 1]
    made = kind(*(sizes if n > 1 else ()), values, *limits, True)
    with pytest.raises(InputError, match="periodic tabulated function f must have equal values"):
        SystemTwin(*singles(n, made, value(n)))
