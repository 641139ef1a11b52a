"""Velocities after an accepted move: carried over to the new positions (rule 5 of docs/theory.md).

MD with a time step of finite length does not sample Maxwell's velocities exactly: on the step they are a little too
slow along stiff directions (by 1 − ω²dt²/4 for a harmonic one under BAOAB or leapfrog), and between the steps, where
most of OpenMM's integrators keep them, they are correlated with the forces. Velocities drawn anew at every accepted
move therefore heat a molecule. Carried over they do not: positions and velocities are independent in the target, so
that a new conformation may keep the velocities of the old one, as far as its constraints let it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from openmm_bg.energy import thermal_energy

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

FloatArray = NDArray[np.float64]


def carry_velocities(
    context: openmm.Context, old: FloatArray, new: FloatArray, temperature: float, rng: np.random.Generator
) -> FloatArray:
    """Give a Context new positions, and the velocities that it has at old ones.

    With P(x) the projection on velocities that the constraints allow at x, in the metric of the masses, and M(x) the
    shift of half a step between positions and velocities, if the integrator has one:

        v_on  = v − M(x_old)                                        on the step, where velocities know nothing of x
        v_on' = P(x_new) [v_on + (1 − P(x_old)) ξ]                  ξ of Maxwell's distribution
        v'    = v_on' + M(x_new)

    What the old constraints had taken is drawn anew, so that the sum in brackets has Maxwell's distribution without
    constraints, whatever x_old was, and its projection the one with those of x_new. The centre's motion is taken out if
    the System has a CMMotionRemover. A Context whose velocities are all zero, as they are before anyone sets them, gets
    fresh ones.

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

    Returns
    -------
    FloatArray
        The velocities [N, 3], nm/ps, that the Context now has.
    """
    system = context.getSystem()
    masses = [system.getParticleMass(i)._value for i in range(system.getNumParticles())]
    velocities, kT = _velocities(context), thermal_energy(temperature)
    # floats, for numpy is slow where it has just been driven out of the caches by a flow's pass
    spread = np.array([[math.sqrt(kT / mass) if mass > 0.0 else 0.0] for mass in masses])
    fresh = spread * rng.standard_normal(velocities.shape)
    if velocities.any():
        context.setPositions(old)
        moving = velocities - _half_step(context)
        if system.getNumConstraints():
            moving += fresh - _allowed(context, fresh)
    else:
        moving = fresh
    context.setPositions(new)
    if system.getNumConstraints():
        moving = _allowed(context, moving)
    if any(isinstance(force, openmm.CMMotionRemover) for force in system.getForces()):
        moving -= np.array(masses) @ moving / sum(masses)
    velocities = moving + _half_step(context)
    context.setVelocities(velocities)
    return velocities


def _velocities(context: openmm.Context) -> FloatArray:
    return np.array(context.getState(velocities=True).getVelocities(asNumpy=True)._value, dtype=np.float64)


def _half_step(context: openmm.Context) -> FloatArray:
    """From velocities on the step to those that the integrator keeps [N, 3], nm/ps: ∓ dt/2 f/m, projected, or zero.

    OpenMM knows this offset of each integrator, and applies it to velocities that it draws: to those of 0 K as well.
    """
    context.setVelocitiesToTemperature(0.0, 1)
    return _velocities(context)


def _allowed(context: openmm.Context, velocities: FloatArray) -> FloatArray:
    """Velocities [N, 3] without what the constraints forbid at the Context's positions."""
    context.setVelocities(velocities)
    context.applyVelocityConstraints(context.getIntegrator().getConstraintTolerance())
    return _velocities(context)
