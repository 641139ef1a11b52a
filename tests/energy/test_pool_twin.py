"""A pool whose energies are those of the torch twin, and the choice of it."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading

import numpy as np
import pytest
import torch

from openmm_bg.energy import ContextPool, choices, memory, tune, tuning, twin_workers
from openmm_bg.energy.snapshot import read_state
from openmm_bg.energy.twin import kernels, nonbonded, twin
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Where this module's compiled loops lie."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_kept_choices(libraries, tmp_path, monkeypatch):
    """A cache folder of this module's own; choices are kept for one test each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(libraries))
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path / "own")
    return tmp_path / "own" / "choices"


@pytest.fixture
def spring():
    """Three particles: E = scale·k (r - 0.1)²/2 of the first two, and a weak repulsion of all pairs."""
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    force = openmm.CustomBondForce("0.5*scale*k*(r-0.1)^2")
    force.addGlobalParameter("scale", 1.0)
    force.addPerBondParameter("k")
    force.addBond(0, 1, [1000.0])
    system.addForce(force)
    system.addForce(openmm.CMMotionRemover())
    x = np.array([[0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.0, 0.5, 0.0]])
    return system, force, x


def at(length: float, n: int = 1) -> np.ndarray:
    frames = np.zeros((n, 3, 3))
    frames[:, 1, 0] = length
    frames[:, 2, 1] = 0.5
    return frames


