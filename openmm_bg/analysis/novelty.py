"""Are generated frames new, and do they hold: distance to the nearest known frame, and what minimisation does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip

from openmm_bg.analysis.distances import ANGSTROM
from openmm_bg.analysis.superposition import superpose
from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]

KCAL = 4.184  # kJ
#: Steps of a minimisation at most.
ITERATIONS = 1000


def heavy_atoms(topology: Any) -> NDArray[np.int64]:
    """Atoms that are no hydrogens; all of them where there is nothing else."""
    heavy = [a.index for a in topology.atoms() if a.element is None or a.element.symbol not in ("H", "D")]
    return np.array(heavy or range(topology.getNumAtoms()), dtype=np.int64)


def nearest_rmsd(
    positions: ArrayLike, known: ArrayLike, atoms: ArrayLike, advance: Callable[[int], object] | None = None
) -> FloatArray:
    """RMSD of each frame to the nearest of the known ones, superposed; equal atoms are not exchanged.

    Parameters
    ----------
    positions, known : array_like, shape [n, N, 3] and [m, N, 3]
        nm.
    atoms : array_like of int
        Atoms that are superposed and counted.
    advance : callable, optional
        Told 1 for every frame that is done.

    Returns
    -------
    ndarray, shape [n]
        Å.

    Raises
    ------
    InputError
        There is no known frame.
    """
    import mdtraj

    index = np.asarray(atoms, int)
    x, y = (np.array(np.asarray(a)[:, index], dtype=np.float32) for a in (positions, known))
    if len(y) == 0:
        raise InputError("There is no known frame to compare with.")
    ours, theirs = mdtraj.Trajectory(x, None), mdtraj.Trajectory(y, None)
    ours.center_coordinates()
    theirs.center_coordinates()
    found = np.empty(len(x))
    for k in range(len(x)):
        found[k] = mdtraj.rmsd(theirs, ours, k, parallel=False, precentered=True).min()
        if advance is not None:
            advance(1)
    return ANGSTROM * found


def minimise(
    context: openmm.Context,
    positions: ArrayLike,
    atoms: Sequence[int] | NDArray[np.int64],
    iterations: int = ITERATIONS,
    advance: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:
    """Energy minimisation of a few frames: sound ones fall in energy and stay where they are.

    Parameters
    ----------
    context : openmm.Context
        Its positions are overwritten.
    positions : array_like, shape [n, N, 3]
        nm.
    atoms : sequence of int
        Atoms whose RMSD is reported.
    iterations : int
        At most; 0 would mean without limit.
    advance : callable, optional
        Told 1 for every frame that is done.

    Returns
    -------
    list of dict
        ``rmsd`` (Å, moved, superposed), ``before`` and ``after`` (kcal/mol); all NaN where OpenMM gave up.
    """
    rows = []
    for frame in np.asarray(positions, np.float64):
        try:
            context.setPositions(frame)
            before = context.getState(energy=True).getPotentialEnergy()._value / KCAL
            openmm.LocalEnergyMinimizer.minimize(context, maxIterations=iterations)
            state = context.getState(energy=True, positions=True)
            after = state.getPotentialEnergy()._value / KCAL
            end = np.asarray(state.getPositions(asNumpy=True)._value)
            gap = superpose(end[None], frame, atoms)[0][atoms] - frame[atoms]
            row = {"rmsd": ANGSTROM * float(np.sqrt((gap**2).sum(-1).mean())), "before": before, "after": after}
        except (openmm.OpenMMException, np.linalg.LinAlgError):  # NaN forces of atoms on top of one another
            row = {"rmsd": float("nan"), "before": float("nan"), "after": float("nan")}
        rows.append(row)
        if advance is not None:
            advance(1)
    return rows
