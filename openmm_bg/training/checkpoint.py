"""Checkpoints that survive a kill or a full disk at any moment: safetensors and JSON, no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from openmm_bg.errors import CheckpointError
from openmm_bg.files import CHECKPOINT, write_atomically

INDEX = CHECKPOINT
_FORMAT = "openmm_bg checkpoint"
_VERSION = 1
# What an interrupted or superseded checkpoint can leave behind: our own names and nothing else.
_LEFTOVER = re.compile(r"checkpoint-\d+(-\d+)?\.safetensors(\.tmp)?|checkpoint\.json\.tmp")


def exists(directory: Path) -> bool:
    """Whether the directory holds a checkpoint."""
    return (directory / INDEX).exists()


def save(directory: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a checkpoint and delete the one before it.

    The tensors go to ``checkpoint-<step>.safetensors``; then ``checkpoint.json``, which names that file, its
    size and its digest, replaces its predecessor in one rename: the commit. Older tensors go only afterwards.

    Raises
    ------
    CheckpointError
        When something cannot be written; the previous checkpoint is intact and nothing half-written remains.
    """
    data = save_tensors({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    name = f"checkpoint-{step}.safetensors"
    if name == _named_by_index(directory):
        # The committed checkpoint keeps its file until the new index is in place: take another name.
        name = f"checkpoint-{step}-1.safetensors"
    path = directory / name
    index = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "file": name,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "meta": meta,
    }
    text = json.dumps(index, indent=1, allow_nan=False).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        try:
            write_atomically(directory / INDEX, text)
        except BaseException:
            with contextlib.suppress(OSError):
                # After a failed commit the new tensors are an orphan, unless the rename itself got through.
                if _named_by_index(directory) != path.name:
                    path.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"Cannot write a checkpoint of step {step} to {directory} ({reason}){advice(directory)}."
        ) from error
    clean(directory)


def advice(directory: Path) -> str:
    """The end of a sentence about a disk that is full: whether there is a checkpoint to go on from."""
    return (
        "; the previous checkpoint is intact: make room and resume" if exists(directory) else ": make room and repeat"
    )


def _named_by_index(directory: Path) -> str | None:
    try:
        return json.loads((directory / INDEX).read_bytes())["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clean(directory: Path) -> None:
    """Delete what the index does not name: older tensors and leftovers of a killed process."""
    keep = _named_by_index(directory)
    if keep is None:
        return
    for path in directory.iterdir():
        if path.name != keep and _LEFTOVER.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def load(directory: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, tensors (on the CPU) and metadata of the checkpoint in a directory.

    Raises
    ------
    CheckpointError
        For a missing, truncated or foreign checkpoint.
    """
    path = directory / INDEX
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != _FORMAT or index["version"] != _VERSION:
            raise CheckpointError(f"{path} is not a checkpoint of this version of openmm_bg.")
        name, size, digest = index["file"], int(index["size"]), index["sha256"]
        if not _LEFTOVER.fullmatch(name):
            raise ValueError(name)
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged or not a checkpoint of openmm_bg.") from None
    try:
        data = (directory / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {directory / name}, which {path} names: {error.strerror}.") from None
    if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"{directory / name} is damaged (size or digest differ), restore it from a copy or train anew."
        )
    try:
        tensors = load_tensors(data)
    except SafetensorError:
        raise CheckpointError(f"{directory / name} is not a safetensors file.") from None
    return int(index["step"]), tensors, index["meta"]


def load_module(module: torch.nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Copy the tensors named ``prefix + name`` into a module's state.

    Raises
    ------
    CheckpointError
        When names or shapes differ from the module's.
    """
    state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    own = module.state_dict()
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise CheckpointError("The checkpoint belongs to another flow: resume with the configuration it was made with.")
    module.load_state_dict(state)
