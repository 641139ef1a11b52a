"""Reconstruction by parallel prefix: against atom-by-atom placement, its gradients, and the number of rounds."""

import math
import random

import pytest
import torch

from openmm_bg.coordinates import InternalCoordinates, build_zmatrix, dense, frames
from openmm_bg.coordinates.prefix import LONG, build_schedule
from openmm_bg.coordinates.rotations import bond_axis, plane_axis


def atom_by_atom(zmatrix, seed, r, theta, phi):
    """Positions [B, N, 3] placed one after the other, each from three atoms before it (NeRF)."""
    zero = torch.zeros_like(seed[:, 0])
    x = [None] * zmatrix.n_atoms
    first, middle, last = zmatrix.seed
    r1, r2, angle = seed.unbind(-1)
    x[first] = torch.stack((zero, zero, zero), dim=-1)
    x[middle] = torch.stack((r1, zero, zero), dim=-1)
    x[last] = torch.stack((r1 - r2 * angle.cos(), r2 * angle.sin(), zero), dim=-1)
    for k, (atom, parent, grandparent, great) in enumerate(zmatrix.rows):
        e = x[parent] - x[grandparent]
        e = e / e.norm(dim=-1, keepdim=True)
        n = torch.linalg.cross(x[grandparent] - x[great], e)
        n = n / n.norm(dim=-1, keepdim=True)
        local = torch.stack(
            (-theta[:, k].cos(), theta[:, k].sin() * phi[:, k].cos(), theta[:, k].sin() * phi[:, k].sin()), dim=-1
        )
        x[atom] = (
            x[parent]
            + r[:, k, None] * (torch.stack((e, torch.linalg.cross(n, e), n), dim=-1) @ local[..., None])[..., 0]
        )
    return torch.stack(x, dim=1)


def random_coordinates(n_rows: int, batch: int, dtype=torch.float64):
    """Seed, r, θ, φ anywhere in their domain, leaves of the graph."""
    torch.manual_seed(3)

    def between(low, high, *shape):
        return (low + (high - low) * torch.rand(*shape, dtype=torch.float64)).to(dtype).requires_grad_()

    seed = torch.cat((between(0.1, 0.2, batch, 2), between(0.5, 2.5, batch, 1)), dim=1).detach().requires_grad_()
    return (
        seed,
        between(0.1, 0.2, batch, n_rows),
        between(0.3, 2.8, batch, n_rows),
        between(-math.pi, math.pi, batch, n_rows),
    )


NAMES = ["water", "methanol", "isobutane", "toluene", "dipeptide", "proline", "hp35"]


@pytest.fixture(params=["as it comes", "in rounds"])
def way(request, monkeypatch):
    """Small molecules have a way of their own, which large ones and large batches never take."""
    if request.param == "in rounds":
        monkeypatch.setattr("openmm_bg.coordinates.frames.DENSE_BATCH", -1)
        monkeypatch.setattr("openmm_bg.coordinates.dense.place", None)
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_against_atom_by_atom(molecule, name, way):
    """Positions and gradients with respect to every coordinate, seed included."""
    zmatrix = build_zmatrix(molecule(name).topology)
    internal = InternalCoordinates(zmatrix)
    q = random_coordinates(len(zmatrix.rows), 3)
    x, expected = internal.to_positions(*q), atom_by_atom(zmatrix, *q)
    assert (x - expected).abs().max() < 1e-12
    towards = torch.randn_like(x)
    found = torch.autograd.grad(x, q, towards)
    wanted = torch.autograd.grad(expected, q, towards, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-10, rtol=1e-9)
    single = tuple(t.detach().float().requires_grad_() for t in q)
    x32 = internal.to_positions(*single)
    assert x32.dtype == torch.float32 and (x32 - x).abs().max() < 1e-4
    for a, b in zip(torch.autograd.grad(x32, single, towards.float()), found, strict=True):
        assert a.dtype == torch.float32
        if b.numel():
            assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("name", ["water", "isobutane", "dipeptide"])
def test_gradcheck(molecule, name, way):
    zmatrix = build_zmatrix(molecule(name).topology)
    internal = InternalCoordinates(zmatrix)
    assert torch.autograd.gradcheck(internal.to_positions, random_coordinates(len(zmatrix.rows), 2))


