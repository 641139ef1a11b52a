"""One frame in Python's floats is what it is in torch: coordinates, positions, volumes and the domain."""

import copy
import math
import pickle

import pytest
import torch

from openmm_bg.coordinates import constraints, representation
from openmm_bg.coordinates.constraints import FixmanTerm
from openmm_bg.coordinates.single import SingleFrame

NAMES = [
    "methanol", "propane", "butane", "isobutane", "ethylammonium", "ethylamine", "dimethylamine", "acetamide",
    "benzene", "toluene", "cyclohexane", "trifluoroethane", "water", "dipeptide", "tripeptide", "proline",
]  # fmt: skip


@pytest.fixture
def both(monkeypatch):
    """A call with one frame, under no_grad: what it returns in floats and in torch."""
    calls = []
    for name in ("to_internal", "to_positions", "in_domain"):
        genuine = getattr(SingleFrame, name)
        monkeypatch.setattr(SingleFrame, name, lambda *a, f=genuine: calls.append(1) or f(*a))

    def call(function, *arguments):
        found = []
        for limit in (representation.SINGLE_ATOMS, 0):
            calls.clear()
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(representation, "SINGLE_ATOMS", limit)
                result = function(*arguments)
            assert len(calls) == (limit > 0)
            found.append(result if isinstance(result, tuple) else (result,))
        for a, b in zip(*found, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
        return found

    return call


def assert_close(found, tolerance):
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("kind", ["full", "reduced"])
@pytest.mark.parametrize("name", NAMES)
def test_as_torch(molecule, name, kind, both):
    mol = molecule(name)
    systems = [mol.system] if name in ("methanol", "water") else [mol.system, mol.constrained()]
    for m in (mol.map(kind, system) for system in systems):
        assert m.n_atoms <= representation.SINGLE_ATOMS
        for x in mol.x[:5].split(1):
            found = both(m.to_internal_and_log_volume, x)
            # an angle at the edge of its interval may be on either side
            turned = [torch.remainder(a - b + 1, 2 * math.pi) - 1 for a, b in zip(*found, strict=True)]
            assert all((difference.abs() < 1e-11).all() for difference in turned)
            y, s, _ = found[1]
            assert_close(both(m.positions_and_log_volume, y, s), 1e-12)
            assert_close(both(m.positions_and_log_volume, y, s[0]), 1e-12)
            (inside,), _ = both(m.in_domain, y, s)
            assert torch.equal(inside, m.in_domain(y, s))


@pytest.mark.parametrize("name", ["dipeptide", "isobutane", "ethylamine"])
def test_far_from_the_data(molecule, name, both):
    """Circular coordinates anywhere; then lengths and angles outside the domain, where volumes are NaN in torch too."""
    mol = molecule(name)
    m = mol.map("full", mol.constrained())
    y, s = m.to_internal(mol.x[:40])
    torch.manual_seed(3)
    circular = torch.tensor(m.layout.circular)
    anywhere = torch.where(circular, 2 * math.pi * torch.rand(y.shape, dtype=y.dtype) - math.pi, y)
    inside = []
    for scale in (0.0, 0.02, 1.0):
        for row in (anywhere + scale * torch.randn(y.shape, dtype=y.dtype) * ~circular).split(1):
            assert_close(both(m.positions_and_log_volume, row, s[:1]), 1e-10)
            found = both(m.in_domain, row, s[:1])
            assert torch.equal(*(values[0] for values in found))
            inside.append(bool(found[0][0]))
    assert {*inside} == {True, False}


def test_the_edges_of_the_domain(molecule, both):
    """Open intervals: an angle of exactly π or 0 and a length of 0 are outside, as NaN and infinity are."""
    m = molecule("dipeptide").map("full")
    y, s = m.to_internal(molecule("dipeptide").x[:1])
    modelled = [c for c in m.coordinates if c.modelled]
    for kind, values in (("length", (0.0, -0.1)), ("angle", (0.0, math.pi)), ("dihedral", (math.nan, math.inf))):
        column = next(i for i, c in enumerate(modelled) if c.kind == kind)
        for value in values:
            other = y.clone()
            other[0, column] = value
            found = both(m.in_domain, other, s)
            assert not bool(found[0][0]) and not bool(found[1][0])


def test_nothing_is_placed_outside_the_domain(molecule):
    """One by one or in a batch, and none of it NaN inside; forbidden angles would fold back."""
    mol = molecule("dipeptide")
    m = mol.map("full", mol.constrained())
    y, s = m.to_internal(mol.x[:8])
    angle = next(i for i, c in enumerate(c for c in m.coordinates if c.modelled) if c.kind == "angle")
    y[::3, angle] = -y[::3, angle]
    outside = torch.arange(8) % 3 == 0
    with torch.no_grad():
        x, log_volume = m.positions_in_domain(y, s[:1])
        alone = [
            torch.cat(part) for part in zip(*(m.positions_in_domain(row, s[:1]) for row in y.split(1)), strict=True)
        ]
        inside = m.positions_and_log_volume(y[~outside], s[:1])
    for made, volume in ((x, log_volume), alone):
        assert torch.isnan(made[outside]).all() and torch.isneginf(volume[outside]).all()
        assert torch.allclose(made[~outside], inside[0], atol=1e-12)
        assert torch.allclose(volume[~outside], inside[1], atol=1e-10)


def test_not_finite(molecule):
    """Coordinates that are not finite give what torch makes of them; so do atoms on top of each other or in line."""
    mol = molecule("dipeptide")
    m, x = mol.map("full", mol.constrained()), mol.x[:1]
    y, s = m.to_internal(x)
    for value in (math.nan, math.inf, -math.inf):
        other = y.clone()
        other[0, 5] = value
        with torch.no_grad():
            made, log_volume = m.positions_and_log_volume(other, s)
        assert not torch.isfinite(made).all() and not torch.isfinite(log_volume).all()
    bad = [x.clone() for _ in range(3)]
    bad[0][0, 6] = bad[0][0, 4]
    bad[1][0, 3] = math.nan
    a, b, _ = m.zmatrix.seed
    bad[2][0, m.zmatrix.seed[2]] = 2 * x[0, b] - x[0, a]
    for frame in bad:
        with torch.no_grad():
            alone = m.to_internal_and_log_volume(frame)
            among = m.to_internal_and_log_volume(torch.cat((frame, x)))
        for one, two in zip(alone, among, strict=True):
            assert torch.equal(torch.isfinite(one[0]), torch.isfinite(two[0]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_gradients_other_types_and_traces_are_torch(molecule, monkeypatch):
    """What floats cannot give is left to torch: a graph, single precision, a trace that serves other positions."""
    m = molecule("dipeptide").map("full")
    x = molecule("dipeptide").x
    for name in ("to_internal", "to_positions", "in_domain"):
        monkeypatch.setattr(SingleFrame, name, None)
    y, s, log_volume = m.to_internal_and_log_volume(x[:1].clone().requires_grad_())
    assert y.requires_grad and log_volume.requires_grad
    with torch.no_grad():
        assert m.positions_and_log_volume(y.float(), s.float())[0].dtype == torch.float32
        assert m.in_domain(*m.to_internal(x[:2])).shape == (2,)
        traced = torch.jit.trace(lambda frame: m.to_internal_and_log_volume(frame), (x[:1],), check_trace=False)
        assert torch.allclose(traced(x[1:2])[0], m.to_internal(x[1:2])[0], atol=1e-12)


def test_copies(molecule, both):
    """The map of a copy, of a pickle, and of a System with other masses, is that System's."""
    mol = molecule("dipeptide")
    m = mol.map("full", mol.constrained())
    y, s = m.to_internal(mol.x[:1])
    light = m.with_constraints(mol.map("full").constraints)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), light):
        assert_close(both(other.positions_and_log_volume, y, s), 1e-12)
    with torch.no_grad():
        volumes = [float(one.positions_and_log_volume(y, s)[1]) for one in (m, light)]
    assert abs(volumes[0] - volumes[1]) > 0.1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_fixman_term(size):
    """Blocks of any size, and hydrogens on top of each other, whose R has no determinant."""
    torch.manual_seed(size)
    rows = [list(range(start, start + size)) for start in (0, size)]
    term = FixmanTerm([(rows[0], [1.0] * size, 12.0), (rows[1], [2.0] * size, 14.0)])
    theta = torch.rand(5, 2 * size, dtype=torch.float64) + 1
    phi = 2 * math.pi * torch.rand(5, 2 * size, dtype=torch.float64)
    for angles, turns, value in zip(theta.tolist(), phi.tolist(), term(theta, phi), strict=True):
        assert term.of_frame(angles, turns) == pytest.approx(float(value), abs=1e-12)


def test_determinants_of_singular_matrices():
    for scaled in ([1.0], [1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [0.3, math.nan, 0.2], [0.5] * 6):
        size = {1: 2, 3: 3, 6: 4}[len(scaled)]
        (expected,) = constraints._log_determinant(torch.tensor([[scaled]], dtype=torch.float64), size)
        found = constraints._log_determinant_of(scaled, size)
        assert found == pytest.approx(float(expected), abs=1e-12, nan_ok=True)
