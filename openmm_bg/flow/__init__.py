"""Normalizing flows over internal coordinates: pure PyTorch, scriptable, without OpenMM."""

from openmm_bg.flow.build import build_flow, count_parameters, matched_baseline
from openmm_bg.flow.config import FlowConfig
from openmm_bg.flow.density import FlowDensity
from openmm_bg.flow.layout import FeatureLayout

__all__ = ["FeatureLayout", "FlowConfig", "FlowDensity", "build_flow", "count_parameters", "matched_baseline"]
