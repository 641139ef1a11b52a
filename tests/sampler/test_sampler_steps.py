"""`step`: what moves, what stays bit for bit, and that MD with moves samples what MD samples."""

import copy

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import InputError
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.rules import metropolis
from openmm_bg.simulate import torsion_angle

import openmm  # isort: skip

PHI, PSI, OMEGA = (4, 6, 8, 14), (6, 8, 14, 16), (1, 4, 6, 8)


def snapshot(context):
    state = context.getState(positions=True, velocities=True)
    return state.getPositions(asNumpy=True)._value.copy(), state.getVelocities(asNumpy=True)._value.copy()


def bond_lengths(system, x):
    pairs = np.array([system.getConstraintParameters(k)[:2] for k in range(system.getNumConstraints())])
    return np.linalg.norm(x[pairs[:, 0]] - x[pairs[:, 1]], axis=-1)


@pytest.mark.parametrize("n_proposals", [1, 8])
def test_a_rejected_step_changes_nothing(make_context, make_sampler, monkeypatch, n_proposals):
    context = make_context()
    context.getIntegrator().step(10)
    sampler = make_sampler(context, n_proposals=n_proposals)
    genuine = sampler.pool.energies

    monkeypatch.setattr(sampler.pool, "energies", lambda positions: np.full_like(genuine(positions), np.inf))
    x, v = snapshot(context)
    report = sampler.step(5)
    after_x, after_v = snapshot(context)
    assert report["n_accepted"] == 0 and not report["accepted"] and report["longest_rejection_streak"] == 5
    assert np.array_equal(x, after_x) and np.array_equal(v, after_v)


@pytest.mark.parametrize("n_proposals", [1, 8])
def test_an_accepted_step_keeps_s_and_the_frame(dipeptide, make_context, make_sampler, n_proposals):
    context = make_context()
    context.getIntegrator().step(200)
    sampler = make_sampler(context, n_proposals=n_proposals)
    x, v = snapshot(context)
    report = sampler.step(20)
    moved, velocities = snapshot(context)
    assert report["accepted"] and report["n_accepted"] > 0 and report["n_proposed"] == 20
    assert report["n_energies"] == 20 * n_proposals + 1
    assert not np.allclose(moved, x) and not np.allclose(velocities, v)
    np.testing.assert_allclose(bond_lengths(dipeptide.system, moved), bond_lengths(dipeptide.system, x), atol=1e-10)
    a, b, c = dipeptide.flow.coordinates.zmatrix.seed
    np.testing.assert_allclose(moved[a], x[a], atol=1e-12)
    unit_before, unit_after = (p[b] - p[a] for p in (x, moved))
    np.testing.assert_allclose(
        unit_after / np.linalg.norm(unit_after), unit_before / np.linalg.norm(unit_before), atol=1e-10
    )
    normal_before, normal_after = (np.cross(p[b] - p[a], p[c] - p[b]) for p in (x, moved))
    np.testing.assert_allclose(
        normal_after / np.linalg.norm(normal_after), normal_before / np.linalg.norm(normal_before), atol=1e-9
    )
    masses = np.array([dipeptide.system.getParticleMass(i)._value for i in range(22)])
    np.testing.assert_allclose((masses[:, None] * velocities).sum(0), 0.0, atol=1e-9)  # CMMotionRemover
    for k in range(12):  # projected on the constraints
        i, j, _ = dipeptide.system.getConstraintParameters(k)
        assert abs(np.dot(moved[i] - moved[j], velocities[i] - velocities[j])) < 1e-4


def test_velocities_have_the_temperature(dipeptide, make_context, make_sampler):
    context = make_context()
    sampler = make_sampler(context)
    kinetic = []
    while len(kinetic) < 120:
        context.setVelocities(np.zeros((22, 3)))  # as if nobody had set any: they are drawn, else carried over
        if sampler.step(1)["accepted"]:
            kinetic.append(context.getState(energy=True).getKineticEnergy()._value)
    dof = 3 * 22 - 12 - 3
    expected = 0.5 * dof * 8.31446261815324e-3 * 300.0
    # Var of a χ² kinetic energy is (dof/2) kT², so the mean of n has this error; 5 of it is the tolerance.
    error = np.sqrt(0.5 * dof) * 8.31446261815324e-3 * 300.0 / np.sqrt(len(kinetic))
    assert abs(np.mean(kinetic) - expected) < 5 * error


