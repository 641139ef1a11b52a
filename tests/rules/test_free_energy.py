"""Free energies: by hand, beside pymbar, and every mistake a user can make."""

import logging
import math

import numpy as np
import pytest

from openmm_bg import free_energy, weights
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError

INF = math.inf


def gaussian_works(n=2_000, m=1_500, sigma=1.0, log_z=0.7, seed=0):
    """log w of both sides for a Gaussian log-weight: N(log Z - σ²/2, σ²) under q and N(log Z + σ²/2, σ²) under p."""
    rng = np.random.default_rng(seed)
    return (
        log_z - sigma**2 / 2 + sigma * rng.normal(size=n),
        log_z + sigma**2 / 2 + sigma * rng.normal(size=m),
    )


def test_one_sided_by_hand(caplog):
    result = free_energy.one_sided(np.log([1.0, 3.0]))
    assert result.delta_f == pytest.approx(-np.log(2.0))
    assert result.error == pytest.approx(0.5)
    assert result.bias == pytest.approx(0.125)  # Var 2, mean 2, n = 2
    assert "cannot be trusted" in caplog.text
    caplog.clear()
    free_energy.one_sided(gaussian_works(sigma=0.3)[0])
    assert not caplog.records


def test_bar_agrees_with_pymbar():
    import pymbar

    flow, md = gaussian_works()
    result = free_energy.bar(flow, md)
    reference = pymbar.bar(-flow, md, uncertainty_method="MBAR")
    assert result.delta_f == pytest.approx(reference["Delta_f"], abs=1e-8)
    assert result.error == pytest.approx(reference["dDelta_f"], rel=1e-6)
    assert result.overlap == pytest.approx(pymbar.bar_overlap(-flow, md), rel=1e-6)
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


def test_difference():
    a = free_energy.FreeEnergy(1.0, 0.3, "BAR", overlap=0.5, n_outside=1)
    b = free_energy.FreeEnergy(3.0, 0.4, "BAR", overlap=0.2, n_outside=2)
    result = free_energy.difference(a, b)
    assert (result.delta_f, result.error) == pytest.approx((2.0, 0.5))
    assert (result.overlap, result.bias, result.n_outside) == (0.2, None, 3)

    def ensemble(log_w, label="exact"):
        n = len(log_w)
        return Ensemble(np.zeros((n, 1, 3)), np.zeros(n), np.zeros(n), log_w, label=label)

    low, high = np.full(50, 1.0), np.full(50, 3.0)
    result = free_energy.difference(ensemble(low), ensemble(high))
    assert result.delta_f == pytest.approx(-2.0) and result.overlap is None
    assert result.bias == pytest.approx(0.0)
    with pytest.raises(InputError, match="of one kind"):
        free_energy.difference(ensemble(low), ensemble(high, "rigid"))


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
    assert free_energy.state_difference(log_w, everything, everything) == pytest.approx((0.0, 0.0))
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
    ],
)
def test_state_difference_refuses(log_w, a, b, message):
    with pytest.raises(InputError, match=message):
        free_energy.state_difference(log_w, a, b)


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
