"""`FlowReplicaExchangeSampler`: what a replica carries after a move, what is weighed, and what is sampled."""

import copy
import random

import numpy as np
import pytest
import torch

from openmm_bg import proposals, swaps
from openmm_bg.energy import BOLTZMANN
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.replica import FlowReplicaExchangeSampler
from openmm_bg.simulate import torsion_angle

import openmm  # isort: skip
from openmm import app, unit  # isort: skip

PSI = (6, 8, 14, 16)
REFERENCE = openmm.Platform.getPlatformByName("Reference")
LADDER = [{"temperature": 300.0 * unit.kelvin}, {"temperature": 350.0 * unit.kelvin}]


@pytest.fixture
def make(dipeptide):
    """A sampler on the Reference platform, with a fixed stream for dynamics, moves and exchanges."""

    def build(states=None, *, system=None, md_steps=2, seed=1, integrator=None, **options):
        random.seed(seed)
        if integrator is None:
            integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
            integrator.setRandomNumberSeed(seed)
        system = dipeptide.system if system is None else system
        simulation = app.Simulation(dipeptide.topology, system, integrator, REFERENCE)
        simulation.context.setPositions(dipeptide.positions)
        simulation.context.setVelocitiesToTemperature(300.0, seed)
        flow = options.pop("flow", dipeptide.flow)
        states = LADDER if states is None else states
        return FlowReplicaExchangeSampler(states, simulation, md_steps, flow=flow, seed=seed, **options)

    return build


def arrays(state):
    return state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value


# -------------------------------------------------------------------- what a replica carries


@pytest.mark.parametrize("n_proposals", [1, 4])
def test_conformations_follow_accepted_moves_only(dipeptide, make, n_proposals):
    sampler = make(n_proposals=n_proposals)
    context, coordinates = sampler.simulation.context, dipeptide.flow.coordinates
    masses = np.array([dipeptide.system.getParticleMass(i)._value for i in range(22)])
    seen = {True: 0, False: 0}
    for _ in range(25):
        for index in (0, 1):
            app.ReplicaExchangeSampler.simulateReplica(sampler, index)  # MD alone
            after_md = sampler.replicaConformation[index]
            x, v = (np.array(a) for a in arrays(after_md))
            before = sampler.flow_statistics[index]["n_accepted"]
            sampler._move(index, index)
            accepted = sampler.flow_statistics[index]["n_accepted"] > before
            seen[accepted] += 1
            kept = sampler.replicaConformation[index]
            here, velocities = arrays(context.getState(positions=True, velocities=True))
            assert np.array_equal(arrays(kept)[0], here) and np.array_equal(arrays(kept)[1], velocities)
            if not accepted:
                assert kept is after_md and np.array_equal(here, x) and np.array_equal(velocities, v)
                continue
            assert not np.allclose(here, x) and not np.allclose(velocities, v)
            old, new = (coordinates.to_internal(torch.from_numpy(np.array(p))[None])[1] for p in (x, here))
            torch.testing.assert_close(new, old, rtol=0.0, atol=1e-10)
            np.testing.assert_allclose((masses[:, None] * velocities).sum(0), 0.0, atol=1e-9)
            assert kept.getStepCount() == after_md.getStepCount()
    assert min(seen.values()) >= 3  # both have been looked at


def test_an_integrator_that_leaves_out_forces_is_refused(dipeptide, make):
    system = copy.deepcopy(dipeptide.system)
    system.getForce(0).setForceGroup(3)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setIntegrationForceGroups({0})
    with pytest.raises(ValueError, match="leaves out force group 3"):
        make(system=system, integrator=integrator)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    sampler = make(system=system, integrator=integrator)
    sampler.simulate(1)
    integrator.setIntegrationForceGroups({0})
    with pytest.raises(ValueError, match="leaves out force group 3"):
        sampler.simulate(1)


def test_velocities_have_the_states_temperature(dipeptide, make):
    """At 300 and 400 K, whatever the integrator was left at."""
    sampler = make([{"temperature": 300.0}, {"temperature": 400.0}], n_proposals=8)
    kinetic = {0: [], 1: []}
    masses = np.array([dipeptide.system.getParticleMass(i)._value for i in range(22)])
    while min(len(found) for found in kinetic.values()) < 40:
        for index in (0, 1):
            before = sampler.flow_statistics[index]["n_accepted"]
            sampler.simulateReplica(index)
            if sampler.flow_statistics[index]["n_accepted"] > before:
                v = arrays(sampler.replicaConformation[index])[1]
                kinetic[index].append(0.5 * (masses * (v**2).sum(1)).sum())
    dof = 3 * 22 - 12 - 3
    for index, temperature in ((0, 300.0), (1, 400.0)):
        # Standard error of the mean of n kinetic energies: kT sqrt(dof / 2n); the other temperature is 8 or more away.
        error = BOLTZMANN * temperature * np.sqrt(dof / (2 * len(kinetic[index])))
        assert abs(np.mean(kinetic[index]) - 0.5 * dof * BOLTZMANN * temperature) < 5 * error


