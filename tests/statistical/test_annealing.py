"""Formulas G and H on a toy with known marginals and log Z; every deliberate error must be caught.

G starts every chain from an exact, independent sample of the target, as `test_exact_moves` does. Errors of the rules
themselves (which x the work is taken at, whose work W_down is) replace the leg that would be wrong; errors of a user
(another kernel, a term left out) come in by the front door.
"""

from itertools import pairwise

import numpy as np
import pytest

from openmm_bg import free_energy, weights
from openmm_bg.errors import InputError
from openmm_bg.moves import anneal
from openmm_bg.rules import annealing, metropolis

N_RIGHT = 100_000
N_BROKEN = 50_000
SCHEDULE = np.array([0.0, 0.1, 0.3, 0.6, 1.0])
ROUNDS = 3


class Setting:
    """Bridge of one setting of the toy in latent variables, with one term left out or doubled on purpose."""

    def __init__(self, toy, setting, broken, s):
        self.toy, self.setting, self.broken, self.s = toy, setting, broken, s
        self.flow = toy.ToyFlow(n_dim=3 if setting == "off" else 2)
        self.log_base, self.log_target = annealing.latent_densities(
            self.flow.forward, self.flow.base_log_prob, self.log_pi
        )

    def log_pi(self, y):
        full = self.toy.full(y, self.s)
        value = self.toy.log_pi(*full, with_fixman=self.setting != "off", omit=self.broken)
        return 2 * value if self.broken == "factor 2" else value

    def sample(self, n, rng):
        return self.flow.sample_base((n,), rng)

    def kernel(self, n_steps=1):
        kernel = annealing.latent_kernel(
            circular=self.flow.circular,
            concentration=self.flow.concentration * (self.broken != "plain walk"),
            a=0.6,
            width=1.0,
            n_steps=n_steps,
        )
        if self.broken == "kernel of the target":  # λ forgotten in the acceptance
            return lambda state, lam, log_w, rng: kernel(state, 1.0, log_w, rng)
        return kernel


def late_up_leg(state, log_w, kernel, schedule, rng):
    """Deliberate error: work at x_k, after the kernel."""
    work, total = 0.0, None
    for before, lam in pairwise(schedule):
        state, info = kernel(state, float(lam), log_w, rng)
        work = work + (lam - before) * state.log_w
        total = info if total is None else total + info
    return state, work, total


def late_down_leg(state, log_w, kernel, schedule, rng):
    """Deliberate error: work at x_k, before the reversed kernel."""
    work, total = 0.0, None
    for before, lam in zip(schedule[-2::-1], schedule[:0:-1], strict=True):
        work = work + (lam - before) * state.log_w
        state, info = kernel(state, float(lam), log_w, rng)
        total = info if total is None else total + info
    return state, work, total


# ---------------------------------------------------------------------------------------------- formula H


def check_annealing(toy, monkeypatch, setting, broken=None, schedule=SCHEDULE):
    n = N_BROKEN if broken else N_RIGHT
    bridge = Setting(toy, setting, broken, toy.S0)
    if broken == "work at x_k":
        monkeypatch.setattr(annealing, "up_leg", late_up_leg)
    if broken == "increments":
        monkeypatch.setattr(annealing, "check_schedule", np.asarray)
        schedule = schedule[:-1]
    z, log_w, info = annealing.annealed_importance_sampling(
        bridge.log_base, bridge.log_target, bridge.sample, bridge.kernel(), schedule, n, np.random.default_rng(31)
    )
    ref = toy.reference(with_fixman=setting == "on", r=toy.S0 if setting == "on" else None)
    verdict = toy.Verdict(f"H, {setting}, broken={broken}", n)
    for name, indicator in toy.bins(*toy.full(bridge.flow.forward(z)[0], toy.S0), ref).items():
        value, error = weights.expectation(indicator, log_w)
        verdict.histogram(name, value, error, getattr(ref, name))
    estimate = free_energy.one_sided(log_w)
    verdict.number("log Z", -estimate.delta_f, estimate.error, ref.log_z)
    # A kernel that never moves would turn H into A, which is right, and prove nothing.
    assert info.acceptance_rate > 0.1
    return verdict.show(), weights.effective_sample_size(log_w)


