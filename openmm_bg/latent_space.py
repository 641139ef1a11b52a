"""The latent side of a flow on arrays: draws z ~ b from a numpy generator, z → y and y → z with their densities.

What proposals (D, E), latent moves (F, G) and annealing (H) have in common. The draws come from the caller's own
generator: torch has one for the whole process, and seeding it anew for each draw takes longer than a small molecule's
energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_bg.artifact import Flow

FloatArray = NDArray[np.float64]

#: Frames handled at once: bounds the memory of the flow's intermediates, whatever n a user asks for.
CHUNK = 4096
#: Batches up to this size run TorchScript without its profiling executor, which would recompile for seconds first.
FEW = 64


class LatentSpace:
    """z, its base density b, and the map between z and y, in float64 on the CPU whatever the flow's device.

    Parameters
    ----------
    flow
        Whose density and layout are used.
    device
        Where its parameters are.
    """

    def __init__(self, flow: Flow, device: torch.device) -> None:
        self.flow, self.device = flow, device
        layout = flow.coordinates.layout
        self.base: dict[str, Any] = {
            "circular": np.array(layout.circular, dtype=np.bool_),
            "concentration": np.array(layout.concentration, dtype=np.float64),
            "fold": np.array(layout.fold, dtype=np.float64),
        }
        self._linear = np.flatnonzero(~self.base["circular"])
        self._circle = np.flatnonzero(self.base["circular"])
        self._concentration = self.base["concentration"][self._circle]
        self._fold = self.base["fold"][self._circle]
        parts = [part for part in (flow.density, flow.completion) if part is not None]
        self._watched = [m for part in parts for m in part.modules() if m is part or "Dropout" in _class_name(m)]

    def eval(self) -> None:
        """Dropout off if somebody has switched it on. `Flow.eval` visits every module, for a tenth of a flow pass."""
        if any(module.training for module in self._watched):
            self.flow.eval()

    def draw(self, n: int, rng: np.random.Generator) -> FloatArray:
        """n draws z ~ b, [n, D]: normal, von Mises (uniform at κ = 0), and for n-fold angles a branch at random."""
        z = np.empty((n, len(self.base["circular"])))
        z[:, self._linear] = rng.standard_normal((n, len(self._linear)))
        angle = rng.vonmises(0.0, self._concentration, (n, len(self._circle)))
        branch = np.floor(self._fold * rng.random(angle.shape))
        # The remainder of a tiny negative number rounds to 2π.
        turned = np.mod((angle + 2.0 * np.pi * branch) / self._fold + np.pi, 2.0 * np.pi)
        z[:, self._circle] = np.where(turned >= 2.0 * np.pi, 0.0, turned) - np.pi
        return z

    def sample(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """n samples y [n, D] and log q [n]."""
        z = self.draw(n, rng)
        y, log_det = self.forward(z)
        return y, torch.from_numpy(self.log_base(z)) - log_det

    # No pass runs in torch.inference_mode, a fifth faster: TorchScript keeps constants of it, with which the same
    # process can compute no gradient any more.

    def log_base(self, z: FloatArray) -> FloatArray:
        """log b(z) [n] of z [n, D]."""
        density = self.flow.density
        with torch.no_grad():
            values = [density.base_log_prob(part) for part in self._parts(z)]  # type: ignore[operator]
        return _joined(values).numpy()

    def forward(self, z: FloatArray) -> tuple[Tensor, Tensor]:
        """y = f(z) [n, D] and log |det dy/dz| [n] of z [n, D]."""
        with torch.no_grad(), torch.jit.optimized_execution(len(z) > FEW):
            pairs = [self.flow.forward(part) for part in self._parts(z)]
        y, log_det = zip(*pairs, strict=True)
        return _joined(y), _joined(log_det)

    def inverse(self, y: Tensor) -> tuple[FloatArray, Tensor]:
        """z [n, D] and log q(y) [n] of y [n, D]."""
        with torch.no_grad(), torch.jit.optimized_execution(len(y) > FEW):
            z, log_det = self.flow.inverse(y.to(self.device, torch.float64))
            log_q = self.flow.density.base_log_prob(z) + log_det  # type: ignore[operator]
        return _joined([z]).numpy(), _joined([log_q])

    def _parts(self, z: FloatArray) -> tuple[Tensor, ...]:
        return torch.from_numpy(np.ascontiguousarray(z, dtype=np.float64)).to(self.device).split(CHUNK)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).to("cpu", torch.float64)


def _class_name(module: torch.nn.Module) -> str:
    """Name of a module's class, also of one that TorchScript has compiled."""
    return str(getattr(module, "original_name", type(module).__name__))
