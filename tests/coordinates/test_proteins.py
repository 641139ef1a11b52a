"""Every residue that OpenMM's amber14 and charmm36 know, disulfides, caps, and whole proteins."""

import math

import numpy as np
import pytest
import torch
from openmm import app, unit

from openmm_bg.coordinates import CoordinateMap, MoleculeGraph, build_zmatrix, place_like
from openmm_bg.errors import InputError

AMBER, AMBER19, CHARMM = "amber14-all.xml", "amber19-all.xml", "charmm36.xml"
#: Amber's residues inside a chain; CYX has a bond to another one and comes below.
INNER = (
    "ALA ARG ASH ASN ASP CYM CYS GLH GLN GLU GLY HID HIE HIP HYP ILE LEU LYN LYS MET PHE PRO SER THR TRP TYR VAL"
).split()
ENDS = "ALA ARG ASN ASP CYS GLN GLU GLY HID HIE HIP ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split()
CHARMM_INNER = (
    "ALA ARG ASN ASP ASP+ASPP CYS CYM GLN GLU GLU+GLUP GLY HSD HSE HSP ILE LEU LYS LYS+LSN MET PHE PRO SER THR TRP TYR "
    "VAL"
).split()


def random_sequences() -> dict[str, tuple[str, list[str]]]:
    """Name -> (force field, templates): each residue inside, at either end, and every cap."""
    rng = np.random.default_rng(2)
    amber, charmm = rng.permutation(INNER).tolist(), rng.permutation(CHARMM_INNER).tolist()
    first, last = rng.permutation(ENDS).tolist(), rng.permutation(ENDS).tolist()
    found = {
        "amber-caps": (AMBER, ["ACE", *amber[:14], "NME"]),
        "amber-amide": (AMBER, ["ACE", *amber[14:], "NHE"]),
        "charmm-ends": (CHARMM, [charmm[0] + "+NTER", *charmm[1:13], "LEU+CTER"]),
        "charmm-caps": (CHARMM, ["ALA+ACE", *charmm[13:], "VAL+CT3"]),
        "charmm-proline": (CHARMM, ["PRO+PROP", "GLY", "ALA+CT2"]),
        "charmm-glycine": (CHARMM, ["GLY+GLYP", "SER", "PHE+CNEU"]),
    }
    for k, (a, b) in enumerate(zip(first, last, strict=True)):
        found[f"ends-N{a}-C{b}"] = (AMBER, ["N" + a, INNER[k], "C" + b])
    found["ends-NSER-CHYP"] = (AMBER, ["NSER", "CYS", "CHYP"])
    found["amber19-caps"] = (AMBER19, found["amber-caps"][1])
    found["amber19-amide"] = (AMBER19, found["amber-amide"][1])
    found["amber19-ends"] = (AMBER19, ["NARG", *ENDS[:10], "CTYR"])
    return found


SEQUENCES = random_sequences()
DISULFIDES = {  # residues, and the pairs that are bonded
    "vicinal": (["ACE", "CYX", "CYX", "NME"], [(1, 2)]),
    "loop": (["NGLY", "CYX", "ALA", "GLY", "SER", "CYX", "CLYS"], [(1, 5)]),
    "ends": (["NCYX", "ALA", "GLY", "SER", "CCYX"], [(0, 4)]),
    "two": (["ACE", "CYX", "GLY", "CYX", "PRO", "ALA", "CYX", "PHE", "CYX", "NME"], [(1, 6), (3, 8)]),
}
PROTEINS = ["hp35", "protein-g", "t4-lysozyme", "dhfr", "trpzip2"]
SIDE_CHAINS = {
    "ALA": "CA-CB",
    "ARG": "CA-CB CB-CG CD-CG CD-NE CZ-NE CZ-NH1 CZ-NH2",
    "ASP": "CA-CB CB-CG",
    "GLH": "CA-CB CB-CG CD-CG CD-OE2",
    "GLN": "CA-CB CB-CG CD-CG CD-NE2",
    "GLY": "",
    "HID": "CA-CB CB-CG",
    "ILE": "CA-CB CB-CG2 CB-CG1 CD1-CG1",
    "LYN": "CA-CB CB-CG CD-CG CD-CE CE-NZ",
    "LYS": "CA-CB CB-CG CD-CG CD-CE CE-NZ",
    "MET": "CA-CB CB-CG CG-SD CE-SD",
    "PRO": "",
    "THR": "CA-CB CB-CG2 CB-OG1",
    "TRP": "CA-CB CB-CG",
    "TYR": "CA-CB CB-CG CZ-OH",
}


