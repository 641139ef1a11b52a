"""What users bring: checked, completed, or refused in one sentence with nothing left behind."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch  # before openmm
from click.testing import CliRunner

from openmm_bg.cli import main
from openmm_bg.coordinates import InternalCoordinates, build_zmatrix
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


@pytest.mark.parametrize("ending", ["pdb", "cif"])
def test_protonations_by_name(hp35, tmp_path, ending):
    """OpenMM's readers make ASP of ASH: without the name the pH would decide, and nobody be told."""
    modeller = app.Modeller(hp35.topology, hp35.positions)
    modeller.delete([a for a in modeller.topology.atoms() if a.element is app.element.hydrogen])
    next(modeller.topology.chains()).id = "A"
    changed = {"ASP": "ASH", "HIS": "HIP", "GLU": "GLH"}
    first = {name: next(r for r in modeller.topology.residues() if r.name == name) for name in changed}
    for name, residue in first.items():
        residue.name = changed[name]
    path = tmp_path / f"named.{ending}"
    with open(path, "w") as file:
        (app.PDBFile if ending == "pdb" else app.PDBxFile).writeFile(
            modeller.topology, modeller.positions, file, keepIds=True
        )
    molecule = prepare(path, FIELD)
    residues = list(molecule.topology.residues())
    for name, hydrogens in (("ASP", {"HD2"}), ("HIS", {"HD1", "HE2"}), ("GLU", {"HE2"})):
        assert hydrogens <= {a.name for a in residues[first[name].index].atoms()}
        assert f"{changed[name]} {first[name].id}" in molecule.notes[0]
    others = [r for r in residues if r.name == "ASP" and r.index != first["ASP"].index]
    assert others and all("HD2" not in {a.name for a in r.atoms()} for r in others)


def test_repartitioned_masses(dipeptide):
    molecule = prepare(dipeptide, FIELD, hydrogen_mass=3.0)
    masses = [molecule.system.getParticleMass(a.index)._value for a in molecule.topology.atoms()]
    light = [m for m, a in zip(masses, molecule.topology.atoms(), strict=True) if a.element.symbol == "H"]
    assert np.allclose(light, 3.0)
    assert sum(masses) == pytest.approx(sum(a.element.mass._value for a in molecule.topology.atoms()), abs=0.01)


def test_residues_that_only_a_patch_describes(dipeptide, monkeypatch):
    """charmm36 describes charged ends by patches, of which OpenMM's list of unmatched residues knows nothing."""
    monkeypatch.setattr(app.ForceField, "getUnmatchedResidues", lambda self, topology: list(topology.residues()))
    molecule = prepare(dipeptide, FIELD)
    assert molecule.topology.getNumAtoms() == 22 and molecule.notes == []


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

    def moved(s, words, to):
        return s[:30] + to + s[54:] if words in s else s

    case("torn", lambda s: moved(s, " CB  ALA", "  99.000  99.000  99.000"), "ALA 2", "CB", "correct their coordinates")
    spot = "   1.000   2.000   3.000"
    case("spot", lambda s: moved(s, "  1.00  0.00", spot), "0.00 nm apart", "correct their coordinates")
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


def test_two_chains_of_one_letter(tail, tmp_path):
    """Without a TER record between them OpenMM takes them for one chain, and its broken bond for a gap."""
    one = [line for line in tail.read_text().splitlines() if line.startswith("ATOM")]
    number = int(one[-1][22:26])

    def copy(start, keep=lambda line: True):
        """The chain again, 5 nm away, with numbers from `start`."""
        first = int(one[0][22:26])
        return [
            f"{s[:22]}{int(s[22:26]) - first + start:4d}{s[26:30]}{float(s[30:38]) + 50:8.3f}{s[38:]}"
            for s in one
            if keep(s)
        ]

    def refusal(*parts):
        (tmp_path / "two.pdb").write_text("\n".join([*itertools.chain(*parts), "END"]) + "\n")
        with pytest.raises(InputError) as caught:
            prepare(tmp_path / "two.pdb", FIELD)
        message = str(caught.value)
        assert "\n" not in message and message.endswith(".") and ". " not in message
        return message

    ended = refusal(one, copy(number + 1))
    assert "a second chain of the same letter begins there: put a TER record" in ended and "missing" not in ended
    without_end = [line for line in one if " OXT" not in line]
    again = refusal(without_end, copy(1))  # numbers begin anew
    assert "a second chain of the same letter begins there" in again
    unclear = refusal(without_end, copy(number + 5, lambda s: s[12:16].strip() not in ("H", "H2", "H3")))
    assert "residues between them are missing (PDBFixer adds them), or a second chain" in unclear and "TER" in unclear
    assert "2 chains ((blank), (blank)): give them different letters and keep one of them with --chain" in refusal(
        one, ["TER"], copy(1)
    )


