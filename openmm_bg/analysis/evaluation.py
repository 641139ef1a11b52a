"""The result of `evaluate`: figures with their notes, as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically

#: An acceptance below this is as good as none, and is called so: no chain lives to see it.
NEVER = 1e-9


@dataclass(frozen=True, eq=False)
class Material:
    """What figures were computed from, for pictures.

    Parameters
    ----------
    generated, data : ndarray, shape [m, N, 3] and [n, N, 3]
        nm; the frames whose structure was looked at.
    energies : dict
        kcal/mol of every sample or frame, by the names of ``Evaluation.figures["energies"]``; +inf where there is none.
    log_weights : list of ndarray
        In the order of ``Evaluation.figures["weights"]``; -inf is a weight of zero.
    """

    generated: NDArray[np.float32]
    data: NDArray[np.float32]
    energies: dict[str, NDArray[np.float64]]
    log_weights: list[NDArray[np.float64]]


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` found.

    Parameters
    ----------
    figures : dict
        Sections ``delta_d``, ``energies``, ``nll``, ``weights``, ``moves``, ``reduction``, ``rmsf``, ``ramachandran``,
        ``chi``, ``clashes``, ``chirality``, ``cis_amides``, ``novelty``, ``embedding``, as the functions of this room
        return them, and ``about``. A section that the molecule or the representation does not have is None.
    notes : tuple of str
        Sentences on what was left out or done with less than was asked.
    material : Material, optional
        Frames, energies and weights behind the figures; it is not part of the JSON.
    """

    figures: dict[str, Any]
    notes: tuple[str, ...] = ()
    material: Material | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> str:
        """JSON text; NaN as null, infinities as the strings "inf" and "-inf"."""
        return json.dumps(_plain({**self.figures, "notes": list(self.notes)}), indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        """Write the JSON in one step.

        Raises
        ------
        InputError
            It cannot be written.
        """
        try:
            write_atomically(path, self.to_json() + "\n")
        except OSError as error:
            raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error

    def __str__(self) -> str:
        rows = [row for part in (_table_one, _weights, _residues, _checks, _novelty) for row in part(self.figures)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if math.isnan(number):
            return None
        return number if math.isfinite(number) else ("inf" if number > 0 else "-inf")
    return value


def plus(value: float, error: float, form: str = ".2f") -> str:
    """``1.23 ± 0.04``; the value alone where there is no error."""
    return f"{value:{form}}" if math.isnan(error) else f"{value:{form}} ± {error:{form}}"


def _table_one(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    delta = figures["delta_d"]
    if delta is not None:
        rows.append(
            (
                f"ΔD ({delta['atoms']}), Å",
                f"{plus(delta['generated'], delta['generated_sd'], '.3f')}; data against data "
                f"{plus(delta['data'], delta['data_sd'], '.3f')}; "
                + ("" if math.isnan(delta["training"]) else f"training frames {delta['training']:.3f}; ")
                + f"{delta['batches']} batch{'es' * (delta['batches'] != 1)} of {delta['batch']}",
            )
        )
    for name, values in figures["energies"].items():
        form = ".1f" if abs(values["below_median_mean"]) < 1e6 else ".2e"  # clashes have energies of many digits
        rows.append(
            (
                f"energy, {name}, kcal/mol",
                f"below the median {plus(values['below_median_mean'], values['below_median_sd'], form)} (SD); "
                f"median {values['median']:{'.1f' if abs(values['median']) < 1e6 else '.2e'}}"
                + (f"; {values['nonfinite']} none" if values["nonfinite"] else ""),
            )
        )
    nll = figures["nll"]
    first = nll["flows"][0]
    rows.append(
        (
            "held-out NLL, nats",
            f"{plus(first['per_dof'], first['per_dof_error'], '.4f')} per modelled degree of freedom "
            f"({first['dof']}), {plus(first['total'], first['total_error'])} in total; {first['frames']} frames, "
            f"{first['outside']} outside",
        )
    )
    if len(nll["flows"]) > 1:
        rows.append(
            (
                f"NLL of {len(nll['flows'])} flows, nats",
                f"{plus(nll['per_dof_mean'], nll['per_dof_sd'], '.4f')} per degree of freedom, "
                f"{plus(nll['total_mean'], nll['total_sd'])} in total (SD over flows)",
            )
        )
    return rows


def _weights(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            f"weights, formula {w['formula']} ({w['label']})",
            f"ESS {w['ess']:.3g}, k-hat {w['khat']:.2f} (trusted below {w['khat_threshold']:.2f}), "
            f"largest share {w['max_weight']:.2g}, {w['samples']} samples, {w['weight_zero']} of weight zero",
        )
        for w in figures["weights"]
    ]
    move = figures["moves"]
    found = plus(move["acceptance"], move["acceptance_error"], ".2g") if move["acceptance"] >= NEVER else "0"
    rows.append(
        (
            "acceptance of partial moves (D)",
            f"{found}; {move['frames']} frames, {move['proposals']} proposals each, {move['outside']} frames outside",
        )
    )
    return rows


def _residues(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    reduction = figures["reduction"]
    if reduction is not None:
        rows.append(
            (
                "RMSD that `reduced` costs, Å",
                f"heavy atoms {reduction['heavy']:.2f} (at most {reduction['heavy_largest']:.2f}), backbone "
                f"{reduction['backbone']:.2f} (at most {reduction['backbone_largest']:.2f}); {reduction['frames']} "
                "held-out frames and their copies at typical lengths and stiff angles",
            )
        )
    if figures["rmsf"]:
        ours, theirs = (np.array([row[k] for row in figures["rmsf"]]) for k in ("generated", "data"))
        worst = figures["rmsf"][int(np.abs(ours - theirs).argmax())]
        rows.append(
            (
                "RMSF, mean over residues, Å",
                f"{ours.mean():.2f}; data {theirs.mean():.2f}; most different {worst['residue']} "
                f"({worst['generated']:.2f}, {worst['data']:.2f})",
            )
        )
    for key, name in (("ramachandran", "φ, ψ"), ("chi", "χ")):
        if figures[key]:
            found = figures[key]
            mean = {k: float(np.mean([row[k] for row in found])) for k in ("generated", "data", "data_time")}
            worst = max(found, key=lambda row: row["generated"])
            label = worst["residue"] + (f" χ{worst['chi']}" if "chi" in worst else "")
            rows.append(
                (
                    f"{name}, Jensen-Shannon, bits",
                    f"{mean['generated']:.3f}; data against data {mean['data']:.3f} (at random), "
                    f"{mean['data_time']:.3f} (halves in time); worst {label} {worst['generated']:.3f}",
                )
            )
    return rows


def _checks(figures: dict[str, Any]) -> list[tuple[str, str]]:
    ours, theirs = figures["clashes"]["generated"], figures["clashes"]["data"]
    limit = figures["clashes"]
    rows = [
        (
            f"clashes a frame, {name}",
            f"{ours[key]:.3g} ({ours[key + '_frames']:.1%} of frames); data {theirs[key]:.3g} "
            f"({theirs[key + '_frames']:.1%}); closer than {limit[key + '_distance']:g} nm",
        )
        for key, name in (("heavy", "heavy atoms"), ("hydrogen", "hydrogens"))
    ]
    for key, name in (("chirality", "frames with a wrong hand"), ("cis_amides", "frames with a cis amide")):
        if figures[key] is not None:
            found = figures[key]
            parts = found["centres"] if key == "chirality" else found["bonds"]
            worst = max(parts, key=lambda row: row["generated"])
            more = f"; most at {worst['residue']}" if worst["generated"] > 0 else ""
            rows.append((name, f"{found['generated']:.2%}; data {found['data']:.2%}{more}"))
    return rows


def _novelty(figures: dict[str, Any]) -> list[tuple[str, str]]:
    found = figures["novelty"]
    ours, theirs = (np.median(found[key]) for key in ("generated", "data"))
    rows = [
        (
            "RMSD to the nearest frame, Å",
            f"median {ours:.2f}, largest {np.max(found['generated']):.2f}; held-out {theirs:.2f}, "
            f"{np.max(found['data']):.2f}; among {found['known']} {found['reference']} frames",
        )
    ]
    for key, name in (("minimised", "generated"), ("minimised_data", "held-out")):
        moved = np.array([row["rmsd"] for row in found[key]])
        after = np.array([row["after"] for row in found[key]])
        done = np.isfinite(moved)
        if done.any():
            rows.append(
                (
                    f"minimised, farthest {name}",
                    f"moved {moved[done].mean():.2f} Å (at most {moved[done].max():.2f}), "
                    f"to {after[done].mean():.1f} kcal/mol; {int(done.sum())} of {done.size}",
                )
            )
        else:
            rows.append((f"minimised, farthest {name}", f"OpenMM gave up on all {done.size}"))
    embedding = figures["embedding"]
    if embedding is not None:
        how = "UMAP" if embedding["method"] == "umap" else f"PCA ({embedding['explained']:.0%} of the variance)"
        rows.append(("embedding in two dimensions", f"{how} of backbone distances, in the JSON file"))
    return rows
