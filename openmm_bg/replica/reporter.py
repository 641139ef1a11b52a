"""OpenMM's replica exchange reporter, with a record of the flows, states and counts of the run that wrote the files."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.artifact import Flow, topology_digest
from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically
from openmm_bg.replica.sampler import FlowReplicaExchangeSampler

logger = logging.getLogger(__name__)

RECORD = "flow_moves.json"
RECORD_VERSION = 1
#: Entries that have to be the same when a run is resumed, and how an error names them.
_IDENTITY = {
    "system": "another System",
    "states": "other states",
    "flows": "other flows",
    "atom_subset": "another atom_subset",
}


#: What OpenMM's class changes of a sampler when it resumes.
_RESUMED = ("replicaConformation", "replicaStateIndex", "_previousReplicaStateIndex", "currentIteration")
_COUNTS = ("n_proposed", "n_accepted", "n_outside")


class FlowReplicaExchangeReporter(app.ReplicaExchangeReporter):
    """`openmm.app.ReplicaExchangeReporter` that also writes which flows, states and System the files belong to.

    OpenMM's checkpoints hold conformations and the log says in which states they are; neither says of what. Resuming
    compares first, so that files of another run or damaged ones are refused before the sampler is touched, and gives
    the sampler its counts back. Other options of the moves are no other run; a note in the log names them.

    Parameters
    ----------
    directory, reportInterval
        As in OpenMM's class.
    sampler
        The `FlowReplicaExchangeSampler` that this reporter will be added to, and no other.
    resume
        Whether to continue from the files in ``directory`` (written with ``checkpoints=True``).
    options
        All others of OpenMM's class.

    Raises
    ------
    InputError
        The files are of another System, other states or flows, were not written by this class, or are damaged; a
        folder that is not empty, without ``resume``; a sampler of another class. Nothing is changed.
    ValueError
        As OpenMM's class, for files that are missing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        reportInterval: int,
        sampler: FlowReplicaExchangeSampler,
        *,
        resume: bool = False,
        **options: Any,
    ) -> None:
        # OpenMM's class ends by closing files, whether or not its constructor was ever reached.
        self._log = self._energy = self._volume = None
        if not isinstance(sampler, FlowReplicaExchangeSampler):
            raise InputError(f"This reporter needs a FlowReplicaExchangeSampler, got a {type(sampler).__name__}.")
        self._sampler = weakref.ref(sampler)  # the sampler holds this reporter
        self._record = Path(directory) / RECORD
        self._identity = _identity(sampler)
        stored = _read(self._record) if resume else None
        if stored is None:
            _require_empty(Path(directory))
        else:
            _require_sound(stored, self._record)
            for name, other in _IDENTITY.items():
                if stored.get(name) != self._identity[name]:
                    raise InputError(
                        f"The files in {directory} are from a run with {other}: resume with what wrote them, or give "
                        "a new folder."
                    )
            _require_sound_run(Path(directory), len(sampler.states))
        before = {name: copy.copy(getattr(sampler, name)) for name in _RESUMED}
        try:
            super().__init__(str(directory), reportInterval, sampler, resume=resume, **options)
        except BaseException:
            for name, value in before.items():
                setattr(sampler, name, value)
            raise
        if stored is not None:
            _restore(sampler, stored)
            _note_options(sampler, stored, directory)
        else:
            self._write(sampler)

    def require_own(self, sampler: FlowReplicaExchangeSampler) -> None:
        """Raise `InputError` unless this reporter was made for this sampler."""
        if sampler is not self._sampler():
            raise InputError(
                f"The reporter of {self.directory} was made for another sampler: make one for this sampler, with a "
                "folder of its own."
            )

    def __call__(self, sampler: FlowReplicaExchangeSampler) -> None:
        """Write what OpenMM's class writes, and the counts; called by the sampler after every iteration.

        Raises
        ------
        InputError
            It is not the sampler that this reporter was made for; nothing is written.
        """
        self.require_own(sampler)
        super().__call__(sampler)
        if sampler.currentIteration % self.reportInterval == 0:
            self._write(sampler)

    def _write(self, sampler: FlowReplicaExchangeSampler) -> None:
        swaps = [{"pair": list(pair), **counts} for pair, counts in sampler.swap_statistics.items()]
        counts = {"flow_statistics": sampler.flow_statistics, "swap_statistics": swaps, "options": _options(sampler)}
        record = {"version": RECORD_VERSION, **self._identity, "iteration": sampler.currentIteration, **counts}
        write_atomically(self._record, json.dumps(record, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"There is no readable {path.name} in {path.parent}: this reporter resumes only what it wrote itself."
        ) from error
    if not isinstance(found, dict) or found.get("version") != RECORD_VERSION:
        raise InputError(f"{path} is of another version of openmm_bg: resume with the version that wrote it.")
    return found


def _require_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"The folder {folder} is not empty: resume=True continues the run in it, another one wants a new folder."
        )


