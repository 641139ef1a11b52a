"""What the commands do, apart from reading their options: files in, files out."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import openmm  # isort: skip

from openmm_bg.artifact import Flow, load
from openmm_bg.energy import make_context
from openmm_bg.errors import InputError
from openmm_bg.files import CHECKPOINT, find_flow, folder_kind
from openmm_bg.sampler import BoltzmannGeneratorSampler


def sample_to_files(
    flow_file: Path,
    n: int,
    output: Path,
    system_file: Path | None = None,
    temperature: float | None = None,
    seed: int = 0,
    platform: str | None = None,
    n_workers: int | None = None,
    tune: Literal["quick", "full"] = "quick",
) -> str:
    """Sample a flow into a trajectory and an ``.npz`` beside it; both complete or not at all.

    Parameters
    ----------
    flow_file, n, output, seed, platform, n_workers, tune
        Artifact or the training folder that holds it, number of samples, trajectory file in a format MDTraj writes,
        random seed, energy platform (as `BoltzmannGeneratorSampler`).
    system_file
        XML of another System for the same molecule.
    temperature
        K; default: the flow's.

    Returns
    -------
    str
        One paragraph with the figures that matter.

    Raises
    ------
    InputError
        Anything the user named that cannot be used.
    """
    if n < 1:
        raise InputError(f"The number of samples must be at least 1, got {n}.")
    if output.suffix.lower() not in (".dcd", ".xtc", ".nc", ".pdb"):
        raise InputError(f"{output} has no ending of a trajectory format: use .dcd, .xtc, .nc or .pdb.")
    if not output.parent.is_dir():
        raise InputError(f"There is no folder {output.parent}.")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"The folder {output.parent} cannot be written: choose another one for {output.name}.")
    flow = load(find_flow(flow_file))
    system = flow.system if system_file is None else read_system(system_file)
    context = make_context(system)
    if system.getNumParticles() != flow.coordinates.n_atoms:
        raise InputError(
            f"{system_file} has {system.getNumParticles()} particles, the flow's molecule {flow.coordinates.n_atoms}."
        )
    context.setPositions(_sound_frame(flow, context))
    kelvin = flow.temperature if temperature is None else temperature
    with BoltzmannGeneratorSampler(
        flow, context, kelvin, seed=seed, platform=platform, n_workers=n_workers, tune=tune
    ) as sampler:
        ensemble = sampler.sample(n)
    trajectory = ensemble.to_mdtraj()
    keep = np.isfinite(ensemble.log_weights)
    trajectory = trajectory[keep]
    temporary = output.with_name(f".part-{output.name}")
    arrays = output.with_suffix(".npz")
    part = arrays.with_name(f".part-{arrays.name}")
    try:
        try:
            trajectory.save(str(temporary))
        except Exception as error:  # MDTraj's writers raise what they like on a full disk
            raise OSError(f"MDTraj could not write it ({type(error).__name__}; is the disk full?)") from error
        with open(part, "wb") as handle:
            np.savez(
                handle,
                log_weights=ensemble.log_weights[keep],
                reduced_potentials=ensemble.reduced_potentials[keep],
                log_q=ensemble.log_q[keep],
                n_samples=n,
                n_nonfinite=ensemble.n_nonfinite,
                temperature=kelvin,
                label=ensemble.label,
            )
        os.replace(temporary, output)
        os.replace(part, arrays)
    except OSError as error:
        raise InputError(f"Cannot write {output}: {error.strerror or error}.") from error
    finally:
        for path in (temporary, part):
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return f"{ensemble!r}\nWrote {keep.sum()} frames to {output} and their weights to {arrays}."


def _sound_frame(flow: Flow, context: openmm.Context) -> np.ndarray:
    """[N, 3] nm: of some samples the one of least energy, whose platforms agree on it.

    The mean of all coordinates will not do: disulfides and macrocycles are not closed there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y, _ = flow.sample(16)
    frames = flow.to_positions(y).numpy()
    frames = frames[np.isfinite(frames).all((1, 2))]
    if not len(frames):
        raise InputError(f"None of {len(y)} samples of the flow is a conformation: train it on more frames, or longer.")
    energies = []
    for frame in frames:
        context.setPositions(frame)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    return frames[int(np.argmin(np.nan_to_num(energies, nan=np.inf)))]


def read_system(path: Path) -> openmm.System:
    """A System from XML.

    Raises
    ------
    InputError
        Missing file, or XML of something else.
    """
    if not path.is_file():
        raise InputError(f"There is no System file {path}.")
    try:
        system = openmm.XmlSerializer.deserialize(path.read_text())
    except Exception as error:  # the parser raises OpenMMException and UnicodeDecodeError alike
        raise InputError(f"{path} is not a System written by openmm.XmlSerializer.") from error
    if not isinstance(system, openmm.System):
        raise InputError(f"{path} holds a {type(system).__name__}, not a System.")
    return system


def check_resumable(folder: Path) -> None:
    """Refuse to resume a training where there can be none: a mistyped path would cost the time of a new one.

    Raises
    ------
    InputError
        No such folder, or one of something else.
    """
    if not folder.is_dir():
        raise InputError(
            f"There is no training to resume in {folder}, no such folder: correct its name, or leave out --resume to "
            "begin one."
        )
    if folder_kind(folder) == "simulation":
        raise InputError(f"{folder} holds a simulation, not a training: give -o the training's folder.")
    if not (folder / CHECKPOINT).is_file() and any(folder.iterdir()):
        raise InputError(
            f"{folder} holds no training (no {CHECKPOINT}): correct its name, or leave out --resume to begin one there."
        )


def read_log_weights(path: Path) -> np.ndarray:
    """Log-weights [frames] from a ``.npy`` file, or from the ``.npz`` that `openmm-bg sample` writes.

    Raises
    ------
    InputError
        Missing file, or one of anything else than numbers.
    """
    if not path.is_file():
        raise InputError(f"There is no file of log-weights {path}.")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                found = found["log_weights"]
        return np.asarray(found).astype(np.float64, casting="same_kind")
    except Exception as error:  # zipfile and NumPy raise what they stumble over; NumPy's advice is about pickle
        raise InputError(
            f"{path} is no .npy file of numbers: write the log-weights with numpy.save, one for each frame."
        ) from error
