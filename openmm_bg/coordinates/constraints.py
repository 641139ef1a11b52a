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
        Particle count differs from the topology's; virtual sites, massless or Drude particles; not one molecule;
        constraints that are not bonds between a hydrogen and a heavy atom (HAngles, rigid water, AllBonds).
    """
    import openmm

    atoms = list(topology.atoms())
    n = system.getNumParticles()
    if n != len(atoms):
        raise InputError(f"The System has {n} particles, but the topology has {len(atoms)} atoms.")
    # Drude particles and virtual sites have no bonds, so they are looked for before the bond graph is.
    if any(isinstance(force, openmm.DrudeForce) for force in system.getForces()):
        raise InputError("The System has Drude particles: polarisable models of that kind are not supported.")
    masses = []
    for i, atom in enumerate(atoms):
        name = f"{atom.residue.name}{atom.residue.index + 1}-{atom.name}"
        if system.isVirtualSite(i):
            raise InputError(f"Particle {i} ({name}) is a virtual site: flows need real atoms only.")
        mass = system.getParticleMass(i)._value
        if mass <= 0.0:
            raise InputError(f"Particle {i} ({name}) has no mass: massless atoms are not supported.")
        masses.append(float(mass))
    graph = MoleculeGraph(topology)
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
                f"The System constrains the bond {graph.label(i)} to {graph.label(j)}, which is not one between a "
                "hydrogen and a heavy atom: build it with constraints=HBonds or None."
            )
        bonds.append((i, j) if graph.is_hydrogen(i) else (j, i))
        lengths.append(float(distance._value))
    return Constraints(bonds=bonds, lengths=lengths, masses=masses)


def _determinant(theta: Tensor, phi: Tensor, heavy: Tensor, light: Tensor) -> Tensor:
    """det Z [B, G] of blocks of M constraints at one atom; θ, φ [B, G, M], 1/m_X [G], 1/m_k [G, M].

    Written out for two and three hydrogens, where a batched factorisation costs ten times as much.
    """
    m = theta.shape[-1]
    ct, st = theta.cos(), theta.sin()

    def off_diagonal(k: int, other: int) -> Tensor:
        turn = (phi[..., k] - phi[..., other]).cos()
        return heavy * (ct[..., k] * ct[..., other] + st[..., k] * st[..., other] * turn)

    diagonal = (light + heavy[:, None]).unbind(-1)
    if m == 2:
        return diagonal[0] * diagonal[1] - off_diagonal(0, 1).square()
    if m == 3:
        a, b, c = off_diagonal(1, 2), off_diagonal(0, 2), off_diagonal(0, 1)
        squares = diagonal[0] * a.square() + diagonal[1] * b.square() + diagonal[2] * c.square()
        return diagonal[0] * diagonal[1] * diagonal[2] + 2 * a * b * c - squares
    rows = [
        [diagonal[k].expand_as(ct[..., k]) if k == other else off_diagonal(k, other) for other in range(m)]
        for k in range(m)
    ]
    return torch.linalg.det(torch.stack([torch.stack(row, -1) for row in rows], -2))


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
            self.register_buffer(f"_light{size}", 1.0 / light, persistent=False)

    def forward(self, theta: Tensor, phi: Tensor) -> Tensor:
        """Φ [B] from angles and dihedrals [B, K] of all Z-matrix rows."""
        total = theta.new_zeros(len(theta))
        for size in self._sizes:
            rows = getattr(self, f"_rows{size}")
            heavy = getattr(self, f"_heavy{size}").to(theta.dtype)
            inverse = getattr(self, f"_light{size}").to(theta.dtype)
            if size == 1:
                total = total + (1.0 / heavy + inverse[:, 0]).log().sum()
                continue
            determinant = _determinant(theta[:, rows], phi[:, rows], 1.0 / heavy, inverse)
            total = total + determinant.log().sum(-1)
        return 0.5 * total
