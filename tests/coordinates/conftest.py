"""Molecules for the tests of the coordinates: hand-made topologies with frames from short MD of a generic System."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_bg.coordinates import CoordinateMap, read_constraints

SMALL: dict[str, tuple[str, str]] = {  # heavy atoms and their bonds; hydrogens are given after each atom
    "methanol": ("C3 O1", "0-1"),
    "propane": ("C3 C2 C3", "0-1 1-2"),
    "butane": ("C3 C2 C2 C3", "0-1 1-2 2-3"),
    "isobutane": ("C3 C1 C3 C3", "0-1 1-2 1-3"),
    "ethylammonium": ("C3 C2 N3", "0-1 1-2"),
    "ethylamine": ("C3 C2 N2", "0-1 1-2"),
    "dimethylamine": ("C3 N1 C3", "0-1 1-2"),
    "acetamide": ("C3 C0 O0 N2", "0-1 1-2 1-3"),
    "benzene": ("C1 C1 C1 C1 C1 C1", "0-1 1-2 2-3 3-4 4-5 5-0"),
    "toluene": ("C1 C1 C1 C1 C1 C0 C3", "0-1 1-2 2-3 3-4 4-5 5-0 5-6"),
    "cyclohexane": ("C2 C2 C2 C2 C2 C2", "0-1 1-2 2-3 3-4 4-5 5-0"),
    "trifluoroethane": ("C3 C0 F0 F0 F0", "0-1 1-2 1-3 1-4"),
    "water": ("O2", ""),
}
PLANAR = {"benzene", "toluene", "acetamide"}


@dataclass
class Molecule:
    """A molecule for tests: ``positions`` [n, N, 3] nm float64, ``system`` without constraints."""

    topology: app.Topology
    positions: np.ndarray
    system: openmm.System

    def constrained(self, hydrogen_mass: float | None = None) -> openmm.System:
        """The System with all bonds to hydrogen constrained at the lengths of the first frame."""
        system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(self.system))
        for a, b in self.topology.bonds():
            if "H" not in (a.element.symbol, b.element.symbol):
                continue
            hydrogen, heavy = (a, b) if a.element.symbol == "H" else (b, a)
            length = np.linalg.norm(self.positions[0, a.index] - self.positions[0, b.index])
            system.addConstraint(a.index, b.index, float(length))
            if hydrogen_mass is not None:
                extra = hydrogen_mass - system.getParticleMass(hydrogen.index)._value
                system.setParticleMass(hydrogen.index, hydrogen_mass)
                system.setParticleMass(heavy.index, system.getParticleMass(heavy.index)._value - extra)
        return system

    def map(self, representation: str = "full", system: openmm.System | None = None) -> CoordinateMap:
        constraints = read_constraints(system or self.system, self.topology)
        return CoordinateMap.fit(self.topology, self.positions, constraints, representation)

    @property
    def x(self) -> torch.Tensor:
        return torch.from_numpy(self.positions)


def bare_system(topology: app.Topology) -> openmm.System:
    """Masses and nothing else."""
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    return system


def small_topology(atoms: str, bonds: str) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    heavy, symbols = [], atoms.split()
    for i, symbol in enumerate(symbols):
        element = app.Element.getBySymbol(symbol[:-1])
        heavy.append(topology.addAtom(f"{symbol[:-1]}{i}", element, residue))
    for bond in bonds.split():
        a, b = bond.split("-")
        topology.addBond(heavy[int(a)], heavy[int(b)])
    for i, symbol in enumerate(symbols):
        for k in range(int(symbol[-1])):
            hydrogen = topology.addAtom(f"H{i}{k}", app.element.hydrogen, residue)
            topology.addBond(heavy[i], hydrogen)
    return topology


def generic_system(topology: app.Topology, planar: bool) -> openmm.System:
    """Harmonic bonds and angles, soft repulsion: enough for sensible shapes with stable chirality."""
    system = bare_system(topology)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    neighbours: dict[int, list[int]] = {i: [] for i in range(system.getNumParticles())}
    pairs = []
    for a, b in topology.bonds():
        bonds.addBond(a.index, b.index, 0.109 if "H" in (a.element.symbol, b.element.symbol) else 0.145, 2e5)
        neighbours[a.index].append(b.index)
        neighbours[b.index].append(a.index)
        pairs.append((a.index, b.index))
    for centre, around in neighbours.items():
        degrees = 120.0 if planar and len(around) == 3 else 109.5
        for i, a in enumerate(around):
            for b in around[:i]:
                angles.addAngle(a, centre, b, math.radians(degrees), 500.0)
    repulsion = openmm.CustomNonbondedForce("5*exp(-(r/0.12)^2)")
    for _ in range(system.getNumParticles()):
        repulsion.addParticle([])
    repulsion.createExclusionsFromBonds(pairs, 1)
    torsions = openmm.PeriodicTorsionForce()
    for a, b in pairs:  # stiff C-N bonds where everything is planar: the amide
        symbols = {list(topology.atoms())[i].element.symbol for i in (a, b)}
        if planar and symbols == {"C", "N"}:
            for i in neighbours[a]:
                for j in neighbours[b]:
                    if i != b and j != a:
                        torsions.addTorsion(i, a, b, j, 2, math.pi, 10.0)
    for force in (bonds, angles, repulsion, torsions):
        system.addForce(force)
    return system


def short_md(system: openmm.System, starts: list[np.ndarray], n: int, seed: int) -> np.ndarray:
    """n frames [n, N, 3] of Langevin MD at 300 K, from the lowest of several minima (others may be tangled)."""
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.001)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    minima = []
    for start in starts:
        context.setPositions(start)
        openmm.LocalEnergyMinimizer.minimize(context, 1.0, 500)
        state = context.getState(positions=True, energy=True)
        minima.append((state.getPotentialEnergy()._value, state.getPositions(asNumpy=True)._value))
    context.setPositions(min(minima, key=lambda m: m[0])[1])
    context.setVelocitiesToTemperature(300, seed)
    integrator.step(500)
    frames = []
    for _ in range(n):
        integrator.step(20)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)


@cache
def small_molecule(name: str) -> Molecule:
    topology = small_topology(*SMALL[name])
    system = generic_system(topology, name in PLANAR)
    rng = np.random.default_rng(7)
    n = system.getNumParticles()
    starts = list(0.3 * rng.normal(size=(6, n, 3)))
    if name in PLANAR:  # a flat start, for a minimiser does not untangle a ring
        angle = 2 * math.pi * np.arange(6) / 6
        start = 0.02 * rng.normal(size=(n, 3))
        heavy = sum(a.element.symbol != "H" for a in topology.atoms())
        for i in range(min(6, heavy)):
            start[i, :2] += 0.14 * np.array([math.cos(angle[i]), math.sin(angle[i])])
        for a, b in topology.bonds():
            if b.index >= 6 or (heavy < 6 and b.index >= heavy):
                start[b.index] = 1.7 * start[a.index] + 0.03 * rng.normal(size=3)
        starts = [start]
    return Molecule(topology, short_md(system, starts, 100, 11), system)


@cache
def dipeptide() -> Molecule:
    from openmmtools import testsystems

    test = testsystems.AlanineDipeptideVacuum(constraints=None)
    start = np.asarray(test.positions.value_in_unit(unit.nanometer))
    return Molecule(test.topology, short_md(test.system, [start], 100, 3), test.system)


@cache
def protein(first: int = 0, last: int = 34) -> Molecule:
    """Residues of the villin headpiece that OpenMM ships, without water and ions; frames are its own, jittered."""
    pdb = app.PDBFile(os.path.join(os.path.dirname(app.__file__), "data", "test.pdb"))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete([r for r in pdb.topology.residues() if not first <= r.index <= last])
    x = np.array(modeller.positions.value_in_unit(unit.nanometer))
    rng = np.random.default_rng(5)
    frames = x + 0.004 * rng.normal(size=(40, *x.shape))
    return Molecule(modeller.topology, frames, bare_system(modeller.topology))


def molecule(name: str) -> Molecule:
    if name == "dipeptide":
        return dipeptide()
    if name == "hp35":
        return protein()
    if name == "tripeptide":  # GLU-ASP-PHE
        return protein(3, 5)
    if name == "proline":  # LEU-PRO-LEU
        return protein(19, 21)
    return small_molecule(name)


@pytest.fixture(name="molecule", scope="session")
def molecule_fixture():
    """molecule(name) -> Molecule."""
    return molecule


@pytest.fixture(scope="session")
def bare():
    """bare(topology) -> System with masses only."""
    return bare_system


@pytest.fixture(scope="session")
def build_topology():
    """build_topology(atoms, bonds) -> Topology in the notation of `SMALL`."""
    return small_topology


@pytest.fixture(scope="session")
def proteins():
    """The module proteins.py: test folders are no packages, so a helper is loaded by path."""
    name = "openmm_bg_test_proteins"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("proteins.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def jittered():
    """jittered(topology, positions [N, 3], n) -> Molecule with n frames [n, N, 3] jittered by 4 pm."""

    def build(topology: app.Topology, x: np.ndarray, n: int = 12) -> Molecule:
        rng = np.random.default_rng(5)
        return Molecule(topology, x + 0.004 * rng.normal(size=(n, *x.shape)), bare_system(topology))

    return build
