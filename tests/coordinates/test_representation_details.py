"""What is modelled: methyl rotors, sectors, cuts, bases, rings, the channels of `reduced`, and JSON."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from openmm import app

from openmm_bg.coordinates import CoordinateMap, build_zmatrix, read_constraints
from openmm_bg.coordinates.statistics import CONCENTRATED, _circle, fit_statistics, von_mises_concentration

TAU = 2 * math.pi


def wrapped(angle):
    return (angle + math.pi) % TAU - math.pi


def distances(x):
    return torch.linalg.norm(x[:, :, None] - x[:, None], dim=-1)


def fixman(m, y, s):
    _, _, theta, phi = m._raw(y, s)
    return m.fixman(theta, phi)


def modelled(m: CoordinateMap):
    return [c for c in m.coordinates if c.modelled]


# ---------------------------------------------------------------- methyl rotors


@pytest.mark.parametrize("representation", ["full", "reduced"])
@pytest.mark.parametrize("name", ["dipeptide", "methanol", "isobutane", "ethylammonium", "proline"])
def test_cyclic_permutation_of_three_hydrogens(molecule, name, representation):
    """t' shifts by exactly ±120°; lengths, angles and gaps change hands; the volume does not move."""
    mol = molecule(name)
    m = mol.map(representation, mol.constrained(3.0) if name != "methanol" else None)
    y, s = m.to_internal(mol.x[:10])
    assert m.zmatrix.triple
    for triple in m.zmatrix.triple:
        a, b, c = (m.zmatrix.rows[row][0] for row in triple)
        rotor = next(j for j, k in enumerate(modelled(m)) if k.row == triple[0] and k.kind == "dihedral")
        same = [
            j for j, k in enumerate(modelled(m)) if k.row not in triple or (k.row == triple[0] and k.kind == "dihedral")
        ]
        for order in ((b, c, a), (c, a, b)):
            x = mol.x[:10].clone()
            x[:, [a, b, c]] = x[:, list(order)]
            y2, s2 = m.to_internal(x)
            shift = wrapped((y2 - y)[:, rotor].numpy())
            assert np.abs(np.abs(shift) - TAU / 3).max() < 1e-12
            assert np.ptp(shift) < 1e-12  # the same turn for all frames
            others = [j for j in same if j != rotor]
            assert torch.equal(y2[:, others], y[:, others])
            assert m.in_domain(y2, s2).all()
            assert torch.allclose(m.log_volume(y2, s2), m.log_volume(y, s), atol=1e-9)
            assert torch.allclose(distances(m.to_positions(y2, s2)), distances(x), atol=1e-10)


def test_fold_is_for_three_identical_hydrogens(molecule, build_topology):
    def folds(topology):
        return len(build_zmatrix(topology).triple)

    count = {name: folds(molecule(name).topology) for name in ("dipeptide", "ethylammonium", "ethylamine", "toluene")}
    assert count == {"dipeptide": 3, "ethylammonium": 2, "ethylamine": 1, "toluene": 1}
    assert folds(molecule("trifluoroethane").topology) == 1  # CF3 keeps its labels
    assert folds(molecule("methanol").topology) == 1  # the seed's hydrogen is the hydroxyl's
    for name in ("dipeptide", "toluene", "methanol"):
        layout = molecule(name).map("full").layout
        assert layout.fold.count(3) == folds(molecule(name).topology) and set(layout.fold) <= {1, 3}
    # CH2D
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    carbons = [topology.addAtom(f"C{i}", app.element.carbon, residue) for i in range(3)]
    light = [topology.addAtom(f"H{i}", app.element.hydrogen, residue) for i in range(2)]
    heavy = topology.addAtom("D", app.element.deuterium, residue)
    for a, b in [(0, 1), (1, 2)]:
        topology.addBond(carbons[a], carbons[b])
    for hydrogen in (*light, heavy):
        topology.addBond(carbons[0], hydrogen)
    assert folds(topology) == 0


