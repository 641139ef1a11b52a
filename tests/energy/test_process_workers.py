"""Worker processes of a pool: the same numbers as threads, and no process that outlives its parent."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg.energy import ContextPool, choices, process_workers, tune, tuning
from openmm_bg.energy.process_workers import ProcessWorkers
from openmm_bg.energy.snapshot import read_state
from openmm_bg.energy.workers import Workers, usable_cores
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

pytestmark = pytest.mark.skipif(os.name != "posix", reason="worker processes need a POSIX system")


def pids(pool: ContextPool) -> list[int]:
    return [process._popen.pid for process in pool._workers._shared.processes]


def gone(pid: int) -> bool:
    """Whether a process has ended; what nobody has collected yet has ended too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(found: list[int], seconds: float = 5.0) -> bool:
    deadline = time.perf_counter() + seconds
    while not all(map(gone, found)) and time.perf_counter() < deadline:
        time.sleep(0.01)
    return all(map(gone, found))


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_same_numbers_as_threads(make_context, frames, platform, monkeypatch):
    # Four frames at a time, so that a batch goes in several parts.
    monkeypatch.setattr(process_workers, "MEMORY", 4 * 8 * (6 * 22 + 1))
    mixed = frames.copy()
    mixed[3, 5, 1] = np.nan
    mixed[7, 3] = mixed[7, 9]  # two atoms on one spot: evaluated, and not finite
    with (
        ContextPool(make_context(platform), platform=platform, n_workers=1) as threads,
        ContextPool(make_context(platform), platform=platform, n_workers=3, processes=True) as processes,
    ):
        assert (processes.processes, processes.n_workers, processes.platform) == (True, 3, platform)
        assert not threads.processes
        assert processes._workers._layout.capacity == 12  # at least four for each process
        for batch in (frames, mixed, frames[:1], mixed[3:4], frames[:0], np.concatenate([mixed] * 5)):
            expected, expected_forces = threads.energies_and_forces(batch)
            energies, forces = processes.energies_and_forces(batch)
            only = processes.energies(batch)
            np.testing.assert_allclose(energies, expected, rtol=1e-6)
            np.testing.assert_allclose(only, expected, rtol=1e-6)
            np.testing.assert_allclose(forces, expected_forces, rtol=1e-4, atol=0.05)
            if platform == "Reference":
                np.testing.assert_array_equal(energies, expected)
        assert (processes.n_energies, processes.n_nonfinite) == (2 * threads.n_energies, 2 * threads.n_nonfinite)
        assert threads.n_nonfinite > 0 and np.ptp(threads.energies(frames)) > 1.0


def test_results_belong_to_the_caller(make_context, frames):
    with ContextPool(make_context(), platform="Reference", n_workers=1, processes=True) as pool:
        first, first_forces = pool.energies_and_forces(frames)
        kept, kept_forces = first.copy(), first_forces.copy()
        pool.energies_and_forces(frames[::-1] + 0.01)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first_forces, kept_forces)


def test_sync_follows_the_context(make_context, pair):
    system, force, x = pair
    context = make_context("Reference", system, x)
    at = np.repeat(np.array([[[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]]]), 32, axis=0)
    with ContextPool(context, platform="Reference", n_workers=2, processes=True) as pool:
        assert pool.energies(at) == pytest.approx(np.full(32, 5.0))
        context.setParameter("scale", 3.0)
        old = pool._workers, pids(pool)
        pool.sync()
        assert pool._workers is old[0]
        assert pool.energies(at) == pytest.approx(np.full(32, 15.0))
        force.setBondParameters(0, 0, 1, [2000.0])
        force.updateParametersInContext(context)
        pool.sync()
        assert pool.energies(at) == pytest.approx(np.full(32, 30.0))
        assert pool._workers is not old[0] and pool.processes and all_gone(old[1])


