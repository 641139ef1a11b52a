"""Formula C and its BAR on the toy molecule, with the package's own completion; every deliberate error is caught.

π ∝ exp(-u) J √det Z with r free. Two divisions of (φ, θ, r): the stiff r is completed by a Gaussian whose family does
not contain the truth, or the broad φ by a von Mises density.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from openmm_bg import free_energy, weights
from openmm_bg.flow import FeatureLayout
from openmm_bg.flow.completion import Completion
from openmm_bg.training.completion import FitOptions, describe, fit

pytestmark = pytest.mark.statistical

N = 200_000
FIT = FitOptions(batch_size=512, least_steps=150, most_steps=150, hidden=16)


@dataclass
class Completed:
    """A flow of y with known density, and the fitted g(s|y)."""

    toy: object
    member: str  # what is completed: "r" or "phi"
    completion: Completion

    def draw_y(self, n, rng):
        """y [n, 2] and log q [n]: (φ, θ) of the toy's flow, or (θ, r) of its two straight lines."""
        if self.member == "r":
            return self.toy.ToyFlow(n_dim=2).sample((n,), rng)
        z = rng.standard_normal((n, 2))
        return self._mean + self._scale * z, self._log_lines(z)

    def log_q(self, y):
        if self.member == "r":
            return self.toy.ToyFlow(n_dim=2).log_q(y)
        return self._log_lines((y - self._mean) / self._scale)

    _mean, _scale = np.array([1.85, 1.03]), np.array([0.45, 0.12])

    def _log_lines(self, z):
        return (-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(self._scale)).sum(-1)

    def split(self, frames):
        """Frames (φ, θ, r) [n, 3] to y [n, 2] and s [n, 1]."""
        return (frames[:, :2], frames[:, 2:]) if self.member == "r" else (frames[:, 1:], frames[:, :1])

    def join(self, y, s):
        return (y[:, 0], y[:, 1], s[:, 0]) if self.member == "r" else (s[:, 0], y[:, 0], y[:, 1])

    def samples(self, n, seed):
        """(φ, θ, r), log q and log g."""
        rng = np.random.default_rng(seed)
        y, log_q = self.draw_y(n, rng)
        torch.manual_seed(seed)
        with torch.no_grad():
            s, log_g = self.completion.sample(torch.from_numpy(y))
        return self.join(y, s.numpy()), log_q, log_g.numpy()

    def log_w(self, x, log_q, log_g, broken=None):
        total = self.toy.log_pi(*x, with_fixman=True, omit=broken)
        total = total - (0.0 if broken == "log q" else log_q) - (0.0 if broken == "log g" else log_g)
        return 2.0 * total if broken == "factor 2" else total


@pytest.fixture(scope="module", params=["r", "phi"])
def completed(toy, request):
    """g fitted to few exact frames in few steps: good enough to work, too poor for an error to hide."""
    frames = toy.draw_exact(4000, np.random.default_rng(5), with_fixman=True)
    circular = [True, False] if request.param == "r" else [False, False]
    shift, scale = ([0.0, 1.8], [1.0, 0.4]) if request.param == "r" else ([1.8, 1.0], [0.4, 0.1])
    given = FeatureLayout(circular, [True] * 2, [1, 1], [0.0, 0.0], shift, scale)
    found = Completed(toy, request.param, None)
    y, s = (torch.from_numpy(np.ascontiguousarray(part)) for part in found.split(frames))
    torch.manual_seed(0)
    layout = describe(s, [request.param == "phi"])
    assert layout.circular == [request.param == "phi"]
    found.completion = Completion(given, layout, hidden=16)
    fit(found.completion, y, s, options=FIT)
    return found


def check_weights(completed, broken=None, n=N):
    """Marginals by `expectation`, log Z by `one_sided`."""
    toy = completed.toy
    x, log_q, log_g = completed.samples(n, seed=1)
    log_w = completed.log_w(x, log_q, log_g, broken)
    ref = toy.reference(with_fixman=True)
    verdict = toy.Verdict(f"completed {completed.member}, broken={broken}", n)
    for name, indicator in toy.bins(*x, ref).items():
        verdict.histogram(name, *weights.expectation(indicator, log_w), getattr(ref, name))
    z = free_energy.one_sided(log_w)
    verdict.number("log Z", -z.delta_f, z.error, ref.log_z)
    return verdict.show()


def check_bar(completed, broken=None, n=20_000):
    """BAR between samples and exact frames; log w broken alike on both sides."""
    toy = completed.toy
    frames = toy.draw_exact(n, np.random.default_rng(3), with_fixman=True)
    y, s = completed.split(frames)
    with torch.no_grad():
        log_g = completed.completion.log_prob(
            *(torch.from_numpy(np.ascontiguousarray(part)) for part in (s, y))
        ).numpy()
    log_w_md = completed.log_w(tuple(frames.T), completed.log_q(y), log_g, broken)
    result = free_energy.bar(completed.log_w(*completed.samples(n, seed=2), broken), log_w_md)
    verdict = toy.Verdict(f"BAR, completed {completed.member}, broken={broken}", n)
    verdict.number("log Z", -result.delta_f, result.error, toy.reference(with_fixman=True).log_z)
    return verdict.show(), result


ERRORS = ["jacobian", "fixman", "log q", "log g", "factor 2"]


def test_completed_weights_recover_marginals_and_log_z(completed):
    check_weights(completed).assert_right()


@pytest.mark.parametrize("broken", ERRORS)
def test_broken_completed_weights_are_caught(completed, broken):
    check_weights(completed, broken).assert_wrong()


def test_completed_bar_recovers_log_z(completed):
    verdict, result = check_bar(completed)
    verdict.assert_right()
    assert 0.1 < result.overlap < 1.0


@pytest.mark.parametrize("broken", ERRORS)
def test_broken_completed_bar_is_caught(completed, broken):
    check_bar(completed, broken)[0].assert_wrong()
