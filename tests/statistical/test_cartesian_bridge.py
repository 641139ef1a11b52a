"""Formulas G and H where everything moves, in OpenMM: a bent molecule with a light centre whose marginals are known.

A-B-A with masses 4/1/4: y is the angle θ, s are both lengths; with constraints s is gone and det Z matters. The flow is
a Gaussian of θ with a Gaussian g(r|θ) whose mean follows θ, so that h(s_0|y')/h(s_0|y_0) is no constant. Chains of G
start from exact samples and end as independent ones.
"""

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg import free_energy, weights
from openmm_bg.errors import InputError
from openmm_bg.moves import bridge
from openmm_bg.moves.bridge import CartesianBridge
from openmm_bg.rules import annealing, metropolis

import openmm  # isort: skip

KT = 8.31446261815324e-3 * 300.0
R0, T0, S0 = 0.15, 1.75, 0.30  # the flow: θ ~ N(1.75, 0.3²), of which (0, π) holds all but 1e-6
SIGMA, FOLLOW = 0.010, 0.03  # g: r ~ N(R0 + FOLLOW cos θ, SIGMA²)
SIGMA_T, FOLLOW_T = 0.009, 0.02  # the target
SCHEDULE, SUDDEN = [0.0, 0.2, 0.5, 1.0], [0.0, 1.0]
EDGES = {
    "theta": np.array([0.0, 1.5, 1.7, 1.85, 2.0, 2.15, 2.35, np.pi]),
    "r": np.array([0.0, 0.133, 0.138, 0.143, 0.148, 0.155, 1.0]),
}
N_H, N_G, N_BROKEN = 2500, 2500, 1200
#: Errors that take more samples to show.
N_SUBTLE = {"no test": 2500, "kinetic energy": 6000, "no down leg": 2000}


def target_u(theta):
    return 5.0 * (theta - 2.0) ** 2


def mean_t(theta):
    return R0 + FOLLOW_T * np.cos(theta)


def fixman(theta):
    return 0.5 * np.log(1.25**2 - np.cos(theta) ** 2)


