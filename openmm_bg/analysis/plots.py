"""Pictures of ensembles, weights and chains; every function returns a `matplotlib.figure.Figure`.

Nothing here touches pyplot or the global backend, so that the functions may be called from any program and thread of
control. Data that are missing, empty or not finite give a picture that says so, never an exception: a report about
a failed run is most needed when something is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis import style
from openmm_bg.analysis.torsions import PHI_BASIN, phi_basin, ramachandran_free_energy, torsion_free_energy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]

__all__ = [
    "Sample",
    "chain_trace",
    "free_energy_along_phi",
    "free_energy_estimates",
    "log_weight_histogram",
    "ramachandran_maps",
    "reduced_potential_histogram",
]


class Sample(NamedTuple):
    """One method's values: what a curve or map is made of.

    ``label`` names the method (and picks its colour), ``values`` are [n] numbers or, for maps, a pair of [n] angles;
    ``log_weights`` [n] up to a constant, None for equal weights.
    """

    label: str
    values: Any
    log_weights: ArrayLike | None = None


class Estimate(Protocol):
    """What `free_energy_estimates` reads of a row."""

    @property
    def method(self) -> str: ...
    @property
    def value_kT(self) -> float: ...
    @property
    def error_kT(self) -> float: ...
    @property
    def n_energies(self) -> int: ...


def _relative_weights(sample: Sample, keep: NDArray[np.bool_]) -> FloatArray:
    """Weights of the kept values, their sum over *all* values being one."""
    if sample.log_weights is None:
        return np.full(int(keep.sum()), 1.0 / max(1, keep.size))
    log_w = np.asarray(sample.log_weights, dtype=np.float64)
    top = log_w.max(initial=-np.inf)
    weights = np.zeros(log_w.size) if top == -np.inf else np.exp(log_w - top)
    return weights[keep] / max(weights.sum(), 1e-300)


def _mark_basin(axes: Any) -> None:
    for edge in PHI_BASIN:
        axes.axvline(edge, color=style.GREY, linestyle=(0, (4, 3)), linewidth=1.0, zorder=3)


@style.styled
def ramachandran_maps(samples: Sequence[Sample], bins: int = 60, ceiling: float = 12.0) -> Figure:
    """Free-energy maps over (φ, ψ) side by side, on one colour scale.

    Parameters
    ----------
    samples
        ``values`` are pairs (φ [n], ψ [n]) in rad.
    bins
        Along each axis.
    ceiling
        kT; the top of the colour scale.
    """
    figure = style.new_figure(3.6)
    figure.set_layout_engine("compressed", wspace=0.05)  # square panels and a colour bar of their height
    panels = figure.subplots(1, len(samples), sharex=True, sharey=True, squeeze=False)[0]
    image = None
    for axes, sample in zip(panels, samples, strict=True):
        phi, psi = sample.values
        surface = ramachandran_free_energy(phi, psi, sample.log_weights, bins)
        image = axes.imshow(
            surface.T,
            origin="lower",
            extent=(-np.pi, np.pi, -np.pi, np.pi),
            vmin=0.0,
            vmax=ceiling,
            cmap="viridis",
            interpolation="nearest",
        )
        axes.set_title(sample.label)
        axes.spines[["top", "right"]].set_visible(True)
        style.angle_axis(axes.xaxis, "φ")
        style.angle_axis(axes.yaxis, "ψ")
        axes.label_outer()
        _mark_basin(axes)
        if np.isnan(surface).all():
            axes.text(0.5, 0.5, "no weight", ha="center", va="center", transform=axes.transAxes, color="#666666")
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), extend="max", pad=0.015, aspect=25)
        bar.set_label("free energy (kT)")
        bar.outline.set_visible(False)
    return figure


@style.styled
def free_energy_along_phi(
    samples: Sequence[Sample], bins: int = 48, n_blocks: int = 20, ceiling: float = 20.0
) -> Figure:
    """Free energy along φ by several methods, with a band of one standard error (jackknife over blocks).

    Parameters
    ----------
    samples
        ``values`` are φ [n] in rad, in the order of time where correlated.
    bins
        Over [-π, π].
    n_blocks
        Blocks of the jackknife.
    ceiling
        kT; the top of the axis. Higher bins hold a few clashing samples, which would flatten everything else.
    """
    figure = style.new_figure(4.3)
    axes = figure.add_subplot()
    zero = None
    for i, sample in enumerate(samples):
        centres, profile, error = torsion_free_energy(sample.values, sample.log_weights, bins, n_blocks)
        if np.isnan(profile).all():
            axes.plot([], [], color=style.method_colour(sample.label, i), label=f"{sample.label} (no weight)")
            continue
        # Each profile is an absolute -ln p; one common constant moves the first one's minimum to zero.
        zero = np.nanmin(profile) if zero is None else zero
        colour = style.method_colour(sample.label, i)
        band = np.nan_to_num(error)
        axes.fill_between(centres, profile - zero - band, profile - zero + band, color=colour, alpha=0.22, linewidth=0)
        # Curves that agree hide each other unless the later ones are dashed.
        dashes = ("-", (0, (6, 3)), (0, (1.5, 2)))[i % 3]
        axes.plot(centres, profile - zero, linestyle=dashes, color=colour, label=sample.label, zorder=3 + i)
    style.angle_axis(axes.xaxis, "φ")
    axes.set_ylabel("free energy (kT)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(-2.0, min(-0.4, low)), min(ceiling, high))
    axes.grid(axis="y")
    _mark_basin(axes)
    figure.legend(loc="outside upper left", ncols=max(1, len(samples)))
    return figure


@style.styled
def reduced_potential_histogram(samples: Sequence[Sample], bins: int = 80) -> Figure:
    """Densities of the reduced potential.

    The range is that of the first sample (a reference such as MD) with a margin to the right: flow samples have a
    long tail of clashes that would leave nothing else to see. What lies beyond is given as a share in the legend.

    Parameters
    ----------
    samples
        ``values`` are reduced potentials [n] in kT; non-finite ones count as beyond the range.
    bins
        Over the range.
    """
    figure = style.new_figure(3.9)
    axes = figure.add_subplot()
    reference = next((v for s in samples if np.isfinite(v := np.asarray(s.values, dtype=np.float64)).any()), None)
    if reference is None:
        return style.message(figure, "No finite energy.")
    low, high = np.quantile(reference[np.isfinite(reference)], [0.0005, 0.9995])
    width = max(high - low, 1e-6)
    edges = np.linspace(low - 0.15 * width, high + 0.5 * width, bins + 1)
    for i, sample in enumerate(samples):
        values = np.asarray(sample.values, dtype=np.float64)
        keep = (values >= edges[0]) & (values <= edges[-1])
        weights = _relative_weights(sample, keep)
        density = np.histogram(values[keep], edges, weights=weights)[0] / np.diff(edges)
        beyond = 1.0 - float(weights.sum())
        label = sample.label + (f" ({100 * beyond:.2g} % beyond the picture)" if beyond > 5e-4 else "")
        colour = style.method_colour(sample.label, i)
        if i == 0:
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.18, label=label)
        else:
            axes.stairs(density, edges, color=colour, linewidth=1.8, label=label)
    axes.set_xlabel("reduced potential u (kT)")
    axes.set_ylabel("density (1/kT)")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="upper right")
    return figure


@style.styled
def log_weight_histogram(targets: Mapping[str, ArrayLike], bins: int = 90) -> Figure:
    """Histograms of log-weights, counted from the mean weight, with ESS and Pareto k̂ of each target.

    The vertical axis is logarithmic, for the few samples on the far right decide how good the weights are.

    Parameters
    ----------
    targets
        Name of the target -> log-weights [n]; -inf is a weight of zero.
    bins
        Over the range shown.
    """
    from openmm_bg.weights import effective_sample_size, pareto_khat

    figure = style.new_figure(3.9)
    axes = figure.add_subplot()
    curves = []
    for name, log_weights in targets.items():
        log_w = np.asarray(log_weights, dtype=np.float64)
        finite = log_w[log_w > -np.inf]
        if finite.size == 0:
            axes.plot([], [], " ", label=f"{name}: no sample has a weight")
            continue
        log_mean = finite.max() + np.log(np.exp(finite - finite.max()).sum() / log_w.size)
        figures = f"{name}: ESS {100 * effective_sample_size(log_w):.1f} %, k̂ = {pareto_khat(log_w):.2f}"
        curves.append((figures, finite - log_mean, log_w.size))
    if curves:
        # Weights of a hopeless flow spread over many powers of ten: the upper ones are what there is to see.
        reach = [float(x.max()) - 4.0 * float(x.max() - np.median(x)) for _, x, _ in curves]
        low = min(max(float(np.quantile(x, 0.002)), far) for (_, x, _), far in zip(curves, reach, strict=True)) - 1.0
        high = max(float(x.max()) for _, x, _ in curves) + 0.5
        edges = np.linspace(low, high, bins + 1)
        for (label, x, n), colour in zip(curves, (style.BLUE, style.ORANGE, *style.SPARE), strict=False):
            counts = np.histogram(x, edges)[0]
            left = 1.0 - np.count_nonzero(x >= low) / n
            label += f" ({100 * left:.2g} % further left or without weight)" if left > 5e-4 else ""
            axes.stairs(np.maximum(counts, 0.3), edges, color=colour, linewidth=1.8, label=label)
        axes.set_xlim(low, high)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.axvline(0.0, color=style.GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_xlabel("log w − log of the mean weight (kT)")
    axes.set_ylabel("samples in a bin")
    figure.legend(loc="outside upper left")
    return figure


def _power(number: float) -> str:
    """1.8×10⁷, in mathtext."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


