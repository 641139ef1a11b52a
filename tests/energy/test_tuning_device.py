"""Tuning with a GPU's twin among the candidates, and the memory of it. The CPU is in the place of the GPU."""

from __future__ import annotations

import importlib.util
import json
import logging

import numpy as np
import pytest
import torch

from openmm_bg.energy import ContextPool, SystemTwin, choices, tune, tuning, twin_workers

import openmm  # isort: skip

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
GPU = "twin:cuda"
X = 0.12 * torch.stack((torch.arange(5.0), torch.arange(5) % 2, torch.arange(5) % 3), dim=1)[None]


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "compiled" not in r.getMessage()]


@pytest.fixture
def rates(monkeypatch):
    """Timing as if it had found these frames per second; what was timed, and on how many frames to begin with."""
    found, timed = {GPU: 100.0, "twin": 10.0}, []

    def rate(workers, frames, **options):
        timed.append((workers.platform, workers.n, options.get("first", 0), len(frames)))
        return found.get(workers.platform, 1.0)

    monkeypatch.setattr(tuning, "_rate", rate)
    return found, timed


def test_full_tuning_times_it_and_a_pool_uses_it(gpu, context, rates, caplog, monkeypatch):
    made, closed = [], []
    plain, end = twin_workers.TwinWorkers.__init__, twin_workers.TwinWorkers.close
    monkeypatch.setattr(
        twin_workers.TwinWorkers, "__init__", lambda self, *given: made.append(given[-1]) or plain(self, *given)
    )
    monkeypatch.setattr(twin_workers.TwinWorkers, "close", lambda self: closed.append(self.platform) or end(self))
    with (
        caplog.at_level(logging.INFO, logger="openmm_bg.energy.tuning"),
        ContextPool(context, tune="full") as pool,
    ):
        assert (pool.platform, pool.n_workers) == (GPU, 1) and pool._workers.on_gpu
        assert pool.tuning is not None and pool.tuning.chosen == pool.tuning.rows[-1]
        assert pool.tuning.chosen.name == "twin:cuda x 1"
        assert {row.platform for row in pool.tuning.rows} == {*PLATFORMS, "twin", GPU}
        assert made == ["twin", GPU] and closed == ["twin"]  # each once, and the loser is gone
        # A GPU is timed on whole batches alone; the CPU begins with few frames.
        assert [entry for entry in rates[1] if entry[0] == GPU] == [(GPU, 1, 512, 512)]
        assert torch.isfinite(pool.evaluate_on_device(X)[0]).all()
        said = [r.getMessage() for r in caplog.records if r.name.endswith("tuning")]
        assert said == [str(pool.tuning)]
        assert said[0].startswith("Energies run in a torch twin of the System on the GPU, 100 frames/s (others: ")


def test_its_real_timing(gpu, context, monkeypatch):
    monkeypatch.setattr(tuning, "TWIN_SECONDS", 0.05)
    report = tune(context, platform=GPU, n_workers=2)
    assert report.chosen.n_workers == 1 and (report.chosen.frames_per_second or 0.0) > 0.0
    assert len(report.rows) == 1 and report.rows[0].note == "not compiled"


@pytest.mark.parametrize("faster", ["twin", "Reference"])
def test_what_is_faster_is_chosen(gpu, context, rates, faster):
    rates[0][faster] = 1000.0
    report = tune(context, effort="full")
    assert report.chosen.platform == faster
    assert [row.frames_per_second for row in report.rows if row.platform == GPU] == [100.0]


def test_nobody_asked_for_it(gpu, context, rates):
    assert GPU not in {row.platform for row in tune(context).rows}
    assert GPU not in {row.platform for row in tune(context, platform="twin").rows}
    assert GPU not in {row.platform for row in tune(context, platform="Reference", effort="full").rows}


@pytest.mark.parametrize("when", ["made", "timed"])
def test_one_that_cannot_be_timed_is_a_row_with_a_reason(gpu, context, rates, monkeypatch, when):
    closed = []

    def fail(*_, **__):
        raise RuntimeError("CUDA error: out of luck")

    plain, end = SystemTwin, twin_workers.TwinWorkers.close

    def make(*arguments, **options):
        if options["compile"] is not None:
            return plain(*arguments, **options)
        if when == "made":
            fail()
        twin = plain(*arguments, **options)
        twin.evaluate = fail
        return twin

    monkeypatch.setattr(twin_workers, "SystemTwin", make)
    monkeypatch.setattr(twin_workers.TwinWorkers, "close", lambda self: closed.append(self.platform) or end(self))
    report = tune(context, effort="full")
    assert report.chosen.platform == "twin"
    (row,) = [row for row in report.rows if row.platform == GPU]
    assert row.frames_per_second is None
    assert row.note == "The GPU cannot evaluate the System (CUDA error: out of luck)"
    assert closed == ([GPU, "twin"] if when == "timed" else ["twin"])


def test_a_kept_choice_knows_its_gpu(gpu, context, rates, no_kept_choices, monkeypatch):
    assert tune(context, effort="full").chosen.platform == GPU
    (file,) = no_kept_choices.iterdir()
    assert json.loads(file.read_text())["conditions"]["gpu"] == "A card"
    rates[1].clear()
    with ContextPool(context) as again:
        assert again.platform == GPU and again.tuning is not None and again.tuning.kept and not rates[1]
    gpu[0] = "Another card"
    report = tune(context)
    assert not report.kept and report.chosen.platform in PLATFORMS
    gpu[0] = "A card"
    assert tune(context).kept
    has_triton = importlib.util.find_spec("triton") is not None
    with monkeypatch.context() as other:
        other.setattr(choices.importlib.util, "find_spec", lambda _: None if has_triton else "one that was installed")
        assert not tune(context).kept
    # A choice of what is not there any more, though its file has the right name.
    gpu[0] = ""
    choices.keep_choice("digest", choices.Choice("twin", 1, 10.0))
    assert choices.load_choice("digest") is not None
    choices.keep_choice("digest", choices.Choice(GPU, 1, 10.0))
    assert choices.load_choice("digest") is None


def test_a_kept_gpu_that_fails_gives_way_to_contexts(gpu, context, rates, caplog, monkeypatch):
    tune(context, effort="full")

    def fail(*_, **__):
        raise RuntimeError("CUDA error: busy")

    monkeypatch.setattr(twin_workers, "SystemTwin", fail)
    with ContextPool(context) as pool:
        assert pool.platform in PLATFORMS and np.isfinite(pool.energies(X)).all()
    (said,) = warnings_of(caplog)
    assert "instead of a torch twin: The GPU cannot evaluate the System (CUDA error: busy)." in said
