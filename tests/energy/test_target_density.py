"""log π(y, s) = -u + log J + Φ on a bent triatomic: y = (r, θ), s = (the other bond length)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import openmm  # isort: skip

from openmm_bg.energy import ContextPool, Target, reduced_energy, thermal_energy
from openmm_bg.errors import InputError

K_BOND, K_ANGLE, R0, THETA0, T = 5000.0, 100.0, 0.1, 1.9, 350.0


class Bent(nn.Module):
    """Atom 0 at the origin, atom 1 on the x axis at r, atom 2 bound to atom 1 at angle θ and length s."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def to_positions(self, y: Tensor, s: Tensor) -> Tensor:
        self.calls.append(y.detach())
        r, theta, b = y[:, 0], y[:, 1], s[:, 0]
        zero = torch.zeros_like(r)
        # No effect on the value, and a slope that is NaN at θ = 1/2: on purpose.
        trap = 0.0 * torch.sqrt(torch.abs(theta - 0.5))
        first = torch.stack([zero, zero, zero], 1)
        second = torch.stack([r + trap, zero, zero], 1)
        third = second + torch.stack([-b * torch.cos(theta), b * torch.sin(theta), zero], 1)
        return torch.stack([first, second, third], 1)

    def log_volume(self, y: Tensor, s: Tensor) -> Tensor:
        return 2 * torch.log(y[:, 0]) + 2 * torch.log(s[:, 0]) + torch.log(torch.sin(y[:, 1]))

    def in_domain(self, y: Tensor, s: Tensor) -> Tensor:
        return (y[:, 0] > 0) & (y[:, 1] > 0) & (y[:, 1] < math.pi) & (s[:, 0] > 0)


@pytest.fixture
def pool(make_context):
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    bonds.addBond(0, 1, R0, K_BOND)
    bonds.addBond(1, 2, R0, K_BOND)
    angles.addAngle(0, 1, 2, THETA0, K_ANGLE)
    # Infinite where atoms 0 and 2 come closer than 0.02 nm.
    wall = openmm.CustomBondForce("1/step(r-0.02)-1")
    wall.addBond(0, 2, [])
    for force in (bonds, angles, wall):
        system.addForce(force)
    x = np.array([[0.0, 0, 0], [0.1, 0, 0], [0.13, 0.09, 0]])
    with ContextPool(make_context("Reference", system, x), platform="Reference", n_workers=1) as pool:
        yield pool


def analytic(y: Tensor, s: Tensor) -> Tensor:
    energy = 0.5 * K_BOND * ((y[:, 0] - R0) ** 2 + (s[:, 0] - R0) ** 2) + 0.5 * K_ANGLE * (y[:, 1] - THETA0) ** 2
    return -energy / thermal_energy(T) + 2 * torch.log(y[:, 0] * s[:, 0]) + torch.log(torch.sin(y[:, 1]))


