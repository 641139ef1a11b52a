"""x → (y, s) → x and back, derivatives, and the volume element against autograd."""

import math

import numpy as np
import pytest
import torch

from openmm_bg.coordinates import CoordinateMap, place_like, wrap

NAMES = [
    "methanol", "propane", "butane", "isobutane", "ethylammonium", "ethylamine", "dimethylamine", "acetamide",
    "benzene", "toluene", "cyclohexane", "trifluoroethane", "water", "dipeptide", "tripeptide", "proline", "hp35",
]  # fmt: skip
REPRESENTATIONS = ["full", "reduced"]


def largest_error(m: CoordinateMap, x: torch.Tensor, back: torch.Tensor) -> float:
    placed = torch.cat([place_like(back[i : i + 1], x[i], m.zmatrix.seed) for i in range(len(x))])
    return float((placed - x).abs().max())


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_positions_survive(molecule, name, representation):
    mol = molecule(name)
    x = mol.x[:20]
    m = mol.map(representation)
    y, s = m.to_internal(x)
    assert y.shape[1] + s.shape[1] == 3 * m.n_atoms - 6
    assert y.shape[1] == m.n_modelled == m.layout.n and s.shape[1] == m.n_fixed == len(m.reference_fixed)
    assert m.in_domain(y, s).all()
    back = m.to_positions(y, s)
    assert back.dtype == torch.float64
    assert largest_error(m, x, back) < 1e-10
    single = x.float()
    y32, s32 = m.to_internal(single)
    back32 = m.to_positions(y32, s32)
    assert y32.dtype == s32.dtype == back32.dtype == torch.float32
    assert m.log_volume(y32, s32).dtype == torch.float32
    assert largest_error(m, single, back32) < 1e-4


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", ["methanol", "isobutane", "ethylamine", "toluene", "dipeptide", "tripeptide"])
def test_coordinates_survive(molecule, name, representation):
    """q → x → q for q drawn independently, far from the data."""
    mol = molecule(name)
    m = mol.map(representation)
    y, s = m.to_internal(mol.x)
    torch.manual_seed(1)
    n = 30
    pick = torch.randint(len(y), (n, y.shape[1]))
    circular = torch.tensor(m.layout.circular)
    mixed = torch.gather(y, 0, pick) + 0.02 * torch.randn(n, y.shape[1], dtype=y.dtype) * ~circular
    mixed = torch.where(circular, 2 * math.pi * torch.rand(n, y.shape[1], dtype=y.dtype) - math.pi, mixed)
    assert m.in_domain(mixed, s[:n]).all()
    y2, s2 = m.to_internal(m.to_positions(mixed, s[:n]))
    error = torch.cat((y2 - mixed, s2 - s[:n]), dim=-1)
    assert (torch.remainder(error + 1, 2 * math.pi) - 1).abs().max() < 1e-9


def test_one_row_of_s_serves_a_batch(molecule):
    m = molecule("dipeptide").map("reduced")
    y, _ = m.to_internal(molecule("dipeptide").x[:5])
    expanded = m.reference_fixed.expand(5, -1)
    assert torch.equal(m.to_positions(y, m.reference_fixed), m.to_positions(y, expanded))
    assert torch.equal(m.log_volume(y, m.reference_fixed), m.log_volume(y, expanded))
    assert torch.equal(m.in_domain(y, m.reference_fixed), m.in_domain(y, expanded))
    x, volume = m.positions_and_log_volume(y, expanded)
    assert torch.equal(x, m.to_positions(y, expanded)) and torch.equal(volume, m.log_volume(y, expanded))


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("name", ["propane", "ethylamine"])
def test_gradients(molecule, name, constrained):
    mol = molecule(name)
    m = mol.map("full", mol.constrained() if constrained else None)
    x = mol.x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: m.to_internal(p), (x,), atol=1e-5)
    y, s = (t.detach().requires_grad_() for t in m.to_internal(mol.x[:2]))
    assert torch.autograd.gradcheck(m.positions_and_log_volume, (y, s), atol=1e-5)


