"""Twins of real molecules, in both precisions; bad frames; and the same call as a pool's."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import warnings

import numpy as np
import pytest
import torch

from openmm_bg.energy import ContextPool, SystemTwin, reduced_energy, thermal_energy
from openmm_bg.energy.twin import triton_kernels
from openmm_bg.energy.twin.twin import ninther
from openmm_bg.errors import InputError

import openmm  # isort: skip
from openmm import app, unit  # isort: skip
from openmm.app.internal import customgbforces  # isort: skip

SOLVENTS = {
    "hct": customgbforces.GBSAHCTForce,
    "obc1": customgbforces.GBSAOBC1Force,
    "obc2": customgbforces.GBSAOBC2Force,
    "gbn": customgbforces.GBSAGBnForce,
    "gbn2": customgbforces.GBSAGBn2Force,
}


@pytest.fixture(scope="module")
def alanine():
    """Topology, System in vacuum and positions [22, 3] nm of alanine dipeptide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        from openmmtools.testsystems import AlanineDipeptideVacuum

        test = AlanineDipeptideVacuum(constraints=None)
        logging.disable(logging.NOTSET)
    return test.topology, test.system, np.array(test.positions.value_in_unit(unit.nanometer))


def jittered(x: np.ndarray, count: int, scale: float = 0.005, seed: int = 0) -> np.ndarray:
    return x + np.random.default_rng(seed).normal(scale=scale, size=(count, *x.shape))


def in_solvent(alanine, model: str, **options) -> openmm.System:
    """Alanine dipeptide with a generalised Born model from openmm.app."""
    topology, system, _ = alanine
    system = copy.deepcopy(system)
    solvent = SOLVENTS[model](**options)
    charges = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    for i, parameters in enumerate(solvent.getStandardParameters(topology)):
        solvent.addParticle([charges.getParticleParameters(i)[0], *parameters])
    solvent.finalize()
    system.addForce(solvent)
    return system


@pytest.mark.parametrize("options", [{}, {"SA": "ACE", "kappa": 1.0}], ids=["plain", "surface-salt"])
@pytest.mark.parametrize("model", SOLVENTS)
def test_solvents_of_openmm(alanine, model, options):
    frames = jittered(alanine[2], 4)
    twin = SystemTwin(in_solvent(alanine, model, **options), frames)
    assert twin.deviation.energy < 1e-10 and twin.deviation.relative_force < 1e-11
    gone = np.abs(twin.energies(frames) - SystemTwin(alanine[1], frames).energies(frames))
    assert gone.min() > 10.0, "the solvent hardly matters"


@pytest.fixture(scope="module")
def hp35():
    """Topology and positions [582, 3] nm of OpenMM's villin headpiece without water and ions."""
    pdb = app.PDBFile(os.path.join(os.path.dirname(app.__file__), "data", "test.pdb"))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete([r for r in modeller.topology.residues() if r.name in ("HOH", "Cl")])
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


@pytest.mark.parametrize(
    "files",
    [
        ("amber14-all.xml",),
        ("charmm36.xml",),
        ("amber14-all.xml", "implicit/obc1.xml"),
        ("amber14-all.xml", "implicit/gbn2.xml"),
    ],
    ids=["amber14", "charmm36", "obc1", "gbn2"],
)
def test_a_protein(hp35, files):
    system = app.ForceField(*files).createSystem(hp35[0], constraints=app.HBonds)
    if files == ("charmm36.xml",):
        assert any(isinstance(f, openmm.CMAPTorsionForce) and f.getNumTorsions() for f in system.getForces())
    twin = SystemTwin(system, jittered(hp35[1], 1), dtype=torch.float32)
    print(twin.deviation, "|", twin.deviation_in_use)
    assert twin.deviation.energy < 1e-8 and twin.deviation.relative_force < 1e-11
    # single precision of terms of 1e3 kJ/mol, a thousand of them
    assert 0.0 < twin.deviation_in_use.energy < 0.05 and twin.deviation_in_use.relative_force < 1e-4


