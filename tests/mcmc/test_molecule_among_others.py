"""The flow's molecule among others: `atom_subset` of the openmmtools moves, and latent and nonequilibrium moves."""
# ruff: noqa: NPY002  (openmmtools, and so the move, draws from numpy's global generator)

import copy
import json

import numpy as np
import pytest
import torch
import yaml

import openmm_bg as bg
from openmm_bg import proposals
from openmm_bg.energy import BOLTZMANN
from openmm_bg.latent_space import LatentSpace
from openmm_bg.mcmc import BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove
from openmm_bg.rules import annealing
from openmm_bg.simulate import torsion_angle

import openmm  # isort: skip
from openmm import unit  # isort: skip
from openmmtools import cache, states  # isort: skip
from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove  # isort: skip
from openmmtools.utils import deserialize, serialize  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
PSI = (6, 8, 14, 16)
ATOMS = [22 - i for i in range(22)]  # the dipeptide in reverse order, behind the ion
# In the frame of the flow's own positions: where the ion's energy varies most without a clash.
ION = [[0.073, -0.417, 0.215]]
WATER = [[-0.75, 0.45, 0.35], [-0.65428, 0.45, 0.35], [-0.77398, 0.54268, 0.35]]
CHARGE = 0.12
N_STARTS = 140


def among_others(alone, periodic=False):
    """An ion, the dipeptide's atoms in reverse order, and a rigid water."""
    system = openmm.System()
    for mass in (39.0, *(alone.getParticleMass(21 - k) for k in range(22)), 16.0, 1.0, 1.0):
        system.addParticle(mass)
    for k in range(alone.getNumConstraints()):
        i, j, length = alone.getConstraintParameters(k)
        system.addConstraint(ATOMS[i], ATOMS[j], length)
    for i, j, length in ((23, 24, 0.09572), (23, 25, 0.09572), (24, 25, 0.15139)):
        system.addConstraint(i, j, length)
    for force in alone.getForces():
        if isinstance(force, openmm.NonbondedForce):
            nonbonded = openmm.NonbondedForce()
            if periodic:
                nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
            nonbonded.addParticle(CHARGE, 0.25, 0.2)
            for k in range(22):
                nonbonded.addParticle(*force.getParticleParameters(21 - k))
            for charge, sigma, epsilon in ((-0.8, 0.31, 0.6), (0.4, 1.0, 0.0), (0.4, 1.0, 0.0)):
                nonbonded.addParticle(charge, sigma, epsilon)
            for k in range(force.getNumExceptions()):
                i, j, *rest = force.getExceptionParameters(k)
                nonbonded.addException(ATOMS[i], ATOMS[j], *rest)
            for i, j in ((23, 24), (23, 25), (24, 25)):
                nonbonded.addException(i, j, 0.0, 1.0, 0.0)
            system.addForce(nonbonded)
        elif isinstance(force, openmm.HarmonicBondForce):
            bonds = openmm.HarmonicBondForce()
            for k in range(force.getNumBonds()):
                i, j, *rest = force.getBondParameters(k)
                bonds.addBond(ATOMS[i], ATOMS[j], *rest)
            system.addForce(bonds)
        elif isinstance(force, openmm.HarmonicAngleForce):
            angles = openmm.HarmonicAngleForce()
            for k in range(force.getNumAngles()):
                h, i, j, *rest = force.getAngleParameters(k)
                angles.addAngle(ATOMS[h], ATOMS[i], ATOMS[j], *rest)
            system.addForce(angles)
        elif isinstance(force, openmm.PeriodicTorsionForce):
            torsions = openmm.PeriodicTorsionForce()
            for k in range(force.getNumTorsions()):
                h, i, j, m, *rest = force.getTorsionParameters(k)
                torsions.addTorsion(ATOMS[h], ATOMS[i], ATOMS[j], ATOMS[m], *rest)
            system.addForce(torsions)
    return system


def together(molecule):
    """Positions of the whole System [..., 26, 3] from the molecule's [..., 22, 3]."""
    molecule = np.asarray(molecule)
    ends = [np.broadcast_to(np.array(x), (*molecule.shape[:-2], len(x), 3)) for x in (ION, WATER)]
    return np.concatenate((ends[0], molecule[..., ::-1, :], ends[1]), axis=-2)


def at(positions, **options):
    return states.SamplerState(np.array(positions) * unit.nanometer, **options)