def test_statistics_add_up(make_sampler):
    sampler = make_sampler()
    reports = [sampler.step(7) for _ in range(5)]
    statistics = sampler.statistics
    assert statistics["n_proposed"] == 35
    assert statistics["n_accepted"] == sum(r["n_accepted"] for r in reports) > 0
    assert statistics["n_energies"] >= sum(r["n_energies"] for r in reports) == 5 * 8
    assert statistics["longest_rejection_streak"] >= max(r["longest_rejection_streak"] for r in reports)


def test_a_state_outside_the_support_stays(dipeptide, make_context, make_sampler):
    """A cis amide has q = 0: no move may leave it, for none could come back."""
    y, s = dipeptide.flow.to_internal(dipeptide.positions)
    amide = next(
        k for k, c in enumerate([c for c in dipeptide.flow.coordinates.coordinates if c.modelled]) if c.kind == "amide"
    )
    y[0, amide] += np.pi
    cis = dipeptide.flow.coordinates.to_positions(y, s)[0].numpy()
    assert abs(torsion_angle(cis[None], OMEGA)[0]) < 0.5 * np.pi
    context = make_context(positions=cis)
    sampler = make_sampler(context)
    x, v = snapshot(context)
    for sampler.n_proposals in (1, 3):
        report = sampler.step(50)
        assert not report["inside"] and report["n_accepted"] == 0 and report["n_proposed"] == 50
        assert report["n_energies"] == 0  # what cannot be accepted is not evaluated
    assert np.array_equal(x, snapshot(context)[0]) and np.array_equal(v, snapshot(context)[1])


METHYLS = ((0, 2, 3), (11, 12, 13), (19, 20, 21))


@pytest.mark.parametrize("methyl", METHYLS)
@pytest.mark.parametrize("turns", [1, 2])
def test_every_labelling_of_a_methyl_group_moves(dipeptide, make_context, make_sampler, methyl, turns):
    """A cyclic permutation of identical hydrogens is the same molecule: q covers it and moves are accepted."""
    x = np.array(dipeptide.positions)
    x[list(methyl)] = x[list(np.roll(methyl, turns))]
    y, s = dipeptide.flow.to_internal(np.stack((dipeptide.positions, x)))
    assert bool(dipeptide.flow.coordinates.in_domain(y, s).all())
    log_q = dipeptide.flow.log_prob(y).detach().numpy()
    assert abs(log_q[1] - log_q[0]) < 5.0  # kT; the flow learned the symmetry from data, not exactly
    report = make_sampler(make_context(positions=x)).step(20)
    assert report["inside"] and report["n_accepted"] > 0


def test_a_mirrored_methyl_group_is_outside(dipeptide, make_context, make_sampler):
    x = np.array(dipeptide.positions)
    x[[11, 12]] = x[[12, 11]]
    report = make_sampler(make_context(positions=x)).step(5)
    assert not report["inside"] and report["n_accepted"] == 0


def test_nan_positions_are_refused_before_anything_moves(dipeptide, make_context, make_sampler):
    context = make_context()
    sampler = make_sampler(context)
    x = np.array(dipeptide.positions)
    x[5] = np.nan
    context.setPositions(x)
    with pytest.raises(ValueError, match=r"positions|energy"):
        sampler.step(1)


