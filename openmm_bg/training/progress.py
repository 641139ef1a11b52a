"""The progress bar of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openmm_bg.progress import progress_bar
from openmm_bg.training.config import LOSS_NAMES, SURROGATES, Stage


class StageBar:
    """Share of the stage that is done, with the latest figure of each kind."""

    def __init__(self, bar: Any, stage: Stage) -> None:
        self._bar = bar
        self._shown: dict[str, float] = {}
        active = stage.losses.active()
        # A single loss is the loss itself, unless that is a surrogate whose figure says more.
        self._twice = [name for name in active if len(active) == 1 and name not in SURROGATES]

    def show(self, row: dict[str, Any], fraction: float) -> None:
        """A row of the loss curve, and the share of the stage that is done."""
        if self._bar is None:
            return
        for name in ("loss", *LOSS_NAMES, "validation_nll", "ess"):
            if row[name] is not None and name not in self._twice:
                self._shown[name] = row[name]
        short = {name.replace("validation_nll", "val"): f"{value:.4g}" for name, value in self._shown.items()}
        self._bar.set_postfix(short, refresh=False)
        self._bar.update(100.0 * min(fraction, 1.0) - self._bar.n)


@contextmanager
def stage_bar(stage: Stage, shown: bool) -> Iterator[StageBar]:
    """A bar for the time of the body, invisible unless `shown`."""
    if not shown:
        yield StageBar(None, stage)
        return
    with progress_bar(
        total=100.0, desc=stage.name, mininterval=0.5, shown=True,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}",
    ) as bar:  # fmt: skip
        yield StageBar(bar, stage)
