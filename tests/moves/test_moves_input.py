"""For every move on a Context: mistakes and odd Contexts are named and nothing has moved; a seed fixes the chain."""

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.moves import anneal
from openmm_bg.moves.bridge import BASE

import openmm  # isort: skip

SCHEDULE = [0.0, 0.5, 1.0]
MOVES = {
    "D": lambda sampler: sampler,
    "F": bg.LatentMove,
    "G": lambda sampler: bg.NonequilibriumMove(sampler, SCHEDULE),
    "G with s moving": lambda sampler: bg.CartesianNonequilibriumMove(sampler, SCHEDULE, n_verlet=1),
}


@pytest.fixture(autouse=True)
def _no_profiling():
    """TorchScript's profiling executor would recompile for seconds in tests of a few frames."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(params=MOVES)
def kind(request):
    return MOVES[request.param]


def positions(context):
    return context.getState(positions=True).getPositions(asNumpy=True)._value.copy()


def clone(system):
    return openmm.XmlSerializer.clone(system)


@pytest.mark.parametrize("make", [make for name, make in MOVES.items() if name != "D"])
def test_a_move_needs_a_sampler(make_context, make):
    with pytest.raises(InputError, match=r"needs a BoltzmannGeneratorSampler, got a Context"):
        make(make_context())


def test_nan_positions_are_refused(dipeptide, make_context, make_sampler, kind):
    context = make_context()
    move = kind(make_sampler(context))
    x = np.array(dipeptide.positions)
    x[4] = np.nan
    context.setPositions(x)
    with pytest.raises(InputError, match="not finite"):
        move.step(1)
    assert move.statistics["n_proposed"] == 0


def test_a_reinitialised_context_has_no_positions(dipeptide, make_context, make_sampler, kind):
    context = make_context(clone(dipeptide.system))
    move = kind(make_sampler(context))
    context.reinitialize()
    with pytest.raises(InputError, match="has no positions: call"):
        move.step(1)
    context.setPositions(dipeptide.positions)
    assert move.step(1)["inside"]


def test_a_molecule_cut_by_its_box_is_refused(dipeptide, make_context, make_sampler, kind):
    context = make_context(periodic(dipeptide.system))
    move = kind(make_sampler(context))
    x = np.array(dipeptide.positions)
    x[16:, 0] += 3.0  # the same to the force field
    context.setPositions(x)
    with pytest.raises(InputError, match="is the molecule whole"):
        move.step(1)
    np.testing.assert_array_equal(positions(context), x)


def test_a_seed_fixes_the_chain_and_torchs_stream_is_left_alone(make_context, make_sampler, kind):
    found = []
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for seed in (8, 8, 9):
        context = make_context()
        kind(make_sampler(context, seed=seed)).step(4)
        found.append(positions(context))
    assert torch.equal(torch.rand(2), expected)
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_closed_sampler_says_so(make_context, make_sampler, kind):
    context = make_context()
    sampler = make_sampler(context)
    move = kind(sampler)
    x = positions(context)
    sampler.close()
    with pytest.raises(EnergyError, match="closed"):
        move.step(1)
    np.testing.assert_array_equal(positions(context), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sampler: bg.LatentMove(sampler, residues=1), "list of residue indices, got 1"),
        (lambda sampler: bg.LatentMove(sampler, a="0.3"), "0 < a <= 1"),
        (lambda sampler: bg.LatentMove(sampler, width=None), "finite width"),
        (lambda sampler: bg.LatentMove(sampler, a=float("nan")), "0 < a <= 1"),
        (lambda sampler: bg.LatentMove(sampler).burn_in(5, acceptance="0.3"), "between 0 and 1"),
        (lambda sampler: bg.NonequilibriumMove(sampler, SCHEDULE, a=2.0), "0 < a <= 1"),
        (lambda sampler: bg.NonequilibriumMove(sampler, SCHEDULE, n_kernel_steps=1.5), "n_kernel_steps must be"),
        (lambda sampler: anneal(sampler, 2.5, SCHEDULE), "number of walkers must be"),
        (lambda sampler: anneal(sampler, 2, SCHEDULE, width=-1.0), "finite width"),
        (lambda sampler: anneal(sampler, 2, SCHEDULE, n_steps=0), "n_steps must be"),
    ],
)
def test_mistakes_are_named(make_context, make_sampler, call, message):
    with pytest.raises(InputError, match=message):
        call(make_sampler(make_context()))


# ------------------------------------------------------------------------------------- the bridge and its Context


def periodic(system, group=None):
    """The System in a box, with Ewald sums; their reciprocal part in a force group of its own if one is named."""
    system = clone(system)
    system.setDefaultPeriodicBoxVectors((3, 0, 0), (0, 3, 0), (0, 0, 3))
    (force,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    force.setCutoffDistance(1.0)
    if group is not None:
        force.setReciprocalSpaceForceGroup(group)
    return system


@pytest.mark.parametrize("group", [None, BASE, 7])
def test_the_bridge_has_all_of_ewald(dipeptide, make_context, make_sampler, group):
    context = make_context(periodic(dipeptide.system, group))
    move = bg.CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=1)
    x = positions(context)
    u0, u = move._bridge.energies(x.reshape(-1))
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert u == pytest.approx(energy / thermal_energy(300.0), abs=1e-6)
    y, s = dipeptide.flow.to_internal(x)
    log_q = float(dipeptide.flow.log_prob(y).detach()[0])
    assert u0 == pytest.approx(float(dipeptide.flow.coordinates.log_volume(y, s)[0]) - log_q, abs=2e-3)
    assert move.step(1)["inside"]


def with_bond(system, name, value):
    """A System with E = ``name`` · k max(0, r - 5)², which vanishes wherever the molecule is."""
    system = clone(system)
    force = openmm.CustomBondForce(f"{name}*k*max(0, r-5)^2")
    force.addGlobalParameter(name, value)
    force.addPerBondParameter("k")
    force.addBond(0, 21, [1.0])
    system.addForce(force)
    return system, force


def test_a_parameter_of_the_users_does_not_scale_the_flow(dipeptide, make_context, make_sampler):
    """The base's own global parameter must not be one that the Context has: it would be set to the Context's value."""
    plain = bg.CartesianNonequilibriumMove(make_sampler(make_context()), SCHEDULE, n_verlet=1)
    (own,) = set(plain._bridge.context.getParameters())
    context = make_context(with_bond(dipeptide.system, own, 0.25)[0])
    move = bg.CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=1)
    row = positions(context).reshape(-1)
    move._bridge.follow(context)
    assert move._bridge.context.getParameter(own) == 0.25
    np.testing.assert_allclose(move._bridge.energies(row), plain._bridge.energies(row), atol=1e-6)


def test_a_change_that_does_not_show_here_is_followed(dipeptide, make_context, make_sampler):
    system, force = with_bond(dipeptide.system, "strength", 1.0)
    context = make_context(system)
    move = bg.CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=1)
    first = move._bridge
    move.step(1)
    assert move._bridge is first
    force.setBondParameters(0, 0, 21, [50.0])
    force.updateParametersInContext(context)
    move.step(1)
    assert move._bridge is not first
    own = move._bridge.context.getSystem().getForces()
    (bond,) = (f for f in own if isinstance(f, openmm.CustomBondForce))
    assert bond.getBondParameters(0)[2] == (50.0,)


def test_a_change_that_was_not_pushed_leaves_the_bridge(dipeptide, make_context, make_sampler):
    system = clone(dipeptide.system)
    context = make_context(system)
    move = bg.CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, n_verlet=1)
    first = move._bridge
    bonds = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    i, j, r, k = bonds.getBondParameters(0)
    bonds.setBondParameters(0, i, j, r._value + 0.02, k)
    move.step(1)
    assert move._bridge is first
    bonds.updateParametersInContext(context)
    move.step(1)
    assert move._bridge is not first


def test_a_trajectory_that_explodes_is_rejected(make_context, make_sampler):
    context = make_context()
    move = bg.CartesianNonequilibriumMove(make_sampler(context), SCHEDULE, timestep=0.5, n_verlet=8)
    x = positions(context).reshape(1, -1)
    for down, lost in ((True, np.inf), (False, -np.inf)):
        end, work = move._leg(x, down=down)
        assert work[0] == lost and np.isfinite(end).all()
    assert move.step(2)["n_accepted"] == 0
    np.testing.assert_array_equal(positions(context).reshape(1, -1), x)


@pytest.mark.parametrize("seed", ["a", -1, 1.5])
def test_annealing_wants_a_seed(make_context, make_sampler, seed):
    with pytest.raises(InputError, match="seed must be a whole number"):
        anneal(make_sampler(make_context()), 2, SCHEDULE, seed=seed)
