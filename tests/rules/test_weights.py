"""Figures and averages of importance weights, on cases with known answers."""

import logging
import math

import numpy as np
import pytest

from openmm_bg import ensemble as ensemble_module
from openmm_bg import weights
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError

INF = math.inf


def test_known_figures():
    assert weights.effective_sample_size(np.zeros(7)) == pytest.approx(1.0)
    assert weights.effective_sample_size([0.0, -INF, -INF, -INF]) == pytest.approx(0.25)
    # weights 1 and 3: (4)² / (2·10)
    assert weights.effective_sample_size(np.log([1.0, 3.0])) == pytest.approx(0.8)
    assert weights.max_weight(np.log([1.0, 3.0])) == pytest.approx(0.75)
    np.testing.assert_allclose(weights.normalized_weights([-INF, *np.log([1.0, 3.0])]), [0, 0.25, 0.75])
    assert weights.log_mean_weight(np.log([1.0, 3.0]))[0] == pytest.approx(np.log(2.0))
    # standard deviation √2, mean 2, n = 2
    assert weights.log_mean_weight(np.log([1.0, 3.0]))[1] == pytest.approx(0.5)


@pytest.mark.parametrize("constant", [-1e5, 0.0, 1e5])
def test_nothing_overflows_and_only_log_z_sees_a_constant(constant):
    log_w = np.random.default_rng(0).normal(size=500)
    shifted = log_w + constant
    assert weights.effective_sample_size(shifted) == pytest.approx(weights.effective_sample_size(log_w))
    assert weights.max_weight(shifted) == pytest.approx(weights.max_weight(log_w))
    assert weights.forward_ess(shifted) == pytest.approx(weights.forward_ess(log_w))
    assert weights.pareto_khat(shifted) == pytest.approx(weights.pareto_khat(log_w), abs=1e-6)
    assert weights.log_mean_weight(shifted)[0] - constant == pytest.approx(weights.log_mean_weight(log_w)[0])


def test_all_weights_zero():
    nothing = np.full(5, -INF)
    assert weights.effective_sample_size(nothing) == 0.0
    assert weights.max_weight(nothing) == 0.0
    assert weights.pareto_khat(nothing) == INF
    for call in (
        lambda: weights.normalized_weights(nothing),
        lambda: weights.expectation(np.ones(5), nothing),
        lambda: weights.log_mean_weight(nothing),
        lambda: weights.resample(nothing, 3, np.random.default_rng(0)),
    ):
        with pytest.raises(InputError, match="All 5 weights are zero"):
            call()


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_infinite_weights_are_mistakes(bad):
    log_w = np.array([0.0, bad])
    for call in (
        lambda: weights.normalized_weights(log_w),
        lambda: weights.effective_sample_size(log_w),
        lambda: weights.max_weight(log_w),
        lambda: weights.pareto_khat(log_w),
        lambda: weights.expectation(np.ones(2), log_w),
        lambda: weights.log_mean_weight(log_w),
        lambda: weights.resample(log_w, 3, np.random.default_rng(0)),
    ):
        with pytest.raises(InputError, match="NaN or \\+inf"):
            call()


@pytest.mark.parametrize("shape", [(), (0,), (2, 2)])
def test_shape_of_log_weights(shape):
    with pytest.raises(InputError, match="one-dimensional"):
        weights.effective_sample_size(np.zeros(shape))


def test_expectation_shapes_and_ignored_values():
    rng = np.random.default_rng(1)
    log_w = rng.normal(size=50)
    values = rng.normal(size=(50, 2, 3))
    mean, error = weights.expectation(values, log_w)
    assert mean.shape == error.shape == (2, 3)
    one, its_error = weights.expectation(values[:, 1, 2], log_w)
    assert isinstance(one, float) and isinstance(its_error, float)
    assert (one, its_error) == pytest.approx((mean[1, 2], error[1, 2]))
    np.testing.assert_allclose(mean, np.average(values, axis=0, weights=np.exp(log_w)))
    # equal weights: the ordinary standard error
    _, error = weights.expectation(values, np.zeros(50))
    np.testing.assert_allclose(error, values.std(axis=0, ddof=1) / np.sqrt(50))
    # values at samples of weight zero are not looked at
    log_w[::2] = -INF
    values[::2] = math.nan
    assert np.all(np.isfinite(weights.expectation(values, log_w)[0]))
    values[1, 0, 0] = math.nan
    with pytest.raises(InputError, match="must be finite"):
        weights.expectation(values, log_w)
    with pytest.raises(InputError, match="one entry per log-weight"):
        weights.expectation(values[:-1], log_w)
    assert weights.expectation([3.0], [0.0]) == (3.0, INF)


