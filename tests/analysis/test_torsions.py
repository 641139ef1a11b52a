"""Backbone torsions: which atoms, which sign, which free energy."""

import mdtraj
import numpy as np
import pytest
import torch  # noqa: F401  (first: OpenMM's torch plugin, which other tests may use, loads only then)

from openmm_bg.analysis import dihedral_atoms, is_trans, phi_basin, ramachandran_free_energy, torsion
from openmm_bg.analysis.torsions import torsion_free_energy
from openmm_bg.errors import InputError

from openmm import app  # isort: skip


@pytest.fixture(scope="module")
def dipeptide():
    from openmmtools.testsystems import AlanineDipeptideVacuum

    test = AlanineDipeptideVacuum()
    return test.topology, np.asarray(test.positions._value)


#: Residue -> (backbone and first side-chain atoms, bonds among them); enough for proline's ring and serine's OH.
RESIDUES = {
    "GLY": (["N", "CA", "C", "O"], []),
    "SER": (["N", "CA", "C", "O", "CB", "OG", "HG"], [("CA", "CB"), ("CB", "OG"), ("OG", "HG")]),
    "ASP": (
        ["N", "CA", "C", "O", "CB", "CG", "OD1", "OD2"],
        [("CA", "CB"), ("CB", "CG"), ("CG", "OD1"), ("CG", "OD2")],
    ),
    "PRO": (["N", "CD", "CG", "CB", "CA", "C", "O"], [("N", "CD"), ("CD", "CG"), ("CG", "CB"), ("CB", "CA")]),
}


def peptide(names, rename=None):
    """A chain without caps; `rename` gives other names to atoms, for names must not matter."""
    topology = app.Topology()
    chain, last = topology.addChain(), None
    for name in names:
        residue = topology.addResidue(name, chain)
        labels, bonds = RESIDUES[name]
        atoms = {
            label: topology.addAtom((rename or {}).get(label, label), app.Element.getBySymbol(label[0]), residue)
            for label in labels
        }
        for a, b in [("N", "CA"), ("CA", "C"), ("C", "O"), *bonds]:
            topology.addBond(atoms[a], atoms[b])
        if last is not None:
            topology.addBond(last, atoms["N"])
        last = atoms["C"]
    oxt = topology.addAtom("OXT", app.element.oxygen, residue)
    topology.addBond(last, oxt)
    return topology


def test_alanine_dipeptide_with_its_caps(dipeptide):
    assert dihedral_atoms(dipeptide[0]) == {
        "phi": [(4, 6, 8, 14)],
        "psi": [(6, 8, 14, 16)],
        "omega": [(1, 4, 6, 8), (8, 14, 16, 18)],
    }


@pytest.mark.parametrize("rename", [None, {"CA": "C2", "N": "N7", "C": "C99"}])
def test_chain_with_proline_serine_and_aspartate(rename):
    topology = peptide(["GLY", "PRO", "SER", "ASP", "GLY"], rename)
    expected = peptide(["GLY", "PRO", "SER", "ASP", "GLY"])
    at = {(a.residue.index, a.name): a.index for a in expected.atoms()}
    found = dihedral_atoms(topology)
    n = 5
    assert found["phi"] == [
        (at[i - 1, "C"], at[i, "N"], at[i, "CA"], at[i, "C"]) for i in range(1, n)
    ]  # the last residue has a φ, the first has none
    assert found["psi"] == [(at[i, "N"], at[i, "CA"], at[i, "C"], at[i + 1, "N"]) for i in range(n - 1)]
    assert found["omega"] == [(at[i, "CA"], at[i, "C"], at[i + 1, "N"], at[i + 1, "CA"]) for i in range(n - 1)]


def test_topology_without_bonds_is_refused(dipeptide):
    bare = app.Topology()
    residue = bare.addResidue("X", bare.addChain())
    bare.addAtom("A", app.element.carbon, residue)
    bare.addAtom("B", app.element.carbon, residue)
    with pytest.raises(InputError, match="no bonds"):
        dihedral_atoms(bare)


def test_sign_and_size_agree_with_mdtraj(dipeptide):
    topology, positions = dipeptide
    rng = np.random.default_rng(3)
    frames = positions + rng.normal(0, 0.03, (50, *positions.shape))
    trajectory = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(topology))
    for quadruples in dihedral_atoms(topology).values():
        for atoms in quadruples:
            reference = mdtraj.compute_dihedrals(trajectory, [atoms], periodic=False)[:, 0]
            difference = torsion(frames, atoms) - reference
            np.testing.assert_allclose(np.cos(difference), 1.0, atol=1e-6)
            np.testing.assert_allclose(np.sin(difference), 0.0, atol=1e-4)  # mdtraj works in float32


