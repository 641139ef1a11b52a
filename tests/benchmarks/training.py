"""Time and memory of one training step with and without what may save them, and of the flow itself, as rows of
docs/benchmarks.md.

    python tests/benchmarks/training.py
    python tests/benchmarks/training.py --presets paper --layouts protein-g --batch 64 --device cuda

Prints one JSON object for each case: seconds of a step (gradient of the likelihood) with each option, divided by those
of the plain step (all take turns, so that they see the same machine, and the least time counts), and the memory that a
further sample adds to the peak of a step. On a CPU with one thread times are CPU times of this process, which other
processes disturb least; otherwise wall times. Memory is the peak of a process of its own on a CPU, that of the
allocator on a GPU.

`maps`: seconds of forward (base to data, as samples go) and inverse (as likelihoods go) in float64 without gradients,
of the eager flow and of its script, in turns.

Options: `checkpointing` (`gradient_checkpointing`), `bfloat16` (`network_precision`, as a CPU or a GPU has it),
`autocast` (what a GPU would do, on this device) and, with --compile, `torch.compile` of the whole likelihood. Its first
call is given in wall time and in CPU time with that of the C++ compiler, a process of its own; set
TORCHINDUCTOR_CACHE_DIR to an empty folder, and TORCHINDUCTOR_COMPILE_THREADS=1 for a CPU time that misses nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from openmm_bg.flow import FeatureLayout, FlowConfig, build_flow
from openmm_bg.flow.coupling import economical
from openmm_bg.training.threads import product_precision

#: Linear coordinates, circular ones of the backbone and of the side chains, as the representation named has them.
LAYOUTS = {
    "dipeptide": (39, 7, 14),  # full: lengths and angles are linear
    "hp35": (103, 102, 104),  # reduced
    "protein-g": (166, 165, 141),  # reduced
}
OPTIONS = ("checkpointing", "bfloat16", "autocast")


def layout(name: str) -> FeatureLayout:
    """As many coordinates of each kind as the molecule has."""
    angles, dihedrals, side_chains = LAYOUTS[name]
    circular = [False] * angles + [True] * (dihedrals + side_chains)
    n = len(circular)
    return FeatureLayout(
        circular=circular,
        backbone=[i < angles + dihedrals for i in range(n)],
        fold=[1] * n,
        concentration=[2.0 if c else 0.0 for c in circular],
        shift=[0.0] * n,
        scale=[1.0] * n,
    )


def make_step(options: argparse.Namespace, preset: str, name: str) -> tuple[Callable[[str], float], Any]:
    """One step with an option; the loss."""
    device = torch.device(options.device)
    flow = build_flow(layout(name), FlowConfig.preset(preset)).to(device).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        y, _ = flow.eval().sample(options.batch[preset])
    flow.train()
    y = y.float()

    def step(option: str) -> float:
        flow.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        small = option == "bfloat16" and device.type == "cpu"
        with ExitStack() as stack:
            stack.enter_context(product_precision("bfloat16" if small else "float32"))
            stack.enter_context(
                economical(
                    flow,
                    recompute=option == "checkpointing",
                    bfloat16=option == "autocast" or (option == "bfloat16" and device.type == "cuda"),
                )
            )
            loss = -flow.log_prob(y).mean()
            loss.backward()
        return loss.detach().item()

    return step, flow


def memory_per_sample(options: argparse.Namespace, preset: str, name: str, option: str) -> float:
    """MiB that each further sample of a batch adds to the peak of a step."""
    few = options.batch[preset]
    rises = []
    for batch in (few, 4 * few):
        changed = argparse.Namespace(**{**vars(options), "batch": {preset: batch}})
        rises.append(_rise(changed, preset, name, option))
    return (rises[1] - rises[0]) / (3 * few)


def _rise(options: argparse.Namespace, preset: str, name: str, option: str) -> float:
    """MiB that a step adds; on a CPU in a process of its own, whose peak it is."""
    if options.device != "cpu":
        step, _ = make_step(options, preset, name)
        step(option)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(option)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_peak, args=(theirs, options, preset, name, option))
    child.start()
    rise: float = ours.recv()
    child.join()
    return rise


def _peak(pipe: Any, options: argparse.Namespace, preset: str, name: str, option: str) -> None:
    torch.set_num_threads(1)  # a fork cannot use its parent's threads
    step, _ = make_step(options, preset, name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(option)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def compiled(flow: Any, options: argparse.Namespace, y: torch.Tensor) -> dict[str, float]:
    """torch.compile of log q: seconds of the first gradient, and how many times faster later ones are."""

    def gradient(log_prob: Callable[..., Any]) -> None:
        flow.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        (-log_prob(y).mean()).backward()

    fast = torch.compile(flow.log_prob, dynamic=False)
    begin, cpu = time.perf_counter(), _cpu_seconds()
    gradient(fast)
    figures = {"first call, s": time.perf_counter() - begin, "first call, s of CPU": _cpu_seconds() - cpu}
    gradient(fast)
    gradient(flow.log_prob)
    pairs = [
        (timed(lambda: gradient(flow.log_prob), options.device), timed(lambda: gradient(fast), options.device))
        for _ in range(3 * options.repeats)
    ]
    plain, quick = (min(found) for found in zip(*pairs, strict=True))
    return {name: round(value, 1) for name, value in figures.items()} | {"times faster": round(plain / quick, 2)}


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in used)


def maps(flow: Any, options: argparse.Namespace, batch: int) -> dict[str, float]:
    """Least seconds of forward and inverse, eager and scripted."""
    training = flow.training
    flow.eval()
    scripted = torch.jit.script(flow)
    with torch.no_grad():
        z = flow.sample_base(batch)
        y, _ = flow(z)
        calls: dict[str, Callable[[], object]] = {
            "forward": lambda: flow(z),
            "inverse": lambda: flow.inverse(y),
            "forward, scripted": lambda: scripted(z),
            "inverse, scripted": lambda: scripted.inverse(y),
        }
        for call in calls.values():
            for _ in range(2):  # TorchScript optimises at its second call
                call()
        least = dict.fromkeys(calls, float("inf"))
        for _ in range(max(2, options.repeats)):
            for name, call in calls.items():
                least[name] = min(least[name], timed(call, options.device))
    flow.train(training)
    return {name: round(value, 5) for name, value in least.items()}


def measure(options: argparse.Namespace, preset: str, name: str) -> dict[str, Any]:
    """Figures of one preset on one molecule."""
    memory = {option: memory_per_sample(options, preset, name, option) for option in ("plain", "checkpointing")}
    step, flow = make_step(options, preset, name)
    names = ("plain", *OPTIONS)
    losses = {option: step(option) for option in names}  # also the first calls
    times: dict[str, list[float]] = {option: [] for option in names}
    for _ in range(options.repeats):
        for option in names:
            times[option].append(timed(lambda option=option: step(option), options.device))  # type: ignore[misc]
    least = {option: min(found) for option, found in times.items()}
    row: dict[str, Any] = {
        "preset": preset,
        "molecule": name,
        "batch": options.batch[preset],
        "seconds": round(least["plain"], 4),
        "ratios": {option: round(least[option] / least["plain"], 3) for option in OPTIONS},
        "losses": losses,
        "MiB per sample": {option: round(found, 2) for option, found in memory.items()},
        "maps": maps(flow, options, options.batch[preset]),
    }
    if options.compile:
        y, _ = flow.eval().sample(options.batch[preset])
        row["compile"] = compiled(flow.train(), options, y.float())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["cpu", "paper"], choices=["cpu", "protein", "paper"])
    parser.add_argument("--layouts", nargs="+", default=["dipeptide", "hp35", "protein-g"], choices=sorted(LAYOUTS))
    parser.add_argument("--batch", type=int, help="samples of a step; default 256, 16 for paper")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    options = parser.parse_args()
    options.batch = {preset: options.batch or (16 if preset == "paper" else 256) for preset in options.presets}
    print(json.dumps({"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}))  # fmt: skip
    for preset in options.presets:
        for name in options.layouts:
            if (preset == "cpu") == (name == "dipeptide"):  # each where it is meant to be used
                print(json.dumps(measure(options, preset, name)), flush=True)


if __name__ == "__main__":
    main()
