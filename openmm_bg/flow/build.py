"""From a layout and a configuration to a flow."""

import math

import torch
from torch import nn

from openmm_bg.errors import InputError
from openmm_bg.flow.config import FlowConfig
from openmm_bg.flow.density import FlowDensity
from openmm_bg.flow.layout import FeatureLayout
from openmm_bg.flow.nsf import NSF
from openmm_bg.flow.split import SplitFlow


def build_flow(layout: FeatureLayout, config: FlowConfig, seed: int = 0) -> FlowDensity:
    """A flow over the coordinates of `layout`, which starts as its (shifted, scaled) base density.

    Parameters
    ----------
    layout
        The D coordinates.
    config
        The architecture.
    seed
        Of masks, phase shifts and initial weights; torch's global generator is left as it was.

    Returns
    -------
    FlowDensity
        In training mode, float32 networks.

    Raises
    ------
    InputError
        If the layout is empty.
    """
    if layout.n == 0:
        raise InputError("The FeatureLayout has no coordinates: choose a representation that models one.")
    # The density hands linear features over first.
    features = sorted(range(layout.n), key=lambda i: layout.circular[i])
    fold = [layout.fold[i] if layout.circular[i] else 0 for i in features]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner: nn.Module
        if config.split:
            inner = SplitFlow(fold, [layout.backbone[i] for i in features], features, config)
        else:
            inner = NSF(fold, features, config)
        return FlowDensity(layout, inner)


def matched_baseline(layout: FeatureLayout, config: FlowConfig) -> FlowConfig:
    """The "nsf" preset with the hidden width that gives it about as many parameters as `config`.

    Comparisons with the baseline are fair at a similar number of parameters only.
    """
    wanted = count_parameters(build_flow(layout, config))
    # The size is a quadratic in the width: three small flows determine it.
    one, two, three = (
        count_parameters(build_flow(layout, FlowConfig.preset("nsf", hidden=width))) for width in (1, 2, 3)
    )
    a = (three - 2 * two + one) / 2
    b = two - one - 3 * a
    c = one - a - b
    width = (math.sqrt(max(b * b + 4 * a * (wanted - c), 0.0)) - b) / (2 * a)
    return FlowConfig.preset("nsf", hidden=max(1, round(width)))


def count_parameters(flow: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in flow.parameters() if p.requires_grad)