def test_polarisable_force_fields(dipeptide, tmp_path):
    """AMOEBA on a CPU ended in OpenMM's error about a nonbonded method, or the process with it."""
    refused(simulate(dipeptide, tmp_path, "--forcefield", "amoeba2018.xml"), "amoeba2018.xml", "polarisable", "AMOEBA")
    drude = ("--forcefield", "charmm_polar_2023.xml", "--solvent", "none")
    refused(simulate(dipeptide, tmp_path, *drude), "polarisable", "Drude")


def test_bad_settings(dipeptide, tmp_path, monkeypatch):
    monkeypatch.setattr("openmm_bg.simulate.engine.minimise", None)  # all of it is said before any work
    refused(simulate(dipeptide, tmp_path, "--seed", "-1"), "seed", "negative")
    refused(simulate(dipeptide, tmp_path, "--ph", "nan"), "pH")
    refused(simulate(dipeptide, tmp_path, "--forcefield", "nonsense.xml"), "nonsense.xml")
    refused(simulate(dipeptide, tmp_path, "--forcefield", "tip3p.xml"), "does not know ALA 2", "--forcefield")
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
    ours = get_data_filename("data/alanine-dipeptide-gbsa/alanine-dipeptide.crd")  # LEaP's ending, and CHARMM's
    np.testing.assert_array_equal(prepare_parameters(Path(prmtop), Path(ours)).positions, molecule.positions)
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


