"""The variance loss: a regression whose minimum is the target, whatever the samples."""

import math

import pytest
import torch

from openmm_bg.training.buffer import ResampledBuffer
from openmm_bg.training.losses import log_variance


class Gaussian(torch.nn.Module):
    def __init__(self, mean, log_scale):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_scale = torch.nn.Parameter(torch.tensor(log_scale, dtype=torch.float64))

    def log_prob(self, y):
        return (-0.5 * ((y - self.mean) / self.log_scale.exp()) ** 2 - self.log_scale).sum(-1)


LOG_Z = 7.0 + 2 * math.log(2.0)  # of `target`, against a density that leaves out (2π)^(-1/2) for each dimension


def target(y):
    return -0.5 * ((y - 1.0) / 2.0).square().sum(-1) + 7.0  # N(1, 2²) up to a constant


@pytest.fixture
def samples():
    return 3.0 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_gradient_is_that_of_half_the_mean_square(samples):
    density = Gaussian([0.3, -0.2], [0.4, 0.1]).double()
    result = log_variance(density, samples, target(samples), 6.5, clip=1e6)
    result.loss.backward()
    got = [p.grad.clone() for p in density.parameters()]
    density.zero_grad()
    residual = target(samples) - density.log_prob(samples) - 6.5
    half = 0.5 * residual.square().mean()
    half.backward()
    for a, p in zip(got, density.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)
    assert float(result.residual) == pytest.approx(2.0 * float(half), rel=1e-9)


def test_samples_that_do_not_count(samples):
    """Value, gradient and residual are those of the others; π may vanish there."""
    density = Gaussian([0.3, -0.2], [0.4, 0.1])
    keep = torch.arange(len(samples)) % 4 != 0
    log_density = torch.where(keep, target(samples), -torch.inf)
    strange = torch.where(torch.arange(len(samples))[:, None] % 8 == 0, torch.inf, samples)  # none that counts
    found = log_variance(density, strange, log_density, torch.tensor(LOG_Z, dtype=torch.float64), keep=keep)
    alone = log_variance(density, samples[keep], target(samples[keep]), LOG_Z)
    for mine, theirs in zip(found, alone, strict=True):
        assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    parameters = list(density.parameters())
    gradients = (torch.autograd.grad(result.loss, parameters) for result in (found, alone))
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9)
    everything = log_variance(density, samples, log_density, LOG_Z)
    assert float(everything.residual.detach()) != pytest.approx(float(alone.residual.detach()), rel=1e-3)


@pytest.mark.parametrize("strange", [0.0, -1.0, math.inf, math.nan])
def test_samples_that_do_not_count_may_lie_where_there_is_no_density(strange):
    """As a bond length of 0 does. Deliberate error: they count."""

    class LogNormal(Gaussian):
        def log_prob(self, y):
            return super().log_prob(y.log()) - y.log().sum(-1)

    density = LogNormal([0.1, 0.2], [0.0, 0.3])
    y = torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    for first in (0, 1):  # whether the first row counts
        keep = torch.arange(40) % 2 == first
        given = torch.where(keep[:, None], y, strange)
        log_density = target(given)
        found = log_variance(density, given, log_density, LOG_Z, keep=keep)
        alone = log_variance(density, y[keep], log_density[keep], LOG_Z)
        assert float(found.loss.detach()) == pytest.approx(float(alone.loss.detach()), rel=1e-12)
        gradients = (torch.autograd.grad(result.loss, list(density.parameters())) for result in (found, alone))
        for mine, theirs in zip(*gradients, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9)
        assert not math.isfinite(float(log_variance(density, given, log_density, LOG_Z).loss.detach()))


def test_every_sample_is_silent_at_the_optimum(samples):
    density = Gaussian([1.0, 1.0], [0.6931471805599453] * 2).double()
    result = log_variance(density, samples, target(samples), LOG_Z)
    result.loss.backward()
    assert float(result.residual) < 1e-20
    assert all(float(p.grad.abs().max()) < 1e-10 for p in density.parameters())


def test_one_clash_does_not_own_the_batch(samples):
    density = Gaussian([0.3, -0.2], [0.4, 0.1]).double()
    log_density = target(samples)
    log_density[0] -= 1e6
    result = log_variance(density, samples, log_density, LOG_Z, clip=2.0)
    assert float(result.residual) <= 4.0


def test_training_finds_the_target(samples):
    density = Gaussian([0.0, 0.0], [0.0, 0.0]).double()
    optimizer = torch.optim.Adam(density.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        log_variance(density, samples, target(samples), LOG_Z).loss.backward()
        optimizer.step()
    torch.testing.assert_close(density.mean.detach(), torch.ones(2, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(density.log_scale.detach().exp(), 2.0 * torch.ones(2).double(), atol=1e-3, rtol=0)


class Leaky(torch.nn.Module):
    """Uniform on [0, 1], where the target is, but for a share ε that lies on [2, 3], where there is none."""

    def __init__(self, share):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(math.log(share / (1 - share)), dtype=torch.float64))

    def log_prob(self, y):
        inside = torch.nn.functional.logsigmoid(-self.logit)
        return torch.where(y[:, 0] < 1.5, inside, torch.nn.functional.logsigmoid(self.logit))

    def sample(self, n):
        lost = torch.rand(n, dtype=torch.float64) < torch.sigmoid(self.logit)
        y = (torch.rand(n, dtype=torch.float64) + 2.0 * lost)[:, None]
        return y, self.log_prob(y)


class Inside:
    def log_density(self, y, s):
        return torch.where(y[:, 0] < 1.5, 3.0, -torch.inf).double()


def leaky_buffer(density, n):
    buffer = ResampledBuffer(n_batches=1)
    buffer.refill(density, Inside(), torch.zeros(n, 0, dtype=torch.float64))
    return buffer


def test_log_z_counts_samples_without_weight():
    """The mean weight of n samples with the share ε lost: its error is that of the number lost."""
    torch.manual_seed(0)
    share, n = 0.2, 20_000
    buffer = leaky_buffer(Leaky(share), n)
    error = math.sqrt(share / (1 - share) / n)
    assert buffer.log_z == pytest.approx(3.0, abs=4 * error)
    assert abs(buffer.median - 3.0) > 40 * error  # what the mean over the kept samples would give


@pytest.mark.parametrize("right", [True, False])
def test_lost_mass_comes_back(right):
    """With log Z from the samples that were kept alone the residual is nothing, and the loss of mass stays."""
    torch.manual_seed(0)
    density = Leaky(0.2)
    optimizer = torch.optim.Adam(density.parameters(), lr=0.05)
    for _ in range(200):
        buffer = leaky_buffer(density, 2000)
        y = buffer.draw(500, torch.Generator().manual_seed(1)).y
        optimizer.zero_grad()
        log_z = buffer.log_z if right else buffer.median
        log_variance(density, y, torch.full([500], 3.0, dtype=torch.float64), log_z).loss.backward()
        optimizer.step()
    share = float(torch.sigmoid(density.logit.detach()))
    assert share < 0.1 if right else share == pytest.approx(0.2, abs=1e-9)


def test_log_z_is_part_of_the_state():
    torch.manual_seed(0)
    buffer, other = leaky_buffer(Leaky(0.2), 500), ResampledBuffer(n_batches=1)
    other.load_state_dict(buffer.state_dict())
    assert other.log_z == buffer.log_z != 0.0
