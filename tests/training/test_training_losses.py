"""The losses against closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_bg.training import losses

D64 = torch.float64


def _covariance_formula(xq, xp):
    """Textbook Fréchet distance with the covariance matrices, for small dimensions."""
    sq, sp = torch.cov(xq.T), torch.cov(xp.T)
    values, vectors = torch.linalg.eigh(sq)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sp @ root).clamp(min=0).sqrt().sum()
    return (xq.mean(0) - xp.mean(0)).square().sum() + sq.trace() + sp.trace() - 2 * cross


@pytest.mark.parametrize(("b1", "b2", "p"), [(40, 40, 3), (25, 60, 5), (60, 25, 5), (12, 9, 30)])
def test_w2_equals_the_covariance_formula(b1, b2, p):
    torch.manual_seed(b1 + b2 + p)
    xq = torch.randn(b1, p, dtype=D64) @ torch.randn(p, p, dtype=D64) + 1.0
    xp = torch.randn(b2, p, dtype=D64) @ torch.randn(p, p, dtype=D64)
    expected = _covariance_formula(xq, xp)
    # With fewer samples than dimensions the textbook form takes roots of rounded zero eigenvalues.
    tolerance = 1e-10 if min(b1, b2) > p else 1e-5
    assert torch.allclose(losses.w2_distance(xq, xp), expected, rtol=tolerance, atol=0)
    wrong = expected + 2e-3 * expected
    assert not torch.allclose(losses.w2_distance(xq, xp), wrong, rtol=tolerance, atol=0)


def test_w2_of_a_batch_with_itself_and_of_a_shift():
    torch.manual_seed(1)
    x = torch.randn(30, 4, dtype=D64)
    assert abs(float(losses.w2_distance(x, x))) < 1e-12
    assert float(losses.w2_distance(x + 2.0, x)) == pytest.approx(16.0, rel=1e-12)
    assert float(losses.w2_distance(3.0 * x, x)) == pytest.approx(
        4.0 * float(x.var(0).sum()) + 4.0 * float(x.mean(0).square().sum()), rel=1e-12
    )


@pytest.mark.parametrize(("b1", "b2", "p"), [(9, 9, 3), (7, 11, 3), (11, 7, 3), (6, 6, 12), (5, 8, 12)])
def test_w2_gradient_against_finite_differences(b1, b2, p):
    torch.manual_seed(7)
    xq = torch.randn(b1, p, dtype=D64, requires_grad=True)
    xp = torch.randn(b2, p, dtype=D64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.w2_distance, (xq, xp), eps=1e-6, atol=1e-6)


def test_w2_gradient_is_finite_for_degenerate_batches():
    x = torch.zeros(8, 5)
    x[0] = 1.0
    for xq in (torch.zeros(8, 5), x, x.roll(1, 0), torch.eye(8, 5)):
        xq = xq.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(losses.w2_distance(xq, torch.eye(6, 5)), xq)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("b1", "b2", "p"), [(12, 9, 3), (7, 11, 12)])
@pytest.mark.parametrize("junk", [7.0, math.nan, math.inf])
def test_w2_of_masked_rows_is_that_of_the_others(b1, b2, p, junk):
    """Value and gradient; rows left out may be anything and get no gradient. Deliberate error: they count."""
    torch.manual_seed(b1)
    xq, xp = torch.randn(b1, p, dtype=D64), torch.randn(b2, p, dtype=D64)
    keep = torch.ones(b1, dtype=torch.bool)
    keep[[0, 3, b1 - 1]] = False
    given = torch.where(keep[:, None], xq, junk).requires_grad_(True)
    alone = xq[keep].clone().requires_grad_(True)
    found, expected = losses.w2_distance(given, xp, keep), losses.w2_distance(alone, xp)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,), (same,) = torch.autograd.grad(found, given), torch.autograd.grad(expected, alone)
    assert torch.allclose(gradient[keep], same, rtol=1e-9, atol=1e-12) and not gradient[~keep].any()
    assert not float(losses.w2_distance(given, xp).detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


@pytest.mark.parametrize("kept", [0, 1])
def test_w2_of_fewer_than_two_rows_is_nan(kept):
    keep = torch.arange(5) < kept
    assert torch.isnan(losses.w2_distance(torch.randn(5, 3), torch.randn(6, 3), keep))


def test_masked_gradient_stops_nan_and_nothing_else():
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [4.0, 5.0]], requires_grad=True)
    same, keep = losses.masked_gradient(x)
    roots = same.sqrt()  # NaN in one row, and so is what comes back to it
    keep.copy_(torch.isfinite(roots.detach()).all(dim=1))
    (gradient,) = torch.autograd.grad(torch.where(keep[:, None], roots, 0.0).sum(), x)
    assert torch.equal(gradient, torch.tensor([[0.5, 0.5 / 2**0.5], [0.0, 0.0], [0.25, 0.5 / 5**0.5]]))
    plain = torch.where(keep[:, None], x.sqrt(), 0.0).sum()
    assert torch.isnan(torch.autograd.grad(plain, x)[0]).any()  # what it is for


def test_w2_bias_of_finite_batches_is_there():
    # Two batches of one distribution: documented, and the reason for a data-against-data figure.
    torch.manual_seed(3)
    assert float(losses.w2_distance(torch.randn(64, 40), torch.randn(64, 40))) > 1.0


def test_backbone_distances():
    torch.manual_seed(0)
    positions = torch.randn(3, 6, 3, dtype=D64, requires_grad=True)
    atoms = torch.tensor([4, 0, 2])
    d = losses.backbone_distances(positions, atoms)
    assert d.shape == (3, 3)
    expected = [torch.dist(positions[1, i], positions[1, j]) for i, j in [(4, 0), (4, 2), (0, 2)]]
    assert torch.allclose(d[1], torch.stack(expected))
    assert losses.backbone_distances(positions, torch.arange(6), offset=3).shape == (3, 6)
    same = torch.zeros(1, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.backbone_distances(same, torch.arange(2)).sum(), same)
    assert torch.isfinite(gradient).all()


def test_nll_and_its_weights(kit):
    density = kit.AffineDensity(2)
    y = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    each = 0.5 * y.square().sum(1) + math.log(2 * math.pi)
    assert torch.allclose(losses.nll(density, y), each.mean())
    assert torch.allclose(losses.nll(density, y, torch.tensor([3.0, 1.0])), 0.75 * each[0] + 0.25 * each[1])


def test_buffer_nll_clips_weights(kit):
    density = kit.AffineDensity(1)
    y = torch.tensor([[0.0], [1.0], [3.0]])
    log_w = torch.tensor([-1.0, 0.0, 50.0], dtype=D64)
    w = torch.tensor([math.exp(-1), 1.0, math.exp(2)])
    each = -density.log_prob(y)
    assert torch.allclose(losses.buffer_nll(density, y, log_w), (w * each).sum() / w.sum())
    # The level of the log-weights does not matter: the target is not normalised.
    assert torch.allclose(losses.buffer_nll(density, y, log_w + 1e4), losses.buffer_nll(density, y, log_w))
    assert not torch.allclose(losses.buffer_nll(density, y, log_w, clip=60.0), (w * each).sum() / w.sum())


def _analytic_reverse_kl(density, target):
    """KL(q || π) - log Z of the affine flow against the unnormalised Gaussian."""
    scale = density.log_scale.exp()
    n = density.n_features
    cross = 0.5 * (((density.mean - target.mean) / target.scale).square() + (scale / target.scale).square()).sum()
    return cross - density.log_scale.sum() - 0.5 * n * (1 + math.log(2 * math.pi))


def _gradient(value, density):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(density.parameters()))])


def _per_sample(loss_of, n):
    """Mean and standard error of gradients over n independent batches."""
    g = torch.stack([loss_of() for _ in range(n)])
    return g.mean(0), g.std(0) / math.sqrt(n)


def _shifted(kit):
    density = kit.AffineDensity(2).double()
    with torch.no_grad():
        density.mean.copy_(torch.tensor([0.3, -0.2]))
        density.log_scale.copy_(torch.tensor([0.2, -0.3]))
    return density, kit.GaussianTarget([1.0, 0.5], [0.8, 1.3])


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["reverse_kl", "path"])
def test_reverse_kl_gradient_is_the_analytic_one(kit, kind):
    torch.manual_seed(11)
    density, target = _shifted(kit)
    exact = _gradient(_analytic_reverse_kl(density, target), density)
    s = torch.zeros(500, 0, dtype=D64)

    def once():
        if kind == "reverse_kl":
            return _gradient(losses.reverse_kl(density, target, density.sample_base(500), s).loss, density)
        with torch.no_grad():
            y, _ = density.sample(500)
        evaluation = losses.evaluate_target(target, y, s)
        return _gradient(losses.path_gradient(density, y, -evaluation.gradient).loss, density)

    mean, error = _per_sample(once, 60)
    assert ((mean - exact).abs() < 5 * error).all()
    # The same statistics see a gradient that is off by a tenth, and one of the wrong sign.
    assert ((mean - 1.1 * exact).abs() > 5 * error).any()
    assert ((mean + exact).abs() > 5 * error).all()


@pytest.mark.statistical
@pytest.mark.parametrize("proposal", ["target", "reweighted"])
def test_path_gradient_of_target_samples_is_that_of_the_forward_kl(kit, proposal):
    torch.manual_seed(12)
    density, target = _shifted(kit)
    shift = (density.mean - target.mean).detach()
    variance = (2 * density.log_scale).exp().detach()
    # d/dθ of E_p[-log q] for Gaussians.
    second = target.scale.square() + shift.square()
    exact = torch.cat([shift / variance, 1 - second / variance])
    n = 2000

    def samples():
        if proposal == "target":
            return target.mean + target.scale * torch.randn(n, 2, dtype=D64), None
        wide = 2.0
        y = target.mean + wide * torch.randn(n, 2, dtype=D64)
        log_w = target.log_density(y, y[:, :0]) + 0.5 * ((y - target.mean) / wide).square().sum(1)
        return y, log_w

    def once(use_weights=True):
        y, log_w = samples()
        gradient = (target.mean - y) / target.scale.square()
        result = losses.path_gradient(density, y, gradient, log_w if use_weights else None)
        return _gradient(result.loss, density)

    mean, error = _per_sample(once, 60)
    assert ((mean - exact).abs() < 5 * error).all()
    assert ((mean - 1.1 * exact).abs() > 5 * error).any()
    if proposal == "reweighted":
        mean, error = _per_sample(lambda: once(False), 60)
        assert ((mean - exact).abs() > 5 * error).any()


def test_path_gradient_vanishes_at_the_optimum_for_every_sample(kit):
    torch.manual_seed(2)
    density = kit.AffineDensity(2).double()
    target = kit.GaussianTarget([1.0, 0.5], [0.8, 1.3])
    with torch.no_grad():
        density.mean.copy_(target.mean)
        density.log_scale.copy_(target.scale.log())
    for _ in range(5):
        y = 3.0 * torch.randn(1, 2, dtype=D64)
        evaluation = losses.evaluate_target(target, y, y[:, :0])
        path = losses.path_gradient(density, y, -evaluation.gradient)
        assert _gradient(path.loss, density).abs().max() < 1e-12 and float(path.mismatch) < 1e-20
        plain = losses.nll(density, y)
        assert _gradient(plain, density).abs().max() > 1e-3  # the usual estimator is noisy there


@pytest.mark.parametrize("weighted", [False, True])
def test_path_gradient_of_masked_rows_is_that_of_the_others(kit, weighted):
    torch.manual_seed(5)
    density, target = _shifted(kit)
    y = torch.randn(9, 2, dtype=D64)
    log_w = torch.randn(9, dtype=D64) if weighted else None
    gradient = -losses.evaluate_target(target, y, y[:, :0]).gradient
    keep = torch.arange(9) % 3 != 1
    rows = torch.where(keep[:, None], y, math.nan)  # such a row has no score
    found = losses.path_gradient(density, rows, gradient, log_w)
    alone = losses.path_gradient(density, y[keep], gradient[keep], None if log_w is None else log_w[keep])
    assert int(found.n_dropped) == 3 and int(alone.n_dropped) == 0
    assert torch.allclose(_gradient(found.loss, density), _gradient(alone.loss, density), rtol=1e-12)
    assert torch.allclose(found.mismatch, alone.mismatch, rtol=1e-12)
    other = losses.path_gradient(density, y, gradient, log_w)
    assert not torch.allclose(other.mismatch, alone.mismatch, rtol=1e-3)
    nothing = losses.path_gradient(density, y, gradient, log_w, finite=torch.zeros(9, dtype=torch.bool))
    assert torch.isnan(nothing.loss) and torch.isnan(nothing.mismatch) and int(nothing.n_dropped) == 9


def test_path_gradient_through_circular_and_folded_coordinates(kit):
    """Against the parameter gradient of the forward KL of the real flow, by its full batch mean."""
    torch.manual_seed(5)
    density = kit.small_flow(linear="spline").double()
    with torch.no_grad():
        for p in density.parameters():
            p.add_(0.05 * torch.randn_like(p))
        other = kit.small_flow(1).double()
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
        y, _ = other.sample(4000)
    leaf = y.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(other.log_prob(leaf).sum(), leaf)
    parameters = [p for p in density.parameters() if p.requires_grad]

    def flat(value):
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    parts = [slice(i, i + 200) for i in range(0, 4000, 200)]
    path = torch.stack([flat(losses.path_gradient(density, y[p], score[p]).loss) for p in parts])
    plain = torch.stack([flat(losses.nll(density, y[p])) for p in parts])
    direction = plain.mean(0) / plain.mean(0).norm()
    difference = (path - plain) @ direction
    error = difference.std() / math.sqrt(len(parts))
    assert abs(difference.mean()) < 5 * error
    along = plain @ direction
    assert along.mean() > 8 * error  # an estimate without the gradient, or of the other sign, would show


def test_reverse_kl_drops_and_counts_samples_without_energy(kit):
    torch.manual_seed(3)
    density = kit.AffineDensity(2)
    target = kit.GaussianTarget([0.0, 0.0], [1.0, 1.0], wall=0.5)
    z = torch.randn(200, 2)
    s = torch.zeros(200, 0)
    result = losses.reverse_kl(density, target, z, s)
    inside = z[:, 0] < 0.5
    assert int(result.n_dropped) == int((~inside).sum()) > 0
    alone = losses.reverse_kl(density, target, z[inside], s[inside])
    assert torch.allclose(result.loss, alone.loss)
    assert torch.allclose(_gradient(result.loss, density), _gradient(alone.loss, density))
    nothing = losses.reverse_kl(density, kit.GaussianTarget([0.0, 0.0], [1.0, 1.0], wall=-99.0), z, s)
    assert torch.isnan(nothing.loss) and int(nothing.n_dropped) == 200


def test_a_nan_energy_gradient_reaches_no_parameter(kit):
    class Broken(kit.GaussianTarget):
        def log_density(self, y, s):
            # Finite value, gradient NaN for negative arguments: 0 * NaN behind a where.
            return super().log_density(y, s) + torch.where(y[:, 0] > 0, torch.sqrt(y[:, 0]), 0.0)

    density = kit.AffineDensity(2)
    z = torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.4, 0.4]])
    result = losses.reverse_kl(density, Broken([0.0, 0.0], [1.0, 1.0]), z, z[:, :0])
    assert int(result.n_dropped) == 1
    assert torch.isfinite(_gradient(result.loss, density)).all()


def test_regulariser_counts_from_the_reference(kit):
    target = kit.GaussianTarget([0.0, 0.0], [1.0, 1.0])
    y = torch.tensor([[1.0, 0.0], [100.0, 0.0]], dtype=D64)
    evaluation = losses.evaluate_target(
        target, y, y[:, :0], regulariser=lambda u: torch.clamp(u, max=10.0), reference=3.0
    )
    assert torch.allclose(evaluation.energy, torch.tensor([0.5, 13.0], dtype=D64))
    assert torch.allclose(evaluation.log_density, torch.tensor([-0.5, -5000.0], dtype=D64))
    assert evaluation.gradient[1].abs().max() == 0 and evaluation.gradient[0, 0] == 1.0


def test_evaluation_mode_puts_the_flag_back():
    module = torch.nn.Dropout()
    with losses.evaluation_mode(module):
        assert not module.training
    assert module.training