# ---------------------------------------------------------------- sectors


def test_offsets_near_pi_do_not_jump(molecule):
    """Planar groups: data on both sides of ±π stay one narrow hump, in y and in the standardisation."""
    mol = molecule("acetamide")
    m = mol.map("full")
    y, _ = m.to_internal(mol.x)
    planar = [j for j, c in enumerate(modelled(m)) if c.linear_angle and abs(abs(m.layout.shift[j]) - math.pi) < 0.3]
    assert len(planar) >= 2
    raw = wrapped(y[:, planar].numpy())
    assert (np.ptp(raw, axis=0) > 6).any()  # the frames do straddle ±π
    assert (np.ptp(y[:, planar].numpy(), axis=0) < 2.5).all()
    for j in planar:
        assert not m.layout.circular[j] and m.layout.scale[j] < 0.6
        assert m.layout.shift[j] == pytest.approx(float(y[:, j].mean()), abs=1e-9)
        assert m.layout.scale[j] == pytest.approx(float(y[:, j].std(correction=0)), rel=1e-6)


def test_both_pyramids_of_an_amine_are_one_sector(molecule):
    """Inversion of nitrogen exchanges nothing that is conserved, so the sector holds both signs."""
    mol = molecule("ethylamine")
    m = mol.map("full")
    y, s = m.to_internal(mol.x)
    assert m.in_domain(y, s).all()
    j = next(j for j, c in enumerate(modelled(m)) if c.invertible)
    inverted = y.clone()
    inverted[:, j] = TAU - y[:, j]
    assert ((inverted[:, j] - math.pi) * (y[:, j] - math.pi) < 0).any()
    assert m.in_domain(inverted, s).all()
    assert not any(c.invertible for c in molecule("ethylammonium").map("full").coordinates)


def test_mirror_image_is_outside(molecule):
    mol = molecule("dipeptide")
    for representation in ("full", "reduced"):
        m = mol.map(representation)
        assert m.in_domain(*m.to_internal(mol.x)).all()
        assert not m.in_domain(*m.to_internal(-mol.x)).any()


def test_cis_amide_is_outside(molecule):
    mol = molecule("dipeptide")
    m = mol.map("full")
    y, s = m.to_internal(mol.x)
    amides = [j for j, c in enumerate(modelled(m)) if c.kind == "amide"]
    assert len(amides) == 2
    for j in amides:
        assert not m.layout.circular[j] and abs(wrapped(m.layout.shift[j] - math.pi)) < 0.5
        cis = y.clone()
        cis[:, j] += math.pi
        assert not m.in_domain(cis, s).any()
        y2, s2 = m.to_internal(m.to_positions(cis, s))
        assert not m.in_domain(y2, s2).any()


def test_frames_outside_are_counted_and_left_out(molecule, caplog):
    mol = molecule("dipeptide")
    clean = mol.map("full")
    y, s = clean.to_internal(mol.x[:4])
    amide = next(j for j, c in enumerate(modelled(clean)) if c.kind == "amide")
    y[:, amide] += math.pi
    frames = torch.cat((mol.x, clean.to_positions(y, s), -mol.x[:3]))
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        m = CoordinateMap.fit(mol.topology, frames, clean.constraints)
    assert m.statistics.n_outside == 7 and m.statistics.n_frames == len(frames)
    assert "7 of 107 data frames" in caplog.text
    assert (~m.in_domain(*m.to_internal(frames))).sum() == 7
    linear = [j for j, circular in enumerate(m.layout.circular) if not circular]
    shift, scale = np.array(m.layout.shift), np.array(m.layout.scale)
    assert np.allclose(shift[linear], np.array(clean.layout.shift)[linear], atol=1e-9)
    assert np.allclose(scale[linear], np.array(clean.layout.scale)[linear], atol=1e-9)


