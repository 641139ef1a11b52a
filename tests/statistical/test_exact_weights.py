"""Formulas A, B and J on a toy with known marginals and log Z; every deliberate error must be caught."""

import logging

import numpy as np
import pytest

from openmm_bg import free_energy, weights

pytestmark = pytest.mark.statistical

N = 200_000


def flow_weights(toy, mode, broken, n=N, seed=1):
    """(φ, θ, r) and log w of flow samples; formula A for "off" and "on", B for "rigid"."""
    rng = np.random.default_rng(seed)
    flow = toy.ToyFlow(n_dim=3 if mode == "off" else 2)
    y, log_q = flow.sample((n,), rng)
    phi, theta, r = toy.full(y, toy.S0)
    log_target = toy.log_pi(phi, theta, r, with_fixman=mode == "on", omit=broken)
    if broken == "log_q":
        log_q = np.zeros(n)
    log_w = log_target - log_q
    if broken == "factor 2":
        log_w = 2.0 * log_w
    return (phi, theta, r), log_w


def target(toy, mode):
    return toy.reference(with_fixman=mode == "on", r=None if mode == "off" else toy.S0)


def check_weights(toy, mode, broken=None, ref=None):
    """Marginals by `expectation`, log Z by `one_sided`."""
    (phi, theta, r), log_w = flow_weights(toy, mode, broken)
    ref = ref or target(toy, mode)
    verdict = toy.Verdict(f"weights, {mode}, broken={broken}", N)
    for name, indicator in toy.bins(phi, theta, r, ref).items():
        value, error = weights.expectation(indicator, log_w)
        verdict.histogram(name, value, error, getattr(ref, name))
    z = free_energy.one_sided(log_w)
    verdict.number("log Z", -z.delta_f, z.error, ref.log_z)
    return verdict.show()


def check_bar(toy, mode, broken=None, n=20_000):
    """BAR between flow samples and exact frames; log w broken alike on both sides."""
    _, log_w = flow_weights(toy, mode, broken, n, seed=2)
    rng = np.random.default_rng(3)
    frames = toy.draw_exact(n, rng, with_fixman=mode == "on", r=None if mode == "off" else toy.S0)
    flow = toy.ToyFlow(n_dim=3 if mode == "off" else 2)
    log_q = flow.log_q(frames[:, : flow.n_dim]) * (broken != "log_q")
    log_w_md = toy.log_pi(*frames.T, with_fixman=mode == "on", omit=broken) - log_q
    if broken == "factor 2":
        log_w_md = 2 * log_w_md
    result = free_energy.bar(log_w, log_w_md)
    verdict = toy.Verdict(f"BAR, {mode}, broken={broken}", n)
    verdict.number("log Z", -result.delta_f, result.error, target(toy, mode).log_z)
    return verdict.show(), result


@pytest.mark.parametrize("mode", ["off", "on", "rigid"])
def test_weights_recover_marginals_and_log_z(toy, mode):
    check_weights(toy, mode).assert_right()


@pytest.mark.parametrize(
    ("mode", "broken"),
    [
        ("off", "jacobian"),
        ("off", "log_q"),
        ("off", "factor 2"),
        ("on", "jacobian"),
        ("on", "fixman"),
        ("on", "log_q"),
        ("on", "factor 2"),
        ("rigid", "jacobian"),
        ("rigid", "log_q"),
        ("rigid", "factor 2"),
    ],
)
def test_broken_weights_are_caught(toy, mode, broken):
    check_weights(toy, mode, broken).assert_wrong()


def test_rigid_weights_are_neither_the_force_field_nor_md_with_frozen_s(toy):
    """Why results of formula B carry a label: their marginals are not those of the other two ensembles."""
    free = toy.reference(with_fixman=False)
    check_weights(toy, "rigid", ref=toy.Reference(free.log_z, free.phi, free.theta, None)).assert_wrong()
    check_weights(toy, "rigid", ref=target(toy, "on")).assert_wrong()


@pytest.mark.parametrize("mode", ["off", "on"])
def test_bar_recovers_log_z(toy, mode):
    verdict, result = check_bar(toy, mode)
    verdict.assert_right()
    assert 0.1 < result.overlap < 1.0


@pytest.mark.parametrize(("mode", "broken"), [("off", "jacobian"), ("on", "fixman"), ("on", "log_q")])
def test_broken_bar_is_caught(toy, mode, broken):
    check_bar(toy, mode, broken)[0].assert_wrong()


