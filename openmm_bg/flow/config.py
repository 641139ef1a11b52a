"""What a flow is made of, as one validated and serialisable object."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openmm_bg.errors import InputError

PRESETS: dict[str, dict[str, Any]] = {
    # Kim et al. (2024): 48 + 10 gated attention blocks, rational-quadratic splines everywhere.
    "paper": {
        "n_backbone_blocks": 48,
        "n_joint_blocks": 10,
        "conditioner": "attention",
        "linear": "spline",
    },
    # A small peptide gains nothing from a stack of its backbone alone: the joint blocks couple everything at once.
    "cpu": {
        "n_backbone_blocks": 0,
        "n_joint_blocks": 10,
        "conditioner": "gated",
        "hidden": 96,
        "n_hidden": 2,
        "linear": "affine",
    },
    # The split at a size for CPUs, over the reduced coordinates of a protein: some thousand frames of MD fit no more.
    "protein": {
        "n_backbone_blocks": 8,
        "n_joint_blocks": 4,
        "conditioner": "gated",
        "hidden": 16,
        "n_hidden": 1,
        "linear": "affine",
    },
    # The paper's baseline: as many layers, no split, no attention.
    "nsf": {
        "split": False,
        "n_backbone_blocks": 0,
        "n_joint_blocks": 58,
        "conditioner": "mlp",
        "hidden": 128,
        "n_hidden": 2,
        "linear": "spline",
    },
}


class FlowConfig(BaseModel):
    """Architecture of the flow.

    Attributes
    ----------
    split
        True: `SplitFlow`; False: `NSF`, all of whose layers are joint.
    n_backbone_blocks, n_joint_blocks
        Coupling layers of either stack. One layer transforms half of its features only, so a stack has two or
        more; the backbone stack may be empty.
    conditioner
        Network that conditions a coupling layer: gated attention, a residual perceptron ("mlp"), or one of gated
        linear units ("gated").
    d_model, d_key, d_value, dropout, n_units
        Attention: widths of tokens, of Q and K, of V and U; dropout in training; attention units per block.
    hidden, n_hidden
        "mlp" and "gated": width and number of residual layers.
    n_bins
        Bins K of every spline.
    linear
        Map of the linear features: "spline", "affine", or "mixed", which is affine but for the two layers
        nearest to the data on each channel's path. Circular features always pass splines.
    bound
        Linear splines act on [-bound, bound], in standard deviations.
    phase_shift
        Phase shifts of circular features: random and fixed, or learned.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: bool = True
    n_backbone_blocks: int = Field(4, ge=0)
    n_joint_blocks: int = Field(8, ge=2)
    conditioner: Literal["attention", "mlp", "gated"] = "mlp"
    d_model: int = Field(128, ge=1)
    d_key: int = Field(32, ge=2, multiple_of=2)
    d_value: int = Field(64, ge=1)
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    n_units: int = Field(1, ge=1)
    hidden: int = Field(256, ge=1)
    n_hidden: int = Field(2, ge=0)
    n_bins: int = Field(8, ge=2, le=256)
    linear: Literal["spline", "affine", "mixed"] = "mixed"
    bound: float = Field(5.0, gt=0.0, allow_inf_nan=False)
    phase_shift: Literal["random", "learned"] = "random"

    @model_validator(mode="after")
    def _check_blocks(self) -> FlowConfig:
        if self.n_backbone_blocks == 1:
            raise ValueError("n_backbone_blocks must be 0 or at least 2: one block bends half of the features.")
        if not self.split and self.n_backbone_blocks:
            raise ValueError("n_backbone_blocks must be 0 when split is false.")
        return self

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FlowConfig:
        """A named architecture ("paper", "cpu", "protein" or "nsf"), with single fields changed.

        Raises
        ------
        InputError
            If there is no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"There is no flow preset {name!r}: choose one of {', '.join(sorted(PRESETS))}.")
        return cls(**{**PRESETS[name], **changes})
