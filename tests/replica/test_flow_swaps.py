"""Learned swaps inside `FlowReplicaExchangeSampler`: the ratio of two conformations, what replicas carry, mistakes."""

import copy
import random

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg import swaps
from openmm_bg.artifact import Flow
from openmm_bg.energy import BOLTZMANN
from openmm_bg.errors import InputError
from openmm_bg.proposals import FlowProposals
from openmm_bg.replica import FlowReplicaExchangeSampler
from openmm_bg.replica import sampler as replica_sampler
from openmm_bg.swaps import FlowBijection, FlowSwap

import openmm  # isort: skip
from openmm import app, unit  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
LADDER = [{"temperature": 300.0 * unit.kelvin}, {"temperature": 350.0 * unit.kelvin}]


def build(dipeptide, *, seed=1, md_steps=2, states=None, system=None, **options):
    random.seed(seed)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(seed)
    system = dipeptide.system if system is None else system
    simulation = app.Simulation(dipeptide.topology, system, integrator, REFERENCE)
    simulation.context.setPositions(dipeptide.positions)
    simulation.context.setVelocitiesToTemperature(300.0, seed)
    options = {"flow": dipeptide.flow, "flow_states": [], "seed": seed} | options
    return FlowReplicaExchangeSampler(LADDER if states is None else states, simulation, md_steps, **options)


def conformations(dipeptide, n, seed=2):
    """n conformations about the minimised one."""
    x = np.array(dipeptide.positions)
    return x + 1e-3 * np.random.default_rng(seed).normal(size=(n, *x.shape))


# -------------------------------------------------------------------- the bijection and the ratio


