"""FlowDensity: a normalised density on the coordinates themselves, its samples, its script."""

import copy
import io
import math

import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.flow import FeatureLayout, FlowConfig, build_flow
from openmm_bg.flow.coupling import CouplingLayer
from openmm_bg.flow.splines import wrap

SMALL = {"n_backbone_blocks": 2, "n_joint_blocks": 4, "hidden": 16, "d_model": 16, "n_bins": 5, "bound": 3.0}
ATTENTION = {"conditioner": "attention"}


def small(**changes) -> FlowConfig:
    return FlowConfig(**{**SMALL, **changes})


def integral(flow, layout: FeatureLayout, n: int) -> float:
    """∫ q dy over the circle or eleven standard deviations either side, by a product rule."""
    axes = []
    for i in range(layout.n):
        half = math.pi if layout.circular[i] else 11.0 * layout.scale[i]
        centre = 0.0 if layout.circular[i] else layout.shift[i]
        axes.append(centre + half * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1))
    volume = math.prod(float(a[1] - a[0]) for a in axes)
    y = torch.cartesian_prod(*axes).reshape(-1, layout.n)
    with torch.no_grad():
        return float(flow.log_prob(y).exp().sum()) * volume


@pytest.mark.parametrize(
    "kinds, fold, kappa, changes",
    [
        ("L", 1, 0.0, {"linear": "spline"}),
        ("l", 1, 0.0, {"linear": "mixed"}),
        ("C", 1, 0.0, {}),
        ("c", 1, 4.0, {"phase_shift": "learned"}),
        ("c", 3, 0.0, {}),
        ("C", 3, 2.0, ATTENTION),
    ],
)
def test_density_integrates_to_one_in_one_dimension(kinds, fold, kappa, changes, make_layout, perturb):
    layout = make_layout(kinds, fold, kappa)
    flow = perturb(build_flow(layout, small(**changes)), 0.12)
    y = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None]
    start = build_flow(layout, small(**changes)).eval()
    assert (flow.log_prob(y) - start.log_prob(y)).abs().max() > 0.05
    # midpoint rule: O(h²) at the kinks of the spline's slope; 1e-4 at n = 1000 falls to 1e-6 here
    assert abs(integral(flow, layout, 10000) - 1.0) < 1e-5


@pytest.mark.parametrize(
    "kinds, fold, kappa, changes",
    [
        ("Ll", 1, 0.0, {"linear": "spline"}),
        ("lc", 1, 0.0, {}),
        ("Cl", 3, 1.0, ATTENTION),
        ("cl", 3, 2.0, {"conditioner": "gated"}),
        ("cC", 1, 2.0, {"phase_shift": "learned"}),
        ("lc", 1, 1.0, {"split": False, "n_backbone_blocks": 0, "linear": "spline"}),
    ],
)
def test_density_integrates_to_one_in_two_dimensions(kinds, fold, kappa, changes, make_layout, perturb):
    layout = make_layout(kinds, fold, kappa)
    flow = perturb(build_flow(layout, small(**changes)), 0.1)
    fine, coarse = integral(flow, layout, 400), integral(flow, layout, 320)
    assert abs(fine - coarse) < 1e-3, "the grid resolves the density"
    assert abs(fine - 1.0) < 2e-3


@pytest.mark.parametrize("kinds", ["l", "lc"])
def test_a_forgotten_scale_is_seen(kinds, make_layout, perturb):
    layout = make_layout(kinds)
    flow = perturb(build_flow(layout, small()), 0.1)
    flow.log_scale.zero_()
    assert abs(integral(flow, layout, 400) - 1.0) > 0.1


def test_a_forgotten_fold_is_seen(make_layout, perturb):
    layout = make_layout("c", 3, 2.0)
    flow = perturb(build_flow(layout, small()), 0.1)
    flow.base.log_norm -= math.log(3.0)  # the log-determinant of v = 3z without that of y = v/3
    assert abs(integral(flow, layout, 2000) - 1.0) > 0.5


