"""Every kind of force in a twin against OpenMM's Reference platform: energies and forces, on random positions."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch

from openmm_bg.energy.twin import SystemTwin, triton_kernels
from openmm_bg.energy.twin import system as twin_system
from openmm_bg.energy.twin.gb import as_custom
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

N = 9
RNG = np.random.default_rng(11)
#: Atoms on a bent grid, 0.15 nm apart, displaced at random: no two closer than 0.05 nm.
GRID = 0.15 * np.stack(np.meshgrid(range(3), range(3), [0], indexing="ij"), axis=-1).reshape(9, 3)
GRID[:, 2] = 0.04 * np.array([0, 1, 0, -1, 0, 2, -2, 1, 0])
FRAMES = GRID + RNG.normal(scale=0.02, size=(6, N, 3))


def holding(*forces: openmm.Force) -> openmm.System:
    system = openmm.System()
    for _ in range(N):
        system.addParticle(12.0)
    for force in forces:
        system.addForce(copy.deepcopy(force))  # a System owns its forces
    return system


#: Forces without pairs.
BONDED = (
    openmm.HarmonicBondForce, openmm.HarmonicAngleForce, openmm.PeriodicTorsionForce, openmm.RBTorsionForce,
    openmm.CMAPTorsionForce, openmm.CustomBondForce, openmm.CustomAngleForce, openmm.CustomTorsionForce,
    openmm.CustomExternalForce,
)  # fmt: skip
HAVE_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Triton's interpreter, all atoms in one program, for it is slow: see test_twin_triton.py for others."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setattr(triton_kernels, "ROWS", 16)
        yield


def agrees(*forces: openmm.Force, frames: np.ndarray = FRAMES, least: float = 1e-3, **options: object) -> SystemTwin:
    """A twin of the forces, whose energies vary over the frames and are OpenMM's; with pairs, in Triton too."""
    twin = SystemTwin(holding(*forces), frames, **options)
    print(twin.deviation)
    assert twin.deviation.relative_energy < 1e-11 and twin.deviation.relative_force < 1e-10
    assert np.ptp(twin.energies(frames)) > least
    if HAVE_TRITON and any(not isinstance(force, BONDED) for force in forces):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        fused = SystemTwin(holding(*forces), frames, compile="triton", device=device, **options)
        assert fused.deviation.relative_energy < 1e-11 and fused.deviation.relative_force < 1e-10
        assert fused.backend == "triton" or any(getattr(f, "getNumTabulatedFunctions", int)() for f in forces)
    return twin


def table(kind: str) -> openmm.TabulatedFunction:
    values = RNG.normal(size=60)
    return {
        "c1": lambda: openmm.Continuous1DFunction(values[:12], 0.05, 0.45),
        "c1p": lambda: openmm.Continuous1DFunction([*values[:12], values[0]], 0.0, 0.2, True),
        "c2": lambda: openmm.Continuous2DFunction(6, 10, values, 0.0, 0.5, -0.5, 3.5),
        "c2p": lambda: openmm.Continuous2DFunction(5, 7, closed(5, 7), 0.0, 0.2, -0.5, 0.7, True),
        "c3": lambda: openmm.Continuous3DFunction(3, 4, 5, values, 0.1, 0.4, 0.12, 0.28, -0.5, 1.5),
        "c3p": lambda: openmm.Continuous3DFunction(6, 3, 4, closed(6, 3, 4), 0.0, 0.2, 0.0, 0.1, -0.5, 1.1, True),
        "d1": lambda: openmm.Discrete1DFunction(values[:5]),
        "d2": lambda: openmm.Discrete2DFunction(3, 4, values[:12]),
        "d3": lambda: openmm.Discrete3DFunction(3, 4, 5, values),
    }[kind]()


def closed(*sizes: int) -> np.ndarray:
    """Random values of a periodic function, the first argument's fastest."""
    inner = RNG.normal(size=[n - 1 for n in reversed(sizes)])
    return np.pad(inner, (0, 1), mode="wrap").ravel()


# ---------------------------------------------------------------- bonded


