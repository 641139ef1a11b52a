"""Loops over pairs in C++ and Triton against OpenMM and against torch, and what happens without a compiler.

Triton's kernels run on a CUDA device if there is one, and else in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest
import torch

from openmm_bg.energy import SystemTwin
from openmm_bg.energy.twin import kernels, triton_kernels
from openmm_bg.energy.twin.evaluator import Evaluator
from openmm_bg.energy.twin.system import Forces
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

needs_compiler = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
BACKENDS = [pytest.param("c++", marks=needs_compiler), pytest.param("triton", marks=needs_triton)]
#: Where each backend runs.
DEVICES = {"c++": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
DOUBLE_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])

N = 9
RNG = np.random.default_rng(5)
GRID = 0.16 * np.stack(np.meshgrid(range(3), range(3), [0], indexing="ij"), axis=-1).reshape(N, 3)
FRAMES = GRID + RNG.normal(scale=0.02, size=(40, N, 3))

#: Every function, several branches, and both orders of a pair.
EVERYTHING = (
    "q1*s2^2*(sqrt(r)+exp(-r/s1)+log(r+q2^2)+sin(5*r)+cos(r*s2)+sec(r)+csc(r+1)+tan(r)+cot(r+0.5)+asin(r/3)+acos(r/3)"
    "+atan(r)+atan2(r,s1)+atan2(1,r)+sinh(r)+cosh(r)+tanh(r*q1)+erf(r)+erfc(r)+step(r-0.3)*r+delta(r-9)+square(r)+cube(r)"
    "+recip(r)+min(r,0.2)+max(r,s1)+min(q1,r*q2)+abs(r-0.3)+floor(9*r)+ceil(7*r)+select(step(0.3-r),r^3,s1)+r^1.5+s1^r"
    "+select(floor(4*r),1,2)+r^-5*1e-3)"
)


#: Functions of the reciprocal of what the second particle alone has.
OF_THE_SECOND = "max(1/(1+B2),0.1)+sinh(1/(1+B2))+tan(1/(2+B2))+(1/(3+B2))^1.5+select(step(B2-1.2),1/(4+B2),0.3)"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of this module's own, and Triton's interpreter where there is no device for its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if DEVICES["triton"] == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            # All atoms and frames in one program, for the interpreter is slow; see test_twin_triton.py for others.
            patch.setattr(triton_kernels, "ROWS", 16)
            patch.setattr(triton_kernels, "FRAMES", 256)
        yield


def make_system(energy: str = EVERYTHING, solvent: bool = True) -> openmm.System:
    rng = np.random.default_rng(2)
    system = openmm.System()
    nonbonded, custom, gbsa = openmm.NonbondedForce(), openmm.CustomNonbondedForce(energy), openmm.GBSAOBCForce()
    born = openmm.CustomGBForce()
    bonds = openmm.HarmonicBondForce()
    for name in "qs":
        custom.addPerParticleParameter(name)
    born.addPerParticleParameter("q")
    born.addGlobalParameter("scale", 1.0)
    born.addComputedValue("I", "q2^2*exp(-scale*r/0.1)*tanh(r/q1^2)", born.ParticlePair)
    born.addComputedValue("B", "1/(1+I^2)+q*x", born.SingleParticle)
    born.addEnergyTerm("B^2+q*I*z", born.SingleParticle)
    born.addEnergyTerm("q1*q2*(B1+B2)/sqrt(r^2+B1^2+B2^2)", born.ParticlePairNoExclusions)
    for i in range(N):
        system.addParticle(12.0)
        charge = rng.normal(scale=0.4)
        nonbonded.addParticle(charge, rng.uniform(0.08, 0.15), rng.uniform(0.1, 1.0))
        custom.addParticle([rng.uniform(0.5, 1.5), rng.uniform(0.1, 0.3)])
        gbsa.addParticle(charge, rng.uniform(0.1, 0.2), rng.uniform(0.7, 1.0))
        born.addParticle([rng.uniform(0.5, 1.0)])
        if i:
            bonds.addBond(i - 1, i, 0.15, 1e4)
    nonbonded.addException(0, 1, 0.0, 0.1, 0.0)
    nonbonded.addException(2, 5, 0.1, 0.12, 0.3)
    custom.addExclusion(3, 4)
    born.addExclusion(1, 7)
    for force in [nonbonded, custom, bonds, *([gbsa, born] if solvent else [])]:
        system.addForce(force)
    return system


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((backend, dtype), marks=needs, id=f"{backend}-{name}")
        for backend, needs in (("c++", needs_compiler), ("triton", needs_triton))
        for name, dtype in (("double", torch.float64), ("single", torch.float32))
    ],
)
def twins(request):
    """A compiled twin and one in torch."""
    backend, dtype = request.param
    system = make_system()
    where = {"dtype": dtype, "device": DEVICES[backend]}
    return tuple(SystemTwin(system, FRAMES[:5], **where, compile=c) for c in (backend, False))


@pytest.fixture(scope="module")
def known(twins):
    """The compiled twin's energies and forces on all frames."""
    return twins[0].energies_and_forces(FRAMES)


