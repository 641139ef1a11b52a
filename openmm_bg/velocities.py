"""Velocities after an accepted move: carried over to the new positions (rule 5 of docs/theory.md).

MD with a time step of finite length does not sample Maxwell's velocities exactly: on the step they are a little too
slow along stiff directions (their mean square is 1 − ω²dt²/4 of what their positions ask for in a harmonic one, under
BAOAB or leapfrog), and between the steps, where most of OpenMM's integrators keep them, they are correlated with the
forces. Velocities drawn anew at every accepted move therefore heat a molecule. Carried over they stay as slow as they
were, along the same bonds: each atom's velocity turns with the bonds around it. That is as exact, for in the target
velocities know nothing of positions beyond the constraints, and without these have no direction.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from openmm_bg.energy import thermal_energy

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

FloatArray = NDArray[np.float64]

#: On-step kinetic energy, in its mean, that Maxwell's distribution does not reach: for three atoms once in e^400 draws.
HOT = 100.0
#: Their velocities are half a step behind as well, as positions and velocities that they sample show (they are
#: correlated as those of a leapfrog are), but OpenMM gives them no offset.
BEHIND = (openmm.NoseHooverIntegrator, openmm.VariableLangevinIntegrator, openmm.VariableVerletIntegrator)


def carry_velocities(
    context: openmm.Context,
    old: FloatArray,
    new: FloatArray,
    temperature: float,
    rng: np.random.Generator,
    bonds: NDArray[np.int64],
) -> FloatArray:
    """Give a Context new positions, and the velocities that it has at old ones.

    With P(x) the projection on velocities that the constraints allow at x, in the metric of the masses, R a rotation of
    each atom's velocity by itself, and M(x) the shift of half a step between positions and velocities, if the
    integrator has one:

        v_on  = v − M(x_old)                                        on the step, where velocities know nothing of x
        v_on' = P(x_new) R(x_old, x_new) [v_on + (1 − P(x_old)) ξ]  ξ of Maxwell's distribution
        v'    = v_on' + M(x_new)

    What the old constraints had taken is drawn anew, so that the sum in brackets has Maxwell's distribution without
    constraints, whatever x_old was; so has every rotation of it, and its projection has the one with those of x_new. If
    the System has a CMMotionRemover P takes out the centre's motion too. Fresh velocities stand in for those that are
    all zero, as they are before anyone sets them, and for those whose v_on is not finite or `HOT`: velocities of
    another place, in a Context whose atoms have been put on top of each other, would take M there along to where a move
    rescues it.

    This costs two evaluations of the Context's forces if the integrator has an M.

    Parameters
    ----------
    context
        With velocities that belong to the old positions; its positions need not be those.
    old, new
        [N, 3] nm.
    temperature
        K.
    rng
        Of ξ.
    bonds
        [K, 2], particles; R turns the bonds around an atom into their new directions, and leaves atoms without any.

    Returns
    -------
    FloatArray
        The velocities [N, 3], nm/ps, that the Context now has.

    Raises
    ------
    openmm.OpenMMException
        Forces cannot be computed. The Context has its velocities, at the old positions.
    """
    system, kT = context.getSystem(), thermal_energy(temperature)
    masses = _masses(system)
    velocities = _velocities(context)
    # floats, for numpy is slow where it has just been driven out of the caches by a flow's pass
    spread = np.array([[math.sqrt(kT / mass) if mass > 0.0 else 0.0] for mass in masses])
    fresh = spread * rng.standard_normal(velocities.shape)
    removes_drift = any(isinstance(force, openmm.CMMotionRemover) for force in system.getForces())
    moving = fresh
    try:
        if velocities.any():
            context.setPositions(old)
            on_step = velocities - _half_step(context)
            if _is_maxwells(on_step, masses, kT):
                moving = on_step
                if system.getNumConstraints():
                    moving += fresh - _allowed(context, fresh)
                if removes_drift:
                    moving += _drift(fresh, masses)
                moving = _turned(moving, old, new, bonds)
        context.setPositions(new)
        if system.getNumConstraints():
            moving = _allowed(context, moving)
        if removes_drift:
            moving -= _drift(moving, masses)
        carried = moving + _half_step(context)
        context.setVelocities(carried)
    except BaseException:
        context.setPositions(old)
        context.setVelocities(velocities)
        raise
    return carried


def _masses(system: openmm.System) -> list[float]:
    return [system.getParticleMass(i)._value for i in range(system.getNumParticles())]


def _is_maxwells(velocities: FloatArray, masses: list[float], kT: float) -> bool:
    """Whether velocities may be of Maxwell's distribution at all; False of NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        energy = float((np.array(masses) @ velocities**2).sum())
    return energy < HOT * kT * 3 * sum([mass > 0.0 for mass in masses])


