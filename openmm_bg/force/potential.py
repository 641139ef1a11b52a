"""The function behind a PythonForce: the flow's potential, so that MD under it samples the flow (docs/theory.md).

OpenMM pickles the function behind a ``PythonForce`` whenever a System is copied or written. A network has no place in
that: `FlowPotential` carries the artifact's path and sha256, and every process reads each artifact once.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.artifact import Flow, load
from openmm_bg.errors import ArtifactError, InputError

#: How far a length that the flow does not model may be from its constrained value, nm: far more than a minimiser's soft
#: constraints or rounded coordinates need, and soon exceeded where nothing holds the length.
LENGTH_SLACK = 0.01

_flows: dict[str, Flow] = {}  # by sha256: the same bytes are the same flow, wherever they lie
_lock = threading.Lock()


@dataclass(frozen=True)
class FlowPotential:
    """The function behind `FlowForce`: picklable, a few hundred bytes.

    Parameters
    ----------
    path, sha256
        The artifact, and what must be in it.
    kT
        kJ/mol.
    parameter
        Name of the global parameter that scales the potential.
    """

    path: str
    sha256: str
    kT: float
    parameter: str

    @property
    def flow(self) -> Flow:
        """The flow, read once per process.

        Raises
        ------
        ArtifactError
            The file has vanished, or is another one now.
        """
        found = _flows.get(self.sha256)
        if found is not None:
            return found
        with _lock:
            if self.sha256 not in _flows:
                flow, digest = read_flow(Path(self.path))
                if digest != self.sha256:
                    raise ArtifactError(
                        f"{self.path} has changed since its FlowForce was made: restore it, or make the force anew."
                    )
                _flows[self.sha256] = flow
        return _flows[self.sha256]

    def log_density(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """log q + log g - log J - Φ [B] at positions [B, N, 3] (nm), float64, and which are inside the domain [B].

        Raises
        ------
        InputError
            Another number of atoms, or in another order; kept lengths that are not those of the flow's constraints.
        """
        flow = self.flow
        coordinates = flow.coordinates
        if positions.shape[1:] != (coordinates.n_atoms, 3):
            # OpenMM 8.5 has no such method; a force that it cannot restrict is good for the molecule alone.
            remedy = (
                "name the molecule's with setParticles()"
                if hasattr(openmm.PythonForce, "setParticles")
                else "it takes the molecule alone, or OpenMM 8.6, whose setParticles() names the molecule's"
            )
            raise InputError(
                f"The flow has {coordinates.n_atoms} atoms, FlowForce got {positions.shape[1]} particles: {remedy}."
            )
        y, s = coordinates.to_internal(positions)
        held = [k for k, c in enumerate(c for c in coordinates.coordinates if not c.modelled) if c.constrained]
        if held:
            off = float((s.detach() - coordinates.reference_fixed)[:, held].abs().max())
            if off > LENGTH_SLACK:
                particles = (
                    "name in setParticles() the molecule's particles, which the System must have, in the flow's order"
                    if hasattr(openmm.PythonForce, "setParticles")
                    else "its particles in the flow's order"
                )
                raise InputError(
                    f"A bond length that the flow keeps fixed is {off:.3f} nm off: give the System the constraints "
                    f"that the flow was trained with, and {particles}."
                )
        log_p = flow.joint_log_prob(y, s).double() - coordinates.log_volume(y, s)
        return log_p, coordinates.in_domain(y, s)

    def energy_and_forces(self, positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Unscaled energies [B] (kJ/mol) and forces [B, N, 3] (kJ/mol/nm) at positions [B, N, 3] (nm)."""
        known = np.isfinite(positions).all(axis=(1, 2))
        energies, forces = np.full(len(positions), np.nan), np.full(positions.shape, np.nan)
        if not known.any():
            return energies, forces
        # A caller may run MD inside torch.no_grad(). TorchScript's profiling executor would recompile for seconds
        # during the first steps and gain nothing on small batches.
        with torch.inference_mode(False), torch.enable_grad(), torch.jit.optimized_execution(False):
            x = torch.tensor(positions[known], dtype=torch.float64, requires_grad=True)
            log_p, inside = self.log_density(x)
            (slope,) = torch.autograd.grad(log_p.sum(), x)
        value = -self.kT * log_p.detach().numpy()
        force = self.kT * slope.numpy()
        good = inside.numpy() & np.isfinite(value) & np.isfinite(force).all(axis=(1, 2))
        energies[known] = np.where(good, value, np.inf)
        forces[known] = np.nan_to_num(force, nan=0.0, posinf=0.0, neginf=0.0)
        return energies, forces

    def __call__(self, state: openmm.State) -> tuple[float, NDArray[np.float64]]:
        """What OpenMM calls: scaled energy and forces [N, 3] of a State."""
        positions = np.asarray(state.getPositions(asNumpy=True)._value, dtype=np.float64)
        scale = state.getParameters()[self.parameter]
        if scale == 0.0:  # 0 * inf is no energy
            return 0.0, np.zeros_like(positions)
        energies, forces = self.energy_and_forces(positions[None])
        energy = float(energies[0])
        # Forbidden stays forbidden under a negative scale, too.
        return energy if energy == float("inf") else scale * energy, scale * forces[0]


def read_flow(path: Path) -> tuple[Flow, str]:
    """The flow in a file, and the file's sha256: a file replaced in between is refused.

    Raises
    ------
    ArtifactError
        There is no such file, it is no flow, or it changed while it was read.
    """
    before = _digest(path)
    if before in _flows:
        return _flows[before], before
    flow = load(path)
    after = _digest(path)
    if before != after:
        raise ArtifactError(f"{path} was being replaced while it was read: try again.")
    return flow, after


def remember(flow: Flow, digest: str) -> None:
    """Keep a flow for every potential of this process with the same sha256."""
    _flows.setdefault(digest, flow)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        reason = error.strerror or error
        raise ArtifactError(f"There is no flow at {path} ({reason}): FlowForce reads it there.") from error
