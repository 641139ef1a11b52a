"""Learned swaps between two thermodynamic states (formula I of docs/theory.md).

A bijection f = f_b ∘ f_a⁻¹ of two flows carries the modelled coordinates of a state a into those that are typical of a
state b, and back. Here are the bijection, the acceptance ratio on arrays, and both put together for positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.artifact import Flow, topology_digest
from openmm_bg.errors import EnergyError, InputError
from openmm_bg.latent_space import FEW
from openmm_bg.proposals import FlowProposals

FloatArray = NDArray[np.float64]


def swap_log_ratio(
    log_pi_a: ArrayLike,
    log_pi_b: ArrayLike,
    log_pi_a_new: ArrayLike,
    log_pi_b_new: ArrayLike,
    log_det_to_b: ArrayLike,
    log_det_to_a: ArrayLike,
) -> FloatArray:
    """Formula I: the logarithm of the Metropolis-Hastings ratio of a swap.

    π_a(new a) π_b(new b) |det f'(y_a)| |det (f⁻¹)'(y_b)| / [π_a(old a) π_b(old b)]. Whether s stays with its state or
    travels with y shows in the new states that the densities belong to, not here. All six terms are required.

    Parameters
    ----------
    log_pi_a, log_pi_b : array_like, shape [...]
        log π of the current states, each with its own U/kT, log J and Φ; -inf where π = 0.
    log_pi_a_new, log_pi_b_new : array_like, shape [...]
        The same of the states after the swap.
    log_det_to_b, log_det_to_a : array_like, shape [...]
        log |det f'| at y_a and log |det (f⁻¹)'| at y_b.

    Returns
    -------
    ndarray, shape [...]
        -inf where a new state has π = 0; otherwise +inf where an old one has.

    Raises
    ------
    InputError
        A term is NaN, a density is +inf, or a determinant is not finite.

    References
    ----------
    Invernizzi, Krämer, Clementi and Noé, J. Phys. Chem. Lett. 13, 11643 (2022); formula I of docs/theory.md.
    """
    densities = [np.asarray(v, dtype=np.float64) for v in (log_pi_a, log_pi_b, log_pi_a_new, log_pi_b_new)]
    volumes = [np.asarray(v, dtype=np.float64) for v in (log_det_to_b, log_det_to_a)]
    if any(np.any(np.isnan(v) | (v == np.inf)) for v in densities) or not all(np.isfinite(v).all() for v in volumes):
        raise InputError("The terms of a flow swap must be finite or, for the density of an impossible state, -inf.")
    before = densities[0] + densities[1]
    after = densities[2] + densities[3] + volumes[0] + volumes[1]
    ratio = after - np.where(np.isfinite(before), before, 0.0)
    return np.where((before == -np.inf) & (after > -np.inf), np.inf, ratio)


class FlowBijection:
    """f = f_b ∘ f_a⁻¹ between the modelled coordinates of two flows of one molecule.

    Parameters
    ----------
    flow_a, flow_b
        Of one molecule, with the same Z-matrix, modelled coordinates and circular dimensions. One flow twice makes f
        the identity.

    Raises
    ------
    InputError
        Their latent spaces do not correspond.
    """

    def __init__(self, flow_a: Flow, flow_b: Flow) -> None:
        if topology_digest(flow_a.topology) != topology_digest(flow_b.topology):
            raise InputError("The two flows of a swap are of different molecules: take two of one topology.")
        a, b = flow_a.coordinates, flow_b.coordinates
        if (
            a.zmatrix.to_dict() != b.zmatrix.to_dict()
            or [asdict(c) for c in a.coordinates] != [asdict(c) for c in b.coordinates]
            or (a.layout.circular, a.layout.fold) != (b.layout.circular, b.layout.fold)
        ):
            raise InputError(
                "The two flows of a swap model different coordinates: train both with one representation and the same "
                "constraints."
            )
        self.flow_a, self.flow_b = flow_a, flow_b

    def to_b(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """f(y_a) [B, D] and log |det f'| [B] of y_a [B, D]; float64 on the CPU."""
        return self._carry(y, self.flow_a, self.flow_b)

    def to_a(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """f⁻¹(y_b) [B, D] and log |det (f⁻¹)'| [B] of y_b [B, D]; float64 on the CPU."""
        return self._carry(y, self.flow_b, self.flow_a)

    def _carry(self, y: Tensor, source: Flow, target: Flow) -> tuple[Tensor, Tensor]:
        y = y.to("cpu", torch.float64)
        if source is target:
            return y.clone(), torch.zeros(len(y), dtype=torch.float64)
        with torch.no_grad(), torch.jit.optimized_execution(len(y) > FEW):
            z, log_det = source.inverse(y.to(next(source.parameters()).device))
            carried, more = target.forward(z.to(next(target.parameters()).device))
        return carried.to("cpu", torch.float64), (log_det.cpu() + more.cpu()).to(torch.float64)


@dataclass(frozen=True, eq=False)
class SwapProposal:
    """What a swap offers.

    Attributes
    ----------
    positions_a, positions_b
        [N, 3] nm, of the whole System in either state after the swap.
    log_ratio
        Logarithm of the acceptance ratio; -inf if the swap is impossible.
    inside
        False where a current state lies outside its flow's domain, so that no swap could be undone.
    """

    positions_a: FloatArray
    positions_b: FloatArray
    log_ratio: float
    inside: bool


class FlowSwap:
    """Formula I for one conformation in each of two states of a System.

    The flow's molecule keeps its frame in either state (seed atom 0, the direction to atom 1, the half-plane of
    atom 2), and so do the particles around it.

    Parameters
    ----------
    a, b
        The flows of the two states, matched to the System.
    travels
        Whether s, what the flows do not model, travels with y. By default it stays with its state.

    Raises
    ------
    InputError
        The flows' latent spaces do not correspond.
    """

    def __init__(self, a: FlowProposals, b: FlowProposals, travels: bool = False) -> None:
        self.bijection = FlowBijection(a.flow, b.flow)
        self.a, self.b, self.travels = a, b, travels

    def propose(
        self,
        positions_a: FloatArray,
        positions_b: FloatArray,
        reduced_potential_a: Callable[[FloatArray], float],
        reduced_potential_b: Callable[[FloatArray], float],
    ) -> SwapProposal:
        """The conformations after a swap and the logarithm of its acceptance ratio.

        Parameters
        ----------
        positions_a, positions_b
            Current positions [N, 3] of the System in the two states, nm.
        reduced_potential_a, reduced_potential_b
            u of each state with its own temperature and box, for positions [N, 3]; each serves old and new
            conformation.

        Raises
        ------
        InputError
            Positions that cannot be those of the System.
        EnergyError
            The energy of a current conformation cannot be computed.
        """
        (x_a, y_a, s_a), (x_b, y_b, s_b) = self.a.split(positions_a), self.b.split(positions_b)
        if not (_inside(self.a, y_a, s_a) and _inside(self.b, y_b, s_b)):
            return SwapProposal(positions_a, positions_b, float("-inf"), False)
        u_a = self.a.within(positions_a, reduced_potential_a)
        u_b = self.b.within(positions_b, reduced_potential_b)
        new_b, det_to_b = self.bijection.to_b(y_a)
        new_a, det_to_a = self.bijection.to_a(y_b)
        new_s_a, new_s_b = (s_b, s_a) if self.travels else (s_a, s_b)
        new_x_a, volume_a = self.a.place(new_a, new_s_a, x_a)
        new_x_b, volume_b = self.b.place(new_b, new_s_b, x_b)
        log_ratio = float("-inf")
        if bool(torch.isfinite(new_x_a).all() and torch.isfinite(new_x_b).all()):
            log_ratio = float(
                swap_log_ratio(
                    _current(self.a, y_a, s_a, x_a, u_a),
                    _current(self.b, y_b, s_b, x_b, u_b),
                    self.a.log_density(new_x_a, volume_a, u_a),
                    self.b.log_density(new_x_b, volume_b, u_b),
                    det_to_b.numpy(),
                    det_to_a.numpy(),
                )[0]
            )
        return SwapProposal(
            self.a.merge(positions_a, new_x_a[0].numpy()),
            self.b.merge(positions_b, new_x_b[0].numpy()),
            log_ratio,
            True,
        )


def _inside(state: FlowProposals, y: Tensor, s: Tensor) -> bool:
    return bool(state.coordinates.in_domain(y, s)[0])


def _current(
    state: FlowProposals, y: Tensor, s: Tensor, x: Tensor, reduced_potential: Callable[[FloatArray], float]
) -> FloatArray:
    """log π [1] of a current state, whose energy has to exist."""
    try:
        u = float(reduced_potential(x.numpy()))
    except openmm.OpenMMException as error:
        raise EnergyError(f"OpenMM cannot compute the energy of the current positions: {error}") from error
    log_pi = state.coordinates.log_volume(y, s).numpy() - u
    return np.where(np.isfinite(log_pi), log_pi, -np.inf)
