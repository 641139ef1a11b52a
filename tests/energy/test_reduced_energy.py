"""u = U/kT and its gradient; energies tamed for training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import openmm  # isort: skip
from openmm import unit  # isort: skip

from openmm_bg.energy import BOLTZMANN, ContextPool, reduced_energy, regularise_energy, thermal_energy
from openmm_bg.errors import InputError


@pytest.fixture
def pool(make_context):
    with ContextPool(make_context(), platform="Reference", n_workers=2) as pool:
        yield pool


def test_thermal_energy():
    assert pytest.approx(8.31446261815324e-3, rel=1e-12) == BOLTZMANN
    assert thermal_energy(300) == thermal_energy(300.0 * unit.kelvin) == 300 * BOLTZMANN
    assert thermal_energy(np.float32(300)) == thermal_energy(300)
    for wrong in (0, -1.0, math.nan, math.inf, "300", None, True, 300 * unit.picosecond):
        with pytest.raises(InputError, match="temperature"):
            thermal_energy(wrong)


def test_value_and_type(pool, frames):
    kT = thermal_energy(450)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(frames, dtype=dtype)
        u = reduced_energy(x, pool, 450)
        assert u.dtype == torch.float64 and u.shape == (13,) and not u.requires_grad
        np.testing.assert_allclose(u.numpy(), pool.energies(x) / kT, rtol=1e-14)
        v = reduced_energy(x.requires_grad_(), pool, 450 * unit.kelvin)
        assert v.requires_grad
        np.testing.assert_array_equal(v.detach().numpy(), u.numpy())
        v.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype
        with torch.no_grad():
            assert not reduced_energy(x, pool, 450).requires_grad
    with pytest.raises(InputError, match="tensor"):
        reduced_energy(frames, pool, 450)


def test_gradient_against_finite_differences(pool, frames):
    x = torch.tensor(frames[:4], requires_grad=True)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (weight * reduced_energy(x, pool, 300)).sum().backward()
    rng = np.random.default_rng(5)
    h = 1e-6
    for _ in range(5):
        # The rows' displacements are independent: a mix-up of rows would show.
        d = rng.normal(size=x.shape)
        up, down = (reduced_energy(torch.tensor(frames[:4] + s * h * d), pool, 300) for s in (1, -1))
        numeric = float((weight * (up - down)).sum()) / (2 * h)
        assert float((x.grad * torch.tensor(d)).sum()) == pytest.approx(numeric, rel=1e-6)
        assert abs(numeric) > 1.0


def test_bad_frames_have_no_gradient(pool, frames):
    bad = frames.copy()
    bad[2, 0, 0] = np.nan
    bad[6, 3] = bad[6, 9]
    x = torch.tensor(bad, requires_grad=True)
    u = reduced_energy(x, pool, 300)
    assert torch.isinf(u[[2, 6]]).all() and (u[[2, 6]] > 0).all()
    (u * torch.where(torch.isinf(u.detach()), torch.inf, 1.0)).sum().backward()
    assert (x.grad[[2, 6]] == 0).all()
    y = torch.tensor(frames, requires_grad=True)
    reduced_energy(y, pool, 300).sum().backward()
    rest = [i for i in range(13) if i not in (2, 6)]
    torch.testing.assert_close(x.grad[rest], y.grad[rest])


def test_clash_in_single_precision(pool, frames):
    """A slope beyond single precision, times the small factor of the regulariser, is finite."""
    x = torch.tensor(frames[:1], dtype=torch.float32)
    x[0, 3] = x[0, 9] + 1e-4
    x.requires_grad_()
    u = reduced_energy(x, pool, 300)
    assert 1e36 < float(u.detach()) < math.inf
    regularise_energy(u, cut=1e3, maximum=1e60).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 1e3


def test_regulariser():
    cut, top = 100.0, 1e10
    u = torch.tensor([-50.0, 0.0, 99.0, 100.0, 101.0, 1e5, 1e10, 1e20, math.inf, -math.inf, math.nan])
    u = u.double().requires_grad_()
    f = regularise_energy(u, cut, top)
    ceiling = cut * (1 + math.log(top / cut))
    expected = [-50, 0, 99, 100, cut * (1 + math.log(1.01)), cut * (1 + math.log(1e5 / cut))] + [ceiling] * 5
    np.testing.assert_allclose(f.detach().numpy(), expected, rtol=1e-14)
    f.sum().backward()
    np.testing.assert_allclose(u.grad.numpy(), [1, 1, 1, 1, 1 / 1.01, cut / 1e5, 0, 0, 0, 0, 0], rtol=1e-12)
    # Value and slope are continuous at the cut, and order is kept.
    near = torch.linspace(99.9, 100.1, 2001, dtype=torch.float64, requires_grad=True)
    g = regularise_energy(near, cut, top)
    (slope,) = torch.autograd.grad(g.sum(), near)
    assert float(slope.diff().abs().max()) < 2e-4
    assert (g.diff() > 0).all()
    for wrong in ((10.0, 5.0), (0.0, 5.0), (math.nan, 5.0), (1.0, math.inf)):
        with pytest.raises(InputError, match="cut"):
            regularise_energy(u, *wrong)


def test_regulariser_keeps_the_type():
    u = torch.tensor([1.0, 1e5, math.inf], requires_grad=True)
    f = regularise_energy(u)
    assert f.dtype == torch.float32 and torch.isfinite(f).all()
    f.sum().backward()
    assert torch.isfinite(u.grad).all()
    assert openmm.Platform.getNumPlatforms() > 0
