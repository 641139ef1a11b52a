"""`MoveReporter`: moves made while ``simulation.step`` runs, as OpenMM's own ExpandedEnsembleSampler makes them."""

from __future__ import annotations

from typing import Any, Protocol

import torch  # noqa: F401  # isort: skip  (before OpenMM, or its torch plugin does not load)
from openmm import app  # isort: skip

from openmm_bg.errors import InputError
from openmm_bg.matching import require_count
from openmm_bg.standing import Report


class Move(Protocol):
    """`BoltzmannGeneratorSampler`, `LatentMove` or any other move on a Context."""

    @property
    def context(self) -> Any: ...

    def step(self, n: int = 1) -> Report: ...


class MoveReporter:
    """A reporter for ``openmm.app.Simulation`` that makes exact moves at regular intervals.

    It writes nothing. Positions change only by an accepted move, which keeps every constraint and carries
    the velocities over; time and step count do not change. The moves' own counts are in ``move.statistics``.

    Reporters that are due at the same step and ask for data get a State which OpenMM took before the first of them was
    called; those that read the Context themselves see the moves of the reporters before them in the list. Both are
    frames of the same ensemble, and each State is consistent in itself.

    Parameters
    ----------
    move
        A `BoltzmannGeneratorSampler` or another move, on ``simulation.context``.
    interval
        MD steps between moves; they are made when the step count is a multiple of it.
    n_steps
        Metropolis steps each time.

    Raises
    ------
    InputError
        interval or n_steps is not a whole number of at least 1, or move is no move. When the simulation runs, before
        anything has moved: the move is on another Context than the simulation's.

    Examples
    --------
    >>> simulation.reporters.append(bg.MoveReporter(sampler, 100))  # doctest: +SKIP
    >>> simulation.step(100_000)  # doctest: +SKIP
    """

    def __init__(self, move: Move, interval: int, n_steps: int = 1) -> None:
        is_move = callable(getattr(move, "step", None)) and hasattr(move, "context")
        if not is_move or isinstance(move, app.Simulation):  # whose own step would call this reporter again
            raise InputError(
                f"A MoveReporter needs a sampler or another move on a Context, got a {type(move).__name__}."
            )
        require_count("The interval of a MoveReporter", interval)
        require_count("n_steps", n_steps)
        self.move = move
        self.interval = int(interval)
        self.n_steps = int(n_steps)

    def describeNextReport(self, simulation: Any) -> dict[str, Any]:
        """Steps until the next moves; OpenMM calls this. No State is asked for, `report` reads the Context itself."""
        if self.move.context is not simulation.context:
            raise InputError(
                "The move of a MoveReporter is on another Context than the simulation: make its sampler with "
                "simulation.context."
            )
        return {"steps": self.interval - simulation.currentStep % self.interval, "periodic": None, "include": []}

    def report(self, simulation: Any, state: Any) -> None:
        """Make the moves; OpenMM calls this."""
        self.move.step(self.n_steps)
