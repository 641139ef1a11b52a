"""`compile`: the same training up to rounding, from compiled code where it serves, and one sentence where it cannot."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.training import LossWeights, Stage, Trainer, TrainingInterrupted
from openmm_bg.training import objective as objective_module
from openmm_bg.training.compiled import CompiledDensity

FIGURES = ("loss", "nll", "w2", "kl", "buffer", "variance", "path", "gradient_norm", "validation_nll", "ess")


class Counting:
    """A backend of torch.compile that runs what was traced as it is, and counts."""

    def __init__(self, delay: float = 0.0) -> None:
        self.compiled = self.runs = 0
        self.delay = delay

    def __call__(self, graph, inputs):
        self.compiled += 1
        time.sleep(self.delay)

        def run(*arguments):
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def counting(monkeypatch):
    """The backend of every training of the test."""
    backend = Counting()
    monkeypatch.setattr(objective_module, "CompiledDensity", partial(CompiledDensity, backend=backend))
    return backend


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Code compiled for one test's flow is of no use to the next one's, and torch keeps eight versions at most."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attention_flow(kit, **changes):
    settings = {"conditioner": "attention", "d_model": 8, "d_key": 4, "d_value": 8, "linear": "spline", "dropout": 0.2}
    return kit.small_flow(**({"n_backbone_blocks": 0, **settings} | changes))


def all_stages(steps=4):
    return [
        Stage(name="nll", losses=LossWeights(nll=1), steps=steps, warmup_steps=0),
        Stage(name="w2+kl", losses=LossWeights(nll=1, w2=0.3, kl=0.1), steps=steps, warmup_steps=0),
        Stage(name="buffer", losses=LossWeights(buffer=1), steps=steps, warmup_steps=0),
        Stage(name="variance", losses=LossWeights(variance=1), steps=steps, warmup_steps=0),
        Stage(name="path", losses=LossWeights(nll=0.5, path=0.5), steps=steps, path_samples="flow"),
    ]


def make(kit, stages, *, flow=None, directory=None, **changes):
    flow = attention_flow(kit) if flow is None else flow
    return Trainer(
        flow, kit.torsion_data(300), kit.small_config(stages, **changes), target=kit.TorsionTarget(),
        backbone_atoms=[0, 1, 2], progress=False, directory=directory,
    )  # fmt: skip


def largest_difference(rows, others):
    """Of any figure of any step, relative where it is above 1."""
    worst = 0.0
    for a, b in zip(rows, others, strict=True):
        assert a["stage"] == b["stage"]
        for name in FIGURES:
            assert (a[name] is None) == (b[name] is None), name
            if a[name] is not None:
                worst = max(worst, abs(a[name] - b[name]) / max(1.0, abs(a[name])))
    return worst


def nudged(flow):
    """The flow with every parameter one rounding error away: what that does to a curve is its tolerance."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.0 + torch.finfo(parameter.dtype).eps)
    return flow


