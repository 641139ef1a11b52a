"""Trainings by several processes, run by test_training_ranks.py: `python rank_scenarios.py OUTPUT`.

One process imports everything once and forks the ranks of each scenario; each rank leaves one JSON file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import openmm_bg.energy  # noqa: F401  (imported here, not by the forks)
from openmm_bg.training import LossWeights, Stage, Trainer, losses
from openmm_bg.training import objective as objective_module
from openmm_bg.training import trainer as trainer_module
from openmm_bg.training.compiled import CompiledDensity
from openmm_bg.training.dataset import Dataset
from openmm_bg.training.parallel import ProcessRanks, joined

spec = importlib.util.spec_from_file_location("stand_ins", Path(__file__).with_name("conftest.py"))
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)

STAGES = [
    Stage(name="nll", losses=LossWeights(nll=1), steps=4, warmup_steps=3, keep_best=True),
    Stage(name="w2+kl", losses=LossWeights(nll=1, w2=0.3, kl=0.1), steps=4, warmup_steps=0),
    Stage(name="buffer", losses=LossWeights(buffer=1), steps=3),
    Stage(name="variance", losses=LossWeights(variance=1), steps=3),
    Stage(name="path data", losses=LossWeights(nll=0.5, path=0.5), steps=2, path_samples="data"),
    Stage(name="path flow", losses=LossWeights(path=0.5), steps=2, path_samples="flow"),
    Stage(name="path buffer", losses=LossWeights(buffer=0.5, path=0.5), steps=3, path_samples="buffer"),
]
SIZES = {"batch_size": 63, "sample_batch": 33, "w2_data_batch": 128, "precision": "float64", "validation_frames": 41}


class CountingTarget(kit.TorsionTarget):
    """Some samples have no energy; each evaluated row is counted, as a ContextPool does."""

    def __init__(self) -> None:
        self.pool = SimpleNamespace(n_energies=0)

    def log_density(self, y, s):
        self.pool.n_energies += int(torch.isfinite(y).all(dim=1).sum())
        return torch.where(y[:, 2] < 1.5, super().log_density(y, s), -torch.inf)


def flow(dropout=0.0, seed=0):
    found = kit.small_flow(
        seed, conditioner="attention", n_backbone_blocks=0, d_model=8, d_key=4, d_value=8, linear="spline",
        dropout=dropout,
    )  # fmt: skip
    return found.double()


def data(seed=0):
    """Weighted frames: the weights enter the losses."""
    frames = kit.torsion_data(400, seed)
    weights = torch.sin(torch.arange(400, dtype=torch.float64))
    return Dataset(frames.y, frames.s, weights)


def trainer(ranks, directory=None, density=None, stages=STAGES, **changes):
    settings = SIZES | {"weighting": "loss", "validate_every": 4} | changes.pop("settings", {})
    options = {"target": CountingTarget(), "backbone_atoms": [0, 1, 2], "progress": False, "ranks": ranks} | changes
    frames = options.pop("frames", None) or data()
    return Trainer(
        flow() if density is None else density, frames, kit.small_config(stages, **settings), directory=directory,
        **options,
    )  # fmt: skip


def result(made, rows):
    return {
        "rows": rows,
        "energies": made.objective.n_energies,
        "own": made.objective.target.target.pool.n_energies if made.ranks.size > 1 else None,
        "parameters": float(sum(p.detach().square().sum() for p in made.density.parameters())),
    }


def curve(ranks, output, **changes):
    made = trainer(ranks, **changes)
    return result(made, made.run())


def nudged(ranks, output):
    """What rounding alone does to the curve: parameters that start one unit in the last place away."""
    density = flow()
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.mul_(1.0 + 2.0**-52)
    return curve(ranks, output, density=density)


def compiled(ranks, output):
    """torch traces the flow in each process, and runs what it traced."""
    objective_module.CompiledDensity = partial(CompiledDensity, backend="eager")
    made = trainer(ranks, settings={"compile": True})
    found = result(made, made.run())
    fits = made.objective._compiled._log_prob is not None
    return found | {"compiled for": len(made.objective._compiled._example) if fits else None}


def without_sum(ranks, output):
    ProcessRanks.sum_gradients = lambda self, parameters: None
    return curve(ranks, output)


def mean_of_w2(ranks, output):
    """The wrong way: each rank's W2 of its own samples, averaged."""
    whole = losses.w2_distance

    def averaged(xq, xp, *masked):
        return sum(whole(part, xp) for part in xq.chunk(ranks.size)) / ranks.size

    objective_module.losses.w2_distance = averaged
    return curve(ranks, output)


