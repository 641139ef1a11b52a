"""Formula G on a Context, s frozen: both legs weigh what the formula says, at the Context's own s."""

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import InputError
from openmm_bg.rules import annealing, metropolis

SCHEDULE = [0.0, 0.4, 1.0]


@pytest.fixture(autouse=True)
def _no_profiling():
    """TorchScript's profiling executor would recompile for seconds in tests of a few frames."""
    with torch.jit.optimized_execution(False):
        yield


def snapshot(context):
    state = context.getState(positions=True, velocities=True)
    return state.getPositions(asNumpy=True)._value.copy(), state.getVelocities(asNumpy=True)._value.copy()


def test_both_legs_and_the_acceptance_are_the_formula(dipeptide, make_context, make_sampler, monkeypatch):
    context = make_context()
    context.getIntegrator().step(60)
    sampler = make_sampler(context)
    before, _ = snapshot(context)
    legs, decisions = [], []

    def record(name):
        genuine = getattr(annealing, name)

        def leg(state, log_w, *rest):
            visited = [state]

            def spy(x):
                value = log_w(x)
                visited.append(metropolis.State(np.array(x), value))
                return value

            end, work, info = genuine(state, spy, *rest)
            legs.append((name, state, visited, end, work))
            return end, work, info

        monkeypatch.setattr(annealing, name, leg)

    record("up_leg")
    record("down_leg")
    genuine = annealing.metropolis_step

    def decide(state, proposal, rng, log_ratio=None):
        new, info = genuine(state, proposal, rng, log_ratio=log_ratio)
        decisions.append((state, proposal, log_ratio, new))
        return new, info

    monkeypatch.setattr(annealing, "metropolis_step", decide)
    move = bg.NonequilibriumMove(sampler, SCHEDULE, a=0.2, width=0.2)
    n = 3
    report = move.step(n)
    plain, kt = make_context(), thermal_energy(300.0)
    _, s = dipeptide.flow.to_internal(before)

    def log_w(z):
        y, _ = dipeptide.flow.forward(torch.from_numpy(np.atleast_2d(z)))
        if not bool(dipeptide.flow.coordinates.in_domain(y, s)[0]):
            return -np.inf
        plain.setPositions(dipeptide.flow.coordinates.to_positions(y, s)[0].detach().numpy())
        u = plain.getState(energy=True).getPotentialEnergy()._value / kt
        volume = dipeptide.flow.coordinates.log_volume(y, s)
        return float(-u + volume.detach() - dipeptide.flow.log_prob(y).detach())

    assert [name for name, *_ in legs] == ["down_leg", "up_leg"] * n
    y0, _ = dipeptide.flow.to_internal(before)
    z0, _ = dipeptide.flow.inverse(y0)
    np.testing.assert_allclose(legs[0][1].value, z0.detach().numpy(), rtol=0.0, atol=1e-5)  # float32 networks
    for _, start, visited, _, _ in legs:
        for state in (start, *visited):
            assert float(state.log_w[0]) == pytest.approx(log_w(state.value), abs=2e-3, rel=1e-6)  # float32 networks
    # The decisions of the moves (those of the kernels have the power of λ in their ratio) use the two works.
    outer = [d for d in decisions if any(d[1] is leg[3] for leg in legs if leg[0] == "up_leg")]
    assert len(outer) == n
    for (state, _, log_ratio, new), down, up in zip(outer, legs[::2], legs[1::2], strict=True):
        assert float(log_ratio[0]) == pytest.approx(min(0.0, float(up[4][0] - down[4][0])))
        assert down[1].value is state.value or np.array_equal(down[1].value, state.value)
        assert np.array_equal(new.value, state.value) or np.array_equal(new.value, up[3].value)
    assert report["n_proposed"] == n == move.statistics["n_proposed"]
    # Both ends of each leg and one latent step at each of two λ, twice a move; and where the Context stands.
    assert report["n_energies"] == n * (2 + 2 * 2) + 1 and move.info.n_energies == n * 6
    after, _ = snapshot(context)
    if report["accepted"]:
        y_end, s_end = dipeptide.flow.to_internal(after)
        np.testing.assert_allclose(s_end, s, atol=1e-9)
        y_new = dipeptide.flow.forward(torch.from_numpy(outer[-1][3].value))[0].detach()
        assert float(torch.sin((y_end - y_new) / 2).abs().max()) < 1e-6
    else:
        np.testing.assert_array_equal(after, before)


def test_an_accepted_move_keeps_the_frame_and_the_constraints(dipeptide, make_context, make_sampler):
    context = make_context()
    x, v = snapshot(context)
    move = bg.NonequilibriumMove(make_sampler(context, seed=4), SCHEDULE)
    report = move.step(6)
    moved, velocities = snapshot(context)
    assert report["accepted"] and report["n_accepted"] > 0 and not np.allclose(v, velocities)
    a = dipeptide.flow.coordinates.zmatrix.seed[0]
    np.testing.assert_allclose(moved[a], x[a], atol=1e-12)
    for k in range(dipeptide.system.getNumConstraints()):
        i, j, _ = dipeptide.system.getConstraintParameters(k)
        assert np.linalg.norm(moved[i] - moved[j]) == pytest.approx(np.linalg.norm(x[i] - x[j]), abs=1e-10)
        assert abs(np.dot(moved[i] - moved[j], velocities[i] - velocities[j])) < 1e-4


def test_a_rejected_move_changes_nothing(make_context, make_sampler, monkeypatch):
    context = make_context()
    sampler = make_sampler(context)
    genuine = annealing.up_leg

    def worthless(*args):
        end, work, info = genuine(*args)
        return end, np.full_like(work, -np.inf), info

    monkeypatch.setattr(annealing, "up_leg", worthless)
    x, v = snapshot(context)
    report = bg.NonequilibriumMove(sampler, SCHEDULE).step(2)
    assert report["n_accepted"] == 0 and not report["accepted"] and report["inside"]
    assert np.array_equal(x, snapshot(context)[0]) and np.array_equal(v, snapshot(context)[1])


def test_a_state_outside_the_support_stays(dipeptide, make_context, make_sampler):
    x = np.array(dipeptide.positions)
    x[[11, 12]] = x[[12, 11]]  # a mirrored methyl group
    context = make_context(positions=x)
    report = bg.NonequilibriumMove(make_sampler(context), SCHEDULE).step(3)
    assert not report["inside"] and report["n_accepted"] == 0 and report["n_energies"] == 0
    np.testing.assert_array_equal(snapshot(context)[0], x)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ([0.0, 0.5], {}, "schedule"),
        ([0.0, 0.6, 0.5, 1.0], {}, "schedule"),
        ([0.0, 1.0], {"a": 0.0}, "0 < a <= 1"),
        ([0.0, 1.0], {"width": -1.0}, "width > 0"),
        ([0.0, 1.0], {"n_kernel_steps": 0}, "n_kernel_steps"),
    ],
)
def test_mistakes_are_named(make_context, make_sampler, schedule, options, message):
    with pytest.raises(InputError, match=message):
        bg.NonequilibriumMove(make_sampler(make_context()), schedule, **options)


def test_the_number_of_moves_is_checked(make_context, make_sampler):
    with pytest.raises(InputError, match="number of moves"):
        bg.NonequilibriumMove(make_sampler(make_context()), SCHEDULE).step(0)
