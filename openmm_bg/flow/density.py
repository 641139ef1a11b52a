"""The whole flow as a normalised density of the modelled coordinates y: what is trained and exported."""

import math

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError
from openmm_bg.flow.base import BaseDensity
from openmm_bg.flow.layout import FeatureLayout
from openmm_bg.flow.splines import wrap

CPU_VALUES = 32_768
"""Coordinates that pass the flow at a time on a CPU where no gradient is wanted. What the layers make of more outgrows
what the allocator keeps, and mapping that memory anew for every layer costs as much as the arithmetic."""


class FlowDensity(nn.Module):
    """Standardisation, cuts and folds around an inner flow, with its base density.

    Linear coordinates: y = shift + scale ŷ. Circular ones, fold n and centre c: the inner flow maps z to v on the
    same branch of the rotor, and y = wrap(v + c / n).

    The density is exact whatever the parameters (q_θ of formulas A-J of `docs/theory.md`), provided dropout
    is off: call `eval()` before likelihoods, weights or moves. Scriptable by `torch.jit.script`.

    Parameters
    ----------
    layout
        The D coordinates.
    inner
        Flow with `forward` and `inverse` on features-first arrays [D, B]: first the linear features, then the
        circular ones in [-π, π), both in the layout's order.

    Notes
    -----
    The dtype of the argument is the dtype of the result. Networks run in the dtype of their weights, float32;
    for float64 arguments the splines, the standardisation and the log-determinants are in float64.
    """

    linear: Tensor
    circular: Tensor
    order: Tensor
    shift: Tensor
    scale: Tensor
    centre: Tensor
    log_scale: Tensor

    def __init__(self, layout: FeatureLayout, inner: nn.Module) -> None:
        super().__init__()
        linear = [i for i in range(layout.n) if not layout.circular[i]]
        circular = [i for i in range(layout.n) if layout.circular[i]]
        self.n_features = layout.n
        self.at_once = max(1, CPU_VALUES // layout.n)  # TorchScript sees no globals
        self.inner = inner
        self.base = BaseDensity(layout)

        def column(values: list[float] | list[int], which: list[int]) -> Tensor:
            return torch.tensor([[float(values[i])] for i in which], dtype=torch.float64).reshape(-1, 1)

        scale = column(layout.scale, linear)
        constants = (*layout.scale, *layout.shift)
        if not all(math.isfinite(value) for value in constants):
            raise InputError("Every shift and scale of a FeatureLayout must be a finite number.")
        self.register_buffer("linear", torch.tensor(linear, dtype=torch.long), persistent=False)
        self.register_buffer("circular", torch.tensor(circular, dtype=torch.long), persistent=False)
        order = torch.argsort(torch.tensor(linear + circular, dtype=torch.long))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("shift", column(layout.shift, linear))
        self.register_buffer("scale", scale)
        self.register_buffer("centre", column(layout.shift, circular) / column(layout.fold, circular))
        self.register_buffer("log_scale", scale.log().sum())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base → data.

        Parameters
        ----------
        z
            [B, D]: standard normal on linear dimensions, rad in [-π, π) on circular ones.

        Returns
        -------
        y : Tensor [B, D]
            Coordinates in their own units, circular ones in [-π, π).
        log_det : Tensor [B]
            log |det dy/dz|.
        """
        step = self._step(z)
        if step >= z.shape[0]:
            return self._forward(z)
        parts = [self._forward(part) for part in z.split(step)]
        return torch.cat([y for y, _ in parts]), torch.cat([log_det for _, log_det in parts])

    def _step(self, x: Tensor) -> int:
        """Rows of equal parts of a batch [B, D] to work on one by one."""
        n = max(1, x.shape[0])
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return n
        at_once = self.at_once
        if not torch.jit.is_scripting():
            at_once = at_once * torch.get_num_threads()
        n_parts = (n + at_once - 1) // at_once
        return (n + n_parts - 1) // n_parts

    def _forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = z.t()
        v = wrap(x.index_select(0, self.circular))
        out, log_det = self.inner.forward(torch.cat([x.index_select(0, self.linear), v]))
        n = self.linear.shape[0]
        y_linear = self.shift.to(z.dtype) + self.scale.to(z.dtype) * out[:n]
        y_circular = wrap(out[n:] + self.centre.to(z.dtype))
        y = torch.cat([y_linear, y_circular]).index_select(0, self.order)
        return y.t(), log_det + self.log_scale.to(z.dtype)

    @torch.jit.export
    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data → base: y [B, D] to z [B, D] and log |det dz/dy| [B]. Angles may be given modulo 2π."""
        step = self._step(y)
        if step >= y.shape[0]:
            return self._inverse(y)
        parts = [self._inverse(part) for part in y.split(step)]
        return torch.cat([z for z, _ in parts]), torch.cat([log_det for _, log_det in parts])

    def _inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y.t()
        v = wrap(x.index_select(0, self.circular) - self.centre.to(y.dtype))
        standardised = (x.index_select(0, self.linear) - self.shift.to(y.dtype)) / self.scale.to(y.dtype)
        out, log_det = self.inner.inverse(torch.cat([standardised, v]))  # type: ignore[operator]
        n = self.linear.shape[0]
        z = torch.cat([out[:n], wrap(out[n:])]).index_select(0, self.order)
        return z.t(), log_det - self.log_scale.to(y.dtype)

    @torch.jit.export
    def log_prob(self, y: Tensor) -> Tensor:
        """log q(y), [B], of coordinates y [B, D]."""
        z, log_det = self.inverse(y)
        return self.base(z) + log_det

    @torch.jit.export
    def base_log_prob(self, z: Tensor) -> Tensor:
        """Log-density [B] of the base at z [B, D]."""
        return self.base(z)

    @torch.jit.export
    def sample_base(self, n: int) -> Tensor:
        """n independent draws of z, [n, D], float64, from torch's global generator."""
        return self.base.sample(n)

    @torch.jit.export
    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """n independent draws y [n, D] and their log q [n], float64."""
        z = self.base.sample(n)
        y, log_det = self.forward(z)
        return y, self.base(z) - log_det
