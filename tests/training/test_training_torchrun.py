"""`torchrun ... -m openmm_bg.cli train`: files as from one process, and one sentence for a mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import mdtraj
import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)
import yaml

import openmm_bg as bg
from openmm_bg.training.history import read_losses

import openmm  # isort: skip
from openmm import app  # isort: skip

CONFIG = {
    "batch_size": 33, "sample_batch": 17, "validation_frames": 50, "validate_every": 2, "precision": "float64",
    "buffer": {"draw_size": 32}, "flow": {"n_backbone_blocks": 0, "n_joint_blocks": 2, "hidden": 8, "n_hidden": 1},
    "stages": [
        {"name": "a", "losses": {"nll": 1.0, "kl": 0.01}, "steps": 3},
        {"name": "b", "losses": {"buffer": 1.0, "variance": 0.1}, "steps": 3},
    ],
}  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the shipped molecule, with frames a little off its positions."""
    folder = tmp_path_factory.mktemp("files")
    molecule = bg.load_alanine_dipeptide()
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(molecule.system))
    x = np.asarray(molecule.positions)
    with open(folder / "top.pdb", "w") as file:
        app.PDBFile.writeFile(molecule.topology, x * openmm.unit.nanometer, file)
    frames = x + np.random.default_rng(0).normal(0.0, 0.001, (300, *x.shape))
    mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(molecule.topology)).save(str(folder / "traj.dcd"))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "wrong.yaml").write_text(yaml.safe_dump(CONFIG | {"batch_sise": 3}))
    return folder


def train(folder, launcher, output, config="config.yaml"):
    command = [
        *launcher, "openmm_bg.cli", "train", "--system", "system.xml", "--topology", "top.pdb", "--trajectory",
        "traj.dcd", "--temperature", "300", "--config", config, "--platform", "Reference", "--workers", "1", "-o",
        output,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_two_processes_write_what_one_does(folder):
    both = train(folder, TORCHRUN, "two")
    assert both.returncode == 0, both.stderr
    one = train(folder, [sys.executable, "-m"], "one")
    assert one.returncode == 0, one.stderr
    assert both.stdout.count("coordinates, 6 steps") == 1 and "2 processes share every batch" in both.stderr
    rows, others = (read_losses(folder / name / "losses.csv") for name in ("one", "two"))
    assert len(rows) == len(others) == 6
    for a, b in zip(rows, others, strict=True):
        for name in ("loss", "nll", "kl", "buffer", "variance", "validation_nll", "ess", "gradient_norm"):
            # Networks are float32, whose sums of some hundred terms round by 1e-5 at most; ten times that.
            assert (a[name] is None) == (b[name] is None)
            assert a[name] is None or a[name] == pytest.approx(b[name], rel=1e-4), name
    found = [bg.load(folder / name / "flow.bg").metadata["training"] for name in ("one", "two")]
    assert found[0]["n_energies"] == found[1]["n_energies"] > 0
    assert found[0]["reverse_ess"] == pytest.approx(found[1]["reverse_ess"], rel=0.01)


@pytest.mark.slow
def test_a_mistake_is_told_once(folder):
    done = train(folder, TORCHRUN, "wrong", config="wrong.yaml")
    assert done.returncode != 0
    assert len(re.findall(r"^Error: .*batch_sise", done.stderr, flags=re.MULTILINE)) == 1
    assert len(re.findall(r"^Error: ", done.stderr, flags=re.MULTILINE)) == 1
