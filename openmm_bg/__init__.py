"""Boltzmann generators for OpenMM: normalizing flows as an exact sampler.

>>> import openmm_bg as bg
>>> model = bg.load_alanine_dipeptide()
>>> model.flow.coordinates.n_atoms
22

The public names are imported when first used, so that ``import openmm_bg`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_bg import free_energy
    from openmm_bg.analysis.evaluate import evaluate
    from openmm_bg.artifact import Flow, load
    from openmm_bg.data import load_alanine_dipeptide
    from openmm_bg.ensemble import Ensemble
    from openmm_bg.force import FlowForce
    from openmm_bg.moves.cartesian import CartesianNonequilibriumMove
    from openmm_bg.moves.latent import LatentMove
    from openmm_bg.moves.reporters import MoveReporter
    from openmm_bg.moves.switching import NonequilibriumMove
    from openmm_bg.sampler import BoltzmannGeneratorSampler
    from openmm_bg.training.config import TrainingConfig
    from openmm_bg.training.run import train

_PUBLIC = {
    "BoltzmannGeneratorSampler": "openmm_bg.sampler",
    "CartesianNonequilibriumMove": "openmm_bg.moves",
    "Ensemble": "openmm_bg.ensemble",
    "Flow": "openmm_bg.artifact",
    "FlowForce": "openmm_bg.force",
    "LatentMove": "openmm_bg.moves",
    "MoveReporter": "openmm_bg.moves",
    "NonequilibriumMove": "openmm_bg.moves",
    "TrainingConfig": "openmm_bg.training.config",
    "evaluate": "openmm_bg.analysis.evaluate",
    "load": "openmm_bg.artifact",
    "load_alanine_dipeptide": "openmm_bg.data",
    "train": "openmm_bg.training.run",
}
_MODULES = ("free_energy",)

__all__ = [
    "BoltzmannGeneratorSampler",
    "CartesianNonequilibriumMove",
    "Ensemble",
    "Flow",
    "FlowForce",
    "LatentMove",
    "MoveReporter",
    "NonequilibriumMove",
    "TrainingConfig",
    "evaluate",
    "free_energy",
    "load",
    "load_alanine_dipeptide",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"openmm_bg.{name}")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'openmm_bg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
