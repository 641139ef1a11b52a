"""Figures of generated frames against data whose values are known beforehand, each with an error that must show."""

import math
import os
import sys
import types

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)
from openmm import app, unit

from openmm_bg.analysis import geometry_checks
from openmm_bg.analysis.density_figures import energy_figures, weight_figures
from openmm_bg.analysis.distances import backbone_atoms, delta_d, pair_distances
from openmm_bg.analysis.embedding import embed
from openmm_bg.analysis.novelty import heavy_atoms, minimise, nearest_rmsd
from openmm_bg.analysis.residues import (
    chi_distances,
    chi_torsions,
    distribution_distance,
    js_divergence,
    ramachandran_distances,
    residue_rmsf,
)
from openmm_bg.analysis.superposition import rmsf, superpose
from openmm_bg.analysis.torsions import dihedral_atoms, torsion
from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.errors import InputError

import openmm  # isort: skip


@pytest.fixture(scope="module")
def villin():
    """(topology, positions [582, 3] nm) of HP35, out of the water of OpenMM's own example."""
    pdb = app.PDBFile(os.path.join(os.path.dirname(app.__file__), "data", "test.pdb"))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    keep = {"HOH", "Cl", "Na", "CL", "NA", "Cl-", "Na+"}
    modeller.delete([r for r in modeller.topology.residues() if r.name in keep])
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


def rotations(n, rng):
    """Rotation matrices [n, 3, 3]."""
    q = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    return q * np.sign(np.linalg.det(q))[:, None, None]


def wander(frames, rng):
    """The same frames, each standing somewhere else."""
    return frames @ rotations(len(frames), rng) + rng.normal(size=(len(frames), 1, 3))


def turned(topology, frame, bond, angle):
    """A frame with everything beyond the bond (a, b), on the side of b, turned about it."""
    graph = MoleculeGraph(topology)
    a, b = bond
    side, front = {b}, [b]
    while front:
        front = [o for x in front for o in graph.neighbours[x] if o != a and o not in side]
        side |= set(front)
    axis = frame[b] - frame[a]
    axis = axis / np.linalg.norm(axis)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    rotation = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    out = frame.copy()
    rows = sorted(side)
    out[rows] = (frame[rows] - frame[b]) @ rotation.T + frame[b]
    return out


# ------------------------------------------------------------------ ΔD


def line(spacing):
    """Three atoms on a line [n, 3, 3], neighbours `spacing` [n] apart."""
    frames = np.zeros((len(spacing), 3, 3))
    frames[:, 1, 0], frames[:, 2, 0] = spacing, 2 * spacing
    return frames


def test_delta_d_of_a_constant_shift():
    """Distances 1, 1 and 2 spacings: 0.03 nm more of each is 0.04 nm on average, 0.4 Å."""
    found = delta_d(line(np.full(2500, 0.13)), line(np.full(2100, 0.10)), [0, 1, 2])
    assert found["generated"] == pytest.approx(0.4) and found["generated_sd"] == pytest.approx(0.0, abs=1e-12)
    assert found["data"] == pytest.approx(0.0, abs=1e-12) and math.isnan(found["ratio"])
    assert found["batch"] == 1000 and found["batches"] == 2
    assert delta_d(line(np.full(7, 0.13)), line(np.full(2, 0.1)), [0, 2])["batch"] == 2


@pytest.mark.statistical
@pytest.mark.parametrize("n_data", [4000, 1500])
def test_delta_d_of_gaussians(n_data):
    """|a - b| of two Gaussians of width σ is 2σ/√π on average: two independent sets, and data against data."""
    sigma, rng = 0.01, np.random.default_rng(7)
    ours, theirs = (line(0.3 + sigma * rng.normal(size=n)) for n in (4000, n_data))
    found = delta_d(ours, theirs, [0, 1, 2], seed=1)
    mean = 10 * (4 / 3) * 2 * sigma / math.sqrt(math.pi)
    spread = 10 * (4 / 3) * sigma * math.sqrt(2 - 4 / math.pi)  # of |a - b|
    error = spread / math.sqrt(n_data)
    assert found["batches"] == 4
    assert abs(found["generated"] - mean) < 5 * error
    assert abs(found["data"] - mean) < 5 * error  # a frame paired with itself would pull this down
    assert 0.3 * spread / math.sqrt(1000) < found["data_sd"] < 3 * spread / math.sqrt(1000)
    narrow = delta_d(line(np.full(4000, 0.3)), theirs, [0, 1, 2])
    assert narrow["ratio"] == pytest.approx(1 / math.sqrt(2), rel=0.1)  # too little spread shows as less than 1


