"""`BoltzmannGeneratorMove` inside openmmtools: what it weighs, what it leaves alone, and what it samples."""
# ruff: noqa: NPY002  (openmmtools, and so the move, draws from numpy's global generator)

import contextlib
import copy
import json
import pickle
import shutil
import time

import numpy as np
import pytest
import torch
import yaml

from openmm_bg import proposals
from openmm_bg.energy import BOLTZMANN
from openmm_bg.errors import InputError
from openmm_bg.free_energy import statistical_inefficiency
from openmm_bg.mcmc import BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove, base
from openmm_bg.simulate import torsion_angle

import openmm  # isort: skip
from openmm import unit  # isort: skip
from openmmtools import cache, states  # isort: skip
from openmmtools.mcmc import GHMCMove, LangevinDynamicsMove, SequenceMove, WeightedMove  # isort: skip
from openmmtools.utils import deserialize, serialize  # isort: skip

PSI = (6, 8, 14, 16)
REFERENCE = openmm.Platform.getPlatformByName("Reference")


def thermodynamic(dipeptide, temperature=300.0, system=None, **options):
    return states.ThermodynamicState(
        dipeptide.system if system is None else system, temperature * unit.kelvin, **options
    )


def at(positions, **options):
    return states.SamplerState(np.array(positions) * unit.nanometer, **options)


def snapshot(state):
    v = None if state.velocities is None else np.array(state.velocities.value_in_unit(unit.nanometer / unit.picosecond))
    return np.array(state.positions.value_in_unit(unit.nanometer)), v


def random_velocities(dipeptide):
    v = np.random.default_rng(4).normal(size=(len(dipeptide.positions), 3))
    return v * unit.nanometer / unit.picosecond


class Recorder:
    """Wraps a rule of `moves` and `FlowProposals._draw`: the log-weights that were weighed, the y they belong to."""

    def __init__(self, monkeypatch, name):
        rule, draw = getattr(proposals.metropolis, name), proposals.FlowProposals._draw
        self.weights, self.drawn = [], []

        def record_rule(current, proposed, rng):
            self.weights.append((float(current), np.array(proposed).ravel()))
            return rule(current, proposed, rng)

        def record_draw(this, n, rng):
            y, log_q = draw(this, n, rng)
            self.drawn.append(y.clone())
            return y, log_q

        monkeypatch.setattr(proposals.metropolis, name, record_rule)
        monkeypatch.setattr(proposals.FlowProposals, "_draw", record_draw)


class TorsionState(states.GlobalParameterState):
    lambda_psi = states.GlobalParameterState.GlobalParameter("lambda_psi", standard_value=1.0)


# -------------------------------------------------------------------- what is weighed


