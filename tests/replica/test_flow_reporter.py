"""What a sampler's options choose, what a failure leaves, and files that know which run they are of."""

import copy
import json
import random

import numpy as np
import pytest

from openmm_bg.energy import BOLTZMANN
from openmm_bg.errors import InputError
from openmm_bg.proposals import FlowProposals
from openmm_bg.replica import FlowReplicaExchangeReporter, FlowReplicaExchangeSampler

import openmm  # isort: skip
from openmm import app, unit  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
LADDER = [{"temperature": 300.0 * unit.kelvin}, {"temperature": 350.0 * unit.kelvin}]


@pytest.fixture
def build(dipeptide):
    def make(*, states=None, system=None, seed=1, md_steps=2, **options):
        random.seed(seed)
        integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
        integrator.setRandomNumberSeed(seed)
        system = dipeptide.system if system is None else system
        simulation = app.Simulation(dipeptide.topology, system, integrator, REFERENCE)
        simulation.context.setPositions(dipeptide.positions)
        simulation.context.setVelocitiesToTemperature(300.0, seed)
        options = {"flow": dipeptide.flow, "seed": seed} | options
        return FlowReplicaExchangeSampler(LADDER if states is None else states, simulation, md_steps, **options)

    return make


def positions_of(state):
    return np.array(state.getPositions(asNumpy=True)._value)


# -------------------------------------------------------------------- kinds of moves


@pytest.mark.parametrize(
    ("options", "method", "passed"),
    [
        ({"n_steps": 3, "n_proposals": 2}, "chain", {"n_steps": 3, "n_proposals": 2}),
        ({"n_steps": 3, "step": 0.4}, "latent_chain", {"n_steps": 3, "step": 0.4}),
        (
            {"schedule": [0.0, 0.5, 1.0], "step": 0.2, "n_kernel_steps": 2},
            "switching_chain",
            {"schedule": [0.0, 0.5, 1.0], "step": 0.2, "n_kernel_steps": 2, "n_steps": 1},
        ),
        (
            {"schedule": np.array([0.0, 1.0])},
            "switching_chain",
            {"schedule": [0.0, 1.0], "step": 0.3, "n_kernel_steps": 1, "n_steps": 1},
        ),
    ],
)
def test_the_options_choose_the_formula(dipeptide, build, monkeypatch, options, method, passed):
    """D or E, F, G: each with the energy and temperature of the replica's own state."""
    seen = []

    def spy(name):
        genuine = getattr(FlowProposals, name)

        def called(this, positions, reduced_potential, rng, **arguments):
            seen.append((name, np.array(positions), reduced_potential(positions), arguments))
            return genuine(this, positions, reduced_potential, rng, **arguments)

        monkeypatch.setattr(FlowProposals, name, called)

    for name in ("chain", "latent_chain", "switching_chain"):
        spy(name)
    sampler = build(**options)
    sampler.simulate(1)
    context = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), REFERENCE)
    assert len(seen) == 2
    for (name, positions, u, arguments), temperature in zip(seen, (300.0, 350.0), strict=True):
        context.setPositions(positions)
        energy = context.getState(energy=True).getPotentialEnergy()._value
        assert name == method and arguments == passed
        assert u == pytest.approx(energy / (BOLTZMANN * temperature), rel=1e-9)
    assert sum(counts["n_proposed"] for counts in sampler.flow_statistics) == 2 * options.get("n_steps", 1)


