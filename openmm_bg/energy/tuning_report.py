"""Candidates for the evaluation of energies, the report of their timing, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .twin_workers import TWIN, TWIN_ON_GPU

#: Least share of a core with which a machine counts as free: threads lose some of it at switches.
FREE = 0.8

#: Note of a candidate that was not tried.
NO_TIME = "no time left"


@dataclass(frozen=True)
class TuningRow:
    """One candidate: platform (or one of `TWINS`), number of Contexts (or threads), frames per second (None if not
    timed) and why not, whether each Context has a process of its own, and whether GBSAOBCForce stands in for an equal
    CustomGBForce.
    """

    platform: str
    n_workers: int
    frames_per_second: float | None
    note: str = ""
    processes: bool = False
    equal_solvent: bool = False

    @property
    def kind(self) -> tuple[str, bool, bool]:
        """All but the number of workers."""
        return self.platform, self.processes, self.equal_solvent

    @property
    def name(self) -> str:
        """The candidate in a few words."""
        words = f"{self.platform} x {self.n_workers}" + (" processes" if self.processes else "")
        return words + (" with GBSAOBCForce" if self.equal_solvent else "")


@dataclass(frozen=True)
class Tuning:
    """Report of `tune`: every candidate, threads before processes and the twin, the chosen one, and whether an earlier
    tuning chose it.
    """

    rows: tuple[TuningRow, ...]
    chosen: TuningRow
    seconds: float
    kept: bool = False

    def __str__(self) -> str:
        n = self.chosen.n_workers
        where = (
            "a torch twin of the System on the GPU"
            if self.chosen.platform == TWIN_ON_GPU
            else f"{n} thread(s) of a torch twin of the System"
            if self.chosen.platform == TWIN
            else f"{n} process(es) with a Context each on {self.chosen.platform}"
            if self.chosen.processes
            else f"{n} Context(s) on {self.chosen.platform}"
        )
        if self.chosen.equal_solvent:
            where += " with GBSAOBCForce in the place of the equal CustomGBForce"
        what = f"Energies run in {where}, {self.chosen.frames_per_second:.3g} frames/s"
        if self.kept:
            return f"{what}, as an earlier full tuning of this System on this machine found."
        others = ", ".join(
            f"{row.name}: " + (row.note if row.frames_per_second is None else f"{row.frames_per_second:.3g}")
            for row in self.rows
            if row is not self.chosen
        )
        return what + (f" (others: {others})" if others else "") + f", found in {self.seconds:.1f} s."


def surely_fastest(rows: Iterable[TuningRow], chosen: TuningRow, share: float) -> bool:
    """Whether a candidate is fastest of its kind, whatever other load on the machine did to the timing.

    A candidate that got a share of the processor may be up to 1 / share times faster without the other load, which may
    have come and gone between one candidate and the next. Numbers of workers of one kind are not told apart so: load
    slows them alike, up to the number itself.

    Parameters
    ----------
    rows, chosen
        All candidates, and the fastest.
    share
        Least share of a core that a thread with work at all times got, 1 if it got all of it.
    """
    if share >= FREE:
        return True
    bound = share * (chosen.frames_per_second or 0.0)
    rivals = [row for row in rows if row.kind != chosen.kind]
    return not any((row.frames_per_second or 0.0) >= bound or row.note == NO_TIME for row in rivals)
