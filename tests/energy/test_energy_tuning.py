"""Choosing platform and worker count by timing."""

from __future__ import annotations

import logging
import time
import types

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm  # isort: skip

from openmm_bg.energy import ContextPool, Tuning, tune, tuning
from openmm_bg.errors import EnergyError, InputError

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """Every candidate is tried, however busy the machine."""
    monkeypatch.setattr(tuning, "TOTAL_SECONDS", 1e3)


@pytest.fixture
def clock(monkeypatch):
    """A clock of its own: what a frame costs on each platform, and what it costs to make a Context."""
    clock = types.SimpleNamespace(now=0.0, frame={"Reference": 8e-6, "CPU": 70e-6}, context=0.05)
    clock.perf_counter = clock.process_time = lambda: clock.now
    evaluate, init = tuning.Workers.evaluate, tuning.Workers.__init__

    def timed(self, positions, rows, *, forces):
        clock.now += clock.frame[self.platform] * len(rows) / self.n
        return evaluate(self, positions, rows, forces=forces)

    def made(self, system, platform, properties, n):
        clock.now += clock.context * n
        init(self, system, platform, properties, n)

    monkeypatch.setattr(tuning.Workers, "evaluate", timed)
    monkeypatch.setattr(tuning.Workers, "__init__", made)
    monkeypatch.setattr(tuning, "time", clock)
    monkeypatch.setattr(tuning, "TOTAL_SECONDS", 1.6)
    monkeypatch.setattr(tuning, "_platforms", lambda context: ["CPU", "Reference"])
    monkeypatch.setattr(tuning, "usable_cores", lambda: [0])
    return clock


def test_the_fastest_is_chosen(make_context, caplog):
    context = make_context("CPU")
    with caplog.at_level(logging.INFO, logger="openmm_bg"):
        report = tune(context)
    assert isinstance(report, Tuning)
    assert {row.platform for row in report.rows} == set(PLATFORMS)
    assert report.rows[0].platform == "CPU"  # the Context's own comes first
    rates = [row.frames_per_second or 0.0 for row in report.rows]
    assert report.chosen.frames_per_second == max(rates) > 0
    # Eight microseconds a frame against some seventy: no load on the machine turns this round.
    assert report.chosen.platform == "Reference"
    assert [r.getMessage() for r in caplog.records] == [str(report)]
    assert "\n" not in str(report)


@pytest.mark.parametrize("context_cost", [0.05, 0.5, 2.0])
def test_tuning_keeps_to_its_time(make_context, clock, context_cost):
    """Two seconds; where Contexts are dear, the last one may be begun just before the time is up."""
    clock.context = context_cost
    report = tune(make_context("CPU"))
    assert clock.now <= 1.6 + context_cost + tuning.CANDIDATE_SECONDS
    notes = [row.note for row in report.rows]
    assert notes[0] == "" and (notes[1] == "no time left") == (context_cost == 2.0)
    assert report.chosen.platform == ("CPU" if context_cost == 2.0 else "Reference")


def test_what_is_named_is_kept(make_context):
    context = make_context("Reference")
    assert tune(context, platform="CPU").chosen.platform == "CPU"
    assert all(row.n_workers == 2 for row in tune(context, n_workers=2).rows)
    with ContextPool(context, platform="CPU") as pool:
        assert pool.platform == "CPU"
        assert pool.tuning is not None and pool.n_workers == pool.tuning.chosen.n_workers
    with ContextPool(context, n_workers=2) as pool:
        assert pool.n_workers == 2


def test_a_pool_uses_what_was_chosen(make_context, frames):
    with ContextPool(make_context("CPU"), positions=frames) as pool:
        assert pool.tuning is not None
        assert (pool.platform, pool.n_workers) == (pool.tuning.chosen.platform, pool.tuning.chosen.n_workers)


def test_a_hopeless_candidate_is_dropped_after_one_frame(make_context, monkeypatch):
    context = make_context("Reference")
    counts: list[tuple[str, int]] = []
    plain = tuning.Workers.evaluate

    def slow_cpu(self, positions, rows, *, forces):
        counts.append((self.platform, len(rows)))
        if self.platform == "CPU":
            time.sleep(0.05 * len(rows))
        return plain(self, positions, rows, forces=forces)

    monkeypatch.setattr(tuning.Workers, "evaluate", slow_cpu)
    report = tune(context)
    assert [n for name, n in counts if name == "CPU"] == [1]
    assert [row.note for row in report.rows if row.platform == "CPU"] == ["too slow"]
    assert report.chosen.platform == "Reference"


def test_no_candidate_is_started_after_the_time_is_up(make_context, monkeypatch):
    monkeypatch.setattr(tuning, "TOTAL_SECONDS", 0.0)
    report = tune(make_context("CPU"))
    assert report.chosen.platform == "CPU"
    assert sum(row.frames_per_second is not None for row in report.rows) == 1


def test_a_platform_that_cannot_hold_the_system_is_skipped(make_context, monkeypatch):
    context = make_context("CPU")
    plain = tuning.Workers.__init__

    def refuse(self, system, platform, properties, n):
        if platform != "CPU":
            raise openmm.OpenMMException("no kernel for this force")
        plain(self, system, platform, properties, n)

    monkeypatch.setattr(tuning.Workers, "__init__", refuse)
    report = tune(context)
    assert report.chosen.platform == "CPU"
    assert any("no kernel" in row.note for row in report.rows)
    with pytest.raises(EnergyError, match="no kernel"):
        tune(context, platform="Reference")


def test_a_platform_that_disagrees_is_not_used(make_context, monkeypatch):
    """Another platform whose energies differ from the Context's gives way to the Context's own."""
    from openmm_bg.energy import workers

    plain = workers.Workers.group_energies

    def biased(self, positions):
        total, groups = plain(self, positions)
        return total + (1.0 if self.platform == "Reference" else 0.0), groups

    monkeypatch.setattr(workers.Workers, "group_energies", biased)
    context = make_context("CPU")
    with ContextPool(context, n_workers=1) as pool:
        assert pool.tuning is not None and pool.tuning.chosen.platform == "Reference"
        assert pool.platform == "CPU"
    with pytest.raises(EnergyError, match=r"differs from the Context by 0\.9999"):
        ContextPool(context, platform="Reference", n_workers=1)


def test_wrong_frames_are_refused(make_context):
    context = make_context("Reference")
    for frames in (np.zeros((0, 22, 3)), np.full((2, 22, 3), np.inf)):
        with pytest.raises(InputError, match="time on"):
            tune(context, positions=frames)
    with pytest.raises(InputError, match=r"\[B, 22, 3\]"):
        tune(context, positions=np.zeros((22, 3)))


def test_worker_counts():
    assert tuning._counts(1) == [1]
    assert tuning._counts(2) == [1, 2]
    assert tuning._counts(6) == [1, 2, 4, 6]
    assert tuning._counts(8) == [1, 2, 4, 8]
