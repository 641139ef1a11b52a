"""Clones with GBSAOBCForce in the place of an equal CustomGBForce: verified, timed, and followed by `sync`."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg.energy import ContextPool, implicit_solvent, snapshot, tune, tuning
from openmm_bg.energy.workers import Workers
from openmm_bg.errors import EnergyError

import openmm  # isort: skip
from openmm.app.internal import customgbforces  # isort: skip

RADII = {1: 0.12, 12: 0.17, 14: 0.155, 16: 0.15}


def solvate(system: openmm.System, kind: type = customgbforces.GBSAOBC2Force) -> openmm.System:
    """A copy of a System in vacuum with an implicit solvent as OpenMM's own force fields write it."""
    copied = copy.deepcopy(system)
    nonbonded = next(f for f in copied.getForces() if isinstance(f, openmm.NonbondedForce))
    force = kind(SA="ACE")
    for i in range(system.getNumParticles()):
        charge = nonbonded.getParticleParameters(i)[0]._value
        radius = RADII[round(system.getParticleMass(i)._value)]
        force.addParticle([charge, radius, 0.8])
    force.finalize()
    force.setForceGroup(2)
    copied.addForce(force)
    return copied


def solvent(system: openmm.System) -> openmm.CustomGBForce:
    return next(f for f in system.getForces() if isinstance(f, openmm.CustomGBForce))


@pytest.fixture
def obc2(dipeptide) -> openmm.System:
    return solvate(dipeptide[0])


def plain_loop(context: openmm.Context, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    energies, forces = [], []
    for frame in frames:
        context.setPositions(frame)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy()._value)
        forces.append(state.getForces(asNumpy=True)._value.copy())
    return np.array(energies), np.array(forces)


def said(caplog, words: str, level: int = logging.INFO) -> int:
    return len([r for r in caplog.records if words in r.getMessage() and r.levelno == level])


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_clones_have_the_equal_force_and_the_same_energies(
    make_context, dipeptide, frames, obc2, platform, processes, caplog
):
    expected, expected_forces = plain_loop(make_context("Reference", obc2), frames)
    vacuum, _ = plain_loop(make_context("Reference"), frames)
    assert np.all(np.abs(expected - vacuum) > 10.0)  # the solvent counts
    context = make_context(platform, obc2)
    with (
        caplog.at_level(logging.INFO, logger="openmm_bg"),
        ContextPool(context, platform=platform, n_workers=2, processes=processes) as pool,
    ):
        assert pool.equal_solvent and pool.tuning is None
        energies, forces = pool.energies_and_forces(frames)
        pool.sync()
    exact = platform == "Reference"
    np.testing.assert_allclose(energies, expected, rtol=1e-10 if exact else 1e-5, atol=1e-8 if exact else 5e-3)
    np.testing.assert_allclose(forces, expected_forces, rtol=1e-8 if exact else 1e-3, atol=1e-6 if exact else 0.5)
    assert said(caplog, "has an equal, faster form") == 1
    assert isinstance(solvent(context.getSystem()), openmm.CustomGBForce)  # the user's System stays


def test_what_the_clones_hold(make_context, obc2, frames):
    def kinds(pool: ContextPool) -> set[str]:
        system = pool._workers._run(lambda clone: clone.context.getSystem(), 1)[0]
        return {type(force).__name__ for force in system.getForces()}

    context = make_context("Reference", obc2)
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        assert "GBSAOBCForce" in kinds(pool) and "CustomGBForce" not in kinds(pool)
        equal = pool.energies(frames)
        # What the two forms may differ by in double precision is far below what any other model would.
        assert pool._slack < 1e-6
    with ContextPool(context, platform="Reference", n_workers=1, equal_solvent=False) as pool:
        assert "CustomGBForce" in kinds(pool) and "GBSAOBCForce" not in kinds(pool)
        assert not pool.equal_solvent
        np.testing.assert_allclose(pool.energies(frames), equal, rtol=1e-10)


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("most, count", [(22, 2), (21, 1)])
def test_a_large_system_is_verified_on_one_frame_and_no_form_twice(
    make_context, obc2, caplog, monkeypatch, request, most, count, spoil
):
    if spoil:
        request.getfixturevalue("spoiled")
    evaluated = []

    def make(system: openmm.System) -> openmm.Context:
        evaluated.append({type(force).__name__ for force in system.getForces()})
        return snapshot.make_context(system)

    monkeypatch.setattr(tuning, "TWO_FRAMES", most)
    monkeypatch.setattr(implicit_solvent, "make_context", make)
    with (
        caplog.at_level(logging.INFO, logger="openmm_bg"),
        ContextPool(make_context("Reference", obc2), platform="Reference", n_workers=1) as pool,
    ):
        assert pool.equal_solvent != spoil
    assert evaluated == [{"CustomGBForce"}, {"GBSAOBCForce"}]
    frames, level = f"on {count} frame{'s' * (count > 1)}", logging.WARNING if spoil else logging.INFO
    assert said(caplog, f"{frames}." if spoil else f"{frames} energies", level) == 1