@pytest.mark.parametrize("rule, n_proposals", [("independence_chain", 1), ("multiple_proposal_chain", 4)])
def test_the_weight_is_the_thermodynamic_states_own(dipeptide, artifact, contexts, monkeypatch, rule, n_proposals):
    """Temperature, pressure, a restraint and its parameter, against energies of a Context of our own."""
    system = copy.deepcopy(dipeptide.system)
    nonbonded = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    restraint = openmm.CustomTorsionForce("lambda_psi * 5.0 * (1 + cos(theta))")
    restraint.addGlobalParameter("lambda_psi", 1.0)
    restraint.addTorsion(*PSI, [])
    system.addForce(restraint)
    box = 4.0 * np.eye(3)
    system.setDefaultPeriodicBoxVectors(*box)
    plain = thermodynamic(dipeptide, 350.0, system, pressure=20.0 * unit.atmosphere)
    state = states.CompoundThermodynamicState(plain, [TorsionState(lambda_psi=0.3)])
    move = BoltzmannGeneratorMove(artifact, n_steps=3, n_proposals=n_proposals)
    # The cached Context holds another replica's positions, box and parameter.
    other = states.CompoundThermodynamicState(
        thermodynamic(dipeptide, 400.0, system, pressure=1.0 * unit.atmosphere), [TorsionState(lambda_psi=0.9)]
    )
    move.apply(other, at(dipeptide.positions, box_vectors=1.1 * box * unit.nanometer), context_cache=contexts)
    assert len(contexts) == 1

    current = np.array(dipeptide.positions) + 1e-3 * np.random.default_rng(2).normal(size=(22, 3))
    recorder = Recorder(monkeypatch, rule)
    move.apply(state, at(current, box_vectors=box * unit.nanometer), context_cache=contexts)
    assert len(contexts) == 1 and len(recorder.weights) == 1

    context = openmm.Context(system, openmm.VerletIntegrator(0.001), REFERENCE)
    context.setParameter("lambda_psi", 0.3)
    context.setPeriodicBoxVectors(*box)
    coordinates = dipeptide.flow.coordinates
    y0, s = coordinates.to_internal(torch.from_numpy(current)[None])
    y = torch.cat((y0, recorder.drawn[0]))
    fixed = s.expand(len(y), -1)
    frames = coordinates.to_positions(y, fixed).numpy()
    pressure_volume = (20.0 * unit.atmosphere * 64.0 * unit.nanometer**3 * unit.AVOGADRO_CONSTANT_NA).value_in_unit(
        unit.kilojoule_per_mole
    )
    u = []
    for x in frames:
        context.setPositions(x)
        u.append(context.getState(energy=True).getPotentialEnergy()._value + pressure_volume)
    log_q = dipeptide.flow.log_prob(y).detach().numpy()
    expected = coordinates.log_volume(y, fixed).numpy() - np.array(u) / (BOLTZMANN * 350.0) - log_q
    before, proposed = recorder.weights[0]
    assert len(proposed) == 3 * n_proposals and np.isfinite(proposed).any()
    inside = np.isfinite(proposed)
    np.testing.assert_allclose(before, expected[0], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(proposed[inside], expected[1:][inside], rtol=1e-6, atol=1e-5)


# -------------------------------------------------------------------- what changes and what does not


@pytest.mark.parametrize("n_proposals", [1, 4])
def test_rejected_and_accepted_moves(dipeptide, artifact, contexts, n_proposals):
    np.random.seed(1)
    move = BoltzmannGeneratorMove(artifact, n_proposals=n_proposals)
    state = thermodynamic(dipeptide, 330.0)
    replica = at(dipeptide.positions, velocities=random_velocities(dipeptide))
    system, coordinates = dipeptide.system, dipeptide.flow.coordinates
    bonds = np.array([system.getConstraintParameters(k)[:2] for k in range(system.getNumConstraints())])
    masses = np.array([system.getParticleMass(i)._value for i in range(22)])
    seen = {True: 0, False: 0}
    for _ in range(40):
        x, v = snapshot(replica)
        kept = (replica.positions, replica.velocities)
        before = move.statistics
        move.apply(state, replica, context_cache=contexts)
        after_x, after_v = snapshot(replica)
        accepted = move.statistics["n_accepted"] - before["n_accepted"]
        assert move.statistics["n_proposed"] - before["n_proposed"] == 1
        seen[bool(accepted)] += 1
        if not accepted:
            assert replica.positions is kept[0] and replica.velocities is kept[1]
            assert np.array_equal(after_x, x) and np.array_equal(after_v, v)
            continue
        assert not np.allclose(after_x, x) and not np.allclose(after_v, v)
        assert replica.potential_energy is None and replica.kinetic_energy is None
        old, new = (coordinates.to_internal(torch.from_numpy(p)[None])[1] for p in (x, after_x))
        torch.testing.assert_close(new, old, rtol=0.0, atol=1e-10)
        np.testing.assert_allclose(after_x[coordinates.zmatrix.seed[0]], x[coordinates.zmatrix.seed[0]], atol=1e-12)
        relative = [p[bonds[:, 0]] - p[bonds[:, 1]] for p in (after_x, after_v)]
        np.testing.assert_allclose((relative[0] * relative[1]).sum(1), 0.0, atol=1e-4)  # projected on the constraints
        np.testing.assert_allclose((masses[:, None] * after_v).sum(0), 0.0, atol=1e-9)  # the System's CMMotionRemover
    assert seen[True] > 3 and seen[False] > 3


def test_velocities_have_the_states_temperature(dipeptide, artifact, contexts):
    np.random.seed(2)
    move = BoltzmannGeneratorMove(artifact, n_proposals=8)
    replica, state = at(dipeptide.positions), thermodynamic(dipeptide, 400.0)
    masses = np.array([dipeptide.system.getParticleMass(i)._value for i in range(22)])
    kinetic = []
    while len(kinetic) < 60:
        before = move.statistics["n_accepted"]
        replica.velocities = None
        move.apply(state, replica, context_cache=contexts)
        if move.statistics["n_accepted"] > before:
            kinetic.append(0.5 * (masses * (snapshot(replica)[1] ** 2).sum(1)).sum())
    dof = 3 * 22 - 12 - 3
    # The mean of n kinetic energies has standard error kT sqrt(dof / 2n); 300 K in place of 400 K would be 10 of them.
    error = BOLTZMANN * 400.0 * np.sqrt(dof / (2 * len(kinetic)))
    assert abs(np.mean(kinetic) - 0.5 * dof * BOLTZMANN * 400.0) < 5 * error


@pytest.mark.parametrize("own", [True, False])
def test_velocities_are_the_states_not_those_left_in_a_cached_context(dipeptide, artifact, contexts, monkeypatch, own):
    np.random.seed(3)
    move, state = BoltzmannGeneratorMove(artifact, n_steps=20, n_proposals=8), thermodynamic(dipeptide, 300.0)
    context, _ = contexts.get_context(state)
    context.setVelocities(np.full((22, 3), 7.0))
    seen, carry = [], base.carry_velocities

    def spy(context, *arguments):
        seen.append(np.array(context.getState(velocities=True).getVelocities(asNumpy=True)._value))
        return carry(context, *arguments)

    monkeypatch.setattr(base, "carry_velocities", spy)
    replica = at(dipeptide.positions, velocities=random_velocities(dipeptide) if own else None)
    before = snapshot(replica)[1]
    move.apply(state, replica, context_cache=contexts)
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0], before if own else 0.0)