def test_trans_and_cis(dipeptide):
    topology, positions = dipeptide
    omega = dihedral_atoms(topology)["omega"]
    frames = np.stack([positions, positions, positions])
    a, b = positions[14], positions[16]  # turn NME by 180° about its amide bond
    axis = (b - a) / np.linalg.norm(b - a)
    moved = frames[1, 17:] - a
    frames[1, 17:] = a + 2 * (moved @ axis)[:, None] * axis - moved
    frames[2, 0:20] = np.nan
    assert is_trans(frames, omega).tolist() == [True, False, False]
    assert is_trans(frames, []).tolist() == [True, True, True]


def test_bad_positions_and_atoms_are_refused():
    with pytest.raises(InputError, match="shape"):
        torsion(np.zeros((4, 3)), (0, 1, 2, 3))
    with pytest.raises(InputError, match="four atoms among 0 to 3"):
        torsion(np.zeros((1, 4, 3)), (0, 1, 2, 4))


def test_basin_is_open_and_leaves_nan_out():
    assert phi_basin([-0.1, 0.0, 0.1, 1.9, 2.0, np.nan]).tolist() == [False, False, True, True, False, False]


def test_ramachandran_map_of_known_weights():
    quarter = np.pi / 2  # 2 x 2 bins: three occupied with weights 1, 1 + 1, e⁻³, one empty but for weight zero
    phi = np.array([-quarter, -quarter, -quarter, quarter, quarter, np.nan])
    psi = np.array([-quarter, quarter, quarter, -quarter, quarter, 0.0])
    surface = ramachandran_free_energy(phi, psi, [7.0, 7.0, 7.0, 4.0, -np.inf, 7.0], bins=2)
    np.testing.assert_allclose(surface, [[np.log(2), 0.0], [3 + np.log(2), np.nan]], atol=1e-12)
    assert np.isnan(ramachandran_free_energy([], [], [], bins=3)).all()
    assert np.isnan(ramachandran_free_energy([0.1], [0.1], [-np.inf], bins=3)).all()
    with pytest.raises(InputError, match="NaN"):
        ramachandran_free_energy([0.1], [0.1], [np.nan])
    with pytest.raises(InputError, match="equally long"):
        ramachandran_free_energy([0.1], [0.1, 0.2])


def profile_z(n, seed, bias=0.0):
    """Deviation from the exact profile in standard errors: uniform samples reweighted to a von Mises density."""
    kappa = 2.0
    phi = np.random.default_rng(seed).uniform(-np.pi, np.pi, n)
    centres, profile, error = torsion_free_energy(phi, (1 + bias) * kappa * np.cos(phi), bins=24)
    fine = np.linspace(-np.pi, np.pi, 24 * 200 + 1)
    middle = 0.5 * (fine[1:] + fine[:-1])
    mass = np.exp(kappa * np.cos(middle)).reshape(24, 200).mean(1) / (2 * np.pi * np.i0(kappa))
    np.testing.assert_allclose(centres, middle.reshape(24, 200).mean(1))
    return (profile + np.log(mass)) / error


@pytest.mark.statistical
def test_profile_and_its_jackknife_error():
    z = np.concatenate([profile_z(20_000, seed) for seed in range(40)])
    # 20 blocks make z a t of 19 degrees of freedom: variance 19/17. Of 960 values, neighbours in a run being nearly
    # independent, the mean square has a standard error of about sqrt(2.5 / 960) = 0.05; four of those are allowed.
    assert abs(np.mean(z**2) - 19 / 17) < 0.2
    assert np.abs(z).max() < 6.0


@pytest.mark.statistical
def test_wrong_weights_show_in_the_profile():
    z = np.concatenate([profile_z(20_000, seed, bias=0.05) for seed in range(40)])
    assert np.mean(z**2) - 19 / 17 > 0.4


def test_profile_without_and_with_single_blocks():
    phi = np.concatenate([np.full(95, -1.0), np.full(5, 1.0)])  # the second bin is seen in the last block only
    _, profile, error = torsion_free_energy(phi, bins=2, n_blocks=20)
    width = np.pi
    np.testing.assert_allclose(profile, [-np.log(0.95 / width), -np.log(0.05 / width)])
    assert np.isfinite(error[0]) and np.isnan(error[1])
    assert np.isnan(torsion_free_energy([np.nan, np.nan])[1]).all()
    with pytest.raises(InputError, match="two blocks"):
        torsion_free_energy(phi, n_blocks=1)
