"""What the report says in words and tables; its pictures are in `report`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from openmm_bg.analysis.evaluation import NEVER, plus

__all__ = [
    "checks_table",
    "energy_words",
    "highlights",
    "lead",
    "minimisation_table",
    "number",
    "table_one",
    "title",
    "warnings",
    "weights_table",
]

#: ΔD within this many times data against data is as good as it gets for finite training.
GOOD_RATIO = 1.1
#: Below this the generated frames spread too little.
NARROW_RATIO = 0.97
#: Share of frames with clashes above the data's from which on a reader is warned.
CLASHES = 0.05


def number(value: float, digits: int = 3) -> str:
    """Significant digits without exponents for everyday sizes; a real minus sign; words for what is no number."""
    if math.isnan(value):
        return "not known"
    if math.isinf(value):
        return "infinite" if value > 0 else "−infinite"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}·10{_superscript(int(exponent))}".replace("-", "−")
    if size >= 10.0**digits:
        return f"{value:,.0f}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}".replace("-", "−")


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(share: float) -> str:
    """``4.2 %``; small shares keep two digits."""
    if not math.isfinite(share):
        return "not known"
    value = 100 * share
    return (f"{value:.1f}" if value >= 1 else number(value, 2)) + "\u00a0%"


def _kcal(value: float) -> str:
    """One decimal, so that a column of energies has its points below one another; huge ones as powers of ten."""
    return f"{value:,.1f}".replace("-", "−") if abs(value) < 1e6 else number(value)


def _energy(values: dict[str, float]) -> str:
    mean, spread = values["below_median_mean"], values["below_median_sd"]
    if not math.isfinite(mean):
        return "none is finite"
    if abs(mean) < 1e6:
        return plus(mean, spread, ",.1f").replace("-", "−")
    return number(mean) + ("" if math.isnan(spread) else f" ± {number(spread, 2)}")


def _generated(figures: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Energy figures of generated frames, the ones to hold against the data last."""
    return [(name, values) for name, values in figures["energies"].items() if name != "data"]


def title(figures: dict[str, Any]) -> str:
    """Heading of the page."""
    about = figures["about"]
    residues = f"{about['residues']} residues, " if about["residues"] > 1 else ""
    return f"A flow held against its molecular dynamics: {residues}{about['atoms']:,} atoms"


def lead(figures: dict[str, Any]) -> list[str]:
    """What was done, and what came out, in a few sentences."""
    about = figures["about"]
    what = (
        f"{about['samples']:,} structures drawn from a normalizing flow ({about['representation']} representation, "
        f"{figures['nll']['flows'][0]['dof']:,} modelled coordinates) stand here beside {about['held_out_frames']:,} "
        f"frames of molecular dynamics at {about['temperature']:g}\u00a0K that training has not seen."
    )
    outcome = []
    delta = figures["delta_d"]
    if delta is not None and math.isfinite(delta["ratio"]):
        ratio = delta["ratio"]
        verdict = (
            "less than the data have among themselves, so that its structures spread too little"
            if ratio < NARROW_RATIO
            else "as near as data are to data"
            if ratio <= GOOD_RATIO
            else f"{number(ratio, 2)} times as far as data are from data"
        )
        outcome.append(f"In its backbone distances (ΔD) the flow is {verdict}.")
    outcome.append(_energy_verdict(figures))
    exact = [w for w in figures["weights"] if w["label"] == "exact"]
    if exact:
        w = exact[-1]
        worth = w["ess"] * w["samples"]
        outcome.append(
            f"With exact weights its samples are worth {number(max(worth, 0.0), 2)} independent ones of "
            f"{w['samples']:,} (ESS {percent(w['ess'])})."
        )
    return [what, " ".join(outcome)]


def _energy_verdict(figures: dict[str, Any]) -> str:
    data = figures["energies"]["data"]
    name, ours = _generated(figures)[-1]
    gap = ours["below_median_mean"] - data["below_median_mean"]
    spread = data["below_median_sd"]
    kind = "Completed samples" if name.endswith("completed") else "Its samples"
    if not math.isfinite(gap):
        return "The lower half of its energies is not finite."
    size = f"{number(abs(gap), 2)} kcal/mol {'above' if gap >= 0 else 'below'} the data's"
    if name.endswith("rigid"):
        return f"At typical bond lengths and angles the lower half of its energies lies {size}, which does not compare."
    if math.isfinite(spread) and abs(gap) <= spread:
        return (
            f"{kind} have the data's energies: below the median their mean lies {size}, whose standard deviation is "
            f"{number(spread, 2)}."
        )
    return f"Below the median the mean energy of {kind.lower()} lies {size}" + (
        f", whose standard deviation is {number(spread, 2)}." if math.isfinite(spread) else "."
    )