class Molecule:
    """System, base force and exact draws; `broken` leaves a term of the base out, or doubles the potential."""

    def __init__(self, constrained, broken=None):
        self.constrained = constrained
        system = openmm.System()
        for mass in (4.0, 1.0, 4.0):
            system.addParticle(mass)
        gauss = f"0.5*((theta - {T0})/{S0})^2 + {np.log(S0 * np.sqrt(2 * np.pi))}"
        volume = "0" if broken == "jacobian" else "2*log(a) + 2*log(b) + log(sin(theta))"
        target = "5*(theta - 2)^2"
        if constrained:
            system.addConstraint(0, 1, R0)
            system.addConstraint(1, 2, R0)
            if broken != "fixman":
                volume += f" + 0.5*log({1.25**2} - cos(theta)^2)"
        else:
            norm = 2 * np.log(SIGMA * np.sqrt(2 * np.pi))
            if broken != "log g":
                gauss += f" + 0.5*((a - m)/{SIGMA})^2 + 0.5*((b - m)/{SIGMA})^2 + {norm}"
            target += f" + 0.5*((a - n)/{SIGMA_T})^2 + 0.5*((b - n)/{SIGMA_T})^2"
        where = (
            f"; m = {R0} + {FOLLOW}*cos(theta); n = {R0} + {FOLLOW_T}*cos(theta)"
            "; a = distance(p1, p2); b = distance(p2, p3); theta = angle(p1, p2, p3)"
        )

        def force(expression):
            found = openmm.CustomCompoundBondForce(3, f"{KT}*({expression}){where}")
            found.addBond([0, 1, 2], [])
            return found

        factor = 2 if broken == "factor 2" else 1
        system.addForce(force(f"{factor}*({target})"))
        system.addForce(openmm.CMMotionRemover())  # not to be taken along
        self.system, self.base = system, force(f"{gauss} + {volume}")

    def bridge(self, timestep, platform=None):
        properties = {"Threads": "1"} if platform == "CPU" else {}
        return CartesianBridge(
            self.system, self.base, 300.0, timestep=timestep, platform=platform, properties=properties
        )

    # -------- coordinates and exact draws

    @staticmethod
    def positions(theta, r):
        zero = np.zeros_like(theta)
        atoms = [
            np.stack([r[:, 0], zero, zero], 1),
            np.zeros((len(theta), 3)),
            np.stack([r[:, 1] * np.cos(theta), r[:, 1] * np.sin(theta), zero], 1),
        ]
        return np.stack(atoms, 1).reshape(len(theta), 9)

    @staticmethod
    def internal(x):
        x = x.reshape(-1, 3, 3)
        one, two = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
        r = np.stack([np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1)], 1)
        return np.arccos((one * two).sum(1) / r.prod(1)), r

    def draw_flow(self, n, rng):
        theta = T0 + S0 * rng.standard_normal(n)
        r = np.full((n, 2), R0)
        if not self.constrained:
            r = R0 + FOLLOW * np.cos(theta)[:, None] + SIGMA * rng.standard_normal((n, 2))
        return self.positions(theta, r)

    def theta_density(self, theta):
        """Marginal, unnormalised: its integral over θ is Z."""
        density = np.exp(-target_u(theta)) * np.sin(theta)
        if self.constrained:
            return density * R0**4 * np.exp(fixman(theta))
        return density * (np.sqrt(2 * np.pi) * SIGMA_T * (mean_t(theta) ** 2 + SIGMA_T**2)) ** 2

    def reference(self):
        """log Z, and the bins' probabilities by name."""
        theta = (np.arange(200_000) + 0.5) * np.pi / 200_000
        density = self.theta_density(theta)
        z = density.mean() * np.pi
        shares = {"theta": np.histogram(theta, EDGES["theta"], weights=density)[0] / density.sum()}
        if not self.constrained:
            coarse = theta[::200]
            r = np.linspace(0.08, 0.22, 4001)
            by_r = r**2 * np.exp(-0.5 * ((r[None] - mean_t(coarse)[:, None]) / SIGMA_T) ** 2)
            by_r = (by_r / by_r.sum(1, keepdims=True) * density[::200, None]).sum(0)
            shares["r"] = np.histogram(r, EDGES["r"], weights=by_r)[0] / by_r.sum()
        return np.log(z), shares

    def draw_target(self, n, rng):
        grid = (np.arange(20_000) + 0.5) * np.pi / 20_000
        total = np.cumsum(self.theta_density(grid))
        theta = np.interp(rng.random(n), total / total[-1], grid)
        r = np.full((n, 2), R0)
        todo = np.ones((n, 2), dtype=bool)
        while not self.constrained and todo.any():
            trial = mean_t(theta)[:, None] + SIGMA_T * rng.standard_normal((n, 2))
            good = todo & (rng.random((n, 2)) < (trial / 0.25) ** 2)
            r[good] = trial[good]
            todo &= ~good
        return self.positions(theta, r)

    def compare(self, toy, title, x, log_w=None):
        """Verdict on weighted or unweighted positions [n, 9]."""
        theta, r = self.internal(x)
        log_z, shares = self.reference()
        verdict = toy.Verdict(title, len(x))
        for name, p in shares.items():
            indicator = toy.one_hot(theta if name == "theta" else r[:, 0], EDGES[name])
            if log_w is None:
                verdict.histogram(name, indicator.mean(0), np.sqrt(p * (1 - p) / len(x)), p)
            else:
                verdict.histogram(name, *weights.expectation(indicator, log_w), p)
        if log_w is not None:
            estimate = free_energy.one_sided(log_w)
            verdict.number("log Z", -estimate.delta_f, estimate.error, log_z)
        return verdict.show()


# ---------------------------------------------------------------------------------------------- formula H


def check_annealing(toy, monkeypatch, constrained, broken=None):
    molecule, rng = Molecule(constrained, broken), np.random.default_rng(51)
    n = N_SUBTLE.get(broken, N_BROKEN) if broken else N_H
    if broken == "no test":  # unadjusted dynamics: observables may look right, log Z does not

        def always(state, proposal, rng, log_ratio=None):
            return metropolis.metropolis_step(state, proposal, rng, log_ratio=np.zeros(len(log_ratio)))

        monkeypatch.setattr(bridge, "metropolis_step", always)
    on = molecule.bridge(0.007 if broken == "no test" else 0.003)
    x = molecule.draw_flow(n, rng)
    state = metropolis.State(x, on.log_w(x))
    kernel = on.hmc_kernel(n_leapfrog=6)
    end, log_w, info = annealing.up_leg(state, on.log_w, kernel, SCHEDULE, rng)
    print(f"acceptance {info.acceptance_rate:.3f}, ESS {weights.effective_sample_size(log_w):.3f}")
    assert info.acceptance_rate > 0.5
    if broken is None:
        assert weights.effective_sample_size(log_w) > weights.effective_sample_size(state.log_w)
    return molecule.compare(toy, f"H, constrained {constrained}, broken={broken}", end.value, log_w)


