"""Latent moves on a Context (formula F of docs/theory.md): local steps in a flow's base variables, all or a block.

Unlike a fresh proposal (formulas D and E), a latent move starts from where the chain stands, so that it stays usable
where a flow is too poor, or a molecule too large, for fresh proposals to be accepted.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.matching import require_count
from openmm_bg.moves.base import ContextMove
from openmm_bg.rules import metropolis
from openmm_bg.sampler import BoltzmannGeneratorSampler
from openmm_bg.standing import Report, Standing

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Part = Literal["all", "backbone", "side chains"]

#: Step sizes are adapted within these bounds; a walk by π rad forgets where it came from.
SMALLEST_STEP, WIDEST_WALK = 1e-4, math.pi


class LatentMove(ContextMove):
    """Formula F on a sampler's Context: a step in z that is reversible for the base, then α = min(1, w(f(z'))/w(f(z))).

    w = π/q at the same s, with the whole log-determinant of the flow. What the flow does not model stays, as in
    `BoltzmannGeneratorSampler.step`. A proposal outside the domain or its sectors has w = 0 and is rejected, never
    drawn again.

    A *block* move changes the z of some coordinates and keeps those of all others. The flow couples them, so that other
    y may move a little too; α is the same. (A move that keeps other y exactly would need a density q(y_A | y_B), which
    this flow does not have.)

    Parameters
    ----------
    sampler
        Its Context, flow, target and random stream are used.
    residues
        Indices (from 0) of the residues whose coordinates move; None stands for all. A coordinate belongs to the
        residue of the atom that it places: φ to its own residue, ψ to the next one.
    part
        "backbone" or "side chains" moves that channel of these residues alone.
    run
        Each step moves that many consecutive ones of the residues, a run chosen at random; None moves all of them.
    a
        Step of Gaussian latent coordinates, in (0, 1]; 1 draws them afresh.
    width
        Standard deviation (rad) of the walk of circular ones.
    redraw
        Draw the block afresh from the base, whatever `a` and `width`.

    Attributes
    ----------
    a, width
        As given, until `burn_in` adapts them; `step` never does.
    info
        All steps of `step` (not of `burn_in`), joined; None before the first.

    Raises
    ------
    InputError
        A step size out of range, residues that do not exist or have no modelled coordinate, an unknown part, a run
        that does not fit.

    Examples
    --------
    >>> move = bg.LatentMove(sampler, residues=range(3, 9), part="backbone")  # doctest: +SKIP
    >>> move.burn_in(500)  # doctest: +SKIP
    >>> for _ in range(1000):  # doctest: +SKIP
    ...     simulation.step(100)
    ...     move.step(4)
    """

    def __init__(
        self,
        sampler: BoltzmannGeneratorSampler,
        *,
        residues: Iterable[int] | None = None,
        part: Part = "all",
        run: int | None = None,
        a: float = 0.3,
        width: float = 0.3,
        redraw: bool = False,
    ) -> None:
        super().__init__(sampler)
        require_steps(a, width)
        self.redraw = bool(redraw)
        self.a, self.width = (1.0, math.inf) if self.redraw else (float(a), float(width))
        self.blocks = _blocks(sampler, residues, part, run)

    def step(self, n: int = 1) -> Report:
        """n exact Metropolis steps on the Context's own positions, with step sizes as they are.

        Velocities are carried over to accepted positions (`velocities`); if nothing was accepted the Context is not
        touched at all.

        Raises
        ------
        InputError
            n < 1, NaN positions.
        EnergyError
            The Context no longer has the energies of its System.
        """
        require_count("The number of steps", n)
        report, info = self._run(n, None)
        self._count(info)
        return report

    def burn_in(self, n: int, acceptance: float = 0.3) -> Report:
        """n steps that adapt `a` and `width` by one common factor towards an acceptance probability.

        The chain is not exact while its steps depend on its past: leave out what it visits here. (Robbins and Monro
        1951, on the logarithm of the factor, with gain 1/k^0.6.)

        Parameters
        ----------
        n
            Number of steps.
        acceptance
            The probability aimed at, between 0 and 1.

        Raises
        ------
        InputError
            As `step`; an acceptance outside (0, 1); a move that redraws its block, which has no step size.
        """
        require_count("The number of steps", n)
        if self.redraw:
            raise InputError("A move that redraws its block has no step size to adapt: leave burn_in out.")
        if not _is_number(acceptance) or not 0.0 < acceptance < 1.0:
            raise InputError(f"The acceptance to aim at must lie between 0 and 1, got {acceptance!r}.")
        return self._run(n, acceptance)[0]

    def _run(self, n: int, aim: float | None) -> tuple[Report, metropolis.Info]:
        standing = self.sampler.stand()
        state = metropolis.State(standing.z, np.array([standing.log_w]))
        chosen: Tensor | None = None
        total: metropolis.Info | None = None
        start, log_factor = (self.a, self.width), 0.0
        for k in range(n):
            proposal, x = self._propose(state, standing)
            state, info = metropolis.metropolis_step(state, proposal, self.sampler.rng)
            if info.n_accepted:
                chosen = x[0]
            total = info if total is None else total + info
            if aim is not None and standing.inside:
                log_factor += (info.acceptance_probability - aim) / (k + 1) ** 0.6
                a, width = (math.exp(log_factor) * value for value in start)
                self.a = min(max(a, SMALLEST_STEP), 1.0)
                self.width = min(max(width, SMALLEST_STEP), WIDEST_WALK)
        assert total is not None
        return self.sampler.settle(standing, total, chosen), total

    def _propose(self, state: metropolis.State, standing: Standing) -> tuple[metropolis.State, Tensor]:
        """z' with its log-weight, and the positions [1, N, 3] of f(z')."""
        if not standing.inside:  # nothing can be accepted: the rule is told so, and an energy is saved
            return metropolis.State(state.value, np.array([-np.inf])), standing.positions[None]
        rng, space = self.sampler.rng, self.sampler.space
        block = self.blocks[int(rng.integers(len(self.blocks)))]
        z = metropolis.latent_proposal(state.value, rng, a=self.a, width=self.width, chosen=block, **space.base)
        y, log_det = space.forward(z)
        log_q = torch.from_numpy(space.log_base(z)) - log_det
        x, log_w = self.sampler.weigh(standing, y, log_q)
        return metropolis.State(z, log_w), x


def require_steps(a: float, width: float) -> None:
    """Raise `InputError` unless 0 < a <= 1 and 0 < width < infinity."""
    if not (_is_number(a) and _is_number(width)) or not 0.0 < a <= 1.0 or not 0.0 < width < math.inf:
        raise InputError(f"A latent move needs 0 < a <= 1 and a finite width > 0, got a = {a!r}, width = {width!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _blocks(
    sampler: BoltzmannGeneratorSampler, residues: Iterable[int] | None, part: Part, run: int | None
) -> list[BoolArray]:
    """Which latent coordinates [D] a step moves, one entry for each block that it may choose."""
    if part not in ("all", "backbone", "side chains"):
        raise InputError(f"part must be 'all', 'backbone' or 'side chains', got {part!r}.")
    coordinates = sampler.coordinates
    names = [f"{residue.name}{residue.id}" for residue in sampler.flow.topology.residues()]
    of_atom = [atom.residue.index for atom in sampler.flow.topology.atoms()]
    owner = np.array([of_atom[c.atom] for c in coordinates.coordinates if c.modelled])
    channel = np.array(coordinates.layout.backbone, dtype=np.bool_)
    allowed = {"all": np.ones_like(channel), "backbone": channel, "side chains": ~channel}[part]
    if residues is not None and not isinstance(residues, Iterable):
        raise InputError(f"residues must be a list of residue indices, got {residues!r}: write [{residues!r}].")
    wanted = list(range(len(names))) if residues is None else list(residues)
    for residue in wanted:
        whole = isinstance(residue, (int, np.integer)) and not isinstance(residue, bool)
        if not whole or not 0 <= residue < len(names):
            raise InputError(f"There is no residue {residue!r}: name residues by their indices, 0 to {len(names) - 1}.")
    chosen = sorted({int(residue) for residue in wanted})
    windows = [chosen]
    if run is not None:
        require_count("run", run)
        windows = [chosen[i : i + run] for i in range(len(chosen) - run + 1)]
        windows = [window for window in windows if window[-1] - window[0] == run - 1]
        if not windows:
            raise InputError(f"There are no {run} consecutive residues among the chosen ones: take a shorter run.")
    blocks = [allowed & np.isin(owner, window) for window in windows]
    blocks = [block for block in blocks if block.any()]
    if not blocks:
        listed = ", ".join(names[residue] for residue in chosen[:5]) + (", ..." if len(chosen) > 5 else "")
        what = "modelled coordinates" if part == "all" else f"modelled coordinates of the {part}"
        raise InputError(f"The residues chosen ({listed or 'none'}) have no {what}: choose others.")
    return blocks
