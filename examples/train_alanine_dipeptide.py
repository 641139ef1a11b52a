"""Make the alanine dipeptide that ships with the package: MD, training, figures, artifact.

    python examples/train_alanine_dipeptide.py -o work/ --minutes 60 --install

Resumable: run it again after an interruption and it continues where it was (MD frames and checkpoints lie in the
output folder). The MD has a well in φ that populates both basins. The likelihood sees its frames reweighted to 5 % in
the rare basin; the second stage, whose minimum does not depend on where its samples come from, takes the frames as they
are and the plain force field as the target.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import pickle
import platform
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg.analysis.quality import chain_figures, forward_figures, frame_log_weights, reverse_figures
from openmm_bg.analysis.torsions import phi_basin
from openmm_bg.demo import PHI, TEMPERATURE, DemoSettings, draw, is_trans, make_data
from openmm_bg.energy import ContextPool, Target, thermal_energy
from openmm_bg.simulate import temperature_ladder, tempered_md, torsion_angle
from openmm_bg.training import LossWeights, Stage, TrainingConfig

import openmm  # isort: skip

POPULATION = 0.05


def configuration(minutes: float, seed: int) -> TrainingConfig:
    """The "cpu" preset, larger and longer, and a third stage that a likelihood of reweighted samples joins.

    The network fills the 5 MB that the package grants it. The variance loss clips its residuals, so that the few
    samples far below their due density are left to the third stage.
    """
    config = TrainingConfig.preset("cpu").model_dump()
    config["flow"] |= {"n_joint_blocks": 12, "hidden": 112, "n_hidden": 2}
    config["stages"][-1]["seconds"] = 60.0 * minutes
    coverage = Stage(
        name="coverage",
        losses=LossWeights(variance=1.0, buffer=0.5),
        seconds=15.0 * minutes,
        learning_rate=3e-4,
        warmup_steps=200,
    )
    config["stages"].append(coverage.model_dump())
    return TrainingConfig.load({**config, "seed": seed, "validate_every": 1000})


def held_out_frames(data, seconds: float, seed: int) -> np.ndarray:
    """Decorrelated frames [n, N, 3] of an unbiased tempered run that nothing was trained on, trans only."""
    found = tempered_md(
        data.system,
        data.topology,
        data.positions,
        temperature_ladder(TEMPERATURE, 900.0, 5),
        seconds=seconds,
        steps_per_frame=500,
        seed=seed,
    )
    return found.positions[is_trans(found.positions)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="of stage 2; stage 3 takes a quarter of it")
    parser.add_argument("--md-seconds", type=float, default=240.0)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--install", action="store_true", help="put the artifact into the package")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    cache = options.output / "md.pkl"  # ours, read back by this script alone
    if cache.exists():
        data, held_out = pickle.loads(cache.read_bytes())
    else:
        settings = DemoSettings(seconds_pilot=30.0, seconds_md=options.md_seconds, seed=options.seed)
        data = make_data(settings)
        held_out = held_out_frames(data, 0.3 * options.md_seconds, options.seed + 5000)
        cache.write_bytes(pickle.dumps((data, held_out)))
    phi = torsion_angle(data.trajectory.positions, PHI)
    # For the likelihood, from the balanced frames to a slight well: same shape, a smaller depth.
    plain = data.trajectory.log_weights
    weight = np.exp(plain - plain.max())
    share = weight[phi_basin(phi)].sum() / weight.sum()
    kt = thermal_energy(TEMPERATURE)
    depth = kt * np.log(POPULATION / (1 - POPULATION) * (1 - share) / share)
    slight = replace(data.well, depth=float(depth))

    flow = bg.train(
        data.system,
        data.topology,
        data.trajectory.positions,
        TEMPERATURE,
        log_weights=data.log_weights(slight),
        config=configuration(options.minutes, options.seed),
        directory=options.output,
        resume=True,
    )
    ensemble, _, _ = draw(flow, data, options.samples, options.seed + 1)
    inside = phi_basin(torsion_angle(ensemble.positions, PHI))
    figures = reverse_figures(ensemble, inside) | chain_figures(ensemble.log_weights, inside)
    context = openmm.Context(
        data.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(data.positions)
    with ContextPool(context, platform="Reference") as pool:
        target = Target(flow.coordinates, pool, TEMPERATURE)
        figures |= forward_figures(*frame_log_weights(flow, flow.coordinates, target, held_out))
        figures["frames_in_basin"] = int(phi_basin(torsion_angle(held_out, PHI)).sum())
    figures["date"] = datetime.date.today().isoformat()
    figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    figures["md_energies"] = data.n_energies
    figures["training_energies"] = flow.metadata["training"]["n_energies"]
    print(json.dumps(figures, indent=2))
    print(f"{time.monotonic() - started:.0f} s in this run")

    flow.metadata["training"]["well"] = {"depth_kJ_mol": slight.depth, "population": POPULATION}
    flow.metadata["figures"] = figures
    flow.metadata["positions"] = np.round(data.positions, 6).tolist()
    flow.save(options.output / "alanine_dipeptide.bg")
    if options.install:
        flow.save(Path(str(files("openmm_bg.data") / "alanine_dipeptide.bg")))


if __name__ == "__main__":
    main()
