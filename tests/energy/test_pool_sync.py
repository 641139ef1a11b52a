"""`sync` follows the user's Context, or refuses."""

from __future__ import annotations

import contextlib
import logging
import os
import threading

import numpy as np
import pytest
import torch

import openmm  # isort: skip

from openmm_bg.energy import ContextPool
from openmm_bg.energy.snapshot import energy_tolerance, read_state
from openmm_bg.errors import EnergyError, InputError

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def at(*lengths: float) -> np.ndarray:
    frames = np.zeros((len(lengths), 2, 3))
    frames[:, 1, 0] = lengths
    return frames


@pytest.fixture(params=PLATFORMS)
def setup(request, make_context, pair):
    """Context, pool and force of two particles with E = scale·k (r - 0.1)²/2."""
    system, force, x = pair
    context = make_context(request.param, system, x)
    with ContextPool(context, platform=request.param, n_workers=2) as pool:
        yield context, pool, force


def energy(pool: ContextPool) -> float:
    """E(0.2 nm) = scale·k/200, the same from both clones."""
    values = pool.energies(at(*[0.2] * 32))
    assert np.ptp(values) == 0.0
    return pytest.approx(values[0], rel=1e-5)


def test_global_parameters(setup):
    context, pool, _ = setup
    assert energy(pool) == 5.0
    context.setParameter("scale", 3.0)
    assert energy(pool) == 5.0  # not before sync
    pool.sync()
    assert energy(pool) == 15.0


def test_box_vectors(make_context):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors((3, 0, 0), (0, 3, 0), (0, 0, 3))
    force = openmm.CustomBondForce("100*r")
    force.setUsesPeriodicBoundaryConditions(True)
    force.addBond(0, 1, [])
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(force)
    context = make_context("Reference", system, at(1.0)[0])
    with ContextPool(context, platform="Reference", n_workers=2) as pool:
        assert pool.energies(at(1.9))[0] == pytest.approx(110.0)
        context.setPeriodicBoxVectors((2, 0, 0), (0, 3, 0), (0, 0, 3))
        pool.sync()
        assert pool.energies(at(1.9))[0] == pytest.approx(10.0)


def test_force_parameters_that_were_pushed(setup):
    context, pool, force = setup
    old = pool._workers
    pool.sync()
    assert pool._workers is old  # nothing changed, nothing made
    force.setBondParameters(0, 0, 1, [2000.0])
    force.updateParametersInContext(context)
    pool.sync()
    assert energy(pool) == 10.0
    new = pool._workers
    assert new is not old
    pool.sync()
    assert pool._workers is new


def test_pushed_parameters_that_do_not_show_at_the_present_positions(setup):
    context, pool, force = setup
    context.setPositions(at(0.1)[0])  # energy and forces vanish whatever k is
    force.setBondParameters(0, 0, 1, [2000.0])
    force.updateParametersInContext(context)
    pool.sync()
    assert energy(pool) == 10.0


def test_a_reinitialised_context(setup):
    context, pool, force = setup
    force.setBondParameters(0, 0, 1, [4000.0])
    force.addGlobalParameter("other", 1.0)
    force.setEnergyFunction("0.5*scale*other*k*(r-0.1)^2")
    context.reinitialize(preserveState=True)
    context.setParameter("other", 0.5)
    pool.sync()
    assert energy(pool) == 10.0


def test_a_change_that_was_not_pushed_leaves_the_contexts_energy(setup, caplog):
    context, pool, force = setup
    force.setBondParameters(0, 0, 1, [2000.0])
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        pool.sync()
        pool.sync()
    assert len([r for r in caplog.records if "without telling" in r.getMessage()]) == 1
    assert energy(pool) == 5.0
    force.updateParametersInContext(context)
    pool.sync()
    assert energy(pool) == 10.0