def test_delta_d_of_the_training_frames():
    """Training frames a constant away from the data have that difference, whatever was generated."""
    ours, theirs, known = (line(np.full(n, x)) for n, x in ((300, 0.10), (250, 0.10), (2100, 0.12)))
    found = delta_d(ours, theirs, [0, 1, 2], training=known, batch=100)
    assert found["training"] == pytest.approx(10 * 0.02 * 4 / 3) and found["training_sd"] == pytest.approx(
        0.0, abs=1e-9
    )
    assert found["generated"] == pytest.approx(0.0, abs=1e-9) and found["batches"] == 3
    few = delta_d(ours, theirs, [0, 1, 2], training=known[:7], batch=100)
    assert few["training"] == pytest.approx(found["training"]) and math.isnan(few["training_sd"])
    assert math.isnan(delta_d(ours, theirs, [0, 1, 2])["training"])


def test_delta_d_ignores_rigid_motion_and_sees_the_right_atoms(dipeptide):
    rng = np.random.default_rng(0)
    frames = dipeptide.positions + rng.normal(0, 0.002, (300, 22, 3))
    atoms, name = backbone_atoms(dipeptide.topology)
    assert [list(dipeptide.topology.atoms())[a].name for a in atoms] == ["CH3", "C", "N", "CA", "C", "N", "C"]
    assert name == "N, CA, C"
    plain, moved = delta_d(frames, frames, atoms, seed=3), delta_d(wander(frames, rng), frames, atoms, seed=3)
    assert moved["generated"] == pytest.approx(plain["generated"], rel=1e-9)
    shifted = frames.copy()
    shifted[:, 0] += 1.0  # a hydrogen
    assert delta_d(shifted, frames, atoms, seed=3)["generated"] == pytest.approx(plain["generated"], rel=1e-9)
    shifted[:, atoms[0]] += 1.0
    assert delta_d(shifted, frames, atoms, seed=3)["generated"] > 10 * plain["generated"]


def test_delta_d_refuses():
    frames = line(np.full(5, 0.1))
    for arguments in ((frames[:0], frames, [0, 1]), (frames, frames[:1], [0, 1]), (frames, frames, [0])):
        with pytest.raises(InputError, match="ΔD needs"):
            delta_d(*arguments)
    with pytest.raises(InputError, match="ΔD needs"):
        delta_d(frames, frames, [0, 1], batch=0)


# ------------------------------------------------------------------ energies and weights


def test_energy_figures():
    found = energy_figures([5.0, 1.0, 1e9, 3.0, np.inf, 7.0])
    assert found["median"] == 6.0 and found["below_median_mean"] == 3.0 and found["below_median_sd"] == 2.0
    assert found["nonfinite"] == 1
    assert energy_figures([2.0])["below_median_mean"] == 2.0
    lost = energy_figures([1.0, np.nan, np.inf])
    assert lost["median"] == np.inf and lost["below_median_mean"] == 1.0 and lost["nonfinite"] == 2
    with pytest.raises(InputError, match="no energies"):
        energy_figures([])


def test_weight_figures():
    found = weight_figures(np.log([1.0] * 30 + [3.0] * 10), "A", "exact")
    assert found["ess"] == pytest.approx(60**2 / (30 + 90) / 40) and found["max_weight"] == pytest.approx(0.05)
    assert weight_figures([0.0, -np.inf], "B", "rigid")["weight_zero"] == 1


# ------------------------------------------------------------------ superposition and RMSF