def test_exchange_energies_belong_to_the_moved_conformations(make):
    sampler = make(n_steps=3)
    probe = openmm.Context(sampler.simulation.system, openmm.VerletIntegrator(0.001), REFERENCE)

    def check(sampler):
        for index, conformation in enumerate(sampler.replicaConformation):
            probe.setPositions(conformation.getPositions())
            expected = probe.getState(energy=True).getPotentialEnergy()._value
            found = [e.value_in_unit(unit.kilojoule_per_mole) for e in sampler.replicaStateEnergy[index]]
            np.testing.assert_allclose(found, expected, rtol=1e-9)

    sampler.reporters.append(check)
    sampler.simulate(8)
    for counts in sampler.flow_statistics:
        assert counts["n_proposed"] == 24 and 0 < counts["n_accepted"] < 24 and counts["n_outside"] == 0


def test_only_the_states_chosen_move(make):
    sampler = make(flow_states=[1])
    sampler.simulate(5)
    assert [counts["n_proposed"] for counts in sampler.flow_statistics] == [0, 5]


def test_a_conformation_outside_the_support_stays(dipeptide, make):
    """A mirror image has q = 0; only the MD moves it."""
    sampler = make(n_steps=4, n_proposals=4)
    context = sampler.simulation.context
    context.setPositions(np.array(dipeptide.positions) * [1.0, 1.0, -1.0])
    sampler.replicaConformation[0] = context.getState(positions=True, velocities=True, parameters=True)
    sampler.simulateReplica(0)
    assert sampler.flow_statistics[0] == {"n_proposed": 4, "n_accepted": 0, "n_outside": 4}
    here = context.getState(positions=True).getPositions(asNumpy=True)._value
    assert np.array_equal(here, arrays(sampler.replicaConformation[0])[0])


# -------------------------------------------------------------------- what is weighed


@pytest.mark.parametrize("with_temperature", [True, False])
def test_the_weight_is_the_states_own(dipeptide, make, monkeypatch, with_temperature):
    """Weighted force groups, a parameter and the temperature (the integrator's where states name none)."""
    system = copy.deepcopy(dipeptide.system)
    restraint = openmm.CustomTorsionForce("strength * (1 + cos(theta))")
    restraint.addGlobalParameter("strength", 0.0)
    restraint.addTorsion(*PSI, [])
    restraint.setForceGroup(1)
    system.addForce(restraint)
    states = [{"groups": {0, 1}, "strength": 2.0}, {"groups": {0: 0.8, 1: 0.5}, "strength": 6.0}]
    if with_temperature:
        for state, temperature in zip(states, (300.0, 340.0 * unit.kelvin), strict=True):
            state["temperature"] = temperature
    sampler = make(states, system=system, n_steps=6)

    rule, draw = proposals.metropolis.independence_chain, proposals.FlowProposals._draw
    weighed, drawn = [], []

    def record_rule(current, proposed, rng):
        weighed.append((current, np.array(proposed)))
        return rule(current, proposed, rng)

    def record_draw(this, n, rng):
        drawn.append(draw(this, n, rng)[0].clone())
        return drawn[-1], dipeptide.flow.log_prob(drawn[-1]).detach()

    monkeypatch.setattr(proposals.metropolis, "independence_chain", record_rule)
    monkeypatch.setattr(proposals.FlowProposals, "_draw", record_draw)
    before, genuine = [], proposals.FlowProposals.chain

    def record_start(this, positions, *arguments, **options):
        before.append(np.array(positions))
        return genuine(this, positions, *arguments, **options)

    monkeypatch.setattr(proposals.FlowProposals, "chain", record_start)
    sampler.replicaStateIndex = [1, 0]
    sampler.simulateReplica(0)  # in state 1

    context = openmm.Context(system, openmm.VerletIntegrator(0.001), REFERENCE)
    context.setParameter("strength", 6.0)
    coordinates = dipeptide.flow.coordinates
    y0, s = coordinates.to_internal(torch.from_numpy(before[0])[None])
    y = torch.cat((y0, drawn[0]))
    fixed = s.expand(len(y), -1)
    inside = coordinates.in_domain(y, fixed).numpy()
    energy = []
    for x in coordinates.to_positions(y, fixed).numpy():
        context.setPositions(x)
        parts = [context.getState(energy=True, groups={g}).getPotentialEnergy()._value for g in (0, 1)]
        energy.append(0.8 * parts[0] + 0.5 * parts[1])
    kT = BOLTZMANN * (340.0 if with_temperature else 300.0)
    log_q = dipeptide.flow.log_prob(y).detach().numpy()
    expected = coordinates.log_volume(y, fixed).numpy() - np.array(energy) / kT - log_q
    found = np.concatenate(([weighed[0][0]], weighed[0][1]))
    assert inside[0] and inside.sum() > 1
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-6, atol=1e-5)
    assert np.isneginf(found[~inside]).all()


