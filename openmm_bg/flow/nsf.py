"""The baseline without split and without attention: a plain neural spline flow."""

from collections.abc import Sequence

from torch import Tensor, nn

from openmm_bg.flow.config import FlowConfig
from openmm_bg.flow.coupling import build_stack


class NSF(nn.Module):
    """Coupling layers over all features alike (Durkan et al. 2019); the paper's baseline with 58 of them.

    Parameters
    ----------
    fold
        Of the D features in the order of the arrays, as in `CouplingLayer`.
    positions
        Global coordinate index of each feature.
    config
        `n_joint_blocks` layers, all of them over every feature.
    """

    def __init__(self, fold: Sequence[int], positions: list[int], config: FlowConfig) -> None:
        super().__init__()
        self.stack = build_stack(fold, positions, config.n_joint_blocks, 2, config)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base → data: [D, B] to [D, B] and the log-determinant [B]."""
        return self.stack(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data → base: [D, B] to [D, B] and the log-determinant [B] of this direction."""
        return self.stack.inverse(x)