def test_khat_threshold():
    assert weights.khat_threshold(100) == pytest.approx(0.5)
    assert weights.khat_threshold(10**9) == pytest.approx(0.7)
    assert weights.khat_threshold(5) < 0
    assert weights.khat_threshold(1) == -INF


@pytest.mark.statistical
@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_khat_of_pareto_weights(k):
    """w = U^-k has a generalized Pareto tail of shape k; the fit's error is (1 + k)/√m for m tail samples."""
    n = 100_000
    log_w = -k * np.log(np.random.default_rng(2).random(n))
    tail = 3 * np.sqrt(n)
    error = (1 + k) / np.sqrt(tail)
    # the fit's prior draws k towards 0.5 with the weight of ten samples
    pull = 10 * (0.5 - k) / (tail + 10)
    khat = weights.pareto_khat(log_w)
    z = (khat - k - pull) / error
    print(f"k {k}: k-hat {khat:.3f}, z = {z:.1f}, n = {n}")
    assert abs(z) < 4
    # companion: the weights' square has twice the shape, and is told apart
    assert abs((weights.pareto_khat(2 * log_w) - k - pull) / error) > 5


def test_khat_where_no_tail_can_be_fitted():
    rng = np.random.default_rng(3)
    assert weights.pareto_khat(np.zeros(1000)) == -INF
    assert weights.pareto_khat(1e-12 * rng.normal(size=1000)) == -INF  # a perfect flow, up to rounding
    assert weights.pareto_khat(rng.normal(size=24)) == INF
    assert np.isfinite(weights.pareto_khat(rng.normal(size=25)))
    few = np.full(1000, -INF)
    few[:80] = rng.normal(size=80)
    assert weights.pareto_khat(few) == INF  # the tail alone would have 94 members
    many = np.full(1000, -INF)
    many[:300] = rng.normal(size=300)
    assert np.isfinite(weights.pareto_khat(many))


def test_forward_ess_by_hand():
    # w = 1 and 3 on MD frames: mean w = 2, mean 1/w = 2/3
    assert weights.forward_ess(np.log([1.0, 3.0])) == pytest.approx(0.75)
    assert weights.forward_ess([0.0, 0.0, INF]) == 0.0
    for bad in (math.nan, -INF):
        with pytest.raises(InputError, match="leave out frames"):
            weights.forward_ess([0.0, bad])


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_systematic_resampling_rounds_expected_counts(n):
    rng = np.random.default_rng(4)
    log_w = rng.normal(size=40)
    log_w[5] = -INF
    share = weights.normalized_weights(log_w)
    index = weights.resample(log_w, n, rng)
    counts = np.bincount(index, minlength=40)
    assert index.shape == (n,) and counts[5] == 0
    assert np.all(np.abs(counts - n * share) < 1 + 1e-9)
    with pytest.raises(InputError, match="at least 1"):
        weights.resample(log_w, 0, rng)


def test_repeats_are_scattered_over_the_resampled_frames():
    log_w = np.zeros(101)
    log_w[7] = np.log(100.0)  # half of everything: 500 copies, which must not come in one block
    heavy = weights.resample(log_w, 1000, np.random.default_rng(0)) == 7
    assert heavy.sum() == 500
    # about 500 changes between neighbours in a random order (standard deviation 16), 1 or 2 in a block
    assert abs(np.count_nonzero(heavy[1:] != heavy[:-1]) - 500) < 5 * 16


@pytest.mark.statistical
def test_resampling_is_unbiased():
    rng = np.random.default_rng(5)
    log_w = rng.normal(size=12)
    share = weights.normalized_weights(log_w)
    draws = 20_000
    counts = np.bincount(np.concatenate([weights.resample(log_w, 1, rng) for _ in range(draws)]), minlength=12)
    z = (counts - draws * share) / np.sqrt(draws * share * (1 - share))
    print(f"largest z {np.abs(z).max():.1f}, n = {draws}")
    assert np.abs(z).max() < 4
    equal = (counts - draws / 12) / np.sqrt(draws / 12)
    assert np.abs(equal).max() > 5


def make(n=300, seed=6, label="exact", n_atoms=4, topology=None):
    rng = np.random.default_rng(seed)
    log_w = 0.3 * rng.normal(size=n)
    log_w[3] = -INF
    u = rng.normal(size=n)
    u[3] = math.nan
    positions = rng.normal(size=(n, n_atoms, 3))
    positions[3] = math.nan
    return Ensemble(positions, u, np.zeros(n), log_w, n_nonfinite=1, label=label, topology=topology)


