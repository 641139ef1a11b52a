"""Choices of a full tuning, kept from one process to the next.

A choice holds for one System, on one machine, with the same versions of what evaluates it: all of that is in the name
of its file. Nothing depends on the file: without it, the choice is made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import platform as machine
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from .twin.kernels import cache_folder, compiler
from .twin_workers import TWIN, TWIN_ON_GPU, gpu_name
from .workers import usable_cores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Platform (or one of `TWINS`), number of workers, the frames per second that they were chosen for, whether the
    workers are processes, and whether an equal force stands in for the solvent's.
    """

    platform: str
    n_workers: int
    frames_per_second: float
    processes: bool = False
    equal_solvent: bool = False


def load_choice(digest: str) -> Choice | None:
    """The choice kept for the System of this digest, if it was made on a machine like this one.

    A file that cannot be read counts as none.
    """
    conditions = _conditions(digest)
    try:
        found = json.loads(_path(conditions).read_text(encoding="utf-8"))
        choice = Choice(**found["choice"])
        twins = [TWIN, TWIN_ON_GPU] if conditions["gpu"] else [TWIN]
        known = choice.platform in [*twins, *conditions["platforms"]]
        counts = isinstance(choice.n_workers, int) and choice.n_workers >= 1
        if found["conditions"] == conditions and known and counts and math.isfinite(choice.frames_per_second):
            return choice
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        logger.debug("A kept choice of how to evaluate energies cannot be read: %s", error)
    return None


def keep_choice(digest: str, choice: Choice) -> None:
    """Write a choice, whole or not at all; if that is impossible, one sentence says so."""
    conditions = _conditions(digest)
    content = json.dumps({"choice": asdict(choice), "conditions": conditions}, indent=1)
    temporary = None
    try:
        path = _path(conditions)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several processes of one training keep theirs at the same time.
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # Path.home raises RuntimeError
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        logger.warning("How energies are evaluated fastest is not kept, for it cannot be written: %s.", reason)


def _path(conditions: dict[str, Any]) -> Path:
    name = hashlib.blake2b(json.dumps(conditions, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / "choices" / f"{name}.json"


def _conditions(digest: str) -> dict[str, Any]:
    """All that a choice depends on."""
    try:
        ours = version("openmm-bg")
    except PackageNotFoundError:
        ours = ""
    return {
        "system": digest,
        "format": 2,  # 1 was kept without a look at other load on the machine
        "processor": _processor(),
        "cores": len(usable_cores()),
        "processes": os.environ.get("LOCAL_WORLD_SIZE", "1"),  # of one training, which share the cores
        "compiler": compiler() is not None,
        "gpu": gpu_name(),
        "triton": importlib.util.find_spec("triton") is not None,  # the compiler for a GPU
        "platforms": [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())],
        "openmm": openmm.Platform.getOpenMMVersion(),
        "torch": torch.__version__,
        "openmm_bg": ours,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return machine.processor() or machine.machine()