def harmonic_bonds():
    force = openmm.HarmonicBondForce()
    for i in range(N - 1):
        force.addBond(i, i + 1, 0.1 + 0.01 * i, 1e4 + 100 * i)
    return force


def harmonic_angles():
    force = openmm.HarmonicAngleForce()
    for i in range(N - 2):
        force.addAngle(i, i + 1, i + 2, 1.5 + 0.1 * i, 100.0 + i)
    return force


def periodic_torsions():
    force = openmm.PeriodicTorsionForce()
    for i in range(N - 3):
        force.addTorsion(i, i + 1, i + 2, i + 3, i % 4 + 1, 0.3 * i, 5.0 + i)
    return force


def rb_torsions():
    force = openmm.RBTorsionForce()
    for i in range(N - 3):
        force.addTorsion(i, i + 1, i + 2, i + 3, *RNG.normal(size=6))
    return force


def cmap():
    force = openmm.CMAPTorsionForce()
    for size in (8, 5):
        force.addMap(size, RNG.normal(scale=5.0, size=size * size))
    for i, which in enumerate([0, 1, 0, 1, 1]):
        force.addTorsion(which, i, i + 1, i + 2, i + 3, i + 1, i + 2, i + 3, i + 4)
    return force


@pytest.mark.parametrize("make", [harmonic_bonds, harmonic_angles, periodic_torsions, rb_torsions, cmap])
def test_bonded_force(make):
    agrees(make())


def test_custom_bonds_angles_torsions_and_external_with_globals():
    bond = openmm.CustomBondForce("s*k*(r-b)^4")
    bond.addGlobalParameter("s", 1.5)
    for name in ("k", "b"):
        bond.addPerBondParameter(name)
    angle = openmm.CustomAngleForce("k*(cos(theta)-c)^2*s")
    angle.addGlobalParameter("s", 1.5)
    for name in ("k", "c"):
        angle.addPerAngleParameter(name)
    torsion = openmm.CustomTorsionForce("k*min(dt,2*pi-dt)^2; dt=abs(theta-r); pi=3.1415926535")
    for name in ("k", "r"):  # r is a parameter here and not a distance
        torsion.addPerTorsionParameter(name)
    external = openmm.CustomExternalForce("k*((x-a)^2+y^2*z+r*x*z)")
    for name in ("k", "a", "r"):
        external.addPerParticleParameter(name)
    for i in range(N - 3):
        bond.addBond(i, i + 2, [1e4 + i, 0.2])
        angle.addAngle(i, i + 1, i + 3, [50.0 + i, 0.1])
        torsion.addTorsion(i, i + 2, i + 1, i + 3, [3.0 + i, 0.2 * i])
        external.addParticle(i + 1, [10.0, 0.1 * i, 0.3])
    for force in (bond, angle, torsion, external):
        agrees(force, frames=FRAMES + 0.5)
    twin = agrees(bond, angle, torsion, external)
    before = twin.energies(FRAMES)
    twin.set_parameters({"s": 0.2})
    again = agrees(bond, angle, torsion, external, parameters={"s": 0.2})
    np.testing.assert_allclose(twin.energies(FRAMES), again.energies(FRAMES), rtol=1e-14)
    assert np.abs(before - again.energies(FRAMES)).max() > 0.01
    with pytest.raises(InputError, match="'q'"):
        twin.set_parameters({"q": 1.0})


def test_bonded_atoms_on_one_spot_have_openmms_forces():
    together = FRAMES[:1].copy()
    together[0, 1] = together[0, 0]
    twin = SystemTwin(holding(harmonic_bonds()), together)
    assert twin.deviation.force < 1e-9 and twin.energies_and_forces(together)[1].any()


@pytest.mark.parametrize("other", [0, 2])
def test_an_angle_without_an_arm_has_no_energy(other):
    """As in OpenMM: the atoms are bonded, so that nothing else would tell that they are on one spot."""
    force = openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, 2.0, 100.0)
    together = FRAMES[:3].copy()
    together[1, other] = together[1, 1]
    context = openmm.Context(
        holding(force), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(together[1])
    assert np.isnan(context.getState(energy=True).getPotentialEnergy()._value)
    twin = SystemTwin(holding(force), FRAMES[:3])
    energies, forces = twin.energies_and_forces(together)
    assert energies[1] == np.inf and not forces[1].any()
    np.testing.assert_array_equal(energies[[0, 2]], twin.energies(FRAMES)[[0, 2]])


def test_atoms_in_a_line_have_openmms_forces():
    force = openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, 2.0, 100.0)
    straight = FRAMES[:1].copy()
    straight[0, :3] = [[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]]
    twin = SystemTwin(holding(force), straight)
    assert twin.deviation.force < 1e-9


