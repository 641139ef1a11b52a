"""Free energies: by hand, beside pymbar, and every mistake a user can make."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from openmm_bg import free_energy, weights
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.free_energy.estimates import describe_khat

INF = math.inf


def gaussian_works(n=2_000, m=1_500, sigma=1.0, log_z=0.7, seed=0):
    """log w of both sides for a Gaussian log-weight: N(log Z - σ²/2, σ²) under q and N(log Z + σ²/2, σ²) under p."""
    rng = np.random.default_rng(seed)
    return (
        log_z - sigma**2 / 2 + sigma * rng.normal(size=n),
        log_z + sigma**2 / 2 + sigma * rng.normal(size=m),
    )


def ensemble(log_w, label="exact", seed=0, u=None):
    n = len(log_w)
    u = np.zeros(n) if u is None else u
    return Ensemble(np.zeros((n, 1, 3)), u, np.random.default_rng(seed).normal(size=n), log_w, label=label)


def test_one_sided_by_hand(caplog):
    result = free_energy.one_sided(np.log([1.0, 3.0]))
    assert result.delta_f == pytest.approx(-np.log(2.0))
    assert result.error == pytest.approx(0.5)
    assert result.bias == pytest.approx(0.125)  # Var 2, mean 2, n = 2
    assert "cannot be trusted" in caplog.text
    assert not result.trustworthy and result.effective == pytest.approx(1.6)
    caplog.clear()
    good = free_energy.one_sided(gaussian_works(sigma=0.3)[0])
    assert good.trustworthy and good.khat < 0.7 and good.effective > 1_000
    assert not caplog.records


def test_one_sided_warns_of_too_few_samples_in_effect(caplog):
    """k-hat has nothing against equal weights, however few they are."""
    few = free_energy.one_sided([0.0] * 49)
    assert few.khat == -INF and not few.trustworthy
    assert "worth 49.0 samples, fewer than 50" in caplog.text
    caplog.clear()
    assert free_energy.one_sided([0.0] * 60).trustworthy and not caplog.records


def test_bar_agrees_with_pymbar():
    import pymbar

    flow, md = gaussian_works()
    result = free_energy.bar(flow, md)
    reference = pymbar.bar(-flow, md, uncertainty_method="MBAR")
    assert result.delta_f == pytest.approx(reference["Delta_f"], abs=1e-8)
    assert result.error == pytest.approx(reference["dDelta_f"], rel=1e-6)
    assert result.overlap == pytest.approx(pymbar.bar_overlap(-flow, md), rel=1e-6)
    solver = pymbar.MBAR(np.stack([np.zeros(3_500), np.concatenate([-flow, -md])]), [2_000, 1_500])
    assert result.overlap_matrix == pytest.approx(solver.compute_overlap()["matrix"], abs=1e-6)
    assert (result.method, result.n_outside) == ("BAR", 0)


@pytest.mark.parametrize("log_z", [-3e5, 0.0, 3e5])
def test_bar_does_not_mind_the_constant(log_z):
    result = free_energy.bar(*gaussian_works(log_z=log_z))
    assert result.delta_f == pytest.approx(free_energy.bar(*gaussian_works(log_z=0.0)).delta_f - log_z, abs=1e-6)


def test_bar_survives_clashes_and_zero_weights():
    """One steric clash gives a work of 1e6 kT, on which pymbar's own uncertainty breaks down."""
    flow, md = gaussian_works()
    plain = free_energy.bar(flow, md)
    clash = flow.copy()
    clash[:3] = [-1e6, -900.0, -INF]
    with np.errstate(all="raise", under="ignore"):
        result = free_energy.bar(clash, md)
    assert result.delta_f == pytest.approx(plain.delta_f, abs=0.01)
    assert result.error == pytest.approx(plain.error, rel=0.05)


def test_bar_leaves_numpys_error_state_alone():
    before = np.geterr()
    free_energy.bar(*gaussian_works())
    assert np.geterr() == before


def test_bar_counts_frames_outside(caplog):
    flow, md = gaussian_works()
    result = free_energy.bar(flow, np.concatenate([md, [INF] * 5]))
    assert result.n_outside == 5
    assert result.delta_f == pytest.approx(free_energy.bar(flow, md).delta_f)
    assert "5 of 1505 MD frames" in caplog.text


