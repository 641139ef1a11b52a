"""`NonequilibriumFlowMove` samples its state: a chain of four atoms beside an ion, where moves cost a few milliseconds.

Every chain starts from an exact, independent sample of the state and is moved once; a move that keeps the ensemble
keeps such samples of it, so that the mean difference between behind and before is zero whatever the observable.
"""
# ruff: noqa: NPY002  (openmmtools, and so the move, draws from numpy's global generator)

from itertools import pairwise

import numpy as np
import pytest
import torch

from openmm_bg import proposals
from openmm_bg.artifact import Flow, compress_text, topology_to_dict
from openmm_bg.coordinates import CoordinateMap, read_constraints
from openmm_bg.energy import BOLTZMANN
from openmm_bg.flow import FlowConfig, build_flow
from openmm_bg.mcmc import NonequilibriumFlowMove
from openmm_bg.rules import annealing

import openmm  # isort: skip
from openmm import app, unit  # isort: skip
from openmmtools import cache, states  # isort: skip

REFERENCE = openmm.Platform.getPlatformByName("Reference")
KT = BOLTZMANN * 400.0
LENGTH, ANGLE = 0.153, 1.95
SIGMA_R, SIGMA_A = 0.012, 0.12
ATOMS = [4, 3, 2, 1]  # the chain in reverse order, behind the ion
ION = np.array([[0.05, 0.32, 0.10]])
N_STARTS = 280


def chain_topology():
    topology = app.Topology()
    residue = topology.addResidue("BUT", topology.addChain())
    atoms = [topology.addAtom(f"C{k}", app.element.carbon, residue) for k in range(4)]
    for a, b in pairwise(atoms):
        topology.addBond(a, b)
    return topology


def chain_system(atoms, n, ion=None):
    """Bonds and angles of typical width, a torsion, and a strong attraction of the last atom to the ion."""
    system = openmm.System()
    for _ in range(n):
        system.addParticle(14.0)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for a, b in pairwise(atoms):
        bonds.addBond(a, b, LENGTH, KT / SIGMA_R**2)
    for k in range(2):
        angles.addAngle(*atoms[k : k + 3], ANGLE, KT / SIGMA_A**2)
    torsion = openmm.CustomTorsionForce(f"{KT}*(0.7*cos(theta) + 0.5*cos(2*theta - 1))")
    torsion.addTorsion(*atoms, [])
    for force in (bonds, angles, torsion):
        system.addForce(force)
    if ion is not None:
        pull = openmm.CustomBondForce(f"{4.0 * KT}*exp(-(r - 0.3)^2/0.02)*(-1)")
        pull.addBond(ion, atoms[3], [])
        system.addForce(pull)
    return system


def chain_positions(rng, n, widen):
    """Chains [n, 4, 3] with Gaussian lengths and angles, and torsions all around."""
    r = LENGTH + widen * SIGMA_R * rng.standard_normal((n, 3))
    a = ANGLE + widen * SIGMA_A * rng.standard_normal((n, 2))
    phi = rng.uniform(-np.pi, np.pi, n)
    zero = np.zeros(n)
    x1 = np.stack([r[:, 0], zero, zero], 1)
    x2 = x1 + r[:, 1:2] * np.stack([-np.cos(a[:, 0]), np.sin(a[:, 0]), zero], 1)
    back = (x1 - x2) / r[:, 1:2]
    side = np.cross(np.broadcast_to([0.0, 0.0, 1.0], back.shape), back)
    turned = np.cos(phi)[:, None] * side + np.sin(phi)[:, None] * [0.0, 0.0, 1.0]
    x3 = x2 + r[:, 2:] * (np.cos(a[:, 1:]) * back + np.sin(a[:, 1:]) * turned)
    return np.stack([np.zeros((n, 3)), x1, x2, x3], 1)


