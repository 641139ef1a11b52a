"""Pictures residue by residue: (φ, ψ) maps and χ histograms, and how far they differ from the data's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis import style
from openmm_bg.analysis.residues import BINS
from openmm_bg.analysis.structure_plots import residue_axis
from openmm_bg.analysis.torsions import ramachandran_free_energy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]

__all__ = ["chi_grid", "chi_histograms", "ramachandran_bars", "ramachandran_grid"]

#: kT; the top of the colour scale of maps of some thousand frames.
_CEILING = 7.0


@style.styled
def ramachandran_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Jensen-Shannon divergence of (φ, ψ) of each residue, with what the data have against themselves.

    Parameters
    ----------
    rows
        From `residues.ramachandran_distances`.
    """
    figure = style.new_figure(3.7)
    axes = figure.add_subplot()
    place = np.arange(len(rows))
    axes.bar(place, [r["generated"] for r in rows], 0.62, color=style.BLUE, alpha=0.85, label="generated against data")
    for key, label, marker, colour in (
        ("data", "data against data, at random", "_", style.BLACK),
        ("data_time", "data against data, halves in time", "D", style.ORANGE),
    ):
        size = 13 if marker == "_" else 5
        values = [r[key] for r in rows]
        axes.plot(
            place, values, marker, color=colour, markersize=size, markeredgewidth=2 if size > 6 else 1, label=label
        )
    residue_axis(axes.xaxis, [r["residue"] for r in rows])
    highest = max((row[key] for row in rows for key in ("generated", "data", "data_time")), default=0.0)
    axes.set_ylim(0.0, min(1.02, max(0.2, 1.15 * highest)))
    axes.set_ylabel("JS divergence (bits)")
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@style.styled
def ramachandran_grid(maps: Sequence[tuple[str, ArrayLike, ArrayLike]]) -> Figure:
    """Free-energy maps over (φ, ψ): data above generated, or side by side if there is one pair.

    Parameters
    ----------
    maps
        (title, angles of the data [n, 2], of generated frames [m, 2]) in rad.
    """
    alone = len(maps) == 1
    rows, columns = (1, 2) if alone else (2, len(maps))
    figure = style.new_figure(4.6 if alone else 0.9 + 2 * 8.3 / columns)
    figure.set_layout_engine("compressed", wspace=0.03, hspace=0.03)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    image: Any = None
    for column, (title, data, generated) in enumerate(maps):
        for row, (name, angles) in enumerate((("data", data), ("generated", generated))):
            axes = panels[0, row] if alone else panels[row, column]
            phi, psi = np.asarray(angles, np.float64).T
            image = axes.imshow(
                ramachandran_free_energy(phi, psi, None, BINS).T, origin="lower", cmap="viridis", vmin=0.0,
                extent=(-np.pi, np.pi, -np.pi, np.pi), vmax=_CEILING, interpolation="nearest",
            )  # fmt: skip
            axes.spines[["top", "right"]].set_visible(True)
            if alone:
                axes.set_title(f"{title}, {name}")
            elif row == 0:
                axes.set_title(title, fontsize=10.5)
            for axis, letter in ((axes.xaxis, "φ"), (axes.yaxis, "ψ")):
                axis.set_ticks([-np.pi, 0.0, np.pi], ["−π", "0", "π"])
                axis.set_label_text(letter if alone or axis is axes.xaxis else f"{letter}, {name}")
            axes.label_outer()
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), extend="max", pad=0.012, aspect=30)
    bar.set_label("free energy (kT)")
    bar.outline.set_visible(False)
    return figure


@style.styled
def chi_grid(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Jensen-Shannon divergence of every χ as a field of residues and χ1 to χ5; below it the data's halves in time.

    Parameters
    ----------
    rows
        From `residues.chi_distances`.
    """
    residues = list(dict.fromkeys(r["residue"] for r in rows))
    numbers = list(range(1, max(r["chi"] for r in rows) + 1))
    figure = style.new_figure(1.75 + 0.5 * len(numbers))
    figure.set_layout_engine("constrained", hspace=0.02)
    panels = figure.subplots(2, 1, sharex=True)
    image: Any = None
    for axes, key, title in zip(
        panels,
        ("generated", "data_time"),
        ("generated against data", "data against data, halves in time"),
        strict=True,
    ):
        field = np.full((len(numbers), len(residues)), np.nan)
        for r in rows:
            field[r["chi"] - 1, residues.index(r["residue"])] = r[key]
        image = axes.imshow(field, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(numbers)), [f"χ{k}" for k in numbers])
        axes.set_title(title, fontsize=10.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    residue_axis(panels[1].xaxis, residues)
    bar = figure.colorbar(image, ax=list(panels), pad=0.012, aspect=20)
    bar.set_label("JS divergence (bits)")
    bar.outline.set_visible(False)
    return figure


@style.styled
def chi_histograms(shown: Sequence[tuple[str, ArrayLike, ArrayLike]]) -> Figure:
    """Histograms of single χ, generated against data.

    Parameters
    ----------
    shown
        (title, angles of the data [n], of generated frames [m]) in rad; up to six.
    """
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = style.new_figure(0.6 + 1.75 * rows)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    edges = np.linspace(-np.pi, np.pi, BINS + 1)
    for axes, (title, data, generated) in zip(panels.ravel(), shown, strict=False):
        for name, angles in (("data", data), ("generated", generated)):
            density = np.histogram(np.clip(angles, -np.pi, np.pi), edges, density=True)[0]
            filled = {"fill": True, "alpha": 0.22} if name == "data" else {"linewidth": 1.6}
            axes.stairs(density, edges, color=style.method_colour(name), label=name, **filled)
        axes.set_title(title, fontsize=10.5)
        axes.set_ylim(bottom=0.0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xticks([-np.pi, -np.pi / 2, 0.0, np.pi / 2, np.pi], ["−π", "−π/2", "0", "π/2", "π"])
        axes.set_xlim(-np.pi, np.pi)
    for axes in panels.ravel()[len(shown) :]:
        axes.set_axis_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure
