"""Acceptance of Metropolis moves on a protein, as rows of docs/benchmarks.md.

    openmm-bg simulate protein.pdb -o md/
    python examples/compare_protein_training.py md/ -o comparison/ --budget 10m
    python tests/benchmarks/protein_moves.py comparison/split-all/flow.bg --md md/
    python tests/benchmarks/protein_moves.py flow.bg --md md/ --only side backbone --moves 400 --frames 16

Every kind of move starts from the same held-out frames of the MD (`--held-out blocks`: every fourth of 20 blocks of
time of each trajectory, as the comparison holds out; `test`: the replica test.dcd) and makes an equal share of its
moves from each, in the System of the MD. Kinds that adapt their steps do so in a burn-in that does not count, on the
first frame. Prints a Markdown table, and with --json everything that was measured.

"expected" is the mean over moves of min(1, ratio), of E the weight of the proposals against all weight: it resolves
rates far below one accepted move. Errors are standard errors over the starting frames. log α is that of the ratio,
cut at 0; its mean without moves that run into atoms (-inf or below -1e4). RMSD is that of an accepted move, after
superposition on all heavy atoms. Energies are those of the moves themselves; what checks the Context before each call
of `step` is not in them. Seconds are CPU time, all of it. A frame that the flow cannot produce stays and counts with
zero; how many do is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

import openmm_bg as bg
from openmm_bg.analysis.evaluation_input import read_held_out
from openmm_bg.analysis.superposition import superpose
from openmm_bg.coordinates import MoleculeGraph
from openmm_bg.errors import InputError
from openmm_bg.rules.metropolis import log_acceptance
from openmm_bg.simulate.folder import read_record, read_training_data
from openmm_bg.standing import place

BLOCKS = 20
CLASH = -1e4
TOLERANCE = 1e-6  # of constraints, where frames were rounded for their file


# ---------------------------------------------------------------------------------------------------- what is measured


@dataclass
class Record:
    """Moves of one kind from one frame."""

    alpha: list[float] = field(default_factory=list)
    log_alpha: list[float] = field(default_factory=list)
    backbone: list[float] = field(default_factory=list)  # nm, of accepted moves
    everything: list[float] = field(default_factory=list)
    accepted: int = 0
    energies: int = 0
    seconds: float = 0.0


class Ruler:
    """RMSD of two frames [N, 3], of the backbone and of all heavy atoms, after superposition on the latter."""

    def __init__(self, topology: Any) -> None:
        self.backbone = np.flatnonzero(MoleculeGraph(topology).peptide_backbone())
        self.heavy = np.array([a.index for a in topology.atoms() if a.element.symbol != "H"])

    def add(self, record: Record, before: np.ndarray, after: np.ndarray) -> None:
        moved = superpose(after[None], before, self.heavy)[0] - before
        for atoms, values in ((self.backbone, record.backbone), (self.heavy, record.everything)):
            values.append(float(np.sqrt((moved[atoms] ** 2).sum(1).mean())))


def independence(sampler: Any, n: int, record: Record, ruler: Ruler) -> None:
    """Formulas D and E by `sampler.step`; for log α the weights that it computes."""
    genuine, seen = sampler.weigh, []

    def spy(standing: Any, y: Any, log_q: Any) -> Any:
        x, log_w = genuine(standing, y, log_q)
        seen.append((standing.log_w, log_w))
        return x, log_w

    before = positions_of(sampler.context)
    sampler.weigh = spy
    try:
        report = sampler.step(n)
    finally:
        sampler.weigh = genuine
    for current, proposed in seen:
        record.log_alpha += log_acceptance(np.full(proposed.shape, current), proposed).tolist()
    record.alpha.append(report["acceptance_probability"])
    record.accepted += report["n_accepted"]
    if report["n_accepted"]:
        ruler.add(record, before, positions_of(sampler.context))


def latent(move: bg.LatentMove, n: int, record: Record, ruler: Ruler) -> None:
    """Formula F by `LatentMove.step`."""
    genuine, seen = move._propose, []

    def spy(state: Any, standing: Any) -> Any:
        proposal, x = genuine(state, standing)
        seen.append((state, proposal, x[0].numpy()))
        return proposal, x

    here = positions_of(move.context)
    move._propose = spy  # type: ignore[method-assign]
    try:
        report = move.step(n)
    finally:
        move._propose = genuine  # type: ignore[method-assign]
    record.accepted += report["n_accepted"]
    left = report["n_accepted"]
    for k, (state, proposal, x) in enumerate(seen):
        log_alpha = float(log_acceptance(state.log_w, proposal.log_w)[0])
        record.log_alpha.append(log_alpha)
        record.alpha.append(math.exp(log_alpha))
        last = k + 1 == len(seen)
        if (left > 0) if last else np.array_equal(seen[k + 1][0].value, proposal.value):
            ruler.add(record, here, x)
            here, left = x, left - 1


def switching(move: bg.NonequilibriumMove, n: int, record: Record, ruler: Ruler) -> None:
    """Formula G by `NonequilibriumMove.step`."""
    genuine, sampler = move._move, move.sampler
    here = [positions_of(move.context)]

    def spy(z: Any, standing: Any) -> Any:
        state, info = genuine(z, standing)
        record.alpha.append(info.acceptance_probability)
        record.log_alpha.append(math.log(info.acceptance_probability) if info.acceptance_probability > 0 else -math.inf)
        if info.n_accepted:
            x = place(sampler.coordinates, standing, sampler.space.forward(state.value)[0])[0][0].numpy()
            ruler.add(record, here[0], x)
            here[0] = x
        return state, info

    move._move = spy  # type: ignore[method-assign]
    try:
        record.accepted += move.step(n)["n_accepted"]
    finally:
        move._move = genuine  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------- kinds of moves


@dataclass(frozen=True)
class Kind:
    """A row of the table: how a move is made, what share of --moves is made, and how many energies one costs."""

    name: str
    group: str
    make: Callable[[Any, int], Any]  # sampler, burn-in -> move
    share: float = 1.0  # of --moves
    cost: int = 1


def latent_kind(name: str, group: str, *, adapt: bool = False, **options: Any) -> Kind:
    def make(sampler: Any, burn_in: int) -> bg.LatentMove:
        move = bg.LatentMove(sampler, **options)
        if adapt:
            move.burn_in(burn_in)
        return move

    return Kind(name, group, make)


def switching_kind(n: int, step: float) -> Kind:
    """Both ends of both legs, and a latent step at every λ but the first of either."""

    def make(sampler: Any, _: int) -> bg.NonequilibriumMove:
        return bg.NonequilibriumMove(sampler, np.linspace(0.0, 1.0, n), a=step, width=step)

    return Kind(f"G, {n} λ, steps of {step:g}", "switching", make, 0.1 if n > 20 else 0.2, 2 + 2 * (n - 1))


def kinds() -> list[Kind]:
    """All rows."""
    side: dict[str, Any] = {"part": "side chains", "run": 1}
    rows = [
        Kind("D: all of y drawn", "independence", lambda sampler, _: sampler),
        Kind("E: K = 64", "independence", lambda sampler, _: sampler, 0.1, 64),
    ]
    rows += [latent_kind(f"F, all of z: steps of {a:g}", "latent", a=a, width=a) for a in (0.01, 0.03, 0.1, 0.3)]
    rows += [
        latent_kind("F, all of z: adapted", "latent", a=0.03, width=0.03, adapt=True),
        latent_kind("side chain of one residue: steps of 0.3", "side", a=0.3, width=0.3, **side),
        latent_kind("side chain of one residue: adapted", "side", a=0.3, width=0.3, adapt=True, **side),
        latent_kind("side chain of one residue: redrawn", "side", redraw=True, **side),
    ]
    for run in (1, 3, 5):
        name = f"backbone of {run} residue{'s' if run > 1 else ''}"
        block: dict[str, Any] = {"part": "backbone", "run": run}
        rows += [
            latent_kind(f"{name}: adapted", "backbone", a=0.1, width=0.1, adapt=True, **block),
            latent_kind(f"{name}: redrawn", "backbone", redraw=True, **block),
        ]
    rows.append(latent_kind("all of one residue: redrawn", "side", redraw=True, run=1))
    rows += [switching_kind(n, step) for n in (11, 31) for step in (0.03,)]
    return rows


# ---------------------------------------------------------------------------------------------------- setting


def held_out_frames(folder: Path, held_out: str, n: int) -> tuple[openmm.System, Any, float, np.ndarray]:
    """System, topology, temperature, and n frames [n, N, 3] (nm) evenly spread over those that no training saw."""
    data = read_training_data(folder)
    test = read_held_out(folder, data.topology).positions
    if held_out == "blocks":
        names = len(read_record(folder)["trajectories"]) - 1
        parts = [*np.array_split(data.positions, names), test]
        test = np.concatenate([part[np.arange(len(part)) * BLOCKS // len(part) % 4 == 3] for part in parts])
    if len(test) < n:
        raise InputError(f"There are {len(test)} held-out frames, fewer than --frames {n}: ask for fewer.")
    spread = np.linspace(0, len(test) - 1, n + 2).round().astype(int)[1:-1]
    return data.system, data.topology, data.temperature, test[spread].astype(np.float64)


def positions_of(context: openmm.Context) -> np.ndarray:
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)


def stand_at(context: openmm.Context, x: np.ndarray) -> None:
    """At a frame of a file, whose rounding has moved constrained lengths."""
    context.setPositions(x)
    context.applyConstraints(TOLERANCE)


@contextlib.contextmanager
def k_proposals(sampler: Any, k: int) -> Iterator[None]:
    before, sampler.n_proposals = sampler.n_proposals, k
    try:
        yield
    finally:
        sampler.n_proposals = before


# ---------------------------------------------------------------------------------------------------- measurement


def measure(kind: Kind, sampler: Any, frames: np.ndarray, options: argparse.Namespace, ruler: Ruler) -> dict[str, Any]:
    """The figures of one kind of move."""
    each = max(1, round(options.moves * kind.share / len(frames)))
    stand_at(sampler.context, frames[0])
    k = kind.cost if kind.group == "independence" else 1
    records = []
    with k_proposals(sampler, k):
        move = kind.make(sampler, options.burn_in)
        for x in frames:
            stand_at(sampler.context, x)
            record = Record()
            before, begin = sampler.pool.n_energies, time.process_time()
            if kind.group == "independence":
                independence(move, each, record, ruler)
            else:
                (switching if kind.group == "switching" else latent)(move, each, record, ruler)
            record.seconds = time.process_time() - begin
            record.energies = sampler.pool.n_energies - before
            records.append(record)
    made = each * len(frames)
    rates = np.array([np.mean(r.alpha) for r in records])
    log_alpha = np.concatenate([r.log_alpha for r in records])
    finite = log_alpha[log_alpha > CLASH]
    accepted = sum(r.accepted for r in records)
    energies = sum(r.energies for r in records)
    lengths = [np.concatenate([getattr(r, name) for r in records]) for name in ("backbone", "everything")]
    found = {
        "move": kind.name,
        "group": kind.group,
        "made": made,
        "accepted": accepted,
        "acceptance": accepted / made,
        "expected": float(rates.mean()),
        "expected_error": float(rates.std(ddof=1) / math.sqrt(len(rates))) if len(rates) > 1 else math.nan,
        "log_alpha_mean": float(finite.mean()) if finite.size else -math.inf,
        "log_alpha_median": float(np.median(log_alpha)),
        "clashes": float((log_alpha <= CLASH).mean()),
        "energies_per_move": energies / made,
        "energies_per_accepted": energies / accepted if accepted else math.inf,
        "rmsd_backbone": float(lengths[0].mean()) if accepted else math.nan,
        "rmsd_heavy": float(lengths[1].mean()) if accepted else math.nan,
        "seconds_per_move": sum(r.seconds for r in records) / made,
    }
    if isinstance(move, bg.LatentMove):
        found |= {"a": move.a, "width": move.width}
    return found


HEAD = [
    "move", "made", "accepted", "expected", "log α: mean, median", "into atoms", "energies per accepted",
    "RMSD of an accepted one, Å: backbone, heavy atoms", "CPU seconds a move",
]  # fmt: skip


def row(found: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    name = found["move"] + (f" to {found['a']:.2g}" if "adapted" in found["move"] else "")
    error = f" ± {found['expected_error']:.1g}" if math.isfinite(found["expected_error"]) else ""
    some = found["accepted"] > 0
    cells = [
        name,
        f"{found['made']}",
        f"{found['accepted']} ({100 * found['acceptance']:.3g} %)",
        f"{found['expected']:.2g}{error}",
        f"{found['log_alpha_mean']:.3g}, {found['log_alpha_median']:.3g}",
        f"{100 * found['clashes']:.2g} %",
        f"{found['energies_per_accepted']:.3g}" if some else "none accepted",
        f"{10 * found['rmsd_backbone']:.2g}, {10 * found['rmsd_heavy']:.2g}" if some else "",
        f"{found['seconds_per_move']:.2g}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", type=Path)
    parser.add_argument("--md", type=Path, required=True, help="folder of openmm-bg simulate")
    parser.add_argument("--held-out", choices=("blocks", "test"), default="blocks")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--moves", type=int, default=400, help="of each kind; of the dear ones a fraction")
    parser.add_argument("--burn-in", type=int, default=150)
    parser.add_argument("--only", nargs="+", choices=sorted({kind.group for kind in kinds()}), default=None)
    parser.add_argument("--platform", default="CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    system, topology, temperature, frames = held_out_frames(options.md, options.held_out, options.frames)
    flow = bg.load(options.flow, topology=topology)
    integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.002)
    platform = openmm.Platform.getPlatformByName(options.platform)
    properties = {"Threads": "1"} if options.platform == "CPU" else {}
    context = openmm.Context(system, integrator, platform, properties)
    stand_at(context, frames[0])
    rows = []
    chosen = [kind for kind in kinds() if options.only is None or kind.group in options.only]
    with bg.BoltzmannGeneratorSampler(
        flow, context, seed=options.seed, platform=options.platform, n_workers=1
    ) as sampler:
        outside = 0
        for x in frames:
            stand_at(context, x)
            outside += not sampler.stand().inside
        print(f"\n{outside} of {len(frames)} frames lie outside what the flow can produce.\n", flush=True)
        print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
        for kind in chosen:
            rows.append(measure(kind, sampler, frames, options, Ruler(topology)))
            print(row(rows[-1]), flush=True)
            if options.json is not None:
                settings: dict[str, Any] = {key: str(value) for key, value in vars(options).items()}
                load = os.getloadavg() if hasattr(os, "getloadavg") else None
                settings |= {
                    "outside": outside,
                    "date": datetime.date.today().isoformat(),
                    "torch": torch.__version__,
                    "load": load,
                }
                options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
