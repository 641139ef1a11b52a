"""What the demo trains on: frames that a badly guessed well skewed are weighed back to balance."""

import numpy as np
import pytest

import openmm_bg as bg
from openmm_bg import demo
from openmm_bg.errors import InputError
from openmm_bg.simulate import TemperedTrajectory, torsion_angle

import openmm  # isort: skip


@pytest.fixture(scope="module")
def frames():
    """Trans frames of either basin, 30 inside φ > 0 and 300 outside."""
    molecule = bg.load_alanine_dipeptide()
    context = openmm.Context(
        molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(molecule.positions)
    with bg.BoltzmannGeneratorSampler(molecule.flow, context, 300.0, seed=0) as sampler:
        x = sampler.sample(4000).positions
    x = x[demo.is_trans(x)]
    inside = demo.phi_basin(torsion_angle(x, demo.PHI))
    return np.concatenate([x[inside][:30], x[~inside][:300]])


def data_of(monkeypatch, frames):
    def run(system, topology, positions, ladder, *, seconds, bias, seed, progress):
        log_weights = bias.energy(torsion_angle(frames, demo.PHI)) / demo.thermal_energy(demo.TEMPERATURE)
        return TemperedTrajectory(frames, log_weights, np.zeros(len(frames), dtype=int), 1000, seconds)

    monkeypatch.setattr(demo, "tempered_md", run)
    return demo.make_data(demo.DemoSettings(), progress=False)


def test_skewed_frames_are_balanced_by_weights(monkeypatch, frames):
    data = data_of(monkeypatch, frames)
    inside = demo.phi_basin(torsion_angle(frames, demo.PHI))
    weight = np.exp(data.log_weights(data.well))
    assert weight[inside].sum() / weight.sum() == pytest.approx(0.5, abs=1e-6)
    assert inside.mean() < 0.15  # without weights they are not
    # The weights are those of the System that is trained for.
    energies = []
    for system in (data.biased, data.system):
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        found = []
        for x in frames[25:35]:
            context.setPositions(x)
            found.append(context.getState(energy=True).getPotentialEnergy()._value)
        energies.append(np.array(found) / demo.thermal_energy(demo.TEMPERATURE))
    shift = data.log_weights(data.well)[25:35] + energies[0] - energies[1] - data.trajectory.log_weights[25:35]
    np.testing.assert_allclose(shift, 0.0, atol=1e-5)


def test_one_basin_alone_is_refused(monkeypatch, frames):
    with pytest.raises(InputError, match="one of the two basins"):
        data_of(monkeypatch, frames[:30])