def custom_torsions():
    force = openmm.CustomTorsionForce("k*theta^2")
    force.addPerTorsionParameter("k")
    for i in range(N - 3):
        force.addTorsion(i, i + 1, i + 2, i + 3, [1.0 + i])
    return force


LINE = [(0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.3, 0.0, 0.0), (0.7, 0.0, 0.0)]


@pytest.mark.parametrize(
    "make, place",
    [
        *itertools.product(
            (periodic_torsions, rb_torsions, custom_torsions, cmap),
            [
                dict(zip((0, 1, 2), LINE, strict=False)),
                dict(zip((1, 2, 3), LINE, strict=False)),
                dict(zip((0, 1, 2, 3), LINE, strict=False)),
                {0: 1},
                {1: 2},
                {2: 3},
            ],
        ),
        # Its sign is rounding's, and must not matter.
        (rb_torsions, {0: 2}),
        (custom_torsions, {0: 2}),
    ],
)
def test_torsions_that_are_none_have_openmms_energies(make, place):
    """Three atoms in a line, or two on one spot: a quarter of a turn, and forces that are no numbers."""
    force = make()
    twin = SystemTwin(holding(force), FRAMES[:1])
    frames = FRAMES[:3].copy()
    for atom, where in place.items():
        frames[1, atom] = frames[1, where] if isinstance(where, int) else where
    context = openmm.Context(
        holding(force), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(frames[1])
    state = context.getState(energy=True, forces=True)
    energies, forces = twin.energies_and_forces(frames)
    assert energies[1] == pytest.approx(state.getPotentialEnergy()._value, rel=1e-8, abs=1e-8)
    assert np.isnan(state.getForces(asNumpy=True)._value).any() and not forces[1].any()
    np.testing.assert_array_equal(energies[[0, 2]], twin.energies(FRAMES)[[0, 2]])
    assert forces[[0, 2]].any(axis=(1, 2)).all()


# ---------------------------------------------------------------- nonbonded


def nonbonded(exceptions: bool = True) -> openmm.NonbondedForce:
    force = openmm.NonbondedForce()
    rng = np.random.default_rng(2)
    for _ in range(N):
        force.addParticle(rng.normal(scale=0.4), rng.uniform(0.08, 0.15), rng.uniform(0.1, 1.0))
    if exceptions:
        force.addException(0, 1, 0.0, 0.1, 0.0)
        force.addException(3, 1, 0.0, 0.1, 0.0)
        force.addException(2, 5, 0.1, 0.12, 0.3)
        force.addException(7, 4, -0.2, 0.1, 0.0)
    return force


@pytest.mark.parametrize("exceptions", [False, True])
def test_nonbonded(exceptions):
    agrees(nonbonded(exceptions))


def test_an_offset_that_makes_well_depths_negative_leaves_no_energy():
    """As in OpenMM, though the product of two of them is positive; and no warning of numpy's."""
    force = nonbonded(exceptions=False)
    force.addGlobalParameter("lambda", 0.0)
    for i in (3, 6):
        force.addParticleParameterOffset("lambda", i, 0.0, 0.0, -2.0)
    twin = agrees(force)
    twin.set_parameters({"lambda": 1.0})
    assert np.all(twin.energies(FRAMES) == np.inf)
    context = openmm.Context(
        holding(force), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setParameter("lambda", 1.0)
    context.setPositions(FRAMES[0])
    assert np.isnan(context.getState(energy=True).getPotentialEnergy()._value)
    twin.set_parameters({"lambda": 0.0})
    assert np.isfinite(twin.energies(FRAMES)).all()


def test_nonbonded_offsets_follow_global_parameters():
    force = nonbonded()
    for name in ("lambda", "mu"):
        force.addGlobalParameter(name, 0.5)
    force.addParticleParameterOffset("lambda", 3, 0.5, 0.02, 0.1)
    force.addParticleParameterOffset("mu", 3, -0.2, 0.0, 0.2)
    force.addParticleParameterOffset("mu", 6, 0.3, 0.01, 0.0)
    force.addExceptionParameterOffset("lambda", 0, 0.2, 0.02, 0.4)
    force.addExceptionParameterOffset("mu", 2, 0.2, 0.02, 0.4)
    twin = agrees(force)
    moved = agrees(force, parameters={"lambda": 1.0, "mu": 0.1})
    assert np.abs(twin.energies(FRAMES) - moved.energies(FRAMES)).max() > 1.0
    twin.set_parameters({"lambda": 1.0, "mu": 0.1})
    np.testing.assert_array_equal(twin.energies(FRAMES), moved.energies(FRAMES))


def custom_nonbonded(energy: str, names: tuple[str, ...] = ("q", "s")) -> openmm.CustomNonbondedForce:
    force = openmm.CustomNonbondedForce(energy)
    for name in names:
        force.addPerParticleParameter(name)
    rng = np.random.default_rng(3)
    for i in range(N):
        force.addParticle([i % 3 if name.startswith("kind") else rng.uniform(0.1, 0.3) for name in names])
    return force


@pytest.mark.parametrize(
    "energy",
    [
        "q1*q2*exp(-r/s)/r; s=0.5*(s1+s2)",
        "q1*s2^2*sin(9*r)",  # not symmetric: the lower index is the first particle
        "select(step(0.2-r), 1000*q1*q2*(0.2-r)^2, 0)",
        "q1+q2",
        "scale*(a1+a2)*r",
    ],
)
def test_custom_nonbonded(energy):
    force = custom_nonbonded(energy)
    force.addGlobalParameter("scale", 2.0)
    force.addComputedValue("a", "q^2*scale+s")
    force.addExclusion(1, 0)
    force.addExclusion(2, 7)
    if energy == "q1+q2":  # a constant, which has no forces
        twin = SystemTwin(holding(force), FRAMES)
        assert twin.deviation.energy < 1e-12 and twin.energies(FRAMES)[0] > 1.0
        return
    twin = agrees(force)
    if "scale" in energy:
        twin.set_parameters({"scale": 3.0})
        again = agrees(force, parameters={"scale": 3.0})
        np.testing.assert_allclose(twin.energies(FRAMES), again.energies(FRAMES), rtol=1e-13)


@pytest.mark.parametrize("energy", ["q1*q2/r", "q1*s2^2*sin(9*r)"])
@pytest.mark.parametrize(
    "groups",
    [
        [((0, 1, 2), (4, 5))],
        [((5, 6), (0, 1, 5, 6))],
        [((0, 1, 2, 3), (0, 1, 2, 3))],
        [((0, 1, 2), (2, 3, 4)), ((3, 4), (0, 2))],  # pairs that count twice, once in either order
    ],
)
def test_interaction_groups(energy, groups):
    force = custom_nonbonded(energy)
    force.addExclusion(1, 2)
    force.addExclusion(5, 0)
    for first, second in groups:
        force.addInteractionGroup(first, second)
    agrees(force, least=1e-4)


@pytest.mark.parametrize(
    "kind, energy",
    [
        ("c1", "q1*q2*f(r)"),
        ("c1p", "q1*q2*f(r-0.1)"),
        ("c2", "f(r,q1*q2*30)"),
        ("c2p", "f(r-0.1,q1*q2*30)"),
        ("c3", "f(r,q1,2*r)"),
        ("c3", "f(3*r^2,q2,kind1*r)"),
        ("c3", "f(q1,0.2,kind1)*r"),  # of parameters alone
        ("c3p", "f(r-0.3,q2,kind1-kind2*r)"),
        ("d1", "(f(kind1)+f(kind2))*r^2"),
        ("d2", "f(kind1,kind2)*r"),
        ("d2", "f(2*step(r-0.2),kind2)*r"),
        ("d3", "f(kind1,kind2,kind1+kind2)*r"),
    ],
)
def test_tabulated_functions(kind, energy):
    force = custom_nonbonded(energy, ("q", "kind"))
    force.addTabulatedFunction("f", table(kind))
    agrees(force)


def test_soft_core_pairs_may_touch():
    force = custom_nonbonded("q1*q2/(0.2+(r/0.1)^6)")
    twin = agrees(force)
    touching = FRAMES.copy()
    touching[2, 3] = touching[2, 6]
    context = openmm.Context(
        holding(force), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(touching[2])
    energies, forces = twin.energies_and_forces(touching)
    assert energies[2] == pytest.approx(context.getState(energy=True).getPotentialEnergy()._value, rel=1e-13)
    assert np.isfinite(forces).all()


# ---------------------------------------------------------------- implicit solvent


def gbsa(surface: float = 2.25936) -> openmm.GBSAOBCForce:
    force = openmm.GBSAOBCForce()
    rng = np.random.default_rng(4)
    for _ in range(N):
        force.addParticle(rng.normal(scale=0.4), rng.uniform(0.1, 0.2), rng.uniform(0.7, 1.0))
    force.setSurfaceAreaEnergy(surface)
    force.setSoluteDielectric(1.5)
    return force


@pytest.mark.parametrize("surface", [0.0, 2.25936])
def test_gbsa_obc(surface):
    agrees(gbsa(surface))


def test_gbsa_obc_inside_another_sphere():
    close = FRAMES.copy()
    close[:, 4] = close[:, 1] + [0.0, 0.02, 0.01]
    solvent = gbsa()
    solvent.setParticleParameters(1, 0.3, 0.2, 1.0)
    solvent.setParticleParameters(4, -0.2, 0.1, 1.0)
    whole = agrees(solvent, frames=close)
    # the force field's expressions lack the term for it
    force = as_custom(solvent)
    name, text, kind = force.getComputedValueParameters(0)
    assert "+C)" in text
    force.setComputedValueParameters(0, name, text.replace("+C)", ")"), kind)
    plain = agrees(force, frames=close)
    assert np.abs(plain.energies(close) - whole.energies(close)).max() > 0.1


def custom_gb(pair_kind: int, place: bool = False) -> openmm.CustomGBForce:
    """Values that depend on earlier ones, terms of one and two particles, a table and a global parameter."""
    kinds = openmm.CustomGBForce
    force = kinds()
    for name in ("q", "kind"):
        force.addPerParticleParameter(name)
    force.addGlobalParameter("scale", 0.7)
    force.addTabulatedFunction("t", openmm.Discrete2DFunction(3, 3, np.random.default_rng(5).uniform(1, 2, size=9)))
    force.addComputedValue("I", "t(kind1,kind2)*q2^2*exp(-scale*r/0.1)", pair_kind)
    force.addComputedValue("B", "1/(1+I^2)+q" + ("+x*y" if place else ""), kinds.SingleParticle)
    force.addComputedValue("C", "B*I+scale*q" + ("-z" if place else ""), kinds.SingleParticle)
    force.addEnergyTerm("C^2+q*I" + ("+z^2*B" if place else ""), kinds.SingleParticle)
    force.addEnergyTerm("q1*q2*(C1+C2)/sqrt(r^2+B1^2+B2^2)", kinds.ParticlePairNoExclusions)
    force.addEnergyTerm("I1*I2*r", pair_kind)
    for i in range(N):
        force.addParticle([np.random.default_rng(i).normal(), i % 3])
    force.addExclusion(0, 1)
    force.addExclusion(6, 2)
    return force


@pytest.mark.parametrize("place", [False, True])
@pytest.mark.parametrize("kind", [openmm.CustomGBForce.ParticlePair, openmm.CustomGBForce.ParticlePairNoExclusions])
def test_custom_gb(kind, place):
    twin = agrees(custom_gb(kind, place), gbsa(), nonbonded(), frames=FRAMES + (0.3 if place else 0.0))
    before = twin.energies(FRAMES)
    twin.set_parameters({"scale": 1.1})
    again = agrees(custom_gb(kind, place), gbsa(), nonbonded(), parameters={"scale": 1.1})
    np.testing.assert_allclose(twin.energies(FRAMES), again.energies(FRAMES), rtol=1e-13)
    assert np.abs(before - again.energies(FRAMES)).max() > 1e-3


def test_custom_gb_without_energies_of_pairs():
    force = openmm.CustomGBForce()
    force.addPerParticleParameter("q")
    force.addComputedValue("I", "q2/r", openmm.CustomGBForce.ParticlePair)
    force.addEnergyTerm("I^2", openmm.CustomGBForce.SingleParticle)
    for i in range(N):
        force.addParticle([0.1 * i])
    agrees(force)


# ---------------------------------------------------------------- the check itself, and what is refused


def test_forces_without_energy_are_skipped():
    agrees(harmonic_bonds(), openmm.CMMotionRemover(), openmm.AndersenThermostat(300.0, 1.0))


def born(values: str, count: int = N) -> openmm.CustomGBForce:
    """With computed values of single particles (s) and of pairs (p)."""
    force = openmm.CustomGBForce()
    for k, kind in enumerate(values):
        text, of = ("1", force.SingleParticle) if kind == "s" else ("r", force.ParticlePair)
        force.addComputedValue(f"I{k}", text, of)
    force.addEnergyTerm("I0" if values else "1", force.SingleParticle)
    for _ in range(count):
        force.addParticle([])
    return force


def periodic_bonds():
    force = harmonic_bonds()
    force.setUsesPeriodicBoundaryConditions(True)
    return force


def with_method(force, method):
    force.setNonbondedMethod(method)
    return force


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: openmm.RMSDForce(FRAMES[0]), "RMSDForce"),
        (lambda: openmm.MonteCarloBarostat(1.0, 300.0), "MonteCarloBarostat"),
        (lambda: openmm.CustomCVForce("1"), "CustomCVForce"),
        (periodic_bonds, "periodic"),
        (lambda: with_method(nonbonded(), openmm.NonbondedForce.CutoffNonPeriodic), "cutoff.*NonbondedForce"),
        (lambda: with_method(nonbonded(), openmm.NonbondedForce.PME), "periodic|cutoff"),
        (lambda: with_method(custom_nonbonded("r"), openmm.CustomNonbondedForce.CutoffNonPeriodic), "cutoff"),
        (lambda: with_method(gbsa(), openmm.GBSAOBCForce.CutoffNonPeriodic), "cutoff"),
        (lambda: born(""), "CustomGBForce without computed values"),
        *((lambda values=values: born(values), "computed values are not one of pairs") for values in ("s", "sp", "pp")),
    ],
)
def test_what_it_does_not_know_is_refused(make, word):
    with pytest.raises(InputError, match=f"{word}.*Context pool"):
        SystemTwin(holding(make()), FRAMES)


