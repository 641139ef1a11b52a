"""Figures of the shipped alanine dipeptide, as rows of docs/benchmarks.md.

    python tests/benchmarks/dipeptide.py weights chain moves     # minutes
    python tests/benchmarks/dipeptide.py tempering --seconds 120
    python tests/benchmarks/dipeptide.py md --seconds 600
    python tests/benchmarks/dipeptide.py memory round-trip

Each part prints one JSON object. "Energies per independent sample" is the statistical inefficiency (pymbar) of the
indicator of the φ basin, 0 < φ < 2 rad, times the energy evaluations between two entries of the series; training is
excluded, and its count is printed beside it. "Independent samples per second" is the same in seconds of wall time, with
everything that a user waits for but loading the artifact and its trial of processors.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg.analysis.quality import chain_figures, forward_figures, frame_log_weights, reverse_figures
from openmm_bg.analysis.torsions import phi_basin
from openmm_bg.coordinates import log_jacobian, place_like, wrap
from openmm_bg.demo import PHI, TEMPERATURE, is_trans
from openmm_bg.energy import ContextPool, Target
from openmm_bg.free_energy import chain_state_difference, statistical_inefficiency
from openmm_bg.simulate import temperature_ladder, tempered_md, torsion_angle

import openmm  # isort: skip


def context_of(molecule: Any, seed: int = 1, time_step: float = 0.002) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, time_step)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(molecule.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(TEMPERATURE, seed)
    return context


def phi_of(context: openmm.Context) -> float:
    x = context.getState(positions=True).getPositions(asNumpy=True)._value
    return float(torsion_angle(x[None], PHI)[0])


def draw(options: argparse.Namespace) -> Any:
    molecule = bg.load_alanine_dipeptide()
    with bg.BoltzmannGeneratorSampler(molecule.flow, context_of(molecule), seed=options.seed) as sampler:
        sampler.sample(1000)  # what is tuned and allocated once
        begin = time.perf_counter()
        ensemble = sampler.sample(options.samples)
        return ensemble, time.perf_counter() - begin


def weights(options: argparse.Namespace) -> dict[str, Any]:
    """Reverse figures of fresh samples."""
    ensemble, seconds = draw(options)
    found = reverse_figures(ensemble, phi_basin(torsion_angle(ensemble.positions, PHI)))
    rate = options.samples / seconds
    return found | {"samples_per_second": rate, "independent_samples_per_second": rate * found["ess"]}


def chain(options: argparse.Namespace) -> dict[str, Any]:
    """A pure chain of formula D through the same kind of samples."""
    ensemble, seconds = draw(options)
    record = bg.load_alanine_dipeptide().flow.metadata["training"]
    found = chain_figures(ensemble.log_weights, phi_basin(torsion_angle(ensemble.positions, PHI)), options.seed)
    rate = options.samples / seconds / found["energies_per_independent_sample"]
    return found | {"training_energies": record["n_energies"], "independent_samples_per_second": rate}


def moves(options: argparse.Namespace) -> dict[str, Any]:
    """MD with Metropolis moves between its steps, on one Context."""
    molecule = bg.load_alanine_dipeptide()
    context = context_of(molecule)
    phi = np.empty(options.rounds)
    with bg.BoltzmannGeneratorSampler(molecule.flow, context, seed=options.seed) as sampler:
        sampler.step(options.moves)
        begin = time.perf_counter()
        for i in range(options.rounds):
            context.getIntegrator().step(options.md_steps)
            sampler.step(options.moves)
            phi[i] = phi_of(context)
        seconds = time.perf_counter() - begin
        statistics = sampler.statistics
    inside = phi_basin(phi)
    g = statistical_inefficiency(inside)
    # two more a round: the comparison of the clones with the Context
    energies = options.rounds * (options.md_steps + 2) + statistics["n_energies"]
    value, error = chain_state_difference(~inside, inside)
    return {
        "rounds": options.rounds,
        "md_steps": options.md_steps,
        "moves": options.moves,
        "acceptance": statistics["n_accepted"] / statistics["n_proposed"],
        "longest_rejection_streak": statistics["longest_rejection_streak"],
        "energies_per_independent_sample": g * energies / options.rounds,
        "independent_samples_per_second": options.rounds / g / seconds,
        "delta_f": value,
        "delta_f_error": error,
    }


def tempering(options: argparse.Namespace) -> dict[str, Any]:
    """Replica exchange in temperature without bias, and the forward ESS of the flow on its frames."""
    molecule = bg.load_alanine_dipeptide()
    ladder = temperature_ladder(TEMPERATURE, 900.0, 5)
    found = tempered_md(
        molecule.system,
        molecule.topology,
        molecule.positions,
        ladder,
        seconds=options.seconds,
        steps_per_frame=500,
        n_ladders=options.ladders,
        seed=options.seed + 40_000,
    )
    per_frame = len(ladder) * 501
    inside = phi_basin(torsion_angle(found.positions, PHI))
    series = [inside[found.ladder == k] for k in np.unique(found.ladder)]
    g = float(np.mean([statistical_inefficiency(s) for s in series]))
    trans = is_trans(found.positions)
    with ContextPool(context_of(molecule), platform="Reference") as pool:
        target = Target(molecule.flow.coordinates, pool, TEMPERATURE)
        log_w = frame_log_weights(molecule.flow, molecule.flow.coordinates, target, found.positions[trans])
    value, error = chain_state_difference(~inside[trans], inside[trans], chains=found.ladder[trans])
    return {
        "frames_all": len(inside),
        "passages": int(sum(np.count_nonzero(s[1:] != s[:-1]) for s in series)),
        "energies_per_independent_sample": g * per_frame,
        "independent_samples_per_second": len(inside) / g / options.seconds,
        "delta_f": value,
        "delta_f_error": error,
        "cis_frames": int((~trans).sum()),
    } | forward_figures(*log_w)


def md(options: argparse.Namespace) -> dict[str, Any]:
    """Plain MD at 300 K: seldom enough passages for a good figure, so their number is printed."""
    molecule = bg.load_alanine_dipeptide()
    context = context_of(molecule, options.seed + 3)
    phi, begin = [], time.monotonic()
    while time.monotonic() - begin < options.seconds:
        context.getIntegrator().step(200)
        phi.append(phi_of(context))
    inside = phi_basin(np.array(phi))
    passages = int(np.count_nonzero(inside[1:] != inside[:-1]))
    return {
        "steps": 200 * len(phi),
        "share": float(inside.mean()),
        "passages": passages,
        # A series that never left its basin has no correlation time to measure.
        "energies_per_independent_sample": statistical_inefficiency(inside) * 200 if passages else None,
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a million samples."""
    ensemble, seconds = draw(argparse.Namespace(samples=1_000_000, seed=options.seed))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"samples": ensemble.n, "ess": ensemble.ess, "peak_GiB": peak, "seconds": seconds}


