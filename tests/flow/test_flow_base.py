"""Base density: normalisation, and samples that follow it."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from openmm_bg.errors import InputError
from openmm_bg.flow import FeatureLayout
from openmm_bg.flow.base import BaseDensity, sample_von_mises

N = 20000
# Critical value of the Kolmogorov-Smirnov statistic at a false-alarm rate of 1e-4 (seeds are fixed).
CRITICAL = stats.kstwo.isf(1e-4, N)
GRID = np.linspace(-math.pi, math.pi, 400001)


def von_mises_cdf(kappa: float, fold: int = 1):
    density = np.exp(kappa * (np.cos(fold * GRID) - 1)) / (2 * math.pi * special.i0e(kappa))
    cdf = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(GRID))])
    assert abs(cdf[-1] - 1.0) < 1e-6
    return lambda x: np.interp(x, GRID, cdf)


@pytest.mark.statistical
@pytest.mark.parametrize("kappa", [0.0, 1e-9, 1e-5, 0.02, 0.5, 3.0, 40.0, 2000.0])
def test_von_mises_samples(kappa):
    torch.manual_seed(11)
    v = sample_von_mises(torch.tensor([kappa, 1.0], dtype=torch.float64), N)
    assert v.dtype == torch.float64 and ((v >= -math.pi) & (v < math.pi)).all()
    assert stats.kstest(v[:, 0].numpy(), von_mises_cdf(kappa)).statistic < CRITICAL
    # the columns are independent
    assert abs(np.corrcoef(np.sin(v.numpy()).T)[0, 1]) < 4.0 / math.sqrt(N)


@pytest.mark.statistical
@pytest.mark.parametrize("kappa, wrong", [(0.5, 0.3), (3.0, 3.5), (40.0, 47.0), (0.02, 0.2)])
def test_a_wrong_concentration_is_seen(kappa, wrong):
    torch.manual_seed(11)
    v = sample_von_mises(torch.tensor([kappa], dtype=torch.float64), N)
    assert stats.kstest(v[:, 0].numpy(), von_mises_cdf(wrong)).statistic > CRITICAL


@pytest.mark.statistical
@pytest.mark.parametrize("fold, kappa", [(1, 2.0), (3, 0.0), (3, 2.0), (3, 30.0)])
def test_base_samples(make_layout, fold, kappa):
    torch.manual_seed(12)
    base = BaseDensity(make_layout("clc", fold=fold, kappa=kappa))
    z = base.sample(N)
    assert z.shape == (N, 3) and z.dtype == torch.float64
    assert ((z[:, [0, 2]] >= -math.pi) & (z[:, [0, 2]] < math.pi)).all()
    for column in (0, 2):
        assert stats.kstest(z[:, column].numpy(), von_mises_cdf(kappa, fold)).statistic < CRITICAL
    assert stats.kstest(z[:, 1].numpy(), stats.norm.cdf).statistic < CRITICAL
    if fold == 3 and kappa > 0:
        assert stats.kstest(z[:, 0].numpy(), von_mises_cdf(kappa, 1)).statistic > CRITICAL


@pytest.mark.parametrize("fold, kappa", [(1, 0.0), (1, 0.7), (3, 5.0), (1, 1000.0), (3, 1e5)])
def test_base_is_normalised(make_layout, fold, kappa):
    base = BaseDensity(make_layout("c", fold=fold, kappa=kappa))
    z = torch.linspace(-math.pi, math.pi, 200001, dtype=torch.float64)[:-1, None]
    total = base(z).exp().mean() * 2 * math.pi  # the rectangle rule converges exponentially for periodic functions
    assert abs(float(total) - 1.0) < 1e-10


def test_base_log_density(make_layout):
    base = BaseDensity(make_layout("lc", kappa=2.0))
    z = torch.tensor([[0.3, 1.1]], dtype=torch.float64)
    expected = stats.norm.logpdf(0.3) + stats.vonmises.logpdf(1.1, 2.0)
    assert abs(float(base(z)) - expected) < 1e-12
    assert base(z.float()).dtype == torch.float32


def test_concentration_must_be_finite():
    layout = FeatureLayout([True], [True], [1], [float("nan")], [0.0], [1.0])
    with pytest.raises(InputError, match="concentration"):
        BaseDensity(layout)
