"""Names that settle a protonation, whoever gave them: OpenMM knows no bonds of some, and caps as patches of others."""

from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.errors import InputError
from openmm_bg.simulate import folder
from openmm_bg.simulate.reading import read_topology
from openmm_bg.simulate.structure import prepare

import openmm  # isort: skip
from openmm import app  # isort: skip

AMBER = ("amber14-all.xml",)


@pytest.fixture(scope="module")
def end(hp35) -> app.Modeller:
    """HIS-LEU-LYS-LYS-GLU-LYS-GLY-LEU-PHE, the end of HP35, without hydrogens."""
    modeller = app.Modeller(hp35.topology, hp35.positions)
    modeller.delete(list(modeller.topology.residues())[:-9])
    modeller.delete([a for a in modeller.topology.atoms() if a.element is app.element.hydrogen])
    assert [r.name for r in modeller.topology.residues()] == "HIS LEU LYS LYS GLU LYS GLY LEU PHE".split()
    next(modeller.topology.chains()).id = "A"
    return modeller


def named(modeller: app.Modeller, path: Path, names: dict[int, str]) -> Path:
    """A file in which residues (by index) have other names; as programs write it that know them: without CONECT."""
    cif = path.suffix == ".cif"
    with open(path, "w") as file:
        (app.PDBxFile if cif else app.PDBFile).writeFile(modeller.topology, modeller.positions, file, keepIds=True)
    lines = path.read_text().splitlines()
    atoms = [i for i, line in enumerate(lines) if line.startswith(("ATOM", "HETATM"))]
    for i, atom in zip(atoms, modeller.topology.atoms(), strict=True):
        if (name := names.get(atom.residue.index)) is not None:
            line, old = lines[i], atom.residue.name
            lines[i] = line.replace(f" {old} ", f" {name} ") if cif else f"{line[:17]}{name:4s}{line[21:]}"
    path.write_text("\n".join(lines) + "\n")
    return path