@pytest.mark.parametrize("values", ["s", "sp", "pp"])
def test_openmm_refuses_these_computed_values_too(values):
    with pytest.raises(openmm.OpenMMException, match="computed value"):
        openmm.Context(
            holding(born(values)), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )


def few(force, count):
    for _ in range(count):
        force.addParticle(*([[]] if isinstance(force, openmm.CustomNonbondedForce) else [0.1, 0.1, 0.5]))
    return force


@pytest.mark.parametrize("kind", ["NonbondedForce", "CustomNonbondedForce", "GBSAOBCForce", "CustomGBForce"])
@pytest.mark.parametrize("count", [0, N - 1, N + 1])
def test_a_force_of_more_or_fewer_particles_is_refused(kind, count):
    makers = {
        "NonbondedForce": lambda: few(openmm.NonbondedForce(), count),
        "CustomNonbondedForce": lambda: few(openmm.CustomNonbondedForce("r"), count),
        "GBSAOBCForce": lambda: few(openmm.GBSAOBCForce(), count),
        "CustomGBForce": lambda: born("p", count),
    }
    with pytest.raises(InputError, match=f"^The {kind} has {count} particles, the System {N}: make them equal.$"):
        SystemTwin(holding(makers[kind]()), FRAMES)


def missing_parameter():
    force = openmm.CustomBondForce("k*r")
    force.addPerBondParameter("k")
    force.addBond(0, 1, [])
    return force


