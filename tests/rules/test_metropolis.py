"""The accept/choose rules with stub proposals: infinities, bookkeeping, shapes, bit-identity."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from openmm_bg.errors import InputError
from openmm_bg.rules import metropolis
from openmm_bg.rules.metropolis import State

INF = math.inf


def rng():
    return np.random.default_rng(0)


def test_log_acceptance_table():
    cases = [
        # current, proposed, log alpha
        (0.0, -2.0, -2.0),
        (-2.0, 0.0, 0.0),
        (INF, 5.0, -INF),  # q = 0 at the current state: stays
        (INF, -INF, -INF),
        (-INF, -50.0, 0.0),  # π = 0 at the current state: leaves
        (-INF, -INF, -INF),
        (0.0, -INF, -INF),
    ]
    current, proposed, expected = np.array(cases).T
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(metropolis.log_acceptance(current, proposed), expected)


@pytest.mark.parametrize("rule", ["independence", "multiple", "step"])
def test_infinite_weights_without_nan_arithmetic(rule):
    def last(current, proposed):
        with np.errstate(all="raise", under="ignore"):
            if rule == "independence":
                return metropolis.independence_chain(current, [proposed] * 6, rng())[0][-1] >= 0
            if rule == "multiple":
                return metropolis.multiple_proposal_chain(current, [[proposed] * 2] * 6, rng())[0][-1] >= 0
            old, new = State(np.zeros(1), current), State(np.ones(1), proposed)
            return metropolis.metropolis_step(old, new, rng())[0].value[0] == 1

    assert not last(INF, 0.0)
    assert not last(INF, 1e300)
    assert not last(INF, -INF)
    assert last(-INF, -1e5)
    assert not last(-INF, -INF)
    assert not last(0.0, -INF)
    assert last(-1e300, 0.0)
    assert not last(0.0, -1e5)
    for bad in (math.nan, INF):
        with pytest.raises(InputError):
            last(0.0, bad)
    with pytest.raises(InputError):
        last(math.nan, 0.0)


def test_independence_chain_reports_where_it_stands():
    # certain moves: up, impossible, up, far down, up
    index, info = metropolis.independence_chain(0.0, [1e3, -INF, 2e3, 0.0, 3e3], rng())
    np.testing.assert_array_equal(index, [0, 0, 2, 2, 4])
    assert (info.n_proposed, info.n_accepted, info.n_energies) == (5, 3, 5)
    assert info.longest_rejection_streak == 1
    assert info.acceptance_rate == pytest.approx(0.6)
    assert info.acceptance_probability == pytest.approx(0.6)
    index, info = metropolis.independence_chain(0.0, [-1e3] * 4 + [1e3], rng())
    np.testing.assert_array_equal(index, [-1, -1, -1, -1, 4])
    assert info.longest_rejection_streak == 4


def test_multiple_proposals_index_flattened_candidates():
    index, info = metropolis.multiple_proposal_chain(0.0, [[-INF, 1e3], [-INF, -INF], [5e3, 0.0]], rng())
    np.testing.assert_array_equal(index, [1, 1, 4])
    assert (info.n_proposed, info.n_accepted, info.n_energies) == (3, 2, 6)
    assert info.acceptance_probability == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="at least one proposal"):
        metropolis.multiple_proposal_chain(0.0, np.zeros((3, 0)), rng())


@pytest.mark.parametrize("chains", [(), (1,), (3,), (2, 3)])
def test_leading_axes_are_chains(chains):
    generator = rng()
    current = generator.normal(size=chains)
    single = generator.normal(size=(*chains, 7))
    many = generator.normal(size=(*chains, 7, 4))
    for index, info, top in (
        (*metropolis.independence_chain(current, single, rng()), 7),
        (*metropolis.multiple_proposal_chain(current, many, rng()), 28),
    ):
        assert index.shape == (*chains, 7)
        assert index.min() >= -1 and index.max() < top
        assert np.all(np.diff(index, axis=-1) >= 0)  # each proposal is offered once, in order
        assert info.n_proposed == 7 * current.size
        moved = np.diff(index, axis=-1, prepend=-1) > 0
        assert info.n_accepted == moved.sum()
    z = generator.normal(size=(*chains, 2))
    state, info = metropolis.metropolis_step(State(z, current), State(z + 1, current + 0.1), rng())
    assert state.value.shape == z.shape and state.log_w.shape == current.shape
    assert info.n_accepted == info.n_proposed == current.size


def test_chains_do_not_mix():
    """A chain's proposals are its own: chains with certain moves end where they must."""
    current = np.array([0.0, INF, -INF])
    proposed = np.array([[1e3, -INF], [1e3, 1e3], [-INF, -7.0]])
    index, info = metropolis.independence_chain(current, proposed, rng())
    np.testing.assert_array_equal(index, [[0, 0], [-1, -1], [-1, 1]])
    assert info.longest_rejection_streak == 2