def charge(system: openmm.System) -> float:
    (force,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    return sum(force.getParticleParameters(i)[0]._value for i in range(force.getNumParticles()))


def hydrogens(topology: app.Topology, residue: int, *parents: str) -> int:
    return sum(
        {a.residue.index, b.residue.index} == {residue}
        and "H" in {a.element.symbol, b.element.symbol}
        and bool({a.name, b.name} & set(parents))
        for a, b in topology.bonds()
    )


@pytest.fixture(scope="module")
def plain(end, tmp_path_factory) -> float:
    """Charge with the protonation that the pH gives."""
    return charge(prepare(named(end, tmp_path_factory.mktemp("plain") / "plain.pdb", {}), AMBER).system)


@pytest.mark.parametrize(
    ("index", "name", "parents", "n", "more", "ending"),
    [
        (2, "LYN", ("NZ",), 2, -1, "pdb"), (3, "LSN", ("NZ",), 2, -1, "cif"), (3, "LYSH", ("NZ",), 3, 0, "pdb"),
        (4, "GLUP", ("OE1", "OE2"), 1, 1, "pdb"), (4, "GLH", ("OE1", "OE2"), 1, 1, "cif"),
        (0, "HISH", ("ND1", "NE2"), 2, 1, "pdb"), (0, "NHIP", ("ND1", "NE2"), 2, 1, "pdb"),
        (8, "CPHE", ("CB",), 2, 0, "cif"),
    ],
)  # fmt: skip
def test_a_name_of_a_protonation(end, plain, tmp_path, ending, index, name, parents, n, more):
    path = named(end, tmp_path / f"named.{ending}", {index: name})
    molecule = prepare(path, AMBER)
    assert hydrogens(molecule.topology, index, *parents) == n
    assert charge(molecule.system) == pytest.approx(plain + more, abs=1e-3)
    number = next(r.id for r in molecule.topology.residues() if r.index == index)
    assert (f"{name} {number} as named" in molecule.notes[0]) == (name != "CPHE")
    MoleculeGraph(read_topology(path))  # what openmm-bg train reads: one molecule
    # The folder's topology is read by OpenMM itself, and by everybody else.
    text = folder._topology_file(molecule)[1]
    assert name not in text


def test_a_name_that_openmm_does_not_know_has_no_bonds_there(end, tmp_path):
    """Why all this is needed; and a Topology of OpenMM's own reader is refused with that cause."""
    topology = app.PDBFile(str(named(end, tmp_path / "lyn.pdb", {2: "LYN"}))).topology
    assert not any(a.residue.index == b.residue.index == 2 for a, b in topology.bonds())
    with pytest.raises(InputError, match=r"\(OpenMM's readers know none of residues called LYN\)\.$"):
        MoleculeGraph(topology)


def test_no_hydrogen_of_a_neutral_lysine_is_lost(end, tmp_path):
    """Amber calls them HZ2 and HZ3, OpenMM HZ1 and HZ2: it would take HZ3 away and add none."""
    molecule = prepare(named(end, tmp_path / "heavy.pdb", {2: "LYN"}), AMBER)
    modeller = app.Modeller(molecule.topology, molecule.positions * openmm.unit.nanometer)
    for atom in modeller.topology.atoms():
        if atom.residue.index == 2 and atom.name == "HZ1":
            atom.name = "HZ3"
    complete = prepare(named(modeller, tmp_path / "amber.pdb", {2: "LYN"}), AMBER)
    assert complete.notes == [] and hydrogens(complete.topology, 2, "NZ") == 2
    modeller.delete([a for a in modeller.topology.atoms() if a.residue.index == 7 and a.name == "HG"])
    path = named(modeller, tmp_path / "lacking.pdb", {2: "LYN"})
    again = prepare(path, AMBER)
    assert hydrogens(again.topology, 2, "NZ") == 2 and again.notes[0].startswith("Added 1 hydrogens")


def test_a_name_stands_above_the_hydrogens_of_the_file(end, tmp_path):
    charged = prepare(named(end, tmp_path / "heavy.pdb", {}), AMBER)
    modeller = app.Modeller(charged.topology, charged.positions * openmm.unit.nanometer)
    assert hydrogens(modeller.topology, 2, "NZ") == 3
    neutral = prepare(named(modeller, tmp_path / "lyn.pdb", {2: "LYN"}), AMBER)
    assert hydrogens(neutral.topology, 2, "NZ") == 2 and hydrogens(neutral.topology, 3, "NZ") == 3
    assert neutral.notes == [f"Hydrogens of LYN {list(neutral.topology.residues())[2].id} changed, as named."]
    assert charge(neutral.system) == pytest.approx(charge(charged.system) - 1, abs=1e-3)


def test_cysteines_without_their_hydrogen(end, tmp_path):
    """Charged or in a disulfide: the name says which, and a disulfide needs its partner."""
    modeller = app.Modeller(end.topology, end.positions)
    leucine = list(modeller.topology.residues())[1]
    modeller.delete([a for a in leucine.atoms() if a.name in ("CD1", "CD2")])
    residue = list(modeller.topology.residues())[1]
    residue.name = "CYS"
    sulfur = next(a for a in residue.atoms() if a.name == "CG")
    sulfur.name, sulfur.element = "SG", app.element.sulfur
    plain = prepare(named(modeller, tmp_path / "cys.pdb", {}), AMBER)
    assert hydrogens(plain.topology, 1, "SG") == 1
    thiolate = prepare(named(modeller, tmp_path / "cym.pdb", {1: "CYM"}), AMBER)
    assert hydrogens(thiolate.topology, 1, "SG") == 0
    assert charge(thiolate.system) == pytest.approx(charge(plain.system) - 1, abs=1e-3)
    with pytest.raises(InputError, match=r"CYX \d+ of chain A is named as in a disulfide, but no other sulfur"):
        prepare(named(modeller, tmp_path / "cyx.pdb", {1: "CYX"}), AMBER)


def test_a_form_that_the_force_field_lacks(end, tmp_path):
    """Amber has no neutral lysine at an end of the chain."""
    modeller = app.Modeller(end.topology, end.positions)
    modeller.delete(list(modeller.topology.residues())[:2])
    number = next(modeller.topology.residues()).id
    with pytest.raises(InputError, match=f"no template for LYN {number} of chain A at an end of the chain") as caught:
        prepare(named(modeller, tmp_path / "lyn.pdb", {0: "LYN"}), AMBER)
    assert "\n" not in str(caught.value) and "Modeller" not in str(caught.value)


def test_a_residue_whose_bonds_openmm_does_not_know(dipeptide, tmp_path):
    """Hydroxyproline is a template of amber14, but no residue of OpenMM's readers: its bonds are the file's."""
    pdb = app.PDBFile(str(dipeptide))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete([a for a in modeller.topology.atoms() if a.element is app.element.hydrogen])
    atoms = {(a.residue.name, a.name): a for a in modeller.topology.atoms()}
    x = np.array(modeller.positions.value_in_unit(openmm.unit.nanometer))
    old = {name: x[atom.index] for (residue, name), atom in atoms.items() if residue == "ALA"}
    away = old["CB"] - old["CA"]
    corner = old["CB"] + away
    places = {"CG": corner, "CD": 0.5 * (corner + old["N"] + away), "OD1": corner + 0.9 * away}
    topology = app.Topology()
    chain, new = topology.addChain("A"), {}
    positions = []
    for old_residue in modeller.topology.residues():
        proline = old_residue.name == "ALA"
        made = topology.addResidue("HYP" if proline else old_residue.name, chain)
        for atom in old_residue.atoms():
            new[atom.residue.name, atom.name] = topology.addAtom(atom.name, atom.element, made)
            positions.append(x[atom.index])
        for name in places if proline else ():
            new["ALA", name] = topology.addAtom(name, app.Element.getBySymbol(name[0]), made)
            positions.append(places[name])
    for a, b in modeller.topology.bonds():
        topology.addBond(new[a.residue.name, a.name], new[b.residue.name, b.name])
    for a, b in (("CB", "CG"), ("CG", "CD"), ("CD", "N"), ("CG", "OD1")):
        topology.addBond(new["ALA", a], new["ALA", b])
    path = tmp_path / "hyp.pdb"
    with open(path, "w") as file:
        app.PDBFile.writeFile(topology, np.array(positions) * openmm.unit.nanometer, file)
    assert "CONECT" in path.read_text()
    molecule = prepare(path, AMBER)
    assert hydrogens(molecule.topology, 1, "OD1") == 1 and molecule.topology.getNumAtoms() == 27
    assert folder._topology_file(molecule)[0] == "topology.pdb"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "CONECT" not in line) + "\n")
    with pytest.raises(InputError, match=r"OpenMM knows no bond of N in HYP \d+ of chain A"):
        prepare(path, AMBER)