# -------------------------------------------------------------------- mistakes


def test_bad_input_is_refused(dipeptide, make, tmp_path):
    for options, message in (
        ({"flow_states": [0, 2]}, "state 2"),
        ({"n_steps": 0}, "n_steps"),
        ({"n_proposals": 0}, "n_proposals"),
        ({"flow": tmp_path / "none.bg"}, "no flow"),
        ({"states": [{"temperature": 300.0}, {"temperature": -1.0}]}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    bonded = copy.deepcopy(dipeptide.system)
    bonded.addConstraint(4, 6, 0.14)
    with pytest.raises(ValueError, match="constrain"):
        make(system=bonded)


def test_a_saved_flow_serves_as_well(dipeptide, make, tmp_path):
    dipeptide.flow.save(tmp_path / "adp.bg")
    sampler = make(flow=tmp_path / "adp.bg")
    sampler.simulate(2)
    assert sampler.flow_statistics[0]["n_proposed"] == 2


# -------------------------------------------------------------------- what is sampled


def scores(weighted_reference, sampler, iterations):
    """z of each state's samples against `reference`; the MD of 1 fs is far more exact than these errors."""
    energy, psi = np.empty((iterations, 2)), np.empty((iterations, 2))
    sampler.simulate(20)

    def record(sampler):
        row = sampler.currentIteration - 21
        for replica, state in enumerate(sampler.replicaStateIndex):
            energy[row, state] = sampler.replicaStateEnergy[replica][state].value_in_unit(unit.kilojoule_per_mole)
            x = arrays(sampler.replicaConformation[replica])[0]
            psi[row, state] = torsion_angle(x[None], PSI)[0] > 1.0

    sampler.reporters.append(record)
    sampler.simulate(iterations)
    z = {}
    for state, temperature in enumerate((300.0, 350.0)):
        for name, series in (("energy", energy[:, state]), ("psi", psi[:, state])):
            mean, error = weighted_reference[temperature, name]
            own = series.std(ddof=1) * np.sqrt(statistical_inefficiency(series) / iterations)
            z[temperature, name] = (series.mean() - mean) / np.hypot(error, own)
            print(f"{temperature} K {name}: {series.mean():.3f} ± {own:.3f}, {mean:.3f} ± {error:.3f}")
        assert 0.05 < weighted_reference[temperature, "psi"][0] < 0.95  # a population that could be wrong
    print(z)
    return z


@pytest.mark.statistical
def test_replicas_sample_their_states(dipeptide, make, hot_flow, weighted_reference):
    """With moves of a flow for each state, learned swaps between them, and exchanges."""
    learned = {"state_flows": {1: hot_flow(dipeptide.flow)}, "swaps": [(1, 0)]}
    sampler = make(md_steps=5, n_steps=3, n_proposals=4, seed=9, **learned)
    z = scores(weighted_reference, sampler, 200)
    assert all(abs(value) < 4.0 for value in z.values()), z
    assert all(counts["n_accepted"] > 0.2 * counts["n_proposed"] for counts in sampler.flow_statistics)
    print(sampler.swap_statistics)
    assert sampler.swap_statistics[1, 0]["n_accepted"] > 0.1 * sampler.swap_statistics[1, 0]["n_proposed"]


@pytest.mark.statistical
def test_acceptance_on_the_energy_alone_is_caught(make, weighted_reference, monkeypatch):
    """log q left out of the acceptance."""
    draw = proposals.FlowProposals._draw
    monkeypatch.setattr(
        proposals.FlowProposals, "_draw", lambda self, n, rng: (draw(self, n, rng)[0], torch.zeros(n).double())
    )
    monkeypatch.setattr(proposals.FlowProposals, "_log_q", lambda self, y: torch.zeros(len(y)).double())
    z = scores(weighted_reference, make(md_steps=5, n_steps=3, n_proposals=4, seed=10), 100)
    assert abs(z[300.0, "energy"]) > 5.0 and abs(z[350.0, "energy"]) > 5.0, z


@pytest.mark.statistical
def test_swaps_that_are_not_weighed_are_caught(dipeptide, make, hot_flow, weighted_reference, monkeypatch):
    """Every swap accepted, between a flow that is far too wide for 350 K and that of 300 K."""
    monkeypatch.setattr(swaps, "swap_log_ratio", lambda *terms: np.array([np.inf]))
    learned = {"state_flows": {1: hot_flow(dipeptide.flow, 1.6)}, "swaps": [(1, 0)], "flow_states": []}
    z = scores(weighted_reference, make(md_steps=5, seed=11, **learned), 80)
    assert max(abs(value) for value in z.values()) > 5.0, z