def test_one_chain_is_the_first_of_two():
    """A chain alone runs in Python's floats, and meets the same exponentials as among others."""

    class Drawn:
        """An rng that hands out the same row to everyone."""

        def __init__(self, row):
            self.row = row

        def standard_exponential(self, shape):
            return np.broadcast_to(self.row, shape).copy()

    generator = rng()
    for current in (0.0, 2.5, -40.0, INF, -INF):
        for n in (0, 1, 30):
            proposed = generator.normal(scale=3.0, size=n)
            proposed[generator.random(n) < 0.2] = -INF
            drawn = Drawn(generator.standard_exponential(n))
            one, alone = metropolis.independence_chain(current, proposed, drawn)
            two, among = metropolis.independence_chain(np.full(2, current), np.stack([proposed, proposed]), drawn)
            assert one.dtype == two.dtype and one.shape == (n,)
            np.testing.assert_array_equal(np.stack([one, one]), two)
            assert 2 * alone.n_accepted == among.n_accepted and 2 * alone.n_energies == among.n_energies
            assert alone.longest_rejection_streak == among.longest_rejection_streak
            assert alone.acceptance_probability == pytest.approx(among.acceptance_probability, nan_ok=True)
            for name in ("leading_rejections", "trailing_rejections"):
                np.testing.assert_array_equal(np.repeat(getattr(alone, name), 2), getattr(among, name))
        for log_w in (-INF, -3.0, 1.0):
            drawn = Drawn(generator.standard_exponential(1))
            old, new = State(np.zeros((1, 2)), np.array([current])), State(np.ones((1, 2)), np.array([log_w]))
            state, alone = metropolis.metropolis_step(old, new, drawn)
            twice = [State(np.repeat(s.value, 2, 0), np.repeat(s.log_w, 2)) for s in (old, new)]
            states, among = metropolis.metropolis_step(*twice, drawn)
            np.testing.assert_array_equal(np.repeat(state.value, 2, 0), states.value)
            np.testing.assert_array_equal(np.repeat(state.log_w, 2), states.log_w)
            assert 2 * alone.n_accepted == among.n_accepted
            assert alone.acceptance_probability == pytest.approx(among.acceptance_probability)


def test_reports_join_as_if_the_chain_had_run_in_one_piece():
    generator = rng()
    for _ in range(200):
        log_w = generator.normal(scale=3.0, size=(3, 12))
        index, whole = metropolis.independence_chain(np.zeros(3), log_w, np.random.default_rng(1))
        moved = np.diff(index, axis=-1, prepend=-1) > 0
        before = np.concatenate(
            [np.zeros((3, 1)), np.where(index >= 0, np.take_along_axis(log_w, index, 1), 0.0)[:, :-1]], axis=1
        )
        probability = np.exp(metropolis.log_acceptance(before, log_w))
        cuts = [0, *sorted(generator.integers(0, 13, size=2)), 12]
        pieces = [metropolis._report(moved[:, a:b], probability[:, a:b], 1) for a, b in itertools.pairwise(cuts)]
        joined = pieces[0] + pieces[1] + pieces[2]
        for name in ("n_proposed", "n_accepted", "n_energies", "longest_rejection_streak"):
            assert getattr(joined, name) == getattr(whole, name), name
        np.testing.assert_array_equal(joined.leading_rejections, whole.leading_rejections)
        np.testing.assert_array_equal(joined.trailing_rejections, whole.trailing_rejections)
        assert joined.acceptance_probability == pytest.approx(whole.acceptance_probability)
        longest = max(len(run) for row in moved for run in "".join("01"[int(m)] for m in row).split("1"))
        assert whole.longest_rejection_streak == longest
    with pytest.raises(InputError, match="same chains"):
        _ = whole + metropolis.independence_chain(0.0, [0.0], rng())[1]


