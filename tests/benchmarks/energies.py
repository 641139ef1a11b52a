"""Energies and forces of batches: plain loop, pool of Contexts and torch twin, as rows of docs/benchmarks.md.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/energies.py
    python tests/benchmarks/energies.py --systems dipeptide-obc1 hp35-gbn2 --threads 2 --compiled
    python tests/benchmarks/energies.py --systems dipeptide-obc1 hp35-gbn2 --only-device

Prints a table for each system: frames per second, and their ratio to the limit of OpenMM's CPU platform, which is the
same number of force evaluations inside ``integrator.step()`` in one Context a thread. All candidates take turns, so
that they see the same machine, and the best turn of each counts. With one thread it is the CPU time of this process
that is measured, which other processes disturb least; otherwise wall time. Positions are jittered by 4 pm. Every twin
is compared with the Reference platform first, and a line says how far from it it is. Lines above the table say what
pools that tune themselves have chosen, and how long their construction took; these use all cores that the process may
run on. Where there is a CUDA device (``--device cpu`` leaves it out), a second table has the twin on it, with Triton's
kernels and in torch, positions and results on the device, in wall time up to the last result; its limit is one Context
of OpenMM's CUDA platform, frame by frame. What is compiled or kept lies in a folder that is deleted at the end, so that
first times are first times.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import importlib.util
import logging
import os
import platform as machine
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_bg.energy import ContextPool, SystemTwin
from openmm_bg.energy.implicit_solvent import with_equal_solvent
from openmm_bg.energy.workers import usable_cores
from openmm_bg.errors import BGError

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

#: Atoms above which the Reference platform is hopeless.
REFERENCE_ATOMS = 100

SYSTEMS = ("dipeptide-vacuum", "dipeptide-obc1", "hp35-vacuum", "hp35-obc1", "hp35-obc2", "hp35-gbn2", "protein-g-gbn2")
Call = Callable[[], object]


def load(name: str) -> tuple[openmm.System, NDArray[np.float64]]:
    """System and positions [N, 3] nm."""
    molecule, _, solvent = name.rpartition("-")
    if molecule == "dipeptide":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from openmmtools import testsystems

            kind = testsystems.AlanineDipeptideVacuum if solvent == "vacuum" else testsystems.AlanineDipeptideImplicit
            found = kind(constraints=None)
        return found.system, np.asarray(found.positions.value_in_unit(openmm.unit.nanometer))
    from openmm import app

    path = Path(__file__).parents[1] / "coordinates" / "proteins.py"
    spec = importlib.util.spec_from_file_location("proteins", path)
    assert spec is not None and spec.loader is not None
    sys.modules.setdefault("proteins", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["proteins"])
    topology, positions, *_ = sys.modules["proteins"].structure(molecule)
    files = ["amber14-all.xml"] + ([] if solvent == "vacuum" else [f"implicit/{solvent}.xml"])
    return app.ForceField(*files).createSystem(topology), np.asarray(positions)


def context_on(name: str, system: openmm.System, frame: NDArray[np.float64]) -> openmm.Context:
    """A Context that uses one thread."""
    properties = {"Threads": "1"} if name == "CPU" else {}
    platform = openmm.Platform.getPlatformByName(name)
    context = openmm.Context(copy.deepcopy(system), openmm.VerletIntegrator(1e-7), platform, properties)
    context.setPositions(frame)
    return context


def pinned(index: int) -> ThreadPoolExecutor:
    """A thread that stays on one core."""
    cores = usable_cores()
    start = os.sched_setaffinity if hasattr(os, "sched_setaffinity") else lambda *_: None
    return ThreadPoolExecutor(1, initializer=start, initargs=(0, {cores[index % len(cores)]}))


def plain_loop(name: str, system: openmm.System, frames: NDArray[np.float64]) -> Call:
    """One frame after the other, as OpenMM's manual has it, but pinned."""
    worker = pinned(0)
    context = worker.submit(context_on, name, system, frames[0]).result()

    def loop() -> None:
        for frame in frames:
            context.setPositions(frame)
            state = context.getState(energy=True, forces=True)
            state.getPotentialEnergy(), state.getForces(asNumpy=True)

    return lambda: worker.submit(loop).result()


