"""The shipped alanine dipeptide and Contexts of it."""

import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg as bg

import openmm  # isort: skip


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
            dipeptide.system if system is None else system, integrator, openmm.Platform.getPlatformByName(platform)
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
