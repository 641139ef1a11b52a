"""What carries Kim et al., arXiv 2401.04246 (2024), on your protein: architecture and losses, at one training budget.

    openmm-bg simulate protein.pdb -o md/
    python examples/compare_protein_training.py md/ -o comparison/ --budget 10m
    python examples/compare_protein_training.py md/ -o comparison/ --budget 10m --only split-nll split-nll-w2
    python examples/compare_protein_training.py md/ -o comparison/ --table

Seven configurations are trained on the same frames, for the same seconds, with the same number of parameters (within
10 %): a plain spline flow by likelihood (NSF), the split flow's layers without the split by likelihood, the split flow
by likelihood, the same with reverse KL (energies), with the W2 distance, with W2 and then energies beside it, and
through the paper's four stages, the last of which leaves W2 out again. The budget is the training time of one
configuration on the cores that the process may use; run nothing else on them. The split flows share their first stage,
which is plain likelihood, and the last two of them all but the fourth: what is shared is trained once and counts in
full for each (without the fourth, 5 % of the budget stay unused).

Few frames are soon learnt by heart: likelihood alone keeps the weights that served validation frames best, which may be
those of the first minute. What became of it in the rest of its time has a row too, and W2 is held against the better.

Everything may be interrupted and run again: trainings go on where they stopped, finished results are kept. Each
configuration leaves NAME/result.json and NAME/flow.bg; comparison.png shows them side by side and the table, in
Markdown, is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.analysis import style
from openmm_bg.analysis.density_figures import draw, energy_figures, frame_energies, held_out_nll, weight_figures
from openmm_bg.analysis.distances import backbone_atoms, delta_d
from openmm_bg.analysis.evaluation_input import read_held_out
from openmm_bg.artifact import Flow, compress_text, load, topology_to_dict
from openmm_bg.coordinates import CoordinateMap, read_constraints
from openmm_bg.energy import ContextPool, Target, make_context
from openmm_bg.errors import BGError, InputError
from openmm_bg.files import write_atomically
from openmm_bg.flow import FlowConfig, build_flow, count_parameters
from openmm_bg.sampler import BoltzmannGeneratorSampler
from openmm_bg.simulate.folder import read_record, read_training_data
from openmm_bg.training.config import LossWeights, Stage, TrainingConfig
from openmm_bg.training.dataset import Dataset
from openmm_bg.training.run import make_dataset
from openmm_bg.training.threads import fastest_threads
from openmm_bg.training.trainer import Trainer, TrainingDiverged

logger = logging.getLogger("compare_protein_training")

#: The split flow of a size that CPUs train in minutes, and baselines with as many layers: the spline flow of the
#: literature, with residual networks and splines throughout, and one that has all of the split flow but the split.
SPLIT = FlowConfig.preset("protein")
N_BLOCKS = SPLIT.n_backbone_blocks + SPLIT.n_joint_blocks
BASELINES = {
    "nsf-nll": FlowConfig.preset("nsf", n_joint_blocks=N_BLOCKS),
    "joint-nll": SPLIT.model_copy(update={"split": False, "n_backbone_blocks": 0, "n_joint_blocks": N_BLOCKS}),
}
#: Name in the table, and of its folder.
NAMES = {
    "nsf-nll": "NSF, NLL",
    "joint-nll": "split flow's layers, not split, NLL",
    "split-nll": "split flow, NLL",
    "split-nll-kl": "split flow, NLL + KL",
    "split-nll-w2": "split flow, NLL + W2",
    "split-nll-w2-kl": "split flow, NLL + W2, then KL too",
    "split-all": "split flow, all four stages",
}
SMOKE_SECONDS = 1.0
#: Energies above the median of the frames' by more than this (kT) are tamed in training.
CUT = 300.0
#: Of time, into which a trajectory is cut: a quarter of them is held out.
BLOCKS = 20


@dataclass(frozen=True)
class Size:
    """How much of everything: training seconds of a configuration, and samples of its evaluation."""

    seconds: float
    samples: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From "smoke", or a time such as 90s, 10m or 1h."""
        if text == "smoke":
            return cls(SMOKE_SECONDS, 200, 100)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
        if not found or float(found[1]) == 0.0:
            raise argparse.ArgumentTypeError(f"{text!r} is neither smoke nor a time such as 90s, 10m or 1h")
        return cls(float(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[found[2]], 4000, 1000)


@dataclass(frozen=True)
class Data:
    """What all configurations share."""

    system: openmm.System
    topology: Any
    temperature: float
    coordinates: CoordinateMap
    dataset: Dataset
    training: Any  # [n, N, 3] nm
    held_out: Any  # [m, N, 3] nm


# --- what is compared ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A stage, its share of the budget, and how many samples a step of it draws.

    The trainer of the package draws as many for every stage; here W2 wants many, and energies are what costs.
    """

    name: str
    share: float
    rate: float
    weights: dict[str, float]
    samples: int = 64

    def config(self, flow: FlowConfig, seconds: float, seed: int, n_frames: int) -> TrainingConfig:
        """The stage alone, for training frames `n_frames` of which a tenth validates."""
        likelihood = set(self.weights) == {"nll"}
        return TrainingConfig(
            seed=seed,
            batch_size=64,
            sample_batch=self.samples,
            w2_data_batch=min(512, n_frames // 2),
            ema_decay=0.99,
            energy_cut=CUT,
            validate_every=50,
            flow=flow,
            stages=[
                Stage(
                    name=self.name,
                    losses=LossWeights(**self.weights),
                    seconds=self.share * seconds,
                    learning_rate=self.rate,
                    schedule="constant" if self.name == "start" else "cosine",
                    keep_best=likelihood,  # few frames: the likelihood overfits long before the budget ends
                    warmup_steps=30,
                )
            ],
        )


#: What every configuration begins with; the split flows share it. Each loss's gradient is clipped before its weight λ,
#: and all are large enough to be clipped: λ is the share of a step that a loss has beside the likelihood.
BEGINNING = Part("start", 0.2, 1e-3, {"nll": 1.0})
THREE = [
    Part("nll+w2", 0.35, 1e-3, {"nll": 1.0, "w2": 1.0}),
    Part("nll+w2+kl", 0.4, 1e-3, {"nll": 1.0, "w2": 1.0, "kl": 1.0}, samples=16),
]
STAGES = {
    "nsf-nll": [Part("nll", 0.8, 1e-3, {"nll": 1.0})],
    "joint-nll": [Part("nll", 0.8, 1e-3, {"nll": 1.0})],
    "split-nll": [Part("nll", 0.8, 1e-3, {"nll": 1.0})],
    "split-nll-kl": [Part("nll+kl", 0.8, 3e-4, {"nll": 1.0, "kl": 0.5}, samples=16)],
    "split-nll-w2": [Part("nll+w2", 0.8, 1e-3, {"nll": 1.0, "w2": 1.0})],
    "split-nll-w2-kl": THREE,
    # Slow, for without W2 the fourth stage unlearns what W2 has taught.
    "split-all": [*THREE, Part("nll+kl", 0.05, 1e-6, {"nll": 1.0, "kl": 1.2}, samples=16)],
}


def matched_width(coordinates: CoordinateMap, config: FlowConfig, wanted: int) -> FlowConfig:
    """The configuration with the hidden width that brings it closest to the wanted number of parameters."""

    def parameters(width: int) -> int:
        return count_parameters(build_flow(coordinates.layout, config.model_copy(update={"hidden": width})))

    low, high = 1, 2
    while parameters(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle) < wanted else (low, middle)
    best = min((low, high), key=lambda width: abs(parameters(width) - wanted))
    return config.model_copy(update={"hidden": best})


def flow_config(name: str, data: Data) -> FlowConfig:
    """Split flow, or baseline of the same number of parameters.

    Raises
    ------
    InputError
        No width of the baseline comes within 10 %.
    """
    if name not in BASELINES:
        return SPLIT
    wanted = count_parameters(build_flow(data.coordinates.layout, SPLIT))
    config = matched_width(data.coordinates, BASELINES[name], wanted)
    found = count_parameters(build_flow(data.coordinates.layout, config))
    if abs(found - wanted) > 0.1 * wanted:
        raise InputError(
            f"The baseline has {found} parameters and the split flow {wanted}: no width brings them closer."
        )
    return config


# --- data, training, evaluation -----------------------------------------------------------------------------------


def read(folder: Path, held_out: str) -> Data:
    """Frames of a folder of `openmm-bg simulate`: those to train on, and those that no training sees.

    "blocks" holds out every fourth of 20 blocks of time of every trajectory: frames of basins that training knows, as
    short simulations need. "test" holds out test.dcd, a replica of its own: what the flow knows of basins elsewhere.
    """
    found = read_training_data(folder)
    test = read_held_out(folder, found.topology).positions
    if held_out == "test":
        training, rest = found.positions, test
    else:
        n = len(read_record(folder)["trajectories"]) - 1
        parts = [*np.array_split(found.positions, n), test]
        held = [np.arange(len(part)) * BLOCKS // len(part) % 4 == 3 for part in parts]
        training = np.concatenate([part[~mask] for part, mask in zip(parts, held, strict=True)])
        rest = np.concatenate([part[mask] for part, mask in zip(parts, held, strict=True)])
    coordinates = CoordinateMap.fit(found.topology, training, read_constraints(found.system, found.topology), "reduced")
    dataset = make_dataset(coordinates, training, None, keep_positions=True)
    logger.info(
        "%d training and %d held-out frames of %d atoms; %d coordinates are modelled.",
        len(dataset), len(rest), coordinates.n_atoms, coordinates.n_modelled,
    )  # fmt: skip
    return Data(found.system, found.topology, found.temperature, coordinates, dataset, training, rest)


def context_of(data: Data) -> openmm.Context:
    context = make_context(data.system, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(data.training[0].astype(np.float64))
    return context


def typical_step(data: Data) -> Callable[[], None]:
    """A step of the likelihood, for timing."""
    density = build_flow(data.coordinates.layout, SPLIT)
    y = data.dataset.y[:64].float()

    def step() -> None:
        density.log_prob(y).mean().backward()

    return step


@dataclass
class Trained:
    """A flow and what its training took; `stages` has a row of figures for each.

    ``last`` is the flow at its last step, where training went back to the best one.
    """

    flow: Flow
    last: Flow | None
    stages: list[dict[str, Any]]
    validation: list[tuple[float, float]]  # seconds, NLL of the trainer's own validation frames


def train(name: str, data: Data, output: Path, size: Size, seed: int, progress: bool) -> Trained:
    """Train stage after stage; each has a folder of its own, and goes on where that stands."""
    config = flow_config(name, data)
    density = build_flow(data.coordinates.layout, config, seed=seed)
    atoms, _ = backbone_atoms(data.topology)
    shared = output / ("start" if name.startswith("split") else f"{name}/start")
    stages: list[dict[str, Any]] = []
    validation: list[tuple[float, float]] = []
    for part in (BEGINNING, *STAGES[name]):
        owner = "split-nll-w2-kl" if part in THREE else name
        folder = shared if part is BEGINNING else output / owner / part.name
        settings = part.config(config, size.seconds, seed, len(data.dataset))
        logger.info("%s: stage %s, %.0f s", NAMES[name], part.name, part.share * size.seconds)
        with ContextPool(context_of(data), tune="full") as pool:
            trainer = Trainer(
                density,
                data.dataset,
                settings,
                target=Target(data.coordinates, pool, data.temperature),
                backbone_atoms=[int(a) for a in atoms],
                directory=folder,
                progress=progress,
                identity=f" {data.temperature:g} K",
            )
            history = trainer.run(resume=True)
            energies = trainer.objective.n_energies
        before = sum(stage["seconds"] for stage in stages)
        found = [(before + row["seconds"], row["validation_nll"]) for row in history]
        validation.extend((seconds, value) for seconds, value in found if value is not None)
        row = {"name": part.name, "steps": trainer.step, "seconds": history[-1]["seconds"], "energies": energies}
        for loss in part.weights:
            row[loss] = float(np.mean([r[loss] for r in history[-20:] if r[loss] is not None]))
        stages.append({**row, "weights": part.weights, "baselines": trainer.baselines})
    metadata = {
        "temperature": data.temperature,
        "topology": topology_to_dict(data.topology),
        "system": compress_text(openmm.XmlSerializer.serialize(data.system)),
        "training": {"comparison": name, "stages": stages},
    }
    last = None
    if trainer.best.last:
        ended = build_flow(data.coordinates.layout, config, seed=seed)
        ended.load_state_dict(trainer.best.last)
        last = Flow(ended, data.coordinates, metadata)
    return Trained(Flow(density, data.coordinates, metadata), last, stages, validation)


def evaluate(flow: Flow, data: Data, size: Size, seed: int) -> dict[str, Any]:
    """The row of Table 1 and the weights at fixed s (formula B of docs/theory.md)."""
    atoms, _ = backbone_atoms(data.topology)
    with BoltzmannGeneratorSampler(flow, context_of(data), data.temperature, seed=seed) as sampler:
        found = draw(sampler, size.samples, completion=False)
        # What a perfect flow would have: the data's own y with the bond lengths and angles that samples get.
        y, s = data.coordinates.to_internal(
            torch.as_tensor(data.held_out[:: max(1, len(data.held_out) // 1000)]).double()
        )
        y = y[data.coordinates.in_domain(y, s)]
        rigid = flow.to_positions(y).numpy()
        energies = {
            "generated": energy_figures(found.energies),
            "data_rigid": energy_figures(frame_energies(sampler, rigid)),
            "data": energy_figures(frame_energies(sampler, data.held_out)),
        }
    return {
        "delta_d": delta_d(found.positions, data.held_out, atoms, batch=size.batch, seed=seed),
        "delta_d_training": delta_d(data.training, data.held_out, atoms, batch=size.batch, seed=seed),
        "energies": energies,
        "nll": held_out_nll(flow, data.held_out),
        "nll_training": held_out_nll(flow, data.training[:: max(1, len(data.training) // 1000)]),
        "weights": weight_figures(found.log_weights, "B", found.label),
        "samples": size.samples,
    }


# --- files --------------------------------------------------------------------------------------------------------


def results(output: Path) -> dict[str, dict[str, Any]]:
    """What is finished, in the order of `NAMES`."""
    found = {}
    for name in NAMES:
        path = output / name / "result.json"
        if path.is_file():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise InputError(f"{path} is damaged: remove it, and the configuration is evaluated again.") from None
    return found


def run_one(name: str, data: Data, output: Path, size: Size, seed: int, progress: bool) -> None:
    """Train, evaluate and write one configuration; what is there already is not done again."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    trained = train(name, data, output, size, seed, progress)
    trained.flow.save(folder / "flow.bg")
    logger.info("%s: evaluation", NAMES[name])
    begin = time.perf_counter()
    figures = evaluate(load(folder / "flow.bg"), data, size, seed)
    content = {
        "name": name,
        "settings": settings(data, size, seed),
        "parameters": count_parameters(trained.flow.density),
        **{key: sum(stage[key] for stage in trained.stages) for key in ("steps", "seconds", "energies")},
        "stages": trained.stages,
        "validation": trained.validation,
        "figures": figures,
        "last_figures": None if trained.last is None else evaluate(trained.last, data, size, seed),
        "evaluation_seconds": round(time.perf_counter() - begin, 1),
        "date": datetime.date.today().isoformat(),
    }
    write_atomically(folder / "result.json", json.dumps(content, indent=1))


def settings(data: Data, size: Size, seed: int) -> dict[str, Any]:
    """What results must share to stand in one table."""
    return {
        "frames": data.dataset.fingerprint()[:16],
        "training_frames": len(data.dataset),
        "held_out_frames": len(data.held_out),
        "atoms": data.coordinates.n_atoms,
        "modelled": data.coordinates.n_modelled,
        "budget_seconds": size.seconds,
        "seed": seed,
    }


# --- table and picture ----------------------------------------------------------------------------------------------


def _energy(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"


def rows(found: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Label, result and figures of all that was evaluated: configurations, and their last steps if those are others."""
    shown = []
    for name, result in found.items():
        shown.append((NAMES[name], result, result["figures"]))
        if result["last_figures"] is not None:
            shown.append((f"{NAMES[name]}, last step", result, result["last_figures"]))
    return shown


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per configuration, and below it what the paper's ordering asks for."""
    first = next(iter(found.values()))
    about, figures = first["settings"], first["figures"]
    lines = [
        f"{about['atoms']} atoms, {about['modelled']} modelled coordinates, {about['training_frames']} training and "
        f"{about['held_out_frames']} held-out frames, {about['budget_seconds']:g} s of training each, seed "
        f"{about['seed']}, {first['date']}.",
        "",
        "| configuration | parameters | steps | energies in training | ΔD, Å | median energy, kcal/mol "
        "| mean ± SD below the median | held-out NLL, nats | per coordinate | ESS (B) | k̂ |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, result, f in rows(found):
        e, w, d = f["energies"]["generated"], f["weights"], f["delta_d"]
        lines.append(
            f"| {label} | {result['parameters']} | {result['steps']} | {result['energies']} "
            f"| {d['generated']:.3f} | {_energy(e['median'])} | {_energy(e['below_median_mean'])} ± "
            f"{_energy(e['below_median_sd'])} | {f['nll']['total']:.1f} ± {f['nll']['total_error']:.1f} "
            f"| {f['nll']['per_dof']:.3f} | {w['ess']:.2g} | {w['khat']:.2f} |"
        )
    for title, key, distance in (
        ("held-out MD", "data", figures["delta_d"]["data"]),
        ("its y, rigid", "data_rigid", None),
    ):
        e = figures["energies"][key]
        shown = "" if distance is None else f"{distance:.3f}"
        lines.append(
            f"| {title} | | | | {shown} | {_energy(e['median'])} | {_energy(e['below_median_mean'])} ± "
            f"{_energy(e['below_median_sd'])} | | | | |"
        )
    lines.append(f"| training MD | | | | {figures['delta_d_training']['generated']:.3f} | | | | | | |")
    return "\n".join([*lines, "", *ordering(found)])


def ordering(found: dict[str, dict[str, Any]]) -> list[str]:
    """The paper's ordering, each claim with its figure and whether it holds here.

    Energies are counted from the median of MD frames with the lengths and angles of samples, which no training changes.
    ΔD of likelihood alone is the better one of its best and its last step.
    """

    def value(name: str, *keys: str) -> float:
        part: Any = found[name]["figures"]
        for key in keys:
            part = part[key]
        return float(part)

    def distance(name: str) -> float:
        last = found[name]["last_figures"]
        return min(f["delta_d"]["generated"] for f in (found[name]["figures"], last) if f is not None)

    lines = []
    for baseline in BASELINES:
        if {baseline, "split-nll"} <= set(found):
            other, split = (value(name, "nll", "total") for name in (baseline, "split-nll"))
            lines.append(
                f"- {NAMES['split-nll']} against {NAMES[baseline]}, held-out NLL: {split:.1f} against {other:.1f} nats "
                f"(goal: lower, {_verdict(split < other)})."
            )
    for without, with_w2 in (
        ("split-nll", "split-nll-w2"),
        ("split-nll-kl", "split-nll-w2-kl"),
        ("split-nll-kl", "split-all"),
    ):
        if {without, with_w2} <= set(found):
            a, b = distance(without), distance(with_w2)
            floor = value(without, "delta_d", "data")
            lines.append(
                f"- W2, {NAMES[with_w2]} against {NAMES[without]}: ΔD {b:.3f} against {a:.3f} Å, {a / b:.2f} times "
                f"lower (goal 2: {_verdict(a >= 2 * b)}); above data against data {b - floor:.3f} and "
                f"{a - floor:.3f} Å."
            )
    for without, with_kl in (
        ("split-nll", "split-nll-kl"),
        ("split-nll-w2", "split-nll-w2-kl"),
        ("split-nll-w2", "split-all"),
    ):
        if {without, with_kl} <= set(found):
            data = value(without, "energies", "data_rigid", "median")
            a, b = (value(name, "energies", "generated", "median") - data for name in (without, with_kl))
            da, db = distance(without), distance(with_kl)
            if a <= 0:
                lines.append(f"- KL, {NAMES[with_kl]}: {NAMES[without]} is not above rigid MD: nothing to lower.")
                continue
            ratio = a / b if b > 0 else float("inf")
            lower = f"{ratio:.3g} times lower" if b > 0 else "below rigid MD's"
            lines.append(
                f"- KL, {NAMES[with_kl]} against {NAMES[without]}: median energy above rigid MD's {_energy(b)} against "
                f"{_energy(a)} kcal/mol, {lower}, ΔD {db / da - 1:+.0%} (goal: a hundred times, at "
                f"most +10 %: {_verdict(ratio >= 100 and db <= 1.1 * da)})."
            )
    return lines


def _verdict(holds: bool) -> str:
    return "reached" if holds else "**short**"


@style.styled
def picture(found: dict[str, dict[str, Any]]) -> Any:
    """ΔD, energy above rigid MD's and held-out NLL, a point for each configuration."""
    figure = style.new_figure(1.3 + 0.42 * len(found))
    left, middle, right = figure.subplots(1, 3, sharey=True)
    names = list(found)[::-1]
    labels = [NAMES[name].replace("split flow, ", "split, ") for name in names]
    colours = [style.GREY if name in BASELINES else style.BLUE for name in names]
    figures = [found[name]["figures"] for name in names]
    first = figures[0]
    for value, text, colour in (
        (first["delta_d"]["data"], "data against data", style.BLACK),
        (first["delta_d_training"]["generated"], "training against held-out", style.ORANGE),
    ):
        left.axvline(value, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), label=text)
    left.set_xlabel("ΔD (Å)")
    base = first["energies"]["data_rigid"]["median"]
    excess = [f["energies"]["generated"]["median"] - base for f in figures]
    nll, error = ([f["nll"][key] for f in figures] for key in ("per_dof", "per_dof_error"))
    for row, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        left.plot(figures[row]["delta_d"]["generated"], label, "o", color=colour, markersize=8)
        last = found[names[row]]["last_figures"]
        if last is not None:
            # once in the legend
            text = None if any(line.get_fillstyle() == "none" for line in left.lines) else "at the last step"
            at = last["delta_d"]["generated"]
            left.plot(at, label, "o", color=colour, markersize=8, fillstyle="none", label=text)
        if excess[row] > 1.0:
            middle.plot(excess[row], label, "o", color=colour, markersize=8)
        else:
            middle.plot(1.0, label, "<", color=colour, markersize=8)
            middle.annotate("at or below MD's", (1.0, label), (8, -3), textcoords="offset points", fontsize=9)
        right.errorbar(nll[row], label, xerr=error[row], fmt="o", color=colour, markersize=8, capsize=3)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    distances = [x for line in left.lines for x in line.get_xdata()]
    if (ratio := max(distances) / min(distances)) > 3.0:
        from matplotlib.ticker import LogLocator, NullLocator

        left.set_xscale("log")
        left.xaxis.set_major_locator(
            LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if ratio < 5.0 else (1.0, 2.0, 5.0))
        )
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter("{x:g}")
    middle.set_xscale("log")
    middle.set_xlabel("median energy\nabove rigid MD's (kcal/mol)")
    right.set_xlabel("held-out NLL\n(nats per coordinate)")
    left.set_ylim(-0.5, len(figures) - 0.5)
    for axes in (left, middle, right):
        axes.grid(axis="x")
    return figure


# --- command line ---------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of openmm-bg simulate")
    parser.add_argument("-o", "--output", type=Path, default=Path("comparison"))
    parser.add_argument("--budget", type=Size.parse, default="10m", help="training time each: 90s, 10m, 1h, or smoke")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--held-out", choices=["blocks", "test"], default="blocks",
        help="a quarter of all trajectories in blocks of time, or test.dcd (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, and train nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def finish(output: Path) -> None:
    found = results(output)
    if not found:
        raise InputError(f"{output} has no finished configuration yet.")
    about = [result["settings"] for result in found.values()]
    if any(other != about[0] for other in about):
        raise InputError(f"The results in {output} have other data, budgets or seeds: give each comparison its folder.")
    picture(found).savefig(output / "comparison.png", dpi=120)
    text = table(found)
    (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    diverged: list[str] = []
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        if not options.table:
            data = read(options.folder, options.held_out)
            here = settings(data, options.budget, options.seed)
            done = results(options.output)
            for name, result in done.items():
                if result["settings"] != here:
                    raise InputError(
                        f"{options.output / name} was made with other data, another budget or seed: choose another "
                        "folder."
                    )
            with fastest_threads(typical_step(data)):
                for name in options.only or NAMES:
                    if name in done:
                        logger.info("%s: finished before", NAMES[name])
                        continue
                    try:
                        run_one(name, data, options.output, options.budget, options.seed, not options.quiet)
                    except TrainingDiverged as error:  # the others are worth their time
                        logger.error("%s: %s", NAMES[name], error)
                        diverged.append(name)
        finish(options.output)
    except KeyboardInterrupt:
        print("Interrupted: run the same command again to go on.", file=sys.stderr)
        return 130
    except (BGError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 1 if diverged else 0


if __name__ == "__main__":
    sys.exit(main())