def test_bar_warns_of_poor_overlap(caplog):
    good = free_energy.bar(*gaussian_works(sigma=1.0))
    assert good.overlap > 0.5 and not caplog.records
    poor = free_energy.bar(*gaussian_works(sigma=5.0))
    assert poor.overlap < free_energy.MIN_OVERLAP and "Overlap" in caplog.text
    assert good.trustworthy and not poor.trustworthy
    caplog.clear()
    assert not free_energy.bar(*gaussian_works(m=49)).trustworthy and "49 MD frames" in caplog.text
    assert free_energy.bar(*gaussian_works(m=50)).trustworthy
    same = np.zeros(100)
    assert free_energy.bar(same, same).overlap == pytest.approx(1.0)
    assert free_energy.bar(same, same).error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("flow", "md", "message"),
    [
        ([0.0, math.nan], [0.0], "log_w_flow"),
        ([0.0, INF], [0.0], "log_w_flow"),
        ([-INF, -INF], [0.0], "log_w_flow"),
        ([], [0.0], "log_w_flow"),
        ([0.0], [math.nan], "log_w_md"),
        ([0.0], [-INF], "log_w_md"),
        ([0.0], [INF, INF], "No MD frame"),
        ([[0.0]], [0.0], "one-dimensional"),
    ],
)
def test_bar_refuses(flow, md, message):
    with pytest.raises(InputError, match=message):
        free_energy.bar(flow, md)


def test_bar_warns_where_frames_and_samples_contradict_each_other(caplog):
    """Overlap sees nothing wrong with frames of another System, temperature or with swapped arguments."""
    flow, md = gaussian_works()
    assert free_energy.bar(flow, md).trustworthy and not caplog.records
    wrong = {"up": (flow, md + 1.0), "down": (flow, md - 1.0), "swapped": (md, flow)}
    rng = np.random.default_rng(7)
    wide, hot = 1.5 * rng.normal(size=(2_000, 4)), np.sqrt(4 / 3) * rng.normal(size=(1_500, 4))
    # a flow of variance 2.25 for harmonic wells at 300 K, frames of 400 K
    wrong["hotter"] = tuple(-0.5 * (1 - 1 / 2.25) * np.square(x).sum(axis=1) for x in (wide, hot))
    for name, sets in wrong.items():
        caplog.clear()
        result = free_energy.bar(*sets)
        assert result.overlap > 0.5, name
        assert not result.trustworthy and "contradict each other" in caplog.text, name
    caplog.clear()
    # equal weights but for rounding are no contradiction, equal weights that are 0.1 kT apart are
    assert free_energy.bar(np.zeros(500), np.full(500, 1e-4)).trustworthy and not caplog.records
    assert not free_energy.bar(np.zeros(500), np.full(500, 0.1)).trustworthy


def test_mbar_with_flow_warns_of_the_state_whose_frames_contradict(caplog):
    flow, md = gaussian_works()
    frames = np.stack([md, md])
    good = free_energy.mbar_with_flow(np.stack([flow, flow]), [frames, None])
    assert good.trustworthy and not caplog.records
    found = free_energy.mbar_with_flow(np.stack([flow, flow]), [frames, frames + 1.0])
    assert found.sound.tolist() == [True, True, False] and not found.between(0, 2).trustworthy
    assert "MD frames of state 2 contradict" in caplog.text and "state 1" not in caplog.text


def test_what_k_hat_says(caplog):
    """Few samples have no k-hat to print, and one just above the threshold is not printed as equal to it."""
    free_energy.one_sided(np.arange(5.0))
    free_energy.one_sided(np.arange(24.0))
    assert "5 weights are too few samples for k-hat" in caplog.text
    assert "24 weights are too few" in caplog.text and "inf" not in caplog.text
    assert describe_khat(0.7004, 5_000) == "Pareto k-hat 0.7004 of 5000 weights is not below 0.7000"
    assert describe_khat(0.7, 5_000) == "Pareto k-hat 0.70 of 5000 weights is not below 0.70"
    assert describe_khat(1.23, 5_000) == "Pareto k-hat 1.23 of 5000 weights is not below 0.70"
    caplog.clear()
    free_energy.mbar([[0.0] * 5, list(np.arange(5.0))], [5, 0])
    assert "5 weights are too few" in caplog.text and "-inf" not in caplog.text


