"""Pictures of a whole ensemble against data: energies, weights, nearest frames, an embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis import style
from openmm_bg.analysis.density_figures import energy_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]

__all__ = [
    "embedding_map",
    "energy_cumulative",
    "energy_histogram",
    "minimised_scatter",
    "nearest_histogram",
    "weight_shares",
]

#: Sets whose median lies further from the data's than this many times the data's spread would leave a histogram flat.
_FAR = 25.0


def _finite(values: ArrayLike) -> FloatArray:
    array = np.asarray(values, np.float64)
    return array[np.isfinite(array)]


def _spread(values: ArrayLike) -> tuple[float, float]:
    """Median, and a standard deviation that outliers do not own (from the quartiles)."""
    array = _finite(values)
    low, middle, high = np.quantile(array, [0.25, 0.5, 0.75])
    return float(middle), max(float(high - low) / 1.349, 1e-3)


@style.styled
def energy_histogram(energies: Mapping[str, ArrayLike]) -> Figure:
    """Histograms of energies, with the mean ± standard deviation below the median and the median under them.

    The range is that of the data and of every set whose median lies near them; what lies beyond is a share in the
    legend.

    Parameters
    ----------
    energies
        Name -> kcal/mol [n]; "data" is among them; values that are not finite lie beyond the range.
    """
    figure = style.new_figure(4.4, style.HALF)
    names = ["data", *(name for name in energies if name != "data")]
    known = {name: _finite(energies[name]) for name in names}
    if known["data"].size == 0:
        return style.message(figure, "No frame of the data has a finite energy.")
    axes, marks = figure.subplots(2, 1, sharex=True, height_ratios=(4.0, 0.45 * len(names)))
    middle, width = _spread(known["data"])
    near = [n for n in names if known[n].size and abs(_spread(energies[n])[0] - middle) < _FAR * width]
    low = min(float(np.quantile(known[n], 0.002)) for n in near)
    # Of generated sets the tail above the median is long: as much of it as leaves the rest wide enough to see.
    tails = [min(float(np.quantile(known[n], 0.98)), middle + _FAR * width) for n in near]
    high = max(float(np.quantile(known["data"], 0.998)), *tails)
    edges = np.linspace(low - 0.06 * (high - low), high + 0.12 * (high - low), 91)
    for k, name in enumerate(names):
        values, total = known[name], np.size(energies[name])
        counts = np.histogram(values, edges)[0]
        beyond = 1.0 - counts.sum() / max(1, total)
        label = name + (f" ({100 * beyond:.0f} % beyond)" if beyond > 5e-3 else "")
        colour = style.method_colour(name, k)
        density = counts / max(1, total) / np.diff(edges)
        filled: dict[str, Any] = {"fill": True, "alpha": 0.22} if name == "data" else {"linewidth": 1.8}
        axes.stairs(density, edges, color=colour, label=label, **filled)
        _mark(marks, k, energy_figures(energies[name]), colour, (edges[0], edges[-1]))
    axes.set_ylabel("density (mol/kcal)")
    axes.set_ylim(bottom=0.0)
    axes.set_xlim(edges[0], edges[-1])
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    figure.legend(loc="outside upper left", ncols=1)
    marks.set_ylim(len(names) - 0.4, -0.6)
    marks.set_yticks([])
    marks.spines["left"].set_visible(False)
    marks.set_xlabel("potential energy (kcal/mol)")
    return figure


def _mark(axes: Any, row: int, figures: Mapping[str, float], colour: str, limits: tuple[float, float]) -> None:
    """Mean ± SD below the median as a dot with a bar, and the median as a tick; an arrow where they lie outside."""
    mean, spread, median = (figures[key] for key in ("below_median_mean", "below_median_sd", "median"))
    if limits[0] <= mean <= limits[1]:
        if np.isfinite(spread):
            axes.hlines(row, mean - spread, mean + spread, color=colour, linewidth=3.0)
        axes.plot(mean, row, "o", color="white", markeredgecolor=colour, markersize=7, markeredgewidth=2)
        axes.plot(median, row, "|", color=colour, markersize=12, markeredgewidth=2)
        return
    right = mean > limits[1]
    axes.text(
        limits[1] if right else limits[0], row, f"mean {mean:.2g} →" if right else f"← mean {mean:.2g}",
        ha="right" if right else "left", va="center", color=colour, fontsize=10,
    )  # fmt: skip


@style.styled
def energy_cumulative(energies: Mapping[str, ArrayLike]) -> Figure:
    """Share of samples below an energy, on an axis that is linear near the data's median and logarithmic far from it.

    Parameters
    ----------
    energies
        As `energy_histogram`.
    """
    figure = style.new_figure(4.4, style.HALF)
    if _finite(energies["data"]).size == 0:
        return style.message(figure, "No frame of the data has a finite energy.")
    axes = figure.add_subplot()
    middle, width = _spread(energies["data"])
    unit = 10.0 ** np.ceil(np.log10(3 * width))
    ends = [0.0]
    for k, name in enumerate(("data", *(n for n in energies if n != "data"))):
        values = np.sort(_finite(energies[name])) - middle
        share = np.arange(1, values.size + 1) / max(1, np.size(energies[name]))
        keep = np.unique(np.linspace(0, values.size - 1, min(values.size, 2000)).astype(int))
        colour = style.method_colour(name, k)
        axes.plot(values[keep], share[keep], color=colour, label=name, drawstyle="steps-post")
        if values.size:
            ends += [float(values[0]), float(values[max(0, int(0.99 * np.size(energies[name])) - 1) % values.size])]
    axes.set_xscale("symlog", linthresh=unit, linscale=1.5)
    low, high = min(min(ends), -unit), max(max(ends), unit)
    axes.set_xlim(1.3 * low, 1.3 * high)
    ticks = _symlog_ticks(low, high, unit)
    axes.set_xticks(ticks, [_signed(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(0.5, color=style.GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.text(0.99, 0.51, "median", color="#666666", fontsize=9.5, ha="right", transform=axes.transAxes)
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel("share of frames below")
    axes.set_xlabel("energy − median of the data (kcal/mol)")
    figure.legend(loc="outside upper left", ncols=1)
    return figure


def _symlog_ticks(low: float, high: float, unit: float) -> list[float]:
    """Zero and powers of ten beyond the linear part, so few that their labels have room."""
    first = round(np.log10(unit))
    decades = [int(np.log10(max(end, unit)) + 1e-9) - first for end in (-low, high)]
    step = max(1, -(-(sum(decades) + 1) // 4))
    # Next to a long axis the linear part is narrow: its ends would stand on top of zero.
    begin = 0 if step == 1 else step
    below, above = ([10.0 ** (first + k) for k in range(begin, n + 1, step)] for n in decades)
    return [*(-x for x in reversed(below)), 0.0, *above]


def _signed(value: float) -> str:
    """−1000, 10⁶: short numbers as they are, long ones as powers of ten."""
    if abs(value) < 1e4:
        return f"{value:.0f}".replace("-", "−")
    sign = "−" if value < 0 else ""
    return rf"${sign}10^{{{round(np.log10(abs(value)))}}}$"


@style.styled
def weight_shares(log_weights: Mapping[str, ArrayLike]) -> Figure:
    """Share of all weight that the largest k weights carry: a curve that rises at once means a few samples decide.

    Parameters
    ----------
    log_weights
        Name -> [n] up to a constant; -inf is a weight of zero.
    """
    figure = style.new_figure(3.6)
    axes = figure.add_subplot()
    largest = 1
    for name, colour in zip(log_weights, (style.BLUE, style.ORANGE, *style.SPARE), strict=False):
        array = np.sort(np.asarray(log_weights[name], np.float64))[::-1]
        if array.size == 0 or array[0] == -np.inf:
            axes.plot([], [], color=colour, label=f"{name}: no sample has a weight")
            continue
        share = np.cumsum(np.exp(array - array[0]))
        k = np.arange(1, array.size + 1)
        keep = np.unique(np.geomspace(1, array.size, 400).astype(int)) - 1
        axes.plot(k[keep], (share / share[-1])[keep], color=colour, label=name)
        largest = max(largest, array.size)
    every = np.geomspace(1, max(2, largest), 200)
    axes.plot(every, every / every[-1], color=style.GREY, linestyle=(0, (4, 3)), linewidth=1.2, label="equal weights")
    axes.set_xscale("log")
    axes.set_xlim(1, max(2, largest))
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel("samples with the largest weights")
    axes.set_ylabel("share of all weight")
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=1)
    return figure


@style.styled
def nearest_histogram(generated: ArrayLike, data: ArrayLike, reference: str) -> Figure:
    """RMSD to the nearest known frame: generated against held-out frames.

    Parameters
    ----------
    generated, data : array_like, shape [m] and [n]
        Å, from `novelty.nearest_rmsd`.
    reference : str
        What the known frames are.
    """
    figure = style.new_figure(4.0, style.HALF)
    ours, theirs = _finite(generated), _finite(data)
    if ours.size == 0 or theirs.size == 0:
        return style.message(figure, "No distance is finite.")
    axes = figure.add_subplot()
    top = float(np.quantile(np.concatenate([ours, theirs]), 0.995))
    edges = np.linspace(0.0, max(1.05 * top, 1e-3), 41)
    for name, label, values in (("data", "held-out", theirs), ("generated", "generated", ours)):
        counts = np.histogram(values, edges)[0] / values.size
        filled: dict[str, Any] = {"fill": True, "alpha": 0.22} if name == "data" else {"linewidth": 1.8}
        axes.stairs(counts, edges, color=style.method_colour(name), label=label, **filled)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel(f"RMSD to the nearest {reference} frame (Å)")
    axes.set_ylabel("share of frames")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@style.styled
def minimised_scatter(generated: Sequence[Mapping[str, float]], data: Sequence[Mapping[str, float]]) -> Figure:
    """Energy after minimisation against how far the frame moved.

    Parameters
    ----------
    generated, data
        From `novelty.minimise`; frames that OpenMM gave up on are left out and counted in the legend.
    """
    figure = style.new_figure(4.0, style.HALF)
    axes = figure.add_subplot()
    for name, label, marker, rows in (("data", "held-out", "o", data), ("generated", "generated", "s", generated)):
        done = [row for row in rows if np.isfinite(row["rmsd"]) and np.isfinite(row["after"])]
        text = label + (f" ({len(rows) - len(done)} given up)" if len(done) < len(rows) else "")
        moved, after = [row["rmsd"] for row in done], [row["after"] for row in done]
        axes.plot(moved, after, marker, color=style.method_colour(name), markersize=7, alpha=0.8, label=text)
    axes.set_xlim(left=0.0)
    axes.margins(y=0.15)
    axes.set_xlabel("moved in minimisation, RMSD (Å)")
    axes.set_ylabel("energy after (kcal/mol)")
    axes.grid()
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@style.styled
def embedding_map(found: Mapping[str, Any], which: Sequence[str]) -> Figure:
    """The embedding of backbone distances in two dimensions; the last of ``which`` lies on top.

    Parameters
    ----------
    found
        From `embedding.embed`.
    which
        "data" and "generated", or one of them; the limits are those of both, so that pictures compare.
    """
    figure = style.new_figure(4.3, style.HALF)
    axes = figure.add_subplot()
    both = np.concatenate([np.asarray(found[name], np.float64) for name in ("data", "generated")])
    both = both[np.isfinite(both).all(1)]
    if len(both) == 0:
        return style.message(figure, "No point of the embedding is finite.")
    low, high = np.quantile(both, [0.002, 0.998], axis=0)
    margin = 0.07 * np.maximum(high - low, 1e-6)
    for name in which:
        points = np.asarray(found[name], np.float64)
        axes.plot(
            *points.T, "." if name == "data" else "x", color=style.method_colour(name), alpha=0.45, label=name,
            markersize=3.5, markeredgewidth=0.9, linestyle="none", rasterized=True,
        )  # fmt: skip
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    pca = found["method"] == "pca"
    axes.set_xlabel("first principal component (Å)" if pca else "UMAP 1")
    axes.set_ylabel("second principal component (Å)" if pca else "UMAP 2")
    figure.legend(loc="outside upper left", ncols=2, markerscale=2.0)
    return figure
