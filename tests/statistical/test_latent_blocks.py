"""Block moves (formula F) on the toy: some latent dimensions redrawn or walked, the others kept; errors are caught.

As in the tests of the other moves, chains start from exact independent samples, so that they end as exact ones if and
only if the moves are right.
"""

import numpy as np
import pytest

from openmm_bg.rules import metropolis
from openmm_bg.rules.metropolis import State

pytestmark = pytest.mark.statistical

N_RIGHT, N_BROKEN = 150_000, 60_000
ROUNDS = 6
#: The toy's flow transforms each coordinate for itself; a shear ties φ and θ, so that a block moves the other y too.
SHEAR = 0.25


class Sheared:
    """The toy's flow with θ = θ_0(z_1) (1 + c cos φ): one latent dimension moves two coordinates, |det| has both."""

    def __init__(self, toy, n_dim):
        self.flow = toy.ToyFlow(n_dim=n_dim)
        self.circular, self.concentration = self.flow.circular, self.flow.concentration

    def _factor(self, y):
        return 1.0 + SHEAR * np.cos(y[..., 0])

    def forward(self, z):
        y, log_det = self.flow.forward(z)
        factor = self._factor(y)
        y[..., 1] *= factor
        return y, log_det + np.log(factor)

    def inverse(self, y):
        y = y.copy()
        factor = self._factor(y)
        y[..., 1] /= factor
        z, log_det = self.flow.inverse(y)
        return z, log_det + np.log(factor)

    def log_q(self, z, log_det):
        return self.flow.base_log_prob(z) - log_det


def check_blocks(toy, setting, width, broken=None):
    rng = np.random.default_rng(41)
    n = N_BROKEN if broken else N_RIGHT
    with_fixman = setting == "partial"
    dims = 2 if with_fixman else 3
    flow = Sheared(toy, dims)
    x = toy.draw_exact(n, rng, with_fixman=with_fixman)
    blocks = np.eye(dims, dtype=bool)

    def log_pi(y):
        value = toy.log_pi(*toy.full(y, x[:, 2]), with_fixman=with_fixman, omit=broken)
        return 2 * value if broken == "factor 2" else value

    def log_w(y, z, log_det):
        if broken == "det of the block alone":  # the shear's part, that of the other y, is forgotten
            log_det = flow.flow.forward(z)[1]
        if broken == "det left out":
            log_det = 0.0
        return log_pi(y) - (2 if broken == "factor 2" else 1) * flow.log_q(z, log_det)

    total = None
    for k in range(ROUNDS * dims):
        y = x[:, :dims]
        z, log_det = flow.inverse(y)
        proposed = metropolis.latent_proposal(
            z,
            rng,
            circular=flow.circular,
            concentration=flow.concentration * (broken != "uniform redraw"),
            fold=1,
            a=1.0 if np.isinf(width) else 0.6,
            width=width,
            chosen=blocks[k % dims],
        )
        new, new_det = flow.forward(proposed)
        state, info = metropolis.metropolis_step(
            State(y, log_w(y, z, log_det)), State(new, log_w(new, proposed, new_det)), rng
        )
        x[:, :dims] = state.value
        if with_fixman:
            x[:, 2] = toy.draw_r(x[:, 0], x[:, 1], rng)
        total = info if total is None else total + info
    print(f"acceptance {total.acceptance_rate:.3f}")
    assert total.acceptance_rate > 0.1
    ref = toy.reference(with_fixman=with_fixman)
    verdict = toy.Verdict(f"F in blocks, {setting}, width {width}, broken={broken}", n)
    for name, indicator in toy.bins(*x.T, ref).items():
        p = getattr(ref, name)
        verdict.histogram(name, indicator.mean(axis=0), np.sqrt(p * (1 - p) / n), p)
    return verdict.show()


@pytest.mark.parametrize("setting", ["off", "partial"])
@pytest.mark.parametrize("width", [1.0, np.inf], ids=["walked", "redrawn"])
def test_block_moves(toy, setting, width):
    check_blocks(toy, setting, width).assert_right()


