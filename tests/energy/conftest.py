"""Systems for the energy tests: alanine dipeptide in vacuum, and a small molecule whose energy is known."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg.energy import choices

import openmm  # isort: skip
from openmm import unit  # isort: skip

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


@pytest.fixture(scope="session")
def dipeptide() -> tuple[openmm.System, np.ndarray]:
    """System of alanine dipeptide in vacuum, and its positions [22, 3] nm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        from openmmtools.testsystems import AlanineDipeptideVacuum

        test = AlanineDipeptideVacuum()
        logging.disable(logging.NOTSET)
    return test.system, np.array(test.positions.value_in_unit(unit.nanometer))


@pytest.fixture(autouse=True)
def no_kept_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tests of timing do not take up what the user of this machine has tuned; where choices lie instead."""
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path)
    return tmp_path / "choices"


@pytest.fixture
def frames(dipeptide: tuple[openmm.System, np.ndarray]) -> np.ndarray:
    """Thirteen different frames [13, 22, 3] nm."""
    x = dipeptide[1]
    return x + np.random.default_rng(7).normal(scale=0.004, size=(13, *x.shape))


MakeContext = Callable[..., openmm.Context]


@pytest.fixture
def make_context(dipeptide: tuple[openmm.System, np.ndarray]) -> Iterator[MakeContext]:
    """Make a Context of alanine dipeptide (or of `system`) on a platform, positions set."""

    def make(
        platform: str = "Reference",
        system: openmm.System | None = None,
        positions: np.ndarray | None = None,
    ) -> openmm.Context:
        properties = {"Threads": "1"} if platform == "CPU" else {}
        context = openmm.Context(
            dipeptide[0] if system is None else system,
            openmm.VerletIntegrator(0.001),
            openmm.Platform.getPlatformByName(platform),
            properties,
        )
        context.setPositions(dipeptide[1] if positions is None else positions)
        return context

    yield make


@pytest.fixture
def pair() -> tuple[openmm.System, openmm.CustomBondForce, np.ndarray]:
    """Two particles, E = scale·k (r - 0.1)²/2 with the global parameter `scale`; positions 0.15 nm apart."""
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    force = openmm.CustomBondForce("0.5*scale*k*(r-0.1)^2")
    force.addGlobalParameter("scale", 1.0)
    force.addPerBondParameter("k")
    force.addBond(0, 1, [1000.0])
    system.addForce(force)
    return system, force, np.array([[0.0, 0.0, 0.0], [0.15, 0.0, 0.0]])


def pair_frames(lengths: list[float]) -> np.ndarray:
    """Frames [B, 2, 3] of two particles at these distances, nm."""
    frames = np.zeros((len(lengths), 2, 3))
    frames[:, 1, 0] = lengths
    return frames
