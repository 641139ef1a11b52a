"""Losses and gradient of one step, taken as it is or replayed as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openmm_bg.training.config import Stage, TrainingConfig
from openmm_bg.training.graphs import CudaRecorder, Recorder, StepGraphs, called
from openmm_bg.training.objective import Objective
from openmm_bg.training.parallel import Ranks

logger = logging.getLogger(__name__)


class GradientStep:
    """Takes the losses of an objective backwards.

    Parameters
    ----------
    objective
        Where losses come from.
    parameters
        Of the flow: their `grad` is what a step leaves.
    config
        Clipping, and whether to use CUDA graphs.
    ranks
        The processes that train together.
    """

    def __init__(self, objective: Objective, parameters: list[Tensor], config: TrainingConfig, ranks: Ranks) -> None:
        self._objective, self._parameters, self._config, self._ranks = objective, parameters, config, ranks
        self._gradient = [torch.zeros_like(p) for p in parameters]  # always the same tensors: graphs write into them
        self._used: list[bool] = []
        self._new_recorder = _new_recorder(config, parameters[0].device, ranks)
        self.graphs: StepGraphs | None = None

    def begin_stage(self, stage: Stage) -> None:
        """Graphs are those of one stage; before its first step, and where it is resumed."""
        if self._new_recorder is not None:
            small = self._config.network_precision == "bfloat16"
            precision = torch.bfloat16 if small else self._gradient[0].dtype
            self.graphs = StepGraphs(self._new_recorder(), self._gradient, stage.name, precision)
            self._objective.outside = self.graphs.outside

    def end_stage(self) -> None:
        """Nothing is replayed any more."""
        self.graphs, self._objective.outside = None, called

    def take(self, stage: Stage, step: int, stage_step: int) -> dict[str, Any]:
        """Leave the gradient of the weighted losses in the parameters, and return figures of the step.

        Returns
        -------
        dict
            Floats: `loss`, `gradient_norm`, every loss of the stage by its name, and `ess` if energies of fresh samples
            were evaluated; `dropped` is a count.
        """
        filled = self._objective.begin_step(stage, step, stage_step)
        work = partial(self._losses_and_gradient, stage)
        if self.graphs is None or not self._objective.repeats(stage):
            result = work()
        else:
            result = self.graphs.run(work)
        for p, gradient, used in zip(self._parameters, self._gradient, self._used, strict=True):
            p.grad = gradient if used else None  # without one, the optimiser leaves a parameter as it is
        # One transfer for all figures: on a GPU each would wait for the queue.
        values = torch.stack([value.double() for value in result.values()]).tolist()
        figures: dict[str, Any] = dict(zip(result, values, strict=True))
        return {**filled, **figures, "dropped": int(figures["dropped"]) + filled.get("dropped", 0)}

    def _losses_and_gradient(self, stage: Stage) -> dict[str, Tensor]:
        """The gradient goes into `_gradient`. Nothing here looks at a number or changes a shape but by way of
        `Objective.outside`: this is what graphs replay.

        Each loss is clipped before its weight: together, one thousands of times larger, as an energy's is, would be
        all.
        """
        terms, figures = self._objective.terms(stage)
        weights = stage.losses.active()
        loss = torch.stack([weights[name] * term.detach() for name, term in terms.items()]).sum()
        torch._foreach_zero_(self._gradient)
        self._used = [False] * len(self._parameters)
        for name, term in terms.items():
            if term.requires_grad:
                shared = name == "kl" and "w2" in terms  # the samples' pass through the flow
                self._add(self._differentiated(term, shared), weights[name])
        used = [gradient for gradient, is_used in zip(self._gradient, self._used, strict=True) if is_used]
        norm = nn.utils.get_total_norm(used) if used else torch.full_like(loss, torch.nan)
        reported = {name: figures.pop(name, term).detach() for name, term in terms.items()}
        return {"loss": loss, "gradient_norm": norm, **reported, **figures}

    def _differentiated(self, term: Tensor, shared: bool) -> list[Tensor | None]:
        """Its gradient by each parameter; None for those that it does not depend on or that are frozen."""
        free = [p for p in self._parameters if p.requires_grad]
        found = iter(torch.autograd.grad(term, free, retain_graph=shared, allow_unused=True))
        return [next(found) if p.requires_grad else None for p in self._parameters]

    def _add(self, found: list[Tensor | None], weight: float) -> None:
        """Clip the gradient of a loss and add it with its weight."""
        gradients = [gradient for gradient in found if gradient is not None]
        self._ranks.sum_gradients(gradients)
        factor = torch.full((), weight, dtype=gradients[0].dtype, device=gradients[0].device)
        if self._config.gradient_clip is not None:
            norm = nn.utils.get_total_norm(gradients)
            factor = factor * torch.clamp(self._config.gradient_clip / (norm + 1e-6), max=1.0)
        into = [total for total, gradient in zip(self._gradient, found, strict=True) if gradient is not None]
        torch._foreach_add_(into, torch._foreach_mul(gradients, factor))
        self._used = [used or gradient is not None for used, gradient in zip(self._used, found, strict=True)]


def _new_recorder(config: TrainingConfig, device: torch.device, ranks: Ranks) -> Callable[[], Recorder] | None:
    """Makes what records the graphs of a stage, where they are wanted and there is a GPU of one's own.

    Graphs give their memory back when a stage ends, and so need another recorder in the next one.
    """
    if not config.cuda_graphs:
        return None
    obstacle = None
    if device.type != "cuda":
        obstacle = f"the flow is on the device {device.type!r}"
    elif ranks.size > 1:
        obstacle = "several processes share every step"
    if obstacle is not None:
        logger.warning("cuda_graphs is without effect: %s.", obstacle)
        return None
    return partial(CudaRecorder, device)