def messages(caplog, level: int = logging.WARNING) -> list[str]:
    """What was said, but for the sentence that comes wherever there is no compiler."""
    said = [record.getMessage() for record in caplog.records if record.levelno >= level]
    return [message for message in said if "are not compiled" not in message]


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("own", PLATFORMS)
def test_same_numbers_as_contexts(make_context, frames, own):
    with (
        ContextPool(make_context("Reference"), platform="Reference", n_workers=1) as contexts,
        ContextPool(make_context(own), platform="twin", n_workers=2) as twin,
    ):
        assert (twin.platform, twin.n_workers, twin.n_atoms, twin.tuning) == ("twin", 2, 22, None)
        many = np.concatenate([frames] * 30)  # more than a chunk
        expected, expected_forces = contexts.energies_and_forces(many)
        assert np.ptp(expected) > 1.0
        energies, forces = twin.energies_and_forces(torch.tensor(many))
        only = twin.energies(many)
        assert twin.n_energies == 2 * len(many) and twin.n_nonfinite == 0
        twin.sync()
        assert twin.n_energies == 2 * len(many)  # a comparison is nobody's energy
        assert twin.energies(many[:0]).shape == (0,)
    assert energies.dtype == forces.dtype == np.float64
    np.testing.assert_allclose(energies, expected, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(only, expected, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(forces, expected_forces, rtol=1e-9, atol=1e-7)


def test_bad_frames_disturb_no_other(make_context, frames):
    with ContextPool(make_context(), platform="twin", n_workers=1) as twin:
        good, good_forces = twin.energies_and_forces(frames)
        mixed = frames.copy()
        bad = [0, 3, 4, 7, 12]
        for row, value in zip(bad, [np.nan, np.inf, -np.inf, 1e300, np.nan], strict=True):
            mixed[row, row % 22, row % 3] = value
        mixed[5, 3] = mixed[5, 9]  # two nonbonded atoms on one spot: evaluated, and not finite
        twin.n_energies = twin.n_nonfinite = 0
        energies, forces = twin.energies_and_forces(mixed)
        assert (twin.n_energies, twin.n_nonfinite) == (len(frames) - len(bad), len(bad) + 1)
        bad.append(5)
        rest = [row for row in range(len(frames)) if row not in bad]
        assert np.all(energies[bad] == np.inf) and not forces[bad].any()
        # Alone or with others in a vector: the same numbers, up to the order of sums.
        np.testing.assert_allclose(energies[rest], good[rest], rtol=1e-12)
        np.testing.assert_allclose(forces[rest], good_forces[rest], rtol=1e-9, atol=1e-9)
        only = twin.energies(np.full((2, 22, 3), np.nan))
        assert np.all(only == np.inf) and twin.n_energies == len(frames) - 5
        with pytest.raises(InputError, match=r"\[B, 22, 3\]"):
            twin.energies(frames[:, :5])


@pytest.mark.parametrize("count", [31, 32, 33, 100, 600])
def test_threads_share_a_batch_of_any_size(make_context, frames, count):
    many = np.concatenate([frames] * 50)[:count]
    with ContextPool(make_context(), platform="twin", n_workers=1) as twin:
        expected, expected_forces = twin.energies_and_forces(many)
        twin._workers.set_threads(3)
        energies, forces = twin.energies_and_forces(many)
        assert twin.n_workers == 3
    np.testing.assert_allclose(energies, expected, rtol=1e-13)
    np.testing.assert_allclose(forces, expected_forces, rtol=1e-10, atol=1e-9)


def test_end_of_a_pool(make_context, frames):
    before = threading.active_count()
    twin = ContextPool(make_context(), platform="twin", n_workers=2)
    twin.energies(np.concatenate([frames] * 50))
    assert threading.active_count() > before
    twin.close()
    twin.close()
    assert threading.active_count() == before
    with pytest.raises(EnergyError, match="closed"):
        twin.energies(frames)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_is_refused(make_context, frames, monkeypatch):
    with ContextPool(make_context(), platform="twin", n_workers=1) as twin:
        monkeypatch.setattr(twin_workers.os, "getpid", lambda: -1)
        with pytest.raises(EnergyError, match="fork"):
            twin.energies(frames)


# ------------------------------------------------------------------------------------------------ sync


@pytest.mark.parametrize("own", PLATFORMS)
def test_sync_follows_the_context(make_context, spring, own):
    system, force, x = spring
    context = make_context(own, system, x)
    context.setParameter("scale", 2.0)  # before the twin is made, too
    with ContextPool(context, platform="twin", n_workers=1) as twin:

        def energy():
            return pytest.approx(twin.energies(at(0.2))[0], rel=1e-9)

        assert energy() == 10.0
        context.setParameter("scale", 3.0)
        assert energy() == 10.0  # not before sync
        old = twin._workers
        twin.sync()
        assert energy() == 15.0 and twin._workers is old
        force.setBondParameters(0, 0, 1, [2000.0])
        force.updateParametersInContext(context)
        twin.sync()
        assert energy() == 30.0 and twin._workers is not old
        force.addGlobalParameter("other", 1.0)
        force.setEnergyFunction("0.5*scale*other*k*(r-0.1)^2")
        context.reinitialize(preserveState=True)
        context.setParameter("other", 0.5)
        twin.sync()
        assert energy() == 15.0
        assert twin.platform == "twin"


def test_a_change_that_was_not_pushed_leaves_the_contexts_energy(make_context, spring, caplog):
    system, force, x = spring
    context = make_context("Reference", system, x)
    with ContextPool(context, platform="twin", n_workers=1) as twin:
        force.setBondParameters(0, 0, 1, [2000.0])
        twin.sync()
        twin.sync()
        assert len([m for m in messages(caplog) if "without telling" in m]) == 1
        assert twin.energies(at(0.2))[0] == pytest.approx(5.0)
        force.updateParametersInContext(context)
        force.setBondParameters(0, 0, 1, [3000.0])
        # The Context has parameters that no System has any more.
        with pytest.raises(EnergyError, match=r"torch twin of the Context's System differs from the Context by 1\.25"):
            twin.sync()


def test_a_context_that_no_twin_can_follow_is_refused(make_context, spring):
    system, _, x = spring
    context = make_context("Reference", system, x)
    with ContextPool(context, platform="twin", n_workers=1) as twin:
        system.addForce(openmm.PythonForce(Flat()))
        context.reinitialize(preserveState=True)
        with pytest.raises(EnergyError, match="PythonForce"):
            twin.sync()


class Flat:
    def __call__(self, state):
        return 0.0, np.zeros((3, 3))


# ------------------------------------------------------------------------------------------------ where it cannot be


def periodic_system():
    system = openmm.System()
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(force.CutoffPeriodic)
    force.setCutoffDistance(0.9)
    for _ in range(3):
        system.addParticle(1.0)
        force.addParticle(0.0, 0.2, 1.0)
    system.setDefaultPeriodicBoxVectors((2, 0, 0), (0, 2, 0), (0, 0, 2))
    system.addForce(force)
    return system


def test_a_periodic_system_falls_back_to_contexts(make_context, caplog):
    context = make_context("Reference", periodic_system(), at(0.3)[0])
    with ContextPool(context, platform="Reference", n_workers=1) as plain:
        expected = plain.energies(at(0.35, 3))
    with ContextPool(context, platform="twin", n_workers=1) as fallen:
        assert fallen.platform in PLATFORMS and fallen.n_workers == 1
        np.testing.assert_allclose(fallen.energies(at(0.35, 3)), expected, rtol=1e-5)
    assert len(messages(caplog)) == 1
    assert "instead of a torch twin" in messages(caplog)[0] and "periodic" in messages(caplog)[0]
    caplog.clear()
    report = tune(context, n_workers=1, effort="full")
    assert report.rows[-1].platform == "twin" and report.rows[-1].frames_per_second is None
    assert "periodic" in report.rows[-1].note and "periodic" in str(report)
    assert report.chosen.platform in PLATFORMS
    assert not messages(caplog)
    with pytest.raises(EnergyError, match="periodic"):
        tune(context, platform="twin")


def test_a_twin_that_disagrees_gives_way_to_contexts(make_context, frames, caplog, monkeypatch):
    plain = twin_workers.TwinWorkers.group_energies

    def biased(self, positions):
        total, groups = plain(self, positions)
        return total + 1e-3, groups

    monkeypatch.setattr(twin_workers.TwinWorkers, "group_energies", biased)
    with ContextPool(make_context(), platform="twin", n_workers=1) as fallen:
        assert fallen.platform in PLATFORMS
        assert np.isfinite(fallen.energies(frames)).all()
    assert len(messages(caplog)) == 1
    assert "differs from the Context by 0.001" in messages(caplog)[0]


@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])
def test_a_system_too_large_for_memory_gives_way_to_contexts(context, caplog, monkeypatch, library):
    """As if its tables of all pairs were of 2^53 bytes, whoever allocates them."""
    monkeypatch.setattr(nonbonded, "upper", lambda _: library.empty(2**50, dtype=library.float64))
    x = context.getState(positions=True).getPositions(asNumpy=True)._value[None]
    with pytest.raises(EnergyError, match=r"^Memory is too small for a torch twin of the System \(.*allocate.*\)\.$"):
        twin_workers.TwinWorkers(context.getSystem(), read_state(context), 1)
    report = tune(context, effort="full")
    (row,) = [row for row in report.rows if row.platform == "twin"]
    assert row.frames_per_second is None and row.note.startswith("Memory is too small")
    assert report.chosen.platform in PLATFORMS
    with ContextPool(context, platform="twin") as pool:
        assert pool.platform in PLATFORMS and np.isfinite(pool.energies(x)).all()
    assert "instead of a torch twin: Memory is too small" in caplog.text


