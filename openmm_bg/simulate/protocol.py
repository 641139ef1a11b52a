"""The settings of ``openmm-bg simulate``, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from openmm_bg.errors import InputError

#: Mass of a hydrogen after repartitioning, dalton (Hopkins et al., J. Chem. Theory Comput. 11, 1864, 2015, use 3).
HYDROGEN_MASS = 3.0
#: Longest time step, ps, without and with repartitioned hydrogen masses.
LONGEST_STEP = {False: 0.0025, True: 0.005}


@dataclass(frozen=True)
class Protocol:
    """What every replica does: heat, cool, equilibrate, and then keep frames.

    All replicas start from one minimised structure. Each draws its own velocities at ``start_temperature``, runs
    freely for ``heating`` ps, cools to ``temperature`` and equilibrates for ``equilibration`` ps. A start that has
    changed a chirality or an amide isomer on its way is drawn again.

    Attributes
    ----------
    temperature, friction, time_step
        K, 1/ps and ps of the LangevinMiddleIntegrator.
    hydrogen_mass
        dalton; None leaves masses alone.
    interval, length
        ps between frames, and of each replica.
    replicas
        Trajectories for training.
    test
        One more replica, test.dcd, that training leaves alone.
    start_temperature, heating, equilibration
        K, ps, ps.
    seed
        Of velocities and noise. It makes replicas differ; a run cannot be repeated bit by bit, for replicas share
        Contexts as these come free.
    """

    temperature: float = 300.0
    friction: float = 1.0
    time_step: float = 0.002
    hydrogen_mass: float | None = None
    interval: float = 1.0
    length: float = 5000.0
    replicas: int = 4
    test: bool = True
    start_temperature: float = 400.0
    heating: float = 20.0
    equilibration: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("temperature", "friction", "time_step", "interval", "length", "start_temperature")
        for name in (*positive, "heating", "equilibration"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
                raise InputError(f"The setting {name.replace('_', ' ')} cannot be {value:g}: give a positive number.")
        if self.replicas < 1:
            raise InputError(f"There must be at least 1 replica, got {self.replicas}.")
        if self.seed < 0:
            raise InputError(f"The seed {self.seed} is negative: give 0 or a larger whole number.")
        if self.hydrogen_mass is not None and not 1.0 < self.hydrogen_mass <= 4.0:
            raise InputError(f"Hydrogens of {self.hydrogen_mass:g} dalton are not possible: give between 1 and 4.")
        longest = LONGEST_STEP[self.hydrogen_mass is not None]
        if self.time_step > longest:
            advice = "shorten it" if self.hydrogen_mass else "shorten it or repartition hydrogen masses (--hmr)"
            raise InputError(
                f"A time step of {1000 * self.time_step:g} fs is too long for these masses (at most "
                f"{1000 * longest:g} fs): {advice}."
            )
        if abs(self.interval / self.time_step - self.steps_per_frame) > 1e-6 * self.steps_per_frame + 1e-9:
            raise InputError(
                f"The interval of {self.interval:g} ps is no multiple of the time step of {1000 * self.time_step:g} fs."
            )
        if self.frames < 1:
            raise InputError(f"{self.length:g} ps are shorter than the interval between frames, {self.interval:g} ps.")

    @property
    def steps_per_frame(self) -> int:
        return max(1, round(self.interval / self.time_step))

    @property
    def frames(self) -> int:
        """Frames of each replica."""
        return int(self.length / self.interval + 1e-6)

    @property
    def names(self) -> list[str]:
        """Of the trajectories, without their ending."""
        return [f"trajectory-{k + 1}" for k in range(self.replicas)] + ["test"] * self.test

    def steps(self, ps: float) -> int:
        return round(ps / self.time_step)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
