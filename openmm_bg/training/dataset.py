"""Training data: internal coordinates with weights, split in blocks of time, drawn reproducibly."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor

from openmm_bg.errors import InputError


class Dataset:
    """Frames of a trajectory in internal coordinates.

    Parameters
    ----------
    y
        [n, D] modelled coordinates, in the order of time (the split relies on it).
    s
        [n, S] the coordinates that the flow does not model; none if left out.
    log_weights
        [n] of frames from a biased or tempered run, up to a constant; equal weights if left out.
    positions
        [n, N, 3] nm, for the W2 loss; if left out it rebuilds them from y and s.

    Raises
    ------
    InputError
        For no frames, lengths that differ, and numbers that are not finite. A log-weight of -inf is allowed.
    """

    def __init__(
        self,
        y: Tensor,
        s: Tensor | None = None,
        log_weights: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        y = torch.as_tensor(y)
        if y.ndim != 2 or y.shape[0] == 0 or y.shape[1] == 0:
            raise InputError(
                f"The training data must be frames x coordinates with at least one of each, got shape {tuple(y.shape)}."
            )
        n = y.shape[0]
        self.y = y.detach().double()
        self.s = self.y.new_zeros((n, 0)) if s is None else torch.as_tensor(s).detach().double()
        self.log_weights = None if log_weights is None else torch.as_tensor(log_weights).detach().double()
        self.positions = None if positions is None else torch.as_tensor(positions).detach()
        shapes: list[tuple[str, Tensor | None, int]] = [
            ("y", self.y, 2), ("s", self.s, 2), ("log_weights", self.log_weights, 1),
            ("positions", self.positions, 3),
        ]  # fmt: skip
        for name, values, ndim in shapes:
            if values is None:
                continue
            if values.ndim != ndim or values.shape[0] != n:
                raise InputError(
                    f"The training data hold {n} frames but {name} has shape {tuple(values.shape)}, give one "
                    "row per frame."
                )
            if name == "log_weights":
                bad = torch.isnan(values) | (values == torch.inf)
            else:
                bad = ~torch.isfinite(values).flatten(1).all(dim=1)
            if bool(bad.any()):
                raise InputError(
                    f"{int(bad.sum())} of {n} training frames have a value of {name} that is not finite, the "
                    f"first is frame {int(bad.nonzero()[0])}; remove them."
                )
        if self.log_weights is not None and bool(torch.isneginf(self.log_weights).all()):
            raise InputError("All training frames have weight zero, check log_weights.")

    def __len__(self) -> int:
        return self.y.shape[0]

    @property
    def n_modelled(self) -> int:
        """Number of modelled coordinates D."""
        return self.y.shape[1]

    @property
    def s_is_constant(self) -> bool:
        """Whether every frame has the same s, as in the full representation (constrained lengths only)."""
        return bool((self.s == self.s[:1]).all())

    @property
    def weights(self) -> Tensor | None:
        """[n] weights with mean 1, or None for equal ones."""
        if self.log_weights is None:
            return None
        return torch.softmax(self.log_weights, dim=0) * len(self)

    def __getitem__(self, index: Tensor) -> Dataset:
        """The frames of `index`."""
        return Dataset(
            self.y[index],
            self.s[index],
            None if self.log_weights is None else self.log_weights[index],
            None if self.positions is None else self.positions[index],
        )

    def to(self, device: torch.device | str) -> Dataset:
        """The same frames on another device."""
        if torch.device(device) == self.y.device:
            return self
        return Dataset(
            self.y.to(device),
            self.s.to(device),
            None if self.log_weights is None else self.log_weights.to(device),
            None if self.positions is None else self.positions.to(device),
        )

    def split(
        self, validation_fraction: float = 0.1, n_blocks: int = 20, seed: int = 0
    ) -> tuple[Dataset, Dataset | None]:
        """Training and validation frames (None for fraction 0).

        The trajectory is cut into contiguous blocks and whole blocks are held out at random: neighbouring
        frames of MD are alike, so frames held out one by one would be known from their neighbours.
        """
        n = len(self)
        if validation_fraction == 0.0:
            return self, None
        n_blocks = min(n_blocks, n)
        n_held = max(1, round(validation_fraction * n_blocks))
        if n_held >= n_blocks:
            raise InputError(
                f"{n} training frames cannot be split with a validation fraction of {validation_fraction}, "
                "give more frames or a smaller fraction."
            )
        generator = torch.Generator().manual_seed(seed)
        held = torch.randperm(n_blocks, generator=generator)[:n_held]
        block = torch.arange(n) * n_blocks // n
        mask = torch.isin(block, held)
        return self[(~mask).nonzero()[:, 0]], self[mask.nonzero()[:, 0]]

    def require(self, n: int, purpose: str) -> None:
        """Raise InputError unless there are `n` frames for `purpose`."""
        if len(self) < n:
            raise InputError(
                f"The {purpose} needs {n} training frames and there are {len(self)}, give more frames or a "
                "smaller batch."
            )

    def fingerprint(self) -> str:
        """Digest of shapes, weights and up to 4096 frames: tells one data set from another on resuming."""
        rows = spread(len(self), 4096)
        digest = hashlib.sha256(repr((tuple(self.y.shape), tuple(self.s.shape))).encode())
        for values in (self.y, self.s, self.log_weights):
            if values is not None:
                digest.update(values[rows].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def spread(n: int, most: int) -> Tensor:
    """At most `most` indices below n, evenly spaced."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()


