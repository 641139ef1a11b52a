"""`evaluate` as a whole: the shipped dipeptide against its own ensemble, a `reduced` flow, files, and wrong input."""

import copy
import json
import math
import re
import sys

import mdtraj
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import openmm_bg as bg
from openmm_bg.analysis.density_figures import draw, frame_energies, held_out_nll, partial_move_acceptance
from openmm_bg.analysis.evaluate import _reduction, evaluate
from openmm_bg.analysis.evaluation import Evaluation
from openmm_bg.analysis.evaluation_input import check_frames, read_frames, read_held_out
from openmm_bg.analysis.files import evaluate_files
from openmm_bg.analysis.report_text import table_one, weights_table
from openmm_bg.cli import main
from openmm_bg.errors import ArtifactError, InputError
from openmm_bg.rules.metropolis import log_acceptance

import openmm  # isort: skip
from openmm import unit  # isort: skip

ONE = {"platform": "Reference", "n_workers": 1, "progress": False}
CONFIG = {
    "batch_size": 128,
    "flow": {"n_backbone_blocks": 0, "n_joint_blocks": 2, "hidden": 16},
    "stages": [{"name": "likelihood", "losses": {"nll": 1.0}, "steps": 60, "learning_rate": 5e-3}],
}


def sampler_at(dipeptide, temperature):
    reference = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), reference)
    context.setPositions(dipeptide.positions)
    return bg.BoltzmannGeneratorSampler(dipeptide.flow, context, temperature, seed=5, platform="Reference", n_workers=1)


@pytest.fixture(scope="module")
def reduced(dipeptide, frames):
    return bg.train(dipeptide.system, dipeptide.topology, frames, 300.0, representation="reduced", config=CONFIG, **ONE)


# ------------------------------------------------------------------ densities


def test_nll_of_the_flows_own_samples_is_what_the_sampler_says(dipeptide, ensemble):
    found = held_out_nll(dipeptide.flow, ensemble.positions[:700])
    nll = -ensemble.log_q[:700]
    assert found["total"] == pytest.approx(nll.mean(), abs=1e-4) and found["frames"] == 700 and found["outside"] == 0
    assert found["dof"] == dipeptide.flow.coordinates.n_modelled
    assert found["per_dof"] == pytest.approx(found["total"] / found["dof"])
    assert found["total_error"] == pytest.approx(nll.std() / math.sqrt(700), rel=0.3)
    twice = held_out_nll(dipeptide.flow, np.repeat(ensemble.positions[:350], 2, 0))
    assert twice["total_error"] > 1.2 * found["total_error"]  # correlated frames count for fewer
    some = ensemble.positions[:10].copy()
    some[:4] *= -1.0  # mirror images are not of the flow's sector
    assert held_out_nll(dipeptide.flow, some)["outside"] == 4
    with pytest.raises(InputError, match="sectors"):
        held_out_nll(dipeptide.flow, some[:4])


@pytest.mark.statistical
def test_acceptance_of_partial_moves(dipeptide):
    """Against min(1, w'/w) of pairs of independent samples, the first of each taken by its weight.

    At another temperature than the flow's, for at its own the flow is too good to tell a right ratio from a wrong one.
    """
    sampler = sampler_at(dipeptide, 340.0)
    ensemble = sampler.sample(4000)
    frames = ensemble.resample(60, seed=1)
    w = np.exp(ensemble.log_weights - ensemble.log_weights.max())
    pairs = np.exp(log_acceptance(ensemble.log_weights[:2000, None], ensemble.log_weights[None, 2000:]))
    expected = (w[:2000, None] * pairs).sum() / (w[:2000].sum() * pairs.shape[1])
    found = partial_move_acceptance(sampler, frames, 64, seed=2)
    assert found["frames"] == 60 and found["proposals"] == 64 and found["outside"] == 0
    assert abs(found["acceptance"] - expected) < 5 * found["acceptance_error"]
    assert found["acceptance_error"] < 0.05 and found["expected"] == pytest.approx(1 / found["acceptance"])
    # The ratio upside down, for one: the sample is large enough to tell.
    upside_down = np.exp(log_acceptance(-ensemble.log_weights[:2000, None], -ensemble.log_weights[None, 2000:]))
    wrong = (w[:2000, None] * upside_down).sum() / (w[:2000].sum() * pairs.shape[1])
    assert abs(found["acceptance"] - wrong) > 5 * found["acceptance_error"]
    mirrored = partial_move_acceptance(sampler, -frames[:3], 8)
    assert mirrored["acceptance"] == 0.0 and mirrored["outside"] == 3 and mirrored["expected"] == np.inf
    sampler.close()