@pytest.mark.statistical
@pytest.mark.parametrize("setting", ["off", "on"])
def test_annealed_importance_sampling(toy, monkeypatch, setting):
    verdict, ess = check_annealing(toy, monkeypatch, setting)
    verdict.assert_right()
    plain, plain_ess = check_annealing(toy, monkeypatch, setting, schedule=[0.0, 1.0])
    plain.assert_right()
    print(f"ESS {ess:.3f}, of plain importance sampling {plain_ess:.3f}")
    assert ess > 1.1 * plain_ess


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("setting", "broken"),
    [
        ("off", "work at x_k"),
        ("on", "work at x_k"),
        ("on", "increments"),
        ("off", "plain walk"),
        ("on", "plain walk"),
        ("off", "kernel of the target"),
        ("off", "jacobian"),
        ("on", "fixman"),
        ("on", "factor 2"),
    ],
)
def test_broken_annealed_importance_sampling_is_caught(toy, monkeypatch, setting, broken):
    check_annealing(toy, monkeypatch, setting, broken)[0].assert_wrong()


# ---------------------------------------------------------------------------------------------- formula G


class StoredWork:
    """Deliberate error: W_down is the W_up of the last accepted candidate.

    That would be right in a chain that nothing else moves; here s moves between rounds, as it does under MD.
    """

    def __init__(self, monkeypatch):
        self.up_leg, self.down_leg = annealing.up_leg, annealing.down_leg
        self.kept = self.latest_up = self.latest_down = None
        monkeypatch.setattr(annealing, "up_leg", self.up)
        monkeypatch.setattr(annealing, "down_leg", self.down)

    def up(self, *args):
        state, self.latest_up, info = self.up_leg(*args)
        return state, self.latest_up, info

    def down(self, *args):
        state, work, info = self.down_leg(*args)
        self.latest_down = work if self.kept is None else self.kept
        return state, self.latest_down, info

    def after(self, moved):
        self.kept = np.where(moved, self.latest_up, self.latest_down)


def check_switching(toy, monkeypatch, setting, broken=None):
    """G in z, with r moved between rounds (partial) or nothing but z (off)."""
    rng = np.random.default_rng(32)
    n = N_BROKEN if broken else N_RIGHT
    x = toy.draw_exact(n, rng, with_fixman=setting == "partial")
    bridge = Setting(toy, setting, broken, x[:, 2])
    stored = StoredWork(monkeypatch) if broken == "stored work" else None
    if broken == "work at x_k":
        monkeypatch.setattr(annealing, "up_leg", late_up_leg)
        monkeypatch.setattr(annealing, "down_leg", late_down_leg)
    if broken in ("no down leg", "weight instead of a down leg"):
        true_leg, known = annealing.down_leg, broken != "no down leg"

        def other_work(state, *args):
            end, work, info = true_leg(state, *args)
            return end, state.log_w if known else np.zeros_like(work), info

        monkeypatch.setattr(annealing, "down_leg", other_work)
    total = None
    # A stored work does harm only once something else has moved the state: it needs rounds to show.
    for _ in range(4 * ROUNDS if stored else ROUNDS):
        z = bridge.flow.inverse(x[:, : bridge.flow.n_dim])[0]
        state, info = annealing.nonequilibrium_candidate_move(
            z, bridge.log_base, bridge.log_target, bridge.sample, bridge.kernel(), SCHEDULE, rng
        )
        if stored is not None:
            stored.after(np.any(state.value != z, axis=1))
        x[:, : bridge.flow.n_dim] = bridge.flow.forward(state.value)[0]
        if setting == "partial":
            x[:, 2] = bridge.s = toy.draw_r(x[:, 0], x[:, 1], rng)
        total = info if total is None else total + info
    assert total.acceptance_rate > 0.1  # a chain that never moves keeps its exact start and proves nothing
    print(f"acceptance {total.acceptance_rate:.3f} (expected {total.acceptance_probability:.3f})")
    ref = toy.reference(with_fixman=setting == "partial")
    verdict = toy.Verdict(f"G, {setting}, broken={broken}", n)
    for name, indicator in toy.bins(*x.T, ref).items():
        p = getattr(ref, name)
        verdict.histogram(name, indicator.mean(axis=0), np.sqrt(p * (1 - p) / n), p)
    return verdict.show(), total


