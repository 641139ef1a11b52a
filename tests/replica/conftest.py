"""A flow for a higher temperature than that of the one that ships."""

import numpy as np
import pytest
import torch

from openmm_bg.artifact import Flow


class Bent(torch.nn.Module):
    """A flow followed by a map of its own: linear coordinates widened, circular ones bent by a Möbius map.

    Stands for a flow trained at a higher temperature. `bend` is known in closed form, so that f is too.
    """

    def __init__(self, density, layout, widen, stretch):
        super().__init__()
        self.density, self.widen, self.stretch = density, widen, stretch
        self.shift = torch.tensor(layout.shift)
        self.linear = ~torch.tensor(layout.circular)
        self.bent = torch.tensor([c and n == 1 for c, n in zip(layout.circular, layout.fold, strict=True)])

    def bend(self, y, inverse=False):
        """(y', log |det|)."""
        k, c = (1 / self.widen, 1 / self.stretch) if inverse else (self.widen, self.stretch)
        half = 0.5 * y
        circle = 2 * torch.atan2(c * torch.sin(half), torch.cos(half))
        slope = c / (torch.cos(half) ** 2 + (c * torch.sin(half)) ** 2)
        out = torch.where(self.linear, self.shift + k * (y - self.shift), torch.where(self.bent, circle, y))
        det = torch.where(self.bent, slope.log(), 0.0).sum(-1) + self.linear.sum() * np.log(k)
        return out, det

    def forward(self, z):
        y, log_det = self.density(z)
        out, det = self.bend(y)
        return out, log_det + det

    def inverse(self, y):
        inner, det = self.bend(y, inverse=True)
        z, log_det = self.density.inverse(inner)
        return z, log_det + det

    def log_prob(self, y):
        z, log_det = self.inverse(y)
        return self.density.base_log_prob(z) + log_det

    def base_log_prob(self, z):
        return self.density.base_log_prob(z)

    def sample_base(self, n):
        return self.density.sample_base(n)

    def sample(self, n):
        z = self.sample_base(n)
        y, log_det = self.forward(z)
        return y, self.base_log_prob(z) - log_det


@pytest.fixture(scope="session")
def hot_flow():
    """(flow, widen, stretch) to a flow that is wider by a factor, with its circular coordinates bent."""

    def build(flow, widen=(350.0 / 300.0) ** 0.5, stretch=1.0):
        return Flow(Bent(flow.density, flow.coordinates.layout, widen, stretch), flow.coordinates, flow.metadata)

    return build
