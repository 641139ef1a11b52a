"""Files that are written whole or not at all, and what a folder of them is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

#: By these a folder is known: what a training, its checkpoints and a simulation leave there.
FLOW, CHECKPOINT, SIMULATION = "flow.bg", "checkpoint.json", "simulation.json"


def folder_kind(folder: Path) -> Literal["model", "training", "simulation", "other"]:
    """What a folder holds: a trained flow, a training that has not ended, MD frames, or neither."""
    if (folder / FLOW).is_file():
        return "model"
    if (folder / CHECKPOINT).is_file():
        return "training"
    return "simulation" if (folder / SIMULATION).is_file() else "other"


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