def test_f_and_its_inverse(dipeptide, hot_flow):
    hot = hot_flow(dipeptide.flow, 1.05, 1.3)
    bijection = FlowBijection(hot, dipeptide.flow)
    y = dipeptide.flow.sample(20)[0]
    carried, det = bijection.to_b(y)
    expected, expected_det = hot.density.bend(y, inverse=True)
    torch.testing.assert_close(torch.cos(carried - expected), torch.ones_like(y), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(det, expected_det, rtol=0.0, atol=1e-5)
    back, det_back = bijection.to_a(carried)
    torch.testing.assert_close(torch.cos(back - y), torch.ones_like(y), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(det_back, -det, rtol=0.0, atol=1e-5)
    same, zero = FlowBijection(dipeptide.flow, dipeptide.flow).to_b(y)
    assert torch.equal(same, y) and not zero.any()


@pytest.mark.parametrize("travels", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_ratio_is_formula_i(dipeptide, hot_flow, travels, reduced):
    """Against energies of a Context of our own, and f in closed form; `reduced` has an s that matters."""
    flow = dipeptide.flow
    if reduced:
        from openmm_bg.coordinates import CoordinateMap, read_constraints
        from openmm_bg.flow import FlowConfig, build_flow

        torch.manual_seed(0)
        constraints = read_constraints(dipeptide.system, dipeptide.topology)
        coordinates = CoordinateMap.fit(dipeptide.topology, conformations(dipeptide, 30), constraints, "reduced")
        density = build_flow(coordinates.layout, FlowConfig.preset("cpu", hidden=8, n_hidden=0))
        flow = Flow(density, coordinates, dipeptide.flow.metadata)
    coordinates = flow.coordinates
    hot = hot_flow(flow, 1.02, 1.1)
    torch.manual_seed(1)
    x = dipeptide.flow.to_positions(dipeptide.flow.sample(2)[0]).numpy()
    x[1] += [0.3, -0.2, 0.1]
    context = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), REFERENCE)

    def u(temperature):
        def reduced_potential(frame):
            context.setPositions(frame)
            return context.getState(energy=True).getPotentialEnergy()._value / (BOLTZMANN * temperature)

        return reduced_potential

    swap = FlowSwap(FlowProposals(hot, dipeptide.system), FlowProposals(flow, dipeptide.system), travels)
    proposal = swap.propose(x[0], x[1], u(350.0), u(300.0))

    y, s = coordinates.to_internal(torch.from_numpy(x))
    new_b, det_b = hot.density.bend(y[:1], inverse=True)
    new_a, det_a = hot.density.bend(y[1:])
    s_a, s_b = (s[1:], s[:1]) if travels else (s[:1], s[1:])
    expected = 0.0
    for sign, temperature, values, rest in (
        (-1, 350.0, y[:1], s[:1]),
        (-1, 300.0, y[1:], s[1:]),
        (1, 350.0, new_a, s_a),
        (1, 300.0, new_b, s_b),
    ):
        frame = coordinates.to_positions(values, rest)[0].numpy()
        expected += sign * (float(coordinates.log_volume(values, rest)[0]) - u(temperature)(frame))
    expected += float(det_a[0] + det_b[0])
    assert proposal.inside and np.isfinite(proposal.log_ratio)
    np.testing.assert_allclose(proposal.log_ratio, expected, rtol=1e-6, atol=1e-3)
    assert abs(float(det_a[0] + det_b[0])) > 0.005  # |det f'| does not cancel here
    for found, start, values, rest in (
        (proposal.positions_a, x[0], new_a, s_a),
        (proposal.positions_b, x[1], new_b, s_b),
    ):
        back, rest_back = coordinates.to_internal(torch.from_numpy(found)[None])
        torch.testing.assert_close(torch.cos(back - values), torch.ones_like(back), rtol=0.0, atol=1e-8)
        torch.testing.assert_close(torch.cos(rest_back - rest), torch.ones_like(rest), rtol=0.0, atol=1e-8)
        seed = coordinates.zmatrix.seed
        np.testing.assert_allclose(found[seed[0]], start[seed[0]], atol=1e-9)  # stands where it stood
    if reduced:
        assert float((s_a - s_b).abs().max()) > 1e-4

    mirrored = x[0] * [1.0, 1.0, -1.0]
    if not reduced:
        outside = swap.propose(mirrored, x[1], u(350.0), u(300.0))
        assert not outside.inside and outside.log_ratio == -np.inf


# -------------------------------------------------------------------- in the sampler


def test_replicas_take_over_what_was_accepted(dipeptide, hot_flow, monkeypatch):
    """Conformations, velocities and energies after accepted swaps; a refused one leaves everything alone."""
    sampler = build(dipeptide, state_flows={1: hot_flow(dipeptide.flow)}, swaps=[(1, 0)], md_steps=5)
    sampler.exchangesPerIteration = 0
    sampler.simulate(1)
    assert sampler.swap_statistics[1, 0]["n_proposed"] == 1
    propose, proposals = FlowSwap.propose, []

    def record(this, *arguments):
        proposals.append(propose(this, *arguments))
        ratio = -np.inf if refuse else np.inf
        return swaps.SwapProposal(proposals[-1].positions_a, proposals[-1].positions_b, ratio, True)

    monkeypatch.setattr(FlowSwap, "propose", record)
    masses = np.array([dipeptide.system.getParticleMass(i)._value for i in range(22)])
    probe = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), REFERENCE)
    kinetic = {0: [], 1: []}
    for refuse in [True] + [False] * 40:
        for replica, temperature in ((0, 300.0), (1, 350.0)):  # carried over they stay the same from swap to swap
            context = sampler.simulation.context
            context.setState(sampler.replicaConformation[replica])
            context.setVelocitiesToTemperature(temperature, 1 + len(proposals))
            sampler.replicaConformation[replica] = context.getState(positions=True, velocities=True, parameters=True)
        before, energies = list(sampler.replicaConformation), copy.deepcopy(sampler.replicaStateEnergy)
        sampler.exchangeReplicas()
        assert sampler.replicaStateIndex == [0, 1]
        for replica, positions in ((1, proposals[-1].positions_a), (0, proposals[-1].positions_b)):
            found = sampler.replicaConformation[replica]
            if refuse:
                assert found is before[replica]
                assert list(sampler.replicaStateEnergy[replica]) == list(energies[replica])
                continue
            np.testing.assert_allclose(found.getPositions(asNumpy=True)._value, positions, atol=1e-7)
            probe.setPositions(positions)
            energy = probe.getState(energy=True).getPotentialEnergy()._value
            for value in sampler.replicaStateEnergy[replica]:
                np.testing.assert_allclose(value.value_in_unit(unit.kilojoule_per_mole), energy, rtol=1e-9)
            v = found.getVelocities(asNumpy=True)._value
            kinetic[replica].append(0.5 * (masses * (v**2).sum(1)).sum())
    for replica, temperature in ((0, 300.0), (1, 350.0)):
        dof = 3 * 22 - 12 - 3
        error = BOLTZMANN * temperature * np.sqrt(dof / (2 * len(kinetic[replica])))
        assert abs(np.mean(kinetic[replica]) - 0.5 * dof * BOLTZMANN * temperature) < 5 * error
    assert sampler.swap_statistics[1, 0]["n_accepted"] >= 40


def test_a_swap_that_fails_half_way_changes_nothing(dipeptide, monkeypatch):
    """Accepted, and then the second replica's velocities cannot be had."""
    sampler = build(dipeptide, swaps=[(1, 0)])
    sampler.simulate(1)
    before, energies = list(sampler.replicaConformation), copy.deepcopy(sampler.replicaStateEnergy)
    counts = copy.deepcopy(sampler.swap_statistics)
    propose, carry, calls = FlowSwap.propose, replica_sampler.carry_velocities, []

    def certain(this, *arguments):
        found = propose(this, *arguments)
        return swaps.SwapProposal(found.positions_a, found.positions_b, np.inf, True)

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise openmm.OpenMMException("no forces")
        return carry(*arguments)

    monkeypatch.setattr(FlowSwap, "propose", certain)
    monkeypatch.setattr(replica_sampler, "carry_velocities", failing)
    with pytest.raises(openmm.OpenMMException, match="no forces"):
        sampler.exchangeReplicas()
    assert all(found is old for found, old in zip(sampler.replicaConformation, before, strict=True))
    assert sampler.replicaStateEnergy == energies
    assert sampler.swap_statistics[1, 0]["n_accepted"] == counts[1, 0]["n_accepted"]


