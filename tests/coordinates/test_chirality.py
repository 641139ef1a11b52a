"""What frames must have of chirality before a flow is trained on them."""

import logging

import numpy as np
import pytest
from openmm import app

from openmm_bg.coordinates import CoordinateMap
from openmm_bg.coordinates.chirality import MIXED, check_hands, hand, is_amino, stereocentres
from openmm_bg.errors import InputError

MIRROR = np.array([1.0, 1.0, -1.0])


@pytest.fixture(scope="module")
def peptide(proteins) -> tuple[app.Topology, np.ndarray]:
    """NALA-GLY-THR-CVAL, [100, N, 3] nm about one L geometry."""
    topology = proteins.build_topology("amber14-all.xml", ["NALA", "GLY", "THR", "CVAL"])
    x = proteins.idealised(topology)
    return topology, x + np.random.default_rng(0).normal(scale=0.002, size=(100, *x.shape))


def said(caplog, positions, topology) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_hands(positions, topology)
    return caplog.text


def test_frames_of_an_l_peptide_pass_in_silence(peptide, caplog):
    topology, x = peptide
    assert said(caplog, x, topology) == ""


def test_a_mirrored_trajectory_is_noticed(peptide, caplog):
    topology, x = peptide
    text = said(caplog, x * MIRROR, topology)
    assert "All 3 amino acids with a side chain are D" in text and "ALA 1" in text and "mirror image" in text


def test_one_d_amino_acid_is_noticed(peptide, caplog):
    """H and CB of threonine's CA change places."""
    topology, x = peptide
    atoms = list(topology.atoms())
    x = x.copy()
    named = {a.name: a.index for a in atoms if a.residue.name == "THR"}
    side = [i for name, i in named.items() if name not in ("N", "H", "CA", "HA", "C", "O")]
    # The side chain through the plane of N, CA and C: its own hand changes too, that of the others does not.
    origin = x[:, named["CA"], None]
    normal = np.cross(x[:, named["N"]] - origin[:, 0], x[:, named["C"]] - origin[:, 0])[:, None]
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    moved = [*side, named["HA"]]
    x[:, moved] -= 2 * ((x[:, moved] - origin) * normal).sum(-1, keepdims=True) * normal
    assert "In the frames THR 3 has the chirality of D amino acids" in said(caplog, x, topology)


def test_two_stereoisomers_are_refused(peptide):
    """The coordinates are to keep one; a fit to halves of two has its sectors between them, and no frame outside."""
    topology, x = peptide
    mixed = np.where(np.arange(100)[:, None, None] % 2 == 0, x, x * MIRROR)
    with pytest.raises(InputError, match=r"50% of the frames have another chirality at CA of ALA 1") as caught:
        check_hands(mixed, topology)
    assert "\n" not in str(caught.value) and "one stereoisomer" in str(caught.value)
    assert CoordinateMap.fit(topology, mixed).statistics.n_outside == 0  # why it is not left to the fit


def test_a_few_inverted_frames_are_left_to_the_fit(peptide, caplog):
    """Hot MD brings some; `CoordinateMap.fit` leaves them out and says so."""
    topology, x = peptide
    x = x.copy()
    x[: int(100 * MIXED) - 1] *= MIRROR
    assert said(caplog, x, topology) == ""
    assert CoordinateMap.fit(topology, x).statistics.n_outside == int(100 * MIXED) - 1
    x[: int(100 * MIXED)] = peptide[1][: int(100 * MIXED)] * MIRROR
    with pytest.raises(InputError, match="5% of the frames"):
        check_hands(x, topology)


def test_hands_of_all_centres(peptide):
    topology, x = peptide
    atoms = list(topology.atoms())
    found = stereocentres(topology)
    assert {f"{atoms[c].residue.name}-{atoms[c].name}" for c, _ in found} == {"ALA-CA", "THR-CA", "THR-CB", "VAL-CA"}
    for centre, three in found:
        assert (hand(x, centre, three) != hand(x * MIRROR, centre, three)).all()
        if is_amino(atoms, centre, three):
            assert hand(x, centre, three).all()
