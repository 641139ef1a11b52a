"""Threads are measured, the precision of products is chosen, and both are put back."""

import types

import pytest
import torch

import openmm_bg.training.threads
from openmm_bg.training import LossWeights, Stage, Trainer
from openmm_bg.training.threads import fastest_threads, product_precision


@pytest.mark.parametrize("slow_at, expected", [(1, 4), (4, 1)])
def test_the_faster_number_is_used_and_the_old_one_restored(slow_at, expected, monkeypatch):
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)  # no real one: the machine may be busy
    monkeypatch.setattr(openmm_bg.training.threads, "time", clock)

    def work():
        clock.now += 0.02 if torch.get_num_threads() in (slow_at, 2) else 0.002

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with fastest_threads(work) as chosen:
            assert chosen == expected == torch.get_num_threads()
        assert torch.get_num_threads() == 4
        with pytest.raises(RuntimeError), fastest_threads(work):
            raise RuntimeError
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_product_precision_holds_inside_only():
    before = torch.get_float32_matmul_precision()
    for name, setting in (("float32", "highest"), ("bfloat16", "medium")):
        with product_precision(name):
            assert torch.get_float32_matmul_precision() == setting
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError), product_precision("bfloat16"):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_low_precision_is_for_gradients_alone(kit, monkeypatch):
    """Samples that get weights, and validation, are computed in float32; afterwards all is as before."""
    before = torch.get_float32_matmul_precision()
    seen = {"gradient": set(), "sample": set(), "validation": set()}
    flow = kit.small_flow()
    config = kit.small_config(
        [Stage(name="buffer", losses=LossWeights(buffer=1.0, nll=1.0), steps=2)], network_precision="bfloat16",
        ema_decay=0.0, validate_every=1,
    )  # fmt: skip
    log_prob, sample = flow.log_prob, flow.sample

    def noted_log_prob(y):
        seen["gradient" if torch.is_grad_enabled() else "validation"].add(torch.get_float32_matmul_precision())
        return log_prob(y)

    def noted_sample(n):
        seen["sample"].add(torch.get_float32_matmul_precision())
        return sample(n)

    monkeypatch.setattr(flow, "log_prob", noted_log_prob)
    monkeypatch.setattr(flow, "sample", noted_sample)
    Trainer(flow, kit.torsion_data(200), config, target=kit.TorsionTarget(), progress=False).run()
    assert seen == {"gradient": {"medium"}, "sample": {"highest"}, "validation": {before}}
    assert torch.get_float32_matmul_precision() == before


def test_checkpointing_leaves_the_curve_as_it_is(kit):
    """Bit for bit, dropout included; samples drawn between keep their random numbers."""
    stages = [Stage(name="all", losses=LossWeights(nll=1.0, kl=0.1, w2=0.1), steps=4)]
    curves = []
    for recompute in (False, True):
        flow = kit.small_flow(conditioner="attention", d_model=8, d_key=4, d_value=8, linear="spline", dropout=0.3)
        trainer = Trainer(
            flow, kit.torsion_data(300), kit.small_config(stages, gradient_checkpointing=recompute),
            target=kit.TorsionTarget(), backbone_atoms=[0, 1, 2], progress=False,
        )  # fmt: skip
        rows = trainer.run()
        curves.append([(row["loss"], row["gradient_norm"], row["kl"], row["w2"]) for row in rows])
    assert curves[0] == curves[1]