def steps(system: openmm.System, frames: NDArray[np.float64], threads: int, name: str = "CPU") -> Call:
    """As many force evaluations as there are frames, inside the integrator, shared among Contexts.

    Every Context is made and used in a thread that stays on its core: the CPU platform would else be up to four times
    slower.
    """
    workers = [pinned(i) for i in range(threads)]
    contexts = [worker.submit(context_on, name, system, frames[0]).result() for worker in workers]
    each = len(frames) // threads

    def run() -> None:
        running = [w.submit(c.getIntegrator().step, each) for w, c in zip(workers, contexts, strict=True)]
        for step in running:
            step.result()

    return run


def self_tuned(system: openmm.System, frames: NDArray[np.float64]) -> dict[str, Call]:
    """Pools that choose for themselves: among Contexts, and with the twin among the candidates."""
    found = {}
    for name, effort in (
        ("pool, self-tuned, Contexts", "quick"),
        ('pool, tune="full"', "full"),
        ("the same from a kept choice", "quick"),
    ):
        context = context_on("CPU", system, frames[0])
        started = time.perf_counter()
        pool = ContextPool(context, positions=frames[:8], tune=effort)
        print(f"{name}: made in {time.perf_counter() - started:.2f} s. {pool.tuning}", flush=True)
        if effort == "full" or pool.platform != "twin":
            kind = ", processes" if pool.processes else ""
            found[f"{name} ({pool.platform} x {pool.n_workers}{kind})"] = lambda p=pool: p.energies_and_forces(frames)
    return found


def candidates(system: openmm.System, frames: NDArray[np.float64], options: argparse.Namespace) -> dict[str, Call]:
    """What is timed, by name."""
    threads: int = options.threads
    tuned = self_tuned(system, frames)
    found = {
        "limit: step(), CPU": steps(system, frames, threads),
        "plain loop, CPU": plain_loop("CPU", system, frames),
    }
    platforms = ["CPU"]
    if frames.shape[1] <= REFERENCE_ATOMS:
        platforms.append("Reference")
        found["limit: step(), Reference"] = steps(system, frames, threads, "Reference")
        found["plain loop, Reference"] = plain_loop("Reference", system, frames)
    found |= tuned

    def add_pool(name: str, **how: bool) -> None:
        for platform in platforms:
            context = context_on("CPU", system, frames[0])
            pool = ContextPool(context, platform=platform, n_workers=threads, **how)
            found[f"{name}, {platform} x {threads}"] = lambda pool=pool: pool.energies_and_forces(frames)

    equal = with_equal_solvent(system)
    add_pool("pool", equal_solvent=False)
    if threads > 1:
        add_pool("pool, processes", equal_solvent=equal is not None, processes=True)
    if equal is not None:
        found["limit: step(), CPU, equal GBSAOBCForce"] = steps(equal, frames, threads)
        add_pool("pool, equal GBSAOBCForce", equal_solvent=True)
    for dtype in (torch.float64, torch.float32):
        for compiled in (True,) if options.compiled else (False, True):
            started = time.perf_counter()
            twin = SystemTwin(system, frames[:2], dtype=dtype, compile=compiled, n_threads=threads)
            kind = "compiled" if twin.compiled else "torch"
            name = f"twin, {str(dtype).removeprefix('torch.')}, {kind}"
            print(f"{name}: {twin.deviation_in_use}; made in {time.perf_counter() - started:.1f} s", flush=True)
            found[name] = lambda twin=twin: twin.energies_and_forces(frames)
    return found


def rates(
    calls: dict[str, Call], n_frames: int, options: argparse.Namespace, *, wall: bool = False
) -> dict[str, float]:
    """Frames per second of each call, all taking turns."""
    clock = time.process_time if options.threads == 1 and not wall else time.perf_counter
    best = dict.fromkeys(calls, 0.0)
    for turn in range(options.turns + 1):
        for name, call in calls.items():
            begin, count = clock(), 0
            while count == 0 or clock() - begin < options.seconds:
                call()
                count += 1
            if turn:  # the first one pays for caches
                best[name] = max(best[name], count * n_frames / (clock() - begin))
    return best