@pytest.fixture(scope="module")
def build(proteins, jittered):
    """build(name) -> Molecule; skips where a structure is not on this machine."""
    made = {}

    def find(name):
        if name not in made:
            if name in PROTEINS:
                try:
                    made[name] = jittered(*proteins.structure(name))
                except proteins.MissingStructure as error:
                    pytest.skip(str(error))
            else:
                pairs: list[tuple[int, int]] = []
                if name in DISULFIDES:
                    field, (names, pairs) = AMBER, DISULFIDES[name]
                else:
                    field, names = SEQUENCES[name]
                topology = proteins.build_topology(field, names, pairs)
                made[name] = jittered(topology, proteins.idealised(topology))
        return made[name]

    return find


def modelled(m: CoordinateMap):
    return [c for c in m.coordinates if c.modelled]


def turned_bonds(m: CoordinateMap) -> list[tuple[int, int]]:
    """The bonds that a modelled dihedral turns, seed excluded."""
    found = []
    for c in modelled(m):
        if c.kind in ("dihedral", "amide") and c.row >= 0:
            _, parent, grandparent, _ = m.zmatrix.rows[c.row]
            found.append((min(parent, grandparent), max(parent, grandparent)))
    return found


def largest_error(m: CoordinateMap, x: torch.Tensor, back: torch.Tensor) -> float:
    placed = torch.cat([place_like(back[i : i + 1], x[i], m.zmatrix.seed) for i in range(len(x))])
    return float((placed - x).abs().max())


def check_round_trip(m: CoordinateMap, x: torch.Tensor) -> None:
    y, s = m.to_internal(x)
    assert y.shape[1] + s.shape[1] == 3 * m.n_atoms - 6
    assert m.in_domain(y, s).all()
    assert largest_error(m, x, m.to_positions(y, s)) < 1e-10
    single = x.float()
    assert largest_error(m, single, m.to_positions(*m.to_internal(single))) < 1e-4


def check_torsions(proteins, molecule, m: CoordinateMap) -> None:
    """`reduced` turns each bond outside small rings once, and of the rings' bonds proline's φ alone."""
    neighbours = proteins.neighbours_of(molecule.topology)
    atoms = list(molecule.topology.atoms())
    tree = set()  # bonds that a row of the Z-matrix stands for
    for atom, parent, *_ in m.zmatrix.rows:
        tree.add((min(atom, parent), max(atom, parent)))
    first, middle, last = m.zmatrix.seed
    tree |= {(min(first, middle), max(first, middle)), (min(middle, last), max(middle, last))}
    expected, phi_of_proline = set(), set()
    for a, b in ((min(a.index, b.index), max(a.index, b.index)) for a, b in molecule.topology.bonds()):
        if (a, b) not in tree:
            continue
        ends = [[o for o in neighbours[p] - {q} if (min(p, o), max(p, o)) in tree] for p, q in ((a, b), (b, a))]
        if 0 < len(proteins.smallest_ring(neighbours, a, b)) <= 6:
            if {atoms[a].name, atoms[b].name} == {"N", "CA"}:
                phi_of_proline.add((a, b))
        elif all(ends):
            expected.add((a, b))
    turned = turned_bonds(m)
    assert len(turned) == len(set(turned))
    assert expected <= set(turned)
    assert set(turned) - expected <= phi_of_proline


def check_fixman_blocks(molecule, m: CoordinateMap, reduced: bool) -> None:
    """All hydrogens of one atom share an axis; in `reduced` random y therefore moves no det Z (docs/theory.md)."""
    row_of = {row[0]: row for row in m.zmatrix.rows}
    axes: dict[int, set[tuple[int, ...]]] = {}
    for hydrogen, heavy in m.constraints.bonds:
        axes.setdefault(heavy, set()).add(row_of[hydrogen][1:])
    assert axes and all(len(found) == 1 and next(iter(found))[0] == heavy for heavy, found in axes.items())
    if not reduced:
        return
    y, s = m.to_internal(molecule.x[:1])
    torch.manual_seed(5)
    random = 2 * math.pi * torch.rand(4, y.shape[1], dtype=torch.float64) - math.pi
    for j, c in enumerate(modelled(m)):
        if c.kind == "angle":
            random[:, j] = 0.3 + 2.5 * torch.rand(4, dtype=torch.float64)
    _, _, theta, phi = m._raw(torch.cat((y, random)), s)
    for value in m.fixman.log_determinants(theta, phi):
        assert (value - value[:1]).abs().max() < 1e-12


