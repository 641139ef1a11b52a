"""A pool gives what a plain loop over one Context gives, whatever else is in the batch."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import openmm  # isort: skip

from openmm_bg.energy import ContextPool
from openmm_bg.errors import EnergyError, InputError

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]

# Relative, between Contexts of one platform: double precision on Reference, single on CPU; others may also sum
# in another order.
TOLERANCE = {"Reference": 1e-12, "CPU": 1e-5}


def plain_loop(context: openmm.Context, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    energies, forces = [], []
    for frame in frames:
        context.setPositions(frame)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy()._value)
        forces.append(state.getForces(asNumpy=True)._value.copy())
    return np.array(energies), np.array(forces)


@pytest.mark.parametrize("n_workers", [1, 2, 3])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_equals_a_plain_loop_in_the_same_order(make_context, frames, platform, n_workers):
    tolerance = TOLERANCE.get(platform, 1e-4)
    expected, expected_forces = plain_loop(make_context(platform), frames)
    assert np.ptp(expected) > 1.0  # the frames can be told apart
    with ContextPool(make_context(platform), platform=platform, n_workers=n_workers) as pool:
        assert (pool.platform, pool.n_workers, pool.n_atoms) == (platform, n_workers, 22)
        assert pool.tuning is None
        energies, forces = pool.energies_and_forces(frames)
        only = pool.energies(frames)
    assert energies.dtype == forces.dtype == np.float64
    np.testing.assert_allclose(energies, expected, rtol=tolerance, atol=100 * tolerance)
    np.testing.assert_allclose(only, expected, rtol=tolerance, atol=100 * tolerance)
    np.testing.assert_allclose(forces, expected_forces, rtol=tolerance, atol=1e4 * tolerance)


def test_clones_of_another_platform_than_the_contexts(make_context, frames):
    expected, _ = plain_loop(make_context("Reference"), frames)
    with ContextPool(make_context("CPU"), platform="Reference", n_workers=1) as pool:
        np.testing.assert_allclose(pool.energies(frames), expected, rtol=1e-12)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bad_frames_disturb_no_other(make_context, frames, platform):
    with ContextPool(make_context(platform), platform=platform, n_workers=2) as pool:
        good, good_forces = pool.energies_and_forces(frames)
        mixed = frames.copy()
        bad = [0, 3, 4, 7, 12]
        for row, value in zip(bad, [np.nan, np.inf, -np.inf, 1e300, np.nan], strict=True):
            mixed[row, row % 22, row % 3] = value
        pool.n_energies = pool.n_nonfinite = 0
        energies, forces = pool.energies_and_forces(mixed)
        assert pool.n_nonfinite == len(bad)
        assert pool.n_energies == len(frames) - len(bad)
        rest = [row for row in range(len(frames)) if row not in bad]
        assert np.all(energies[bad] == np.inf)
        assert np.all(forces[bad] == 0.0)
        np.testing.assert_allclose(energies[rest], good[rest], rtol=1e-6)
        np.testing.assert_allclose(forces[rest], good_forces[rest], rtol=1e-4, atol=0.1)
        np.testing.assert_allclose(pool.energies(frames), good, rtol=1e-6)  # and nothing stays behind


@pytest.mark.parametrize("platform", PLATFORMS)
def test_energies_that_are_not_finite_count_as_infinite(make_context, frames, platform):
    clash = frames.copy()
    clash[5, 3] = clash[5, 9]  # two nonbonded atoms on one spot
    with ContextPool(make_context(platform), platform=platform, n_workers=1) as pool:
        good = pool.energies(frames)
        energies, forces = pool.energies_and_forces(clash)
        assert energies[5] == np.inf
        assert np.all(forces[5] == 0.0)
        assert pool.n_nonfinite == 1
        rest = np.arange(13) != 5
        np.testing.assert_allclose(energies[rest], good[rest], rtol=1e-6)


class Picky:
    """E = r² between two particles, but an error beyond 0.5 nm."""

    def __call__(self, state):
        x = state.getPositions(asNumpy=True)._value
        d = x[1] - x[0]
        if np.linalg.norm(d) > 0.5:
            raise ValueError("too far apart")
        return float(d @ d), np.array([2 * d, -2 * d])


@pytest.mark.parametrize("computation", [Picky(), lambda state: Picky()(state)], ids=["copied", "shared"])
def test_a_frame_at_which_openmm_raises(make_context, caplog, computation):
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(openmm.PythonForce(computation))
    extra = openmm.CustomBondForce("scale*r")
    extra.addGlobalParameter("scale", 0.0)
    extra.addBond(0, 1, [])
    system.addForce(extra)
    frames = np.zeros((6, 2, 3))
    frames[:, 1, 2] = [0.1, 0.9, 0.2, 0.8, 0.7, 0.3]
    context = make_context("Reference", system, frames[0])
    context.setParameter("scale", 5.0)
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        with caplog.at_level(logging.WARNING, logger="openmm_bg"):
            energies, forces = pool.energies_and_forces(frames)
            pool.energies(frames)
        # The Context that is made after an error has the parameters that its forerunner had.
        np.testing.assert_allclose(energies, [0.51, np.inf, 1.04, np.inf, np.inf, 1.59], rtol=1e-12)
        np.testing.assert_allclose(forces[:, 0, 2], [5.2, 0, 5.4, 0, 0, 5.6], rtol=1e-12)
        assert pool.n_nonfinite == 6
    assert len([r for r in caplog.records if "too far apart" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.float32),
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: torch.tensor(x),
        lambda x: torch.tensor(x, dtype=torch.float32, requires_grad=True),
        lambda x: torch.tensor(x.transpose(2, 0, 1).copy()).permute(1, 2, 0),
        lambda x: x.tolist(),
        lambda x: x * openmm.unit.nanometer,
    ],
    ids=["float32", "fortran", "strided", "tensor", "tensor32-grad", "permuted", "list", "quantity"],
)
def test_positions_in_any_form(make_context, frames, convert):
    before = frames.copy()
    with ContextPool(make_context(), platform="Reference", n_workers=1) as pool:
        energies, forces = pool.energies_and_forces(convert(frames))
        expected, expected_forces = pool.energies_and_forces(frames)
    # float32 positions: 1e-7 nm times forces of some 1e4 kJ/mol/nm on 22 atoms
    np.testing.assert_allclose(energies, expected, atol=0.05)
    np.testing.assert_allclose(forces, expected_forces, atol=2.0)
    np.testing.assert_array_equal(frames, before)


def test_empty_batch_and_single_frame(make_context, frames):
    with ContextPool(make_context(), platform="Reference", n_workers=2) as pool:
        energies, forces = pool.energies_and_forces(np.empty((0, 22, 3)))
        assert energies.shape == (0,) and forces.shape == (0, 22, 3)
        assert pool.energies(torch.empty(0, 22, 3)).shape == (0,)
        assert pool.energies(frames[:1]).shape == (1,)


@pytest.mark.parametrize("shape", [(22, 3), (5, 21, 3), (5, 22, 2), (5, 66), (1, 5, 22, 3)])
def test_a_wrong_shape_is_refused(make_context, shape):
    with ContextPool(make_context(), platform="Reference", n_workers=1) as pool:
        with pytest.raises(InputError, match=r"\[B, 22, 3\]"):
            pool.energies(np.zeros(shape))
        with pytest.raises(InputError, match=r"\[B, 22, 3\]"):
            pool.energies([["a"], ["b"]])


def test_wrong_arguments_are_refused(make_context, dipeptide):
    context = make_context()
    with pytest.raises(InputError, match="Reference"):
        ContextPool(context, platform="Abacus")
    for n_workers in (0, -1, 1.5, True, "2"):
        with pytest.raises(InputError, match="n_workers"):
            ContextPool(context, n_workers=n_workers)
    with pytest.raises(InputError, match="time on"):
        ContextPool(context, positions=np.full((1, 22, 3), np.nan))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_context_without_usable_positions_is_refused(dipeptide, make_context, platform):
    system, x = dipeptide
    unset = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    with pytest.raises(InputError, match="no positions"):
        ContextPool(unset, platform=platform, n_workers=1)
    bad = x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        ContextPool(make_context(platform, positions=bad), platform=platform, n_workers=1)
    clash = x.copy()
    clash[3] = clash[9]
    with pytest.raises(InputError, match="potential energy"):
        ContextPool(make_context(platform, positions=clash), platform=platform, n_workers=1)


def test_the_users_context_is_untouched(make_context, frames):
    context = make_context("Reference")
    context.setVelocitiesToTemperature(300.0, 1)
    context.getIntegrator().step(3)
    everything = dict(positions=True, velocities=True, forces=True, energy=True, parameters=True)

    def picture() -> str:
        return openmm.XmlSerializer.serialize(context.getState(**everything))

    before, step, time = picture(), context.getStepCount(), context.getTime()
    with ContextPool(context) as pool:
        pool.energies_and_forces(frames)
        pool.sync()
    assert (picture(), context.getStepCount(), context.getTime()) == (before, step, time)


def test_a_closed_pool_says_so(make_context, frames):
    pool = ContextPool(make_context(), platform="Reference", n_workers=2)
    pool.close()
    pool.close()
    with pytest.raises(EnergyError, match="closed"):
        pool.energies(frames)
