"""The shipped artifact as a file, and Contexts on the Reference platform."""

import pytest
import torch  # noqa: F401  (before openmm)
from openmmtools import cache

import openmm  # isort: skip


@pytest.fixture(scope="session")
def artifact(dipeptide, tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "adp.bg"
    dipeptide.flow.save(path)
    return path


@pytest.fixture
def contexts():
    return cache.ContextCache(platform=openmm.Platform.getPlatformByName("Reference"))
