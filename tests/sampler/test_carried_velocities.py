"""Velocities carried over to accepted positions (rule 5 of docs/theory.md)."""

import functools
import inspect

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg.velocities
from openmm_bg.energy import BOLTZMANN
from openmm_bg.velocities import carry_velocities, local_frames

import openmm  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
KELVIN, STEP = 300.0, 0.004
kT = BOLTZMANN * KELVIN
MASSES = np.array([[16.0], [1.0], [1.5], [12.0]])
CONSTRAINTS = ((0, 1), (0, 2))
FRAMES = local_frames([*CONSTRAINTS, (0, 3)])
NO_FRAMES = local_frames([])


def on_the_step(step):
    """Velocity Verlet: positions and velocities of the same time."""
    integrator = openmm.CustomIntegrator(step)
    integrator.addComputePerDof("v", "v + 0.5*dt*f/m")
    integrator.addComputePerDof("x", "x + dt*v")
    integrator.addComputePerDof("v", "v + 0.5*dt*f/m")
    return integrator


def langevin():
    return openmm.LangevinMiddleIntegrator(KELVIN, 1.0, STEP)


def nose_hoover():
    return openmm.NoseHooverIntegrator(KELVIN, 1.0, STEP)


def second_of_two():
    integrator = openmm.CompoundIntegrator()
    integrator.addIntegrator(on_the_step(STEP))
    integrator.addIntegrator(nose_hoover())
    integrator.setCurrentIntegrator(1)
    return integrator


def of_variable_step():
    integrator = openmm.VariableVerletIntegrator(1e-3)
    integrator.setStepSize(STEP)
    return integrator


#: An integrator, and how many steps its velocities are behind the positions.
INTEGRATORS = [
    (langevin, 0.5),
    (lambda: openmm.VerletIntegrator(STEP), 0.5),
    (lambda: on_the_step(STEP), 0.0),
    (nose_hoover, 0.5),
    (of_variable_step, 0.5),
    (second_of_two, 0.5),
]


def bent_molecule(remover=False):
    """An atom with two constrained neighbours, and a fourth on a stiff bond."""
    system = openmm.System()
    for mass in MASSES[:, 0]:
        system.addParticle(mass)
    for pair in CONSTRAINTS:
        system.addConstraint(*pair, 0.1)
    bonds = openmm.HarmonicBondForce()
    bonds.addBond(0, 3, 0.15, 3e5)
    bonds.addBond(1, 2, 0.15, 2e4)
    system.addForce(bonds)
    if remover:
        system.addForce(openmm.CMMotionRemover())
    return system


def conformation(angle, stretch, turn):
    """[4, 3] nm: the two neighbours at this angle, the whole turned about an axis."""
    x = np.array(
        [
            [0.0, 0.0, 0.0],
            [0.1, 0.0, 0.0],
            [0.1 * np.cos(angle), 0.1 * np.sin(angle), 0.0],
            [-0.05, -0.06, stretch],
        ]
    )
    c, s = np.cos(turn), np.sin(turn)
    return x @ np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]]).T


OLD, NEW = conformation(1.7, 0.14, 0.2), conformation(1.2, 0.12, 1.9)


def projection(x):
    """[12, 12], acting on velocities: without what changes a constrained distance, in the metric of the masses."""
    jacobian = np.zeros((len(CONSTRAINTS), 4, 3))
    for k, (i, j) in enumerate(CONSTRAINTS):
        jacobian[k, i], jacobian[k, j] = x[i] - x[j], x[j] - x[i]
    jacobian = jacobian.reshape(len(CONSTRAINTS), 12)
    scaled = jacobian / np.repeat(MASSES[:, 0], 3)
    return np.eye(12) - scaled.T @ np.linalg.solve(scaled @ jacobian.T, jacobian)


def behind(x, steps):
    """[12] nm/ps: from velocities on the step to those of so many steps earlier."""
    context = openmm.Context(bent_molecule(), openmm.VerletIntegrator(0.001), REFERENCE)
    context.setPositions(x)
    forces = context.getState(forces=True).getForces(asNumpy=True)._value
    return -steps * STEP * projection(x) @ (forces / MASSES).ravel()


def without_drift():
    """[12, 12], acting on velocities: without the centre's motion, orthogonal in the metric of the masses."""
    drift = np.tile(np.eye(3), (4, 1))
    return np.eye(12) - drift @ (drift * np.repeat(MASSES, 3, axis=0)).T / MASSES.sum()