def test_energies_are_the_systems_in_kcal(frames, dipeptide):
    with sampler_at(dipeptide, 300.0) as sampler:
        context = sampler.context
        context.setPositions(frames[17])
        energy = context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilocalorie_per_mole)
        assert frame_energies(sampler, frames[:40])[17] == pytest.approx(energy, abs=1e-4)
        context.setPositions(dipeptide.positions)
        told = []
        found = draw(sampler, 1300, advance=told.append)
        assert told == [1000, 300] and found.label == "exact" and found.log_weights.shape == (1300,)
        np.testing.assert_allclose(frame_energies(sampler, found.positions), found.energies, atol=0.05)


# ------------------------------------------------------------------ the whole


def test_a_good_flow_looks_like_its_ensemble(evaluated):
    found = evaluated.figures
    assert 0.95 < found["delta_d"]["ratio"] < 1.05 and found["delta_d"]["batches"] == 2
    energies = found["energies"]
    assert set(energies) == {"generated", "data"}
    gap = energies["generated"]["below_median_mean"] - energies["data"]["below_median_mean"]
    assert abs(gap) < energies["data"]["below_median_sd"]
    (weights,) = found["weights"]
    assert weights["formula"] == "A" and weights["label"] == "exact" and 0.7 < weights["ess"] < 1.0
    assert found["nll"]["total_mean"] == found["nll"]["flows"][0]["total"] and math.isnan(found["nll"]["total_sd"])
    assert 0.6 < found["moves"]["acceptance"] < 1.0
    assert found["reduction"] is None and "costs" not in str(evaluated)
    (row,) = found["ramachandran"]
    assert row["generated"] < 1.5 * row["data"]
    for row in found["rmsf"]:
        assert abs(row["generated"] - row["data"]) < 0.2 * row["data"]
    assert found["chi"] is None and found["chirality"]["generated"] == 0.0
    assert any("side chain torsion χ" in note for note in evaluated.notes)
    novelty = found["novelty"]
    assert novelty["reference"] == "training" and novelty["known"] == 600
    assert (np.sort(novelty["data"])[:90] < 0.01).all()  # every second held-out frame is a training frame here
    assert np.median(novelty["generated"]) > 0.05
    assert len(novelty["minimised"]) == 5 and all(row["rmsd"] < 1.5 for row in novelty["minimised"])
    assert [row["nearest"] for row in novelty["minimised"]] == sorted(novelty["generated"], reverse=True)[:5]


def test_a_broken_set_of_frames_shows(dipeptide, frames):
    """Data of another φ: what the flow gets right against its ensemble, it must get wrong against this."""
    phi = dipeptide.flow.coordinates
    y, s = phi.to_internal(torch.as_tensor(frames[:200]))
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    narrow = y.mean(0) + 1e-3 * noise
    other = phi.to_positions(narrow, s).numpy()
    found = evaluate(dipeptide.flow, other, n_samples=100, batch=100, **ONE).figures
    assert found["delta_d"]["ratio"] > 2.0 and found["ramachandran"][0]["generated"] > 0.3
    assert found["rmsf"][0]["generated"] > 2 * found["rmsf"][0]["data"]


def test_text_and_json(evaluated, tmp_path):
    text = str(evaluated)
    for part in (
        "ΔD (N, CA, C), Å",
        "below the median",
        "median",
        "NLL",
        "formula A (exact)",
        "(D)",
        "RMSF",
        "cis amide",
    ):
        assert part in text
    evaluated.save(tmp_path / "figures.json")
    back = json.loads((tmp_path / "figures.json").read_text())
    assert back["nll"]["total_sd"] is None and back["about"]["held_out_frames"] == 1200
    assert back["delta_d"]["generated"] == evaluated.figures["delta_d"]["generated"]
    assert np.array(back["embedding"]["generated"]).shape == (1000, 2)
    with pytest.raises(InputError, match="Cannot write"):
        evaluated.save(tmp_path / "nowhere" / "figures.json")


