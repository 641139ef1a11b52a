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

With --energies instead, training by energy of alanine dipeptide (openmmtools', unconstrained): CPU seconds of the flow,
of the coordinates and of the energies in one step. `variance`, as the cpu preset trains: a gradient of log q over 512
rows with the optimiser, and an eighth of 3,072 fresh samples with their energies. `kl`: 256 samples with their gradient
and the optimiser, energies with forces. Each part takes turns with the others, the least time counts, and energies
come from one thread. Frames are jittered by 4 pm; what they are does not change what they cost.

Options: `checkpointing` (`gradient_checkpointing`), `bfloat16` (`network_precision`, as a CPU or a GPU has it),
`autocast` (what a GPU would do, on this device).

With --compile instead, `torch.compile` of log q and of samples, each with its gradients, against the eager passes, in
turns. The first call is given in wall time and in CPU time with that of the C++ compiler, a process of its own, once
with an empty cache (a folder that is deleted at the end) and once more; set TORCHINDUCTOR_COMPILE_THREADS=1 for a CPU
time that misses nothing.

With --graphs instead, on a GPU: seconds of a step of the likelihood, clipping and the optimiser included, as it is and
replayed as CUDA graphs (`cuda_graphs`), in turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from openmm_bg.flow import FeatureLayout, FlowConfig, build_flow
from openmm_bg.flow.coupling import economical
from openmm_bg.training import Dataset, LossWeights, Stage, TrainingConfig
from openmm_bg.training.graphs import WARMUP
from openmm_bg.training.objective import Objective
from openmm_bg.training.parallel import Ranks
from openmm_bg.training.step import GradientStep
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


def compiled(options: argparse.Namespace, preset: str, name: str) -> dict[str, Any]:
    """torch.compile of passes with gradients: what the first call costs, and how many times faster later ones are."""
    import torch._functorch.config

    batch = options.batch[preset]
    flow = build_flow(layout(name), FlowConfig.preset(preset)).to(options.device).train()
    precision = TrainingConfig.preset(preset).network_precision
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        z = flow.sample_base(batch).float()
        y = flow(z)[0].contiguous()

    def log_q(log_prob: Callable[..., Any]) -> None:
        (-log_prob(y).mean()).backward()

    def samples(forward: Callable[..., Any]) -> None:
        moved, log_det = forward(z)
        (moved.square().sum(1).mean() - log_det.mean()).backward()

    row: dict[str, Any] = {"preset": preset, "molecule": name, "batch": batch}
    passes = {"log q": (log_q, flow.log_prob), "samples": (samples, flow.forward)}
    for what in options.passes:
        gradient, plain = passes[what]

        def call(function: Callable[..., Any], gradient: Callable[..., None] = gradient) -> None:
            flow.zero_grad(set_to_none=True)
            with product_precision(precision):
                gradient(function)

        figures = {}
        # The graph of samples that two losses share is run backwards twice, so that its memory is not given away.
        with torch._functorch.config.patch(donated_buffer=what == "log q"):
            for again in ("", ", from the cache"):
                torch._dynamo.reset()
                fast = torch.compile(plain, dynamic=False, fullgraph=True, options={"fallback_random": True})
                begin, cpu = time.perf_counter(), _cpu_seconds()
                call(fast)
                figures[f"first call{again}, s"] = time.perf_counter() - begin
                figures[f"first call{again}, s of CPU"] = _cpu_seconds() - cpu
        call(fast)
        call(plain)
        pairs = [
            (timed(lambda: call(plain), options.device), timed(lambda: call(fast), options.device))  # noqa: B023
            for _ in range(5 * options.repeats)
        ]
        eager, quick = (min(found) for found in zip(*pairs, strict=True))
        row[what] = {
            **{figure: round(value, 1) for figure, value in figures.items()},
            "eager, ms": round(1e3 * eager, 2),
            "compiled, ms": round(1e3 * quick, 2),
            "times faster": round(eager / quick, 2),
        }
    return row


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
    return row


def replayed(options: argparse.Namespace, preset: str, name: str) -> dict[str, Any]:
    """Seconds of steps with CUDA graphs and without."""
    _, flow = make_step(options, preset, name)
    batch = options.batch[preset]
    with torch.no_grad():
        y, _ = flow.eval().sample(8 * batch)
    flow.train()
    data = Dataset(y.cpu()).to(y.device)
    stage = Stage(name=f"{preset} for {name}", losses=LossWeights(nll=1.0), steps=1)
    parameters = list(flow.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-6, fused=True)
    steps = {}
    for way in ("plain", "graphs"):
        config = TrainingConfig(batch_size=batch, stages=[stage], cuda_graphs=way == "graphs")
        steps[way] = GradientStep(Objective(flow, flow, data, config), parameters, config, Ranks())
        steps[way].begin_stage(stage)

    def take(way: str) -> None:
        steps[way].take(stage, 0, 0)
        optimizer.step()

    for way in steps:
        for _ in range(WARMUP + 2):  # recorded, and compared
            take(way)
    graphs = steps["graphs"].graphs
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(5 * options.repeats):
        for way, found in times.items():
            found.append(timed(lambda way=way: take(way), options.device))  # type: ignore[misc]
    least = {way: min(found) for way, found in times.items()}
    return {
        "preset": preset,
        "molecule": name,
        "batch": batch,
        "seconds": least,
        "gain": round(least["plain"] / least["graphs"], 3),
        "without graphs": "this needs --device cuda" if graphs is None else graphs.given_up,
    }


def training_by_energy(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """CPU milliseconds of flow, coordinates and energies in a step of the losses variance and kl."""
    import copy

    import numpy as np
    from energies import load

    from openmm_bg.coordinates import CoordinateMap
    from openmm_bg.energy import ContextPool
    from openmm_bg.training import losses

    import openmm  # isort: skip  (after torch)
    from openmmtools import testsystems  # isort: skip

    system, positions = load(name)
    config = TrainingConfig.preset("cpu")
    batch, drawn, every = config.batch_size, config.buffer.draw_size, config.buffer.draw_every
    noise = np.random.default_rng(0).normal(0.0, 0.004, (drawn, *positions.shape))
    frames = positions + noise
    topology = testsystems.AlanineDipeptideVacuum(constraints=None).topology
    coordinates = CoordinateMap.fit(topology, frames, representation="full")
    y, s = coordinates.to_internal(torch.as_tensor(frames))
    flow = build_flow(coordinates.layout, FlowConfig.preset("cpu")).train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.0, fused=True)
    log_density = torch.zeros(batch, dtype=torch.float64)

    def updated(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(flow.parameters()), 5.0, foreach=True)
        optimizer.step()

    def regress() -> None:
        with product_precision(config.network_precision):
            updated(losses.log_variance(flow, y[:batch].float(), log_density, 0.0).loss)

    def draw() -> None:
        flow.eval()
        with torch.no_grad():
            flow.sample(drawn)
        flow.train()

    def push() -> None:
        z = flow.sample_base(config.sample_batch).float()
        moved, log_det = flow(z)
        updated(moved.square().sum(1).mean() - log_det.mean())

    def place(rows: int, gradient: bool) -> None:
        leaf = y[:rows].clone().requires_grad_(gradient)
        x = coordinates.to_positions(leaf, s[:rows])
        total = coordinates.log_volume(leaf, s[:rows]).sum() + x.sum()
        if gradient:
            total.backward()

    calls: dict[str, Callable[[], object]] = {
        "flow: gradient of log q": regress,
        "flow: fresh samples": draw,
        "flow: samples with gradient": push,
        "coordinates of fresh samples": lambda: place(drawn, False),
        "coordinates with gradient": lambda: place(config.sample_batch, True),
    }
    pools = {}
    for source in ("twin", "Reference", "CPU"):
        platform_name = "Reference" if source == "twin" else source
        platform_of = openmm.Platform.getPlatformByName(platform_name)
        context = openmm.Context(copy.deepcopy(system), openmm.VerletIntegrator(0.001), platform_of)
        context.setPositions(positions)
        pools[source] = pool = ContextPool(context, platform=source, n_workers=1)
        calls[f"{source}: energies"] = lambda pool=pool: pool.energies(frames)  # type: ignore[misc]
        few = frames[: config.sample_batch]
        calls[f"{source}: energies with forces"] = lambda pool=pool, few=few: pool.energies_and_forces(few)  # type: ignore[misc]
    least = dict.fromkeys(calls, float("inf"))
    for turn in range(1 + max(3, options.repeats)):
        for what, call in calls.items():
            seconds = timed(call, "cpu")
            if turn:  # the first warms up
                least[what] = min(least[what], seconds)
    for pool in pools.values():
        pool.close()
    ms = {what: round(1e3 * seconds, 2) for what, seconds in least.items()}
    flows = (ms["flow: gradient of log q"] + ms["flow: fresh samples"] / every, ms["flow: samples with gradient"])
    energies = {who: (ms[f"{who}: energies"] / every, ms[f"{who}: energies with forces"]) for who in pools}
    parts = {
        "flow": flows,
        "coordinates": (ms["coordinates of fresh samples"] / every, ms["coordinates with gradient"]),
        **energies,
    }
    return {
        "molecule": name,
        "ms of a step": {
            loss: {who: round(found[i], 2) for who, found in parts.items()} for i, loss in enumerate(("variance", "kl"))
        },
        "energies / flow": {who: [round(found[i] / flows[i], 3) for i in (0, 1)] for who, found in energies.items()},
        "ms of a call": ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["cpu", "paper"], choices=["cpu", "protein", "paper"])
    parser.add_argument("--layouts", nargs="+", default=["dipeptide", "hp35", "protein-g"], choices=sorted(LAYOUTS))
    parser.add_argument("--batch", type=int, help="samples of a step; default 256, 16 for paper")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile, and nothing else")
    parser.add_argument("--passes", nargs="+", default=["log q", "samples"], choices=["log q", "samples"],
                        help="what --compile compiles")  # fmt: skip
    parser.add_argument("--graphs", action="store_true", help="steps as CUDA graphs, and nothing else")
    parser.add_argument("--energies", action="store_true", help="training by energy of a dipeptide, and nothing else")
    options = parser.parse_args()
    options.batch = {preset: options.batch or (16 if preset == "paper" else 256) for preset in options.presets}
    print(json.dumps({"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
                      "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}))  # fmt: skip
    if options.energies:
        for name in ("dipeptide-vacuum", "dipeptide-obc1"):
            print(json.dumps(training_by_energy(options, name)), flush=True)
        return
    for preset in options.presets:
        for name in options.layouts:
            if (preset == "cpu") != (name == "dipeptide"):  # each where it is meant to be used
                continue
            if not options.compile:
                figures = replayed if options.graphs else measure
                print(json.dumps(figures(options, preset, name)), flush=True)
                continue
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
                print(json.dumps(compiled(options, preset, name)), flush=True)


if __name__ == "__main__":
    main()
