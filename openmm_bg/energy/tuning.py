"""Which platform, which form of the solvent, how many Contexts beside each other, in threads or in processes, or
whether a torch twin evaluates this System fastest: measured, not guessed.

No rule of thumb holds: the Reference platform is thirty times faster than the CPU platform on a small molecule in
vacuum and ten times slower on one in implicit solvent, and some forces gain from a second process but not from a second
thread.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm, or its torch plugin does not load)
import openmm  # isort: skip

from ..errors import EnergyError, InputError
from .arrays import as_frames, sound_rows
from .choices import Choice, keep_choice, load_choice
from .implicit_solvent import EqualSolvent, find_equal_solvent
from .process_workers import ProcessWorkers, serialise
from .snapshot import ContextState, clone_system, digest_system, platform_properties, read_state
from .tuning_report import NO_TIME, Tuning, TuningRow, surely_fastest
from .twin_workers import JITTER, TWIN, TWINS, TwinWorkers, default_threads, twin_names
from .workers import Workers, usable_cores

logger = logging.getLogger(__name__)

Effort: TypeAlias = Literal["quick", "full"]

#: Seconds after which no further candidate is started, and seconds of timing per candidate.
TOTAL_SECONDS = 1.6
CANDIDATE_SECONDS = 0.12

#: The same of a full tuning. A twin works on many frames at once, and one alone costs as much as its least number for a
#: thread, with which timing begins.
FULL_SECONDS = 10.0
TWIN_SECONDS = 1.0
TWIN_FRAMES = 32

#: A candidate is hopeless if its first frame takes longer than this, and even perfect scaling of a frame that
#: is so many times faster (the first one pays for caches and neighbour lists) stays behind the best so far.
#: Below that time, timing it properly costs nothing.
COSTLY_SECONDS = 0.01
WARM_UP = 3.0

#: Atoms up to which the equal solvent is verified on two frames: on the Reference platform a CustomGBForce takes 0.1 s
#: for 600 atoms and more than a second for 2,500.
TWO_FRAMES = 1000

#: More workers must gain this factor, or the series of worker counts ends: less is noise, and costs memory.
GAIN = 1.05

#: Processes must be faster than all else by this factor, for each costs memory and a third of a second to start.
PROCESS_GAIN = 1.1

#: How far other load on the machine may take the rate of one thread from that of the same thread later on.
NOISE = 2.0

#: Platforms whose Contexts may have a process each; a GPU would have to share itself among them.
HOST_PLATFORMS = ("Reference", "CPU")

#: Repeats of the largest batch, its frames, and the bound on frames x atoms that keeps its memory small.
REPEATS = 4
FRAMES = 512
FRAME_ATOMS = 1_000_000


def tune(
    context: openmm.Context,
    *,
    platform: str | None = None,
    n_workers: int | None = None,
    positions: Any = None,
    effort: Effort = "quick",
) -> Tuning:
    """Time energies and forces on every platform present and on growing numbers of workers.

    Where a CustomGBForce is that of OBC2, the equal GBSAOBCForce is verified and timed besides, and before it.

    The Context's own platform comes first and is always a candidate; others that cannot hold the System are
    skipped. The chosen platform may compute in a coarser precision than the Context's own: name `platform`
    where that is not wanted.

    Parameters
    ----------
    context
        Context with positions; it is read only.
    platform, n_workers
        Fix one of the two; None means to be found. The platform may be "twin", or "twin:cuda" where torch has a GPU.
    positions
        [F, N, 3] nm, finite frames like those to come; default the Context's own positions.
    effort
        "full" takes longer for each candidate to be timed, and tries worker processes and the System's torch twin too
        (on the CPU, and on torch's GPU if there is one), which may take seconds to compile. What it finds is kept in
        the user's cache folder, and "quick" takes that up, without timing, for the same System, machine and versions.
        Nothing is kept or taken up where platform or n_workers is named, and no twin is tried where platform is. Nor is
        anything kept that may be the doing of other load on the machine (`surely_fastest`), which one sentence says;
        what an earlier tuning has kept stays.

    Returns
    -------
    Tuning
        The report; also logged in one sentence at level INFO.

    Raises
    ------
    InputError
        No such platform, a worker count below 1, frames of a wrong shape or not finite, an unknown effort, or a Context
        without finite positions and energy.
    EnergyError
        No candidate could be timed.
    """
    equal = find_equal(context, read_state(context), positions) if platform not in TWINS else None
    report, ready = find_fastest(
        context, platform=platform, n_workers=n_workers, positions=positions, effort=effort, equal=equal
    )
    if ready is not None:
        ready.close()
    return report


def find_equal(context: openmm.Context, state: ContextState, positions: Any = None) -> EqualSolvent | None:
    """The Context's System with its faster solvent, verified on the Context's positions and, unless it has more than
    `TWO_FRAMES` atoms, on another frame: the first one given, or one nearby.
    """
    other = state.positions + np.random.default_rng(0).normal(scale=JITTER, size=state.positions.shape)
    if positions is not None:
        given = as_frames(positions, len(state.positions))[:1]
        other = given[0] if sound_rows(given) else other
    frames = np.stack((state.positions, other))
    return find_equal_solvent(context.getSystem(), frames[: 1 if len(other) > TWO_FRAMES else 2])


def find_fastest(
    context: openmm.Context,
    *,
    platform: str | None = None,
    n_workers: int | None = None,
    positions: Any = None,
    effort: Effort = "quick",
    kept: bool = True,
    processes: bool | None = None,
    equal: EqualSolvent | None = None,
) -> tuple[Tuning, TwinWorkers | ProcessWorkers | None]:
    """As `tune`, and the twin or the processes, if they were made and chosen, for they cost time to make.

    Parameters
    ----------
    context, platform, n_workers, positions, effort
        As for `tune`.
    kept
        Whether a choice of an earlier tuning may be taken up, and that of this one be kept.
    processes
        True: processes only, in the place of threads; False: no processes; None: they are tried with "full".
    equal
        A faster form of the System, verified.
    """
    started = time.perf_counter()
    check_choice(platform, n_workers, effort)
    state = read_state(context)
    frames = _frames(state, positions)
    if processes:
        serialise(context.getSystem())  # refused before any platform is blamed for it
    digest = digest_system(context) if platform is None and n_workers is None and processes is None else None
    if kept and effort == "quick" and digest is not None and (choice := load_choice(digest)) is not None:
        row = TuningRow(
            choice.platform,
            choice.n_workers,
            choice.frames_per_second,
            processes=choice.processes,
            equal_solvent=choice.equal_solvent and equal is not None,
        )
        report = Tuning((row,), row, time.perf_counter() - started, kept=True)
        logger.info("%s", report)
        return report, None

    system = clone_system(context)
    forms = ([(True, equal.system)] if equal is not None else []) + [(False, system)]
    rows: list[TuningRow] = []
    shares: list[float] = []
    twins: dict[str, TwinWorkers] = {}
    process_workers: ProcessWorkers | None = None
    if platform not in TWINS:
        names = [platform] if platform is not None else _platforms(context)
        if processes and platform is None:
            names = [name for name in names if name in HOST_PLATFORMS]
        counts = [n_workers] if n_workers is not None else _counts(len(usable_cores()))
        deadline = started + (FULL_SECONDS if effort == "full" else TOTAL_SECONDS)
        rows = _time_contexts(
            context, forms, state, frames, names, counts, deadline, ProcessWorkers if processes else Workers, shares
        )
    twin_rows: list[TuningRow] = []
    named = [platform] if platform is not None and platform in TWINS else []
    for name in twin_names() if platform is None and effort == "full" and not processes else named:
        threads = [n_workers] if n_workers is not None else _counts(default_threads())
        found, twin = _time_twin(system, state, frames, threads if name == TWIN else [1], name, shares)
        twin_rows += found
        if twin is not None:
            twins[name] = twin
    if platform not in TWINS and effort == "full" and processes is None:
        # Last, for they are not started where they could not win; the twin's rows stay at the end of the report.
        found, process_workers = _time_processes(context, dict(forms), state, frames, n_workers, [*rows, *twin_rows])
        rows += found
    rows += twin_rows

    timed = [row for row in rows if row.frames_per_second is not None]
    if not timed:
        reasons = "; ".join(f"{row.name}: {row.note}" for row in rows)
        raise EnergyError(f"No platform could evaluate the System in a copy of the Context ({reasons}).")
    chosen = max(timed, key=lambda row: (row.frames_per_second or 0.0) / (PROCESS_GAIN if row.processes else 1.0))
    ready: TwinWorkers | ProcessWorkers | None = None
    for name, twin in twins.items():
        if chosen.platform == name:
            twin.set_threads(chosen.n_workers)
            ready = twin
        else:
            twin.close()
    if process_workers is not None:
        if chosen.processes:
            process_workers.set_processes(chosen.n_workers)
            process_workers.retire()
            ready = process_workers
        else:
            process_workers.close()
    report = Tuning(tuple(rows), chosen, time.perf_counter() - started)
    logger.info("%s", report)
    if kept and effort == "full" and digest is not None:
        _keep(digest, report, min(shares, default=1.0))
    return report, ready


def _keep(digest: str, report: Tuning, share: float) -> None:
    """Keep what was chosen, unless the load on the machine may have decided it: it would stay for ever."""
    if not surely_fastest(report.rows, report.chosen, share):
        logger.warning(
            "How energies are evaluated fastest is not kept, for the machine was so busy with other work while it was "
            "timed (a thread got %.0f %% of a core) that another way may be faster: tune again when it is free.",
            100.0 * share,
        )
        return
    best = report.chosen
    rate = best.frames_per_second or 0.0
    keep_choice(digest, Choice(best.platform, best.n_workers, rate, best.processes, best.equal_solvent))


def _time_contexts(
    context: openmm.Context,
    forms: list[tuple[bool, openmm.System]],
    state: ContextState,
    frames: NDArray[np.float64],
    names: list[str],
    counts: list[int],
    deadline: float,
    kind: type[Workers] | type[ProcessWorkers],
    shares: list[float],
) -> list[TuningRow]:
    """Platforms, forms of the System and worker counts, each until it gains no more."""
    rows: list[TuningRow] = []
    best = 0.0
    for name, (equal, system) in itertools.product(names, forms):
        best_here = 0.0
        for count in counts:
            row = TuningRow(name, count, None, processes=kind is ProcessWorkers, equal_solvent=equal)
            if best > 0.0 and time.perf_counter() > deadline:
                rows.append(replace(row, note=NO_TIME))
                break
            try:
                workers = kind(system, name, platform_properties(name, context), count)
            except (openmm.OpenMMException, EnergyError) as error:
                rows.append(replace(row, note=f"cannot hold this System ({error})"))
                break
            try:
                workers.apply(state)
                rate = _rate(workers, frames, hopeless_below=best, scaling=max(counts) / count, shares=shares)
            finally:
                workers.close()
            if workers.failure is not None:
                rows.append(replace(row, note=f"cannot evaluate this System ({workers.failure})"))
                break
            if rate is None:
                rows.append(replace(row, note="too slow"))
                break
            rows.append(replace(row, frames_per_second=rate))
            best = max(best, rate)
            if rate < GAIN * best_here:
                break
            best_here = max(best_here, rate)
    return rows


def _time_processes(
    context: openmm.Context,
    forms: dict[bool, openmm.System],
    state: ContextState,
    frames: NDArray[np.float64],
    n_workers: int | None,
    rows: list[TuningRow],
) -> tuple[list[TuningRow], ProcessWorkers | None]:
    """Processes on the platform and with the form of the System that could gain most from them; they are returned too.

    They cannot be faster than one thread of theirs times their number, up to `NOISE`.
    """
    timed = [row for row in rows if row.platform in HOST_PLATFORMS and row.frames_per_second is not None]
    if not timed:
        return [], None
    most = n_workers if n_workers is not None else default_threads()
    bounds = [(row.frames_per_second or 0.0) * most / min(row.n_workers, most) for row in timed]
    bound, leader = max(zip(bounds, timed, strict=True), key=lambda pair: pair[0])
    row = replace(leader, n_workers=most, frames_per_second=None, note="", processes=True)
    if most == 1:
        return [replace(row, note="no gain from one alone")], None
    if NOISE * bound < max(other.frames_per_second or 0.0 for other in rows):
        return [replace(row, note="too slow")], None
    try:
        workers = ProcessWorkers(
            forms[row.equal_solvent], row.platform, platform_properties(row.platform, context), most
        )
    except (openmm.OpenMMException, EnergyError) as error:
        return [replace(row, note=str(error).rstrip("."))], None
    found: list[TuningRow] = []
    try:
        workers.apply(state)
        for count in [n_workers] if n_workers is not None else [count for count in _counts(most) if count > 1]:
            workers.set_processes(count)
            workers.evaluate(frames, list(range(min(len(frames), 2 * count))), forces=True)  # memory is new to them
            rate = _rate(workers, frames, hopeless_below=0.0, scaling=1.0)
            if workers.failure is not None:
                raise EnergyError(f"cannot evaluate this System ({workers.failure})")
            found.append(replace(row, n_workers=count, frames_per_second=rate))
    except EnergyError as error:
        workers.close()
        return [replace(row, note=str(error).rstrip("."))], None
    except BaseException:
        workers.close()
        raise
    return found, workers


def _time_twin(
    system: openmm.System,
    state: ContextState,
    frames: NDArray[np.float64],
    counts: list[int],
    name: str,
    shares: list[float],
) -> tuple[list[TuningRow], TwinWorkers | None]:
    """A twin's rows, one for each number of threads, and the twin unless it cannot be had.

    On a GPU, frames and forces travel there and back, as those of a sampler do, and the clock stops when they are here.
    """
    try:
        twin = TwinWorkers(system, state, counts[0], name)
    except (InputError, EnergyError) as error:
        return [TuningRow(name, counts[0], None, str(error).rstrip("."))], None
    rows: list[TuningRow] = []
    for n in counts:
        twin.set_threads(n)
        first = len(frames) if twin.on_gpu else TWIN_FRAMES * n  # launches cost a GPU the same for one frame and all
        try:
            # Its first call starts threads, or fills the GPU's memory.
            twin.evaluate(frames[:first], list(range(len(frames[:first]))), forces=True)
            rate = _rate(
                twin, frames, hopeless_below=0.0, scaling=1.0, seconds_allowed=TWIN_SECONDS, first=first, shares=shares
            )
        except EnergyError as error:  # of a GPU
            twin.close()
            return [TuningRow(name, n, None, str(error).rstrip("."))], None
        rows.append(TuningRow(name, n, rate, "compiled" if twin.twin.compiled else "not compiled"))
    return rows, twin


def check_choice(platform: str | None, n_workers: int | None, effort: str | None = None) -> None:
    """Refuse a platform that is not there, a worker count below 1 and an unknown effort.

    Without an effort, Contexts are wanted, and "twin" is no platform.
    """
    names = platform_names() + ([] if effort is None else [TWIN])
    if platform is not None and platform not in names and effort is not None:
        names += [name for name in twin_names() if name not in names]  # only now, for it wakes the GPU
    if platform is not None and platform not in names:
        raise InputError(f"There is no platform {platform!r} here: name one of {', '.join(names)}.")
    if n_workers is not None and (isinstance(n_workers, bool) or int(n_workers) != n_workers or n_workers < 1):
        raise InputError(f"n_workers must be a whole number of at least 1, not {n_workers!r}.")
    if effort is not None and effort not in ("quick", "full"):
        raise InputError(f"Tuning is 'quick' or 'full', not {effort!r}.")


def platform_names() -> list[str]:
    """Names of the platforms that this OpenMM has."""
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def _platforms(context: openmm.Context) -> list[str]:
    # Own platform first: it is sure to work. Then the two that start in milliseconds.
    names = [context.getPlatform().getName(), "Reference", "CPU", *platform_names()]
    return [name for name in dict.fromkeys(names) if name in platform_names()]


def _counts(cores: int) -> list[int]:
    counts = [2**k for k in range(cores.bit_length()) if 2**k < cores]
    return [*counts, cores]


def _frames(state: ContextState, positions: Any) -> NDArray[np.float64]:
    n_atoms = len(state.positions)
    given = as_frames(state.positions[None] if positions is None else positions, n_atoms)
    if len(given) == 0 or len(sound_rows(given)) < len(given):
        raise InputError("positions to time on must be at least one frame, all of finite numbers.")
    count = int(np.clip(FRAME_ATOMS // n_atoms, 8, FRAMES))
    frames = given[np.arange(count) % len(given)]
    # Every second frame is moved as a whole: one neighbour list must not serve them all, as it never does in
    # use.
    frames[1::2] += 0.2
    return frames


def _rate(
    workers: Workers | ProcessWorkers | TwinWorkers,
    frames: NDArray[np.float64],
    *,
    hopeless_below: float,
    scaling: float,
    seconds_allowed: float = CANDIDATE_SECONDS,
    first: int = 0,
    shares: list[float] | None = None,
) -> float | None:
    """Frames per second, or None if one frame per worker shows that the candidate cannot win.

    To `shares` the share of a core is added that a single thread got, for it has work at all times: where several
    threads wait for each other, or for a GPU, no such number tells of other load.
    """

    def seconds(n: int) -> float:
        begin = time.perf_counter()
        workers.evaluate(frames, list(range(n)), forces=True)
        return max(time.perf_counter() - begin, 1e-9)

    alone = workers.n == 1 and workers.platform in (*HOST_PLATFORMS, TWIN) and not isinstance(workers, ProcessWorkers)
    began, worked = time.perf_counter(), time.process_time()
    n = min(max(workers.n, first), len(frames))
    total = elapsed = seconds(n)
    if elapsed > COSTLY_SECONDS and scaling * WARM_UP * n / elapsed < hopeless_below:
        return None
    # Grow towards a batch that fills the time allowed, so that handing out work weighs as it does in use.
    while (size := min(len(frames), int(0.5 * (seconds_allowed - total) * n / elapsed))) > n:
        n, elapsed = size, seconds(size)
        total += elapsed
    # The best of a few, for other load on the machine only ever slows a candidate down.
    for _ in range(REPEATS):
        if total > 0.5 * seconds_allowed:
            break
        again = seconds(n)
        elapsed, total = min(elapsed, again), total + again
    if alone and shares is not None:
        shares.append((time.process_time() - worked) / max(time.perf_counter() - began, 1e-9))
    return n / elapsed