def test_the_seed_decides(dipeptide, frames):
    first, again, other = (
        evaluate(dipeptide.flow, frames[:60], n_samples=30, seed=seed, **ONE).to_json() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_figures_of_a_bad_flow_are_readable(evaluated):
    """Energies of clashes have twenty digits, and acceptances of 1e-163 are zero."""
    figures = copy.deepcopy(evaluated.figures)
    figures["energies"]["generated"] |= {"below_median_mean": 1.4376e9, "below_median_sd": 2.5e9, "median": 1.2e20}
    figures["moves"] |= {"acceptance": 1.6e-163, "acceptance_error": 0.0, "expected": 6e162}
    text = str(Evaluation(figures))
    assert "1.44e+09 ± 2.50e+09 (SD); median 1.20e+20" in text
    assert re.search(r"acceptance of partial moves \(D\) +0; ", text)
    (row,) = [row for row in weights_table(figures) if "moves" in row[0]]
    assert row[1].startswith("0") and row[2].startswith("no proposal had a chance")
    (row,) = [row for row in weights_table(evaluated.figures) if "moves" in row[0]]
    assert row[2].startswith("one in 1.")


def test_one_batch_is_no_batches(evaluated):
    figures = copy.deepcopy(evaluated.figures)
    for n, words in ((1, "; 1 batch of 500\n"), (2, "; 2 batches of 500\n")):
        figures["delta_d"]["batches"] = n
        assert words in str(Evaluation(figures))


def test_one_sample_is_enough(dipeptide, frames):
    found = evaluate(dipeptide.flow, frames[:20], n_samples=1, **ONE)
    assert found.figures["delta_d"]["batch"] == 1 and str(found)
    assert any("batches of 1 frames" in note for note in found.notes)


def test_reduced_flows_have_rigid_and_completed_weights(reduced, frames):
    found = evaluate(reduced, frames, n_samples=300, **ONE)
    assert [(w["formula"], w["label"]) for w in found.figures["weights"]] == [("B", "rigid"), ("C", "exact")]
    energies = found.figures["energies"]
    assert set(energies) == {"generated, rigid", "generated, completed", "data"}
    assert energies["generated, completed"]["median"] > energies["generated, rigid"]["median"]
    assert 0 < found.figures["moves"]["acceptance"] < 1 and any("kT/2" in note for note in found.notes)
    cost = found.figures["reduction"]
    assert cost["frames"] == 500 and 0.0 < cost["backbone"] <= cost["heavy"] < cost["heavy_largest"] < 1.0
    assert f"heavy atoms {cost['heavy']:.2f}" in str(found) and f"backbone {cost['backbone']:.2f}" in str(found)
    assert any("reduced costs" in row[0] and row[1] == f"{cost['heavy']:.2f}" for row in table_one(found.figures))
    # By hand: s of one frame at its reference, superposed by MDTraj.
    x = torch.tensor(frames[:1], dtype=torch.float64)
    y, _ = reduced.coordinates.to_internal(x)
    frozen = reduced.coordinates.to_positions(y, reduced.coordinates.reference_fixed).numpy()
    topology = mdtraj.Topology.from_openmm(reduced.topology)
    heavy = topology.select("element != H")
    pair = [mdtraj.Trajectory(each, topology) for each in (frozen, frames[:1])]
    by_hand = 10 * mdtraj.rmsd(*pair, atom_indices=heavy)[0]
    assert _reduction(reduced, frames[:1])["heavy"] == pytest.approx(by_hand, abs=1e-3)
    bare = bg.Flow(reduced.density, reduced.coordinates, reduced.metadata)
    found = evaluate(bare, frames[:100], n_samples=50, **ONE)
    assert [w["formula"] for w in found.figures["weights"]] == ["B"]
    assert any("no completion" in note for note in found.notes)


def test_several_seeds(dipeptide, reduced, frames):
    config = {**CONFIG, "seed": 7, "stages": [{**CONFIG["stages"][0], "steps": 20}]}
    given = (dipeptide.system, dipeptide.topology, frames[:300], 300.0)
    other = bg.train(*given, representation="reduced", config=config, **ONE)
    found = evaluate([reduced, other], frames[:50], n_samples=20, **ONE).figures["nll"]
    for key in ("total", "per_dof"):
        first, second = (held_out_nll(flow, frames[:50])[key] for flow in (reduced, other))
        assert [row[key] for row in found["flows"]] == pytest.approx([first, second], rel=1e-5)
        assert abs(first - second) > 0.05 * abs(first)
        assert found[f"{key}_mean"] == pytest.approx((first + second) / 2, rel=1e-5)
        assert found[f"{key}_sd"] == pytest.approx(abs(first - second) / math.sqrt(2), rel=1e-3)  # of a sample of two
    with pytest.raises(InputError, match="different coordinates"):
        evaluate([dipeptide.flow, reduced], frames[:50], **ONE)


def test_a_molecule_without_amino_acids(chain):
    flow, frames = chain
    found = evaluate(flow, frames, n_samples=100, **ONE)
    for key in ("ramachandran", "chi", "chirality", "cis_amides"):
        assert found.figures[key] is None
    assert found.figures["delta_d"]["atoms"] == "longest chain of heavy atoms"
    assert any("no amino acids" in note for note in found.notes) and "φ, ψ" not in str(found)


# ------------------------------------------------------------------ files


def save(path, frames, topology):
    mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(topology)).save(str(path))