def together(molecule):
    """Positions of the whole System [..., 5, 3] from the chain's [..., 4, 3]."""
    return np.concatenate((np.broadcast_to(ION, (*molecule.shape[:-2], 1, 3)), molecule[..., ::-1, :]), axis=-2)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(artifact, System with the ion, exact and independent starts [n, 5, 3], log Z)."""
    rng, topology, alone = np.random.default_rng(3), chain_topology(), chain_system(range(4), 4)
    torch.manual_seed(3)
    coordinates = CoordinateMap.fit(
        topology, chain_positions(rng, 4000, 1.2), read_constraints(alone, topology), "full"
    )
    density = build_flow(
        coordinates.layout, FlowConfig.preset("cpu", n_backbone_blocks=0, n_joint_blocks=2, hidden=4, n_hidden=0)
    )
    metadata = {
        "temperature": 300.0,  # the state's is another
        "topology": topology_to_dict(topology),
        "system": compress_text(openmm.XmlSerializer.serialize(alone)),
    }
    flow = Flow(density, coordinates, metadata)
    path = tmp_path_factory.mktemp("chain") / "chain.bg"
    flow.save(path)

    system = chain_system(ATOMS, 5, ion=0)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), REFERENCE)
    y, log_q = flow.sample(8000)
    s = coordinates.reference_fixed.expand(len(y), -1)
    good = coordinates.in_domain(y, s)
    y, s, log_q = y[good], s[good], log_q[good].numpy()
    molecules = coordinates.to_positions(y, s).numpy()
    # The moves keep the first atom's place, the direction to the second and the half-plane of the third.
    frames, u = together(molecules), []
    for x in frames:
        context.setPositions(x)
        u.append(context.getState(energy=True).getPotentialEnergy()._value / KT)
    log_w = coordinates.log_volume(y, s).numpy() - np.array(u) - log_q
    w = np.exp(log_w - log_w.max())
    kept = frames[rng.random(len(w)) < w]
    print(f"spread of log w {log_w.std():.2f}, {len(kept)} exact starts of {len(w)}")
    assert len(kept) >= 2 * N_STARTS
    return path, system, kept, log_w.max() + np.log(w.mean())


def scores(chain, seed, n=N_STARTS):
    """z of the mean change of each observable over a move."""
    path, system, starts, _ = chain
    starts = starts[:n]
    state, contexts = states.ThermodynamicState(system, 400.0 * unit.kelvin), cache.ContextCache(platform=REFERENCE)
    move = NonequilibriumFlowMove(path, schedule=[0.0, 0.3, 1.0], step=0.4, atom_subset=ATOMS)
    np.random.seed(seed)
    after = np.empty_like(starts)
    for k, x in enumerate(starts):
        replica = states.SamplerState(x * unit.nanometer)
        move.apply(state, replica, context_cache=contexts)
        after[k] = replica.positions.value_in_unit(unit.nanometer)

    def observables(x):
        to_ion = np.linalg.norm(x[:, 1] - x[:, 0], axis=1)
        length, ends = (np.linalg.norm(x[:, ATOMS[a]] - x[:, ATOMS[b]], axis=1) for a, b in ((0, 1), (0, 3)))
        return {"ion": np.exp(-((to_ion - 0.3) ** 2) / 0.02), "width": (length - LENGTH) ** 2, "ends": ends}

    before, behind = observables(starts), observables(after)
    z = {}
    for name in before:
        d = behind[name] - before[name]
        z[name] = d.mean() / (d.std(ddof=1) / np.sqrt(len(d)))
    rate = move.statistics["n_accepted"] / move.statistics["n_proposed"]
    print(f"accepted {rate:.2f}, z {z}, n {len(starts)}")
    assert rate > 0.2  # nothing that stays proves anything
    return z


@pytest.mark.statistical
def test_candidate_moves_keep_the_state(chain):
    z = scores(chain, seed=1)
    assert all(abs(value) < 4.0 for value in z.values()), z


@pytest.mark.statistical
def test_work_without_the_down_leg_is_caught(chain, monkeypatch):
    """One stored W for every move, a small one: candidates are accepted whatever the current state is worth."""
    genuine = annealing.down_leg

    def leg(state, *arguments):
        final, work, info = genuine(state, *arguments)
        return final, np.full_like(work, chain[-1] - 3.0), info

    monkeypatch.setattr(annealing, "down_leg", leg)
    z = scores(chain, seed=2)
    assert max(abs(value) for value in z.values()) > 5.0, z


@pytest.mark.statistical
@pytest.mark.parametrize("broken", ["kJ/mol in place of kT", "ion left out"])
def test_another_reduced_potential_is_caught(chain, monkeypatch, broken):
    genuine = proposals.FlowProposals.within

    def within(this, positions, reduced_potential):
        if broken == "ion left out":
            positions = np.array(positions)
            positions[0] += 50.0
            return genuine(this, positions, reduced_potential)
        u = genuine(this, positions, reduced_potential)
        return lambda molecule: u(molecule) * KT

    monkeypatch.setattr(proposals.FlowProposals, "within", within)
    z = scores(chain, 3, 2 * N_STARTS)
    assert max(abs(value) for value in z.values()) > 5.0, z