def _require_sound(stored: Mapping[str, Any], path: Path) -> None:
    """Raise `InputError` unless a record has all that is read from it."""

    def are_counts(found: Any) -> bool:
        return isinstance(found, dict) and all(isinstance(found.get(name), int) for name in _COUNTS)

    states, flow_counts, swap_counts = (stored.get(n) for n in ("states", "flow_statistics", "swap_statistics"))
    sound = (
        all(name in stored for name in _IDENTITY)
        and isinstance(states, list)
        and isinstance(flow_counts, list)
        and len(flow_counts) == len(states)
        and all(are_counts(found) for found in flow_counts)
        and isinstance(swap_counts, list)
        and all(are_counts(found) and isinstance(found.get("pair"), list) for found in swap_counts)
        and isinstance(stored.get("options", {}), dict)
    )
    if not sound:
        raise _damaged(path)


def _require_sound_run(folder: Path, n_states: int) -> None:
    """Raise `InputError` unless OpenMM can read the log and checkpoints; it tells itself of those that are missing."""
    for index in range(n_states):
        path = folder / f"checkpoint_{index}.xml"
        if not path.is_file():
            continue
        try:
            found = openmm.XmlSerializer.deserialize(path.read_text())
        except Exception as error:  # OpenMM's parser raises what it likes
            raise _damaged(path) from error
        if not isinstance(found, openmm.State):
            raise _damaged(path)
    path = folder / "log.csv"
    if path.is_file():
        try:
            fields = path.read_text().splitlines()[-1].split(",")
            whole = [int(fields[0]), *(int(x) for x in fields[2 : n_states + 2])]
        except (IndexError, ValueError) as error:
            raise _damaged(path) from error
        if sorted(whole[1:]) != list(range(n_states)):
            raise _damaged(path)


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged: restore it from a copy, or start anew in another folder.")


def _options(sampler: FlowReplicaExchangeSampler) -> dict[str, Any]:
    """How the moves are made, as JSON has it: what may differ between a run and its continuation."""
    return {
        "n_steps": sampler.n_steps,
        "n_proposals": sampler.n_proposals,
        "step": sampler.step,
        "schedule": sampler.schedule,
        "n_kernel_steps": sampler.n_kernel_steps,
        "flow_states": sorted(int(state) for state in sampler.flow_states),
        "swaps": [[int(a), int(b)] for a, b in sampler.swap_statistics],
        "swap_travels": sampler.swap_travels,
    }


def _note_options(sampler: FlowReplicaExchangeSampler, stored: Mapping[str, Any], folder: Any) -> None:
    """Log what options of the moves have changed; files of versions that kept none say nothing."""
    now, before = _options(sampler), stored.get("options", {})
    changed = [
        f"{name} {before[name]} is now {value}" for name, value in now.items() if before.get(name, value) != value
    ]
    if changed:
        logger.warning("The run in %s goes on with other moves: %s.", folder, ", ".join(changed))


def _restore(sampler: FlowReplicaExchangeSampler, stored: Mapping[str, Any]) -> None:
    sampler.flow_statistics = [dict(counts) for counts in stored["flow_statistics"]]
    for entry in stored["swap_statistics"]:
        pair = tuple(entry["pair"])
        if pair in sampler.swap_statistics:
            sampler.swap_statistics[pair] = {name: n for name, n in entry.items() if name != "pair"}


def _identity(sampler: FlowReplicaExchangeSampler) -> dict[str, Any]:
    """What must not differ between a run and its continuation, as JSON has it."""
    # Seeds of random numbers may differ from one part of a run to the next.
    xml = re.sub(r'\brandom(?:Number)?Seed="[^"]*"', "", openmm.XmlSerializer.serialize(sampler.simulation.system))
    digests = {id(p): flow_digest(p.flow) for p in sampler.proposals}
    return {
        "system": hashlib.sha256(xml.encode()).hexdigest(),
        "states": [{str(name): _plain(value) for name, value in state.items()} for state in sampler.states],
        "flows": [digests[id(p)] for p in sampler.proposals],
        "atom_subset": None if sampler.proposals[0].atoms is None else sampler.proposals[0].particles,
    }


def _plain(value: Any) -> Any:
    """A property of a state as JSON has it: temperatures in K, force groups as sorted pairs of group and weight."""
    if unit.is_quantity(value):
        value = value.value_in_unit_system(unit.md_unit_system)
    if isinstance(value, Mapping):
        return sorted([int(group), float(weight)] for group, weight in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted([int(group), 1.0] for group in value)
    return float(value)


def flow_digest(flow: Flow) -> str:
    """sha256 of a flow's molecule, its layout and all its parameters, whether it was loaded or just trained."""
    found = hashlib.sha256(topology_digest(flow.metadata["topology"]).encode())
    found.update(json.dumps(flow.coordinates.layout.to_dict(), sort_keys=True).encode())
    for name, value in sorted(flow.density.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
