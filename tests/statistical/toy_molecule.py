"""A molecule of three numbers whose marginals and log Z are known, and a flow that models it badly.

Coordinates φ (circular), θ in (0, π) and r > 0, volume element J = r² sin θ, and a stiff r that follows both
angles. det Z is that of a bent A-B-A molecule with a light centre (4/1/4 dalton), a function of θ: with protein
masses no error in it could ever show. Three settings:

- "off":      no constraints, y = (φ, θ, r), π ∝ exp(-u) J;
- "on":       r constrained to 1, y = (φ, θ), π ∝ exp(-u) J √det Z at r = 1;
- "partial":  y = (φ, θ) moves while s = r stays, π ∝ exp(-u) J √det Z; r is drawn from its exact conditional
              between moves, which stands for MD. For formula C a completion g(r|φ, θ) draws it, or one g(φ|θ, r).

References come from Gauss-Legendre quadrature in φ and θ, and closed forms in r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

PHI_EDGES = np.linspace(-np.pi, np.pi, 13)
THETA_EDGES = np.array([0.0, 1.2, 1.45, 1.65, 1.85, 2.05, 2.3, np.pi])
R_EDGES = np.array([0.0, 0.88, 0.94, 1.0, 1.06, 1.12, 2.0])
SIGMA_R = 0.07
S0 = 1.0


def r_mean(phi, theta):
    return 1.0 + 0.08 * np.cos(phi - 0.4) - 0.10 * np.cos(theta)


def energy(phi, theta, r):
    """Reduced potential."""
    angles = 0.9 * np.cos(phi - 0.6) + 0.7 * np.cos(2 * phi) + 3.0 * (theta - 1.8) ** 2
    return angles + 0.5 * np.cos(phi) * np.cos(theta) + 0.5 * ((r - r_mean(phi, theta)) / SIGMA_R) ** 2


def log_jacobian(theta, r):
    return 2.0 * np.log(r) + np.log(np.sin(theta))


def fixman(theta):
    """½ log det Z with Z = [[1/m_A + 1/m_B, cos θ/m_B], [cos θ/m_B, 1/m_A + 1/m_B]], m_A = 4, m_B = 1."""
    return 0.5 * np.log(1.25**2 - np.cos(theta) ** 2)


def in_domain(theta, r):
    return (theta > 0) & (theta < np.pi) & (r > 0)


def log_pi(phi, theta, r, *, with_fixman, omit=None):
    """log of the target's density in dq up to nothing: its integral is Z. `omit` leaves a term out on purpose."""
    inside = in_domain(theta, r)
    theta, r = np.where(inside, theta, 1.0), np.where(inside, r, 1.0)
    total = -energy(phi, theta, r)
    if omit != "jacobian":
        total = total + log_jacobian(theta, r)
    if with_fixman and omit != "fixman":
        total = total + fixman(theta)
    return np.where(inside, total, -np.inf)


# ---------------------------------------------------------------------------------------------- references


@dataclass(frozen=True)
class Reference:
    log_z: float
    phi: np.ndarray
    theta: np.ndarray
    r: np.ndarray | None
    rms_weight: float = 0.0


