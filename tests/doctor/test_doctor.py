"""The doctor finds what works, survives what crashes, and says what is used instead."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from openmm_bg import doctor
from openmm_bg.cli import main
from openmm_bg.doctor import Finding, Report, examine
from openmm_bg.isolated import run_isolated


@pytest.fixture(scope="module")
def report():
    return examine()


def test_this_machine(report):
    assert report.ok
    assert report.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report.versions["openmm"] and report.versions["torch"]
    names = [f.name for f in report.platforms]
    assert "Reference" in names and next(f for f in report.platforms if f.name == "Reference").works
    assert names[-1] == "Reference"  # the slowest
    assert report.flow.works and "64 samples" in report.flow.detail
    assert report.force.works


def test_text_names_everything(report):
    text = str(report)
    for finding in (*report.platforms, report.cuda, report.openmm_torch, report.flow, report.force):
        assert finding.detail and finding.detail in text
        assert "\n" not in finding.detail and "Traceback" not in finding.detail
    assert text.endswith("Everything needed works.")


def test_cuda_is_what_torch_says(report):
    import torch

    assert report.cuda.works == torch.cuda.is_available()
    if not report.cuda.works:
        assert "torch" in report.cuda.detail and "CPU" in report.cuda.detail


# -------------------------------------------------------------------- processes


def test_endings_of_a_process():
    assert run_isolated("print('a'); print('b')", 60) == (True, "b")
    assert run_isolated("import sys; sys.exit('no such thing')", 60) == (False, "no such thing")
    assert run_isolated("import os; os._exit(3)", 60) == (False, "the process ended with code 3")
    works, detail = run_isolated("import os; os.abort()", 60)
    assert not works and "SIGABRT" in detail
    works, detail = run_isolated("import time; time.sleep(60)", 1)
    assert not works and detail == "no answer within 1 s"


def test_same_import_path(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("value = 5")
    monkeypatch.syspath_prepend(tmp_path)
    assert run_isolated("import only_here; print(only_here.value)", 60) == (True, "5")


# -------------------------------------------------------------------- the verdict


HEALTHY = Report(
    {"python": "3.11.0", "openmm": "8.6.1", "openmmtorch": None},
    [Finding("CUDA", False, "no driver."), Finding("Reference", True, "a Context works")],
    Finding("CUDA in torch", False, "none."),
    Finding("openmm-torch", False, "none."),
    Finding("shipped flow", True, "fine", needed=True),
    Finding("FlowForce", True, "fine", needed=True),
)
SICK = {
    "flow": replace(HEALTHY, flow=Finding("shipped flow", False, "truncated.", needed=True)),
    "force": replace(HEALTHY, force=Finding("FlowForce", False, "no PythonForce.", needed=True)),
    "platforms": replace(HEALTHY, platforms=[Finding("Reference", False, "broken.")]),
    "no platform": replace(HEALTHY, platforms=[]),
}


def test_what_can_be_done_without_is_no_failure():
    assert HEALTHY.ok
    assert "openmmtorch not installed" in str(HEALTHY)


@pytest.mark.parametrize("name", SICK)
def test_command_fails_when_something_needed_is_broken(monkeypatch, name):
    monkeypatch.setattr(doctor, "examine", lambda: SICK[name])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "Something needed is broken" in result.output


def test_command_succeeds(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: HEALTHY)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "Reference" in result.output


def test_broken_flow_is_told(monkeypatch, tmp_path):
    """The probe itself, with a package whose shipped file is damaged."""
    code = (
        "from openmm_bg import data, doctor\n"
        "from openmm_bg.errors import ArtifactError\n"
        "def damaged(): raise ArtifactError('alanine_dipeptide.bg is truncated.')\n"
        "data.load_alanine_dipeptide = damaged\n"
        "doctor.main('probe_flow')\n"
    )
    works, detail = run_isolated(code, 120)
    assert not works and "alanine_dipeptide.bg is truncated" in detail


def test_doctor_alone_loads_neither_torch_nor_openmm():
    """It must be able to speak where they cannot be imported."""
    code = "import sys, openmm_bg.doctor; print(sorted({'torch', 'openmm'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
