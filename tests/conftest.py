"""What the tests of several rooms start from and compare with: the shipped alanine dipeptide."""

import copy
import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch  # before openmm

import openmm_bg as bg
from openmm_bg.energy import BOLTZMANN
from openmm_bg.simulate import torsion_angle

import openmm  # isort: skip

PSI = (6, 8, 14, 16)

#: Networks this small gain nothing from a second thread, and wait for it ten times longer than they compute wherever
#: another process is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Neither choices nor libraries that this user keeps decide what a test runs, and no test leaves any."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # whose list of fonts lies there too, and takes long to make
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or str(usual / "matplotlib"))
        yield


@pytest.fixture(autouse=True)
def molecule_stays_as_shipped(request):
    """A test that changes the System which all share would decide what later ones find."""
    yield
    if "dipeptide" in request.fixturenames:
        molecule = request.getfixturevalue("dipeptide")
        if hasattr(molecule, "flow"):  # rooms have other dipeptides too
            assert openmm.XmlSerializer.serialize(molecule.system) == shipped_system(), "the shared System was changed"


@functools.cache
def shipped_system() -> str:
    return openmm.XmlSerializer.serialize(bg.load_alanine_dipeptide().system)


@pytest.fixture(scope="session")
def weighted_reference(dipeptide):
    """(temperature, "energy" | "psi") to (mean, error): energy (kJ/mol) and ψ population of the shipped dipeptide.

    At 300 and 350 K: the flow's own samples, weighted (formula A). Many, and both temperatures from the same ones: at
    350 K a few of large weight make up the tail, and an error estimated from too few would not know of it.
    """
    reference = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), reference)
    context.setPositions(dipeptide.positions)
    options = {"seed": 5, "platform": "Reference", "n_workers": 1}
    with bg.BoltzmannGeneratorSampler(dipeptide.flow, context, 300.0, **options) as sampler:
        ensemble = sampler.sample(40000)
    u = np.where(np.isfinite(ensemble.log_weights), ensemble.reduced_potentials, 0.0)
    psi = torsion_angle(ensemble.positions, PSI) > 1.0
    found = {}
    for temperature in (300.0, 350.0):
        log_w = ensemble.log_weights + u * (1.0 - 300.0 / temperature)
        w = np.exp(log_w - log_w.max())
        w /= w.sum()
        for name, f in (("energy", u * BOLTZMANN * 300.0), ("psi", psi)):
            mean = (w * f).sum()
            found[temperature, name] = (mean, np.sqrt((w**2 * (f - mean) ** 2).sum()))
    return found


@pytest.fixture(scope="session")
def dipeptide():
    return bg.load_alanine_dipeptide()


@pytest.fixture
def make_context(dipeptide):
    """A Context of the shipped System (or of another one) at the shipped positions."""

    def make(system=None, platform="Reference", temperature=300.0, positions=None, integrator=None):
        if integrator is None:
            integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.002)
            integrator.setRandomNumberSeed(5)
        context = openmm.Context(
            copy.deepcopy(dipeptide.system) if system is None else system,
            integrator,
            openmm.Platform.getPlatformByName(platform),
        )
        context.setPositions(dipeptide.positions if positions is None else positions)
        context.setVelocitiesToTemperature(300.0, 3)
        return context

    return make


@pytest.fixture
def make_sampler(dipeptide, make_context):
    """A sampler on one Reference worker, closed at the end of the test."""
    made = []

    def make(context=None, *, flow=None, seed=1, **options):
        context = make_context() if context is None else context
        options = {"platform": "Reference", "n_workers": 1, **options}
        sampler = bg.BoltzmannGeneratorSampler(flow or dipeptide.flow, context, seed=seed, **options)
        made.append(sampler)
        return sampler

    yield make
    for sampler in made:
        sampler.close()
