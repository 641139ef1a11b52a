"""What every move on a Context has: a sampler, and the counts of all its steps."""

from __future__ import annotations

from typing import Any

from openmm_bg.errors import InputError
from openmm_bg.rules.metropolis import Info
from openmm_bg.sampler import BoltzmannGeneratorSampler
from openmm_bg.standing import counts


class ContextMove:
    """A move on a sampler's Context, whose reports are joined.

    Parameters
    ----------
    sampler
        `BoltzmannGeneratorSampler` whose Context, flow, target and random stream the move uses.

    Attributes
    ----------
    info
        All steps so far, joined; None before the first.

    Raises
    ------
    InputError
        Not a sampler.
    """

    def __init__(self, sampler: BoltzmannGeneratorSampler) -> None:
        if not isinstance(sampler, BoltzmannGeneratorSampler):
            kind = type(sampler).__name__
            raise InputError(
                f"A {type(self).__name__} needs a BoltzmannGeneratorSampler, got a {kind}: make one first."
            )
        self.sampler = sampler
        self.info: Info | None = None

    @property
    def context(self) -> Any:
        """The sampler's Context."""
        return self.sampler.context

    @property
    def statistics(self) -> dict[str, int]:
        """``n_proposed``, ``n_accepted``, ``n_energies`` and ``longest_rejection_streak`` of all steps so far."""
        return counts(self.info)

    def _count(self, info: Info) -> None:
        self.info = info if self.info is None else self.info + info
