"""What a Metropolis move costs beside its energies and flow passes, as rows of docs/benchmarks.md.

    taskset -c 0 python tests/benchmarks/moves.py
    taskset -c 0 python tests/benchmarks/moves.py --repeats 100

The shipped alanine dipeptide on the Reference platform, one worker, one thread. Everything is a ratio within one run,
between calls that take turns, so that a busy machine touches both sides alike. In a turn a move is called a few times,
each after 10 MD steps, which no clock counts; medians over all calls. For every move:

- in place: time of the call over the time that it spends in energies (of the proposals; of the current state, in the
  Context itself and in its clone, which are compared) and in passes of the flow (draws of z, z to y, y to z, with their
  densities), both in the very same call;
- alone: over the time of the same energies and passes, with the same arguments, made once more right after the call,
  and nothing between them: caches are then at their best, which no move can have.

CPU time of all threads, and wall time beside it. Goals: 1.3 for a move; 256 proposals for at most 20 times the cost of
one. The last column has what one step costs, in CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

import openmm_bg as bg
from openmm_bg.energy import pool as pools

Clock = Callable[[], float]
Call = tuple[Callable[..., Any], tuple[Any, ...]]
#: Calls of a move in a turn, and MD steps before each.
CALLS, MD_STEPS = 6, 10
CLOCKS: tuple[Clock, Clock] = (time.process_time, time.perf_counter)


class Passes:
    """Times and arguments of a sampler's energies and flow passes."""

    def __init__(self, sampler: Any) -> None:
        self.calls: list[Call] = []
        self.spent = np.zeros(2)  # CPU, wall
        for owner, name in (
            (pools, "read_state"),
            (sampler.pool, "_evaluate_state"),
            (sampler.pool, "energies"),
            (sampler.space, "draw"),
            (sampler.space, "forward"),
            (sampler.space, "inverse"),
            (sampler.space, "log_base"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = [clock() for clock in CLOCKS]
            result = genuine(*arguments)
            self.spent += [clock() - start for clock, start in zip(CLOCKS, begin, strict=True)]
            self.calls.append((genuine, arguments))
            return result

        return call

    def turn(self, move: Callable[[], Any]) -> np.ndarray:
        """[3, 2]: seconds of the move, of its parts in place, and of its parts alone; CPU and wall."""
        self.calls, self.spent = [], np.zeros(2)
        whole = seconds(move)
        parts, calls = self.spent.copy(), list(self.calls)
        alone = seconds(lambda: [genuine(*arguments) for genuine, arguments in calls])
        return np.stack([whole, parts, alone])


class Shares:
    """Where the rest of a move's time goes: CPU seconds of the calls named, outermost ones alone."""

    def __init__(self, sampler: Any) -> None:
        self.spent: dict[str, float] = {}
        self._inside = False
        coordinates = ("to_internal_and_log_volume", "positions_in_domain", "in_domain", "require_lengths")
        for label, owner, names in (
            ("energies and flow passes", pools, ("read_state",)),
            ("energies and flow passes", sampler.pool, ("energies", "_evaluate_state")),
            ("energies and flow passes", sampler.space, ("draw", "forward", "inverse", "log_base")),
            ("System compared with its copy", pools, ("fingerprint",)),
            ("coordinates, log J + Φ", sampler.coordinates, coordinates),
            ("positions and velocities handed over", sampler, ("settle",)),
        ):
            for name in names:
                setattr(owner, name, self._timed(label, getattr(owner, name)))

    def _timed(self, label: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._inside:
                return genuine(*arguments)
            self._inside, begin = True, time.process_time()
            try:
                return genuine(*arguments)
            finally:
                self.spent[label] = self.spent.get(label, 0.0) + time.process_time() - begin
                self._inside = False

        return call

    def turn(self, move: Callable[[], Any], turns: int) -> None:
        """Print shares of the CPU time of so many calls of a move."""
        self.spent = {}
        whole = sum(seconds(move)[0] for _ in range(turns))
        rest = {**self.spent, "all else": whole - sum(self.spent.values())}
        print(", ".join(f"{label} {100 * value / whole:.0f} %" for label, value in rest.items()))


def seconds(call: Callable[[], Any]) -> np.ndarray:
    begin = [clock() for clock in CLOCKS]
    call()
    return np.array([clock() - start for clock, start in zip(CLOCKS, begin, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40, help="turns of every move")
    parser.add_argument("--warm-up", type=int, default=4, help="turns that do not count: TorchScript compiles in them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    molecule = bg.load_alanine_dipeptide()
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.002)
    context = openmm.Context(molecule.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(molecule.positions)
    sampler = bg.BoltzmannGeneratorSampler(molecule.flow, context, seed=options.seed, platform="Reference", n_workers=1)
    latent = bg.LatentMove(sampler, a=0.1, width=0.1)
    passes = Passes(sampler)

    def proposals(k: int, n: int) -> Callable[[], None]:
        def call() -> None:
            sampler.n_proposals = k
            sampler.step(n)

        return call

    moves: dict[str, tuple[Callable[[], Any], int]] = {
        "D, step(1)": (proposals(1, 1), 1),
        "D, step(64)": (proposals(1, 64), 64),
        "E, K = 64, step(1)": (proposals(64, 1), 1),
        "E, K = 256, step(1)": (proposals(256, 1), 1),
        "E, K = 256, step(8)": (proposals(256, 8), 8),
        "F, step(1)": (latent.step, 1),
        "F, step(64)": (lambda: latent.step(64), 64),
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in moves}
    with sampler:
        context.setVelocitiesToTemperature(300.0, options.seed)
        for turn in range(options.warm_up + options.repeats):
            for name, (move, _) in moves.items():
                for _ in range(CALLS):
                    integrator.step(MD_STEPS)
                    values = passes.turn(move)
                    if turn >= options.warm_up:
                        found[name].append(values)
    print("| move | in place: CPU, wall | alone: CPU, wall | CPU ms a step |\n|---|---|---|---|")
    cost = {}
    for name, (_, n) in moves.items():
        values = np.array(found[name])  # [calls, 3, 2]
        ratios = [np.median(values[:, 0] / values[:, k], axis=0) for k in (1, 2)]
        cost[name] = float(np.median(values[:, 0, 0])) / n
        cells = [f"{pair[0]:.2f}, {pair[1]:.2f}" for pair in ratios]
        print(f"| {name} | {' | '.join(cells)} | {1e3 * cost[name]:.2f} |")
    one, many = cost["D, step(1)"], cost["E, K = 256, step(1)"]
    print(f"\nK = 256 over K = 1, a call of step(1) each: {many / one:.1f}")
    one, many = cost["D, step(64)"], cost["E, K = 256, step(8)"]
    print(f"the same inside long calls, where one proposal shares its batch with others: {many / one:.0f}")
    print("\nWhere the time goes:")
    with bg.BoltzmannGeneratorSampler(molecule.flow, context, seed=1, platform="Reference", n_workers=1) as sampler:
        shares, latent = Shares(sampler), bg.LatentMove(sampler, a=0.1, width=0.1)
        sampler.step(1)
        for name, move in (("D, step(1)", sampler.step), ("F, step(64)", lambda: latent.step(64))):
            print(name, end=": ")
            shares.turn(move, options.repeats)


if __name__ == "__main__":
    main()
