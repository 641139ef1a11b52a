"""Pictures of structures: fluctuations along the chain, distance matrices, overlaid traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis import style
from openmm_bg.analysis.distances import ANGSTROM
from openmm_bg.analysis.superposition import superpose
from openmm_bg.coordinates import MoleculeGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]

__all__ = ["distance_matrices", "overlay", "residue_axis", "rmsf_curve", "trace_paths"]

#: Labels that fit along an axis of the page's width.
_LABELS = 40
#: Residues from which on a trace through CA says more than all heavy atoms.
_CHAIN = 8


def residue_axis(axis: Any, labels: Sequence[str], most: int = _LABELS) -> None:
    """Turn an x or y axis of matplotlib into one of residues 0 to n - 1; not all are named if there are many."""
    step = -(-len(labels) // most)
    places = list(range(0, len(labels), step))
    turned = axis.axis_name == "x" and len(labels) > 6
    axis.set_ticks(places, [labels[k] for k in places], rotation=90 if turned else 0, fontsize=9)
    limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    few = max(0.0, 0.5 * (6 - len(labels)))  # the bars of two residues need not fill the page
    limits(-0.6 - few, len(labels) - 0.4 + few)


@style.styled
def rmsf_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """RMSF along the chain, generated against data.

    Parameters
    ----------
    rows
        From `residues.residue_rmsf`.
    """
    figure = style.new_figure(3.7)
    if not rows:
        return style.message(figure, "No residue has heavy atoms.")
    axes = figure.add_subplot()
    for name, marker, dashes in (("data", "o", "-"), ("generated", "s", (0, (6, 2)))):
        values = [row[name] for row in rows]
        axes.plot(values, marker=marker, markersize=4, linestyle=dashes, color=style.method_colour(name), label=name)
    residue_axis(axes.xaxis, [row["residue"] for row in rows])
    axes.set_ylim(0.0, 1.08 * axes.get_ylim()[1])
    axes.set_ylabel("RMSF (Å)")
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@style.styled
def distance_matrices(generated: ArrayLike, data: ArrayLike, atoms: ArrayLike, topology: Any) -> Figure:
    """Mean distance matrices of generated frames and of data side by side, and their difference.

    Parameters
    ----------
    generated, data : array_like, shape [a, a]
        Å, from `distances.mean_distances`.
    atoms : array_like of int, shape [a]
        Which atoms these are, by which the axes are labelled.
    topology : openmm.app.Topology
    """
    from matplotlib.ticker import MaxNLocator

    ours, theirs = np.asarray(generated, np.float64), np.asarray(data, np.float64)
    figure = style.new_figure(3.9)
    figure.set_layout_engine("compressed", wspace=0.06)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    top = float(max(ours.max(), theirs.max()))
    gap = ours - theirs
    limit = max(float(np.abs(gap).max()), 1e-6)
    places, labels = _residue_ticks(atoms, topology)
    mean: Any = None
    difference: Any = None
    for axes, matrix, title in zip(panels, (ours, theirs, gap), ("generated", "data", "generated − data"), strict=True):
        if matrix is gap:
            difference = axes.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        else:
            mean = axes.imshow(matrix, cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(True)
        axes.set_xticks(places, labels, rotation=90, fontsize=9)
        axes.set_yticks(places, labels, fontsize=9)
    for image, where, label in ((mean, panels[:2], "mean distance (Å)"), (difference, panels[2:], "difference (Å)")):
        bar = figure.colorbar(image, ax=list(where), location="bottom", pad=0.02, aspect=30, shrink=0.9)
        bar.set_label(label)
        bar.locator = MaxNLocator(nbins=6 if image is mean else 4)
        bar.update_ticks()
        bar.outline.set_visible(False)
    return figure


def _residue_ticks(atoms: ArrayLike, topology: Any, most: int = 9) -> tuple[list[float], list[str]]:
    """Where along the chosen atoms a few residues stand, and their labels."""
    from openmm_bg.analysis.residues import residue_label

    every = list(topology.atoms())
    where: dict[int, list[int]] = {}
    for place, atom in enumerate(np.asarray(atoms, int)):
        where.setdefault(every[atom].residue.index, []).append(place)
    residues = list(topology.residues())
    chosen = list(where)[:: -(-len(where) // most)]
    return [float(np.mean(where[k])) for k in chosen], [residue_label(residues[k]) for k in chosen]


def trace_paths(topology: Any) -> tuple[list[list[int]], str]:
    """Atoms to be joined by lines, and what they are: CA of a chain, or all bonds of heavy atoms of a small molecule.

    Returns
    -------
    paths : list of list of int
        Each of two atoms or more.
    name : str
    """
    graph = MoleculeGraph(topology)
    peptide = graph.peptide_backbone()
    alphas = [a for a in range(graph.n_atoms) if peptide[a] and graph.names[a] == "CA"]
    if len(alphas) >= _CHAIN:
        return [alphas], "CA trace"
    heavy = [a for a in range(graph.n_atoms) if not graph.is_hydrogen(a)]
    return [[a, b] for a in heavy for b in graph.neighbours[a] if a < b and not graph.is_hydrogen(b)], "heavy atoms"


def _smooth(points: FloatArray, pieces: int = 6) -> FloatArray:
    """Catmull-Rom spline [f, (a - 1) pieces + 1, 3] through points [f, a, 3]; straight lines between two."""
    if points.shape[1] < 3:
        return points
    before = np.concatenate([2 * points[:, :1] - points[:, 1:2], points[:, :-1]], axis=1)[:, :-1]
    after = np.concatenate([points[:, 1:], 2 * points[:, -1:] - points[:, -2:-1]], axis=1)[:, 1:]
    a, b = points[:, :-1], points[:, 1:]
    t = np.arange(pieces)[:, None] / pieces
    p0, p1, p2, p3 = (x[:, :, None, :] for x in (before, a, b, after))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return np.concatenate([curve.reshape(len(points), -1, 3), points[:, -1:]], axis=1)


@style.styled
def overlay(generated: ArrayLike, data: ArrayLike, topology: Any, atoms: ArrayLike) -> Figure:
    """A few generated and data frames, superposed on the data's mean structure, from two directions.

    Parameters
    ----------
    generated, data : array_like, shape [m, N, 3] and [n, N, 3]
        nm; a dozen of each.
    topology : openmm.app.Topology
    atoms : array_like of int
        Atoms that are superposed.
    """
    ours, theirs = np.asarray(generated, np.float64), np.asarray(data, np.float64)
    centre = theirs[0]
    for _ in range(4):
        centre = superpose(theirs, centre, atoms).mean(0)
    ours, theirs = (ANGSTROM * superpose(x, centre, atoms) for x in (ours, theirs))
    paths, _ = trace_paths(topology)
    used = sorted({a for path in paths for a in path})
    middle = ANGSTROM * centre[used]
    # Along the directions in which the mean structure is thinnest and second thinnest, it shows most.
    axes3 = np.linalg.svd(middle - middle.mean(0))[2]
    sets = {"data": theirs - middle.mean(0), "generated": ours - middle.mean(0)}
    curves = {name: [_smooth(x[:, path] @ axes3.T) for path in paths] for name, x in sets.items()}
    views = ((0, 1, 2), (0, 2, 1))
    every = np.concatenate([c.reshape(-1, 3) for group in curves.values() for c in group])
    low, high = every.min(0) - 0.4, every.max(0) + 0.4
    across = high[0] - low[0]
    heights = [float((high - low)[vertical] / across) for _, vertical, _ in views]
    figure = style.new_figure(0.7 + min(8.0, 0.95 * style.WIDTH / 3 * sum(heights)))
    panels = figure.subplots(2, 3, sharex=True, sharey="row", height_ratios=heights)
    for row, order in enumerate(views):
        for column, title in enumerate(("data", "generated", "both")):
            axes = panels[row, column]
            for name in ("data", "generated") if title == "both" else (title,):
                _draw(axes, curves[name], order, style.method_colour(name), (low, high))
            axes.set_xlim(low[0], high[0])
            axes.set_ylim(low[order[1]], high[order[1]])
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(title)
        panels[row, 0].set_ylabel("first view" if row == 0 else "turned by 90°")
    bar = 10.0 if across > 24 else 5.0 if across > 12 else 2.0
    corner = panels[1, 0]
    # Below the panel: in it, the bar might cross the molecule.
    corner.plot(
        [low[0], low[0] + bar], [-0.04, -0.04], color=style.BLACK, linewidth=2.5, clip_on=False,
        transform=corner.get_xaxis_transform(),
    )  # fmt: skip
    corner.annotate(
        f"{bar:g} Å", (low[0] + bar, -0.04), (6, 0), xycoords=corner.get_xaxis_transform(),
        textcoords="offset points", va="center", fontsize=10, annotation_clip=False,
    )  # fmt: skip
    return figure


def _draw(
    axes: Any,
    curves: Sequence[FloatArray],
    order: tuple[int, int, int],
    colour: str,
    box: tuple[FloatArray, FloatArray],
) -> None:
    """Lines of all frames, far ones first and paler, so that the eye sees which passes in front."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    horizontal, vertical, depth = order
    parts = [np.stack([c[:, :-1], c[:, 1:]], axis=2).reshape(-1, 2, 3) for c in curves]
    segments = np.concatenate(parts)
    far = segments[:, :, depth].mean(1)
    rank = np.argsort(far)
    segments, far = segments[rank], far[rank]
    low, high = box[0][depth], box[1][depth]
    near = np.clip((far - low) / max(high - low, 1e-9), 0.0, 1.0)[:, None]
    ink = np.array(to_rgb(colour))
    shade = ink * (0.35 + 0.65 * near) + 1.0 * (0.65 - 0.65 * near)
    lines = LineCollection(
        list(segments[:, :, [horizontal, vertical]]),
        colors=np.concatenate([shade, np.full((len(shade), 1), 0.75)], axis=1),
        linewidths=1.0 + 0.9 * near[:, 0],
        capstyle="round",
        rasterized=len(segments) > 600,
    )
    axes.add_collection(lines)