def test_box_and_force_groups(make_context):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors((3, 0, 0), (0, 3, 0), (0, 0, 3))
    for group, text in ((0, "100*r"), (5, "-99*r")):
        force = openmm.CustomBondForce(text)
        force.setUsesPeriodicBoundaryConditions(True)
        force.addBond(0, 1, [])
        force.setForceGroup(group)
        system.addForce(force)
    for _ in range(2):
        system.addParticle(1.0)
    x = np.array([[0.0, 0, 0], [1.9, 0, 0]])
    context = make_context("Reference", system, x)
    with ContextPool(context, platform="Reference", n_workers=1, processes=True) as pool:
        assert pool.energies(x[None])[0] == pytest.approx(1.1)
        context.setPeriodicBoxVectors((2, 0, 0), (0, 3, 0), (0, 0, 3))
        pool.sync()
        assert pool.energies(x[None])[0] == pytest.approx(0.1)
        total, groups = pool._workers.group_energies(x)
        assert total == pytest.approx(0.1) and groups == pytest.approx([10.0, -9.9])


def test_a_frame_at_which_openmm_raises(make_context):
    system, force = openmm.System(), openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    for _ in range(2):
        system.addParticle(1.0)
        force.addParticle(0.0, 0.1, 0.0)
    extra = openmm.CustomBondForce("scale*r")
    extra.addGlobalParameter("scale", 0.0)
    extra.addBond(0, 1, [])
    for added in (force, extra):
        system.addForce(added)
    batch = np.zeros((6, 2, 3))
    batch[:, 1, 2] = [0.1, np.nan, 0.2, np.nan, np.nan, 0.3]  # a pool would not send these: its CPU platform raises
    context = make_context("CPU", system, batch[0])
    context.setParameter("scale", 5.0)
    workers = ProcessWorkers(system, "CPU", {"Threads": "1"}, 2)
    try:
        workers.apply(read_state(context))
        energies, forces = workers.evaluate(batch, list(range(6)), forces=True)
        # The Context that is made after an error has the parameters that its forerunner had.
        np.testing.assert_allclose(energies, [0.5, np.inf, 1.0, np.inf, np.inf, 1.5], rtol=1e-5)
        np.testing.assert_allclose(forces[[0, 2, 5], 0, 2], 5.0, rtol=1e-5)
        assert "NaN" in workers.failure
    finally:
        workers.close()


def test_what_cannot_be_sent_is_refused(make_context, dipeptide, frames, monkeypatch):
    with pytest.raises(openmm.OpenMMException, match="Abacus"):
        ProcessWorkers(dipeptide[0], "Abacus", {}, 1)
    with pytest.raises(InputError, match="processes are for Contexts"):
        ContextPool(make_context(), platform="twin", processes=True)
    workers = ProcessWorkers(dipeptide[0], "Reference", {}, 1)
    with pytest.raises(TypeError, match=r"\[B, 22, 3\]"):
        workers.evaluate(frames[:, :5], [0], forces=True)
    workers.close()

    def fail(system):
        raise ValueError("It has no text.")

    monkeypatch.setattr(openmm.XmlSerializer, "serialize", fail)
    with pytest.raises(EnergyError, match=r"cannot have this System \(It has no text\): let threads do the work\.$"):
        ProcessWorkers(dipeptide[0], "Reference", {}, 1)


def energy_and_forces(state):
    """What a PythonForce may call; unlike a lambda, it can be pickled."""
    return 0.0, np.zeros((2, 3))


def with_python_force(where: str) -> openmm.System:
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    force = openmm.PythonForce((lambda state: energy_and_forces(state)) if where == "lambda" else energy_and_forces)
    if where == "collective variable":
        outer = openmm.CustomCVForce("a")
        outer.addCollectiveVariable("a", openmm.PythonForce(energy_and_forces))
        force = outer
    elif where == "alchemical":
        outer = openmm.ATMForce("u0")
        outer.addForce(openmm.PythonForce(energy_and_forces))
        force = outer
    system.addForce(force)
    return system