@pytest.mark.parametrize("name", [*SEQUENCES, *DISULFIDES, *PROTEINS])
def test_coordinates_of(proteins, build, name):
    mol = build(name)
    system = mol.constrained(3.0)
    full, reduced = mol.map("full", system), mol.map("reduced", system)
    assert full.n_fixed == len(full.constraints.bonds) == system.getNumConstraints()
    for m in (full, reduced):
        check_round_trip(m, mol.x[:4])
        check_fixman_blocks(mol, m, m is reduced)
    assert not any(c.kind in ("length", "offset") for c in modelled(reduced))
    check_torsions(proteins, mol, reduced)


def test_every_template_is_tried(proteins):
    """No amino acid or cap of amber14 is left out, and none of charmm36's twenty."""
    names = {name for source, names in SEQUENCES.values() if source == AMBER for name in names}
    names |= {name for names, _ in DISULFIDES.values() for name in names}
    assert amino_acids(proteins, AMBER) == names
    charmm = {name.split("+")[0] for source, names in SEQUENCES.values() if source == CHARMM for name in names}
    assert len({"HIS" if name.startswith("HS") else name for name in charmm} - {"CYM"}) == 20


def amino_acids(proteins, field: str) -> set[str]:
    """Templates of amino acids and caps."""
    templates = proteins.force_field(field)._templates
    return {
        name
        for name, found in templates.items()
        if {"N", "CA", "C"} <= {a.name for a in found.atoms} or name in ("ACE", "NME", "NHE")
    }


def test_amber19_has_amber14s_residues(proteins):
    """The same names with the same atoms and bonds, but for names within two caps: what holds of one holds of both.

    Whole molecules of amber19 are among those of `test_coordinates_of` all the same, and below with its Systems.
    """
    names = amino_acids(proteins, AMBER19)
    assert names == amino_acids(proteins, AMBER)
    for name in names:
        graphs = []
        for field in (AMBER, AMBER19):
            found = proteins.template(field, name)
            label = [a.element.symbol if name in ("ACE", "NME") else a.name for a in found.atoms]
            graphs.append((sorted(label), sorted(tuple(sorted((label[i], label[j]))) for i, j in found.bonds)))
        assert graphs[0] == graphs[1], name


@pytest.mark.parametrize("name", ["amber19-caps", "amber19-amide", "amber19-ends"])
def test_systems_of_amber19(proteins, build, name):
    """The force field knows the molecule, and its own constraints are lengths of the coordinates."""
    mol = build(name)
    options = {"constraints": app.HBonds, "hydrogenMass": 3.0 * unit.dalton}
    system = proteins.force_field(AMBER19).createSystem(mol.topology, **options)
    hydrogens = sum(a.element.symbol == "H" for a in mol.topology.atoms())
    for representation in ("full", "reduced"):
        m = mol.map(representation, system)
        assert len(m.constraints.bonds) == system.getNumConstraints() == hydrogens
        check_round_trip(m, mol.x[:2])
        check_fixman_blocks(mol, m, representation == "reduced")


@pytest.mark.parametrize("name", ["amber-caps", "amber-amide"])
def test_side_chains_by_name(build, name):
    """χ angles, hydroxyls, amines and methyl groups, from a list written by hand."""
    mol = build(name)
    atoms = list(mol.topology.atoms())
    turned = set(turned_bonds(mol.map("reduced")))
    found: dict[int, set[str]] = {}
    for a, b in turned:
        if atoms[a].residue is atoms[b].residue and not {atoms[a].name, atoms[b].name} <= {"N", "CA", "C"}:
            found.setdefault(atoms[a].residue.index, set()).add("-".join(sorted((atoms[a].name, atoms[b].name))))
    seen = 0
    for residue in mol.topology.residues():
        if residue.name in SIDE_CHAINS:
            seen += 1
            assert found.get(residue.index, set()) == set(SIDE_CHAINS[residue.name].split()), residue.name
    assert seen >= 5


# ---------------------------------------------------------------- disulfides


