"""Tempered MD against quadrature: four atoms whose torsion has two unequal wells."""

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg  # noqa: F401
from openmm_bg.energy import BOLTZMANN
from openmm_bg.errors import InputError
from openmm_bg.free_energy import chain_state_difference
from openmm_bg.simulate import TorsionBias, temperature_ladder, tempered_md, torsion_angle

import openmm  # isort: skip
from openmm import app  # isort: skip

ATOMS = (0, 1, 2, 3)
T = 300.0
WELL = TorsionBias(ATOMS, centre=1.0, sharpness=3.0, depth=4.0)


def torsion_energy(phi):
    return 4.0 * (1.0 + np.cos(2.0 * phi)) + 3.0 * np.cos(phi - 1.0 + np.pi / 2)


@pytest.fixture(scope="module")
def molecule():
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("FOU", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.Element.getBySymbol("C"), residue) for i in range(4)]
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for _ in range(4):
        system.addParticle(12.0)
    for i in range(3):
        topology.addBond(atoms[i], atoms[i + 1])
        bonds.addBond(i, i + 1, 0.15, 50_000.0)
    for i in range(2):
        angles.addAngle(i, i + 1, i + 2, 1.9, 300.0)
    torsion = openmm.CustomTorsionForce("4*(1+cos(2*theta))+3*cos(theta-1+1.5707963267948966)")
    torsion.addTorsion(0, 1, 2, 3, [])
    for force in (bonds, angles, torsion):
        system.addForce(force)
    x = np.array([[0.05, 0.14, 0.0], [0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.2, 0.0, 0.14]])
    return system, topology, x


def exact_difference():
    phi = np.linspace(-np.pi, np.pi, 20_001)
    weight = np.exp(-torsion_energy(phi) / (BOLTZMANN * T))  # lengths and angles do not know the torsion
    inside = phi > 0
    return float(np.log(weight[~inside].sum() / weight[inside].sum()))


def score(molecule, bias, sign=1.0):
    """z of the weighted free energy of φ > 0 against quadrature."""
    system, topology, x = molecule
    found = tempered_md(
        system, topology, x, temperature_ladder(T, 600.0, 3), iterations=900, bias=bias, n_ladders=1,
        steps_per_exchange=100, steps_per_frame=20, friction=5.0, seed=3,
    )  # fmt: skip
    phi = torsion_angle(found.positions, ATOMS)
    assert len(found.positions) == 900 * 5 and found.n_energies >= 900 * 3 * 100
    value, error = chain_state_difference(phi <= 0, phi > 0, sign * found.log_weights, chains=found.ladder)
    print(value, error, exact_difference())
    return (value - exact_difference()) / error


@pytest.mark.statistical
@pytest.mark.parametrize("bias", [None, WELL])
def test_populations_are_those_of_quadrature(molecule, bias):
    assert abs(score(molecule, bias)) < 4.0


@pytest.mark.statistical
def test_a_bias_taken_away_with_the_wrong_sign_is_caught(molecule):
    assert abs(score(molecule, WELL, sign=-1.0)) > 5.0


def test_a_balanced_well_balances():
    stream = np.random.default_rng(0)
    grid = np.linspace(-np.pi, np.pi, 4001)
    weight = np.exp(-(torsion_energy(grid) + WELL.energy(grid)) / (BOLTZMANN * T))
    phi = stream.choice(grid, size=40_000, p=weight / weight.sum())
    for population in (0.5, 0.2):
        well = WELL.balanced(phi, phi > 0, T, population)
        biased = np.exp(-(torsion_energy(grid) + well.energy(grid)) / (BOLTZMANN * T))
        assert biased[grid > 0].sum() / biased.sum() == pytest.approx(population, abs=0.02)
    with pytest.raises(InputError, match="one of the two basins"):
        WELL.balanced(phi, np.zeros(len(phi), dtype=bool), T)


def test_the_force_is_the_energy(molecule):
    system, _, x = molecule
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    force = WELL.force()
    force.setForceGroup(5)
    copy.addForce(force)
    context = openmm.Context(copy, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    energy = context.getState(energy=True, groups={5}).getPotentialEnergy()._value
    assert energy == pytest.approx(float(WELL.energy(torsion_angle(x[None], ATOMS))[0]), abs=1e-9)


def test_bad_input(molecule):
    system, topology, x = molecule
    with pytest.raises(InputError, match="either seconds or iterations"):
        tempered_md(system, topology, x, [300.0])
    with pytest.raises(InputError, match="0 < lowest"):
        temperature_ladder(-1.0, 300.0, 3)
