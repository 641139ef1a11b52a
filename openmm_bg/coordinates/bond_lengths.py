"""Are frames of this molecule: no bond of theirs may have a length that no covalent bond has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.errors import InputError

#: Covalent radii, nm (Cordero et al. 2008); elements that are not listed count as the largest.
COVALENT_RADII = {"H": 0.031, "D": 0.031, "C": 0.076, "N": 0.071, "O": 0.066, "F": 0.057, "S": 0.105, "P": 0.107}
LARGEST_RADIUS = 0.15
#: A bond longer than this many times the sum of its radii was never a bond: another atom order.
STRETCH = 1.4
#: The same for frames after the first, where hot MD of a soft bond may have gone: broken, for all that is known.
BROKEN = 2.0
#: Shorter than this many times the sum, atoms of listed elements stand on one another: other units, empty frames.
SQUEEZE = 0.5
#: Frames looked at together.
_FRAMES = 256


def check_bond_lengths(positions: NDArray[np.floating], graph: MoleculeGraph, name: str) -> None:
    """Refuse frames that cannot be of a molecule, by the elements of its bonds alone.

    No frame stands for what is usual: the mean of a fit closes no flexible ring, so that it has disulfides, and bonds
    that close a macrocycle, of any length.

    Parameters
    ----------
    positions
        [n, N, 3] nm, the first frame a sound one: it is judged more strictly.
    graph
        Of the molecule.
    name
        What to call the frames in messages.

    Raises
    ------
    InputError
        A non-finite frame, or a bond that is far too long or too short.

    References
    ----------
    Cordero et al., Dalton Trans. 2832 (2008).
    """
    pairs = np.array([(a, b) for a in range(graph.n_atoms) for b in graph.neighbours[a] if a < b])
    a, b = pairs.reshape(-1, 2).T
    radii = np.array([COVALENT_RADII.get(element, LARGEST_RADIUS) for element in graph.elements])
    listed = np.array([element in COVALENT_RADII for element in graph.elements])
    usual = radii[a] + radii[b]
    least = np.where(listed[a] & listed[b], SQUEEZE, 0.0) * usual
    for start in range(0, len(positions), _FRAMES):
        frames = np.asarray(positions[start : start + _FRAMES], dtype=np.float64)
        infinite = np.flatnonzero(~np.isfinite(frames).all((1, 2)))
        if len(infinite):
            raise InputError(f"Frame {start + infinite[0]} of {name} has non-finite positions: remove it.")
        length = np.linalg.norm(frames[:, a] - frames[:, b], axis=-1)
        limit = np.full((len(frames), 1), BROKEN)
        if start == 0:
            limit[0] = STRETCH
        wrong = np.argwhere((length > limit * usual) | (length < least))
        if len(wrong):
            frame, k = wrong[0]
            raise InputError(
                f"In frame {start + frame} of {name} the bond {graph.label(a[k])} to {graph.label(b[k])} is "
                f"{length[frame, k]:.3f} nm: another molecule or atom order, wrong units, or a molecule split by the "
                "periodic box."
            )