def test_wrong_kinds_of_input_are_named():
    sample = ensemble(np.zeros(60))
    for given in (1.0, np.zeros(3), "abc"):
        with pytest.raises(InputError, match="a must be a FreeEnergy"):
            free_energy.difference(given, sample)
        with pytest.raises(InputError, match="b must be a FreeEnergy"):
            free_energy.difference(sample, given)
        with pytest.raises(InputError, match="ensemble must be an Ensemble"):
            free_energy.at_temperature(given, 300, 400)
        with pytest.raises(InputError, match="ensemble must be an Ensemble"):
            free_energy.reweight(given, sample)
        with pytest.raises(InputError, match="sampler must be a BoltzmannGeneratorSampler"):
            free_energy.reweight(sample, given)
    log_w = sample.log_weights
    for call in (
        lambda: free_energy.one_sided(sample),
        lambda: free_energy.bar(sample, log_w),
        lambda: free_energy.bar(log_w, sample),
        lambda: free_energy.common_difference(sample, log_w),
        lambda: free_energy.mbar_with_flow(sample, [None]),
        lambda: free_energy.state_difference(sample, log_w > 1, log_w < 1),
    ):
        with pytest.raises(InputError, match=r"pass ensemble\.log_weights"):
            call()
    with pytest.raises(InputError, match="array of log-weights, not str"):
        free_energy.one_sided("abc")


def test_a_difference_of_common_samples_with_other_masses_is_refused():
    """What their weights hold beside u and log q is log J + Φ: Φ is another one with other masses."""
    rng = np.random.default_rng(6)
    u = 1e6 * rng.random(200)
    a = ensemble(rng.normal(size=200), u=u)
    same = replace(a, log_weights=a.log_weights + 0.25 * u, reduced_potentials=0.75 * u)
    assert free_energy.difference(a, same).method == "common samples"
    other = replace(a, log_weights=a.log_weights + 0.01 * rng.normal(size=200))
    with pytest.raises(InputError, match="different masses, constraints"):
        free_energy.difference(a, other)
    more = Ensemble(np.zeros((200, 2, 3)), u, a.log_q, a.log_weights)
    with pytest.raises(InputError, match="1 and 2 atoms"):
        free_energy.difference(a, more)


def test_difference():
    a = free_energy.FreeEnergy(1.0, 0.3, "BAR", overlap=0.5, n_outside=1)
    b = free_energy.FreeEnergy(3.0, 0.4, "BAR", overlap=0.2, n_outside=2)
    result = free_energy.difference(a, b)
    assert (result.delta_f, result.error) == pytest.approx((2.0, 0.5))
    assert (result.overlap, result.bias, result.n_outside) == (0.2, None, 3)

    low, high = ensemble(np.full(50, 1.0), seed=1), ensemble(np.full(50, 3.0), seed=2)
    result = free_energy.difference(low, high)
    assert (result.method, result.overlap) == ("difference", None)
    assert result.delta_f == pytest.approx(-2.0) and result.bias == pytest.approx(0.0)
    with pytest.raises(InputError, match="of one kind"):
        free_energy.difference(low, ensemble(np.full(50, 3.0), label="rigid"))


def test_a_difference_of_the_same_samples_is_taken_sample_by_sample(caplog):
    """A change that is the same for all samples has no error, however poor the weights that both share."""
    rng = np.random.default_rng(3)
    log_w = rng.normal(size=4_000)
    a = ensemble(log_w)
    b = replace(a, log_weights=log_w + 2.5, reduced_potentials=a.reduced_potentials - 2.5)
    result = free_energy.difference(a, b)
    assert result.method == "common samples"
    assert (result.delta_f, result.error, result.bias) == pytest.approx((-2.5, 0.0, 0.0), abs=1e-12)
    assert result.overlap == pytest.approx(1.0)
    assert result.overlap_matrix == pytest.approx(np.full((2, 2), 0.5))
    independent = free_energy.difference(free_energy.one_sided(log_w), free_energy.one_sided(log_w + 2.5))
    assert independent.error > 0.02
    assert not caplog.records


