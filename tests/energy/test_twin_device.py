"""A twin on another device, of which there need not be one: the device ``meta`` has shapes and no numbers.

It refuses to work with a tensor that was left on the CPU, and any look at a number would be an error.
"""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch

from openmm_bg.energy import SystemTwin
from openmm_bg.energy.twin import pairs
from openmm_bg.energy.twin.evaluator import Evaluator
from openmm_bg.energy.twin.system import Forces
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

N = 8
META = torch.device("meta")
RNG = np.random.default_rng(3)
FRAMES = 0.15 * np.stack((np.arange(N), np.arange(N) % 2, np.arange(N) % 3), axis=1) + RNG.normal(
    scale=0.01, size=(11, N, 3)
)


def every_force() -> openmm.System:
    """All that a twin knows: each kind of force, of tabulated function and of CustomGBForce's terms."""
    system = openmm.System()
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    rb, maps = openmm.RBTorsionForce(), openmm.CMAPTorsionForce()
    nonbonded, gbsa = openmm.NonbondedForce(), openmm.GBSAOBCForce()
    external = openmm.CustomExternalForce("k*x^2+y*z")
    born, custom = openmm.CustomGBForce(), openmm.CustomNonbondedForce("q1*q2*(c(r)+p(r)+m(r,q1)+d(kind1,kind2)*r)")
    for name, function in (
        ("c", openmm.Continuous1DFunction([0.0, 1.0, 0.5, 2.0], 0.0, 2.0)),
        ("p", openmm.Continuous1DFunction([0.0, 1.0, 0.5, 0.0], 0.0, 0.3, True)),
        ("m", openmm.Continuous2DFunction(3, 4, list(RNG.normal(size=12)), 0.0, 2.0, 0.0, 2.0)),
        ("d", openmm.Discrete2DFunction(3, 3, list(RNG.normal(size=9)))),
    ):
        custom.addTabulatedFunction(name, function)
    for name in ("q", "kind"):
        custom.addPerParticleParameter(name)
    born.addPerParticleParameter("q")
    born.addGlobalParameter("scale", 1.0)
    born.addComputedValue("I", "q2^2*exp(-scale*r/0.1)", born.ParticlePair)
    born.addComputedValue("B", "1/(1+I^2)+q*x", born.SingleParticle)
    born.addEnergyTerm("B^2+q*I*z", born.SingleParticle)
    born.addEnergyTerm("q1*q2*(B1+B2)/sqrt(r^2+B1^2+B2^2)", born.ParticlePairNoExclusions)
    external.addGlobalParameter("k", 2.0)
    maps.addMap(5, list(RNG.normal(size=25)))
    for i in range(N):
        system.addParticle(12.0)
        nonbonded.addParticle(0.1 * (-1) ** i, 0.1, 0.3)
        gbsa.addParticle(0.1 * (-1) ** i, 0.15, 0.8)
        custom.addParticle([0.5 + 0.1 * i, i % 3])
        born.addParticle([0.5 + 0.05 * i])
        external.addParticle(i, [])
    for i in range(N - 4):
        bonds.addBond(i, i + 1, 0.15, 1e3)
        angles.addAngle(i, i + 1, i + 2, 2.0, 50.0)
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 2, 0.3, 4.0)
        rb.addTorsion(i, i + 1, i + 2, i + 3, *RNG.normal(size=6))
        maps.addTorsion(0, i, i + 1, i + 2, i + 3, i + 1, i + 2, i + 3, i + 4)
    nonbonded.addException(0, 1, 0.0, 0.1, 0.0)
    nonbonded.addException(2, 4, 0.1, 0.1, 0.3)
    for force in (bonds, angles, torsions, rb, maps, nonbonded, gbsa, external, born, custom):
        system.addForce(force)
    return system


SYSTEM = every_force()


def on_meta(dtype: torch.dtype) -> SystemTwin:
    """A twin whose arrays have no numbers, made from one on the CPU, for it cannot be compared with OpenMM."""
    twin = copy.copy(SystemTwin(SYSTEM, FRAMES[:2], dtype=dtype))
    twin.device, twin._counts = META, torch.zeros(2, dtype=torch.int64, device=META)
    twin._evaluator = Evaluator(Forces(SYSTEM), dtype, META)
    twin._evaluator.prepare(twin.parameters)
    return twin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("given", ["meta", "cpu"])
@pytest.mark.parametrize("forces", [False, True])
def test_all_tensors_are_on_the_device_and_nothing_waits_for_it(dtype, given, forces):
    twin = on_meta(dtype)
    positions = torch.from_numpy(FRAMES).to(given)
    energies, found = twin.evaluate(positions, forces=forces)
    assert energies.device == META and energies.shape == (11,) and energies.dtype == torch.float64
    if forces:
        assert found is not None and found.device == META and found.shape == positions.shape and found.dtype == dtype
    twin.set_parameters({"scale": 0.5, "k": 1.0})
    assert twin.evaluate(positions)[0].device == META


