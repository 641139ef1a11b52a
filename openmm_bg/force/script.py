"""The flow's potential as one TorchScript module, positions in and energy and forces out: what a TorchForce takes.

Coordinates are traced, everything else is scripted. Lengths of lists, groups of siblings and numbers of hydrogens are
plain Python in `openmm_bg.coordinates`, which TorchScript cannot compile; for one molecule and one frame they are
constants, and what is left for a trace is arithmetic without a branch (`wrap` and the domain are comparisons of
tensors). Whatever depends on the values of positions, and the flow with its own loops, is scripted and keeps its
control flow. `FlowPotential` of the PythonForce is the same computation for batches; `tests/force` compares them.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openmm_bg.artifact import Flow
from openmm_bg.coordinates import CoordinateMap
from openmm_bg.force.potential import LENGTH_SLACK


class _Here:
    """A tensor that answers `to(other)` with itself.

    The map brings s to the device of y, where it is already. A trace would record that as a move to the device of
    tracing, and the module would fail on every other one.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def to(self, other: Tensor) -> Tensor:
        return self.tensor


class _Internal(nn.Module):
    """Positions [1, N, 3] to y [1, D], s [1, S], log J + Φ [1] and whether they are in the domain [1]; to be traced."""

    def __init__(self, coordinates: CoordinateMap) -> None:
        super().__init__()
        self.coordinates = coordinates

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, s = self.coordinates.to_internal(x)
        here: Any = _Here(s)
        return y, s, self.coordinates.log_volume(y, here), self.coordinates.in_domain(y, here)


class _Potential(nn.Module):
    """Energy [] (kJ/mol) and forces [N, 3] (kJ/mol/nm) at positions [N, 3] (nm), both times a scale; to be scripted.

    Forces are an output, for outside the domain they are no slope of the energy, which is infinite there.
    """

    free: Tensor
    held: Tensor
    lengths: Tensor

    def __init__(self, flow: Flow, kT: float) -> None:
        super().__init__()
        coordinates = flow.coordinates
        kept = [c for c in coordinates.coordinates if not c.modelled]
        free = [k for k, c in enumerate(kept) if not c.constrained]
        held = [k for k, c in enumerate(kept) if c.constrained]
        self.n_atoms, self.kT, self.slack = coordinates.n_atoms, kT, LENGTH_SLACK
        self.internal = _traced(coordinates)
        self.density = flow.density
        self.completion = flow.completion if free else None
        self.register_buffer("free", torch.tensor(free, dtype=torch.long))
        self.register_buffer("held", torch.tensor(held, dtype=torch.long))
        self.register_buffer("lengths", coordinates.reference_fixed[held])

    def log_density(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log q + log g - log J - Φ [1] of positions [1, N, 3], whether in the domain [1], kept lengths [1, H]."""
        y, s, log_volume, inside = self.internal(x)
        log_p = self.density.log_prob(y)  # type: ignore[operator]
        if self.completion is not None:
            log_p = log_p + self.completion.log_prob(s.index_select(1, self.free), y)  # type: ignore[operator]
        return log_p.to(torch.float64) - log_volume, inside, s.detach().index_select(1, self.held)

    def forward(self, positions: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and forces, in float64 and in the dtype of the positions."""
        if positions.shape[0] != self.n_atoms:
            raise RuntimeError(
                f"The flow of this FlowForce has {self.n_atoms} atoms, the System {positions.shape[0]} particles: "
                "a molecule among others needs backend='python' and setParticles()."
            )
        at = positions.detach().to(torch.float64)
        energy = torch.zeros([], dtype=torch.float64, device=at.device)
        forces = torch.zeros_like(at)
        if bool(scale == 0.0):  # 0 * inf is no energy
            return energy, forces.to(positions.dtype)
        if not bool(torch.isfinite(at).all()):
            return energy + torch.nan, (forces + torch.nan).to(positions.dtype)
        if at.is_inference():
            raise RuntimeError("A FlowForce through TorchForce needs gradients: leave torch.inference_mode().")
        before = torch.is_grad_enabled()  # MD may run inside torch.no_grad()
        torch.set_grad_enabled(True)
        x = at.unsqueeze(0).requires_grad_(True)
        log_p, inside, lengths = self.log_density(x)
        slope = torch.autograd.grad([log_p.sum()], [x])[0]
        torch.set_grad_enabled(before)
        assert slope is not None
        if lengths.numel() > 0 and bool((lengths - self.lengths).abs().max() > self.slack):
            raise RuntimeError(
                f"A bond length that the flow keeps fixed is more than {self.slack} nm off: give the System the "
                "constraints that the flow was trained with, and its particles in the flow's order."
            )
        value, force = -self.kT * log_p.detach()[0], self.kT * slope.detach()[0]
        factor = scale.to(torch.float64)
        good = inside[0] & torch.isfinite(value) & torch.isfinite(force).all()
        # Forbidden stays forbidden under a negative scale, too.
        energy = torch.where(good, factor * value, torch.full_like(value, torch.inf))
        force = factor * torch.nan_to_num(force, nan=0.0, posinf=0.0, neginf=0.0)
        return energy, force.to(positions.dtype).contiguous()


def _traced(coordinates: CoordinateMap) -> torch.jit.ScriptModule:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn([1, coordinates.n_atoms, 3], dtype=torch.float64, generator=generator)
    # Tracing again to compare is what `check_trace` does; here tests compare with the map itself, in all its branches.
    return torch.jit.trace(_Internal(coordinates), (x,), check_trace=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every Python value that it takes for a constant, torch >= 2.10 of TorchScript itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*")
        warnings.filterwarnings("ignore", message=r".*TorchScript.*")
        yield


def scripted_potential(flow: Flow, kT: float) -> torch.jit.ScriptModule:
    """The potential of a complete flow for ``TorchForce``, which shares nothing with ``flow``.

    Parameters
    ----------
    flow
        `full`, or `reduced` with a completion.
    kT
        kJ/mol.

    Returns
    -------
    torch.jit.ScriptModule
        ``(positions [N, 3] nm, scale []) -> (energy [] kJ/mol in float64, forces [N, 3] in the dtype of positions)``,
        both times the scale. It raises where the number of particles or a constrained length is not the flow's.
    """
    with _quiet():
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(_Potential(flow, kT)), buffer)
        buffer.seek(0)
        module = torch.jit.load(buffer, map_location="cpu")
    for parameter in module.parameters():
        parameter.requires_grad_(False)  # or every evaluation would record what their gradients need
    return module
