"""The figures of a flow from weights and frames whose figures are known, and the demo's signs."""

import math

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg as bg
from openmm_bg.analysis.quality import chain_figures, forward_figures, frame_log_weights, reverse_figures
from openmm_bg.coordinates import CoordinateMap, read_constraints
from openmm_bg.demo import PHI, WELL, DemoData, draw, tempered_difference
from openmm_bg.energy import ContextPool, Target
from openmm_bg.ensemble import Ensemble
from openmm_bg.errors import InputError
from openmm_bg.simulate import TemperedTrajectory, torsion_angle

import openmm  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")


def context_of(molecule, system=None):
    context = openmm.Context(molecule.system if system is None else system, openmm.VerletIntegrator(0.001), REFERENCE)
    context.setPositions(molecule.positions)
    return context


def test_reverse_figures_of_two_weights():
    """A quarter of the samples lies in the state and weighs three times as much."""
    n = 4000
    inside = np.arange(n) % 4 == 0
    log_w = np.where(inside, math.log(3.0), 0.0) + 7.0
    ensemble = Ensemble(np.zeros((n, 1, 3)), np.zeros(n), np.zeros(n), log_w)
    found = reverse_figures(ensemble, inside)
    assert found["samples"] == n and found["n_nonfinite"] == 0
    assert found["ess"] == pytest.approx((0.25 * 3 + 0.75) ** 2 / (0.25 * 9 + 0.75))
    assert found["ess_inside"] == pytest.approx(1.0) and found["ess_outside"] == pytest.approx(1.0)
    assert found["delta_f"] == pytest.approx(0.0, abs=1e-12)  # 3/4 against 3/4
    flipped = reverse_figures(ensemble, ~inside)
    assert flipped["delta_f_error"] == pytest.approx(found["delta_f_error"]) and found["delta_f_error"] > 0
    heavier = reverse_figures(Ensemble(np.zeros((n, 1, 3)), np.zeros(n), np.zeros(n), log_w + inside), inside)
    assert heavier["delta_f"] == pytest.approx(-1.0)  # more weight inside: the state's free energy falls


def test_forward_figures():
    inside = np.array([True] * 8 + [False] * 2)
    even = np.where(inside, 1.5, np.inf)
    assert forward_figures(even, inside) == {"frames": 8, "frames_outside": 2, "forward_ess": pytest.approx(1.0)}
    log_w = even.copy()
    log_w[:4] += math.log(3.0)  # E_p[w] E_p[1/w] = 2 · 2/3
    assert forward_figures(log_w, inside)["forward_ess"] == pytest.approx(0.75)
    log_w[0] = np.inf  # a frame that the flow cannot produce
    assert forward_figures(log_w, inside)["forward_ess"] == 0.0
    with pytest.raises(InputError, match="No MD frame"):
        forward_figures(log_w, np.zeros(10, dtype=bool))


def test_chain_figures():
    """Weights of 1 and 1/3 at even odds: from the heavy one to a light one every third proposal, else always."""
    rng = np.random.default_rng(3)
    n = 100_000
    heavy = rng.random(n) < 0.5
    found = chain_figures(np.where(heavy, 0.0, -math.log(3.0)), rng.random(n) < 0.2, seed=1)
    in_heavy = 0.75  # of the chain's time: weight times share
    acceptance = in_heavy * (0.5 + 0.5 / 3) + (1 - in_heavy)
    error = math.sqrt(3 * acceptance * (1 - acceptance) / n)  # three for the correlation of successive steps
    assert found["steps"] == n - 1 and abs(found["acceptance"] - acceptance) < 5 * error
    assert 1.0 < found["energies_per_independent_sample"] < 2.5
    assert found["longest_rejection_streak"] > 3
    # The state's indicator is that of the sample where the chain stands, not of the last proposal.
    even = chain_figures(np.zeros(n), np.arange(n) % 2 == 0)
    assert even["acceptance"] == 1.0 and even["longest_rejection_streak"] == 0


