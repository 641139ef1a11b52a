"""The number of threads is measured and put back."""

import time

import pytest
import torch

from openmm_bg.training.threads import fastest_threads


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