def test_a_change_known_not_to_be_pushed_stays_out_where_it_does_not_show(setup, caplog):
    """Seen not to be the Context's once, it is not taken for the Context's later; pushed and visible, it is."""
    context, pool, force = setup
    seen = context.getState(positions=True).getPositions(asNumpy=True)._value
    hidden = np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]])  # at the minimum, where k has no energy
    force.setBondParameters(0, 0, 1, [2000.0])
    pool.sync()
    workers = pool._workers
    context.setPositions(hidden)
    pool.sync()
    assert pool._workers is workers and pool.generation == 0
    context.setPositions(seen)
    pool.sync()
    assert pool._workers is workers and energy(pool) == 5.0
    force.updateParametersInContext(context)
    pool.sync()
    assert pool.generation == 1 and energy(pool) == 10.0
    force.setBondParameters(0, 0, 1, [4000.0])  # another edit, pushed where it does not show
    force.updateParametersInContext(context)
    context.setPositions(hidden)
    with caplog.at_level(logging.INFO, logger="openmm_bg"):
        pool.sync()
    assert pool.generation == 2 and energy(pool) == 20.0
    assert any("has changed" in record.getMessage() for record in caplog.records)


def test_a_force_that_cannot_be_written_hides_no_other(setup):
    """A PythonForce around a lambda is not compared, but what is beside it is."""
    context, pool, force = setup
    system = context.getSystem()
    zeros = np.zeros((system.getNumParticles(), 3))
    system.addForce(openmm.PythonForce(lambda state: (0.0, zeros)))
    context.reinitialize(preserveState=True)
    pool.sync()
    generation = pool.generation
    force.setBondParameters(0, 0, 1, [4000.0])
    force.updateParametersInContext(context)
    context.setPositions(np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]))
    pool.sync()
    assert pool.generation == generation + 1 and energy(pool) == 20.0


def test_an_inconsistent_context_is_refused(setup):
    context, pool, force = setup
    force.setBondParameters(0, 0, 1, [2000.0])
    with pytest.raises(EnergyError, match=r"updateParametersInContext"):
        ContextPool(context, platform=pool.platform, n_workers=1)
    with pytest.raises(EnergyError, match=r"updateParametersInContext"):
        ContextPool(context)
    # The Context has parameters that no System has any more.
    force.updateParametersInContext(context)
    force.setBondParameters(0, 0, 1, [3000.0])
    with pytest.raises(EnergyError, match=r"differs from the Context by 1\.25"):
        pool.sync()


def test_particles_added(setup):
    context, pool, _ = setup
    context.getSystem().addParticle(1.0)
    context.reinitialize()
    context.setPositions(np.zeros((3, 3)) + np.arange(3)[:, None] * 0.1)
    with pytest.raises(EnergyError, match="3 particles instead of 2"):
        pool.sync()


def test_positions_must_be_usable(setup):
    context, pool, _ = setup
    context.reinitialize()  # forgets positions
    with pytest.raises(InputError, match="no positions"):
        pool.sync()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_sync_during_dynamics(make_context, frames, platform):
    context = make_context(platform)
    context.setVelocitiesToTemperature(300.0, 1)
    with ContextPool(context, platform=platform, n_workers=1) as pool:
        workers = pool._workers
        for _ in range(10):
            context.getIntegrator().step(50)
            pool.sync()
        assert pool._workers is workers


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_tolerance_covers_rounding_and_no_more(make_context, dipeptide, offset):
    """Reference and CPU differ by less than half the tolerance, and near the origin that is below 0.1 kT."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        x = dipeptide[1] + offset + rng.normal(scale=0.003, size=dipeptide[1].shape)
        ours, other = (read_state(make_context(p, positions=x)) for p in ("Reference", "CPU"))
        groups = np.array([ours.energy])
        tolerance = energy_tolerance(ours, groups, double=False, same_platform=False)
        assert abs(ours.energy - other.energy) < 0.5 * tolerance
        assert tolerance < 0.25 * (1 + offset)
        assert energy_tolerance(ours, groups, double=True, same_platform=True) < 1e-6


# ------------------------------------------------------------------------------------------------ from several threads


class Held:
    """Workers that stay in their next batch until they are told to go on; then they evaluate it."""

    def __init__(self, pool: ContextPool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        plain = pool._workers.evaluate

        def evaluate(*arguments, **options):
            if not self.begun.is_set():  # a twin's `group_energies` comes here too
                self.begun.set()
                assert self.go.wait(20)
            return plain(*arguments, **options)

        monkeypatch.setattr(pool._workers, "evaluate", evaluate)


def in_thread(function) -> tuple[threading.Thread, list[object]]:
    """A thread that calls a function, and what it returned or was told."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(function())
        except EnergyError as error:
            found.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, found


