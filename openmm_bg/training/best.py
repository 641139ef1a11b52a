"""Weights that a stage comes back to: those of the best validation, and beside them those it ended with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_PREFIXES = {"best.": "state", "last.": "last"}


class BestWeights:
    """What a stage with ``keep_best`` remembers.

    Attributes
    ----------
    value
        The lowest validation NLL of the stage so far, nats; inf if there is none.
    state
        The weights that had it.
    last
        The weights that the stage before ended with, where it went back to its best; empty otherwise. For whoever asks
        what became of a likelihood beyond its best: frames may be too few for it and other figures still improve.
    """

    def __init__(self) -> None:
        self.value = math.inf
        self.state: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def offer(self, value: float, module: torch.nn.Module) -> None:
        """Remember a module's weights if their validation NLL is the lowest."""
        if value < self.value:
            self.value, self.state = value, _weights(module)

    def end_stage(self, kept: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> None:
        """Give modules the best weights, if there are any; those of ``kept`` become the last ones."""
        self.last = {}
        if self.state:
            self.last = _weights(kept)
            for module in modules:
                module.load_state_dict(self.state)
        self.value, self.state = math.inf, {}

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            prefix + name: tensor
            for prefix, attribute in _PREFIXES.items()
            for name, tensor in getattr(self, attribute).items()
        }

    def meta(self) -> float | None:
        """For a checkpoint's JSON, which knows no inf."""
        return None if math.isinf(self.value) else self.value

    def restore(self, tensors: Mapping[str, Tensor], meta: Any, device: torch.device) -> None:
        """What `tensors` and `meta` gave."""
        self.value = math.inf if meta is None else meta
        for prefix, attribute in _PREFIXES.items():
            found = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
            setattr(self, attribute, found)


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
