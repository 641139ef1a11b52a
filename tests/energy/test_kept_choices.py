"""What a full tuning keeps for later where the machine had other work to do while candidates were timed."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg.energy import ContextPool, choices, tune, tuning
from openmm_bg.energy.process_workers import ProcessWorkers
from openmm_bg.energy.tuning_report import FREE, NO_TIME, TuningRow, surely_fastest


def row(platform: str, rate: float | None, n: int = 1, **more: object) -> TuningRow:
    return TuningRow(platform, n, rate, **more)


@pytest.mark.parametrize(
    "share, others, sure",
    [
        (1.0, [row("twin", 99.0)], True),
        (FREE, [row("twin", 99.0)], True),
        (0.79, [row("twin", 99.0)], False),
        (0.5, [row("twin", 49.0)], True),
        (0.5, [row("twin", 50.0)], False),
        (0.1, [row("twin", 9.0)], True),
        (0.1, [row("twin", 11.0), row("CPU", 1.0)], False),
        (0.5, [row("CPU", 99.0, n=2)], True),  # of its own kind
        (0.5, [row("CPU", 99.0, n=2, processes=True)], False),
        (0.5, [row("CPU", 99.0, equal_solvent=True)], False),
        (0.5, [row("twin", None, note="periodic boundary conditions")], True),
        (0.5, [row("OpenCL", None, note=NO_TIME)], False),
        (1.0, [row("OpenCL", None, note=NO_TIME)], True),
        (0.5, [], True),
    ],
)
def test_when_a_choice_is_sure(share, others, sure):
    chosen = row("CPU", 100.0)
    assert surely_fastest([*others, chosen], chosen, share) is sure


# ------------------------------------------------------------------------------------------------ what is measured


class Workers:
    """A second of wall time and this much of the processor's for each thousand frames."""

    def __init__(self, clock: SimpleNamespace, platform: str, n: int, busy: float) -> None:
        self.clock, self.platform, self.n, self.busy = clock, platform, n, busy

    def evaluate(self, frames: np.ndarray, rows: list[int], *, forces: bool) -> None:
        self.clock.wall += len(rows) / 1000
        self.clock.cpu += self.busy * len(rows) / 1000


@pytest.fixture
def clock(monkeypatch):
    """Time that only goes on when frames are evaluated."""
    now = SimpleNamespace(wall=7.0, cpu=3.0)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: now.cpu))
    return now


@pytest.mark.parametrize("platform", ["Reference", "CPU", "twin"])
@pytest.mark.parametrize("busy", [1.0, 0.3])
def test_the_share_of_a_thread_is_its_time_on_the_processor(clock, platform, busy):
    shares: list[float] = []
    rate = tuning._rate(Workers(clock, platform, 1, busy), np.zeros((512, 1, 3)), hopeless_below=0.0, scaling=1.0,
                        shares=shares)  # fmt: skip
    assert rate == pytest.approx(1000.0) and shares == [pytest.approx(busy)]


@pytest.mark.parametrize("platform, n", [("Reference", 2), ("twin", 4), ("twin:cuda", 1), ("CUDA", 1)])
def test_what_waits_for_others_or_a_gpu_tells_nothing(clock, platform, n):
    shares: list[float] = []
    tuning._rate(
        Workers(clock, platform, n, 0.1), np.zeros((512, 1, 3)), hopeless_below=0.0, scaling=1.0, shares=shares
    )
    assert shares == []


def test_nor_does_the_time_of_another_process(clock, monkeypatch):
    monkeypatch.setattr(tuning, "ProcessWorkers", Workers)
    shares: list[float] = []
    tuning._rate(Workers(clock, "CPU", 1, 0.0), np.zeros((9, 1, 3)), hopeless_below=0.0, scaling=1.0, shares=shares)
    assert shares == []
    assert tuning.ProcessWorkers is not ProcessWorkers


def test_every_single_thread_of_a_full_tuning_is_measured(make_context, monkeypatch):
    asked, plain = [], tuning._rate

    def rate(workers, *arguments, **options):
        before = len(options.get("shares") or [])
        found = plain(workers, *arguments, **options)
        if found is not None:  # a frame that other work held up makes a candidate look hopeless
            asked.append((workers.platform, workers.n, len(options.get("shares") or []) - before))
        return found

    monkeypatch.setattr(tuning, "_rate", rate)
    monkeypatch.setattr(tuning, "TWIN_SECONDS", 0.05)
    tune(make_context("Reference"), effort="full")
    assert {name for name, n, _ in asked if n == 1} >= {"Reference", "twin"}
    assert all(added == (n == 1) for _, n, added in asked)


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.fixture
def timing(monkeypatch):
    """Frames per second of each candidate and the share of a core that each got, as told."""
    found = SimpleNamespace(rates={"Reference": 100.0, "CPU": 50.0, "twin": 1000.0}, share=1.0)

    def rate(workers, *_, shares=None, **__):
        if shares is not None:
            shares.append(found.share)
        return found.rates[workers.platform]

    monkeypatch.setattr(tuning, "_rate", rate)
    monkeypatch.setattr(tuning, "_time_processes", lambda *_: ([], None))
    return found


def told(caplog) -> list[str]:
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [message for message in said if "are not compiled" not in message]  # where there is no compiler


def test_load_that_may_have_decided_leaves_nothing_for_later(make_context, timing, caplog, no_kept_choices):
    context = make_context("Reference")
    timing.rates["twin"], timing.share = 90.0, 0.1  # 900 on a free machine
    with ContextPool(context, tune="full") as pool:
        assert pool.platform == "Reference"  # now, it is faster
    assert not no_kept_choices.exists()
    (said,) = told(caplog)
    assert said.startswith("How energies are evaluated fastest is not kept") and "10 % of a core" in said
    assert not tune(context).kept


def test_a_choice_that_load_cannot_have_made_is_kept(make_context, timing, caplog):
    context = make_context("Reference")
    timing.share = 0.2
    assert tune(context, effort="full").chosen.platform == "twin"
    assert tune(context).chosen.platform == "twin" and tune(context).kept and not told(caplog)


def test_a_machine_that_is_busy_now_does_not_undo_what_was_kept(make_context, timing, caplog, no_kept_choices):
    context = make_context("Reference")
    tune(context, effort="full")
    (file,) = no_kept_choices.iterdir()
    before = file.read_text()
    timing.rates["twin"], timing.share = 90.0, 0.1
    assert tune(context, effort="full").chosen.platform == "Reference"
    assert file.read_text() == before and len(told(caplog)) == 1
    assert tune(context).chosen.platform == "twin" and tune(context).kept
    timing.share = 1.0  # and now the machine is free, and it is really so
    tune(context, effort="full")
    assert file.read_text() != before and tune(context).chosen.platform == "Reference"


def test_choices_of_before_are_not_taken_up(make_context, timing, monkeypatch, no_kept_choices):
    """They were kept whatever the load."""
    context, plain = make_context("Reference"), choices._conditions
    without = lambda digest: {name: value for name, value in plain(digest).items() if name != "format"}  # noqa: E731
    with monkeypatch.context() as before:
        before.setattr(choices, "_conditions", without)
        tune(context, effort="full")
        assert tune(context).kept
    assert len(list(no_kept_choices.iterdir())) == 1 and not tune(context).kept