def test_a_state_outside_the_support_stays(dipeptide, artifact, contexts):
    """The mirror image has q = 0: no move may leave it, for none could come back."""
    move = BoltzmannGeneratorMove(artifact, n_steps=5, n_proposals=4)
    mirrored = np.array(dipeptide.positions) * [1.0, 1.0, -1.0]
    replica = at(mirrored)
    move.apply(thermodynamic(dipeptide), replica, context_cache=contexts)
    assert np.array_equal(snapshot(replica)[0], mirrored) and replica.velocities is None
    assert move.statistics == {"n_accepted": 0, "n_proposed": 5, "n_outside": 5}


def test_a_seed_repeats_and_copies_do_not(dipeptide, artifact, contexts):
    def run(move, seed=None):
        if seed is not None:
            np.random.seed(seed)
        torch.manual_seed(0)
        replica = at(dipeptide.positions)
        move.apply(thermodynamic(dipeptide), replica, context_cache=contexts)
        return snapshot(replica)[0]

    move = BoltzmannGeneratorMove(artifact, n_steps=20, n_proposals=4)
    twin = copy.deepcopy(move)
    first = run(move, 11)
    assert np.array_equal(first, run(twin, 11))
    assert not np.allclose(first, run(copy.deepcopy(move)))
    torch.manual_seed(0)
    untouched = torch.rand(1)
    run(move)
    assert torch.rand(1) == untouched  # the global generator is where run() left it


def test_256_proposals_cost_less_than_20_moves(dipeptide, artifact, contexts):
    """They share one pass of the flow; measured as CPU time, which other processes hardly touch."""
    state, replica = thermodynamic(dipeptide), at(dipeptide.positions)

    def cost(n_proposals):
        move = BoltzmannGeneratorMove(artifact, n_proposals=n_proposals)
        times = []
        for _ in range(8):
            start = time.process_time()
            move.apply(state, replica, context_cache=contexts)
            times.append(time.process_time() - start)
        return np.median(times)

    one, many = cost(1), cost(256)
    print(f"{1e3 * one:.1f} ms, {1e3 * many:.1f} ms, ratio {many / one:.1f}")
    assert many < 20.0 * one


# -------------------------------------------------------------------- openmmtools' machinery


def test_the_serialised_move_is_small_and_plain(artifact):
    move = BoltzmannGeneratorMove(artifact, n_steps=3, n_proposals=5)
    move.statistics = {"n_accepted": np.int64(4), "n_proposed": 9.0}
    stored = serialize(move)
    assert len(json.dumps(stored)) < 1000
    for text, read in ((json.dumps(stored), json.loads), (yaml.safe_dump(stored), yaml.safe_load)):
        again = deserialize(read(text))
        assert (again.n_steps, again.n_proposals) == (3, 5) and again.flow_sha256 == move.flow_sha256
        assert again.statistics == move.statistics == {"n_accepted": 4, "n_proposed": 9, "n_outside": 0}
    assert len(pickle.dumps(move)) < 1000
    assert pickle.loads(pickle.dumps(move)).__getstate__() == move.__getstate__()
    twin = copy.deepcopy(move)
    twin.statistics = {"n_accepted": 0, "n_proposed": 0}
    assert move.statistics["n_proposed"] == 9
    assert not any(hasattr(move, name) for name in ("__len__", "__iter__", "__getitem__", "timestep"))


