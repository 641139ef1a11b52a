"""FlowForce: its energy is the formula's, its forces are the slope of it, and MD under it samples the flow."""

import copy
import hashlib
import pickle
import shutil
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.energy import BOLTZMANN
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.force import FlowForce, FlowPotential
from openmm_bg.force import potential as force_module

import openmm  # isort: skip

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
TEMPERATURE = 310.0  # on purpose not that of training, which must not matter
KT = BOLTZMANN * TEMPERATURE


def system_of(template, *forces):
    """Particles and constraints of a System, with these forces instead of its own."""
    system = copy.deepcopy(template)
    for index in reversed(range(system.getNumForces())):
        system.removeForce(index)
    for force in forces:
        system.addForce(force)
    return system


def context_of(system, positions, platform="Reference"):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    return context


def energy_of(context, **options):
    return context.getState(energy=True, **options).getPotentialEnergy()._value


def forces_of(context):
    return context.getState(forces=True).getForces(asNumpy=True)._value


def potential_of(path, kind=FlowPotential):
    """The function behind a FlowForce, which OpenMM does not hand out again."""
    return kind(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), KT, "flow_scale")


@pytest.fixture
def frame(small):
    """One frame of the flow [5, 3], nm."""
    return small.flow.to_positions(small.sample(1))[0].numpy()


@pytest.fixture
def forget(monkeypatch):
    """Act like a process that has read no artifact."""
    monkeypatch.setattr(force_module, "_flows", {})


# -------------------------------------------------------------------- the energy


def volume_by_hand(x, zmatrix, constraints):
    """log J from lengths and angles, ½ log det Z from the gradients of the constraints, at x [N, 3]."""

    def length(i, j):
        return np.linalg.norm(x[i] - x[j])

    def sine(i, j, k):
        cosine = (x[i] - x[j]) @ (x[k] - x[j]) / length(i, j) / length(k, j)
        return np.sqrt(1 - cosine**2)

    a, b, c = zmatrix.seed
    log_j = 2 * np.log(length(a, b)) + 2 * np.log(length(b, c)) + np.log(sine(a, b, c))
    for atom, parent, grandparent, _ in zmatrix.rows:
        log_j += 2 * np.log(length(atom, parent)) + np.log(sine(atom, parent, grandparent))
    gradients = np.zeros((len(constraints.bonds), *x.shape))
    for k, (i, j) in enumerate(constraints.bonds):
        gradients[k, i] = (x[i] - x[j]) / length(i, j)
        gradients[k, j] = -gradients[k, i]
    z = np.einsum("kix,lix,i->kl", gradients, gradients, 1 / np.array(constraints.masses))
    return log_j, 0.5 * np.linalg.slogdet(z)[1]


def test_energy_is_the_formula(small):
    """log q from the sampling direction, log J and Φ from Cartesian positions alone."""
    torch.manual_seed(4)
    y, log_q = small.flow.sample(20)
    context = context_of(system_of(small.system, FlowForce(small.path, TEMPERATURE)), small.frames[0])
    fixman = []
    for x, lq in zip(small.flow.to_positions(y).numpy(), log_q.numpy(), strict=True):
        log_j, phi = volume_by_hand(x, small.flow.coordinates.zmatrix, small.constraints)
        context.setPositions(x)
        assert energy_of(context) == pytest.approx(-KT * (lq - log_j - phi), abs=1e-4)
        fixman.append(KT * phi)
    assert np.std(fixman) > 0.05  # so that a lost Φ would show


def test_energy_of_a_completed_flow(completed):
    """log q and log g from the sampling direction."""
    torch.manual_seed(4)
    y, log_q = completed.flow.sample(20)
    s, log_g = completed.flow.complete(y)
    assert completed.flow.representation == "reduced" and float(log_g.std()) > 0.5
    context = context_of(system_of(completed.system, FlowForce(completed.path, TEMPERATURE)), completed.frames[0])
    for x, log_p in zip(completed.flow.to_positions(y, s).numpy(), (log_q + log_g).numpy(), strict=True):
        log_j, phi = volume_by_hand(x, completed.flow.coordinates.zmatrix, completed.constraints)
        context.setPositions(x)
        assert energy_of(context) == pytest.approx(-KT * (log_p - log_j - phi), abs=1e-3)