def test_gradient_of_some_inputs_only(molecule, way):
    """As in `reduced`, where lengths come from a buffer."""
    zmatrix = build_zmatrix(molecule("dipeptide").topology)
    seed, r, theta, phi = random_coordinates(len(zmatrix.rows), 2)
    x = InternalCoordinates(zmatrix).to_positions(seed.detach(), r.detach(), theta.detach(), phi)
    (found,) = torch.autograd.grad(x.square().sum(), phi)
    (wanted,) = torch.autograd.grad(atom_by_atom(zmatrix, seed, r, theta, phi).square().sum(), phi)
    assert torch.allclose(found, wanted, atol=1e-10)


def test_a_second_derivative_is_refused_aloud(molecule):
    zmatrix = build_zmatrix(molecule("butane").topology)
    q = random_coordinates(len(zmatrix.rows), 2)
    x = InternalCoordinates(zmatrix).to_positions(*q)
    (gradient,) = torch.autograd.grad(x.square().sum(), q[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_straight_angles_and_empty_batches(molecule):
    """At θ = π the plane is undefined in space, not in the coordinates: values and gradients stay finite."""
    zmatrix = build_zmatrix(molecule("hp35").topology)
    internal = InternalCoordinates(zmatrix)
    seed, r, theta, phi = random_coordinates(len(zmatrix.rows), 2)
    theta = theta.detach().clone()
    theta[:, ::7] = math.pi
    theta[:, 1::7] = 0.0
    theta.requires_grad_()
    x = internal.to_positions(seed, r, theta, phi)
    gradients = torch.autograd.grad(x.square().sum(), (seed, r, theta, phi))
    assert torch.isfinite(x).all() and all(torch.isfinite(g).all() for g in gradients)
    nothing = internal.to_positions(*(t[:0] for t in (seed, r, theta, phi)))
    assert nothing.shape == (0, zmatrix.n_atoms, 3)
    small = InternalCoordinates(build_zmatrix(molecule("dipeptide").topology))
    assert small.to_positions(*(t[:0] for t in random_coordinates(19, 1))).shape == (0, 22, 3)
    assert [t.shape[0] for t in internal.to_internal(nothing.detach())] == [0] * 4


def test_a_small_molecule_goes_its_own_way_up_to_a_size_of_the_batch(molecule, monkeypatch):
    """Just below and just above the limit: the same positions and gradients, by different functions."""
    internal = InternalCoordinates(build_zmatrix(molecule("dipeptide").topology))
    monkeypatch.setattr(frames, "DENSE_BATCH", 22 * 5)
    calls = []
    for module, name in ((dense, "place"), (frames, "_place"), (dense, "turn"), (frames, "_turn")):
        original = getattr(module, name)
        label = f"{module.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(
            module, name, lambda *args, label=label, original=original: (calls.append(label), original(*args))[1]
        )
    q = tuple(t.detach() for t in random_coordinates(19, 6))
    results = []
    for batch in (5, 6):
        leaves = tuple(t[:batch].clone().requires_grad_() for t in q)
        x = internal.to_positions(*leaves)
        results.append((x[:5], *(g[:5] for g in torch.autograd.grad(x.cos().sum(), leaves))))
    assert calls == ["dense.place", "dense.turn", "frames._place", "frames._turn"]
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0.0, atol=1e-12)


def signs_of(n):
    return torch.tensor(dense.SIGNS, dtype=torch.float64).repeat(n).reshape(-1, 4)


def test_left_product_is_that_of_quaternions():
    """Signs and components against the 3x3 rotations of both factors; its axes against their first and last columns."""
    torch.manual_seed(1)
    left, right = torch.nn.functional.normalize(torch.randn(2, 40, 4, dtype=torch.float64), dim=-1)
    parts = (right[:, dense.COMPONENTS] * torch.tensor(dense.SIGNS)).reshape(-1, 4, 4)
    product = (left[:, :, None] * parts).sum(1)
    assert torch.equal(parts.flatten(0, 1), right.flatten()[dense.factors(40)].reshape(-1, 4) * signs_of(40))

    def rotation(q):
        w, x, z, y = q.unbind(-1)
        y = -y  # w + x i + p k + q i k, and i k = -j
        rows = (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        )
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    assert torch.allclose(rotation(product), rotation(left) @ rotation(right), atol=1e-14)
    turned = rotation(left)
    for axis, column in ((bond_axis, 0), (plane_axis, 2)):
        assert torch.allclose(axis(left[..., None])[..., 0], turned[..., column], atol=1e-14)


