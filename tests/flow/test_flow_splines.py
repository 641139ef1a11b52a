"""Splines: identity, tails, periodicity, and finite gradients where things meet."""

import math

import pytest
import torch

from openmm_bg.flow.splines import RationalQuadraticSpline, wrap

K = 8


def knots(spline, params):
    """Positions [F, K+1] of the knots in x of parameters [3K, F, B], first column of the batch."""
    fractions = torch.softmax(params[:K, :, 0], 0)
    half = math.pi + (spline.bound - math.pi) * spline.linear.to(params.dtype)
    unit = spline.knot_weights.to(params.dtype) @ fractions + spline.knot_bias.to(params.dtype)
    return half * unit.t()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_zero_parameters_are_the_identity(direction):
    spline = RationalQuadraticSpline([False, True], K, bound=4.0)
    x = torch.stack([torch.linspace(-9, 9, 101), torch.linspace(-math.pi, 3.14159, 101)]).double()
    y, log_det = getattr(spline, direction)(x, torch.zeros(3 * K, 2, 101, dtype=torch.float64))
    # knot constants are kept in float32, in x and y alike
    assert (y - x).abs().max() < 1e-14 * 100
    assert log_det.abs().max() < 1e-12


def test_zero_derivative_logits_without_bias_are_not_the_identity():
    """The bias ln(e^{1-δ} - 1) is what makes the derivative 1."""
    spline = RationalQuadraticSpline([False], K, bound=4.0)
    spline.derivative_bias = 0.0
    _, log_det = spline(torch.zeros(1, 1) + 0.1, torch.zeros(3 * K, 1, 1))
    assert log_det.abs().max() > 0.05


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_tails(direction):
    spline = RationalQuadraticSpline([False], K, bound=3.0)
    params = torch.randn(3 * K, 1, 1, dtype=torch.float64)
    x = torch.tensor([[-50.0, -3.0, 3.0, 3.5, 1e6]], dtype=torch.float64, requires_grad=True)
    y, log_det = getattr(spline, direction)(x, params.expand(-1, -1, 5).contiguous())
    assert torch.allclose(y, x, rtol=1e-14)
    assert log_det.abs().max() < 1e-12
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, torch.ones_like(slope), rtol=1e-12)


def test_monotone_and_continuous_slope():
    spline = RationalQuadraticSpline([False, True], K, bound=math.pi)
    params = (2.0 * torch.randn(3 * K, 2, 1, dtype=torch.float64)).expand(-1, -1, 200001).contiguous()
    x = torch.linspace(-math.pi, math.pi - 1e-9, 200001).double().expand(2, -1).contiguous()
    y, _ = spline(x, params)
    assert (y.diff(dim=1) > 0).all()
    slopes = y.diff(dim=1) / x.diff(dim=1)
    # C1: the slope changes by O(step) of itself, even across knots (a kink would not shrink with the step)
    coarse = (slopes[:, ::20].diff(dim=1).abs() / slopes[:, ::20][:, 1:]).max()
    fine = (slopes.diff(dim=1).abs() / slopes[:, 1:]).max()
    assert fine < coarse / 8


def test_circular_spline_is_continuous_across_the_cut():
    spline = RationalQuadraticSpline([True], K)
    params = torch.randn(3 * K, 1, 1, dtype=torch.float64).expand(-1, -1, 2).contiguous()
    edge = torch.tensor([[-math.pi, math.pi - 1e-10]], dtype=torch.float64, requires_grad=True)
    y, _ = spline(edge, params)
    (slope,) = torch.autograd.grad(y.sum(), edge)
    assert abs(float(y[0, 1] - y[0, 0]) - 2 * math.pi) < 1e-8
    assert abs(float(slope[0, 1] - slope[0, 0])) < 1e-7
    assert abs(float(slope[0, 0]) - 1.0) > 0.01, "the tied derivative is free"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("size", [0.0, 1.0, 10.0, 100.0])
def test_gradients_are_finite_at_knots_edges_and_tails(dtype, direction, size):
    spline = RationalQuadraticSpline([False, True], K, bound=3.0)
    logits = (size * torch.randn(3 * K, 2, 1)).to(dtype)
    at_knots = knots(spline, logits)
    extra = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=dtype).expand(2, -1)
    extra = torch.stack([extra[0], extra[1].clamp(-math.pi, 3.1415925)])
    x = torch.cat([at_knots, at_knots.nextafter(at_knots + 1), at_knots.nextafter(at_knots - 1), extra], 1)
    x = x.detach().requires_grad_()
    params = logits.expand(-1, -1, x.shape[1]).contiguous().requires_grad_()
    y, log_det = getattr(spline, direction)(x, params)
    grads = torch.autograd.grad(y.sum() + log_det.sum(), [x, params])
    for value in (y, log_det, *grads):
        assert torch.isfinite(value).all()


def test_float32_inverse_of_steep_splines_is_finite_and_close():
    """The discriminant goes below zero here without its floor."""
    spline = RationalQuadraticSpline([False], K, bound=5.0)
    params = 8.0 * torch.randn(3 * K, 1, 200000)
    x = 10.0 * torch.rand(1, 200000) - 5.0
    y, log_det = spline.inverse(x, params)
    exact, _ = spline.inverse(x.double(), params.double())
    assert torch.isfinite(y).all() and torch.isfinite(log_det).all()
    assert (y - exact).abs().quantile(0.99) < 1e-4
    assert (y.abs() <= 5.0 + 1e-5).all()


def test_wrap():
    x = torch.tensor([0.0, math.pi, -math.pi, 3 * math.pi, 1.0, -1.0, 7.0, 1e3], dtype=torch.float64)
    down = torch.nextafter(torch.tensor(math.pi).double(), torch.tensor(0.0).double())
    x = torch.cat([x, torch.stack([down, -down, -math.pi - 4e-16 + 0 * down])])
    y = wrap(x)
    assert ((y >= -math.pi) & (y < math.pi)).all()
    assert torch.allclose(torch.cos(x), torch.cos(y)) and torch.allclose(torch.sin(x), torch.sin(y), atol=1e-12)
    inside = torch.linspace(-3.14159, 3.14159, 1001).double()
    assert torch.equal(wrap(inside), inside)
    every = torch.linspace(-20, 20, 100001)
    assert ((wrap(every) >= -math.pi) & (wrap(every) < math.pi)).all()