def test_energy_of_the_dipeptide():
    molecule = bg.load_alanine_dipeptide()
    force = FlowForce(files("openmm_bg.data") / "alanine_dipeptide.bg", TEMPERATURE)
    context = context_of(system_of(molecule.system, force), molecule.positions)
    y, _ = molecule.flow.to_internal(molecule.positions)
    coordinates = molecule.flow.coordinates
    log_j, phi = volume_by_hand(molecule.positions, coordinates.zmatrix, coordinates.constraints)
    with torch.no_grad():
        log_q = float(molecule.flow.log_prob(y))
    assert energy_of(context) == pytest.approx(-KT * (log_q - log_j - phi), abs=1e-3)


def test_rigid_motion_changes_nothing(small, frame):
    context = context_of(system_of(small.system, FlowForce(small.path, TEMPERATURE)), frame)
    before, forces = energy_of(context), forces_of(context)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    context.setPositions(frame @ rotation.T + [1.0, -2.0, 0.5])
    assert energy_of(context) == pytest.approx(before, abs=1e-4)
    np.testing.assert_allclose(forces_of(context), forces @ rotation.T, atol=1e-3 * np.abs(forces).max())


# -------------------------------------------------------------------- the forces


def slopes(context, x, directions, h):
    """Fourth-order differences of the energy along directions [m, N, 3]."""

    def energy(shift):
        context.setPositions(x + shift)
        return energy_of(context)

    return np.array(
        [(8 * (energy(h * d) - energy(-h * d)) - energy(2 * h * d) + energy(-2 * h * d)) / (12 * h) for d in directions]
    )


def test_forces_are_the_slope_to_many_digits(small, tmp_path, forget):
    """With networks in double precision, since the rounding of single precision hides small errors."""
    path = tmp_path / "double.bg"
    small.make("full", path)
    force = FlowForce(path, TEMPERATURE)
    for flow in force_module._flows.values():
        flow.density.double()
    x = small.flow.to_positions(small.sample(3))[2].numpy()
    context = context_of(system_of(small.system, force), x)
    forces = forces_of(context)
    directions = np.eye(15).reshape(15, 5, 3)
    expected = -slopes(context, x, directions, 1e-4).reshape(5, 3)
    np.testing.assert_allclose(forces, expected, atol=1e-6 * np.abs(expected).max())


def test_forces_of_a_completed_flow_are_the_slope(completed, tmp_path, forget):
    path = tmp_path / "double.bg"
    completed.make("reduced", path, completed=True)
    force = FlowForce(path, TEMPERATURE)
    for flow in force_module._flows.values():
        flow.density.double()
        flow.completion.double()
    x = completed.flow.to_positions(*completed.draw(3))[2].numpy()
    context = context_of(system_of(completed.system, force), x)
    forces = forces_of(context)
    expected = -slopes(context, x, np.eye(15).reshape(15, 5, 3), 1e-4).reshape(5, 3)
    np.testing.assert_allclose(forces, expected, atol=1e-6 * np.abs(expected).max())


def test_forces_of_the_dipeptide_are_the_slope():
    molecule = bg.load_alanine_dipeptide()
    x = molecule.positions
    force = FlowForce(files("openmm_bg.data") / "alanine_dipeptide.bg", TEMPERATURE)
    context = context_of(system_of(molecule.system, force), x)
    forces = forces_of(context)
    directions = np.random.default_rng(1).normal(size=(6, *x.shape))
    directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)
    expected = -slopes(context, x, directions, 1e-4)
    found = (forces * directions).sum((1, 2))
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.linalg.norm(forces))


# -------------------------------------------------------------------- as a citizen of OpenMM


def test_scale_and_force_group(small, frame):
    other = openmm.CustomExternalForce("7")
    other.addParticle(0)
    force = FlowForce(small.path, TEMPERATURE, parameter="lambda_flow")
    force.setForceGroup(3)
    context = context_of(system_of(small.system, force, other), frame)
    assert context.getParameters()["lambda_flow"] == 1.0
    whole, forces = energy_of(context, groups={3}), forces_of(context)
    assert energy_of(context, groups={0}) == pytest.approx(7.0)
    assert energy_of(context) == pytest.approx(whole + 7.0)
    for scale in (0.0, 0.5, -1.0):
        context.setParameter("lambda_flow", scale)
        assert energy_of(context, groups={3}) == pytest.approx(scale * whole)
        np.testing.assert_allclose(forces_of(context), scale * forces, rtol=1e-12)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform(small, frame, platform):
    system = system_of(small.system, FlowForce(small.path, TEMPERATURE))
    reference = context_of(system, frame)
    context = context_of(system, frame, platform)
    assert energy_of(context) == pytest.approx(energy_of(reference), abs=1e-2)
    expected = forces_of(reference)
    np.testing.assert_allclose(forces_of(context), expected, atol=1e-3 * np.abs(expected).max())
    context.getIntegrator().step(5)