def test_settings_of_products_leave_positions_alone(molecule):
    """Training may allow products in bfloat16: positions and their gradients are sums, and keep their bits."""
    internal = InternalCoordinates(build_zmatrix(molecule("dipeptide").topology))
    q = tuple(t.detach().float().requires_grad_() for t in random_coordinates(19, 64))
    results = []
    before = torch.get_float32_matmul_precision()
    for setting in ("highest", "medium"):
        try:
            torch.set_float32_matmul_precision(setting)
            x = internal.to_positions(*q)
            results.append((x, *torch.autograd.grad(x.cos().sum(), q)))
        finally:
            torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_pieces_of_a_large_batch(molecule, monkeypatch):
    """What is read in pieces is what is read at once, gradients included."""
    mol = molecule("dipeptide")
    internal = InternalCoordinates(build_zmatrix(mol.topology))
    monkeypatch.setattr("openmm_bg.coordinates.transform.DENSE_ATOMS", 0)

    def read():
        x = mol.x[:10].clone().requires_grad_()
        q = internal.to_internal(x)
        return *q, torch.autograd.grad(sum(part.square().sum() for part in q), x)[0]

    at_once = read()
    monkeypatch.setattr("openmm_bg.coordinates.transform.CPU_ATOMS", 3 * 22 + 1)
    calls = []
    original = InternalCoordinates._to_internal
    monkeypatch.setattr(
        InternalCoordinates, "_to_internal", lambda self, x: (calls.append(len(x)), original(self, x))[1]
    )
    for a, b in zip(read(), at_once, strict=True):
        assert torch.allclose(a, b, atol=1e-14)
    assert calls == [3, 3, 3, 1]