@pytest.mark.parametrize("where", ["offset", "index", "table"])
def test_a_tensor_left_on_the_cpu_is_noticed(monkeypatch, where):
    twin = on_meta(torch.float64)
    if where == "offset":
        twin._evaluator._both._offset = torch.eye(N)[..., None]
        twin._evaluator._both._tiles = {}
    elif where == "index":
        twin._evaluator.forces.torsions._index[0] = torch.zeros(3, dtype=torch.long)
    else:
        table = next(t for t in twin._evaluator._both.formula.tables.values() if t.n_arguments == 1)
        table._copies = {(torch.float64, META): torch.zeros(4, 3, dtype=torch.float64)}
    with pytest.raises(RuntimeError):
        twin.evaluate(torch.from_numpy(FRAMES))


def test_a_look_at_a_number_is_noticed():
    twin = on_meta(torch.float64)
    twin.evaluate(torch.from_numpy(FRAMES))
    with pytest.raises(RuntimeError):
        _ = twin.n_nonfinite


def test_many_tiles_of_pairs_and_many_chunks_change_nothing(monkeypatch):
    """The sizes of another device, on the CPU."""
    twin = SystemTwin(SYSTEM, FRAMES[:2])
    energies, forces = twin.energies_and_forces(FRAMES)
    monkeypatch.setattr(pairs, "TILE", 10)
    monkeypatch.setattr(twin, "_chunk_size", lambda _: 3)
    twin.set_parameters({})  # which cuts the tiles anew
    for ours, theirs in zip(twin.energies_and_forces(FRAMES), (energies, forces), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-11)


def test_chunks_on_a_device_hold_many_frames_of_small_molecules_and_few_of_large_ones():
    twin = on_meta(torch.float32)
    sizes = {}
    for n in (0, 2, 22, 582, 10**6):
        twin.n_atoms = n
        sizes[n] = twin._chunk_size(10**6)
    assert sizes[0] == sizes[2] == 65_536 and sizes[582] == 2**20 // 582 and sizes[10**6] == 32


def small_memory(twin, monkeypatch, most):
    """Let evaluations of more than ``most`` frames run out of memory, after some work; batches asked for."""
    evaluate, asked = twin._evaluator.evaluate, []

    def limited(x, gradient):
        asked.append(x.shape[2])
        if x.shape[2] > most:
            if gradient is not None:
                gradient += 1.0
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate(x, gradient)

    monkeypatch.setattr(twin._evaluator, "evaluate", limited)
    return asked


def test_a_batch_larger_than_memory_is_halved(monkeypatch, caplog):
    twin = SystemTwin(SYSTEM, FRAMES[:2])
    energies, forces = twin.energies_and_forces(FRAMES)
    asked = small_memory(twin, monkeypatch, 3)
    twin.n_energies = twin.n_nonfinite = 0
    with caplog.at_level(logging.INFO, logger="openmm_bg"):
        for ours, theirs in zip(twin.energies_and_forces(FRAMES), (energies, forces), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-11)
    assert asked[0] == 11 and sum(count for count in asked if count <= 3) == 11
    assert twin.n_energies == 11 and twin.n_nonfinite == 0 and "halved" in caplog.text
    # The next batch starts with what has been found to fit, where chunks are made for memory.
    monkeypatch.setattr(twin, "device", META)
    assert twin._chunk_size(11) <= 3


def test_memory_for_no_frame_at_all_is_an_error(monkeypatch):
    twin = SystemTwin(SYSTEM, FRAMES[:2])
    small_memory(twin, monkeypatch, 0)
    with pytest.raises(EnergyError, match="does not hold one frame"):
        twin.energies(FRAMES)


def test_counts_are_kept_and_may_be_set():
    twin = SystemTwin(SYSTEM, FRAMES[:2])
    assert twin.n_energies == twin.n_nonfinite == 0
    frames = FRAMES.copy()
    frames[3, 2] = np.nan
    frames[5, 6] = frames[5, 1]
    twin.energies(frames), twin.energies_and_forces(FRAMES)
    assert (twin.n_energies, twin.n_nonfinite) == (21, 2)
    twin.n_energies = 7
    assert (twin.n_energies, twin.n_nonfinite) == (7, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [None, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_on_a_cuda_device(dtype, compile):
    twin = SystemTwin(SYSTEM, FRAMES[:4], dtype=dtype, device="cuda", compile=compile)
    assert twin.deviation.relative_energy < 1e-11 and twin.backend == ("triton" if compile is None else "torch")
    positions = torch.from_numpy(FRAMES).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        energies, forces = twin.evaluate(positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert energies.is_cuda and forces.is_cuda
    right, right_forces = SystemTwin(SYSTEM, FRAMES[:4]).energies_and_forces(FRAMES)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(energies.cpu().numpy(), right, rtol=tolerance, atol=tolerance)
    largest = np.abs(right_forces).max()
    np.testing.assert_allclose(forces.cpu().numpy(), right_forces, atol=tolerance * largest)


def test_unknown_devices_and_ways_to_compile_are_refused():
    with pytest.raises(InputError, match="compile must be"):
        SystemTwin(SYSTEM, FRAMES[:1], compile="cuda")