@pytest.mark.statistical
@pytest.mark.parametrize("setting", ["off", "partial"])
def test_nonequilibrium_candidate_move(toy, monkeypatch, setting):
    verdict, info = check_switching(toy, monkeypatch, setting)
    verdict.assert_right()
    # one step in each kernel, both ends weighed: 2 + 2 · 4 energies per move
    assert info.n_energies == ROUNDS * N_RIGHT * (2 + 2 * (SCHEDULE.size - 1))


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("setting", "broken"),
    [
        ("off", "no down leg"),
        ("partial", "no down leg"),
        ("off", "weight instead of a down leg"),
        ("partial", "weight instead of a down leg"),
        ("partial", "stored work"),
        ("off", "work at x_k"),
        ("partial", "work at x_k"),
        ("off", "plain walk"),
        ("partial", "plain walk"),
        ("off", "kernel of the target"),
        ("off", "jacobian"),
        ("partial", "fixman"),
        ("partial", "factor 2"),
    ],
)
def test_broken_nonequilibrium_candidate_move_is_caught(toy, monkeypatch, setting, broken):
    check_switching(toy, monkeypatch, setting, broken)[0].assert_wrong()


# ------------------------------------------------------------------------------------------- the kernel's base


def check_fold(fold, n=40_000, kappa=1.5, true_fold=3):
    """A kernel with w = 1 keeps a base exp(κ cos 3z): mean cos 3z, and one branch in three after many steps."""
    rng = np.random.default_rng(33)
    v = rng.vonmises(0.0, kappa, n)
    z = (v + 2 * np.pi * rng.integers(true_fold, size=n)) / true_fold
    state = metropolis.State(np.mod(z + np.pi, 2 * np.pi)[:, None] - np.pi, np.zeros(n))
    kernel = annealing.latent_kernel(circular=[True], concentration=[kappa], fold=[fold], width=1.0, n_steps=10)
    start = state.value
    state, _ = kernel(state, 0.5, lambda z: np.zeros(len(z)), rng)
    assert np.mean(state.value != start) > 0.5 and np.all(np.abs(state.value) <= np.pi)
    exact = np.i0(kappa)
    grid = np.linspace(-np.pi, np.pi, 2000, endpoint=False)
    mean = np.mean(np.cos(grid) * np.exp(kappa * np.cos(grid))) / exact
    found = np.cos(true_fold * state.value[:, 0])
    branch_kept = np.mean(np.abs(np.mod(state.value - start + np.pi, 2 * np.pi) - np.pi) < np.pi / 3)
    return abs(found.mean() - mean) / (found.std() / np.sqrt(n)), branch_kept


@pytest.mark.statistical
def test_kernel_keeps_a_folded_base():
    z, branch_kept = check_fold(3)
    assert z < 4 and branch_kept < 0.95  # and it does change branches
    assert check_fold(1)[0] > 5


# ------------------------------------------------------------------------------------------- no sampling error


def gaussian_bridge(log_target=lambda x: -((x[:, 0] - 1) ** 2)):
    def log_base(x):
        return -0.5 * x[:, 0] ** 2 - 0.5 * np.log(2 * np.pi)

    def sample(n, rng):
        return rng.standard_normal((n, 1))

    return log_base, log_target, sample