@style.styled
def free_energy_estimates(rows: Sequence[Estimate]) -> Figure:
    """ΔF of several methods with bars of one and two standard errors, beside their numbers of energy evaluations.

    Parameters
    ----------
    rows
        Objects with ``method``, ``value_kT``, ``error_kT`` and ``n_energies``; a value that is not finite is named as
        such, an error that is not finite leaves its bar out.
    """
    figure = style.new_figure(0.62 * max(1, len(rows)) + 1.25)
    values, costs = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1.0))
    for i, row in enumerate(rows):
        colour = style.method_colour(row.method, i)
        if np.isfinite(row.value_kT):
            if np.isfinite(row.error_kT):
                for sigmas, width in ((2, 1.6), (1, 5.0)):
                    half = sigmas * row.error_kT
                    values.hlines(i, row.value_kT - half, row.value_kT + half, color=colour, linewidth=width)
            values.plot(row.value_kT, i, "o", color="white", markeredgecolor=colour, markersize=7, markeredgewidth=2)
        else:
            values.text(0.5, i, "no estimate", ha="center", va="center", transform=values.get_yaxis_transform())
        if row.n_energies > 0:
            costs.plot(row.n_energies, i, "D", color=colour, markersize=7)
            costs.annotate(
                _power(row.n_energies),
                (row.n_energies, i), (0, 8), textcoords="offset points", ha="center", fontsize=10,
            )  # fmt: skip
    values.set_yticks(range(len(rows)), [row.method for row in rows])
    values.set_ylim(len(rows) - 0.4, -0.75)
    values.set_xlabel("ΔF (kT)")
    costs.set_xlabel("energy evaluations")
    costs.set_xscale("log")
    costs.margins(x=0.25)
    for axes in (values, costs):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    figure.align_xlabels([values, costs])
    return figure