def test_common_difference_by_hand(caplog):
    result = free_energy.common_difference(np.log([1.0, 3.0]), np.log([2.0, 2.0]))
    assert result.delta_f == pytest.approx(0.0)
    # d = w_b/mean - w_a/mean = (0.5, -0.5); bias (0 - ½)/(2·2), with Var(w_a)/mean² = ½
    assert (result.error, result.bias) == pytest.approx((0.5, -0.125))
    shared = 0.25 * 0.5 / 0.75 + 0.75 * 0.5 / 1.25
    assert result.overlap_matrix == pytest.approx(np.array([[1 - shared, shared], [shared, 1 - shared]]))
    assert result.overlap == pytest.approx(2 * shared)
    assert not result.trustworthy and "cannot be trusted" in caplog.text
    flipped = free_energy.common_difference(np.log([2.0, 2.0]), np.log([1.0, 3.0]))
    assert (flipped.delta_f, flipped.error) == pytest.approx((-result.delta_f, result.error))


def test_overlap_of_common_samples_is_that_of_pymbar():
    """Weights of a wide proposal see the overlap that MBAR finds between samples of the two states themselves."""
    import pymbar

    rng = np.random.default_rng(4)
    n, shift = 40_000, 1.5
    x = 3.0 * rng.standard_normal(n)
    log_q = -0.5 * (x / 3.0) ** 2 - np.log(3.0)
    result = free_energy.common_difference(-0.5 * x**2 - log_q, -0.5 * (x - shift) ** 2 - log_q)
    own = np.concatenate([rng.standard_normal(n), shift + rng.standard_normal(n)])
    solver = pymbar.MBAR(np.stack([0.5 * own**2, 0.5 * (own - shift) ** 2]), [n, n])
    # the error of both is that of a mean of values below ½ over more than 1e4 samples in effect
    assert result.overlap_matrix == pytest.approx(solver.compute_overlap()["matrix"], abs=0.012)
    assert result.overlap == pytest.approx(solver.compute_overlap()["scalar"], abs=0.024)


def test_common_samples_warn_of_states_too_far_apart(caplog):
    rng = np.random.default_rng(5)
    x = 4.0 * rng.standard_normal(50_000)
    log_q = -0.5 * (x / 4.0) ** 2

    def between(shift):
        return free_energy.common_difference(-0.5 * (x + shift) ** 2 - log_q, -0.5 * (x - shift) ** 2 - log_q)

    near = between(1.0)
    assert near.overlap > free_energy.MIN_OVERLAP and near.trustworthy and not caplog.records
    far = between(2.5)
    assert far.khat < 0.5  # weights in both states are fine: only the overlap tells
    assert far.overlap < free_energy.MIN_OVERLAP and not far.trustworthy
    assert "overlap between the two states" in caplog.text


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([0.0], [0.0, 1.0], "every common sample"), ([math.nan], [0.0], "NaN"), ([0.0], [-INF], "zero")],
)
def test_common_difference_refuses(a, b, message):
    with pytest.raises(InputError, match=message):
        free_energy.common_difference(a, b)


def test_another_temperature_needs_no_energies():
    u = np.array([10.0, 20.0, INF])
    a = ensemble(np.array([1.0, 2.0, -INF]), u=u)
    b = free_energy.at_temperature(a, 300.0, 400.0)
    assert b.reduced_potentials[:2] == pytest.approx([7.5, 15.0])
    assert b.log_weights[:2] == pytest.approx([3.5, 7.0]) and b.log_weights[2] == -INF
    assert b.n_nonfinite == 1
    back = free_energy.at_temperature(b, 400.0, 300.0)
    assert back.log_weights == pytest.approx(a.log_weights)
    with pytest.raises(InputError):
        free_energy.at_temperature(a, 300.0, 0.0)


