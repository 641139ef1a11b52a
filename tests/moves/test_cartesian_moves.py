"""Formulas G and H with every coordinate moving, bound to a flow and a Context: alanine dipeptide."""

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.artifact import Flow
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.moves.cartesian import CartesianNonequilibriumMove, anneal_cartesian
from openmm_bg.rules import annealing

import openmm  # isort: skip

SCHEDULE = [0.0, 0.5, 1.0]


@pytest.fixture(autouse=True)
def _no_profiling():
    """TorchScript's profiling executor would recompile for seconds in tests of a few frames."""
    with torch.jit.optimized_execution(False):
        yield


def snapshot(context):
    state = context.getState(positions=True, velocities=True)
    return state.getPositions(asNumpy=True)._value.copy(), state.getVelocities(asNumpy=True)._value.copy()


PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_makes_moves(make_context, make_sampler, platform):
    context = make_context()
    try:
        move = CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=2, platform=platform)
    except InputError as error:  # compiled in, but no device for it
        pytest.skip(str(error))
    x, _ = snapshot(context)
    reference = CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=2, platform="Reference")
    row = x.reshape(1, -1)
    assert move._bridge.log_w(row)[0] == pytest.approx(reference._bridge.log_w(row)[0], abs=0.05)
    report = move.step(3)
    assert report["inside"] and report["n_accepted"] > 0


def test_the_bridge_has_flow_and_force_field_at_its_ends(dipeptide, make_context, make_sampler):
    """-log π_0 is -(log q - log J - Φ) with the System's masses, u the Context's energy: log w is formula A's."""
    system = openmm.XmlSerializer.clone(dipeptide.system)
    for atom in dipeptide.topology.atoms():
        if atom.element.symbol == "H":
            system.setParticleMass(atom.index, 3.0)
    context = make_context(system)
    sampler = make_sampler(context)
    move = CartesianNonequilibriumMove(sampler, SCHEDULE)
    ensemble = sampler.sample(4)
    flat = ensemble.positions.reshape(4, -1)
    np.testing.assert_allclose(move._bridge.log_w(flat), ensemble.log_weights, atol=2e-3)  # float32 networks
    y, s = dipeptide.flow.to_internal(ensemble.positions)
    volume = sampler.coordinates.log_volume(y, s).numpy()
    trained = dipeptide.flow.coordinates.log_volume(y, s).numpy()
    assert np.abs(volume - trained).min() > 0.1  # other masses, another Φ
    for row, log_q, expected in zip(flat, ensemble.log_q, volume, strict=True):
        u0, u = move._bridge.energies(row)
        assert u0 == pytest.approx(expected - log_q, abs=2e-3)
        context.setPositions(row.reshape(-1, 3))
        energy = context.getState(energy=True).getPotentialEnergy()._value
        assert u == pytest.approx(energy / thermal_energy(300.0), abs=1e-5)


@pytest.mark.parametrize("metropolised", [False, True])
def test_a_move_is_the_formula_and_changes_everything(dipeptide, make_context, make_sampler, monkeypatch, metropolised):
    context = make_context()
    sampler = make_sampler(context)
    x, v = snapshot(context)
    seen, genuine = [], annealing.moving_candidate_move

    def spy(current, down, refresh, up, rng):
        parts = {}

        def record(name, part):
            def run(argument):
                parts[name] = (argument, *part(argument))
                return parts[name][1:]

            return run

        state, info = genuine(current, record("down", down), record("refresh", refresh), record("up", up), rng)
        seen.append((current, parts, state, info))
        return state, info

    monkeypatch.setattr(annealing, "moving_candidate_move", spy)
    move = CartesianNonequilibriumMove(sampler, SCHEDULE, n_verlet=2, metropolised=metropolised)
    report = move.step(2)
    (first, parts, *_), (second, *_) = seen
    np.testing.assert_array_equal(first.value[0], x.reshape(-1))
    assert second is seen[0][2]
    # The refresh: another y, the same s and place, for which a `full` flow owes no ratio.
    y_0, s_0 = sampler.coordinates.to_internal(torch.from_numpy(parts["refresh"][0].reshape(1, 22, 3)))
    y, s = sampler.coordinates.to_internal(torch.from_numpy(parts["up"][0].reshape(1, 22, 3)))
    assert parts["refresh"][2][0] == 0.0 and float((y - y_0).abs().max()) > 0.1
    np.testing.assert_allclose(s, s_0, atol=1e-9)
    np.testing.assert_array_equal(parts["down"][1], parts["refresh"][0])
    assert np.isfinite(parts["down"][2]).all() and np.isfinite(parts["up"][2]).all()
    accepted = [info.n_accepted for *_, info in seen]
    assert report["n_accepted"] == sum(accepted) > 0 and report["accepted"]
    moved, velocities = snapshot(context)
    np.testing.assert_array_equal(moved.reshape(-1), seen[-1][2].value[0])
    assert not np.allclose(velocities, v)
    assert report["n_energies"] == move.info.n_energies + 2 and move.statistics["n_proposed"] == 2
    for k in range(dipeptide.system.getNumConstraints()):
        i, j, d = dipeptide.system.getConstraintParameters(k)
        assert np.linalg.norm(moved[i] - moved[j]) == pytest.approx(d._value, rel=1e-6)