def test_tables_that_are_too_large_are_not_made(context, caplog, monkeypatch):
    """Memory that is promised and not there ends a process without an error: it is asked for first."""
    system = context.getSystem()
    n = system.getNumParticles()
    needed = twin.PAIR_BYTES * n**2 * sum(isinstance(force, twin.PAIR_FORCES) for force in system.getForces())
    monkeypatch.setattr(twin, "available_memory", lambda: needed)
    x = context.getState(positions=True).getPositions(asNumpy=True)._value[None]
    with ContextPool(context, platform="twin") as pool:  # they just fit
        assert pool.platform == "twin"
    monkeypatch.setattr(twin, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(nonbonded, "upper", None)  # nothing is allocated
    with ContextPool(context, platform="twin") as pool:
        assert pool.platform in PLATFORMS and np.isfinite(pool.energies(x)).all()
    assert f"instead of a torch twin: Tables for the pairs of {n} particles take" in caplog.text


def test_available_memory(tmp_path, monkeypatch):
    """What the kernel calls available, the limit of a control group, neither."""
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "LIMIT", limit)
    assert memory.available_memory() is None  # macOS, Windows
    limit.write_text("max\n")
    assert memory.available_memory() is None
    meminfo.write_text("MemTotal:       100 kB\nMemFree:         10 kB\nMemAvailable:    60 kB\n")
    assert memory.available_memory() == 60 * 1024
    limit.write_text("5000\n")
    assert memory.available_memory() == 5000
    meminfo.write_text("MemAvailable: much\n")
    assert memory.available_memory() == 5000