@pytest.mark.parametrize("name", ["ethylammonium", "dipeptide"])
def test_gradients_by_y_and_by_s(molecule, name):
    """`reduced`: lengths, angles and offsets in s, methyl rotors and carriers in y, one row of s for a batch of y."""
    mol = molecule(name)
    m = mol.map("reduced", mol.constrained())
    y, s = m.to_internal(mol.x[:2])
    assert m._triples.numel() and len(m._siblings) and m.n_fixed > len(m.constraints.bonds)
    y, s = y.requires_grad_(), s[:1].requires_grad_()
    towards = torch.randn(2, m.n_atoms, 3, dtype=torch.float64)

    def projected(y, s):
        x, volume = m.positions_and_log_volume(y, s)
        return (x * towards).sum() + volume.sum()

    assert torch.autograd.gradcheck(projected, (y, s), atol=1e-5)


def test_angles_wrap_to_a_half_open_interval():
    """-π - ε comes back as the number before π, never as π itself, in either precision."""
    for dtype in (torch.float64, torch.float32):
        pi = torch.tensor(math.pi, dtype=dtype)
        steps = torch.arange(-40, 41, dtype=dtype) * torch.finfo(dtype).eps
        for turn in (-3.0, -1.0, 0.0, 1.0, 3.0):
            found = wrap(turn * pi + steps)
            assert (found >= -pi).all() and (found < pi).all()
            assert ((found - turn * pi - steps).cos() - 1.0).abs().max() < 1e-6