def _panels(edges, order=20):
    x, w = np.polynomial.legendre.leggauss(order)
    half = 0.5 * np.diff(edges)[:, None]
    return (edges[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel(), np.repeat(np.arange(edges.size - 1), order)


def reference(*, with_fixman, r=None):
    """Marginals over the bins and log Z; r fixed to a value, or integrated over."""
    phi, w_phi, bin_phi = _panels(PHI_EDGES)
    theta, w_theta, bin_theta = _panels(THETA_EDGES)
    phi, theta = phi[:, None], theta[None, :]
    at = r_mean(phi, theta)  # r = r_mean removes the stiff term from the energy
    density = np.exp(-energy(phi, theta, at)) * np.sin(theta) * w_phi[:, None] * w_theta[None, :]
    if with_fixman:
        density = density * np.exp(fixman(theta))
    if r is not None:
        by_r = (density * r**2 * np.exp(-0.5 * ((r - at) / SIGMA_R) ** 2))[..., None]
    else:
        # ∫ r² exp(-(r-m)²/2σ²) dr between two edges, in closed form
        edges = R_EDGES.copy()
        edges[-1] = 10.0
        t = (edges - at[..., None]) / SIGMA_R
        bell = np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi)
        integral = (at[..., None] ** 2 + SIGMA_R**2) * ndtr(t) - SIGMA_R * (edges + at[..., None]) * bell
        by_r = density[..., None] * np.diff(integral) * SIGMA_R * np.sqrt(2 * np.pi)
    z = by_r.sum()
    over_r = by_r.sum(axis=2) / z
    return Reference(
        float(np.log(z)),
        np.bincount(bin_phi, over_r.sum(axis=1)),
        np.bincount(bin_theta, over_r.sum(axis=0)),
        None if r is not None else by_r.sum(axis=(0, 1)) / z,
    )


# --------------------------------------------------------------------------------------------- exact samples


def draw_r(phi, theta, rng):
    """r from its exact conditional ∝ r² exp(-(r - r_mean)²/2σ²): rejection from the Gaussian."""
    centre = np.broadcast_to(r_mean(phi, theta), np.shape(phi))
    out = np.empty(centre.shape)
    todo = np.arange(out.size)
    while todo.size:
        trial = centre[todo] + SIGMA_R * rng.standard_normal(todo.size)
        top = centre[todo] + 6 * SIGMA_R  # beyond six σ the bound fails for one draw in 1e9
        good = (trial > 0) & (rng.random(todo.size) * top**2 < trial**2)
        out[todo[good]] = trial[good]
        todo = todo[~good]
    return out


def draw_exact(n, rng, *, with_fixman, r=None):
    """Independent samples (φ, θ, r) of the target by rejection from uniform φ and Gaussian θ."""

    def log_ratio(phi, theta):
        inside = (theta > 0) & (theta < np.pi)
        safe = np.where(inside, theta, 1.0)
        at = r_mean(phi, safe)
        value = -energy(phi, safe, at) + np.log(np.sin(safe)) + 3.0 * (safe - 1.8) ** 2
        if with_fixman:
            value = value + fixman(safe)
        if r is None:
            value = value + np.log(at**2 + SIGMA_R**2)
        else:
            value = value - 0.5 * ((r - at) / SIGMA_R) ** 2
        return np.where(inside, value, -np.inf)

    grid = log_ratio(*np.meshgrid(np.linspace(-np.pi, np.pi, 400), np.linspace(1e-3, np.pi - 1e-3, 400)))
    bound = grid.max() + 0.01
    pieces = []
    found = 0
    while found < n:
        phi = rng.uniform(-np.pi, np.pi, 2 * n)
        theta = 1.8 + rng.standard_normal(2 * n) / np.sqrt(6.0)
        keep = np.log(rng.random(2 * n)) < log_ratio(phi, theta) - bound
        pieces.append(np.stack([phi[keep], theta[keep]]))
        found += int(keep.sum())
    phi, theta = np.concatenate(pieces, axis=1)[:, :n]
    return np.stack([phi, theta, draw_r(phi, theta, rng) if r is None else np.full(n, r)], axis=1)


# ------------------------------------------------------------------------------------------------- the flow


@dataclass(frozen=True)
class ToyFlow:
    """An imperfect but normalised q(y): a Möbius map of the circle and two straight lines.

    Its θ leaves (0, π) now and then: those samples have weight zero. Log-densities are exact.
    """

    n_dim: int = 2  # (φ, θ) or (φ, θ, r)
    kappa: float = 0.7
    stretch: float = 1.25
    theta_mean: float = 1.85
    theta_scale: float = 0.45
    r_mean: float = 1.03
    r_scale: float = 0.12

    @property
    def circular(self):
        return np.array([True, False, False])[: self.n_dim]

    @property
    def concentration(self):
        return np.array([self.kappa, 0.0, 0.0])[: self.n_dim]

    def sample_base(self, shape, rng):
        z = rng.standard_normal((*shape, self.n_dim))
        z[..., 0] = rng.vonmises(0.0, self.kappa, shape) if self.kappa else rng.uniform(-np.pi, np.pi, shape)
        return z

    def base_log_prob(self, z):
        circle = self.kappa * np.cos(z[..., 0]) - np.log(2 * np.pi * np.i0(self.kappa))
        line = -0.5 * z[..., 1:] ** 2 - 0.5 * np.log(2 * np.pi)
        return circle + line.sum(axis=-1)

    def forward(self, z):
        """y and log |det dy/dz|."""
        y = np.empty_like(z)
        half = 0.5 * z[..., 0]
        # Möbius map of the circle, tan(φ/2) = c tan(z/2), written without the pole at π
        y[..., 0] = 2 * np.arctan2(self.stretch * np.sin(half), np.cos(half))
        logdet = np.log(self.stretch) - np.log(np.cos(half) ** 2 + (self.stretch * np.sin(half)) ** 2)
        y[..., 1] = self.theta_mean + self.theta_scale * z[..., 1]
        logdet = logdet + np.log(self.theta_scale)
        if self.n_dim == 3:
            y[..., 2] = self.r_mean + self.r_scale * z[..., 2]
            logdet = logdet + np.log(self.r_scale)
        return y, logdet

    def inverse(self, y):
        """z and log |det dy/dz| there."""
        z = np.empty_like(y)
        half = 0.5 * y[..., 0]
        z[..., 0] = 2 * np.arctan2(np.sin(half), self.stretch * np.cos(half))
        z[..., 1] = (y[..., 1] - self.theta_mean) / self.theta_scale
        if self.n_dim == 3:
            z[..., 2] = (y[..., 2] - self.r_mean) / self.r_scale
        return z, self.forward(z)[1]

    def log_q(self, y):
        z, logdet = self.inverse(y)
        return self.base_log_prob(z) - logdet

    def sample(self, shape, rng):
        z = self.sample_base(shape, rng)
        y, logdet = self.forward(z)
        return y, self.base_log_prob(z) - logdet


def full(y, s):
    """φ, θ, r from modelled y = (φ, θ[, r]) and s = r."""
    return y[..., 0], y[..., 1], (y[..., 2] if y.shape[-1] == 3 else np.broadcast_to(s, y.shape[:-1]))


# --------------------------------------------------------------------------------------------- the yardstick


def one_hot(x, edges):
    index = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, edges.size - 2)
    return np.eye(edges.size - 1)[index]


