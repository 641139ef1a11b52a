"""The configuration: what it accepts, and the one sentence it gives otherwise."""

from __future__ import annotations

import pytest

from openmm_bg.errors import InputError
from openmm_bg.training import LossWeights, Stage, TrainingConfig

GOOD = """
seed: 3
batch_size: 128
flow: {n_backbone_blocks: 2, hidden: 32}
stages:
  - {name: nll, losses: {nll: 1}, epochs: 2.5, learning_rate: 1e-3}
  - {name: buffer, losses: {buffer: 1}, seconds: 240, schedule: constant}
"""


def test_yaml_round_trip(tmp_path):
    path = tmp_path / "training.yaml"
    path.write_text(GOOD)
    config = TrainingConfig.load(path)
    assert config.seed == 3 and config.stages[0].learning_rate == 1e-3 and config.flow.hidden == 32
    path.write_text(config.to_yaml())
    assert TrainingConfig.load(path) == config
    assert TrainingConfig.load(config.model_dump()) == config
    assert TrainingConfig.load(config) is config


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 3", "sede: 3", "sede: no such key"),
        ("hidden: 32", "hiden: 32", "flow.hiden: no such key"),
        ("epochs: 2.5", "epochs: 0", "epochs"),
        ("epochs: 2.5, ", "", "duration"),
        ("{nll: 1}", "{nll: -1}", "nll"),
        ("{nll: 1}", "{nll: 0}", "no loss"),
        ("{nll: 1}", "{w3: 1}", "w3: no such key"),
        ("learning_rate: 1e-3", "learning_rate: .nan", "learning_rate"),
        ("name: buffer", "name: nll", "share a name"),
        ("seed: 3", "validation_fraction: 1.5", "validation_fraction"),
        ("seed: 3", "buffer: {fresh_share: 0.9}", "fresh_share"),
        ("seed: 3", "stages: 3", "stages"),
        ("seed: 3", "energy_maximum: 5", "energy_maximum"),
    ],
)
def test_nonsense_is_one_sentence(tmp_path, old, new, words):
    path = tmp_path / "training.yaml"
    text = GOOD.replace(old, new)
    if new.startswith("stages"):
        text = new
    assert text != GOOD
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        TrainingConfig.load(path)
    message = str(caught.value)
    assert words in message and str(path) in message
    assert "\n" not in message and message.endswith(".") and "pydantic" not in message


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_unusable_files(tmp_path, text):
    path = tmp_path / "training.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"training\.yaml"):
        TrainingConfig.load(path)
    with pytest.raises(InputError, match=r"absent\.yaml"):
        TrainingConfig.load(tmp_path / "absent.yaml")


def test_python_objects_are_checked_too():
    with pytest.raises(InputError, match="duration"):
        Stage(name="a", losses=LossWeights(nll=1.0))
    with pytest.raises(InputError, match="keep_best"):
        TrainingConfig(
            validation_fraction=0.0,
            stages=[Stage(name="a", losses=LossWeights(nll=1.0), steps=1, keep_best=True)],
        )


def test_the_paper_preset_has_the_curriculum_of_the_paper():
    stages = TrainingConfig.preset("paper").stages
    one, two, three, four = (stage.losses for stage in stages[:4])
    assert set(one.active()) == {"nll"}
    assert set(two.active()) == {"nll", "w2"}
    assert set(three.active()) == {"nll", "w2", "kl"} and three.w2 < two.w2
    assert set(four.active()) == {"nll", "kl"} and four.kl > three.kl
    assert [stage.epochs for stage in stages[:4]] == [200, 50, 20, 10]
    assert [set(stage.losses.active()) for stage in stages[4:]] == [{"buffer"}]


def test_the_protein_preset_takes_an_hour_and_never_leaves_w2_out_again():
    stages = TrainingConfig.preset("protein").stages
    assert [set(stage.losses.active()) for stage in stages] == [{"nll"}, {"nll", "w2"}, {"nll", "w2", "kl"}]
    assert sum(stage.seconds for stage in stages) == 3600.0
    assert stages[2].sample_batch < stages[1].sample_batch  # energies are what costs


def test_presets_that_exist():
    assert TrainingConfig.preset("cpu").stages[0].keep_best
    with pytest.raises(InputError, match="preset"):
        TrainingConfig.preset("gpu")  # type: ignore[arg-type]
