"""``openmm-bg simulate``: a structure becomes a folder of trajectories, with every check before the long work."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip

from openmm_bg.coordinates import read_constraints
from openmm_bg.energy.implicit_solvent import with_equal_solvent
from openmm_bg.energy.tuning import check_choice
from openmm_bg.errors import BGError, CheckpointError, InputError
from openmm_bg.files import write_atomically
from openmm_bg.progress import progress_bar
from openmm_bg.simulate import engine as engines
from openmm_bg.simulate import folder as folders
from openmm_bg.simulate import parameters as parameter_files
from openmm_bg.simulate import structure as structures
from openmm_bg.simulate.geometry import Stereochemistry
from openmm_bg.simulate.protocol import Protocol
from openmm_bg.simulate.reading import is_structure
from openmm_bg.simulate.replica import Queue, Replica

logger = logging.getLogger(__name__)

#: Wall time between two checkpoints of a replica, s.
CHECKPOINT_SECONDS = 30.0
#: Settings that a continued simulation may change.
FREE = ("length",)


class SimulationInterrupted(BGError, RuntimeError):
    """Ctrl-C; every frame so far is kept."""


@dataclass(frozen=True)
class Summary:
    """What a simulation has made: frames in all, frames with another stereochemistry, and speed while it ran."""

    folder: Path
    frames: int
    changed: int
    ns_per_day: float
    temperature: float
    trajectories: int

    def __str__(self) -> str:
        changed = ""
        if self.changed:
            changed = f" {self.changed} frames have another chirality or amide isomer, and training leaves them out."
        speed = f", {self.ns_per_day:.3g} ns/day" if np.isfinite(self.ns_per_day) else ""
        return (
            f"{self.folder}: {self.frames} frames in {self.trajectories} trajectories, mean temperature "
            f"{self.temperature:.1f} K{speed}.{changed}"
        )


class _Meter:
    """What the workers have done, for the progress bar and the speed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ps, self.energy, self.temperature, self.started = 0.0, float("nan"), float("nan"), time.perf_counter()

    def report(self, ps: float, energy: float, temperature: float) -> None:
        with self._lock:
            self.ps += ps
            if np.isfinite(energy):
                self.energy, self.temperature = energy, temperature

    @property
    def ns_per_day(self) -> float:
        return 86.4 * self.ps / max(time.perf_counter() - self.started, 1e-9)


