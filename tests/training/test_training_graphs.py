"""`cuda_graphs` without a GPU: a recorder of torch's calls stands for CUDA's."""

from __future__ import annotations

import gc
import importlib.util
import logging
import random
import weakref
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from openmm_bg.errors import EnergyError, InputError
from openmm_bg.training import Stage, Trainer
from openmm_bg.training import objective as objective_module
from openmm_bg.training import step as step_module
from openmm_bg.training.graphs import WARMUP, CudaRecorder, StepGraphs
from openmm_bg.training.parallel import Ranks

from .replay import LOSSES, STEPS, CallRecorder, flow, stages

FIGURES = (
    "loss", "nll", "w2", "kl", "buffer", "variance", "path", "gradient_norm", "validation_nll", "ess", "dropped",
)  # fmt: skip


def trained(kit, stages: list[Stage], *, graphs: bool = True, density=None, target=None, seed: int = 3, **changes):
    config = kit.small_config(stages, seed=seed, cuda_graphs=graphs, **changes)
    made = Trainer(
        flow(kit) if density is None else density, kit.torsion_data(400), config,
        target=target or kit.TorsionTarget(), backbone_atoms=[0, 1, 2], progress=False,
    )  # fmt: skip
    made.run()
    return made


@pytest.fixture
def recorders(monkeypatch):
    """What the trainings of the test record with."""
    made: list[CallRecorder] = []

    def recorder():
        made.append(CallRecorder())
        return made[-1]

    monkeypatch.setattr(step_module, "_new_recorder", lambda config, *_: recorder if config.cuda_graphs else None)
    return made


