"""FlowForce through openmm-torch is FlowForce through PythonForce. `tests/openmm_torch/run` makes an environment."""

import copy
import os
import shutil
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch

from openmm_bg.force import FlowForce
from openmm_bg.openmm_torch import find_openmm_torch

import openmm  # isort: skip

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
TEMPERATURE = 310.0
DIPEPTIDE = files("openmm_bg.data") / "alanine_dipeptide.bg"


@pytest.fixture(scope="session", autouse=True)
def openmm_torch():
    works, found = find_openmm_torch()
    if works:
        return
    if os.environ.get("OPENMM_TORCH_TESTS") == "required":
        pytest.fail(f"openmm-torch: {found}.")
    pytest.skip(f"openmm-torch: {found}.")


def system_of(template, *forces):
    """Particles and constraints of a System, with these forces instead of its own."""
    system = openmm.System()
    for i in range(template.getNumParticles()):
        system.addParticle(template.getParticleMass(i))
    for i in range(template.getNumConstraints()):
        system.addConstraint(*template.getConstraintParameters(i))
    for force in forces:
        system.addForce(force)
    return system


def context_of(system, positions, platform="Reference", integrator=None):
    integrator = integrator or openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    return context


def state_of(context, **options):
    """Energy and forces [N, 3]."""
    state = context.getState(energy=True, forces=True, **options)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


def same(found, expected, rtol=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=rtol, nan_ok=True)
    np.testing.assert_allclose(found[1], expected[1], atol=rtol * np.nan_to_num(np.abs(expected[1])).max())


def both(template, path, positions, platform="Reference", **options):
    """Contexts of the two backends."""
    return [
        context_of(system_of(template, FlowForce(path, TEMPERATURE, backend=backend, **options)), positions, platform)
        for backend in ("python", "torch")
    ]


@pytest.fixture
def frames(small):
    """Frames of the flow [8, 5, 3], nm."""
    return small.flow.to_positions(small.sample(8)).numpy()


# -------------------------------------------------------------------- the same energies and forces


@pytest.mark.parametrize("platform", PLATFORMS)
def test_full_flow(small, frames, platform):
    python, through_torch = both(small.system, small.path, frames[0], platform)
    digits = 1e-5 if platform == "Reference" else 1e-4  # the CPU platform adds forces in single precision
    for x in frames:
        for context in (python, through_torch):
            context.setPositions(x)
        same(state_of(through_torch), state_of(python), digits)


def test_completed_flow(completed):
    x = completed.flow.to_positions(*completed.draw(8)).numpy()
    python, through_torch = both(completed.system, completed.path, x[0])
    for frame in x:
        for context in (python, through_torch):
            context.setPositions(frame)
        same(state_of(through_torch), state_of(python))


def test_dipeptide(small):
    import openmm_bg as bg

    molecule = bg.load_alanine_dipeptide()
    python, through_torch = both(molecule.system, DIPEPTIDE, molecule.positions)
    rng = np.random.default_rng(0)
    for _ in range(6):
        x = molecule.positions + rng.normal(0.0, 1e-3, molecule.positions.shape)
        for context in (python, through_torch):
            context.setPositions(x)
        same(state_of(through_torch), state_of(python))


def test_where_the_density_is_zero(small, frames):
    """Infinite energy, the forces of the continued density; NaN for NaN; and inside again."""
    python, through_torch = both(small.system, small.path, frames[0])
    broken = frames[1].copy()
    broken[3, 0] = np.nan
    for x in (frames[0] * [1, 1, -1], frames[1], broken, frames[2], frames[2] * [1, 1, -1], frames[3]):
        for context in (python, through_torch):
            context.setPositions(x)
        same(state_of(through_torch), state_of(python))
    for scale, expected in ((-1.0, np.inf), (0.0, 0.0), (1.0, np.inf)):
        through_torch.setParameter("flow_scale", scale)
        through_torch.setPositions(frames[0] * [1, 1, -1])
        assert state_of(through_torch)[0] == expected
    through_torch.getIntegrator().step(20)
    assert np.isfinite(through_torch.getState(positions=True).getPositions(asNumpy=True)._value).all()


def test_same_trajectory(small, frames):
    python, through_torch = both(small.system, small.path, frames[0])
    ends = []
    for context in (python, through_torch):
        context.getIntegrator().setConstraintTolerance(1e-10)
        context.applyConstraints(1e-10)
        context.setVelocitiesToTemperature(TEMPERATURE, 1)
        context.getIntegrator().step(50)
        ends.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-5)
    assert np.abs(ends[0] - frames[0]).max() > 1e-3


# -------------------------------------------------------------------- as a citizen of OpenMM