def test_moves_are_stored_under_their_public_name(artifact):
    """Files outlive the modules that a class stands in."""
    for kind in (BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove):
        stored = serialize(kind(artifact))
        assert stored["_serialized__module_name"] == "openmm_bg.mcmc"
        assert stored["_serialized__class_name"] == kind.__name__


def test_copies_cost_little_and_share_no_counts(artifact):
    """openmmtools copies every move of every state at every iteration."""
    for move in (BoltzmannGeneratorMove(artifact), NonequilibriumFlowMove(artifact, schedule=np.linspace(0, 1, 101))):
        sequence = SequenceMove([move] * 10)
        start = time.process_time()
        twin = copy.deepcopy(sequence)
        assert time.process_time() - start < 0.05  # measured: under a millisecond
        twin.move_list[0].statistics = {"n_accepted": 1, "n_proposed": 2}
        assert move.statistics["n_proposed"] == 0 and move.n_proposed == 0
        assert (twin.move_list[0].n_accepted, twin.move_list[0].n_proposed) == (1, 2)
        assert twin.move_list[0].flow_path is move.flow_path


def test_sequences_and_weighted_sets(dipeptide, artifact, contexts):
    np.random.seed(3)
    flow_move = BoltzmannGeneratorMove(artifact, n_steps=2)
    md = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=2)
    chosen = WeightedMove([(flow_move, 0.5), (md, 0.5)])
    sequence = deserialize(serialize(SequenceMove([md, chosen, BoltzmannGeneratorMove(artifact)])))
    replica = at(dipeptide.positions)
    for _ in range(12):
        sequence.apply(thermodynamic(dipeptide), replica, context_cache=contexts)
    statistics = sequence.statistics
    assert statistics[2]["n_proposed"] == 12
    assert 2 <= statistics[1][0]["n_proposed"] <= 22
    assert flow_move.statistics["n_proposed"] == 0
    assert np.isfinite(snapshot(replica)[0]).all()


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_what_openmmtools_asks_of_its_own_moves(dipeptide, artifact, contexts, tmp_path):
    """The checks of its test suite: equal pickles, the same moves back from a .nc file, one Context for all."""
    from openmmtools.multistate import MultiStateReporter
    from openmmtools.tests import test_mcmc

    ours = [
        BoltzmannGeneratorMove(artifact, 2, 3, range(22)),
        LatentFlowMove(artifact, 4, 0.2),
        NonequilibriumFlowMove(artifact, 2, np.linspace(0.0, 1.0, 3), 0.2, 2),
    ]
    ours[0].statistics = {"n_accepted": 3, "n_proposed": 8}
    cases = [*ours, SequenceMove([GHMCMove(), *ours]), WeightedMove([(ours[0], 0.5), (ours[1], 0.5)])]
    for move in cases:
        assert pickle.dumps(deserialize(serialize(move))) == pickle.dumps(move)
    with contextlib.closing(MultiStateReporter(str(tmp_path / "moves.nc"), open_mode="w")) as reporter:
        reporter.write_mcmc_moves(cases)
        assert [m.__getstate__() for m in reporter.read_mcmc_moves()[:3]] == [m.__getstate__() for m in ours]
    md = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=1)
    cache.global_context_cache.empty()
    SequenceMove([md, *ours]).apply(thermodynamic(dipeptide), at(dipeptide.positions), context_cache=contexts)
    assert len(contexts) == 1 and contexts._lru._n_access == 4 and len(cache.global_context_cache) == 0
    np.random.seed(1)
    test_mcmc.test_metropolized_moves()  # it makes one of every subclass it finds
    test_mcmc.test_moves_serialization()


