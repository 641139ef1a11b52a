"""The built-in OBC2 force in place of the custom one: equal on HP35, and refused for everything that only resembles."""

import os

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg.energy.implicit_solvent import (
    TOLERANCE,
    agreement,
    equal_gbsa_force,
    why_not_obc2,
    with_equal_solvent,
)
from openmm_bg.errors import InputError

import openmm  # isort: skip
from openmm import app, unit  # isort: skip
from openmm.app.internal import customgbforces  # isort: skip


@pytest.fixture(scope="module")
def hp35():
    """Topology and positions [582, 3] nm of OpenMM's villin headpiece without water and ions."""
    pdb = app.PDBFile(os.path.join(os.path.dirname(app.__file__), "data", "test.pdb"))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete([r for r in modeller.topology.residues() if r.name in ("HOH", "Cl")])
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


@pytest.fixture(scope="module")
def build(hp35):
    def system(model="obc2", **options):
        return app.ForceField("amber14-all.xml", f"implicit/{model}.xml").createSystem(hp35[0], **options)

    return system


def custom(system):
    return next(f for f in system.getForces() if isinstance(f, openmm.CustomGBForce))


@pytest.mark.parametrize("options", [{}, {"sasaMethod": None}, {"solventDielectric": 60.0, "soluteDielectric": 2.0}])
def test_energies_and_forces_are_equal(hp35, build, options):
    system = build(constraints=app.HBonds, **options)
    custom(system).setForceGroup(3)
    twin = with_equal_solvent(system)
    noise = np.random.default_rng(0).normal(0.0, 0.003, (2, *hp35[1].shape))
    found = agreement(system, twin, hp35[1] + noise)
    print(found)
    # energies.md's bound for the whole energy; the constants' last digits are all that may differ
    assert found.holds and found.relative_energy < 5e-8 and found.relative_force < 5e-8
    assert not any(isinstance(f, openmm.CustomGBForce) for f in twin.getForces())
    assert [f.getForceGroup() for f in twin.getForces() if isinstance(f, openmm.GBSAOBCForce)] == [3]
    assert isinstance(custom(system), openmm.CustomGBForce), "the user's System must stay as it was"
    assert twin.getNumConstraints() == system.getNumConstraints() > 0


def wrong_charges(force):
    for i in range(force.getNumParticles()):
        charge, radius, scale = force.getParticleParameters(i)
        force.setParticleParameters(i, charge / np.sqrt(138.935485 / 138.93545764438198), radius, scale)


def wrong_dielectric(force):
    force.setSolventDielectric(78.3)


def wrong_surface(force):
    force.setSurfaceAreaEnergy(2.26)


@pytest.mark.parametrize("spoil", [wrong_charges, wrong_dielectric, wrong_surface])
def test_a_wrong_constant_is_noticed(hp35, build, spoil):
    system = build()
    twin = with_equal_solvent(system)
    spoil(next(f for f in twin.getForces() if isinstance(f, openmm.GBSAOBCForce)))
    assert not agreement(system, twin, hp35[1][None]).holds, f"not above {TOLERANCE}"


@pytest.mark.parametrize(
    "model, options, reason",
    [
        ("obc1", {}, "Born radius"),
        ("hct", {}, "Born radius|computes other"),
        ("gbn", {}, "tabulated|computes other"),
        ("gbn2", {}, "tabulated|parameters"),
        ("obc2", {"implicitSolventKappa": 1.0}, "self energy"),
        ("obc2", {"nonbondedMethod": app.CutoffNonPeriodic}, "cutoff"),
    ],
)
def test_other_models_stay(build, model, options, reason):
    system = build(model, **options)
    assert with_equal_solvent(system) is None
    assert why_not_obc2(custom(system)) is not None
    with pytest.raises(InputError, match=reason):
        equal_gbsa_force(custom(system))


def test_the_solvent_of_amber_files_is_recognised(hp35):
    force = customgbforces.GBSAOBC2Force(solventDielectric=80.0, SA=None)
    for i in range(3):
        force.addParticle([0.1 * i, 0.15, 0.8])
    force.finalize()
    equal = equal_gbsa_force(force)
    charge, radius, scale = equal.getParticleParameters(2)
    assert equal.getSolventDielectric() == 80.0 and equal.getSurfaceAreaEnergy()._value == 0.0
    assert charge._value == pytest.approx(0.2, rel=1e-6) and radius._value == pytest.approx(0.15) and scale == 0.8


def handmade(born=None, pairs=None, self_energy=None, names=("charge", "or", "sr"), kinds=None, radius=0.141):
    """OBC2 as OpenMM writes it, with one piece exchanged."""
    original = customgbforces.GBSAOBC2Force(SA="ACE")
    force = openmm.CustomGBForce()
    for name in names:
        force.addPerParticleParameter(name)
    kinds = kinds or {}
    for i in range(2):
        name, text, kind = original.getComputedValueParameters(i)
        force.addComputedValue(name, born(text) if born and i == 1 else text, kinds.get(name, kind))
    for i in range(3):
        text, kind = original.getEnergyTermParameters(i)
        change = {0: self_energy, 2: pairs}.get(i)
        force.addEnergyTerm(change(text) if change else text, kind)
    force.addParticle([0.1, radius, 0.1][: len(names)])
    return force


def test_a_copy_by_hand_is_recognised():
    assert why_not_obc2(handmade()) is None
    assert why_not_obc2(handmade(born=lambda t: t.replace(";", " ; "))) is None


@pytest.mark.parametrize(
    "pieces, reason",
    [
        ({"born": lambda t: t.replace("4.85", "2.909125")}, "Born radius"),
        ({"born": lambda t: t.replace("0.8*", "0.80001*")}, "Born radius"),
        ({"born": lambda t: t.replace("offset=0.009", "offset=0.0091")}, "offset"),
        ({"born": lambda t: t.replace("; offset=0.009", "")}, "offset"),
        ({"born": lambda t: t.replace("psi=I*or", "psi=I*or*1.1")}, "psi"),
        ({"born": lambda t: t + "; or=0.1"}, "redefines or"),
        ({"born": lambda t: t + "; tanh=0.1; psi=1"}, "twice"),
        ({"pairs": lambda t: t.replace("exp(-r^2/(4*B1*B2))", "exp(-r^2/(2*B1*B2))")}, "f="),
        ({"pairs": lambda t: t.replace("138.935485", "139")}, "pair energy"),
        ({"pairs": lambda t: t.replace("solventDielectric=78.5", "solventDielectric=80")}, "different dielectric"),
        ({"pairs": lambda t: t.replace("solventDielectric=78.5", "x=1"), "self_energy": lambda t: t.replace(
            "solventDielectric=78.5", "x=1")}, "does not define"),
        ({"self_energy": lambda t: t + "; charge=0"}, "redefines charge"),
        ({"kinds": {"I": openmm.CustomGBForce.ParticlePair}}, "other values"),
        ({"names": ("charge", "or", "sr", "extra")}, "parameters"),
        ({"radius": 0.0}, "radius"),
    ],
)  # fmt: skip
def test_look_alikes_are_refused(pieces, reason):
    found = why_not_obc2(handmade(**pieces))
    assert found is not None
    with pytest.raises(InputError, match=reason):
        equal_gbsa_force(handmade(**pieces))


def test_a_force_that_can_change_is_refused():
    force = handmade()
    force.addGlobalParameter("solventDielectric", 78.5)
    assert "global" in why_not_obc2(force)
    system = openmm.System()
    assert with_equal_solvent(system) is None
