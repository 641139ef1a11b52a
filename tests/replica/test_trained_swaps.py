"""Learned swaps between two flows that were trained apart, each for its own temperature.

A chain of four atoms whose torsion has two wells with 5 kT between them at the lower temperature: its MD hardly ever
crosses there, and ordinary exchanges are switched off, so that what the cold state knows of the other well came through
swaps. Torsion and lengths are independent of everything else, and their marginals known in closed form.
"""

import random

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg import swaps
from openmm_bg.energy import BOLTZMANN
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.replica import FlowReplicaExchangeSampler
from openmm_bg.simulate import torsion_angle
from openmm_bg.swaps import FlowBijection

import openmm  # isort: skip
from openmm import app, unit  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
COLD, HOT = 300.0, 800.0
STIFFNESS, LENGTH = 20_000.0, 0.153
ITERATIONS = 400


def torsion_energy(phi):
    return 7.0 * np.cos(2.0 * phi) + 2.5 * np.sin(phi)


def make_chain():
    """(Topology, System, positions)."""
    topology = app.Topology()
    residue = topology.addResidue("BUT", topology.addChain())
    atoms = [topology.addAtom(f"C{k}", app.element.carbon, residue) for k in range(4)]
    system = openmm.System()
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for _ in range(4):
        system.addParticle(14.0)
    for k in range(3):
        topology.addBond(atoms[k], atoms[k + 1])
        bonds.addBond(k, k + 1, LENGTH, STIFFNESS)
    for k in range(2):
        angles.addAngle(k, k + 1, k + 2, 1.95, 300.0)
    torsion = openmm.CustomTorsionForce("7*cos(2*theta) + 2.5*sin(theta)")
    torsion.addTorsion(0, 1, 2, 3, [])
    for force in (bonds, angles, torsion):
        system.addForce(force)
    positions = np.array([[0.0, 0.0, 0.0], [0.153, 0.0, 0.0], [0.21, 0.142, 0.0], [0.21, 0.199, 0.142]])
    return topology, system, positions


def run_md(system, positions, temperature, n, seed):
    """Frames [n, 4, 3] 0.1 ps apart and their energies [n], kJ/mol."""
    integrator = openmm.LangevinMiddleIntegrator(temperature, 5.0, 0.002)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, REFERENCE)
    context.setPositions(positions)
    context.setVelocitiesToTemperature(temperature, seed)
    frames, energies = np.empty((n, 4, 3)), np.empty(n)
    for k in range(n):
        integrator.step(50)
        state = context.getState(positions=True, energy=True)
        frames[k] = state.getPositions(asNumpy=True)._value
        energies[k] = state.getPotentialEnergy()._value
    return frames, energies


@pytest.fixture(scope="module")
def trained():
    """(Topology, System, positions, flow of the cold state, flow of the hot one), both by `bg.train`."""
    topology, system, positions = make_chain()
    config = {
        "flow": {"n_backbone_blocks": 0, "n_joint_blocks": 4, "hidden": 16, "n_hidden": 1, "n_bins": 8},
        "batch_size": 256,
        "ema_decay": 0.98,
        "validate_every": 1000,
        "stages": [{"name": "nll", "losses": {"nll": 1.0}, "steps": 250, "learning_rate": 5e-3, "warmup_steps": 10}],
    }
    flows = []
    for temperature, seed in ((COLD, 1), (HOT, 2)):
        frames, energies = run_md(system, positions, HOT, 5000, seed)  # which crosses the barrier, as 300 K does not
        flows.append(
            bg.train(
                system,
                topology,
                frames,
                temperature,
                log_weights=energies / BOLTZMANN * (1.0 / HOT - 1.0 / temperature),
                config={**config, "seed": seed},
                progress=False,
                platform="Reference",
                n_workers=1,
            )
        )
    return topology, system, positions, *flows


def expected(temperature):
    """Population of φ > 0, mean cosine and mean squared deviation of a length."""
    kT = BOLTZMANN * temperature
    phi = np.linspace(-np.pi, np.pi, 20_001)[:-1]
    p = np.exp(-torsion_energy(phi) / kT)
    r = np.linspace(0.05, 0.30, 20_001)
    p_r = r**2 * np.exp(-0.5 * STIFFNESS * (r - LENGTH) ** 2 / kT)
    return {
        "right": p[phi > 0].sum() / p.sum(),
        "cosine": (p * np.cos(phi)).sum() / p.sum(),
        "width": (p_r * (r - LENGTH) ** 2).sum() / p_r.sum(),
    }