def simulate(
    structure: str | os.PathLike[str],
    output: str | os.PathLike[str],
    protocol: Protocol | None = None,
    *,
    forcefield: Sequence[str] = ("amber14-all.xml",),
    solvent: Literal["obc2", "none"] = "obc2",
    positions: str | os.PathLike[str] | None = None,
    parameters: Sequence[str | os.PathLike[str]] = (),
    chain: str | None = None,
    ph: float = 7.0,
    platform: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Summary:
    """Make training data: several replicas of one molecule, in a folder that `openmm-bg train` reads.

    Parameters
    ----------
    structure
        PDB or PDBx/mmCIF file of one chain; or .prmtop, .top or .psf with ``positions``.
    output
        Folder, new or empty; with ``resume`` that of the simulation to continue.
    protocol
        Settings; default: `Protocol()`.
    forcefield, solvent
        XML files, and the implicit solvent added to them unless they bring one.
    positions, parameters
        For .prmtop, .top and .psf: file with the positions; for .psf: CHARMM's parameter files.
    chain, ph
        Chain to keep of a structure; pH for hydrogens that it lacks.
    platform
        OpenMM platform; default: the fastest, by timing.
    resume
        Continue an interrupted simulation, or one that is to become longer.
    progress
        Show a progress bar.

    Raises
    ------
    InputError
        Anything that cannot be simulated, before anything is written.
    EnergyError
        An unstable simulation. Frames before it are kept.
    SimulationInterrupted
        Ctrl-C. Continue with ``resume=True``.
    CheckpointError
        A damaged folder.
    """
    protocol = Protocol() if protocol is None else protocol
    check_choice(platform, None)
    if not np.isfinite(ph):
        raise InputError(f"A pH of {ph:g} is not possible: give a number.")
    path, target = Path(structure), Path(output)
    extra = [Path(p) for p in parameters]
    given = {
        "forcefield": list(forcefield), "solvent": solvent, "chain": chain, "ph": ph,
        "files": [_digest(p) for p in (path, *([] if positions is None else [Path(positions)]), *extra)],
    }  # fmt: skip
    if resume:
        record = folders.read_record(target)
        _check_same(record, protocol, given, target)
    else:
        folders.check_new(target)
        record = {}
    if not resume:
        molecule = _read(path, protocol, forcefield, solvent, positions, extra, chain, ph)
        record = _prepare(molecule, target, protocol, given, platform)
    with folders.locked(target):
        return _run(target, record, protocol, platform, resume, progress)


def _read(
    path: Path,
    protocol: Protocol,
    forcefield: Sequence[str],
    solvent: Literal["obc2", "none"],
    positions: Any,
    extra: Sequence[Path],
    chain: str | None,
    ph: float,
) -> structures.Molecule:
    """The molecule of the user's files, with the checks that training will make."""
    if parameter_files.is_parameters(path):
        if positions is None:
            raise InputError(f"{path} holds no positions: give a file that does with --positions.")
        molecule = parameter_files.prepare(
            path, Path(positions), solvent=solvent, parameters=extra, hydrogen_mass=protocol.hydrogen_mass
        )
    elif is_structure(path):
        if positions is not None or extra:
            raise InputError(f"{path} brings its own positions: leave out --positions and --parameters.")
        files = list(forcefield)
        if solvent == "obc2" and not any(name.startswith("implicit/") or name.endswith("_obc.xml") for name in files):
            files.append("implicit/obc2.xml")
        molecule = structures.prepare(path, files, chain=chain, ph=ph, hydrogen_mass=protocol.hydrogen_mass)
    else:
        raise InputError(f"{path} has no known ending: give a .pdb, .cif, .prmtop, .top or .psf file.")
    for note in molecule.notes:
        logger.info("%s", note)
    read_constraints(molecule.system, molecule.topology)  # one molecule, no virtual sites: what training refuses
    return molecule


def _prepare(
    molecule: structures.Molecule, target: Path, protocol: Protocol, given: dict[str, Any], platform: str | None
) -> dict[str, Any]:
    """Minimise, choose System and platform, and make the folder."""
    stereochemistry = Stereochemistry(molecule.topology, molecule.positions)
    for note in stereochemistry.notes():
        logger.warning("%s", note)
    logger.info("Minimising %d atoms.", molecule.topology.getNumAtoms())
    molecule.positions = engines.minimise(
        with_equal_solvent(molecule.system) or molecule.system, molecule.positions, protocol
    )
    different = stereochemistry.difference(molecule.positions)
    if different is not None:
        raise InputError(f"Minimisation changes {different}: the structure is strained there, repair it first.")
    twin, said = engines.equal_solvent(molecule.system, molecule.positions, protocol)
    chosen, system, timing = engines.choose(molecule.system, twin, molecule.positions, protocol, platform)
    if said is not None and chosen.platform in engines.ON_CPU:
        logger.info("%s", said)
    logger.info("%s", timing)
    record = {
        "protocol": protocol.to_dict(),
        "input": given,
        "notes": [*molecule.notes, *stereochemistry.notes(), *([said] if system is twin and said else [])],
        "trajectories": protocol.names,
        "frames": protocol.frames,
        "complete": False,
        "engine": {"platform": chosen.platform, "threads": chosen.threads, "workers": chosen.workers},
    }
    folders.create(target, molecule, system, record)
    return record


def _run(
    target: Path, record: dict[str, Any], protocol: Protocol, platform: str | None, resume: bool, progress: bool
) -> Summary:
    system = folders.read_system(target)
    record = folders.read_record(target)
    topology, start = folders.read_topology(target, record)
    engine = _engine(record, system, start, protocol, platform, resume)
    try:
        if resume:
            record.update(protocol=protocol.to_dict(), frames=protocol.frames, complete=False)
            write_atomically(target / folders.RECORD, _json(record))
        stereochemistry = Stereochemistry(topology, start)
        dof = 3 * system.getNumParticles() - system.getNumConstraints()
        dof -= 3 * any(isinstance(force, openmm.CMMotionRemover) for force in system.getForces())
        replicas = [Replica(target, name, topology, stereochemistry, protocol, dof) for name in record["trajectories"]]
        meter = _Meter()
        _work(engine, system, start, replicas, protocol, meter, progress)
        record.update(complete=True)
        write_atomically(target / folders.RECORD, _json(record))
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {target} ({error.strerror or error}): every frame of the last checkpoint is kept, "
            "--resume continues."
        ) from error
    temperatures = [np.loadtxt(target / f"{r.name}.csv", delimiter=",", skiprows=1, ndmin=2)[:, 2] for r in replicas]
    return Summary(
        target, sum(r.frames for r in replicas), sum(r.changed for r in replicas),
        meter.ns_per_day if meter.ps else float("nan"), float(np.concatenate(temperatures).mean()), len(replicas),
    )  # fmt: skip


