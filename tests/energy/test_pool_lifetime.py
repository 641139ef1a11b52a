"""Threads of a pool: where they run, and that they end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm  # isort: skip

from openmm_bg.energy import ContextPool
from openmm_bg.energy.clone import Clone
from openmm_bg.energy.workers import Workers
from openmm_bg.errors import EnergyError

# One interpreter imports torch and OpenMM once; each way of ending runs in a child of its own, which makes its
# pool itself and leaves through the ordinary end of an interpreter, unless it runs for too long.
SCRIPT = """
import json, os, signal, sys, threading, time
import numpy as np
import torch, openmm
from openmm_bg.energy import ContextPool

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored

def make_pool(name):
    system, force = openmm.System(), openmm.NonbondedForce()
    x = np.stack(np.meshgrid(*[np.arange(10) * 0.2] * 3), -1).reshape(-1, 3)
    for _ in x:
        system.addParticle(1.0)
        force.addParticle(0.0, 0.1, 0.1)
    system.addForce(force)
    platform = openmm.Platform.getPlatformByName(name)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(x)
    return ContextPool(context, platform=name, n_workers=2), np.repeat(x[None], 4000, axis=0)

endings = json.loads(sys.argv[1])
report = {}
for name in ("Reference", "CPU"):
    for label, ending in endings.items():
        if name == "CPU" and label not in ("busy", "interrupt"):
            continue  # only those that leave a Context in mid-air can differ between platforms
        child = os.fork()
        if child == 0:
            started = time.perf_counter()
            pool, batch = make_pool(name)
            # The code runs at top level, as a script's own would.
            break
        deadline = time.perf_counter() + 10.0
        done, status = 0, 0
        while done == 0 and time.perf_counter() < deadline:
            time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
        if done == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            report[f"{name} {label}"] = "hangs"
        else:
            report[f"{name} {label}"] = os.waitstatus_to_exitcode(status)
    else:
        continue
    break
else:
    print(json.dumps(report))
    sys.exit(0)
exec(ending)
"""

# How a script ends with its pool open, and the exit status that this must have.
ENDINGS = {
    "end": ("pool.energies(batch[:2])", 0),
    "exit": ("sys.exit(3)", 3),
    "exception": ("raise ValueError('on purpose')", 1),
    # A batch of minutes, left behind in another thread, or by Ctrl-C after which the pool is used again.
    "busy": (
        """
t = threading.Thread(target=pool.energies, args=[batch], daemon=True)
t.start()
t.join(0.3)
assert t.is_alive()
sys.exit(4)
""",
        4,
    ),
    "interrupt": (
        """
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    pool.energies(batch)
except KeyboardInterrupt:
    assert np.isfinite(pool.energies(batch[:2])).all()
    sys.exit(5)
""",
        5,
    ),
    # A fork has no worker threads: it is told so, and does not wait for them. (It leaves at once, as those of
    # multiprocessing do: OpenMM itself hangs when a forked child destroys a Context of its parent.)
    "fork": (
        """
child = os.fork()
if child == 0:
    try:
        pool.energies(batch[:2])
    except Exception as error:
        os._exit(6 if "fork" in str(error) else 7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        6,
    ),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_interpreter_ends_with_an_open_pool():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps({label: ending for label, (ending, _) in ENDINGS.items()})],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    expected = {f"Reference {label}": code for label, (_, code) in ENDINGS.items()}
    expected |= {"CPU busy": 4, "CPU interrupt": 5}
    assert json.loads(result.stdout) == expected, result.stderr
    assert result.stderr.count("ValueError: on purpose") == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be pinned here")
@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_workers_are_pinned_and_the_caller_is_not(make_context, frames, platform):
    # Threads get the affinity of the one that starts them: run this in one that may use every core there is.
    before = os.sched_getaffinity(0)
    with ContextPool(make_context(platform), platform=platform, n_workers=3) as pool:
        pool.energies(frames)
        assert os.sched_getaffinity(0) == before
        cores = sorted(before)
        threads = pool._workers._shared.threads
        pins = [os.sched_getaffinity(thread.native_id) for thread in threads]
        assert pins == [{cores[i % len(cores)]} for i in range(3)]
    pool = ContextPool(make_context(platform))
    pool.close()
    assert os.sched_getaffinity(0) == before