def test_ensemble_figures_and_averages(monkeypatch):
    ensemble = make()
    assert ensemble.n == len(ensemble) == 300
    assert ensemble.ess == weights.effective_sample_size(ensemble.log_weights)
    assert ensemble.khat == weights.pareto_khat(ensemble.log_weights)
    assert ensemble.max_weight == weights.max_weight(ensemble.log_weights)
    assert ensemble.trustworthy
    text = repr(ensemble)
    for figure in ("exact", "n=300", "ESS=", "k-hat=", "largest share=", "non-finite=1"):
        assert figure in text
    monkeypatch.setattr(ensemble_module, "_CHUNK_BYTES", 7 * 4 * 3 * 8)
    sizes = []

    def first_atom(x):
        sizes.append(len(x))
        assert np.all(np.isfinite(x))  # frames of weight zero are not shown
        return x[:, 0]

    value, error = ensemble.expectation(first_atom)
    assert max(sizes) == 7 and sum(sizes) == 299
    expected = weights.expectation(ensemble.positions[:, 0], ensemble.log_weights)
    np.testing.assert_allclose(value, expected[0])
    np.testing.assert_allclose(error, expected[1])
    value, _ = ensemble.expectation(lambda x: x[:, 0, 0])
    assert value == pytest.approx(expected[0][0])
    for wrong in (lambda x: x.mean(), lambda x: x[:-1, 0, 0]):
        with pytest.raises(InputError, match="one entry per frame"):
            ensemble.expectation(wrong)


def test_ensemble_warns_once_when_error_bars_cannot_be_trusted(caplog):
    ensemble = make()
    ensemble.log_weights = 10 * ensemble.log_weights
    with caplog.at_level(logging.WARNING, logger="openmm_bg.ensemble"):
        ensemble.expectation(lambda x: x[:, 0, 0])
        ensemble.expectation(lambda x: x[:, 0, 1])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be trusted" in caplog.text and "k-hat" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="openmm_bg.ensemble"):
        make().expectation(lambda x: x[:, 0, 0])
    assert not caplog.records


def test_ensemble_resample_save_load(tmp_path):
    ensemble = make(label="rigid")
    drawn = ensemble.resample(50, seed=3)
    assert drawn.shape == (50, 4, 3) and np.all(np.isfinite(drawn))
    np.testing.assert_array_equal(drawn, ensemble.resample(50, seed=3))
    path = tmp_path / "out.npz"
    ensemble.save(path)
    assert [item.name for item in tmp_path.iterdir()] == ["out.npz"]
    again = Ensemble.load(path)
    for name in ("positions", "reduced_potentials", "log_q", "log_weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(ensemble, name))
    assert (again.label, again.n_nonfinite) == ("rigid", 1)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"out\.npz is not an ensemble"):
        Ensemble.load(path)
    with pytest.raises(InputError, match=r"missing\.npz is not an ensemble"):
        Ensemble.load(tmp_path / "missing.npz")


def test_ensemble_and_topology():
    from openmm import app

    topology = app.Topology()
    residue = topology.addResidue("XXX", topology.addChain())
    for k in range(4):
        topology.addAtom(f"C{k}", app.element.carbon, residue)
    ensemble = make(topology=topology)
    trajectory = ensemble.to_mdtraj()
    assert trajectory.n_atoms == 4 and trajectory.n_frames == 300
    np.testing.assert_allclose(trajectory.xyz[0], ensemble.positions[0], rtol=1e-6)
    with pytest.raises(InputError, match=r"set ensemble\.topology"):
        make().to_mdtraj()
    with pytest.raises(InputError, match="4 atoms and the positions have 5"):
        make(n_atoms=5, topology=topology)


def test_ensemble_refuses_inconsistent_arrays():
    good = {
        "positions": np.zeros((2, 3, 3)),
        "reduced_potentials": np.zeros(2),
        "log_q": np.zeros(2),
        "log_weights": np.zeros(2),
    }
    Ensemble(**good)
    for name, bad, message in (
        ("positions", np.zeros((2, 3)), "positions must have shape"),
        ("reduced_potentials", np.zeros(3), "reduced_potentials must have shape"),
        ("log_q", np.array([0.0, math.nan]), "log_q must be finite"),
        ("reduced_potentials", np.array([0.0, INF]), "reduced_potentials must be finite"),
        ("log_weights", np.array([0.0, math.nan]), "NaN or \\+inf"),
    ):
        with pytest.raises(InputError, match=message):
            Ensemble(**{**good, name: bad})


def test_khat_of_a_tail_wider_than_double_precision_is_infinite():
    log_w = np.random.default_rng(0).standard_cauchy(20_000)
    assert weights.effective_sample_size(log_w) < 1e-3
    assert weights.pareto_khat(log_w) == np.inf