def harmonic(centres, counts, seed=0):
    """Reduced potentials [K, n] of unit Gaussians at these centres, one sample set for each count."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([c + rng.standard_normal(n) for c, n in zip(centres, counts, strict=True)])
    return 0.5 * (x[None, :] - np.asarray(centres)[:, None]) ** 2


def test_mbar_agrees_with_pymbar():
    import pymbar

    centres, counts = [0.0, 1.0, 2.0, 1.5], [400, 300, 500, 0]
    u = harmonic(centres, counts)
    result = free_energy.mbar(u, counts)
    solver = pymbar.MBAR(u, counts)
    reference = solver.compute_free_energy_differences()
    assert result.delta_f == pytest.approx(reference["Delta_f"], abs=1e-6)
    assert result.error == pytest.approx(reference["dDelta_f"], abs=1e-6)
    assert result.overlap_matrix == pytest.approx(solver.compute_overlap()["matrix"], abs=1e-6)
    assert result.effective == pytest.approx(solver.compute_effective_sample_number(), rel=1e-5)
    assert result.trustworthy
    pair = result.between(0, 2)
    assert (pair.delta_f, pair.method) == (pytest.approx(reference["Delta_f"][0, 2]), "MBAR")
    assert pair.overlap_matrix.shape == (2, 2)
    assert result.between(0, 3).overlap is None
    with pytest.raises(InputError, match="no state 4"):
        result.between(0, 4)


def test_mbar_does_not_mind_constants_clashes_and_impossible_states():
    counts = [500, 500]
    u = harmonic([0.0, 1.0], counts)
    plain = free_energy.mbar(u, counts)
    rng = np.random.default_rng(1)
    moved = u + np.array([[3e5], [-2e5]]) + 1e6 * rng.standard_normal(u.shape[1])
    result = free_energy.mbar(moved, counts)
    assert result.delta_f[0, 1] == pytest.approx(plain.delta_f[0, 1] - 5e5, abs=1e-4)
    assert result.error == pytest.approx(plain.error, abs=1e-5)
    clash = u.copy()
    clash[1, :3] = [1e6, 900.0, INF]
    before = np.geterr()
    result = free_energy.mbar(clash, counts)
    assert np.geterr() == before
    assert result.delta_f[0, 1] == pytest.approx(plain.delta_f[0, 1], abs=0.02)
    assert result.error[0, 1] == pytest.approx(plain.error[0, 1], rel=0.1)


def test_mbar_warns_where_a_chain_of_states_is_broken(caplog):
    counts = [500] * 4
    whole = free_energy.mbar(harmonic([0.0, 2.0, 4.0, 6.0], counts), counts)
    # the ends share nothing, but states between them link them
    assert whole.overlap_matrix[0, 3] + whole.overlap_matrix[3, 0] < free_energy.MIN_OVERLAP
    assert whole.trustworthy and whole.between(0, 3).trustworthy and not caplog.records
    broken = free_energy.mbar(harmonic([0.0, 2.0, 8.0, 10.0], counts), counts)
    assert not broken.trustworthy
    assert broken.group.tolist() == [0, 0, 1, 1]
    assert not broken.between(1, 2).trustworthy and broken.between(2, 3).trustworthy
    assert "[0, 1] and [2, 3]" in caplog.text


def test_mbar_warns_of_a_state_that_no_sample_tells_about(caplog):
    counts = [2_000, 0]
    near = free_energy.mbar(harmonic([0.0, 0.5], counts), counts)
    assert near.trustworthy and not caplog.records
    far = free_energy.mbar(harmonic([0.0, 4.0], counts), counts)
    assert far.effective[1] < free_energy.MIN_EFFECTIVE
    assert not far.trustworthy and "more samples: 1 (worth" in caplog.text
    assert not far.between(0, 1).trustworthy


def test_overlap_counts_whatever_the_numbers_of_samples(caplog):
    """One off-diagonal entry of the matrix falls with the other state's number of samples; the sum does not."""
    counts = [20_000, 100]
    uneven = free_energy.mbar(harmonic([0.0, 1.0], counts), counts)
    assert uneven.overlap_matrix[0, 1] < free_energy.MIN_LINK
    assert uneven.trustworthy and not caplog.records
    few = free_energy.mbar(harmonic([0.0, 1.0], [30, 10]), [30, 10])
    assert few.group.tolist() == [0, 0] and not few.trustworthy
    assert "more samples: 0 (worth" in caplog.text


