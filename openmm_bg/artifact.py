"""The trained flow as a file: TorchScript plus JSON metadata, and the `Flow` object that Python users hold.

``torch.jit.load(path)`` alone gives forward, inverse, log_prob and sample; everything else an OpenMM user needs
(topology, System, representation, constraints, temperature, training record) is JSON in the extra file
``metadata.json``. A `reduced` flow may have a completion g(s|y), a TorchScript module of its own in the extra file
``completion.pt``. The reader and writer below are the only place that knows the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_bg.coordinates import CoordinateMap
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.files import write_atomically
from openmm_bg.lengths import in_nanometers

logger = logging.getLogger(__name__)

FORMAT = "openmm_bg flow"
FORMAT_VERSION = 1
_EXTRA = "metadata.json"
_COMPLETION = "completion.pt"
_REQUIRED = ("temperature", "topology", "system")
_METHODS = ("forward", "inverse", "log_prob", "sample")
_COMPLETION_METHODS = ("log_prob", "sample", "n_completed")


# ---------------------------------------------------------------- topology as JSON


def topology_to_dict(topology: Any) -> dict[str, Any]:
    """Names, elements, residues, chains and bonds of an ``openmm.app.Topology`` as plain lists."""
    atoms = list(topology.atoms())
    residues = list(topology.residues())
    return {
        "names": [a.name for a in atoms],
        "elements": [None if a.element is None else a.element.symbol for a in atoms],
        "residue_of": [a.residue.index for a in atoms],
        "residues": [[r.name, r.id, r.insertionCode] for r in residues],
        "chain_of": [r.chain.index for r in residues],
        "chains": [c.id for c in topology.chains()],
        "bonds": sorted(sorted((a.index, b.index)) for a, b in topology.bonds()),
    }


def topology_from_dict(data: dict[str, Any]) -> Any:
    """Inverse of `topology_to_dict`."""
    from openmm import app

    topology = app.Topology()
    chains = [topology.addChain(i) for i in data["chains"]]
    residues = [
        topology.addResidue(name, chains[chain], number, code)
        for (name, number, code), chain in zip(data["residues"], data["chain_of"], strict=True)
    ]
    atoms = [
        topology.addAtom(name, None if symbol is None else app.Element.getBySymbol(symbol), residues[residue])
        for name, symbol, residue in zip(data["names"], data["elements"], data["residue_of"], strict=True)
    ]
    for a, b in data["bonds"]:
        topology.addBond(atoms[a], atoms[b])
    return topology


def topology_digest(topology: Any) -> str:
    """sha256 over what fixes a molecule's identity and atom order: names, elements, residue names, bonds."""
    data = topology if isinstance(topology, dict) else topology_to_dict(topology)
    residue_names = [data["residues"][i][0] for i in data["residue_of"]]
    identity = [data["names"], data["elements"], residue_names, [list(b) for b in data["bonds"]]]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def compress_text(text: str) -> str:
    """zlib + base64, for the serialised System inside JSON."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def expand_text(data: str) -> str:
    """Inverse of `compress_text`."""
    return zlib.decompress(base64.b64decode(data)).decode()


@contextmanager
def _quiet_torchscript() -> Iterator[None]:
    """torch >= 2.10 warns that TorchScript is deprecated; users of an artifact can do nothing about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*TorchScript.*")
        yield


# ---------------------------------------------------------------- the Flow