def rotation(alpha: torch.Tensor, beta: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Rz(α) Ry(β) Rz(γ); the Haar measure is sin β dα dβ dγ."""

    def about(axis: int, angle: torch.Tensor) -> torch.Tensor:
        c, s, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
        rows = {
            1: [[c, zero, s], [zero, one, zero], [-s, zero, c]],
            2: [[c, -s, zero], [s, c, zero], [zero, zero, one]],
        }[axis]
        return torch.stack([torch.stack(row) for row in rows])

    return about(2, alpha) @ about(1, beta) @ about(2, gamma)


def brute_force_log_jacobian(m: CoordinateMap, y: torch.Tensor, s: torch.Tensor, frame=None) -> float:
    """log |det dx / d(t, α, β, γ, y, s)| - log sin β by autograd; ``frame``: the atoms that name the rigid frame."""

    def positions(q: torch.Tensor) -> torch.Tensor:
        internal = q[6:]
        x = m.to_positions(internal[None, : m.n_modelled], internal[None, m.n_modelled :])[0]
        if frame is not None:
            home = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=x.dtype)
            reference = torch.zeros_like(x).index_copy(0, torch.tensor(frame), home)
            x = place_like(x[None], reference, frame)[0]
        return (x @ rotation(q[3], q[4], q[5]).T + q[:3]).reshape(-1)

    beta = 1.1
    rigid = torch.tensor([0.3, -0.2, 0.5, 0.4, beta, -2.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(positions, torch.cat((rigid, y, s)))
    return float(torch.linalg.slogdet(jacobian)[1]) - math.log(math.sin(beta))


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", ["methanol", "water", "isobutane", "ethylamine", "toluene", "dipeptide", "tripeptide"])
def test_log_jacobian(molecule, name, representation):
    mol = molecule(name)
    m = mol.map(representation)
    for i in (0, 7):
        y, s = (t[0] for t in m.to_internal(mol.x[i : i + 1]))
        expected = brute_force_log_jacobian(m, y, s)
        assert float(m.log_volume(y[None], s[None])) == pytest.approx(expected, abs=1e-8)


def test_log_jacobian_does_not_depend_on_the_frame(molecule):
    mol = molecule("butane")
    m = mol.map()
    y, s = (t[0] for t in m.to_internal(mol.x[:1]))
    expected = float(m.log_volume(y[None], s[None]))
    for frame in [(2, 3, 0), (5, 9, 1), (13, 2, 4)]:
        assert brute_force_log_jacobian(m, y, s, frame) == pytest.approx(expected, abs=1e-8)


def test_jacobian_test_can_fail(molecule):
    """The comparison sees a missing sin θ or r²."""
    mol = molecule("propane")
    m = mol.map()
    y, s = m.to_internal(mol.x[:1])
    exact = brute_force_log_jacobian(m, y[0], s[0])
    for kind, change in (("angle", lambda v: math.log(math.sin(v))), ("length", lambda v: 2 * math.log(v))):
        j = next(i for i, c in enumerate(m.coordinates) if c.kind == kind)
        assert abs(float(m.log_volume(y, s)) - change(float(y[0, j])) - exact) > 1e-3


def test_place_like_keeps_the_frame(molecule):
    x = molecule("dipeptide").x
    seed = (6, 8, 14)
    placed = place_like(x[1:3], x[0], seed)
    reference = x[0]
    assert torch.allclose(placed[:, 6], reference[6], atol=1e-12)
    e = (reference[8] - reference[6]) / torch.linalg.norm(reference[8] - reference[6])
    along = (placed[:, 8] - placed[:, 6]) / torch.linalg.norm(placed[:, 8] - placed[:, 6], dim=-1, keepdim=True)
    assert torch.allclose(along, e.expand_as(along), atol=1e-12)
    normal = torch.linalg.cross(e, reference[14] - reference[8])
    assert ((placed[:, 14] - placed[:, 8]) @ normal).abs().max() < 1e-12
    assert (((placed[:, 14] - placed[:, 8]) * torch.linalg.cross(normal, e)).sum(-1) > 0).all()
    before, after = torch.cdist(x[1:3], x[1:3]), torch.cdist(placed, placed)
    assert torch.allclose(before, after, atol=1e-9)


def test_dihedral_angle_agrees_with_mdtraj_and_md(molecule):
    """One sign convention everywhere: IUPAC, cis is 0."""
    import mdtraj

    from openmm_bg.coordinates import dihedral_angle
    from openmm_bg.simulate import torsion_angle

    mol = molecule("dipeptide")
    trajectory = mdtraj.Trajectory(mol.positions, mdtraj.Topology.from_openmm(mol.topology))
    for atoms in ([4, 6, 8, 14], [6, 8, 14, 16], [1, 4, 6, 8], [0, 9, 21, 3]):
        ours = dihedral_angle(*(mol.x[:, i] for i in atoms)).numpy()
        theirs = mdtraj.compute_dihedrals(trajectory, [atoms], periodic=False)[:, 0]
        assert np.abs(np.angle(np.exp(1j * (ours - theirs)))).max() < 1e-4
        assert np.abs(np.angle(np.exp(1j * (ours - torsion_angle(mol.positions, atoms))))).max() < 1e-12


def test_backbone_torsions_are_phi_and_psi(molecule):
    """The tree's own dihedrals are the field's φ, ψ (up to the direction of the tree)."""
    from openmm_bg.coordinates import dihedral_angle

    mol = molecule("tripeptide")
    m = mol.map("reduced")
    atoms = list(mol.topology.atoms())
    name = {(a.residue.index, a.name): a.index for a in atoms}
    y, _ = m.to_internal(mol.x)
    modelled = [c for c in m.coordinates if c.modelled]
    for quad in ([(0, "C"), (1, "N"), (1, "CA"), (1, "C")], [(1, "N"), (1, "CA"), (1, "C"), (2, "N")]):
        index = [name[key] for key in quad]
        expected = dihedral_angle(*(mol.x[:, i] for i in index))
        found = [
            j
            for j, c in enumerate(modelled)
            if c.kind == "dihedral" and c.row >= 0 and list(m.zmatrix.rows[c.row]) in (index, index[::-1])
        ]
        assert len(found) == 1 and modelled[found[0]].backbone
        assert torch.allclose(torch.cos(y[:, found[0]] - expected), torch.ones_like(expected), atol=1e-12)
