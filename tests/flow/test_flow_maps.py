"""Every invertible map: inverse, log-determinant against the autograd Jacobian, scripting. New maps add one line."""

import math

import pytest
import torch
from torch import Tensor, nn

from openmm_bg.flow import FlowConfig, build_flow
from openmm_bg.flow.coupling import CouplingLayer, build_stack
from openmm_bg.flow.nsf import NSF
from openmm_bg.flow.splines import RationalQuadraticSpline
from openmm_bg.flow.split import SplitFlow

EPS = torch.finfo(torch.float64).eps
KINDS = "LcLClCcl"  # both kinds in both channels
CIRCULAR = [k in "cC" for k in KINDS]
BACKBONE = [k.isupper() for k in KINDS]
POSITIONS = [3, 0, 1, 7, 4, 5, 2, 6]
MASK = [i % 2 == 0 for i in range(len(KINDS))]
SMALL = {"hidden": 16, "d_model": 16, "n_bins": 5, "bound": 2.5}


class FixedSpline(nn.Module):
    """A spline with constant random parameters, so that it has the interface of the other maps."""

    def __init__(self, circular: list[bool], size: float) -> None:
        super().__init__()
        self.spline = RationalQuadraticSpline(circular, n_bins=6, bound=2.5)
        self.params = nn.Parameter(size * torch.randn(18, len(circular), 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.spline(x, self.params.expand(-1, -1, x.shape[1]).contiguous())

    @torch.jit.export
    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.spline.inverse(y, self.params.expand(-1, -1, y.shape[1]).contiguous())


def coupling(**changes) -> CouplingLayer:
    affine = changes.pop("affine", False)
    return CouplingLayer(CIRCULAR, MASK, POSITIONS, affine, FlowConfig(**{**SMALL, **changes}))


def config(**changes) -> FlowConfig:
    return FlowConfig(**{**SMALL, "n_backbone_blocks": 3, "n_joint_blocks": 4, **changes})


# name: (kinds of its features, builder, size of the noise on its parameters)
MAPS = {
    "interval spline": ("llll", lambda _: FixedSpline([False] * 4, 1.0), 0.0),
    "circular spline": ("cccc", lambda _: FixedSpline([True] * 4, 1.0), 0.0),
    "steep spline": ("llcc", lambda _: FixedSpline([False, False, True, True], 2.5), 0.0),
    "mlp, spline": (KINDS, lambda _: coupling(), 0.3),
    "mlp, affine": (KINDS, lambda _: coupling(affine=True), 0.3),
    "learned phase": (KINDS, lambda _: coupling(phase_shift="learned"), 0.3),
    "attention, spline": (KINDS, lambda _: coupling(conditioner="attention"), 0.2),
    "attention, affine": (KINDS, lambda _: coupling(conditioner="attention", affine=True), 0.2),
    "attention, two units": (KINDS, lambda _: coupling(conditioner="attention", n_units=2), 0.2),
    "stack": (KINDS, lambda _: build_stack(CIRCULAR, POSITIONS, 6, 2, config()), 0.1),
    "split flow": (KINDS, lambda _: SplitFlow(CIRCULAR, BACKBONE, POSITIONS, config()), 0.1),
    "nsf": (KINDS, lambda _: NSF(CIRCULAR, POSITIONS, config(linear="spline")), 0.1),
    "density": (KINDS, lambda layout: build_flow(layout(KINDS), config()), 0.1),
    "density, folded": ("LcC", lambda layout: build_flow(layout("LcC", fold=3, kappa=2.0), config()), 0.1),
}


def build(name: str, make_layout, perturb) -> tuple[nn.Module, Tensor, bool]:
    """The map in float64, points [F, B] (or [B, D]) on it, and whether its batch comes first."""
    kinds, builder, noise = MAPS[name]
    module = perturb(builder(make_layout), noise).double()
    x = torch.stack(
        [math.pi * (2 * torch.rand(40) - 1) if k in "cC" else 2.0 * torch.randn(40) for k in kinds]
    ).double()
    first = name.startswith("density")
    return module, (x.t().contiguous() if first else x), first


def jacobian(function, x: Tensor, batch_first: bool) -> Tensor:
    """[B, F, F], by autograd over the batch summed (the elements of a batch do not mix)."""
    x = x.clone().requires_grad_()
    y = function(x)[0]
    y, axis = (y.t(), 1) if batch_first else (y, 0)
    rows = []
    for row in y:
        (g,) = torch.autograd.grad(row.sum(), x, retain_graph=True)
        rows.append(g if axis else g.t())
    return torch.stack(rows, 1)


@pytest.mark.parametrize("name", MAPS)
def test_inverse(name, make_layout, perturb):
    module, x, first = build(name, make_layout, perturb)
    y, log_det = module(x)
    back, log_det_back = module.inverse(y)
    assert (y - x).abs().max() > 0.05, "the map under test must not be the identity"
    # A rounding error of y is amplified by the inverse Jacobian; 100 operations in the chain.
    amplification = jacobian(module.inverse, y.detach(), first).abs().sum((1, 2)).max().item()
    tolerance = 100 * EPS * max(amplification, 1.0) * y.abs().max().item()
    assert tolerance < 1e-9
    assert (back - x).abs().max() < tolerance
    assert (log_det + log_det_back).abs().max() < 100 * tolerance  # the slope of a narrow bin enters once more
    amplification = jacobian(module, x, first).abs().sum((1, 2)).max().item()
    tolerance = 100 * EPS * max(amplification, 1.0) * x.abs().max().item()
    assert tolerance < 1e-9
    assert (module(back)[0] - y).abs().max() < tolerance


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_log_det_is_the_jacobian_s(name, direction, make_layout, perturb):
    module, x, first = build(name, make_layout, perturb)
    function = getattr(module, direction)
    _, log_det = function(x)
    expected = torch.linalg.slogdet(jacobian(function, x, first)).logabsdet
    assert log_det.abs().max() > 0.05
    assert (log_det - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["mlp, spline", "attention, spline", "mlp, affine"])
def test_a_leak_breaks_the_log_det(name, make_layout, perturb):
    """The test above sees a conditioner that is shown a transformed feature."""
    module, x, first = build(name, make_layout, perturb)
    module.conditioning[0] = module.bent[0]
    expected = torch.linalg.slogdet(jacobian(module, x, first)).logabsdet
    assert (module(x)[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["steep spline", "attention, two units", "split flow", "nsf", "density, folded"])
def test_script_equals_eager(name, make_layout, perturb):
    module, x, _ = build(name, make_layout, perturb)
    if not name.startswith("density"):
        module = Exported(module)
    scripted = torch.jit.script(module)
    for _ in range(3):  # the profiling executor changes its mind after two calls
        for a, b in zip(module(x) + module.inverse(x), scripted(x) + scripted.inverse(x), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


class Exported(nn.Module):
    """Gives a scripted inner map its inverse, which only `FlowDensity` exports.

    Without it, whether there is one depends on what else the process has scripted.
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.forward(x)

    @torch.jit.export
    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(x)
