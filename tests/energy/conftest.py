"""Systems for the energy tests: alanine dipeptide in vacuum, and a small molecule whose energy is known."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_bg.energy import choices, twin_workers

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
def context(make_context: MakeContext) -> openmm.Context:
    """Five charged particles in implicit solvent, and a spring of strength ``k`` between two of them."""
    system, nonbonded, gbsa = openmm.System(), openmm.NonbondedForce(), openmm.GBSAOBCForce()
    spring = openmm.CustomBondForce("k*(r-0.1)^2")
    spring.addGlobalParameter("k", 100.0)
    spring.addBond(0, 1, [])
    i = np.arange(5)
    for sign in (-1) ** i:
        system.addParticle(12.0)
        nonbonded.addParticle(0.3 * sign, 0.1, 0.3)
        gbsa.addParticle(0.3 * sign, 0.15, 0.8)
    for force in (nonbonded, gbsa, spring):
        system.addForce(force)
    return make_context("Reference", system, np.stack((0.12 * i, 0.1 * (i % 2), 0.03 * (i % 3)), axis=1))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU in the place of a GPU; what it is called may be changed."""
    name = ["A card"]
    monkeypatch.setattr(twin_workers, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(choices, "gpu_name", lambda: name[0])
    return name


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