def test_an_inconsistent_context_is_refused(make_context, spring):
    system, force, x = spring
    context = make_context("Reference", system, x)
    force.setBondParameters(0, 0, 1, [2000.0])
    with pytest.raises(EnergyError, match="updateParametersInContext"):
        ContextPool(context, platform="twin", n_workers=1)


def test_without_a_compiler_it_works_in_torch(make_context, frames, caplog, monkeypatch):
    monkeypatch.setattr(kernels, "compiler", lambda: None)
    context = make_context()
    with ContextPool(context, platform="twin", n_workers=1) as twin:
        energies = twin.energies(frames)
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1 and "no C++ compiler" in caplog.text
    with ContextPool(context, platform="Reference", n_workers=1) as contexts:
        np.testing.assert_allclose(energies, contexts.energies(frames), rtol=1e-11)


def test_wrong_words_are_refused(make_context):
    context = make_context()
    with pytest.raises(InputError, match=r"name one of .*twin"):
        ContextPool(context, platform="Twin")
    with pytest.raises(InputError, match="'quick' or 'full', not 'best'"):
        ContextPool(context, tune="best")
    with pytest.raises(InputError, match="n_workers"):
        ContextPool(context, platform="twin", n_workers=0)


# ------------------------------------------------------------------------------------------------ tuning and its memory


@pytest.fixture
def twin_wins(monkeypatch):
    """Timing as if Contexts were slow, and counted."""
    plain, timed = tuning._rate, []

    def rate(workers, *arguments, **options):
        timed.append(workers.platform)
        found = plain(workers, *arguments, **options)
        return found if workers.platform == "twin" else 1e-3

    monkeypatch.setattr(tuning, "_rate", rate)
    monkeypatch.setattr(tuning, "TWIN_SECONDS", 0.05)
    return timed


def test_full_tuning_times_the_twin_and_a_pool_uses_it(make_context, frames, caplog, twin_wins, monkeypatch):
    made = []
    plain = twin_workers.TwinWorkers.__init__

    def count(self, *arguments):
        made.append(1)
        plain(self, *arguments)

    monkeypatch.setattr(twin_workers.TwinWorkers, "__init__", count)
    with (
        caplog.at_level(logging.INFO, logger="openmm_bg.energy.tuning"),
        ContextPool(make_context("CPU"), tune="full") as best,
    ):
        assert best.platform == "twin" and best.tuning is not None
        own = [row for row in best.tuning.rows if row.platform == "twin"]
        assert [row.n_workers for row in own] == tuning._counts(twin_workers.default_threads())
        assert best.tuning.chosen == max(own, key=lambda row: row.frames_per_second or 0.0)
        assert best.n_workers == best.tuning.chosen.n_workers == best._workers.twin.n_threads
        assert {row.platform for row in best.tuning.rows} == {*PLATFORMS, "twin"}
        assert np.isfinite(best.energies(frames)).all()
        assert len(made) == 1  # not once for timing and once for use
        assert str(best.tuning) in messages(caplog, logging.INFO) and "torch twin" in str(best.tuning)


def test_full_tuning_keeps_contexts_where_they_are_faster(make_context, monkeypatch):
    monkeypatch.setattr(tuning, "_rate", lambda workers, *a, **o: 1.0 if workers.platform == "twin" else 2.0)
    with ContextPool(make_context("CPU"), tune="full", n_workers=1) as best:
        assert best.platform in PLATFORMS


def test_a_kept_choice_is_taken_up(make_context, frames, caplog, twin_wins, no_kept_choices):
    context = make_context("CPU")
    chosen = tune(context, effort="full").chosen
    assert chosen.platform == "twin" and len(list(no_kept_choices.iterdir())) == 1
    twin_wins.clear()
    with (
        caplog.at_level(logging.INFO, logger="openmm_bg.energy"),
        ContextPool(make_context("Reference")) as again,
    ):
        assert (again.platform, again.n_workers) == ("twin", chosen.n_workers)
        assert again.tuning is not None and again.tuning.kept
        assert np.isfinite(again.energies(frames)).all()
    assert twin_wins == []  # nothing was timed
    assert len([m for m in messages(caplog, logging.INFO) if "earlier full tuning" in m]) == 1
    # What is named is tuned for, and another full tuning is one.
    assert tune(context, platform="Reference").chosen.platform == "Reference"
    assert not tune(context, n_workers=1).kept
    assert not tune(context, effort="full").kept
    with pytest.raises(InputError, match="time on"):
        tune(context, positions=np.full((2, 22, 3), np.inf))


