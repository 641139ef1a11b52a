"""Small structures for `openmm-bg simulate`, as files that users would bring."""

import os
from pathlib import Path

import pytest
import torch  # noqa: F401  (before openmm)

import openmm  # isort: skip  # noqa: F401
from openmm import app  # isort: skip


def write(modeller: app.Modeller, path: Path) -> Path:
    with open(path, "w") as file:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, file, keepIds=True)
    return path


@pytest.fixture(scope="session")
def box() -> app.PDBFile:
    """OpenMM's villin headpiece HP35 in water with two ions."""
    return app.PDBFile(os.path.join(os.path.dirname(app.__file__), "data", "test.pdb"))


@pytest.fixture(scope="session")
def hp35(box) -> app.Modeller:
    modeller = app.Modeller(box.topology, box.positions)
    modeller.delete([r for r in box.topology.residues() if r.name in ("HOH", "Cl")])
    return modeller


@pytest.fixture(scope="session")
def dipeptide(tmp_path_factory) -> Path:
    """ACE-ALA-NME, complete."""
    from openmmtools.testsystems import AlanineDipeptideVacuum

    test = AlanineDipeptideVacuum()
    return write(app.Modeller(test.topology, test.positions), tmp_path_factory.mktemp("dipeptide") / "ala.pdb")


@pytest.fixture(scope="session")
def tail(hp35, tmp_path_factory) -> Path:
    """The last three residues of HP35 with OXT, without two of the hydrogens of a charged N terminus."""
    modeller = app.Modeller(hp35.topology, hp35.positions)
    modeller.delete(list(modeller.topology.residues())[:-3])
    return write(modeller, tmp_path_factory.mktemp("tail") / "tail.pdb")