def test_superpose_undoes_rigid_motion_and_never_mirrors(dipeptide):
    rng = np.random.default_rng(1)
    frame = dipeptide.positions
    moved = wander(np.repeat(frame[None], 20, 0), rng)
    np.testing.assert_allclose(superpose(moved, frame, range(22)), np.repeat(frame[None], 20, 0), atol=1e-12)
    assert np.abs(superpose(-moved, frame, range(22)) - frame).max() > 0.05
    with pytest.raises(InputError, match="superpose"):
        superpose(moved, frame, [])


@pytest.mark.statistical
def test_rmsf_of_one_shaking_atom(dipeptide):
    """σ along each axis at one atom, nothing elsewhere: √3 σ there, zero elsewhere, whatever stands where."""
    rng, n, sigma = np.random.default_rng(2), 4000, 0.02
    atoms, _ = backbone_atoms(dipeptide.topology)
    side = 10  # CB of ALA, which is not superposed
    frames = np.repeat(dipeptide.positions[None], n, 0)
    frames[:, side] += sigma * rng.normal(size=(n, 3))
    frames = wander(frames, rng)
    found = rmsf(frames, atoms)
    error = sigma * math.sqrt(3) / math.sqrt(6 * n)  # of the root of a mean of 3n squares
    assert abs(found[side] - math.sqrt(3) * sigma) < 5 * error
    assert np.delete(found, side).max() < 1e-10
    rows = residue_rmsf(frames, frames[:, :, ::-1], dipeptide.topology, atoms)
    assert [row["residue"] for row in rows] == ["ACE1", "ALA2", "NME3"]
    heavy = 5  # of ALA: N, CA, CB, C, O
    assert rows[1]["generated"] == pytest.approx(10 * found[side] / math.sqrt(heavy))
    assert rows[1]["data"] == pytest.approx(rows[1]["generated"], rel=1e-6)  # of the mirror images
    assert rows[0]["generated"] < 1e-6


# ------------------------------------------------------------------ distributions of angles


def test_js_divergence():
    assert js_divergence([1, 0], [0, 5]) == pytest.approx(1.0)
    assert js_divergence([2, 1], [4, 2]) == pytest.approx(0.0)
    assert js_divergence([1, 0], [1, 1]) == pytest.approx(0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25)
    with pytest.raises(InputError, match="histograms"):
        js_divergence([0, 0], [1, 1])


@pytest.mark.statistical
def test_distribution_distance_has_its_baseline():
    """Equal distributions: the value is that of finite samples, (K - 1)/(4 n ln 2) bits; shifted ones: far above."""
    rng, n = np.random.default_rng(4), 20_000
    data, same = (rng.uniform(-np.pi, np.pi, (m, 1)) for m in (2 * n, n))
    found = distribution_distance(same, data)
    expected = 35 / (4 * n * math.log(2))
    error = expected * math.sqrt(2 / 35)  # χ² of 35 degrees of freedom
    assert found["frames"] == n
    for key in ("generated", "data", "data_time"):
        assert 0.3 * expected < found[key] < expected + 5 * error, key  # χ²: no sample comes out as low as that
    shifted = np.angle(np.exp(1j * (0.05 * np.pi * np.sin(same) + same)))
    assert distribution_distance(shifted, data)["generated"] > expected + 10 * error
    drift = np.concatenate([data[:n] * 0.5, data[n:]])
    found = distribution_distance(same, drift)
    assert found["data_time"] > 0.2 and found["data"] < expected + 5 * error


def test_ramachandran_distance_of_another_basin(dipeptide):
    rng = np.random.default_rng(5)
    data = dipeptide.positions + rng.normal(0, 0.001, (400, 22, 3))
    (phi,) = dihedral_atoms(dipeptide.topology)["phi"]
    other = turned(dipeptide.topology, dipeptide.positions, phi[1:3], 2.0) + rng.normal(0, 0.001, (200, 22, 3))
    (row,) = ramachandran_distances(other, data, dipeptide.topology)
    assert row["residue"] == "ALA2" and row["generated"] == pytest.approx(1.0) and row["data"] < 0.2
    (row,) = ramachandran_distances(data[:200], data, dipeptide.topology)
    assert row["generated"] < 0.2


