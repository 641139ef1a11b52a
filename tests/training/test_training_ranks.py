"""Several processes train as one would with the joint batch, agree on everything, and leave together."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.training.parallel import ProcessRanks, Ranks, joined

SCRIPT = Path(__file__).with_name("rank_scenarios.py")
FIGURES = ("loss", "nll", "w2", "kl", "buffer", "path", "variance", "validation_nll", "ess", "gradient_norm")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(scenario, number of processes) to what each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in sorted(folder.glob("*.json")):
        name, size, _ = path.stem.rsplit("-", 2)
        found.setdefault((name, int(size)), []).append(json.loads(path.read_text()))
    assert all(len(ranks) == size for (_, size), ranks in found.items()), done.stderr
    return found


def largest_difference(rows, others):
    """Of any figure of any step, relative where it is above 1; whole numbers must be equal."""
    assert [r["step"] for r in rows] == [r["step"] for r in others]
    worst = 0.0
    for a, b in zip(rows, others, strict=True):
        assert a["stage"] == b["stage"] and a["skipped"] == b["skipped"]
        for name in FIGURES:
            assert (a[name] is None) == (b[name] is None), name
            if a[name] is not None:
                worst = max(worst, abs(a[name] - b[name]) / max(1.0, abs(a[name])))
    return worst


@pytest.fixture(scope="module")
def tolerance(outcomes):
    """A hundred times what one unit in the last place of the parameters does to the curve of one process.

    Sums over shares round otherwise than sums over the batch, at several places of each step where the nudge acts once.
    """
    (whole,), (nudged,) = outcomes["curve", 1], outcomes["nudged", 1]
    rounding = largest_difference(whole["rows"], nudged["rows"])
    assert 0.0 < rounding < 1e-12
    return 100.0 * max(rounding, torch.finfo(torch.float64).eps)


def test_the_curve_is_that_of_one_process(outcomes, tolerance):
    """Batches of 63, 33 and 41 rows: shares are not equal."""
    (whole,) = outcomes["curve", 1]
    assert {name for row in whole["rows"] for name in FIGURES if row[name] is not None} == set(FIGURES)
    assert sum(row["dropped"] for row in whole["rows"]) > 0  # samples without an energy are part of it
    for rank in outcomes["curve", 2]:
        assert largest_difference(whole["rows"], rank["rows"]) < tolerance
        assert [row["dropped"] for row in whole["rows"]] == [row["dropped"] for row in rank["rows"]]
        assert rank["parameters"] == pytest.approx(whole["parameters"], rel=tolerance)


def test_each_process_compiles_for_its_share(outcomes, tolerance):
    """Of 63 rows, 32; batches with rows left out are filled up."""
    (whole,) = outcomes["curve", 1]
    for rank in outcomes["compiled", 2]:
        assert rank["compiled for"] == 32
        assert largest_difference(whole["rows"], rank["rows"]) < tolerance


@pytest.mark.parametrize("error", ["without_sum", "mean_of_w2"])
def test_a_wrong_way_to_share_is_noticed(outcomes, tolerance, error):
    """Gradients of the own share alone; W2 as a mean over processes."""
    (whole,) = outcomes["curve", 1]
    assert largest_difference(whole["rows"], outcomes[error, 2][0]["rows"]) > 1e3 * tolerance


def test_energies_are_shared_and_counted_together(outcomes):
    (whole,) = outcomes["curve", 1]
    ranks = outcomes["curve", 2]
    assert sum(rank["own"] for rank in ranks) == whole["energies"] > 0
    assert {rank["energies"] for rank in ranks} == {whole["energies"]}
    assert max(rank["own"] for rank in ranks) < 1.1 * whole["energies"] / 2


def test_a_signal_to_one_stops_all_at_one_step(outcomes):
    for rank in outcomes["first_half", 2]:
        for name in ("plain", "dropout"):
            kind, text, step = rank[name]
            assert kind == "TrainingInterrupted" and step == 10 and "holds step 10" in text


def test_another_number_of_processes_continues_the_curve(outcomes, tolerance):
    (whole,) = outcomes["curve", 1]
    for rank in outcomes["resumed", 3]:  # begun by two
        assert largest_difference(whole["rows"], rank["rows"]) < tolerance
        assert rank["energies"] == whole["energies"]


def test_dropout_is_the_exception_but_resumes(outcomes, tolerance):
    """Masks depend on the number of processes, yet a resumed run draws those of an unbroken one."""
    unbroken, resumed = outcomes["with_dropout", 2], outcomes["resumed_dropout", 2]
    for a, b in zip(unbroken, resumed, strict=True):
        assert largest_difference(a["rows"], b["rows"]) == 0.0
    (whole,) = outcomes["curve", 1]
    assert largest_difference(whole["rows"], unbroken[0]["rows"]) > 1e3 * tolerance


def test_the_clock_is_the_main_process_s(outcomes):
    ranks = outcomes["own_clock", 2]
    assert {len(rank["rows"]) for rank in ranks} == {10}
    assert all(rank["rows"][-1]["seconds"] == 10.0 for rank in ranks)


def test_a_bad_share_skips_the_step_for_all(outcomes):
    for rank in outcomes["one_bad", 2]:
        assert [row["skipped"] for row in rank["rows"]] == [0, 0, 1, 0] and rank["finite"]
        assert math.isnan(rank["rows"][2]["loss"])


def test_mistakes_reach_all(outcomes):
    for rank in outcomes["other_data", 2]:
        assert rank["error"] == "InputError" and "Process 1 has other data" in rank["text"]
    for rank in outcomes["full_disk", 2]:
        assert rank["error"] == "CheckpointError" and "No space left" in rank["text"]


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_lost_process_holds_nobody_up(outcomes, how):
    """One that ends is noticed at once; one that hangs (20 s there) after the time limit (3 s there)."""
    main, other = outcomes[how, 2]
    assert main["error"] == "RankLost" and "lost the others" in main["text"] and "\n" not in main["text"]
    assert other["error"] == ("ValueError" if how == "fails" else "RankLost")
    assert main["at"] - other["began"][0] < 15.0  # the machine may be busy


def test_alone_nothing_is_joined(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with joined() as ranks:
        assert type(ranks) is Ranks and not torch.distributed.is_initialized()
        assert ranks.is_main and ranks.from_main(lambda: 3) == 3 and ranks.agree((True, 2.5)) == [1.0, 2.5]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with joined() as ranks:
        assert type(ranks) is Ranks and not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"),
                        ("MASTER_PORT", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="this machine has 1"), joined("cuda"):
        pass


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_shares_cover_the_batch_once(n):
    joint = torch.arange(2.0 * n).reshape(n, 2)
    for size in (2, 3, 4):
        shares = []
        for rank in range(size):
            ranks = SimpleNamespace(rank=rank, size=size)
            shares.append(ProcessRanks.own_rows(ranks, joint))
            assert torch.isfinite(shares[-1]).all() and len(shares[-1]) == -(-n // size)
            filled = ProcessRanks.own_rows(ranks, joint, math.nan)
            assert torch.isfinite(filled).sum() <= torch.isfinite(shares[-1]).sum()
        assert torch.equal(torch.cat(shares)[:n], joint)