def evaluated(twin: SystemTwin, positions: torch.Tensor, wait: Call) -> None:
    """Energies and forces of positions, up to the last result."""
    twin.evaluate(positions)
    wait()


def measure_device(name: str, system: openmm.System, x: NDArray[np.float64], options: argparse.Namespace) -> None:
    """Print the table of one system's twins on a device, batch by batch."""
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    wait: Call = (lambda: torch.cuda.synchronize(device)) if on_cuda else (lambda: None)
    what = torch.cuda.get_device_name(device) if on_cuda else str(device)
    print(f"\n{name} on {what}: {len(x)} atoms, wall time")
    noise = np.random.default_rng(0).normal(scale=0.004, size=(max(options.device_batches), *x.shape))
    frames = np.ascontiguousarray(x + noise)
    few = frames[: min(len(frames), 256)]
    known = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    limit = 0.0
    if "CUDA" in known:
        limit = rates({"": plain_loop("CUDA", system, few)}, len(few), options, wall=True)[""]
        print(f"plain loop, one Context of OpenMM's CUDA platform: {limit:,.0f} frames/s")
    else:
        print("OpenMM has no CUDA platform here: no limit.")
    twins: dict[str, SystemTwin] = {}
    for dtype in (torch.float64, torch.float32):
        for compile in ("triton", False):
            started = time.perf_counter()
            twin = SystemTwin(system, frames[:2], dtype=dtype, device=device, compile=compile)
            label = f"twin, {str(dtype).removeprefix('torch.')}, {twin.backend}"
            print(f"{label}: {twin.deviation_in_use}; made in {time.perf_counter() - started:.1f} s", flush=True)
            twins.setdefault(label, twin)
    print("\n| | batch | frames/s | of OpenMM's CUDA | GiB |\n|---|---|---|---|---|")
    for batch in options.device_batches:
        positions = torch.from_numpy(frames[:batch]).to(device)
        for label, twin in twins.items():
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            call = functools.partial(evaluated, twin, positions, wait)
            rate = rates({label: call}, batch, options, wall=True)[label]
            memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if on_cuda else ""
            ratio = f"{rate / limit:.1f}" if limit else ""
            print(f"| {label} | {batch:,} | {rate:,.0f} | {ratio} | {memory} |", flush=True)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the table of one system."""
    system, x = load(name)
    noise = np.random.default_rng(0).normal(scale=0.004, size=(options.batch, *x.shape))
    frames = np.ascontiguousarray(x + noise)
    if options.device != "cpu":
        measure_device(name, system, x, options)
    if options.only_device:
        return
    print(f"\n{name}: {len(x)} atoms, {options.batch} frames, {options.threads} thread(s)")
    found = rates(candidates(system, frames, options), len(frames), options)
    limit = found["limit: step(), CPU"]
    print("\n| | frames/s | of the limit |\n|---|---|---|")
    for candidate, rate in found.items():
        print(f"| {candidate} | {rate:,.0f} | {rate / limit:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=["dipeptide-vacuum", "dipeptide-obc1", "hp35-obc2"]
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of each candidate in each turn")
    parser.add_argument("--compiled", action="store_true", help="leave out the twins that are not compiled")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="another device, where twins are timed too; cpu: none")
    parser.add_argument("--device-batches", type=int, nargs="+", default=[1_024, 16_384])
    parser.add_argument("--only-device", action="store_true", help="leave out what runs on the CPU")
    options = parser.parse_args()
    if options.only_device and options.device == "cpu":
        parser.error("there is no other device than the CPU")
    logging.disable(logging.WARNING)  # of openmmtools
    torch.set_num_threads(options.threads)
    print(
        f"{datetime.date.today().isoformat()}, {machine.machine()}, torch {torch.__version__}, "
        f"OpenMM {openmm.Platform.getOpenMMVersion()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.environ["TRITON_CACHE_DIR"] = folder
        for name in options.systems:
            try:
                measure(name, options)
            except BGError as error:
                print(f"{name}: {error}")


if __name__ == "__main__":
    main()
