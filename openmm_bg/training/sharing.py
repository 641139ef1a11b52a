"""Density, target and coordinates whose work on a joint batch is shared by the processes of a training.

They stand in for the objects that they wrap: arguments and results are those of the joint batch, alike in every
process, gradients included; only the parameters of the flow receive the gradient of the own share, which
`Ranks.sum_gradients` completes. With one process nothing is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from openmm_bg.training.parallel import Gather, ProcessRanks, Ranks, Scatter


class SharedDensity:
    """A flow whose passes are shared.

    Parameters
    ----------
    density
        `openmm_bg.flow.FlowDensity` or its like, the same in every process.
    ranks
        The processes.
    seed
        Of dropout, whose masks differ between processes: the only randomness that depends on their number.
    """

    def __init__(self, density: Any, ranks: ProcessRanks, seed: int) -> None:
        self.density = density
        self.ranks = ranks
        self._seed = seed
        self._step = self._pass = 0

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        return self.density.training

    def train(self) -> None:
        """Dropout on."""
        self.density.train()

    def eval(self) -> None:
        """Dropout off."""
        self.density.eval()

    def begin_step(self, step: int) -> None:
        """The masks of a step depend on its number alone, so that a resumed run draws them again."""
        self._step, self._pass = step, 0

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As the density's `forward`, for joint z [B, D]."""
        return self._pair(self.density.forward, z)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """As the density's, for joint y [B, D]."""
        return self._pair(self.density.inverse, y)

    def log_prob(self, y: Tensor) -> Tensor:
        """[B] of joint y [B, D]."""
        return self._single(self.density.log_prob, y)

    def base_log_prob(self, z: Tensor) -> Tensor:
        """[B] of joint z [B, D]."""
        return self._single(self.density.base_log_prob, z)

    def sample_base(self, n: int) -> Tensor:
        """[n, D], the same in every process: they share the state of torch's generator."""
        return self.density.sample_base(n)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """n joint draws [n, D] and their log q [n]."""
        z = self.sample_base(n)
        y, log_det = self(z)
        return y, self.base_log_prob(z) - log_det

    def _single(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with self._own_dropout(x.device):
            own = function(Scatter.apply(x, self.ranks, None))
        return Gather.apply(own, self.ranks, x.shape[0])

    def _pair(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        with self._own_dropout(x.device):
            moved, log_det = function(Scatter.apply(x, self.ranks, None))
        n = x.shape[0]
        return Gather.apply(moved, self.ranks, n), Gather.apply(log_det, self.ranks, n)

    @contextmanager
    def _own_dropout(self, device: torch.device) -> Iterator[None]:
        """Random numbers of this process inside; the stream that all share is left as it was."""
        if not self.training:
            yield
            return
        self._pass += 1
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            name = f"{self._seed} {self._step} {self._pass} {self.ranks.rank}"
            torch.manual_seed(_digest(name))
            yield


class SharedCoordinates:
    """Coordinates whose reconstruction is shared."""

    def __init__(self, coordinates: Any, ranks: ProcessRanks) -> None:
        self.coordinates = coordinates
        self.ranks = ranks

    def to_positions(self, y: Tensor, s: Tensor) -> Tensor:
        """[B, N, 3] of joint y [B, D] and s [B, S]."""
        own = self.coordinates.to_positions(Scatter.apply(y, self.ranks, None), Scatter.apply(s, self.ranks, None))
        return Gather.apply(own, self.ranks, y.shape[0])


class SharedTarget:
    """A target whose energies are shared: each process evaluates its rows in its own Contexts.

    Attributes
    ----------
    n_energies
        Energies evaluated by all processes together; 0 for a target that does not count.
    """

    def __init__(self, target: Any, ranks: ProcessRanks) -> None:
        self.target = target
        self.ranks = ranks
        self.n_energies = 0

    def log_density(self, y: Tensor, s: Tensor) -> Tensor:
        """[B] of joint y [B, D] and s [B, S]."""
        # NaN is outside every domain: rows that only fill up a share cost no energy.
        nan = float("nan")
        own = self.target.log_density(Scatter.apply(y, self.ranks, nan), Scatter.apply(s, self.ranks, nan))
        self.n_energies = self.ranks.total(int(getattr(getattr(self.target, "pool", None), "n_energies", 0)))
        return Gather.apply(own, self.ranks, y.shape[0])


def share_density(density: Any, ranks: Ranks, seed: int) -> Any:
    """`density` itself, or its shared stand-in if there are several processes."""
    return SharedDensity(density, ranks, seed) if isinstance(ranks, ProcessRanks) else density


def share_target(target: Any, ranks: Ranks) -> Any:
    """As `share_density`; None stays None."""
    return SharedTarget(target, ranks) if isinstance(ranks, ProcessRanks) and target is not None else target


def share_coordinates(coordinates: Any, ranks: Ranks) -> Any:
    """As `share_target`."""
    shared = isinstance(ranks, ProcessRanks) and coordinates is not None
    return SharedCoordinates(coordinates, ranks) if shared else coordinates  # type: ignore[arg-type]


def _digest(text: str) -> int:
    """A seed for every text."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
