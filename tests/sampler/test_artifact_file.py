"""The artifact: what plain TorchScript offers, what is refused, and that nothing is left half-written."""

import json
import subprocess
import sys
import textwrap
from importlib.resources import files

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.artifact import topology_digest, topology_from_dict, topology_to_dict
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.weights import effective_sample_size

SHIPPED = files("openmm_bg.data") / "alanine_dipeptide.bg"


def test_plain_torchscript_is_enough_to_sample():
    code = textwrap.dedent(f"""
        import json, sys, torch
        extra = {{"metadata.json": ""}}
        flow = torch.jit.load({str(SHIPPED)!r}, _extra_files=extra)
        torch.manual_seed(0)
        y, log_q = flow.sample(7)
        z, backward = flow.inverse(y)
        again, forward = flow(z)
        assert y.shape == z.shape == (7, 48) and log_q.shape == backward.shape == forward.shape == (7,)
        assert torch.allclose(flow.log_prob(y), log_q, atol=1e-4)
        turned = torch.remainder(again - y + torch.pi, 2 * torch.pi) - torch.pi
        assert turned.abs().max() < 1e-5 and torch.allclose(forward, -backward, atol=1e-4)
        data = json.loads(extra["metadata.json"])
        assert {{"topology", "system", "coordinates", "temperature", "versions", "training"}} <= data.keys()
        assert data["coordinates"]["representation"] == "full"
        assert len(data["coordinates"]["constraints"]["bonds"]) == 12
        assert "openmm_bg" not in sys.modules and "openmm" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_save_and_load_give_the_same_flow(dipeptide, tmp_path):
    path = tmp_path / "copy.bg"
    dipeptide.flow.save(path)
    copy = bg.load(path, topology=dipeptide.topology)
    y, log_q = dipeptide.flow.sample(16)
    assert torch.equal(copy.log_prob(y), dipeptide.flow.log_prob(y))
    assert torch.allclose(copy.log_prob(y), log_q, atol=1e-4)
    positions = dipeptide.flow.to_positions(y)
    back, s = copy.to_internal(positions)
    turned = torch.remainder(back - y + torch.pi, 2 * torch.pi) - torch.pi
    assert turned.abs().max() < 1e-9 and s.shape == (16, 12)
    assert copy.temperature == dipeptide.flow.temperature
    assert [p.name for p in tmp_path.iterdir()] == ["copy.bg"]


def test_topology_survives_json(dipeptide):
    data = json.loads(json.dumps(topology_to_dict(dipeptide.topology)))
    assert topology_digest(topology_from_dict(data)) == topology_digest(dipeptide.topology)


def test_another_topology_is_refused(dipeptide):
    data = topology_to_dict(dipeptide.topology)
    swapped = dict(data, elements=["C", "H", *data["elements"][2:]], names=["CH3", "H1", *data["names"][2:]])
    with pytest.raises(ArtifactError, match=r"atom 0 is H .* C \(CH3\).*atom order"):
        bg.load(SHIPPED, topology=topology_from_dict(swapped))
    fewer = dict(data, bonds=data["bonds"][:-1])
    with pytest.raises(ArtifactError, match="other names or bonds"):
        bg.load(SHIPPED, topology=topology_from_dict(fewer))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept):
    data = SHIPPED.read_bytes()
    path = tmp_path / "short.bg"
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ArtifactError, match=r"short\.bg is not a readable TorchScript file"):
        bg.load(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "foreign.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ArtifactError, match="not one that openmm_bg wrote"):
        bg.load(path)
    with pytest.raises(ArtifactError, match="no flow at"):
        bg.load(tmp_path / "absent.bg")
    (tmp_path / "text.bg").write_text("hello")
    with pytest.raises(ArtifactError, match="not a readable TorchScript file"):
        bg.load(tmp_path / "text.bg")


def test_a_full_disk_leaves_the_old_file(dipeptide, tmp_path, monkeypatch):
    path = tmp_path / "flow.bg"
    path.write_bytes(b"precious")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("openmm_bg.artifact.os.fsync", full)
    with pytest.raises(ArtifactError, match=r"Cannot write .*flow\.bg: .*No space left"):
        dipeptide.flow.save(path)
    assert path.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["flow.bg"]
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="Cannot write"):
        dipeptide.flow.save(tmp_path / "absent" / "flow.bg")


def test_positions_are_checked(dipeptide):
    with pytest.raises(InputError, match=r"\[frames, 22, 3\]"):
        dipeptide.flow.to_internal(np.zeros((4, 21, 3)))
    bad = np.array(dipeptide.positions)
    bad[3, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        dipeptide.flow.to_internal(bad)


@pytest.mark.statistical
def test_shipped_file_is_small_and_its_figures_are_true(dipeptide, make_sampler):
    """The figures in the metadata are those of fresh samples, within four standard errors of both."""
    assert len(SHIPPED.read_bytes()) <= 5 * 1024**2
    figures = dipeptide.flow.metadata["figures"]
    ensemble = make_sampler(seed=77).sample(10_000)
    # ESS = (mean w)² / mean w²: its error from blocks of independent samples
    blocks = [effective_sample_size(part) for part in np.split(ensemble.log_weights, 20)]
    error = np.std(blocks, ddof=1) / np.sqrt(len(blocks))
    print(ensemble.ess, figures["ess"], error)
    assert abs(ensemble.ess - figures["ess"]) < 4.0 * error
    assert figures["khat"] < 0.5 and ensemble.khat < 0.7
    assert {"ess_inside", "ess_outside", "forward_ess", "acceptance", "date", "machine"} <= figures.keys()
