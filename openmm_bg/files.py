"""Files that are written whole or not at all, and what a folder of them is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

from openmm_bg.errors import InputError

#: By these a folder is known: what a training, its checkpoints and a simulation leave there.
FLOW, CHECKPOINT, SIMULATION = "flow.bg", "checkpoint.json", "simulation.json"


def folder_kind(folder: Path) -> Literal["model", "training", "simulation", "other"]:
    """What a folder holds: a trained flow, a training that has not ended, MD frames, or neither."""
    if (folder / FLOW).is_file():
        return "model"
    if (folder / CHECKPOINT).is_file():
        return "training"
    return "simulation" if (folder / SIMULATION).is_file() else "other"


def find_flow(path: Path) -> Path:
    """The flow file that a user names, or that of the training folder that he names.

    Raises
    ------
    InputError
        A folder without a flow; the sentence says what it is.
    """
    if not path.is_dir():
        return path
    kind = folder_kind(path)
    if kind == "model":
        return path / FLOW
    if kind == "training":
        raise InputError(
            f"The training in {path} has not ended, and so has left no {FLOW} yet: repeat its command with --resume."
        )
    if kind == "simulation":
        raise InputError(
            f"{path} holds MD frames of openmm-bg simulate and no flow: name the flow that was trained on them "
            f"(openmm-bg train {path} -o model/ leaves model/{FLOW})."
        )
    if others := sorted(found.name for found in path.glob("*.bg")):
        raise InputError(f"{path} is a folder, which holds {', '.join(others)}: name the file.")
    raise InputError(f"{path} is a folder without a flow: name a flow file, or a folder of openmm-bg train.")


def write_atomically(path: Path, content: bytes | str) -> None:
    """`path` holds all of the content (text as UTF-8), or what it held, even after a kill or on a full disk.

    The content goes to ``path.tmp``, onto the disk, and then takes the place of `path` in one rename.

    Raises
    ------
    OSError
        It cannot be written; nothing half-written remains.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; file systems which cannot open a directory do so on their own."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
