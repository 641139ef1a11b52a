"""`train`: from a System, a Topology and a trajectory to a `Flow`, with everything checked before the long work."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)
from openmm import unit  # isort: skip

from openmm_bg.artifact import Flow, compress_text, topology_to_dict
from openmm_bg.coordinates import CoordinateMap, MoleculeGraph, read_constraints
from openmm_bg.coordinates.bond_lengths import COVALENT_RADII, check_bond_lengths
from openmm_bg.coordinates.chirality import check_hands
from openmm_bg.energy import ContextPool, Target, in_kelvin, make_context
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.flow import build_flow
from openmm_bg.flow.completion import Completion
from openmm_bg.training.completion import fit_completion, free_columns
from openmm_bg.training.config import TrainingConfig
from openmm_bg.training.dataset import Dataset
from openmm_bg.training.parallel import Ranks, joined
from openmm_bg.training.record import training_record, versions
from openmm_bg.training.threads import fastest_threads
from openmm_bg.training.trainer import Trainer, TrainingInterrupted

logger = logging.getLogger(__name__)

#: Atoms closer than this many times the sum are bonded, whatever the topology says.
CONTACT = 1.2


def train(
    system: openmm.System,
    topology: Any,
    trajectory: Any,
    temperature: Any,
    *,
    log_weights: Any = None,
    representation: Literal["full", "reduced"] = "full",
    config: TrainingConfig | dict[str, Any] | str | Path = "cpu",
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    platform: str | None = None,
    n_workers: int | None = None,
    tune: Literal["quick", "full"] = "quick",
    device: str | None = None,
    progress: bool = True,
) -> Flow:
    """Train a flow on a little MD and on the force field itself.

    Started by `torchrun`, all processes train the same flow and share every batch and its energies; the main one writes
    files and shows progress.

    Parameters
    ----------
    system
        ``openmm.System`` of the single molecule, with the constraints of the MD to come.
    topology
        Its ``openmm.app.Topology``, with bonds.
    trajectory
        Frames in time order: an array [n, N, 3] in nm, an ``mdtraj.Trajectory``, or the path (or paths) of a file that
        MDTraj reads.
    temperature
        K or Quantity: of the target, and of the frames unless ``log_weights`` say otherwise.
    log_weights
        [n], up to a constant, for frames of a biased or tempered run; minus infinity leaves a frame out.
    representation
        "full" models every unconstrained coordinate, "reduced" the torsions and backbone angles alone; the others get
        a completion g(s|y) from the same frames, after the flow.
    config
        Preset ("cpu", "protein", "paper"), YAML file, dict or `TrainingConfig`.
    directory
        For checkpoints, the loss curve and ``flow.bg``; None keeps everything in memory.
    resume
        Continue from the checkpoint in ``directory``.
    platform, n_workers
        Of the Contexts that evaluate energies, in each process; None chooses by timing. "twin": a torch twin of the
        System evaluates them; "twin:cuda": on a GPU, where samples of a flow that is trained there stay.
    tune
        "full" tries worker processes too, and the twin on the CPU and on a GPU if torch has one; it takes longer and is
        remembered (see `openmm_bg.energy.tune`).
    device
        Where the flow is trained, "cpu" (the default) or "cuda".
    progress
        Show progress bars.

    Returns
    -------
    Flow
        In eval mode, with the moving average of the weights.

    Raises
    ------
    InputError
        Anything about System, Topology, trajectory or configuration that cannot work, before any training.
    TrainingInterrupted
        Ctrl-C; run again with ``resume=True``.
    RankLost
        Another process of a training by several failed.
    """
    where = _device(device)
    with joined(where) as ranks:
        return _train(
            system, topology, trajectory, temperature, log_weights, representation, config, directory, resume, platform,
            n_workers, tune, where, progress, ranks,
        )  # fmt: skip


def _train(
    system: openmm.System,
    topology: Any,
    trajectory: Any,
    temperature: Any,
    log_weights: Any,
    representation: Literal["full", "reduced"],
    config: TrainingConfig | dict[str, Any] | str | Path,
    directory: str | os.PathLike[str] | None,
    resume: bool,
    platform: str | None,
    n_workers: int | None,
    tune: Literal["quick", "full"],
    device: torch.device,
    progress: bool,
    ranks: Ranks,
) -> Flow:
    """`train` as one of the processes."""
    if isinstance(config, str) and config in ("cpu", "protein", "paper"):
        config = TrainingConfig.preset(config)  # type: ignore[arg-type]
    config = TrainingConfig.load(config)
    _check_kinds(system, topology)
    kelvin = in_kelvin(temperature)
    constraints = read_constraints(system, topology)
    graph = MoleculeGraph(topology)
    positions = load_frames(trajectory, topology)
    _check_bonds(positions, graph)
    check_hands(positions, topology)
    logger.info("%d frames of %d atoms.", len(positions), graph.n_atoms)
    _announce_refusals(system)
    try:
        log_w = None if log_weights is None else np.asarray(log_weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("log_weights must be numbers, one per frame.") from None
    if log_w is not None and log_w.shape != (len(positions),):
        raise InputError(f"log_weights has shape {log_w.shape}, but the trajectory has {len(positions)} frames.")
    coordinates = CoordinateMap.fit(topology, positions, constraints, representation)
    dataset = make_dataset(coordinates, positions, log_w, keep_positions=any(s.losses.w2 for s in config.stages))
    context = make_context(system, *_platform(platform))
    context.setPositions(positions[0].astype(np.float64))
    density = build_flow(coordinates.layout, config.flow, seed=config.seed).to(device)
    with _common_pool(context, platform, n_workers, tune, ranks) as pool:
        target = Target(coordinates.to(device), pool, kelvin)
        trainer = Trainer(
            density,
            dataset,
            config,
            target=target,
            backbone_atoms=_backbone_chain(graph),
            directory=directory,
            progress=progress,
            identity=_identity(system, kelvin),
            ranks=ranks,
        )
        sample = dataset.y[: -(-config.batch_size // ranks.size)].float().to(device)
        with fastest_threads(lambda: _trial_step(density, sample)):
            trainer.run(resume=resume)
            with _interruptible(directory):
                for module in (density, coordinates):
                    module.to("cpu")
                completion, fitted = _complete(coordinates, topology, dataset, config)
        with _interruptible(directory):
            record = training_record(trainer, density, coordinates, len(positions), completion)
    if fitted:
        record["completion"] = fitted
    metadata = {
        "temperature": kelvin,
        "topology": topology_to_dict(topology),
        "system": compress_text(openmm.XmlSerializer.serialize(system)),
        "versions": versions(),
        "training": record,
    }
    flow = Flow(density, coordinates, metadata, completion)
    if directory is not None:
        path = Path(directory) / "flow.bg"
        ranks.from_main(lambda: flow.save(path))
    return flow


@contextmanager
def _interruptible(directory: str | os.PathLike[str] | None) -> Iterator[None]:
    """Ctrl-C after the last step: the flow is trained, and what is missing is the work of a minute."""
    try:
        yield
    except KeyboardInterrupt:
        what = "Interrupted after the training's last step, before the flow was written"
        if directory is None:
            raise TrainingInterrupted(f"{what}; without a directory nothing is saved.") from None
        raise TrainingInterrupted(
            f"{what}; {directory} holds the trained flow's checkpoint, resume to go on: no step is repeated."
        ) from None


def load_frames(trajectory: Any, topology: Any) -> np.ndarray:
    """Frames [n, N, 3] in nm, float32 or float64, checked against the topology's atoms.

    Raises
    ------
    InputError
        Unreadable file, another number of atoms, or another order of elements where the file names them.
    """
    n_atoms = topology.getNumAtoms()
    if hasattr(trajectory, "value_in_unit"):
        trajectory = trajectory.value_in_unit(unit.nanometer)
    if isinstance(trajectory, (str, os.PathLike)) or (
        isinstance(trajectory, (list, tuple)) and trajectory and isinstance(trajectory[0], (str, os.PathLike))
    ):
        import mdtraj

        paths = [trajectory] if isinstance(trajectory, (str, os.PathLike)) else list(trajectory)
        top = mdtraj.Topology.from_openmm(topology)
        frames = []
        for path in map(Path, paths):
            if not path.is_file():
                raise InputError(f"There is no trajectory at {path}.")
            named = path.suffix.lower() in (".pdb", ".h5", ".hdf5", ".gro", ".mol2")
            try:
                loaded = mdtraj.load(str(path)) if named else mdtraj.load(str(path), top=top)
            except Exception as error:  # MDTraj raises whatever its format reader does
                raise InputError(f"MDTraj cannot read {path} with this topology: {_first_line(error)}.") from error
            _check_atoms(loaded.topology, topology, path.name)
            frames.append(loaded.xyz)
        found = np.concatenate(frames)
        if len(found) < 2:
            names = ", ".join(path.name for path in map(Path, paths))
            raise InputError(f"{names} holds {len(found)} frame: training needs a trajectory of many.")
        return found
    if hasattr(trajectory, "xyz") and hasattr(trajectory, "topology"):
        _check_atoms(trajectory.topology, topology, "the trajectory")
        return np.asarray(trajectory.xyz)
    try:
        positions = np.asarray(trajectory)
        numeric = np.issubdtype(positions.dtype, np.number)
    except (TypeError, ValueError):
        numeric = False
    if not numeric:
        raise InputError(
            f"The trajectory must be an array in nm, an mdtraj.Trajectory or a path, not a {type(trajectory).__name__}."
        )
    if positions.ndim != 3 or positions.shape[1:] != (n_atoms, 3):
        raise InputError(f"The trajectory must be [frames, {n_atoms}, 3] in nm, got {list(positions.shape)}.")
    return positions.astype(np.float64) if positions.dtype not in (np.float32, np.float64) else positions


def make_dataset(
    coordinates: CoordinateMap, positions: np.ndarray, log_weights: np.ndarray | None, keep_positions: bool = False
) -> Dataset:
    """Frames inside the modelled sectors as (y, s), with their weights.

    Parameters
    ----------
    coordinates
        The map.
    positions
        [n, N, 3] nm.
    log_weights
        [n] or None.
    keep_positions
        Keep the Cartesian frames too, for the W2 loss.
    """
    ys, ss, kept = [], [], []
    for start in range(0, len(positions), 8192):
        x = torch.as_tensor(positions[start : start + 8192], dtype=torch.float64)
        y, s = coordinates.to_internal(x)
        inside = coordinates.in_domain(y, s)
        ys.append(y[inside])
        ss.append(s[inside])
        kept.append(inside)
    keep = torch.cat(kept)
    if log_weights is not None:
        keep_weights = torch.as_tensor(log_weights)[keep]
    s = torch.cat(ss)
    if all(c.constrained for c in coordinates.coordinates if not c.modelled):
        # Constrained lengths differ between frames only by the solver's tolerance: one exact value for all.
        s = coordinates.reference_fixed.expand(len(s), -1).contiguous()
    return Dataset(
        torch.cat(ys),
        s,
        None if log_weights is None else keep_weights,
        torch.as_tensor(positions)[keep] if keep_positions else None,
    )


def _check_atoms(found: Any, topology: Any, name: str) -> None:
    theirs = [(a.name, "" if a.element is None else a.element.symbol) for a in found.atoms]
    ours = [(a.name, "" if a.element is None else a.element.symbol) for a in topology.atoms()]
    if len(theirs) != len(ours):
        raise InputError(f"{name} has {len(theirs)} atoms, the topology has {len(ours)}.")
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a[1] != b[1]:
            raise InputError(
                f"Atom {i} is {a[0]} in {name} and {b[0]} in the topology: the atom orders differ, convert one of them."
            )


def _check_kinds(system: Any, topology: Any) -> None:
    from openmm import app

    if not isinstance(system, openmm.System):
        raise InputError(f"The system must be an openmm.System, not a {type(system).__name__}.")
    if not isinstance(topology, app.Topology):
        raise InputError(
            f"The topology must be an openmm.app.Topology (a PDBFile's .topology), not a {type(topology).__name__}."
        )


def _announce_refusals(system: openmm.System) -> None:
    """Training is possible with a box, a barostat or an external force, independent samples later are not: say so."""
    if system.usesPeriodicBoundaryConditions():
        logger.warning(
            "The System has a periodic box: where its energy depends on how the molecule is turned, as with PME, "
            "step() will work and sample() will refuse; train with nonbondedMethod=NoCutoff to have both."
        )
    for force in system.getForces():
        name = type(force).__name__
        if "Barostat" in name or "External" in name:
            logger.warning(
                "The System has a %s: step() will work, sample() will refuse; train without it to have both.", name
            )


def _check_bonds(positions: np.ndarray, graph: MoleculeGraph) -> None:
    """Frames whose bonds have possible lengths, and a topology that has them all.

    In the first frame, two atoms as close as bonded ones mean that the topology lacks a bond, such as the one that
    closes a ring.
    """
    if len(positions) == 0:
        raise InputError("The trajectory has no frames.")
    check_bond_lengths(positions, graph, "the trajectory")
    frame = np.asarray(positions[0], dtype=np.float64)
    known = np.array([COVALENT_RADII.get(element, np.nan) for element in graph.elements])
    distance = np.linalg.norm(frame[:, None] - frame[None], axis=-1)
    close = np.triu(distance < CONTACT * (known[:, None] + known[None]), k=1)
    for a, b in zip(*np.nonzero(close), strict=True):
        if b not in graph.neighbours[a]:
            raise InputError(
                f"In frame 0 of the trajectory {graph.label(a)} and {graph.label(b)} are {distance[a, b]:.3f} nm apart,"
                " but the topology has no bond between them: add it (PDB files need CONECT records for it)."
            )


def _backbone_chain(graph: MoleculeGraph) -> list[int]:
    """Atoms whose distances the W2 loss compares: N, CA and C in the order of the chain."""
    return [atom for atom, flag in enumerate(graph.backbone()) if flag]


def _identity(system: openmm.System, kelvin: float) -> str:
    """What a resumed run must share besides data and configuration."""
    text = openmm.XmlSerializer.serialize(system)
    return f" {kelvin:g} K {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _trial_step(density: torch.nn.Module, y: torch.Tensor) -> None:
    """Forward and backward of the likelihood, for timing; leaves no gradients behind."""
    with torch.random.fork_rng(devices=[]):
        density.log_prob(y).mean().backward()  # type: ignore[operator]
    density.zero_grad(set_to_none=True)


def _device(name: str | None) -> torch.device:
    """The device asked for, of this process's own number where several train."""
    try:
        found = torch.device("cpu" if name is None else name)
    except RuntimeError:
        raise InputError(f"There is no device {name!r}: train on 'cpu' or 'cuda'.") from None
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"The flow cannot be trained on the device {name!r}: use 'cpu' or 'cuda'.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"Torch has no GPU here for the device {name!r}: use 'cpu', or install torch with CUDA.")
    return found


