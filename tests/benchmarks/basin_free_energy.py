"""Error of the φ-basin free energy of alanine dipeptide against energy evaluations, five methods side by side.

    python tests/benchmarks/basin_free_energy.py run --work work/        # minutes; what is there already is kept
    python tests/benchmarks/basin_free_energy.py run --work work/ --methods pt --repeats 4
    python tests/benchmarks/basin_free_energy.py report --work work/ --image docs/images/basin-free-energy.png

Plain MD, parallel tempering (replica exchange in temperature, 300 to 900 K), and MD with moves of formula D, E or F
between its steps, all of the shipped molecule in vacuum at 300 K. F(0 < φ < 2 rad) - F(rest), both with trans amides.
An evaluation is one energy or force of one conformation, by whichever Context. Each independent run is one file.

``report`` prints a table and draws a picture. Errors come twice: from the statistical inefficiency of all runs joined,
and from the root mean square deviation of the runs' prefixes from the reference, which is that of the flow's weights
(formula A). The second exists where every run has seen both states.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  (before openmm)
from dipeptide import context_of, draw
from tqdm.auto import tqdm

import openmm_bg as bg
from openmm_bg.analysis.torsions import phi_basin
from openmm_bg.demo import PHI, TEMPERATURE, is_trans
from openmm_bg.free_energy import chain_state_difference, state_difference, statistical_inefficiency
from openmm_bg.simulate import temperature_ladder, tempered_md, torsion_angle

MD_STEPS, MOVES, PROPOSALS = 10, 4, 64
#: Of parallel tempering: MD steps between exchanges, which is also the interval of frames.
STEPS_PER_EXCHANGE = 200
METHODS = {
    "md": "MD",
    "pt": "parallel tempering",
    "d": "MD + D",
    "e": f"MD + E, K = {PROPOSALS}",
    "f": "MD + F",
}
#: Evaluations of one run, and how many runs, by default.
BUDGET = {"md": 3e6, "pt": 6e6, "d": 2e4, "e": 5e4, "f": 2e4}
REPEATS = {"md": 1, "pt": 4, "d": 8, "e": 4, "f": 4}
COLOURS = {"md": "0.45", "pt": "#d55e00", "d": "#0072b2", "e": "#009e73", "f": "#cc79a7"}
MARKERS = {"md": "x", "pt": "s", "d": "o", "e": "^", "f": "v"}


@dataclass
class Run:
    """Frames of one run in time order: φ, whether both amides are trans, evaluations spent up to each."""

    phi: np.ndarray
    trans: np.ndarray
    spent: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        return phi_basin(self.phi) & self.trans

    @property
    def outside(self) -> np.ndarray:
        return ~phi_basin(self.phi) & self.trans


def frames_of(positions: np.ndarray, spent: np.ndarray) -> Run:
    return Run(torsion_angle(positions, PHI), is_trans(positions), spent)


def plain(budget: float, seed: int) -> Run:
    context, every = context_of(bg.load_alanine_dipeptide(), seed + 1), 200
    frames = []
    for _ in tqdm(range(int(budget) // every), desc="MD", leave=False):
        context.getIntegrator().step(every)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value.astype(np.float32))
    return frames_of(np.stack(frames), every * np.arange(1, len(frames) + 1))


def tempering(budget: float, seed: int) -> Run:
    molecule = bg.load_alanine_dipeptide()
    ladder = temperature_ladder(TEMPERATURE, 900.0, 5)
    per_frame = len(ladder) * (STEPS_PER_EXCHANGE + 1)
    found = tempered_md(
        molecule.system,
        molecule.topology,
        molecule.positions,
        ladder,
        iterations=int(budget) // per_frame - 20,  # tempered_md leaves its start in 20 iterations without frames
        steps_per_exchange=STEPS_PER_EXCHANGE,
        steps_per_frame=STEPS_PER_EXCHANGE,
        n_ladders=1,
        seed=1000 * (seed + 1),
    )
    return frames_of(found.positions, per_frame * (20 + np.arange(1, len(found.positions) + 1)))


def moves(method: str, budget: float, seed: int) -> Run:
    """MD with moves between its steps; the evaluations of F's burn-in count."""
    molecule = bg.load_alanine_dipeptide()
    context = context_of(molecule, seed + 1)
    options: dict[str, Any] = {"n_proposals": PROPOSALS if method == "e" else 1, "platform": "Reference"}
    frames, spent = [], []
    with bg.BoltzmannGeneratorSampler(molecule.flow, context, seed=seed, n_workers=1, **options) as sampler:
        move: Any = sampler
        calls = 0
        if method == "f":
            move = bg.LatentMove(sampler)
            move.burn_in(100)
            calls = 1
        per_round = 1 if method == "e" else MOVES
        with tqdm(total=int(budget), desc=METHODS[method], leave=False) as bar:
            while not spent or spent[-1] < budget:
                context.getIntegrator().step(MD_STEPS)
                move.step(per_round)
                calls += 1
                frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
                # two more a call: the comparison of the clones with the Context
                spent.append(MD_STEPS * len(frames) + 2 * calls + sampler.statistics["n_energies"])
                bar.update(spent[-1] - bar.n)
    return frames_of(np.stack(frames), np.array(spent))


