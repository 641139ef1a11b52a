"""`sample` and `reverse_kl`: the numbers are formula A's, and what cannot be exact is refused."""

import logging
import math

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.errors import ArtifactError, EnergyError, InputError

import openmm  # isort: skip
from openmm import unit  # isort: skip

KT = 300.0 * unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoules_per_mole / unit.kelvin)
PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def plain_energies(context, positions):
    energies = []
    for x in positions:
        context.setPositions(x)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    return np.array(energies)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_weights_are_formula_a(dipeptide, make_context, make_sampler, platform):
    sampler = make_sampler(make_context(platform=platform), platform=platform)
    ensemble = sampler.sample(40)
    assert ensemble.positions.shape == (40, 22, 3) and ensemble.label == "exact" and ensemble.n_nonfinite == 0
    for array in (ensemble.positions, ensemble.reduced_potentials, ensemble.log_q, ensemble.log_weights):
        assert array.dtype == np.float64
    u = plain_energies(make_context(platform="Reference"), ensemble.positions) / KT
    y, s = dipeptide.flow.to_internal(ensemble.positions)
    log_q = dipeptide.flow.log_prob(y).detach().numpy()
    volume = dipeptide.flow.coordinates.log_volume(y, s).numpy()
    # The CPU platform sums in single precision: its energies carry ~1e-5 of the largest terms.
    tolerance = 1e-6 if platform == "Reference" else 5e-3
    np.testing.assert_allclose(ensemble.reduced_potentials, u, atol=tolerance)
    np.testing.assert_allclose(ensemble.log_q, log_q, atol=2e-4)  # the networks are float32
    np.testing.assert_allclose(ensemble.log_weights, -u + volume - log_q, atol=tolerance + 2e-4)


def test_same_seed_same_samples_and_nothing_else_is_touched(make_context, make_sampler):
    context = make_context()
    before = context.getState(positions=True, velocities=True)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = make_sampler(context, seed=4).sample(20)
    assert torch.equal(torch.rand(3), expected)
    second = make_sampler(seed=4).sample(20)
    other = make_sampler(seed=5).sample(20)
    np.testing.assert_array_equal(first.log_weights, second.log_weights)
    assert not np.array_equal(first.log_weights, other.log_weights)
    after = context.getState(positions=True, velocities=True)
    assert np.array_equal(before.getPositions(asNumpy=True)._value, after.getPositions(asNumpy=True)._value)
    assert np.array_equal(before.getVelocities(asNumpy=True)._value, after.getVelocities(asNumpy=True)._value)


def test_chunks_do_not_show(make_sampler, monkeypatch):
    sampler = make_sampler()
    monkeypatch.setattr("openmm_bg.sampler.CHUNK", 64)
    ensemble = sampler.sample(150)
    assert ensemble.n == 150 and np.isfinite(ensemble.log_weights).all()
    assert len(np.unique(ensemble.log_q)) == 150
    assert sampler.statistics["n_energies"] >= 150


def test_another_temperature_is_exact_and_noted(dipeptide, make_context, make_sampler, caplog):
    with caplog.at_level(logging.INFO, logger="openmm_bg.sampler"):
        hot = make_sampler(make_context(temperature=400.0), seed=9)
    assert sum("400 K" in r.message for r in caplog.records) == 1
    cold = make_sampler(seed=9)
    a, b = hot.sample(30), cold.sample(30)
    np.testing.assert_array_equal(a.positions, b.positions)
    shift = b.reduced_potentials * (1.0 - 300.0 / 400.0)
    np.testing.assert_allclose(a.log_weights - b.log_weights, shift, atol=1e-6)


def test_temperature_of_the_integrator_or_the_argument(make_context, make_sampler):
    assert make_sampler().temperature == 300.0
    assert make_sampler(temperature=350 * unit.kelvin).temperature == 350.0
    verlet = make_context(integrator=openmm.VerletIntegrator(0.001))
    with pytest.raises(InputError, match="VerletIntegrator has no temperature"):
        make_sampler(verlet)
    assert make_sampler(verlet, temperature=300.0).temperature == 300.0
    for bad in (0.0, -300.0, math.nan):
        with pytest.raises(InputError, match="temperature"):
            make_sampler(temperature=bad)


@pytest.mark.parametrize("n", [0, -3])
def test_no_samples_no_steps(make_sampler, n):
    sampler = make_sampler()
    for call in (sampler.sample, sampler.step, sampler.reverse_kl):
        with pytest.raises(InputError, match=f"at least 1, got {n}"):
            call(n)
    with pytest.raises(InputError, match="n_proposals must be at least 1"):
        make_sampler(n_proposals=n)


