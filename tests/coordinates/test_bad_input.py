"""What no formula covers is refused, each with one sentence that names the input."""

from dataclasses import replace

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_bg.coordinates import (
    Constraints,
    CoordinateMap,
    InternalCoordinates,
    MoleculeGraph,
    build_zmatrix,
    read_constraints,
)
from openmm_bg.errors import InputError


def refusal(call, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message and message.endswith(".") and ". " not in message


def topology_of(bonds, elements="CCCH", residues=1):
    topology = app.Topology()
    chain = topology.addChain()
    found = [topology.addResidue("MOL", chain) for _ in range(residues)]
    atoms = [
        topology.addAtom(f"{symbol}{i}", app.Element.getBySymbol(symbol), found[i % residues])
        for i, symbol in enumerate(elements)
    ]
    for a, b in bonds:
        topology.addBond(atoms[a], atoms[b])
    return topology


def test_not_one_molecule(molecule):
    refusal(lambda: MoleculeGraph(topology_of([])), "no bonds")
    refusal(lambda: MoleculeGraph(topology_of([(0, 1), (1, 2)])), "not one molecule", "MOL1-H3")  # a bond missing
    refusal(lambda: MoleculeGraph(topology_of([(0, 1)], "CC")), "2 atoms", "at least three")
    butane, propane = molecule("butane").topology, molecule("propane").topology
    modeller = app.Modeller(butane, np.zeros((14, 3)).tolist() * unit.nanometer)
    modeller.add(propane, np.zeros((11, 3)).tolist() * unit.nanometer)
    refusal(lambda: build_zmatrix(modeller.topology), "not one molecule", "MOL2")
    frames = np.random.default_rng(0).normal(size=(3, 25, 3))
    refusal(lambda: CoordinateMap.fit(modeller.topology, frames), "not one molecule")


def test_particles(molecule, bare):
    mol = molecule("propane")
    short = bare(mol.topology)
    short.addParticle(1.0)
    refusal(lambda: read_constraints(short, mol.topology), "12 particles", "11 atoms")
    massless = bare(mol.topology)
    massless.setParticleMass(4, 0.0)
    refusal(lambda: read_constraints(massless, mol.topology), "Particle 4", "no mass")
    virtual = bare(mol.topology)
    virtual.setParticleMass(5, 0.0)
    virtual.setVirtualSite(5, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    refusal(lambda: read_constraints(virtual, mol.topology), "Particle 5", "virtual site")
    drude = bare(mol.topology)
    force = openmm.DrudeForce()
    force.setName("renamed by the user")
    drude.addForce(force)
    refusal(lambda: read_constraints(drude, mol.topology), "Drude")


def test_a_virtual_site_without_bonds_is_named_as_such():
    topology = topology_of([(0, 1), (0, 2)], "OHH")
    residue = next(topology.residues())
    topology.addAtom("M", None, residue)
    system = openmm.System()
    for mass in (16.0, 1.0, 1.0, 0.0):
        system.addParticle(mass)
    system.setVirtualSite(3, openmm.ThreeParticleAverageSite(0, 1, 2, 0.7, 0.15, 0.15))
    refusal(lambda: read_constraints(system, topology), "MOL1-M", "virtual site")


def test_constraints(molecule, bare):
    mol = molecule("propane")
    angles = mol.constrained()
    angles.addConstraint(3, 4, 0.18)  # HAngles
    refusal(lambda: read_constraints(angles, mol.topology), "not a bond", "HBonds")
    everything = mol.constrained()
    everything.addConstraint(0, 1, 0.15)  # AllBonds
    refusal(lambda: read_constraints(everything, mol.topology), "MOL1-C0", "MOL1-C1", "HBonds")
    water = molecule("water")
    rigid = water.constrained()
    rigid.addConstraint(1, 2, 0.16)
    refusal(lambda: read_constraints(rigid, water.topology), "not a bond")


@pytest.mark.parametrize("name", ["methanol", "water"])
def test_no_three_heavy_atoms_and_constraints(molecule, name):
    mol = molecule(name)
    constraints = read_constraints(mol.constrained(), mol.topology)
    refusal(
        lambda: CoordinateMap.fit(mol.topology, mol.positions, constraints),
        "three linked heavy atoms",
        "constraints=None",
    )
    free = mol.map()
    refusal(lambda: free.with_constraints(constraints), "constrains", "model")


def test_a_length_of_the_seed_may_be_constrained_elsewhere(molecule):
    """Methanol with only its methyl hydrogens constrained: the seed takes the free one."""
    mol = molecule("methanol")
    system = mol.constrained()
    hydroxyl = next(
        k for k in range(system.getNumConstraints()) if {1, 5} == set(system.getConstraintParameters(k)[:2])
    )
    system.removeConstraint(hydroxyl)
    m = mol.map("full", system)
    assert m.zmatrix.seed == (0, 1, 5) and m.n_fixed == 3


def test_constraints_of_another_system(molecule):
    mol = molecule("butane")
    free, fixed = mol.map("full"), mol.map("full", mol.constrained())
    all_bonds = read_constraints(mol.constrained(), mol.topology)
    refusal(lambda: free.with_constraints(all_bonds), "constrains the length", "model")
    fewer = Constraints(all_bonds.bonds[:-1], all_bonds.lengths[:-1], all_bonds.masses)
    assert len(fixed.with_constraints(fewer).constraints.bonds) == 9  # s is kept: free lengths there do no harm
    wrong = Constraints(all_bonds.bonds, all_bonds.lengths, all_bonds.masses[:-1])
    refusal(lambda: fixed.with_constraints(wrong), "13 masses", "14 atoms")
    refusal(lambda: fixed.with_constraints(Constraints([(4, 3)], [0.1], all_bonds.masses)), "no length")
    assert mol.map("reduced").with_constraints(all_bonds).constraints is all_bonds


def test_data(molecule):
    mol = molecule("propane")
    x = mol.positions.copy()
    refusal(lambda: CoordinateMap.fit(mol.topology, x[0]), "[frames >= 2, 11, 3]", "[11, 3]")
    refusal(lambda: CoordinateMap.fit(mol.topology, x[:, :10]), "[frames >= 2, 11, 3]", "10")
    refusal(lambda: CoordinateMap.fit(mol.topology, x[:1]), "[frames >= 2, 11, 3]")
    refusal(lambda: CoordinateMap.fit(mol.topology, x + 1j), "complex")
    x[17, 3, 1] = np.nan
    refusal(lambda: CoordinateMap.fit(mol.topology, x), "Frame 17", "non-finite")
    refusal(lambda: CoordinateMap.fit(mol.topology, mol.positions, None, "cartesian"), "'cartesian'", "'reduced'")
    wrong = Constraints([], [], [1.0] * 5)
    refusal(lambda: CoordinateMap.fit(mol.topology, mol.positions, wrong), "5 masses")


def test_a_zmatrix_that_breaks_the_rule_is_refused(molecule):
    """Frames are carried along bonds, so a row's axis is its parent's own bond."""
    zmatrix = build_zmatrix(molecule("butane").topology)
    first, middle, last = zmatrix.seed
    rows = list(zmatrix.rows)
    row = next(i for i, r in enumerate(rows) if r[1] == middle)
    rows[row] = (rows[row][0], middle, last, first)
    refusal(lambda: InternalCoordinates(replace(zmatrix, rows=rows)), f"atom {rows[row][0]}")