def test_a_swap_that_cannot_be_weighed_changes_nothing(dipeptide, monkeypatch):
    sampler = build(dipeptide, swaps=[(1, 0)])
    sampler.simulate(1)
    before = list(sampler.replicaConformation)
    counts = copy.deepcopy(sampler.swap_statistics)

    def impossible(this, state):
        raise openmm.OpenMMException("no energy")

    monkeypatch.setattr(type(sampler._sampler), "computeEnergy", impossible)
    with pytest.raises(bg.errors.EnergyError, match="no energy"):
        sampler.exchangeReplicas()
    assert all(a is b for a, b in zip(before, sampler.replicaConformation, strict=True))
    assert sampler.swap_statistics == counts


def test_resuming_with_openmms_reporter(dipeptide, hot_flow, tmp_path):
    """OpenMM's own reporter stores and resumes; files of another run are refused before anything is simulated."""
    options = {"state_flows": {1: hot_flow(dipeptide.flow)}, "swaps": [(1, 0)], "flow_states": None}
    sampler = build(dipeptide, **options)
    sampler.reporters.append(app.ReplicaExchangeReporter(str(tmp_path / "run"), 1, sampler, checkpoints=True))
    sampler.simulate(2)
    stored = [np.array(c.getPositions(asNumpy=True)._value) for c in sampler.replicaConformation]
    again = build(dipeptide, **options)
    again.reporters.append(app.ReplicaExchangeReporter(str(tmp_path / "run"), 1, again, checkpoints=True, resume=True))
    assert again.currentIteration == 2
    if not sampler.swap_statistics[1, 0]["n_accepted"]:
        for found, x in zip(again.replicaConformation, stored, strict=True):
            np.testing.assert_allclose(found.getPositions(asNumpy=True)._value, x, atol=1e-6)
    again.simulate(1)
    assert again.flow_statistics[0]["n_proposed"] == 1 and again.currentIteration == 3

    three = build(dipeptide, states=[{"temperature": t} for t in (300.0, 320.0, 350.0)])
    three.replicaStateIndex = [0, 1, 1]
    with pytest.raises(ValueError, match="one each"):
        three.simulate(1)
    foreign = build(dipeptide)
    single = openmm.System()
    single.addParticle(1.0)
    other = openmm.Context(single, openmm.VerletIntegrator(0.001), REFERENCE)
    other.setPositions(np.zeros((1, 3)))
    foreign.replicaConformation[1] = other.getState(positions=True)
    before = foreign.replicaConformation[0]
    with pytest.raises(ValueError, match="another run"):
        foreign.simulate(1)
    assert foreign.replicaConformation[0] is before and foreign.currentIteration == 0


def test_a_reinitialised_context_is_noticed(dipeptide):
    sampler = build(dipeptide, flow_states=None, system=copy.deepcopy(dipeptide.system))
    sampler.simulate(1)
    sampler.simulation.context.reinitialize()
    sampler.simulate(1)  # the same System: replicas bring their own positions
    assert sampler.flow_statistics[0]["n_proposed"] == 2
    sampler.simulation.system.setParticleMass(4, 40.0)
    sampler.simulation.context.reinitialize()
    with pytest.raises(ValueError, match="masses"):
        sampler.simulate(1)
    assert sampler.currentIteration == 2


def test_mistakes(dipeptide):
    flow = dipeptide.flow
    for options, message in (
        ({"swaps": [(0, 2)]}, "state 2"),
        ({"swaps": [(1, 1)]}, "two different"),
        ({"swaps": [(0, 1, 1)]}, "pair"),
        ({"state_flows": {3: flow}}, "state 3"),
        ({"atom_subset": list(range(21))}, "21 particles"),
        ({"atom_subset": [0] * 22}, "once"),
    ):
        with pytest.raises(ValueError, match=message):
            build(dipeptide, **options)
    metadata = copy.deepcopy(flow.metadata)
    metadata["topology"]["residues"][1][0] = "GLY"
    with pytest.raises(ValueError, match="different molecules"):
        FlowBijection(flow, Flow(flow.density, flow.coordinates, metadata))
    from openmm_bg.coordinates import CoordinateMap, read_constraints

    constraints = read_constraints(dipeptide.system, dipeptide.topology)
    reduced = CoordinateMap.fit(dipeptide.topology, conformations(dipeptide, 30), constraints, "reduced")
    with pytest.raises(ValueError, match="different coordinates"):
        FlowBijection(flow, Flow(flow.density, reduced, flow.metadata))


@pytest.mark.parametrize(("change", "part"), [(1j, "complex"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_positions_that_are_no_real_numbers_are_refused(dipeptide, change, part):
    positions = dipeptide.positions
    proposals = FlowProposals(dipeptide.flow, dipeptide.system)
    proposals.split(positions)
    with pytest.raises(InputError, match=part):
        proposals.split(positions + change)
