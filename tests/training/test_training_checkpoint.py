"""Checkpoints: atomic, checked, and intact whatever fails."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from openmm_bg import files
from openmm_bg.errors import CheckpointError
from openmm_bg.training import checkpoint
from openmm_bg.training.history import COLUMNS, History


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_and_replacement(tmp_path):
    tensors = {"a": torch.randn(3, 2), "rng": torch.get_rng_state(), "step": torch.tensor(4.0)}
    checkpoint.save(tmp_path, 5, tensors, {"x": [1.5, None]})
    step, loaded, meta = checkpoint.load(tmp_path)
    assert step == 5 and meta == {"x": [1.5, None]}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    checkpoint.save(tmp_path, 6, {"a": torch.zeros(1)}, {})
    assert _names(tmp_path) == ["checkpoint-6.safetensors", "checkpoint.json"]
    checkpoint.save(tmp_path, 6, {"a": torch.ones(1)}, {})  # the same step again
    assert checkpoint.load(tmp_path)[1]["a"] == 1 and len(_names(tmp_path)) == 2
    checkpoint.save(tmp_path, 6, {"a": 2 * torch.ones(1)}, {})
    assert checkpoint.load(tmp_path)[1]["a"] == 2 and len(_names(tmp_path)) == 2


def test_only_own_leftovers_are_deleted(tmp_path):
    for name in ("checkpoint-3.safetensors", "checkpoint-9.safetensors.tmp", "flow.safetensors", "notes.tmp"):
        (tmp_path / name).write_bytes(b"x")
    checkpoint.save(tmp_path, 4, {"a": torch.zeros(1)}, {})
    assert _names(tmp_path) == [
        "checkpoint-4.safetensors",
        "checkpoint.json",
        "flow.safetensors",
        "notes.tmp",
    ]


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
@pytest.mark.parametrize("nth", [1, 2])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call, nth):
    checkpoint.save(tmp_path, 1, {"a": torch.zeros(1000)}, {"n": 1})
    before = _names(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    count = 0

    def failing(real):
        def function(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == nth:
                raise full
            return real(*arguments, **keywords)

        return function

    if call == "write":
        real_open = open

        class File:
            def __init__(self, *arguments):
                self.file = real_open(*arguments)
                self.write = failing(self.file.write)

            def __enter__(self):
                return self

            def __exit__(self, *arguments):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

        monkeypatch.setattr(files, "open", File, raising=False)
    else:
        # Directories are synced too, and not being able to is no error: count files only.
        monkeypatch.setattr(files, "_sync_directory", lambda directory: None)
        monkeypatch.setattr(os, call, failing(getattr(os, call)))
    with pytest.raises(CheckpointError, match="No space left") as caught:
        checkpoint.save(tmp_path, 2, {"a": torch.ones(1000)}, {"n": 2})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    monkeypatch.undo()
    assert _names(tmp_path) == before
    step, tensors, meta = checkpoint.load(tmp_path)
    assert step == 1 and meta == {"n": 1} and tensors["a"].sum() == 0
    checkpoint.save(tmp_path, 2, {"a": torch.ones(1000)}, {"n": 2})
    assert checkpoint.load(tmp_path)[0] == 2


def test_a_real_limit_on_file_size(tmp_path):
    """The kernel's own refusal, in a child process with a small RLIMIT_FSIZE."""
    resource = pytest.importorskip("resource")
    checkpoint.save(tmp_path, 1, {"a": torch.zeros(10)}, {})
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            checkpoint.save(tmp_path, 2, {"a": torch.zeros(10_000)}, {})
        except CheckpointError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert _names(tmp_path) == ["checkpoint-1.safetensors", "checkpoint.json"]
    assert checkpoint.load(tmp_path)[0] == 1


@pytest.mark.parametrize(
    "damage",
    ["flip", "truncate", "remove", "index", "version", "elsewhere", "none"],
)
def test_damage_is_noticed(tmp_path, damage):
    checkpoint.save(tmp_path, 7, {"a": torch.zeros(100)}, {})
    tensors, index = tmp_path / "checkpoint-7.safetensors", tmp_path / "checkpoint.json"
    data = bytearray(tensors.read_bytes())
    text = json.loads(index.read_text())
    if damage == "none":
        checkpoint.load(tmp_path)
        return
    if damage == "flip":
        data[-3] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(data[:-10])
    elif damage == "remove":
        tensors.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:40])
    elif damage == "version":
        index.write_text(json.dumps({**text, "version": 99}))
    else:
        index.write_text(json.dumps({**text, "file": "../../etc/passwd"}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_loading_into_another_module_is_refused():
    tensors = {"model.weight": torch.zeros(2, 2), "model.bias": torch.zeros(2)}
    checkpoint.load_module(torch.nn.Linear(2, 2), tensors, "model.")
    for module in (torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, bias=False)):
        with pytest.raises(CheckpointError, match="another flow"):
            checkpoint.load_module(module, tensors, "model.")


def test_history_is_cut_back_and_reads_to_the_same_bits(tmp_path):
    history = History(tmp_path)
    history.append(step=1, stage="a, b", loss=0.1 + 0.2, dropped=0, skipped=0)
    size = history.flush()
    history.append(step=2, stage="a, b", loss=float("nan"), dropped=3, skipped=1)
    assert history.flush() > size
    again = History(tmp_path)
    again.restore(size)
    assert again.rows == history.rows[:1] and (tmp_path / "losses.csv").stat().st_size == size
    again.append(step=2, stage="c", loss=1e-300)
    again.flush()
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0] == ",".join(COLUMNS)


def test_history_on_a_full_disk_is_cut_back(tmp_path, monkeypatch):
    history = History(tmp_path)
    history.append(step=1, stage="a")
    size = history.flush()
    history.append(step=2, stage="a")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        history.flush()
    assert (tmp_path / "losses.csv").stat().st_size == size


def test_a_lost_loss_curve_does_not_lose_the_training(tmp_path, caplog):
    history = History(tmp_path)
    history.restore(100)
    assert history.rows == [] and "new one begins" in caplog.text
