"""openmmtools' own tests with our moves in the place of its own, wherever a test is about moves in general.

Not among them: `test_mcmc_expectations` (oscillators and an ideal gas, which have no internal coordinates for a flow to
model; what our moves sample is judged in the statistical tests), `test_propagate_replicas` (a step of a femtosecond
that hardly moves), `test_move_restart` and the tests of splittings and tolerances (integrators), and those that make no
move at all.
"""
# ruff: noqa: NPY002  (openmmtools, and so the move, draws from numpy's global generator)

import copy
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import openmmtools
import pytest

from openmm_bg.mcmc import BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove

from openmm import unit  # isort: skip  (after torch)
from openmmtools import alchemy, cache, states, testsystems  # isort: skip
from openmmtools.tests import test_mcmc as mcmc_suite  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::DeprecationWarning")

KINDS = [BoltzmannGeneratorMove, LatentFlowMove, NonequilibriumFlowMove]


@pytest.fixture
def ours(artifact):
    """Makes a function that stands for one of openmmtools' classes and leaves its arguments aside."""
    np.random.seed(1)

    def build(kind, **options):
        if kind is NonequilibriumFlowMove:
            options["schedule"] = [0.0, 0.5, 1.0]
        return lambda *arguments, atom_subset=None, **others: kind(artifact, atom_subset=atom_subset, **options)

    yield build
    cache.global_context_cache.empty()


# -------------------------------------------------------------------- tests of moves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "test_default_context_cache",
        "test_default_context_cache_apply",
        "test_context_cache_specific_apply",
        "test_context_cache_sequence_apply",
        "test_context_cache_compatibility",
        "test_context_cache_local_vs_global",
        "test_dummy_context_cache",
        "test_moves_serialization",
    ],
)
def test_of_moves(ours, monkeypatch, kind, name):
    """In the place of Langevin dynamics, the move that all of these begin with."""
    monkeypatch.setattr(mcmc_suite, "LangevinDynamicsMove", ours(kind))
    getattr(mcmc_suite, name)()


@pytest.mark.parametrize(("kind", "n_steps"), list(zip(KINDS, (50, 20, 8), strict=True)))
def test_of_metropolized_moves(ours, monkeypatch, kind, n_steps):
    """Positions differ after an acceptance, and both acceptances and rejections are counted."""
    made = ours(kind, n_steps=n_steps)
    monkeypatch.setattr(mcmc_suite, "MetropolizedMove", SimpleNamespace(__subclasses__=lambda: [made]))
    mcmc_suite.test_metropolized_moves()


# -------------------------------------------------------------------- tests of multistate samplers


@pytest.fixture(scope="module")
def sampling_suite(pytestconfig):
    """`openmmtools.tests.test_sampling`, which marks some tests as flaky and imports requests for one download."""
    pytestconfig.addinivalue_line("markers", "flaky: of openmmtools, unused here")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("requests") is None:
            patch.setitem(sys.modules, "requests", ModuleType("requests"))
        return importlib.import_module("openmmtools.tests.test_sampling")


@pytest.fixture(scope="module")
def drivers(sampling_suite):
    """Its tests of replica exchange; their second molecule, a host with its guest, becomes alanine dipeptide too."""
    test = testsystems.AlanineDipeptideVacuum()
    tests = sampling_suite.TestReplicaExchange()
    temperatures = [(300.0 + 10.0 * i) * unit.kelvin for i in range(tests.N_STATES)]
    replicas = [states.SamplerState(test.positions + 10.0 * i * unit.nanometer) for i in range(tests.N_SAMPLERS)]
    plain = [states.ThermodynamicState(test.system, t) for t in temperatures]
    region = alchemy.AlchemicalRegion(alchemical_atoms=range(6))
    system = alchemy.AbsoluteAlchemicalFactory().create_alchemical_system(test.system, region)
    compound = []
    for i, temperature in enumerate(temperatures):
        alchemical = alchemy.AlchemicalState.from_system(system)
        alchemical.set_alchemical_parameters(1.0 - 0.1 * i)
        state = states.ThermodynamicState(system, temperature)
        compound.append(states.CompoundThermodynamicState(state, [alchemical]))
    tests.alanine_test = (plain, replicas, [])
    tests.hostguest_test = (compound, copy.deepcopy(replicas), [copy.deepcopy(plain[0])])
    return tests


@pytest.mark.parametrize(
    ("name", "replaced", "kind"),
    [
        ("test_run_extend", "MCRotationMove", NonequilibriumFlowMove),
        ("test_resume_positions_velocities_from_storage", "MCRotationMove", BoltzmannGeneratorMove),
        ("test_from_storage", "LangevinDynamicsMove", NonequilibriumFlowMove),
        ("test_equilibrate", "LangevinDynamicsMove", LatentFlowMove),
        ("test_checkpointing", "IntegratorMove", BoltzmannGeneratorMove),
    ],
)
def test_of_drivers(drivers, ours, monkeypatch, name, replaced, kind):
    """Replica exchange with storage, of states that differ in temperature and in an alchemical parameter."""
    monkeypatch.setattr(openmmtools.mcmc, replaced, ours(kind))
    getattr(drivers, name)()


def test_of_the_reporter(sampling_suite, ours, monkeypatch):
    """Moves come back from a .nc file as they went in."""
    monkeypatch.setattr(openmmtools.mcmc, "IntegratorMove", ours(NonequilibriumFlowMove, n_steps=3, step=0.2))
    monkeypatch.setattr(openmmtools.mcmc, "GHMCMove", ours(BoltzmannGeneratorMove, n_proposals=4))
    sampling_suite.TestReporter().test_store_mcmc_moves()