@pytest.mark.parametrize(
    ("u", "counts", "message"),
    [
        ([0.0, 1.0], [2], "reduced potentials"),
        ([[0.0, 1.0]], [1.0], "whole numbers"),
        ([[0.0, 1.0]], [3], "3 samples in all"),
        ([[0.0, math.nan]], [2], "NaN"),
        ([[0.0, INF], [0.0, 0.0]], [2, 0], "no density in the state that drew it"),
        ([[0.0, 0.0], [INF, INF]], [2, 0], "no density at any sample"),
    ],
)
def test_mbar_refuses(u, counts, message):
    with pytest.raises(InputError, match=message):
        free_energy.mbar(u, counts)


def test_mbar_with_flow_is_bar_for_one_state(caplog):
    flow, md = gaussian_works()
    bar = free_energy.bar(flow, md)
    result = free_energy.mbar_with_flow(flow[None], [np.concatenate([md, [INF] * 5])[None]])
    pair = result.between(0, 1)
    assert (pair.delta_f, pair.error) == pytest.approx((bar.delta_f, bar.error), abs=1e-5)
    assert pair.overlap_matrix == pytest.approx(bar.overlap_matrix, abs=1e-5)
    assert pair.overlap == pytest.approx(bar.overlap, abs=1e-5)
    assert pair.n_outside == 5 and "5 of 1505 MD frames" in caplog.text


def test_mbar_with_flow_without_frames_is_the_difference_of_common_samples():
    flow, _ = gaussian_works()
    both = np.stack([flow, flow + 0.3 * np.sin(flow) - 1.0])
    result = free_energy.mbar_with_flow(both, [None, None]).between(1, 2)
    common = free_energy.common_difference(*both)
    assert result.delta_f == pytest.approx(common.delta_f, abs=1e-6)
    assert result.error == pytest.approx(common.error, rel=0.02)


@pytest.mark.parametrize(
    ("flow", "md", "message"),
    [
        ([0.0], [None], "needs log-weights"),
        ([[0.0]], [], "0 sets of frames"),
        ([[INF]], [None], r"NaN and \+inf"),
        ([[0.0]], [[0.0]], "Frames of state 1"),
        ([[0.0]], [[[INF]]], "No MD frame of state 1"),
    ],
)
def test_mbar_with_flow_refuses(flow, md, message):
    with pytest.raises(InputError, match=message):
        free_energy.mbar_with_flow(flow, md)


def test_decorrelated():
    rng = np.random.default_rng(2)
    slow = np.repeat(rng.standard_normal(100), 20)
    fast = rng.standard_normal(2_000)
    g = free_energy.statistical_inefficiency(slow)
    assert g > 10
    kept = free_energy.decorrelated(fast, slow)
    assert abs(len(kept) - 2_000 / g) <= 1
    assert np.all(np.diff(kept) >= np.floor(g)) and kept[0] == 0 and kept[-1] < 2_000
    assert len(free_energy.decorrelated(np.ones(7))) == 7
    for bad in ([], [np.ones(3), np.ones(4)]):
        with pytest.raises(InputError, match="of one length"):
            free_energy.decorrelated(*bad)


def test_state_difference_by_hand():
    log_w = np.log([1.0, 2.0, 3.0, 4.0])
    a = np.array([True, True, False, False])
    delta_f, error = free_energy.state_difference(log_w, a, ~a)
    assert delta_f == pytest.approx(-np.log(7 / 3))
    # independent relative variances of the two sums, n/(n-1) for the sample
    expected = np.sqrt(((1 + 4) / 9 + (9 + 16) / 49) * 4 / 3)
    assert error == pytest.approx(expected)
    back, same = free_energy.state_difference(log_w, ~a, a)
    assert (back, same) == pytest.approx((-delta_f, error))
    everything = np.ones(4, dtype=bool)
    # of the share of one state in the whole: the ratio estimator of `expectation`, on a log scale
    _, error = free_energy.state_difference(log_w, everything, a)
    share, share_error = weights.expectation(a, log_w)
    assert error == pytest.approx(share_error / share)