@pytest.mark.parametrize("conditioner", ["mlp", "gated", "attention"])
@pytest.mark.parametrize("kappa", [0.0, 2.0])
def test_the_flow_starts_as_its_base(conditioner, kappa, make_layout):
    layout = make_layout("LcClCl", 1, kappa)
    flow = build_flow(layout, small(conditioner=conditioner)).eval()
    z = flow.sample_base(100)
    y, log_det = flow(z)
    circular = torch.tensor(layout.circular)
    shift, scale = torch.tensor([layout.shift, layout.scale], dtype=torch.float64)
    assert (wrap(y - z - shift)[:, circular]).abs().max() < 1e-12
    assert (y - z * scale - shift)[:, ~circular].abs().max() < 1e-12
    assert (log_det - scale.log().sum()).abs().max() < 1e-12
    expected = torch.distributions.VonMises(0.0 * z, max(kappa, 1e-9)).log_prob(wrap(y - shift)).double()[:, circular]
    gauss = torch.distributions.Normal(shift, scale).log_prob(y)[:, ~circular]
    assert (flow.log_prob(y) - expected.sum(1) - gauss.sum(1)).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{}, ATTENTION, {"phase_shift": "learned"}])
@pytest.mark.parametrize("fold", [1, 3])
def test_density_is_periodic_and_continuous_across_the_cut(changes, fold, make_layout, perturb):
    layout = make_layout("LcCl", fold, 1.0)
    flow = perturb(build_flow(layout, small(**changes)), 0.2).double()
    y, log_q = flow.sample(200)
    for column in (1, 2):
        for turn in (2 * math.pi, -4 * math.pi):
            moved = y.clone()
            moved[:, column] += turn
            assert (flow.log_prob(moved) - log_q).abs().max() < 1e-9
        left, right = y.clone(), y.clone()
        left[:, column], right[:, column] = math.pi - 1e-9, -math.pi + 1e-9
        assert (flow.log_prob(left) - flow.log_prob(right)).abs().max() < 1e-5
        # the cut of the inner flow, v = n y - c = ±π, is no edge either
        cut = (math.pi + layout.shift[column]) / fold
        left[:, column], right[:, column] = cut - 1e-9, cut + 1e-9
        assert (flow.log_prob(left) - flow.log_prob(right)).abs().max() < 1e-5


def branches_of(flow, layout, n=100):
    """Samples y of a flow whose first circular feature is a threefold rotor, their log q, and both of the branches."""
    column = layout.circular.index(True)
    y, log_q = flow.sample(n)
    turned = []
    for k in range(3):
        moved = y.clone()
        moved[:, column] = wrap(moved[:, column] + 2 * math.pi * k / 3)
        z, _ = flow.inverse(moved)
        assert (flow(z)[0] - moved).abs().max() < 1e-9
        turned.append((z, flow.log_prob(moved)))
    return y, log_q, turned, column


@pytest.mark.parametrize("changes", [{}, ATTENTION])
def test_a_rotor_is_threefold_given_the_others(changes, make_layout, perturb):
    """A layer turns every branch of it alike, whatever the others are: three branches of y are three of z."""
    layout = make_layout("CL", 3, 1.0)
    flow = build_flow(layout, small(**changes))
    rotor_alone = [block for block in flow.inner.joint_blocks.blocks if block.n_circular and not block.n_linear]
    assert rotor_alone
    perturb(torch.nn.ModuleList(rotor_alone), 0.2)
    _, log_q, turned, column = branches_of(flow.double(), layout)
    for k, (z, value) in enumerate(turned):
        assert (value - log_q).abs().max() < 1e-9
        assert (wrap(z[:, column] - turned[0][0][:, column] - 2 * math.pi * k / 3)).abs().max() < 1e-9


@pytest.mark.parametrize("changes", [{}, ATTENTION])
def test_others_see_the_branch_of_a_rotor(changes, make_layout, perturb):
    """Each hydrogen of a methyl group has the angle of where it stands, so the branch is information."""
    layout = make_layout("CL", 3, 1.0)
    flow = perturb(build_flow(layout, small(**changes)), 0.2).double()
    _, log_q, turned, _ = branches_of(flow, layout)
    assert (turned[1][1] - log_q).abs().max() > 0.05