def positions_of(replica):
    return np.array(replica.positions.value_in_unit(unit.nanometer))


class Energies:
    """Potential energies of frames in a Context of our own, kJ/mol."""

    def __init__(self, system, box=None):
        self.context = openmm.Context(system, openmm.VerletIntegrator(0.001), REFERENCE)
        if box is not None:
            self.context.setPeriodicBoxVectors(*box)

    def __call__(self, frames):
        out = np.empty(len(frames))
        for k, x in enumerate(frames):
            self.context.setPositions(np.ascontiguousarray(x))
            out[k] = self.context.getState(energy=True).getPotentialEnergy()._value
        return out


# -------------------------------------------------------------------- what is weighed, what moves


def test_the_weight_is_the_whole_systems(dipeptide, artifact, contexts, monkeypatch):
    """Energies of all particles, the state's temperature and pressure, and log J + Φ and log q of the molecule."""
    system, box = among_others(dipeptide.system, periodic=True), 4.0 * np.eye(3)
    system.setDefaultPeriodicBoxVectors(*box)
    state = states.ThermodynamicState(system, 340.0 * unit.kelvin, pressure=20.0 * unit.atmosphere)
    rule, draw = proposals.metropolis.independence_chain, proposals.FlowProposals._draw
    weights, drawn = [], []

    def record_rule(current, proposed, rng):
        weights.append(np.concatenate(([current], np.ravel(proposed))))
        return rule(current, proposed, rng)

    def record_draw(this, n, rng):
        drawn.append(draw(this, n, rng))
        return drawn[-1]

    monkeypatch.setattr(proposals.metropolis, "independence_chain", record_rule)
    monkeypatch.setattr(proposals.FlowProposals, "_draw", record_draw)
    coordinates = dipeptide.flow.coordinates
    y0, s = coordinates.to_internal(torch.from_numpy(dipeptide.positions)[None])
    frame = together(coordinates.to_positions(y0, s)[0].numpy()) + 1.7
    replica = at(frame, box_vectors=box * unit.nanometer)
    np.random.seed(3)
    move = BoltzmannGeneratorMove(artifact, n_steps=5, atom_subset=ATOMS)
    move.apply(state, replica, context_cache=contexts)

    y = torch.cat((y0, drawn[0][0]))
    fixed = s.expand(len(y), -1)
    frames = together(coordinates.to_positions(y, fixed).numpy()) + 1.7
    pressure_volume = (20.0 * unit.atmosphere * 64.0 * unit.nanometer**3 * unit.AVOGADRO_CONSTANT_NA).value_in_unit(
        unit.kilojoule_per_mole
    )
    u = (Energies(system, box)(frames) + pressure_volume) / (BOLTZMANN * 340.0)
    alone = Energies(dipeptide.system)(frames[:, ATOMS]) / (BOLTZMANN * 340.0)
    assert np.ptp((u - alone)[:3]) > 0.1  # the others do matter
    log_q = dipeptide.flow.log_prob(y).detach().numpy()
    expected = coordinates.log_volume(y, fixed).numpy() - u - log_q
    inside = np.isfinite(weights[0])
    assert inside[0] and inside.sum() > 3
    np.testing.assert_allclose(weights[0][inside], expected[inside], rtol=1e-6, atol=1e-5)

    after = positions_of(replica)
    others = [0, 23, 24, 25]
    assert move.statistics["n_accepted"] > 0 and not np.allclose(after[ATOMS], frame[ATOMS])
    assert np.array_equal(after[others], frame[others])
    found = np.abs(frames - after).max(axis=(1, 2)).min()
    assert found < 1e-6  # one of those that were weighed
    np.testing.assert_allclose(after[ATOMS[coordinates.zmatrix.seed[0]]], frame[ATOMS[coordinates.zmatrix.seed[0]]])