@style.styled
def chain_trace(phi: ArrayLike, unit: str = "round") -> Figure:
    """φ along a chain, with the share of its frames in the basin.

    Parameters
    ----------
    phi
        [t] rad in the order of time; NaN where a frame was left out (a cis amide).
    unit
        What one frame is, for the axis.
    """
    figure = style.new_figure(3.3)
    x = np.asarray(phi, dtype=np.float64)
    keep = np.isfinite(x)
    if not keep.any():
        return style.message(figure, "The chain has no frame to show.")
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=(6.0, 1.0))
    inside = phi_basin(x)
    time = np.arange(x.size)
    for mask, colour in ((keep & ~inside, style.GREEN), (inside, style.RED)):
        # Thousands of dots as vectors make a page slow; they are drawn as pixels inside the vector picture.
        axes.plot(time[mask], x[mask], ".", color=colour, markersize=3.0, rasterized=True)
    edges = np.linspace(-np.pi, np.pi, 73)
    for mask, colour in ((keep & ~inside, style.GREEN), (inside, style.RED)):
        counts = np.histogram(x[mask], edges)[0]
        side.stairs(counts, edges, orientation="horizontal", fill=True, color=colour, alpha=0.75)
    side.set_xscale("symlog", linthresh=1.0)
    side.set_xlabel("frames (log)")
    side.set_xticks([])
    side.minorticks_off()
    for panel in (axes, side):
        panel.axhspan(*PHI_BASIN, color=style.RED, alpha=0.08, linewidth=0)
    axes.set_xlim(0, max(1, x.size))
    axes.set_xlabel(unit)
    style.angle_axis(axes.yaxis, "φ")
    crossings = int(np.count_nonzero(np.diff(inside[keep].astype(np.int8))))
    axes.set_title(f"{100 * inside[keep].mean():.2f} % of the frames in 0 < φ < 2 rad, {crossings:,} crossings")
    return figure
