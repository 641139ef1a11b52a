"""Coupling layers: what may depend on what, the start, masks; and the parts of attention."""

import math

import pytest
import torch

from openmm_bg.flow import FlowConfig
from openmm_bg.flow.attention import (
    AttentionConditioner,
    GatedAttentionUnit,
    laplace,
    laplace_inverse,
    relative_buckets,
    rotary_angles,
    rotate,
)
from openmm_bg.flow.coupling import CouplingLayer, alternating_masks

CIRCULAR = [False, True, True, False, True, False, False]
MASK = [True, False, True, True, False, False, True]
POSITIONS = [4, 11, 2, 30, 7, 8, 200]
VARIANTS = [
    {"conditioner": "mlp"},
    {"conditioner": "mlp", "phase_shift": "learned"},
    {"conditioner": "gated"},
    {"conditioner": "attention"},
    {"conditioner": "attention", "n_units": 3},
]


def layer(affine=False, positions=POSITIONS, **changes) -> CouplingLayer:
    torch.manual_seed(5)
    config = FlowConfig(**{"hidden": 16, "d_model": 16, "n_bins": 4, **changes})
    return CouplingLayer(CIRCULAR, MASK, positions, affine, config)


def points(n=5):
    x = torch.randn(len(CIRCULAR), n, dtype=torch.float64)
    x[torch.tensor(CIRCULAR)] = math.pi * (2 * torch.rand(sum(CIRCULAR), n, dtype=torch.float64) - 1)
    return x


def leak(module: CouplingLayer, x: torch.Tensor) -> float:
    """Largest entry of dy/dx that must vanish: transformed on other transformed, conditioning on anything else."""
    jac = torch.autograd.functional.jacobian(lambda a: module(a[:, None])[0][:, 0], x)
    bent = torch.tensor(MASK)
    inner = jac[bent][:, bent]
    off_diagonal = inner - torch.diag(torch.diagonal(inner))
    passive = jac[~bent] - torch.eye(len(MASK), dtype=x.dtype)[~bent]
    assert jac[bent][:, ~bent].abs().max() > 1e-3, "the conditioner must condition"
    return max(off_diagonal.abs().max().item(), passive.abs().max().item())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_jacobian_is_triangular(variant, affine, perturb):
    module = perturb(layer(affine, **variant)).double()
    assert leak(module, points()[:, 0]) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_leaky_conditioner_is_caught(variant, perturb):
    module = perturb(layer(**variant)).double()
    module.conditioning[1] = module.bent[2]
    assert leak(module, points()[:, 0]) > 1e-3


def test_a_residual_that_carries_the_value_is_caught(perturb):
    """Attention whose transformed tokens start from their value: the leak that a residual would make."""
    module = perturb(layer(conditioner="attention")).double()
    original, bent = module.conditioner.forward, module.bent

    def with_value(x, forward=module.forward):
        target = module.conditioner.target
        module.conditioner.__dict__["forward"] = lambda given: original(given) + x[bent[1]] * target.sum()
        result = forward(x)
        del module.conditioner.__dict__["forward"]
        return result

    module.__dict__["forward"] = with_value
    assert leak(module, points()[:, 0]) > 1e-3


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_identity_at_start(variant, affine, direction):
    x = points(50)
    y, log_det = getattr(layer(affine, **variant).eval(), direction)(x)
    assert (y - x).abs().max() < 1e-12  # also under the phase shifts, which are not zero
    assert log_det.abs().max() < 1e-12


def test_phase_shifts_are_random_and_move_the_fixed_point(perturb):
    module = perturb(layer()).double()
    assert module.phase.abs().min() > 1e-3
    x = points(1)
    x[torch.tensor(CIRCULAR)] = -math.pi
    moved = (module(x)[0] - x)[torch.tensor(CIRCULAR) & torch.tensor(MASK)]
    assert moved.abs().min() > 1e-6
    module.phase.zero_()
    fixed = (module(x)[0] - x)[torch.tensor(CIRCULAR) & torch.tensor(MASK)]
    assert fixed.abs().max() < 1e-12  # without shifts a tied spline fixes the cut
    assert isinstance(layer(phase_shift="learned").phase, torch.nn.Parameter)


def test_every_parameter_gets_a_gradient(perturb):
    for variant in VARIANTS:
        module = perturb(layer(**variant))
        y, log_det = module(points(20).float())
        (y.square().sum() + log_det.sum()).backward()
        for name, p in module.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            assert p.grad.abs().max() > 0.0, name