def test_chi_distances_of_a_protein(villin):
    topology, frame = villin
    rng = np.random.default_rng(6)
    data = frame + rng.normal(0, 1e-4, (40, *frame.shape))
    rows = chi_distances(data[:20], data, topology)
    atoms = list(topology.atoms())
    names = [row["residue"] for row in rows]
    assert names == sorted(names, key=lambda name: int(name[3:])) and not any("GLY" in n or "ALA" in n for n in names)
    lysine = next(n for n in names if n.startswith("LYS"))
    assert [row["chi"] for row in rows if row["residue"] == lysine] == [1, 2, 3, 4]
    ring = next(r for r in topology.residues() if r.name == "PHE")
    index = {a.name: a.index for a in ring.atoms()}
    flipped = data[:20].copy()
    for a, b in (("CD1", "CD2"), ("CE1", "CE2"), ("HD1", "HD2"), ("HE1", "HE2")):
        flipped[:, [index[a], index[b]]] = flipped[:, [index[b], index[a]]]
    label = f"PHE{ring.index + 1}"
    chi2 = next(r for r in chi_distances(flipped, data, topology) if (r["residue"], r["chi"]) == (label, 2))
    assert chi2["generated"] < 0.1  # the flip of a ring changes nothing
    side = next(r for r in topology.residues() if r.name == "LEU")
    index = {a.name: a.index for a in side.atoms()}
    other = np.stack([turned(topology, x, (index["CA"], index["CB"]), 2.0) for x in data[:20]])
    changed = {(r["residue"], r["chi"]) for r in chi_distances(other, data, topology) if r["generated"] > 0.9}
    assert changed == {(f"LEU{side.index + 1}", 1)}
    assert atoms[index["CB"]].residue is side


def test_half_turns_count_only_between_equal_atoms(proteins):
    """Acids are ASP and GLU for everybody who names them, with or without the proton that tells their oxygens apart."""
    names = ["ACE", "ASP", "ASH", "GLU", "GLH", "PHE", "TYR", "HIP", "ASN", "GLN", "LEU", "NME"]
    topology = proteins.build_topology("amber14-all.xml", names)
    for residue in topology.residues():
        residue.name = {"ASH": "ASP", "GLH": "GLU"}.get(residue.name, residue.name)
    folded = [(t.residue, t.number) for t in chi_torsions(topology) if t.fold]
    assert folded == [("ASP2", 2), ("GLU4", 3), ("PHE6", 2), ("TYR7", 2)]
    frame = proteins.idealised(topology)
    index = {(a.residue.index, a.name): a.index for a in topology.atoms()}
    rng = np.random.default_rng(12)
    for k, end, number, changed in ((1, ("CB", "CG"), 2, 0.0), (2, ("CB", "CG"), 2, 1.0), (4, ("CG", "CD"), 3, 1.0)):
        half = turned(topology, frame, (index[k, end[0]], index[k, end[1]]), np.pi)
        data, other = (x + rng.normal(0, 1e-4, (20, *frame.shape)) for x in (frame, half))
        (row,) = (
            r for r in chi_distances(other, data, topology) if (r["residue"][3:], r["chi"]) == (f"{k + 1}", number)
        )
        assert row["generated"] == pytest.approx(changed, abs=0.3), (k, number)


def test_each_chi_once(proteins):
    """Hydroxyproline's second χ runs along its ring, not to the hydroxyl."""
    names = ["ACE", "HYP", "ILE", "THR", "VAL", "PRO", "ARG", "HYP", "NME"]
    topology = proteins.build_topology("amber14-all.xml", names)
    atoms, found = list(topology.atoms()), chi_torsions(topology)
    rows = [(t.residue, t.number) for t in found]
    assert rows == sorted(set(rows), key=lambda row: (int(row[0][3:]), row[1]))
    assert rows.count(("ARG7", 5)) == 1
    ends = {(t.residue, t.number): atoms[t.atoms[0][3]].name for t in found}
    assert ends["HYP2", 2] == ends["HYP8", 2] == "CD" and ends["HYP2", 1] == "CG" and ends["ILE3", 2] == "CD1"


