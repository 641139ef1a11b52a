"""Several processes that train one flow together, as `torchrun` starts them; alone where nothing started several.

Every process draws the same joint batch from the same random numbers. What costs, passes through the flow, energies and
positions, is done for the rows of one's own share, and the results are gathered, so that each loss is that of the joint
batch, medians and W2 included, and not an average over processes.
"""

from __future__ import annotations

import datetime
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from openmm_bg.errors import BGError, InputError

logger = logging.getLogger(__name__)

#: Seconds after which a process that does not answer counts as lost.
TIMEOUT = 300.0
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and its like set

T = TypeVar("T")


class RankLost(BGError, RuntimeError):
    """Another process of the training ended, or did not answer in time."""


class Ranks:
    """The processes of a training as one of them sees them; this class is the only one of its kind.

    Attributes
    ----------
    rank, size
        Number of this process and of all.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the processes, the same list in all of them."""
        return [float(value) for value in values]

    def total(self, count: int) -> int:
        """Sum of a count over the processes."""
        return count

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Sum the gradients of shares, in place: that of the joint batch."""

    def align(self, module: nn.Module) -> None:
        """Give a module everywhere the parameters and buffers that it has in the main process."""

    def from_main(self, function: Callable[[], T]) -> T:
        """Result, or exception, of a function that the main process alone calls."""
        return function()

    def require_same(self, text: str, what: str) -> None:
        """Raise InputError in all processes if they do not bring the same text."""

    def first_to_fail(self) -> bool:
        """Whether no other process has told the user of a failure yet."""
        return True


class ProcessRanks(Ranks):
    """The processes of torch's default group, which must exist.

    Parameters
    ----------
    store
        Shared by the processes, outlives each of them: through it the first that fails tells the others.
    """

    def __init__(self, store: Any = None) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._store = store
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # whatever gloo and NCCL say of a lost connection or a time that ran out
            # The first sentence, without the line of source that gloo puts before it.
            reason = re.sub(r"^\[\S+\]\s*", "", str(error).strip() or type(error).__name__).split(". ")[0].rstrip(".")
            raise RankLost(
                f"Process {self.rank} of {self.size} lost the others, one of which failed or does not answer "
                f"({' '.join(reason.split())}); the last checkpoint is intact, start all of them again to resume."
            ) from error

    def agree(self, values: Sequence[float]) -> list[float]:
        together = torch.tensor([float(value) for value in values], dtype=torch.float64)
        with self._together():
            self._dist.all_reduce(together, op=self._dist.ReduceOp.MAX)
        return together.tolist()

    def total(self, count: int) -> int:
        together = torch.tensor(count, dtype=torch.int64)
        with self._together():
            self._dist.all_reduce(together)
        return int(together)

    def sum_gradients(self, gradients: list[Tensor]) -> None:  # of the same parameters everywhere: one joint loss
        for dtype in sorted({g.dtype for g in gradients}, key=str):
            mine = [g for g in gradients if g.dtype == dtype]
            # One message for all of them: each alone would cost its latency.
            joint = torch.cat([g.reshape(-1) for g in mine])
            with self._together():
                self._dist.all_reduce(joint)
            parts = joint.split([g.numel() for g in mine])
            torch._foreach_copy_(mine, [part.view_as(g) for part, g in zip(parts, mine, strict=True)])

    def align(self, module: nn.Module) -> None:
        state = self.from_main(lambda: {name: value.cpu() for name, value in module.state_dict().items()})
        module.load_state_dict(state)

    def from_main(self, function: Callable[[], T]) -> T:
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except BaseException as error:
                outcome[1] = error if _pickles(error) else RankLost(f"Process 0 failed ({error}).")
                if not isinstance(error, Exception):
                    raise
        with self._together():
            self._dist.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def require_same(self, text: str, what: str) -> None:
        found: list[Any] = [None] * self.size
        with self._together():
            self._dist.all_gather_object(found, text)
        others = [rank for rank, other in enumerate(found) if other != found[0]]
        if others:
            raise InputError(f"Process {others[0]} has other {what} than process 0: start all with the same input.")

    def first_to_fail(self) -> bool:
        if self._store is None:
            return self.is_main
        with suppress(RuntimeError):  # the store is gone with the process that kept it: better told twice than never
            return int(self._store.add("failures", 1)) == 1
        return True

    # --- rows of a joint batch ------------------------------------------------------------------------------

    def own_rows(self, joint: Tensor, fill: float | None = None) -> Tensor:
        """This process's share of the rows, equally many in each process: beyond the end `fill`, or the last row."""
        n = joint.shape[0]
        rows = -(-n // self.size)
        start = min(self.rank * rows, n)
        own = joint[start : start + rows]
        missing = rows - own.shape[0]
        if missing:
            rest = joint[-1:] if fill is None else torch.full_like(joint[-1:], fill)
            own = torch.cat([own, rest.expand(missing, *joint.shape[1:])])
        return own.contiguous()

    def all_rows(self, own: Tensor, n: int) -> Tensor:
        """The first n rows of everybody's shares in a row."""
        own = own.contiguous()
        shares = [torch.empty_like(own) for _ in range(self.size)]
        with self._together():
            self._dist.all_gather(shares, own)
        return torch.cat(shares)[:n]


class Scatter(torch.autograd.Function):
    """Own rows of a joint batch; gradients of all shares come back joined, the same in every process."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor, ranks: ProcessRanks, fill: float | None) -> Tensor:
        ctx.ranks, ctx.n = ranks, joint.shape[0]
        return ranks.own_rows(joint, fill)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.all_rows(gradient, ctx.n), None, None


class Gather(torch.autograd.Function):
    """The joint batch from everybody's rows.

    What follows is computed alike in every process, so the joint gradient is there already: its own rows go back.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: ProcessRanks, n: int) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_rows(own, n)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.own_rows(gradient, 0.0), None, None


@contextmanager
def joined(device: str | torch.device = "cpu", timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The processes that `torchrun` started, joined for the time of the body; this one alone without it.

    Tensors on the CPU go through gloo, those on a GPU through NCCL, one device for each local rank. A group that exists
    already is used and left as it is.

    Parameters
    ----------
    device
        Where the flow is trained, "cpu" or "cuda".
    timeout
        Seconds that a process waits for the others.

    Raises
    ------
    InputError
        More processes than GPUs on this machine.
    RankLost
        The others do not show up.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        yield ProcessRanks() if dist.get_world_size() > 1 else Ranks()
        return
    if not all(name in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
        return
    backend = "gloo"
    if str(device).startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"Local process {local} has no GPU of its own, this machine has {torch.cuda.device_count()}: "
                "start as many processes."
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size,
                                timeout=limit)  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise RankLost(f"The processes of this training did not find each other within {timeout:.0f} s.") from error
    ranks = ProcessRanks(dist.PrefixStore("openmm_bg", store))
    logger.info("%d processes share every batch.", size)
    try:
        yield ranks
    except BaseException:
        if backend == "gloo":  # NCCL would wait for those that are no longer there
            with suppress(RuntimeError):
                dist.destroy_process_group()  # who waits for this process learns at once that it is gone
        raise
    dist.destroy_process_group()


@contextmanager
def joined_to_tell_once(device: str | torch.device = "cpu") -> Iterator[Ranks]:
    """`joined` for commands: an error that a process has told the user ends the others without a word (status 1)."""
    with joined(device) as ranks:
        try:
            yield ranks
        except BGError:
            if not ranks.first_to_fail():
                raise SystemExit(1) from None
            raise


def _pickles(value: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True