def round_trip(options: argparse.Namespace) -> dict[str, Any]:
    """Largest deviations of the coordinates and of the flow."""
    molecule = bg.load_alanine_dipeptide()
    flow = molecule.flow
    torch.manual_seed(options.seed)
    y, log_q = flow.sample(2000)
    x = flow.to_positions(y)
    back, s = flow.to_internal(x)
    again = place_like(flow.to_positions(back, s), x[0], flow.coordinates.zmatrix.seed)
    first = place_like(x, x[0], flow.coordinates.zmatrix.seed)
    single = flow.coordinates.to_positions(y.float(), flow.coordinates.reference_fixed.float())
    z, backward = flow.inverse(y)
    forward_y, forward = flow(z)
    jacobian = torch.stack([_log_det(flow, row) for row in z[:20]])
    seed, r, theta, _ = flow.coordinates.internal.to_internal(x)
    return {
        "positions_float64_nm": float((again - first).abs().max()),
        "positions_float32_nm": float((single.double() - x).abs().max()),
        "flow_round_trip": float(wrap(forward_y - y).detach().abs().max()),
        "log_det_sum": float((forward + backward).detach().abs().max()),
        "log_det_against_autograd": float((jacobian - forward[:20]).detach().abs().max()),
        "sample_against_log_prob": float((flow.log_prob(y) - log_q).detach().abs().max()),
        "log_jacobian_range": float(np.ptp(log_jacobian(seed, r, theta).numpy())),
    }


def _log_det(flow: Any, z: torch.Tensor) -> torch.Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], z)
    return torch.linalg.slogdet(jacobian)[1]


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "weights": weights,
    "chain": chain,
    "moves": moves,
    "tempering": tempering,
    "md": md,
    "memory": memory,
    "round-trip": round_trip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5_000)
    parser.add_argument("--md-steps", type=int, default=10)
    parser.add_argument("--moves", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--ladders", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for part in options.parts:
        begin = time.monotonic()
        figures = PARTS[part](options)
        figures |= {"wall_seconds": time.monotonic() - begin, "date": datetime.date.today().isoformat()}
        figures["machine"] = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        print(json.dumps({part: figures}), flush=True)


if __name__ == "__main__":
    main()
