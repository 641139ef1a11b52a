"""Less memory and less precision in training: gradients stay, splines stay, samples and weights never notice."""

from __future__ import annotations

import functools

import pytest
import torch

from openmm_bg.flow import FlowConfig, build_flow, coupling
from openmm_bg.flow.coupling import CouplingLayer, economical

BFLOAT16_ROUNDOFF = 2.0**-9


@pytest.fixture
def flow(make_layout, perturb):
    def build(conditioner="attention", dropout=0.3):
        config = FlowConfig(
            n_backbone_blocks=2, n_joint_blocks=4, conditioner=conditioner, d_model=16, d_key=8, d_value=8, hidden=16,
            linear="mixed", dropout=dropout,
        )  # fmt: skip
        return perturb(build_flow(make_layout("LCLCclclCC", fold=1, kappa=1.0), config), size=0.2)

    return build


def gradients(flow, way, y):
    """Loss and gradients, those of y included, with dropout from a fixed seed."""
    flow.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    y = y.clone().requires_grad_(True)
    loss = flow.log_prob(y).mean() if way == "inverse" else (lambda x, d: (x.sin().sum(1) + d).mean())(*flow(y))
    loss.backward()
    return loss.detach(), [y.grad, *(p.grad for p in flow.parameters())]


@pytest.mark.parametrize("conditioner", ["attention", "mlp", "gated"])
@pytest.mark.parametrize("way", ["inverse", "forward"])
def test_recomputed_gradients_are_the_same_bits(flow, conditioner, way):
    flow = flow(conditioner).train()
    y = torch.randn(12, 10)
    loss, plain = gradients(flow, way, y)
    with economical(flow, recompute=True, bfloat16=False):
        again, recomputed = gradients(flow, way, y)
    assert torch.equal(loss, again)
    for a, b in zip(plain, recomputed, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_other_dropout_in_the_second_pass_is_noticed(flow, monkeypatch):
    """The companion: without the random state of the first pass gradients differ."""
    flow = flow().train()
    y = torch.randn(12, 10)
    _, plain = gradients(flow, "inverse", y)
    careless = functools.partial(coupling.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(coupling, "checkpoint", careless)
    with economical(flow, recompute=True, bfloat16=False):
        _, recomputed = gradients(flow, "inverse", y)
    assert any(not torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True) if a is not None)


def kept_bytes(flow, y):
    """Memory that the graph of a loss holds besides parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*flow.parameters(), *flow.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = flow.log_prob(y).mean()
    assert loss.requires_grad
    return sum(kept.values())


def test_recomputing_keeps_little(flow):
    flow = flow().train()
    y = torch.randn(64, 10)
    plain = kept_bytes(flow, y)
    with economical(flow, recompute=True, bfloat16=False):
        assert kept_bytes(flow, y) < 0.1 * plain


def test_flags_change_nothing_without_gradients_and_end_with_the_block(flow):
    flow = flow()
    y = torch.randn(8, 10)
    with torch.no_grad():
        before = flow.log_prob(y)
        with pytest.raises(RuntimeError), economical(flow, recompute=True, bfloat16=True):
            # evaluation mode: what samples and weights are computed in
            assert torch.equal(flow.log_prob(y), before)
            raise RuntimeError
        flow.train()
        torch.manual_seed(0)
        first = flow.log_prob(y)
        torch.manual_seed(0)
        assert torch.equal(flow.log_prob(y), first)
    assert not any(getattr(module, name, False) for module in flow.modules() for name in ("recompute", "low_precision"))


@pytest.mark.parametrize("conditioner", ["attention", "gated"])
def test_an_economical_flow_scripts_to_the_same_function(flow, conditioner):
    flow = flow(conditioner).double()
    y = torch.randn(8, 10, dtype=torch.float64)
    with economical(flow, recompute=True, bfloat16=True):
        scripted = torch.jit.script(flow)
    torch.testing.assert_close(scripted.log_prob(y), flow.log_prob(y), rtol=1e-9, atol=1e-9)
    assert scripted.log_prob(y).requires_grad


@pytest.mark.parametrize("conditioner", ["attention", "mlp", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_stays_inside_the_networks(flow, conditioner, dtype):
    """What enters the splines and leaves the flow has the dtype of the coordinates; the networks do use bfloat16."""
    flow = flow(conditioner, dropout=0.0).train()
    inside, splines, grads = set(), set(), set()
    for module in flow.modules():
        if isinstance(module, CouplingLayer):
            module.conditioner.register_forward_hook(lambda m, x, out: inside.add(out.dtype))
            module.spline.register_forward_hook(lambda m, x, out: splines.update(t.dtype for t in (*x, *out)))
    y = torch.randn(12, 10, dtype=dtype)
    with economical(flow, recompute=False, bfloat16=True):
        log_q = flow.log_prob(y)
        log_q.mean().backward()
    grads = {p.grad.dtype for p in flow.parameters() if p.grad is not None}
    assert inside == {torch.bfloat16} and splines == {dtype} and log_q.dtype == dtype
    assert grads == {torch.float32}


@pytest.mark.parametrize("conditioner", ["attention", "mlp", "gated"])
def test_bfloat16_moves_the_loss_by_rounding_alone(flow, conditioner):
    """To first order roundings of size u in what leaves the networks move the loss by at most u Σ |row ∂loss/∂row|.

    Networks round at several places one after the other, the last of which is what leaves them: twelve at most (six
    products, each with its input and its output).
    """
    flow = flow(conditioner, dropout=0.0).train()
    y = torch.randn(64, 10)
    rows = []

    def remember(module, x, out):
        out.retain_grad()
        rows.append(out)

    hooks = [m.conditioner.register_forward_hook(remember) for m in flow.modules() if isinstance(m, CouplingLayer)]
    loss = -flow.log_prob(y).mean()
    loss.backward()
    for hook in hooks:
        hook.remove()
    scale = sum(float((row.detach() * row.grad).abs().sum()) for row in rows)
    with economical(flow, recompute=False, bfloat16=True):
        low = -flow.log_prob(y).mean()
    assert 0.0 < abs(float(low.detach() - loss.detach())) < 12 * BFLOAT16_ROUNDOFF * scale