@pytest.mark.parametrize("n_proposals, rule", [(1, "independence_chain"), (3, "multiple_proposal_chain")])
def test_the_weights_of_a_step_are_the_formulas(dipeptide, make_context, make_sampler, monkeypatch, n_proposals, rule):
    """log w of the current state and of every proposal, recomputed from positions alone; and who is chosen moves."""
    monkeypatch.setattr("openmm_bg.sampler.CHUNK", 8)
    context = make_context()
    context.getIntegrator().step(100)
    sampler = make_sampler(context, n_proposals=n_proposals)
    calls, batches = [], []
    genuine_rule, genuine_energies = getattr(metropolis, rule), sampler.pool.energies

    def spy_rule(current, proposed, rng):
        index, info = genuine_rule(current, proposed, rng)
        calls.append((current, np.array(proposed), np.array(index)))
        return index, info

    def spy_energies(positions):
        energies = genuine_energies(positions)
        batches.append((torch.as_tensor(positions).numpy().copy(), energies))
        return energies

    monkeypatch.setattr(metropolis, rule, spy_rule)
    monkeypatch.setattr(sampler.pool, "energies", spy_energies)
    here, _ = snapshot(context)
    report = sampler.step(20)
    plain = make_context()
    kt = thermal_energy(300.0)

    def log_w(x):
        plain.setPositions(x)
        u = plain.getState(energy=True).getPotentialEnergy()._value / kt
        y, s = dipeptide.flow.to_internal(x)
        return float(-u + dipeptide.flow.coordinates.log_volume(y, s) - dipeptide.flow.log_prob(y).detach())

    assert len(batches) == len(calls) > 1
    for (current, proposed, index), (positions, _) in zip(calls, batches, strict=True):
        assert proposed.size == len(positions) == len(index) * n_proposals
        assert float(current) == pytest.approx(log_w(here), abs=1e-3)  # float32 networks
        for value, x in zip(proposed.reshape(-1), positions, strict=True):
            assert value == pytest.approx(log_w(x), abs=1e-3)
        if index[-1] >= 0:
            here = positions[index[-1]]
    assert report["n_proposed"] == 20 and np.array_equal(snapshot(context)[0], here)


def test_a_proposal_outside_the_domain_weighs_nothing(dipeptide, make_context, make_sampler, monkeypatch):
    """θ > π describes the same positions as another θ: decided before q → x, or it would be folded back in."""
    sampler = make_sampler(make_context())
    angle = next(k for k, c in enumerate(c for c in sampler.coordinates.coordinates if c.modelled) if c.kind == "angle")
    genuine = sampler._draw

    def folded(n):
        y, log_q = genuine(n)
        y[:, angle] = 2.0 * np.pi - y[:, angle]
        return y, log_q

    monkeypatch.setattr(sampler, "_draw", folded)
    assert sampler.step(30)["n_accepted"] == 0
    assert np.isneginf(sampler.sample(30).log_weights).all()


def test_constraints_and_masses_are_followed_after_reinitialize(dipeptide, make_context, make_sampler):
    context = make_context(openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(dipeptide.system)))
    sampler = make_sampler(context, seed=3)
    before = sampler.sample(50)
    system = context.getSystem()
    for i, atom in enumerate(dipeptide.topology.atoms()):
        if atom.element.symbol == "H":
            system.setParticleMass(i, 3.0)
    context.reinitialize(preserveState=True)
    fresh = make_sampler(context, seed=3).sample(50)
    again = make_sampler(seed=3)
    again.context, again.pool = context, sampler.pool
    heavy = again.sample(50)
    np.testing.assert_allclose(heavy.log_weights, fresh.log_weights, atol=1e-9)
    assert np.abs(heavy.log_weights - before.log_weights).max() > 1e-3
    a, b, d = system.getConstraintParameters(0)
    system.setConstraintParameters(0, a, b, d._value + 0.01)
    context.reinitialize(preserveState=True)
    with pytest.raises(ValueError, match="another force field's lengths"):
        sampler.sample(5)


def test_a_changed_temperature_of_the_integrator_is_followed(make_context, make_sampler):
    context = make_context()
    sampler = make_sampler(context)
    sampler.step(1)
    context.getIntegrator().setTemperature(450.0)
    sampler.step(1)
    assert sampler.temperature == 450.0
    fixed = make_sampler(context, temperature=320.0)
    fixed.step(1)
    assert fixed.temperature == 320.0