PYTHON_FORCE = r"^Worker processes cannot evaluate a PythonForce: let threads do the work\.$"


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="this OpenMM has no PythonForce")
@pytest.mark.parametrize("where", ["function", "lambda", "collective variable", "alchemical"])
def test_a_python_force_stays_in_this_process(where, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a process was started")

    monkeypatch.setattr(process_workers, "_Process", refuse)
    with pytest.raises(EnergyError, match=PYTHON_FORCE):
        ProcessWorkers(with_python_force(where), "Reference", {}, 1)


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="this OpenMM has no PythonForce")
def test_a_python_force_in_pools_and_tuning(make_context, rates):
    context = make_context("Reference", with_python_force("lambda"), np.zeros((2, 3)))
    for platform in ("Reference", None):
        with pytest.raises(EnergyError, match=PYTHON_FORCE):
            ContextPool(context, platform=platform, n_workers=1, processes=True)
    report = tune(context, effort="full")
    [row] = [row for row in report.rows if row.processes]
    assert row.note == PYTHON_FORCE[1:-3] and row.frames_per_second is None and not report.chosen.processes
    with ContextPool(context, tune="full") as pool:
        assert not pool.processes and np.isfinite(pool.energies(np.zeros((3, 2, 3)))).all()


@pytest.mark.parametrize("how", ["frozen", "no program", "wrong program"])
def test_where_no_process_can_be_started(dipeptide, monkeypatch, tmp_path, how):
    if how == "frozen":  # an application with Python inside would start itself again
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(
        sys, "executable", {"frozen": sys.executable, "no program": ""}.get(how, str(tmp_path / "no-python"))
    )
    with pytest.raises(EnergyError, match=r"interpreter as a program|cannot be started"):
        ProcessWorkers(dipeptide[0], "Reference", {}, 1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be pinned here")
def test_processes_are_pinned_and_the_caller_is_not(make_context, frames):
    before = os.sched_getaffinity(0)
    with ContextPool(make_context("CPU"), platform="CPU", n_workers=3, processes=True) as pool:
        pool.energies(frames)
        assert os.sched_getaffinity(0) == before
        cores = sorted(before)
        assert [os.sched_getaffinity(pid) for pid in pids(pool)] == [{cores[i % len(cores)]} for i in range(3)]


# ------------------------------------------------------------------------------------------------ ends


def test_ends_and_leaves_nothing(make_context, frames):
    context = make_context()
    ContextPool(context, platform="Reference", n_workers=1, processes=True).close()
    gc.collect()  # what earlier tests have dropped goes now, not below
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    pool = ContextPool(context, platform="Reference", n_workers=2, processes=True)
    found = pids(pool)
    pool.energies(frames)
    pool.close()
    pool.close()
    assert all_gone(found, 0.0)  # close waits for them
    with pytest.raises(EnergyError, match="closed"):
        pool.energies(frames)
    dropped = ContextPool(context, platform="Reference", n_workers=2, processes=True)
    found = pids(dropped)
    assert not any(map(gone, found))
    del dropped, pool
    gc.collect()
    assert all_gone(found, 0.0)
    if files:
        assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("when", ["idle", "busy"])
def test_a_process_that_is_killed_is_an_error_and_no_hang(make_context, frames, when):
    pool = ContextPool(make_context(), platform="Reference", n_workers=2, processes=True)
    found = pids(pool)
    many = np.concatenate([frames] * (1 if when == "idle" else 20000))  # seconds
    killer = threading.Timer(0.0 if when == "idle" else 0.4, os.kill, [found[1], signal.SIGKILL])
    killer.start()
    if when == "idle":
        killer.join()
    started = time.perf_counter()
    with pytest.raises(EnergyError, match=r"A worker process of the pool ended \(SIGKILL\): make another pool"):
        pool.energies(many)
    assert time.perf_counter() - started < 20.0  # on a busy machine, too
    assert all_gone(found)
    with pytest.raises(EnergyError, match="closed"):
        pool.energies(frames)


@pytest.mark.parametrize("closed", [True, False])
def test_processes_that_stop_early_leave_no_old_energies(dipeptide, frames, monkeypatch, closed):
    """What `close` tells them while they work; they answer as ever."""
    workers = ProcessWorkers(dipeptide[0], "Reference", {}, 2)
    rows = list(range(len(frames)))
    old, _ = workers.evaluate(frames, rows, forces=False)
    assert np.isfinite(old).all()
    plain = workers._call

    def stop(orders):
        if orders[0]["do"] == "evaluate":
            workers._shared.memory[0] = 1
        answers = plain(orders)
        if closed:
            workers.close()
        return answers

    monkeypatch.setattr(workers, "_call", stop)
    message = "The pool was closed while it evaluated energies" if closed else "left out frames of a batch"
    with pytest.raises(EnergyError, match=message):
        workers.evaluate(frames + 0.01, rows, forces=False)
    with pytest.raises(EnergyError, match="closed"):
        workers.evaluate(frames, rows, forces=False)


def test_closed_by_another_thread(make_context, frames):
    pool = ContextPool(make_context(), platform="Reference", n_workers=2, processes=True)
    found: list[object] = []

    def work() -> None:
        try:
            found.append(pool.energies(np.concatenate([frames] * 10000)))  # seconds
        except EnergyError as error:
            found.append(str(error))

    before = pool._workers._number
    caller = threading.Thread(target=work)
    caller.start()
    deadline = time.perf_counter() + 10.0
    while pool._workers._number == before and time.perf_counter() < deadline:  # until the command is given
        time.sleep(0.001)
    time.sleep(0.05)
    pool.close()
    caller.join(10)
    assert found == ["The pool was closed while it evaluated energies."]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files cannot be counted here")
def test_no_file_stays_open_where_there_are_too_few(dipeptide):
    import resource

    ProcessWorkers(dipeptide[0], "Reference", {}, 1).close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    messages = []
    for more in range(30):
        workers = None
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, limits[1]))
            workers = ProcessWorkers(dipeptide[0], "Reference", {}, 1)
        except EnergyError as error:
            messages.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        if workers is not None:
            workers.close()
            break
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before, more
    assert len([m for m in messages if m == "Worker processes cannot be started (Too many open files)."]) >= 8, messages


