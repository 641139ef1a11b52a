"""Φ = ½ log det Z: against constraint gradients in Cartesian space, against MD, and its independence of y."""

import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app

from openmm_bg.coordinates import Constraints, CoordinateMap, place_like, read_constraints
from openmm_bg.coordinates.constraints import FixmanTerm


def brute_force(x: torch.Tensor, constraints: Constraints) -> torch.Tensor:
    """½ log det Z [B] with Z_kl = Σ_i ∇_i σ_k · ∇_i σ_l / m_i, gradients by autograd, over all constraints at once."""
    hydrogens, heavy = (torch.tensor(column) for column in zip(*constraints.bonds, strict=True))
    inverse_mass = (1 / torch.tensor(constraints.masses, dtype=x.dtype)).repeat_interleave(3)

    def sigma(positions: torch.Tensor) -> torch.Tensor:
        p = positions.reshape(-1, 3)
        return torch.linalg.norm(p[hydrogens] - p[heavy], dim=-1)

    found = []
    for frame in x:
        gradient = torch.autograd.functional.jacobian(sigma, frame.reshape(-1))
        found.append(0.5 * torch.linalg.slogdet((gradient * inverse_mass) @ gradient.T)[1])
    return torch.stack(found)


def fixman(m: CoordinateMap, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    _, _, theta, phi = m._raw(y, s)
    return m.fixman(theta, phi)


@pytest.mark.parametrize("mass", [None, 3.0, 7.0])
@pytest.mark.parametrize("name", ["isobutane", "ethylammonium", "ethylamine", "toluene", "dipeptide", "tripeptide"])
def test_against_constraint_gradients(molecule, name, mass):
    mol = molecule(name)
    system = mol.constrained(mass) if mass != 7.0 else mol.constrained()
    if mass == 7.0:  # any masses, each atom its own
        rng = np.random.default_rng(2)
        for i in range(system.getNumParticles()):
            system.setParticleMass(i, float(rng.uniform(0.5, 10.0)))
    m = mol.map("full", system)
    constraints = m.constraints
    assert len(constraints.bonds) == system.getNumConstraints() > 0
    torch.manual_seed(3)
    x = mol.x[:4] + 0.02 * torch.randn(4, m.n_atoms, 3, dtype=torch.float64)
    y, s = m.to_internal(x)
    expected = brute_force(x, constraints)
    assert torch.allclose(fixman(m, y, s), expected, atol=1e-10)
    assert expected.std() > 1e-4  # the term does depend on the positions here
    free = mol.map("full")
    y, s = free.to_internal(x)
    assert torch.equal(fixman(free, y, s), torch.zeros(4, dtype=torch.float64))


def test_four_hydrogens_on_one_atom():
    """Blocks larger than three take the general route."""
    torch.manual_seed(0)
    theta, phi = math.pi * torch.rand(5, 4, dtype=torch.float64), 6 * torch.rand(5, 4, dtype=torch.float64)
    direction = torch.stack((theta.cos(), theta.sin() * phi.cos(), theta.sin() * phi.sin()), dim=-1)
    masses, heavy = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 5.0
    for n in (1, 2, 3, 4):
        term = FixmanTerm([(list(range(n)), masses[:n].tolist(), heavy)])
        d = direction[:, :n]
        expected = 0.5 * torch.logdet(d @ d.transpose(1, 2) / heavy + torch.diag(1 / masses[:n]))
        assert torch.allclose(term(theta, phi), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["isobutane", "ethylammonium", "ethylamine", "dipeptide", "proline", "hp35"])
def test_reduced_keeps_every_determinant(molecule, name):
    """The Z-matrix rule: y at random, anywhere in its domain, moves no hydrogen-bearing group's det Z."""
    mol = molecule(name)
    m = mol.map("reduced", mol.constrained(3.0))
    y, s = m.to_internal(mol.x[:1])
    torch.manual_seed(5)
    modelled = [c for c in m.coordinates if c.modelled]
    random = 2 * math.pi * torch.rand(16, y.shape[1], dtype=torch.float64) - math.pi
    for j, c in enumerate(modelled):
        if c.kind == "angle":
            random[:, j] = 0.3 + 2.5 * torch.rand(16, dtype=torch.float64)
    _, _, theta, phi = m._raw(torch.cat((y, random)), s)
    found = m.fixman.log_determinants(theta, phi)
    assert found
    for value in found:
        assert (value - value[:1]).abs().max() < 1e-12
    if name != "hp35":  # and in Cartesian space, where nothing is assumed
        x = m.to_positions(torch.cat((y, random[:3])), s)
        assert np.ptp(brute_force(x, m.constraints).numpy()) < 1e-9


def test_another_axis_breaks_the_rule(molecule):
    """One hydrogen of a CH2 measured from the other neighbour: det Z then moves with the backbone's angle."""
    mol = molecule("butane")
    m = mol.map("reduced", mol.constrained(4.0))
    first, middle, last = m.zmatrix.seed
    hydrogen = next(row[0] for row in m.zmatrix.rows if row[1] == middle and row[0] > 3)
    y, s = m.to_internal(mol.x[:1])
    y = y.repeat(3, 1)
    modelled = [c for c in m.coordinates if c.modelled]
    theta = next(j for j, c in enumerate(modelled) if c.kind == "angle" and c.row == -2)
    y[:, theta] += torch.tensor([-0.2, 0.0, 0.2])
    x = m.to_positions(y, s)
    assert np.ptp(brute_force(x, m.constraints).numpy()) < 1e-10
    for frame in x:  # carry the hydrogen along with the frame of the other bond instead
        frame[hydrogen] = place_like(mol.x[:1], frame, (middle, last, first))[0, hydrogen]
    assert np.ptp(brute_force(x, m.constraints).numpy()) > 1e-4


# ---------------------------------------------------------------- against constrained MD


SOFT = 8.0  # kJ/mol/rad²: the hydrogens roam about X
N_CHAIN = 4000  # without Φ the chain below is then 7 σ off


@pytest.fixture(scope="module")
def bent_molecule():
    """A-B-X with two hydrogens on X, masses 4/1/4 there, soft angles, and a constrained trajectory [n, 5, 3]."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [topology.addAtom(name, app.element.carbon, residue) for name in "AB"]
    atoms.append(topology.addAtom("X", app.element.nitrogen, residue))
    atoms += [topology.addAtom(name, app.element.hydrogen, residue) for name in ("H1", "H2")]
    for a, b in [(0, 1), (1, 2), (2, 3), (2, 4)]:
        topology.addBond(atoms[a], atoms[b])
    system = openmm.System()
    for mass in (12.0, 12.0, 1.0, 4.0, 4.0):
        system.addParticle(mass)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    bonds.addBond(0, 1, 0.15, 2e4)
    bonds.addBond(1, 2, 0.15, 2e4)
    angles.addAngle(0, 1, 2, 1.9, 100.0)
    for hydrogen in (3, 4):
        angles.addAngle(1, 2, hydrogen, 1.9, SOFT)
        system.addConstraint(2, hydrogen, 0.1)
    system.addForce(bonds)
    system.addForce(angles)
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.002)
    integrator.setRandomNumberSeed(17)
    integrator.setConstraintTolerance(1e-8)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    start = np.array([[0, 0, 0], [0.15, 0, 0], [0.2, 0.14, 0], [0.3, 0.14, 0], [0.17, 0.2, 0.08]])
    context.setPositions(start)
    context.applyConstraints(1e-8)
    context.setVelocitiesToTemperature(300, 17)
    integrator.step(2000)
    frames = np.empty((12000, 5, 3))
    for i in range(len(frames)):
        integrator.step(60)
        frames[i] = context.getState(positions=True).getPositions(asNumpy=True)._value
    return topology, system, frames


def expectations(m: CoordinateMap, with_fixman: bool, whole: bool) -> list[float]:
    """Means of cos²(H-X-H) and cos θ_1 by quadrature of exp(-u) J √det Z over θ_1, θ_2 and the offset.

    Over the whole circle of the offset, or over the sector in which `m` models it.
    """
    theta = (np.arange(60) + 0.5) * math.pi / 60
    offset = (np.arange(60) + 0.5) * 2 * math.pi / 60
    grid = np.stack(np.meshgrid(theta, theta, offset, indexing="ij"), axis=-1).reshape(-1, 3)
    kinds = [(c.atom, c.kind) for c in m.coordinates if c.modelled]
    y = torch.tensor(m.layout.shift, dtype=torch.float64).repeat(len(grid), 1)
    for name, column in zip([(3, "angle"), (4, "angle"), (4, "offset")], grid.T, strict=True):
        y[:, kinds.index(name)] = torch.from_numpy(column)
    s = m.reference_fixed.expand(len(y), -1)
    log_density = m.log_volume(y, s).numpy()
    if not with_fixman:
        log_density = log_density - fixman(m, y, s).numpy()
    kt = 0.00831446261815324 * 300
    log_density = log_density - 0.5 * SOFT * ((grid[:, :2] - 1.9) ** 2).sum(1) / kt
    weight = np.exp(log_density - log_density.max())
    if not whole:
        weight *= m.in_domain(y, s).numpy()
    cosine = np.cos(grid[:, 0]) * np.cos(grid[:, 1]) + np.sin(grid[:, 0]) * np.sin(grid[:, 1]) * np.cos(grid[:, 2])
    return [float((weight * f).sum() / weight.sum()) for f in (cosine**2, np.cos(grid[:, 0]))]


def z_scores(m: CoordinateMap, frames: np.ndarray, with_fixman: bool, whole: bool) -> np.ndarray:
    """(Mean - expectation) / error for cos²(H-X-H) and cos θ_1, errors by statistical inefficiency."""
    from pymbar.timeseries import statistical_inefficiency

    expected = expectations(m, with_fixman, whole)

    def unit(v):
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    h1, h2, axis = (unit(frames[:, i] - frames[:, 2]) for i in (3, 4, 1))
    series = [(h1 * h2).sum(1) ** 2, (h1 * axis).sum(1)]
    z = []
    for values, mean in zip(series, expected, strict=True):
        error = values.std() * math.sqrt(statistical_inefficiency(values) / len(values))
        z.append((values.mean() - mean) / error)
    print(f"z = {z}, n = {len(frames)}, with Φ: {with_fixman}")
    return np.array(z)


def fitted_map(bent_molecule) -> CoordinateMap:
    topology, system, frames = bent_molecule
    return CoordinateMap.fit(topology, frames, read_constraints(system, topology), "full")


@pytest.mark.statistical
@pytest.mark.parametrize("with_fixman", [True, False])
def test_constrained_md_samples_sqrt_det_z(bent_molecule, with_fixman):
    """And a density without the term is seen to be wrong."""
    z = np.abs(z_scores(fitted_map(bent_molecule), bent_molecule[2], with_fixman, whole=True)).max()
    assert z < 4 if with_fixman else z > 6


# ---------------------------------------------------------------- against a chain of formula D


@pytest.fixture(scope="module")
def partial_moves(bent_molecule):
    """`chain(n)`: frames [n, 5, 3] of a `BoltzmannGeneratorSampler` in `full`, two steps of formula D apart, no MD."""
    from openmm_bg import BoltzmannGeneratorSampler
    from openmm_bg.artifact import Flow, compress_text, topology_to_dict
    from openmm_bg.flow import FlowConfig, build_flow

    topology, system, frames = bent_molecule
    m = fitted_map(bent_molecule)
    config = FlowConfig(n_backbone_blocks=0, n_joint_blocks=2, hidden=4, n_hidden=0, linear="affine")
    metadata = {
        "temperature": 300.0,
        "topology": topology_to_dict(topology),
        "system": compress_text(openmm.XmlSerializer.serialize(system)),
    }
    flow = Flow(build_flow(m.layout, config), m, metadata)
    start = frames[m.in_domain(*m.to_internal(torch.from_numpy(frames))).numpy()][-1]  # one of two mirror images

    def chain(n: int) -> np.ndarray:
        context = openmm.Context(
            system, openmm.LangevinMiddleIntegrator(300, 1, 0.001), openmm.Platform.getPlatformByName("Reference")
        )
        context.setPositions(start)
        x = np.empty((n, 5, 3))
        sampler = BoltzmannGeneratorSampler(flow, context, seed=11, platform="Reference", n_workers=1)
        try:
            for i in range(n):
                sampler.step(2)
                x[i] = context.getState(positions=True).getPositions(asNumpy=True)._value
            assert sampler.statistics["n_accepted"] > 0.2 * sampler.statistics["n_proposed"]
        finally:
            sampler.close()
        return x

    return chain


@pytest.mark.statistical
def test_partial_moves_sample_sqrt_det_z(bent_molecule, partial_moves):
    """In `full` the constrained group's angles are modelled, so formula D must carry Φ."""
    assert np.abs(z_scores(fitted_map(bent_molecule), partial_moves(N_CHAIN), with_fixman=True, whole=False)).max() < 4


@pytest.mark.statistical
def test_partial_moves_without_the_fixman_term_are_wrong(bent_molecule, partial_moves, monkeypatch):
    monkeypatch.setattr(FixmanTerm, "forward", lambda self, theta, phi: torch.zeros_like(theta[:, 0]))
    monkeypatch.setattr(FixmanTerm, "of_frame", lambda self, theta, phi: 0.0)
    x = partial_moves(N_CHAIN)
    monkeypatch.undo()
    assert np.abs(z_scores(fitted_map(bent_molecule), x, with_fixman=True, whole=False)).max() > 6
