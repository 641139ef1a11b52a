"""Base density of the flow: Gaussian on the line, von Mises or uniform on the circle."""

import math

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError
from openmm_bg.flow.layout import FeatureLayout
from openmm_bg.flow.splines import wrap


def sample_von_mises(concentration: Tensor, n: int) -> Tensor:
    """Independent draws from the von Mises densities exp(κ cos v) / (2π I0(κ)) on [-π, π), mean 0.

    Rejection from a wrapped Cauchy density 1 / (r - cos v) (Best and Fisher 1979). A proposal is accepted
    with probability c exp(1 - c), c = κ (r - cos v), which is exact for any r > 1: rounding of the optimal r
    costs efficiency only. κ = 0 gives the uniform density.

    Parameters
    ----------
    concentration
        [C], float64, finite and >= 0.
    n
        Number of draws.

    Returns
    -------
    Tensor [n, C], float64.
    """
    kappa = concentration.clamp(min=1e-8)
    tau = 1.0 + torch.sqrt(1.0 + 4.0 * kappa * kappa)
    rho = (tau - torch.sqrt(2.0 * tau)) / (2.0 * kappa)
    # The general form of r cancels for small κ, where r = 1/κ + κ + O(κ³).
    r = torch.where(kappa < 1e-4, 1.0 / kappa + kappa, (1.0 + rho * rho) / (2.0 * rho.clamp(min=1e-12)))
    n_angles = concentration.shape[0]
    shape = [n, n_angles]
    value = torch.zeros(shape, dtype=torch.float64, device=concentration.device)
    done = torch.zeros(shape, dtype=torch.bool, device=concentration.device)
    # A proposal fails with probability 0.34 at most (κ → ∞): 300 rounds all failing is a matter of 1e-140.
    for _ in range(300):
        u = torch.rand([3, n, n_angles], dtype=torch.float64, device=concentration.device)
        z = torch.cos(math.pi * u[0])
        cosine = ((1.0 + r * z) / (r + z)).clamp(-1.0, 1.0)
        c = kappa * (r - cosine)
        accepted = u[1] < c * torch.exp(1.0 - c)
        sign = torch.where(u[2] < 0.5, -1.0, 1.0)
        value = torch.where(done, value, sign * torch.acos(cosine))
        done = done | accepted
        if bool(done.all()):
            break
    uniform = math.pi * (2.0 * torch.rand(shape, dtype=torch.float64, device=concentration.device) - 1.0)
    return wrap(torch.where(concentration > 0.0, value, uniform))


class BaseDensity(nn.Module):
    """N(0, 1) on linear dimensions; exp(κ cos(n z)) / (2π I0(κ)) on circular ones, z in [-π, π), n the fold.

    log I0(κ) = log i0e(κ) + κ, for I0 itself overflows.

    Parameters
    ----------
    layout
        Kinds, folds and concentrations of the D features.

    Raises
    ------
    InputError
        If a concentration is not finite.
    """

    linear: Tensor
    circular: Tensor
    order: Tensor
    concentration: Tensor
    fold: Tensor
    log_norm: Tensor

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__()
        linear = [i for i in range(layout.n) if not layout.circular[i]]
        circular = [i for i in range(layout.n) if layout.circular[i]]
        kappa = torch.tensor([layout.concentration[i] for i in circular], dtype=torch.float64)
        if not bool(torch.isfinite(kappa).all()):
            raise InputError("Every concentration of a FeatureLayout must be a finite number.")
        fold = torch.tensor([float(layout.fold[i]) for i in circular], dtype=torch.float64)
        # Relative to the peak value exp(κ), which log_prob takes out of the exponent.
        log_norm = (
            0.5 * math.log(2.0 * math.pi) * len(linear)
            + (math.log(2.0 * math.pi) + torch.log(torch.special.i0e(kappa))).sum()
        )
        self.register_buffer("linear", torch.tensor(linear, dtype=torch.long), persistent=False)
        self.register_buffer("circular", torch.tensor(circular, dtype=torch.long), persistent=False)
        order = torch.argsort(torch.tensor(linear + circular, dtype=torch.long))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("concentration", kappa)
        self.register_buffer("fold", fold)
        self.register_buffer("log_norm", torch.as_tensor(log_norm, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        """Log-density [B] of z [B, D], in the dtype of z."""
        gauss = z.index_select(1, self.linear)
        angle = z.index_select(1, self.circular) * self.fold.to(z.dtype)
        circles = self.concentration.to(z.dtype) * (torch.cos(angle) - 1.0)
        return circles.sum(1) - 0.5 * gauss.square().sum(1) - self.log_norm.to(z.dtype)

    def sample(self, n: int) -> Tensor:
        """n independent draws, [n, D], float64: a folded angle picks one of its n branches uniformly."""
        device = self.concentration.device
        gauss = torch.randn([n, self.linear.shape[0]], dtype=torch.float64, device=device)
        fold = self.fold.to(torch.float64)
        v = sample_von_mises(self.concentration.to(torch.float64), n)
        branch = torch.floor(fold * torch.rand(v.shape, dtype=torch.float64, device=device))
        angle = wrap((v + 2.0 * math.pi * branch) / fold)
        return torch.cat([gauss, angle], 1).index_select(1, self.order)
