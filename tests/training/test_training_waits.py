"""A training step on the device ``meta``, which has shapes and no numbers.

A look at a number, as would make a CPU wait for a GPU, is an error there, and so is a tensor of the CPU.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from openmmtools import testsystems
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_bg.coordinates import CoordinateMap, read_constraints
from openmm_bg.coordinates import frames as frames_module
from openmm_bg.flow import FlowConfig, build_flow
from openmm_bg.training import objective as objective_module
from openmm_bg.training.parallel import Ranks
from openmm_bg.training.run import make_dataset
from openmm_bg.training.step import GradientStep

from .replay import LOSSES, Wait, flow, refuse_waits, stages

import openmm  # isort: skip


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


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("preset", ["cpu", "protein", "paper", "nsf"])
def test_neither_do_flows_and_coordinates_of_a_molecule(kit, dipeptide, monkeypatch, preset, kept, small):
    """Every preset's layers, and Cartesian coordinates of samples and, unless they are kept, of frames: by the way of
    small batches of small molecules, and by that of all others."""
    if not small:
        monkeypatch.setattr(frames_module, "DENSE_BATCH", 0)
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
