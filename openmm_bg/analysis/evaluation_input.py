"""What `openmm-bg evaluate` reads: held-out frames, the training frames beside them, both of bounded size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.errors import InputError

logger = logging.getLogger(__name__)

Frames = NDArray[np.float32]

#: More frames than twice this are thinned while they are read.
MAX_FRAMES = 10_000
#: Fewer make no figure worth printing.
MIN_FRAMES = 20
#: A bond this many times longer or shorter than in the flow's molecule was never one: another order, other units.
STRETCH = 1.5
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


def check_frames(positions: Any, topology: Any, reference: NDArray[np.floating], name: str) -> Frames:
    """Positions [n, N, 3] nm as float32, checked to be of the flow's molecule.

    Parameters
    ----------
    positions
        Frames.
    topology : openmm.app.Topology
        The flow's.
    reference
        [N, 3] nm, a sound frame of the flow's molecule.
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
    bad = np.flatnonzero(~np.isfinite(x).all((1, 2)))
    if bad.size:
        raise InputError(f"Frame {bad[0]} of {name} has positions that are not finite: remove it.")
    bonds = [(bond[0], bond[1]) for bond in topology.bonds()]
    a, b = (np.array([pair[k].index for pair in bonds], dtype=int) for k in (0, 1))
    typical = np.linalg.norm(reference[a] - reference[b], axis=-1)
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        length = np.linalg.norm(part[:, a] - part[:, b], axis=-1)
        wrong = np.argwhere(~((length > typical / STRETCH) & (length < typical * STRETCH)))
        if len(wrong):
            frame, k = wrong[0]
            one, other = bonds[k]
            raise InputError(
                f"In frame {start + frame} of {name} the bond {one.residue.name}{one.residue.index + 1}-{one.name} to "
                f"{other.residue.name}{other.residue.index + 1}-{other.name} is {length[frame, k]:.3f} nm, in the "
                f"flow's molecule {typical[k]:.3f}: another molecule or atom order, other units, or one split by a "
                "periodic box."
            )
    return x.astype(np.float32, copy=False)


def read_held_out(data: Path, topology: Any, training: Path | None = None, limit: int = MAX_FRAMES) -> HeldOut:
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
    limit
        As in `read_frames`.

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
        notes.append(f"Every {stride}th frame of {data} was used, {len(positions)} frames.")
    known: Frames | None = None
    if training is not None:
        known = _read_training(training, topology, limit)
    return HeldOut(positions, known, str(data), None if training is None else str(training), tuple(notes))


def _read_training(path: Path, topology: Any, limit: int) -> Frames:
    if not path.is_dir():
        return read_frames(path, topology, limit)[0]
    from openmm_bg.simulate.folder import read_training_data

    frames = read_training_data(path).positions
    stride = max(1, len(frames) // limit)
    return np.array(frames[::stride], dtype=np.float32)


def _check_elements(found: Any, topology: Any, path: Path) -> None:
    ours = [("" if a.element is None else a.element.symbol, a.name) for a in topology.atoms()]
    theirs = [("" if a.element is None else a.element.symbol, a.name) for a in found.atoms]
    for i, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        if a[0] != b[0]:
            raise InputError(f"Atom {i} is {a[1]} in {path} and {b[1]} in the flow's molecule: another atom order.")