@pytest.mark.parametrize("name", list(DISULFIDES))
def test_a_disulfide_is_no_edge_of_the_tree(build, name):
    mol = build(name)
    atoms = list(mol.topology.atoms())
    graph, zmatrix = MoleculeGraph(mol.topology), build_zmatrix(mol.topology)
    assert len(graph.disulfides) == len(DISULFIDES[name][1])
    assert all(atoms[a].name == atoms[b].name == "SG" for a, b in graph.disulfides)
    edges = {frozenset(row[:2]) for row in zmatrix.rows}
    assert not edges & set(map(frozenset, graph.disulfides))
    # the tree still runs along the whole backbone
    seed = {frozenset(zmatrix.seed[:2]), frozenset(zmatrix.seed[1:])}
    named = {(a.residue.index, a.name): a.index for a in atoms}
    peptide = [frozenset((named[i, "C"], named[i + 1, "N"])) for i in range(len(DISULFIDES[name][0]) - 1)]
    assert all(bond in edges | seed for bond in peptide)


def test_cysteines_turn_as_if_reduced(build):
    """χ1 of a bridged cysteine is modelled: the ring that the disulfide closes is not rigid."""
    mol = build("loop")
    atoms = list(mol.topology.atoms())
    turned = turned_bonds(mol.map("reduced"))
    chi1 = [{atoms[a].name, atoms[b].name} for a, b in turned if atoms[a].residue.name == "CYX"]
    assert chi1.count({"CA", "CB"}) == 2


def test_a_small_ring_with_a_disulfide_stays_a_ring(build_topology):
    """A dithiolane (five atoms) is rigid."""
    graph = MoleculeGraph(build_topology("S0 S0 C2 C2 C1 C3", "0-1 1-2 2-3 3-4 4-0 4-5"))
    assert not graph.disulfides
    assert graph.in_ring(0, 1) and graph.ring_systems()[:5] == [0] * 5 and not graph.in_ring(4, 5)


def test_a_disulfide_that_holds_the_molecule_together_stays(build_topology):
    graph = MoleculeGraph(build_topology("C3 S0 S0 C3", "0-1 1-2 2-3"))
    assert not graph.disulfides and not graph.in_ring(1, 2)


# ---------------------------------------------------------------- several chains


def message_of(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and ". " not in message
    return message


def two_chains(proteins, linked: bool) -> app.Topology:
    one = proteins.build_topology(AMBER, ["ACE", "CYX", "NME"])
    x = [[0.0, 0.0, 0.0]] * one.getNumAtoms() * unit.nanometer
    modeller = app.Modeller(one, x)
    modeller.add(one, x)
    topology = modeller.topology
    if linked:
        sulfurs = [a for a in topology.atoms() if a.name == "SG"]
        topology.addBond(*sulfurs)
    return topology


@pytest.mark.parametrize("linked", [False, True])
def test_several_chains_are_refused(proteins, linked):
    topology = two_chains(proteins, linked)
    message = message_of(lambda: build_zmatrix(topology))
    assert "2 protein chains" in message and "ACE4" in message and "one chain" in message


def test_a_gap_in_one_chain_is_refused(proteins):
    topology = proteins.build_topology(AMBER, ["ACE", "ALA", "GLY", "NME"])
    topology._bonds = [bond for bond in topology._bonds if {bond[0].name, bond[1].name} != {"C", "N"}]
    assert "not one molecule" in message_of(lambda: build_zmatrix(topology))


def test_padded_names_are_understood(proteins):
    """ParmEd leaves the blanks of old prmtop files in the names."""
    topology = proteins.build_topology(AMBER, ["NALA", "PHE", "CSER"])
    plain = MoleculeGraph(topology)
    for atom in topology.atoms():
        atom.name = f"{atom.name:4s}"
    assert MoleculeGraph(topology).backbone() == plain.backbone() and sum(plain.backbone()) == 9


def test_caps_belong_to_the_backbone(proteins):
    """As residues of their own, and as the atoms that CHARMM's patches add."""
    for field, names, expected in (
        (AMBER, ["ACE", "ALA", "NME"], ["CH3", "C", "N", "CA", "C", "N", "CH3"]),
        (AMBER, ["ACE", "ALA", "NHE"], ["CH3", "C", "N", "CA", "C", "N"]),
        (AMBER19, ["ACE", "ALA", "NME"], ["CH3", "C", "N", "CA", "C", "N", "C"]),
        (CHARMM, ["ALA+ACE", "SER+CT3"], ["N", "CA", "C", "CAY", "CY", "N", "CA", "C", "NT", "CAT"]),
    ):
        topology = proteins.build_topology(field, names)
        flags = MoleculeGraph(topology).backbone()
        found = [a.name for a, yes in zip(topology.atoms(), flags, strict=True) if yes]
        assert sorted(found) == sorted(expected)
