"""The resampled buffer: recent flow samples with their importance weights, to train on by energy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_bg.training.losses import Regulariser, evaluate_target, evaluation_mode

# Largest log-weight above the median that enters log Z: beyond it one sample would move the estimate.
_LARGEST = 6.0


class BufferBatch(NamedTuple):
    """Samples drawn from the buffer."""

    y: Tensor  # [B, D] float64
    log_w: Tensor  # [B] float64
    log_density: Tensor  # [B] log π, float64
    gradient: Tensor | None  # [B, D] ∇ of the regularised log π, float64


class ResampledBuffer:
    """First in, first out store of the last `n_batches` draws of flow samples and their log-weights.

    ``log w = log π(y, s) - log q(y)`` with the density that drew y (formula A of docs/theory.md when s is
    constant; otherwise s is drawn from the data and the weights lead to an average over s). A weight stays
    right while the flow moves on, because it belongs to the proposal that drew the sample. Samples are drawn
    in evaluation mode, without gradients. `Trainer` hands in the moving average of the weights if it has
    one: that is the flow which is kept, so its effective sample size is the figure of progress.

    Parameters
    ----------
    n_batches
        Draws that are kept.
    gradients
        Also keep ∇_y log π of the regularised target, for the path gradient.

    Attributes
    ----------
    median
        Of the log-weights that are kept.
    log_z
        Logarithm of the mean weight of all samples drawn, those without a finite energy included as zeros; weights
        beyond e⁶ times the median count as that.
    """

    def __init__(self, n_batches: int, *, gradients: bool = False) -> None:
        self.n_batches = n_batches
        self.gradients = gradients
        self._batches: list[dict[str, Tensor]] = []
        self._drawn: list[int] = []  # samples of each draw, those that were not kept included
        self._joined: dict[str, Tensor] = {}
        self.median = 0.0
        self.log_z = 0.0
        self.ess = float("nan")

    def __len__(self) -> int:
        return self._joined["log_w"].shape[0] if self._joined else 0

    def clear(self, *, gradients: bool | None = None) -> None:
        """Forget all samples."""
        self._batches, self._drawn = [], []
        self.gradients = self.gradients if gradients is None else gradients
        self._join()
        self.ess = float("nan")

    def refill(
        self,
        density: Any,
        target: Any,
        s: Tensor,
        *,
        regulariser: Regulariser | None = None,
        reference: float = 0.0,
    ) -> tuple[float, int]:
        """Draw one batch, as many samples as `s` [n, S] has rows, and drop the oldest if there are too many.

        Returns
        -------
        ess : float
            Effective sample size of this draw as a share of n; samples without a finite energy have weight 0.
        n_dropped : int
            Samples without a finite log-weight (or gradient, where kept), which do not enter the buffer.
        """
        with evaluation_mode(density), torch.no_grad():
            y, log_q = density.sample(s.shape[0])
        y, log_q = y.double(), log_q.double()
        evaluation = evaluate_target(
            target, y, s, regulariser=regulariser, reference=reference, gradient=self.gradients
        )
        log_w = evaluation.log_density - log_q
        keep = torch.isfinite(log_w) & torch.isfinite(y).all(dim=1) & evaluation.finite
        batch = {"y": y[keep], "s": s[keep], "log_w": log_w[keep], "log_density": evaluation.log_density[keep]}
        if self.gradients:
            batch["gradient"] = -evaluation.gradient[keep]
        kept = batch["log_w"]
        if kept.numel():
            w = torch.exp(kept - kept.max())
            self.ess = float(w.sum().square() / w.square().sum() / s.shape[0])
            self._batches = [*self._batches, batch][-self.n_batches :]
            self._drawn = [*self._drawn, s.shape[0]][-self.n_batches :]
            self._join()
        else:
            self.ess = 0.0
        return self.ess, s.shape[0] - kept.numel()

    def _join(self) -> None:
        names = self._batches[0].keys() if self._batches else []
        self._joined = {name: torch.cat([batch[name] for batch in self._batches]) for name in names}
        if not self._joined:
            self.median = self.log_z = 0.0
            return
        log_w = self._joined["log_w"]
        self.median = float(log_w.median())
        # The mean over all that were drawn: a sample that was not kept has the weight zero.
        total = torch.logsumexp(log_w.clamp(max=self.median + _LARGEST), dim=0)
        self.log_z = float(total) - math.log(sum(self._drawn))

    def draw(self, n: int, generator: torch.Generator) -> BufferBatch:
        """n samples, each kept one equally likely, with replacement; the buffer must not be empty."""
        index = torch.randint(len(self), (n,), generator=generator).to(self._joined["y"].device)
        gradient = self._joined["gradient"][index] if self.gradients else None
        joined = self._joined
        return BufferBatch(joined["y"][index], joined["log_w"][index], joined["log_density"][index], gradient)

    def state_dict(self) -> dict[str, Any]:
        """Tensors of every draw, and the plain figures."""
        tensors = {f"{k}.{name}": value for k, batch in enumerate(self._batches) for name, value in batch.items()}
        ess = None if self.ess != self.ess else self.ess
        return {
            "tensors": tensors,
            "n": len(self._batches),
            "drawn": self._drawn,
            "gradients": self.gradients,
            "ess": ess,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.gradients = bool(state["gradients"])
        names = ["y", "s", "log_w", "log_density"] + (["gradient"] if self.gradients else [])
        self._batches = [{name: state["tensors"][f"{k}.{name}"] for name in names} for k in range(state["n"])]
        self._drawn = list(state["drawn"])
        self._join()
        self.ess = float("nan") if state["ess"] is None else float(state["ess"])
