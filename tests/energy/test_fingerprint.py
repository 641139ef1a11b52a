"""What a pool compares before every move: whatever changes a System's energy must change its fingerprint."""

import copy

import openmm
import pytest

from openmm_bg.energy import fingerprint as module
from openmm_bg.energy.fingerprint import fingerprint


def bonds():
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.1, 100.0)
    return force


def angles():
    force = openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, 1.9, 300.0)
    return force


def torsions():
    force = openmm.PeriodicTorsionForce()
    force.addTorsion(0, 1, 2, 3, 2, 0.3, 4.0)
    return force


def ryckaert_bellemans():
    force = openmm.RBTorsionForce()
    force.addTorsion(0, 1, 2, 3, *range(1, 7))
    return force


def nonbonded():
    force = openmm.NonbondedForce()
    for _ in range(4):
        force.addParticle(0.1, 0.3, 0.5)
    force.addException(0, 1, 0.0, 0.3, 0.0)
    force.addGlobalParameter("scale", 1.0)
    force.addParticleParameterOffset("scale", 2, 0.1, 0.0, 0.0)
    force.addExceptionParameterOffset("scale", 0, 0.1, 0.0, 0.0)
    return force


def born():
    force = openmm.GBSAOBCForce()
    for _ in range(4):
        force.addParticle(0.1, 0.15, 0.8)
    return force


def custom():
    force = openmm.CustomExternalForce("k*max(0, r-2)^2; r=sqrt(x^2+y^2+z^2)")
    force.addPerParticleParameter("k")
    force.addParticle(0, [5.0])
    return force


#: Every way in which a force may be told another energy.
CHANGES = {
    bonds: [
        lambda f: f.setBondParameters(0, 0, 1, 0.1, 100.1),
        lambda f: f.setBondParameters(0, 0, 1, 0.1001, 100.0),
        lambda f: f.setBondParameters(0, 0, 2, 0.1, 100.0),
        lambda f: f.addBond(1, 2, 0.1, 1.0),
        lambda f: f.setUsesPeriodicBoundaryConditions(True),
        lambda f: f.setForceGroup(3),
    ],
    angles: [
        lambda f: f.setAngleParameters(0, 0, 1, 2, 1.9, 301.0),
        lambda f: f.setAngleParameters(0, 0, 1, 3, 1.9, 300.0),
        lambda f: f.addAngle(1, 2, 3, 1.0, 1.0),
        lambda f: f.setUsesPeriodicBoundaryConditions(True),
    ],
    torsions: [
        lambda f: f.setTorsionParameters(0, 0, 1, 2, 3, 3, 0.3, 4.0),
        lambda f: f.setTorsionParameters(0, 0, 1, 2, 3, 2, 0.4, 4.0),
        lambda f: f.addTorsion(3, 2, 1, 0, 1, 0.0, 1.0),
        lambda f: f.setUsesPeriodicBoundaryConditions(True),
    ],
    ryckaert_bellemans: [
        lambda f: f.setTorsionParameters(0, 0, 1, 2, 3, 1, 2, 3, 4, 5, 7),
        lambda f: f.setUsesPeriodicBoundaryConditions(True),
    ],
    nonbonded: [
        lambda f: f.setParticleParameters(3, 0.11, 0.3, 0.5),
        lambda f: f.setParticleParameters(3, 0.1, 0.31, 0.5),
        lambda f: f.setExceptionParameters(0, 0, 1, 0.01, 0.3, 0.0),
        lambda f: f.addException(0, 2, 0.0, 0.3, 0.0),
        lambda f: f.addGlobalParameter("other", 1.0),
        lambda f: f.setGlobalParameterName(0, "renamed"),
        lambda f: f.setGlobalParameterDefaultValue(0, 2.0),
        lambda f: f.setParticleParameterOffset(0, "scale", 2, 0.2, 0.0, 0.0),
        lambda f: f.addParticleParameterOffset("scale", 1, 0.2, 0.0, 0.0),
        lambda f: f.setExceptionParameterOffset(0, "scale", 0, 0.2, 0.0, 0.0),
        lambda f: f.addExceptionParameterOffset("scale", 0, 0.2, 0.0, 0.0),
        lambda f: f.setNonbondedMethod(f.CutoffNonPeriodic),
        lambda f: f.setCutoffDistance(0.9),
        lambda f: f.setUseSwitchingFunction(True),
        lambda f: f.setSwitchingDistance(0.8),
        lambda f: f.setReactionFieldDielectric(70.0),
        lambda f: f.setEwaldErrorTolerance(1e-5),
        lambda f: f.setPMEParameters(1.0, 20, 20, 20),
        lambda f: f.setLJPMEParameters(1.0, 20, 20, 20),
        lambda f: f.setUseDispersionCorrection(False),
        lambda f: f.setReciprocalSpaceForceGroup(2),
        lambda f: f.setIncludeDirectSpace(False),
        lambda f: f.setExceptionsUsePeriodicBoundaryConditions(True),
        lambda f: f.setForceGroup(3),
    ],
    born: [
        lambda f: f.setParticleParameters(3, 0.1, 0.16, 0.8),
        lambda f: f.setNonbondedMethod(f.CutoffNonPeriodic),
        lambda f: f.setCutoffDistance(0.9),
        lambda f: f.setSoluteDielectric(2.0),
        lambda f: f.setSolventDielectric(70.0),
        lambda f: f.setSurfaceAreaEnergy(1.0),
    ],
    openmm.CMMotionRemover: [lambda f: f.setFrequency(7)],
    custom: [
        lambda f: f.setParticleParameters(0, 0, [6.0]),
        lambda f: f.setEnergyFunction("2*k*max(0, r-2)^2; r=sqrt(x^2+y^2+z^2)"),
    ],
}