def test_bar_with_frames_outside_the_sector_gives_the_sectors_z(toy):
    """Frames with q = 0 are left out: keeping them, as an infinite work, would give Z of all sectors."""
    rng = np.random.default_rng(11)
    n = 40_000
    # a flow that lives on 0 < φ < π only: fold a symmetric flow, so that q doubles there
    flow = toy.ToyFlow()
    y, log_q = flow.sample((n,), rng)
    y[:, 0] = np.abs(y[:, 0])
    log_w = toy.log_pi(*toy.full(y, toy.S0), with_fixman=True) - log_q - np.log(2)
    frames = toy.draw_exact(n, rng, with_fixman=True, r=toy.S0)
    inside = frames[:, 0] > 0
    log_w_md = np.where(inside, toy.log_pi(*frames.T, with_fixman=True) - flow.log_q(frames[:, :2]) - np.log(2), np.inf)
    ref = target(toy, "on")
    share = ref.phi[ref.phi.size // 2 :].sum()  # bins of 0 < φ < π
    result = free_energy.bar(log_w, log_w_md)
    verdict = toy.Verdict("BAR, half the circle", n)
    verdict.number("log Z of the sector", -result.delta_f, result.error, ref.log_z + np.log(share))
    verdict.show().assert_right()
    assert result.n_outside == n - int(inside.sum())
    wrong = toy.Verdict("BAR, half the circle, against Z of the whole", n)
    wrong.number("log Z", -result.delta_f, result.error, ref.log_z)
    wrong.show().assert_wrong()


def check_state_difference(toy, broken=None):
    (phi, theta, _), log_w = flow_weights(toy, "on", broken)
    ref = target(toy, "on")
    third = toy.PHI_EDGES[4]
    delta_f, error = free_energy.state_difference(log_w, phi < third, phi >= third)
    verdict = toy.Verdict(f"state difference, broken={broken}", N)
    verdict.number("dF", delta_f, error, -np.log(ref.phi[4:].sum() / ref.phi[:4].sum()))
    # overlapping states: θ's lower half against everything
    low = theta < toy.THETA_EDGES[4]
    delta_f, error = free_energy.state_difference(log_w, np.ones_like(low), low)
    verdict.number("dF to the whole", delta_f, error, -np.log(ref.theta[:4].sum()))
    return verdict.show()


def test_state_difference(toy):
    check_state_difference(toy).assert_right()


@pytest.mark.parametrize("broken", ["jacobian", "fixman", "log_q", "factor 2"])
def test_broken_state_difference_is_caught(toy, broken):
    check_state_difference(toy, broken).assert_wrong()


def calibration(toy, title, estimates, errors):
    """Is the scatter of repeated estimates what their error bars say? log of the ratio, with its own error."""
    estimates, errors = np.asarray(estimates), np.asarray(errors)
    verdict = toy.Verdict(title, estimates.size)
    ratio = np.log(estimates.std(ddof=1) / np.sqrt(np.mean(errors**2)))
    verdict.number("log(scatter/error)", ratio, 1 / np.sqrt(2 * (estimates.size - 1)), 0.0)
    return verdict.show()


def repeated(toy, what, repeats=400, n=2_000):
    """400 estimates and error bars of one quantity from independent sets of samples."""
    (phi, _, _), log_w = flow_weights(toy, "off", None, n * repeats, seed=4)
    out = []
    for k in range(repeats):
        part = slice(k * n, (k + 1) * n)
        if what == "mean":
            out.append(weights.expectation(np.cos(phi[part]), log_w[part]))
        elif what == "log Z":
            out.append(weights.log_mean_weight(log_w[part]))
        elif what == "state":
            out.append(free_energy.state_difference(log_w[part], phi[part] < 0, phi[part] > 0))
        elif what == "overlapping states":
            everything = np.ones(n, dtype=bool)
            out.append(free_energy.state_difference(log_w[part], everything, phi[part] > 0))
    return np.array(out).T


@pytest.mark.parametrize("what", ["mean", "log Z", "state", "overlapping states"])
def test_error_bars_have_the_size_of_the_scatter(toy, what):
    estimates, errors = repeated(toy, what)
    calibration(toy, f"error bar of {what}", estimates, errors).assert_right()
    # the companion: error bars half or twice as long do not pass
    calibration(toy, f"half the error bar of {what}", estimates, errors / 2).assert_wrong()
    calibration(toy, f"twice the error bar of {what}", estimates, errors * 2).assert_wrong()


def test_bar_error_has_the_size_of_the_scatter(toy):
    repeats, n = 200, 1_000
    rng = np.random.default_rng(5)
    _, log_w = flow_weights(toy, "on", None, n * repeats, seed=6)
    frames = toy.draw_exact(n * repeats, rng, with_fixman=True, r=toy.S0)
    log_w_md = toy.log_pi(*frames.T, with_fixman=True) - toy.ToyFlow().log_q(frames[:, :2])
    results = [free_energy.bar(log_w[k * n : (k + 1) * n], log_w_md[k * n : (k + 1) * n]) for k in range(repeats)]
    errors = np.array([result.error for result in results])
    estimates = [result.delta_f for result in results]
    calibration(toy, "BAR error", estimates, errors).assert_right()
    calibration(toy, "half the BAR error", estimates, errors / 2).assert_wrong()


def test_one_sided_bias_estimate(toy, caplog):
    """Few samples: -log mean w lies above -log Z by what `bias` says, and is right once that is taken away."""
    caplog.set_level(logging.ERROR, logger="openmm_bg.free_energy")  # k-hat of 20 samples is no news
    repeats, n = 6_000, 20
    _, log_w = flow_weights(toy, "on", None, n * repeats, seed=7)
    results = [free_energy.one_sided(part) for part in log_w.reshape(repeats, n)]
    exact = -target(toy, "on").log_z
    for name, values in (
        ("corrected", np.array([result.delta_f - result.bias for result in results])),
        ("taken as it is", np.array([result.delta_f for result in results])),
    ):
        verdict = toy.Verdict(f"one-sided estimate, {name}", repeats)
        verdict.number("-log Z", values.mean(), values.std(ddof=1) / np.sqrt(repeats), exact)
        verdict.show()
        verdict.assert_right() if name == "corrected" else verdict.assert_wrong()


@pytest.mark.parametrize("biased", [False, True])
def test_chain_state_difference_from_correlated_chains(toy, biased):
    """Two-state Markov chains with known populations and correlation time, plain or under a known bias."""
    rng = np.random.default_rng(8)
    chains, length = 200, 2_000
    to_b, to_a = 0.04, 0.08
    state = rng.random(chains) < to_b / (to_a + to_b)
    series = np.empty((chains, length), dtype=bool)
    for t in range(length):
        jump = rng.random(chains) < np.where(state, to_a, to_b)
        state = state ^ jump
        series[:, t] = state
    exact = -np.log(to_b / to_a)
    # the bias pushed the chain out of b by 1.5 kT, and roughened both states
    log_w = np.where(series, 1.5, 0.0) + 0.7 * rng.standard_normal(series.shape) if biased else None
    results = [
        free_energy.chain_state_difference(~row, row, None if log_w is None else log_w[k])
        for k, row in enumerate(series)
    ]
    estimates, errors = np.array(results).T
    verdict = toy.Verdict(f"chains, biased={biased}", chains)
    verdict.number("mean dF", estimates.mean(), estimates.std() / np.sqrt(chains), exact - (1.5 if biased else 0.0))
    verdict.show()
    verdict.assert_right()
    # g is itself an estimate from 2,000 frames and carries a bias of some per cent: allow for ten.
    ratio = estimates.std(ddof=1) / np.sqrt(np.mean(errors**2))
    print(f"scatter/error = {ratio:.3f}")
    assert abs(np.log(ratio)) < 4 / np.sqrt(2 * chains) + 0.1
    # companion: without the statistical inefficiency the error bar is far too short
    naive = np.array([free_energy.state_difference(np.zeros(length), ~row, row)[1] for row in series])
    assert estimates.std(ddof=1) / np.sqrt(np.mean(naive**2)) > 2.0


def test_forward_ess_agrees_with_ess_and_sees_a_lost_mode(toy):
    rng = np.random.default_rng(9)
    _, log_w = flow_weights(toy, "on", None, 100_000)
    frames = toy.draw_exact(100_000, rng, with_fixman=True, r=toy.S0)
    log_w_md = toy.log_pi(*frames.T, with_fixman=True) - toy.ToyFlow().log_q(frames[:, :2])
    blocks = np.array(
        [
            [weights.effective_sample_size(a), weights.forward_ess(b)]
            for a, b in zip(np.split(log_w, 50), np.split(log_w_md, 50), strict=True)
        ]
    )
    mean, error = blocks.mean(axis=0), blocks.std(axis=0, ddof=1) / np.sqrt(50)
    verdict = toy.Verdict("forward ESS", 100_000)
    verdict.number("forward - reverse", mean[1] - mean[0], np.hypot(*error), 0.0)
    verdict.show().assert_right()
    # a flow that has all but lost half the circle: weights of its own samples look no worse
    lost = frames[:, 0] < 0
    assert weights.forward_ess(np.where(lost, log_w_md + 8, log_w_md)) < 0.05


def test_resampled_frames_follow_the_target(toy):
    (phi, theta, r), log_w = flow_weights(toy, "on", None)
    ref = target(toy, "on")
    index = weights.resample(log_w, N, np.random.default_rng(10))
    for broken, rows in ((False, index), (True, np.arange(N))):
        verdict = toy.Verdict(f"resampled, weights ignored={broken}", N)
        for name, indicator in toy.bins(phi[rows], theta[rows], r[rows], ref).items():
            # the weighted estimate's error, and at most a multinomial draw's for resampling
            expected = getattr(ref, name)
            error = weights.expectation(toy.bins(phi, theta, r, ref)[name], log_w)[1]
            error = np.hypot(error, np.sqrt(expected * (1 - expected) / N))
            verdict.histogram(name, indicator.mean(axis=0), error, expected)
        verdict.show()
        verdict.assert_wrong() if broken else verdict.assert_right()