@pytest.mark.parametrize("kind", ["MultiStateSampler", "ReplicaExchangeSampler", "ParallelTemperingSampler"])
def test_openmmtools_drivers_store_and_resume(dipeptide, artifact, tmp_path, kind):
    """All moves go through the .nc file, and their counts come back from it."""
    from openmmtools import multistate

    driver = getattr(multistate, kind)
    md = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=2)
    flow_moves = [
        BoltzmannGeneratorMove(artifact, n_steps=3),
        LatentFlowMove(artifact, n_steps=2),
        NonequilibriumFlowMove(artifact, schedule=[0.0, 0.4, 1.0], step=0.2),
    ]
    temperatures, replicas = (300.0, 350.0), [at(dipeptide.positions), at(dipeptide.positions)]
    storage = str(tmp_path / "run.nc")
    sampler = driver(mcmc_moves=SequenceMove([md, *flow_moves]), number_of_iterations=2)
    reporter = multistate.MultiStateReporter(storage, checkpoint_interval=1)
    if kind == "ParallelTemperingSampler":
        ladder = {"min_temperature": 300.0 * unit.kelvin, "max_temperature": 350.0 * unit.kelvin, "n_temperatures": 2}
        sampler.create(thermodynamic(dipeptide), replicas, reporter, **ladder)
    else:
        sampler.create([thermodynamic(dipeptide, t) for t in temperatures], replicas, reporter)
    sampler.run()

    def counts(sampler):
        return [[s["n_proposed"] for s in m.statistics[1:]] for m in sampler.mcmc_moves]

    assert counts(sampler) == [[6, 4, 2], [6, 4, 2]]
    accepted = [m.statistics for m in sampler.mcmc_moves]
    del sampler
    again = driver.from_storage(multistate.MultiStateReporter(storage, open_mode="r+", checkpoint_interval=1))
    assert [m.statistics for m in again.mcmc_moves] == accepted
    assert again.mcmc_moves[0].move_list[3].schedule == [0.0, 0.4, 1.0]
    again.extend(1)
    assert counts(again) == [[9, 6, 3], [9, 6, 3]]
    found = [state.temperature.value_in_unit(unit.kelvin) for state in again._thermodynamic_states]
    np.testing.assert_allclose(found, temperatures)


# -------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("change", [{"version": 99}, {"n_steps": None}, {"n_proposals": 0}, {"n_accepted": None}])
def test_a_damaged_or_foreign_store_raises_our_error(artifact, change):
    stored = {**serialize(BoltzmannGeneratorMove(artifact)), **change}
    with pytest.raises(ValueError, match=r"version|n_steps|n_proposals|whole"):
        deserialize(stored)


def test_a_missing_entry_is_not_a_mere_warning(artifact):
    stored = serialize(BoltzmannGeneratorMove(artifact))
    del stored["flow_sha256"]
    with pytest.raises(ValueError, match="flow_sha256"):
        deserialize(stored)


