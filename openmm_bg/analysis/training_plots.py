"""The loss curve as a picture, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.analysis import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]

__all__ = ["loss_curve"]

#: Columns of the loss curve that share an axis: (title of the axis, columns with their names and colours).
_CURVES = (
    (
        "negative log-\nlikelihood (nats)",
        (("nll", "MD frames", style.BLUE), ("buffer", "MD frames and buffer", style.ORANGE)),
    ),
    ("reverse KL (kT)", (("kl", "reverse KL", style.GREEN), ("path", "path gradient", style.PURPLE))),
    ("variance of\nlog π - log q", (("variance", "flow samples and MD frames", style.ORANGE),)),
    ("W₂² (nm²)", (("w2", "distances", style.RED),)),
)


def _column(history: Sequence[Mapping[str, Any]], name: str) -> FloatArray:
    """One column of the loss curve, NaN where absent."""
    values = (row.get(name) for row in history)
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)


def _smooth(values: FloatArray, window: int) -> FloatArray:
    """Moving mean over finite values; NaN stays where nothing was recorded."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


@style.styled
def loss_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses and effective sample size during training, stage by stage.

    Parameters
    ----------
    history
        Rows with keys of `openmm_bg.training.history.COLUMNS`; absent keys and None are gaps.
    """
    groups = [(title, [c for c in columns if np.isfinite(_column(history, c[0])).any()]) for title, columns in _CURVES]
    groups = [(title, columns) for title, columns in groups if columns]
    if not groups and np.isfinite(_column(history, "loss")).any():
        groups = [("loss", [("loss", "training", style.BLUE)])]
    ess = _column(history, "ess")
    n_panels = len(groups) + bool(np.isfinite(ess).any())
    figure = style.new_figure(1.2 + 1.9 * max(1, n_panels))
    if n_panels == 0:
        return style.message(figure, "No loss was recorded.")
    panels = figure.subplots(n_panels, 1, sharex=True, squeeze=False)[:, 0]
    seconds = _column(history, "seconds")
    timed = bool(np.isfinite(seconds).all()) and bool(np.all(np.diff(seconds) >= 0))
    x = seconds / 60.0 if timed else np.arange(1.0, len(history) + 1.0)
    stages = [str(row.get("stage") or "") for row in history]
    starts = [i for i in range(len(stages)) if i == 0 or stages[i] != stages[i - 1]]
    window = max(1, len(history) // 150)
    for axes, (title, columns) in zip(panels, groups, strict=False):
        shown = [_column(history, name) for name, _, _ in columns]
        for (_, label, colour), values in zip(columns, shown, strict=True):
            axes.plot(x, values, color=colour, linewidth=0.5, alpha=0.3, rasterized=True)
            for begin, end in zip(starts, [*starts[1:], len(x)], strict=True):  # no smoothing across stages
                smooth = _smooth(values[begin:end], window)
                axes.plot(x[begin:end], smooth, color=colour, label=label)
                label = "_" + label
        if title == _CURVES[0][0]:
            validation = _column(history, "validation_nll")
            at = np.isfinite(validation)
            if at.any():
                axes.plot(x[at], validation[at], "o", color=style.BLACK, markersize=3.5, label="held-out MD frames")
                shown.append(validation)
        _robust_limits(axes, shown)
        axes.set_ylabel(title)
        axes.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=0.85)
    if np.isfinite(ess).any():
        at = np.isfinite(ess)  # only steps that evaluated energies of fresh samples have one
        panels[-1].plot(x[at], ess[at], ".", color=style.BLUE, markersize=3.0, alpha=0.35, rasterized=True)
        panels[-1].plot(x[at], _smooth(ess[at], max(1, int(at.sum()) // 40)), color=style.BLUE)
        panels[-1].set_ylim(0.0, 1.0)
        panels[-1].set_ylabel("ESS of fresh\nsamples")
    for axes in panels:
        axes.grid(axis="y")
        for start in starts[1:]:
            axes.axvline(x[start], color=style.GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    for start in starts:
        panels[0].annotate(
            f"stage “{stages[start]}”" if stages[start] else "",
            (x[start], 1.0), (3, 5), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=10,
            color="#555555", annotation_clip=False,
        )  # fmt: skip
    panels[-1].set_xlabel("training time (minutes)" if timed else "step")
    panels[-1].set_xlim(0.0 if timed else x[0], max(float(x[-1]), float(x[0]) + 1e-6))
    return figure


def _robust_limits(axes: Any, series: Sequence[FloatArray]) -> None:
    """Limits that the first steps, far above the rest, do not decide."""
    values = np.concatenate([s[np.isfinite(s)] for s in series])
    low, high = float(values.min()), float(np.quantile(values, 0.97))
    span = max(high - low, 1e-6 * abs(high), 1e-9)
    axes.set_ylim(low - 0.08 * span, high + 0.35 * span)
