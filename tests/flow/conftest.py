"""Layouts and parameter noise shared by the tests of the flow room."""

import math

import pytest
import torch

from openmm_bg.flow import FeatureLayout


def _make_layout(kinds: str, fold: int = 1, kappa: float = 0.0) -> FeatureLayout:
    """One letter per coordinate: l/L linear, c/C circular (upper case: backbone)."""
    circular = [k in "cC" for k in kinds]
    return FeatureLayout(
        circular=circular,
        backbone=[k.isupper() for k in kinds],
        fold=[fold if c else 1 for c in circular],
        concentration=[kappa if c else 0.0 for c in circular],
        shift=[0.7 * math.sin(1.0 + 2.3 * i) * (3.0 if c else 1.0) for i, c in enumerate(circular)],
        scale=[1.0 if c else 0.3 + 0.2 * (i % 3) for i, c in enumerate(circular)],
    )


def _perturb(module: torch.nn.Module, size: float = 0.3, seed: int = 1) -> torch.nn.Module:
    """Random numbers added to every parameter, so that no map is the identity; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_((size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype))
    return module.eval()


@pytest.fixture(scope="session")
def make_layout():
    return _make_layout


@pytest.fixture(scope="session")
def perturb():
    return _perturb


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20240108)