def deviation(make_integrator, steps, rng, n=2500, frames=FRAMES, remover=False):
    """Largest deviation of the covariance of carried velocities [12, 12] from Maxwell's, in standard errors.

    Velocities come from Maxwell's distribution on the step at OLD, and are looked at on the step at NEW.
    """
    integrator = make_integrator()
    integrator.setConstraintTolerance(1e-10)
    context = openmm.Context(bent_molecule(remover), integrator, REFERENCE)
    centred = without_drift() if remover else np.eye(12)
    allowed, spread, shift = projection(OLD) @ centred, np.sqrt(kT / MASSES), behind(OLD, steps)
    found = np.empty((n, 12))
    for row in found:
        v = allowed @ (spread * rng.standard_normal((4, 3))).ravel() + shift
        context.setPositions(OLD)
        context.setVelocities(v.reshape(4, 3))
        row[:] = carry_velocities(context, OLD, NEW, KELVIN, rng, frames).ravel()
    found -= behind(NEW, steps)
    expected = projection(NEW) @ centred @ np.diag(kT / np.repeat(MASSES[:, 0], 3))
    # Var of an element of a covariance that is estimated from n normal vectors of known mean (Isserlis).
    error = np.sqrt((expected**2 + np.outer(expected.diagonal(), expected.diagonal())) / n)
    means = np.abs(found.mean(0)) / np.sqrt(expected.diagonal() / n)
    return max((np.abs(found.T @ found / n - expected) / error).max(), means.max())


@pytest.mark.statistical
@pytest.mark.parametrize(("make_integrator", "steps"), INTEGRATORS)
def test_carried_velocities_have_maxwells_distribution_on_the_new_constraints(make_integrator, steps):
    # 78 covariances and 12 means: one in 1e5 runs has one of them 5 standard errors off.
    assert deviation(make_integrator, steps, np.random.default_rng(1)) < 5.0


@pytest.mark.statistical
@pytest.mark.parametrize("remover", [False, True])
@pytest.mark.parametrize("frames", [NO_FRAMES, FRAMES[:, :2], FRAMES[:, 2:], FRAMES, FRAMES[:, [0, 3]]])
def test_they_have_it_however_each_atom_turns(frames, remover):
    assert deviation(*INTEGRATORS[0], np.random.default_rng(1), frames=frames, remover=remover) < 5.0


@pytest.mark.statistical
def test_a_deliberate_error_is_seen(monkeypatch):
    make_integrator, steps = INTEGRATORS[0]
    half_step = openmm_bg.velocities._half_step
    with monkeypatch.context() as patch:  # velocities between the steps taken for those on the step
        patch.setattr(openmm_bg.velocities, "_half_step", lambda context: 0.0 * half_step(context))
        assert deviation(make_integrator, steps, np.random.default_rng(1)) > 10.0
    with monkeypatch.context() as patch:  # constraints that leave everything alone: nothing is drawn, nothing taken
        patch.setattr(openmm_bg.velocities, "_allowed", lambda context, v: v)
        assert deviation(make_integrator, steps, np.random.default_rng(1)) > 10.0
    with monkeypatch.context() as patch:  # what turns velocities is no rotation
        patch.setattr(openmm_bg.velocities, "_turned", lambda v, *_: v * [1.2, 1.0, 1.0])
        assert deviation(make_integrator, steps, np.random.default_rng(1)) > 10.0
    with monkeypatch.context() as patch:  # the centre's motion is taken out before atoms turn, and drawn by none
        patch.setattr(openmm_bg.velocities, "_drift", lambda velocities, masses: 0.0 * velocities)
        assert deviation(make_integrator, steps, np.random.default_rng(1), frames=FRAMES[:, 2:], remover=True) > 10.0

    class Deaf(np.random.Generator):
        """ξ is zero, the velocities of the test are not."""

        def standard_normal(self, size=None):
            inside = inspect.currentframe().f_back.f_code.co_name == "carry_velocities"
            return np.zeros(size) if inside else super().standard_normal(size)

    # Velocities that turn hide it: next to nothing of ξ is left.
    assert deviation(make_integrator, steps, Deaf(np.random.PCG64(1)), frames=NO_FRAMES) > 10.0