@pytest.mark.statistical
def test_samples_follow_the_density(make_layout, perturb):
    """Shares of a two-dimensional histogram against the integrated density; a tilted density must fail."""
    torch.manual_seed(3)
    layout = make_layout("Cc", 1, 1.0)
    flow = perturb(build_flow(layout, small()), 0.2)
    n, bins, sub = 40000, 6, 20
    with torch.no_grad():
        y, _ = flow.sample(n)
        axis = (torch.arange(bins * sub, dtype=torch.float64) + 0.5) / (bins * sub) * 2 * math.pi - math.pi
        q = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(bins, sub, bins, sub).mean((1, 3))
    expected = n * q / q.sum()
    cell = ((y + math.pi) / (2 * math.pi) * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(cell[:, 0] * bins + cell[:, 1], minlength=bins**2).reshape(bins, bins).double()
    dof = bins**2 - 1

    def z_score(expected):
        return float((((counts - expected) ** 2 / expected).sum() - dof) / math.sqrt(2 * dof))

    assert abs(z_score(expected)) < 5.0
    tilted = expected * (1 + 0.1 * torch.linspace(-1, 1, bins)[:, None])
    assert z_score(tilted / tilted.sum() * n) > 5.0


@pytest.mark.parametrize("changes", [{}, ATTENTION, {"linear": "affine"}, {"split": False, "n_backbone_blocks": 0}])
def test_log_q_of_a_sample_is_its_log_prob(changes, make_layout, perturb):
    layout = make_layout("LcClCl", 1, 2.0)
    flow = perturb(build_flow(layout, small(**changes)), 0.2)
    y, log_q = flow.sample(200)
    assert y.dtype == log_q.dtype == torch.float64
    assert torch.isfinite(log_q).all()
    assert ((y >= -math.pi) & (y < math.pi))[:, torch.tensor(layout.circular)].all()
    # networks are float32: a conditioner input that rounds the other way moves log q by about 1e-6
    assert (flow.log_prob(y) - log_q).abs().max() < 1e-5


def rounding_of(flow, y, n=24):
    """What float32 networks do to log q(y), [B]: rms over `n` copies of a float64 flow, a rounding off each.

    The networks' weights and inputs are multiplied by 1 + 2⁻²⁴ ξ, ξ normal: a computed sum of products is the exact
    one of factors that differ by about so much (Higham, "Accuracy and Stability of Numerical Algorithms", section
    3.1). Each sample has its own value, and they span decades: inside a bin that is narrow and high, log q changes
    with the network's output by the inverse of its width.
    """

    def rounded(value):
        return value * (1.0 + 2.0**-24 * torch.randn_like(value))

    exact, squares = flow.log_prob(y), 0.0
    for _ in range(n):
        twin = copy.deepcopy(flow)
        for layer in (module for module in twin.modules() if isinstance(module, CouplingLayer)):
            layer.conditioner.register_forward_pre_hook(lambda _, args: tuple(map(rounded, args)))
            for parameter in layer.conditioner.parameters():
                parameter.copy_(rounded(parameter))
        squares = squares + (twin.log_prob(y) - exact).square()
    return (squares / n).sqrt()


@pytest.mark.statistical
@pytest.mark.parametrize(
    "changes", [{}, ATTENTION, {"conditioner": "gated"}, {"linear": "affine"}, {"split": False, "n_backbone_blocks": 0}]
)
def test_single_precision_networks_are_those_of_double_precision(changes, make_layout, perturb):
    """log q differs by the networks' rounding and by nothing else, sample by sample; a phase off by 1e-5 rad shows."""
    flow = perturb(build_flow(make_layout("LcClCl", 1, 2.0), small(**changes)), 0.2)
    double = copy.deepcopy(flow).double()
    with torch.no_grad():
        y, _ = flow.sample(200)
        sigma = rounding_of(double, y)

        def worst():
            return float(((double.log_prob(y) - flow.log_prob(y)) / sigma).abs().max())

        assert sigma.max() > 5 * sigma.median() and sigma.median() < 1e-4, "samples of every kind"
        assert worst() < 8.0
        next(m for m in double.modules() if isinstance(m, CouplingLayer) and m.n_circular).phase += 1e-5
        assert worst() > 16.0


@pytest.mark.parametrize(
    "changes", [{}, ATTENTION, {"conditioner": "gated"}, {"linear": "affine"}, {"split": False, "n_backbone_blocks": 0}]
)
def test_all_but_the_networks_is_in_the_precision_of_the_argument(changes, make_layout, perturb):
    """A float64 flow that is handed the outputs of the float32 networks has the same log q, to the bit."""
    flow = perturb(build_flow(make_layout("LcClCl", 3, 2.0), small(**changes)), 0.2)
    double = copy.deepcopy(flow).double()
    with torch.no_grad():
        y, _ = flow.sample(200)
        assert not torch.equal(double.log_prob(y), flow.log_prob(y))
        layers = [[m for m in f.modules() if isinstance(m, CouplingLayer)] for f in (double, flow)]
        for theirs, ours in zip(*layers, strict=True):
            single = ours.conditioner
            theirs.conditioner.register_forward_hook(lambda _, args, out, single=single: single(*args).to(out.dtype))
        assert torch.equal(double.log_prob(y), flow.log_prob(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_in_is_dtype_out(dtype, make_layout, perturb):
    flow = perturb(build_flow(make_layout("LcCl", 3, 1.0), small()), 0.1)
    z = flow.sample_base(20).to(dtype)
    for value in (*flow(z), *flow.inverse(z), flow.log_prob(z), flow.base_log_prob(z)):
        assert value.dtype == dtype
    assert next(flow.parameters()).dtype == torch.float32
    if dtype == torch.float64:
        y, _ = flow(z)
        assert (flow.inverse(y)[0] - z).abs().max() < 1e-9, "float64 round trip with float32 networks"


@pytest.mark.parametrize("kinds", ["L", "c", "LLL", "ccc", "CCC", "LlLl", "LC", "lc", "cL", "LCc"])
@pytest.mark.parametrize("changes", [{}, ATTENTION, {"linear": "spline", "conditioner": "attention", "n_units": 2}])
def test_empty_channels_and_single_kinds(kinds, changes, make_layout, perturb):
    flow = perturb(build_flow(make_layout(kinds, 1, 0.5), small(**changes)), 0.2)
    y, log_q = flow.sample(30)
    assert y.shape == (30, len(kinds))
    assert (flow.log_prob(y) - log_q).abs().max() < 1e-5
    if kinds in ("c", "LLL", "lc"):
        scripted = torch.jit.script(flow)
        assert (scripted.log_prob(y) - log_q).abs().max() < 1e-5
    (-flow.log_prob(y.float()).mean()).backward()
    for p in flow.parameters():
        assert p.grad is None or torch.isfinite(p.grad).all()


@pytest.mark.parametrize("batch", [0, 1, 10, 11, 25])
@pytest.mark.parametrize("changes", [{}, ATTENTION])
def test_large_batches_pass_in_equal_pieces(batch, changes, make_layout, perturb, monkeypatch):
    """Without gradients alone, eagerly and scripted; each row goes where it came from."""
    flow = perturb(build_flow(make_layout("LcClCl", 3, 2.0), small(**changes)), 0.2).double()
    flow.at_once = 5
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    scripted = torch.jit.script(flow)
    z = flow.sample_base(batch)
    sizes = []
    for name in ("_forward", "_inverse"):
        original = getattr(flow, name)
        monkeypatch.setattr(flow, name, lambda x, original=original: (sizes.append(len(x)), original(x))[1])
    whole = flow(z)
    whole += flow.inverse(whole[0])
    assert sizes == [batch, batch]
    sizes.clear()
    with torch.no_grad():
        pieces = flow(z)
        pieces += flow.inverse(pieces[0])
        lone = scripted(z)
        lone += scripted.inverse(lone[0])
    assert sizes == 2 * {0: [0], 1: [1], 10: [10], 11: [6, 5], 25: [9, 9, 7]}[batch]
    for a, b, c in zip(whole, pieces, lone, strict=True):
        assert a.shape == b.shape == c.shape
        assert torch.allclose(a, b, rtol=0.0, atol=1e-11) and torch.allclose(a, c, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("name", ["paper", "cpu", "protein", "nsf"])
def test_presets_build_and_run(name, make_layout):
    config = FlowConfig.preset(name)
    flow = build_flow(make_layout("LCCllc", 1, 1.0), config)
    y, log_q = flow.eval().sample(8)
    assert (flow.log_prob(y) - log_q).abs().max() < 1e-9
    if name == "paper":
        assert len(flow.inner.backbone_blocks.blocks) == 48
        assert len(flow.inner.joint_blocks.blocks) == 10
    elif name == "nsf":
        assert len(flow.inner.stack.blocks) == 58


def test_mixed_transform_puts_splines_next_to_the_data(make_layout):
    def affine(stack):
        return [block.n_affine > 0 for block in stack.blocks]

    both = build_flow(make_layout("LLLLllll"), small(n_backbone_blocks=4, n_joint_blocks=4)).inner
    assert affine(both.backbone_blocks) == affine(both.joint_blocks) == [False, False, True, True]
    only = build_flow(make_layout("LLLL"), small(n_backbone_blocks=4, n_joint_blocks=4)).inner
    assert affine(only.joint_blocks) == [True] * 4
    side = build_flow(make_layout("llll"), small(n_backbone_blocks=4, n_joint_blocks=4)).inner
    assert affine(side.backbone_blocks) == [] and affine(side.joint_blocks) == [False, False, True, True]


@pytest.mark.parametrize("changes", [{}, ATTENTION, {"split": False, "n_backbone_blocks": 0}])
def test_script_save_and_load(changes, make_layout, perturb):
    flow = perturb(build_flow(make_layout("LcClCl", 3, 2.0), small(**changes)), 0.15)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(flow), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert not loaded.training
    with torch.no_grad():
        y, log_q = loaded.sample(50)
        for _ in range(3):
            assert (loaded.log_prob(y) - log_q).abs().max() < 1e-5
            assert (flow.log_prob(y) - log_q).abs().max() < 1e-5
        z = loaded.sample_base(50)
        assert torch.allclose(loaded.base_log_prob(z), flow.base_log_prob(z))
        assert torch.allclose(loaded(z)[0], flow(z)[0], atol=1e-5)
        assert torch.allclose(loaded.inverse(y)[0], flow.inverse(y)[0], atol=1e-5)
        torch.manual_seed(7)
        a, _ = flow.sample(20)
        torch.manual_seed(7)
        b, _ = loaded.sample(20)
        assert torch.allclose(a, b, atol=1e-5)


def test_scripted_gradients(make_layout, perturb):
    flow = perturb(build_flow(make_layout("LcClCl", 1, 2.0), small()), 0.15)
    scripted = torch.jit.script(flow)
    y = flow.sample(20)[0].detach()
    expected = torch.autograd.grad(flow.log_prob(y.requires_grad_()).sum(), y)[0]
    for _ in range(3):
        got = torch.autograd.grad(scripted.log_prob(y).sum(), y)[0]
        assert torch.allclose(got, expected, atol=1e-5, rtol=1e-4)


def test_training_mode_has_dropout_and_eval_does_not(make_layout, perturb):
    flow = perturb(build_flow(make_layout("LcClCl"), small(**ATTENTION)), 0.2)
    y, _ = flow.sample(20)
    assert torch.equal(flow.log_prob(y), flow.log_prob(y))
    flow.train()
    assert not torch.equal(flow.log_prob(y), flow.log_prob(y))


def test_seeds(make_layout):
    layout = make_layout("LcClCl")
    state = torch.get_rng_state()
    a, b, c = (build_flow(layout, small(), seed=s) for s in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), c.state_dict().values(), strict=True))


def test_masks_and_phases_travel_with_the_weights(make_layout, perturb):
    """A checkpoint restored into a flow of another seed must be the same density."""
    layout = make_layout("C" * 10)
    config = small(n_backbone_blocks=6)
    flow, other = perturb(build_flow(layout, config, seed=0), 0.1), build_flow(layout, config, seed=1).eval()
    y, log_q = flow.sample(20)
    other.load_state_dict(flow.state_dict())
    assert (other.log_prob(y) - log_q).abs().max() < 1e-5


def test_gradients_reach_every_parameter_and_both_directions(make_layout, perturb):
    flow = perturb(build_flow(make_layout("LcClCl", 1, 1.0), small(phase_shift="learned")), 0.1).train()
    z = flow.sample_base(50).float()
    y, log_det = flow(z)
    (y.square().sum() - log_det.sum() - flow.log_prob(y.detach()).sum()).backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_empty_layout_is_refused():
    with pytest.raises(InputError, match="no coordinates"):
        build_flow(FeatureLayout([], [], [], [], [], []), small())


def test_non_finite_standardisation_is_refused():
    layout = FeatureLayout([False], [True], [1], [0.0], [float("nan")], [1.0])
    with pytest.raises(InputError, match="finite"):
        build_flow(layout, small())