def told(caplog):
    """Warnings of this package; torch's compiler logs a great deal to itself."""
    ours = [record for record in caplog.records if record.name.startswith("openmm_bg")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def test_every_loss_trains_as_without(kit, counting, monkeypatch):
    """Dropout, a buffer, several losses with one pass, every kind of stage; and the comparison can fail."""
    plain = make(kit, all_stages()).run()
    rounding = largest_difference(plain, make(kit, all_stages(), flow=nudged(attention_flow(kit))).run())
    assert rounding > 0.0 and counting.runs == 0
    trainer = make(kit, all_stages(), compile=True)
    names = list(trainer.density.state_dict())
    rows = trainer.run()
    assert counting.compiled == 1  # for all stages
    assert counting.runs == 1 + 5 * 4  # one to prepare; one for every step with a likelihood
    assert largest_difference(plain, rows) <= 10.0 * rounding
    assert list(trainer.density.state_dict()) == names and not any("_orig_mod" in name for name in names)
    # A compiled density that is off by a thousandth has another curve.
    right = CompiledDensity.log_prob
    monkeypatch.setattr(CompiledDensity, "log_prob", lambda self, y: 1.001 * right(self, y))
    off = make(kit, all_stages()[:1], compile=True).run()
    assert largest_difference(plain[: len(off)], off) > 100.0 * rounding


def test_other_sizes_and_uses_are_eager(kit, counting):
    flow = kit.small_flow().train()
    y = kit.torsion_data(100).y.float()
    density = CompiledDensity(flow, counting)
    density.prepare(y[:64])
    assert all(parameter.grad is None for parameter in flow.parameters())

    def gradient(function, batch):
        flow.zero_grad()
        function(batch).mean().backward()
        return torch.cat([parameter.grad.reshape(-1) for parameter in flow.parameters()])

    runs = counting.runs
    for rows, served in ((64, 1), (63, 1), (48, 1), (47, 0), (1, 0), (65, 0), (100, 0)):
        # Rows beyond the batch are dropped again, and with them their gradients.
        expected, found = gradient(flow.log_prob, y[:rows]), gradient(density.log_prob, y[:rows])
        assert torch.allclose(found, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))
        assert counting.runs - runs == served, rows
        runs = counting.runs
    with torch.no_grad():
        density.log_prob(y[:64])
    density.log_prob(y[:64].requires_grad_(True))
    density.log_prob(y[:64].double())
    density.eval()
    assert not flow.training and not density.training
    density.log_prob(y[:64])
    density.train()
    z = density.sample_base(64).float()
    assert torch.equal(density(z)[0], flow(z)[0]) and torch.equal(density.inverse(y)[0], flow.inverse(y)[0])
    assert counting.runs == runs and counting.compiled == 1


@pytest.mark.parametrize("before", [False, True])
def test_resumes_with_and_without(kit, counting, tmp_path, before):
    """A checkpoint of an eager training is one of a compiled training, and the other way round."""
    stages = all_stages()[:3]
    settings = {"checkpoint_every": 3, "gradient_checkpointing": False}
    whole = make(kit, stages, **settings).run()
    rounding = largest_difference(whole, make(kit, stages, flow=nudged(attention_flow(kit)), **settings).run())
    broken = make(kit, stages, directory=tmp_path, compile=before, **settings)
    step = broken._train_step

    def interrupting(*arguments):
        row = step(*arguments)
        broken._interruption.requested = broken.step == 7
        return row

    broken._train_step = interrupting
    with pytest.raises(TrainingInterrupted):
        broken.run()
    resumed = make(kit, stages, directory=tmp_path, compile=not before, **settings)
    rows = resumed.run(resume=True)
    assert counting.runs > 1
    assert largest_difference(whole, rows) <= 10.0 * rounding
    assert resumed.config.model_dump()["compile"] is (not before)


def test_recomputed_layers_are_not_compiled(kit):
    """Their second pass would draw another dropout, and the gradient be that of neither."""
    with pytest.raises(InputError, match="compile and gradient_checkpointing exclude each other"):
        kit.small_config(all_stages(), compile=True, gradient_checkpointing=True)