def test_an_integrator_that_leaves_out_forces_is_refused(dipeptide, make_context, make_sampler):
    """MD would sample U without them, and moves accept on U with them."""
    system = copy.deepcopy(dipeptide.system)
    for force in system.getForces():
        force.setForceGroup(3 if isinstance(force, openmm.PeriodicTorsionForce) else 0)
    remover = openmm.CMMotionRemover()
    remover.setForceGroup(5)
    system.addForce(remover)
    context = make_context(system)
    integrator = context.getIntegrator()
    integrator.setIntegrationForceGroups({0})
    with pytest.raises(ValueError, match=r"leaves out force group 3 \(a PeriodicTorsionForce\)"):
        make_sampler(context)
    integrator.setIntegrationForceGroups({0, 3})  # not that of the remover, which has no energy
    sampler = make_sampler(context)
    before = snapshot(context)
    integrator.setIntegrationForceGroups({0, 1, 5})
    for call in (sampler.step, sampler.sample, bg.LatentMove(sampler).step):
        with pytest.raises(ValueError, match="leaves out force group 3"):
            call(1)
    after = snapshot(context)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    integrator.setIntegrationForceGroups({0, 3})
    assert sampler.step(1)["n_proposed"] == 1


def run_chain(dipeptide, rounds, seed, moves=True, n_proposals=1, temperature=300.0):
    """φ, ψ and energy after each round of 40 MD steps at 300 K and one move whose target is at ``temperature``."""
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(dipeptide.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(dipeptide.positions)
    context.setVelocitiesToTemperature(300.0, seed)
    frames, energy = [], []
    integrator.step(2000)
    options = {"n_proposals": n_proposals, "seed": seed, "platform": "Reference", "n_workers": 1}
    with bg.BoltzmannGeneratorSampler(dipeptide.flow, context, temperature, **options) as sampler:
        for _ in range(rounds):
            integrator.step(40)
            if moves:
                sampler.step(1)
            state = context.getState(positions=True, energy=True)
            frames.append(state.getPositions(asNumpy=True)._value)
            energy.append(state.getPotentialEnergy()._value)
    positions = np.array(frames)
    return torsion_angle(positions, PHI), torsion_angle(positions, PSI), np.array(energy)


@pytest.fixture(scope="module")
def md_alone(dipeptide):
    return run_chain(dipeptide, 8000, seed=21, moves=False)


def mean_and_error(series):
    return series.mean(), series.std(ddof=1) * np.sqrt(statistical_inefficiency(series) / len(series))


def compare(a, b):
    """z-scores of conditional averages over the region φ < 0 that MD alone explores."""
    observables = {"psi > 0": lambda psi, u: psi > 0.0, "energy": lambda psi, u: u}
    scores = {}
    for name, value in observables.items():
        found = []
        for phi, psi, u in (a, b):
            inside = phi < 0.0
            found.append(mean_and_error(np.asarray(value(psi, u), dtype=float)[inside]))
        (m0, e0), (m1, e1) = found
        scores[name] = (m1 - m0) / np.hypot(e0, e1)
    return scores


@pytest.mark.statistical
@pytest.mark.slow
@pytest.mark.parametrize("n_proposals", [1, 4])
def test_md_and_md_with_moves_agree(dipeptide, md_alone, n_proposals):
    scores = compare(md_alone, run_chain(dipeptide, 1500, seed=22, n_proposals=n_proposals))
    print(scores)
    assert all(abs(z) < 4.0 for z in scores.values()), scores


@pytest.mark.statistical
@pytest.mark.slow
def test_moves_at_a_wrong_temperature_are_caught(dipeptide, md_alone):
    """The same comparison must fail where moves accept by kT ten percent too large: it can see such an error."""
    scores = compare(md_alone, run_chain(dipeptide, 1500, seed=22, temperature=330.0))
    print(scores)
    assert abs(scores["energy"]) > 5.0, scores


def test_positions_that_no_simulation_has(dipeptide, make_context, make_sampler):
    """They would be rejected for ever, and nobody would know why."""
    context = make_context()
    sampler = make_sampler(context)
    context.setPositions(10.0 * dipeptide.positions)
    with pytest.raises(InputError, match="nm"):
        sampler.step(1)
    hydrogen, carbon, _ = dipeptide.system.getConstraintParameters(0)
    stretched = dipeptide.positions.copy()
    stretched[hydrogen] += 0.1 * (stretched[hydrogen] - stretched[carbon])
    context.setPositions(stretched)
    with pytest.raises(InputError, match="applyConstraints"):
        sampler.step(1)
    context.applyConstraints(1e-6)
    sampler.step(1)