def test_bad_frames_weigh_nothing(make_sampler, monkeypatch):
    sampler = make_sampler()
    genuine = sampler.pool.evaluate_on_device

    def spoiled(positions, forces=True):
        energies, found = genuine(positions, forces=forces)
        energies[::4] = torch.inf
        return energies, found

    monkeypatch.setattr(sampler, "_require_invariance", lambda: None)
    monkeypatch.setattr(sampler.pool, "evaluate_on_device", spoiled)
    ensemble = sampler.sample(16)
    assert np.isneginf(ensemble.log_weights[::4]).all() and ensemble.n_nonfinite == 4
    assert np.isfinite(np.delete(ensemble.log_weights, np.arange(0, 16, 4))).all()
    assert np.isposinf(ensemble.reduced_potentials[::4]).all()


# ---------------------------------------------------------------- gradients


def test_reverse_kl_value_and_gradient(dipeptide, make_sampler, tmp_path):
    """The gradient is a finite difference's along itself: the forces reach the parameters with the right sign."""
    flow = bg.load(_copy(dipeptide, tmp_path))
    value = make_sampler(flow=flow, seed=2).reverse_kl(64)
    value.backward()
    ensemble = make_sampler(flow=flow, seed=2).sample(64)
    assert float(value.detach()) == pytest.approx(-float(ensemble.log_weights.mean()), abs=1e-6)
    gradients = [p.grad.clone() for p in flow.parameters()]
    assert sum(float((g**2).sum()) for g in gradients) > 0
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    values = []
    step = 2e-4
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(flow.parameters(), gradients, strict=True):
                p += sign * step * g / norm
        values.append(float(make_sampler(flow=flow, seed=2).reverse_kl(64).detach()))
        with torch.no_grad():
            for p, g in zip(flow.parameters(), gradients, strict=True):
                p -= sign * step * g / norm
    # Central difference: error O(step²), 4e-3 at five times this step, plus rounding of the mean log q over 2·step.
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm, rel=0.01)


def _copy(dipeptide, tmp_path):
    path = tmp_path / "own.bg"
    dipeptide.flow.save(path)
    return path


# ---------------------------------------------------------------- Systems that do not fit


def changed(system, edit):
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    edit(copy)
    return copy


def test_a_barostat_refuses_samples_and_not_steps(dipeptide, make_context, make_sampler):
    def edit(system):
        system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
        force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
        force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
        force.setCutoffDistance(1.5)
        system.setDefaultPeriodicBoxVectors([4, 0, 0], [0, 4, 0], [0, 0, 4])

    sampler = make_sampler(make_context(changed(dipeptide.system, edit)))
    with pytest.raises(InputError, match="MonteCarloBarostat"):
        sampler.sample(4)
    assert sampler.step(2)["n_proposed"] == 2


def test_an_external_force_refuses_samples(dipeptide, make_context, make_sampler):
    def edit(system):
        force = openmm.CustomExternalForce("10*x^2")
        force.addParticle(0, [])
        system.addForce(force)

    with pytest.raises(InputError, match="where the molecule stands"):
        make_sampler(make_context(changed(dipeptide.system, edit))).sample(4)


def test_periodic_images_refuse_samples_and_not_steps(dipeptide, make_context, make_sampler):
    """However wide the box: at a strained frame the difference that turning makes hides behind rounding."""

    def edit(system):
        force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
        force.setNonbondedMethod(openmm.NonbondedForce.PME)
        force.setCutoffDistance(1.5)
        system.setDefaultPeriodicBoxVectors([20, 0, 0], [0, 20, 0], [0, 0, 20])

    sampler = make_sampler(make_context(changed(dipeptide.system, edit)))
    with pytest.raises(InputError, match="periodic images"):
        sampler.sample(4)
    assert sampler.step(2)["n_proposed"] == 2


def test_another_molecule_is_refused(dipeptide, make_context, make_sampler):
    def one_more(system):
        system.addParticle(1.0)
        next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce)).addParticle(0, 0.1, 0)

    x = np.concatenate((dipeptide.positions, [[3.0, 3.0, 3.0]]))
    with pytest.raises(InputError, match="23 particles, but the topology has 22"):
        make_sampler(make_context(changed(dipeptide.system, one_more), positions=x))

    def fewer_bonds(system):
        force = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
        a, b, length, k = force.getBondParameters(0)
        force.setBondParameters(0, a, (b + 7) % 22, length, k)

    with pytest.raises(InputError, match="another molecule or another atom order"):
        make_sampler(make_context(changed(dipeptide.system, fewer_bonds)))


