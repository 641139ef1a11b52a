"""Formula F on a Context: the weights are the formula's, blocks keep the other z, step sizes adapt in burn-in only."""

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import InputError
from openmm_bg.latent_space import LatentSpace
from openmm_bg.moves.latent import LatentMove
from openmm_bg.rules import metropolis


def snapshot(context):
    state = context.getState(positions=True, velocities=True)
    return state.getPositions(asNumpy=True)._value.copy(), state.getVelocities(asNumpy=True)._value.copy()


@pytest.fixture(autouse=True)
def _no_profiling():
    """TorchScript's profiling executor would recompile for seconds in tests of a few frames."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture
def seen(monkeypatch):
    """(state, proposal, new state) of every accept-or-reject decision."""
    found, genuine = [], metropolis.metropolis_step

    def spy(state, proposal, rng):
        new, info = genuine(state, proposal, rng)
        found.append((state, proposal, new))
        return new, info

    monkeypatch.setattr(metropolis, "metropolis_step", spy)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"residues": [1], "redraw": True}, {"part": "backbone", "run": 2, "a": 0.7, "width": 1.0}],
    ids=["all", "redrawn residue", "backbone of two residues"],
)
def test_the_weights_are_the_formula(dipeptide, make_context, make_sampler, seen, options):
    """log w of the current state and of every z', recomputed from positions alone."""
    context = make_context()
    context.getIntegrator().step(50)
    sampler = make_sampler(context)
    before, _ = snapshot(context)
    move = bg.LatentMove(sampler, **options)
    report = move.step(8)
    plain, kt = make_context(), thermal_energy(300.0)

    def log_w(x):
        plain.setPositions(x)
        u = plain.getState(energy=True).getPotentialEnergy()._value / kt
        y, s = dipeptide.flow.to_internal(x)
        return float(-u + dipeptide.flow.coordinates.log_volume(y, s) - dipeptide.flow.log_prob(y).detach())

    _, s = dipeptide.flow.to_internal(before)
    assert float(seen[0][0].log_w[0]) == pytest.approx(log_w(before), abs=2e-3)  # float32 networks
    dets = []
    for (state, proposal, new), (following, *_) in zip(seen, [*seen[1:], (seen[-1][2],)], strict=True):
        assert following is new  # the chain goes on from what was decided
        y, log_det = dipeptide.flow.forward(torch.from_numpy(proposal.value))
        if bool(dipeptide.flow.coordinates.in_domain(y, s)[0]):
            x = dipeptide.flow.coordinates.to_positions(y, s)[0].detach().numpy()
            assert float(proposal.log_w[0]) == pytest.approx(log_w(x), abs=2e-3)
        else:
            assert np.isneginf(proposal.log_w[0])
        kept = proposal.value[0] == state.value[0]
        assert any(np.all(kept[~block]) and not np.any(kept[block & ~kept]) for block in move.blocks)
        dets.append(float(log_det[0].detach()))
    assert np.std(dets) > 0.05  # what a lost log-determinant would do to every weight
    assert report["n_proposed"] == 8 and report["n_energies"] == 9 and len(seen) == 8
    # Where the chain ended is where the Context stands, bit for bit if nothing was accepted.
    after, _ = snapshot(context)
    if report["accepted"]:
        y, s_after = dipeptide.flow.to_internal(after)
        np.testing.assert_allclose(s_after, s, atol=1e-9)
        y_end, _ = dipeptide.flow.forward(torch.from_numpy(seen[-1][2].value))
        assert float((torch.sin((y - y_end) / 2)).detach().abs().max()) < 1e-6
    else:
        np.testing.assert_array_equal(after, before)


def test_other_coordinates_may_move_but_their_latent_values_do_not(dipeptide, make_context, make_sampler, seen):
    sampler = make_sampler(make_context())
    move = LatentMove(sampler, residues=[1], part="side chains", redraw=True)
    (block,) = move.blocks
    move.step(3)
    for state, proposal, _ in seen:
        np.testing.assert_array_equal(proposal.value[:, ~block], state.value[:, ~block])
        assert np.all(proposal.value[:, block] != state.value[:, block])


def test_an_accepted_step_keeps_s_the_frame_and_the_constraints(dipeptide, make_context, make_sampler):
    context = make_context()
    context.getIntegrator().step(100)
    x, v = snapshot(context)
    move = LatentMove(make_sampler(context), a=0.2, width=0.2)
    report = move.step(6)
    moved, velocities = snapshot(context)
    assert report["accepted"] and not np.allclose(moved, x) and not np.allclose(velocities, v)
    a, b, c = dipeptide.flow.coordinates.zmatrix.seed
    np.testing.assert_allclose(moved[a], x[a], atol=1e-12)
    normals = [np.cross(p[b] - p[a], p[c] - p[b]) for p in (x, moved)]
    one, two = (n / np.linalg.norm(n) for n in normals)
    np.testing.assert_allclose(one, two, atol=1e-9)
    for k in range(dipeptide.system.getNumConstraints()):
        i, j, _ = dipeptide.system.getConstraintParameters(k)
        before = np.linalg.norm(x[i] - x[j])
        assert np.linalg.norm(moved[i] - moved[j]) == pytest.approx(before, abs=1e-10)
        assert abs(np.dot(moved[i] - moved[j], velocities[i] - velocities[j])) < 1e-4
    masses = np.array([dipeptide.system.getParticleMass(i)._value for i in range(22)])
    np.testing.assert_allclose((masses[:, None] * velocities).sum(0), 0.0, atol=1e-9)
    assert move.statistics["n_proposed"] == 6 and move.statistics["n_accepted"] == report["n_accepted"]
    assert move.info.n_energies == 6