def same(ours, theirs, twin) -> None:
    """That energies are bitwise equal on a CPU; another device may do other frames at once in another order."""
    np.testing.assert_allclose(ours, theirs, rtol=0.0 if twin.device.type == "cpu" else 1e-5)


def test_compiled_is_openmms(twins, known):
    compiled, eager = twins
    assert compiled.compiled and not eager.compiled and compiled.backend in ("c++", "triton")
    print(compiled.deviation_in_use)
    found = compiled.deviation_in_use
    if compiled.dtype == torch.float64:
        assert max(found.relative_energy, found.relative_force) < 1e-12
    else:
        assert found.of_rounding < 0.1 and found.relative_force < 1e-5
    for ours, theirs in zip(known, eager.energies_and_forces(FRAMES), strict=True):
        tight = compiled.dtype == torch.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-11 if tight else 1e-4, atol=1e-9 if tight else 2e-2)
    np.testing.assert_allclose(compiled.energies(FRAMES), known[0], rtol=1e-5)


def test_batches_that_do_not_fill_vectors(twins, known):
    compiled = twins[0]
    expected, expected_forces = known
    # Vectors are those of C++; the sizes that Triton minds are in test_twin_triton.py.
    for count in (0, 1, 17) if compiled.backend == "triton" else (0, 1, 7, 15, 16, 17, 40, 300):
        frames = np.tile(FRAMES, (8, 1, 1))[:count]
        energies, forces = compiled.energies_and_forces(frames)
        assert energies.shape == (count,) and forces.shape == frames.shape
        np.testing.assert_allclose(energies, np.tile(expected, 8)[:count], rtol=1e-6)
        np.testing.assert_allclose(forces, np.tile(expected_forces, (8, 1, 1))[:count], rtol=1e-4, atol=1e-3)


def test_bad_frames_disturb_no_other_in_their_vector(twins, known):
    compiled = twins[0]
    mixed = FRAMES.copy()
    for row, value in zip([0, 3, 18, 39], [np.nan, np.inf, 1e300, 1e19], strict=True):
        mixed[row, row % N, row % 3] = value
    mixed[7, 3] = mixed[7, 6]
    good, good_forces = known
    energies, forces = compiled.energies_and_forces(mixed)
    bad = [0, 3, 7, 18, 39]
    rest = np.setdiff1d(np.arange(40), bad)
    assert np.isfinite(good).all() and np.all(energies[bad] == np.inf) and not forces[bad].any()
    same(energies[rest], good[rest], compiled)
    same(forces[rest], good_forces[rest], compiled)


def test_global_parameters_reach_compiled_code(twins):
    compiled, eager = twins
    before = compiled.energies(FRAMES)
    for twin in twins:
        twin.set_parameters({"scale": 0.3})
    after = compiled.energies(FRAMES)
    np.testing.assert_allclose(after, eager.energies(FRAMES), rtol=1e-5, atol=1e-3)
    assert np.abs(after - before).min() > 1e-2
    for twin in twins:
        twin.set_parameters({"scale": 1.0})


