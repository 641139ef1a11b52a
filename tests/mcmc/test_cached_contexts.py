"""What a cached Context, a state or a stored move may have become: right work or one sentence, and nothing changed."""

import copy
import gc
import shutil
import weakref

import numpy as np
import pytest
import torch

from openmm_bg import proposals
from openmm_bg.coordinates import read_constraints
from openmm_bg.energy import BOLTZMANN
from openmm_bg.mcmc import BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove, base

import openmm  # isort: skip
from openmm import unit  # isort: skip
from openmmtools import states  # isort: skip
from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove  # isort: skip

KINDS = [BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove]


def thermodynamic(system, **options):
    return states.ThermodynamicState(system, 300.0 * unit.kelvin, **options)


def at(positions, **options):
    return states.SamplerState(np.array(positions) * unit.nanometer, **options)


def current_log_weight(monkeypatch, move, state, replica, contexts):
    """log w of the state that the move starts from, as its rule was given it."""
    found, rule = [], proposals.metropolis.independence_chain

    def record(current, proposed, rng):
        found.append(float(current))
        return rule(current, proposed, rng)

    with monkeypatch.context() as patch:
        patch.setattr(proposals.metropolis, "independence_chain", record)
        move.apply(state, copy.deepcopy(replica), context_cache=contexts)
    return found[0]


def expected_log_weight(dipeptide, context, positions):
    """The same from this Context's own System and energy."""
    flow = dipeptide.flow
    coordinates = flow.coordinates.with_constraints(read_constraints(context.getSystem(), flow.topology))
    y, s = coordinates.to_internal(torch.from_numpy(np.array(positions))[None])
    context.setPositions(positions)
    u = context.getState(energy=True).getPotentialEnergy()._value / (BOLTZMANN * 300.0)
    return float(coordinates.log_volume(y, s)[0]) - u - float(flow.log_prob(y).detach()[0])


def refused(move, state, replica, contexts, message):
    """One sentence, and neither state, replica nor counts are changed."""
    positions, velocities, before = replica.positions, replica.velocities, np.array(replica.positions._value)
    xml, temperature = openmm.XmlSerializer.serialize(state.system), state.temperature
    with pytest.raises(ValueError, match=message) as caught:
        move.apply(state, replica, context_cache=contexts)
    assert "\n" not in str(caught.value)
    assert replica.positions is positions and replica.velocities is velocities
    assert np.array_equal(replica.positions._value, before)
    assert openmm.XmlSerializer.serialize(state.system) == xml and state.temperature == temperature
    assert move.statistics == {"n_accepted": 0, "n_proposed": 0, "n_outside": 0}


# -------------------------------------------------------------------- Contexts that have changed


@pytest.mark.parametrize("change", ["masses", "forces", "constraint"])
def test_a_reinitialised_context_is_matched_anew(dipeptide, artifact, contexts, monkeypatch, change):
    """It is the same object, with another Φ or another energy; weights are those of what it is now."""
    state, replica, move = thermodynamic(dipeptide.system), at(dipeptide.positions), BoltzmannGeneratorMove(artifact)
    context, _ = contexts.get_context(state)
    first = current_log_weight(monkeypatch, move, state, replica, contexts)
    assert first == pytest.approx(expected_log_weight(dipeptide, context, dipeptide.positions), abs=1e-4)
    system = context.getSystem()
    if change == "masses":
        system.setParticleMass(1, 3.0)  # the carbon of a methyl group, whose hydrogens are constrained
    elif change == "constraint":
        i, j, length = system.getConstraintParameters(0)
        system.removeConstraint(0)
        bonds = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
        bonds.addBond(i, j, length + 0.005 * unit.nanometer, 250000.0)
    else:
        torsions = next(f for f in system.getForces() if isinstance(f, openmm.PeriodicTorsionForce))
        for k in range(torsions.getNumTorsions()):
            *rest, strength = torsions.getTorsionParameters(k)
            torsions.setTorsionParameters(k, *rest, 1.5 * strength)
    context.reinitialize()
    second = current_log_weight(monkeypatch, move, state, replica, contexts)
    assert contexts.get_context(state)[0] is context
    assert second == pytest.approx(expected_log_weight(dipeptide, context, dipeptide.positions), abs=1e-4)
    assert abs(second - first) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_no_longer_fits_is_refused(dipeptide, artifact, contexts, kind):
    state, replica = thermodynamic(dipeptide.system), at(dipeptide.positions)
    kind(artifact).apply(state, at(dipeptide.positions), context_cache=contexts)
    context, _ = contexts.get_context(state)
    context.getSystem().addConstraint(4, 6, 0.14)  # of a heavy-atom bond, which the flow models
    context.reinitialize()
    for _ in range(2):  # what was known of the Context must not come back
        refused(kind(artifact), state, replica, contexts, "constrain")
    system = context.getSystem()
    system.addParticle(18.0)
    next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce)).addParticle(0.0, 1.0, 0.0)
    context.reinitialize()
    refused(kind(artifact), state, replica, contexts, "reinitialised.*empty the context cache")
    contexts.empty()
    move = kind(artifact)
    move.apply(state, replica, context_cache=contexts)
    assert move.statistics["n_proposed"] == 1


