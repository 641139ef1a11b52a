"""All stages of the method through `bg.train`, on real forces, in both representations."""

import math

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

import openmm_bg as bg

import openmm  # isort: skip

STAGES = [
    {"name": "nll", "losses": {"nll": 1.0}},
    {"name": "nll+w2", "losses": {"nll": 1.0, "w2": 1.0}},
    {"name": "nll+w2+kl", "losses": {"nll": 1.0, "w2": 0.2, "kl": 0.05}},
    {"name": "nll+kl", "losses": {"nll": 1.0, "kl": 0.2}},
    {"name": "buffer", "losses": {"buffer": 1.0}},
    {"name": "path", "losses": {"buffer": 0.5, "path": 0.5}, "path_samples": "buffer"},
]


def config(conditioner, steps=20):
    return {
        "batch_size": 64,
        "sample_batch": 32,
        "w2_data_batch": 128,
        "validate_every": 10,
        "ema_decay": 0.9,
        "buffer": {"draw_size": 128},
        "flow": {
            "n_backbone_blocks": 2,
            "n_joint_blocks": 2,
            "conditioner": conditioner,
            "hidden": 32,
            "d_model": 16,
            "d_key": 8,
            "d_value": 8,
        },
        "stages": [s | {"steps": steps, "learning_rate": 3e-3, "warmup_steps": 4} for s in STAGES],
    }


@pytest.fixture(scope="module")
def frames():
    """Frames of the shipped flow, resampled by their weights: as good as MD, and made in a second."""
    molecule = bg.load_alanine_dipeptide()
    context = openmm.Context(
        molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(molecule.positions)
    with bg.BoltzmannGeneratorSampler(molecule.flow, context, 300.0, seed=0, platform="Reference") as sampler:
        return molecule, sampler.sample(4000).resample(3000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("representation, conditioner", [("full", "mlp"), ("reduced", "attention")])
def test_every_stage_runs_on_real_forces(frames, tmp_path, representation, conditioner):
    molecule, positions = frames
    flow = bg.train(
        molecule.system,
        molecule.topology,
        positions,
        300.0,
        representation=representation,
        config=config(conditioner),
        directory=tmp_path,
        platform="Reference",
        n_workers=1,
        progress=False,
    )
    from openmm_bg.training.history import read_losses

    rows = read_losses(tmp_path / "losses.csv")
    assert [r["stage"] for r in rows] == [s["name"] for s in STAGES for _ in range(20)]
    for row in rows:
        losses = next(s["losses"] for s in STAGES if s["name"] == row["stage"])
        for name in ("nll", "w2", "kl", "buffer", "path"):
            assert (row[name] is not None) == (name in losses), (row["stage"], name)
            assert row[name] is None or math.isfinite(row[name])
    first, last = (np.mean([r["nll"] for r in part]) for part in (rows[:5], rows[15:20]))
    assert last < first - 0.3  # nats; a batch mean of 64 scatters by less
    loaded = bg.load(tmp_path / "flow.bg", topology=molecule.topology)
    context = openmm.Context(
        molecule.system,
        openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.002),
        openmm.Platform.getPlatformByName("Reference"),
    )
    context.setPositions(molecule.positions)
    with bg.BoltzmannGeneratorSampler(loaded, context, seed=0, platform="Reference", n_workers=1) as sampler:
        assert sampler.sample(50).label == "exact"  # formula A, or C with the completion
        ensemble = sampler.sample(50, completion=False)
        assert ensemble.label == ("exact" if representation == "full" else "rigid")
        report = sampler.step(5)
    assert report["inside"] and report["n_proposed"] == 5
    if representation == "reduced":
        record = flow.metadata["training"]
        assert record["completed_ess"] > 0 and record["completion"]["steps"] >= 500
        # s stands still: bond lengths, other angles and offsets of every sample are the reference's
        y, s = flow.to_internal(ensemble.positions)
        assert y.shape[1] < 20
        np.testing.assert_allclose(s.numpy(), np.tile(flow.coordinates.reference_fixed.numpy(), (50, 1)), atol=1e-8)
