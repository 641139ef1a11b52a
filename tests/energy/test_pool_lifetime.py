"""Threads of a pool: where they run, and that they end."""

from __future__ import annotations

import gc
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
from openmm_bg.errors import EnergyError

SCRIPT = """
import sys, threading
import numpy as np
import torch, openmm
from openmm_bg.energy import ContextPool

system = openmm.System()
n = {n}
force = openmm.NonbondedForce()
for i in range(n):
    system.addParticle(1.0)
    force.addParticle(0.0, 0.1, 0.1)
system.addForce(force)
platform = openmm.Platform.getPlatformByName({platform!r})
context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
x = np.stack(np.meshgrid(*[np.arange(12) * 0.2] * 3), -1).reshape(-1, 3)[:n]
context.setPositions(x)
pool = ContextPool(context, platform={platform!r}, n_workers=2)
batch = np.repeat(x[None], 4000, axis=0)
print("pool open", flush=True)
{ending}
"""


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("raise SystemError('on purpose')", 1),
        ("sys.exit(3)", 3),
        ("pool.energies(batch[:8])", 0),
        # A batch of minutes, left behind in another thread or by Ctrl-C:
        ("threading.Timer(0.3, pool.energies, [batch]).start() if 0 else None\n"
         "t = threading.Thread(target=pool.energies, args=[batch], daemon=True)\n"
         "t.start(); t.join(0.3)\n"
         "sys.exit(4)", 4),
        ("import os, signal\n"
         "threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
         "try:\n"
         "    pool.energies(batch)\n"
         "except KeyboardInterrupt:\n"
         "    assert np.isfinite(pool.energies(batch[:2])).all()\n"
         "    sys.exit(5)", 5),
        ("import os\n"
         "child = os.fork()\n"
         "if child == 0:\n"
         "    try:\n"
         "        pool.energies(batch[:2])\n"
         "    except Exception as error:\n"
         "        sys.exit(6 if 'fork' in str(error) else 7)\n"
         "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))", 6),
    ],
    ids=["exception", "exit", "end", "busy", "interrupt", "fork"],
)  # fmt: skip
def test_the_interpreter_ends_with_an_open_pool(platform, ending, code):
    script = SCRIPT.format(n=1000, platform=platform, ending=ending)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "pool open\n"
        started = time.perf_counter()
        _, errors = process.communicate(timeout=20)
        elapsed = time.perf_counter() - started
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert elapsed < 8.0
    if code == 1:
        assert "on purpose" in errors


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
