"""`MoveReporter`: moves made by ``simulation.step``, at the right steps and without harm to the simulation."""

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg as bg
from openmm_bg.errors import InputError

import openmm  # isort: skip
from openmm import app  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")


@pytest.fixture
def simulation(dipeptide):
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.002)
    integrator.setRandomNumberSeed(7)
    found = app.Simulation(dipeptide.topology, dipeptide.system, integrator, REFERENCE)
    found.context.setPositions(dipeptide.positions)
    found.context.setVelocitiesToTemperature(300.0, 3)
    return found


class Counter:
    """A move that only says when it was made."""

    def __init__(self, context):
        self.context, self.made = context, []

    def step(self, n=1):
        self.made.append((self.context.getStepCount(), n))


def test_moves_are_made_at_multiples_of_the_interval(simulation):
    counter = Counter(simulation.context)
    simulation.reporters.append(bg.MoveReporter(counter, 12, n_steps=3))
    simulation.step(5)
    simulation.step(31)
    assert counter.made == [(12, 3), (24, 3), (36, 3)]
    simulation.currentStep = 100  # as after a restart
    simulation.step(10)
    assert counter.made[3:] == [(108, 3)] and simulation.currentStep == 110


class Witness:
    """Keeps the State that OpenMM hands to reporters."""

    def __init__(self, interval):
        self.interval, self.seen = interval, []

    def describeNextReport(self, simulation):
        steps = self.interval - simulation.currentStep % self.interval
        return {"steps": steps, "periodic": False, "include": ["positions", "energy"]}

    def report(self, simulation, state):
        self.seen.append((state.getPositions(asNumpy=True)._value, state.getPotentialEnergy()._value))


def test_md_goes_on_from_accepted_moves(dipeptide, simulation, make_sampler):
    sampler = make_sampler(simulation.context, n_proposals=4)
    first, last = Witness(20), Witness(20)
    simulation.reporters += [first, bg.MoveReporter(sampler, 20, n_steps=5), last]
    reports, states, genuine = [], [], sampler.step

    def step(n):
        reports.append(genuine(n))
        states.append(simulation.context.getState(positions=True, velocities=True))
        return reports[-1]

    sampler.step = step
    simulation.step(60)
    assert simulation.currentStep == 60 and simulation.context.getTime()._value == pytest.approx(0.12)
    assert sampler.statistics["n_proposed"] == 15 and len(states) == 3 and any(r["accepted"] for r in reports)
    pairs = [dipeptide.system.getConstraintParameters(k) for k in range(dipeptide.system.getNumConstraints())]
    for state, report in zip(states, reports, strict=True):
        x, v = state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value
        for i, j, d in pairs:
            assert np.linalg.norm(x[i] - x[j]) == pytest.approx(d._value, rel=2e-5)
            if report["accepted"]:  # redrawn; those that MD leaves behind hold its constraints to a time step only
                assert abs(np.dot(x[i] - x[j], v[i] - v[j])) < 1e-4
    # What other reporters got belongs together, wherever in the list they stand.
    for witness in (first, last):
        assert len(witness.seen) == 3
        for frame, energy in witness.seen:
            assert sampler.pool.energies(frame[None])[0] == pytest.approx(energy, abs=1e-6)


def test_a_latent_move_reports_too(simulation, make_sampler):
    move = bg.LatentMove(make_sampler(simulation.context), a=0.1, width=0.1)
    simulation.reporters.append(bg.MoveReporter(move, 5, n_steps=2))
    simulation.step(15)
    assert move.statistics["n_proposed"] == 6 and move.statistics["n_accepted"] > 0


def test_a_move_on_another_context_is_refused_before_anything_moves(simulation, make_context, make_sampler):
    other = make_context()
    simulation.reporters.append(bg.MoveReporter(make_sampler(other), 10))
    before = [c.getState(positions=True).getPositions(asNumpy=True)._value for c in (simulation.context, other)]
    with pytest.raises(InputError, match="another Context than the simulation"):
        simulation.step(10)
    assert simulation.currentStep == 0
    for context, x in zip((simulation.context, other), before, strict=True):
        np.testing.assert_array_equal(context.getState(positions=True).getPositions(asNumpy=True)._value, x)


@pytest.mark.parametrize("interval", [0, -5, 2.5, "10", None, True])
def test_a_bad_interval_is_named(simulation, interval):
    with pytest.raises(InputError, match="interval of a MoveReporter must be"):
        bg.MoveReporter(Counter(simulation.context), interval)


def test_other_mistakes_are_named(simulation):
    with pytest.raises(InputError, match="n_steps must be"):
        bg.MoveReporter(Counter(simulation.context), 10, n_steps=0)
    with pytest.raises(InputError, match="needs a sampler or another move on a Context, got a Simulation"):
        bg.MoveReporter(simulation, 10)
