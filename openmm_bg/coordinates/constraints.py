"""What a System fixes: its constraints, the checks that refuse what no formula covers, and Fixman's determinant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, sin
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


def _log_determinant(scaled: Tensor, size: int) -> Tensor:
    """log det R [B, G] of symmetric M × M matrices with ones on their diagonals.

    Written out for two and three hydrogens, where a batched factorisation costs ten times as much.

    Parameters
    ----------
    scaled
        [B, G, M (M - 1) / 2] the elements above the diagonal, row by row.
    size
        M.
    """
    if size == 2:
        return torch.log1p(-scaled.square().squeeze(-1))
    if size == 3:
        a, b, c = scaled.unbind(-1)
        return torch.log1p(2 * a * b * c - scaled.square().sum(-1))
    matrix = torch.eye(size, dtype=scaled.dtype, device=scaled.device).repeat(*scaled.shape[:-1], 1, 1)
    row, column = torch.triu_indices(size, size, 1, device=scaled.device)
    matrix[..., row, column] = scaled
    matrix[..., column, row] = scaled
    return torch.linalg.det(matrix).log()


def _log_determinant_of(scaled: Sequence[float], size: int) -> float:
    """`_log_determinant` of one matrix, from the floats above its diagonal."""
    if size > 3:
        return float(_log_determinant(torch.tensor([[scaled]], dtype=torch.float64), size))
    off = 2 * math.prod(scaled) - sum([value * value for value in scaled]) if size == 3 else -scaled[0] * scaled[0]
    if off > -1.0:
        return math.log1p(off)
    return -math.inf if off == -1.0 else math.nan


class FixmanTerm(nn.Module):
    """Φ = ½ log det Z [B], block by block: one block for each heavy atom and its constrained hydrogens.

    ``Z_kk = 1/m_X + 1/m_k`` and ``Z_kl = cos(k-X-l)/m_X`` with the angle from the hydrogens' own angles θ and
    dihedrals φ, which share one axis by the Z-matrix rule. With R_kl = Z_kl / √(Z_kk Z_ll), log det Z is log det R and
    a constant, Σ log Z_kk.

    Parameters
    ----------
    blocks
        For each heavy atom with constrained hydrogens: (rows of the hydrogens, their masses, the heavy atom's mass).
    """

    _constant: Tensor

    def __init__(self, blocks: Sequence[tuple[list[int], list[float], float]]) -> None:
        super().__init__()
        constant = 0.0
        # by number of hydrogens: for every pair of them two rows, and R_kl over the cosine
        pairs: dict[int, list[tuple[int, int, float]]] = {}
        for rows, masses, heavy in blocks:
            diagonal = [1.0 / heavy + 1.0 / mass for mass in masses]
            constant += 0.5 * sum(math.log(value) for value in diagonal)
            for k, other in itertools.combinations(range(len(rows)), 2):
                share = 1.0 / (heavy * math.sqrt(diagonal[k] * diagonal[other]))
                pairs.setdefault(len(rows), []).append((rows[k], rows[other], share))
        self.register_buffer("_constant", torch.tensor(constant, dtype=torch.float64), persistent=False)
        self._offset, self._pairs = constant, pairs
        self._sizes = sorted(pairs)
        for size in self._sizes:
            first, second, shares = zip(*pairs[size], strict=True)
            self.register_buffer(f"_first{size}", torch.tensor(first), persistent=False)
            self.register_buffer(f"_second{size}", torch.tensor(second), persistent=False)
            self.register_buffer(f"_shares{size}", torch.tensor(shares, dtype=torch.float64), persistent=False)

    def forward(self, theta: Tensor, phi: Tensor) -> Tensor:
        """Φ [B] from angles and dihedrals [B, K] of all Z-matrix rows."""
        total = self._constant.to(theta.dtype).expand(len(theta))
        for found in self.log_determinants(theta, phi):
            total = total + 0.5 * found.sum(-1)
        return total

    def of_frame(self, theta: Sequence[float], phi: Sequence[float]) -> float:
        """Φ of one frame, from the floats of its angles and dihedrals [K]."""
        total = self._offset
        for size, pairs in self._pairs.items():
            scaled = [
                (cos(theta[k]) * cos(theta[j]) + sin(theta[k]) * sin(theta[j]) * cos(phi[k] - phi[j])) * share
                for k, j, share in pairs
            ]
            n = size * (size - 1) // 2
            total += 0.5 * sum([_log_determinant_of(scaled[i : i + n], size) for i in range(0, len(scaled), n)])
        return total

    def log_determinants(self, theta: Tensor, phi: Tensor) -> list[Tensor]:
        """log det R [B, G] of the blocks of two hydrogens, of those of three, and so on, as far as there are any."""
        if not self._sizes:
            return []
        cosine, sine = theta.cos(), theta.sin()
        found = []
        for size in self._sizes:
            first, second = getattr(self, f"_first{size}"), getattr(self, f"_second{size}")
            turn = (phi.index_select(1, first) - phi.index_select(1, second)).cos()
            between = cosine.index_select(1, first) * cosine.index_select(1, second)
            between = between + sine.index_select(1, first) * sine.index_select(1, second) * turn
            scaled = between * getattr(self, f"_shares{size}").to(theta.dtype)
            n_pairs = size * (size - 1) // 2
            found.append(_log_determinant(scaled.view(len(theta), len(first) // n_pairs, n_pairs), size))
        return found
