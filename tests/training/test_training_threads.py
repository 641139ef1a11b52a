"""Threads are measured, the precision of products is chosen, and both are put back."""

import time

import pytest
import torch

from openmm_bg.training import LossWeights, Stage, Trainer
from openmm_bg.training.threads import fastest_threads, matmul_precision


@pytest.mark.parametrize("slow_at, expected", [(1, 4), (4, 1)])
def test_the_faster_number_is_used_and_the_old_one_restored(slow_at, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        work = lambda: time.sleep(0.02 if torch.get_num_threads() in (slow_at, 2) else 0.002)  # noqa: E731
        with fastest_threads(work) as chosen:
            assert chosen == expected == torch.get_num_threads()
        assert torch.get_num_threads() == 4
        with pytest.raises(RuntimeError), fastest_threads(work):
            raise RuntimeError
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_matmul_precision_holds_inside_only():
    before = torch.get_float32_matmul_precision()
    other = "high" if before == "medium" else "medium"
    with matmul_precision(other):
        assert torch.get_float32_matmul_precision() == other
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError), matmul_precision(other):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_training_sets_the_matmul_precision(kit, monkeypatch):
    """And whatever comes afterwards computes as before."""
    before = torch.get_float32_matmul_precision()
    other = "high" if before == "medium" else "medium"
    seen = set()
    flow = kit.small_flow()
    genuine = flow.log_prob
    monkeypatch.setattr(flow, "log_prob", lambda y: seen.add(torch.get_float32_matmul_precision()) or genuine(y))
    config = kit.small_config([Stage(name="nll", losses=LossWeights(nll=1.0), steps=2)], matmul_precision=other)
    Trainer(flow, kit.torsion_data(200), config, progress=False).run()
    assert seen == {other} and torch.get_float32_matmul_precision() == before
