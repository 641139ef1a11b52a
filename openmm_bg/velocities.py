"""Velocities after an accepted move: carried over to the new positions (rule 5 of docs/theory.md).

MD with a time step of finite length does not sample Maxwell's velocities exactly: on the step they are a little too
slow along stiff directions (their mean square is 1 − ω²dt²/4 of what their positions ask for in a harmonic one, under
BAOAB or leapfrog), and between the steps, where most of OpenMM's integrators keep them, they are correlated with the
forces. Velocities drawn anew at every accepted move therefore heat a molecule. Carried over they stay as slow as they
were, along the same bonds: each atom's velocity turns with a frame of its own, made of the bonds around it. That is as
exact, for in the target velocities know nothing of positions beyond the constraints, and without these have no
direction.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.energy import thermal_energy

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

FloatArray = NDArray[np.float64]

#: On-step kinetic energy, in its mean, that Maxwell's distribution does not reach: for three atoms once in e^400 draws.
HOT = 100.0
#: Atoms nearer than this to each other, or a third to their line, make no frame; nm.
FLAT = 1e-6
#: Their velocities are half a step behind as well, as positions and velocities that they sample show (they are
#: correlated as those of a leapfrog are), but OpenMM gives them no offset.
BEHIND = (openmm.NoseHooverIntegrator, openmm.VariableLangevinIntegrator, openmm.VariableVerletIntegrator)


def local_frames(bonds: ArrayLike) -> NDArray[np.int64]:
    """For each atom with a frame: itself, one that it is bonded to, and one that is bonded to either of them.

    Parameters
    ----------
    bonds
        [K, 2], particles.

    Returns
    -------
    NDArray
        [3, A].
    """
    neighbours: dict[int, list[int]] = {}
    for i, j in np.asarray(bonds).tolist():
        neighbours.setdefault(i, []).append(j)
        neighbours.setdefault(j, []).append(i)
    found = []
    for atom, (bonded, *others) in sorted(neighbours.items()):
        others += [k for k in neighbours[bonded] if k != atom]
        if others:
            found.append((atom, bonded, others[0]))
    return np.array(found, dtype=np.int64).reshape(-1, 3).T


def carry_velocities(
    context: openmm.Context,
    old: FloatArray,
    new: FloatArray,
    temperature: float,
    rng: np.random.Generator,
    frames: NDArray[np.int64],
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
    frames
        [3, K] from `local_frames`: what R turns; it leaves all other particles.

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
                moving = _turned(moving, old, new, frames)
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


def _turned(velocities: FloatArray, old: FloatArray, new: FloatArray, frames: NDArray[np.int64]) -> FloatArray:
    """Velocities [N, 3] that stand in the frames of the new positions as they stood in those of the old ones.

    Each frame's first axis points along the bond, its second lies in the plane of the three atoms. Three that are in a
    line, or on one spot, before or after, have none: their first atom's velocity stays as it is.
    """
    atoms, bonded, third = frames
    x = np.stack([old, new])
    origin = x[:, atoms]
    first, second = x[:, bonded] - origin, x[:, third] - origin
    lengths = np.sqrt((first * first).sum(-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        first /= lengths
        second -= (first * second).sum(-1, keepdims=True) * first
        heights = np.sqrt((second * second).sum(-1, keepdims=True))
        second /= heights
    flat = ~((lengths > FLAT) & (heights > FLAT)).all(0)
    normal = first[..., [1, 2, 0]] * second[..., [2, 0, 1]] - first[..., [2, 0, 1]] * second[..., [1, 2, 0]]
    moving = velocities[atoms]
    turned = sum((axis[0] * moving).sum(-1, keepdims=True) * axis[1] for axis in (first, second, normal))
    result = velocities.copy()
    result[atoms] = np.where(flat, moving, turned)
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
