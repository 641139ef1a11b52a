"""The rule of formula G with s moving, on two numbers (y, s), 1e5 chains at once; every error is caught."""

import numpy as np
import pytest

from openmm_bg.rules import annealing, metropolis

N_RIGHT, N_BROKEN = 100_000, 60_000
SLOPE, SPREAD = 0.8, 0.6  # h(s|y) = N(0.8 y, 0.6²), q = N(0, 1)
STEPS, DT = 8, 0.25


def log_base(x):
    return -0.5 * x[:, 0] ** 2 - 0.5 * ((x[:, 1] - SLOPE * x[:, 0]) / SPREAD) ** 2


def log_target(x):
    y, s = x.T
    return -(y**2 - 1.0) * (y**2 - 1.5) - 0.4 * y - 0.5 * ((s - np.tanh(y)) / 0.5) ** 2


def slope(f, x):
    step = 1e-5 * np.eye(2)
    return np.stack([(f(x + d) - f(x - d)) / 2e-5 for d in step], 1)


def grid():
    y, s = ((np.arange(-400, 400) + 0.5) / 100.0 for _ in range(2))
    points = np.stack(np.meshgrid(y, s, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(log_target(points))
    return points, density / density.sum()


POINTS, SHARES = grid()
EDGES = {
    0: np.array([-9, -1.2, -0.8, -0.3, 0.3, 0.8, 1.2, 9.0]),
    1: np.array([-9, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1, 9.0]),
}


def check(toy, broken=None, keep_s=True):
    rng = np.random.default_rng(61)
    n = N_BROKEN if broken else N_RIGHT
    rows = rng.choice(len(SHARES), n, p=SHARES)
    x = POINTS[rows] + rng.uniform(-0.005, 0.005, (n, 2))

    def leg(down):
        def walk(x):
            v = rng.standard_normal(x.shape)
            first, lambdas = (log_target if down else log_base), np.arange(1, STEPS + 1) / STEPS
            start = first(x) - 0.5 * (v**2).sum(1)
            for lam in lambdas[::-1] if down and broken != "protocol not reversed" else lambdas:

                def force(x, lam=lam):
                    return (1 - lam) * slope(log_base, x) + lam * slope(log_target, x)

                v = v + 0.5 * DT * force(x)
                x = x + DT * v
                v = v + 0.5 * DT * force(x)
            end = (log_base if down else log_target)(x) - 0.5 * (v**2).sum(1)
            work = start - end if down else end - start
            if broken == "no down leg" and down:
                work = np.zeros_like(work)
            if broken == "kinetic energy":
                other = 0.5 * (v**2).sum(1)
                work = work + (-other if down else other)
            return x, work

        return walk

    def refresh(x):
        y = rng.standard_normal(n)
        if not keep_s:
            return np.stack([y, SLOPE * y + SPREAD * rng.standard_normal(n)], 1), np.zeros(n)

        def log_h(y):
            return -0.5 * ((x[:, 1] - SLOPE * y) / SPREAD) ** 2

        ratio = log_h(y) - log_h(x[:, 0])
        if broken == "h left out":
            ratio = np.zeros(n)
        return np.stack([y, x[:, 1]], 1), -ratio if broken == "h upside down" else ratio

    state, total = metropolis.State(x, np.zeros(n)), None
    for _ in range(3):
        state, info = annealing.moving_candidate_move(state, leg(True), refresh, leg(False), rng)
        total = info if total is None else total + info
    print(f"acceptance {total.acceptance_rate:.3f}")
    assert total.acceptance_rate > 0.1
    verdict = toy.Verdict(f"G moving s, keep_s={keep_s}, broken={broken}", n)
    for k, edges in EDGES.items():
        p = np.histogram(POINTS[:, k], edges, weights=SHARES)[0]
        # The edges of bins are edges of grid cells, so that only the curvature within a cell is lost.
        verdict.histogram("ys"[k], toy.one_hot(state.value[:, k], edges).mean(0), np.sqrt(p * (1 - p) / n), p)
    return verdict.show()


@pytest.mark.statistical
@pytest.mark.parametrize("keep_s", [True, False])
def test_moving_candidate_move(toy, keep_s):
    check(toy, keep_s=keep_s).assert_right()


@pytest.mark.statistical
@pytest.mark.parametrize(
    "broken", ["no down leg", "h left out", "h upside down", "kinetic energy", "protocol not reversed"]
)
def test_broken_moving_candidate_move_is_caught(toy, broken):
    check(toy, broken).assert_wrong()


def test_lost_legs_and_impossible_starts():
    """-inf up is rejected, +inf down stays, -inf down (a bad start) leaves, outside the domain is rejected."""
    x = np.arange(6.0)[:, None]
    down = np.array([0.0, np.inf, -np.inf, -np.inf, 0.0, 0.0])
    up = np.array([-np.inf, 5.0, -4.0, -np.inf, 5.0, 5.0])
    log_h = np.array([0.0, 0.0, 0.0, 0.0, -np.inf, 0.0])
    state = metropolis.State(x, np.array([0.0, 0.0, 0.0, 0.0, 0.0, np.inf]))
    rng = np.random.default_rng(0)
    with np.errstate(all="raise"):
        new, info = annealing.moving_candidate_move(
            state, lambda x: (x, down), lambda x: (x, log_h), lambda x: (x + 10, up), rng
        )
    np.testing.assert_array_equal(new.value[:, 0], [0, 1, 12, 3, 4, 5])
    assert info.n_accepted == 1 and np.isposinf(new.log_w[5])
