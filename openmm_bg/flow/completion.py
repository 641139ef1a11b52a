"""The completion g(s|y): a normalised density of what the flow leaves out, given what it models (formula C)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError
from openmm_bg.flow.base import sample_von_mises
from openmm_bg.flow.layout import FeatureLayout
from openmm_bg.flow.mlp import FeatureLinear
from openmm_bg.flow.splines import wrap

#: Largest factor, as a logarithm, by which y may change the width of a Gaussian coordinate.
WIDTH_RANGE = 2.0
#: Standardised linear y enter the networks clamped to this: no density may become NaN far from all data.
FEATURE_RANGE = 8.0


@dataclass(frozen=True)
class CompletionLayout:
    """One entry per completed coordinate, in the order of the vector s (F of them).

    Parameters
    ----------
    circular
        True for a von Mises density on the whole circle, False for a Gaussian.
    periodic
        True for an angle given modulo 2π. One that is not `circular` is Gaussian in the window shift ± π.
    shift, scale
        Mean and standard deviation that standardise a Gaussian coordinate; 0 and 1 for a circular one.
    """

    circular: list[bool]
    periodic: list[bool]
    shift: list[float]
    scale: list[float]

    def __post_init__(self) -> None:
        if len({len(self.circular), len(self.periodic), len(self.shift), len(self.scale)}) != 1:
            raise InputError("A CompletionLayout needs lists of one length.")
        if not all(math.isfinite(v) for v in (*self.shift, *self.scale)) or any(v <= 0.0 for v in self.scale):
            raise InputError("A CompletionLayout needs finite shifts and scales, and scales above 0.")
        if any(c and not p for c, p in zip(self.circular, self.periodic, strict=True)):
            raise InputError("A circular coordinate of a CompletionLayout must be periodic.")

    @property
    def n(self) -> int:
        """Number of completed coordinates F."""
        return len(self.circular)


class _Network(nn.Module):
    """Residual perceptron of gated linear units (as `GatedConditioner`), [inputs, B] to [n_rows, B]; zero at start."""

    def __init__(self, n_inputs: int, n_rows: int, hidden: int, n_hidden: int) -> None:
        super().__init__()
        self.n_inputs = n_inputs
        # With nothing to enter, one constant zero input keeps the shapes regular.
        self.entry = FeatureLinear(max(1, n_inputs), hidden)
        self.up = nn.ModuleList([FeatureLinear(hidden, 2 * hidden) for _ in range(n_hidden)])
        self.down = nn.ModuleList([FeatureLinear(hidden, hidden) for _ in range(n_hidden)])
        # A network without a purpose keeps one row, for layers of no rows make torch complain.
        self.head = FeatureLinear(hidden, max(1, n_rows))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.entry.weight.dtype)
        if self.n_inputs == 0:
            x = torch.zeros([1, x.shape[1]], dtype=x.dtype, device=x.device)
        h = self.entry(x)
        for up, down in zip(self.up, self.down):  # noqa: B905  (TorchScript has no strict=)
            gate, value = up.forward(h).chunk(2)
            h = h + down.forward(nn.functional.silu(gate) * value)
        return self.head(h)


class Completion(nn.Module):
    """g(s|y) = Π_c vonMises(s_c | y) · N(s_l | y, s_c): circular coordinates first, then all the others at once.

    Circular: exp(a cos s + b sin s) / (2π I0(κ)), κ² = a² + b², with (a, b) from a network of y. The others: with
    standardised v, mean m and widths σ from a network of y and the circular ones,

        ε = diag(1/σ) W (v - m),   W lower triangular with a unit diagonal,

    is standard normal: a Gaussian with covariance W⁻¹ diag(σ²) W⁻ᵀ, log |det W| = 0. W does not depend on y, for the
    stiff coordinates of a molecule are tied to their neighbours in much the same way in every conformation.

    The density is exact whatever the parameters, and positive on all of ℝ or the circle. A draw of a periodic
    Gaussian coordinate beyond its window is NaN: no conformation, weight zero. Scriptable by `torch.jit.script`.

    Parameters
    ----------
    given
        Layout of y, the condition.
    layout
        The F completed coordinates.
    coupled
        [F, F] bool: which pairs W may tie to each other; all if left out.
    hidden, n_hidden
        Width and number of the layers of both networks.

    Notes
    -----
    Networks enter y as (cos, sin) of circular values, of n-fold ones also (cos, sin) of n y, and standardised linear
    values. They run in float32; everything else in the dtype of s.

    Raises
    ------
    InputError
        An empty layout, or `coupled` of another shape.
    """

    linear: Tensor
    circular: Tensor
    order: Tensor
    shift: Tensor
    scale: Tensor
    window: Tensor
    given_linear: Tensor
    given_circular: Tensor
    given_folded: Tensor
    given_shift: Tensor
    given_scale: Tensor
    given_fold: Tensor
    mask: Tensor

    def __init__(
        self,
        given: FeatureLayout,
        layout: CompletionLayout,
        coupled: Tensor | None = None,
        hidden: int = 64,
        n_hidden: int = 2,
    ) -> None:
        super().__init__()
        if layout.n == 0:
            raise InputError("A completion needs at least one coordinate.")
        if coupled is not None and coupled.shape != (layout.n, layout.n):
            raise InputError(f"coupled must be [{layout.n}, {layout.n}], got {list(coupled.shape)}.")
        linear = [i for i in range(layout.n) if not layout.circular[i]]
        circular = [i for i in range(layout.n) if layout.circular[i]]
        self.n_completed = layout.n
        self.width_range, self.feature_range = WIDTH_RANGE, FEATURE_RANGE  # TorchScript sees no globals
        self.n_linear, self.n_circular = len(linear), len(circular)

        def indices(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).reshape(-1, 1)

        self.register_buffer("linear", indices(linear), persistent=False)
        self.register_buffer("circular", indices(circular), persistent=False)
        self.register_buffer("order", torch.argsort(indices(linear + circular)), persistent=False)
        self.register_buffer("shift", column([layout.shift[i] for i in linear]))
        self.register_buffer("scale", column([layout.scale[i] for i in linear]))
        self.register_buffer("window", torch.tensor([layout.periodic[i] for i in linear]).reshape(-1, 1))
        y_linear = [i for i in range(given.n) if not given.circular[i]]
        y_circular = [i for i in range(given.n) if given.circular[i]]
        y_folded = [i for i in y_circular if given.fold[i] > 1]
        self.register_buffer("given_linear", indices(y_linear), persistent=False)
        self.register_buffer("given_circular", indices(y_circular), persistent=False)
        self.register_buffer("given_folded", indices(y_folded), persistent=False)
        self.register_buffer("given_shift", column([given.shift[i] for i in y_linear]))
        self.register_buffer("given_scale", column([given.scale[i] for i in y_linear]))
        self.register_buffer("given_fold", column([float(given.fold[i]) for i in y_folded]))

        n_inputs = len(y_linear) + 2 * (len(y_circular) + len(y_folded))
        self.on_circle = _Network(n_inputs, 2 * len(circular), hidden, n_hidden)
        self.on_line = _Network(n_inputs + 2 * len(circular), 2 * len(linear), hidden, n_hidden)
        self.direction = nn.Parameter(torch.zeros(2 * len(circular), 1))
        self.log_width = nn.Parameter(torch.zeros(len(linear), 1))
        self.coupling = nn.Parameter(torch.zeros(len(linear), len(linear)))
        allowed = torch.ones(layout.n, layout.n, dtype=torch.bool) if coupled is None else coupled.bool()
        self.register_buffer("mask", allowed[linear][:, linear].tril(-1))

    def _features(self, y: Tensor) -> Tensor:
        """y [B, D] to the networks' inputs [inputs, B]."""
        x = y.t()
        line = (x.index_select(0, self.given_linear) - self.given_shift.to(y.dtype)) / self.given_scale.to(y.dtype)
        turns = x.index_select(0, self.given_folded) * self.given_fold.to(y.dtype)
        angles = torch.cat([x.index_select(0, self.given_circular), turns])
        line = line.clamp(-self.feature_range, self.feature_range)
        return torch.cat([line, torch.cos(angles), torch.sin(angles)])

    def _directions(self, features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and κ [C, B] of the circular coordinates."""
        rows = self.direction.to(dtype) + self.on_circle(features)[: 2 * self.n_circular].to(dtype)
        a, b = rows[: self.n_circular], rows[self.n_circular :]
        # Away from zero, where the slope of the root is infinite; a, b and κ stay consistent to 1e-12.
        return a, b, torch.sqrt(a * a + b * b + 1e-24)

    def _line(self, features: Tensor, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and log σ [L, B] of the standardised Gaussian coordinates."""
        known = torch.cat([features, torch.cos(angles).to(features.dtype), torch.sin(angles).to(features.dtype)])
        rows = self.on_line(known)[: 2 * self.n_linear].to(dtype)
        change = self.width_range * torch.tanh(rows[self.n_linear :] / self.width_range)
        return rows[: self.n_linear], self.log_width.to(dtype) + change

    def _triangle(self, dtype: torch.dtype) -> Tensor:
        unit = torch.eye(self.n_linear, dtype=dtype, device=self.coupling.device)
        return unit + (self.coupling * self.mask).to(dtype)

    def _gauss(self, epsilon: Tensor, log_sigma: Tensor) -> Tensor:
        """Log-density [B] of Gaussian coordinates whose standard normal deviates are ε [L, B]."""
        constant = self.scale.log().sum() + 0.5 * math.log(2.0 * math.pi) * self.n_linear
        return -(0.5 * epsilon.square() + log_sigma).sum(0) - constant.to(epsilon.dtype)

    def _circle(self, angles: Tensor, a: Tensor, b: Tensor, kappa: Tensor) -> Tensor:
        """Log-density [B] of circular coordinates [C, B]; log I0(κ) = log i0e(κ) + κ, for I0 overflows."""
        peak = a * torch.cos(angles) + b * torch.sin(angles) - kappa
        return (peak - torch.log(torch.special.i0e(kappa)) - math.log(2.0 * math.pi)).sum(0)

    def forward(self, s: Tensor, y: Tensor) -> Tensor:
        """log g(s|y), as `log_prob`."""
        return self.log_prob(s, y)

    @torch.jit.export
    def log_prob(self, s: Tensor, y: Tensor) -> Tensor:
        """log g(s|y) [B] of completed coordinates s [B, F] at y [B, D], in nm and rad; in the dtype of s."""
        x = s.t()
        features = self._features(y)
        angles = x.index_select(0, self.circular)
        total = torch.zeros_like(s[:, 0])
        if self.n_circular > 0:
            a, b, kappa = self._directions(features, s.dtype)
            total = total + self._circle(angles, a, b, kappa)
        if self.n_linear > 0:
            mean, log_sigma = self._line(features, angles, s.dtype)
            v = x.index_select(0, self.linear) - self.shift.to(s.dtype)
            v = torch.where(self.window, wrap(v), v) / self.scale.to(s.dtype)
            epsilon = torch.mm(self._triangle(s.dtype), v - mean) * torch.exp(-log_sigma)
            total = total + self._gauss(epsilon, log_sigma)
        return total

    @torch.jit.export
    def sample(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """One draw s [B, F] for each y [B, D] and its log g [B], float64; from torch's global generator."""
        features = self._features(y)
        n, dtype = y.shape[0], torch.float64
        angles = torch.zeros([0, n], dtype=dtype, device=y.device)
        line = torch.zeros([0, n], dtype=dtype, device=y.device)
        total = torch.zeros([n], dtype=dtype, device=y.device)
        if self.n_circular > 0:
            a, b, kappa = self._directions(features, dtype)
            turn = sample_von_mises(kappa.reshape(-1), 1).reshape(kappa.shape)
            angles = wrap(torch.atan2(b, a) + turn)
            total = total + self._circle(angles, a, b, kappa)
        if self.n_linear > 0:
            mean, log_sigma = self._line(features, angles, dtype)
            epsilon = torch.randn([self.n_linear, n], dtype=dtype, device=y.device)
            scaled = epsilon * torch.exp(log_sigma)
            v = mean + torch.linalg.solve_triangular(self._triangle(dtype), scaled, upper=False, unitriangular=True)
            v = v * self.scale
            beyond = self.window & (v.abs() >= math.pi)
            line = torch.where(beyond, torch.full_like(v, math.nan), v + self.shift)
            total = total + self._gauss(epsilon, log_sigma)
        return torch.cat([line, angles]).index_select(0, self.order).t(), total