def test_single_precision_far_from_the_origin(alanine):
    frames = jittered(alanine[2], 20)
    twin = SystemTwin(in_solvent(alanine, "obc1"), frames, dtype=torch.float32)
    assert twin.deviation_in_use.energy < 5e-3 and twin.deviation_in_use.relative_force < 1e-5
    here, there = twin.energies(frames), twin.energies(frames + 300.0)
    np.testing.assert_allclose(there, here, atol=5e-3)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("dtype, away", [(torch.float32, 1e4), (torch.float32, 1e6), (torch.float64, 1e14)])
def test_particles_far_away_spoil_no_other(alanine, dtype, away, count):
    """Free ones, as ions without a wall: the molecule's energy is as precise as without them."""
    system, rng = copy.deepcopy(alanine[1]), np.random.default_rng(0)
    charges = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    for k in range(count):
        system.addParticle(20.0), charges.addParticle(float(k == 0), 0.1, 0.5)
    frames = np.concatenate((jittered(alanine[2], 6), rng.normal(scale=3.0, size=(6, count, 3))), axis=1)
    twin = SystemTwin(system, frames[:2], dtype=dtype)
    frames[:, 22:] *= away
    alone = SystemTwin(alanine[1], frames[:2, :22])
    energies, forces = twin.energies_and_forces(frames)
    right, right_forces = alone.energies_and_forces(frames[:, :22])
    assert np.ptp(right) > 1.0
    # As precise as the other tests of one precision find the molecule alone, to which the charge is nothing.
    digits = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(energies, right, atol=digits * 500.0, rtol=0.0)
    np.testing.assert_allclose(forces[:, :22], right_forces, atol=digits * np.abs(right_forces).max(), rtol=0.0)