KERNEL = annealing.latent_kernel(circular=[False], concentration=[0.0])


@pytest.mark.parametrize(
    "schedule",
    [[0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.99], [0.0, 0.7, 0.6, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0], [0.0, np.nan, 1.0]],
)
def test_a_schedule_that_does_not_add_up_is_refused(schedule):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="schedule"):
        annealing.annealed_importance_sampling(*gaussian_bridge(), KERNEL, schedule, 4, rng)
    with pytest.raises(InputError, match="schedule"):
        annealing.nonequilibrium_candidate_move(np.zeros((4, 1)), *gaussian_bridge(), KERNEL, schedule, rng)


def test_work_is_taken_where_the_formula_says():
    """A kernel that shifts x by one makes x_k = x_0 + k: the sum can be written down."""

    def shift(step):
        def kernel(state, lam, log_w, rng):
            x = state.value + step
            seen.append(lam)
            new = metropolis.State(x, log_w(x))
            return metropolis.metropolis_step(new, new, rng)

        return kernel

    def log_w(x):
        return 10.0 * x[:, 0]

    rng = np.random.default_rng(0)
    seen = []
    start = metropolis.State(np.array([[0.0], [7.0]]), np.array([0.0, 70.0]))
    end, work, _ = annealing.up_leg(start, log_w, shift(1.0), [0.0, 0.2, 0.5, 1.0], rng)
    assert seen == [0.2, 0.5, 1.0] and end.value[:, 0].tolist() == [3.0, 10.0]
    expected = 0.2 * 0 + 0.3 * 10 + 0.5 * 20
    np.testing.assert_allclose(work, [expected, expected + 70], rtol=0, atol=1e-12)
    seen = []
    # The same path walked down has the same work.
    back, work_down, _ = annealing.down_leg(end, log_w, shift(-1.0), [0.0, 0.2, 0.5, 1.0], rng)
    assert seen == [1.0, 0.5, 0.2]
    np.testing.assert_array_equal(back.value, start.value)
    np.testing.assert_allclose(work_down, work, rtol=0, atol=1e-12)


def test_forbidden_states_have_weight_zero_for_ever():
    """-inf, NaN and +inf of the target alike; nobody walks into them, and no NaN comes out."""

    def log_target(x):
        return np.select([x[:, 0] < -1, x[:, 0] > 1, np.abs(x[:, 0]) < 0.1], [-np.inf, np.nan, np.inf], 0.0)

    rng = np.random.default_rng(1)
    first = []
    log_base, _, draw = gaussian_bridge()

    def sample(n, rng):
        first.append(draw(n, rng))
        return first[-1]

    n = 4000
    x, log_w, info = annealing.annealed_importance_sampling(
        log_base, log_target, sample, KERNEL, [0.0, 0.01, 0.5, 1.0], n, rng
    )
    allowed = log_target(first[0]) == 0.0
    assert 0.2 < allowed.mean() < 0.8
    np.testing.assert_array_equal(log_w > -np.inf, allowed)
    assert not np.any(np.isnan(log_w))
    assert np.all(log_target(x[allowed]) == 0.0)
    assert info.n_energies == n * 4
    # All forbidden: still no exception, only weights of zero.
    _, log_w, _ = annealing.annealed_importance_sampling(
        log_base, lambda x: np.full(len(x), np.nan), sample, KERNEL, [0.0, 1.0], 5, rng
    )
    assert np.all(log_w == -np.inf)


