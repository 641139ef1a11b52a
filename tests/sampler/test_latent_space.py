"""The latent side of a flow: draws follow its base, passes agree with the flow, and results are ordinary tensors."""

import numpy as np
import pytest
import torch
from scipy import stats

from openmm_bg.artifact import Flow
from openmm_bg.coordinates import place_like
from openmm_bg.latent_space import LatentSpace
from openmm_bg.standing import place, seed_frame

N = 20_000
# Critical value of the two-sample Kolmogorov-Smirnov statistic at a false-alarm rate of 1e-5 (seeds are fixed).
CRITICAL = stats.kstwo.isf(1e-5, N // 2)


@pytest.fixture(scope="module")
def space(dipeptide):
    return LatentSpace(dipeptide.flow, torch.device("cpu"))


def farthest(z, reference, *, coordinate=lambda z: z):
    """Largest Kolmogorov-Smirnov distance over the columns."""
    return max(stats.ks_2samp(a, b).statistic for a, b in zip(coordinate(z).T, coordinate(reference).T, strict=True))


@pytest.mark.statistical
def test_draws_follow_the_base_of_the_flow(dipeptide, space):
    """Against the flow's own draws: Gaussian, uniform, and a von Mises rotor of three branches."""
    torch.manual_seed(1)
    reference = dipeptide.flow.density.sample_base(N).numpy()
    z = space.draw(N, np.random.default_rng(2))
    kappa, fold, circular = (space.base[key] for key in ("concentration", "fold", "circular"))
    assert (kappa > 0).any() and (fold == 3).any() and (~circular).any()
    assert z.shape == reference.shape and (z[:, circular] >= -np.pi).all() and (z[:, circular] < np.pi).all()
    assert farthest(z, reference) < CRITICAL
    assert np.abs(np.corrcoef(z.T) - np.eye(z.shape[1])).max() < 6.0 / np.sqrt(N)
    assert space.log_base(z).mean() == pytest.approx(space.log_base(reference).mean(), abs=0.3)


@pytest.mark.statistical
@pytest.mark.parametrize("broken", ["no branches", "no concentration"])
def test_wrong_draws_are_caught(dipeptide, broken):
    space = LatentSpace(dipeptide.flow, torch.device("cpu"))
    if broken == "no branches":
        space._fold = np.ones_like(space._fold)
    else:
        space._concentration = np.zeros_like(space._concentration)
    torch.manual_seed(1)
    reference = dipeptide.flow.density.sample_base(N).numpy()
    assert farthest(space.draw(N, np.random.default_rng(2)), reference) > CRITICAL


def test_draws_are_the_generators_own(space):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = space.draw(7, np.random.default_rng(3))
    assert torch.equal(torch.rand(2), expected)
    np.testing.assert_array_equal(first, space.draw(7, np.random.default_rng(3)))
    assert not np.array_equal(first, space.draw(7, np.random.default_rng(4)))


def test_passes_are_the_flows(dipeptide, space, monkeypatch):
    z = space.draw(9, np.random.default_rng(3))
    y, log_det = space.forward(z)
    with torch.no_grad():
        expected, det = dipeptide.flow.forward(torch.from_numpy(z))
        log_q = dipeptide.flow.log_prob(y)
    # Networks are float32: TorchScript's executors and other batches differ in their last digits.
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(log_det, det, atol=1e-3)
    back, found = space.inverse(y)
    np.testing.assert_allclose(np.sin((back - z) / 2), 0.0, atol=1e-5)
    np.testing.assert_allclose(found, log_q, atol=1e-3)
    y_drawn, log_q_drawn = space.sample(9, np.random.default_rng(3))
    np.testing.assert_allclose(y_drawn, y, atol=1e-5)
    np.testing.assert_allclose(log_q_drawn, space.log_base(z) - log_det.numpy(), atol=1e-3)
    monkeypatch.setattr("openmm_bg.latent_space.CHUNK", 4)
    np.testing.assert_allclose(space.forward(z)[0], y, atol=1e-5)
    np.testing.assert_allclose(space.log_base(z), log_q_drawn + log_det, atol=1e-3)


def test_results_may_be_differentiated_and_changed(space):
    y, log_det = space.forward(space.draw(2, np.random.default_rng(0)))
    y[:, 0] += 1.0
    log_det += 1.0
    y.requires_grad_()
    (y**2).sum().backward()
    assert torch.equal(y.grad, 2.0 * y.detach())


class Noisy(torch.nn.Module):
    """A density with dropout."""

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Sequential(torch.nn.Dropout(0.5))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True])
def test_dropout_is_switched_off_wherever_it_was_switched_on(dipeptide, scripted):
    density = Noisy().eval()
    if scripted:
        density = torch.jit.script(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Dropout(0.5))).eval())
    flow = Flow(density, dipeptide.flow.coordinates, dipeptide.flow.metadata)
    space = LatentSpace(flow, torch.device("cpu"))
    for module in (density, next(m for m in density.modules() if not list(m.children()))):
        module.train()
        assert any(m.training for m in density.modules())
        space.eval()
        assert not any(m.training for m in density.modules())


def test_positions_stand_where_the_old_ones_do(dipeptide, make_context, make_sampler):
    context = make_context()
    context.getIntegrator().step(50)
    sampler = make_sampler(context)
    standing = sampler.stand()
    coordinates = sampler.coordinates
    y = sampler.space.forward(sampler.space.draw(6, np.random.default_rng(1)))[0]
    angle = next(k for k, c in enumerate(c for c in coordinates.coordinates if c.modelled) if c.kind == "angle")
    y[2, angle] = 2.0 * np.pi - y[2, angle]  # outside, though a conformation
    x, log_volume = place(coordinates, standing, y)
    keep = [0, 1, 3, 4, 5]
    s = standing.s.expand(5, -1)
    expected = place_like(coordinates.to_positions(y[keep], s), standing.positions, coordinates.zmatrix.seed)
    np.testing.assert_allclose(x[keep], expected, atol=1e-12)
    np.testing.assert_allclose(log_volume[keep], coordinates.log_volume(y[keep], s), atol=1e-12)
    assert bool(torch.isnan(x[2]).all()) and log_volume[2] == -torch.inf
    # Where it stands itself comes back, and its z is where the flow has it.
    np.testing.assert_allclose(place(coordinates, standing, standing.y)[0][0], standing.positions, atol=1e-12)
    np.testing.assert_allclose(sampler.space.inverse(standing.y)[0], standing.z, atol=1e-9)
    frame = seed_frame(standing.positions, coordinates.zmatrix.seed)
    np.testing.assert_allclose(frame.T @ frame, np.eye(3), atol=1e-12)
    assert float(torch.linalg.det(frame)) == pytest.approx(1.0)


def test_gradients_go_on_working_after_passes(dipeptide):
    """What TorchScript keeps of a pass must not be in the way of a gradient, in whichever order they come."""
    space = LatentSpace(dipeptide.flow, torch.device("cpu"))
    z = space.draw(3, np.random.default_rng(0))
    for _ in range(4):  # its plans are made in the first calls
        y, _ = space.forward(z)
        space.inverse(y)
        with torch.jit.optimized_execution(False):
            wanted = y.requires_grad_()
            dipeptide.flow.log_prob(wanted).sum().backward()
        assert bool(torch.isfinite(wanted.grad).all())
        dipeptide.flow.density.zero_grad()
        space.inverse(y.detach())