@needs_compiler
@DOUBLE_AND_SINGLE
def test_exponentials_and_logarithms_to_the_ends_of_their_range(dtype):
    """Energies of two particles that are these functions of their distance, and where they overflow or vanish."""
    limits, (tiny, slack) = (
        np.finfo(str(dtype)[6:]),
        {torch.float64: (1e-307, 4e-16), torch.float32: (1e-38, 2e-7)}[dtype],
    )
    distances = np.concatenate((np.geomspace(1e-3, 2e3, 2000), np.linspace(80, 110, 500), np.linspace(700, 760, 500)))
    frames = np.zeros((len(distances), 2, 3))
    frames[:, 1, 0] = distances
    system = openmm.System()
    force = openmm.CustomNonbondedForce("select(exponential, exp(factor*r), log(factor*r))")
    for name in ("exponential", "factor"):
        force.addGlobalParameter(name, 1.0)
    for _ in range(2):
        system.addParticle(1.0)
        force.addParticle([])
    system.addForce(force)
    twin = SystemTwin(system, frames[1000:1001], dtype=dtype, compile=True)
    assert twin.compiled
    for sign in (-1.0, 1.0):
        twin.set_parameters({"factor": sign})
        found = twin.energies(frames)
        inside = (sign * distances > np.log(limits.tiny)) & (sign * distances < np.log(limits.max))
        # The rounding of a distance is magnified by its size.
        error = np.abs(found / np.exp(np.where(inside, sign * distances, 0.0)) - 1.0)
        assert np.all(error[inside] < slack * (4.0 + distances[inside]))
        assert np.all(found[sign * distances > np.log(limits.max) + 1e-3] == np.inf)
        assert np.all(found[sign * distances < np.log(limits.tiny)] <= limits.tiny)
    for factor in (1.0, tiny):  # the second makes numbers below the smallest normal one
        twin.set_parameters({"exponential": 0.0, "factor": factor})
        found = twin.energies(frames)
        exact = np.log(factor) + np.log(distances)
        loss = 1.0 if factor == 1.0 else 3e3  # digits that such numbers lack
        assert np.all(np.abs(found - exact) < slack * loss * (2.0 + np.abs(exact)))


@needs_compiler
def test_two_threads_give_what_one_gives():
    before = torch.get_num_threads()
    system, frames = make_system(), np.tile(FRAMES, (40, 1, 1))
    one = SystemTwin(system, FRAMES[:2], dtype=torch.float32, compile=True, n_threads=1)
    two = SystemTwin(system, FRAMES[:2], dtype=torch.float32, compile=True, n_threads=2)
    assert (one.n_threads, two.n_threads) == (1, 2)
    for _ in range(2):
        for ours, theirs in zip(one.energies_and_forces(frames), two.energies_and_forces(frames), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        two.close()
    two.close()
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="n_threads"):
        SystemTwin(system, FRAMES[:2], n_threads=0)


@needs_compiler
def test_a_library_is_compiled_once(monkeypatch, caplog):
    arguments = {"dtype": torch.float32, "compile": True}
    system = make_system("q1*q2/r", solvent=False)
    with caplog.at_level(logging.INFO, logger="openmm_bg"):
        first = SystemTwin(system, FRAMES[:2], **arguments)
        assert sum("were compiled in" in record.getMessage() for record in caplog.records) == 1
        made = set(kernels.cache_folder().glob("*"))
        again = SystemTwin(system, FRAMES[:2], **arguments)
        assert sum("were compiled in" in record.getMessage() for record in caplog.records) == 1
    assert set(kernels.cache_folder().glob("*")) == made
    np.testing.assert_array_equal(first.energies(FRAMES), again.energies(FRAMES))


@pytest.mark.parametrize("broken", ["", "/bin/false"])
def test_without_a_compiler_torch_does_it(monkeypatch, caplog, broken):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", broken)
    system = make_system("q1*q2/r^2", solvent=False)
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        twin = SystemTwin(system, FRAMES[:2], compile=True)
    assert not twin.compiled and len(caplog.records) == 1
    assert ("cannot compile" if broken else "no C++ compiler") in caplog.text
    np.testing.assert_array_equal(twin.energies(FRAMES), SystemTwin(system, FRAMES[:2]).energies(FRAMES))


