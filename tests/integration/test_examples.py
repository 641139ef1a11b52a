"""Examples run as a user would run them; the one that trains the shipped artifact takes too long to be among them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ARTIFACT = ROOT / "openmm_bg" / "data" / "alanine_dipeptide.bg"

needs_artifact = pytest.mark.skipif(
    not ARTIFACT.exists(), reason="the shipped artifact openmm_bg/data/alanine_dipeptide.bg is absent"
)


def run(folder: Path, script: str, *arguments: str) -> str:
    """Standard output of an example that must succeed."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@needs_artifact
def test_sample_alanine_dipeptide(tmp_path: Path) -> None:
    import mdtraj

    output = run(tmp_path, "sample_alanine_dipeptide.py", "-n", "2000", "-o", "out.pdb")
    assert output.startswith("2000 samples")
    found = re.search(r"F\(phi > 0\) - F\(rest\) = (\S+) ± (\S+) kT", output)
    assert found is not None
    assert np.isfinite([float(found[1]), float(found[2])]).all()
    frames = mdtraj.load(str(tmp_path / "out.pdb"))
    assert frames.xyz.shape == (2000, 22, 3)


@needs_artifact
def test_metropolis_moves(tmp_path: Path) -> None:
    output = run(tmp_path, "metropolis_moves.py", "--rounds", "20", "--md-steps", "10", "--proposals", "8")
    found = re.search(r"accepted (\d+) of (\d+) moves", output)
    assert found is not None
    assert int(found[2]) == 80
    assert 0 < int(found[1]) <= 80


@needs_artifact
def test_openmmtools_move(tmp_path: Path) -> None:
    output = run(tmp_path, "openmmtools_move.py", "--iterations", "10", "--proposals", "4")
    found = re.search(r"accepted (\d+) of (\d+) moves at 300 K", output)
    assert found is not None
    assert int(found[2]) == 40
    assert 0 < int(found[1]) <= 40


@needs_artifact
@pytest.mark.parametrize("what", ["solvation", "temperature", "basins"])
def test_free_energy(tmp_path: Path, what: str) -> None:
    """In seconds errors are large; what flow and reference say has to agree within them all the same."""
    output = run(tmp_path, f"free_energy_{what}.py", "--quick")
    values = re.findall(r"^\S.*?\s(\S+) ± (\S+) kT\s+([\d,]+) energies", output, flags=re.MULTILINE)
    assert len(values) == 3
    assert all(0 < float(error) < 1.5 for _, error, _ in values)
    assert ("passages" if what == "basins" else "overlap of neighbours") in output
    deviations = re.findall(r"^z\(.+\) = (\S+)$", output, flags=re.MULTILINE)
    assert len(deviations) == 2
    assert all(abs(float(z)) < 5 for z in deviations)


def glycine_dipeptide() -> tuple[Any, Any]:
    """Topology and rough positions of ACE-GLY-NME, cut out of alanine dipeptide."""
    from openmm import app
    from openmmtools.testsystems import AlanineDipeptideVacuum

    alanine = AlanineDipeptideVacuum()
    modeller = app.Modeller(alanine.topology, alanine.positions)
    modeller.delete([atom for atom in modeller.topology.atoms() if atom.name in ("CB", "HB1", "HB2", "HB3")])
    for residue in modeller.topology.residues():
        residue.name = "GLY" if residue.name == "ALA" else residue.name
    for atom in modeller.topology.atoms():
        atom.name = "HA2" if atom.name == "HA" else atom.name
    modeller.addHydrogens(app.ForceField("amber14-all.xml"))
    return modeller.topology, modeller.positions


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """system.xml, top.pdb and traj.dcd of a molecule for which no flow ships."""
    import mdtraj
    import openmm
    from openmm import app, unit

    folder = tmp_path_factory.mktemp("molecule")
    topology, positions = glycine_dipeptide()
    field = app.ForceField("amber14-all.xml")
    system = field.createSystem(topology, constraints=app.HBonds)
    integrator = openmm.LangevinMiddleIntegrator(300, 5, 0.002)
    integrator.setRandomNumberSeed(1)
    simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(positions)
    simulation.minimizeEnergy()
    frames = []
    for _ in range(1200):
        simulation.step(20)
        frames.append(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    with open(folder / "top.pdb", "w") as handle:
        app.PDBFile.writeFile(topology, frames[0] * unit.nanometer, handle)
    mdtraj.Trajectory(np.array(frames), mdtraj.Topology.from_openmm(topology)).save_dcd(str(folder / "traj.dcd"))
    return folder


def test_train_own_molecule(tmp_path: Path, files: Path) -> None:
    output = run(
        tmp_path,
        "train_own_molecule.py",
        *("--system", str(files / "system.xml")),
        *("--topology", str(files / "top.pdb")),
        *("--trajectory", str(files / "traj.dcd")),
        *("-o", "model", "--quick"),
    )
    assert "\nFlow(19 atoms, full" in output  # after what the DCD reader has to say
    assert "Ensemble(exact, n=500, atoms=19" in output
    assert (tmp_path / "model" / "flow.bg").is_file()
    assert (tmp_path / "model" / "losses.csv").is_file()