@pytest.mark.statistical
@pytest.mark.parametrize("constrained", [False, True])
def test_annealing(toy, monkeypatch, constrained):
    check_annealing(toy, monkeypatch, constrained).assert_right()


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("constrained", "broken"),
    [
        (False, "jacobian"),
        (False, "log g"),
        (False, "no test"),
        (False, "factor 2"),
        (True, "fixman"),
        (True, "jacobian"),
    ],
)
def test_broken_annealing_is_caught(toy, monkeypatch, constrained, broken):
    check_annealing(toy, monkeypatch, constrained, broken).assert_wrong()


# ---------------------------------------------------------------------------------------------- formula G


def check_switching(toy, monkeypatch, constrained, metropolised, broken=None, schedule=SCHEDULE):
    molecule, rng = Molecule(constrained, broken), np.random.default_rng(52)
    n = N_SUBTLE.get(broken, N_BROKEN) if broken else N_G
    on = molecule.bridge(0.003)
    if broken == "kinetic energy":  # the potentials alone
        monkeypatch.setattr(on, "_kinetic", lambda: 0.0)

    def leg(down):
        def walk(x):
            if metropolised:
                run = annealing.down_leg if down else annealing.up_leg
                state = metropolis.State(x, on.log_w(x))
                end, work, _ = run(state, on.log_w, on.hmc_kernel(5), schedule, rng)
                value = end.value
            else:
                value, work = on.verlet_leg(x, schedule, 5, rng, down=down)
            if down and broken == "no down leg":  # a constant in its place; zero would accept nothing at all
                work = np.full_like(work, molecule.reference()[0])
            return value, work

        return walk

    def refresh(x):
        theta, r = molecule.internal(x)
        new = T0 + S0 * rng.standard_normal(len(x))
        new = np.where((new > 0) & (new < np.pi), new, T0)  # once in 1e6 draws

        def log_h(angle):
            return (-0.5 * ((r - R0 - FOLLOW * np.cos(angle)[:, None]) / SIGMA) ** 2).sum(1)

        ratio = np.zeros(len(x)) if constrained or broken == "h left out" else log_h(new) - log_h(theta)
        return molecule.positions(new, r), ratio

    state = metropolis.State(molecule.draw_target(n, rng), np.zeros(n))
    total = None
    for _ in range(2):
        state, info = annealing.moving_candidate_move(state, leg(True), refresh, leg(False), rng)
        total = info if total is None else total + info
    print(f"acceptance {total.acceptance_rate:.3f}")
    assert total.acceptance_rate > 0.1
    title = f"G, constrained {constrained}, {'HMC' if metropolised else 'Verlet'}, broken={broken}"
    return molecule.compare(toy, title, state.value)


@pytest.mark.statistical
@pytest.mark.parametrize(("constrained", "metropolised"), [(False, False), (True, False), (False, True)])
def test_switching(toy, monkeypatch, constrained, metropolised):
    check_switching(toy, monkeypatch, constrained, metropolised).assert_right()


@pytest.mark.statistical
@pytest.mark.parametrize("metropolised", [False, True])
def test_the_down_leg_of_a_sudden_switch(toy, monkeypatch, metropolised):
    """The faster the switch, the more the works scatter, and the more a lost down leg shows."""
    check_switching(toy, monkeypatch, False, metropolised, schedule=SUDDEN).assert_right()
    check_switching(toy, monkeypatch, False, metropolised, "no down leg", schedule=SUDDEN).assert_wrong()


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("constrained", "metropolised", "broken"),
    [
        (False, False, "h left out"),
        (False, False, "factor 2"),
        (False, False, "kinetic energy"),
        (True, False, "factor 2"),
    ],
)
def test_broken_switching_is_caught(toy, monkeypatch, constrained, metropolised, broken):
    check_switching(toy, monkeypatch, constrained, metropolised, broken).assert_wrong()


# ---------------------------------------------------------------------------------------------- mechanics


PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_runs_the_same_bridge(platform, constrained):
    """A leg up and its reversal cancel: positions return, and log W up and down are each other's."""
    molecule, rng = Molecule(constrained), np.random.default_rng(53)
    try:
        on = molecule.bridge(0.002, platform)
    except InputError as error:
        pytest.skip(str(error))
    x = molecule.draw_flow(3, rng)
    reference = Molecule(constrained).bridge(0.002)
    single = platform not in ("Reference", "CPU")
    np.testing.assert_allclose(on.log_w(x), reference.log_w(x), atol=1e-2 if single else 1e-4)
    for row in x:
        velocities = []
        genuine = on._start

        def start(row, rng, genuine=genuine, velocities=velocities):
            found = genuine(row, rng)
            if velocities:  # the second leg starts with the first one's last velocities, turned round
                on.context.setVelocities(-velocities[0])
                return found[0], found[1], on._kinetic()
            return found

        on._start = start
        end, up = on.verlet_leg(row[None], SCHEDULE, 5, rng)
        velocities.append(on.context.getState(velocities=True).getVelocities(asNumpy=True)._value)
        back, down = on.verlet_leg(end, SCHEDULE, 5, rng, down=True)
        on._start = genuine
        assert np.abs(end - row).max() > 1e-3
        np.testing.assert_allclose(back[0], row, atol=1e-4 if single else 1e-6)
        assert up[0] == pytest.approx(down[0], abs=0.05 if single else 1e-3)
        if constrained:
            np.testing.assert_allclose(molecule.internal(end)[1], R0, rtol=1e-5)


def test_forbidden_states():
    """Where the base is zero nobody goes, whatever λ; a bad start leaves, a lost trajectory is rejected."""
    molecule, rng = Molecule(False), np.random.default_rng(54)
    wall = openmm.CustomCompoundBondForce(3, "-log(step(1.9 - angle(p1, p2, p3)))")
    wall.addBond([0, 1, 2], [])
    on = CartesianBridge(molecule.system, wall, 300.0, timestep=0.003)
    x = molecule.positions(np.array([1.8, 2.2]), np.full((2, 2), R0))
    assert np.isfinite(on.log_w(x))[0] and np.isneginf(on.log_w(x))[1]
    state = metropolis.State(x[:1], on.log_w(x[:1]))
    for _ in range(40):
        state, _ = on.hmc_kernel(5)(state, 1.0, on.log_w, rng)
    assert molecule.internal(state.value)[0][0] < 1.9
    assert np.isposinf(on.verlet_leg(x[1:], SUDDEN, 2, rng, down=True)[1][0])
    assert np.isneginf(on.verlet_leg(x[1:], SUDDEN, 2, rng)[1][0])
    wild = Molecule(False).bridge(1e3)
    start = metropolis.State(x[:1], wild.log_w(x[:1]))
    state, info = wild.hmc_kernel(20)(start, 0.5, wild.log_w, rng)
    assert info.n_accepted == 0 and np.array_equal(state.value, x[:1])
    assert np.isneginf(wild.verlet_leg(x[:1], SUDDEN, 20, rng)[1][0])


def test_the_users_system_stays_as_it_is():
    molecule = Molecule(False)
    before = openmm.XmlSerializer.serialize(molecule.system)
    on = molecule.bridge(0.001)
    assert openmm.XmlSerializer.serialize(molecule.system) == before
    kinds = [type(f).__name__ for f in on.context.getSystem().getForces()]
    assert "CMMotionRemover" not in kinds and len(kinds) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep": 0.0}, "time step must be"),
        ({"timestep": float("inf")}, "time step must be"),
        ({"timestep": "fast"}, "time step must be"),
        ({"timestep": 0.001, "platform": "Abacus"}, "platform Abacus"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Molecule(False).bridge(**options)


def test_counts_and_schedules_are_checked():
    on, rng = Molecule(False).bridge(0.001), np.random.default_rng(0)
    x = Molecule(False).draw_flow(1, rng)
    with pytest.raises(InputError, match="n_leapfrog"):
        on.hmc_kernel(0)
    with pytest.raises(InputError, match="n_steps"):
        on.hmc_kernel(5, 0)
    with pytest.raises(InputError, match="n_verlet"):
        on.verlet_leg(x, SCHEDULE, 0, rng)
    with pytest.raises(InputError, match="schedule"):
        on.verlet_leg(x, [0.0, 0.5], 1, rng)
