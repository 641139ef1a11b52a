"""Sampling, training and commands with energies from the torch twin."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import openmm_bg as bg
from openmm_bg.cli import main
from openmm_bg.energy import ContextPool, choices
from openmm_bg.errors import EnergyError
from openmm_bg.training import run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path)


def test_same_moves_and_weights_as_with_contexts(dipeptide, make_context):
    found = {}
    for platform in ("twin", "Reference"):
        context = make_context()
        with bg.BoltzmannGeneratorSampler(dipeptide.flow, context, seed=3, platform=platform, n_workers=1) as sampler:
            assert sampler.pool.platform == platform
            report = sampler.step(20)
            ensemble = sampler.sample(40)
            x = context.getState(positions=True).getPositions(asNumpy=True)._value
            found[platform] = (x, ensemble.log_weights, report["n_accepted"], sampler.statistics)
    for ours, theirs in zip(found["twin"], found["Reference"], strict=True):
        if isinstance(ours, np.ndarray):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        else:
            assert ours == theirs
    assert found["twin"][2] > 0


@pytest.mark.parametrize("options", [("--platform", "twin", "--workers", "1"), ("--tune", "full")])
def test_a_command_takes_the_twin(tmp_path, dipeptide, options):
    dipeptide.flow.save(tmp_path / "flow.bg")
    command = ["sample", str(tmp_path / "flow.bg"), "-n", "20", "-o", str(tmp_path / "out.dcd"), *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and "n=20" in result.output


def test_processes_of_a_training_never_mix_twin_and_contexts(make_context, monkeypatch):
    context = make_context()
    ranks = SimpleNamespace(size=2, from_main=lambda _: ("twin", 1))
    with run._common_pool(context, "Reference", 1, "quick", ranks) as pool:
        assert pool.platform == "twin"
    made = []

    def contexts_only(context, *, platform=None, n_workers=None, tune="quick"):
        made.append(platform)
        return ContextPool(context, platform="Reference", n_workers=1)

    monkeypatch.setattr(run, "ContextPool", contexts_only)
    with (
        pytest.raises(EnergyError, match="another process cannot use"),
        run._common_pool(context, None, None, "full", ranks),
    ):
        pass
    assert made == [None, "twin"]
    assert [p.getName() for p in run._platform("twin")] == ["Reference"]