def excluded_stranger():
    force = few(openmm.CustomNonbondedForce("r"), N)
    force.addExclusion(0, 50)
    return force


def nonbonded_with(change):
    force = few(openmm.NonbondedForce(), N)
    force.addGlobalParameter("lambda", 0.5)
    change(force)
    return force


@pytest.mark.parametrize(
    "make, word",
    [
        (missing_parameter, "number of parameters"),
        (excluded_stranger, "exclusion"),
        (lambda: nonbonded_with(lambda force: force.addException(0, 50, 0.1, 0.1, 0.1)), "exception: 50"),
        (lambda: nonbonded_with(lambda force: force.addParticleParameterOffset("lambda", 50, 1, 1, 1)), "50"),
        (lambda: nonbonded_with(lambda force: force.addExceptionParameterOffset("lambda", 50, 1, 1, 1)), "50"),
    ],
)
def test_what_openmm_refuses_is_refused_in_its_words(make, word):
    with pytest.raises(InputError, match=f"OpenMM cannot make a Context of the System: .*{word}"):
        system = holding()
        system.addForce(make())
        SystemTwin(system, FRAMES)


def test_virtual_sites_are_refused():
    system = holding(harmonic_bonds())
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(InputError, match="virtual sites"):
        SystemTwin(system, FRAMES)