def test_a_ninther_is_among_the_middle_ones():
    x = torch.randn(200, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = ninther(x)
    assert found.shape == (200, 1, 3)
    rank = (x < found).sum(1)
    assert rank.min() >= 3 and rank.max() <= 5 and rank.unique().tolist() == [3, 4, 5]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("model", ["obc2", "gbn2"])
def test_solvents_in_triton(alanine, model, monkeypatch):
    """On a CUDA device if there is one, else in Triton's interpreter; in single precision, far from the origin too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(triton_kernels, "ROWS", 32)
    frames, system = jittered(alanine[2], 2), in_solvent(alanine, model, SA="ACE", kappa=1.0)
    twin = SystemTwin(system, frames, dtype=torch.float32, compile="triton", device=device)
    assert twin.backend == "triton"
    assert twin.deviation_in_use.energy < 5e-3 and twin.deviation_in_use.relative_force < 1e-5
    np.testing.assert_allclose(twin.energies(frames + 300.0), SystemTwin(system, frames).energies(frames), atol=5e-3)


# ---------------------------------------------------------------- bad frames


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["double", "single"])
def twin(request, alanine):
    return SystemTwin(in_solvent(alanine, "obc2"), jittered(alanine[2], 2), dtype=request.param)


def test_bad_frames_disturb_no_other(twin, alanine):
    frames = jittered(alanine[2], 150)
    good, good_forces = twin.energies_and_forces(frames)
    assert np.isfinite(good).all() and np.ptp(good) > 10.0
    mixed = frames.copy()
    bad = [0, 3, 70, 71, 149]
    for row, value in zip(bad, [np.nan, np.inf, -np.inf, 1e300, 1e19], strict=True):
        mixed[row, row % 22, row % 3] = value
    mixed[100, 3] = mixed[100, 15]  # two atoms on one spot
    mixed[101] = 0.0
    bad += [100, 101]
    twin.n_energies = twin.n_nonfinite = 0
    energies, forces = twin.energies_and_forces(mixed)
    assert np.all(energies[bad] == np.inf) and np.all(forces[bad] == 0.0)
    assert (twin.n_energies, twin.n_nonfinite) == (145, 7)
    rest = np.setdiff1d(np.arange(150), bad)
    np.testing.assert_array_equal(energies[rest], good[rest])
    np.testing.assert_array_equal(forces[rest], good_forces[rest])


def test_overflow_of_single_precision_is_infinite(alanine):
    frames = jittered(alanine[2], 2)
    system = alanine[1]
    exact = SystemTwin(system, frames)
    single = SystemTwin(system, frames, dtype=torch.float32)
    close = frames.copy()
    close[0, 4] = close[0, 16] + [2e-4, 0.0, 0.0]  # r^-12 is 2e44
    assert np.isfinite(exact.energies(close)).all() and exact.energies(close)[0] > 1e38
    energies, forces = single.energies_and_forces(close)
    assert energies[0] == np.inf and not forces[0].any()
    assert energies[1] == pytest.approx(exact.energies(close)[1], abs=1e-2)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
def test_batches_of_any_size(twin, alanine, count):
    frames = jittered(alanine[2], 130)
    energies, forces = twin.energies_and_forces(frames[:count])
    assert energies.shape == (count,) and forces.shape == (count, 22, 3)
    assert energies.dtype == forces.dtype == np.float64
    whole = twin.energies_and_forces(frames)
    np.testing.assert_allclose(energies, whole[0][:count], rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(twin.energies(frames[:count]), energies, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("shape", [(22, 3), (5, 21, 3), (5, 22, 2), (1, 5, 22, 3)])
def test_a_wrong_shape_is_refused(twin, shape):
    with pytest.raises(InputError, match=r"\[B, 22, 3\]"):
        twin.energies(np.zeros(shape))
    with pytest.raises(InputError, match=r"\[B, 22, 3\]"):
        twin.evaluate(torch.zeros(shape))


def test_positions_in_any_form_stay_as_they_are(twin, alanine):
    frames = jittered(alanine[2], 3)
    before = frames.copy()
    expected = twin.energies(frames)
    for form in (
        torch.tensor(frames, requires_grad=True),
        np.asfortranarray(frames),
        frames.tolist(),
        frames * unit.nanometer,
    ):
        np.testing.assert_allclose(twin.energies(form), expected, rtol=1e-12)
    np.testing.assert_array_equal(frames, before)


def test_a_twin_answers_as_a_pool_does(alanine):
    system, frames = in_solvent(alanine, "obc1"), jittered(alanine[2], 70)
    twin = SystemTwin(system, frames[:2])
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(frames[0])
    frames[5, 3] = np.nan
    frames[9, 3] = frames[9, 15]
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        for ours, theirs in zip(twin.energies_and_forces(frames), pool.energies_and_forces(frames), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-7)
        assert twin.n_nonfinite == pool.n_nonfinite and twin.n_energies == pool.n_energies


def test_a_twin_serves_reduced_energies_and_their_gradients(alanine):
    system, frames = in_solvent(alanine, "obc1"), jittered(alanine[2], 5)
    twin = SystemTwin(system, frames)
    x = torch.tensor(frames, requires_grad=True)
    u = reduced_energy(x, twin, 300.0)
    u.sum().backward()
    energies, forces = twin.energies_and_forces(frames)
    np.testing.assert_allclose(u.detach().numpy() * thermal_energy(300.0), energies, rtol=1e-14)
    np.testing.assert_allclose(x.grad.numpy() * -thermal_energy(300.0), forces, rtol=1e-14)


def test_forces_are_slopes_of_energies(alanine):
    """Without OpenMM: along a random direction, by differences."""
    frames = jittered(alanine[2], 3)
    twin = SystemTwin(in_solvent(alanine, "gbn2"), frames[:1])
    direction = np.random.default_rng(3).normal(size=frames.shape)
    step = 1e-6
    slope = (twin.energies(frames + step * direction) - twin.energies(frames - step * direction)) / (2 * step)
    found = -(twin.energies_and_forces(frames)[1] * direction).sum(axis=(1, 2))
    np.testing.assert_allclose(found, slope, rtol=1e-6)
