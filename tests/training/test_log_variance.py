"""The variance loss: a regression whose minimum is the target, whatever the samples."""

import pytest
import torch

from openmm_bg.training.losses import log_variance


class Gaussian(torch.nn.Module):
    def __init__(self, mean, log_scale):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_scale = torch.nn.Parameter(torch.tensor(log_scale, dtype=torch.float64))

    def log_prob(self, y):
        return (-0.5 * ((y - self.mean) / self.log_scale.exp()) ** 2 - self.log_scale).sum(-1)


def target(y):
    return -0.5 * ((y - 1.0) / 2.0).square().sum(-1) + 7.0  # N(1, 2²) up to a constant


@pytest.fixture
def samples():
    return 3.0 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_gradient_is_that_of_half_the_variance(samples):
    density = Gaussian([0.3, -0.2], [0.4, 0.1]).double()
    result = log_variance(density, samples, target(samples), clip=1e6)
    result.loss.backward()
    got = [p.grad.clone() for p in density.parameters()]
    density.zero_grad()
    residual = target(samples) - density.log_prob(samples)
    half = 0.5 * residual.var(correction=0)
    half.backward()
    for a, p in zip(got, density.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)
    assert float(result.residual) == pytest.approx(2.0 * float(half), rel=1e-9)


def test_every_sample_is_silent_at_the_optimum(samples):
    density = Gaussian([1.0, 1.0], [0.6931471805599453] * 2).double()
    result = log_variance(density, samples, target(samples))
    result.loss.backward()
    assert float(result.residual) < 1e-20
    assert all(float(p.grad.abs().max()) < 1e-10 for p in density.parameters())


def test_one_clash_does_not_own_the_batch(samples):
    density = Gaussian([0.3, -0.2], [0.4, 0.1]).double()
    log_density = target(samples)
    log_density[0] -= 1e6
    result = log_variance(density, samples, log_density, clip=2.0)
    assert float(result.residual) <= 4.0


def test_training_finds_the_target(samples):
    density = Gaussian([0.0, 0.0], [0.0, 0.0]).double()
    optimizer = torch.optim.Adam(density.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        log_variance(density, samples, target(samples)).loss.backward()
        optimizer.step()
    torch.testing.assert_close(density.mean.detach(), torch.ones(2, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(density.log_scale.detach().exp(), 2.0 * torch.ones(2).double(), atol=1e-3, rtol=0)
