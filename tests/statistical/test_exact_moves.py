"""Formulas D, E and F leave the target invariant on a toy with known marginals; broken variants do not.

Every chain starts from an exact, independent sample of the target and makes a few moves, so that the final
states are again independent and exact samples if, and only if, the moves are right.
"""

import numpy as np
import pytest

from openmm_bg.rules import metropolis
from openmm_bg.rules.metropolis import State

pytestmark = pytest.mark.statistical

N_RIGHT = 200_000  # independent chains
N_BROKEN = 60_000  # every deliberate error below shows at 5 sigma from 2.2e4 chains or fewer
ROUNDS = 5
K = 4


class Chains:
    """What D, E and F share: the target of a setting, with a term left out or doubled on purpose."""

    def __init__(self, toy, setting, broken, seed, kappa=0.7):
        self.toy, self.setting, self.broken = toy, setting, broken
        self.rng = np.random.default_rng(seed)
        self.n = N_BROKEN if broken else N_RIGHT
        self.flow = toy.ToyFlow(n_dim=3 if setting == "off" else 2, kappa=kappa)
        self.x = toy.draw_exact(self.n, self.rng, with_fixman=setting == "partial")

    @property
    def y(self):
        return self.x[:, : self.flow.n_dim]

    def log_pi(self, y):
        """Of y [n, ..., D] with each chain's own s."""
        s = self.x[:, 2].reshape(self.n, *[1] * (y.ndim - 2))
        value = self.toy.log_pi(*self.toy.full(y, s), with_fixman=self.setting == "partial", omit=self.broken)
        return 2 * value if self.broken == "factor 2" else value

    def log_w(self, y, log_q):
        return self.log_pi(y) - (2 if self.broken == "factor 2" else 1) * log_q

    def take(self, proposals, last):
        """Move the chains whose last index is not -1 to proposals [n, m, D]."""
        moved = last >= 0
        self.x[moved, : self.flow.n_dim] = proposals[np.flatnonzero(moved), last[moved]]

    def move_s(self):
        """What MD does between moves: here an exact draw of s given y."""
        if self.setting == "partial":
            self.x[:, 2] = self.toy.draw_r(self.x[:, 0], self.x[:, 1], self.rng)

    def verdict(self, title, info):
        ref = self.toy.reference(with_fixman=self.setting == "partial")
        verdict = self.toy.Verdict(f"{title}, {self.setting}, broken={self.broken}", self.n)
        for name, indicator in self.toy.bins(*self.x.T, ref).items():
            p = getattr(ref, name)
            verdict.histogram(name, indicator.mean(axis=0), np.sqrt(p * (1 - p) / self.n), p)
        print(f"acceptance {info.acceptance_rate:.3f} (expected {info.acceptance_probability:.3f})")
        # A chain that never moves would keep its exact start and prove nothing.
        assert info.acceptance_rate > 0.1
        return verdict.show()


def check_independence(toy, setting, broken=None):
    """D, two proposals to a batch."""
    chains = Chains(toy, setting, broken, seed=21)
    total = None
    for _ in range(ROUNDS):
        proposals, log_q = chains.flow.sample((chains.n, 2), chains.rng)
        current_log_q = chains.flow.log_q(chains.y)
        if broken == "old log q":
            current_log_q = np.zeros(chains.n)
        index, info = metropolis.independence_chain(
            chains.log_w(chains.y, current_log_q), chains.log_w(proposals, log_q), chains.rng
        )
        chains.take(proposals, index[:, -1])
        chains.move_s()
        total = info if total is None else total + info
    return chains.verdict("D", total)


def check_multiple(toy, setting, broken=None):
    """E with K proposals."""
    chains = Chains(toy, setting, broken, seed=22)
    total = None
    proposals, log_q = chains.flow.sample((chains.n, K), chains.rng)
    for _ in range(ROUNDS):
        if broken != "reused pool":
            proposals, log_q = chains.flow.sample((chains.n, K), chains.rng)
        log_w = chains.log_w(chains.y, chains.flow.log_q(chains.y))
        if broken == "current left out":
            log_w = np.full(chains.n, -np.inf)
        index, info = metropolis.multiple_proposal_chain(log_w, chains.log_w(proposals, log_q)[:, None, :], chains.rng)
        chains.take(proposals, index[:, -1])
        chains.move_s()
        total = info if total is None else total + info
    return chains.verdict("E", total)


def check_latent(toy, setting, broken=None, kappa=0.7):
    """F with a proposal that is reversible for the base."""
    chains = Chains(toy, setting, broken, seed=23, kappa=kappa)
    total = None
    for _ in range(2 * ROUNDS):
        z, logdet = chains.flow.inverse(chains.y)
        log_w = chains.log_w(chains.y, chains.flow.base_log_prob(z) - logdet)
        proposed = metropolis.latent_proposal(
            z,
            chains.rng,
            circular=chains.flow.circular,
            concentration=chains.flow.concentration * (broken != "plain walk"),
            fold=1,
            a=0.6,
            width=1.0,
        )
        y, logdet = chains.flow.forward(proposed)
        log_w_proposed = chains.log_w(y, chains.flow.base_log_prob(proposed) - logdet)
        state, info = metropolis.metropolis_step(State(chains.y, log_w), State(y, log_w_proposed), chains.rng)
        chains.x[:, : chains.flow.n_dim] = state.value
        chains.move_s()
        total = info if total is None else total + info
    return chains.verdict(f"F, kappa {kappa}", total)


