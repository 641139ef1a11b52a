"""What a System fixes: its constraints, the checks that refuse what no formula covers, and Fixman's determinant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.errors import InputError


@dataclass(frozen=True)
class Constraints:
    """Constrained bonds of a System and the masses that enter Fixman's term.

    ``bonds`` [M] pairs (hydrogen, heavy atom), ``lengths`` [M] nm in the same order, ``masses`` [N] dalton.
    """

    bonds: list[tuple[int, int]]
    lengths: list[float]
    masses: list[float]

    def as_set(self) -> set[tuple[int, int]]:
        return {(min(pair), max(pair)) for pair in self.bonds}


def read_constraints(system: Any, topology: Any) -> Constraints:
    """Constraints and masses of a System of one molecule, after the checks of docs/theory.md.

    Raises
    ------
    InputError
        Particle count differs from the topology's; virtual sites, massless or Drude particles; constraints that are
        not bonds between a hydrogen and a heavy atom (HAngles, rigid water, AllBonds).
    """
    graph = MoleculeGraph(topology)
    n = system.getNumParticles()
    if n != graph.n_atoms:
        raise InputError(f"The System has {n} particles, but the topology has {graph.n_atoms} atoms.")
    masses = []
    for i in range(n):
        if system.isVirtualSite(i):
            raise InputError(f"Particle {i} ({graph.label(i)}) is a virtual site: flows need real atoms only.")
        mass = system.getParticleMass(i)._value
        if mass <= 0.0:
            raise InputError(f"Particle {i} ({graph.label(i)}) has no mass: massless atoms are not supported.")
        masses.append(float(mass))
    for force in system.getForces():
        if force.getName() == "DrudeForce":
            raise InputError("The System has Drude particles: polarisable models of that kind are not supported.")
    bonds: list[tuple[int, int]] = []
    lengths: list[float] = []
    for k in range(system.getNumConstraints()):
        i, j, distance = system.getConstraintParameters(k)
        if j not in graph.neighbours[i]:
            raise InputError(
                f"The System constrains the distance {graph.label(i)} to {graph.label(j)}, which is not a bond: "
                "build it with constraints=HBonds or None."
            )
        if graph.is_hydrogen(i) == graph.is_hydrogen(j):
            raise InputError(
                f"The System constrains the bond {graph.label(i)} to {graph.label(j)} between heavy atoms: "
                "build it with constraints=HBonds or None."
            )
        bonds.append((i, j) if graph.is_hydrogen(i) else (j, i))
        lengths.append(float(distance._value))
    return Constraints(bonds=bonds, lengths=lengths, masses=masses)


class FixmanTerm(nn.Module):
    """Φ = ½ log det Z [B], block by block: one block for each heavy atom and its constrained hydrogens.

    ``Z_kk = 1/m_X + 1/m_k`` and ``Z_kl = cos(k-X-l)/m_X`` with the angle from the hydrogens' own angles θ and
    dihedrals φ, which share one axis by the Z-matrix rule.

    Parameters
    ----------
    blocks
        For each heavy atom with constrained hydrogens: (rows of the hydrogens, their masses, the heavy atom's mass).
    """

    def __init__(self, blocks: Sequence[tuple[list[int], list[float], float]]) -> None:
        super().__init__()
        by_size: dict[int, list[tuple[list[int], list[float], float]]] = {}
        for block in blocks:
            by_size.setdefault(len(block[0]), []).append(block)
        self._sizes = sorted(by_size)
        for size in self._sizes:
            group = by_size[size]
            self.register_buffer(f"_rows{size}", torch.tensor([b[0] for b in group]), persistent=False)
            heavy = torch.tensor([b[2] for b in group], dtype=torch.float64)
            light = torch.tensor([b[1] for b in group], dtype=torch.float64)
            self.register_buffer(f"_heavy{size}", heavy, persistent=False)
            self.register_buffer(f"_diagonal{size}", torch.diag_embed(1.0 / light), persistent=False)

    def forward(self, theta: Tensor, phi: Tensor) -> Tensor:
        """Φ [B] from angles and dihedrals [B, K] of all Z-matrix rows."""
        total = theta.new_zeros(len(theta))
        for size in self._sizes:
            rows = getattr(self, f"_rows{size}")
            heavy = getattr(self, f"_heavy{size}").to(theta.dtype)
            diagonal = getattr(self, f"_diagonal{size}").to(theta.dtype)
            if size == 1:
                total = total + (1.0 / heavy + diagonal[:, 0, 0]).log().sum()
                continue
            t, p = theta[:, rows], phi[:, rows]
            ct, st = t.cos(), t.sin()
            cosine = ct[..., :, None] * ct[..., None, :] + st[..., :, None] * st[..., None, :] * (
                p[..., :, None] - p[..., None, :]
            ).cos()
            total = total + torch.linalg.slogdet(cosine / heavy[:, None, None] + diagonal)[1].sum(-1)
        return 0.5 * total