def test_chains_of_a_cif_file_by_the_column_that_openmm_takes(end, tmp_path):
    """With water in the file OpenMM takes label_asym_id: names and alternates must be found under it, too."""
    path = named(end, tmp_path / "a.cif", {2: "LYN"})
    lines = path.read_text().splitlines()
    columns = [line.strip().removeprefix("_atom_site.") for line in lines if line.startswith("_atom_site.")]
    rows = [line.split() for line in lines if line.startswith(("ATOM", "HETATM"))]
    label, author = columns.index("label_asym_id"), columns.index("auth_asym_id")
    for row in rows:
        row[label], row[author] = "P", "A"
    water = list(rows[-1])
    for key, value in (("label_asym_id", "W"), ("label_comp_id", "HOH"), ("auth_comp_id", "HOH"), ("id", "9000")):
        water[columns.index(key)] = value
    for key in ("label_seq_id", "auth_seq_id"):
        water[columns.index(key)] = "900"
    for key in ("label_atom_id", "auth_atom_id"):
        water[columns.index(key)] = "O"
    water[columns.index("type_symbol")] = "O"
    head = [line for line in lines if not line.startswith(("ATOM", "HETATM"))]
    last = max(i for i, line in enumerate(head) if line.startswith("_atom_site."))
    text = [*head[: last + 1], *(" ".join(row) for row in [*rows, water]), *head[last + 1 :]]
    path.write_text("\n".join(text) + "\n")
    molecule = prepare(path, AMBER)
    assert next(molecule.topology.chains()).id == "P" and hydrogens(molecule.topology, 2, "NZ") == 2