def check_general_latent(toy, setting, broken=None):
    """F with a drifting proposal, which needs its own density in both directions and the flow's volume."""
    chains = Chains(toy, setting, broken, seed=24)
    rng, drift, spread, kappa = chains.rng, 0.4, 0.7, 2.0

    def log_t(new, old):
        step = new - old - drift
        return kappa * np.cos(step[:, 0]) - 0.5 * np.sum((step[:, 1:] / spread) ** 2, axis=1)

    total = None
    for _ in range(2 * ROUNDS):
        z, logdet = chains.flow.inverse(chains.y)
        proposed = z + drift + spread * rng.standard_normal(z.shape)
        proposed[:, 0] = z[:, 0] + drift + rng.vonmises(0.0, kappa, chains.n)
        proposed[:, 0] = np.mod(proposed[:, 0] + np.pi, 2 * np.pi) - np.pi
        y, logdet_proposed = chains.flow.forward(proposed)
        log_pi, log_pi_proposed = chains.log_pi(chains.y), chains.log_pi(y)
        use_t = broken != "T left out"
        use_det = broken != "det left out"
        ratio = metropolis.latent_log_ratio(
            log_pi,
            logdet * use_det,
            log_pi_proposed,
            logdet_proposed * use_det,
            log_t(proposed, z) * use_t,
            log_t(z, proposed) * use_t,
        )
        state, info = metropolis.metropolis_step(
            State(chains.y, log_pi), State(y, log_pi_proposed), rng, log_ratio=ratio
        )
        chains.x[:, : chains.flow.n_dim] = state.value
        chains.move_s()
        total = info if total is None else total + info
    return chains.verdict("F, general T", total)


SETTINGS = pytest.mark.parametrize("setting", ["off", "partial"])
# Everywhere: volume element, Fixman term and a factor two; then what only the rule itself can lose.
TARGET_ERRORS = [
    ("off", "jacobian"),
    ("off", "factor 2"),
    ("partial", "jacobian"),
    ("partial", "fixman"),
    ("partial", "factor 2"),
]


@SETTINGS
def test_independence_chain(toy, setting):
    check_independence(toy, setting).assert_right()


@pytest.mark.parametrize(("setting", "broken"), [*TARGET_ERRORS, ("off", "old log q"), ("partial", "old log q")])
def test_broken_independence_chain_is_caught(toy, setting, broken):
    check_independence(toy, setting, broken).assert_wrong()


@SETTINGS
def test_multiple_proposal_chain(toy, setting):
    check_multiple(toy, setting).assert_right()


@pytest.mark.parametrize(
    ("setting", "broken"),
    [
        *TARGET_ERRORS,
        ("off", "current left out"),
        ("partial", "current left out"),
        ("off", "reused pool"),
        ("partial", "reused pool"),
    ],
)
def test_broken_multiple_proposal_chain_is_caught(toy, setting, broken):
    check_multiple(toy, setting, broken).assert_wrong()


@SETTINGS
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_latent_move(toy, setting, kappa):
    check_latent(toy, setting, kappa=kappa).assert_right()


@pytest.mark.parametrize(("setting", "broken"), [*TARGET_ERRORS, ("off", "plain walk"), ("partial", "plain walk")])
def test_broken_latent_move_is_caught(toy, setting, broken):
    check_latent(toy, setting, broken).assert_wrong()


@SETTINGS
def test_general_latent_move(toy, setting):
    check_general_latent(toy, setting).assert_right()


@pytest.mark.parametrize(
    ("setting", "broken"), [("partial", "fixman"), ("partial", "T left out"), ("partial", "det left out")]
)
def test_broken_general_latent_move_is_caught(toy, setting, broken):
    check_general_latent(toy, setting, broken).assert_wrong()


def test_independence_chain_forgets_a_bad_start(toy):
    """All chains start from one point: after n steps the largest weight bounds what is left of it."""
    chains, n = 20_000, 100
    rng = np.random.default_rng(25)
    flow = toy.ToyFlow()
    y, log_q = flow.sample((chains, n), rng)
    log_w = toy.log_pi(*toy.full(y, toy.S0), with_fixman=True) - log_q
    start = np.array([3.0, 0.7])
    log_w_start = toy.log_pi(*start, toy.S0, with_fixman=True) - flow.log_q(start)
    index, _ = metropolis.independence_chain(np.full(chains, log_w_start), log_w, rng)
    ref = toy.reference(with_fixman=True, r=toy.S0)
    # Mengersen and Tweedie 1996: the distance to the target is at most (1 - Z / max w)^n.
    grid = np.stack(np.meshgrid(np.linspace(-np.pi, np.pi, 300), np.linspace(0.01, 3.13, 300)), axis=-1)
    largest = (toy.log_pi(*toy.full(grid, toy.S0), with_fixman=True) - flow.log_q(grid)).max()
    left = (1 - np.exp(ref.log_z - largest)) ** n
    print(f"bound on what is left of the start: {left:.1e}")
    assert left < 1e-3
    for steps, right in ((n, True), (2, False)):
        last = index[:, steps - 1]
        end = np.where((last >= 0)[:, None], y[np.arange(chains), last], start)
        verdict = toy.Verdict(f"D from one point, {steps} steps", chains)
        for name, indicator in toy.bins(end[:, 0], end[:, 1], toy.S0, ref).items():
            p = getattr(ref, name)
            verdict.histogram(name, indicator.mean(axis=0), np.sqrt(p * (1 - p) / chains), p)
        verdict.show()
        verdict.assert_right() if right else verdict.assert_wrong()