def run(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    reference = options.work / "reference.json"
    if not reference.exists():
        ensemble, _ = draw(argparse.Namespace(samples=options.samples, seed=options.seed + 77))
        inside = phi_basin(torsion_angle(ensemble.positions, PHI))
        value, error = state_difference(ensemble.log_weights, ~inside, inside)
        reference.write_text(json.dumps({"samples": ensemble.n, "value": value, "error": error}))
    for method in options.methods:
        for k in range(options.repeats or REPEATS[method]):
            path = options.work / f"{method}-{k}.npz"
            if path.exists():
                continue
            begin, seed = time.monotonic(), options.seed + 100 * k
            budget = options.budget or BUDGET[method]
            if method in ("md", "pt"):
                made = (plain if method == "md" else tempering)(budget, seed)
            else:
                made = moves(method, budget, seed)
            np.savez(path, phi=made.phi, trans=made.trans, spent=made.spent)
            print(f"{METHODS[method]}, run {k}: {made.spent[-1]:.3g} evaluations, {time.monotonic() - begin:.0f} s")


def read(work: Path, method: str) -> list[Run]:
    runs = []
    for path in sorted(work.glob(f"{method}-*.npz")):
        with np.load(path) as data:
            runs.append(Run(data["phi"], data["trans"], data["spent"]))
    return runs


def prefixes(runs: list[Run], reference: float) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations, and the root mean square deviation of single runs from the reference after that many."""
    most = min(one.spent[-1] for one in runs)
    counts, errors = [], []
    for budget in most / 2.0 ** np.arange(6):
        deviations = []
        for one in runs:
            n = int(np.searchsorted(one.spent, budget, side="right"))
            a, b = int(one.outside[:n].sum()), int(one.inside[:n].sum())
            if a and b:
                deviations.append(-np.log(b / a) - reference)
        if len(deviations) == len(runs):
            counts.append(budget)
            errors.append(float(np.sqrt(np.mean(np.square(deviations)))))
    return np.array(counts), np.array(errors)


def figures(runs: list[Run], reference: float) -> dict[str, Any]:
    """What the table shows of one method; ``cost`` is the number of evaluations times the squared error, kT²."""
    inside = np.concatenate([one.inside for one in runs])
    outside = np.concatenate([one.outside for one in runs])
    label = np.repeat(np.arange(len(runs)), [len(one.phi) for one in runs])
    passages = sum(int(np.count_nonzero(np.diff(one.inside.astype(int)))) for one in runs)
    total = float(sum(one.spent[-1] for one in runs))
    found: dict[str, Any] = {"runs": len(runs), "evaluations": total, "passages": passages}
    if inside.any() and passages >= 2:
        value, error = chain_state_difference(outside, inside, chains=label)
        g = float(np.mean([statistical_inefficiency(one.inside) for one in runs]))
        found |= {"delta_f": value, "error": error, "cost": total * error**2, "z": (value - reference) / error}
        found["per_independent_sample"] = g * total / len(inside)
        found["counts"], found["scatter"] = prefixes(runs, reference)
    return found


def training_cost() -> float:
    """Evaluations that went into the shipped flow: its MD and its training."""
    found = bg.load_alanine_dipeptide().flow.metadata["figures"]
    return float(found["training_energies"] + found["md_energies"])


def report(options: argparse.Namespace) -> None:
    reference = json.loads((options.work / "reference.json").read_text())
    table = {m: figures(read(options.work, m), reference["value"]) for m in METHODS if read(options.work, m)}
    training = training_cost()
    print(f"training and its MD: {training:.2g} evaluations")
    print(f"reference: {reference['value']:.3f} ± {reference['error']:.3f} kT, {reference['samples']} weighted samples")
    titles = ("", "runs, evaluations in all", "passages", "ΔF, kT", "per independent sample", "for an error of 0.1 kT")
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for method, found in table.items():
        start = f"| {METHODS[method]} | {found['runs']}, {found['evaluations']:.1e} | {found['passages']} |"
        if "cost" not in found:
            print(f"{start} not determined | | |")
            continue
        need = found["cost"] / 0.01
        print(
            f"{start} {found['delta_f']:.3f} ± {found['error']:.3f} | {found['per_independent_sample']:.3g} | "
            f"{need:.2g}{'' if method == 'pt' else f' ({need + training:.2g} with training)'} |"
        )
    if "cost" in table.get("pt", {}):
        cost = table["pt"]["cost"]
        for method in ("d", "e", "f"):
            if "cost" in table.get(method, {}):
                ratio = cost / table[method]["cost"]
                print(f"{METHODS[method]}: {ratio:.0f} times fewer evaluations than tempering at the same error")
        print(f"with training, moves are ahead of tempering at errors below {np.sqrt(cost / training):.2f} kT")
    for method, found in table.items():
        for count, error in zip(found.get("counts", []), found.get("scatter", []), strict=True):
            print(f"{METHODS[method]}: {count:.2g} evaluations a run, rms deviation {error:.3f} kT")
    if options.image:
        picture(table, training, options.image)


def picture(table: dict[str, dict[str, Any]], training: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), constrained_layout=True)
    errors = np.geomspace(0.02, 2.0, 80)
    for method, found in table.items():
        colour = COLOURS[method]
        if "cost" not in found:
            text = f"{METHODS[method]} alone: no passage in {found['evaluations']:.0e}"
            axes.text(0.99, 0.95, text, transform=axes.transAxes, ha="right", fontsize=8, color=colour)
            continue
        axes.plot(found["cost"] / errors**2, errors, color=colour, label=METHODS[method])
        bar = found["scatter"] / np.sqrt(2 * found["runs"])  # what a root mean square of so few is good for
        axes.errorbar(found["counts"], found["scatter"], bar, fmt=MARKERS[method], color=colour, markersize=5, lw=0.8)
        if method != "pt":
            axes.plot(found["cost"] / errors**2 + training, errors, "--", color=colour, linewidth=1.2)
    axes.set(xscale="log", yscale="log", ylim=(0.02, 2.0), xlim=(1e3, 3e9))
    axes.set(xlabel="energy evaluations", ylabel="error of F(φ > 0) − F(rest), kT")
    axes.plot([], [], "--", color="0.3", label="training and its MD included")
    axes.plot([], [], "o", color="0.3", markersize=5, label="rms deviation of independent runs")
    axes.grid(alpha=0.25, which="major")
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "report"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--repeats", type=int, help="runs of each method")
    parser.add_argument("--budget", type=float, help="evaluations of one run")
    parser.add_argument("--samples", type=int, default=200_000, help="weighted samples of the reference")
    parser.add_argument("--image", type=Path, help="where the picture goes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    {"run": run, "report": report}[options.part](options)


if __name__ == "__main__":
    main()