class Flow:
    """A normalised density over the modelled internal coordinates of one molecule.

    Made by `openmm_bg.train` or `openmm_bg.load`. y [B, D] are unstandardised internal coordinates (rad, nm), s
    [B, S] the ones that are kept; see `openmm_bg.coordinates.CoordinateMap`.

    Parameters
    ----------
    density
        ``FlowDensity`` or its TorchScript form, in eval mode.
    coordinates
        The map between positions and (y, s).
    metadata
        JSON-able: temperature (K), topology, compressed System, versions, training record.
    completion
        g(s|y) over the unconstrained part of s, or its TorchScript form; None leaves a `reduced` flow with formula B.

    Raises
    ------
    InputError
        The completion covers another number of coordinates than s has free ones.
    """

    def __init__(
        self,
        density: torch.nn.Module,
        coordinates: CoordinateMap,
        metadata: dict[str, Any],
        completion: torch.nn.Module | None = None,
    ) -> None:
        self.density = density
        self.coordinates = coordinates
        self.metadata = metadata
        self.completion = completion
        self._topology: Any = None
        kept = [c for c in coordinates.coordinates if not c.modelled]
        self._free = [k for k, c in enumerate(kept) if not c.constrained]
        if completion is not None and completion.n_completed != len(self._free):
            raise InputError(
                f"The completion covers {completion.n_completed} coordinates, the flow leaves out {len(self._free)}: "
                "fit it with the flow's own coordinates."
            )
        self.eval()

    def eval(self) -> None:
        """Dropout off, in the flow and in the completion: no density holds with it."""
        self.density.eval()
        if self.completion is not None:
            self.completion.eval()

    # -------- the density

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base z [B, D] to y [B, D] and log|det dy/dz| [B]."""
        return self.density(z)

    __call__ = forward

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, D] to base z [B, D] and log|det dz/dy| [B]."""
        return self.density.inverse(y)  # type: ignore[operator]

    def log_prob(self, y: Tensor) -> Tensor:
        """log q(y) [B], the density in dy of docs/theory.md."""
        return self.density.log_prob(y)  # type: ignore[operator]

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """n samples y [n, D] (float64) and their log q [n]; draws from torch's global generator."""
        if n < 0:
            raise InputError(f"The number of samples must not be negative, got {n}.")
        with torch.no_grad():
            return self.density.sample(n)  # type: ignore[operator]

    @property
    def is_complete(self) -> bool:
        """Whether there is a density of every unconstrained coordinate: a `full` flow, or one with a completion."""
        return not self._free or self.completion is not None

    def complete(self, y: Tensor, s0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One draw s ~ g(s|y) for each y [B, D] (formula C); from torch's global generator.

        Parameters
        ----------
        y
            [B, D].
        s0
            [S], of which the constrained lengths are taken; the reference values if left out.

        Returns
        -------
        tuple
            s [B, S], with NaN where a draw is no conformation, and log g(s|y) [B]; float64.

        Raises
        ------
        InputError
            There is no completion.
        """
        self._require_completion()
        s0 = self.coordinates.reference_fixed if s0 is None else s0
        s = s0.to(y.device, torch.float64).repeat(len(y), 1)
        if not self._free:
            return s, torch.zeros(len(y), dtype=torch.float64, device=y.device)
        with torch.no_grad():
            free, log_g = self.completion.sample(y)  # type: ignore[union-attr, operator]
        return s.index_copy(1, torch.tensor(self._free, device=y.device), free), log_g

    def joint_log_prob(self, y: Tensor, s: Tensor) -> Tensor:
        """log q(y) + log g(s|y) [B], the density in dy ds of all unconstrained coordinates; in the dtype of y.

        Raises
        ------
        InputError
            A `reduced` flow without a completion.
        """
        self._require_completion()
        log_q = self.log_prob(y)
        if not self._free:
            return log_q
        free = s.index_select(1, torch.tensor(self._free, device=s.device))
        return log_q + self.completion.log_prob(free.to(y), y)  # type: ignore[union-attr, operator]

    def log_prob_positions(self, positions: Any) -> Tensor:
        """log q + log g [B] of positions [B, N, 3] (nm), in internal coordinates; -inf outside the domain.

        What MD frames enter BAR with (formula J): ``log w = -u + log J + Φ - log_prob_positions``.

        Raises
        ------
        InputError
            A `reduced` flow without a completion; another number of atoms, or non-finite positions.
        """
        self._require_completion()
        y, s = self.to_internal(positions)
        with torch.no_grad():
            log_p = self.joint_log_prob(y, s)
        return torch.where(self.coordinates.in_domain(y, s), log_p, -torch.inf)

    def _require_completion(self) -> None:
        if not self.is_complete:
            raise InputError(
                f"This reduced flow has no density of {len(self._free)} of its coordinates: train it anew to have its "
                "completion, or use representation='full'."
            )

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The flow's parameters, for optimisers and gradients; not those of the completion."""
        return self.density.parameters()

    # -------- coordinates

    def to_internal(self, positions: Any) -> tuple[Tensor, Tensor]:
        """Positions [B, N, 3] or [N, 3] (nm, array, tensor or Quantity) to y [B, D] and s [B, S], float64.

        Raises
        ------
        InputError
            Another number of atoms, or positions that are not finite real numbers, or not lengths.
        """
        x = _positions_tensor(positions, self.coordinates.n_atoms)
        return self.coordinates.to_internal(x)

    def to_positions(self, y: Tensor, s: Tensor | None = None) -> Tensor:
        """(y [B, D], s [B, S]) to positions [B, N, 3] in nm; s defaults to the reference values."""
        return self.coordinates.to_positions(y, self.coordinates.reference_fixed if s is None else s)

    # -------- what it was made for

    @property
    def temperature(self) -> float:
        """Temperature of training, K. Appears in no formula; a mismatch costs efficiency only."""
        return float(self.metadata["temperature"])

    @property
    def representation(self) -> str:
        """ "full" or "reduced"."""
        return self.coordinates.representation

    @property
    def topology(self) -> Any:
        """The molecule's ``openmm.app.Topology``."""
        if self._topology is None:
            self._topology = topology_from_dict(self.metadata["topology"])
        return self._topology

    @property
    def bonds(self) -> NDArray[np.int64]:
        """The molecule's bonds [K, 2], the lower atom first."""
        return np.array(self.metadata["topology"]["bonds"], dtype=np.int64).reshape(-1, 2)

    @property
    def system(self) -> Any:
        """A fresh copy of the System it was trained for."""
        import openmm

        return openmm.XmlSerializer.deserialize(expand_text(self.metadata["system"]))

    def check_topology(self, topology: Any) -> None:
        """Raise `ArtifactError` unless ``topology`` has the same atoms, in the same order, with the same bonds."""
        theirs, ours = topology_to_dict(topology), self.metadata["topology"]
        if len(theirs["names"]) != len(ours["names"]):
            raise ArtifactError(
                f"The flow was made for {len(ours['names'])} atoms, the topology given has {len(theirs['names'])}."
            )
        for i, (a, b) in enumerate(zip(ours["elements"], theirs["elements"], strict=True)):
            if a != b:
                raise ArtifactError(
                    f"The flow's atom {i} is {a} ({ours['names'][i]}), the topology's is {b} ({theirs['names'][i]}): "
                    "another molecule or another atom order."
                )
        if topology_digest(ours) != topology_digest(theirs):
            raise ArtifactError(
                "The topology has the flow's elements but other names or bonds: pass the one it was trained with."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact: TorchScript with ``metadata.json`` inside, complete or not at all.

        Raises
        ------
        ArtifactError
            The file cannot be written (full disk, missing folder).
        """
        target = Path(path)
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "coordinates": self.coordinates.to_dict(),
            **self.metadata,
            "completion": None if self.completion is None else {"coordinates": len(self._free)},
        }
        self.eval()
        # Through memory: torch's own file writer ends the process when the disk is full.
        buffer = io.BytesIO()
        try:
            with _quiet_torchscript():
                extra: dict[str, Any] = {_EXTRA: json.dumps(metadata)}
                if self.completion is not None:
                    part = io.BytesIO()
                    torch.jit.save(_scripted(self.completion), part)
                    extra[_COMPLETION] = part.getvalue()
                torch.jit.save(_scripted(self.density), buffer, _extra_files=extra)
            write_atomically(target, buffer.getvalue())
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"Cannot write {target}: {str(error).splitlines()[0]}.") from error

    def __repr__(self) -> str:
        completed = "" if self.completion is None else f", {len(self._free)} completed"
        return (
            f"Flow({self.coordinates.n_atoms} atoms, {self.representation}, {self.coordinates.n_modelled} modelled "
            f"coordinates{completed}, {self.temperature:g} K)"
        )


def _scripted(module: torch.nn.Module) -> torch.jit.ScriptModule:
    return module if isinstance(module, torch.jit.ScriptModule) else torch.jit.script(module)


def _positions_tensor(positions: Any, n_atoms: int) -> Tensor:
    x = torch.as_tensor(in_nanometers(positions, f"[frames, {n_atoms}, 3]")).double()
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3 or x.shape[1:] != (n_atoms, 3):
        raise InputError(f"Positions must be [frames, {n_atoms}, 3] in nm, got {list(x.shape)}.")
    if not torch.isfinite(x).all():
        raise InputError("Positions contain NaN or infinite values.")
    return x


def load(path: str | os.PathLike[str], *, topology: Any = None) -> Flow:
    """Read an artifact.

    Parameters
    ----------
    path
        File written by `Flow.save`.
    topology
        If given, the molecule it must have been made for.

    Raises
    ------
    ArtifactError
        Missing, truncated or foreign file, or one made for another topology.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no flow at {path}.")
    extra: dict[str, Any] = {_EXTRA: "", _COMPLETION: ""}
    completion = None
    try:
        with _quiet_torchscript():
            density = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
            if extra[_COMPLETION]:
                completion = torch.jit.load(io.BytesIO(extra[_COMPLETION]), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable TorchScript file: truncated, or of another kind.") from error
    text = extra[_EXTRA]
    try:
        metadata = json.loads(text) if text else None
    except ValueError as error:
        raise ArtifactError(f"{path} holds damaged metadata: copy the file again.") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} is a TorchScript file, but not one that openmm_bg wrote.")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {metadata.get('format_version')}, this openmm_bg reads {FORMAT_VERSION}: "
            "use the version that wrote it, or train again."
        )
    if density.training or not all(hasattr(density, name) for name in _METHODS):
        raise ArtifactError(f"{path} was exported in training mode or lacks a method: export it again with save().")
    try:
        coordinates = CoordinateMap.from_dict(metadata["coordinates"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} holds incomplete metadata ({error}): export it again.") from error
    missing = [key for key in _REQUIRED if key not in metadata]
    if missing:
        raise ArtifactError(f"{path} holds incomplete metadata (no {missing[0]}): export it again.")
    if (completion is not None) != bool(metadata.get("completion")) or (
        completion is not None
        and (completion.training or not all(hasattr(completion, name) for name in _COMPLETION_METHODS))
    ):
        raise ArtifactError(f"{path} and its metadata disagree about the completion: export it again.")
    try:
        flow = Flow(density, coordinates, {k: v for k, v in metadata.items() if k != "coordinates"}, completion)
    except InputError as error:
        raise ArtifactError(f"{path} holds another molecule's completion: export it again.") from error
    if topology is not None:
        flow.check_topology(topology)
    return flow