def test_latent_moves_weigh_with_the_density_itself(dipeptide, artifact, contexts, monkeypatch):
    """w = π/q of current and proposed state, q from the flow's own log_prob: with its base and its determinant."""
    rule, seen = proposals.metropolis.metropolis_step, []

    def record(state, proposal, rng):
        seen.append((proposal.value.copy(), float(state.log_w[0]), float(proposal.log_w[0])))
        return rule(state, proposal, rng)

    monkeypatch.setattr(proposals.metropolis, "metropolis_step", record)
    system, flow = among_others(dipeptide.system), dipeptide.flow
    state = states.ThermodynamicState(system, 340.0 * unit.kelvin)
    y, s = flow.to_internal(dipeptide.positions)
    start = together(flow.to_positions(y, s)[0].numpy())
    np.random.seed(5)
    LatentFlowMove(artifact, n_steps=4, step=0.2, atom_subset=ATOMS).apply(state, at(start), context_cache=contexts)
    with torch.no_grad():
        y = torch.cat((y, flow.forward(torch.from_numpy(np.concatenate([z for z, _, _ in seen])))[0]))
        log_q = flow.log_prob(y).numpy()
    fixed = s.expand(len(y), -1)
    u = Energies(system)(together(flow.coordinates.to_positions(y, fixed).numpy())) / (BOLTZMANN * 340.0)
    expected = flow.coordinates.log_volume(y, fixed).numpy() - u - log_q
    np.testing.assert_allclose(seen[0][1], expected[0], rtol=1e-6, atol=1e-4)
    found = np.array([w for _, _, w in seen])
    assert np.isfinite(found).sum() > 2
    inside = np.isfinite(found)
    np.testing.assert_allclose(found[inside], expected[1:][inside], rtol=1e-6, atol=1e-4)
    # The first proposal is near, but not the state itself.
    assert np.abs(seen[0][0] - flow.inverse(y[:1])[0].detach().numpy()).max() > 0.05


def test_switching_moves_work_on_the_states_own_bridge(dipeptide, artifact, contexts, monkeypatch):
    """log π - log q of every state that the legs visit, from positions alone; W_up and W_down from those."""
    rule, seen, legs = annealing.nonequilibrium_candidate_move, [], []

    def record_rule(z, log_base, log_target, sample, kernel, schedule, rng):
        def target(z):
            value = log_target(z)
            seen.append((z.copy(), float(value[0] - log_base(z)[0])))
            return value

        return rule(z, log_base, target, sample, kernel, schedule, rng)

    def record_leg(name):
        genuine = getattr(annealing, name)

        def leg(state, *arguments):
            final, work, info = genuine(state, *arguments)
            legs.append((name, float(state.log_w[0]), float(final.log_w[0]), float(work[0])))
            return final, work, info

        monkeypatch.setattr(annealing, name, leg)

    record_leg("down_leg")
    record_leg("up_leg")
    monkeypatch.setattr(annealing, "nonequilibrium_candidate_move", record_rule)
    system, flow = among_others(dipeptide.system), dipeptide.flow
    state = states.ThermodynamicState(system, 340.0 * unit.kelvin)
    y, s = flow.to_internal(dipeptide.positions)
    start = together(flow.to_positions(y, s)[0].numpy())
    replica = at(start)
    np.random.seed(6)
    move = NonequilibriumFlowMove(artifact, schedule=[0.0, 0.4, 1.0], step=0.2, atom_subset=ATOMS)
    move.apply(state, replica, context_cache=contexts)
    with torch.no_grad():
        y = flow.forward(torch.from_numpy(np.concatenate([z for z, _ in seen])))[0]
        log_q = flow.log_prob(y).numpy()
    fixed = s.expand(len(y), -1)
    frames = together(flow.coordinates.to_positions(y, fixed).numpy())
    u = Energies(system)(frames) / (BOLTZMANN * 340.0)
    expected = flow.coordinates.log_volume(y, fixed).numpy() - u - log_q
    found = np.array([w for _, w in seen])
    inside = np.isfinite(found)
    # The current state, two kernels down, a fresh draw, two kernels up.
    assert len(found) == 6 and inside[0] and inside.sum() > 2
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-6, atol=1e-4)
    assert [name for name, *_ in legs] == ["down_leg", "up_leg"]
    for name, first, last, work in legs:  # with two increments of λ each work has two terms, both at visited states
        terms = 0.4 * (last if name == "down_leg" else first) + 0.6 * np.append(found[inside], -np.inf)
        assert np.abs(np.nan_to_num(terms - work, nan=0.0)).min() < 1e-6
    assert move.statistics["n_proposed"] == 1
    if move.statistics["n_accepted"]:
        assert np.abs(frames - positions_of(replica)).max(axis=(1, 2)).min() < 1e-6


