"""The folder of a simulation: what it holds, how it is written so that a kill at any moment loses nothing, and reading.

``system.xml`` is the System that ran, constraints and solvent force included: the frames' ensemble is that of this
System and no other. ``topology.pdb`` (.cif) has the minimised start. Each replica has ``NAME.dcd``, ``NAME.csv`` (time,
potential energy, temperature of each frame) and ``NAME.checkpoint.json``. ``simulation.json`` has the rest.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.errors import CheckpointError, InputError
from openmm_bg.files import SIMULATION, write_atomically
from openmm_bg.simulate.structure import Molecule

logger = logging.getLogger(__name__)

RECORD = SIMULATION
SYSTEM = "system.xml"
FORMAT = "openmm_bg simulation"


@dataclass(frozen=True)
class TrainingData:
    """What ``openmm-bg train`` takes from a folder: positions [n, N, 3] nm of all trajectories but test.dcd."""

    system: openmm.System
    topology: app.Topology
    positions: NDArray[np.float32]
    temperature: float


def check_new(folder: Path) -> None:
    """Refuse a folder that holds anything, and one that cannot be made.

    Raises
    ------
    InputError
        As said.
    """
    if (folder / RECORD).exists():
        raise InputError(f"{folder} holds a simulation already: continue it with --resume, or choose another folder.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose another one.")
    above = folder.absolute().parent
    if not above.is_dir():
        raise InputError(f"There is no folder {above}.")
    if not os.access(above, os.W_OK):
        raise InputError(f"The folder {above} cannot be written: choose another place for {folder.name}.")


def create(folder: Path, molecule: Molecule, system: openmm.System, record: dict[str, Any]) -> None:
    """Make the folder with System, topology and record; all of it appears at once.

    Raises
    ------
    InputError
        It cannot be written, or the topology does not survive being written.
    """
    target = folder.absolute()
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        name, text = _topology_file(molecule)
        record = {"format": FORMAT, "version": 1, "topology": name, **record}
        write_atomically(temporary / SYSTEM, openmm.XmlSerializer.serialize(system))
        write_atomically(temporary / name, text)
        write_atomically(temporary / RECORD, json.dumps(record, indent=1))
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"Cannot write {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any]:
    """The content of simulation.json.

    Raises
    ------
    InputError
        No folder of a simulation.
    CheckpointError
        A damaged one.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"{folder} is no folder of openmm-bg simulate: it has no {RECORD}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["version"] != 1:
            raise ValueError("another format")
        if not all(record[key] for key in ("topology", "protocol", "trajectories", "frames", "engine")):
            raise ValueError("something is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged, or was written by another version.") from error
    return record


def read_system(folder: Path) -> openmm.System:
    """The System of system.xml."""
    try:
        return openmm.XmlSerializer.deserialize((folder / SYSTEM).read_text(encoding="utf-8"))
    except Exception as error:  # OSError, or whatever the parser raises
        raise CheckpointError(f"{folder / SYSTEM} is missing or damaged.") from error


def read_topology(folder: Path, record: dict[str, Any]) -> tuple[app.Topology, NDArray[np.float64]]:
    """Topology and the minimised positions [N, 3] nm."""
    path = folder / record["topology"]
    try:
        found = (app.PDBxFile if path.suffix == ".cif" else app.PDBFile)(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} is missing or damaged.") from error
    return found.topology, np.array(found.getPositions(asNumpy=True)._value, dtype=np.float64)


def read_checkpoint(folder: Path, name: str) -> dict[str, Any] | None:
    """What a replica had saved, None before its first checkpoint."""
    path = folder / f"{name}.checkpoint.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in ("frames", "dcd_bytes", "csv_bytes", "changed"):
            found[key] = int(found[key])
        if not isinstance(found["state"], str):
            raise ValueError("no state")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: remove it and the other files of {name} to repeat it.") from error
    return found


def read_training_data(folder: Path) -> TrainingData:
    """Frames, System and temperature for training; only frames that a checkpoint vouches for.

    Raises
    ------
    InputError
        No simulation, or one without frames yet.
    CheckpointError
        A damaged or incomplete file.
    """
    from mdtraj.formats import DCDTrajectoryFile

    record = read_record(folder)
    system, (topology, _) = read_system(folder), read_topology(folder, record)
    n_atoms = topology.getNumAtoms()
    if system.getNumParticles() != n_atoms:
        raise CheckpointError(f"{folder / SYSTEM} and {folder / record['topology']} are of different molecules.")
    parts, expected = [], 0
    for name in record["trajectories"]:
        if name == "test":
            continue
        expected += record["frames"]
        checkpoint = read_checkpoint(folder, name)
        n = 0 if checkpoint is None else checkpoint["frames"]
        if n == 0:
            continue
        path = folder / f"{name}.dcd"
        try:
            with DCDTrajectoryFile(str(path)) as file:
                xyz = file.read(n_frames=n)[0]
        except Exception as error:  # MDTraj raises OSError, RuntimeError and its own
            raise CheckpointError(f"{path} is missing or damaged.") from error
        if xyz.shape != (n, n_atoms, 3):
            raise CheckpointError(f"{path} does not hold the {n} frames of {n_atoms} atoms that its checkpoint counts.")
        parts.append(xyz / np.float32(10.0))  # Å
    if not parts:
        raise InputError(f"The simulation in {folder} has no frames yet: let it run, --resume continues it.")
    positions = np.concatenate(parts)
    if len(positions) < expected:
        logger.warning("The simulation in %s is not complete: %d of %d frames.", folder, len(positions), expected)
    return TrainingData(system, topology, positions, float(record["protocol"]["temperature"]))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from writing to the folder.

    Raises
    ------
    InputError
        Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process is simulating in {folder}: wait for it or end it.") from None
        except OSError:
            pass  # a file system without locks
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _topology_file(molecule: Molecule) -> tuple[str, str]:
    """Name and text of a file from which OpenMM reads the same atoms and bonds."""
    for name, format_ in (("topology.pdb", app.PDBFile), ("topology.cif", app.PDBxFile)):
        text = io.StringIO()
        with contextlib.suppress(Exception):  # more atoms than a PDB file can number
            format_.writeFile(molecule.topology, molecule.positions * unit.nanometer, text, keepIds=True)
            back = format_(io.StringIO(text.getvalue())).topology
            if _fingerprint(back) == _fingerprint(molecule.topology):
                return name, text.getvalue()
    raise InputError("The bonds of this molecule do not survive in a PDB or PDBx/mmCIF file: rename residues or atoms.")


def _fingerprint(topology: app.Topology) -> tuple[list[str], set[tuple[int, int]]]:
    elements = ["" if a.element is None else a.element.symbol for a in topology.atoms()]
    return elements, {(min(a.index, b.index), max(a.index, b.index)) for a, b in topology.bonds()}