def test_initial_gradients_of_attention_are_not_shut():
    """With the bias at 0, f = 0.006, and the value path would start with a quarter of the gradient or less."""
    sizes = {}
    for start in ("default", "shut"):
        module = layer(conditioner="attention").train(False)
        torch.nn.init.normal_(module.conditioner.heads[0].weight, std=0.1)
        if start == "shut":
            torch.nn.init.zeros_(module.conditioner.last.bias)
        y, log_det = module(points(50).float())
        (y.square().sum() + log_det.sum()).backward()
        sizes[start] = module.conditioner.last.value.weight.grad.norm().item()
    assert sizes["default"] > 3 * sizes["shut"]


def test_dropout_is_active_in_training_only(perturb):
    module = perturb(layer(conditioner="attention"))
    x = points(20).float()
    assert torch.equal(module(x)[0], module(x)[0])
    module.train()
    assert not torch.equal(module(x)[0], module(x)[0])


def test_attention_sees_global_positions(perturb):
    x = points(20).float()
    here = perturb(layer(conditioner="attention"))
    there = perturb(layer(conditioner="attention", positions=[p + 3 * i for i, p in enumerate(POSITIONS)]))
    there.load_state_dict(here.state_dict())
    assert (here(x)[0] - there(x)[0]).abs().max() > 1e-4
    # rotary and T5 are relative: a common offset changes nothing
    moved = perturb(layer(conditioner="attention", positions=[p + 40 for p in POSITIONS]))
    moved.load_state_dict(here.state_dict())
    assert (here(x)[0] - moved(x)[0]).abs().max() < 1e-4


def test_gated_attention_unit_is_the_masked_formula(perturb):
    """Against the formula over all tokens with an explicit mask, written out."""
    positions, masked = [0, 3, 4, 9, 12, 40], torch.tensor([False, True, False, True, True, False])
    keys = [p for p, m in zip(positions, masked, strict=True) if not m]
    unit = perturb(GatedAttentionUnit(positions, keys, 10, 8, 6, 0.1)).double()
    x = torch.randn(4, 6, 10, dtype=torch.float64)

    silu = torch.nn.functional.silu
    hat = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * unit.norm.scale
    v, u, z = silu(unit.value(hat)), silu(unit.gate(hat)), silu(unit.shared(hat))
    q, k = unit.gamma_q * z + unit.beta_q, unit.gamma_k * z + unit.beta_k
    scores = torch.zeros(4, 6, 6, dtype=torch.float64)
    for i, pi in enumerate(positions):
        for j, pj in enumerate(positions):
            for pair in range(4):  # the product of rotated pairs depends on the difference of positions
                angle = (pi - pj) * 10000.0 ** (-2 * pair / 8)
                a, b = q[:, i, pair], q[:, i, pair + 4]
                c, d = k[:, j, pair], k[:, j, pair + 4]
                scores[:, i, j] += (a * c + b * d) * math.cos(angle) + (a * d - b * c) * math.sin(angle)
    bias = unit.bias[relative_buckets(positions, positions)]
    sigma = math.sqrt(1 / (4 * math.pi))
    weights = 0.5 * (1 + torch.erf((scores / 3 + bias - math.sqrt(0.5)) / (sigma * math.sqrt(2))))
    weights = weights * (~masked).to(weights.dtype)
    expected = x + unit.output(u * (weights @ v))
    got = unit(x, x[:, ~masked])
    assert (got - expected).abs().max() < 1e-6  # rotary constants are float32
    one = unit(x[:1], x[:1, ~masked])
    assert (one - expected[:1]).abs().max() < 1e-6


def conditioner_written_out(c, x):
    """Tokens of the full width, the unit over them, and the heads: as the paper has it."""
    line, turns = x[: c.n_linear], x[c.n_linear :]
    angles, folded = c.fold * turns, (c.fold > 1).to(x.dtype)
    circles = torch.stack([angles.cos(), angles.sin(), folded * turns.cos(), folded * turns.sin()], -1)
    circles = circles.transpose(0, 1) @ c.embed_angle.weight.t()
    seen = torch.cat([line.t()[..., None] @ c.embed_value.weight.t(), circles], 1)
    h = torch.nn.functional.silu(c.mix(c.last(c.target.expand(x.shape[1], -1, -1), seen + c.position)))
    starts = [sum(c.group_sizes[:i]) for i in range(len(c.heads))]
    rows = [head(h[:, start : start + n]) for head, start, n in zip(c.heads, starts, c.group_sizes, strict=True)]
    return torch.cat([row.permute(2, 1, 0).reshape(-1, x.shape[1]) for row in rows])


