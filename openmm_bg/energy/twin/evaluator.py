"""Energies and gradients of one chunk of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from . import triton_kernels
from .algebra import ZERO, Node, total
from .formula import Globals
from .kernels import Kernel, build, lanes, looks_up_nothing
from .pairs import PairFormula, PairPass
from .program import distance_factor
from .system import Forces
from .terms import External, Listed


class Prepared(Protocol):
    """What depends on global parameters."""

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None: ...


class Evaluator:
    """All terms of a System, prepared for one precision.

    Parameters
    ----------
    forces
        The terms; their parameters are prepared here, so that an evaluator needs terms of its own.
    dtype, device
        Where and how precisely terms are evaluated, and gradients added up. Energies and sums over an atom's pairs are
        added up in float64, in C++ from sums of a few (`kernels.BLOCK`).

    Attributes
    ----------
    multiple
        What the number of frames in a batch must be a multiple of.
    """

    def __init__(self, forces: Forces, dtype: torch.dtype, device: torch.device) -> None:
        self.forces, self.dtype, self.device = forces, dtype, device
        n, solvents = forces.n_atoms, forces.solvents
        energy = total(part.node for part in forces.pairs)
        fields = [name for solvent in solvents for name in solvent.fields]
        slopes = {name + side: energy.derivative(name + side) for name in fields for side in "12"}
        outputs: dict[str, Node] = {"energy": energy, "factor": distance_factor(energy), **slopes}
        self._energy = self._pass(n, {"energy": energy}, fields, forces.pairs)
        self._both = self._pass(n, outputs, fields, forces.pairs)
        parts = [solvent.part for solvent in solvents]
        sums = {name: node for solvent in solvents for name, node in solvent.sums.items()}
        self._sums = self._pass(n, sums, [], parts)
        factor = total(solvent.slopes for solvent in solvents)
        self._chain = self._pass(n, {"factor": factor}, [s.adjoint for s in solvents], parts)
        self.multiple = 1
        self._triton: list[triton_kernels.TritonKernel] = []
        self._groups: list[Listed | External] = [*forces.listed(), *forces.external]

    def compile(self, backend: str) -> str | None:
        """Have the passes over pairs in ``c++`` or ``triton``, if that is possible; otherwise why not.

        To be called before `prepare`.
        """
        named = {"energy": self._energy, "both": self._both, "sums": self._sums, "chain": self._chain}
        wanted = {name: found for name, found in named.items() if found is not None and looks_up_nothing(found)}
        if not wanted:
            return None if not any(named.values()) else "they look up tables"
        if backend == "triton":
            if (reason := triton_kernels.unavailable(self.device)) is not None:
                return reason
            for name, found in wanted.items():
                found.kernel = kernel = triton_kernels.TritonKernel(f"pass_{name}", found, self.dtype)
                self._triton.append(kernel)
            triton_kernels.build(self._triton)
            return None
        if self.device.type != "cpu":
            return "C++ runs on the CPU and nowhere else"
        kernels = [Kernel(f"pass_{name}", found) for name, found in wanted.items()]
        reason = build(kernels, self.dtype)
        if reason is None:
            for found, made in zip(wanted.values(), kernels, strict=True):
                found.kernel = made
            self.multiple = lanes(self.dtype)
        return reason

    def trial(self) -> str | None:
        """Start prepared Triton kernels for the first time; if that fails, why, and torch takes their place."""
        reason = triton_kernels.trial(self._triton, self.device)
        if reason is not None:
            for kernel in self._triton:
                kernel.pairs.kernel = None
            self._triton = []
        return reason

    @staticmethod
    def _pass(
        n_atoms: int, outputs: Mapping[str, Node], fields: list[str], parts: list[PairFormula]
    ) -> PairPass | None:
        wanted = {name: node for name, node in outputs.items() if node != ZERO}
        return PairPass(n_atoms, wanted, fields, parts) if wanted else None

    def prepare(self, parameters: Globals) -> None:
        """Take over global parameters."""
        passes = [found for found in (self._energy, self._both, self._sums, self._chain) if found is not None]
        parts: list[Prepared] = [*self._groups, *self.forces.solvents, *passes]
        for part in parts:
            part.prepare(parameters, self.dtype, self.device)

    def evaluate(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """Energies [B] float64 of positions x [3, N, B]; their gradient is added to ``gradient``."""
        energy = x.new_zeros(x.shape[2], dtype=torch.float64)
        for group in self._groups:
            energy += group.evaluate(x, gradient)
        fields: dict[str, Tensor] = {}
        slopes: list[dict[str, Tensor]] = []
        if self.forces.solvents:
            zeros = x.new_zeros(x.shape[1:])
            sums = self._sums.evaluate(x, {})[1] if self._sums is not None else {}
            for solvent in self.forces.solvents:
                own, found, derivatives = solvent.single(x, sums.get(solvent.value, zeros), gradient is not None)
                energy += own
                fields |= found
                slopes.append(derivatives)
        pairs = self._energy if gradient is None else self._both
        adjoints: dict[str, Tensor] = {}
        if pairs is not None:
            own, adjoints = pairs.evaluate(x, fields, gradient)
            energy += own
        if gradient is not None and self.forces.solvents:
            zeros = x.new_zeros(x.shape[1:])
            adjoints = {name: adjoints.get(name, zeros) for name in fields}
            pulls = {
                solvent.adjoint: solvent.pull(adjoints, own_slopes, gradient)
                for solvent, own_slopes in zip(self.forces.solvents, slopes, strict=True)
            }
            if self._chain is not None:
                self._chain.evaluate(x, pulls, gradient)
        return energy