def test_domain_is_decided_on_the_coordinates(molecule):
    """Values that q → x would fold back are outside, and so are non-finite ones, in y and in s."""
    mol = molecule("dipeptide")
    for representation in ("full", "reduced"):
        m = mol.map(representation)
        y, s = m.to_internal(mol.x[:1])
        fixed = [c for c in m.coordinates if not c.modelled]
        for values, described, position in ((y, modelled(m), 0), (s, fixed, 1)):
            for j, c in enumerate(described):
                bad = {"length": [-0.1, 0.0], "angle": [-0.2, 0.0, math.pi + 0.2], "dihedral": []}.get(c.kind)
                if bad is None:
                    bad = [float(values[0, j]) + math.pi, float(values[0, j]) - math.pi, TAU + float(values[0, j])]
                for value in [*bad, math.nan, math.inf, -math.inf]:
                    changed = [y.clone(), s.clone()]
                    changed[position][0, j] = value
                    assert not m.in_domain(*changed).item(), (c, value)
                if c.kind == "dihedral":
                    changed = [y.clone(), s.clone()]
                    changed[position][0, j] += 2.0
                    assert m.in_domain(*changed).item()


def test_all_frames_need_one_stereoisomer(molecule):
    from openmm_bg.errors import InputError

    mol = molecule("dipeptide")
    m = mol.map("full")
    values = m._raw_sorted(mol.x[:1]).numpy().repeat(6, axis=0)
    offsets = [j for j, c in enumerate(m.coordinates) if c.linear_angle and not c.invertible][:6]
    for frame, j in enumerate(offsets):  # every frame is in the minority somewhere
        values[frame, j] += math.pi
    with pytest.raises(InputError, match="one stereoisomer"):
        fit_statistics(m.coordinates, values)


# ---------------------------------------------------------------- cuts and bases


@pytest.mark.parametrize(
    ("centres", "weights", "widths"),
    [
        ([3.1], [1.0], [0.2]),
        ([1.0, -2.0], [0.9, 0.1], [0.2, 0.1]),
        ([-1.2, -2.6, 1.0], [0.6, 0.3, 0.1], [0.3, 0.3, 0.2]),
        ([0.0, math.pi], [0.92, 0.08], [0.15, 0.15]),
        ([1.05, -1.05, math.pi], [0.4, 0.3, 0.3], [0.25, 0.25, 0.25]),
    ],
)
def test_cut_lies_in_the_emptiest_region(centres, weights, widths):
    rng = np.random.default_rng(3)
    which = rng.choice(len(centres), size=20000, p=weights)
    angle = wrapped(np.array(centres)[which] + np.array(widths)[which] * rng.normal(size=20000))
    centre, _ = _circle(angle)

    def near(point):
        return np.mean(np.abs(wrapped(angle - point)) < math.radians(10))

    emptiest = min(near(point) for point in np.linspace(-math.pi, math.pi, 721))
    assert near(centre + math.pi) <= emptiest + 0.002
    if len(centres) == 1:
        assert wrapped(centre - centres[0]) == pytest.approx(0.0, abs=0.01)


def test_von_mises_or_uniform_base():
    rng = np.random.default_rng(4)
    for kappa in (4.0, 30.0):
        centre, found = _circle(rng.vonmises(2.9, kappa, 40000))
        assert found == pytest.approx(kappa, rel=0.05) and abs(wrapped(centre - 2.9)) < 0.01
    assert _circle(rng.uniform(-math.pi, math.pi, 40000))[1] == 0.0
    assert _circle(rng.vonmises(0.5, 0.5, 40000))[1] == 0.0
    assert _circle(np.full(10, 1.0))[1] == pytest.approx(200.0)  # never infinite
    for kappa in (0.5, 3.0, 50.0):
        i1, i0 = (getattr(torch.special, f"i{k}e")(torch.tensor(kappa, dtype=torch.float64)) for k in (1, 0))
        assert von_mises_concentration(float(i1 / i0)) == pytest.approx(kappa, rel=1e-6)
    assert 0 < CONCENTRATED < 1


