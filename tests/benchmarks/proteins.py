"""How fast the paper's flow samples a protein, as rows of docs/benchmarks.md.

    python tests/benchmarks/proteins.py
    python tests/benchmarks/proteins.py --systems hp35 --presets paper protein --threads 1
    python tests/benchmarks/proteins.py --device cuda --batch 2048 --samples 20000

Prints one JSON object for each system and preset: samples a second of the flow as it is trained (eager) and of its
TorchScript artifact, saved and loaded, y and log q alone and with positions; and the ratio artifact to eager. The two
take turns and the fastest round of each counts. The reduced representation; weights are random, for the rate does not
depend on them. Protein G comes from the tests' file 1pga.pdb, HP35 from OpenMM.

Goals: 50 samples a second of the paper preset for protein G on two cores, 10,000 on an H200-class GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_bg.artifact import Flow, load, topology_to_dict
from openmm_bg.coordinates import CoordinateMap
from openmm_bg.flow import FlowConfig, build_flow, count_parameters

SYSTEMS = ("hp35", "protein-g", "dhfr")
PRESETS = ("paper", "protein", "nsf")
#: Of the atoms about the structure, nm: gives every coordinate a width.
JITTER = 0.004


def structure(name: str) -> tuple[Any, np.ndarray]:
    """Topology and positions [N, 3] nm, as the tests of the coordinates load them."""
    path = Path(__file__).parents[1] / "coordinates" / "proteins.py"
    if "proteins" not in sys.modules:
        spec = importlib.util.spec_from_file_location("proteins", path)
        assert spec is not None and spec.loader is not None
        sys.modules["proteins"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["proteins"])
    found = sys.modules["proteins"].structure(name)
    return found[0], found[1]


def random_flow(name: str, preset: str, seed: int = 0) -> Flow:
    """A flow of the reduced coordinates whose couplings all do something."""
    topology, x = structure(name)
    noise = JITTER * np.random.default_rng(seed).normal(size=(64, *x.shape))
    coordinates = CoordinateMap.fit(topology, x + noise, None, "reduced")
    density = build_flow(coordinates.layout, FlowConfig.preset(preset), seed=seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in density.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return Flow(density, coordinates, {"temperature": 300.0, "topology": topology_to_dict(topology), "system": ""})


def fastest(calls: dict[str, Callable[[], object]], rounds: int, cuda: bool) -> dict[str, float]:
    """Least seconds of each call; all take turns, and the first turn, which compiles, does not count."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 2):  # TorchScript optimises at its second call
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if turn >= 2:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def measure(name: str, preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one system and preset."""
    device = torch.device(options.device)
    flow = random_flow(name, preset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flow.bg"
        flow.save(path)
        megabytes = path.stat().st_size / 1e6
        artifact = load(path)
    flow.density.to(device)
    artifact.density.to(device)
    flow.coordinates.to(device)

    def density(of: Flow) -> Callable[[], object]:
        return lambda: [of.sample(options.batch) for _ in range(options.samples // options.batch)]

    def positions(of: Flow) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                for _ in range(options.samples // options.batch):
                    y, _ = of.sample(options.batch)
                    s = flow.coordinates.reference_fixed.to(y).expand(len(y), -1)
                    flow.coordinates.to_positions(y, s)

        return call

    calls = {"eager": density(flow), "artifact": density(artifact), "artifact_positions": positions(artifact)}
    drawn = options.samples // options.batch * options.batch
    seconds = fastest(calls, options.rounds, device.type == "cuda")
    rates = {key: drawn / value for key, value in seconds.items()}
    return {
        "system": name,
        "preset": preset,
        "atoms": flow.coordinates.n_atoms,
        "modelled": flow.coordinates.n_modelled,
        "parameters": count_parameters(flow.density),
        "artifact_mb": megabytes,
        "samples_per_second": rates,
        "artifact_to_eager": rates["artifact"] / rates["eager"],
        "batch": options.batch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["protein-g"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["paper"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64, help="drawn in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.samples < options.batch:
        parser.error("--samples must be at least --batch")
    torch.set_num_threads(options.threads)
    for name in options.systems:
        for preset in options.presets:
            figures = measure(name, preset, options)
            where = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
            figures["machine"] = f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads"
            figures["date"] = datetime.date.today().isoformat()
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