def highlights(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that are shown large."""
    found = []
    delta = figures["delta_d"]
    if delta is not None:
        found.append(("ΔD, Å (data against data)", f"{delta['generated']:.2f} ({delta['data']:.2f})"))
    name, ours = _generated(figures)[-1]
    data = figures["energies"]["data"]
    gap = ours["below_median_mean"] - data["below_median_mean"]
    shown = f"{round(gap, 1) + 0.0:+,.1f}" if abs(gap) < 1e6 else number(gap)  # + 0.0: no minus before a zero
    kind = " (rigid)" if name.endswith("rigid") else ""
    found.append((f"energy below the median{kind}, against the data's", f"{shown} kcal/mol".replace("-", "−")))
    nll = figures["nll"]
    found.append(("held-out NLL, nats a coordinate", number(nll["per_dof_mean"])))
    w = figures["weights"][-1]
    found.append((f"ESS, formula {w['formula']} ({w['label']})", percent(w["ess"])))
    return found


def warnings(figures: dict[str, Any]) -> list[str]:
    """What a reader must not miss."""
    found = []
    for w in figures["weights"]:
        if w["label"] == "exact" and not w["khat"] < w["khat_threshold"]:
            found.append(
                f"Pareto k̂ of the exact weights (formula {w['formula']}) is {number(w['khat'], 2)}, not below "
                f"{number(w['khat_threshold'], 2)}: a few samples carry too much, and errors of weighted averages "
                "cannot be trusted. Moves of the flow inside MD stay exact."
            )
    if not any(w["label"] == "exact" for w in figures["weights"]):
        found.append(
            "This reduced flow has no completion: there are no exact weights, and its rigid ones are not averages of "
            "the force field."
        )
    clashes = figures["clashes"]
    for key, what in (("heavy", "heavy atoms"), ("hydrogen", "hydrogens")):
        ours, theirs = (clashes[k][f"{key}_frames"] for k in ("generated", "data"))
        if ours > theirs + CLASHES:
            found.append(
                f"{percent(ours)} of the generated frames have {what} closer than "
                f"{clashes[key + '_distance']:g} nm; of the data {percent(theirs)}."
            )
    for key, what in (("chirality", "a centre of the wrong hand"), ("cis_amides", "a cis amide")):
        if figures[key] is not None and figures[key]["generated"] > figures[key]["data"] + 0.01:
            ours, theirs = (percent(figures[key][k]) for k in ("generated", "data"))
            found.append(f"{ours} of the generated frames have {what}; of the data {theirs}.")
    outside = figures["nll"]["flows"][0]["outside"]
    if outside:
        found.append(
            f"{outside:,} held-out frames lie outside the sectors (chirality, amide isomers) that the flow models; no "
            "likelihood counts them."
        )
    return found


def table_one(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (figure, generated, data, in words)."""
    rows = []
    delta = figures["delta_d"]
    if delta is not None:
        rows.append(
            (
                "ΔD, Å",
                plus(delta["generated"], delta["generated_sd"], ".3f"),
                plus(delta["data"], delta["data_sd"], ".3f"),
                f"{number(delta['ratio'])} times data against data; {delta['atoms']}; "
                + (
                    f"{delta['batches']} batches of {delta['batch']:,} pairs, ± is their standard deviation"
                    if delta["batches"] > 1
                    else f"one batch of {delta['batch']:,} pairs"
                ),
            )
        )
        if not math.isnan(delta["training"]):
            words = "training frames against held-out ones: what a flow that repeats them would have"
            rows.append(
                ("ΔD of the training frames, Å", "", plus(delta["training"], delta["training_sd"], ".3f"), words)
            )
    data = figures["energies"]["data"]
    for name, values in _generated(figures):
        kind = name.removeprefix("generated").lstrip(", ")
        note = {
            "rigid": "as in the paper: typical bond lengths and angles, whose energies lack about kT/2 for each "
            "coordinate that is kept",
            "completed": "with the lengths and angles of the completion: the ones to hold against the data",
        }.get(kind, "")
        gone = f"{values['nonfinite']:,} samples have no finite energy" if values["nonfinite"] else ""
        words = "; ".join(part for part in ("mean ± standard deviation", note, gone) if part)
        label = f" ({kind})" if kind else ""
        rows.append((f"energy below the median{label}, kcal/mol", _energy(values), _energy(data), words))
        rows.append((f"median energy{label}, kcal/mol", _kcal(values["median"]), _kcal(data["median"]), ""))
    nll = figures["nll"]
    first = nll["flows"][0]
    several = len(nll["flows"]) > 1
    for key, what, form in (("per_dof", "NLL a coordinate, nats", ".4f"), ("total", "NLL in total, nats", ",.2f")):
        value = (
            plus(nll[f"{key}_mean"], nll[f"{key}_sd"], form)
            if several
            else plus(first[key], first[f"{key}_error"], form)
        )
        words = f"{first['dof']:,} modelled coordinates in rad and nm" if key == "per_dof" else ""
        if key == "total":
            words = (
                f"mean and standard deviation over {len(nll['flows'])} flows"
                if several
                else f"{first['frames']:,} held-out frames; ± is the standard error"
            )
        rows.append((what, value.replace("-", "−"), "", words))
    cost = figures["reduction"]
    if cost is not None:
        rows.append(
            (
                "RMSD that reduced costs, Å",
                f"{cost['heavy']:.2f}",
                "",
                f"heavy atoms, backbone {cost['backbone']:.2f}; {cost['frames']:,} held-out frames against copies "
                "at typical lengths and stiff angles",
            )
        )
    return rows


def energy_words(figures: dict[str, Any]) -> str:
    """What the energies are, for the kind of flow at hand."""
    names = [name for name, _ in _generated(figures)]
    if names == ["generated"]:
        return (
            "Potential energies of generated frames, unweighted, and of the data. The curves should lie on one another."
        )
    text = (
        "A reduced flow draws torsions and backbone angles. “Rigid” structures stand at typical bond lengths and all "
        "other angles, as in the paper; for want of their vibrations they lie about kT/2 below the data for each "
        "coordinate that is kept."
    )
    if "generated, completed" in names:
        text += " “Completed” ones have lengths and angles drawn as well: those are the ones to compare."
    return text


def weights_table(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (what, value, in words) on weights and partial moves."""
    rows = []
    for w in figures["weights"]:
        exact = "averages of the force field" if w["label"] == "exact" else "averages at fixed lengths and angles only"
        head = f"formula {w['formula']} ({w['label']})"
        trusted = "below" if w["khat"] < w["khat_threshold"] else "not below"
        rows += [
            (
                f"ESS, {head}",
                percent(w["ess"]),
                f"{exact}; worth {number(w['ess'] * w['samples'], 2)} of {w['samples']:,} samples"
                + (f", {w['weight_zero']:,} of weight zero" if w["weight_zero"] else ""),
            ),
            (f"Pareto k̂, {head}", number(w["khat"], 2), f"{trusted} its limit, {number(w['khat_threshold'], 2)}"),
            (f"largest share, {head}", percent(w["max_weight"]), "of all weight in one sample"),
        ]
    move = figures["moves"]
    words = "no proposal had a chance"
    if move["acceptance"] >= NEVER:
        words = f"one in {number(move['expected'], 2)} proposals"
        if not math.isnan(move["acceptance_error"]):
            words += f", standard error {percent(move['acceptance_error'])}"
    rows.append(
        (
            "acceptance of moves (D)",
            percent(move["acceptance"] if move["acceptance"] >= NEVER else 0.0),
            f"{words}; from {move['frames']} held-out frames, {move['proposals']} proposals each",
        )
    )
    return rows


def checks_table(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (what, generated, data, in words) on clashes, hands and amides."""
    clashes = figures["clashes"]
    ours, theirs = clashes["generated"], clashes["data"]
    rows = []
    for key, name in (("heavy", "heavy atoms"), ("hydrogen", "hydrogens")):
        rows.append(
            (
                f"frames with clashing {name}",
                percent(ours[f"{key}_frames"]),
                percent(theirs[f"{key}_frames"]),
                f"closer than {clashes[key + '_distance']:g} nm, four bonds apart or more; "
                f"{number(ours[key], 2)} pairs a frame, data {number(theirs[key], 2)}",
            )
        )
    for key, name, parts in (
        ("chirality", "frames with a wrong hand", "centres"),
        ("cis_amides", "frames with a cis amide", "bonds"),
    ):
        found = figures[key]
        if found is None:
            continue
        count = len(found[parts])
        worst = max(found[parts], key=lambda row: row["generated"])
        words = f"{count} {parts}" if count > 1 else f"one {parts[:-1]}"
        if worst["generated"] > 0:
            words += f"; most at {worst['residue']}, {percent(worst['generated'])}"
        rows.append((name, percent(found["generated"]), percent(found["data"]), words))
    return rows


def minimisation_table(novelty: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows of (which, nearest, moved, before, after) of the frames that were minimised."""
    rows = []
    for key, name in (("minimised", "generated"), ("minimised_data", "held-out")):
        for k, row in enumerate(novelty[key], start=1):
            moved = np.isfinite(row["rmsd"])
            rest = (number(row["rmsd"], 2), _kcal(row["before"]), _kcal(row["after"]))
            rows.append((f"{name} {k}", number(row["nearest"], 3), *(rest if moved else ("OpenMM gave up", "", ""))))
    return rows
