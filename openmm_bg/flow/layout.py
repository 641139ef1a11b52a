"""What the flow needs to know of the coordinates it models; the one thing the two rooms share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from openmm_bg.errors import InputError


@dataclass(frozen=True)
class FeatureLayout:
    """One entry per modelled coordinate, in the order of the vector y (D of them).

    Parameters
    ----------
    circular
        True for an angle on the whole circle, False for a coordinate on the real line.
    backbone
        True for the backbone channel of the split flow, False for the side-chain channel.
    fold
        n-fold symmetry of a circular coordinate: the flow bends v = n·y - shift modulo 2π, all branches alike,
        and lets other coordinates see the branch. 1 for everything that is not a rotor of identical atoms.
    concentration
        κ of the von Mises base density of a circular coordinate, 0 for a uniform base. 0 for linear ones.
    shift
        Linear: the mean that standardisation takes away. Circular: the centre c (rad) of v = n·y - c,
        chosen so that the cut at c ± π lies where the data are emptiest.
    scale
        Linear: the standard deviation that standardisation divides by. Circular: always 1, for scaling an
        angle would break its period.
    """

    circular: list[bool]
    backbone: list[bool]
    fold: list[int]
    concentration: list[float]
    shift: list[float]
    scale: list[float]

    def __post_init__(self) -> None:
        lengths = {len(value) for value in asdict(self).values()}
        if len(lengths) != 1:
            raise InputError(f"A FeatureLayout needs lists of one length, got lengths {sorted(lengths)}.")
        for circular, fold, kappa, scale in zip(self.circular, self.fold, self.concentration, self.scale, strict=True):
            if circular and scale != 1.0:
                raise InputError("A circular coordinate must have scale 1: scaling breaks its period.")
            if not circular and (fold != 1 or kappa != 0.0):
                raise InputError("Only circular coordinates may be folded or have a von Mises base.")
            if fold < 1 or kappa < 0.0 or scale <= 0.0:
                raise InputError("fold must be >= 1, concentration >= 0 and scale > 0.")

    @property
    def n(self) -> int:
        """Number of modelled coordinates D."""
        return len(self.circular)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FeatureLayout:
        """Inverse of `to_dict`."""
        return cls(**data)