def test_frames_weigh_what_samples_weigh(dipeptide):
    flow = dipeptide.flow
    with bg.BoltzmannGeneratorSampler(flow, context_of(dipeptide), 300.0, seed=2, platform="Reference") as sampler:
        ensemble = sampler.sample(200)
        frames = ensemble.positions.copy()
        frames[np.isnan(frames).any(axis=(1, 2))] = dipeptide.positions  # of samples outside the domain
        frames[0] *= -1.0  # the other enantiomer
        log_w, sector = frame_log_weights(flow, sampler.coordinates, sampler.target, frames)
    finite = np.isfinite(ensemble.log_weights)
    finite[0] = False
    assert not sector[0] and log_w[0] == np.inf and sector[finite].all()
    np.testing.assert_allclose(log_w[finite], ensemble.log_weights[finite], atol=1e-6)


def test_frames_that_cannot_be_weighed_are_refused(dipeptide):
    good = np.stack([np.asarray(dipeptide.positions)] * 3)
    holed = good.copy()
    holed[1, 4, 2] = np.nan
    wrong = [
        (10.0 * good, "in nm"),
        (good[:, :-1], r"shape \[n, 22, 3\].*got \[3, 21, 3\]"),
        (good[0], r"pass x\[None\]"),
        (good[:0], "shape"),
        (holed, "first frame 1"),
        ("frames", "plain numbers"),
    ]
    with bg.BoltzmannGeneratorSampler(dipeptide.flow, context_of(dipeptide), 300.0, platform="Reference") as sampler:
        for frames, message in wrong:
            with pytest.raises(InputError, match=message):
                frame_log_weights(dipeptide.flow, sampler.coordinates, sampler.target, frames)
        log_w, _ = frame_log_weights(dipeptide.flow, sampler.coordinates, sampler.target, good[::-1])
    assert np.isfinite(log_w).all()


def test_a_reduced_flow_has_no_forward_weights(dipeptide):
    frames = dipeptide.positions + np.random.default_rng(0).normal(0.0, 0.001, (20, 22, 3))
    constraints = read_constraints(dipeptide.system, dipeptide.flow.topology)
    coordinates = CoordinateMap.fit(dipeptide.flow.topology, frames, constraints, "reduced")
    with ContextPool(context_of(dipeptide), platform="Reference", n_workers=1) as pool, pytest.raises(InputError):
        frame_log_weights(dipeptide.flow, coordinates, Target(coordinates, pool, 300.0), frames)


@pytest.fixture(scope="module")
def data(dipeptide):
    biased = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(dipeptide.system))
    biased.addForce(WELL.force())
    empty = TemperedTrajectory(np.zeros((0, 22, 3)), np.zeros(0), np.zeros(0), 0, 0.0)
    return DemoData(
        WELL, dipeptide.system, biased, dipeptide.flow.topology, np.asarray(dipeptide.positions), empty, 0, 0
    )


def test_the_balanced_weights_are_those_of_the_biased_system(dipeptide, data):
    """The demo weighs its samples on the plain System and takes the well by its formula; here OpenMM adds it."""
    ensemble, balanced, n_energies = draw(dipeptide.flow, data, 500, seed=4)
    context = context_of(dipeptide, data.biased)
    with bg.BoltzmannGeneratorSampler(dipeptide.flow, context, 300.0, seed=4) as sampler:
        expected = sampler.sample(500).log_weights
    finite = np.isfinite(balanced)
    assert finite.mean() > 0.9 and n_energies >= finite.sum()
    assert (np.isfinite(ensemble.log_weights) == finite).all()
    np.testing.assert_allclose(balanced[finite], expected[finite], atol=1e-6)
    assert np.ptp((balanced - ensemble.log_weights)[finite]) > 1.0  # the well does show


def test_tempered_difference_undoes_the_bias(dipeptide, data):
    """Frames at even odds, of which those in the basin were held there by 2 kT: ΔF = F(basin) - F(rest) = 2."""
    with bg.BoltzmannGeneratorSampler(dipeptide.flow, context_of(dipeptide), 300.0, seed=5) as sampler:
        x = sampler.sample(2000).positions
    phi = torsion_angle(np.nan_to_num(x), PHI)
    basin, rest = x[(phi > 0) & (phi < 2)][0], x[(phi < -1) & (phi > -2)][0]
    inside = np.random.default_rng(1).random(4000) < 0.5
    frames = np.where(inside[:, None, None], basin, rest).astype(np.float32)
    found = TemperedTrajectory(frames, np.where(inside, -2.0, 0.0), np.arange(4000) // 2000, 0, 0.0)
    value, error = tempered_difference(found)
    assert abs(value - 2.0) < 5 * error and 0.01 < error < 0.1