@contextmanager
def _common_pool(
    context: openmm.Context,
    platform: str | None,
    n_workers: int | None,
    tune: Literal["quick", "full"],
    ranks: Ranks,
) -> Iterator[ContextPool]:
    """Contexts (or twins) for energies, on the main process's platform everywhere: one energy function for all.

    All time their choices at once, and so see the machine as it will be. Processes that train on a GPU each have their
    Contexts on the same one.
    """
    with ExitStack() as stack:
        if ranks.size > 1 and torch.cuda.is_available():
            stack.enter_context(_contexts_on_gpu(torch.cuda.current_device()))
        pool = stack.enter_context(ContextPool(context, platform=platform, n_workers=n_workers, tune=tune))
        chosen, workers = ranks.from_main(lambda: (pool.platform, pool.n_workers))
        if pool.platform != chosen:
            pool = stack.enter_context(ContextPool(context, platform=chosen, n_workers=n_workers or workers))
        if pool.platform != chosen:
            raise EnergyError(
                f"Energies of the main process come from {chosen}, which another process cannot use: name a platform "
                "that all have."
            )
        yield pool


@contextmanager
def _contexts_on_gpu(index: int) -> Iterator[None]:
    """New Contexts of OpenMM's GPU platforms lie on this GPU unless they say otherwise."""
    platforms = [openmm.Platform.getPlatform(i) for i in range(openmm.Platform.getNumPlatforms())]
    found = [p for p in platforms if "DeviceIndex" in p.getPropertyNames()]
    before = [p.getPropertyDefaultValue("DeviceIndex") for p in found]
    try:
        for p in found:
            p.setPropertyDefaultValue("DeviceIndex", str(index))
        yield
    finally:
        for p, value in zip(found, before, strict=True):
            p.setPropertyDefaultValue("DeviceIndex", value)


def _platform(name: str | None) -> tuple[openmm.Platform, ...]:
    if name is None or name in ("twin", "twin:cuda"):
        # Only a holder of positions and parameters; the pool times every platform for the real work.
        name = "Reference"
    names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if name not in names:
        raise InputError(f"There is no OpenMM platform {name!r} here: choose one of {', '.join(names)}, twin.")
    return (openmm.Platform.getPlatformByName(name),)


def _complete(
    coordinates: CoordinateMap, topology: Any, dataset: Dataset, config: TrainingConfig
) -> tuple[Completion | None, dict[str, float]]:
    """g(s|y) and the record of its fit, on the trainer's own split; None if nothing is left to complete."""
    if not free_columns(coordinates):
        return None, {}
    train, held = dataset.split(config.validation_fraction, config.validation_blocks, config.seed)
    return fit_completion(coordinates, topology, train, held, seed=config.seed)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