def test_a_wrong_term_is_noticed(monkeypatch):
    def wrong(forces, force, prefix):
        original(forces, force, prefix)
        forces.distances.terms[-1].evaluate, right = None, forces.distances.terms[-1].evaluate
        forces.distances.terms[-1].evaluate = lambda c, s: tuple(
            part if part is None else 1.0001 * part for part in right(c, s)
        )

    original = twin_system.READERS[openmm.HarmonicBondForce]
    monkeypatch.setitem(twin_system.READERS, openmm.HarmonicBondForce, wrong)
    with pytest.raises(EnergyError, match="differs from OpenMM"):
        SystemTwin(holding(harmonic_bonds()), FRAMES)


@pytest.mark.parametrize("missing", [openmm.HarmonicAngleForce, openmm.NonbondedForce, openmm.GBSAOBCForce])
def test_a_force_left_out_is_noticed(monkeypatch, missing):
    monkeypatch.setitem(twin_system.READERS, missing, lambda *_: None)
    with pytest.raises(EnergyError, match="differs from OpenMM"):
        SystemTwin(holding(harmonic_bonds(), harmonic_angles(), nonbonded(), gbsa()), FRAMES)


def test_wrong_gradients_alone_are_noticed(monkeypatch):
    def wrong(forces, force, prefix):
        original(forces, force, prefix)
        spread = forces.torsions.spread
        forces.torsions.spread = lambda slope, vectors: spread(slope * 1.001, vectors)

    original = twin_system.READERS[openmm.PeriodicTorsionForce]
    monkeypatch.setitem(twin_system.READERS, openmm.PeriodicTorsionForce, wrong)
    with pytest.raises(EnergyError, match="differs from OpenMM"):
        SystemTwin(holding(periodic_torsions()), FRAMES)


@pytest.mark.parametrize("frames", [FRAMES[:0], np.full((1, N, 3), np.nan)])
def test_frames_to_compare_on_must_be_finite(frames):
    with pytest.raises(InputError, match="at least one frame"):
        SystemTwin(holding(harmonic_bonds()), frames)


def test_frames_without_an_energy_are_refused():
    clash = FRAMES[:1].copy()
    clash[0, 0] = clash[0, 8]
    with pytest.raises(InputError, match="no finite energy"):
        SystemTwin(holding(nonbonded()), clash)


def test_an_empty_system():
    twin = SystemTwin(holding(), FRAMES)
    energies, forces = twin.energies_and_forces(FRAMES)
    assert not energies.any() and not forces.any() and math.isfinite(twin.deviation.energy)


def test_wrong_types_are_refused():
    with pytest.raises(InputError, match="dtype"):
        SystemTwin(holding(), FRAMES, dtype=torch.float16)