@pytest.fixture
def replays(monkeypatch):
    """The graphs of every stage that was trained."""
    made: list[StepGraphs] = []

    class Remembered(StepGraphs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(step_module, "StepGraphs", Remembered)
    return made


def same_curves(a: Trainer, b: Trainer) -> None:
    assert len(a.history) == len(b.history) > 0
    for mine, theirs in zip(a.history, b.history, strict=True):
        assert {name: mine[name] for name in FIGURES} == {name: theirs[name] for name in FIGURES}
    for p, q in zip(a.density.parameters(), b.density.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("name", "path_samples"), [*((name, "flow") for name in LOSSES), ("path", "data"), ("path", "buffer")]
)
def test_a_replayed_training_is_the_plain_one_bit_for_bit(kit, recorders, replays, caplog, name, path_samples):
    """Draws, dropout, clipping, moving average, energies and what they drop: all of it anew in each replay."""
    caplog.set_level(logging.INFO)
    plan = stages(name, path_samples=path_samples)
    target = kit.GaussianTarget([0.5, 0.0, 1.0], [0.7, 1.0, 0.2], wall=1.2)  # some samples have no energy
    target.coordinates = kit.PlaneCoordinates()
    replayed = trained(kit, plan, target=target)
    assert replays[0].given_up is None and replays[0].replays == STEPS - WARMUP - 1
    assert recorders[0].n_recorded > 100
    assert any("replayed as" in r.message for r in caplog.records) and not any(
        r.levelno >= logging.WARNING for r in caplog.records
    )
    same_curves(replayed, trained(kit, plan, graphs=False, target=target))
    if name != "likelihood" and name != "w2":
        assert sum(row["dropped"] for row in replayed.history) > 0


def test_frames_with_weights_and_several_stages(kit, recorders, replays):
    """A stage has graphs of its own, and weights of frames are drawn with them."""
    plan = [*stages("likelihood"), *stages("energy"), *stages("buffer")]
    data = kit.torsion_data(400)
    data.log_weights = torch.linspace(-1.0, 1.0, 400, dtype=torch.float64)
    made = []
    for graphs in (True, False):
        config = kit.small_config(plan, cuda_graphs=graphs, weighting="loss", ema_decay=0.0)
        made.append(
            Trainer(
                flow(kit), data, config, target=kit.TorsionTarget(), backbone_atoms=[0, 1, 2], progress=False
            )
        )  # fmt: skip
        made[-1].run()
    assert [g.replays for g in replays] == [STEPS - WARMUP - 1] * 3
    same_curves(*made)


def test_a_resumed_training_records_again(kit, recorders, replays, tmp_path):
    plan = stages("energy")
    whole = trained(kit, plan)
    made = []
    for steps in (WARMUP + 2, STEPS):
        part = [plan[0].model_copy(update={"steps": steps})] if steps < STEPS else plan
        config = kit.small_config(part, seed=3, cuda_graphs=True)
        trainer = Trainer(
            flow(kit), kit.torsion_data(400), config, target=kit.TorsionTarget(), backbone_atoms=[0, 1, 2],
            progress=False, directory=tmp_path,
        )  # fmt: skip
        made.append(trainer)
        if steps < STEPS:
            trainer.config = kit.small_config(plan, seed=3, cuda_graphs=True)
            trainer._interruption.requested = False
            step = trainer._train_step

            def stop(stage, fraction, trainer=trainer, step=step):
                row = step(stage, fraction)
                trainer._interruption.requested = trainer.step == WARMUP + 2
                return row

            trainer._train_step = stop
            with pytest.raises(Exception, match="resume to go on"):
                trainer.run()
        else:
            trainer.run(resume=True)
    same_curves(made[-1], whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu(kit, replays, name):
    """The real ones. Sums of a GPU have no fixed order, and nine steps at a rate of 1e-3 do not blow that up."""
    made = [trained(kit, stages(name), graphs=graphs, density=flow(kit).cuda()) for graphs in (True, False)]
    assert replays[0].given_up is None and replays[0].replays == STEPS - WARMUP - 1
    for mine, theirs in zip(made[0].history, made[1].history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-4)


def test_the_benchmark_times_replays(recorders):
    path = Path(__file__).parents[1] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("bench_training_graphs", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.replayed(Namespace(device="cpu", batch={"cpu": 8}, repeats=1), "cpu", "dipeptide")
    assert found["without graphs"] is None and recorders[0].n_recorded > 100
    assert found["gain"] > 0.0


# --- what must be noticed -----------------------------------------------------------------------------------------


def test_graphs_that_do_nothing_are_noticed(kit, monkeypatch, replays, caplog):
    """The deliberate error: replays that leave the gradient of the recorded step."""
    idle = partial(CallRecorder, runs=False)
    monkeypatch.setattr(step_module, "_new_recorder", lambda config, *_: idle if config.cuda_graphs else None)
    plan = stages("energy")
    made = trained(kit, plan, density=flow(kit, dropout=0.0))  # such a graph does not draw either
    assert "the gradient of a replayed step is wrong" in replays[0].given_up and replays[0].replays == 1
    assert sum("trains without CUDA graphs" in r.message for r in caplog.records) == 1
    same_curves(made, trained(kit, plan, graphs=False, density=flow(kit, dropout=0.0)))


@pytest.mark.parametrize("frozen", ["number", "draw"])
def test_what_python_froze_is_noticed(frozen):
    """A number of Python's in the recorded step, and a draw by a generator that is not recorded."""
    gradient = [torch.zeros(3)]
    source = random.Random(1)
    x = torch.arange(3.0)

    def step():
        factor = source.random() if frozen == "draw" else float(len(taken))
        taken.append(factor)
        gradient[0].copy_(x * factor)
        return {"loss": gradient[0].sum()}

    taken: list[float] = []
    graphs = StepGraphs(CallRecorder(), gradient, "toy")
    for _ in range(WARMUP + 2):
        graphs.run(step)
    assert "wrong by" in graphs.given_up
    assert torch.equal(gradient[0], x * taken[-1])  # the plain step's


def test_a_step_without_a_finite_gradient_proves_nothing():
    """The comparison waits for one that has."""
    gradient = [torch.zeros(2)]
    values = iter([1.0] * (WARMUP + 1) + [float("nan"), 2.0, 3.0])

    graphs = StepGraphs(CallRecorder(), gradient, "toy")

    def step():
        x = graphs.outside(lambda: torch.tensor(next(values)))
        gradient[0].copy_(x * torch.ones(2))
        return {"loss": gradient[0].sum()}

    found = [float(graphs.run(step)["loss"]) for _ in range(WARMUP + 4)]
    assert found[-2:] == [4.0, 6.0] and found[-3] != found[-3]
    assert graphs.given_up is None and graphs.replays == 3


@pytest.mark.parametrize("name", ["likelihood", "energy", "buffer"])
def test_a_step_that_waits_trains_without_graphs(kit, monkeypatch, recorders, replays, caplog, name):
    """The deliberate error: a look at a number. The draws made before it are used: the curve is the plain one."""
    plan = stages(name)
    plain = trained(kit, plan, graphs=False)
    terms = objective_module.Objective.terms

    def waiting(self, stage):
        found, figures = terms(self, stage)
        float(next(iter(found.values())).detach())
        return found, figures

    monkeypatch.setattr(objective_module.Objective, "terms", waiting)
    made = trained(kit, plan)
    assert "could not be recorded" in replays[0].given_up and "_local_scalar_dense" in replays[0].given_up
    assert sum("trains without CUDA graphs" in r.message for r in caplog.records) == 1
    same_curves(made, plain)


def test_errors_of_energies_are_errors_still(kit, recorders):
    """While recording, and between replays."""
    for fails_at in (WARMUP + 1, WARMUP + 4):
        target = kit.TorsionTarget()
        whole, calls = target.log_density, []

        def failing(y, s, whole=whole, calls=calls, fails_at=fails_at):
            calls.append(len(y))
            if len(calls) > fails_at:  # one call finds the median of the data
                raise EnergyError("no energy")
            return whole(y, s)

        target.log_density = failing
        with pytest.raises(EnergyError, match="no energy"):
            trained(kit, stages("energy"), target=target)


def test_other_shapes_between_graphs_are_an_error():
    gradient = [torch.zeros(2)]
    sizes = iter([2] * (WARMUP + 1) + [3, 3])
    graphs = StepGraphs(CallRecorder(), gradient, "toy")

    def step():
        x = graphs.outside(lambda: torch.ones(next(sizes)))
        gradient[0].copy_(x[:2])
        return {"loss": x.sum()}

    for _ in range(WARMUP + 1):
        graphs.run(step)
    with pytest.raises(RuntimeError, match="other shapes"):
        graphs.run(step)


def test_without_a_gpu_a_training_says_so_and_goes_on(kit, caplog):
    plan = stages("likelihood")
    made = trained(kit, plan)
    assert sum("the flow is on the device 'cpu'" in r.message for r in caplog.records) == 1
    same_curves(made, trained(kit, plan, graphs=False))


def test_several_processes_train_without_graphs(kit, caplog):
    class Two(Ranks):
        size = 2

    config = kit.small_config(stages("likelihood"), cuda_graphs=True)
    assert step_module._new_recorder(config, torch.device("cuda"), Two()) is None
    assert "several processes" in caplog.text


def test_recomputed_layers_and_graphs_exclude_each_other(kit):
    with pytest.raises((InputError, ValueError), match="exclude each other"):
        kit.small_config(stages("likelihood"), cuda_graphs=True, gradient_checkpointing=True)


class FailingCapture:
    """What stands for torch.cuda: a capture whose end is an error, and a generator that it leaves unusable."""

    def __init__(self, monkeypatch, fails_at: str) -> None:
        self.left: list[str] = []
        self.generator_works = True
        self.fails_at = fails_at
        outer = self

        class Generator:
            def clone_state(self):
                return "the same numbers"

            def graphsafe_set_state(self, state):
                assert state == "the same numbers"
                outer.generator_works = True

        class Graph:
            def __init__(self, *_, **__):
                pass

            def replay(self):
                pass

        class Entered:
            def __init__(self, name):
                self.name = name

            def __enter__(self):
                if self.name == "graph":
                    outer.generator_works = False
                    if fails_at == "begin":
                        raise RuntimeError("capture did not begin")

            def __exit__(self, *_):
                outer.left.append(self.name)
                if self.name == "graph":
                    if fails_at == "end":
                        raise RuntimeError("capture was invalidated")
                    outer.generator_works = True

        fake = {
            "graph_pool_handle": lambda: (0, 1), "Stream": lambda device: "own stream", "CUDAGraph": Graph,
            "device": lambda device: Entered("device"), "stream": lambda stream: Entered("stream"),
            "graph": lambda *_, **__: Entered("graph"), "default_generators": [None, Generator()],
        }  # fmt: skip
        for name, value in fake.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("fails_at", ["begin", "end", "nowhere"])
def test_a_failed_capture_leaves_nothing_behind(monkeypatch, fails_at):
    """Neither its stream, which torch would leave current, nor a generator that believes in it (torch up to 2.12)."""
    cuda = FailingCapture(monkeypatch, fails_at)
    recorder = CudaRecorder(torch.device("cuda", 1))
    if fails_at == "nowhere":
        recorder.begin()
        assert not cuda.generator_works
        recorder.end()
    elif fails_at == "end":
        recorder.begin()
        with pytest.raises(RuntimeError, match="invalidated"):
            recorder.end()
    else:
        with pytest.raises(RuntimeError, match="did not begin"):
            recorder.begin()
    recorder.abandon()
    assert cuda.generator_works
    assert cuda.left[-2:] == ["stream", "device"]


def test_memory_of_a_failed_recording_is_free_for_the_plain_step(recorders):
    """As memory may have been what failed."""
    made: list[weakref.ref] = []
    alive: list[bool] = []
    gradient = [torch.zeros(2)]
    graphs = StepGraphs(CallRecorder(), gradient, "toy")

    def step():
        gc.collect()
        alive.append(bool(made and made[-1]() is not None))
        large = torch.ones(5) * len(made)
        made.append(weakref.ref(large))
        gradient[0].copy_(large[:2])
        if len(made) == WARMUP + 1:
            float(large[0])
        return {"loss": large.sum()}

    for _ in range(WARMUP + 1):
        graphs.run(step)
    assert graphs.given_up is not None and len(made) == WARMUP + 2
    assert not any(alive)


def test_memory_that_holds_no_second_step_ends_the_comparison(kit, recorders, replays, monkeypatch):
    plan = stages("energy")
    plain = trained(kit, plan, graphs=False)
    terms = objective_module.Objective.terms
    failed = []

    def failing(self, stage):
        found = terms(self, stage)  # its draws are recalled, and once more after the failure
        if replays[0].replays == 1 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no memory")
        return found

    monkeypatch.setattr(objective_module.Objective, "terms", failing)
    made = trained(kit, plan)
    assert failed and "memory does not hold a step beside them" in replays[0].given_up
    same_curves(made, plain)


def test_wrong_figures_are_noticed(kit, recorders, replays, monkeypatch):
    """The deliberate error: a figure that is a number of the recorded step."""
    terms = objective_module.Objective.terms
    calls = []

    def frozen(self, stage):
        calls.append(1)
        found, figures = terms(self, stage)
        return found, {**figures, "ess": torch.full((), float(len(calls)))}

    monkeypatch.setattr(objective_module.Objective, "terms", frozen)
    trained(kit, stages("likelihood"))
    assert replays[0].given_up == "figures of a replayed step are wrong (ess)"


def test_frozen_parameters_stay_as_they_are(kit, recorders):
    densities = [flow(kit), flow(kit)]
    for graphs, density in zip((True, False), densities, strict=True):
        first = next(density.parameters()).requires_grad_(False)
        before = first.clone()
        trained(kit, stages("energy"), density=density, graphs=graphs)
        assert torch.equal(first, before)
    for p, q in zip(*(density.parameters() for density in densities), strict=True):
        assert torch.equal(p, q)
