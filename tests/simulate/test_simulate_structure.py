"""What users bring: checked, completed, or refused in one sentence with nothing left behind."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)
from click.testing import CliRunner

from openmm_bg.cli import main
from openmm_bg.errors import InputError
from openmm_bg.simulate.geometry import Stereochemistry
from openmm_bg.simulate.structure import prepare

import openmm  # isort: skip
from openmm import app, unit  # isort: skip

FIELD = ("amber14-all.xml", "implicit/obc2.xml")


def refused(result, *words):
    """One sentence, without a traceback, that holds the words."""
    assert result.exit_code == 1, result.output
    message = result.output.strip()
    assert message.startswith("Error: ") and message.endswith(".") and "Traceback" not in message, message
    assert len(message.splitlines()) == 1, message
    for word in words:
        assert word in message, message
    print(message)


def simulate(structure, tmp_path, *options):
    return CliRunner().invoke(main, ["simulate", str(structure), "-o", str(tmp_path / "md"), *options])


def written(modeller, path):
    with open(path, "w") as file:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, file, keepIds=True)
    return path


def test_water_and_ions_leave_and_the_rest_stays(box, tmp_path):
    modeller = app.Modeller(box.topology, box.positions)
    residues = list(modeller.topology.residues())
    modeller.delete([r for r in residues if r.name == "HOH"][20:])
    molecule = prepare(written(modeller, tmp_path / "box.pdb"), FIELD)
    assert molecule.topology.getNumAtoms() == molecule.system.getNumParticles() == 582
    assert any("20 water molecules and 2 ions" in note for note in molecule.notes)
    assert molecule.topology.getPeriodicBoxVectors() is None
    assert not molecule.system.usesPeriodicBoundaryConditions()
    hydrogens = sum(atom.element.symbol == "H" for atom in molecule.topology.atoms())
    assert molecule.system.getNumConstraints() == hydrogens
    assert not Stereochemistry(molecule.topology, molecule.positions).notes()


def test_missing_hydrogens_come_with_a_note(tail):
    molecule = prepare(tail, FIELD)
    assert [note for note in molecule.notes if "hydrogens" in note]
    assert sum(a.name in ("H", "H1", "H2", "H3") for a in next(molecule.topology.residues()).atoms()) == 3


def test_every_hydrogen_can_be_missing(hp35, tmp_path):
    modeller = app.Modeller(hp35.topology, hp35.positions)
    modeller.delete([a for a in modeller.topology.atoms() if a.element.symbol == "H"])
    modeller.delete(list(modeller.topology.residues())[:-3])
    molecule = prepare(written(modeller, tmp_path / "heavy.pdb"), FIELD)
    assert any(note.startswith("Added ") for note in molecule.notes)


def test_repartitioned_masses(dipeptide):
    molecule = prepare(dipeptide, FIELD, hydrogen_mass=3.0)
    masses = [molecule.system.getParticleMass(a.index)._value for a in molecule.topology.atoms()]
    light = [m for m, a in zip(masses, molecule.topology.atoms(), strict=True) if a.element.symbol == "H"]
    assert np.allclose(light, 3.0)
    assert sum(masses) == pytest.approx(sum(a.element.mass._value for a in molecule.topology.atoms()), abs=0.01)


def test_a_cif_file_is_read(dipeptide, tmp_path):
    pdb = app.PDBFile(str(dipeptide))
    with open(tmp_path / "ala.cif", "w") as file:
        app.PDBxFile.writeFile(pdb.topology, pdb.positions, file)
    assert prepare(tmp_path / "ala.cif", FIELD).topology.getNumAtoms() == 22

    def doubled(line):
        row = line.split()
        if line.startswith("ATOM") and row[3] == "CB":
            return "\n".join(" ".join([*row[:4], letter, *row[5:]]) for letter in "AB")
        return line

    with pytest.raises(InputError, match="alternate locations in 1 residue, the first is ALA 2 of chain"):
        prepare(edited(tmp_path / "ala.cif", tmp_path / "two.cif", doubled), FIELD)


def test_a_mirror_image_is_noticed(hp35):
    x = np.array(hp35.positions.value_in_unit(unit.nanometer))
    plain, mirrored = Stereochemistry(hp35.topology, x), Stereochemistry(hp35.topology, x * [1, 1, -1])
    assert plain.notes() == []
    assert sum("D amino acid" in note for note in mirrored.notes()) == 33  # 35 residues, two of them glycine
    assert plain.unchanged(x[None]).all() and not plain.unchanged(x[None] * [1, 1, -1]).any()
    assert "chirality" in plain.difference(x * [1, 1, -1])


def test_a_cis_bond_is_noticed(dipeptide):
    pdb = app.PDBFile(str(dipeptide))
    x = np.array(pdb.getPositions(asNumpy=True)._value)
    atoms = {(a.residue.name, a.name): a.index for a in pdb.topology.atoms()}
    c, n = atoms["ALA", "C"], atoms["NME", "N"]
    turned = [a.index for a in pdb.topology.atoms() if a.residue.name == "NME" and a.name != "N"]
    axis = (x[n] - x[c]) / np.linalg.norm(x[n] - x[c])
    y, rest = x.copy(), x[turned] - x[n]
    y[turned] = x[n] + 2 * np.outer(rest @ axis, axis) - rest  # by 180 degrees about C-N
    plain = Stereochemistry(pdb.topology, x)
    assert plain.notes() == [] and "isomer at NME3-N" in plain.difference(y)
    assert Stereochemistry(pdb.topology, y).notes() == ["The amide bond at NME3-N is cis."]


def edited(path, target, change):
    target.write_text("\n".join(filter(None, map(change, path.read_text().splitlines()))) + "\n")
    return target


def test_bad_structures(dipeptide, tail, hp35, tmp_path):
    start = sorted(p.name for p in tmp_path.iterdir())
    work = tmp_path / "in"
    work.mkdir()

    def case(name, change, *words, base=dipeptide, options=()):
        refused(simulate(edited(base, work / f"{name}.pdb", change), tmp_path, *options), *words)

    refused(simulate(work / "none.pdb", tmp_path), "none.pdb")
    (work / "text.pdb").write_text("hello\n")
    refused(simulate(work / "text.pdb", tmp_path), "text.pdb")
    (work / "text.cif").write_text("hello\n")
    refused(simulate(work / "text.cif", tmp_path), "text.cif")
    (work / "a.xyz").write_text("hello\n")
    refused(simulate(work / "a.xyz", tmp_path), ".prmtop")
    case("strange", lambda s: s.replace("ALA", "MSX"), "MSX", "PDBFixer")
    case("heavy", lambda s: None if " CB  ALA" in s else s, "ALA 2", "CB", "PDBFixer")
    case("end", lambda s: None if " OXT" in s else s, "OXT", base=tail)

    def doubled(s, letters="AB"):
        return "\n".join(s[:16] + k + s[17:] for k in letters) if " CB  ALA" in s else s

    case("alternate", doubled, "alternate locations in 1 residue,", "ALA 2")
    assert prepare(edited(dipeptide, work / "kept.pdb", lambda s: doubled(s, "A")), FIELD).topology.getNumAtoms() == 22
    case("gap", lambda s: None if " LEU " in s else s, "residues between them are missing", base=tail)
    case("nan", lambda s: s[:30] + "     nan" + s[38:] if " CB  ALA" in s else s, "nan.pdb")
    body = [s for s in dipeptide.read_text().splitlines() if s.startswith(("ATOM", "HETATM", "TER"))]
    (work / "models.pdb").write_text(
        "\n".join(["MODEL        1", *body, "ENDMDL", "MODEL        2", *body, "ENDMDL", "END"])
    )
    refused(simulate(work / "models.pdb", tmp_path), "2 models")
    two = app.Modeller(*[getattr(app.PDBFile(str(tail)), key) for key in ("topology", "positions")])
    shifted = unit.Quantity(np.array(two.positions.value_in_unit(unit.nanometer)) + 3.0, unit.nanometer)
    two.add(app.PDBFile(str(tail)).topology, shifted)
    for index, chain in enumerate(two.topology.chains()):
        chain.id = "AB"[index]
    written(two, work / "two.pdb")
    refused(simulate(work / "two.pdb", tmp_path), "2 chains", "A, B")
    refused(simulate(work / "two.pdb", tmp_path, "--chain", "C"), "'C'", "'A'")
    assert prepare(work / "two.pdb", FIELD, chain="B").topology.getNumResidues() == 3
    ligand = [*body[:-1], "TER", "HETATM  900  C1  LIG A 900      30.000  30.000  30.000  1.00  0.00           C  "]
    ligand += ["HETATM  901  C2  LIG A 900      31.500  30.000  30.000  1.00  0.00           C  "]
    (work / "ligand.pdb").write_text("\n".join([*ligand, "END"]))
    refused(simulate(work / "ligand.pdb", tmp_path), "LIG 900", "remove it")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*start, "in"])


def test_bad_settings(dipeptide, tmp_path):
    refused(simulate(dipeptide, tmp_path, "--forcefield", "nonsense.xml"), "nonsense.xml")
    refused(simulate(dipeptide, tmp_path, "--platform", "Abacus"), "Abacus")
    refused(simulate(dipeptide, tmp_path, "--time-step", "4"), "--hmr")
    refused(simulate(dipeptide, tmp_path, "--time-step", "8", "--hmr"), "shorten")
    refused(simulate(dipeptide, tmp_path, "--interval", "0.0005"), "multiple")
    refused(simulate(dipeptide, tmp_path, "--length", "0.0001"), "shorter")
    refused(simulate(dipeptide, tmp_path, "--temperature", "-1"), "temperature")
    refused(simulate(dipeptide, tmp_path, "--temperature", "nan"), "temperature")
    refused(simulate(dipeptide, tmp_path, "--replicas", "0"), "replica")
    refused(simulate(dipeptide, tmp_path, "--positions", str(dipeptide)), "--positions")
    refused(simulate(dipeptide, tmp_path, "--resume"), "simulation.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "md").mkdir()
    (tmp_path / "md" / "thesis.tex").write_text("years")
    refused(simulate(dipeptide, tmp_path), "not an empty folder")
    refused(simulate(dipeptide, tmp_path / "absent"), "absent")
    assert (tmp_path / "md" / "thesis.tex").read_text() == "years"


def test_files_with_parameters(tmp_path, monkeypatch):
    from openmmtools.testsystems import get_data_filename

    from openmm_bg.simulate.parameters import prepare as prepare_parameters

    prmtop = get_data_filename("data/alanine-dipeptide-gbsa/alanine-dipeptide.prmtop")
    crd = tmp_path / "ala.inpcrd"
    with open(get_data_filename("data/alanine-dipeptide-gbsa/alanine-dipeptide.crd")) as file:
        crd.write_text(file.read())

    molecule = prepare_parameters(Path(prmtop), crd)
    assert any(isinstance(f, openmm.GBSAOBCForce) for f in molecule.system.getForces())
    assert molecule.system.getNumConstraints() == 12
    assert molecule.notes == []
    bare = prepare_parameters(Path(prmtop), crd, solvent="none")
    assert not any("GB" in type(f).__name__ for f in bare.system.getForces())

    import parmed

    structure = parmed.load_file(prmtop, str(crd))
    structure.save(str(tmp_path / "ala.top"))
    structure.save(str(tmp_path / "ala.gro"))
    gromacs = prepare_parameters(tmp_path / "ala.top", tmp_path / "ala.gro")
    energies = []
    for each in (molecule, gromacs):
        context = openmm.Context(
            each.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )
        context.setPositions(molecule.positions)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    # The same force field with the same solvent; .top files round their parameters.
    assert energies[1] == pytest.approx(energies[0], abs=0.2)

    create = app.AmberPrmtopFile.createSystem

    def warning(self, **options):
        warnings.warn("Non-optimal GB parameters", UserWarning, stacklevel=1)
        return create(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(app.AmberPrmtopFile, "createSystem", warning)
        assert "Non-optimal GB parameters" in prepare_parameters(Path(prmtop), crd).notes[0]

    refused(simulate(prmtop, tmp_path), "--positions")
    refused(simulate(tmp_path / "x.prmtop", tmp_path, "--positions", str(crd)), "x.prmtop")
    (tmp_path / "x.psf").write_text("PSF\n")
    refused(simulate(tmp_path / "x.psf", tmp_path, "--positions", str(crd)), "--parameters")
    refused(simulate(tmp_path / "x.psf", tmp_path, "--positions", str(crd), "--parameters", str(crd)), "x.psf")
    (tmp_path / "bad.prmtop").write_text("nothing")
    refused(simulate(tmp_path / "bad.prmtop", tmp_path, "--positions", str(crd)), "bad.prmtop")
    water = get_data_filename("data/alanine-dipeptide-explicit/alanine-dipeptide.prmtop")
    refused(simulate(water, tmp_path, "--positions", str(crd)), "water")
    with pytest.raises(InputError, match="ending for positions"):
        prepare_parameters(Path(prmtop), tmp_path / "ala.top")
    assert not (tmp_path / "md").exists()