# ------------------------------------------------------------------ clashes, hands, amides


def test_clashes_are_counted_pair_by_pair(dipeptide):
    frames = np.repeat(dipeptide.positions[None], 4, 0)
    found = geometry_checks.count_clashes(frames, dipeptide.topology)
    assert found == {"heavy": 0, "hydrogen": 0, "heavy_frames": 0, "hydrogen_frames": 0, "frames": 4}
    names = [a.name for a in dipeptide.topology.atoms()]
    first, last = 4, len(names) - 4  # ACE's carbon and NME's: far apart along the chain
    assert names[first] == "C" and names[last] == "C"
    distance = geometry_checks.HEAVY_CLASH
    frames[1, first] = frames[1, last] + [0.0, 0.0, 0.99 * distance]
    frames[2, first] = frames[2, last] + [0.0, 0.0, 0.05]
    pairs = {k: pair_distances(frames, [first, last])[k, 0] for k in (1, 2)}
    assert pairs[1] == pytest.approx(0.99 * distance) and pairs[2] == pytest.approx(0.05)
    found = geometry_checks.count_clashes(frames, dipeptide.topology)
    assert found["heavy_frames"] == 0.5
    # by hand: every pair of heavy atoms at least four bonds apart
    graph = MoleculeGraph(dipeptide.topology)
    count = np.zeros(2)
    for a in range(22):
        for b in range(a):
            if graph.distances(a)[b] >= 4:
                heavy = not graph.is_hydrogen(a) and not graph.is_hydrogen(b)
                limit = geometry_checks.HEAVY_CLASH if heavy else geometry_checks.HYDROGEN_CLASH
                count[0 if heavy else 1] += (np.linalg.norm(frames[:, a] - frames[:, b], axis=-1) < limit).sum()
    assert (found["heavy"], found["hydrogen"]) == tuple(count / 4) and count.min() > 0
    with pytest.raises(InputError, match="22, 3"):
        geometry_checks.count_clashes(frames[:, :5], dipeptide.topology)


def test_a_mirrored_frame_has_the_wrong_hand(dipeptide):
    data = np.repeat(dipeptide.positions[None], 10, 0)
    found = geometry_checks.chirality(data, data, dipeptide.topology)
    assert [(c["residue"], c["atom"], c["rule"]) for c in found["centres"]] == [("ALA2", "CA", "L")]
    assert found["generated"] == found["data"] == 0.0
    some = data.copy()
    some[:3] *= -1.0
    found = geometry_checks.chirality(some, data, dipeptide.topology)
    assert found["generated"] == pytest.approx(0.3) and found["data"] == 0.0
    assert geometry_checks.chirality(data, -data, dipeptide.topology)["data"] == 1.0  # L, whatever the data say


def test_stereocentres_of_a_protein(villin):
    topology, frame = villin
    found = geometry_checks.chirality(frame[None], frame[None], topology)
    expected = {(f"{r.name}{r.index + 1}", "CA") for r in topology.residues() if r.name not in ("GLY", "ACE", "NME")}
    expected |= {(f"{r.name}{r.index + 1}", "CB") for r in topology.residues() if r.name in ("THR", "ILE")}
    assert {(c["residue"], c["atom"]) for c in found["centres"]} == expected
    assert found["generated"] == 0.0 and {c["rule"] for c in found["centres"] if c["atom"] == "CA"} == {"L"}
    mirrored = geometry_checks.chirality(-frame[None], frame[None], topology)
    assert all(c["generated"] == 1.0 for c in mirrored["centres"])


def test_cis_amides(dipeptide):
    omega = dihedral_atoms(dipeptide.topology)["omega"]
    data = np.repeat(dipeptide.positions[None], 10, 0)
    assert geometry_checks.cis_amides(data, data, dipeptide.topology)["generated"] == 0.0
    data[0] = turned(dipeptide.topology, dipeptide.positions, omega[1][1:3], np.pi)
    assert abs(torsion(data[:1], omega[1])[0]) < 0.5
    found = geometry_checks.cis_amides(data, data[1:], dipeptide.topology)
    assert found["generated"] == pytest.approx(0.1) and found["data"] == 0.0
    assert [b["generated"] for b in found["bonds"]] == pytest.approx([0.0, 0.1])
    assert [b["residue"] for b in found["bonds"]] == ["ALA2", "NME3"]