# ---------------------------------------------------------------- charmm36


@pytest.fixture(scope="module")
def charmm() -> app.ForceField:
    return app.ForceField("charmm36.xml")


@pytest.fixture
def known(charmm, monkeypatch):
    """It takes seconds to read."""
    monkeypatch.setattr(app, "ForceField", lambda *files: charmm)


@pytest.mark.parametrize("bare", [False, True])
def test_the_alanine_dipeptide_of_charmm36(known, dipeptide, tmp_path, bare):
    """Caps are patches there, and the whole is a residue, twice: of the protein force field and of CGenFF."""
    pdb = app.PDBFile(str(dipeptide))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    if bare:
        modeller.delete([a for a in modeller.topology.atoms() if a.element is app.element.hydrogen])
    molecule = prepare(named(modeller, tmp_path / "ala.pdb", {}), ("charmm36.xml",))
    assert [r.name for r in molecule.topology.residues()] == ["ACE", "ALA", "NME"]
    assert molecule.topology.getNumAtoms() == molecule.system.getNumParticles() == 22
    assert molecule.system.getNumConstraints() == 12
    (cmap,) = (f for f in molecule.system.getForces() if isinstance(f, openmm.CMAPTorsionForce))
    assert cmap.getNumTorsions() == 1  # CGenFF's copy would have none
    masses = [molecule.system.getParticleMass(i)._value for i in range(22)]
    assert masses == pytest.approx([atom.element.mass._value for atom in molecule.topology.atoms()], abs=0.01)
    assert folder._topology_file(molecule)[0] == "topology.pdb"


@pytest.mark.slow
def test_an_amide_cap_and_a_neutral_lysine_of_charmm36(known, dipeptide, tmp_path):
    """ACE-LYN-NH2 without hydrogens: two patches for the caps, one for the lysine."""
    pdb = app.PDBFile(str(dipeptide))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete([a for a in modeller.topology.atoms() if a.element is app.element.hydrogen])
    modeller.delete([a for a in modeller.topology.atoms() if a.residue.name == "NME" and a.name == "C"])
    lines, x = [], {a.name: modeller.positions[a.index] for a in modeller.topology.atoms() if a.residue.name == "ALA"}
    x = {name: np.array(position.value_in_unit(openmm.unit.angstrom)) for name, position in x.items()}
    step = x["CB"] - x["CA"]
    for line in named(modeller, tmp_path / "ala.pdb", {1: "LYN", 2: "NH2"}).read_text().splitlines():
        lines.append(line)
        if line[12:16].strip() == "CB" and "LYN" in line:
            for k, name in enumerate(["CG", "CD", "CE", "NZ"], start=1):
                place = "".join(f"{value:8.3f}" for value in x["CB"] + k * step)
                lines.append(f"{line[:6]}{90 + k:5d}  {name:3s} {line[17:30]}{place}{line[54:76]} {name[0]}")
    path = tmp_path / "cap.pdb"
    path.write_text("\n".join(lines) + "\n")
    molecule = prepare(path, ("charmm36.xml",))
    assert [r.name for r in molecule.topology.residues()] == ["ACE", "LYS", "NH2"]
    assert hydrogens(molecule.topology, 1, "NZ") == hydrogens(molecule.topology, 2, "N") == 2
    assert charge(molecule.system) == pytest.approx(0.0, abs=1e-3)
    assert "LYN" in molecule.notes[0]
