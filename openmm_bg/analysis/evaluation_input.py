"""What `openmm-bg evaluate` reads: held-out frames, the training frames beside them, both of bounded size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.coordinates.bond_lengths import check_bond_lengths
from openmm_bg.errors import InputError

logger = logging.getLogger(__name__)

Frames = NDArray[np.float32]

#: More frames than twice this are thinned while they are read.
MAX_FRAMES = 10_000
#: The same for training frames: the nearest of a part is farther than the nearest of all, and to look at more of them
#: costs seconds only.
MAX_TRAINING_FRAMES = 25_000
#: Fewer make no figure worth printing.
MIN_FRAMES = 20
_CHUNK = 500
#: Formats that name their atoms.
_NAMED = (".pdb", ".h5", ".hdf5", ".gro", ".mol2")


@dataclass(frozen=True)
class HeldOut:
    """Frames to evaluate on.

    ``positions`` [n, N, 3] nm, ``training`` [m, N, 3] or None, ``source`` and ``training_source`` (where from),
    ``notes`` (sentences for the reader).
    """

    positions: Frames
    training: Frames | None
    source: str
    training_source: str | None
    notes: tuple[str, ...]


def read_frames(path: Path, topology: Any, limit: int = MAX_FRAMES, available: int | None = None) -> tuple[Frames, int]:
    """Frames of a trajectory, evenly thinned to at most twice ``limit``.

    Parameters
    ----------
    path
        Any format that MDTraj reads.
    topology : openmm.app.Topology
        The flow's.
    limit
        Frames kept at least, if the file has them.
    available
        Read no more frames than this; None reads all.

    Returns
    -------
    positions
        [n, N, 3] nm.
    stride
        Every how many-th frame was kept.

    Raises
    ------
    InputError
        Missing or unreadable file; another number or order of atoms; a frame that is not finite.
    """
    import mdtraj

    if not path.is_file():
        raise InputError(f"There is no trajectory at {path}.")
    n_atoms = topology.getNumAtoms()
    named = path.suffix.lower() in _NAMED
    kept: list[Frames] = []
    seen, stride = 0, 1
    try:
        extra = {} if named else {"top": mdtraj.Topology.from_openmm(topology)}
        for chunk in mdtraj.iterload(str(path), chunk=_CHUNK, **extra):
            if named and seen == 0:
                _check_elements(chunk.topology, topology, path)
            if chunk.n_atoms != n_atoms:
                raise InputError(f"{path} has {chunk.n_atoms} atoms, the flow's molecule {n_atoms}.")
            xyz = chunk.xyz if available is None else chunk.xyz[: max(0, available - seen)]
            kept.extend(np.array(xyz[(-seen) % stride :: stride], dtype=np.float32))
            seen += len(xyz)
            while len(kept) > 2 * limit:
                kept, stride = kept[::2], 2 * stride
            if available is not None and seen >= available:
                break
    except InputError:
        raise
    except Exception as error:  # MDTraj raises whatever its format's reader does
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        reason = reason.split(". I can only load")[0]  # and all endings that MDTraj knows
        raise InputError(
            f"MDTraj cannot read {path} as a trajectory of the flow's {n_atoms} atoms: {reason}."
        ) from error
    if not kept:
        raise InputError(f"{path} holds no frames.")
    return np.stack(kept), stride


def check_frames(positions: Any, topology: Any, name: str) -> Frames:
    """Positions [n, N, 3] nm as float32, checked to be of the flow's molecule.

    Parameters
    ----------
    positions
        Frames.
    topology : openmm.app.Topology
        The flow's.
    name
        What to call the frames in messages.

    Raises
    ------
    InputError
        Another shape, a frame that is not finite, or one with bonds of impossible lengths.
    """
    x = np.asarray(positions)
    n = topology.getNumAtoms()
    if x.ndim != 3 or x.shape[1:] != (n, 3):
        raise InputError(f"{name} must hold frames [n, {n}, 3] of the flow's molecule, got {list(x.shape)}.")
    check_bond_lengths(x, MoleculeGraph(topology), name)
    return x.astype(np.float32, copy=False)


def read_held_out(
    data: Path,
    topology: Any,
    training: Path | None = None,
    limit: int = MAX_FRAMES,
    training_limit: int = MAX_TRAINING_FRAMES,
) -> HeldOut:
    """Held-out frames, and the training frames where they are to be had.

    Parameters
    ----------
    data
        A trajectory, or a folder of ``openmm-bg simulate`` with its test.dcd. Where it lies in such a folder, the
        folder's other frames are the training frames, and no more frames are read than its checkpoint vouches for.
    topology : openmm.app.Topology
        The flow's.
    training
        A trajectory or such a folder, instead.
    limit, training_limit
        As in `read_frames`, of held-out and of training frames.

    Raises
    ------
    InputError
        As `read_frames`; a folder without a simulation or without test.dcd.
    """
    notes: list[str] = []
    folder = data if data.is_dir() else data.parent
    simulated = (folder / "simulation.json").is_file()
    if data.is_dir():
        if not simulated:
            raise InputError(f"{data} is no folder of openmm-bg simulate: give it a trajectory, or such a folder.")
        data = data / "test.dcd"
        if not data.is_file():
            raise InputError(f"{folder} has no test.dcd (--no-test?): give a trajectory that training has not seen.")
    available = None
    if simulated and data.name == "test.dcd":
        from openmm_bg.simulate.folder import read_checkpoint

        found = read_checkpoint(folder, "test")
        available = 0 if found is None else int(found["frames"])
        training = folder if training is None else training
    elif simulated and data.suffix == ".dcd":
        from openmm_bg.simulate.folder import read_record

        if data.stem in read_record(folder)["trajectories"]:
            notes.append(f"{data} is one of the trajectories that openmm-bg train takes from {folder}: not held out.")
    positions, stride = read_frames(data, topology, limit, available)
    if stride > 1:
        notes.append(f"Every {_ordinal(stride)} frame of {data} was used, {len(positions)} frames.")
    known: Frames | None = None
    if training is not None:
        known, stride = _read_training(training, topology, training_limit)
        if stride > 1:
            notes.append(
                f"Every {_ordinal(stride)} training frame of {training} was used, {len(known)} frames: the nearest of "
                "all may be nearer than the nearest of these."
            )
    return HeldOut(positions, known, str(data), None if training is None else str(training), tuple(notes))


def _read_training(path: Path, topology: Any, limit: int) -> tuple[Frames, int]:
    """As `read_frames`, of a trajectory or of a folder's frames for training."""
    if not path.is_dir():
        return read_frames(path, topology, limit)
    from openmm_bg.simulate.folder import read_training_data

    frames = read_training_data(path).positions
    stride = max(1, -(-len(frames) // (2 * limit)))
    return np.array(frames[::stride], dtype=np.float32), stride


def _ordinal(n: int) -> str:
    """2nd, 3rd, 4th, 11th, 22nd."""
    return f"{n}{'th' if n % 100 in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def _check_elements(found: Any, topology: Any, path: Path) -> None:
    ours = [("" if a.element is None else a.element.symbol, a.name) for a in topology.atoms()]
    theirs = [("" if a.element is None else a.element.symbol, a.name) for a in found.atoms]
    for i, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        if a[0] != b[0]:
            raise InputError(f"Atom {i} is {a[1]} in {path} and {b[1]} in the flow's molecule: another atom order.")