KINDS = {
    "threads": {"platform": "Reference"},
    "processes": {"platform": "Reference", "processes": True},
    "twin": {"platform": "twin"},
}


@pytest.fixture(params=KINDS)
def own_pool(request, make_context, pair):
    """Context, pool and force as `setup`, in workers of each kind."""
    system, force, x = pair
    context = make_context("Reference", system, x)
    with ContextPool(context, n_workers=1, **KINDS[request.param]) as pool:
        yield context, pool, force


def change_beside_a_batch(own_pool, monkeypatch, patience) -> tuple[list[object], list[object], bool]:
    """What a batch finds, what `sync` returns when a change is pushed beside it, and whether `sync` waited so long."""
    context, pool, force = own_pool
    held = Held(pool, monkeypatch)
    batch, energies = in_thread(lambda: pool.energies(at(0.2, 0.2)).tolist())
    assert held.begun.wait(20)
    force.setBondParameters(0, 0, 1, [2000.0])
    force.updateParametersInContext(context)
    sync, synced = in_thread(lambda: pool.sync()[1])
    sync.join(patience)
    waited = sync.is_alive()
    held.go.set()
    batch.join(20), sync.join(20)
    assert not (batch.is_alive() or sync.is_alive())
    return energies, synced, waited


def test_sync_waits_for_a_batch_of_another_thread(own_pool, monkeypatch):
    energies, synced, waited = change_beside_a_batch(own_pool, monkeypatch, 0.5)
    assert waited and energies == [[pytest.approx(5.0), pytest.approx(5.0)]]  # those of before
    assert synced == [pytest.approx(2.5)]
    assert own_pool[1].generation == 1 and own_pool[1].energies(at(0.2))[0] == pytest.approx(10.0)
    assert own_pool[1].n_energies == 3


def test_a_sync_that_did_not_wait_would_be_noticed(own_pool, monkeypatch):
    """It ends the workers that the batch is with."""
    monkeypatch.setattr(own_pool[1], "_turn", contextlib.nullcontext)
    energies, _, waited = change_beside_a_batch(own_pool, monkeypatch, 15.0)
    assert not waited and energies == ["The pool is closed: make another one."]


def test_a_pool_that_is_closed_while_it_follows_stays_closed(own_pool, monkeypatch):
    context, pool, force = own_pool
    force.setBondParameters(0, 0, 1, [2000.0])
    force.updateParametersInContext(context)
    plain, made = pool._make_workers, []

    def make(*arguments):
        made.append(plain(*arguments))
        pool.close()  # as another thread may
        return made[0]

    monkeypatch.setattr(pool, "_make_workers", make)
    with pytest.raises(EnergyError, match="was closed while it followed its Context"):
        pool.sync()
    with pytest.raises(EnergyError, match="closed"):
        made[0].evaluate(at(0.2), [0], forces=False)
    with pytest.raises(EnergyError, match="closed"):
        pool.energies(at(0.2))


def test_a_fork_amid_a_batch_is_told_at_once(own_pool, monkeypatch):
    """Its copy of the lock stays locked: the thread that would open it has stayed behind."""
    pool = own_pool[1]
    held = Held(pool, monkeypatch)
    batch, energies = in_thread(lambda: pool.energies(at(0.2)).tolist())
    assert held.begun.wait(20)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        for call in (lambda: pool.energies(at(0.2)), pool.sync, lambda: pool.evaluate_on_device(torch.tensor(at(0.2)))):
            thread, told = in_thread(call)
            thread.join(5)
            assert told == ["A pool does not survive a fork: make one in each process."]
    held.go.set()
    batch.join(20)
    assert energies == [[pytest.approx(5.0)]]