def count_threads() -> int:
    if os.path.isdir("/proc/self/task"):
        return len(os.listdir("/proc/self/task"))  # OpenMM's own included
    return threading.active_count()


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_pools_leave_no_threads(make_context, frames, platform):
    context = make_context(platform)
    ContextPool(context, platform=platform, n_workers=2).close()
    before = count_threads()
    for _ in range(20):
        with ContextPool(context, platform=platform, n_workers=2) as pool:
            pool.energies(frames[:2])
    for _ in range(5):
        ContextPool(context, platform=platform, n_workers=2)  # dropped without closing
    gc.collect()
    deadline = time.perf_counter() + 5.0
    while count_threads() > before and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert count_threads() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("openmm_bg")]


def test_a_pool_that_cannot_be_made_leaves_no_threads(make_context, pair):
    system, force, x = pair
    context = make_context("Reference", system, x)
    force.setBondParameters(0, 0, 1, [2.0])
    with pytest.raises(EnergyError):
        ContextPool(context, platform="Reference", n_workers=2)
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("openmm_bg")]


def test_one_pool_called_from_several_threads(make_context, frames):
    with ContextPool(make_context(), platform="Reference", n_workers=2) as pool:
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
        assert openmm.Platform.getNumPlatforms() > 0


CLOSED_MEANWHILE = "The pool was closed while it evaluated energies."


def evaluate_beside(pool: ContextPool, batch: np.ndarray) -> tuple[threading.Thread, list[object]]:
    """A thread that evaluates a batch, and its energies or what it was told instead."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(pool.energies(batch))
        except EnergyError as error:
            found.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, found


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_batch_that_is_under_way_when_its_threads_end_is_an_error(make_context, pair, n_workers):
    """Rows that nobody evaluated must not count as rows without a finite energy."""
    system, _, x = pair
    pool = ContextPool(make_context("Reference", system, x), platform="Reference", n_workers=n_workers)
    thread, found = evaluate_beside(pool, np.repeat(x[None], 300_000, axis=0))  # a second or more
    deadline = time.perf_counter() + 10.0
    while pool._workers._shared.job is None and time.perf_counter() < deadline:
        time.sleep(0.001)
    pool.close()  # as `sync` does with its workers once there are new ones
    thread.join(10)
    assert found == [CLOSED_MEANWHILE]


def test_a_task_never_comes_after_the_order_to_end(make_context, frames):
    pool = ContextPool(make_context(), platform="Reference", n_workers=1)
    shared = pool._workers._shared
    queue = shared.queues[0]
    closer = threading.Thread(target=pool.close, daemon=True)

    class Slow:
        def put(self, task: object) -> None:
            if task is not None:
                closer.start()
                time.sleep(0.2)  # time enough for the order to overtake the task
            queue.put(task)

    shared.queues[0] = Slow()
    thread, found = evaluate_beside(pool, frames)
    thread.join(5)
    assert found == [CLOSED_MEANWHILE]
    closer.join(5)
    assert not closer.is_alive()


def test_a_context_that_cannot_be_made_again(monkeypatch):
    system, force = openmm.System(), openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    for _ in range(2):
        system.addParticle(1.0)
        force.addParticle(0.0, 0.1, 0.0)
    system.addForce(force)
    batch = np.zeros((2, 2, 3))
    batch[1, 1] = np.nan  # the CPU platform raises
    workers = Workers(system, "CPU", {"Threads": "1"}, 1)
    try:
        assert workers.evaluate(batch, [0, 1], forces=False)[0][1] == np.inf

        def fail(self: Clone) -> openmm.Context:
            raise openmm.OpenMMException("No memory is left.")

        monkeypatch.setattr(Clone, "_create", fail)
        message = (
            r"^A Context could not be made again after OpenMM raised in it \(No memory is left\): make another pool"
        )
        for rows in ([1], [0]):
            with pytest.raises(openmm.OpenMMException, match=message):
                workers.evaluate(batch, rows, forces=False)
        with pytest.raises(openmm.OpenMMException, match=message):
            workers.group_energies(batch[0])
    finally:
        workers.close()