def test_rejection_keeps_the_old_state_bit_for_bit():
    value = np.array([[0.1 + 0.2, -0.0, math.pi], [1.0, 2.0, 3.0]])
    state = State(value, np.array([0.0, 0.0]))
    proposal = State(value + 1.0, np.array([-INF, 1.0]))
    new, _ = metropolis.metropolis_step(state, proposal, rng())
    assert new.value[0].tobytes() == value[0].tobytes()
    np.testing.assert_array_equal(new.value[1], value[1] + 1.0)
    np.testing.assert_array_equal(new.log_w, [0.0, 1.0])
    with pytest.raises(InputError, match="state's shape"):
        metropolis.metropolis_step(state, State(value[:, :2], state.log_w), rng())


@pytest.mark.statistical
def test_choice_follows_the_weights():
    """E from fixed candidates chooses each with its share; D accepts with w'/w."""
    n = 40_000
    candidates = np.array([0.3, -1.0, 1.2, -INF])
    index, info = metropolis.multiple_proposal_chain(
        np.full(n, candidates[0]), np.tile(candidates[1:], (n, 1, 1)), rng()
    )
    counts = np.bincount(index[:, 0] + 1, minlength=4)
    share = np.exp(candidates) / np.exp(candidates).sum()
    z = (counts - n * share)[:3] / np.sqrt(n * share * (1 - share))[:3]
    print(f"largest z {np.abs(z).max():.1f}, n = {n}")
    assert counts[3] == 0 and np.abs(z).max() < 4
    assert info.acceptance_probability == pytest.approx(1 - share[0])
    doubled = np.exp(2 * candidates) / np.exp(2 * candidates).sum()
    assert np.abs((counts - n * doubled)[:3] / np.sqrt(n * doubled * (1 - doubled))[:3]).max() > 5
    _, info = metropolis.independence_chain(np.zeros(n), np.full((n, 1), -0.7), rng())
    p = math.exp(-0.7)
    assert abs(info.n_accepted - n * p) < 4 * math.sqrt(n * p * (1 - p))
    assert abs(info.n_accepted - n * p**2) > 5 * math.sqrt(n * p * (1 - p))


def check_base_is_invariant(kappa_given):
    """Base samples pushed through the proposal keep the base's moments; κ = 1.5 on the second dimension."""
    n = 200_000
    generator = np.random.default_rng(2)
    z = np.stack(
        [
            generator.uniform(-np.pi, np.pi, n),
            generator.vonmises(0.0, 1.5, n),
            generator.normal(0.0, 1.0, n),
        ],
        axis=1,
    )
    for _ in range(3):
        z = metropolis.latent_proposal(
            z,
            generator,
            circular=[True, True, False],
            concentration=[0.0, kappa_given, 0.0],
            fold=[1, 1, 1],
            a=0.7,
            width=1.2,
        )
    assert np.all((z[:, :2] >= -np.pi) & (z[:, :2] < np.pi))
    bessel = np.i0(1.5)
    angles = np.linspace(-np.pi, np.pi, 2001)[:-1]
    first = np.mean(np.cos(angles) * np.exp(1.5 * np.cos(angles))) / bessel
    deviations = []
    for sample, exact in (
        (np.cos(z[:, 0]), 0.0),
        (np.cos(z[:, 1]), first),
        (np.sin(z[:, 1]), 0.0),
        (z[:, 2], 0.0),
        (z[:, 2] ** 2, 1.0),
    ):
        deviations.append(abs(sample.mean() - exact) / (sample.std() / np.sqrt(n)))
    print(f"kappa handed over {kappa_given}: z = {np.round(deviations, 1)}, n = {n}")
    return max(deviations)


@pytest.mark.statistical
def test_latent_proposal_keeps_the_base():
    assert check_base_is_invariant(1.5) < 4
    assert check_base_is_invariant(0.0) > 5


