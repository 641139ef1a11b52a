"""The split flow: a deep stack on the backbone channel, a shallow one on both channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_bg.flow.config import FlowConfig
from openmm_bg.flow.coupling import build_stack

N_SPLINE_BLOCKS = 2
"""Layers nearest to the data that spline the linear features in the mixed transform: one pair of masks."""


class SplitFlow(nn.Module):
    """Kim et al. (2024): z = [z_bb, z_sc] → x, each channel with its own depth.

    A density is evaluated from the data to the base: the backbone features pass the backbone blocks, the
    result is joined with the side-chain features, and all pass the joint blocks. A sample leaves through the
    inverse: joint blocks first, then backbone blocks.

    The joint blocks couple both channels, so the marginal density of the backbone is **not** available in
    closed form: there is no backbone-only likelihood, and integrating the side chains out needs Monte Carlo.

    A channel may be empty. Without side chains the backbone passes both stacks; without a backbone there are
    no backbone blocks.

    Parameters
    ----------
    fold
        Of the D features in the order of the arrays, as in `CouplingLayer`.
    backbone
        Flags of the D features.
    positions
        Global coordinate index of each feature.
    config
        Numbers of blocks and everything about one block.
    """

    backbone: Tensor
    side_chain: Tensor
    order: Tensor

    def __init__(self, fold: Sequence[int], backbone: list[bool], positions: list[int], config: FlowConfig) -> None:
        super().__init__()
        first = [i for i, is_backbone in enumerate(backbone) if is_backbone]
        second = [i for i, is_backbone in enumerate(backbone) if not is_backbone]
        both = first + second
        self.n_backbone = len(first)
        self.backbone_blocks = build_stack(
            [fold[i] for i in first],
            [positions[i] for i in first],
            config.n_backbone_blocks,
            N_SPLINE_BLOCKS,
            config,
        )
        # The joint blocks are nearest to the data for the side chains, or for all if nothing precedes them.
        nearest = bool(second) or len(self.backbone_blocks.blocks) == 0
        self.joint_blocks = build_stack(
            [fold[i] for i in both],
            [positions[i] for i in both],
            config.n_joint_blocks,
            N_SPLINE_BLOCKS if nearest else 0,
            config,
        )
        self.register_buffer("backbone", torch.tensor(first, dtype=torch.long), persistent=False)
        self.register_buffer("side_chain", torch.tensor(second, dtype=torch.long), persistent=False)
        order = torch.argsort(torch.tensor(both, dtype=torch.long))
        self.register_buffer("order", order, persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base → data: [D, B] to [D, B] and the log-determinant [B]."""
        both = torch.cat([z.index_select(0, self.backbone), z.index_select(0, self.side_chain)])
        both, log_det_joint = self.joint_blocks(both)
        first, log_det = self.backbone_blocks(both[: self.n_backbone])
        x = torch.cat([first, both[self.n_backbone :]]).index_select(0, self.order)
        return x, log_det + log_det_joint

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data → base: [D, B] to [D, B] and the log-determinant [B] of this direction."""
        first, log_det = self.backbone_blocks.inverse(x.index_select(0, self.backbone))
        both = torch.cat([first, x.index_select(0, self.side_chain)])
        both, log_det_joint = self.joint_blocks.inverse(both)
        return both.index_select(0, self.order), log_det + log_det_joint
