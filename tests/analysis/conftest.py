"""Molecules, frames and files that the tests of `evaluate` and of `report` share."""

import importlib.util
import itertools
import json
from importlib.resources import as_file, files
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg as bg

import openmm  # isort: skip
from openmm import app, unit  # isort: skip


@pytest.fixture(scope="session")
def proteins():
    """tests/coordinates/proteins.py, by its path: test folders are no packages."""
    path = Path(__file__).parents[1] / "coordinates" / "proteins.py"
    spec = importlib.util.spec_from_file_location("openmm_bg_test_proteins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ensemble(dipeptide):
    reference = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), reference)
    context.setPositions(dipeptide.positions)
    # Closed at once: a pool that stays open would be a leak to the tests of pools.
    with bg.BoltzmannGeneratorSampler(
        dipeptide.flow, context, 300.0, seed=5, platform="Reference", n_workers=1
    ) as sampler:
        return sampler.sample(4000)


@pytest.fixture(scope="session")
def frames(ensemble):
    """Independent frames [1200, 22, 3] of the Boltzmann distribution, as exact as the flow's weights."""
    return ensemble.resample(1200, seed=1)


@pytest.fixture(scope="session")
def evaluated(dipeptide, frames):
    settings = {"platform": "Reference", "n_workers": 1, "progress": False}
    return bg.evaluate(dipeptide.flow, frames, frames[::2], n_samples=1200, batch=500, seed=3, **settings)


@pytest.fixture(scope="session")
def chain():
    """A chain of five carbons in one residue that is no amino acid: its flow, and frames [300, 5, 3]."""
    topology = app.Topology()
    residue = topology.addResidue("BUT", topology.addChain())
    carbons = [topology.addAtom(f"C{i}", app.element.carbon, residue) for i in range(5)]
    for a, b in itertools.pairwise(carbons):
        topology.addBond(a, b)
    system = openmm.System()
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for i in range(5):
        system.addParticle(12.0)
        if i > 0:
            bonds.addBond(i - 1, i, 0.15, 2e5)
        if i > 1:
            angles.addAngle(i - 2, i - 1, i, 1.95, 500.0)
    system.addForce(bonds)
    system.addForce(angles)
    zigzag = np.array([[0.125 * i, 0.083 * (i % 2), 0.0] for i in range(5)])
    frames = zigzag + np.random.default_rng(0).normal(0, 0.003, (300, 5, 3))
    config = {
        "batch_size": 128,
        "flow": {"n_backbone_blocks": 0, "n_joint_blocks": 2, "hidden": 16},
        "stages": [{"name": "likelihood", "losses": {"nll": 1.0}, "steps": 60, "learning_rate": 5e-3}],
    }
    flow = bg.train(system, topology, frames, 300.0, config=config, platform="Reference", n_workers=1, progress=False)
    return flow, frames


@pytest.fixture
def shipped():
    with as_file(files("openmm_bg.data") / "alanine_dipeptide.bg") as path:
        yield path


@pytest.fixture
def folder(tmp_path, dipeptide, frames):
    """As openmm-bg simulate leaves it: one replica of 50 frames, and test.dcd, killed after its checkpoint."""
    path = tmp_path / "md"
    path.mkdir()
    (path / "system.xml").write_text(openmm.XmlSerializer.serialize(dipeptide.system))
    with open(path / "topology.pdb", "w") as file:
        app.PDBFile.writeFile(dipeptide.topology, dipeptide.positions * unit.nanometer, file, keepIds=True)
    for name, rows, n in (("replica-0", frames[:50], 50), ("test", frames[50:110], 40)):
        mdtraj.Trajectory(rows, mdtraj.Topology.from_openmm(dipeptide.topology)).save(str(path / f"{name}.dcd"))
        record = {"frames": n, "dcd_bytes": 0, "csv_bytes": 0, "changed": 0, "state": ""}
        (path / f"{name}.checkpoint.json").write_text(json.dumps(record))
    record = {
        "format": "openmm_bg simulation",
        "version": 1,
        "topology": "topology.pdb",
        "protocol": {"temperature": 300.0},
        "trajectories": ["replica-0", "test"],
        "frames": 60,
        "engine": {"platform": "Reference"},
    }
    (path / "simulation.json").write_text(json.dumps(record))
    return path