def test_latent_proposal_about_other_centres_and_scales():
    """Under μ, σ of the user's own the proposal is the standard one, shifted and scaled."""
    z = np.random.default_rng(3).normal(size=(50, 2))
    common = {"circular": [False, False], "concentration": [0.0, 0.0], "fold": 1, "a": 0.4, "width": 1.0}
    plain = metropolis.latent_proposal(z, rng(), **common)
    moved = metropolis.latent_proposal(z * 2.0 + 5.0, rng(), mean=5.0, scale=2.0, **common)
    np.testing.assert_allclose(moved, plain * 2.0 + 5.0)
    assert np.all(metropolis.latent_proposal(z, rng(), **{**common, "a": 1e-9}) == pytest.approx(z))


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": 0.0},
        {"a": 1.1},
        {"width": 0.0},
        {"width": math.nan},
        {"circular": [True]},
        {"concentration": [0.0] * 3},
    ],
)
def test_latent_proposal_refuses(wrong):
    good = {"circular": [True, False], "concentration": [0.0, 0.0], "fold": 1, "a": 0.5, "width": 0.5}
    with pytest.raises(InputError):
        metropolis.latent_proposal(np.zeros((4, 2)), rng(), **{**good, **wrong})


def test_latent_log_ratio():
    assert metropolis.latent_log_ratio(-1.0, 0.2, -3.0, 0.7, -0.1, -0.4) == pytest.approx(-1.8)
    with np.errstate(all="raise"):
        assert metropolis.latent_log_ratio(-1.0, 0.0, -INF, 0.0, 0.0, 0.0) == -INF
        assert metropolis.latent_log_ratio(-INF, 0.0, -1.0, 0.0, 0.0, 0.0) == INF
        assert metropolis.latent_log_ratio(-INF, 0.0, -INF, 0.0, 0.0, 0.0) == -INF
        assert metropolis.latent_log_ratio(-1.0, 0.0, -1.0, 0.0, 0.0, -INF) == -INF
    with pytest.raises(InputError):
        metropolis.latent_log_ratio(math.nan, 0.0, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(InputError):
        metropolis.latent_log_ratio(0.0, 0.0, 0.0, 0.0, -INF, 0.0)


def test_general_ratio_obeys_the_rules_for_infinite_weights():
    value = np.zeros((3, 1))
    state = State(value, np.array([INF, 0.0, 0.0]))
    proposal = State(value + 1, np.array([0.0, -INF, 0.0]))
    new, _ = metropolis.metropolis_step(state, proposal, rng(), log_ratio=np.full(3, 50.0))
    np.testing.assert_array_equal(new.value[:, 0], [0.0, 0.0, 1.0])
    with pytest.raises(InputError, match="log_ratio"):
        metropolis.metropolis_step(state, proposal, rng(), log_ratio=np.zeros(2))


@pytest.mark.parametrize("shapes", [((), ()), ((2,), (3, 4)), ((2,), (2, 3, 4))])
def test_shapes_must_agree(shapes):
    with pytest.raises(InputError, match="log_w_proposed must have"):
        metropolis.independence_chain(np.zeros(shapes[0]), np.zeros(shapes[1]), rng())
    with pytest.raises(InputError, match="value must begin"):
        State(np.zeros(3), np.zeros(2))


def test_the_rules_import_neither_openmm_nor_torch():
    code = (
        "import sys, openmm_bg.rules.metropolis, openmm_bg.rules.annealing, openmm_bg.weights;"
        "print([m for m in ('openmm', 'torch', 'pymbar', 'arviz_stats', 'matplotlib', 'mdtraj')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.statistical
@pytest.mark.parametrize("fold_given, right", [(3, True), (1, False)])
def test_latent_proposal_keeps_a_folded_base(fold_given, right):
    """Under exp(κ cos 3z) the mean of cos 3z stays where it was, and drifts if the fold is forgotten."""
    kappa, n = 2.5, 40_000
    stream = np.random.default_rng(5)
    z = (stream.vonmises(0.0, kappa, n) + 2.0 * np.pi * stream.integers(0, 3, n)) / 3.0
    z = np.mod(z + np.pi, 2.0 * np.pi) - np.pi
    before = np.cos(3.0 * z)
    z = z[:, None]
    for _ in range(20):
        z = metropolis.latent_proposal(
            z, stream, circular=[True], concentration=[kappa], fold=[fold_given], a=0.5, width=0.6
        )
    after = np.cos(3.0 * z[:, 0])
    score = (after.mean() - before.mean()) / np.hypot(after.std(), before.std()) * np.sqrt(n)
    print(score, n)
    assert (abs(score) < 4.0) == right
