"""Settings of torch that hold while training: threads and the precision of matrix products.

The number of threads is measured, because two on busy cores can be ten times slower than one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

#: More threads must gain this factor over fewer: less is noise, and leaves no core to others.
GAIN = 1.1
REPEATS = 4


@contextmanager
def fastest_threads(work: Callable[[], object]) -> Iterator[int]:
    """Run the body with the number of threads at which ``work`` is fastest; restore the old number afterwards.

    Candidates are the powers of two up to torch's present number (``OMP_NUM_THREADS`` bounds it), and that number.

    Parameters
    ----------
    work
        One typical piece of work, short: it is called about five times per candidate.
    """
    before = torch.get_num_threads()
    candidates = sorted({2**k for k in range(before.bit_length()) if 2**k < before} | {before})
    best, best_seconds = before, float("inf")
    try:
        if len(candidates) > 1:
            for threads in candidates:
                torch.set_num_threads(threads)
                seconds = _fastest_of(work)
                if seconds * GAIN < best_seconds or best_seconds == float("inf"):
                    best, best_seconds = threads, seconds
            logger.info("The flow runs in %d of %d threads (%.0f ms a step).", best, before, 1e3 * best_seconds)
        torch.set_num_threads(best)
        yield best
    finally:
        torch.set_num_threads(before)


def _fastest_of(work: Callable[[], object]) -> float:
    work()  # caches and lazy initialisation
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]  # a median sees contention, a minimum would not


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """Products of float32 matrices inside the body, "float32" or "bfloat16"; torch's setting is restored afterwards.

    "bfloat16" is a permission: a processor without such products keeps float32 (and torch may still choose a faster
    library for them).
    """
    settings = {"float32": "highest", "bfloat16": "medium"}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(settings[name])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
