"""The fit of g(s|y): it finds the conditional density that made the data, for a molecule in every labelling."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_bg.coordinates import Constraints, CoordinateMap
from openmm_bg.errors import InputError
from openmm_bg.flow import FeatureLayout
from openmm_bg.flow.completion import Completion, CompletionLayout
from openmm_bg.training import Dataset
from openmm_bg.training.completion import FitOptions, describe, fit, fit_completion, free_columns, relabel

QUICK = FitOptions(batch_size=256, least_steps=300, most_steps=300, hidden=16)
GIVEN = FeatureLayout([True, False], [True] * 2, [1, 1], [0.0, 0.0], [0.0, 1.0], [1.0, 0.2])


def made(n=20_000, seed=0):
    """y, s and the entropy of s given y: a broad angle, and a length and an angle tied to each other."""
    rng = np.random.default_rng(seed)
    phi, theta = rng.uniform(-np.pi, np.pi, n), 1.0 + 0.2 * rng.standard_normal(n)
    kappa = 2.0
    turn = rng.vonmises(0.0, kappa, n) + phi  # its mean follows φ: broad over all frames
    noise = rng.standard_normal((2, n))
    length = 0.15 + 0.01 * np.cos(phi) + 0.003 * noise[0]
    angle = 1.9 + 0.1 * (theta - 1.0) + 3.0 * (length - 0.15) + 0.05 * noise[1]
    mean = np.i0(kappa)
    resultant = rng.vonmises(0.0, kappa, 400_000)
    entropy = math.log(2 * math.pi * mean) - kappa * np.cos(resultant).mean()
    entropy += math.log(0.003 * 0.05) + math.log(2 * math.pi * math.e)
    y = torch.from_numpy(np.stack([phi, theta], 1))
    s = torch.from_numpy(np.stack([length, np.remainder(turn + np.pi, 2 * np.pi) - np.pi, angle], 1))
    return y, s, entropy


@pytest.mark.statistical
def test_fit_reaches_the_entropy_of_the_data():
    """No density can have a lower NLL than the conditional entropy; the family contains the truth."""
    y, s, entropy = made()
    layout = describe(s, [False, True, False])
    assert layout.circular == [False, True, False] and layout.shift[1] == 0.0 and layout.scale[1] == 1.0
    completion = Completion(GIVEN, layout, hidden=32)
    held = made(4000, seed=1)
    options = FitOptions(batch_size=256, least_steps=800, most_steps=800, hidden=32)
    record = fit(completion, y, s, None, (held[0], held[1], None), options=options)
    with torch.no_grad():
        log_g = completion.log_prob(held[1], held[0])
    error = float(log_g.std()) / math.sqrt(len(log_g))
    print("NLL", record["validation_nll"], "entropy", entropy, "error", error)
    assert -4.0 * error < record["validation_nll"] - entropy < 4.0 * error + 0.05
    assert not completion.training
    blind = Completion(GIVEN, layout, hidden=32)  # what does not know y is far from it
    assert fit(blind, y[torch.randperm(len(y))], s, options=QUICK)["nll"] > entropy + 1.0


def test_the_fit_is_reproducible_and_leaves_the_generator_alone():
    y, s, _ = made(600)
    layout = describe(s, [False, True, False])
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        completion = Completion(GIVEN, layout, hidden=8)
        before = torch.get_rng_state()
        fit(completion, y, s, generator=torch.Generator().manual_seed(1), options=FitOptions(most_steps=20))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(completion.log_prob(s, y))
    assert torch.equal(*found)


def test_weights_choose_the_frames():
    """Two clouds of lengths; weight on one of them only."""
    rng = np.random.default_rng(0)
    first = np.arange(2000) < 1000
    s = torch.from_numpy(np.where(first, 0.10, 0.20) + 0.001 * rng.standard_normal(2000))[:, None]
    y = torch.from_numpy(rng.uniform(-1, 1, (2000, 2)))
    log_w = torch.from_numpy(np.where(first, -np.inf, 3.0))
    layout = describe(s, [False], log_w)
    assert layout.shift[0] == pytest.approx(0.2, abs=1e-3) and layout.scale[0] == pytest.approx(0.001, rel=0.1)
    completion = Completion(GIVEN, layout, hidden=8)
    record = fit(completion, y, s, log_w, options=QUICK)
    assert record["nll"] == pytest.approx(math.log(0.001) + 0.5 * math.log(2 * math.pi * math.e), abs=0.1)
    with pytest.raises(InputError, match="weight"):
        describe(s, [False], torch.full((2000,), -torch.inf))


def test_narrow_angles_are_gaussian_about_their_circular_mean():
    rng = np.random.default_rng(0)
    around_pi = np.pi + 0.1 * rng.standard_normal(500)
    s = torch.from_numpy(np.stack([np.remainder(around_pi + np.pi, 2 * np.pi) - np.pi, around_pi], 1))
    layout = describe(s, [True, True])
    assert layout.circular == [False, False]
    assert all(abs(math.remainder(c - math.pi, 2 * math.pi)) < 0.03 for c in layout.shift)
    assert layout.scale == pytest.approx([0.1, 0.1], rel=0.1)


# -------------------------------------------------------------------- a molecule


@pytest.fixture(scope="module")
def molecule():
    """Butane of the integration tests: topology, coordinates and frames with one labelling of each methyl group."""
    path = Path(__file__).parents[1] / "integration" / "test_own_molecule.py"
    spec = importlib.util.spec_from_file_location("openmm_bg_test_butane_for_training", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    topology, system, positions = module.butane()
    rng = np.random.default_rng(1)
    frames = positions + rng.normal(0.0, 0.002, (400, *positions.shape))
    bonds = [(j, i) for i, j, _ in (system.getConstraintParameters(k) for k in range(system.getNumConstraints()))]
    constraints = Constraints(bonds, [0.109] * len(bonds), [system.getParticleMass(i)._value for i in range(14)])
    return topology, CoordinateMap.fit(topology, frames, constraints, "reduced"), torch.from_numpy(frames)


def test_what_is_free_is_neither_modelled_nor_constrained(molecule):
    _, coordinates, _ = molecule
    columns = free_columns(coordinates)
    kept = [c for c in coordinates.coordinates if not c.modelled]
    assert len(columns) == 21 and len(kept) == 31
    assert [kept[k].constrained for k in range(31)] == [k not in columns for k in range(31)]


def test_relabelling_permutes_identical_hydrogens_and_nothing_else(molecule):
    _, coordinates, frames = molecule
    y, s = coordinates.to_internal(frames)
    turned, s_turned = relabel(coordinates, y, s, torch.Generator().manual_seed(0))
    x, x_turned = coordinates.to_positions(y, s), coordinates.to_positions(turned, s_turned)
    methyls = [[coordinates.zmatrix.rows[row][0] for row in triple] for triple in coordinates.zmatrix.triple]
    assert methyls
    rest = sorted(set(range(14)) - {atom for atoms in methyls for atom in atoms})
    assert torch.allclose(x[:, rest], x_turned[:, rest], atol=1e-12)
    shifts = set()
    for atoms in methyls:
        for row in range(len(x)):
            distance = torch.cdist(x[row, atoms], x_turned[row, atoms])
            place = distance.argmin(1)
            assert float(distance.min(1).values.max()) < 1e-10 and sorted(place.tolist()) == [0, 1, 2]
            assert (place - place[0]).remainder(3).tolist() == [0, 1, 2]  # cyclic: chirality stays
            shifts.add(int(place[0]))
    assert shifts == {0, 1, 2} and bool(coordinates.in_domain(turned, s_turned).all())


def test_fit_of_a_molecule(molecule):
    topology, coordinates, frames = molecule
    y, s = coordinates.to_internal(frames)
    data = Dataset(y, s)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = FitOptions(least_steps=50, most_steps=50, validate_every=25)
    train, held = data[torch.arange(300)], data[torch.arange(300, 400)]
    completion, record = fit_completion(coordinates, topology, train, held, options=options)
    assert torch.equal(torch.get_rng_state(), before)
    assert completion.n_completed == 21 and record["steps"] == 50 and math.isfinite(record["validation_nll"])
    drawn, log_g = completion.sample(y)
    assert drawn.shape == (400, 21) and bool(torch.isfinite(log_g).all())
    full = s.clone()
    full[:, free_columns(coordinates)] = drawn
    assert bool(coordinates.in_domain(y, full).all())


def test_nothing_to_complete_is_one_sentence(molecule):
    topology, reduced, frames = molecule
    full = CoordinateMap.fit(topology, frames, reduced.constraints, "full")
    y, s = full.to_internal(frames)
    with pytest.raises(InputError, match="nothing to complete"):
        fit_completion(full, topology, Dataset(y, s), None)
    with pytest.raises(InputError, match="as many y as s"):
        fit(Completion(GIVEN, CompletionLayout([False], [False], [0.0], [1.0])), torch.zeros(2, 2), torch.zeros(3, 1))