def test_an_emptied_cache_is_forgotten(dipeptide, artifact, contexts):
    state, move = thermodynamic(dipeptide.system), BoltzmannGeneratorMove(artifact)
    move.apply(state, at(dipeptide.positions), context_cache=contexts)
    context, _ = contexts.get_context(state)
    assert context in base._proposals
    gone = weakref.ref(context)
    contexts.empty()
    del context, _
    gc.collect()
    assert gone() is None  # nothing of ours keeps it alive
    move.apply(state, at(dipeptide.positions), context_cache=contexts)
    assert move.statistics["n_proposed"] == 2


def test_dropout_is_switched_off_again(dipeptide, artifact, contexts):
    """Somebody may train on with the flow that moves in this process use."""
    move = BoltzmannGeneratorMove(artifact)
    flow = base._flow(move.flow_path, move.flow_sha256)
    flow.density.train()
    move.apply(thermodynamic(dipeptide.system), at(dipeptide.positions), context_cache=contexts)
    assert not flow.density.training


# -------------------------------------------------------------------- states that are not the flow's


@pytest.mark.parametrize("kind", KINDS)
def test_other_molecules_are_refused(dipeptide, artifact, contexts, kind):
    system = copy.deepcopy(dipeptide.system)
    bonds = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    i, j, length, strength = bonds.getBondParameters(0)
    bonds.setBondParameters(0, i, 21 if j != 21 else 20, length, strength)  # as many particles, another topology
    refused(kind(artifact), thermodynamic(system), at(dipeptide.positions), contexts, "no bond")
    state = thermodynamic(dipeptide.system)
    refused(kind(artifact), state, at(dipeptide.positions[:-1]), contexts, "21 particles")
    torn = np.array(dipeptide.positions)
    torn[8:] += 1.0
    refused(kind(artifact), state, at(torn), contexts, "bond|whole")


@pytest.mark.parametrize("kind", KINDS)
def test_a_barostat_needs_a_molecule(dipeptide, artifact, contexts, kind):
    """Without bonds OpenMM takes every heavy atom for a molecule of its own, and a barostat would part them."""
    system = copy.deepcopy(dipeptide.system)
    for k in reversed(range(system.getNumForces())):
        if isinstance(system.getForce(k), openmm.HarmonicBondForce):
            system.removeForce(k)
        elif isinstance(system.getForce(k), openmm.NonbondedForce):
            system.getForce(k).setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    box = 4.0 * np.eye(3)
    system.setDefaultPeriodicBoxVectors(*box)
    state = thermodynamic(system, pressure=1.0 * unit.atmosphere)
    replica = at(dipeptide.positions, box_vectors=box * unit.nanometer)
    refused(kind(artifact), state, replica, contexts, "different molecules")


# -------------------------------------------------------------------- files that have changed


@pytest.mark.parametrize("change", ["another artifact", "vanished"])
def test_a_run_is_not_resumed_with_another_artifact(dipeptide, artifact, tmp_path, monkeypatch, change):
    """An error before the first sample is stored; with the file back in its place the run goes on."""
    from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler

    path, storage = tmp_path / "adp.bg", str(tmp_path / "run.nc")
    shutil.copy(artifact, path)
    md = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=1)
    sampler = ReplicaExchangeSampler(mcmc_moves=SequenceMove([BoltzmannGeneratorMove(path), md]))
    states_ = [states.ThermodynamicState(dipeptide.system, t * unit.kelvin) for t in (300.0, 330.0)]
    reporter = MultiStateReporter(storage, checkpoint_interval=1)
    sampler.create(states_, [at(dipeptide.positions)] * 2, reporter)
    sampler.run(1)
    reporter.close()
    del sampler

    def resumed():
        return ReplicaExchangeSampler.from_storage(MultiStateReporter(storage, open_mode="r+", checkpoint_interval=1))

    monkeypatch.setattr(base, "_flows", {})  # as in another process
    if change == "vanished":
        path.unlink()
    else:
        path.write_bytes(artifact.read_bytes() + b"x")
    again = resumed()
    before = [np.array(s.positions._value) for s in again.sampler_states]
    with pytest.raises(ValueError, match="not the one" if change == "another artifact" else "cannot be read"):
        again.extend(1)
    for state, x in zip(again.sampler_states, before, strict=True):
        assert np.array_equal(state.positions._value, x)
    again._reporter.close()
    shutil.copy(artifact, path)
    last = resumed()
    assert last.iteration == 1
    for state, x in zip(last.sampler_states, before, strict=True):
        assert np.array_equal(state.positions._value, x)
    last.extend(1)
    assert last.iteration == 2 and [m.statistics[0]["n_proposed"] for m in last.mcmc_moves] == [2, 2]
