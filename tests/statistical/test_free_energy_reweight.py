"""One flow's samples in several states of alanine dipeptide: `reweight`, `at_temperature` against sampling there."""

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg as bg
from openmm_bg import free_energy
from openmm_bg.errors import InputError
from openmm_bg.simulate import TorsionBias

import openmm  # isort: skip

PHI = (4, 6, 8, 14)
N = 400


@pytest.fixture(scope="module")
def molecule():
    return bg.load_alanine_dipeptide()


def copy_of(system):
    return openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))


def sampler_of(molecule, system=None, temperature=300.0, seed=3):
    context = openmm.Context(
        system or molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(molecule.positions)
    return bg.BoltzmannGeneratorSampler(
        molecule.flow, context, temperature, seed=seed, platform="Reference", n_workers=1
    )


@pytest.fixture(scope="module")
def ensemble(molecule):
    with sampler_of(molecule) as sampler:
        return sampler.sample(N)


def test_another_system_is_as_if_drawn_for_it(molecule, ensemble):
    """A sampler of the other System with the same seed draws the same samples: weights must agree."""
    system = copy_of(molecule.system)
    well = TorsionBias(PHI, centre=1.1, sharpness=3.0, depth=8.0)
    system.addForce(well.force())
    with sampler_of(molecule, system, 350.0) as direct:
        expected = direct.sample(N)
    with sampler_of(molecule, system, 350.0, seed=4) as sampler:
        found = free_energy.reweight(ensemble, sampler)
        spent = sampler.statistics["n_energies"]
    np.testing.assert_array_equal(found.log_q, expected.log_q)
    np.testing.assert_allclose(found.log_weights, expected.log_weights, atol=1e-8)
    np.testing.assert_allclose(found.reduced_potentials, expected.reduced_potentials, atol=1e-8)
    assert N <= spent <= N + 10
    # and it is another state: the same weights as before would not do
    assert np.abs(found.log_weights - ensemble.log_weights).max() > 0.1
    result = free_energy.difference(ensemble, found)
    assert result.method == "common samples"
    w = np.exp(ensemble.log_weights - ensemble.log_weights.max())
    by_hand = -np.log(np.sum(w * np.exp(ensemble.reduced_potentials - found.reduced_potentials)) / w.sum())
    assert result.delta_f == pytest.approx(by_hand)


def test_another_temperature_is_as_if_drawn_for_it(molecule, ensemble):
    with sampler_of(molecule, temperature=400.0) as direct:
        expected = direct.sample(N)
    found = free_energy.at_temperature(ensemble, 300.0, 400.0)
    np.testing.assert_allclose(found.log_weights, expected.log_weights, atol=1e-8)
    with sampler_of(molecule, temperature=400.0, seed=4) as sampler:
        again = free_energy.reweight(ensemble, sampler)
    np.testing.assert_allclose(again.log_weights, found.log_weights, atol=1e-8)


def test_samples_of_weight_zero_keep_it(molecule, ensemble):
    positions = ensemble.positions.copy()
    positions[0] = np.nan
    log_w = ensemble.log_weights.copy()
    log_w[0] = -np.inf
    cut = bg.Ensemble(positions, ensemble.reduced_potentials, ensemble.log_q, log_w, 1)
    with sampler_of(molecule, temperature=400.0, seed=4) as sampler:
        found = free_energy.reweight(cut, sampler)
    assert found.log_weights[0] == -np.inf and found.n_nonfinite == 1
    assert np.isfinite(found.log_weights[1:]).all()


def test_other_masses_are_refused(molecule, ensemble):
    """With constraints Φ depends on masses: -log Z of both would differ by momenta that nobody has counted."""
    system = copy_of(molecule.system)
    for i, atom in enumerate(molecule.topology.atoms()):
        if atom.element.symbol == "H":
            system.setParticleMass(i, 3.0)
    with sampler_of(molecule, system) as sampler, pytest.raises(InputError, match="masses, constraints"):
        free_energy.reweight(ensemble, sampler)
    with sampler_of(molecule, system) as sampler:  # the same seed: the same samples, weighed with these masses
        other = sampler.sample(N)
    with pytest.raises(InputError, match="different masses, constraints"):
        free_energy.difference(ensemble, other)


def test_what_means_nothing_is_refused(molecule, ensemble):
    system = copy_of(molecule.system)
    wall = openmm.CustomExternalForce("10*x^2")
    wall.addParticle(3, [])
    system.addForce(wall)
    with sampler_of(molecule, system) as sampler, pytest.raises(InputError, match="where the molecule stands"):
        free_energy.reweight(ensemble, sampler)
    fewer = bg.Ensemble(ensemble.positions[:, :-1], ensemble.reduced_potentials, ensemble.log_q, ensemble.log_weights)
    nothing = bg.Ensemble(ensemble.positions, ensemble.reduced_potentials, ensemble.log_q, np.full(ensemble.n, -np.inf))
    with sampler_of(molecule) as sampler:
        with pytest.raises(InputError, match="21 atoms"):
            free_energy.reweight(fewer, sampler)
        with pytest.raises(InputError, match="All weights"):
            free_energy.reweight(nothing, sampler)