def test_a_fork_is_refused(make_context, frames, monkeypatch):
    with ContextPool(make_context(), platform="Reference", n_workers=1, processes=True) as pool:
        monkeypatch.setattr(process_workers.os, "getpid", lambda: -1)
        with pytest.raises(EnergyError, match="fork"):
            pool.energies(frames)
        monkeypatch.undo()
        assert np.isfinite(pool.energies(frames)).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_that_lives_on_does_not_keep_a_closed_pool(make_context, frames):
    pool = ContextPool(make_context(), platform="Reference", n_workers=2, processes=True)
    found = pids(pool)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # it holds the pipes of the pool until it is told to end
        os.read(read, 1)
        os._exit(0)
    try:
        assert np.isfinite(pool.energies(frames)).all()
        started = time.perf_counter()
        pool.close()
        assert time.perf_counter() - started < 0.5 * process_workers.END_SECONDS
        assert all_gone(found, 0.0)
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_several_threads_share_the_processes(make_context, frames):
    with ContextPool(make_context(), platform="Reference", n_workers=2, processes=True) as pool:
        expected = pool.energies(frames)
        results: list[tuple[int, np.ndarray]] = []

        def call(shift: int) -> None:
            for _ in range(20):
                results.append((shift, pool.energies(np.roll(frames, shift, axis=0))))

        callers = [threading.Thread(target=call, args=[shift]) for shift in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(30)
        assert len(results) == 80
        for shift, energies in results:
            np.testing.assert_array_equal(energies, np.roll(expected, shift))


# A script without a guard around its main part, which comes through stdin: what starts processes must not run it again.
SCRIPT = """
import json, os, signal, sys, threading, time
import numpy as np
import torch, openmm
from openmm_bg.energy import ContextPool

print("started", flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
system, force = openmm.System(), openmm.NonbondedForce()
x = np.stack(np.meshgrid(*[np.arange(10) * 0.2] * 3), -1).reshape(-1, 3)
for _ in x:
    system.addParticle(1.0)
    force.addParticle(0.0, 0.1, 0.1)
system.addForce(force)
batch = np.repeat(x[None], 4000, axis=0)  # minutes

def make_pool():
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    return ContextPool(context, platform="Reference", n_workers=2, processes=True)

def pids(pool):
    return [process._popen.pid for process in pool._workers._shared.processes]

endings = ENDINGS
for label, ending in endings.items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        pool = make_pool()
        os.write(write, json.dumps(pids(pool)).encode())
        os.close(write)
        break
    os.close(write)
    found = json.loads(os.read(read, 1000))
    deadline = time.perf_counter() + 20.0
    done, status = 0, 0
    while done == 0 and time.perf_counter() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if done == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(json.dumps([label, os.waitstatus_to_exitcode(status) if done else "hangs", found]), flush=True)
else:
    pool = make_pool()
    threading.Thread(target=pool.energies, args=[batch], daemon=True).start()
    time.sleep(0.3)
    print(json.dumps(["killed", None, pids(pool)]), flush=True)
    time.sleep(60)
exec(ending)
"""

BUSY = "threading.Thread(target=pool.energies, args=[batch], daemon=True).start(); time.sleep(0.3); "
ENDINGS = {
    "end": ("pool.energies(batch[:2])", 0),
    "exception": ("raise ValueError('on purpose')", 1),
    "busy": (BUSY + "sys.exit(4)", 4),
    "abrupt": (BUSY + "os._exit(5)", 5),
    "interrupt": (
        """
expected = pool.energies(batch[:2])
for _ in range(3):
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        pool.energies(batch)
        os._exit(9)
    except KeyboardInterrupt:
        assert (pool.energies(batch[:2]) == expected).all()
sys.exit(6)
""",
        6,
    ),
    # A fork of this process that lives on keeps the pipes open: the workers must end all the same.
    "fork": (BUSY + "os.fork() or (time.sleep(12), os._exit(0)); os._exit(7)", 7),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_processes_end_with_their_parent(tmp_path):
    script = SCRIPT.replace("ENDINGS", repr({label: ending for label, (ending, _) in ENDINGS.items()}))
    with (
        open(tmp_path / "errors", "w+") as errors,
        subprocess.Popen(
            [sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as parent,
    ):
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(script)
        parent.stdin.close()
        try:
            lines = []
            for line in parent.stdout:
                lines.append(line.strip())
                if "killed" in line:
                    break
        finally:
            parent.kill()
        errors.seek(0)
        said = errors.read()
    assert lines.count("started") == 1, said
    reports = [json.loads(line) for line in lines[1:]]
    assert [label for label, _, _ in reports] == [*ENDINGS, "killed"], said
    for label, status, found in reports:
        assert len(found) == 2
        assert all_gone(found), label
        if label in ENDINGS:
            assert status == ENDINGS[label][1], (label, said)
    assert said.count("ValueError: on purpose") == 1


# ------------------------------------------------------------------------------------------------ tuning


@pytest.fixture
def rates(monkeypatch):
    """Timing as if it had found these frames per second, on two cores; whose turn it was is noted."""
    found = {"threads": 1000.0, "processes": 1900.0, "twin": 10.0}
    timed: list[tuple[str, str, int]] = []

    def rate(workers, *arguments, **options):
        kind = "processes" if isinstance(workers, ProcessWorkers) else "threads"
        timed.append((kind, workers.platform, workers.n))
        if workers.platform == "twin":
            return found["twin"]
        if workers.platform != "Reference":
            return 1.0
        return found[kind] * (workers.n / 2 if kind == "processes" else 1)

    monkeypatch.setattr(tuning, "_rate", rate)
    monkeypatch.setattr(tuning, "default_threads", lambda: 2)
    monkeypatch.setattr(tuning, "TWIN_SECONDS", 0.05)
    monkeypatch.setattr(tuning, "_time_twin", lambda *_: ([tuning.TuningRow("twin", 1, found["twin"])], None))
    return found, timed


def test_full_tuning_tries_processes_and_a_pool_uses_them(make_context, frames, rates, no_kept_choices, monkeypatch):
    _, timed = rates
    started = []
    plain = ProcessWorkers.__init__

    def count(self, *arguments):
        started.append(arguments[-1])
        plain(self, *arguments)

    monkeypatch.setattr(ProcessWorkers, "__init__", count)
    with ContextPool(make_context(), tune="full") as pool:
        assert pool.processes and (pool.platform, pool.n_workers) == ("Reference", 2)
        assert pool.tuning is not None and pool.tuning.chosen.processes
        assert "2 process(es) with a Context each on Reference" in str(pool.tuning)
        assert started == [2]  # not once for timing and once for use
        assert ("processes", "Reference", 2) in timed
        assert np.isfinite(pool.energies(frames)).all()
    [kept] = no_kept_choices.iterdir()
    assert json.loads(kept.read_text())["choice"]["processes"] is True
    timed.clear()
    with ContextPool(make_context(), tune="quick") as pool:
        assert pool.processes and pool.tuning is not None and pool.tuning.kept and not timed
        found = pids(pool)
        assert len(found) == 2
    assert all_gone(found)
    with ContextPool(make_context(), tune="full", processes=False) as pool:
        assert not pool.processes and not any(row.processes for row in pool.tuning.rows)


def test_fewer_processes_may_be_faster_and_the_others_end(make_context, frames, rates, monkeypatch):
    monkeypatch.setattr(tuning, "default_threads", lambda: 3)
    monkeypatch.setattr(tuning, "_rate", lambda workers, *_, **__: 1000.0 if isinstance(workers, Workers) else
                        {2: 2500.0, 3: 2000.0}[workers.n])  # fmt: skip
    with ContextPool(make_context(), tune="full") as pool:
        assert (pool.processes, pool.n_workers) == (True, 2)
        assert len(pids(pool)) == 2
        assert np.isfinite(pool.energies(frames)).all()
        pool.sync()


@pytest.mark.parametrize(
    "change, note",
    [
        ({"processes": 1050.0}, ""),  # faster, but not by enough for what a process costs
        ({"twin": 4100.0}, "too slow"),  # not even started
    ],
)
def test_processes_must_be_worth_it(make_context, rates, change, note):
    rates[0].update(change)
    report = tune(make_context(), effort="full")
    [row] = [row for row in report.rows if row.processes]
    assert not report.chosen.processes and row.note == note
    assert (row.frames_per_second is None) == bool(note)


def test_no_process_is_started_for_nothing(make_context, rates, monkeypatch):
    def refuse(self, *_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(ProcessWorkers, "__init__", refuse)
    with ContextPool(make_context()) as pool:
        assert not pool.processes
    report = tune(make_context(), effort="full", n_workers=1)
    assert [row.note for row in report.rows if row.processes] == ["no gain from one alone"]
    with pytest.raises(AssertionError, match="was started"):
        tune(make_context(), effort="full")


def test_processes_that_fail_give_way_to_threads(make_context, frames, rates, caplog, monkeypatch):
    def refuse(self, *_):
        raise EnergyError("no processes today")

    ContextPool(make_context(), tune="full").close()
    monkeypatch.setattr(ProcessWorkers, "__init__", refuse)
    with ContextPool(make_context()) as pool:  # from the kept choice
        assert not pool.processes and np.isfinite(pool.energies(frames)).all()
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == ["Threads evaluate energies instead of processes: no processes today"]
    report = tune(make_context(), effort="full")
    assert [row.note for row in report.rows if row.processes] == ["no processes today"]


def test_processes_alone_are_timed_where_they_are_wanted(make_context):
    with ContextPool(make_context(), n_workers=1, processes=True) as pool:
        assert pool.processes and pool.tuning is not None
        assert all(row.processes for row in pool.tuning.rows) and pool.tuning.chosen.frames_per_second > 0
    assert not choices.load_choice("nothing")
    assert usable_cores()


def test_a_wrong_result_would_be_noticed(make_context, monkeypatch):
    """Processes are compared with the Context like threads."""
    plain = ProcessWorkers.group_energies

    def biased(self, positions):
        total, groups = plain(self, positions)
        return total + 1e-3, groups

    monkeypatch.setattr(ProcessWorkers, "group_energies", biased)
    context = make_context()
    with pytest.raises(EnergyError, match=r"differs from the Context by 0\.001"):
        ContextPool(context, platform="Reference", n_workers=1, processes=True)
    assert read_state(context).energy < 0
