"""Monotone rational-quadratic splines on an interval and on the circle.

Durkan et al., "Neural Spline Flows" (2019), equations 4-8; the circular version, with one derivative shared
by both ends, is that of Rezende et al., "Normalizing Flows on Tori and Spheres" (2020).

Inside the flow room arrays are *features first*, [features, batch]: every operation then runs over long
contiguous rows, and the K knots of a feature are summed and searched without a strided inner loop. On a
CPU this is several times faster than [batch, features].
"""

import math

import torch
from torch import Tensor, nn


def wrap(x: Tensor) -> Tensor:
    """Angles (rad) brought to [-π, π), with gradient 1 everywhere; values already there are unchanged."""
    r = x - 2.0 * math.pi * torch.floor(x / (2.0 * math.pi) + 0.5)
    # Rounding in the quotient can leave a value one ulp outside; both corrections keep the gradient.
    r = torch.where(r < -math.pi, r + 2.0 * math.pi, r)
    return torch.where(r >= math.pi, r - 2.0 * math.pi, r)


class RationalQuadraticSpline(nn.Module):
    """Element-wise monotone splines, linear and circular features side by side in one call.

    A linear feature is bent on [-bound, bound], with derivative 1 at both ends and the identity outside.
    A circular feature is bent on [-π, π), where both ends share one free derivative. All parameters zero
    means the identity.

    Parameters
    ----------
    circular
        One flag per feature, F of them.
    n_bins
        Number of bins K.
    bound
        Half-width of the interval of the linear features.
    min_bin
        Least width and height of a bin, as a fraction of the interval.
    min_derivative
        Least derivative δ at a knot.
    """

    knot_weights: Tensor
    knot_bias: Tensor
    linear: Tensor

    def __init__(
        self,
        circular: list[bool],
        n_bins: int = 8,
        bound: float = 5.0,
        min_bin: float = 1e-3,
        min_derivative: float = 1e-3,
    ) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.bound = bound
        self.min_derivative = min_derivative
        self.any_linear = not all(circular)
        # softplus(bias) + δ = 1, so that zero parameters give derivative 1.
        self.derivative_bias = math.log(math.expm1(1.0 - min_derivative))
        # Knots on [-1, 1] are affine in the softmax p: knot_j = -1 + 2 (j m + (1 - K m) Σ_{i<j} p_i).
        # As one matrix product this needs no cumulative sum, and the end knots are ±1 exactly.
        free = 1.0 - n_bins * min_bin
        weights = 2.0 * free * torch.ones(n_bins + 1, n_bins).tril(-1)
        weights[-1] = 0.0
        bias = -1.0 + 2.0 * min_bin * torch.arange(n_bins + 1)
        bias[-1] = 1.0
        self.register_buffer("knot_weights", weights, persistent=False)
        self.register_buffer("knot_bias", bias[:, None], persistent=False)
        self.register_buffer("linear", ~torch.tensor(circular, dtype=torch.bool)[:, None], persistent=False)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Bend `x`.

        Parameters
        ----------
        x
            [F, B]; circular features in [-π, π).
        params
            [3K, F, B], unconstrained: K width logits, K height logits, K derivative logits. The derivative
            logit 0 belongs to both ends of a circular feature and is unused for a linear one.

        Returns
        -------
        y : Tensor [F, B]
        log_det : Tensor [B]
            log dy/dx summed over the features.
        """
        half = self._half_width(x)
        u = x / half
        inside = u.clamp(-1.0, 1.0)
        left, right, low, high, d0, d1 = self._bin(inside, params, 0)
        width = right - left
        height = high - low
        slope = height / width
        xi = (inside - left) / width
        rest = 1.0 - xi
        product = xi * rest
        denominator = slope + (d0 + d1 - 2.0 * slope) * product
        y = low + height * (slope * xi * xi + d0 * product) / denominator
        log_det = self._log_derivative(slope, d0, d1, xi, rest, product, denominator)
        # Outside [-1, 1] the spline's end value plus the excess is the identity, and its log-derivative is
        # that of the end knot, 0: no branch is needed and no gradient can be poisoned by one not taken.
        return half * (y + (u - inside)), log_det

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `forward`: the same shapes, and log dx/dy summed over the features."""
        half = self._half_width(y)
        u = y / half
        inside = u.clamp(-1.0, 1.0)
        left, right, low, high, d0, d1 = self._bin(inside, params, 1)
        width = right - left
        height = high - low
        slope = height / width
        # The fraction ξ of the bin solves a ξ² + b ξ - c = 0 with a + b = slope, c >= 0, one root in [0, 1].
        theta = (inside - low) / height
        curvature = theta * (d0 + d1 - 2.0 * slope)
        b = d0 - curvature
        a = slope - b
        c = slope * theta
        # Positive in exact arithmetic; rounding in float32 can push it below zero. The floor is not 0, where
        # the square root has no finite gradient.
        root = (b * b + 4.0 * a * c).clamp(min=1e-30).sqrt()
        total = b.abs() + root
        # Two forms of the same root; each is free of cancellation for its sign of b, and b < 0 implies a > 0.
        positive = b >= 0.0
        xi = torch.where(positive, 2.0 * c, total) / torch.where(positive, total, 2.0 * a)
        rest = 1.0 - xi
        product = (xi * rest).clamp(min=0.0)  # rounding may carry ξ past 1, the derivative must stay positive
        denominator = slope + (d0 + d1 - 2.0 * slope) * product
        log_det = self._log_derivative(slope, d0, d1, xi, rest, product, denominator)
        return half * (left + width * xi + (u - inside)), -log_det

    def _half_width(self, x: Tensor) -> Tensor:
        """[F, 1]: bound of a linear feature, π of a circular one."""
        return math.pi + (self.bound - math.pi) * self.linear.to(x.dtype)

    def _log_derivative(
        self,
        slope: Tensor,
        d0: Tensor,
        d1: Tensor,
        xi: Tensor,
        rest: Tensor,
        product: Tensor,
        denominator: Tensor,
    ) -> Tensor:
        """Σ_F log dy/dx, [B] (Durkan 2019, equation 5)."""
        ratio = slope / denominator
        numerator = d1 * xi * xi + 2.0 * slope * product + d0 * rest * rest
        return torch.log(numerator * ratio * ratio).sum(0)

    def _bin(self, u: Tensor, params: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The bin of each u on [-1, 1]: left, right, low, high and the derivatives at its knots, each [F, B].

        `axis` is 0 to search among the knots in x, 1 among those in y.
        """
        n_bins = self.n_bins
        shape = u.shape
        n = u.numel()
        logits, derivatives = params.reshape(3 * n_bins, n).split([2 * n_bins, n_bins])
        fractions = torch.softmax(logits.reshape(2, n_bins, n), 1)
        weights = self.knot_weights.to(u.dtype)
        bias = self.knot_bias.to(u.dtype)
        knots = torch.baddbmm(bias, weights.expand(2, n_bins + 1, n_bins), fractions)

        lower = (u.reshape(1, n) >= knots[axis, 1:n_bins]).sum(0)
        upper = lower + 1
        ends = torch.gather(knots, 1, torch.stack([lower, upper]).expand(2, 2, n)).reshape(4, n)
        # Gathered before softplus: two derivatives per value instead of K.
        last = upper == n_bins
        slots = torch.stack([lower, torch.where(last, 0, upper)])
        slopes = nn.functional.softplus(torch.gather(derivatives, 0, slots) + self.derivative_bias)
        slopes = slopes + self.min_derivative
        if self.any_linear:
            ending = torch.stack([lower == 0, last]) & self.linear.expand(shape).reshape(n)
            slopes = torch.where(ending, 1.0, slopes)
        left, right, low, high = ends.reshape(4, shape[0], shape[1]).unbind(0)
        d0, d1 = slopes.reshape(2, shape[0], shape[1]).unbind(0)
        return left, right, low, high, d0, d1
