"""`openmm-bg evaluate` and `openmm-bg report` on files: what is wrong with them is said before any long work."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import platform as machine
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: F401

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.analysis.distances import BATCH
from openmm_bg.analysis.evaluate import check_numbers, evaluate
from openmm_bg.analysis.evaluation import Evaluation
from openmm_bg.analysis.evaluation_input import HeldOut, read_held_out
from openmm_bg.artifact import Flow, load
from openmm_bg.errors import CheckpointError, InputError
from openmm_bg.files import find_flow

logger = logging.getLogger(__name__)

#: Losses of a training, in its folder.
LOSSES_NAME = "losses.csv"


@dataclass(frozen=True)
class _Input:
    """Flows and frames, read and checked."""

    paths: list[Path]
    flows: list[Flow]
    held: HeldOut


def check_target(target: Path) -> None:
    """Refuse a file that could not be written.

    Raises
    ------
    InputError
        A folder of that name, no folder to hold it, or one that cannot be written.
    """
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file with -o.")
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent}.")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise InputError(f"{target} cannot be written: choose another place with -o.")


def _read(flow_files: Sequence[Path], data: Path, training: Path | None, settings: dict[str, Any]) -> _Input:
    paths = [find_flow(path) for path in flow_files]
    flows = [load(path) for path in paths]
    check_numbers(flows, settings.get("n_samples", 1), settings.get("batch", BATCH), settings.get("seed", 0))
    return _Input(paths, flows, read_held_out(data, flows[0].topology, training))


def _evaluated(given: _Input, system_source: str | None, settings: dict[str, Any]) -> Evaluation:
    result = evaluate(given.flows, given.held.positions, given.held.training, **settings)
    about = {
        "flows": [str(path) for path in given.paths],
        "data": given.held.source,
        "training": given.held.training_source,
        **result.figures["about"],
    }
    if system_source is not None:
        about["system"] = system_source
    return Evaluation({**result.figures, "about": about}, (*given.held.notes, *result.notes), result.material)


def _require_flows(flow_files: Sequence[Path]) -> None:
    if not flow_files:
        raise InputError("Give at least one flow file before the trajectory.")


def evaluate_files(
    flow_files: Sequence[Path],
    data: Path,
    output: Path | None = None,
    training: Path | None = None,
    *,
    system_source: str | None = None,
    **settings: Any,
) -> tuple[Evaluation, Path]:
    """`evaluate` on files; writes the JSON.

    Parameters
    ----------
    flow_files
        Artifacts or folders of ``openmm-bg train``; seeds of one training if there are several.
    data
        Trajectory, or a folder of ``openmm-bg simulate``; as `evaluation_input.read_held_out`.
    output
        JSON file; default: the first flow's name with the ending .evaluation.json.
    training
        Trajectory or folder with the training frames.
    system_source
        Where the keyword ``system`` comes from, for the record.
    settings
        Keywords of `evaluate`.

    Returns
    -------
    Evaluation
    Path
        Where its JSON lies.

    Raises
    ------
    InputError
        As `evaluate` and `read_held_out`; a folder without a flow; a place that cannot be written.
    ArtifactError
        A flow that cannot be read.
    """
    _require_flows(flow_files)
    target = find_flow(flow_files[0]).with_suffix(".evaluation.json") if output is None else output
    check_target(target)
    result = _evaluated(_read(flow_files, data, training, settings), system_source, settings)
    result.save(target)
    return result, target


def report_files(
    flow_files: Sequence[Path],
    data: Path,
    output: Path | None = None,
    training: Path | None = None,
    *,
    system_source: str | None = None,
    **settings: Any,
) -> tuple[Evaluation, Path]:
    """`evaluate` on files as one HTML page, with its JSON beside it (the same name, ending in .evaluation.json).

    Parameters
    ----------
    flow_files, data, training, system_source, settings
        As `evaluate_files`. The loss curve is the losses.csv beside the first flow, where there is one.
    output
        HTML file; default: the first flow's name with the ending .html.

    Returns
    -------
    Evaluation
    Path
        Where the page lies.

    Raises
    ------
    InputError, ArtifactError
        As `evaluate_files`.
    """
    from openmm_bg.analysis.report import report_page

    _require_flows(flow_files)
    target = find_flow(flow_files[0]).with_suffix(".html") if output is None else output
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target} must end in .html.")
    figures = target.with_suffix(".evaluation.json")
    check_target(target)
    check_target(figures)
    given = _read(flow_files, data, training, settings)
    history, notes = read_history(given.paths[0], given.flows[0])
    result = _evaluated(given, system_source, settings)
    result = Evaluation(result.figures, (*result.notes, *notes), result.material)
    result.save(figures)
    shown = settings.get("progress", True)
    report_page(target, result, given.flows[0], history, provenance(given.paths, given.flows, result), progress=shown)
    return result, target


def read_history(flow_file: Path, flow: Flow) -> tuple[list[dict[str, Any]], list[str]]:
    """The loss curve beside a flow, and a sentence where it is missing, damaged, or another training's.

    A page without a curve is worth having: none of this is an error.
    """
    from openmm_bg.training.history import read_losses

    path = flow_file.with_name(LOSSES_NAME)
    if not path.is_file():
        return [], [f"There is no {LOSSES_NAME} beside {flow_file}: the training's loss curve is left out."]
    try:
        history = read_losses(path)
    except CheckpointError:
        note = f"{path} is no readable loss curve: it is left out."
        logger.warning("%s", note)
        return [], [note]
    if not history:
        note = f"{path} is empty: the training's loss curve is left out."
        logger.warning("%s", note)
        return [], [note]
    steps = flow.metadata.get("training", {}).get("steps")
    if steps is not None and history[-1]["step"] != steps:
        return history, [
            f"The loss curve ends at step {history[-1]['step']:,}, the flow at {steps:,}: another training wrote it, "
            "or a longer one."
        ]
    return history, []


def provenance(paths: Sequence[Path], flows: Sequence[Flow], result: Evaluation) -> list[tuple[str, str]]:
    """What the page was made from: (name, value) pairs of files, digests, versions, dates, seeds and settings."""
    from importlib.metadata import version

    about, first = result.figures["about"], flows[0].metadata
    record = first.get("training", {})
    rows = []
    for k, (path, flow) in enumerate(zip(paths, flows, strict=True), start=1):
        name = "flow" if len(paths) == 1 else f"flow {k}"
        trained = flow.metadata.get("training", {})
        rows.append((name, f"{path}, SHA-256 {_digest(path)}"))
        made = [f"{trained['steps']:,} steps"] if "steps" in trained else []
        made += [f"{trained['n_energies']:,} energies"] if "n_energies" in trained else []
        made += [f"{trained['frames']:,} frames"] if "frames" in trained else []
        made += [f"seed {trained['config']['seed']}"] if "seed" in trained.get("config", {}) else []
        made += [str(trained["date"])] if "date" in trained else []
        if made:
            rows.append((f"training of {name}" if len(paths) > 1 else "its training", ", ".join(made)))
    if "versions" in first:
        rows.append(("versions it was trained with", _joined(first["versions"])))
    rows += [
        ("held-out frames", f"{about['data']}, {about['held_out_frames']:,} frames"),
        ("training frames", f"{about['training']}, {about['training_frames']:,} frames")
        if about["training"] is not None
        else ("training frames", "none given"),
        ("System of the energies", f"{about['system']}, at {about['temperature']:g} K"),
        ("samples", f"{about['samples']:,}, seed {about['seed']}"),
        ("energies by", f"OpenMM's {about['platform']} platform"),
    ]
    now = {"openmm_bg": version("openmm-bg"), "openmm": openmm.version.version}
    now |= {name: version(name) for name in ("torch", "mdtraj", "numpy")}
    rows.append(("versions of this report", _joined({**now, "python": machine.python_version()})))
    rows.append(("date of this report", datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")))
    if "reverse_ess" in record:
        share = record.get("completed_ess", record["reverse_ess"])
        rows.append(("effective sample size when trained", f"{100 * share:.2g} %"))
    return rows


def _joined(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