def test_constraints_must_be_the_flows(dipeptide, make_context, make_sampler):
    def longer(system):
        a, b, d = system.getConstraintParameters(0)
        system.setConstraintParameters(0, a, b, d._value + 1e-5)

    with pytest.raises(InputError, match="another force field's lengths"):
        make_sampler(make_context(changed(dipeptide.system, longer)))

    def one_fewer(system):
        a, b, d = system.getConstraintParameters(0)
        system.removeConstraint(0)
        force = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
        force.addBond(a, b, d, 284512.0)

    sampler = make_sampler(make_context(changed(dipeptide.system, one_fewer)))
    with pytest.raises(InputError, match="1 bond lengths fixed"):
        sampler.sample(4)
    assert sampler.step(2)["n_proposed"] == 2

    def more(system):
        heavy = [b for b in dipeptide.topology.bonds() if "H" not in (b[0].element.symbol, b[1].element.symbol)]
        bond = heavy[0]
        system.addConstraint(bond[0].index, bond[1].index, 0.15)

    with pytest.raises(InputError, match="not one between a hydrogen and a heavy atom"):
        make_sampler(make_context(changed(dipeptide.system, more)))


def test_masses_come_from_the_system_at_hand(dipeptide, make_context, make_sampler):
    def heavier(system):
        for i, atom in enumerate(dipeptide.topology.atoms()):
            if atom.element.symbol == "H":
                system.setParticleMass(i, 3.0)

    heavy = make_sampler(make_context(changed(dipeptide.system, heavier)), seed=6).sample(200)
    plain = make_sampler(seed=6).sample(200)
    np.testing.assert_array_equal(heavy.positions, plain.positions)
    difference = heavy.log_weights - plain.log_weights
    assert difference.std() > 1e-3  # Fixman's term depends on masses and conformation


def test_positions_must_be_there(dipeptide, make_context, make_sampler):
    x = np.array(dipeptide.positions)
    x[0, 0] = np.nan
    with pytest.raises((InputError, EnergyError), match=r"positions|energy"):
        make_sampler(make_context(positions=x))
    context = openmm.Context(
        dipeptide.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    with pytest.raises(InputError, match="positions"):
        make_sampler(context, temperature=300.0)


def test_an_unusable_device_falls_back_with_a_note(make_sampler, caplog):
    device = "cuda" if not torch.cuda.is_available() else "cuda:99"
    with caplog.at_level(logging.WARNING, logger="openmm_bg.sampler"):
        sampler = make_sampler(device=device)
    assert sampler.device.type == "cpu" and "flow runs on the CPU" in caplog.text


def test_a_path_serves_as_well_as_a_flow(dipeptide, make_sampler, tmp_path):
    path = _copy(dipeptide, tmp_path)
    assert make_sampler(flow=str(path)).sample(3).n == 3
    with pytest.raises(ArtifactError, match="no flow at"):
        make_sampler(flow=tmp_path / "absent.bg")


def test_force_parameters_that_changed_are_followed(dipeptide, make_context, make_sampler):
    context = make_context()
    sampler = make_sampler(context, seed=3)
    before = sampler.sample(10)
    force = next(f for f in context.getSystem().getForces() if isinstance(f, openmm.NonbondedForce))
    for i in range(force.getNumParticles()):
        charge, sigma, epsilon = force.getParticleParameters(i)
        force.setParticleParameters(i, 0.5 * charge, sigma, epsilon)
    force.updateParametersInContext(context)
    after = make_sampler(context, seed=3).sample(10)
    again = sampler.sample(10)  # the pool of the first sampler must have noticed
    assert not np.allclose(after.reduced_potentials, before.reduced_potentials, atol=1e-3)
    u = plain_energies(context, again.positions) / KT
    np.testing.assert_allclose(again.reduced_potentials, u, atol=1e-6)


def test_slips_of_type_are_one_sentence(dipeptide, make_context, make_sampler):
    sampler = make_sampler()
    for call in (sampler.sample, sampler.step, sampler.reverse_kl):
        for n in (1e3, 2.5, "7", True):
            with pytest.raises(InputError, match="must be a whole number"):
                call(n)
    with pytest.raises(InputError, match="seed must be a whole number"):
        make_sampler(seed=-1)
    with pytest.raises(InputError, match=r"simulation\.context.*got a System"):
        bg.BoltzmannGeneratorSampler(dipeptide.flow, dipeptide.system)


def test_a_refused_system_is_one_sentence(dipeptide):
    from openmm_bg.energy import make_context as make

    def edit(system):
        system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))

    with pytest.raises(InputError, match="cannot make a Context of the System: A barostat"):
        make(changed(dipeptide.system, edit))