def oscillators(n, step, integrator):
    """Particles in isotropic harmonic wells with ω dt = 1, in a Context."""
    system = openmm.System()
    well = openmm.CustomExternalForce("0.5*k*(x^2 + y^2 + z^2)")
    well.addGlobalParameter("k", 12.0 / step**2)
    for particle in range(n):
        system.addParticle(12.0)
        well.addParticle(particle)
    system.addForce(well)
    return openmm.Context(system, integrator, REFERENCE), 12.0 / step**2


def energy_after_md(settle, make_integrator, n=400, rounds=60):
    """Mean energy of a degree of freedom, in kT/2, after MD from exact positions, and its standard error.

    These integrators sample harmonic positions exactly at any time step, so that MD which starts from exact positions
    with the velocities of the stationary state ends with 1.
    """
    integrator = make_integrator()
    if hasattr(integrator, "setRandomNumberSeed"):
        integrator.setRandomNumberSeed(3)
    context, k = oscillators(n, STEP, integrator)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((n, 3)) * np.sqrt(kT / k)
    context.setPositions(x)
    context.setVelocitiesToTemperature(KELVIN, 7)
    context.getIntegrator().step(3000)
    found = []
    for _ in range(rounds):
        x = context.getState(positions=True).getPositions(asNumpy=True)._value
        settle(context, x, rng.standard_normal((n, 3)) * np.sqrt(kT / k), KELVIN, rng, NO_FRAMES)
        context.getIntegrator().step(2)
        found.append(context.getState(energy=True).getPotentialEnergy()._value / (1.5 * n * kT))
    # Positions are drawn anew in each round, but velocities live for a picosecond: blocks, not rounds.
    blocks = np.array([block.mean() for block in np.array_split(found, 10)])
    return blocks.mean(), max(blocks.std(ddof=1) / np.sqrt(10), np.sqrt(2 / (3 * n * rounds)))


@pytest.mark.statistical
@pytest.mark.parametrize("make_integrator", [langevin, nose_hoover])
def test_moves_do_not_heat_md_whose_time_step_is_long(make_integrator):
    mean, error = energy_after_md(carry_velocities, make_integrator)
    assert abs(mean - 1.0) < 5 * error

    def draw_anew(context, old, new, temperature, rng, frames):
        context.setPositions(new)
        context.setVelocitiesToTemperature(temperature, int(rng.integers(1, 2**31 - 1)))

    mean, error = energy_after_md(draw_anew, make_integrator)
    assert mean - 1.0 > 10 * error


#: Of a velocity after a rotation made of bonds some 0.1 nm long: a few dozen operations, on numbers of order 1.
ROUNDING = 100 * np.finfo(float).eps


def turned(*args):
    return openmm_bg.velocities._turned(*args)


def test_velocities_turn_with_the_molecule():
    """A rotation of everything turns all velocities with it; what stretches a bond goes on stretching it."""
    rng = np.random.default_rng(4)
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    rotation *= np.linalg.det(rotation)
    v = rng.standard_normal((4, 3))
    agree = functools.partial(np.testing.assert_allclose, rtol=0.0, atol=ROUNDING * np.abs(v).max())
    agree(turned(v, OLD, OLD @ rotation.T, FRAMES), v @ rotation.T)
    agree(turned(v, NEW, NEW, FRAMES), v)
    np.testing.assert_array_equal(turned(v, OLD, NEW, NO_FRAMES), v)
    np.testing.assert_array_equal(turned(v, OLD, NEW, FRAMES[:, [0, 3]])[1:3], v[1:3])  # atoms without a frame
    there = turned(v, OLD, NEW, FRAMES)
    for atom, bonded, _ in FRAMES.T:
        along = [(x[bonded] - x[atom]) / np.linalg.norm(x[bonded] - x[atom]) for x in (OLD, NEW)]
        agree(there[atom] @ along[1], v[atom] @ along[0])
        np.testing.assert_allclose(there[atom] @ there[atom], v[atom] @ v[atom], rtol=ROUNDING)


def test_atoms_that_make_no_frame_do_not_turn():
    v = np.random.default_rng(4).standard_normal((4, 3))
    in_line = OLD * [1.0, 0.0, 0.0] + [[0.0] * 3, [0.0] * 3, [0.0, 0.0, 0.0], [0.0, 0.1, 0.2]]
    on_one_spot = OLD.copy()
    on_one_spot[1] = on_one_spot[0]
    for flat in (in_line, on_one_spot):
        for old, new in ((flat, NEW), (NEW, flat)):
            found = turned(v, old, new, FRAMES)
            assert np.isfinite(found).all()
            np.testing.assert_array_equal(found[1], v[1])
            np.testing.assert_allclose((found**2).sum(1), (v**2).sum(1), rtol=1e-12)