@pytest.mark.parametrize("n_linear, folds", [(2, [1, 3, 2]), (0, [1, 1]), (3, []), (0, [])])
def test_keys_without_history_need_no_tokens(n_linear, folds, perturb):
    """One unit is computed from the features of the tokens, never of their width: the same function and gradients."""
    torch.manual_seed(2)
    n = n_linear + len(folds)
    c = perturb(
        AttentionConditioner([0, 3, 5, 9, 40][:n], n_linear, folds, [1, 2, 50], [2, 1], [2, 4], 10, 8, 6, 0.1, 1)
    ).double()
    x = torch.randn(n, 7, dtype=torch.float64, requires_grad=True)
    got, expected = c(x), conditioner_written_out(c, x)
    assert got.shape == (8, 7)
    assert (got - expected).abs().max() < 1e-13
    variables = [x, *c.parameters()]
    towards = torch.randn_like(got)
    found, wanted = (torch.autograd.grad(out, variables, towards, materialize_grads=True) for out in (got, expected))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_log_q_does_not_depend_on_whether_a_gradient_is_wanted(perturb):
    """To the bit: torch's products of arrays of three dimensions choose their kernel by it."""
    c = perturb(AttentionConditioner([0, 3, 5, 9, 40], 2, [1, 3, 2], [1, 2, 50], [2, 1], [2, 4], 16, 8, 8, 0.1, 1))
    x = torch.randn(5, 30)
    with torch.no_grad():
        without = c(x)
    assert torch.equal(c(x), without)


def test_a_token_that_vanishes_is_finite(perturb):
    """Its norm comes from a quadratic form, which rounding may take below zero."""
    c = perturb(AttentionConditioner([0, 3, 5], 3, [], [1, 2], [2], [2], 128, 8, 6, 0.1, 1))
    with torch.no_grad():
        c.position.copy_(-1.7 * c.embed_value.weight.t().expand(3, -1))
    x = 1.7 * torch.ones(3, 1) * (1.0 + 1e-7 * torch.arange(-20, 20))
    x.requires_grad_()
    rows = c(x)
    rows.sum().backward()
    assert torch.isfinite(rows).all() and torch.isfinite(x.grad).all()


def test_laplace():
    x = torch.tensor([0.0, math.sqrt(0.5)], dtype=torch.float64, requires_grad=True)
    f = laplace(x)
    (slope,) = torch.autograd.grad(f.sum(), x)
    f = f.detach()
    assert abs(float(f[1]) - 0.5) < 1e-12 and abs(float(f[0]) - 0.006) < 2e-4
    assert abs(float(slope[1]) - math.sqrt(2.0)) < 1e-12
    assert abs(float(laplace(torch.tensor(laplace_inverse(0.1)))) - 0.1) < 1e-5


def test_buckets_and_rotary():
    buckets = relative_buckets([50], list(range(400)))[0]
    assert buckets.min() >= 0 and buckets.max() < 32
    assert buckets[50] == 0 and buckets[49] == 1 and buckets[51] == 17
    assert (buckets[50:].diff()[1:] >= 0).all() and (buckets[:51].flip(0).diff() >= 0).all()
    assert buckets[399] == 31 and buckets[50 - 7] == 7
    angles = rotary_angles([5, 9], 8)
    q, k = torch.randn(1, 8), torch.randn(1, 8)
    a = rotate(q, angles[:1].cos(), angles[:1].sin()) @ rotate(k, angles[1:].cos(), angles[1:].sin()).t()
    shifted = rotary_angles([105, 109], 8)
    b = rotate(q, shifted[:1].cos(), shifted[:1].sin()) @ rotate(k, shifted[1:].cos(), shifted[1:].sin()).t()
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_masks(n):
    masks = torch.tensor(alternating_masks(n, 12, torch.Generator().manual_seed(0)))
    assert (masks.sum(0) == 6).all(), "every feature equally often"
    sizes = masks.sum(1)
    assert ((sizes - n / 2).abs() <= 0.5).all(), "balanced halves"
    m = masks.double()
    meets = (m.t() @ (1 - m)) > 0  # i is transformed while j conditions
    assert meets[~torch.eye(n, dtype=torch.bool)].all()
    first_two = m[:4]
    if n > 4:
        fixed = (first_two.t() @ (1 - first_two)) > 0
        assert not fixed[~torch.eye(n, dtype=torch.bool)].all(), "two fixed patterns would not be enough"


def test_one_feature_is_always_transformed():
    assert alternating_masks(1, 3, torch.Generator()) == [[True]] * 3