def test_the_command(shipped, folder, tmp_path, frames, dipeptide):
    output = tmp_path / "figures.json"
    options = ["-n", "40", "--platform", "Reference", "--workers", "1", "--embedding", "pca"]
    arguments = ["evaluate", str(shipped), str(folder), "-o", str(output), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "ΔD" in result.output and str(output) in result.output
    found = json.loads(output.read_text())
    assert found["about"]["held_out_frames"] == 40 and found["about"]["training_frames"] == 50
    assert found["about"]["data"] == str(folder / "test.dcd") and found["novelty"]["reference"] == "training"
    assert found["embedding"]["method"] == "pca"


def test_default_output_lies_next_to_the_flow(shipped, tmp_path, frames, dipeptide):
    flow, data = tmp_path / "flow.bg", tmp_path / "held.dcd"
    flow.write_bytes(shipped.read_bytes())
    save(data, frames[:30], dipeptide.topology)
    result, path = evaluate_files([flow], data, n_samples=20, **ONE)
    assert path == tmp_path / "flow.evaluation.json" and path.is_file()
    assert result.figures["novelty"]["reference"] == "held-out"
    assert result.figures["about"]["training"] is None


def test_frames_are_thinned_evenly(tmp_path, dipeptide, frames):
    path = tmp_path / "many.dcd"
    many = np.concatenate([frames, frames[:50]])
    save(path, many, dipeptide.topology)
    found, stride = read_frames(path, dipeptide.topology, limit=100)
    assert stride == 8 and 100 <= len(found) <= 200
    np.testing.assert_allclose(found, many[::8], atol=1e-5)
    assert len(read_frames(path, dipeptide.topology)[0]) == 1250
    found, _ = read_frames(path, dipeptide.topology, available=700)
    np.testing.assert_allclose(found, many[:700], atol=1e-5)
    assert any("Every 8th frame" in note for note in read_held_out(path, dipeptide.topology, limit=100).notes)
    assert any("Every 2nd frame of" in note for note in read_held_out(path, dipeptide.topology, limit=400).notes)


def test_training_frames_are_all_used_or_a_note_says_so(folder, tmp_path, dipeptide, frames):
    """The nearest training frame is the nearest of all: 400 frames against tens of thousands cost seconds."""
    path = tmp_path / "many.dcd"
    save(path, np.concatenate([frames] * 17), dipeptide.topology)  # 20,400
    found = read_held_out(folder / "test.dcd", dipeptide.topology, path)
    assert len(found.training) == 20_400 and found.notes == ()
    found = read_held_out(folder / "test.dcd", dipeptide.topology, path, training_limit=6000)
    assert len(found.training) == 10_200
    assert [note.split(" was used")[0] for note in found.notes] == [f"Every 2nd training frame of {path}"]
    found = read_held_out(folder, dipeptide.topology, limit=20)  # of a folder: 50 frames, beside 40 held out
    assert len(found.training) == 50 and len(found.positions) == 40 and found.notes == ()
    found = read_held_out(folder, dipeptide.topology, training_limit=10)
    np.testing.assert_allclose(found.training, frames[:50:3], atol=1e-5)  # Å in float32, and back
    assert [note.split(" was used")[0] for note in found.notes] == [f"Every 3rd training frame of {folder}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{flow}", "nowhere.dcd"], "no trajectory at nowhere.dcd"),
        (["nowhere.bg", "{data}"], "no flow at nowhere.bg"),
        (["{flow}", "{flow}"], "MDTraj cannot read"),
        (["{flow}", "{other}"], "atoms"),
        (["{flow}", "{shuffled}"], "another molecule or atom order"),
        (["{flow}", "{named}"], "another atom order"),
        (["{flow}", "{few}"], "19 held-out frames are too few"),
        (["{flow}", "{folder}"], "is no folder of openmm-bg simulate"),
        (["{flow}", "{data}", "-n", "0"], "number of samples must be a whole number of at least 1"),
        (["{flow}", "{data}", "--seed", "-1"], "seed must be"),
        (["{flow}", "{data}", "-o", "{folder}"], "is a folder"),
        (["{flow}", "{data}", "-o", "nowhere/figures.json"], "no folder nowhere"),
        (["{flow}", "{data}", "--training", "nowhere.dcd"], "no trajectory at nowhere.dcd"),
        (["{flow}", "{data}", "--embedding", "umap"], "not installed"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, message, shipped, tmp_path, frames, dipeptide, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    names = {"flow": shipped, "folder": tmp_path / "empty"}
    names["folder"].mkdir()
    for name in ("data", "few", "shuffled", "other"):
        names[name] = tmp_path / f"{name}.dcd"
    names["named"] = tmp_path / "named.pdb"
    save(names["data"], frames[:30], dipeptide.topology)
    save(names["few"], frames[:19], dipeptide.topology)
    save(names["shuffled"], frames[:30, ::-1], dipeptide.topology)
    ours = mdtraj.Topology.from_openmm(dipeptide.topology)
    mdtraj.Trajectory(frames[:30, :10], ours.subset(range(10))).save(str(names["other"]))
    order = np.arange(22)
    order[[0, 1]] = order[[1, 0]]
    mdtraj.Trajectory(frames[:2, :9], ours.subset([4, 5, 6, 7, 8, 9, 10, 11, 12])).save(str(names["named"]))
    words = [word.format(**names) for word in arguments]
    result = CliRunner().invoke(main, ["evaluate", *words, "--platform", "Reference", "--workers", "1"])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert message in result.output.replace("\n", " ")
    assert isinstance(result.exception, SystemExit)
    assert not list(tmp_path.glob("*.json"))


def test_wrong_frames_and_flows(dipeptide, frames, tmp_path):
    bad = frames[:30].copy()
    bad[3, 2, 1] = np.nan
    with pytest.raises(InputError, match=r"Frame 3 .* non-finite"):
        evaluate(dipeptide.flow, bad, **ONE)
    with pytest.raises(InputError, match="wrong units"):
        check_frames(10 * frames[:5], dipeptide.topology, "the trajectory")
    later = frames[:600].copy()
    later[570:, 10:] += 3.0  # half of the molecule in the next periodic image, and not before frame 570
    with pytest.raises(InputError, match=r"frame 570 of the trajectory .* periodic box"):
        check_frames(later, dipeptide.topology, "the trajectory")
    with pytest.raises(InputError, match="22, 3"):
        evaluate(dipeptide.flow, frames[:, :4], **ONE)
    with pytest.raises(InputError, match="training trajectory"):
        evaluate(dipeptide.flow, frames[:30], frames[:, :4], **ONE)
    with pytest.raises(InputError, match="at least one"):
        evaluate([], frames, **ONE)
    with pytest.raises(InputError, match="at least one flow"):
        evaluate_files([], tmp_path / "x.dcd")
    with pytest.raises(InputError, match="Unknown embedding"):
        evaluate(dipeptide.flow, frames[:30], embedding="tsne", **ONE)
    with pytest.raises(InputError, match="batch"):
        evaluate(dipeptide.flow, frames[:30], batch=0, **ONE)
    with pytest.raises(ArtifactError):
        evaluate_files([tmp_path / "x.bg"], tmp_path / "x.dcd")