def test_another_system_is_refused_before_anything_changes(dipeptide, artifact, contexts):
    move = BoltzmannGeneratorMove(artifact)
    larger = copy.deepcopy(dipeptide.system)
    larger.addParticle(18.0)
    for force in larger.getForces():
        if isinstance(force, openmm.NonbondedForce):
            force.addParticle(0.0, 1.0, 0.0)
    x = np.vstack((dipeptide.positions, [[3.0, 3.0, 3.0]]))
    replica = at(x)
    with pytest.raises(ValueError, match="23 particles"):
        move.apply(thermodynamic(dipeptide, system=larger), replica, context_cache=contexts)
    assert np.array_equal(snapshot(replica)[0], x) and len(contexts) == 0
    assert move.statistics["n_proposed"] == 0
    bonded = copy.deepcopy(dipeptide.system)
    bonded.addConstraint(4, 6, 0.14)  # of a heavy-atom bond, which the flow models
    with pytest.raises(ValueError, match="constrain"):
        move.apply(thermodynamic(dipeptide, system=bonded), at(dipeptide.positions), context_cache=contexts)
    x = np.array(dipeptide.positions)
    x[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        move.apply(thermodynamic(dipeptide), at(x), context_cache=contexts)


def test_the_artifact_is_the_one_the_move_was_made_with(dipeptide, artifact, tmp_path, contexts, monkeypatch):
    path = tmp_path / "other.bg"
    shutil.copy(artifact, path)
    move = BoltzmannGeneratorMove(path)
    monkeypatch.setattr(base, "_flows", {})  # as in another process
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the one"):
        move.apply(thermodynamic(dipeptide), at(dipeptide.positions), context_cache=contexts)
    path.unlink()
    stored = deserialize(serialize(move))  # analysis needs no artifact
    with pytest.raises(ValueError, match="cannot be read"):
        stored.apply(thermodynamic(dipeptide), at(dipeptide.positions), context_cache=contexts)


def test_bad_arguments(dipeptide, artifact, tmp_path):
    with pytest.raises(ValueError, match="save"):
        BoltzmannGeneratorMove(dipeptide.flow)
    with pytest.raises(ValueError, match="cannot be read"):
        BoltzmannGeneratorMove(tmp_path / "none.bg")
    (tmp_path / "foreign.bg").write_text("no flow")
    with pytest.raises(ValueError, match="TorchScript"):
        BoltzmannGeneratorMove(tmp_path / "foreign.bg")
    for option in ({"n_steps": 0}, {"n_proposals": 0}, {"n_steps": 1.5}, {"n_proposals": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            BoltzmannGeneratorMove(artifact, **option)
    with pytest.raises(ValueError, match="n_accepted"):
        BoltzmannGeneratorMove(artifact).statistics = {"n_proposed": 3}


# -------------------------------------------------------------------- what is sampled


def scores(dipeptide, artifact, weighted_reference, temperature, rounds, seed):
    """z of MD and moves against `reference`, and the moves' acceptance rate.

    GHMC, so that the dynamics has no time-step error of its own.
    """
    np.random.seed(seed)
    contexts = cache.ContextCache(platform=REFERENCE)
    md = GHMCMove(timestep=1.0 * unit.femtosecond, collision_rate=5.0 / unit.picosecond, n_steps=5)
    flow_move = BoltzmannGeneratorMove(artifact, n_steps=3, n_proposals=4)
    move, state = SequenceMove([md, flow_move]), thermodynamic(dipeptide, temperature)
    replica = at(dipeptide.positions)
    energy, psi = np.empty(rounds), np.empty(rounds)
    context, _ = contexts.get_context(state)
    for k in range(-20, rounds):
        move.apply(state, replica, context_cache=contexts)
        if k >= 0:
            replica.apply_to_context(context, ignore_velocities=True)
            energy[k] = context.getState(energy=True).getPotentialEnergy()._value
            psi[k] = torsion_angle(snapshot(replica)[0][None], PSI)[0] > 1.0
    z = {}
    for name, series in (("energy", energy), ("psi", psi)):
        mean, error = weighted_reference[temperature, name]
        own = series.std(ddof=1) * np.sqrt(statistical_inefficiency(series) / rounds)
        z[name] = (series.mean() - mean) / np.hypot(error, own)
        print(f"{temperature} K {name}: {series.mean():.3f} ± {own:.3f}, {mean:.3f} ± {error:.3f}, z {z[name]:.2f}")
    assert 0.05 < weighted_reference[temperature, "psi"][0] < 0.95  # a population that could be wrong
    return z, flow_move.statistics["n_accepted"] / flow_move.statistics["n_proposed"]


@pytest.mark.statistical
@pytest.mark.parametrize("temperature", [300.0, 350.0])
def test_md_and_moves_sample_the_state(dipeptide, artifact, weighted_reference, temperature):
    z, acceptance = scores(dipeptide, artifact, weighted_reference, temperature, 300, seed=6)
    assert acceptance > 0.2
    assert all(abs(value) < 4.0 for value in z.values()), z


@pytest.mark.statistical
def test_acceptance_on_the_energy_alone_is_caught(dipeptide, artifact, weighted_reference, monkeypatch):
    """log q left out, as openmmtools' MetropolizedMove would."""
    draw = proposals.FlowProposals._draw
    monkeypatch.setattr(
        proposals.FlowProposals, "_draw", lambda self, n, rng: (draw(self, n, rng)[0], torch.zeros(n).double())
    )
    monkeypatch.setattr(proposals.FlowProposals, "_log_q", lambda self, y: torch.zeros(len(y)).double())
    z, _ = scores(dipeptide, artifact, weighted_reference, 300.0, 100, seed=7)
    assert abs(z["energy"]) > 5.0, z


def test_arguments_of_other_types_are_named(dipeptide, artifact, contexts):
    for atoms in (5, 22.0):
        with pytest.raises(InputError, match="atom_subset must be a list"):
            BoltzmannGeneratorMove(artifact, atom_subset=atoms)
    move = BoltzmannGeneratorMove(artifact)
    thermo, sampler = thermodynamic(dipeptide), at(dipeptide.positions)
    for arguments in ((thermo, thermo), (sampler, thermo), (sampler, sampler), (dipeptide.system, sampler)):
        with pytest.raises(InputError, match=r"apply\(\) takes a ThermodynamicState and a SamplerState, in this order"):
            move.apply(*arguments, context_cache=contexts)
    assert move.n_proposed == 0
    move.apply(thermo, sampler, context_cache=contexts)
    assert move.n_proposed == 1