def bins(phi, theta, r, ref):
    """Indicators of every bin that the reference knows, by name."""
    out = {"phi": one_hot(phi, PHI_EDGES), "theta": one_hot(theta, THETA_EDGES)}
    if ref.r is not None:
        out["r"] = one_hot(r, R_EDGES)
    return out


def chi2_z(estimate, error, expected):
    """χ² of one histogram as a standard normal deviate (Wilson-Hilferty), and χ² per degree of freedom.

    The errors are per bin and the bins add up to one: (b-1)/b Σ z² has b-1 degrees of freedom.
    """
    b = expected.size
    # A bin without a single sample has an estimated error of zero; give it the multinomial floor.
    chi2 = (b - 1) / b * np.sum(((estimate - expected) / np.maximum(error, 1e-12)) ** 2)
    dof = b - 1
    spread = 2 / (9 * dof)
    return float((np.cbrt(chi2 / dof) - (1 - spread)) / np.sqrt(spread)), float(chi2 / dof)


def chi2_at_5_sigma(b):
    spread = 2 / (9 * (b - 1))
    return (1 - spread + 5 * np.sqrt(spread)) ** 3


class Verdict:
    """Deviations in σ of everything one check has compared; prints them with n."""

    def __init__(self, title, n):
        self.title, self.n = title, n
        self.z: dict[str, float] = {}
        self.needed: dict[str, float] = {}  # n at which the deviation seen would reach 5 σ
        self.detail: dict[str, str] = {}

    def histogram(self, name, estimate, error, expected):
        z, per_dof = chi2_z(np.asarray(estimate), np.asarray(error), expected)
        self.z[name] = z
        self.detail[name] = f"chi2/dof {per_dof:.2f}"
        excess = per_dof - 1
        self.needed[name] = self.n * (chi2_at_5_sigma(expected.size) - 1) / excess if excess > 0 else np.inf

    def number(self, name, estimate, error, expected):
        z = abs(estimate - expected) / error
        self.z[name] = z
        self.detail[name] = f"{estimate:.4f} +- {error:.4f}, exact {expected:.4f}"
        self.needed[name] = self.n * (5 / z) ** 2 if z > 0 else np.inf

    @property
    def worst(self):
        return max(self.z.values())

    def show(self):
        for name, z in self.z.items():
            print(
                f"{self.title}: {name}: z = {z:.1f} ({self.detail[name]}), n = {self.n}; "
                f"a deviation of this size shows at 5 sigma from n = {self.needed[name]:.2g}"
            )
        return self

    def assert_right(self):
        assert self.worst < 4.0, f"{self.title}: {self.z}"

    def assert_wrong(self):
        assert self.worst > 5.0, f"{self.title} passed although it was broken: {self.z}"
