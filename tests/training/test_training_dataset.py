"""Data set, split and sampler."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.training.buffer import ResampledBuffer
from openmm_bg.training.dataset import Dataset, MinibatchSampler


def _frames(n=100):
    return Dataset(torch.arange(n, dtype=torch.float64)[:, None])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.empty(0, 3),), "at least one"),
        ((torch.zeros(5),), "shape"),
        ((torch.zeros(5, 2), torch.zeros(4, 1)), "s has shape"),
        ((torch.tensor([[0.0], [math.nan]]),), "frame 1"),
        ((torch.zeros(2, 1), torch.tensor([[0.0], [math.inf]])), "value of s"),
        ((torch.zeros(2, 1), None, torch.tensor([0.0, math.nan])), "log_weights"),
        ((torch.zeros(2, 1), None, torch.full((2,), -math.inf)), "weight zero"),
        ((torch.zeros(2, 1), None, None, torch.zeros(2, 3)), "positions"),
    ],
)
def test_bad_data_is_one_sentence(arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        Dataset(*arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_too_few_frames():
    with pytest.raises(InputError, match="needs 200 training frames and there are 100"):
        _frames().require(200, "w2 loss")
    with pytest.raises(InputError, match="cannot be split"):
        _frames(1).split(0.1)


def test_split_is_blocked_complete_and_deterministic():
    train, validation = _frames(1000).split(0.2, n_blocks=20, seed=4)
    assert validation is not None
    together = torch.cat([train.y, validation.y]).flatten().sort().values
    assert torch.equal(together, torch.arange(1000, dtype=torch.float64))
    assert len(validation) == 200
    held = validation.y.flatten().reshape(4, 50)
    assert (held.diff(dim=1) == 1).all()  # whole blocks of neighbouring frames
    assert torch.equal(validation.y, _frames(1000).split(0.2, 20, 4)[1].y)
    assert not torch.equal(validation.y, _frames(1000).split(0.2, 20, 5)[1].y)
    assert _frames().split(0.0)[1] is None


def test_sampler_covers_every_frame_once_per_epoch():
    sampler = MinibatchSampler(10, 4, seed=1)
    drawn = torch.cat([sampler.next() for _ in range(5)])
    assert torch.equal(drawn[:10].sort().values, torch.arange(10))
    assert torch.equal(drawn[10:].sort().values, torch.arange(10))
    assert not torch.equal(drawn[:10], drawn[10:])
    assert MinibatchSampler(3, 7).next().numel() == 7  # a batch larger than the data


@pytest.mark.parametrize("weighted", [False, True])
def test_sampler_state_continues_the_sequence(weighted):
    log_weights = torch.linspace(-1, 1, 10, dtype=torch.float64) if weighted else None
    a = MinibatchSampler(10, 4, log_weights=log_weights, seed=1)
    for _ in range(3):
        a.next()
    b = MinibatchSampler(10, 4, log_weights=log_weights, seed=99)
    b.load_state_dict(a.state_dict())
    for _ in range(6):
        assert torch.equal(a.next(), b.next())


@pytest.mark.statistical
def test_weighted_draws_follow_the_weights():
    log_weights = torch.tensor([0.0, 1.0, -math.inf, 2.0], dtype=torch.float64)
    n = 20_000
    counts = torch.bincount(MinibatchSampler(4, n, log_weights=log_weights, seed=2).next(), minlength=4)
    p = torch.softmax(log_weights, 0)
    error = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= 5 * error).all()
    assert counts[2] == 0
    assert ((counts - n / 4).abs() > 5 * error).any()  # unweighted draws would fail


def test_fingerprint_sees_changes():
    data = _frames()
    other = data.y.clone()
    other[50] += 1e-9
    assert data.fingerprint() == _frames().fingerprint() != Dataset(other).fingerprint()
    assert Dataset(data.y, log_weights=torch.zeros(100)).fingerprint() != data.fingerprint()


def test_buffer_is_first_in_first_out_and_drops_what_has_no_energy(kit):
    torch.manual_seed(0)
    density = kit.AffineDensity(2)
    target = kit.GaussianTarget([0.0, 0.0], [1.0, 1.0], wall=0.5)
    buffer = ResampledBuffer(2, gradients=True)
    s = torch.zeros(50, 0)
    dropped = []
    for _ in range(3):
        ess, n = buffer.refill(density, target, s)
        dropped.append(n)
        # The proposal is the target cut off at 0.5: the weights of the kept are equal.
        assert ess == pytest.approx(1 - n / 50)
    assert min(dropped) > 0 and len(buffer) == 100 - dropped[1] - dropped[2]
    batch = buffer.draw(500, torch.Generator().manual_seed(0))
    assert (batch.y[:, 0] < 0.5).all()
    assert torch.allclose(batch.log_w, torch.full((500,), math.log(2 * math.pi), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(batch.gradient, -batch.y)
    again = ResampledBuffer(2)
    again.load_state_dict(buffer.state_dict())
    other = again.draw(500, torch.Generator().manual_seed(0))
    assert torch.equal(batch.y, other.y) and torch.equal(batch.gradient, other.gradient)


def test_buffer_draws_without_dropout_and_leaves_the_mode(kit):
    class Noisy(kit.AffineDensity):
        def sample(self, n):
            assert not self.training
            return super().sample(n)

    density = Noisy(2).train()
    ResampledBuffer(1).refill(density, kit.GaussianTarget([0.0, 0.0], [1.0, 1.0]), torch.zeros(4, 0))
    assert density.training