@pytest.mark.parametrize(
    "change", ["system", "cores", "version", "compiler", "processor", "platforms", "broken", "gone"]
)
def test_a_kept_choice_holds_where_it_was_made(
    make_context, dipeptide, spring, twin_wins, no_kept_choices, monkeypatch, change
):
    context = make_context("Reference")
    assert tune(context, effort="full").chosen.platform == "twin"
    assert tune(context).kept
    (file,) = no_kept_choices.iterdir()
    if change == "system":
        system = openmm.XmlSerializer.clone(dipeptide[0])
        system.setParticleMass(0, 3.0)
        context = make_context("Reference", system)
    elif change == "cores":
        monkeypatch.setattr(choices, "usable_cores", lambda: list(range(77)))
    elif change == "version":
        monkeypatch.setattr(choices.torch, "__version__", "0.0")
    elif change == "compiler":
        monkeypatch.setattr(choices, "compiler", lambda: None if kernels.compiler() else "g++")
    elif change == "processor":
        monkeypatch.setattr(choices, "_processor", lambda: "another")
    elif change == "platforms":  # a choice of what is not there any more
        found = json.loads(file.read_text())
        found["choice"]["platform"] = "OpenCL on a card that was sold"
        file.write_text(json.dumps(found))
    elif change == "broken":
        file.write_text("{")
    else:
        file.unlink()
    report = tune(context)
    assert not report.kept and report.chosen.platform in PLATFORMS


@pytest.mark.parametrize("content", ["", "[]", '{"choice": {"platform": "twin", "n_workers": 0}}', "\x00"])
def test_a_broken_file_is_written_anew(make_context, twin_wins, no_kept_choices, caplog, content):
    context = make_context("Reference")
    tune(context, effort="full")
    (file,) = no_kept_choices.iterdir()
    file.write_text(content)
    assert not tune(context).kept
    tune(context, effort="full")
    assert tune(context).kept and list(no_kept_choices.iterdir()) == [file]
    assert not messages(caplog)


def test_a_folder_that_cannot_be_written_is_said(make_context, twin_wins, no_kept_choices, caplog):
    no_kept_choices.parent.mkdir()
    no_kept_choices.write_text("a file where the folder would be")
    with ContextPool(make_context("Reference"), tune="full") as best:
        assert best.platform == "twin"
    assert len(messages(caplog)) == 1 and "cannot be written" in messages(caplog)[0]
    assert not tune(make_context("Reference")).kept


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_said(make_context, twin_wins, no_kept_choices, caplog):
    no_kept_choices.mkdir(parents=True)
    no_kept_choices.chmod(stat.S_IRUSR | stat.S_IXUSR)
    tune(make_context("Reference"), effort="full")
    assert len(messages(caplog)) == 1 and "cannot be written" in messages(caplog)[0]


def test_choices_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices.keep_choice("digest", choices.Choice("Reference", 2, 10.0))
    assert choices.load_choice("digest") == choices.Choice("Reference", 2, 10.0)
    assert choices.load_choice("another") is None
    (file,) = tmp_path.rglob("*.json")
    assert kernels.cache_folder() in file.parents


def test_a_system_that_cannot_be_told_from_others_keeps_no_choice(make_context, twin_wins, no_kept_choices):
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    system.addForce(openmm.PythonForce(lambda state: (0.0, np.zeros((3, 3)))))
    report = tune(make_context("Reference", system, at(0.1)[0]), effort="full")
    assert "PythonForce" in report.rows[-1].note
    assert not no_kept_choices.exists()


def test_processes_of_one_training_share_the_cores(monkeypatch):
    monkeypatch.setattr(twin_workers, "usable_cores", lambda: list(range(8)))
    assert twin_workers.default_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert twin_workers.default_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert twin_workers.default_threads() == 1