def system_of(make) -> openmm.System:
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    system.addForce(bonds())
    system.addForce(make())
    return system


@pytest.mark.parametrize(("make", "k"), [(make, k) for make, changes in CHANGES.items() for k in range(len(changes))])
def test_every_change_is_seen(make, k):
    system = system_of(make)
    before = fingerprint(system)
    assert before == fingerprint(system) == fingerprint(copy.copy(system))
    CHANGES[make][k](system.getForce(1))
    xml = openmm.XmlSerializer.serialize
    assert xml(system) != xml(system_of(make))  # it is a change
    assert fingerprint(system) != before


def test_every_setter_of_the_forces_listed_is_tried():
    """A setter that nobody thought of when the lists were written: this fails in the OpenMM that has it."""
    known = {
        "setForceGroup", "setName",  # of all forces
        "setBondParameters", "setAngleParameters", "setTorsionParameters", "setUsesPeriodicBoundaryConditions",
        "setParticleParameters", "setExceptionParameters", "setParticleParameterOffset", "setExceptionParameterOffset",
        "setGlobalParameterName", "setGlobalParameterDefaultValue", "setNonbondedMethod", "setCutoffDistance",
        "setUseSwitchingFunction", "setSwitchingDistance", "setReactionFieldDielectric", "setEwaldErrorTolerance",
        "setPMEParameters", "setLJPMEParameters", "setUseDispersionCorrection", "setReciprocalSpaceForceGroup",
        "setIncludeDirectSpace", "setExceptionsUsePeriodicBoundaryConditions", "setSoluteDielectric",
        "setSolventDielectric", "setSurfaceAreaEnergy", "setFrequency",
    }  # fmt: skip
    for name in module._LISTS:
        found = {setter for setter in dir(getattr(openmm, name)) if setter.startswith("set")}
        assert found <= known, name


def test_forces_that_come_and_go():
    system = system_of(nonbonded)
    before = fingerprint(system)
    system.addForce(angles())
    assert fingerprint(system) != before
    system.removeForce(2)
    assert fingerprint(system) == before
    system.addParticle(1.0)
    assert fingerprint(system) != before


def test_virtual_sites():
    system = system_of(nonbonded)
    before = fingerprint(system)
    system.setParticleMass(3, 0.0)
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    middle = fingerprint(system)
    assert middle != before
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.4, 0.6))
    assert fingerprint(system) != middle


def test_without_the_functions_below_the_classes_it_is_written_as_xml(monkeypatch):
    monkeypatch.delattr(openmm, "_openmm")
    module._reader.cache_clear()
    try:
        system = system_of(nonbonded)
        before = fingerprint(system)
        assert all(isinstance(force, str) and force.startswith("<?xml") for force in before[2:])
        system.getForce(1).setParticleParameters(3, 0.11, 0.3, 0.5)
        assert fingerprint(system) != before
    finally:
        module._reader.cache_clear()