def test_options_of_different_kinds_are_refused(build):
    for options, message in (
        ({"n_proposals": 2, "step": 0.3}, "n_proposals"),
        ({"n_proposals": 2, "schedule": [0.0, 1.0]}, "n_proposals"),
        ({"n_kernel_steps": 2}, "schedule"),
        ({"n_kernel_steps": 0}, "n_kernel_steps"),
        ({"step": 1.5}, "step"),
        ({"schedule": [0.5, 1.0]}, "schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)


@pytest.mark.parametrize("options", [{"n_steps": 4}, {"n_steps": 4, "step": 0.3}, {"schedule": [0.0, 0.5, 1.0]}])
def test_a_failed_move_leaves_replica_and_context(build, monkeypatch, options):
    sampler = build(**options)
    sampler.simulate(1)
    context, genuine, calls = sampler.simulation.context, type(sampler._sampler).computeEnergy, []
    app.ReplicaExchangeSampler.simulateReplica(sampler, 0)  # MD alone
    before, counts = list(sampler.replicaConformation), copy.deepcopy(sampler.flow_statistics)

    def fails(this, state):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("in the middle of the chain")
        return genuine(this, state)

    monkeypatch.setattr(type(sampler._sampler), "computeEnergy", fails)
    with pytest.raises(MemoryError):
        sampler._move(0, sampler.replicaStateIndex[0])
    assert all(a is b for a, b in zip(before, sampler.replicaConformation, strict=True))
    assert sampler.flow_statistics == counts
    here = context.getState(positions=True, velocities=True)
    np.testing.assert_array_equal(positions_of(here), positions_of(before[0]))
    np.testing.assert_array_equal(here.getVelocities(asNumpy=True)._value, before[0].getVelocities(asNumpy=True)._value)


# -------------------------------------------------------------------- files


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_goes_on_with_its_counts(build, tmp_path):
    sampler = build(swaps=[(1, 0)], n_steps=2)
    folder = tmp_path / "run"
    sampler.reporters.append(FlowReplicaExchangeReporter(folder, 1, sampler, checkpoints=True, energy=True))
    sampler.simulate(2)
    again = build(swaps=[(1, 0)], n_steps=2, seed=2)
    again.reporters.append(FlowReplicaExchangeReporter(folder, 1, again, resume=True, checkpoints=True, energy=True))
    assert again.currentIteration == 2
    assert [counts["n_proposed"] for counts in again.flow_statistics] == [4, 4]
    # OpenMM reports before it exchanges, and resumes there.
    assert again.swap_statistics[1, 0]["n_proposed"] == 1
    for counts in again.flow_statistics:
        assert counts.keys() == {"n_proposed", "n_accepted", "n_outside"}
    again.simulate(1)
    assert again.currentIteration == 3 and sum(c["n_proposed"] for c in again.flow_statistics) == 12


def test_files_of_another_run_are_refused(dipeptide, build, hot_flow, tmp_path):
    """Nothing of the sampler is touched, and no file."""
    folder = tmp_path / "run"
    sampler = build()
    sampler.reporters.append(FlowReplicaExchangeReporter(folder, 1, sampler, checkpoints=True))
    sampler.simulate(1)
    heavier = copy.deepcopy(dipeptide.system)
    heavier.setParticleMass(4, 13.0)
    seeded = copy.deepcopy(dipeptide.system)
    stored = contents(folder)

    def refused(message, folder=folder, **options):
        other = build(**options)
        conformations, assigned = list(other.replicaConformation), list(other.replicaStateIndex)
        with pytest.raises(ValueError, match=message) as caught:
            FlowReplicaExchangeReporter(folder, 1, other, resume=True, checkpoints=True)
        assert "\n" not in str(caught.value)
        assert all(a is b for a, b in zip(conformations, other.replicaConformation, strict=True))
        assert other.currentIteration == 0 and other.replicaStateIndex == assigned
        assert [counts["n_proposed"] for counts in other.flow_statistics] == [0] * len(other.states)

    refused("other flows", flow=hot_flow(dipeptide.flow))
    refused("other flows", state_flows={1: hot_flow(dipeptide.flow)})
    refused("other states", states=[{"temperature": 300.0}, {"temperature": 360.0}])
    refused("other states", states=[{"temperature": t} for t in (300.0, 320.0, 350.0)])
    refused("another System", system=heavier)
    refused("atom_subset", atom_subset=list(range(22)))
    assert contents(folder) == stored

    plain = tmp_path / "plain"
    native = build()
    native.reporters.append(app.ReplicaExchangeReporter(str(plain), 1, native, checkpoints=True))
    native.simulate(1)
    refused("flow_moves.json", folder=plain)
    (plain / "flow_moves.json").write_text("{}")
    refused("version", folder=plain)
    again = build(system=seeded, states=[{"temperature": 300.0}, {"temperature": 350.0}])  # the same without units
    FlowReplicaExchangeReporter(folder, 1, again, resume=True, checkpoints=True)
    assert again.currentIteration == 1


def test_replicas_of_another_molecule_are_refused(dipeptide, build):
    """OpenMM's own reporter resumes whatever has the right name: as many particles, other bonds."""
    sampler = build()
    sampler.simulate(1)
    context = sampler.simulation.context
    mixed = np.array(dipeptide.positions)
    mixed[[4, 18]] = mixed[[18, 4]]
    before = context.getState(positions=True)
    context.setPositions(mixed)
    sampler.replicaConformation[1] = context.getState(positions=True, velocities=True, parameters=True)
    context.setPositions(before.getPositions())
    kept = list(sampler.replicaConformation)
    with pytest.raises(ValueError, match="Replica 1 cannot be of the flow's molecule"):
        sampler.simulate(1)
    assert sampler.currentIteration == 1
    assert all(a is b for a, b in zip(kept, sampler.replicaConformation, strict=True))


def untouched(sampler):
    same = all(c is sampler.replicaConformation[0] for c in sampler.replicaConformation)
    counts = [counts["n_proposed"] for counts in sampler.flow_statistics]
    return same and sampler.currentIteration == 0 and counts == [0, 0] and sampler.replicaStateIndex == [0, 1]


@pytest.fixture
def run(build, tmp_path):
    """The folder of a run of one iteration."""
    sampler, folder = build(), tmp_path / "run"
    sampler.reporters.append(FlowReplicaExchangeReporter(folder, 1, sampler, checkpoints=True))
    sampler.simulate(1)
    return folder


def test_a_reporter_serves_the_sampler_it_was_made_for(build, tmp_path):
    first, second = build(), build(flow_states=[])
    reporter = FlowReplicaExchangeReporter(tmp_path / "run", 1, first, checkpoints=True)
    stored = contents(tmp_path / "run")
    second.reporters.append(reporter)
    with pytest.raises(InputError, match="another sampler"):
        second.simulate(1)
    assert untouched(second)  # before any MD
    with pytest.raises(InputError, match="another sampler"):
        reporter(second)
    assert contents(tmp_path / "run") == stored
    first.reporters.append(reporter)
    first.simulate(1)
    assert contents(tmp_path / "run") != stored
    with pytest.raises(InputError, match="FlowReplicaExchangeSampler"):
        FlowReplicaExchangeReporter(tmp_path / "new", 1, first.simulation)


def test_a_folder_in_use_wants_resume(build, run):
    stored = contents(run)
    with pytest.raises(InputError, match="not empty: resume=True"):
        FlowReplicaExchangeReporter(run, 1, build(), checkpoints=True)
    assert contents(run) == stored


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("flow_moves.json", "flow_statistics"),
        ("flow_moves.json", "swap_statistics"),
        ("flow_moves.json", "states"),
        ("flow_moves.json", "atom_subset"),
        ("checkpoint_0.xml", "<State"),
        ("checkpoint_1.xml", ""),
        ("checkpoint_1.xml", openmm.XmlSerializer.serialize(openmm.System())),
        ("log.csv", "Iteration,Step\n1,x"),
        ("log.csv", "Iteration,Step,Replica_0_State,Replica_1_State\n1,2,0,0\n"),
    ],
)
def test_damaged_files_are_named(build, run, name, damage):
    if name.endswith("json"):
        record = json.loads((run / name).read_text())
        del record[damage]
        damage = json.dumps(record)
    (run / name).write_text(damage)
    stored, other = contents(run), build()
    with pytest.raises(InputError, match=f"{name} is damaged") as caught:
        FlowReplicaExchangeReporter(run, 1, other, resume=True, checkpoints=True)
    assert "\n" not in str(caught.value)
    assert untouched(other) and contents(run) == stored