def test_frames_are_made_of_bonds():
    chain = local_frames([(5, 7), (7, 9), (9, 3)])
    np.testing.assert_array_equal(chain.T, [[3, 9, 7], [5, 7, 9], [7, 5, 9], [9, 7, 3]])
    assert local_frames([(0, 1)]).shape == (3, 0)  # nothing says how two atoms turn about their bond


def energies_of_stiff_pairs_after_md(frames, n=750, rounds=40):
    """Mean energy of a stiff bond and of motion across it, in kT/2, after moves that give bonds any direction.

    With their standard errors. Each of n atoms that stand still has two on bonds with ω dt = 1, as in
    `energy_after_md`, of which nothing else is held.
    """
    system = openmm.System()
    k, length = 12.0 / STEP**2, 0.2
    springs = openmm.HarmonicBondForce()
    for centre in range(0, 3 * n, 3):
        for mass in (0.0, 12.0, 12.0):
            system.addParticle(mass)
        springs.addBond(centre, centre + 1, length, k)
        springs.addBond(centre, centre + 2, length, k)
    system.addForce(springs)
    integrator = langevin()
    integrator.setRandomNumberSeed(3)
    context = openmm.Context(system, integrator, REFERENCE)
    rng = np.random.default_rng(5)

    def exact():
        """[3n, 3], bonds of any direction; the r² of the density of their lengths by rejection."""
        lengths = np.empty(0)
        while len(lengths) < 2 * n:
            tried = length + np.sqrt(kT / k) * rng.standard_normal(n)
            lengths = np.concatenate([lengths, tried[rng.random(n) < (tried / (2 * length)) ** 2]])
        ends = rng.standard_normal((n, 2, 3))
        ends *= lengths[: 2 * n].reshape(n, 2, 1) / np.linalg.norm(ends, axis=-1, keepdims=True)
        return np.concatenate([np.zeros((n, 1, 3)), ends], axis=1).reshape(3 * n, 3)

    context.setPositions(exact())
    context.setVelocitiesToTemperature(KELVIN, 7)
    integrator.step(1000)
    along = []
    for _ in range(rounds):
        x = context.getState(positions=True).getPositions(asNumpy=True)._value
        carry_velocities(context, x, exact(), KELVIN, rng, frames(n))
        integrator.step(2)
        state = context.getState(energy=True, positions=True, velocities=True)
        along.append(state.getPotentialEnergy()._value / (n * kT))
    x, v = (array(asNumpy=True)._value.reshape(n, 3, 3)[:, 1:] for array in (state.getPositions, state.getVelocities))
    axis = x / np.linalg.norm(x, axis=-1, keepdims=True)
    across = v - (axis * v).sum(-1, keepdims=True) * axis
    # Positions are drawn anew in each round; velocities live for a picosecond, three times as long as all rounds.
    return (
        (np.mean(along), np.sqrt(2 / (2 * n * rounds))),
        (12.0 * (across**2).sum() / (4 * n * kT), np.sqrt(2 / (4 * n))),
    )


@pytest.mark.statistical
def test_stiff_and_soft_directions_do_not_mix_where_bonds_turn_anywhere():
    def own_frames(n):
        return local_frames([(3 * k, 3 * k + end) for k in range(n) for end in (1, 2)])

    for mean, error in energies_of_stiff_pairs_after_md(own_frames):
        assert abs(mean - 1.0) < 5 * error
    _, (mean, error) = energies_of_stiff_pairs_after_md(lambda n: NO_FRAMES)
    assert mean - 1.0 < -5 * error


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("make_integrator", [langevin, nose_hoover])
def test_a_context_whose_forces_fail_is_left_as_it_was(make_integrator, fails_at):
    calls = []

    def energy_and_forces(state):
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("no forces")
        return 0.0, np.zeros((4, 3))

    system = bent_molecule()
    system.addForce(openmm.PythonForce(energy_and_forces))
    context = openmm.Context(system, make_integrator(), REFERENCE)
    before = np.random.default_rng(1).standard_normal((4, 3))
    context.setPositions(OLD)
    context.setVelocities(before)
    with pytest.raises(openmm.OpenMMException, match="no forces"):
        carry_velocities(context, OLD, NEW, KELVIN, np.random.default_rng(2), FRAMES)
    state = context.getState(positions=True, velocities=True)
    np.testing.assert_array_equal(state.getPositions(asNumpy=True)._value, OLD)
    np.testing.assert_array_equal(state.getVelocities(asNumpy=True)._value, before)