def test_layout_of_a_methyl_is_that_of_the_folded_angle(molecule):
    """shift is c of v = 3t' - c, so that v is concentrated about zero for a stiff rotor."""
    mol = molecule("toluene")
    m = mol.map("full")
    j = m.layout.fold.index(3)
    assert m.layout.circular[j] and m.layout.scale[j] == 1.0
    stiff = mol.x[:1].repeat(200, 1, 1)
    stiff = stiff + 1e-3 * torch.from_numpy(np.random.default_rng(0).normal(size=stiff.shape))
    rotated = CoordinateMap.fit(mol.topology, stiff, m.constraints)
    v = wrapped(3 * rotated.to_internal(stiff)[0][:, j].numpy() - rotated.layout.shift[j])
    assert rotated.layout.concentration[j] > 10 and np.abs(v).max() < 1.0


# ---------------------------------------------------------------- reduced


def test_reduced_of_a_peptide(molecule):
    """Modelled: φ, ψ, ω, χ and backbone angles. Kept: lengths, offsets, ring dihedrals, other angles."""
    mol = molecule("tripeptide")
    m = mol.map("reduced")
    atoms = list(mol.topology.atoms())
    kept = [c for c in m.coordinates if not c.modelled]
    assert all(c.kind in ("angle", "dihedral", "amide") for c in modelled(m))
    assert all(c.backbone and atoms[c.atom].name in ("N", "CA", "C") for c in modelled(m) if c.kind == "angle")
    assert {c.kind for c in kept} >= {"length", "offset", "angle", "dihedral"}
    assert not any(c.backbone for c in kept if c.kind in ("angle", "amide") or c.kind == "dihedral")
    bonds = {
        tuple(sorted((atoms[p].name, atoms[g].name)))
        for c in modelled(m)
        if c.kind == "dihedral" and c.row >= 0
        for _, p, g, _ in [m.zmatrix.rows[c.row]]
    }
    assert {("CA", "N"), ("C", "CA"), ("CA", "CB"), ("CB", "CG"), ("CD", "CG")} <= bonds
    ring = {"CG", "CD1", "CD2", "CE1", "CE2", "CZ"}
    phenyl = {a.index for a in atoms if a.name in ring and a.residue.name == "PHE"}
    for c in modelled(m):
        if c.kind == "dihedral" and c.row >= 0:
            assert not {m.zmatrix.rows[c.row][1], m.zmatrix.rows[c.row][2]} <= phenyl
    assert sum(c.kind == "amide" for c in modelled(m)) == 2


def test_reduced_of_rings(molecule):
    """A ring holds its own shape: nothing of benzene or cyclohexane moves, toluene's methyl does."""
    assert molecule("benzene").map("reduced").n_modelled == 0
    assert molecule("cyclohexane").map("reduced").n_modelled == 0
    m = molecule("toluene").map("reduced")
    assert m.layout.fold.count(3) == 1
    assert all(c.ring < 0 for c in modelled(m) if c.kind != "angle")
    proline = molecule("proline").map("reduced")
    names = [a.name for a in molecule("proline").topology.atoms()]
    for c in modelled(proline):
        if c.kind == "dihedral" and c.ring >= 0 and not c.backbone:
            raise AssertionError(f"the dihedral of {names[c.atom]} turns a bond of proline's ring")


