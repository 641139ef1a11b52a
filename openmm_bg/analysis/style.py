"""How every picture looks: one palette that colour-blind readers can tell apart, one size of type, one angle axis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

#: Okabe and Ito's palette (jfly.uni-koeln.de/color), one colour a method throughout a page.
BLACK, BLUE, ORANGE, GREEN, RED, PURPLE = "#222222", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY = "#8a8a8a"
#: Colours of the methods; any other name gets one of `SPARE`.
METHOD_COLOURS = {"tempered MD": BLACK, "flow, raw": ORANGE, "flow, reweighted": BLUE, "weights": BLUE}
METHOD_COLOURS |= {"MD + moves": GREEN}
METHOD_COLOURS |= {"data": BLACK, "generated": BLUE, "generated, rigid": BLUE, "generated, completed": ORANGE}
SPARE = (RED, PURPLE, GREY)

#: Inches; on a page of 920 pixels one point is one and a third. Two of half the width stand beside one another.
WIDTH = 9.6
HALF = 4.7

_RC: Any = {  # Any: matplotlib types the keys from 3.11 on only
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11.0,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "lines.linewidth": 1.8,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "path",
    "svg.hashsalt": "openmm_bg",  # the same figures give the same file
}


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function under this module's settings, and leave the caller's matplotlib as it was."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(_RC):
            return function(*args, **kwargs)

    return run


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure outside pyplot: no global state, no window, no backend chosen. Sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def method_colour(method: str, position: int = 0) -> str:
    """The colour of a method by its name; unknown names take a spare one by their position."""
    return METHOD_COLOURS.get(method, SPARE[position % len(SPARE)])


def angle_axis(axis: Any, label: str) -> None:
    """Turn an x or y axis of matplotlib into one of angles between -π and π."""
    axis.set_ticks([-np.pi, -np.pi / 2, 0.0, np.pi / 2, np.pi], ["−π", "−π/2", "0", "π/2", "π"])
    axis.set_label_text(f"{label} (rad)")
    limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    limits(-np.pi, np.pi)


def message(figure: Figure, text: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure.clear()
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#666666", transform=axes.transAxes)
    return figure