def first_half(ranks, output):
    """Stopped by a SIGTERM to the last rank, in the third stage; and that with dropout."""
    found = {}
    for name, dropout in (("plain", 0.0), ("dropout", 0.3)):
        made = trainer(ranks, directory=output / name, density=flow(dropout))
        step = made._train_step

        def interrupted(stage, fraction, made=made, step=step):
            if made.step == 9 and ranks.rank == ranks.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # torchrun may send it twice
            return step(stage, fraction)

        made._train_step = interrupted
        try:
            made.run()
        except BaseException as error:
            found[name] = [type(error).__name__, str(error), made.step]
    return found


def resumed(ranks, output):
    made = trainer(ranks, directory=output / "plain")
    return result(made, made.run(resume=True))


def resumed_dropout(ranks, output):
    made = trainer(ranks, directory=output / "dropout", density=flow(0.3))
    return result(made, made.run(resume=True))


def with_dropout(ranks, output):
    return curve(ranks, output, density=flow(0.3))


def own_clock(ranks, output):
    """A stage of ten seconds; only the main process's clock may count."""
    ticks = iter(range(10**6))
    trainer_module.time.perf_counter = lambda: next(ticks) * (1.0 if ranks.is_main else 7.3)
    return curve(ranks, output, stages=[Stage(name="a", losses={"nll": 1}, seconds=10)])


class Poisoned(kit.AffineDensity):
    """NaN in the rows that the last rank evaluates in the third step."""

    calls = 0
    rank = 0

    def log_prob(self, y):
        value = super().log_prob(y)
        if self.training:
            self.calls += 1
            if self.calls == 3 and self.rank:
                value = value * torch.nan
        return value


def one_bad(ranks, output):
    density = Poisoned(3)
    density.rank = ranks.rank
    made = trainer(ranks, density=density, stages=[Stage(name="a", losses={"nll": 1}, steps=4)])
    return result(made, made.run()) | {"finite": all(bool(torch.isfinite(p).all()) for p in density.parameters())}


MOMENT: list[float] = []  # when this rank ceased to answer, on the clock that all share


def _outcome(function):
    try:
        function()
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "at": time.monotonic(), "began": MOMENT}
    return {"error": None}


def other_data(ranks, output):
    return _outcome(lambda: trainer(ranks, frames=data(seed=ranks.rank)))


def full_disk(ranks, output):
    made = trainer(ranks, directory=output / "full", settings={"checkpoint_every": 2})
    real = os.fsync

    def full(descriptor):
        if made.step == 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    os.fsync = full
    return _outcome(made.run)


def fails(ranks, output):
    made = trainer(ranks)
    step = made._train_step

    def failing(stage, fraction):
        if made.step == 3 and ranks.rank == 1:
            MOMENT.append(time.monotonic())
            raise ValueError("this rank alone")
        return step(stage, fraction)

    made._train_step = failing
    return _outcome(made.run)


def hangs(ranks, output):
    made = trainer(ranks)
    step = made._train_step

    def hanging(stage, fraction):
        if made.step == 3 and ranks.rank == 1:
            MOMENT.append(time.monotonic())
            time.sleep(20.0)
        return step(stage, fraction)

    made._train_step = hanging
    return _outcome(made.run)


SCENARIOS = [
    (curve, 1), (curve, 2), (nudged, 1), (compiled, 2), (without_sum, 2), (mean_of_w2, 2),
    (first_half, 2), (resumed, 3), (resumed_dropout, 2), (with_dropout, 2), (own_clock, 2), (one_bad, 2),
    (other_data, 2), (full_disk, 2), (fails, 2), (hangs, 2),
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(scenario, size: int, output: Path) -> None:
    port = free_port()
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}  # fmt: skip
            with joined(timeout=3.0 if scenario is hangs else 60.0) as ranks:
                found = scenario(ranks, output)
                (output / f"{scenario.__name__}-{size}-{rank}.json").write_text(json.dumps(found))
                if scenario in (fails, hangs):
                    raise SystemExit  # as a failed process leaves: without waiting for the others
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    wanted = sys.argv[2:]
    for scenario, size in SCENARIOS:
        if not wanted or scenario.__name__ in wanted:
            began = time.perf_counter()
            run(scenario, size, Path(sys.argv[1]))
            print(scenario.__name__, size, f"{time.perf_counter() - began:.1f} s", flush=True)
