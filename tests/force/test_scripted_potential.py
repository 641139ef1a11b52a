"""The TorchScript module behind backend="torch" is `FlowPotential`, in every branch; it needs no openmm-torch."""

import hashlib
import io
from importlib.resources import files

import numpy as np
import pytest
import torch

from openmm_bg.artifact import Flow, load
from openmm_bg.coordinates import Constraints, CoordinateMap
from openmm_bg.energy import BOLTZMANN
from openmm_bg.flow import FlowConfig, build_flow
from openmm_bg.force import FlowPotential
from openmm_bg.force.script import scripted_potential

KT = BOLTZMANN * 310.0
ONE = torch.tensor(1.0)


def pair(path):
    """A flow from its file, its module and the function that a PythonForce calls."""
    flow = load(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return flow, scripted_potential(flow, KT), FlowPotential(str(path), digest, KT, "flow_scale")


def agree(module, potential, x):
    """Energies and forces at x [B, N, 3], one frame after the other: TorchScript recompiles at its second and third."""
    energies, forces = potential.energy_and_forces(x)
    for frame, energy, force in zip(x, energies, forces, strict=True):
        found, slope = module(torch.tensor(frame), ONE)
        assert found.dtype == slope.dtype == torch.float64 and not slope.requires_grad
        assert float(found) == pytest.approx(energy, rel=1e-5, nan_ok=True)
        np.testing.assert_allclose(slope.numpy(), force, atol=1e-5 * np.nan_to_num(np.abs(force)).max())
    return energies


def last_line(error):
    return str(error.value).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def of_small(small):
    return pair(small.path)


@pytest.fixture
def frame(small):
    """One frame of the flow [5, 3], nm."""
    return small.flow.to_positions(small.sample(1))[0].numpy()


# -------------------------------------------------------------------- the same numbers


def test_full_flow(small, of_small):
    flow, module, potential = of_small
    energies = agree(module, potential, flow.to_positions(small.sample(8)).numpy())
    assert np.isfinite(energies).all() and np.ptp(energies) > 1.0


def test_completed_flow(completed):
    flow, module, potential = pair(completed.path)
    assert flow.representation == "reduced"
    energies = agree(module, potential, flow.to_positions(*completed.draw(8)).numpy())
    assert np.isfinite(energies).all()


def test_dipeptide_with_its_methyl_groups_and_sectors():
    _, module, potential = pair(files("openmm_bg.data") / "alanine_dipeptide.bg")
    x = np.asarray(potential.flow.metadata["positions"], dtype=float)
    noise = np.random.default_rng(0).normal(size=(4, *x.shape))
    agree(module, potential, np.concatenate([x[None], x + 1e-3 * noise, (x * [1, 1, -1])[None], x[None]]))


def test_without_constraints(small, tmp_path):
    path = tmp_path / "free.bg"
    coordinates = CoordinateMap.fit(small.topology, small.frames, Constraints([], [], small.constraints.masses))
    config = FlowConfig(split=False, n_backbone_blocks=0, n_joint_blocks=2, hidden=8, n_hidden=0, linear="affine")
    Flow(build_flow(coordinates.layout, config, seed=1), coordinates, small.flow.metadata).save(path)
    _, module, potential = pair(path)
    assert module.lengths.numel() == 0
    stretched = small.frames[:6].copy()
    stretched[:, 4] += 0.1 * (stretched[:, 4] - stretched[:, 2])
    agree(module, potential, stretched)


def test_in_and_out_of_the_domain(small, of_small):
    """Outside, at coinciding atoms, with NaN, and inside again after each: no branch is frozen by a trace."""
    flow, module, potential = of_small
    x = flow.to_positions(small.sample(4)).numpy()
    bad = np.repeat(x[:1], 3, axis=0)
    bad[0] *= [1, 1, -1]
    bad[1, 0] = bad[1, 1]
    bad[2, 3, 0] = np.nan
    order = [0, 4, 1, 5, 2, 6, 3, 4, 0]
    energies = agree(module, potential, np.concatenate([x, bad])[order])
    assert energies[1] == energies[3] == energies[7] == np.inf and np.isnan(energies[5])
    assert np.isfinite(energies[[0, 2, 4, 6, 8]]).all()


def test_behind_the_edge_forces_lead_back(small, of_small):
    flow, module, potential = of_small
    modelled = [c for c in flow.coordinates.coordinates if c.modelled]
    offset = next(i for i, c in enumerate(modelled) if c.kind == "offset")
    y = small.sample(1)
    y[:, offset] = flow.coordinates.layout.shift[offset] - 0.5 * np.pi - 0.02
    x = flow.to_positions(y).numpy()
    assert agree(module, potential, x)[0] == np.inf
    assert float(module(torch.tensor(x[0]), ONE)[1].abs().max()) > 1.0


@pytest.mark.parametrize("scale", [0.5, -1.0, 0.0, 0.1])
def test_scale(of_small, frame, scale):
    _, module, _ = of_small
    x, factor = torch.tensor(frame), torch.tensor(scale)
    energy, forces = module(x, ONE)
    found, slope = module(x, factor)
    assert float(found) == pytest.approx(scale * float(energy), rel=1e-6)
    np.testing.assert_allclose(slope, scale * forces, rtol=1e-6)
    outside = module(x * torch.tensor([1.0, 1.0, -1.0]), factor)[0]
    assert float(outside) == (0.0 if scale == 0.0 else np.inf)


def test_single_precision_positions(of_small, frame):
    """What a GPU platform passes: the result is computed in double precision all the same."""
    _, module, potential = of_small
    x = torch.tensor(frame, dtype=torch.float32)
    energies, forces = potential.energy_and_forces(x.double().numpy()[None])
    found, slope = module(x, ONE)
    assert found.dtype == torch.float64 and slope.dtype == torch.float32
    assert float(found) == pytest.approx(energies[0], rel=1e-9)
    np.testing.assert_allclose(slope, forces[0], rtol=1e-5, atol=1e-5 * np.abs(forces).max())


# -------------------------------------------------------------------- a module of its own


def test_it_shares_nothing_with_the_flow(small, frame):
    flow, module, _ = pair(small.path)
    before = float(module(torch.tensor(frame), ONE)[0])
    with torch.no_grad():
        for parameter in flow.density.parameters():
            parameter += 1.0
    assert float(module(torch.tensor(frame), ONE)[0]) == before
    assert all(parameter.requires_grad for parameter in flow.density.parameters())


def test_saved_and_read(of_small, frame):
    _, module, _ = of_small
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    twin = torch.jit.load(buffer)
    expected = module(torch.tensor(frame), ONE)
    for found, value in zip(twin(torch.tensor(frame), ONE), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-4)


def test_the_trace_is_bound_to_no_device(small):
    """Tensors on "meta" meet no tensor of the CPU: on a GPU, none of the coordinates' constants stays behind."""
    _, module, _ = pair(small.path)
    internal = module.internal.to("meta")
    assert {str(t.device) for t in internal(torch.zeros(1, 5, 3, dtype=torch.float64, device="meta"))} == {"meta"}


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_mode_is_left_as_it_was(of_small, frame, enabled):
    _, module, _ = of_small
    expected = module(torch.tensor(frame), ONE)[1]
    with torch.set_grad_enabled(enabled):
        found = module(torch.tensor(frame), ONE)[1]
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(torch.jit.Error):
            module(torch.tensor(1.5 * frame), ONE)
        assert torch.is_grad_enabled() == enabled
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


# -------------------------------------------------------------------- mistakes


def test_mistakes_are_told_in_the_last_line(of_small, frame):
    _, module, _ = of_small
    with pytest.raises(torch.jit.Error) as error:
        module(torch.zeros(6, 3, dtype=torch.float64), ONE)
    assert "has 5 atoms, the System 6 particles" in last_line(error) and "setParticles" in last_line(error)
    stretched = frame.copy()
    stretched[3] += 0.2 * (frame[3] - frame[2])
    with pytest.raises(torch.jit.Error) as error:
        module(torch.tensor(stretched), ONE)
    assert "the constraints that the flow was trained with, and its particles in the flow's order" in last_line(error)
    with torch.inference_mode(), pytest.raises(torch.jit.Error) as error:
        module(torch.tensor(frame), ONE)
    assert "leave torch.inference_mode()" in last_line(error)
