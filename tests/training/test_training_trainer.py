"""The training loop: it learns, resumes bit for bit, stops cleanly and refuses early."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
from typing import ClassVar

import pytest
import torch

from openmm_bg.errors import CheckpointError, EnergyError, InputError
from openmm_bg.training import Dataset, LossWeights, Stage, Trainer, TrainingDiverged, TrainingInterrupted
from openmm_bg.training import trainer as trainer_module


def _stages(steps=12, keep_best=False):
    """Every loss, dropout, the buffer, and changes of stage."""
    return [
        Stage(name="nll", losses=LossWeights(nll=1), steps=steps, warmup_steps=3, keep_best=keep_best),
        Stage(name="w2+kl", losses=LossWeights(nll=1, w2=0.3, kl=0.1), steps=steps, warmup_steps=0),
        Stage(name="buffer", losses=LossWeights(buffer=1), steps=steps, schedule="constant"),
        Stage(
            name="path", losses=LossWeights(nll=0.5, path=0.5), steps=steps, path_samples="buffer",
            learning_rate=1e-4,
        ),
    ]  # fmt: skip


def _trainer(kit, data, config, directory=None, **changes):
    # Attention, for its dropout; few blocks, for speed.
    flow = kit.small_flow(conditioner="attention", n_backbone_blocks=0, d_model=8, d_key=4, d_value=8, linear="spline")
    options = {"target": kit.TorsionTarget(), "backbone_atoms": [0, 1, 2], "progress": False, **changes}
    return Trainer(flow, data, config, directory=directory, **options)


def _curve(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


class _Killed(Exception):
    pass


def _kill_at(trainer, step):
    """Let the process 'die' in the middle of that step: nothing of the step may matter afterwards."""
    real = trainer._update_average

    def dying():
        if trainer.step == step:
            raise _Killed
        real()

    trainer._update_average = dying


def test_resume_is_bit_for_bit(kit, tmp_path):
    data = kit.torsion_data(400)
    config = kit.small_config(_stages(6, keep_best=True), checkpoint_every=4, validate_every=3)
    whole = _trainer(kit, data, config)
    rows = whole.run()
    assert len(rows) == 24 and all(math.isfinite(row["loss"]) for row in rows)
    assert any(row["ess"] for row in rows) and any(row["validation_nll"] for row in rows)

    for kill in (3, 10, 14, 22):  # one in each stage, none just after a checkpoint
        broken = _trainer(kit, data, config, tmp_path / str(kill))
        _kill_at(broken, kill)
        with pytest.raises(_Killed):
            broken.run()
        resumed = _trainer(kit, data, config, tmp_path / str(kill))
        torch.rand(7)  # the process that resumes has another history of random numbers
        assert _curve(resumed.run(resume=True)) == _curve(rows)
        for (name, a), b in zip(whole.density.state_dict().items(), resumed.density.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        assert (tmp_path / str(kill) / "losses.csv").read_text().count("\n") == 25


def test_other_randomness_changes_the_curve(kit):
    # The companion of the test above: its equality is not that of constants.
    data = kit.torsion_data(400)
    one = _trainer(kit, data, kit.small_config(_stages(6))).run()
    two = _trainer(kit, data, kit.small_config(_stages(6), seed=1)).run()
    assert all(a["loss"] != b["loss"] for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("lost", ["rng.torch", "optimizer", "objective.sampler", "objective.generator", "ema."])
def test_every_part_of_the_state_matters(kit, tmp_path, monkeypatch, lost):
    """Without any one part of the checkpoint the curve differs: the equality test can fail."""
    data = kit.torsion_data(300)
    config = kit.small_config(_stages(6)[2:], checkpoint_every=3)
    rows = _trainer(kit, data, config).run()
    broken = _trainer(kit, data, config, tmp_path)
    _kill_at(broken, 4)
    with pytest.raises(_Killed):
        broken.run()
    resumed = _trainer(kit, data, config, tmp_path)
    load = trainer_module.checkpoint.load

    def spoiled(directory):
        step, tensors, meta = load(directory)
        for name, value in tensors.items():
            if name.startswith(lost):
                if value.dtype == torch.uint8:
                    tensors[name] = torch.Generator().manual_seed(123).get_state()
                else:
                    tensors[name] = value + 0.05 * torch.ones_like(value)
        return step, tensors, meta

    monkeypatch.setattr(trainer_module.checkpoint, "load", spoiled)
    assert _curve(resumed.run(resume=True)) != _curve(rows)


def test_training_learns_and_leaves_averaged_weights_in_eval_mode(kit):
    data = kit.torsion_data(2000)
    stages = [
        Stage(name="nll", losses=LossWeights(nll=1), steps=150, learning_rate=1e-2, warmup_steps=10),
        Stage(name="buffer", losses=LossWeights(buffer=1), steps=50, learning_rate=1e-3),
    ]
    flow = kit.small_flow()
    unseen = kit.torsion_data(2000, seed=1).y
    first = -float(flow.log_prob(unseen).mean())
    state = torch.get_rng_state()
    trainer = Trainer(flow, data, kit.small_config(stages), target=kit.TorsionTarget(), progress=False)
    rows = trainer.run()
    assert torch.equal(torch.get_rng_state(), state)  # the user's random numbers are theirs
    assert -float(flow.log_prob(unseen).mean()) < first - 0.05
    ess = [row["ess"] for row in rows if row["ess"] is not None]
    assert ess[-1] > 0.7
    assert not flow.training
    for a, b in zip(flow.parameters(), trainer.ema.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("loss", "samples"), [("kl", "data"), ("path", "data"), ("path", "flow"), ("path", "buffer")])
def test_energy_losses_reach_the_target(kit, loss, samples):
    torch.manual_seed(0)
    target = kit.GaussianTarget([1.0, -0.5], [0.5, 2.0])
    data = Dataset(target.mean + target.scale * torch.randn(500, 2, dtype=torch.float64))
    stage = Stage(
        name="energy", losses={loss: 1.0}, steps=300, learning_rate=0.03, warmup_steps=0, path_samples=samples
    )
    density = kit.AffineDensity(2)
    config = kit.small_config([stage], sample_batch=128, gradient_clip=None)
    Trainer(density, data, config, target=target, progress=False).run()
    assert torch.allclose(density.mean.double(), target.mean, atol=0.05)
    assert torch.allclose(density.log_scale.exp().double(), target.scale, rtol=0.05)


def test_a_stage_may_have_its_own_number_of_samples(kit):
    class Counting(kit.TorsionTarget):
        asked: ClassVar[list[int]] = []

        def log_density(self, y, s):
            self.asked.append(len(y))
            return super().log_density(y, s)

    own = Stage(name="own", losses={"kl": 1.0}, steps=2, sample_batch=7)
    others = Stage(name="others", losses={"kl": 1.0}, steps=2)
    target = Counting()
    trainer = Trainer(kit.small_flow(), kit.torsion_data(300), kit.small_config([own, others]), target=target)
    trainer.run()
    assert target.asked[-4:] == [7, 7, 32, 32]  # before them the reference energies of the frames


@pytest.mark.parametrize("weighting", ["resample", "loss"])
def test_weights_of_the_data_enter(kit, weighting):
    torch.manual_seed(0)
    y = torch.cat([torch.randn(300, 1) - 2, torch.randn(300, 1) + 2])[torch.randperm(600)]
    log_weights = torch.where(y[:, 0] > 0, 0.0, -math.inf)
    stage = Stage(name="nll", losses={"nll": 1.0}, steps=300, learning_rate=0.03, warmup_steps=0)
    density = kit.AffineDensity(1)
    config = kit.small_config([stage], weighting=weighting)
    Trainer(density, Dataset(y, log_weights=log_weights), config, progress=False).run()
    assert density.mean.item() == pytest.approx(float(y[y > 0].mean()), abs=0.2)


def test_w2_brings_distances_together(kit):
    torch.manual_seed(0)
    y = torch.randn(600, 2, dtype=torch.float64) * torch.tensor([0.3, 0.1]) + torch.tensor([2.0, 1.0])
    stage = Stage(name="w2", losses={"w2": 1.0}, steps=400, learning_rate=0.02, warmup_steps=0)
    density = kit.AffineDensity(2)
    with torch.no_grad():
        density.mean.fill_(1.5)
    trainer = Trainer(
        density, Dataset(y), kit.small_config([stage]), coordinates=kit.PlaneCoordinates(),
        backbone_atoms=[0, 1, 2], progress=False,
    )  # fmt: skip
    rows = trainer.run()
    assert rows[0]["w2"] > 10 * trainer.baselines["w2"] > 0
    assert rows[-1]["w2"] < 5 * trainer.baselines["w2"]
    assert torch.allclose(density.mean.double(), torch.tensor([2.0, 1.0], dtype=torch.float64), atol=0.1)


def test_positions_given_and_rebuilt_agree(kit):
    torch.manual_seed(0)
    y = torch.rand(300, 2, dtype=torch.float64) + 1
    coordinates = kit.PlaneCoordinates()
    stage = Stage(name="w2", losses={"w2": 1.0}, steps=3)
    baselines = []
    for positions in (None, coordinates.to_positions(y, y[:, :0])):
        trainer = Trainer(
            kit.AffineDensity(2), Dataset(y, positions=positions),
            kit.small_config([stage], precision="float64"),
            coordinates=coordinates, backbone_atoms=[0, 1, 2], progress=False,
        )  # fmt: skip
        trainer.run()
        baselines.append(trainer.baselines["w2"])
    assert baselines[0] == pytest.approx(baselines[1], rel=1e-10)


def test_keep_best_restores_the_lowest_validation(kit):
    data = kit.torsion_data(60)  # few frames: it overfits
    stage = Stage(name="nll", losses={"nll": 1}, steps=200, learning_rate=2e-2, schedule="constant", keep_best=True)
    config = kit.small_config([stage], validation_fraction=0.5, gradient_clip=None)
    flow = kit.small_flow()
    trainer = Trainer(flow, data, config, progress=False)
    rows = trainer.run()
    values = [row["validation_nll"] for row in rows if row["validation_nll"] is not None]
    assert values[-1] > min(values) + 0.05
    y, _ = trainer._validation
    assert -flow.log_prob(y).double().mean().item() == pytest.approx(min(values), abs=1e-6)
    flow.load_state_dict(trainer.best.last)
    assert -flow.log_prob(y).double().mean().item() == pytest.approx(values[-1], abs=1e-6)


def test_the_last_weights_of_a_stage_that_kept_its_best_are_in_its_checkpoint(kit, tmp_path):
    data = kit.torsion_data(60)
    stage = {"losses": {"nll": 1}, "steps": 60, "learning_rate": 2e-2, "schedule": "constant"}
    config = kit.small_config([Stage(name="a", keep_best=True, **stage)], validation_fraction=0.5)
    first = Trainer(kit.small_flow(), data, config, directory=tmp_path, progress=False)
    first.run()
    again = Trainer(kit.small_flow(), data, config, directory=tmp_path, progress=False)
    again.run(resume=True)
    assert again.best.last.keys() == first.density.state_dict().keys()
    for name, weights in again.best.last.items():
        assert torch.equal(weights, first.best.last[name])
    assert any(not torch.equal(weights, first.density.state_dict()[n]) for n, weights in again.best.last.items())
    plain = config.model_copy(update={"stages": [*config.stages, Stage(name="b", **stage)]})
    longer = Trainer(kit.small_flow(), data, plain, directory=tmp_path, progress=False)
    longer.run(resume=True)
    assert longer.best.last == {}


def test_learning_rate_and_lengths(kit):
    data = kit.torsion_data(200)
    stages = [
        Stage(name="a", losses={"nll": 1}, epochs=2.5, learning_rate=0.1, warmup_steps=4, final_fraction=0.1),
        Stage(
            name="b",
            losses={"nll": 1},
            steps=5,
            epochs=100,
            learning_rate=0.2,
            schedule="constant",
            warmup_steps=0,
        ),
    ]
    trainer = Trainer(kit.AffineDensity(3), data, kit.small_config(stages, batch_size=20), progress=False)
    rows = trainer.run()
    rates = [row["learning_rate"] for row in rows if row["stage"] == "a"]
    assert len(rates) == math.ceil(2.5 * 180 / 20)
    assert rates[0] == pytest.approx(0.1 / 4) and max(rates) <= 0.1
    assert rates[-1] == pytest.approx(0.1 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 23))))
    assert [row["learning_rate"] for row in rows if row["stage"] == "b"] == [0.2] * 5


def test_seconds_count_only_time_trained(kit, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: float(next(clock)))
    data = kit.torsion_data(200)
    config = kit.small_config([Stage(name="a", losses={"nll": 1}, seconds=10)], checkpoint_every=3)
    broken = Trainer(kit.AffineDensity(3), data, config, directory=tmp_path, progress=False)
    _kill_at(broken, 7)
    with pytest.raises(_Killed):
        broken.run()
    resumed = Trainer(kit.AffineDensity(3), data, config, directory=tmp_path, progress=False)
    rows = resumed.run(resume=True)
    assert len(rows) == 10 and rows[-1]["seconds"] == 10.0  # a step lasts one tick of this clock


def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(kit, tmp_path):
    data = kit.torsion_data(300)
    config = kit.small_config(_stages(8))
    rows = _trainer(kit, data, config).run()
    trainer = _trainer(kit, data, config, tmp_path)
    step = trainer._train_step

    def interrupted(stage, fraction):
        if trainer.step == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return step(stage, fraction)

    trainer._train_step = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"step 11; .* holds step 11"):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert not trainer.density.training
    assert _curve(_trainer(kit, data, config, tmp_path).run(resume=True)) == _curve(rows)


def test_keyboard_interrupt_in_a_step_keeps_the_last_checkpoint(kit, tmp_path):
    data = kit.torsion_data(300)
    config = kit.small_config(_stages(8), checkpoint_every=4)
    trainer = _trainer(kit, data, config, tmp_path)
    real = trainer._update_average

    def interrupted():
        if trainer.step == 6:
            raise KeyboardInterrupt
        real()

    trainer._update_average = interrupted
    with pytest.raises(TrainingInterrupted, match="holds step 4"):
        trainer.run()
    rows = _trainer(kit, data, config).run()
    assert _curve(_trainer(kit, data, config, tmp_path).run(resume=True)) == _curve(rows)


def test_bad_steps_are_skipped_and_counted_and_end_the_run(kit):
    class Sometimes(kit.AffineDensity):
        calls = 0
        bad = frozenset({3, 4})

        def log_prob(self, y):
            value = super().log_prob(y)
            if self.training:
                Sometimes.calls += 1
                if Sometimes.calls in self.bad:
                    value = value * math.nan
            return value

    data = kit.torsion_data(200)
    config = kit.small_config([Stage(name="a", losses={"nll": 1}, steps=8)], max_bad_steps=3)
    flow = Sometimes(3)
    rows = Trainer(flow, data, config, progress=False).run()
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    Sometimes.calls, Sometimes.bad = 0, frozenset({3, 4, 5})
    with pytest.raises(TrainingDiverged, match="no finite loss in 3 steps"):
        Trainer(Sometimes(3), data, config, progress=False).run()


@pytest.mark.parametrize("limit", [2.0, None])
def test_each_loss_is_clipped_before_its_weight(kit, limit):
    """A loss with a gradient ten thousand times larger has the share that its weight gives it, and no more."""
    trainer = _trainer(kit, kit.torsion_data(400), kit.small_config(_stages(), gradient_clip=limit))
    one, other = trainer._parameters[0], trainer._parameters[1]
    generator = torch.Generator().manual_seed(3)
    small, large = (torch.randn(one.shape, generator=generator) for _ in range(2))
    third = torch.randn(other.shape, generator=generator)
    # the samples of reverse KL and W2 are the same: two of the three share a part of their graph
    shared = (one * large).sum()
    terms = {
        "nll": (one * small).sum(),
        "kl": 1e4 * shared + (other * third).sum(),
        "w2": shared.square(),
    }
    trainer.objective.terms = lambda stage: (terms, {"dropped": torch.tensor(0)})
    stage = Stage(name="clipped", losses={"nll": 1.0, "kl": 0.25, "w2": 2.0}, steps=1)
    norm = trainer._gradient_step.take(stage, 0, 0)["gradient_norm"]

    def clipped(*parts):
        size = torch.cat([part.flatten() for part in parts]).norm()
        return [part * (1.0 if limit is None else min(1.0, limit / float(size))) for part in parts]

    second = clipped(1e4 * large, third)
    expected = clipped(small)[0] + 0.25 * second[0] + 2.0 * clipped(2.0 * shared.detach() * large)[0]
    torch.testing.assert_close(one.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.grad, 0.25 * second[1], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in trainer._parameters[2:])
    total = torch.cat([one.grad.flatten(), other.grad.flatten()]).norm()
    assert norm == pytest.approx(float(total), rel=1e-5)


def test_dropped_samples_are_counted(kit):
    target = kit.GaussianTarget([0.0, 0.0], [1.0, 1.0], wall=0.5)
    y = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = Dataset(y[y[:, 0] < 0.5][:500])
    config = kit.small_config([Stage(name="a", losses={"kl": 1}, steps=5)])
    rows = Trainer(kit.AffineDensity(2), data, config, target=target, progress=False).run()
    assert 0 < sum(row["dropped"] for row in rows) < 5 * 32


def test_refusals_come_first(kit, tmp_path):
    data, target = kit.torsion_data(200), kit.TorsionTarget()

    def make(losses, dataset=data, density=None, **options):
        config = kit.small_config([Stage(name="late", losses=losses, steps=2)])
        options.setdefault("progress", False)
        return Trainer(density or kit.AffineDensity(3), dataset, config, **options)

    for losses in ({"kl": 1}, {"buffer": 1}, {"path": 1}):
        with pytest.raises(InputError, match="'late' trains by energy"):
            make(losses)
    with pytest.raises(InputError, match="no coordinates"):
        make({"w2": 1})
    with pytest.raises(InputError, match="backbone_atoms"):
        make({"w2": 1}, target=target)
    with pytest.raises(InputError, match="needs 128 training frames"):
        make({"w2": 1}, kit.torsion_data(100), target=target, backbone_atoms=[0, 1])
    with pytest.raises(InputError, match="models 2 coordinates"):
        make({"nll": 1}, density=kit.AffineDensity(2))

    class Nowhere:
        def log_density(self, y, s):
            return torch.full_like(y[:, 0], -math.inf)

    with pytest.raises(EnergyError, match="180 of 180"):
        make({"kl": 1}, target=Nowhere()).run()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Cannot create"):
        make({"nll": 1}, directory=tmp_path / "file" / "below").run()


def test_a_directory_is_not_overwritten_and_resumes_only_its_own(kit, tmp_path):
    data = kit.torsion_data(200)
    config = kit.small_config([Stage(name="a", losses={"nll": 1}, steps=3)])

    def make(data=data, config=config):
        return Trainer(kit.AffineDensity(3), data, config, directory=tmp_path, progress=False)

    make().run(resume=True)  # nothing to resume: begins
    with pytest.raises(InputError, match="already holds a checkpoint"):
        make().run()
    assert len(make().run(resume=True)) == 3  # finished: nothing more to do
    with pytest.raises(InputError, match="other data"):
        make(kit.torsion_data(200, seed=1)).run(resume=True)
    with pytest.raises(InputError, match="another value of batch_size"):
        make(config=config.model_copy(update={"batch_size": 32})).run(resume=True)
    with pytest.raises(InputError, match="another value of stages"):
        make(config=config.model_copy(update={"stages": [Stage(name="b", losses={"nll": 1}, steps=3)]})).run(
            resume=True
        )
    longer = [*config.stages, Stage(name="b", losses={"nll": 1}, steps=2)]
    assert len(make(config=config.model_copy(update={"stages": longer})).run(resume=True)) == 5


def test_checkpoint_failure_stops_with_the_previous_one_intact(kit, tmp_path, monkeypatch):
    data = kit.torsion_data(200)
    config = kit.small_config([Stage(name="a", losses={"nll": 1}, steps=9)], checkpoint_every=2)
    rows = Trainer(kit.AffineDensity(3), data, config, progress=False).run()
    trainer = Trainer(kit.AffineDensity(3), data, config, directory=tmp_path, progress=False)
    real = os.fsync

    def full(descriptor):
        if trainer.step == 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.run()
    monkeypatch.undo()
    resumed = Trainer(kit.AffineDensity(3), data, config, directory=tmp_path, progress=False)
    assert _curve(resumed.run(resume=True)) == _curve(rows)


def test_without_average_the_plain_weights_stay(kit):
    data = kit.torsion_data(200)
    config = kit.small_config([Stage(name="a", losses={"nll": 1}, steps=5)], ema_decay=0.0)
    trainer = Trainer(kit.AffineDensity(3), data, config, progress=False)
    trainer.run()
    assert trainer.ema is None and not trainer.density.training


def test_progress_shows_stage_and_figures(kit, capsys):
    data = kit.torsion_data(300)
    config = kit.small_config([Stage(name="resampled", losses={"buffer": 1}, steps=12)])
    Trainer(kit.AffineDensity(3), data, config, target=kit.TorsionTarget()).run()
    shown = capsys.readouterr().err
    assert "resampled" in shown and "100%" in shown and "ess=" in shown and "val=" in shown


def test_training_does_not_alter_the_data(kit):
    data = kit.torsion_data(200)
    y = copy.deepcopy(data.y)
    Trainer(
        kit.AffineDensity(3),
        data,
        kit.small_config([Stage(name="a", losses={"nll": 1}, steps=3)]),
        progress=False,
    ).run()
    assert torch.equal(data.y, y)
