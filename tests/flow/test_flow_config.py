"""The configuration: presets, validation, round trip."""

import pytest
from pydantic import ValidationError

from openmm_bg.errors import InputError
from openmm_bg.flow import FlowConfig, build_flow, count_parameters, matched_baseline


@pytest.mark.parametrize("name", ["paper", "cpu", "protein", "nsf"])
def test_presets_round_trip_through_json(name):
    config = FlowConfig.preset(name, n_bins=6)
    assert config.n_bins == 6
    assert FlowConfig.model_validate_json(config.model_dump_json()) == config


def test_presets_say_what_the_paper_says():
    paper = FlowConfig.preset("paper")
    assert (paper.n_backbone_blocks, paper.n_joint_blocks) == (48, 10)
    assert (paper.conditioner, paper.linear, paper.n_bins) == ("attention", "spline", 8)
    assert (paper.d_key, paper.d_value, paper.dropout) == (32, 64, 0.1)
    nsf = FlowConfig.preset("nsf")
    assert (nsf.split, nsf.n_joint_blocks, nsf.conditioner) == (False, 58, "mlp")


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_layers": 3},
        {"conditioner": "cnn"},
        {"n_backbone_blocks": 1},
        {"n_joint_blocks": 0},
        {"split": False, "n_backbone_blocks": 4},
        {"d_key": 31},
        {"dropout": 1.0},
        {"n_bins": 1},
        {"bound": float("inf")},
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValidationError):
        FlowConfig(**wrong)


def test_unknown_preset():
    with pytest.raises(InputError, match="cpu, nsf, paper"):
        FlowConfig.preset("gpu")


def test_baseline_has_a_similar_number_of_parameters(make_layout):
    layout = make_layout("LCLClclc" * 3)
    config = FlowConfig(n_backbone_blocks=12, n_joint_blocks=6, hidden=100)
    wanted = count_parameters(build_flow(layout, config))
    got = count_parameters(build_flow(layout, matched_baseline(layout, config)))
    assert abs(got / wanted - 1.0) < 0.05