@pytest.mark.parametrize("name", ["water", "ethylamine", "dipeptide"])
def test_few_calls_give_what_many_give(molecule, monkeypatch, name):
    """What reads small batches and what reads large ones, gradients by single coordinates included."""
    mol = molecule(name)
    internal = InternalCoordinates(build_zmatrix(mol.topology))
    torch.manual_seed(4)
    towards = [torch.randn(n, dtype=torch.float64) for n in (3, *3 * [mol.x.shape[1] - 3])]

    def read(limit):
        monkeypatch.setattr("openmm_bg.coordinates.transform.DENSE_ATOMS", limit)
        x = mol.x[:10].clone().requires_grad_()
        q = internal.to_internal(x)
        return *q, torch.autograd.grad(sum((part * along).sum() for part, along in zip(q, towards, strict=True)), x)[0]

    many, few = read(0), read(10 * mol.x.shape[1])
    rounding = 1e3 * torch.finfo(torch.float64).eps  # both are sums of a dozen terms; angles here are far from straight
    for a, b in zip(many, few, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert ((a - b).abs() <= rounding * b.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("batch", [0, 1, 10])
def test_a_large_batch_is_placed_in_pieces(molecule, monkeypatch, batch):
    """Positions and gradients of the pieces are those of the whole; a piece is never empty, none is left out."""
    internal = InternalCoordinates(build_zmatrix(molecule("dipeptide").topology))
    q = tuple(t[:batch].detach().requires_grad_() for t in random_coordinates(19, 10))
    towards = torch.randn(batch, 22, 3, dtype=torch.float64)

    def placed():
        x = internal.to_positions(*q)
        return x.detach(), *torch.autograd.grad(x, q, towards)

    monkeypatch.setattr("openmm_bg.coordinates.frames.DENSE_BATCH", -1)
    at_once = placed()
    monkeypatch.setattr("openmm_bg.coordinates.frames.CPU_ATOMS", 4 * 22)
    sizes, original = [], frames._place
    monkeypatch.setattr(
        frames, "_place", lambda tree, seed, *rest: (sizes.append(len(seed)), original(tree, seed, *rest))[1]
    )
    for a, b in zip(placed(), at_once, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=1e-13)
    assert sizes == {0: [0], 1: [1], 10: [4, 4, 2]}[batch]


def hexyne(build_topology, bend):
    """3-hexyne: coordinates [4, ...] with both angles at the triple bond ``bend`` short of straight."""
    zmatrix = build_zmatrix(build_topology("C3 C2 C0 C0 C2 C3", "0-1 1-2 2-3 3-4 4-5"))
    seed, r, theta, phi = (t.detach() for t in random_coordinates(len(zmatrix.rows), 4))
    for k, row in enumerate(zmatrix.rows):
        if row[1] in (2, 3):
            theta[:, k] = math.pi - bend
    return zmatrix, (seed, r, theta, phi)


@pytest.mark.parametrize("bend", [0.05, 1e-3, 1e-5])
def test_atoms_nearly_in_line(build_topology, bend):
    """Dihedrals about a nearly straight axis keep what the positions hold: errors grow with 1 / bend, no faster."""
    zmatrix, q = hexyne(build_topology, bend)
    assert zmatrix.seed[1] not in (2, 3), "an alkyne's carbon would make a straight seed"
    internal = InternalCoordinates(zmatrix)
    axes = random_rotation() @ torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    x = internal.to_positions(*q) @ axes.T + 1.0
    pairs = torch.cdist(x, x)
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype).requires_grad_()
        found = internal.to_internal(given)
        again = internal.to_positions(*(t.detach() for t in found)).double()
        assert (torch.cdist(again, again) - pairs).abs().max() < 30 * torch.finfo(dtype).eps / bend
        (gradient,) = torch.autograd.grad(sum(t.cos().sum() for t in found), given)
        assert torch.isfinite(gradient).all()


def random_rotation():
    torch.manual_seed(8)
    q, r = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * torch.linalg.det(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_positions_are_outside_the_domain(molecule, dtype):
    """What has no inverse is said to be none instead of being folded back: atoms in line, on one spot, or nowhere."""
    mol = molecule("butane")
    m = mol.map()
    x = mol.x[:1].to(dtype).repeat(4, 1, 1)
    carbons = [row for row in m.zmatrix.rows if row[0] < 4]
    atom, parent, grandparent, _ = carbons[0]
    x[1, [atom, parent, grandparent]] = torch.tensor([[0.25, 0, 0], [0.125, 0, 0], [0, 0, 0]], dtype=dtype)
    x[2, atom] = x[2, parent]
    x[3, atom, 1] = math.nan
    y, s = m.to_internal(x)
    assert y.dtype == dtype and m.in_domain(y, s).tolist() == [True, False, False, False]


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize("long", [1, 2, 5, LONG, 10_000])
def test_schedule_composes_every_path(long):
    """Words instead of motions, for they do not commute either."""
    for case in range(60):
        rng = random.Random(case)
        n_roots, reach = rng.randint(1, 3), rng.choice([1, 2, 5, 50])
        n = n_roots + rng.randint(0, 200)
        parent = [-1] * n_roots + [rng.randint(max(0, i - reach), i - 1) for i in range(n_roots, n)]
        schedule = build_schedule(parent, long)
        assert sorted(schedule.slots) == list(range(n)) and schedule.slots[:n_roots] == list(range(n_roots))
        words = [(node,) for node in schedule.slots]
        for start, stop, sources in schedule.rounds:
            assert len(sources) == stop - start > 0 and not set(sources) & set(range(start, stop))
            words[start:stop] = [words[s] + words[start + i] for i, s in enumerate(sources)]
        for node, word in zip(schedule.slots, words, strict=True):
            path = [node]
            while parent[path[-1]] >= 0:
                path.append(parent[path[-1]])
            assert word == tuple(reversed(path))


@pytest.mark.parametrize("long", [1, LONG])
def test_chains_around_powers_of_two(long):
    for n in (*range(1, 36), 63, 64, 65, 127, 128, 129, 1023, 1024, 1025):
        schedule = build_schedule([-1, *range(n)], long)
        reach = {0: (0,)} | {node: (node,) for node in range(1, n + 1)}
        words = [reach[node] for node in schedule.slots]
        for start, stop, sources in schedule.rounds:
            words[start:stop] = [words[s] + words[start + i] for i, s in enumerate(sources)]
        assert all(word == tuple(range(node + 1)) for node, word in zip(schedule.slots, words, strict=True))
        if long == 1:
            assert len(schedule.rounds) <= 2 * n.bit_length()


def test_rounds_grow_with_the_logarithm():
    """A comb: a backbone of n atoms, each with a side chain of five. Work stays linear."""
    rounds, work = {}, {}
    for n in (64, 1024, 16384):
        parent, tip = [-1], 0
        for _ in range(n):
            parent.append(tip)
            tip = len(parent) - 1
            for k in range(5):
                parent.append(tip if k == 0 else len(parent) - 1)
        schedule = build_schedule(parent)
        rounds[n] = len(schedule.rounds)
        work[n] = sum(stop - start for start, stop, _ in schedule.rounds) / len(parent)
    assert rounds[1024] - rounds[64] == rounds[16384] - rounds[1024] == 8  # two for each doubling
    assert rounds[16384] < 40 and max(work.values()) < 1.2


def test_rounds_of_a_protein(molecule):
    zmatrix = build_zmatrix(molecule("hp35").topology)
    assert InternalCoordinates(zmatrix)._tree.n_rounds < max(zmatrix.levels) / 2