def test_a_resume_that_fails_late_leaves_the_sampler(build, run, monkeypatch):
    """OpenMM reads the run into the sampler before it opens the files that it goes on writing."""
    other = build()

    def fails(path, mode="r", *arguments, **options):
        if "a" in mode:
            raise PermissionError(path)
        return open(path, mode, *arguments, **options)

    monkeypatch.setattr(app.replicaexchangereporter, "open", fails, raising=False)
    with pytest.raises(PermissionError):
        FlowReplicaExchangeReporter(run, 1, other, resume=True, checkpoints=True)
    assert untouched(other)


def test_other_options_of_the_moves_are_noted(build, run, caplog):
    FlowReplicaExchangeReporter(run, 1, build(), resume=True, checkpoints=True)
    assert not caplog.records
    FlowReplicaExchangeReporter(run, 1, build(step=0.2, swaps=[(1, 0)]), resume=True, checkpoints=True)
    (note,) = caplog.messages
    assert "step None is now 0.2" in note and "swaps [] is now [[1, 0]]" in note and "n_proposals" not in note
    record = json.loads((run / "flow_moves.json").read_text())
    del record["options"]  # as earlier versions wrote it
    (run / "flow_moves.json").write_text(json.dumps(record))
    caplog.clear()
    FlowReplicaExchangeReporter(run, 1, build(step=0.2), resume=True, checkpoints=True)
    assert not caplog.records


# -------------------------------------------------------------------- arguments of other types


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atom_subset": 22}, "atom_subset must be a list"),
        ({"flow_states": 1}, "flow_states must name states"),
        ({"flow_states": ["0"]}, "flow_states must name states"),
        ({"swaps": (1, 0)}, r"swaps must be a list of pairs of states, such as \[\(1, 0\)\]"),
        ({"swaps": 1}, "swaps must be a list of pairs"),
        ({"state_flows": ["hot.bg"]}, "state_flows must be a dict"),
        ({"state_flows": {"1": "hot.bg"}}, "state_flows must name states"),
        ({"state_flows": {1: 3}}, "state_flows must be a Flow or the path"),
        ({"flow": None}, "flow must be a Flow or the path"),
        ({"flow": 3}, "flow must be a Flow or the path"),
        ({"states": [300, 400]}, "states must be a list of dicts"),
        ({"seed": "a"}, "seed must be a whole number"),
    ],
)
def test_arguments_of_other_types_are_named(build, options, message):
    with pytest.raises(InputError, match=message) as caught:
        if "seed" in options:
            sampler = build()
            FlowReplicaExchangeSampler(LADDER, sampler.simulation, 2, flow=sampler.proposals[0].flow, **options)
        else:
            build(**options)
    assert "\n" not in str(caught.value)


def test_it_takes_a_simulation_with_positions(dipeptide, build):
    with pytest.raises(InputError, match=r"openmm\.app\.Simulation, got a Context"):
        FlowReplicaExchangeSampler(LADDER, build().simulation.context, 2, flow=dipeptide.flow)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    simulation = app.Simulation(dipeptide.topology, dipeptide.system, integrator, REFERENCE)
    with pytest.raises(InputError, match="setPositions"):
        FlowReplicaExchangeSampler(LADDER, simulation, 2, flow=dipeptide.flow)