@pytest.mark.parametrize(
    ("log_w", "a", "b", "message"),
    [
        ([0.0, 0.0], [True, False], [False, False], "in_b"),
        ([0.0, -INF], [True, False], [False, True], "in_b"),
        ([-INF, 0.0], [True, False], [False, True], "in_a"),
        ([0.0, math.nan], [True, False], [False, True], "NaN"),
        ([0.0, 0.0], [True], [False, True], "in_a"),
        ([[0.0]], [[True]], [[True]], "one-dimensional"),
        ([0.0, 0.0], [True, False], [True, False], "the same state"),
        ([0.0] * 3, [True, True, False], [False, True, True], "share 1 samples"),
        ("abc", [True], [False], "array of log-weights, not str"),
    ],
)
def test_state_difference_refuses(log_w, a, b, message):
    with pytest.raises(InputError, match=message):
        free_energy.state_difference(log_w, a, b)


def test_state_difference_warns_of_a_state_with_few_samples(caplog):
    a = np.arange(1_000) < 940
    free_energy.state_difference(np.zeros(1_000), a, ~a)
    assert not caplog.records
    log_w = np.where(np.arange(1_000) < 990, 0.0, 3.0)  # in b ten samples of sixty carry nearly all
    free_energy.state_difference(log_w, a, ~a)
    assert "One of the two states is worth" in caplog.text


def test_chain_state_difference_counts_passages(caplog):
    blocks = np.repeat([True, False] * 3, 50)
    delta_f, error = free_energy.chain_state_difference(blocks, ~blocks)
    assert delta_f == pytest.approx(0.0)
    assert error > 4 * np.sqrt(4 / 300)  # far above independent frames
    assert "5 times" in caplog.text
    caplog.clear()
    quick = np.arange(300) % 3 == 0
    free_energy.chain_state_difference(quick, ~quick)
    assert not caplog.records
    with pytest.raises(InputError, match="in_a must be one-dimensional"):
        free_energy.chain_state_difference(blocks[None], ~blocks[None])


@pytest.mark.parametrize("name", ["in_b", "log_w", "chains"])
def test_chain_state_difference_names_what_has_another_length(name):
    in_a = np.arange(300) % 3 == 0
    given = {"in_b": ~in_a, "log_w": np.zeros(300), "chains": np.zeros(300)}
    given[name] = given[name][:-1]
    with pytest.raises(InputError, match=f"^{name} must have one entry for each of the 300 frames"):
        free_energy.chain_state_difference(in_a, **given)


def test_chain_weights_are_those_of_state_difference():
    rng = np.random.default_rng(1)
    log_w = rng.normal(size=500)
    a = rng.random(500) < 0.5
    chain = free_energy.chain_state_difference(a, ~a, log_w)
    independent = free_energy.state_difference(log_w, a, ~a)
    assert chain[0] == pytest.approx(independent[0])
    assert chain[1] >= independent[1] * (1 - 1e-12)


def test_statistical_inefficiency():
    rng = np.random.default_rng(2)
    assert free_energy.statistical_inefficiency(np.ones(10)) == 1.0
    x = np.zeros(20_000)
    noise = rng.normal(size=x.size)
    for t in range(1, x.size):  # g = (1 + ρ)/(1 - ρ) = 9
        x[t] = 0.8 * x[t - 1] + noise[t]
    assert free_energy.statistical_inefficiency(x) == pytest.approx(9.0, rel=0.25)
    for bad in ([1.0], [1.0, math.nan], [[1.0, 2.0]]):
        with pytest.raises(InputError, match="time series"):
            free_energy.statistical_inefficiency(bad)


def test_importing_pymbar_says_nothing_and_restores_its_logger(caplog):
    logging.getLogger("pymbar").setLevel(logging.NOTSET)
    with caplog.at_level(logging.DEBUG):
        free_energy.bar(*gaussian_works())
    assert not [record for record in caplog.records if record.name.startswith("pymbar")]
    assert logging.getLogger("pymbar").level == logging.NOTSET