def test_a_molecule_across_the_boundary_stays_whole(dipeptide, artifact, contexts):
    """OpenMM wraps molecules as wholes, so that MD and moves alternate wherever they stand; a torn one is refused."""
    system, box = among_others(dipeptide.system, periodic=True), 3.0 * np.eye(3)
    system.setDefaultPeriodicBoxVectors(*box)
    state = states.ThermodynamicState(system, 300.0 * unit.kelvin, pressure=1.0 * unit.atmosphere)
    flow_move = BoltzmannGeneratorMove(artifact, n_steps=4, atom_subset=ATOMS)
    md = LangevinDynamicsMove(timestep=0.5 * unit.femtosecond, n_steps=2)
    x = together(dipeptide.positions - dipeptide.positions.mean(0))
    x[[0, 23, 24, 25]] += 1.0
    np.random.seed(4)
    replica = at(x, box_vectors=box * unit.nanometer)
    for _ in range(3):
        SequenceMove([md, flow_move]).apply(state, replica, context_cache=contexts)
    assert flow_move.statistics["n_proposed"] == 12 and flow_move.statistics["n_outside"] == 0
    torn = positions_of(replica)
    torn[ATOMS] = np.mod(torn[ATOMS], 3.0)
    torn[ATOMS[:6]] += [3.0, 0.0, 0.0]
    replica = at(torn, box_vectors=box * unit.nanometer)
    with pytest.raises(ValueError, match="whole"):
        flow_move.apply(state, replica, context_cache=contexts)
    assert np.array_equal(positions_of(replica), torn)


# -------------------------------------------------------------------- mistakes


def test_a_barostat_needs_a_molecule(dipeptide, artifact, contexts):
    """Without bonds OpenMM takes every heavy atom for a molecule of its own, and a barostat would part them."""
    system = copy.deepcopy(dipeptide.system)
    for k in reversed(range(system.getNumForces())):
        if isinstance(system.getForce(k), openmm.HarmonicBondForce):
            system.removeForce(k)
        elif isinstance(system.getForce(k), openmm.NonbondedForce):
            system.getForce(k).setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    system.setDefaultPeriodicBoxVectors(*(4.0 * np.eye(3)))
    state = states.ThermodynamicState(system, 300.0 * unit.kelvin, pressure=1.0 * unit.atmosphere)
    replica, move = at(dipeptide.positions), BoltzmannGeneratorMove(artifact)
    with pytest.raises(ValueError, match="different molecules"):
        move.apply(state, replica, context_cache=contexts)
    assert np.array_equal(positions_of(replica), dipeptide.positions) and move.statistics["n_proposed"] == 0


def test_wrong_subsets_are_refused(dipeptide, artifact, contexts):
    for subset in ([0, 0], [], [-1], [1.5], [True]):
        with pytest.raises(ValueError, match="atom_subset"):
            BoltzmannGeneratorMove(artifact, atom_subset=subset)
    system = among_others(dipeptide.system)
    x = together(dipeptide.positions)

    def refused(message, subset=ATOMS, system=system, positions=x):
        state = states.ThermodynamicState(system, 300.0 * unit.kelvin)
        move, replica = BoltzmannGeneratorMove(artifact, atom_subset=subset), at(positions)
        with pytest.raises(ValueError, match=message):
            move.apply(state, replica, context_cache=contexts)
        assert np.array_equal(positions_of(replica), positions) and move.statistics["n_proposed"] == 0

    refused("21 particles", subset=ATOMS[1:])
    refused("particle 30", subset=[*ATOMS[1:], 30])
    refused("constraint", subset=[*ATOMS[1:], 0])  # a hydrogen of a constrained bond left out
    refused("bond", subset=ATOMS[::-1])  # another order
    refused("different Systems", positions=x[:-1])
    site = copy.deepcopy(system)
    site.addParticle(0.0)
    site.setVirtualSite(26, openmm.TwoParticleAverageSite(ATOMS[4], 0, 0.5, 0.5))
    next(f for f in site.getForces() if isinstance(f, openmm.NonbondedForce)).addParticle(0.0, 1.0, 0.0)
    refused("virtual site", system=site, positions=np.vstack((x, [[0.0, 0.0, 0.0]])))
    drude = copy.deepcopy(system)
    drude.addForce(openmm.DrudeForce())
    refused("Drude", system=drude)