def test_a_rejected_step_changes_nothing(make_context, make_sampler, monkeypatch):
    context = make_context()
    context.getIntegrator().step(10)
    sampler = make_sampler(context)
    move = LatentMove(sampler)
    genuine = sampler.weigh
    monkeypatch.setattr(sampler, "weigh", lambda *args: (genuine(*args)[0], np.array([-np.inf])))
    x, v = snapshot(context)
    report = move.step(5)
    assert report["n_accepted"] == 0 and not report["accepted"] and report["longest_rejection_streak"] == 5
    after = snapshot(context)
    assert np.array_equal(x, after[0]) and np.array_equal(v, after[1])


def test_a_proposal_outside_the_domain_is_rejected_not_drawn_again(make_context, make_sampler, monkeypatch):
    """θ > π describes the same positions as another θ: decided before q → x."""
    sampler = make_sampler(make_context())
    angle = next(k for k, c in enumerate(c for c in sampler.coordinates.coordinates if c.modelled) if c.kind == "angle")
    genuine, calls = LatentSpace.forward, []

    def folded(self, z):
        y, log_det = genuine(self, z)
        calls.append(len(y))
        y[:, angle] = 2.0 * np.pi - y[:, angle]
        return y, log_det

    monkeypatch.setattr(LatentSpace, "forward", folded)
    report = LatentMove(sampler, a=0.05, width=0.05).step(6)
    assert report["n_accepted"] == 0 and calls == [1] * 6


def test_a_state_outside_the_support_stays(dipeptide, make_context, make_sampler):
    y, s = dipeptide.flow.to_internal(dipeptide.positions)
    modelled = [c for c in dipeptide.flow.coordinates.coordinates if c.modelled]
    y[0, next(k for k, c in enumerate(modelled) if c.kind == "amide")] += np.pi
    cis = dipeptide.flow.coordinates.to_positions(y, s)[0].numpy()
    context = make_context(positions=cis)
    x, v = snapshot(context)
    move = LatentMove(make_sampler(context))
    report = move.step(5)
    assert not report["inside"] and report["n_accepted"] == 0 and report["n_energies"] == 0
    a = move.a
    move.burn_in(3)
    assert move.a == a  # nothing to learn here
    assert np.array_equal(x, snapshot(context)[0]) and np.array_equal(v, snapshot(context)[1])


def test_steps_adapt_in_burn_in_only(make_context, make_sampler):
    sampler = make_sampler(make_context())
    move = LatentMove(sampler, a=0.3, width=0.15)
    move.step(4)
    assert (move.a, move.width) == (0.3, 0.15)
    counted = move.info.n_proposed
    move.burn_in(4, acceptance=0.999)  # more than it has: smaller steps
    assert move.a < 0.3 and move.width / move.a == pytest.approx(0.5)
    assert move.info.n_proposed == counted == 4
    small = move.a
    move.burn_in(4, acceptance=0.01)
    assert small < move.a <= 1.0
    adapted = (move.a, move.width)
    move.step(3)
    assert (move.a, move.width) == adapted


def test_blocks_are_those_of_the_residues(dipeptide, make_context, make_sampler):
    sampler = make_sampler(make_context())
    layout = sampler.coordinates.layout
    modelled = [c for c in sampler.coordinates.coordinates if c.modelled]
    residue = {a.index: a.residue.index for a in dipeptide.topology.atoms()}
    (everything,) = LatentMove(sampler).blocks
    assert everything.all()
    (block,) = LatentMove(sampler, residues=[1]).blocks
    assert block.tolist() == [residue[c.atom] == 1 for c in modelled] and 0 < block.sum() < len(modelled)
    (backbone,) = LatentMove(sampler, residues=[1], part="backbone").blocks
    (rest,) = LatentMove(sampler, residues=[1], part="side chains").blocks
    assert np.array_equal(backbone, block & np.array(layout.backbone)) and np.array_equal(backbone ^ rest, block)
    pairs = LatentMove(sampler, run=2).blocks
    assert len(pairs) == 2 and np.array_equal(pairs[0] | pairs[1], everything) and (pairs[0] & pairs[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residues": [3]}, "no residue 3: name residues by their indices, 0 to 2"),
        ({"residues": [-1]}, "no residue -1"),
        ({"residues": ["ALA"]}, "no residue 'ALA'"),
        ({"residues": []}, "have no modelled coordinates"),
        ({"part": "sidechain"}, "part must be"),
        ({"run": 4}, "no 4 consecutive residues"),
        ({"residues": [0, 2], "run": 2}, "no 2 consecutive residues"),
        ({"run": 0}, "run must be at least 1"),
        ({"a": 0.0}, "0 < a <= 1"),
        ({"a": 1.5}, "0 < a <= 1"),
        ({"width": float("inf")}, "finite width"),
    ],
)
def test_bad_blocks_and_steps_are_named(make_context, make_sampler, options, message):
    with pytest.raises(InputError, match=message):
        LatentMove(make_sampler(make_context()), **options)


def test_bad_calls_are_named(make_context, make_sampler):
    sampler = make_sampler(make_context())
    with pytest.raises(InputError, match="number of steps"):
        LatentMove(sampler).step(0)
    with pytest.raises(InputError, match="between 0 and 1"):
        LatentMove(sampler).burn_in(5, acceptance=1.0)
    with pytest.raises(InputError, match="no step size"):
        LatentMove(sampler, redraw=True).burn_in(5)
