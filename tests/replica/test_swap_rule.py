"""Formula I leaves both states invariant on a toy with known marginals; broken variants do not.

Every pair of conformations starts from exact, independent samples of the two states and is swapped a few times, so that
the final pairs are again exact samples if, and only if, the swaps are right.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from openmm_bg.swaps import swap_log_ratio

N_RIGHT = 300_000  # independent pairs
N_BROKEN = 80_000  # each test prints from how many pairs its error shows at 5 sigma
N_FIXMAN = 250_000  # the smallest error: from 9e4 pairs
ROUNDS = 3


def load_toy(name):
    path = Path(__file__).parents[1] / "statistical" / "toy_molecule.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hot_and_cold():
    """The toy twice: a second state in which φ feels half the energy and r is wider, and the toy itself."""
    cold, hot = load_toy("openmm_bg_test_toy_cold"), load_toy("openmm_bg_test_toy_hot")
    hot.SIGMA_R = cold.SIGMA_R * np.sqrt(2.0)
    hot.energy = lambda phi, theta, r: 0.5 * cold.energy(phi, theta, r) + 1.5 * (theta - 1.8) ** 2
    return hot, cold


class Pairs:
    """n conformations of the hot state a beside n of the cold state b, and the two flows between them."""

    def __init__(self, hot_and_cold, setting, broken):
        self.hot, self.cold = hot_and_cold
        self.setting, self.broken = setting, broken
        self.partial = setting != "off"
        self.n = {None: N_RIGHT, "fixman": N_FIXMAN}.get(broken, N_BROKEN)
        self.rng = np.random.default_rng(31)
        dim = 2 if self.partial else 3
        # Maps of the circle that differ, so that |det f'| is no constant: one would cancel between the directions. f
        # also shifts θ, so far that sin θ and det Z change with it.
        self.flow_a = self.hot.ToyFlow(n_dim=dim, stretch=0.75, theta_mean=1.55, theta_scale=0.5, r_scale=0.15)
        self.flow_b = self.cold.ToyFlow(n_dim=dim, stretch=1.25)
        self.a = self.hot.draw_exact(self.n, self.rng, with_fixman=self.partial)
        self.b = self.cold.draw_exact(self.n, self.rng, with_fixman=self.partial)
        self.n_accepted = 0

    def log_pi(self, toy, y, s):
        if self.broken == "one temperature":
            toy = self.cold
        return toy.log_pi(*toy.full(y, s), with_fixman=self.partial, omit=self.broken)

    def swap(self):
        dim = self.flow_a.n_dim
        y_a, y_b, s_a, s_b = self.a[:, :dim], self.b[:, :dim], self.a[:, 2], self.b[:, 2]
        z_a, from_a = self.flow_a.inverse(y_a)  # the toy's inverse returns log |dy/dz| there
        z_b, from_b = self.flow_b.inverse(y_b)
        new_b, to_b = self.flow_b.forward(z_a)
        new_a, to_a = self.flow_a.forward(z_b)
        det = 0.0 if self.broken == "det left out" else 1.0
        new_s_a, new_s_b = (s_b, s_a) if self.setting == "travels" else (s_a, s_b)
        weighed = (s_a, s_b) if self.broken == "weighed as if s stayed" else (new_s_a, new_s_b)
        log_ratio = swap_log_ratio(
            self.log_pi(self.hot, y_a, s_a),
            self.log_pi(self.cold, y_b, s_b),
            self.log_pi(self.hot, new_a, weighed[0]),
            self.log_pi(self.cold, new_b, weighed[1]),
            det * (to_b - from_a),
            det * (to_a - from_b),
        )
        if self.broken == "factor 2":
            log_ratio = 2.0 * log_ratio
        accept = -self.rng.standard_exponential(self.n) < log_ratio
        for x, new, s in ((self.a, new_a, new_s_a.copy()), (self.b, new_b, new_s_b.copy())):
            x[accept, :dim] = new[accept]
            if self.partial:
                x[accept, 2] = s[accept]
        self.n_accepted += int(accept.sum())

    def move_s(self):
        """What MD does between swaps: an exact draw of s given y. One that travels needs none to move."""
        if self.setting == "stays":
            self.a[:, 2] = self.hot.draw_r(self.a[:, 0], self.a[:, 1], self.rng)
            self.b[:, 2] = self.cold.draw_r(self.b[:, 0], self.b[:, 1], self.rng)

    def verdict(self):
        for _ in range(ROUNDS):
            self.swap()
            self.move_s()
        # Pairs that are never swapped would keep their exact start and prove nothing.
        acceptance = self.n_accepted / (ROUNDS * self.n)
        print(f"acceptance {acceptance:.3f}")
        assert acceptance > 0.1
        verdict = self.cold.Verdict(f"I, {self.setting}, broken={self.broken}", self.n)
        for state, toy, x in (("a", self.hot, self.a), ("b", self.cold, self.b)):
            ref = toy.reference(with_fixman=self.partial)
            for name, indicator in toy.bins(*x.T, ref).items():
                p = getattr(ref, name)
                verdict.histogram(f"{state} {name}", indicator.mean(axis=0), np.sqrt(p * (1 - p) / self.n), p)
        return verdict.show()


@pytest.mark.statistical
@pytest.mark.parametrize("setting", ["off", "stays", "travels"])
def test_swaps_keep_both_states(hot_and_cold, setting):
    Pairs(hot_and_cold, setting, None).verdict().assert_right()


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("setting", "broken"),
    [
        ("off", "det left out"),
        ("off", "jacobian"),
        ("off", "one temperature"),
        ("off", "factor 2"),
        ("stays", "det left out"),
        ("stays", "jacobian"),
        ("stays", "fixman"),
        ("travels", "det left out"),
        ("travels", "weighed as if s stayed"),
    ],
)
def test_a_broken_swap_is_caught(hot_and_cold, setting, broken):
    Pairs(hot_and_cold, setting, broken).verdict().assert_wrong()


def test_impossible_states():
    """A new state with π = 0 is refused, an old one is left; nothing is decided by inf - inf."""
    inf = np.inf
    ratio = swap_log_ratio([0.0, -inf, -inf, 1.0], [0.0] * 4, [-inf, 0.0, -inf, 1.0], [0.0] * 4, [0.5] * 4, [0.0] * 4)
    assert ratio.tolist() == [-inf, inf, -inf, 0.5]
    for bad in (np.nan, inf):
        with pytest.raises(ValueError, match="finite"):
            swap_log_ratio(bad, 0.0, 0.0, 0.0, 0.0, 0.0)
        with pytest.raises(ValueError, match="finite"):
            swap_log_ratio(0.0, 0.0, 0.0, 0.0, bad, 0.0)
    with pytest.raises(ValueError, match="finite"):
        swap_log_ratio(0.0, 0.0, 0.0, 0.0, -inf, 0.0)