def test_tables_of_distances_stay_in_torch(caplog):
    system = openmm.System()
    force = openmm.CustomNonbondedForce("f(r)")
    force.addTabulatedFunction("f", openmm.Continuous1DFunction([0.0, 1.0, 0.5, 2.0], 0.0, 0.6))
    for _ in range(N):
        system.addParticle(1.0)
        force.addParticle([])
    system.addForce(force)
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        twin = SystemTwin(system, FRAMES[:2], compile=True)
    assert not twin.compiled and "tables" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_the_second_particle_alone(backend):
    """Which is made outside the inner loop, for it changes with frame and particle only."""
    system, force = openmm.System(), openmm.CustomGBForce()
    force.addPerParticleParameter("q")
    force.addComputedValue("B", "q2*exp(-r/0.1)", force.ParticlePair)
    force.addEnergyTerm("q1*select(step(B2-1.5), r*B1, 2*r^2*B2+min(B1,1.5))", force.ParticlePair)
    force.addEnergyTerm(f"q1*r*({OF_THE_SECOND})", force.ParticlePair)
    for i in range(N):
        system.addParticle(1.0)
        force.addParticle([0.5 + 0.1 * i])
    system.addForce(force)
    twin = SystemTwin(system, FRAMES[:5], compile=backend, device=DEVICES[backend])
    assert twin.backend == backend and twin.deviation.relative_force < 1e-12


@pytest.mark.parametrize(
    "backend, block",
    [
        ("torch", None),
        pytest.param("c++", 16, marks=needs_compiler),
        pytest.param("c++", 2**20, marks=needs_compiler),  # a deliberate error, which must show
    ],
)
def test_pairs_in_single_precision_are_not_added_up_in_it(monkeypatch, backend, block):
    """Half a million numbers of 24 bits each, of whose sums single precision would lose more with every pair.

    Torch adds them up in double precision. In C++ that holds for sums of a few, each addition to which rounds by half a
    unit at most. An atom's sum is rounded when it is handed on.
    """
    assert kernels.BLOCK == 16
    if block is not None:
        monkeypatch.setattr(kernels, "BLOCK", block)
    n, large = 1000, 0xAAAAAB
    system, force = openmm.System(), openmm.CustomNonbondedForce(f"{large}+step(r-1000)")
    born = openmm.CustomGBForce()
    born.addComputedValue("I", f"{large}+step(r-1000)", born.ParticlePair)
    born.addEnergyTerm("I", born.SingleParticle)
    for _ in range(n):
        system.addParticle(1.0), force.addParticle([]), born.addParticle([])
    for each in (force, born):
        system.addForce(each)
    evaluator = Evaluator(Forces(system), torch.float32, torch.device("cpu"))
    assert backend == "torch" or evaluator.compile(backend) is None
    evaluator.prepare({})
    x = torch.rand(3, n, 16, generator=torch.Generator().manual_seed(0))
    energies, _ = evaluator._energy.evaluate(x, {})
    (sums,) = evaluator._sums.evaluate(x, {})[1].values()
    assert energies.dtype == torch.float64 and sums.dtype == torch.float32 and sums.shape == (n, 16)
    unit = 2.0**-24
    slack = 0.0 if backend == "torch" else 16 * unit
    right = energies / (n * (n - 1) // 2 * large) - 1.0
    right_sums = sums.double() / ((n - 1) * large) - 1.0
    print(right.abs().max() / unit, right_sums.abs().max() / unit)
    held = bool((right.abs() <= slack).all()), bool((right_sums.abs() <= slack + unit).all())
    assert held == ((False, False) if block == 2**20 else (True, True))


@needs_compiler
@pytest.mark.parametrize(
    "right, wrong", [("begin = i + 1", "begin = i + 2"), ("total[l] += row[l]", "total[l] += 1.001 * row[l]")]
)
def test_wrong_code_is_noticed(monkeypatch, right, wrong):
    assert right in kernels.LOOPS
    monkeypatch.setattr(kernels, "LOOPS", kernels.LOOPS.replace(right, wrong))
    with pytest.raises(EnergyError, match="differs from OpenMM"):  # also in float32, whose rounding is only reported
        SystemTwin(make_system("q1*q2/r^2", solvent=False), FRAMES[:2], dtype=torch.float32, compile=True)