def test_reference_closes_its_rings(molecule):
    """Reference values of a ring come from one frame: with two puckers the means would flatten it."""
    mol = molecule("cyclohexane")
    m = mol.map("reduced")
    rebuilt = m.to_positions(m.reference_fixed.new_zeros(1, 0), m.reference_fixed)
    closing = [
        float(torch.linalg.norm(rebuilt[0, a.index] - rebuilt[0, b.index]))
        for a, b in mol.topology.bonds()
        if a.element.symbol == b.element.symbol == "C"
    ]
    assert max(abs(length - 0.145) for length in closing) < 0.02
    # ring dihedrals of two puckers, by hand: the reference is one of them, not their mean
    values = m._raw_sorted(mol.x).numpy()
    dihedrals = [j for j, c in enumerate(m.coordinates) if c.kind == "dihedral" and c.ring >= 0]
    mirrored = values.copy()
    mirrored[:, dihedrals] *= -1
    both = fit_statistics(m.coordinates, np.concatenate((values, mirrored)))
    found = np.array([both.reference[j] for j in dihedrals])
    distance = np.abs(wrapped(np.concatenate((values, mirrored))[:, dihedrals] - found)).max(1)
    assert distance.min() < 1e-12


def test_reference_is_typical(molecule):
    mol = molecule("dipeptide")
    m = mol.map("reduced", mol.constrained())
    _, s = m.to_internal(mol.x)
    kept = [c for c in m.coordinates if not c.modelled]
    for j, c in enumerate(kept):
        if c.constrained:
            assert float(m.reference_fixed[j]) in m.constraints.lengths
        else:
            assert abs(float(m.reference_fixed[j] - s[:, j].mean())) < 1e-9
    assert m.in_domain(m.to_internal(mol.x)[0], m.reference_fixed).all()


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("representation", ["full", "reduced"])
@pytest.mark.parametrize("name", ["dipeptide", "proline", "water"])
def test_json_round_trip(molecule, name, representation):
    mol = molecule(name)
    m = mol.map(representation, mol.constrained(2.0) if name != "water" else None)
    text = json.dumps(m.to_dict(), allow_nan=False)
    again = CoordinateMap.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    assert again.layout == m.layout and again.zmatrix == m.zmatrix and again.coordinates == m.coordinates
    y, s = m.to_internal(mol.x[:5])
    y2, s2 = again.to_internal(mol.x[:5])
    assert torch.equal(y, y2) and torch.equal(s, s2)
    assert torch.equal(m.to_positions(y, s), again.to_positions(y, s))
    assert torch.equal(m.log_volume(y, s), again.log_volume(y, s))
    assert torch.equal(m.in_domain(y, s), again.in_domain(y, s))
    assert torch.equal(m.reference_fixed, again.reference_fixed)


def test_other_masses(molecule):
    mol = molecule("dipeptide")
    m = mol.map("full", mol.constrained())
    heavy = m.with_constraints(read_constraints(mol.constrained(3.0), mol.topology))
    y, s = m.to_internal(mol.x[:5])
    assert torch.equal(heavy.to_internal(mol.x[:5])[0], y) and heavy.layout == m.layout
    assert (fixman(heavy, y, s) - fixman(m, y, s)).abs().min() > 0.1
    jacobian = m.log_volume(y, s) - fixman(m, y, s)
    assert torch.allclose(heavy.log_volume(y, s) - fixman(heavy, y, s), jacobian, atol=1e-10)


def test_warnings_of_what_will_disappoint(molecule, build_topology, bare, caplog):
    """A straight angle, and data that do not obey the constraints."""
    mol = molecule("dipeptide")
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        mol.map("full", mol.constrained())
    assert caplog.text.count("made with another System") == 1
    caplog.clear()
    topology = build_topology("C3 C0 C0 C3", "0-1 1-2 2-3")
    x = np.zeros((10, 10, 3))
    x[:, :4, 0] = [0.0, 0.15, 0.27, 0.42]
    x[:, 4:7] = [[-0.04, 0.1, 0.0], [-0.04, -0.05, 0.087], [-0.04, -0.05, -0.087]]
    x[:, 7:] = [[0.46, 0.1, 0.0], [0.46, -0.05, 0.087], [0.46, -0.05, -0.087]]
    x += 1e-3 * np.random.default_rng(0).normal(size=x.shape)
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        CoordinateMap.fit(topology, x, read_constraints(bare(topology), topology))
    assert "nearly straight" in caplog.text