def _drift(velocities: FloatArray, masses: list[float]) -> FloatArray:
    """The centre's velocity, as the velocities [N, 3] of all that move with it."""
    weights = np.array(masses)
    return (weights > 0.0)[:, None] * (weights @ velocities / weights.sum())


def _turned(velocities: FloatArray, old: FloatArray, new: FloatArray, bonds: NDArray[np.int64]) -> FloatArray:
    """Velocities [N, 3], of which each has turned as the bonds of its atom have, in the least squares of directions.

    An atom with one bond turns with all bonds of the atom at its other end, which know how it turned about this one.
    """
    if not len(bonds):
        return velocities
    atoms, ends = np.unique(bonds, return_inverse=True)
    first, second = ends.reshape(bonds.shape).T
    before, after = (x[bonds[:, 0]] - x[bonds[:, 1]] for x in (old, new))
    lengths = np.sqrt((before**2).sum(-1) * (after**2).sum(-1))
    outer = after[:, :, None] * (before / np.maximum(lengths, 1e-300)[:, None])[:, None, :]
    # What bonds leave open, as in a linear group, turns as little as it can.
    sums, degree = np.tile(1e-9 * np.eye(3), (len(atoms), 1, 1)), np.bincount(ends.ravel())
    np.add.at(sums, first, outer)
    np.add.at(sums, second, outer)
    turns = sums.copy()
    for here, there in ((first, second), (second, first)):
        lone = degree[here] == 1
        turns[here[lone]] = sums[there[lone]]
    left, _, right = np.linalg.svd(turns)  # Kabsch, Acta Cryst. A 32, 922 (1976)
    left[:, :, 2] *= np.linalg.det(left @ right)[:, None]
    result = velocities.copy()
    result[atoms] = np.einsum("aij,ajk,ak->ai", left, right, velocities[atoms])
    return result


def _velocities(context: openmm.Context) -> FloatArray:
    return np.array(context.getState(velocities=True).getVelocities(asNumpy=True)._value, dtype=np.float64)


def _half_step(context: openmm.Context) -> FloatArray:
    """From velocities on the step to those that the integrator keeps [N, 3], nm/ps: ∓ dt/2 f/m, projected, or zero.

    OpenMM applies this offset to velocities that it draws, to those of 0 K as well. It gives none to the integrators in
    `BEHIND`, nor to any CustomIntegrator, whose velocities count as those on the step.
    """
    integrator = context.getIntegrator()
    if isinstance(integrator, openmm.CompoundIntegrator):
        integrator = integrator.getIntegrator(integrator.getCurrentIntegrator())
    if not isinstance(integrator, BEHIND):
        context.setVelocitiesToTemperature(0.0, 1)
        return _velocities(context)
    state = context.getState(forces=True, groups=integrator.getIntegrationForceGroups())
    half = 0.5 * integrator.getStepSize()._value
    weights = np.array([[half / mass if mass > 0.0 else 0.0] for mass in _masses(context.getSystem())])
    return _allowed(context, -weights * state.getForces(asNumpy=True)._value)


def _allowed(context: openmm.Context, velocities: FloatArray) -> FloatArray:
    """Velocities [N, 3] without what the constraints forbid at the Context's positions."""
    context.setVelocities(velocities)
    context.applyVelocityConstraints(context.getIntegrator().getConstraintTolerance())
    return _velocities(context)