# ------------------------------------------------------------------ novelty and embedding


def test_nearest_rmsd(dipeptide):
    rng = np.random.default_rng(8)
    known = dipeptide.positions + rng.normal(0, 0.02, (30, 22, 3))
    atoms = heavy_atoms(dipeptide.topology)
    assert len(atoms) == 10
    ours = np.concatenate([wander(known[7:8], rng), dipeptide.positions[None] + rng.normal(0, 0.02, (2, 22, 3))])
    found = nearest_rmsd(ours, known, atoms)
    brute = [
        min(10 * np.sqrt(((superpose(x[None], y, atoms)[0] - y)[atoms] ** 2).sum(-1).mean()) for y in known)
        for x in ours
    ]
    np.testing.assert_allclose(found, brute, atol=2e-3)
    assert found[0] < 0.01 < 0.1 < found[1]
    with pytest.raises(InputError, match="no known frame"):
        nearest_rmsd(ours, known[:0], atoms)


def test_minimisation_tells_sound_frames_from_broken_ones(dipeptide):
    reference = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), reference)
    rng = np.random.default_rng(9)
    sound = dipeptide.positions + rng.normal(0, 0.002, (22, 3))
    nan = np.full((22, 3), np.nan)
    clash = dipeptide.positions.copy()
    clash[4] = clash[18] + 0.02
    atoms = heavy_atoms(dipeptide.topology)
    rows = minimise(context, [sound, nan, clash], atoms)
    assert rows[0]["after"] < rows[0]["before"] and rows[0]["rmsd"] < 0.5
    assert all(math.isnan(v) for v in rows[1].values())
    assert rows[2]["before"] > rows[0]["before"] + 100 and not rows[2]["rmsd"] < 0.5


def test_embedding_by_principal_components():
    """Two independent directions of known spread: the first axis is the wider, and both sets share the axes."""
    rng = np.random.default_rng(10)
    spacing = rng.normal(0, [0.05, 0.01], (500, 2)) + 0.4
    data = np.zeros((500, 3, 3))
    data[:, 1, 0], data[:, 2, 1] = spacing.T  # atom 0 in the corner, the others on two axes
    shifted = data.copy()
    shifted[:, 1, 0] += 0.2
    found = embed(shifted, data, [0, 1, 2], method="pca")
    assert found["method"] == "pca" and found["explained"] == pytest.approx(1.0, abs=0.01)
    np.testing.assert_allclose(found["data"].mean(0), 0.0, atol=1e-9)
    assert found["data"][:, 0].std() > 3 * found["data"][:, 1].std()
    assert abs(np.corrcoef(found["data"][:, 0], spacing[:, 0])[0, 1]) > 0.95
    assert abs(found["generated"][:, 0].mean()) > 2.0  # Å
    with pytest.raises(InputError, match="three data frames"):
        embed(data, data[:2], [0, 1, 2])


def test_embedding_by_umap_where_it_is(monkeypatch):
    """How UMAP is called; the package itself is an extra."""

    class Fake:
        def __init__(self, **options):
            self.options = options

        def fit(self, x):
            self.embedding_ = x[:, :2] + self.options["random_state"]
            return self

        def transform(self, x):
            return -x[:, :2]

    frames = line(np.linspace(0.1, 0.2, 9))
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Fake))
    found = embed(frames[:4], frames, [0, 1, 2], seed=3)
    assert found["method"] == "umap"
    np.testing.assert_allclose(found["generated"][:, 0], -np.linspace(1, 2, 9)[:4])
    np.testing.assert_allclose(found["data"][:, 0], np.linspace(1, 2, 9) + 3)
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    assert embed(frames[:4], frames, [0, 1, 2])["method"] == "pca"
    with pytest.raises(InputError, match="not installed"):
        embed(frames[:4], frames, [0, 1, 2], method="umap")
