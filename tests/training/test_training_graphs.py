"""`cuda_graphs` without a GPU: a recorder of torch's calls stands for CUDA's, and the device ``meta`` for a GPU's."""

from __future__ import annotations

import copy
import importlib.util
import logging
import random
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from openmmtools import testsystems
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_bg.coordinates import CoordinateMap, read_constraints
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.flow import FlowConfig, build_flow
from openmm_bg.training import LossWeights, Stage, Trainer
from openmm_bg.training import objective as objective_module
from openmm_bg.training import step as step_module
from openmm_bg.training.graphs import WARMUP, StepGraphs
from openmm_bg.training.parallel import Ranks
from openmm_bg.training.run import make_dataset
from openmm_bg.training.step import GradientStep

from .replay import CallRecorder, Wait, refuse_waits

import openmm  # isort: skip

FIGURES = (
    "loss", "nll", "w2", "kl", "buffer", "variance", "path", "gradient_norm", "validation_nll", "ess", "dropped",
)  # fmt: skip
STEPS = WARMUP + 6
LOSSES = {
    "likelihood": {"nll": 1.0},
    "w2": {"nll": 1.0, "w2": 5.0},
    "energy": {"nll": 1.0, "w2": 5.0, "kl": 0.1},
    "energy alone": {"kl": 0.1},
    "buffer": {"buffer": 1.0, "variance": 0.3},
    "path": {"nll": 1.0, "path": 0.1},
}


def stages(name: str, **changes) -> list[Stage]:
    return [Stage(name=name, losses=LossWeights(**LOSSES[name]), steps=STEPS, learning_rate=1e-3, **changes)]


def flow(kit, dropout: float = 0.2):
    return kit.small_flow(conditioner="attention", d_model=8, d_key=4, d_value=8, linear="spline", dropout=dropout)


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


# --- on a device without numbers ----------------------------------------------------------------------------------


class OneDevice(TorchDispatchMode):
    """Refuses what looks at a number, and what brings tensors of the CPU to the device or mixes them with its own.

    A single number of the CPU may meet the device's: its value goes with the launch.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_waits(func, args)
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [t for t in _pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" and (t.ndim or "copy" in str(func)) for t in given) and any(
            t.device.type == "meta" for t in (*given, *made)
        ):
            raise Wait(f"{func} brings numbers from the CPU")
        return result


class Calls:
    """Results of calls outside, from a step on the CPU, given again on the device."""

    def __init__(self) -> None:
        self.made: list = []
        self.moved: list | None = None

    def __call__(self, function, *inputs):
        if self.moved is not None:
            return self.moved.pop(0)
        self.made.append(function(*inputs))
        return self.made[-1]

    def move(self) -> None:
        self.moved = _pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), self.made)


def step_on_meta(kit, name: str, density, data, target, backbone_atoms) -> None:
    """A step of the losses on the CPU, and again on ``meta``."""
    density.train()
    plan = stages(name)
    config = kit.small_config(plan)
    coordinates = target.coordinates
    objective = objective_module.Objective(
        density, density, data, config, target=target, coordinates=coordinates, backbone_atoms=backbone_atoms
    )
    objective.prepare_energies()
    objective.begin_stage(plan[0])
    objective.begin_step(plan[0], 0, 0)
    objective.outside = calls = Calls()
    parameters = list(density.parameters())
    step = GradientStep(objective, parameters, config, Ranks())
    step.begin_stage(plan[0])
    objective.outside = calls
    expected = step._losses_and_gradient(plan[0])

    objective.device = torch.device("meta")
    objective.density = copy.deepcopy(density).to("meta")
    objective.backbone = objective.backbone.to("meta")
    if isinstance(coordinates, CoordinateMap):
        objective.coordinates = copy.deepcopy(coordinates).to("meta")
    data.positions = None if data.positions is None else data.positions.to("meta")
    objective.y, data.s = objective.y.to("meta"), data.s.to("meta")
    on_meta = GradientStep(objective, list(objective.density.parameters()), config, Ranks())
    on_meta.begin_stage(plan[0])
    calls.move()
    with OneDevice():
        found = on_meta._losses_and_gradient(plan[0])
    assert list(found) == list(expected) and calls.moved == []
    assert {value.device.type for value in found.values()} == {"meta"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_needs_neither_waits_nor_transfers(kit, name):
    step_on_meta(kit, name, flow(kit), kit.torsion_data(400), kit.TorsionTarget(), [0, 1, 2])


@pytest.fixture(scope="module")
def dipeptide():
    """System, Topology and frames [n, N, 3] of a little MD."""
    test = testsystems.AlanineDipeptideVacuum()
    integrator = openmm.LangevinMiddleIntegrator(300.0, 10.0, 0.002)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(test.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(test.positions)
    frames = []
    for _ in range(160):
        integrator.step(10)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    return test.system, test.topology, np.array(frames)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("preset", ["cpu", "protein", "paper", "nsf"])
def test_neither_do_flows_and_coordinates_of_a_molecule(kit, dipeptide, preset, kept):
    """Every preset's layers, and Cartesian coordinates of samples and, unless they are kept, of frames."""
    system, topology, frames = dipeptide
    coordinates = CoordinateMap.fit(topology, frames, read_constraints(system, topology), "reduced")
    dataset = make_dataset(coordinates, frames, None, keep_positions=kept)
    small = {"n_joint_blocks": 2, "n_backbone_blocks": 2 if preset in ("protein", "paper") else 0}
    density = build_flow(coordinates.layout, FlowConfig.preset(preset, **small), seed=0)

    class Harmonic:
        def log_density(self, y, s):
            return -0.5 * y.square().sum(dim=1)

    target = Harmonic()
    target.coordinates = coordinates
    step_on_meta(kit, "energy", density, dataset, target, [0, 1, 2, 3])