def test_copies_and_xml(small, frame, forget):
    system = system_of(small.system, FlowForce(small.path, TEMPERATURE))
    expected = energy_of(context_of(system, frame))
    text = openmm.XmlSerializer.serialize(system)
    assert len(text) < 3000  # it holds a name for the flow, not the flow
    potential = potential_of(small.path)
    assert pickle.loads(pickle.dumps(potential)) == potential
    for twin in (copy.deepcopy(system), openmm.XmlSerializer.deserialize(text)):
        if hasattr(openmm.PythonForce, "setParticles"):  # OpenMM 8.5 forgets names
            assert twin.getForce(0).getName() == "FlowForce"
        assert energy_of(context_of(twin, frame)) == expected
    assert len(force_module._flows) == 1


def test_xml_in_another_process(small, frame, tmp_path):
    system = system_of(small.system, FlowForce(small.path, TEMPERATURE))
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(tmp_path / "x.npy", frame)
    code = (
        "import sys, numpy, openmm\n"
        "system = openmm.XmlSerializer.deserialize(open('system.xml').read())\n"
        "context = openmm.Context(system, openmm.VerletIntegrator(1), openmm.Platform.getPlatformByName('Reference'))\n"
        "context.setPositions(numpy.load('x.npy'))\n"
        "print(context.getState(energy=True).getPotentialEnergy()._value)\n"
    )
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    run = subprocess.run([sys.executable, "-c", path + code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(energy_of(context_of(system, frame)), abs=1e-6)


@pytest.mark.skipif(not hasattr(openmm.PythonForce, "setParticles"), reason="OpenMM < 8.6 has no setParticles")
def test_part_of_a_larger_system(small, frame):
    expected = energy_of(context_of(system_of(small.system, FlowForce(small.path, TEMPERATURE)), frame))
    system = openmm.System()
    for _ in range(8):
        system.addParticle(12.0)
    force = FlowForce(small.path, TEMPERATURE)
    force.setParticles([2, 3, 4, 5, 6])
    system.addForce(force)
    x = np.random.default_rng(0).normal(size=(8, 3))
    x[2:7] = frame
    context = context_of(system, x)
    assert energy_of(context) == pytest.approx(expected, abs=1e-6)
    forces = forces_of(context)
    assert np.abs(forces[2:7]).max() > 1 and not forces[[0, 1, 7]].any()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_md_inside_a_block_without_gradients(small, frame, guard):
    context = context_of(system_of(small.system, FlowForce(small.path, TEMPERATURE)), frame)
    expected = forces_of(context)
    with guard():
        context.setPositions(frame)
        np.testing.assert_array_equal(forces_of(context), expected)


# -------------------------------------------------------------------- where q = 0


def test_outside_the_sector_is_infinite_and_does_not_crash(small, frame):
    context = context_of(system_of(small.system, FlowForce(small.path, TEMPERATURE)), frame * [1, 1, -1])
    assert energy_of(context) == np.inf  # the mirror image
    assert np.isfinite(forces_of(context)).all()
    context.setParameter("flow_scale", -1.0)
    assert energy_of(context) == np.inf
    context.setParameter("flow_scale", 0.0)
    assert energy_of(context) == 0.0
    context.setParameter("flow_scale", 1.0)
    context.getIntegrator().step(20)
    assert np.isfinite(context.getState(positions=True).getPositions(asNumpy=True)._value).all()


def test_md_comes_back_from_behind_the_edge(small):
    coordinates = small.flow.coordinates
    modelled = [c for c in coordinates.coordinates if c.modelled]
    offset = next(i for i, c in enumerate(modelled) if c.kind == "offset")
    y = small.sample(1)
    y[:, offset] = coordinates.layout.shift[offset] - 0.5 * np.pi - 0.02
    integrator = openmm.LangevinMiddleIntegrator(10.0, 100.0, 0.001)
    integrator.setRandomNumberSeed(1)
    system = system_of(small.system, FlowForce(small.path, TEMPERATURE))
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(small.flow.to_positions(y)[0].numpy())
    assert energy_of(context) == np.inf
    integrator.step(150)
    assert np.isfinite(energy_of(context))


def test_rows_of_a_batch_do_not_touch_each_other(small):
    x = small.flow.to_positions(small.sample(4)).numpy()
    potential = potential_of(small.path)
    energies, forces = potential.energy_and_forces(x)
    bad = x.copy()
    bad[1, 0] = bad[1, 1]  # no bond length at all
    bad[2, 3, 0] = np.nan
    found, found_forces = potential.energy_and_forces(bad)
    np.testing.assert_allclose(found[[0, 3]], energies[[0, 3]], rtol=1e-6)
    np.testing.assert_allclose(found_forces[[0, 3]], forces[[0, 3]], atol=1e-3 * np.abs(forces).max())
    assert found[1] == np.inf and np.isfinite(found_forces[1]).all()
    assert np.isnan(found[2]) and np.isnan(found_forces[2]).all()
    assert np.isnan(potential.energy_and_forces(bad[2:3])[0]).all()


# -------------------------------------------------------------------- mistakes


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text.strip() and "Traceback" not in text


def test_reduced_flow_without_completion_is_refused(small, tmp_path):
    path = tmp_path / "reduced.bg"
    small.make("reduced", path)
    with pytest.raises(InputError, match="completion") as error:
        FlowForce(path, 300)
    assert one_sentence(error)


def test_bad_arguments(small, tmp_path):
    with pytest.raises(ArtifactError, match="no flow at") as error:
        FlowForce(tmp_path / "none.bg", 300)
    assert one_sentence(error)
    (tmp_path / "text.bg").write_text("no flow")
    with pytest.raises(ArtifactError, match="not a readable"):
        FlowForce(tmp_path / "text.bg", 300)
    with pytest.raises(InputError, match="positive"):
        FlowForce(small.path, -1)
    with pytest.raises(InputError, match="parameter"):
        FlowForce(small.path, 300, parameter="")
    with pytest.raises(InputError, match="path"):
        FlowForce(small.flow, 300)
    for no_path in (5, None):
        with pytest.raises(InputError, match="takes the path of a saved flow"):
            FlowForce(no_path, 300)
    with pytest.raises(InputError, match="backend 'Torch' of FlowForce: choose 'python' or 'torch'") as error:
        FlowForce(small.path, 300, backend="Torch")
    assert one_sentence(error)


@pytest.mark.parametrize("fate", ["changed", "vanished"])
def test_file_that_is_no_longer_there(small, frame, tmp_path, forget, fate):
    path = shutil.copy(small.path, tmp_path / "copy.bg")
    system = system_of(small.system, FlowForce(path, TEMPERATURE))
    expected = energy_of(context_of(system, frame))
    if fate == "changed":
        small.make("full", path, noise=0.1)
    else:
        path.unlink()
    assert energy_of(context_of(system, frame)) == expected  # this process has read it
    force_module._flows.clear()
    with pytest.raises(openmm.OpenMMException, match="has changed" if fate == "changed" else "no flow at") as error:
        energy_of(context_of(system, frame))
    assert one_sentence(error)


def test_changed_file_makes_another_force(small, frame, tmp_path):
    path = shutil.copy(small.path, tmp_path / "copy.bg")
    old = context_of(system_of(small.system, FlowForce(path, TEMPERATURE)), frame)
    before = energy_of(old)
    small.make("full", path, noise=0.1)
    new = context_of(system_of(small.system, FlowForce(path, TEMPERATURE)), frame)
    assert abs(energy_of(new) - before) > 1e-3 and energy_of(old) == before


def test_wrong_particles_and_free_lengths_are_told(small, frame):
    system = openmm.System()
    for _ in range(6):
        system.addParticle(1.0)
    system.addForce(FlowForce(small.path, TEMPERATURE))
    with pytest.raises(openmm.OpenMMException, match="5 atoms, FlowForce got 6 particles") as error:
        energy_of(context_of(system, np.zeros((6, 3))))
    assert one_sentence(error)
    assert ("OpenMM 8.6" in str(error.value)) == (not hasattr(openmm.PythonForce, "setParticles"))
    stretched = frame.copy()
    stretched[3] += 0.2 * (frame[3] - frame[2])
    with pytest.raises(openmm.OpenMMException, match="the constraints that the flow was trained with") as error:
        energy_of(context_of(system_of(small.system, FlowForce(small.path, TEMPERATURE)), stretched))
    assert one_sentence(error)


@pytest.mark.skipif(not hasattr(openmm.PythonForce, "setParticles"), reason="OpenMM < 8.6 has no setParticles")
def test_particles_in_another_order_are_told(small, frame):
    force = FlowForce(small.path, TEMPERATURE)
    force.setParticles([4, 1, 2, 3, 0])
    with pytest.raises(openmm.OpenMMException, match=r"setParticles\(\) the molecule's particles.* order") as error:
        energy_of(context_of(system_of(small.system, force), frame))
    assert one_sentence(error)


# -------------------------------------------------------------------- MD samples the flow

N_COPIES = 400


class Copies(FlowPotential):
    """The same potential for independent copies of the molecule in one System: errors need no correlation time."""

    omit = ""

    def log_density(self, positions):
        log_p, inside = super().log_density(positions)
        if self.omit == "volume":
            y, s = self.flow.coordinates.to_internal(positions)
            log_p = log_p + self.flow.coordinates.log_volume(y, s)
        if self.omit == "half of log g":
            y, s = self.flow.coordinates.to_internal(positions)
            log_p = log_p - 0.5 * (self.flow.joint_log_prob(y, s) - self.flow.log_prob(y))
        return log_p, inside

    def __call__(self, state):
        positions = state.getPositions(asNumpy=True)._value.reshape(N_COPIES, -1, 3)
        energies, forces = self.energy_and_forces(np.asarray(positions))
        return energies.sum(), forces.reshape(-1, 3)


class WithoutVolume(Copies):
    omit = "volume"


class HalfCompletion(Copies):
    omit = "half of log g"  # without all of it nothing would hold the molecule together


def observables(small, y, s):
    """log J + Φ, what its loss moves most, and the size and direction of the flow's latent variables; log g."""
    with torch.no_grad():
        log_g = small.flow.joint_log_prob(y, s) - small.flow.log_prob(y)
        z, _ = small.flow.inverse(y)
        linear = ~torch.tensor(small.flow.coordinates.layout.circular)
        volume = small.flow.coordinates.log_volume(y, s)
    columns = [volume, z[:, linear].square().sum(-1), z[:, ~linear].cos().sum(-1), z[:, linear].sum(-1)]
    if small.flow.completion is not None:
        columns.append(log_g)
    return torch.stack(columns, -1).numpy()


def worst_deviation(small, potential_type, bath, seed=5):
    """Largest |z| of MD averages against the flow's own; 1 fs, constraints on."""
    system = openmm.System()
    n = small.flow.coordinates.n_atoms
    for k in range(N_COPIES):
        for mass in small.constraints.masses:
            system.addParticle(mass)
        for (i, j), length in zip(small.constraints.bonds, small.constraints.lengths, strict=True):
            system.addConstraint(n * k + i, n * k + j, length)
    system.addForce(openmm.PythonForce(potential_of(small.path, potential_type), {"flow_scale": 1.0}))
    integrator = openmm.LangevinMiddleIntegrator(bath, 50.0, 0.001)
    integrator.setConstraintTolerance(1e-8)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    y, s = small.draw(2 * N_COPIES, seed=seed)
    context.setPositions(small.flow.to_positions(y[:N_COPIES], s[:N_COPIES]).numpy().reshape(-1, 3))
    context.setVelocitiesToTemperature(bath, seed)
    integrator.step(200)  # long enough for a wrong potential to show itself
    averages = []
    for _ in range(20):
        integrator.step(10)
        x = context.getState(positions=True).getPositions(asNumpy=True)._value.reshape(N_COPIES, n, 3)
        averages.append(observables(small, *small.flow.coordinates.to_internal(torch.from_numpy(np.asarray(x)))))
    found = np.mean(averages, axis=0)  # [copies, observables]: copies are independent
    exact = observables(small, *small.draw(200_000, seed=seed + 1))
    error = np.sqrt(found.var(0, ddof=1) / len(found) + exact.var(0) / len(exact))
    z = (found.mean(0) - exact.mean(0)) / error
    print(f"{potential_type.__name__}, bath {bath:g} K: z = {np.round(z, 2)}, n = {N_COPIES}")
    return np.abs(z).max()


@pytest.mark.statistical
def test_md_samples_the_flow(small):
    assert worst_deviation(small, Copies, TEMPERATURE) < 4.0


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("potential", "bath"), [(WithoutVolume, TEMPERATURE), (Copies, 1.15 * TEMPERATURE)], ids=["volume", "temperature"]
)
def test_md_of_a_broken_potential_does_not(small, potential, bath):
    assert worst_deviation(small, potential, bath) > 5.0


@pytest.mark.statistical
def test_md_samples_a_completed_flow(completed):
    assert worst_deviation(completed, Copies, TEMPERATURE) < 4.0


@pytest.mark.statistical
def test_md_with_half_of_log_g_does_not(completed):
    assert worst_deviation(completed, HalfCompletion, TEMPERATURE) > 5.0