def cumulative_weights(log_weights: Tensor | None) -> Tensor | None:
    """[n] running sum of the normalised weights, float64 on the CPU; None for equal weights."""
    return None if log_weights is None else torch.softmax(log_weights.double().cpu(), dim=0).cumsum(dim=0)


def draw_indices(n: int, size: int, generator: torch.Generator, cumulative: Tensor | None = None) -> Tensor:
    """[size] indices below n, with replacement; by inversion, for torch.multinomial stops at 2^24 classes."""
    if cumulative is None:
        return torch.randint(n, (size,), generator=generator)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, uniform, right=True).clamp_(max=n - 1)


class MinibatchSampler:
    """Endless minibatches of indices, whose state goes into a checkpoint.

    Without weights (or with ``weighting="loss"``) every frame comes once per epoch, in a new order each time,
    and a batch may run over into the next epoch. With ``weighting="resample"`` batches are drawn with
    replacement, with the weights as probabilities.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        log_weights: Tensor | None = None,
        weighting: Literal["resample", "loss"] = "resample",
        seed: int = 0,
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self._cumulative = cumulative_weights(log_weights if weighting == "resample" else None)
        self._generator = torch.Generator().manual_seed(seed)
        self._shuffle()

    def _shuffle(self) -> None:
        # The order of an epoch is rebuilt from the generator's state at its start: the state stays small.
        self._epoch_state = self._generator.get_state()
        self._position = 0
        self._order = torch.randperm(self.n, generator=self._generator) if self._cumulative is None else None

    def next(self, size: int | None = None) -> Tensor:
        """[size] indices, `batch_size` of them if no size is given."""
        size = self.batch_size if size is None else size
        if self._cumulative is not None:
            return draw_indices(self.n, size, self._generator, self._cumulative)
        parts = []
        while size > 0:
            assert self._order is not None
            if self._position == self.n:
                self._shuffle()
            part = self._order[self._position : self._position + size]
            self._position += part.numel()
            size -= part.numel()
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Generator state (uint8 tensor) and position within the epoch."""
        if self._cumulative is not None:
            return {"generator": self._generator.get_state(), "position": 0}
        return {"generator": self._epoch_state, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._generator.set_state(state["generator"])
        if self._cumulative is None:
            self._shuffle()
            self._position = int(state["position"])