def test_candidate_move_at_the_edges():
    """π = 0 is left, q = 0 stays, a rejection keeps its bits, a forbidden candidate is rejected."""
    rng = np.random.default_rng(2)

    def log_base(x):
        return np.where(np.abs(x[:, 0]) < 1, 0.0, -np.inf)

    def log_target(x):
        return np.where(x[:, 0] > 0.5, -np.inf, -40.0 * (x[:, 0] < 0))

    def sample(n, rng):
        return rng.uniform(-1, 1, (n, 1))

    kernel = annealing.reversible_kernel(lambda x, rng: rng.uniform(-1, 1, x.shape))
    x = np.repeat([[0.9], [1.7], [-3.0], [0.3]], 500, axis=0)
    x[:500, 0] = 0.9
    log_target_with_outside = lambda x: np.where(np.abs(x[:, 0]) > 1, 0.0, log_target(x))  # noqa: E731
    state, info = annealing.nonequilibrium_candidate_move(
        x, log_base, log_target_with_outside, sample, kernel, [0.0, 0.5, 1.0], rng
    )
    start, outside, good = x[:500], slice(500, 1500), slice(1500, 2000)
    assert np.mean(state.value[:500] != start) > 0.3
    np.testing.assert_array_equal(state.value[outside], x[outside])
    stayed = state.value[good] == x[good]
    assert 0.1 < stayed.mean() < 0.9
    assert not np.any((state.value > 0.5) & (state.value != x))
    assert info.n_proposed == 2000 and info.n_accepted == int(np.any(state.value != x, axis=1).sum())


def test_rows_keep_their_places():
    """Each row has an s of its own: the target must be shown all rows, in order, in both legs."""
    s = np.arange(50.0) * 100
    seen = []

    def log_target(x):
        seen.append(len(x))
        return -0.5 * (x[:, 0] - s / 1e4) ** 2

    log_base, _, sample = gaussian_bridge()
    annealing.nonequilibrium_candidate_move(
        np.zeros((50, 1)), log_base, log_target, sample, KERNEL, [0.0, 0.5, 1.0], np.random.default_rng(3)
    )
    assert set(seen) == {50} and len(seen) == 6


def test_mistakes_are_named():
    rng = np.random.default_rng(4)
    log_base, log_target, sample = gaussian_bridge()
    run = annealing.annealed_importance_sampling
    with pytest.raises(InputError, match="number of walkers"):
        run(log_base, log_target, sample, KERNEL, [0, 1], 0, rng)
    with pytest.raises(InputError, match="n_steps"):
        annealing.reversible_kernel(lambda x, rng: x, n_steps=0)
    with pytest.raises(InputError, match="fold"):
        annealing.latent_kernel(circular=[True], concentration=[0.0], fold=[1.5])
    with pytest.raises(InputError, match="do not belong together"):
        run(lambda x: np.full(len(x), -np.inf), log_target, sample, KERNEL, [0, 1], 3, rng)
    with pytest.raises(InputError, match="NaN"):
        run(lambda x: np.full(len(x), np.nan), log_target, sample, KERNEL, [0, 1], 3, rng)
    with pytest.raises(InputError, match="must return shape"):
        run(log_base, lambda x: x, sample, KERNEL, [0, 1], 3, rng)
    with pytest.raises(InputError, match="sample must return"):
        run(log_base, log_target, lambda n, rng: np.zeros(n), KERNEL, [0, 1], 3, rng)
    with pytest.raises(InputError, match="x must have shape"):
        annealing.nonequilibrium_candidate_move(np.zeros(3), log_base, log_target, sample, KERNEL, [0, 1], rng)
    with pytest.raises(InputError, match="0 < λ"):
        KERNEL(metropolis.State(np.zeros((1, 1)), np.zeros(1)), 0.0, lambda x: np.zeros(1), rng)


# ------------------------------------------------------------------------------------------- a sampler's molecule


@pytest.fixture(scope="module")
def dipeptide_sampler():
    import torch  # noqa: F401  (before openmm)

    import openmm_bg as bg

    import openmm  # isort: skip

    model = bg.load_alanine_dipeptide()
    context = openmm.Context(
        model.system,
        openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.002),
        openmm.Platform.getPlatformByName("Reference"),
    )
    context.setPositions(model.positions)
    with bg.BoltzmannGeneratorSampler(model.flow, context, seed=5, platform="Reference", n_workers=1) as sampler:
        yield sampler