def draw(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.stack([0.08 + 0.05 * torch.rand(n, generator=g), 1.0 + torch.rand(n, generator=g)], 1)
    return y.to(dtype), (0.09 + 0.03 * torch.rand(n, 1, generator=g)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value(pool, dtype):
    y, s = draw(20, dtype)
    target = Target(Bent(), pool, T)
    log_pi = target.log_density(y, s)
    assert log_pi.dtype == torch.float64 and log_pi.shape == (20,)
    # In double precision throughout, whatever comes in.
    torch.testing.assert_close(log_pi, analytic(y.double(), s.double()), rtol=1e-10, atol=1e-10)
    again, x = target.log_density_and_positions(y, s)
    torch.testing.assert_close(again, log_pi, rtol=0, atol=0)
    torch.testing.assert_close(
        -reduced_energy(x, pool, T) + Bent().log_volume(y.double(), s.double()),
        log_pi,
        rtol=1e-12,
        atol=1e-12,
    )


def test_gradient(pool):
    y, s = draw(6)
    y, s = y.requires_grad_(), s.requires_grad_()
    target = Target(Bent(), pool, T)
    weight = torch.arange(1.0, 7.0, dtype=torch.float64)
    ours = torch.autograd.grad((weight * target.log_density(y, s)).sum(), (y, s))
    exact = torch.autograd.grad((weight * analytic(y, s)).sum(), (y, s))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-6)


def test_outside_the_domain(pool):
    """Decided before q -> x: (r, -θ) and (r, 2π - θ) are mirror images with a finite energy."""
    y, s = draw(9)
    good = y.clone()
    y[1, 1] *= -1
    y[2, 1] = 2 * math.pi - y[2, 1]
    y[3, 0] *= -1
    s[4, 0] *= -1
    y[5, 0] = math.nan
    y[6, 1] = math.inf
    s[7, 0] = math.nan
    coordinates = Bent()
    y, s = y.requires_grad_(), s.requires_grad_()
    log_pi, x = Target(coordinates, pool, T).log_density_and_positions(y, s)
    assert torch.isneginf(log_pi[1:8]).all()
    assert torch.isnan(x[1:8]).all()
    torch.testing.assert_close(log_pi[[0, 8]], analytic(good, s)[[0, 8]].detach(), rtol=1e-10, atol=1e-10)
    assert torch.equal(coordinates.calls[0], good[[0, 8]])  # the map saw no other row
    log_pi.sum().backward()
    for grad in (y.grad, s.grad):
        assert (grad[1:8] == 0).all() and (grad[[0, 8]] != 0).all()
    y2, s2 = good[[0, 8]].clone().requires_grad_(), s.detach()[[0, 8]]
    analytic(y2, s2).sum().backward()
    torch.testing.assert_close(y.grad[[0, 8]], y2.grad, rtol=1e-8, atol=1e-6)


def test_energies_that_are_not_finite(pool):
    y, s = draw(4)
    y[1], s[1] = torch.tensor([0.1, 0.01]), 0.1  # atoms 0 and 2 within 0.02 nm
    y[2, 0], y[2, 1] = 1e200, 0.5  # an energy that overflows, where the slope of the map is NaN
    y, s = y.requires_grad_(), s.requires_grad_()
    log_pi = Target(Bent(), pool, T).log_density(y, s)
    assert torch.isfinite(log_pi[[0, 3]]).all()
    assert torch.isneginf(log_pi[[1, 2]]).all()
    (log_pi * torch.where(torch.isinf(log_pi.detach()), torch.inf, 1.0)).sum().backward()
    for grad in (y.grad, s.grad):
        assert (grad[[1, 2]] == 0).all()
        assert torch.isfinite(grad).all() and (grad[[0, 3]] != 0).all()


def test_batches_that_are_empty_or_all_outside(pool):
    target = Target(Bent(), pool, T)
    y, s = draw(0)
    assert target.log_density(y, s).shape == (0,)
    y, s = draw(3)
    y[:, 1] += 10
    y.requires_grad_()
    log_pi, x = target.log_density_and_positions(y, s)
    assert torch.isneginf(log_pi).all() and x.shape == (3, 3, 3)


def test_wrong_input(pool):
    y, s = draw(3)
    target = Target(Bent(), pool, T)
    for pair in ((y[0], s[0]), (y, s[:2]), (y, s[:, 0])):
        with pytest.raises(InputError, match="shape"):
            target.log_density(*pair)
    with pytest.raises(InputError, match="temperature"):
        Target(Bent(), pool, -1)


def test_complex_coordinates_are_refused_and_not_made_real(pool):
    target = Target(Bent(), pool, T)
    y, s = torch.tensor([[0.1, 1.9]]), torch.tensor([[0.1]])
    assert torch.isfinite(target.log_density(y, s)).all()
    for given in ((y + 1j, s), (y, s + 0j)):
        with pytest.raises(InputError, match="y and s must be real numbers, not complex"):
            target.log_density(*given)
