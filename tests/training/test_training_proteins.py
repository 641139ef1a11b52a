"""The paper's configuration, layers and stages, on villin HP35 and protein G: every stage runs, a few steps each."""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg as bg
from openmm_bg.energy.implicit_solvent import with_equal_solvent
from openmm_bg.training import TrainingConfig, record, run
from openmm_bg.training.completion import FitOptions, fit_completion
from openmm_bg.training.history import read_losses

import openmm  # isort: skip
from openmm import app  # isort: skip

FRAMES, STEPS = 32, 2


def proteins():
    """The structures of the tests of the coordinates."""
    if "proteins" not in sys.modules:
        path = Path(__file__).parents[1] / "coordinates" / "proteins.py"
        spec = importlib.util.spec_from_file_location("proteins", path)
        sys.modules["proteins"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["proteins"])
    return sys.modules["proteins"]


def short_dynamics(topology, positions):
    """System in implicit solvent, and frames [n, N, 3] of MD at 300 K from the relaxed structure, 20 fs apart."""
    field = app.ForceField("amber14-all.xml", "implicit/obc2.xml")
    system = with_equal_solvent(field.createSystem(topology, constraints=app.HBonds))
    integrator = openmm.LangevinMiddleIntegrator(300.0, 10.0, 0.002)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("CPU"), {"Threads": "1"})
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=50)
    context.setVelocitiesToTemperature(300.0, 1)
    frames = []
    for _ in range(FRAMES):
        integrator.step(10)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    return system, np.array(frames)


def tiny(preset, steps=STEPS):
    """The preset with all its layers and losses, but small batches and few steps."""
    config = TrainingConfig.preset(preset).model_dump()
    config |= {"batch_size": 4, "sample_batch": 4, "w2_data_batch": 16, "validation_frames": 4}
    config["buffer"] |= {"draw_size": 4}
    config["stages"] = [stage | {"steps": steps, "epochs": None, "seconds": None} for stage in config["stages"]]
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, name, n_residues", [("paper", "hp35", 35), ("paper", "protein-g", 56), ("protein", "hp35", 35)]
)
def test_the_stages_run(preset, name, n_residues, tmp_path, monkeypatch):
    try:
        topology, positions = proteins().structure(name)
    except proteins().MissingStructure as error:
        pytest.skip(str(error))
    assert topology.getNumResidues() == n_residues
    system, frames = short_dynamics(topology, positions)
    monkeypatch.setattr(record, "RECORD_SAMPLES", 4)
    monkeypatch.setattr(run, "fit_completion", partial(fit_completion, options=FitOptions(least_steps=2, most_steps=2)))
    flow = bg.train(
        system, topology, frames, 300.0, representation="reduced", config=tiny(preset), directory=tmp_path,
        platform="CPU", n_workers=1, progress=False,
    )  # fmt: skip
    rows = read_losses(tmp_path / "losses.csv")
    stages = TrainingConfig.preset(preset).stages
    assert [row["stage"] for row in rows] == [stage.name for stage in stages for _ in range(STEPS)]
    for row in rows:
        active = next(stage.losses.active() for stage in stages if stage.name == row["stage"])
        assert row["skipped"] == 0 and math.isfinite(row["gradient_norm"])
        for loss in active:
            assert math.isfinite(row[loss]), (row["stage"], loss)
    y, s = flow.to_internal(frames[:2])
    assert y.shape[1] == flow.coordinates.n_modelled > 5 * n_residues
    again = flow.to_positions(y, s).numpy()
    loaded = bg.load(tmp_path / "flow.bg", topology=topology)
    assert loaded.coordinates.n_modelled == y.shape[1] and again.shape == (2, topology.getNumAtoms(), 3)
