"""The RMSD that `reduced` costs: exact where it can be known, and on MD frames."""

import logging

import numpy as np
import openmm
import pytest
import torch
from openmm import app

from openmm_bg.coordinates import CoordinateMap, MoleculeGraph, read_constraints, reduction_rmsd
from openmm_bg.coordinates.reduction import superposed_rmsd
from openmm_bg.errors import InputError


def test_nothing_is_lost_where_nothing_is_frozen(molecule):
    mol = molecule("dipeptide")
    cost = reduction_rmsd(mol.map("full"), mol.topology, mol.positions)
    assert cost.heavy.shape == cost.backbone.shape == (len(mol.positions),)
    assert max(cost.heavy.max(), cost.backbone.max()) < 1e-10


def test_frames_at_the_reference_cost_nothing(molecule):
    mol = molecule("tripeptide")
    m = mol.map("reduced")
    y, _ = m.to_internal(mol.x)
    cost = reduction_rmsd(m, mol.topology, m.to_positions(y, m.reference_fixed).numpy())
    assert max(cost.heavy.max(), cost.backbone.max()) < 1e-10


def test_one_stretched_bond(molecule):
    """Two heavy atoms drawn apart by d: a heavy RMSD that can be written down."""
    mol = molecule("propane")  # three carbons, C1 in the middle
    m = mol.map("reduced")
    y, _ = m.to_internal(mol.x[:1])
    s = m.reference_fixed[None].clone()
    fixed = [c for c in m.coordinates if not c.modelled]
    j = next(j for j, c in enumerate(fixed) if c.kind == "length" and c.row == -1)
    s[0, j] += 0.01
    x = m.to_positions(y, s)
    cost = reduction_rmsd(m, mol.topology, x.numpy())
    frozen = m.to_positions(y, m.reference_fixed)
    graph = MoleculeGraph(mol.topology)
    heavy = [i for i in range(graph.n_atoms) if not graph.is_hydrogen(i)]
    assert cost.heavy[0] == pytest.approx(brute_force(frozen[0, heavy].numpy(), x[0, heavy].numpy()), abs=1e-6)
    assert 0.001 < cost.heavy[0] < 0.01


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    """Least RMSD by minimising over rotation vectors."""
    from scipy.optimize import minimize
    from scipy.spatial.transform import Rotation

    a, b = a - a.mean(0), b - b.mean(0)

    def rmsd(v):
        return np.sqrt(((Rotation.from_rotvec(v).apply(a) - b) ** 2).sum(1).mean())

    starts = np.random.default_rng(0).normal(size=(6, 3))
    return min(minimize(rmsd, v, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}).fun for v in starts)


def test_superposition_agrees_with_mdtraj(molecule):
    """Also where the best orthogonal matrix would be a reflection."""
    import mdtraj

    mol = molecule("dipeptide")
    moved = mol.positions[:3] @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0] + 0.3
    mirrored = mol.positions[:3] * [1, 1, -1]
    for a in (moved, mirrored):
        ours = superposed_rmsd(torch.from_numpy(a), mol.x[4:7]).numpy()
        topology = mdtraj.Topology.from_openmm(mol.topology)
        for k in range(3):
            reference = mdtraj.Trajectory(mol.positions[4 + k], topology)
            theirs = mdtraj.rmsd(mdtraj.Trajectory(a[k], topology), reference)[0]
            assert ours[k] == pytest.approx(theirs, abs=1e-4)


def test_on_md_frames_of_a_protein(proteins, caplog):
    """HP35, constrained bonds to hydrogen: the backbone keeps its shape; more is lost in the side chains."""
    topology, x = proteins.structure("hp35")
    system = proteins.force_field("amber14-all.xml").createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.002)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("CPU"), {"Threads": "1"})
    context.setPositions(x)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 100)
    frames = []
    for _ in range(24):
        integrator.step(20)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        m = CoordinateMap.fit(topology, np.array(frames), read_constraints(system, topology), "reduced")
    cost = reduction_rmsd(m, topology, np.array(frames))
    assert "outside" not in caplog.text
    assert 0.001 < cost.backbone.mean() < 0.06 and 0.005 < cost.heavy.mean() < 0.1
    # frozen values from elsewhere cost more: the means are what makes it small
    shifted = CoordinateMap.from_dict(m.to_dict())
    with torch.no_grad():
        shifted.reference_fixed += 0.1 * torch.tensor([c.kind == "angle" for c in m.coordinates if not c.modelled])
    assert reduction_rmsd(shifted, topology, np.array(frames)).heavy.mean() > 1.5 * cost.heavy.mean()


def test_what_does_not_fit_is_refused(molecule):
    mol = molecule("propane")
    m = mol.map("reduced")
    for call, part in (
        (lambda: reduction_rmsd(m, molecule("butane").topology, mol.positions), "14 atoms"),
        (lambda: reduction_rmsd(m, mol.topology, mol.positions[0]), "[frames, 11, 3]"),
        (lambda: reduction_rmsd(m, mol.topology, np.full((1, 11, 3), np.nan)), "non-finite"),
        (lambda: reduction_rmsd(m, mol.topology, mol.positions + 1j), "complex"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert part in str(caught.value)