@pytest.mark.parametrize(
    ("setting", "width", "broken"),
    [
        ("off", np.inf, "det left out"),
        ("partial", 1.0, "det left out"),
        ("off", np.inf, "det of the block alone"),
        ("partial", np.inf, "det of the block alone"),
        ("partial", np.inf, "uniform redraw"),
        ("off", np.inf, "jacobian"),
        ("partial", np.inf, "fixman"),
        ("partial", 1.0, "factor 2"),
    ],
)
def test_broken_block_moves_are_caught(toy, setting, width, broken):
    check_blocks(toy, setting, width, broken).assert_wrong()


@pytest.mark.parametrize("broken", [None, "sector forgotten", "drawn again"])
def test_the_edges_of_a_sector(broken):
    """π is flat within a sector of which q, a Gaussian, sticks out: rejected there, the chain stays flat."""
    rng, n, edge, scale = np.random.default_rng(42), 60_000, 1.0, 0.9
    y = rng.uniform(-edge, edge, n)

    def log_w(value):
        return np.where(np.abs(value) < edge, 0.5 * (value / scale) ** 2, -np.inf)

    def propose(value):
        z = value[:, None] / scale
        out = metropolis.latent_proposal(z, rng, circular=[False], concentration=[0.0], fold=1, a=0.7, width=1.0)
        return scale * out[:, 0]

    for _ in range(8):
        new = propose(y)
        while broken == "drawn again" and np.any(outside := np.abs(new) >= edge):
            new[outside] = propose(y)[outside]
        if broken == "sector forgotten":  # folded back inside, as the way through positions would do
            new = np.where(np.abs(new) >= edge, np.sign(new) * 2 * edge - new, new)
            new = np.clip(new, -edge * 0.999, edge * 0.999)
        state, _ = metropolis.metropolis_step(State(y[:, None], log_w(y)), State(new[:, None], log_w(new)), rng)
        y = state.value[:, 0]
    square = y**2
    z = abs(square.mean() - edge**2 / 3) / (square.std() / np.sqrt(n))
    print(f"sector edge, broken={broken}: z = {z:.1f}, n = {n}; shows at 5 sigma from n = {n * (5 / z) ** 2:.2g}")
    assert z < 4.0 if broken is None else z > 5.0


@pytest.mark.parametrize(("kappa_given", "fold_given", "right"), [(2.5, 3, True), (0.0, 3, False), (2.5, 1, False)])
def test_a_redrawn_rotor_keeps_its_base(kappa_given, fold_given, right):
    """Fresh draws of a threefold rotor follow exp(κ cos 3z) on all three branches; the other dimension stays."""
    rng, n, kappa = np.random.default_rng(43), 40_000, 2.5
    z = np.stack([(rng.vonmises(0.0, kappa, n) + 2 * np.pi * rng.integers(-1, 2, n)) / 3.0, rng.normal(size=n)], axis=1)
    new = metropolis.latent_proposal(
        z,
        rng,
        circular=[True, False],
        concentration=[kappa_given, 0.0],
        fold=[fold_given, 1],
        a=1.0,
        width=np.inf,
        chosen=[True, False],
    )
    np.testing.assert_array_equal(new[:, 1], z[:, 1])
    assert np.all((new[:, 0] >= -np.pi) & (new[:, 0] < np.pi))
    grid = np.linspace(-np.pi, np.pi, 4000, endpoint=False)
    mean = np.mean(np.cos(grid) * np.exp(kappa * np.cos(grid))) / np.i0(kappa)
    found = np.cos(3 * new[:, 0])
    score = abs(found.mean() - mean) / (found.std() / np.sqrt(n))
    branch = np.floor((new[:, 0] + np.pi) / (2 * np.pi / 3)).astype(int)
    shares = (np.bincount(branch, minlength=3) / n - 1 / 3) / np.sqrt(2 / 9 / n)
    score = max(score, np.abs(shares).max())
    print(f"kappa {kappa_given}, fold {fold_given}: z = {score:.1f}, n = {n}")
    assert score < 4.0 if right else score > 5.0