def test_no_compiler_is_told_once(kit, monkeypatch, caplog):
    """Before anything else is tried; the training is the eager one, bit for bit."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    plain = make(kit, all_stages(2)[:2]).run()
    caplog.clear()
    with caplog.at_level(logging.INFO, "openmm_bg"):
        rows = make(kit, all_stages(2)[:2], compile=True).run()
    (warning,) = told(caplog)
    assert "no C++ compiler no-such-compiler" in warning and "CXX" in warning
    assert "Compiling" not in caplog.text
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]


def test_a_compiler_that_fails_is_told_once(kit, monkeypatch, caplog):
    def broken(graph, inputs):
        raise OSError("no space left\nand much more")

    monkeypatch.setattr(objective_module, "CompiledDensity", partial(CompiledDensity, backend=broken))
    plain = make(kit, all_stages(2)[:2]).run()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "openmm_bg"):
        rows = make(kit, all_stages(2)[:2], compile=True).run()
    (warning,) = told(caplog)
    assert "without torch.compile" in warning and "no space left" in warning and "\n" not in warning
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]


def test_code_that_no_longer_fits_is_left(kit, counting, caplog):
    """Nothing is compiled anew in the middle of a stage: a sentence, and the flow's own pass."""
    flow = kit.small_flow().train()
    y = kit.torsion_data(64).y.float()
    density = CompiledDensity(flow, counting)
    density.prepare(y)
    flow.inner.joint_blocks.blocks[0].max_log_scale = 1.5
    runs = counting.runs
    for _ in range(2):
        assert torch.equal(density.log_prob(y), flow.log_prob(y))
    assert counting.compiled == 1 and counting.runs == runs
    (warning,) = told(caplog)
    assert "no longer fits" in warning and "\n" not in warning
    density.prepare(y[:32])
    assert counting.compiled == 1


def test_compiling_is_not_training_time(kit, monkeypatch, caplog):
    backend = Counting(delay=1.0)
    monkeypatch.setattr(objective_module, "CompiledDensity", partial(CompiledDensity, backend=backend))
    stages = [Stage(name="nll", losses=LossWeights(nll=1), seconds=0.3)]
    with caplog.at_level(logging.INFO, "openmm_bg"):
        rows = make(kit, stages, flow=kit.small_flow(), compile=True).run()
    assert backend.compiled == 1 and len(rows) > 1 and rows[0]["seconds"] < 0.3
    assert "Compiled in" in caplog.text


INDUCTOR = """
import copy, importlib.util, json, os, sys
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("stand_ins", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
from openmm_bg.training.compiled import CompiledDensity

class Noisy(torch.nn.Module):
    # The flow, and a dropout that costs little to compile.
    def __init__(self):
        super().__init__()
        self.flow = kit.small_flow(n_backbone_blocks=0, n_joint_blocks=2, hidden=8)
        self.dropout = torch.nn.Dropout(0.5)
        self.slope = torch.nn.Parameter(torch.ones(3))

    def log_prob(self, y):
        return self.flow.log_prob(y) + self.dropout(self.slope * y).sum(1)

density = Noisy().train()
torch.manual_seed(0)
with torch.no_grad():
    for parameter in density.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
nudged = copy.deepcopy(density)
with torch.no_grad():
    for parameter in nudged.parameters():
        parameter.mul_(1.0 + 2.0**-23)
y = kit.torsion_data(64).y.float()
compiled = CompiledDensity(density)
compiled.prepare(y)
assert compiled._log_prob is not None

def gradient(module, function, batch, seed=1):
    torch.manual_seed(seed)  # of dropout
    module.zero_grad()
    loss = function(batch).mean()
    loss.backward()
    return torch.cat([loss.detach().reshape(1), *(p.grad.reshape(-1) for p in module.parameters())])

found = {"seconds": compiled.seconds, "served": compiled._log_prob is not None}
right = gradient(density, density.log_prob, y)
for name, other in {
    "compiled": gradient(density, compiled.log_prob, y),
    "nudged": gradient(nudged, nudged.log_prob, y),
    "other dropout": gradient(density, density.log_prob, y, seed=2),
}.items():
    found[name] = float((other - right).abs().max() / right.abs().max())
with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
    found["children"] = file.read().split()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_inductor_agrees_with_eager_and_leaves_no_process(tmp_path):
    """C++ of a small flow: gradients as of parameters one rounding error away, with the dropout of an eager pass."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR, str(Path(__file__).with_name("conftest.py"))],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["served"] and found["seconds"] > 0.0
    # Sums in another order round at every step, the nudge once.
    assert 0.0 < found["nudged"] and found["compiled"] < 10.0 * found["nudged"] < 0.01 * found["other dropout"]
    assert found["children"] == []