def test_a_rejected_move_changes_nothing(make_context, make_sampler, monkeypatch):
    context = make_context()
    move = CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=1)
    genuine = move._up
    monkeypatch.setattr(move, "_up", lambda x: (genuine(x)[0], np.array([-np.inf])))
    x, v = snapshot(context)
    report = move.step(1)
    assert report["n_accepted"] == 0 and not report["accepted"] and report["inside"]
    assert np.array_equal(x, snapshot(context)[0]) and np.array_equal(v, snapshot(context)[1])


def test_a_state_outside_the_support_stays(dipeptide, make_context, make_sampler):
    x = np.array(dipeptide.positions)
    x[[11, 12]] = x[[12, 11]]  # a mirrored methyl group
    context = make_context(positions=x)
    report = CartesianNonequilibriumMove(make_sampler(context), SCHEDULE).step(2)
    assert not report["inside"] and report["n_accepted"] == 0
    np.testing.assert_array_equal(snapshot(context)[0], x)


def test_the_context_is_followed(dipeptide, make_context, make_sampler):
    """Temperature and force parameters of the Context are those of the bridge, too."""
    system = openmm.XmlSerializer.clone(dipeptide.system)
    context = make_context(system)
    move = CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=1)
    first = move._bridge
    move.step(1)
    assert move._bridge is first
    context.getIntegrator().setTemperature(330.0)
    move.step(1)
    assert move._bridge.kT == pytest.approx(thermal_energy(330.0)) and move._bridge is not first
    first = move._bridge
    bonds = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    own = next(f for f in context.getSystem().getForces() if isinstance(f, openmm.HarmonicBondForce))
    for force in {id(f): f for f in (bonds, own)}.values():
        i, j, r, k = force.getBondParameters(0)
        force.setBondParameters(0, i, j, r._value + 0.02, k)
        force.updateParametersInContext(context)
    move.step(1)
    assert move._bridge is not first
    first = move._bridge
    context.getSystem().setParticleMass(0, 3.0)
    context.reinitialize(preserveState=True)
    move.step(1)
    assert move._bridge is not first and move._bridge.context.getSystem().getParticleMass(0)._value == 3.0


def test_annealing_gives_formula_a_where_nothing_moves(make_context, make_sampler, monkeypatch):
    """With λ from 0 to 1 at once the weights are those of `sample`; a flow's draw without one weighs nothing."""
    context = make_context()
    x, v = snapshot(context)
    sampler = make_sampler(context, seed=9)
    genuine = sampler.sample

    def with_a_lost_one(n):
        ensemble = genuine(n)
        ensemble.log_weights[1], ensemble.positions[1] = -np.inf, np.nan
        drawn.append(ensemble)
        return ensemble

    drawn = []
    monkeypatch.setattr(sampler, "sample", with_a_lost_one)
    ensemble, info = anneal_cartesian(sampler, 4, [0.0, 1.0], n_leapfrog=1, seed=2)
    np.testing.assert_allclose(ensemble.log_weights, drawn[0].log_weights, atol=2e-3)
    assert np.isneginf(ensemble.log_weights[1]) and ensemble.n_nonfinite == 1 and ensemble.label == "exact"
    assert info.n_proposed == 3 and info.acceptance_rate > 0.5
    keep = [0, 2, 3]
    assert np.abs(ensemble.positions[keep] - drawn[0].positions[keep]).max() > 1e-5  # the kernel at λ = 1
    energies = sampler.pool.energies(ensemble.positions[keep]) / thermal_energy(300.0)
    np.testing.assert_allclose(ensemble.reduced_potentials[keep], energies, atol=1e-5)
    log_q = sampler.flow.log_prob_positions(ensemble.positions[keep]).numpy()
    np.testing.assert_allclose(ensemble.log_q[keep], log_q, atol=1e-3)
    assert np.array_equal(x, snapshot(context)[0]) and np.array_equal(v, snapshot(context)[1])


def incomplete(flow):
    """The flow, claiming to be a `reduced` one without a completion."""
    found = Flow(flow.density, flow.coordinates, flow.metadata)
    found._free = [0]
    return found


def test_mistakes_are_named(dipeptide, make_context, make_sampler, monkeypatch):
    sampler = make_sampler(make_context())
    for options, message in (
        ({"timestep": 0.0}, "time step must be"),
        ({"n_verlet": 0}, "n_verlet"),
        ({"platform": "Abacus"}, "Abacus"),
    ):
        with pytest.raises(InputError, match=message):
            CartesianNonequilibriumMove(sampler, SCHEDULE, **options)
    with pytest.raises(InputError, match="schedule"):
        CartesianNonequilibriumMove(sampler, [0.0, 0.9])
    with pytest.raises(InputError, match="number of walkers"):
        anneal_cartesian(sampler, 0, SCHEDULE)
    with pytest.raises(InputError, match="number of moves"):
        CartesianNonequilibriumMove(sampler, SCHEDULE).step(0)
    bare = make_sampler(make_context(), flow=incomplete(dipeptide.flow))
    for make in (lambda: CartesianNonequilibriumMove(bare, SCHEDULE), lambda: anneal_cartesian(bare, 3, SCHEDULE)):
        with pytest.raises(InputError, match="no completion, hence no density in Cartesian"):
            make()
    monkeypatch.setattr("openmm_bg.moves.cartesian._agrees", lambda *args: False)
    with pytest.raises(EnergyError, match="other energies than the sampler"):
        anneal_cartesian(sampler, 3, SCHEDULE)
    with pytest.raises(EnergyError, match="other energies than the sampler"):
        CartesianNonequilibriumMove(sampler, SCHEDULE).step(1)


def test_the_public_names():
    assert bg.CartesianNonequilibriumMove is CartesianNonequilibriumMove