def scores(trained, seed):
    """z of both states' marginals, and the passages between the wells of the cold state."""
    topology, system, positions, cold, hot = trained
    random.seed(seed)
    integrator = openmm.LangevinMiddleIntegrator(COLD, 5.0, 0.002)
    integrator.setRandomNumberSeed(seed)
    simulation = app.Simulation(topology, system, integrator, REFERENCE)
    simulation.context.setPositions(positions)
    simulation.context.setVelocitiesToTemperature(COLD, seed)
    ladder = [{"temperature": COLD * unit.kelvin}, {"temperature": HOT * unit.kelvin}]
    options = {"flow": cold, "state_flows": {1: hot}, "flow_states": [], "swaps": [(1, 0)], "seed": seed}
    sampler = FlowReplicaExchangeSampler(ladder, simulation, 250, **options)
    sampler.exchangesPerIteration = 0
    sampler.simulate(30)
    frames = np.empty((2, ITERATIONS, 4, 3))

    def record(sampler):
        for replica, state in enumerate(sampler.replicaStateIndex):
            x = sampler.replicaConformation[replica].getPositions(asNumpy=True)._value
            frames[state, sampler.currentIteration - 31] = x

    sampler.reporters.append(record)
    sampler.simulate(ITERATIONS)
    z = {}
    for state, temperature in enumerate((COLD, HOT)):
        phi = torsion_angle(frames[state], (0, 1, 2, 3))
        length = np.linalg.norm(frames[state, :, 1] - frames[state, :, 0], axis=1)
        found = {"right": (phi > 0).astype(float), "cosine": np.cos(phi), "width": (length - LENGTH) ** 2}
        for name, mean in expected(temperature).items():
            series = found[name]
            error = series.std(ddof=1) * np.sqrt(statistical_inefficiency(series) / len(series))
            z[temperature, name] = (series.mean() - mean) / error
            print(f"{temperature} K {name}: {series.mean():.4f} ± {error:.4f}, exact {mean:.4f}")
    right = torsion_angle(frames[0], (0, 1, 2, 3)) > 0
    counts = sampler.swap_statistics[1, 0]
    print(f"{counts}, passages {np.count_nonzero(right[1:] != right[:-1])}, z {z}")
    return z, counts, np.count_nonzero(right[1:] != right[:-1])


def test_flows_that_were_trained_apart_share_a_latent_space(trained):
    """Their layouts, shifts and base widths differ, and f is a bijection all the same."""
    cold, hot = trained[3:]
    assert cold.coordinates.layout.scale != hot.coordinates.layout.scale
    bijection = FlowBijection(hot, cold)
    torch.manual_seed(1)
    y = hot.sample(200)[0]
    carried, det = bijection.to_b(y)
    back, det_back = bijection.to_a(carried)
    inside = cold.coordinates.in_domain(carried, cold.coordinates.reference_fixed.expand(len(y), -1))
    assert inside.float().mean() > 0.95
    torch.testing.assert_close(torch.cos(back - y), torch.ones_like(y), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(det_back, -det, rtol=0.0, atol=1e-3)


@pytest.mark.statistical
def test_swaps_of_trained_flows_sample_both_states(trained):
    z, counts, passages = scores(trained, seed=3)
    assert all(abs(value) < 4.0 for value in z.values()), z
    assert counts["n_accepted"] > 0.2 * counts["n_proposed"] and passages > 10


@pytest.mark.statistical
def test_swaps_that_are_not_weighed_are_caught(trained, monkeypatch):
    """The flows change places, which weighed swaps would hardly ever accept, and every swap is accepted."""
    topology, system, positions, cold, hot = trained
    monkeypatch.setattr(swaps, "swap_log_ratio", lambda *terms: np.array([np.inf]))
    z, _, _ = scores((topology, system, positions, hot, cold), seed=4)
    assert abs(z[COLD, "right"]) > 5.0, z