KINDS = [BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_move_leaves_the_state_alone(dipeptide, artifact, contexts, monkeypatch, kind):
    system, x = among_others(dipeptide.system), together(dipeptide.positions)
    move = kind(artifact, 6, atom_subset=ATOMS)
    state, replica = states.ThermodynamicState(system, 300.0 * unit.kelvin), at(x)
    replica.velocities = np.ones((26, 3)) * unit.nanometer / unit.picosecond
    positions, velocities = replica.positions, replica.velocities
    calls, genuine = [], states.ThermodynamicState.reduced_potential

    def fails(this, context):
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError("in the middle of the chain")
        return genuine(this, context)

    monkeypatch.setattr(states.ThermodynamicState, "reduced_potential", fails)
    with pytest.raises(MemoryError):
        move.apply(state, replica, context_cache=contexts)

    def impossible(this, context):
        raise openmm.OpenMMException("no energy")

    monkeypatch.setattr(states.ThermodynamicState, "reduced_potential", impossible)
    with pytest.raises(bg.errors.EnergyError, match="no energy"):
        move.apply(state, replica, context_cache=contexts)
    assert replica.positions is positions and replica.velocities is velocities
    assert np.array_equal(positions_of(replica), x) and move.statistics["n_proposed"] == 0
    assert state.temperature == 300.0 * unit.kelvin and state.n_particles == 26


def test_stored_moves_keep_their_options(artifact):
    for move in (
        BoltzmannGeneratorMove(artifact, 2, 3, atom_subset=np.array(ATOMS)),
        LatentFlowMove(artifact, 4, 0.25, atom_subset=ATOMS),
        NonequilibriumFlowMove(artifact, 2, np.linspace(0.0, 1.0, 8), 0.2, 3, atom_subset=ATOMS),
    ):
        stored = json.loads(json.dumps(serialize(move)))
        again = deserialize(dict(stored))  # which takes entries out
        assert type(again) is type(move) and again.__getstate__() == move.__getstate__()
        assert again.atom_subset == ATOMS and copy.deepcopy(move).atom_subset == ATOMS
        assert deserialize(yaml.safe_load(yaml.safe_dump(serialize(move)))).__getstate__() == move.__getstate__()
        first = {k: v for k, v in stored.items() if k != "atom_subset"} | {"version": 1}
        assert deserialize(first).atom_subset is None  # as written before atom_subset existed
        assert str(move._OPTIONS and getattr(move, next(iter(move._OPTIONS)))) in repr(move)
    assert "22 particles" in repr(move)
    for step in (0.0, 1.1, "x", True, float("nan")):
        with pytest.raises(ValueError, match="step"):
            LatentFlowMove(artifact, step=step)
        with pytest.raises(ValueError, match="step"):
            NonequilibriumFlowMove(artifact, step=step)
    for schedule in ([0.0, 0.5], [0.0, 1.0, 1.0], [1.0, 0.0], 5, "λ", [0.0, None, 1.0], None):
        with pytest.raises(ValueError, match="schedule"):
            NonequilibriumFlowMove(artifact, schedule=schedule)
    with pytest.raises(ValueError, match="n_kernel_steps"):
        NonequilibriumFlowMove(artifact, n_kernel_steps=0)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_outside_the_support_stay(dipeptide, artifact, contexts, kind):
    mirrored = np.array(dipeptide.positions) * [1.0, 1.0, -1.0]
    replica, move = at(mirrored), kind(artifact, n_steps=3)
    move.apply(states.ThermodynamicState(dipeptide.system, 300.0 * unit.kelvin), replica, context_cache=contexts)
    assert np.array_equal(positions_of(replica), mirrored) and replica.velocities is None
    assert move.statistics == {"n_accepted": 0, "n_proposed": 3, "n_outside": 3}


# -------------------------------------------------------------------- what is sampled


@pytest.fixture(scope="module")
def starts(dipeptide):
    """Weighted samples of the molecule in the field of the others, exact: frames [n, 26, 3], weights, energy functions.

    From many draws of the flow with their importance weights (formula A, at this standing of the molecule and these
    others) each is kept with probability min(1, w/c) and weight max(w, c): fewer samples of nearly one weight, and
    every weighted mean unbiased.
    """
    system, coordinates = among_others(dipeptide.system), dipeptide.flow.coordinates
    whole, alone = Energies(system), Energies(dipeptide.system)
    torch.manual_seed(8)
    y, log_q = dipeptide.flow.sample(1500)
    s = coordinates.reference_fixed.expand(len(y), -1)
    good = coordinates.in_domain(y, s)
    y, s, log_q = y[good], s[good], log_q[good].numpy()
    frames = together(coordinates.to_positions(y, s).numpy())
    log_w = coordinates.log_volume(y, s).numpy() - whole(frames) / (BOLTZMANN * 330.0) - log_q
    w = np.exp(log_w - log_w.max())
    c = w.sum() / N_STARTS
    for _ in range(20):
        c *= np.minimum(1.0, w / c).sum() / N_STARTS
    kept = np.random.default_rng(9).random(len(w)) < np.minimum(1.0, w / c)
    print(f"{kept.sum()} of {len(w)} kept, effective fraction of all {w.sum() ** 2 / (w**2).sum() / len(w):.2f}")
    return system, frames[kept], np.maximum(w, c)[kept] / c, whole, alone


def scores(starts, move, seed):
    """z of weighted means after a few moves against those before, from the very same samples.

    A move that keeps the ensemble keeps weighted samples of it: each difference has mean zero, whatever the weight.
    """
    system, frames, w, whole, alone = starts
    state, contexts = states.ThermodynamicState(system, 330.0 * unit.kelvin), cache.ContextCache(platform=REFERENCE)
    np.random.seed(seed)
    after = np.empty_like(frames)
    for k, x in enumerate(frames):
        replica = at(x)
        move.apply(state, replica, context_cache=contexts)
        after[k] = positions_of(replica)

    def observables(x):
        own = alone(x[:, ATOMS])
        return np.stack([whole(x) - own, own, torsion_angle(x[:, ATOMS], PSI) > 1.0])

    before, behind = observables(frames), observables(after)
    # Bounded, so that no single clash decides; the bounds are those of the start.
    middle, width = before.mean(1, keepdims=True), 2.0 * before.std(1, keepdims=True)
    before, behind = np.tanh((before - middle) / width), np.tanh((behind - middle) / width)
    d = w * (behind - before)
    z = dict(zip(("interaction", "own", "psi"), d.sum(1) / np.sqrt((d**2).sum(1)), strict=True))
    rate = move.statistics["n_accepted"] / move.statistics["n_proposed"]
    print(f"accepted {rate:.2f}, spread {before.std(1)}, means {before.mean(1)} {behind.mean(1)}, z {z}, n {len(w)}")
    assert rate > 0.15  # nothing that stays proves anything
    return z


def moves_to_test(artifact):
    return {
        "D": BoltzmannGeneratorMove(artifact, n_steps=4, atom_subset=ATOMS),
        "E": BoltzmannGeneratorMove(artifact, n_steps=2, n_proposals=4, atom_subset=ATOMS),
        "F": LatentFlowMove(artifact, n_steps=3, step=0.8, atom_subset=ATOMS),
    }


@pytest.mark.statistical
@pytest.mark.parametrize("formula", ["D", "E", "F"])
def test_moves_keep_the_molecule_in_its_field(artifact, starts, formula):
    z = scores(starts, moves_to_test(artifact)[formula], seed=10)
    assert all(abs(value) < 4.0 for value in z.values()), z


@pytest.mark.statistical
def test_others_left_out_of_the_energy_are_caught(artifact, starts, monkeypatch):
    def without(this, positions, reduced_potential):
        far = np.array(positions)
        far[[0, 23, 24, 25]] += 50.0
        return lambda molecule: reduced_potential(this.merge(far, molecule))

    monkeypatch.setattr(proposals.FlowProposals, "within", without)
    z = scores(starts, moves_to_test(artifact)["D"], seed=11)
    assert abs(z["interaction"]) > 5.0, z


@pytest.mark.statistical
def test_a_broken_latent_move_is_caught(artifact, starts, monkeypatch):
    """log q without the base, as if latent space were flat."""

    inverse, log_base = LatentSpace.inverse, LatentSpace.log_base

    def flat_inverse(this, y):
        z, log_q = inverse(this, y)
        return z, log_q - torch.from_numpy(log_base(this, z))

    monkeypatch.setattr(LatentSpace, "inverse", flat_inverse)
    monkeypatch.setattr(LatentSpace, "log_base", lambda this, z: np.zeros(len(z)))
    z = scores(starts, moves_to_test(artifact)["F"], seed=12)
    assert max(abs(value) for value in z.values()) > 5.0, z
