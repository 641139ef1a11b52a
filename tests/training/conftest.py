"""Small flows, data and targets for the training tests."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openmm_bg.flow import FeatureLayout, FlowConfig, build_flow
from openmm_bg.training import Dataset, Stage, TrainingConfig


class AffineDensity(nn.Module):
    """y = mean + exp(log_scale) z with a standard normal base: every gradient is known in closed form."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n_features = n
        self.mean = nn.Parameter(torch.zeros(n))
        self.log_scale = nn.Parameter(torch.zeros(n))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mean + self.log_scale.exp() * z
        return y.to(z.dtype), self.log_scale.sum().to(z.dtype).expand(z.shape[0])

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        z = (y - self.mean) / self.log_scale.exp()
        return z.to(y.dtype), -self.log_scale.sum().to(y.dtype).expand(y.shape[0])

    def base_log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)

    def log_prob(self, y: Tensor) -> Tensor:
        z, logdet = self.inverse(y)
        return self.base_log_prob(z) + logdet

    def sample_base(self, n: int) -> Tensor:
        return torch.randn(n, self.n_features, dtype=torch.float64)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        z = self.sample_base(n)
        y, logdet = self.forward(z)
        return y, self.base_log_prob(z) - logdet


class GaussianTarget:
    """log π = -½ Σ ((y - mean)/scale)², not normalised; -inf where y_0 exceeds `wall`."""

    def __init__(self, mean: list[float], scale: list[float], wall: float = math.inf) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.scale = torch.tensor(scale, dtype=torch.float64)
        self.wall = wall
        self.coordinates = PlaneCoordinates()

    def log_density(self, y: Tensor, s: Tensor) -> Tensor:
        value = -0.5 * ((y - self.mean) / self.scale).square().sum(dim=1)
        return torch.where(y[:, 0] < self.wall, value, -torch.inf)


class PlaneCoordinates:
    """Three atoms: at the origin, at (y_0, 0, 0) and at (0, y_1, 0)."""

    def to_positions(self, y: Tensor, s: Tensor) -> Tensor:
        zero = torch.zeros_like(y[:, 0])
        atoms = [[zero, zero, zero], [y[:, 0], zero, zero], [zero, y[:, 1], zero]]
        return torch.stack([torch.stack(atom, dim=1) for atom in atoms], dim=1)


LAYOUT = FeatureLayout(
    circular=[True, True, False],
    backbone=[True, False, True],
    fold=[1, 3, 1],
    concentration=[1.0, 0.0, 0.0],
    shift=[0.3, 0.0, 1.0],
    scale=[1.0, 1.0, 0.2],
)


class TorsionTarget:
    """Two torsions and a length; smooth, periodic, threefold in the second torsion."""

    coordinates = PlaneCoordinates()

    def log_density(self, y: Tensor, s: Tensor) -> Tensor:
        torsions = 1.5 * torch.cos(y[:, 0] - 0.5) + 0.8 * torch.cos(3 * y[:, 1])
        return torsions - 0.5 * ((y[:, 2] - 1.0 - 0.1 * torch.cos(y[:, 0])) / 0.2).square()


def torsion_data(n: int, seed: int = 0) -> Dataset:
    """n exact and independent frames of `TorsionTarget`, by rejection."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.empty(0, 3, dtype=torch.float64)
    while y.shape[0] < n:
        angles = (torch.rand(4 * n, 2, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi
        log_p = 1.5 * torch.cos(angles[:, 0] - 0.5) + 0.8 * torch.cos(3 * angles[:, 1]) - 2.3
        angles = angles[torch.rand(4 * n, generator=generator, dtype=torch.float64) < log_p.exp()]
        length = torch.randn(angles.shape[0], generator=generator, dtype=torch.float64) * 0.2
        length = length + 1.0 + 0.1 * torch.cos(angles[:, 0])
        y = torch.cat([y, torch.cat([angles, length[:, None]], dim=1)])
    return Dataset(y[:n], torch.full((n, 1), 0.11, dtype=torch.float64))


def small_flow(seed: int = 0, **changes: Any) -> nn.Module:
    config = {"n_backbone_blocks": 2, "n_joint_blocks": 2, "hidden": 16, "n_hidden": 1, **changes}
    return build_flow(LAYOUT, FlowConfig.preset("cpu", **config), seed)


def small_config(stages: list[Stage], **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "batch_size": 64, "sample_batch": 32, "w2_data_batch": 128, "validate_every": 10,
        "validation_frames": 100, "ema_decay": 0.9, "checkpoint_seconds": 1e6,
        "buffer": {"draw_size": 64, "draw_every": 3, "n_batches": 3},
    }  # fmt: skip
    return TrainingConfig(**{**settings, **changes}, stages=stages)


@pytest.fixture
def kit() -> SimpleNamespace:
    """Builders shared by the tests of this folder."""
    return SimpleNamespace(
        AffineDensity=AffineDensity, GaussianTarget=GaussianTarget, PlaneCoordinates=PlaneCoordinates,
        TorsionTarget=TorsionTarget, layout=LAYOUT, torsion_data=torsion_data, small_flow=small_flow,
        small_config=small_config,
    )  # fmt: skip
