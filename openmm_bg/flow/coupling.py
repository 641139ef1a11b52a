"""One coupling layer: half of the features sets the parameters of an invertible map of the other half.

Dinh et al., "Density estimation using Real NVP" (2017), equations 7-8. Arrays are features first,
[features, batch] (see `openmm_bg.flow.splines`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openmm_bg.flow.attention import AttentionConditioner
from openmm_bg.flow.config import FlowConfig
from openmm_bg.flow.mlp import GatedConditioner, MLPConditioner
from openmm_bg.flow.splines import RationalQuadraticSpline, wrap

MAX_LOG_SCALE = 2.0
"""Bound of the log-scale of an affine map: standardised features need less, and nothing overflows."""


class CouplingLayer(nn.Module):
    """Bend the transformed features given the others, which pass unchanged.

    Circular features: v ← v + (S(w) - w) / n with w = n v + φ modulo 2π, n the fold and S a circular spline. A
    spline with tied ends alone would fix ±π; the shift φ moves that point, and with the spline at its start the
    map is the identity whatever φ is. On an n-fold rotor the same map acts on all n branches, so that a symmetric
    density stays symmetric, while the other features may depend on the branch: each hydrogen of a methyl group
    has the angle that belongs to where it stands. Linear features: spline on an interval, or affine,
    y = x e^s + t with s bounded by a tanh.

    `inverse` (data → base), which training by likelihood calls, uses the explicit direction of the spline.

    Parameters
    ----------
    fold
        One number per feature that the layer sees, F of them: 0 for a linear feature, n >= 1 for a circular one with
        n-fold symmetry.
    transformed
        True for the features to bend, False for those that condition.
    positions
        Global coordinate index of each feature, for attention.
    affine
        Affine rather than spline map of the linear features.
    config
        Conditioner, bins and bounds.

    Notes
    -----
    `economical` can run the conditioner in bfloat16 while training. Its parameters, the splines and the
    log-determinants keep their precision.
    """

    conditioning: Tensor
    bent: Tensor
    order: Tensor
    phase: Tensor
    fold: Tensor

    def __init__(
        self,
        fold: Sequence[int],
        transformed: list[bool],
        positions: list[int],
        affine: bool,
        config: FlowConfig,
    ) -> None:
        super().__init__()
        circular = [n > 0 for n in fold]
        features = sorted(range(len(fold)), key=lambda i: circular[i])  # stable: linear first, in order
        given = [i for i in features if not transformed[i]]
        bent = [i for i in features if transformed[i]]
        given_folds = [fold[i] for i in given if circular[i]]
        n_given_linear = len(given) - len(given_folds)
        self.n_linear = sum(not circular[i] for i in bent)
        self.n_circular = len(bent) - self.n_linear
        self.affine = affine
        self.n_bins = config.n_bins
        splined = bent[self.n_linear :] if affine else bent
        self.n_splined = len(splined)
        self.n_affine = len(bent) - len(splined)
        self.max_log_scale = MAX_LOG_SCALE
        self.low_precision = False
        self.spline = RationalQuadraticSpline([circular[i] for i in splined], config.n_bins, config.bound)

        groups = [(self.n_affine, 2), (self.n_splined, 3 * config.n_bins)]
        groups = [group for group in groups if group[0] > 0]
        self.conditioner: nn.Module
        if config.conditioner == "attention":
            self.conditioner = AttentionConditioner(
                positions=[positions[i] for i in given],
                n_linear=n_given_linear,
                folds=given_folds,
                targets=[positions[i] for i in bent],
                group_sizes=[size for size, _ in groups],
                group_params=[n_params for _, n_params in groups],
                d_model=config.d_model,
                d_key=config.d_key,
                d_value=config.d_value,
                dropout=config.dropout,
                n_units=config.n_units,
            )
        else:
            perceptron = GatedConditioner if config.conditioner == "gated" else MLPConditioner
            self.conditioner = perceptron(
                n_linear=n_given_linear,
                folds=given_folds,
                n_rows=sum(size * n_params for size, n_params in groups),
                hidden=config.hidden,
                n_hidden=config.n_hidden,
            )
        # Index buffers are saved with the weights: random masks must come back as they were trained.
        self.register_buffer("conditioning", torch.tensor(given, dtype=torch.long))
        self.register_buffer("bent", torch.tensor(bent, dtype=torch.long))
        self.register_buffer("order", torch.argsort(torch.tensor(given + bent, dtype=torch.long)))
        bent_folds = [float(fold[i]) for i in bent[self.n_linear :]]
        self.register_buffer("fold", torch.tensor(bent_folds, dtype=torch.float64).reshape(-1, 1), persistent=False)
        phase = math.pi * (2.0 * torch.rand(self.n_circular, 1) - 1.0)
        if config.phase_shift == "learned":
            self.phase = nn.Parameter(phase)
        else:
            self.register_buffer("phase", phase)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Base → data: [F, B] to [F, B] and the log-determinant [B]."""
        given = x.index_select(0, self.conditioning)
        z = x.index_select(0, self.bent)
        if torch.jit.is_scripting():
            rows = self.conditioner(given)
        else:
            rows = self._conditioned(given)
        rows = rows.to(x.dtype)
        linear, spline_params, log_scale, offset = self._split(z, rows)
        log_det = log_scale.sum(0)
        parts = [given, linear * log_scale.exp() + offset]
        if self.n_splined > 0:
            before = self._turns(z[self.n_affine :])
            after, log_det_spline = self.spline.inverse(before, spline_params)
            parts.append(self._moved(z[self.n_affine :], before, after))
            log_det = log_det + log_det_spline
        return torch.cat(parts).index_select(0, self.order), log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data → base: [F, B] to [F, B] and the log-determinant [B] of this direction."""
        given = y.index_select(0, self.conditioning)
        z = y.index_select(0, self.bent)
        if torch.jit.is_scripting():
            rows = self.conditioner(given)
        else:
            rows = self._conditioned(given)
        rows = rows.to(y.dtype)
        linear, spline_params, log_scale, offset = self._split(z, rows)
        log_det = -log_scale.sum(0)
        parts = [given, (linear - offset) * (-log_scale).exp()]
        if self.n_splined > 0:
            before = self._turns(z[self.n_affine :])
            after, log_det_spline = self.spline(before, spline_params)
            parts.append(self._moved(z[self.n_affine :], before, after))
            log_det = log_det + log_det_spline
        return torch.cat(parts).index_select(0, self.order), log_det

    def _conditioned(self, given: Tensor) -> Tensor:
        """Rows of parameters, by a network in bfloat16 if that is wanted and this is training."""
        if not (self.low_precision and self.training):
            return self.conditioner(given)
        with torch.autocast(given.device.type, torch.bfloat16, cache_enabled=False):
            return self.conditioner(given)

    def _split(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Affine features, parameters of the spline [3K, F, B], log-scale and offset of the affine map."""
        n = self.n_affine
        batch = z.shape[1]
        spline_params = rows[2 * n :].reshape(3 * self.n_bins, self.n_splined, batch)
        log_scale = self.max_log_scale * torch.tanh(rows[:n] / self.max_log_scale)
        return z[:n], spline_params, log_scale, rows[n : 2 * n]

    def _turns(self, z: Tensor) -> Tensor:
        """What the spline acts on: linear features as they are, and w = n v + φ of the circular ones (the last)."""
        n = z.shape[0] - self.n_circular
        return torch.cat([z[:n], wrap(self.fold.to(z.dtype) * z[n:] + self.phase.to(z.dtype))])

    def _moved(self, z: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The features after the spline took w from `before` to `after`, both in [-π, π) with fixed ends."""
        n = z.shape[0] - self.n_circular
        # The spline fixes ±π, so this difference is continuous on the circle: no branch is ever left.
        return torch.cat([after[:n], wrap(z[n:] + (after[n:] - before[n:]) / self.fold.to(z.dtype))])


class CouplingStack(nn.Module):
    """Coupling layers in a row, listed from the data to the base.

    With `economical` gradients need the input of each layer alone: what lies inside is computed once more in the
    backward pass, with the same dropout.
    """

    def __init__(self, blocks: list[CouplingLayer]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.recompute = False

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base → data: [F, B] to [F, B] and the log-determinant [B]."""
        if not torch.jit.is_scripting():
            if self.recompute and torch.is_grad_enabled():
                return self._recomputed([block.forward for block in reversed(self.blocks)], z)
        log_det = torch.zeros([z.shape[1]], dtype=z.dtype, device=z.device)
        for block in self.blocks[::-1]:
            z, change = block.forward(z)  # not block(z): scripted slices yield no callables
            log_det = log_det + change
        return z, log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data → base: [F, B] to [F, B] and the log-determinant [B] of this direction."""
        if not torch.jit.is_scripting():
            if self.recompute and torch.is_grad_enabled():
                return self._recomputed([block.inverse for block in self.blocks], y)
        log_det = torch.zeros([y.shape[1]], dtype=y.dtype, device=y.device)
        for block in self.blocks:
            y, change = block.inverse(y)  # type: ignore[operator]
            log_det = log_det + change
        return y, log_det

    def _recomputed(self, passes: list, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros([x.shape[1]], dtype=x.dtype, device=x.device)
        for one in passes:
            x, change = checkpoint(one, x, use_reentrant=False)
            log_det = log_det + change
        return x, log_det


@contextmanager
def economical(flow: nn.Module, *, recompute: bool, bfloat16: bool) -> Iterator[None]:
    """Train `flow` with less memory or less time inside; afterwards it computes as before.

    Parameters
    ----------
    recompute
        Gradient checkpointing: each coupling layer is passed a second time in the backward pass, instead of keeping
        what is inside it. Gradients are the same.
    bfloat16
        Conditioners compute in bfloat16 while the flow is in training mode, and only then: not in samples and weights.
    """
    stacks = [module for module in flow.modules() if isinstance(module, CouplingStack)]
    layers = [module for module in flow.modules() if isinstance(module, CouplingLayer)]
    try:
        for stack in stacks:
            stack.recompute = recompute
        for layer in layers:
            layer.low_precision = bfloat16
        yield
    finally:
        for stack in stacks:
            stack.recompute = False
        for layer in layers:
            layer.low_precision = False


def alternating_masks(n_features: int, n_blocks: int, generator: torch.Generator) -> list[list[bool]]:
    """Which features each of `n_blocks` successive layers transforms.

    Layers come in pairs with complementary masks, so that every feature is transformed equally often. The
    first pair alternates even and odd features, the second the first and second half. Each further pair splits
    at random, and evenly, every group of features that no mask has told apart yet, so that after about log2(n)
    pairs each feature has conditioned each other one; then a new round begins. A single feature is transformed
    by every layer.
    """
    if n_features == 1:
        return [[True] for _ in range(n_blocks)]
    masks: list[list[bool]] = []
    codes = [0] * n_features  # equal codes: always in the same half so far
    for pair in range((n_blocks + 1) // 2):
        if pair == 0:
            mask = [i % 2 == 0 for i in range(n_features)]
        elif pair == 1:
            mask = [i < n_features // 2 for i in range(n_features)]
        else:
            if len(set(codes)) == n_features:
                codes = [0] * n_features
            chance = torch.rand(n_features, generator=generator).tolist()
            mask = [False] * n_features
            for rank, i in enumerate(sorted(range(n_features), key=lambda i: (codes[i], chance[i]))):
                mask[i] = rank % 2 == 0
        codes = [2 * code + bit for code, bit in zip(codes, mask, strict=True)]
        masks += [mask, [not bit for bit in mask]]
    return masks[:n_blocks]


def build_stack(
    fold: Sequence[int], positions: list[int], n_blocks: int, n_spline_blocks: int, config: FlowConfig
) -> CouplingStack:
    """`n_blocks` coupling layers over the given features (none if there are no features).

    Masks and initial weights come from torch's global generator. With the mixed transform the first
    `n_spline_blocks` layers, those nearest to the data, bend linear features by splines and the others by
    affine maps.
    """
    if not fold:
        return CouplingStack([])
    generator = torch.Generator()
    generator.manual_seed(int(torch.randint(2**31, ())))
    blocks = []
    for i, mask in enumerate(alternating_masks(len(fold), n_blocks, generator)):
        affine = config.linear == "affine" or (config.linear == "mixed" and i >= n_spline_blocks)
        blocks.append(CouplingLayer(fold, mask, positions, affine, config))
    return CouplingStack(blocks)