def test_sync_follows_parameters_that_were_pushed(make_context, obc2, frames, caplog):
    context = make_context("Reference", obc2)
    force = solvent(obc2)
    with (
        caplog.at_level(logging.INFO, logger="openmm_bg"),
        ContextPool(context, platform="Reference", n_workers=1) as pool,
    ):
        old = pool.energies(frames)
        for i in range(22):
            charge, radius, scaled = force.getParticleParameters(i)
            force.setParticleParameters(i, [1.3 * charge, radius, scaled])
        force.updateParametersInContext(context)
        assert said(caplog, "has an equal, faster form") == 1
        pool.sync()
        assert said(caplog, "has an equal, faster form") == 2  # verified once more
        assert pool.equal_solvent
        new = pool.energies(frames)
        expected, _ = plain_loop(make_context("Reference", obc2), frames)
    assert np.all(np.abs(new - old) > 1.0)
    np.testing.assert_allclose(new, expected, rtol=1e-10)


def test_sync_follows_a_context_with_another_model(make_context, dipeptide, obc2, frames, caplog):
    context = make_context("Reference", obc2)
    system = context.getSystem()
    other = solvate(dipeptide[0], customgbforces.GBSAOBC1Force)
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        index = next(i for i, f in enumerate(system.getForces()) if isinstance(f, openmm.CustomGBForce))
        system.removeForce(index)
        system.addForce(copy.deepcopy(solvent(other)))
        context.reinitialize(preserveState=True)
        with caplog.at_level(logging.INFO, logger="openmm_bg"):
            pool.sync()
        assert not pool.equal_solvent
        assert said(caplog, "is evaluated as it is: its Born radius") == 1
        expected, _ = plain_loop(make_context("Reference", system), frames)
        np.testing.assert_allclose(pool.energies(frames), expected, rtol=1e-12)


def test_another_model_stays(make_context, dipeptide, frames, caplog):
    system = solvate(dipeptide[0], customgbforces.GBSAOBC1Force)
    context = make_context("Reference", system)
    with (
        caplog.at_level(logging.INFO, logger="openmm_bg"),
        ContextPool(context, platform="Reference", n_workers=1) as pool,
    ):
        assert not pool.equal_solvent and said(caplog, "is evaluated as it is: its Born radius") == 1
        expected, _ = plain_loop(context, frames)
        np.testing.assert_allclose(pool.energies(frames), expected, rtol=1e-12)
    assert not any(row.equal_solvent for row in tune(context, n_workers=1).rows)


@pytest.fixture
def spoiled(monkeypatch):
    """A GBSAOBCForce that is not quite the CustomGBForce."""
    plain = implicit_solvent.equal_gbsa_force

    def wrong(force):
        equal = plain(force)
        equal.setSolventDielectric(78.3)
        return equal

    monkeypatch.setattr(implicit_solvent, "equal_gbsa_force", wrong)


def test_a_form_that_differs_is_not_used(make_context, obc2, frames, caplog, spoiled):
    context = make_context("Reference", obc2)
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        assert not pool.equal_solvent
        expected, _ = plain_loop(context, frames)
        np.testing.assert_allclose(pool.energies(frames), expected, rtol=1e-12)
    assert said(caplog, "the built-in force differs", logging.WARNING) == 1


def test_a_form_that_differs_unnoticed_is_caught_by_the_context(make_context, obc2, spoiled, monkeypatch):
    monkeypatch.setattr(implicit_solvent, "agreement", lambda *_: implicit_solvent.Agreement(0.0, 0.0, 0.0, 2))
    with pytest.raises(EnergyError, match="differs from the Context by"):
        ContextPool(make_context("Reference", obc2), platform="Reference", n_workers=1)


def test_both_forms_are_timed_and_the_faster_is_kept(make_context, obc2, frames, monkeypatch, no_kept_choices):
    report = tune(make_context("Reference", obc2), n_workers=1)
    assert [(row.platform, row.equal_solvent) for row in report.rows][:2] == [("Reference", True), ("Reference", False)]
    assert report.chosen.equal_solvent  # several times faster, whatever else the machine does
    assert "GBSAOBCForce in the place of the equal CustomGBForce" in str(report)

    def rate(workers, *_, **__):
        assert isinstance(workers, Workers)
        system = workers._run(lambda clone: clone.context.getSystem(), 1)[0]
        custom = any(isinstance(force, openmm.CustomGBForce) for force in system.getForces())
        return 100.0 if custom == slow_equal else 50.0

    monkeypatch.setattr(tuning, "_rate", rate)
    monkeypatch.setattr(tuning, "_time_twin", lambda *_: ([], None))
    monkeypatch.setattr(tuning, "default_threads", lambda: 1)
    for slow_equal in (True, False):
        with ContextPool(make_context("Reference", obc2), tune="full", positions=frames) as pool:
            assert pool.equal_solvent is not slow_equal
        [kept] = no_kept_choices.iterdir()
        assert json.loads(kept.read_text())["choice"]["equal_solvent"] is not slow_equal
        with ContextPool(make_context("Reference", obc2)) as pool:
            assert pool.tuning is not None and pool.tuning.kept
            assert pool.equal_solvent is not slow_equal
    before = kept.read_text()
    with ContextPool(make_context("Reference", obc2), tune="full", equal_solvent=False) as pool:
        assert not pool.equal_solvent
    assert kept.read_text() == before  # a tuning that may not try everything decides for nobody else


def test_a_system_that_cannot_be_copied(make_context, obc2, frames):
    obc2.addForce(openmm.PythonForce(lambda state: (0.0, np.zeros((22, 3)))))
    context = make_context("Reference", obc2)
    with ContextPool(context, platform="Reference", n_workers=1) as pool:
        assert not pool.equal_solvent
        expected, _ = plain_loop(make_context("Reference", obc2), frames)
        np.testing.assert_allclose(pool.energies(frames), expected, rtol=1e-12)
