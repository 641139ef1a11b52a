"""Moves on a Context, end to end: chains of a small molecule agree with importance weights of its flow (formula A).

Five atoms, two constrained lengths, a light carrier that makes Φ matter, an untrained flow with disturbed parameters.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.moves.cartesian import CartesianNonequilibriumMove, anneal_cartesian
from openmm_bg.weights import expectation, log_mean_weight

import openmm  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
N_STEPS = 2400


@pytest.fixture(autouse=True)
def _no_profiling():
    """TorchScript's profiling executor would recompile for seconds in tests of a few frames."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = Path(__file__).parents[1] / "force" / "conftest.py"
    spec = importlib.util.spec_from_file_location("openmm_bg_test_small_for_moves", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.Small(tmp_path_factory.mktemp("moves"))
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    # Narrower than the data that the flow has its scales from, so that its weights are bounded: a good reference.
    bonds.addBond(0, 1, 0.150, 10000.0)
    bonds.addBond(1, 2, 0.161, 10000.0)
    for triple in ((0, 1, 2), (1, 2, 3), (1, 2, 4), (3, 2, 4)):
        angles.addAngle(*triple, 1.92, 90.0)
    turn = openmm.PeriodicTorsionForce()
    turn.addTorsion(0, 1, 2, 3, 1, 0.5 - np.pi, 14.0)
    for force in (bonds, angles, turn):
        found.system.addForce(force)
    found.flow = found.make("full", found.path, noise=0.05)
    found.reduced = found.make("reduced", found.path.with_name("reduced.bg"), noise=0.05, completed=True)
    return found


@pytest.fixture
def make_sampler(small):
    made = []

    def make(flow=None, seed=3):
        integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.001)
        integrator.setRandomNumberSeed(seed)
        context = openmm.Context(small.system, integrator, REFERENCE)
        context.setPositions(small.frames[0])
        made.append(
            bg.BoltzmannGeneratorSampler(flow or small.flow, context, seed=seed, platform="Reference", n_workers=1)
        )
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


def observables(small, x, u):
    """[n, 5]: energy, cos and sin of the torsion, both lengths."""
    y = small.flow.to_internal(x)[0].numpy()
    modelled = [c for c in small.flow.coordinates.coordinates if c.modelled]
    lengths = [k for k, c in enumerate(modelled) if c.kind == "length"]
    (turn,) = (k for k, c in enumerate(modelled) if c.kind == "dihedral")
    return np.stack([u, np.cos(y[:, turn]), np.sin(y[:, turn]), *(y[:, k] for k in lengths)], 1)


def deviation(small, sampler, move, n=N_STEPS, every=3):
    """Largest |z| of averages of a chain against those of weighted samples."""
    ensemble = sampler.sample(20_000)
    alive = np.isfinite(ensemble.log_weights)
    columns = observables(small, ensemble.positions[alive], ensemble.reduced_potentials[alive])
    expected, error = expectation(columns, ensemble.log_weights[alive])
    frames, energies = [], []
    for _ in range(n // every):
        move.step(every)
        state = sampler.context.getState(positions=True, energy=True)
        frames.append(state.getPositions(asNumpy=True)._value)
        energies.append(state.getPotentialEnergy()._value / sampler.target.kT)
    found = observables(small, np.array(frames), np.array(energies))
    noise = np.array([np.sqrt(statistical_inefficiency(c) * c.var() / len(c)) for c in found.T])
    z = np.abs(found.mean(0) - expected) / np.hypot(error, noise)
    print(f"{type(move).__name__}: z = {np.round(z, 1)}, n = {n}, {move.statistics}, ESS of A {ensemble.ess:.3f}")
    assert move.statistics["n_accepted"] > 0.1 * move.statistics["n_proposed"]
    return z.max()


@pytest.mark.statistical
def test_latent_moves_sample_the_force_field(small, make_sampler):
    sampler = make_sampler()
    move = bg.LatentMove(sampler, a=0.6, width=1.0)
    move.burn_in(100, acceptance=0.4)
    assert deviation(small, sampler, move) < 4.0


@pytest.mark.statistical
def test_latent_moves_that_forget_q_are_caught(small, make_sampler, monkeypatch):
    """Accepted by π alone, a proposal that is reversible for b samples π b in z: another ensemble."""
    sampler = make_sampler()
    weigh, stand = sampler.weigh, sampler.stand

    def stand_without():
        found = stand()
        log_q = float(sampler.flow.log_prob(found.y).detach()[0])
        return replace(found, log_w=found.log_w + log_q)

    monkeypatch.setattr(sampler, "weigh", lambda standing, y, log_q: weigh(standing, y, torch.zeros_like(log_q)))
    monkeypatch.setattr(sampler, "stand", stand_without)
    assert deviation(small, sampler, bg.LatentMove(sampler, a=0.6, width=1.0)) > 5.0


def test_a_completed_flow_pays_for_the_s_that_it_keeps(small, make_sampler):
    """The refresh of formula G: y' ~ q at s_0, for log g(s_0|y') - log g(s_0|y_0); or s' ~ g, for nothing."""
    flow = small.reduced
    sampler = make_sampler(flow)
    x = small.frames[:1].reshape(1, -1)
    y_0, s_0 = flow.to_internal(x.reshape(1, 5, 3))
    ratios = []
    for keep_s in (True, False):
        move = CartesianNonequilibriumMove(sampler, [0.0, 1.0], n_verlet=1, keep_s=keep_s)
        for _ in range(4):
            new, log_h = move._refresh(x)
            y, s = flow.to_internal(new.reshape(1, 5, 3))
            with torch.no_grad():
                g, g_0 = (flow.joint_log_prob(v, s_0) - flow.log_prob(v) for v in (y, y_0))
            if keep_s:
                np.testing.assert_allclose(s, s_0, atol=1e-9)
                assert log_h[0] == pytest.approx(float(g - g_0), abs=1e-4)
                ratios.append(log_h[0])
            else:
                assert log_h[0] == 0.0 and float((s - s_0).abs().max()) > 1e-3
            assert float((y - y_0).abs().max()) > 1e-3
    assert np.std(ratios) > 0.02  # what is paid is no constant
    # The bridge's base is the density of everything.
    volume = flow.coordinates.log_volume(y_0, s_0)
    with torch.no_grad():
        expected = float((volume - flow.joint_log_prob(y_0, s_0))[0])
    assert move._bridge.energies(x[0])[0] == pytest.approx(expected, abs=1e-4)
    assert move.step(2)["n_proposed"] == 2


@pytest.mark.statistical
def test_annealed_weights_of_a_completed_flow(small, make_sampler):
    """log Z by formula H in Cartesian coordinates against formula C of the same flow."""
    sampler = make_sampler(small.reduced)
    plain = log_mean_weight(sampler.sample(20_000).log_weights)
    ensemble, info = anneal_cartesian(sampler, 120, [0.0, 0.4, 1.0], timestep=0.001, n_leapfrog=3, seed=4)
    value, error = log_mean_weight(ensemble.log_weights)
    z = abs(value - plain[0]) / np.hypot(error, plain[1])
    print(f"H {value:.3f} +- {error:.3f}, C {plain[0]:.3f} +- {plain[1]:.3f}, z = {z:.1f}; {info}")
    assert z < 4.0 and info.acceptance_rate > 0.3