def butane(folder):
    """A .psf in the format of X-PLOR with its parameters and positions, all written here."""
    carbons, hydrogens = range(4), [3, 2, 2, 3]
    bonds = [(i, i + 1) for i in range(3)]
    kinds = ["CT"] * 4
    for i in carbons:
        for _ in range(hydrogens[i]):
            bonds.append((i, len(kinds)))
            kinds.append("HA")
    around = [[b if a == i else a for a, b in bonds if i in (a, b)] for i in range(len(kinds))]
    angles = [(a, i, b) for i in carbons for k, a in enumerate(around[i]) for b in around[i][:k]]
    dihedrals = [(a, i, j, b) for i, j in bonds[:3] for a in around[i] if a != j for b in around[j] if b != i]

    def section(title, rows, per_line):
        found = [f"{len(rows):8d} !{title}"]
        for k in range(0, len(rows), per_line):
            found.append("".join(f"{atom + 1:8d}" for row in rows[k : k + per_line] for atom in row))
        return [*found, ""]

    names = [f"{kind[0]}{i + 1}" for i, kind in enumerate(kinds)]
    charge = {i: -0.09 * hydrogens[i] if i < 4 else 0.09 for i in range(len(kinds))}
    lines = ["PSF", "", "       1 !NTITLE", " REMARKS butane", "", f"{len(kinds):8d} !NATOM"]
    for i, kind in enumerate(kinds):
        mass = 12.011 if kind == "CT" else 1.008
        lines.append(f"{i + 1:8d} MOL  1    BUT  {names[i]:4s} {kind:4s} {charge[i]:10.6f}{mass:14.4f}           0")
    lines += ["", *section("NBOND: bonds", bonds, 4), *section("NTHETA: angles", angles, 3)]
    lines += section("NPHI: dihedrals", dihedrals, 2)
    for title in ("NIMPHI: impropers", "NDON: donors", "NACC: acceptors"):
        lines += section(title, [], 1)
    lines += [
        "       0 !NNB",
        "",
        *["       0" * len(kinds)],
        "",
        "       1       0 !NGRP",
        "       0       0       0",
        "",
    ]
    (folder / "butane.psf").write_text("\n".join(lines))
    (folder / "butane.prm").write_text(
        "* a force field for this test\n*\n\nATOMS\nMASS 1 CT 12.011\nMASS 2 HA 1.008\n\nBONDS\nCT CT 222.5 1.53\n"
        "CT HA 309.0 1.11\n\nANGLES\n"
        "CT CT CT 58.0 113.6\nCT CT HA 26.5 110.1\nHA CT HA 35.5 108.4\n\nDIHEDRALS\nX CT CT X 0.2 3 0.0\n\n"
        "NONBONDED nbxmod 5 atom cdiel fshift vatom vdistance vfswitch -\n"
        "cutnb 14.0 ctofnb 12.0 ctonnb 10.0 eps 1.0 e14fac 1.0 wmin 1.5\n"
        "CT 0.0 -0.08 2.06\nHA 0.0 -0.022 1.32\n\nEND\n"
    )
    topology = app.Topology()
    residue = topology.addResidue("BUT", topology.addChain())
    atoms = [topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in names]
    for a, b in bonds:
        topology.addBond(atoms[a], atoms[b])
    zmatrix = build_zmatrix(topology)
    rows = zmatrix.rows
    turn = [sum(row[1] == parent for row in rows[:k]) for k, (_, parent, *_) in enumerate(rows)]
    phi = [2 * np.pi / 3 * (k + 1) if row[1] == zmatrix.seed[1] else np.pi + 2 * np.pi / 3 * k
           for k, row in zip(turn, rows, strict=True)]  # fmt: skip
    lengths = [[0.153 if row[0] < 4 else 0.111 for row in rows]]
    angles_of_rows = [[1.92] * len(rows)]
    q = (torch.tensor(value, dtype=torch.float64) for value in ([[0.153, 0.153, 1.95]], lengths, angles_of_rows, [phi]))
    x = InternalCoordinates(zmatrix).to_positions(*q)[0].numpy()
    written(app.Modeller(topology, x * unit.nanometer), folder / "butane.pdb")
    return x


def test_a_psf_with_its_parameters(tmp_path):
    """From CHARMM's files to training data; the energies are those of ParmEd's reader."""
    import parmed

    from openmm_bg.simulate.folder import read_training_data
    from openmm_bg.simulate.parameters import prepare as prepare_parameters

    x = butane(tmp_path)
    psf, pdb, prm = (tmp_path / f"butane.{ending}" for ending in ("psf", "pdb", "prm"))
    molecule = prepare_parameters(psf, pdb, parameters=[prm], solvent="none")
    assert np.abs(molecule.positions - x).max() < 1e-4 and molecule.system.getNumConstraints() == 10
    theirs = parmed.charmm.CharmmPsfFile(str(psf)).createSystem(
        parmed.charmm.CharmmParameterSet(str(prm)), nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    energies = []
    for system in (molecule.system, theirs):
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(x)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    assert energies[0] == pytest.approx(energies[1], abs=1e-6) and abs(energies[0]) > 1.0
    files = ["--positions", str(pdb), "--parameters", str(prm)]
    brief = ["--length", "0.0002", "--interval", "0.02", "--replicas", "1", "--heating", "0", "--equilibration", "0"]
    result = simulate(psf, tmp_path, *files, *brief, "--platform", "Reference")
    assert result.exit_code == 0, result.output
    data = read_training_data(tmp_path / "md")
    assert data.positions.shape == (10, 14, 3)
    assert any(isinstance(f, openmm.GBSAOBCForce) for f in data.system.getForces())
    (tmp_path / "none").mkdir()
    other = tmp_path / "other.prm"
    other.write_text(prm.read_text().replace("HA", "HB"))
    refused(
        simulate(psf, tmp_path / "none", "--positions", str(pdb), "--parameters", str(other)),
        "butane.psf", "HA", "give all parameter and topology files",
    )  # fmt: skip
