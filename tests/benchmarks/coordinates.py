"""Cost of the coordinates, against placing atoms one after the other, as rows of docs/benchmarks.md.

    python tests/benchmarks/coordinates.py
    python tests/benchmarks/coordinates.py --systems hp35 dhfr --batch 1024 --device cuda

Prints one JSON object for each system: milliseconds for a batch of q → x (forward), its vector-Jacobian product
(backward) and x → q (inverse), the same for the reference, and their ratios, also of the sum of forward and backward.
The two take turns, so that both see the same machine, and the least time of each counts. On a CPU with one thread it is
the CPU time of this process, which other processes disturb least; otherwise wall time.

The reference places one atom at a time from the three before it (the natural extension reference frame, Parsons et
al., J. Comput. Chem. 26, 1063, 2005) and reads one atom's coordinates at a time, in batches and through autograd.
Positions come from the force field's files and are jittered by 4 pm. Results of some megabytes are given back to the
system and mapped anew at each call, unless glibc is told to keep them: MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_ of 2000000000 show the arithmetic alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_bg.coordinates import InternalCoordinates, ZMatrix, build_zmatrix, place_like

SYSTEMS = {"dipeptide": 22, "hp35": 582, "protein-g": 855, "dhfr": 2489, "t4-lysozyme": 2603, "trpzip2": 218}
Internal = tuple[Tensor, Tensor, Tensor, Tensor]


def place_atom_by_atom(zmatrix: ZMatrix, seed: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    """Positions [B, N, 3], one atom after the other."""
    zero = torch.zeros_like(seed[:, 0])
    first, middle, last = zmatrix.seed
    r1, r2, angle = seed.unbind(-1)
    x: dict[int, Tensor] = {
        first: torch.stack((zero, zero, zero), dim=-1),
        middle: torch.stack((r1, zero, zero), dim=-1),
        last: torch.stack((r1 - r2 * angle.cos(), r2 * angle.sin(), zero), dim=-1),
    }
    st = theta.sin()
    # unbound once: the gradient of an index would be a full array of zeros for every atom
    local = (torch.stack((-theta.cos(), st * phi.cos(), st * phi.sin()), dim=-1) * r[..., None]).unbind(1)
    for k, (atom, parent, grandparent, great) in enumerate(zmatrix.rows):
        e = x[parent] - x[grandparent]
        e = e / torch.linalg.norm(e, dim=-1, keepdim=True)
        n = torch.linalg.cross(x[grandparent] - x[great], e)
        n = n / torch.linalg.norm(n, dim=-1, keepdim=True)
        frame = torch.stack((e, torch.linalg.cross(n, e), n), dim=-1)
        x[atom] = x[parent] + (frame @ local[k][..., None])[..., 0]
    return torch.stack([x[atom] for atom in range(zmatrix.n_atoms)], dim=1)


def read_atom_by_atom(zmatrix: ZMatrix, positions: Tensor) -> Tensor:
    """r, θ, φ [B, K, 3], one atom after the other (the seed left out)."""
    x = positions.unbind(1)
    found = []
    for atom, parent, grandparent, great in zmatrix.rows:
        u, w, v = x[atom] - x[parent], x[grandparent] - x[parent], x[great] - x[grandparent]
        plane, other = torch.linalg.cross(u, w), torch.linalg.cross(v, w)
        theta = torch.atan2(torch.linalg.norm(plane, dim=-1), (u * w).sum(-1))
        sine = -(plane * v).sum(-1) * torch.linalg.norm(w, dim=-1)
        found.append(torch.stack((torch.linalg.norm(u, dim=-1), theta, torch.atan2(sine, (plane * other).sum(-1))), -1))
    return torch.stack(found, dim=1)


def structure(name: str) -> tuple[Any, np.ndarray]:
    """Topology and positions [N, 3] nm; those of the proteins as the tests load them."""
    if name == "dipeptide":
        from openmm import unit
        from openmmtools import testsystems

        found = testsystems.AlanineDipeptideVacuum(constraints=None)
        return found.topology, np.asarray(found.positions.value_in_unit(unit.nanometer))
    path = Path(__file__).parents[1] / "coordinates" / "proteins.py"
    if "proteins" not in sys.modules:
        spec = importlib.util.spec_from_file_location("proteins", path)
        assert spec is not None and spec.loader is not None
        sys.modules["proteins"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["proteins"])
    found = sys.modules["proteins"].structure(name)
    return found[0], found[1]


def least_times(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each call, all taking turns."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()  # memory that the call before this one gave back has to be mapped anew
            inner = 1
            while True:  # the small molecules are over in less than the clock's tick
                begin = clock()
                for _ in range(inner):
                    call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent = clock() - begin
                if spent > 5e-3 or inner >= 64:
                    break
                inner *= 4
            times[name].append(1e3 * spent / inner)
    return {name: min(found) for name, found in times.items()}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one system."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    topology, x = structure(name)
    zmatrix = build_zmatrix(topology)
    internal = InternalCoordinates(zmatrix).to(device)
    noise = 0.004 * np.random.default_rng(0).normal(size=(options.batch, *x.shape))
    exact = torch.tensor(x + noise, dtype=torch.float64, device=device)
    positions = exact.to(dtype)
    seed, r, theta, phi = (t.detach().requires_grad_() for t in internal.to_internal(positions))
    q: Internal = (seed, r, theta, phi)
    towards = torch.randn_like(positions)
    ours, theirs = internal.to_positions(*q), place_atom_by_atom(zmatrix, *q)

    def no_grad(call: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(call)

    def backward(made: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(made, q, towards, retain_graph=True)

    calls: dict[str, Callable[[], object]] = {
        "forward": no_grad(lambda: internal.to_positions(*q)),
        "forward_reference": no_grad(lambda: place_atom_by_atom(zmatrix, *q)),
        "backward": backward(ours),
        "backward_reference": backward(theirs),
        "inverse": no_grad(lambda: internal.to_internal(positions)),
        "inverse_reference": no_grad(lambda: read_atom_by_atom(zmatrix, positions)),
    }
    ms = least_times(calls, options.repeats, device)
    few = exact[:8]
    again = internal.to_positions(*internal.to_internal(few))
    placed = torch.cat([place_like(again[i : i + 1], few[i], zmatrix.seed) for i in range(len(few))])
    parts = ("forward", "backward", "inverse")
    both = [ms[f"forward{of}"] + ms[f"backward{of}"] for of in ("_reference", "")]
    return {
        "atoms": zmatrix.n_atoms,
        "levels": max(zmatrix.levels),
        "rounds": internal._tree.n_rounds,
        "ms": ms,
        "speedup": {part: ms[f"{part}_reference"] / ms[part] for part in parts}
        | {"forward_and_backward": both[0] / both[1]},
        "ns_per_atom": {part: 1e6 * ms[part] / (options.batch * zmatrix.n_atoms) for part in parts},
        "round_trip_float64_nm": float((placed - few).abs().max()),
        "largest_deviation_from_reference_nm": float((ours - theirs).abs().max().detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["dipeptide", "hp35", "protein-g", "dhfr"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in options.systems:
        figures = measure(name, options) | {"batch": options.batch, "dtype": options.dtype}
        figures["date"] = datetime.date.today().isoformat()
        where = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
        figures["machine"] = f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        print(json.dumps({name: figures}), flush=True)


if __name__ == "__main__":
    main()