@pytest.mark.statistical
def test_anneal_agrees_with_plain_weights_of_a_real_flow(dipeptide_sampler, monkeypatch):
    """log Z of alanine dipeptide by formulas H and A, from independent samples; a lost log-determinant is caught."""
    import torch

    sampler = dipeptide_sampler
    plain = weights.log_mean_weight(sampler.sample(600).log_weights)
    before, stream = sampler.context.getState(positions=True).getPositions(asNumpy=True)._value, torch.get_rng_state()
    ensemble, info = anneal(sampler, 150, np.linspace(0, 1, 5), seed=6)
    np.testing.assert_array_equal(sampler.context.getState(positions=True).getPositions(asNumpy=True)._value, before)
    assert torch.equal(torch.get_rng_state(), stream)
    assert ensemble.label == "exact" and ensemble.n == 150 and info.n_energies == 150 * 5
    assert info.acceptance_rate > 0.2
    # What the ensemble says of its last positions is what sampler and flow say of them.
    with torch.no_grad():
        log_q = sampler.flow.log_prob(sampler.flow.to_internal(ensemble.positions)[0]).numpy()
    np.testing.assert_allclose(ensemble.log_q, log_q, atol=1e-3)
    energies = sampler.pool.energies(ensemble.positions) / sampler.target.kT
    np.testing.assert_allclose(ensemble.reduced_potentials, energies, atol=1e-6)

    def deviation(found):
        value, error = weights.log_mean_weight(found.log_weights)
        return abs(value - plain[0]) / np.hypot(error, plain[1])

    right = deviation(ensemble)
    # What this binding alone could lose, whatever the quality of the flow: its volume change.
    forward = sampler.flow.forward
    monkeypatch.setattr(sampler.flow, "forward", lambda z: (forward(z)[0], torch.zeros(len(z), dtype=torch.float64)))
    wrong = deviation(anneal(sampler, 100, [0.0, 1.0], seed=7)[0])
    print(f"H against A: {right:.1f} sigma; without the flow's log-determinant {wrong:.1f} sigma")
    assert right < 4.0
    assert wrong > 5.0


def test_anneals_kernel_knows_the_base_of_a_real_flow(dipeptide_sampler):
    """`latent_kernel` is right for exp(κ cos nz) and N(0, 1) alone: the flow's base must be that, folds included."""
    layout, density = dipeptide_sampler.coordinates.layout, dipeptide_sampler.flow.density
    assert max(layout.fold) == 3 and max(k for k, n in zip(layout.concentration, layout.fold, strict=True) if n > 1) > 0
    z = density.sample_base(40)
    circles = np.array(layout.concentration) * np.cos(np.array(layout.fold) * z.numpy())
    expected = np.where(layout.circular, circles, -0.5 * z.numpy() ** 2).sum(1)
    assert np.ptp(density.base_log_prob(z).numpy() - expected) < 1e-9


def test_anneal_refuses_what_sample_refuses(dipeptide_sampler):
    with pytest.raises(InputError, match="number of walkers"):
        anneal(dipeptide_sampler, 0, [0, 1])
    with pytest.raises(InputError, match="schedule"):
        anneal(dipeptide_sampler, 2, [0, 0.5])

    import openmm_bg as bg

    import openmm  # isort: skip

    model = bg.load_alanine_dipeptide()
    system = openmm.XmlSerializer.clone(model.system)
    wall = openmm.CustomExternalForce("10*x^2")
    wall.addParticle(0)
    system.addForce(wall)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(model.positions)
    with (
        bg.BoltzmannGeneratorSampler(model.flow, context, 300.0, platform="Reference", n_workers=1) as sampler,
        pytest.raises(InputError, match="where the molecule stands"),
    ):
        anneal(sampler, 2, [0, 1])
