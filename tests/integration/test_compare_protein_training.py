"""examples/compare_protein_training.py on a dipeptide: all six configurations, interrupted, repeated, refused."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from openmm_bg.training.checkpoint import INDEX

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "compare_protein_training.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
MD = ["--hmr", "--replicas", "2", "--length", "0.016", "--interval", "0.08", "--heating", "0.5"]
MD += ["--equilibration", "0.5", "--platform", "Reference", "--solvent", "none"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=1200)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_protein_training", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def md(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `openmm-bg simulate`: 2 x 200 frames of alanine dipeptide in vacuum, and 200 of test.dcd."""
    import torch  # noqa: F401  (before openmm)
    from openmm import app
    from openmmtools.testsystems import AlanineDipeptideVacuum

    from openmm_bg.cli import main

    folder = tmp_path_factory.mktemp("md")
    test = AlanineDipeptideVacuum()
    with open(folder / "ala.pdb", "w") as file:
        app.PDBFile.writeFile(test.topology, test.positions, file)
    result = CliRunner().invoke(main, ["simulate", str(folder / "ala.pdb"), "-o", str(folder / "md"), *MD])
    assert result.exit_code == 0, result.output
    return folder / "md"


@pytest.fixture(scope="module")
def finished(md: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished") / "comparison"
    result = run(str(md), "-o", str(folder), "--budget", "smoke", "--quiet")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return folder, table_in(result)


def table_in(result: subprocess.CompletedProcess[str]) -> str:
    """What was printed, without MDTraj's remarks on DCD files."""
    return result.stdout[result.stdout.index("22 atoms, ") :]


def test_all_configurations_with_one_budget(finished: tuple[Path, str], script: ModuleType) -> None:
    folder, output = finished
    found = {name: json.loads((folder / name / "result.json").read_text()) for name in script.NAMES}
    parameters = [result["parameters"] for result in found.values()]
    assert max(parameters) <= 1.1 * min(parameters)
    for name, result in found.items():
        assert result["seconds"] == pytest.approx(sum(stage["seconds"] for stage in result["stages"]))
        # a stage ends with the step that passes its limit
        budget = script.SMOKE_SECONDS * (script.BEGINNING.share + sum(part.share for part in script.STAGES[name]))
        assert budget <= result["seconds"] < budget + 20
        assert all(stage["steps"] >= 1 for stage in result["stages"])
        assert result["steps"] == sum(stage["steps"] for stage in result["stages"])
        losses = {loss for stage in result["stages"] for loss in stage["weights"]}
        assert losses == {"nll", *(loss for loss in ("w2", "kl") if loss in name or name == "split-all")}
        for stage in result["stages"]:
            assert (stage["energies"] > 0) == ("kl" in stage["weights"])
            assert np.isfinite([stage[loss] for loss in stage["weights"]]).all()
        assert (folder / name / "flow.bg").is_file()
        figures = result["figures"]
        assert np.isfinite([figures["delta_d"]["generated"], figures["nll"]["total"], figures["weights"]["ess"]]).all()
        last = result["last_figures"]
        assert (last is not None) == (result["stages"][-1]["weights"] == {"nll": 1.0}), (
            "likelihood alone keeps its best"
        )
        if last is not None:
            assert f"| {script.NAMES[name]}, last step |" in output
            assert np.isfinite([last["delta_d"]["generated"], last["nll"]["total"]]).all()
    starts = {json.dumps(found[name]["stages"][0]) for name in found if name.startswith("split")}
    assert len(starts) == 1, "the split flows share their first stage, to the step"
    three, four = ([s["seconds"] for s in found[name]["stages"]] for name in ("split-nll-w2-kl", "split-all"))
    assert four[:-1] == three and len(three) == 3, "what has a fourth stage shares the other three"
    for name, parts in script.STAGES.items():
        whole = script.BEGINNING.share + sum(part.share for part in parts)
        assert whole == pytest.approx(0.95 if name == "split-nll-w2-kl" else 1.0)
    for title in script.NAMES.values():
        assert f"| {title} |" in output
    assert output.count("\n- ") == 8
    assert (folder / "comparison.md").read_text(encoding="utf-8") == output
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_results_are_kept(
    finished: tuple[Path, str], md: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert len(before) == len(script.NAMES)
    assert script.main([str(md), "-o", str(folder), "--budget", "smoke", "--quiet"]) == 0
    assert capsys.readouterr().out == output
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")} == before
    assert script.main([str(md), "-o", str(folder), "--table"]) == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("other", [["smoke", "--seed", "1"], ["2s"], ["smoke", "--held-out", "test"]], ids=str)
def test_other_settings_need_another_folder(
    other: list[str],
    finished: tuple[Path, str],
    md: Path,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.main([str(md), "-o", str(finished[0]), "--budget", *other]) == 1
    assert capsys.readouterr().err.rstrip().endswith("choose another folder.")


def test_user_mistakes(tmp_path: Path, md: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(md), "-o", str(tmp_path), "--table"]) == 1
    assert capsys.readouterr().err == f"Error: {tmp_path} has no finished configuration yet.\n"
    assert script.main([str(tmp_path), "-o", str(tmp_path / "out"), "--budget", "smoke"]) == 1
    assert "is no folder of openmm-bg simulate" in capsys.readouterr().err


def test_an_interrupted_training_goes_on(tmp_path: Path, md: Path) -> None:
    arguments = [str(md), "-o", str(tmp_path / "out"), "--budget", "5s", "--only", "split-nll", "--quiet"]
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    start = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", start, str(SCRIPT), *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    losses = tmp_path / "out" / "start" / "losses.csv"
    limit = time.monotonic() + 600
    while not (losses.exists() and (losses.parent / INDEX).exists()) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode in (1, 130)  # between two steps, or two stages
    assert "nterrupted" in errors and "Traceback" not in errors
    assert not (tmp_path / "out" / "split-nll" / "result.json").exists()
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"Resumed {losses.parent} at step" in again.stderr
    result = json.loads((tmp_path / "out" / "split-nll" / "result.json").read_text())
    assert result["steps"] == sum(stage["steps"] for stage in result["stages"])


def test_held_out_frames_are_not_trained_on(script: ModuleType, md: Path) -> None:
    data = script.read(md, "blocks")
    assert len(data.training) + len(data.held_out) == 600
    assert len(data.held_out) == 150
    rows = {frame.tobytes() for frame in data.training}
    assert not any(frame.tobytes() in rows for frame in data.held_out)
    test = script.read(md, "test")
    assert (len(test.training), len(test.held_out)) == (400, 200)


def test_budgets(script: ModuleType) -> None:
    assert script.Size.parse("90s").seconds == 90.0
    assert script.Size.parse("1.5m").seconds == 90.0
    assert script.Size.parse("1h").seconds == 3600.0
    for text in ("", "10", "0s", "ten minutes", "-5m"):
        with pytest.raises(script.argparse.ArgumentTypeError, match="neither smoke nor a time"):
            script.Size.parse(text)


@pytest.fixture()
def results(finished: tuple[Path, str], script: ModuleType) -> dict[str, dict[str, Any]]:
    """Results in which every claim of the paper holds."""
    found: dict[str, dict[str, Any]] = script.results(finished[0])
    found = copy.deepcopy(found)
    figures = {
        "nsf-nll": (-100.0, 4.0, 1e8),
        "joint-nll": (-110.0, 4.0, 1e8),
        "split-nll": (-120.0, 4.0, 1e8),
        "split-nll-kl": (-110.0, 4.2, 1e4),
        "split-nll-w2": (-115.0, 1.5, 1e8),
        "split-nll-w2-kl": (-105.0, 1.5, 1e4),
        "split-all": (-105.0, 1.6, 1e3),
    }
    for name, (nll, distance, energy) in figures.items():
        row = found[name]["figures"]
        row["nll"]["total"], row["delta_d"]["generated"], row["delta_d"]["data"] = nll, distance, 1.0
        row["energies"]["generated"]["median"], row["energies"]["data_rigid"]["median"] = energy, 0.0
        if found[name]["last_figures"] is not None:
            found[name]["last_figures"]["delta_d"]["generated"] = distance + 0.1
    return found


def test_the_ordering_is_judged(script: ModuleType, results: dict[str, dict[str, Any]]) -> None:
    assert sum("reached" in line for line in script.ordering(results)) == 8
    easy = copy.deepcopy(results)
    for name in ("split-nll", "split-nll-kl"):
        easy[name]["figures"]["energies"]["generated"]["median"] = -1.0
    lines = script.ordering(easy)
    assert sum("reached" in line for line in lines) == 7
    assert sum("nothing to lower" in line for line in lines) == 1
    broken: list[tuple[str, list[str], float, int]] = [
        ("split-nll", ["nll", "total"], -109.0, 1),
        ("split-nll", ["nll", "total"], -99.0, 2),
        ("split-nll-w2", ["delta_d", "generated"], 2.1, 1),
        ("split-nll-kl", ["delta_d", "generated"], 4.5, 1),  # its W2 claim becomes easier, its KL claim fails
        ("split-nll-w2-kl", ["delta_d", "generated"], 1.7, 1),
        ("split-nll-w2-kl", ["energies", "generated", "median"], 2e6, 1),
        ("split-all", ["energies", "generated", "median"], 2e6, 1),
        ("split-all", ["delta_d", "generated"], 2.2, 2),
    ]
    for name, keys, value, short in broken:
        wrong = copy.deepcopy(results)
        part = wrong[name]["figures"]
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        assert sum("**short**" in line for line in script.ordering(wrong)) == short, (name, keys)
    longer = copy.deepcopy(results)
    longer["split-nll"]["last_figures"]["delta_d"]["generated"] = 2.9  # likelihood alone caught up after its best step
    lines = [line for line in script.ordering(longer) if "**short**" in line]
    assert len(lines) == 2 and "2.900" in lines[0] and lines[1].startswith("- KL, split flow, NLL + KL")


def test_the_baselines_have_as_many_parameters(script: ModuleType, md: Path) -> None:
    data = script.read(md, "test")
    sizes = []
    for name in (*script.BASELINES, "split-nll"):
        config = script.flow_config(name, data)
        sizes.append(script.count_parameters(script.build_flow(data.coordinates.layout, config)))
    assert sizes[:-1] == pytest.approx(sizes[-1:] * 2, rel=0.1)
    # a width that is off by a half is found out
    narrow = config.model_copy(update={"hidden": config.hidden // 2})
    assert script.count_parameters(script.build_flow(data.coordinates.layout, narrow)) < 0.9 * sizes[-1]