def test_parameter_and_force_group(small, frames):
    other = openmm.CustomExternalForce("7")
    other.addParticle(0)
    force = FlowForce(small.path, TEMPERATURE, parameter="lambda_flow", backend="torch")
    force.setForceGroup(3)
    context = context_of(system_of(small.system, force, other), frames[0])
    python, _ = both(small.system, small.path, frames[0], parameter="lambda_flow")
    assert context.getParameters()["lambda_flow"] == python.getParameters()["lambda_flow"] == 1.0
    for scale in (1.0, 0.0, 0.1, -1.0):
        context.setParameter("lambda_flow", scale)
        python.setParameter("lambda_flow", scale)
        expected = state_of(python)
        same(state_of(context, groups={3}), expected)
        assert state_of(context, groups={0})[0] == pytest.approx(7.0)
        assert state_of(context)[0] == pytest.approx(expected[0] + 7.0)


def test_two_flows_in_one_system(small, frames):
    """One backward, scaled apart: they cancel."""
    first = FlowForce(small.path, TEMPERATURE, backend="torch")
    second = FlowForce(small.path, TEMPERATURE, parameter="second", backend="torch")
    context = context_of(system_of(small.system, first, second), frames[0])
    one = state_of(context)
    context.setParameter("second", -1.0)
    energy, forces = state_of(context)
    assert energy == pytest.approx(0.0, abs=1e-5 * abs(one[0]))
    np.testing.assert_allclose(forces, 0.0, atol=1e-5 * np.abs(one[1]).max())


def test_copies_and_xml(small, frames, tmp_path):
    """They hold the flow itself: the artifact may go."""
    path = shutil.copy(small.path, tmp_path / "copy.bg")
    force = FlowForce(path, TEMPERATURE, parameter="lambda_flow", backend="torch")
    assert force.getName() == "FlowForce"
    force.setForceGroup(5)
    system = system_of(small.system, force)
    expected = state_of(context_of(system, frames[0]))
    path.unlink()
    text = openmm.XmlSerializer.serialize(system)
    for twin in (
        copy.deepcopy(system),
        openmm.XmlSerializer.deserialize(text),
        system_of(system, copy.deepcopy(force)),
    ):
        assert twin.getForce(0).getForceGroup() == 5
        context = context_of(twin, frames[0])
        same(state_of(context, groups={5}), expected)
        context.setParameter("lambda_flow", 0.5)
        assert state_of(context)[0] == pytest.approx(0.5 * expected[0], rel=1e-5)
        context.reinitialize(preserveState=True)
        assert state_of(context)[0] == pytest.approx(0.5 * expected[0], rel=1e-5)


READ = """
context = openmm.Context(openmm.XmlSerializer.deserialize(open("system.xml").read()), openmm.VerletIntegrator(1),
                         openmm.Platform.getPlatformByName("Reference"))
context.setPositions(numpy.load("x.npy"))
print(context.getState(energy=True).getPotentialEnergy()._value)
"""
MAKE = """
system = openmm.System()
for _ in range(5):
    system.addParticle(1.0)
system.addForce(FlowForce({path!r}, 310.0, backend="torch"))
open("system.xml", "w").write(openmm.XmlSerializer.serialize(system))
"""
ORDERS = {
    "torch first": "import numpy, torch, openmm\nfrom openmm_bg.force import FlowForce\n",
    "OpenMM first": "import numpy, openmm, torch\nfrom openmm_bg.force import FlowForce\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_in_another_process(small, frames, tmp_path, order):
    """Made where either was imported first; read in a process that knows nothing of openmm_bg, torch first."""
    np.save(tmp_path / "x.npy", frames[0])

    def run(code):
        code = f"import sys; sys.path[:0] = {sys.path!r}\n{code}"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(ORDERS[order] + MAKE.format(path=str(small.path)) + READ)
    found = float(run("import numpy, torch, openmm\n" + READ))
    python, _ = both(small.system, small.path, frames[0])
    assert found == pytest.approx(state_of(python)[0], rel=1e-5)


def test_md_inside_a_block_without_gradients(small, frames):
    context = both(small.system, small.path, frames[0])[1]
    expected = state_of(context)
    with torch.no_grad():
        context.setPositions(frames[0])
        same(state_of(context), expected)
        assert not torch.is_grad_enabled()


# -------------------------------------------------------------------- mistakes


def last_line(error):
    return str(error.value).strip().splitlines()[-1]


def test_a_larger_system_is_refused(small, frames):
    force = FlowForce(small.path, TEMPERATURE, backend="torch")
    assert not hasattr(force, "setParticles")
    system = system_of(small.system, force)
    system.addParticle(1.0)
    context = context_of(system, np.concatenate([frames[0], np.zeros((1, 3))]))
    with pytest.raises(openmm.OpenMMException) as error:
        state_of(context)
    assert last_line(error).endswith(
        "The flow of this FlowForce has 5 atoms, the System 6 particles: a molecule among others needs "
        "backend='python' and setParticles()."
    )


def test_free_lengths_are_told(small, frames):
    stretched = frames[0].copy()
    stretched[3] += 0.2 * (stretched[3] - stretched[2])
    context = both(small.system, small.path, stretched)[1]
    with pytest.raises(openmm.OpenMMException) as error:
        state_of(context)
    assert "the constraints that the flow was trained with" in last_line(error)
    context.setPositions(frames[0])
    assert np.isfinite(state_of(context)[0])
