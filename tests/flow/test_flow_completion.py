"""The completion g(s|y): a normalised density whose samples, values and TorchScript agree."""

import math
import warnings

import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.flow import FeatureLayout
from openmm_bg.flow.completion import Completion, CompletionLayout

GIVEN = FeatureLayout(
    circular=[True, False, True],
    backbone=[True, True, False],
    fold=[1, 1, 3],
    concentration=[0.0, 0.0, 0.0],
    shift=[0.2, 1.9, 0.0],
    scale=[1.0, 0.1, 1.0],
)


def make(circular, periodic, shift, scale, noise=0.1, seed=0, **options):
    """A completion with disturbed parameters: its density depends on y, and is nothing special."""
    torch.manual_seed(seed)
    completion = Completion(GIVEN, CompletionLayout(circular, periodic, shift, scale), hidden=8, **options)
    with torch.no_grad():
        for parameter in completion.parameters():
            parameter += noise * torch.randn(parameter.shape)
    return completion.eval()


@pytest.fixture
def mixed():
    """A length, a broad dihedral, a flat ring's dihedral and an angle."""
    return make([False, True, False, False], [False, True, True, False], [0.15, 0.0, 3.0, 1.9], [0.01, 1.0, 0.1, 0.05])


def conditions(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    return y * torch.tensor([6.28, 0.4, 6.28]) + torch.tensor([-3.14, 1.7, -3.14])


def test_density_of_a_sample_is_its_log_g(mixed):
    y = conditions(500)
    torch.manual_seed(2)
    s, log_g = mixed.sample(y)
    assert s.shape == (500, 4) and s.dtype == log_g.dtype == torch.float64 and bool(torch.isfinite(s).all())
    assert torch.allclose(mixed.log_prob(s, y), log_g, atol=1e-9)
    turned = s + 2 * math.pi * torch.tensor([0.0, 1.0, -2.0, 0.0]).double()  # angles modulo 2π
    assert torch.allclose(mixed.log_prob(turned, y), log_g, atol=1e-5)
    assert not torch.allclose(mixed.log_prob(s, y.flip(0)), log_g, atol=0.1)  # it does depend on y


def test_script_is_the_module(mixed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(mixed)
    y = conditions(50)
    torch.manual_seed(2)
    s, log_g = scripted.sample(y)
    torch.manual_seed(2)
    again, log_g_again = mixed.sample(y)
    assert torch.allclose(s, again, atol=1e-6) and torch.allclose(log_g, log_g_again, atol=1e-4)  # float32 networks
    assert torch.allclose(scripted.log_prob(s, y), log_g, atol=1e-4)
    assert scripted.n_completed == 4


@pytest.mark.parametrize("kind", ["gauss", "circle", "both"])
def test_integral_is_one(kind):
    """On grids that cover all of the mass; the trapezoidal rule is exact to many digits for such densities."""
    n = 400
    circle = torch.linspace(-math.pi, math.pi, n + 1, dtype=torch.float64)[:-1]
    line = torch.linspace(0.05, 0.25, n, dtype=torch.float64)
    grids = {"gauss": (line, line), "circle": (circle, circle), "both": (line, circle)}[kind]
    circular = [len(grid) == n and bool(grid is circle) for grid in grids]
    completion = make(
        circular, circular, [0.0 if c else 0.15 for c in circular], [1.0 if c else 0.01 for c in circular]
    )
    s = torch.cartesian_prod(*grids)
    cell = math.prod(float(grid[1] - grid[0]) for grid in grids)
    for y in conditions(3):
        with torch.no_grad():
            total = completion.log_prob(s, y.expand(len(s), -1)).exp().sum() * cell
        assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_the_ties_are_the_covariance():
    """W⁻¹ diag(σ²) W⁻ᵀ with the networks shut: against torch's own multivariate normal density."""
    completion = make([False] * 3, [False] * 3, [0.0] * 3, [1.0] * 3, noise=0.0)
    lower = torch.tensor([[1.0, 0.0, 0.0], [0.7, 1.0, 0.0], [-0.4, 0.3, 1.0]], dtype=torch.float64)
    sigma = torch.tensor([0.5, 2.0, 1.1], dtype=torch.float64)
    with torch.no_grad():
        completion.coupling.copy_(lower - torch.eye(3))
        completion.log_width.copy_(sigma.log()[:, None])
    inverse = torch.linalg.inv(lower)
    covariance = inverse @ torch.diag(sigma**2) @ inverse.t()
    normal = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
    s = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(completion.log_prob(s, conditions(20)), normal.log_prob(s), atol=1e-6)


def test_pairs_that_are_not_coupled_are_independent():
    coupled = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    completion = make([False] * 3, [False] * 3, [0.0] * 3, [1.0] * 3, noise=0.5, coupled=coupled)
    triangle = completion._triangle(torch.float64)
    assert triangle[2, 0] == 0.0 and triangle[1, 0] != 0.0 and triangle[2, 1] != 0.0
    assert torch.equal(triangle, triangle.tril()) and torch.equal(triangle.diagonal(), torch.ones(3).double())


def test_a_draw_beyond_the_window_is_no_number():
    """Where the Gaussian of an angle reaches around the circle its density would be counted once too few times."""
    completion = make([False], [True], [1.0], [1.5], noise=0.0)
    y = conditions(4000)
    torch.manual_seed(5)
    s, log_g = completion.sample(y)
    lost = torch.isnan(s[:, 0])
    share = math.erfc(math.pi / 1.5 / math.sqrt(2.0))
    assert abs(float(lost.double().mean()) - share) < 4 * math.sqrt(share / 4000)
    assert bool(torch.isfinite(log_g).all())
    assert torch.allclose(completion.log_prob(s[~lost], y[~lost]), log_g[~lost], atol=1e-9)


@pytest.mark.parametrize("far", [1e3, 1e6])
def test_no_condition_makes_nan(mixed, far):
    y = conditions(20)
    y[:, 1] = far
    _, log_g = mixed.sample(y)
    assert bool(torch.isfinite(log_g).all())


def test_gradients_reach_s_and_y(mixed):
    """FlowForce differentiates log g: autograd against central differences, with networks in double precision."""
    double = mixed.double()
    y = conditions(4).requires_grad_()
    with torch.no_grad():
        s, _ = double.sample(y)
    s.requires_grad_()
    assert torch.autograd.gradcheck(double.log_prob, (s, y), eps=1e-7, atol=1e-3, rtol=1e-4)


@pytest.mark.statistical
def test_draws_follow_the_density(mixed):
    """E[exp(log h - log g)] = 1 under g for any normalised h: here g at another y. Fails for a wrong density."""
    n = 100_000
    y = conditions(1).expand(n, -1)
    other = y + torch.tensor([0.05, 0.002, 0.02])
    torch.manual_seed(7)
    with torch.no_grad():
        s, log_g = mixed.sample(y)
        ratio = (mixed.log_prob(s, other) - log_g).exp()
        wrong = (mixed.log_prob(s, other) - log_g + mixed.log_width.double()[0]).exp()  # one width forgotten
    for value, right in ((ratio, True), (wrong, False)):
        z = abs(float(value.mean()) - 1.0) / float(value.std() / math.sqrt(n))
        print("ratio", float(value.mean()), "z", z, "n", n)
        assert z < 4.0 if right else z > 5.0
    # First moments: the circle's, and the Gaussian's standard normal deviates.
    with torch.no_grad():
        features = mixed._features(y[:1])
        a, b, kappa = mixed._directions(features, torch.float64)
        bessel = (torch.special.i1e(kappa) / torch.special.i0e(kappa)) / kappa
    for value, expected in ((s[:, 1].cos(), a * bessel), (s[:, 1].sin(), b * bessel)):
        assert abs(float(value.mean() - expected)) < 4.0 * float(value.std()) / math.sqrt(n)


def test_mistakes_are_one_sentence():
    for arguments, message in (
        (([True], [False], [0.0], [1.0]), "periodic"),
        (([False], [False, True], [0.0], [1.0]), "one length"),
        (([False], [False], [math.nan], [1.0]), "finite"),
        (([False], [False], [0.0], [0.0]), "above 0"),
    ):
        with pytest.raises(InputError, match=message):
            CompletionLayout(*arguments)
    with pytest.raises(InputError, match="at least one"):
        Completion(GIVEN, CompletionLayout([], [], [], []))
    with pytest.raises(InputError, match=r"\[1, 1\]"):
        Completion(GIVEN, CompletionLayout([False], [False], [0.0], [1.0]), torch.ones(2, 2, dtype=torch.bool))