def _engine(
    record: dict[str, Any],
    system: openmm.System,
    start: np.ndarray,
    protocol: Protocol,
    platform: str | None,
    resume: bool,
) -> engines.Engine:
    """As timed when the folder was made; timed again if this may be another machine."""
    if not resume:
        cores = tuple(sorted(engines.usable_cores()))
        return engines.Engine(**record["engine"], cores=cores)
    chosen, _, timing = engines.choose(system, None, start, protocol, platform)
    logger.info("%s", timing)
    return chosen


def _work(
    engine: engines.Engine,
    system: openmm.System,
    start: np.ndarray,
    replicas: list[Replica],
    protocol: Protocol,
    meter: _Meter,
    progress: bool,
) -> None:
    """All replicas to their end, each Context in a thread of its own."""
    queue, halt = Queue(replicas), threading.Event()
    failures: list[BaseException] = []
    xml = openmm.XmlSerializer.serialize(system)
    before = sum(replica.frames for replica in replicas)
    prepared = sum(replica.progress >= 0 for replica in replicas)

    def run(which: int) -> None:
        try:
            # Seeds depend on what is done, so that a continued run draws noise that it has not drawn yet.
            stream = np.random.default_rng([protocol.seed, before, prepared, which])

            def seed() -> int:
                return int(stream.integers(1, 2**31 - 1))

            engine.pin(which)
            context = engine.context(xml, protocol, seed())
            while not halt.is_set() and (replica := queue.take()) is not None:
                until = time.monotonic() + CHECKPOINT_SECONDS
                try:
                    replica.advance(
                        context, start, seed, halt.is_set,
                        lambda end=until: halt.is_set() or time.monotonic() > end, meter.report,  # type: ignore[misc]
                    )  # fmt: skip
                finally:
                    queue.give_back(replica)
        except BaseException as error:
            failures.append(error)
            halt.set()
        finally:
            ended[which].set()

    # Events, for Thread.join that Ctrl-C interrupts takes a running thread for ended (Python 3.11).
    ended = [threading.Event() for _ in range(engine.workers)]
    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(engine.workers)]
    waiting = [replica for replica in replicas if not replica.done]
    todo = sum(
        (protocol.frames - r.frames) * protocol.interval
        + (r.progress < 0) * (protocol.heating + protocol.equilibration)
        for r in waiting
    )  # fmt: skip
    meter.started = time.perf_counter()
    for thread in threads:
        thread.start()
    try:
        with _bar(todo, progress and bool(waiting)) as show:
            while not all(event.is_set() for event in ended):
                for event in ended:
                    event.wait(0.1)  # short waits keep Ctrl-C responsive
                show(meter)
    except KeyboardInterrupt:
        halt.set()
        for event in ended:
            event.wait()
        if not failures:
            done = sum(replica.frames for replica in replicas)
            raise SimulationInterrupted(
                f"Interrupted with {done} of {protocol.frames * len(replicas)} frames, all of them kept: --resume "
                "continues."
            ) from None
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _bar(total: float, shown: bool) -> Any:
    """A function that shows the state of a meter, in ps of all replicas together."""
    form = "{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} ps [{elapsed}<{remaining}{postfix}]"
    with progress_bar(total=total, desc="MD", bar_format=form, shown=shown) as bar:

        def show(meter: _Meter) -> None:
            text = f"{meter.ns_per_day:.3g} ns/day"
            if np.isfinite(meter.energy):
                text += f", {meter.energy:.0f} kJ/mol, {meter.temperature:.0f} K"
            bar.set_postfix_str(text, refresh=False)
            bar.update(min(meter.ps, total) - bar.n)

        yield show


def _check_same(record: dict[str, Any], protocol: Protocol, given: dict[str, Any], target: Path) -> None:
    """A continued simulation must be the same but for its length."""
    try:
        old = Protocol(**record["protocol"])
        theirs = record["input"]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{target / folders.RECORD} is damaged, or was written by another version.") from error
    for name, value in replace(protocol, **{name: getattr(old, name) for name in FREE}).to_dict().items():
        if value != getattr(old, name):
            raise InputError(
                f"{target} was simulated with {name.replace('_', ' ')} {getattr(old, name)}, not {value}: continue "
                "with the same settings (only the length may change)."
            )
    for name, value in given.items():
        if value != theirs.get(name):
            what = "another input file" if name == "files" else f"another {name} ({theirs.get(name)})"
            raise InputError(f"{target} was simulated with {what}: continue with the same, or choose another folder.")


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1)
