"""The page of ``openmm-bg demo``: what was computed, what came out, and the pictures that let a reader judge it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis import plots
from openmm_bg.analysis.page import Block, Paragraph, Picture, Section, Table, write_page
from openmm_bg.analysis.plots import Sample
from openmm_bg.analysis.training_plots import loss_curve
from openmm_bg.errors import InputError

FloatArray = NDArray[np.float64]

__all__ = ["DemoResult", "FreeEnergyRow", "demo_page", "format_estimate", "format_share"]

#: Estimates further apart than this many standard errors are said to disagree.
AGREEMENT = 2.0
#: Share of the total weight above which a single sample is worth a warning.
LARGEST_SHARE = 0.05


@dataclass(frozen=True)
class FreeEnergyRow:
    """ΔF by one method.

    ``method`` is "weights", "MD + moves" or "tempered MD" (each has its colour in the pictures); ``value_kT`` and
    ``error_kT`` in kT, the error one standard deviation; ``n_energies`` counts energy or force evaluations.
    """

    method: str
    value_kT: float
    error_kT: float
    n_energies: int
    note: str = ""


@dataclass
class DemoResult:
    """Everything the demo's page shows.

    Attributes
    ----------
    md_phi, md_psi, md_log_weights : array, shape [m]
        Tempered MD (rad), with the log-weights that take its bias away.
    md_reduced_potentials : array, shape [m] or fewer
        kT, without the bias. A shorter array holds every k-th frame, from the first on.
    flow_phi, flow_psi : array, shape [n]
        Samples of the flow, rad.
    flow_log_weights, flow_log_weights_balanced : array, shape [n]
        For the plain target, and for the balanced one that the flow was trained on; -inf is a weight of zero.
    flow_reduced_potentials : array, shape [n]
        kT, of the plain target.
    flow_in_basin : array of bool, shape [n]
        0 < φ < 2 rad.
    history : list of dict
        The loss curve, keys as `openmm_bg.training.history.COLUMNS`.
    chain_phi : array, shape [t]
        φ (rad) after every round of MD + moves, NaN where an amide is cis.
    rows : list of FreeEnergyRow
    figures : dict
        Further figures by name; those that begin with "seconds, " are times, others are shown as they are. Names
        that begin with "ESS" are left out, for the page computes those from the log-weights.
    quick : bool
        The short form, too short for good figures.
    seconds : float
        Of the whole demo.
    temperature : float
        K.
    """

    md_phi: Any
    md_psi: Any
    md_log_weights: Any
    md_reduced_potentials: Any
    flow_phi: Any
    flow_psi: Any
    flow_log_weights: Any
    flow_log_weights_balanced: Any
    flow_reduced_potentials: Any
    flow_in_basin: Any
    history: list[dict[str, Any]]
    chain_phi: Any
    rows: list[FreeEnergyRow]
    figures: dict[str, str | float] = field(default_factory=dict)
    quick: bool = False
    seconds: float = 0.0
    temperature: float = 300.0


def format_estimate(value: float, error: float) -> str:
    """``4.733 ± 0.006``: as many decimals as the error deserves, three at most."""
    if not math.isfinite(value):
        return "no estimate"
    if not math.isfinite(error) or error < 0:
        return f"{value:.1f}, error unknown"
    decimals = 3 if error < 0.095 else 2 if error < 0.95 else 1
    return f"{value:.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


def format_share(log_weights: ArrayLike, mask: ArrayLike | None = None) -> str:
    """Effective samples within a mask, as ``64.2 % (641 of 999)`` (no-break space before %); "no sample" for none."""
    from openmm_bg.weights import effective_sample_size

    chosen = np.asarray(log_weights, dtype=np.float64)
    if mask is not None:
        chosen = chosen[np.asarray(mask, dtype=np.bool_)]
    if chosen.size == 0:
        return "no sample"
    share = effective_sample_size(chosen)
    return f"{100 * share:.1f}\u00a0% ({share * chosen.size:,.0f} of {chosen.size:,})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _figure(name: str, value: Any) -> tuple[str, str]:
    """Name and value of a figure as a reader wants them."""
    if isinstance(value, (str, bool)):
        return name, str(value)
    if name.startswith("seconds, "):
        return name.removeprefix("seconds, ") + ", wall time", _duration(float(value))
    if not math.isfinite(value):
        return name, "not available" if math.isnan(value) else str(value).replace("-", "−")
    if name == "acceptance":
        return name, f"{100 * value:.1f}\u00a0%"
    if float(value).is_integer() and abs(value) < 1e15:
        return name, f"{int(value):,}".replace("-", "−")
    return name, f"{value:.3g}".replace("-", "−")


def disagreements(rows: Sequence[FreeEnergyRow]) -> list[tuple[str, str, float]]:
    """Pairs of methods whose values lie more than `AGREEMENT` combined standard errors apart, and how many."""
    found = []
    for a, b in combinations(rows, 2):
        spread = math.hypot(a.error_kT, b.error_kT)
        if math.isfinite(spread) and spread > 0 and math.isfinite(a.value_kT - b.value_kT):
            sigmas = abs(a.value_kT - b.value_kT) / spread
            if sigmas > AGREEMENT:
                found.append((a.method, b.method, sigmas))
    return found


def _check(result: DemoResult) -> None:
    """Arrays that belong together must be equally long."""
    groups = (
        ("md_phi", "md_psi", "md_log_weights"),
        (
            "flow_phi", "flow_psi", "flow_log_weights", "flow_log_weights_balanced", "flow_reduced_potentials",
            "flow_in_basin",
        ),
    )  # fmt: skip
    for names in groups:
        sizes = {name: np.shape(getattr(result, name)) for name in names}
        if len(set(sizes.values())) > 1 or len(sizes[names[0]]) != 1:
            raise InputError(f"These arrays of the demo's result must be one-dimensional and equally long: {sizes}.")


def _energy_weights(result: DemoResult) -> FloatArray:
    """Log-weights of the MD frames whose energy is known: all, or every k-th."""
    n, m = len(result.md_log_weights), len(result.md_reduced_potentials)
    stride = max(1, -(-n // max(1, m)))
    chosen = np.asarray(result.md_log_weights, dtype=np.float64)[::stride]
    if len(chosen) != m:
        raise InputError(f"{m} reduced potentials of MD cannot be every k-th of {n} frames.")
    return chosen


def _lead(result: DemoResult) -> list[str]:
    what = (
        "A normalizing flow learned the conformations of alanine dipeptide in vacuum at "
        f"{result.temperature:g}\u00a0K from a short run of tempered molecular dynamics and from the force field's own "
        f"energies. It then drew {len(result.flow_phi):,} independent structures, and an importance weight for each "
        "turned them into a sample of the exact Boltzmann distribution; mixed into ordinary MD as Metropolis moves, "
        "the same flow carries a chain across the barrier in φ. Everything was made from nothing on this machine in "
        f"{_duration(result.seconds)}."
    )
    row = next((row for row in result.rows if row.method == "weights"), None)
    if row is None or not math.isfinite(row.value_kT):
        return [what, "No free-energy difference could be computed from the weights."]
    share = 1.0 / (1.0 + math.exp(min(700.0, row.value_kT)))
    outcome = (
        f"Main result: the conformation with 0 < φ < 2 rad lies {format_estimate(row.value_kT, row.error_kT)} kT in "
        f"free energy above all others, a population of {100 * share:.2g}\u00a0%."
        if row.value_kT >= 0
        else f"Main result: the free energy of 0 < φ < 2 rad against the rest is "
        f"{format_estimate(row.value_kT, row.error_kT)} kT, a population of {100 * share:.2g}\u00a0%."
    )
    known = [r for r in result.rows if math.isfinite(r.value_kT) and math.isfinite(r.error_kT)]
    if len(known) > 1 and not disagreements(known):
        names = " and ".join([", ".join(row.method for row in known[:-1]), known[-1].method])
        outcome += f" The estimates by {names} agree within {AGREEMENT:g} standard errors."
    return [what, outcome]


def _warnings(result: DemoResult) -> list[str]:
    from openmm_bg.weights import khat_threshold, max_weight, pareto_khat

    found = []
    if result.quick:
        found.append(
            "This is the short form (--quick): every step was taken, but none far enough for good figures. Run "
            "openmm-bg demo without --quick for those."
        )
    for first, second, sigmas in disagreements(result.rows):
        found.append(
            f"“{first}” and “{second}” differ in ΔF by {sigmas:.1f} standard errors: trust neither before a longer run."
        )
    n = len(result.flow_log_weights)
    if n == 0:
        return [*found, "The flow drew no sample."]
    khat, limit, largest = pareto_khat(result.flow_log_weights), khat_threshold(n), max_weight(result.flow_log_weights)
    if not khat < limit:
        found.append(
            f"Pareto k̂ of the weights is {khat:.2f}, not below {limit:.2f}: a few samples carry too much, and the "
            "errors from weights cannot be trusted."
        )
    if largest > LARGEST_SHARE:  # a fit to the tail cannot see one weight that dwarfs all others
        found.append(
            f"One sample carries {100 * largest:.0f}\u00a0% of all weight: the errors from weights cannot be trusted."
        )
    return found


def _difference_section(result: DemoResult) -> Section:
    known = [row for row in result.rows if math.isfinite(row.value_kT)]
    blocks: list[Block] = [
        Paragraph(
            "ΔF is the free energy of 0 < φ < 2 rad minus that of all other φ, amide bonds trans. Errors are one "
            "standard deviation and allow for correlated frames."
        ),
        Table(
            ("method", "ΔF (kT)", "energy evaluations", "note"),
            [(r.method, format_estimate(r.value_kT, r.error_kT), f"{r.n_energies:,}", r.note) for r in result.rows],
            text_last=True,
        ),
    ]
    if known:
        blocks.append(
            Picture(
                plots.free_energy_estimates(result.rows),
                "Free-energy difference by method with error bars, beside the number of energy evaluations: "
                + "; ".join(f"{r.method} {format_estimate(r.value_kT, r.error_kT)} kT" for r in known),
                "Left: thick bars are one standard error, thin ones two; they should overlap. Right: what each "
                "estimate cost, on a logarithmic axis; what the flow's training cost is said in the table.",
            )
        )
    return Section("The free-energy difference", blocks)


def _weights_section(result: DemoResult) -> Section:
    inside = np.asarray(result.flow_in_basin, dtype=np.bool_)
    targets = {
        "plain target": result.flow_log_weights,
        "balanced target": result.flow_log_weights_balanced,
    }
    rows = [
        (name.removesuffix(" target"), format_share(w), format_share(w, inside), format_share(w, ~inside))
        for name, w in targets.items()
    ]
    return Section(
        "How good the samples are",
        [
            Paragraph(
                "The effective sample size (ESS) says how many equally weighted samples the weighted ones are worth. "
                "The flow was trained on the balanced target, in which a bias potential makes the rare basin common; "
                "the plain target is the molecule itself, and weighting towards it gives the common basin's samples "
                "most of the weight, which costs samples however good the flow is. Within a basin the ESS shows how "
                "well the flow knows its shape."
            ),
            Table(("target", "all samples", "0 < φ < 2 rad", "elsewhere"), rows, caption="Effective sample size"),
            Picture(
                plots.log_weight_histogram(targets),
                "Histograms of the logarithm of the importance weights for the plain and the balanced target",
                "A perfect flow would put every sample of the balanced target on the dashed line, the mean weight. A "
                "tail to the left only wastes samples; a long tail to the right would let a few samples decide "
                "everything, which Pareto's k̂ measures (below 0.7 is fine). The plain target has a second peak on the "
                "left: samples of the rare basin, which the flow proposes far more often than the molecule visits it.",
            ),
        ],
    )


def _map_section(result: DemoResult) -> Section:
    md = ("tempered MD", result.md_phi, result.md_psi, result.md_log_weights)
    raw = ("flow, raw", result.flow_phi, result.flow_psi, None)
    weighted = ("flow, reweighted", result.flow_phi, result.flow_psi, result.flow_log_weights)
    profiles = [
        Sample("tempered MD", result.md_phi, result.md_log_weights),
        Sample("flow, reweighted", result.flow_phi, result.flow_log_weights),
        Sample("MD + moves", result.chain_phi),
    ]
    return Section(
        "Conformations",
        [
            Picture(
                plots.ramachandran_maps([Sample(name, (phi, psi), w) for name, phi, psi, w in (md, raw, weighted)]),
                "Three free-energy maps over the backbone angles φ and ψ: tempered MD, raw and reweighted flow samples",
                "Free energy over φ and ψ. Left and right should look alike. The middle is what the flow proposes "
                "before weighting: the basin between the dashed lines (0 and 2 rad) is deeper than the molecule's, "
                "because the flow was trained on the balanced target. White: no sample.",
            ),
            Picture(
                plots.free_energy_along_phi(profiles),
                "Free energy along φ from tempered MD, reweighted flow samples and MD with moves, with error bands",
                "Free energy along φ; bands are one standard error. The curves should lie on each other, in the "
                "basins and on the barriers; where a method has few samples its band widens, and where it has none "
                "its curve ends.",
            ),
        ],
    )


def _energy_section(result: DemoResult) -> Section:
    u = result.flow_reduced_potentials
    samples = [
        Sample("tempered MD", result.md_reduced_potentials, _energy_weights(result)),
        Sample("flow, raw", u),
        Sample("flow, reweighted", u, result.flow_log_weights),
    ]
    return Section(
        "Energies",
        [
            Picture(
                plots.reduced_potential_histogram(samples),
                "Histograms of the reduced potential: tempered MD, raw flow samples, reweighted flow samples",
                "Potential energy over kT, without the bias. The reweighted samples should follow the grey shape of "
                "MD. Raw samples are those of an imperfect flow and of the balanced target; the ones far to the right "
                "(atoms too close) get weights near zero.",
            )
        ],
    )


def _chain_section(result: DemoResult) -> Section:
    return Section(
        "MD with moves of the flow",
        [
            Picture(
                plots.chain_trace(result.chain_phi),
                "Trace of the angle φ along a chain of MD steps and Metropolis moves, with a histogram beside it",
                "φ after every round of MD steps and Metropolis moves; the shaded band is 0 < φ < 2 rad. Every "
                "jump in or out of it is a crossing of a barrier that MD alone passes about once in millions of "
                "steps. Moves are accepted or rejected by their exact probability, so that the share of dots in the "
                "band becomes the molecule's own.",
            )
        ],
    )


def _training_section(result: DemoResult) -> Section:
    caption = (
        "Losses against time, one stage after another: moving averages over faint single steps. Black dots are MD "
        "frames that training never saw; if they rise while the blue line falls, the flow learns its data by heart. "
        "The ESS is that of samples drawn during training, on the target that the flow is trained on."
    )
    alt = "Loss and effective sample size during training, stage by stage"
    return Section("Training", [Picture(loss_curve(result.history), alt, caption)])


def _run_section(figures: Mapping[str, Any]) -> Section | None:
    rows = [_figure(name, value) for name, value in figures.items() if not name.startswith("ESS")]
    return Section("The run in figures", [Table(("figure", "value"), rows, text_last=True)]) if rows else None


def demo_page(path: str | os.PathLike[str], result: DemoResult) -> Path:
    """Write the demo's page.

    Parameters
    ----------
    path
        Of the HTML file; its folder must exist, an earlier file is replaced in one step.
    result
        What the demo computed. Empty basins, weights of zero and values that are not finite are named as such.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        Arrays that belong together differ in length, or the file cannot be written.
    """
    _check(result)
    builders = (_difference_section, _weights_section, _map_section, _energy_section, _chain_section, _training_section)
    sections = [build(result) for build in builders]
    run = _run_section(result.figures)
    if run is not None:
        sections.append(run)
    weights = next((row for row in result.rows if row.method == "weights"), None)
    estimate = (math.nan, math.nan) if weights is None else (weights.value_kT, weights.error_kT)
    highlights = [
        ("ΔF from weights, kT", format_estimate(*estimate)),
        ("ESS, plain target", format_share(result.flow_log_weights).split(" (")[0]),
        ("ESS, balanced target", format_share(result.flow_log_weights_balanced).split(" (")[0]),
        ("wall time", _duration(result.seconds)),
    ]
    title = "Alanine dipeptide: exact samples from a normalizing flow"
    return write_page(path, title, _lead(result), sections, highlights, _warnings(result))
