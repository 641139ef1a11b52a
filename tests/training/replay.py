"""What stands for CUDA graphs on a CPU: torch's calls, recorded and run again on the same memory. And what is trained.

As in a CUDA graph the control flow, the shapes and Python's numbers are those of the recording, and results lie where
they lay. What a graph cannot hold is refused: a look at a number, a shape that depends on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_bg.training import LossWeights, Stage
from openmm_bg.training.graphs import WARMUP

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._linalg_svd,
    aten.unique_consecutive, aten._unique2,
}  # fmt: skip


class Wait(RuntimeError):
    """A recorded step looked at a number."""


def refuse_waits(func: Any, args: tuple) -> None:
    """Raise Wait for what would make a CPU wait for a GPU."""
    by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )
    if func.overloadpacket in WAITS or by_mask:
        raise Wait(f"a recorded step calls {func}")


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        refuse_waits(func, args)
        result = func(*args, **kwargs)
        # Detached: what is run again must not grow a graph of autograd.
        self.calls.append((func, *_pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs, result))))
        return result


class CallRecorder:
    """A `Recorder` for the CPU.

    Parameters
    ----------
    runs
        Whether what was recorded runs again; if not, the deliberate error of a graph that does nothing.
    """

    def __init__(self, runs: bool = True) -> None:
        self._runs = runs
        self._record: _Record | None = None
        self.n_recorded = 0

    def begin(self) -> None:
        self._record = _Record()
        self._record.__enter__()

    def end(self) -> Callable[[], None]:
        assert self._record is not None
        record, self._record = self._record, None
        record.__exit__(None, None, None)
        self.n_recorded += len(record.calls)
        first = [True]

        def run() -> None:
            if first.pop() if first else not self._runs:
                return  # recording has run them already
            with torch.no_grad():
                for func, args, kwargs, result in record.calls:
                    again(func, args, kwargs, result)

        return run

    def abandon(self) -> None:
        if self._record is not None:
            record, self._record = self._record, None
            record.__exit__(None, None, None)

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)


def again(func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Run a call once more, with its result where it was."""
    aliases = [r.alias_info for r in func._schema.returns]
    if func.is_view or (any(aliases) and not any(a.is_write for a in aliases if a)):
        return  # another look at memory that is written elsewhere
    new = func(*args, **kwargs)
    if any(a is not None and a.is_write for a in aliases):
        return
    for place, value in zip(_pytree.tree_leaves(result), _pytree.tree_leaves(new), strict=True):
        if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
            place.copy_(value)


STEPS = WARMUP + 6
LOSSES = {
    "likelihood": {"nll": 1.0},
    "w2": {"nll": 1.0, "w2": 5.0},
    "energy": {"nll": 1.0, "w2": 5.0, "kl": 0.1},
    "energy alone": {"kl": 0.1},
    "buffer": {"buffer": 1.0, "variance": 0.3},
    "path": {"nll": 1.0, "path": 0.1},
}


def stages(name: str, **changes) -> list[Stage]:
    return [Stage(name=name, losses=LossWeights(**LOSSES[name]), steps=STEPS, learning_rate=1e-3, **changes)]


def flow(kit, dropout: float = 0.2):
    return kit.small_flow(conditioner="attention", d_model=8, d_key=4, d_value=8, linear="spline", dropout=dropout)