@pytest.mark.parametrize("distance", [0.0, 0.01, 0.1])
def test_a_move_rescues_atoms_on_top_of_each_other(distance):
    """Velocities of another place, with the forces of this one: not finite, or fit to blow up what the move made."""
    system = openmm.System()
    force = openmm.NonbondedForce()
    for _ in range(3):
        system.addParticle(12.0)
        force.addParticle(0.0, 0.3, 1.0)
    system.addForce(force)
    context = openmm.Context(system, langevin(), REFERENCE)
    new = np.array([[0.0, 0.0, 0.0], [0.35, 0.0, 0.0], [0.0, 0.35, 0.0]])
    old = new * np.array([[1.0], [1.0], [distance / 0.35]])
    context.setPositions(new)
    context.setVelocitiesToTemperature(KELVIN, 8)
    v = carry_velocities(context, old, new, KELVIN, np.random.default_rng(3), NO_FRAMES)
    assert 0.0 < np.abs(v).max() < 10 * np.sqrt(kT / 12.0)


def test_velocities_that_are_not_finite_are_drawn():
    context = openmm.Context(bent_molecule(), langevin(), REFERENCE)
    context.setPositions(OLD)
    context.setVelocities(np.full((4, 3), np.nan))
    v = carry_velocities(context, OLD, NEW, KELVIN, np.random.default_rng(3), FRAMES)
    assert np.isfinite(v).all() and v.any()


def test_velocities_that_were_never_set_are_drawn():
    context = openmm.Context(bent_molecule(remover=True), openmm.LangevinMiddleIntegrator(KELVIN, 1.0, STEP), REFERENCE)
    rng, kinetic, shift = np.random.default_rng(2), [], behind(NEW, 0.5).reshape(4, 3)
    for _ in range(400):
        context.setVelocities(np.zeros((4, 3)))
        v = carry_velocities(context, OLD, NEW, KELVIN, rng, FRAMES)
        np.testing.assert_array_equal(v, context.getState(velocities=True).getVelocities(asNumpy=True)._value)
        np.testing.assert_array_equal(NEW, context.getState(positions=True).getPositions(asNumpy=True)._value)
        np.testing.assert_allclose((MASSES * v).sum(0), 0.0, atol=1e-12)
        kinetic.append(0.5 * (MASSES * (v - shift) ** 2).sum())
    freedom = 12 - 2 - 3
    error = np.sqrt(freedom / 2 / len(kinetic)) * kT  # of the mean of χ² energies
    assert abs(np.mean(kinetic) - freedom / 2 * kT) < 5 * error


@pytest.mark.parametrize("remover", [False, True])
def test_particles_that_stand_still_keep_their_velocities(remover):
    """Constrained water beside an atom that moves; a massless site has none."""
    system = bent_molecule(remover)
    system.addParticle(0.0)
    system.setVirtualSite(4, openmm.ThreeParticleAverageSite(0, 1, 2, 0.6, 0.2, 0.2))
    system.addParticle(20.0)
    integrator = openmm.LangevinMiddleIntegrator(KELVIN, 1.0, STEP)
    integrator.setConstraintTolerance(1e-10)
    context = openmm.Context(system, integrator, REFERENCE)
    site = 0.6 * OLD[0] + 0.2 * (OLD[1] + OLD[2])
    old, new = (np.vstack([OLD, site, place]) for place in ([1.0, 0.0, 0.0], [3.0, 1.0, 0.0]))
    context.setPositions(old)
    context.setVelocitiesToTemperature(KELVIN, 4)
    before = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    if remover:
        masses = np.array([*MASSES[:, 0], 0.0, 20.0])
        before = before - masses @ before / masses.sum() * (masses > 0.0)[:, None]
    after = carry_velocities(context, old, new, KELVIN, np.random.default_rng(6), FRAMES)
    # OpenMM takes forbidden velocities off drawn ones to 1e-5 of them.
    np.testing.assert_allclose(after, before, rtol=0.0, atol=1e-5 * np.abs(before).max())
    assert not after[4].any() and after[5].any()
