"""The latent side of a sampler's flow: moves (F, G) and annealing (H) with s frozen walk in its base variables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_bg.sampler import CHUNK, FEW, BoltzmannGeneratorSampler

FloatArray = NDArray[np.float64]


class LatentSpace:
    """The latent side of a sampler's flow on arrays: z, its base density b, and the map to y.

    Parameters
    ----------
    sampler
        Whose flow and device are used.
    """

    def __init__(self, sampler: BoltzmannGeneratorSampler) -> None:
        self.sampler = sampler

    @property
    def base(self) -> dict[str, Any]:
        """``circular``, ``concentration`` and ``fold`` of the base, as `metropolis.latent_proposal` wants them."""
        layout = self.sampler.coordinates.layout
        return {"circular": layout.circular, "concentration": layout.concentration, "fold": layout.fold}

    def _parts(self, z: FloatArray) -> list[Tensor]:
        return list(torch.from_numpy(np.ascontiguousarray(z)).to(self.sampler.device).split(CHUNK))

    def log_base(self, z: FloatArray) -> FloatArray:
        """log b(z) [n] of z [n, D]."""
        density = self.sampler.flow.density
        with torch.no_grad():
            values = [density.base_log_prob(part).cpu() for part in self._parts(z)]  # type: ignore[operator]
        return torch.cat(values).numpy()

    def forward(self, z: FloatArray) -> tuple[Tensor, Tensor]:
        """y = f(z) [n, D] and log |det dy/dz| [n] of z [n, D], float64 on the CPU."""
        with torch.no_grad(), torch.jit.optimized_execution(len(z) > FEW):
            pairs = [self.sampler.flow.forward(part) for part in self._parts(z)]
        y, log_det = (torch.cat(column).to("cpu", torch.float64) for column in zip(*pairs, strict=True))
        return y, log_det

    def inverse(self, y: Tensor) -> FloatArray:
        """z [n, D] of y [n, D]."""
        with torch.no_grad(), torch.jit.optimized_execution(len(y) > FEW):
            z, _ = self.sampler.flow.inverse(y.to(self.sampler.device, torch.float64))
        return z.to("cpu", torch.float64).numpy()

    def draw(self, n: int, rng: np.random.Generator) -> FloatArray:
        """n draws z ~ b, [n, D]; torch's global generator is left as it was."""
        device = self.sampler.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(rng.integers(2**62)))
            z = self.sampler.flow.density.sample_base(n)  # type: ignore[operator]
        return z.to("cpu", torch.float64).numpy()
