"""What `reduced` costs: how far frames move when everything that is not modelled stands at its typical value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.coordinates.representation import CoordinateMap
from openmm_bg.errors import InputError

_BATCH = 256


@dataclass(frozen=True)
class ReductionRMSD:
    """RMSD (nm) of each frame [n] from its copy with s at the reference, superposed on the atoms that are counted."""

    heavy: np.ndarray
    backbone: np.ndarray


def superposed_rmsd(a: Tensor, b: Tensor) -> Tensor:
    """Least RMSD [B] over rigid motions of a on b, both [B, n, 3] (Kabsch, Acta Cryst. A 32, 922, 1976)."""
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    u, _, vt = torch.linalg.svd(a.transpose(1, 2) @ b)
    sign = torch.ones_like(u[:, :, 0])
    sign[:, 2] = torch.linalg.det(u @ vt).sign()  # a rotation, never a reflection
    turned = a @ ((u * sign[:, None, :]) @ vt)
    return (turned - b).square().sum(-1).mean(-1).sqrt()


def reduction_rmsd(coordinates: CoordinateMap, topology: Any, positions: Any) -> ReductionRMSD:
    """RMSD that freezing s costs: x → (y, s) → x(y, s0), with s0 the means that the coordinates were fitted with.

    Rings stand at one typical frame, because the mean of two puckers closes no ring, and constrained lengths at the
    System's. It is the error that a perfect flow on y would still make in formula B of docs/theory.md, or whenever
    positions are made from y alone; formulas C, D and E keep or model s and are not concerned.

    Parameters
    ----------
    coordinates
        The map; `full` costs only what its constrained lengths vary.
    topology
        The ``openmm.app.Topology`` that it was made for.
    positions
        [n, N, 3] nm.

    Returns
    -------
    ReductionRMSD
        Of heavy atoms and of the backbone (N, CA, C and caps; without amino acids the longest chain of heavy atoms).

    Raises
    ------
    InputError
        Topology or positions with another number of atoms, or complex or non-finite positions.
    """
    graph = MoleculeGraph(topology)
    n = coordinates.n_atoms
    if graph.n_atoms != n:
        raise InputError(f"The topology has {graph.n_atoms} atoms, but the coordinates are of {n}.")
    if np.iscomplexobj(positions):
        raise InputError("Positions must be real numbers, not complex ones.")
    x = torch.as_tensor(np.asarray(positions), dtype=torch.float64)
    if x.ndim != 3 or x.shape[1:] != (n, 3):
        raise InputError(f"Positions must be [frames, {n}, 3], got {list(x.shape)}.")
    if not torch.isfinite(x).all():
        raise InputError("The positions hold non-finite numbers: remove those frames.")
    heavy = torch.tensor([not graph.is_hydrogen(atom) for atom in range(n)])
    backbone = torch.tensor(graph.backbone())
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for frames in x.split(_BATCH):
            y, _ = coordinates.to_internal(frames)
            frozen = coordinates.to_positions(y, coordinates.reference_fixed)
            found.append(
                (
                    superposed_rmsd(frozen[:, heavy], frames[:, heavy]),
                    superposed_rmsd(frozen[:, backbone], frames[:, backbone]),
                )
            )
    return ReductionRMSD(*(torch.cat(part).numpy() for part in zip(*found, strict=True)))
