"""OpenMM's replica exchange reporter, with a record of the flows, states and counts of the run that wrote the files."""

from __future__ import annotations

import hashlib
import json
import os
import re
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

RECORD = "flow_moves.json"
RECORD_VERSION = 1
#: Entries that have to be the same when a run is resumed, and how an error names them.
_IDENTITY = {
    "system": "another System",
    "states": "other states",
    "flows": "other flows",
    "atom_subset": "another atom_subset",
}


class FlowReplicaExchangeReporter(app.ReplicaExchangeReporter):
    """`openmm.app.ReplicaExchangeReporter` that also writes which flows, states and System the files belong to.

    OpenMM's checkpoints hold conformations and the log says in which states they are; neither says of what. Resuming
    compares first, so that files of another run are refused before the sampler is touched, and gives the sampler its
    counts back.

    Parameters
    ----------
    directory, reportInterval
        As in OpenMM's class.
    sampler
        The `FlowReplicaExchangeSampler` that this reporter will be added to.
    resume
        Whether to continue from the files in ``directory`` (written with ``checkpoints=True``).
    options
        All others of OpenMM's class.

    Raises
    ------
    InputError
        The files are of another System, other states or flows, or were not written by this class; nothing is changed.
    ValueError
        As OpenMM's class, for folders that are not empty and files that are missing.
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
        self._record = Path(directory) / RECORD
        self._identity = _identity(sampler)
        stored = _read(self._record) if resume else None
        if stored is not None:
            for name, other in _IDENTITY.items():
                if stored.get(name) != self._identity[name]:
                    raise InputError(
                        f"The files in {directory} are from a run with {other}: resume with what wrote them, or give "
                        "a new folder."
                    )
        super().__init__(str(directory), reportInterval, sampler, resume=resume, **options)
        if stored is not None:
            _restore(sampler, stored)
        else:
            self._write(sampler)

    def __call__(self, sampler: FlowReplicaExchangeSampler) -> None:
        """Write what OpenMM's class writes, and the counts; called by the sampler after every iteration."""
        super().__call__(sampler)
        if sampler.currentIteration % self.reportInterval == 0:
            self._write(sampler)

    def _write(self, sampler: FlowReplicaExchangeSampler) -> None:
        swaps = [{"pair": list(pair), **counts} for pair, counts in sampler.swap_statistics.items()]
        counts = {"flow_statistics": sampler.flow_statistics, "swap_statistics": swaps}
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
