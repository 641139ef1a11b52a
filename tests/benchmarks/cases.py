"""Energies, coordinates and flows as cases of pytest-benchmark: growth with batch and atoms, and commits side by side.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/cases.py --benchmark-columns=min,median,ops
    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/cases.py --benchmark-save=before
    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/cases.py --benchmark-compare

A group has the ways to do one thing, a row the milliseconds of a whole batch; ``extra_info`` in saved files has what
one frame takes. Nothing here passes or fails by its time. Ratios for the docs come from the scripts beside this one,
which let the ways take turns in one run.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_bg.coordinates import build_zmatrix
from openmm_bg.coordinates.transform import InternalCoordinates
from openmm_bg.energy import ContextPool
from openmm_bg.flow import FlowConfig, build_flow

BATCHES = (16, 64, 256, 1024)


def script(name: str) -> types.ModuleType:
    """One of the scripts beside this one."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def measure(benchmark: Any, group: str, batch: int, call: Callable[[], object]) -> None:
    call()  # what is made on first use
    benchmark.group = group
    benchmark(call)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["microseconds a frame"] = 1e6 * benchmark.stats.stats.min / batch


@pytest.fixture(scope="module", params=["dipeptide-obc1", "hp35-obc2"])
def molecule(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, System, positions [N, 3] nm, and the scripts' functions."""
    energies = script("energies")
    yield (request.param, *energies.load(request.param), energies)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", ["twin", "pool", "plain loop"])
def test_energies_and_forces(benchmark: Any, molecule: tuple[str, Any, Any, Any], way: str, batch: int) -> None:
    name, system, x, energies = molecule
    frames = x + 0.001 * np.random.default_rng(0).normal(size=(batch, *x.shape))
    if way == "plain loop":
        measure(benchmark, f"energies of {name}, batch {batch}", batch, energies.plain_loop("CPU", system, frames))
        return
    options = {"platform": "twin"} if way == "twin" else {"n_workers": 1}
    with ContextPool(energies.context_on("CPU", system, x), positions=frames[:2], **options) as pool:
        measure(benchmark, f"energies of {name}, batch {batch}", batch, lambda: pool.energies_and_forces(frames))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["dipeptide", "hp35"])
@pytest.mark.parametrize("way", ["q to x and backward", "x to q"])
def test_coordinates(benchmark: Any, name: str, way: str, batch: int) -> None:
    topology, x = script("coordinates").structure(name)
    internal = InternalCoordinates(build_zmatrix(topology))
    noise = 0.004 * np.random.default_rng(0).normal(size=(batch, *x.shape))
    positions = torch.tensor(x + noise, dtype=torch.float32)
    q = [part.detach().requires_grad_() for part in internal.to_internal(positions)]
    towards = torch.randn_like(positions)

    def there() -> object:
        return torch.autograd.grad(internal.to_positions(*q), q, towards)

    call = there if way == "q to x and backward" else torch.no_grad()(lambda: internal.to_internal(positions))
    measure(benchmark, f"coordinates of {name}, {way}", batch, call)


@pytest.mark.parametrize("batch", BATCHES[:3])
@pytest.mark.parametrize(("preset", "name"), [("cpu", "dipeptide"), ("protein", "hp35")])
@pytest.mark.parametrize("way", ["forward", "inverse", "step"])
def test_flow(benchmark: Any, preset: str, name: str, way: str, batch: int) -> None:
    torch.manual_seed(0)
    flow = build_flow(script("training").layout(name), FlowConfig.preset(preset)).eval()
    with torch.no_grad():
        z = flow.sample_base(batch)
        y, _ = flow(z)

    def step() -> None:
        flow.zero_grad(set_to_none=True)
        (-flow.log_prob(y).mean()).backward()

    ways: dict[str, Callable[[], object]] = {
        "forward": torch.no_grad()(lambda: flow(z)),
        "inverse": torch.no_grad()(lambda: flow.inverse(y)),
        "step": step,
    }
    measure(benchmark, f"flow {preset} of {name}, batch {batch}", batch, ways[way])
