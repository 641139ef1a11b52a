"""`report` as a whole: what the page says is what was found; molecules without residues; files; wrong input."""

import base64
import dataclasses
import hashlib
import html
import json
import math
import os
import re
import sys

import mdtraj
import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)
from click.testing import CliRunner

import openmm_bg as bg
from openmm_bg.analysis.evaluation import Evaluation
from openmm_bg.analysis.files import read_history, report_files
from openmm_bg.analysis.report import report_page
from openmm_bg.analysis.report_text import highlights, lead, number, percent, warnings
from openmm_bg.cli import main
from openmm_bg.errors import InputError
from openmm_bg.files import find_flow
from openmm_bg.training.history import COLUMNS

import openmm  # isort: skip

ONE = {"platform": "Reference", "n_workers": 1, "progress": False}
WORDS = ["--platform", "Reference", "--workers", "1"]
HISTORY = [{"step": k + 1, "stage": "nll" if k < 6 else "w2", "nll": -1.0 * k, "loss": -1.0 * k} for k in range(12)]


def rows_of(page):
    """Cells of every table row, as a reader sees them."""
    return [
        [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]


def cells(page, name):
    (found,) = (row for row in rows_of(page) if row[0] == name)
    return found


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def page(evaluated, dipeptide, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    result = Evaluation(evaluated.figures, (*evaluated.notes, "A <note> of mine."), evaluated.material)
    report_page(path, result, dipeptide.flow, HISTORY, [("flow", "a & b"), ("seed", "3")])
    return path.read_text("utf-8")


# ------------------------------------------------------------------ the page


def test_every_section_is_there_in_order(page):
    assert headings(page) == [
        "The row of Table 1",
        "Structures",
        "Energies",
        "Weights and moves",
        "Backbone torsions",
        "What hardly ever happens in MD",
        "Novelty",
        "Training",
        "What to bear in mind",
        "Where this comes from",
    ]
    assert "A &lt;note&gt; of mine." in page and cells(page, "flow")[1] == "a & b"


def test_the_table_has_the_figures(page, evaluated):
    found = evaluated.figures
    delta = found["delta_d"]
    assert cells(page, "ΔD, Å")[1:3] == [
        f"{delta['generated']:.3f} ± {delta['generated_sd']:.3f}",
        f"{delta['data']:.3f} ± {delta['data_sd']:.3f}",
    ]
    assert cells(page, "ΔD of the training frames, Å")[2].startswith(f"{delta['training']:.3f}")
    for column, name in ((1, "generated"), (2, "data")):
        values = found["energies"][name]
        expected = f"{values['below_median_mean']:.1f} ± {values['below_median_sd']:.1f}".replace("-", "−")
        assert cells(page, "energy below the median, kcal/mol")[column] == expected
    nll = found["nll"]["flows"][0]
    expected = f"{nll['total']:.2f} ± {nll['total_error']:.2f}".replace("-", "−")
    assert cells(page, "NLL in total, nats")[1] == expected
    (weights,) = found["weights"]
    assert cells(page, "ESS, formula A (exact)")[1] == f"{100 * weights['ess']:.1f}\u00a0%"
    assert cells(page, "acceptance of moves (D)")[1] == f"{100 * found['moves']['acceptance']:.1f}\u00a0%"
    assert cells(page, "frames with a wrong hand")[1:3] == ["0\u00a0%", "0\u00a0%"]
    rows = [row for row in rows_of(page) if row[0].startswith(("generated ", "held-out ")) and len(row) == 5]
    assert len(rows) == 10
    assert rows[0][1] == number(found["novelty"]["minimised"][0]["nearest"])


def test_the_page_holds_everything_and_loads_nothing(page):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "://" not in text and not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\(", text)
    pictures = re.findall(r'<div( class="wide")?><img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img") == 14
    for _, alt, data in pictures:
        svg = base64.b64decode(data).decode()
        assert len(alt) > 25 and svg.count("<path") + svg.count("<image") > 20
    half = {alt for wide, alt, _ in pictures if not wide}
    assert len(half) == 6 and page.count('<div class="row">') == 3  # three rows of two


def test_an_evaluation_without_its_frames_is_refused(evaluated, dipeptide, tmp_path):
    with pytest.raises(InputError, match="no frames"):
        report_page(tmp_path / "x.html", Evaluation(evaluated.figures), dipeptide.flow)


def test_a_molecule_without_residues(chain, tmp_path):
    flow, frames = chain
    path = tmp_path / "report.html"
    page = report_page(path, bg.evaluate(flow, frames, n_samples=60, **ONE), flow).read_text("utf-8")
    assert headings(page) == [
        "The row of Table 1",
        "Structures",
        "Energies",
        "Weights and moves",
        "What hardly ever happens in MD",
        "Novelty",
        "What to bear in mind",
    ]
    assert "Ramachandran and χ rows are left out" in page and "longest chain of heavy atoms" in page
    assert "5 atoms" in page and "residues, " not in page.split("</h1>")[0]
    assert not any(row[0] in ("frames with a wrong hand", "frames with a cis amide") for row in rows_of(page))


# ------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0316, "−0.0316"),
        (1234.5, "1,234"),  # rounds half to even
        (0.00001, "1.00·10⁻⁵"),
        (-2.5e9, "−2.50·10⁹"),
        (3.14159, "3.14"),
        (math.nan, "not known"),
        (-math.inf, "−infinite"),
    ],
)
def test_numbers_as_readers_want_them(value, text):
    assert number(value) == text


def test_percent():
    assert [percent(x) for x in (0.0, 0.00042, 0.5, 1.0)] == ["0\u00a0%", "0.042\u00a0%", "50.0\u00a0%", "100.0\u00a0%"]


def changed(evaluated, **sections):
    """The figures with single values of a section replaced."""
    figures = dict(evaluated.figures)
    for section, values in sections.items():
        figures[section] = {**figures[section], **values}
    return figures


def test_the_lead_judges_delta_d_and_energies(evaluated):
    assert "as near as data are to data" in lead(evaluated.figures)[1]
    assert "2.5 times as far" in lead(changed(evaluated, delta_d={"ratio": 2.5}))[1]
    assert "spread too little" in lead(changed(evaluated, delta_d={"ratio": 0.8}))[1]
    assert "have the data's energies" in lead(evaluated.figures)[1]
    high = {**evaluated.figures["energies"]["generated"], "below_median_mean": 750.0}
    assert "above the data's" in lead(changed(evaluated, energies={"generated": high}))[1]
    lost = {**high, "below_median_mean": math.inf, "median": math.inf}
    assert "not finite" in lead(changed(evaluated, energies={"generated": lost}))[1]
    rigid = {"generated, rigid": high, "data": evaluated.figures["energies"]["data"]}
    text = lead({**evaluated.figures, "energies": rigid})[1]
    assert "does not compare" in text
    assert ("energy below the median (rigid), against the data's", "+766.5 kcal/mol") in highlights(
        {**evaluated.figures, "energies": {**rigid, "data": {**high, "below_median_mean": -16.5}}}
    )


def test_warnings_say_what_must_not_be_missed(evaluated):
    assert warnings(evaluated.figures) == []
    (w,) = evaluated.figures["weights"]
    (heavy,) = warnings({**evaluated.figures, "weights": [{**w, "khat": 0.9}]})
    assert "k̂" in heavy and "0.90" in heavy
    assert "no exact weights" in warnings({**evaluated.figures, "weights": [{**w, "label": "rigid"}]})[0]
    clashes = evaluated.figures["clashes"]
    bad = {**clashes["generated"], "heavy_frames": 0.4}
    assert any("40.0\u00a0% of the generated frames have heavy atoms" in t for t in warnings(
        changed(evaluated, clashes={"generated": bad})
    ))  # fmt: skip
    assert any("wrong hand" in t for t in warnings(changed(evaluated, chirality={"generated": 0.5})))
    nll = evaluated.figures["nll"]
    outside = {"flows": [{**nll["flows"][0], "outside": 7}]}
    assert any(t.startswith("7 held-out frames lie outside") for t in warnings(changed(evaluated, nll=outside)))


# ------------------------------------------------------------------ files


def write_losses(path, rows):
    lines = [",".join(COLUMNS)]
    lines += [",".join("" if row.get(name) is None else str(row[name]) for name in COLUMNS) for row in rows]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def model(tmp_path, shipped):
    """A folder as openmm-bg train leaves it."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "flow.bg").write_bytes(shipped.read_bytes())
    write_losses(path / "losses.csv", HISTORY)
    return path


def test_the_command_makes_a_page_and_its_figures(model, folder, tmp_path):
    output = tmp_path / "report.html"
    result = CliRunner().invoke(main, ["report", str(model), str(folder), "-n", "40", "-o", str(output), *WORDS])
    assert result.exit_code == 0, result.output
    assert "ΔD" in result.output and str(output) in result.output
    page = output.read_text("utf-8")
    assert "Training" in headings(page)
    digest = hashlib.sha256((model / "flow.bg").read_bytes()).hexdigest()
    assert cells(page, "flow")[1] == f"{model / 'flow.bg'}, SHA-256 {digest}"
    assert cells(page, "samples")[1] == "40, seed 0"
    assert openmm.version.version in cells(page, "versions of this report")[1]
    steps = bg.load(model / "flow.bg").metadata["training"]["steps"]
    assert f"ends at step 12, the flow at {steps:,}" in page
    figures = json.loads((tmp_path / "report.evaluation.json").read_text())
    assert figures["about"]["flows"] == [str(model / "flow.bg")]
    assert figures["about"]["held_out_frames"] == 40 and figures["about"]["training_frames"] == 50


def test_a_trajectory_that_training_uses_is_said(folder, dipeptide):
    from openmm_bg.analysis.evaluation_input import read_held_out

    assert any("not held out" in note for note in read_held_out(folder / "replica-0.dcd", dipeptide.topology).notes)
    assert not any("not held out" in note for note in read_held_out(folder, dipeptide.topology).notes)


def test_the_loss_curve_is_no_condition(model, dipeptide, caplog):
    flow = dipeptide.flow
    steps = flow.metadata["training"]["steps"]
    path = model / "losses.csv"
    write_losses(path, [{**HISTORY[0], "step": steps}])
    assert read_history(model / "flow.bg", flow) == ([dict.fromkeys(COLUMNS) | HISTORY[0] | {"step": steps}], [])
    for text, message in (
        ("", "is empty"),
        (",".join(COLUMNS) + "\n", "is empty"),
        ("something else\n1\n", "no readable loss curve"),
        (",".join(COLUMNS) + "\n1,nll,0.", "no readable loss curve"),
    ):
        path.write_text(text)
        history, (note,) = read_history(model / "flow.bg", flow)
        assert history == [] and message in note and message in caplog.text
        caplog.clear()
    path.unlink()
    assert "no losses.csv beside" in read_history(model / "flow.bg", flow)[1][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "nowhere.dcd"], "no trajectory at nowhere.dcd"),
        (["nowhere.bg", "{data}"], "no flow at nowhere.bg"),
        (["nowhere/flow.bg", "{data}"], "no folder nowhere"),
        (["{empty}", "{data}"], "is a folder without a flow"),
        (["{simulated}", "{model}"], "holds MD frames of openmm-bg simulate"),
        (["{model}", "{other}"], "atoms"),
        (["{model}", "{shuffled}"], "another molecule or atom order"),
        (["{model}", "{single}"], "One held-out frame is too few"),
        (["{model}", "{empty}"], "is no folder of openmm-bg simulate"),
        (["{model}", "{data}", "-n", "0"], "number of samples must be a whole number of at least 1"),
        (["{model}", "{data}", "-o", "{empty}.html"], "is a folder"),
        (["{model}", "{data}", "-o", "nowhere/report.html"], "no folder nowhere"),
        (["{model}", "{data}", "-o", "report.txt"], "must end in .html"),
        (["{model}", "{data}", "-o", "{locked}"], "cannot be written"),
        (["{model}", "{data}", "--system", "nowhere.xml"], "no System file nowhere.xml"),
        (["{model}", "{data}", "--system", "{small}"], "The System has 1 particles"),
        (["{model}", "{data}", "--embedding", "umap"], "not installed"),
    ],
)
@pytest.mark.parametrize("command", ["report", "evaluate"])
def test_wrong_input_is_one_sentence(
    command, arguments, message, model, folder, tmp_path, frames, dipeptide, monkeypatch
):
    if command == "evaluate" and message == "must end in .html":
        pytest.skip("a JSON file may have any name")
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "simulated": folder, "empty": tmp_path / "empty"}
    names["empty"].mkdir()
    (tmp_path / "empty.html").mkdir()
    topology = mdtraj.Topology.from_openmm(dipeptide.topology)
    for name, rows in (("data", frames[:30]), ("single", frames[:1]), ("shuffled", frames[:30, ::-1])):
        names[name] = tmp_path / f"{name}.dcd"
        mdtraj.Trajectory(rows, topology).save(str(names[name]))
    names["other"] = tmp_path / "other.dcd"
    mdtraj.Trajectory(frames[:30, :10], topology.subset(range(10))).save(str(names["other"]))
    small = openmm.System()
    small.addParticle(1.0)
    names["small"] = tmp_path / "small.xml"
    names["small"].write_text(openmm.XmlSerializer.serialize(small))
    names["locked"] = tmp_path / "locked.html"
    access = os.access  # root may write anywhere: a mode would stop nobody here
    monkeypatch.setattr("os.access", lambda p, mode: not (mode == os.W_OK and "locked" in str(p)) and access(p, mode))
    names["locked"].write_text("")
    monkeypatch.setattr("openmm_bg.analysis.evaluate.draw", None)  # any long work would fail otherwise
    words = [word.format(**names) for word in arguments]
    result = CliRunner().invoke(main, [command, *words, *WORDS])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output
    assert not list(tmp_path.rglob("*.json.tmp")) and not (model / "flow.html").exists()


def test_find_flow(model, tmp_path):
    assert find_flow(model) == model / "flow.bg" and find_flow(tmp_path / "x.bg") == tmp_path / "x.bg"
    with pytest.raises(InputError, match="at least one flow"):
        report_files([], tmp_path / "x.dcd")


# ------------------------------------------------------------------ another System


def test_another_force_field(dipeptide, frames):
    """The flow's own and a constant: it shifts every energy, and no weight."""
    shifted_system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(dipeptide.system))
    constant = openmm.CustomBondForce("92.048")  # kJ/mol, 22 kcal/mol
    constant.addBond(0, 1, [])
    shifted_system.addForce(constant)
    settings = {"n_samples": 20, "batch": 20, **ONE}
    plain, shifted = (
        bg.evaluate(dipeptide.flow, frames[:30], system=system, **settings).figures for system in (None, shifted_system)
    )
    for name in ("generated", "data"):
        gap = shifted["energies"][name]["median"] - plain["energies"][name]["median"]
        assert gap == pytest.approx(22.0, abs=1e-3)
    assert shifted["weights"][0]["ess"] == pytest.approx(plain["weights"][0]["ess"], rel=1e-6)
    assert shifted["novelty"]["minimised"][0]["before"] == pytest.approx(
        plain["novelty"]["minimised"][0]["before"] + 22.0, abs=1e-2
    )
    assert (plain["about"]["system"], shifted["about"]["system"]) == ("the flow's own", "another")
    with pytest.raises(InputError, match=r"must be an openmm\.System"):
        bg.evaluate(dipeptide.flow, frames[:30], system="system.xml", **ONE)


def test_evaluation_keeps_what_it_was_computed_from(evaluated, frames):
    material = evaluated.material
    np.testing.assert_array_equal(material.data, frames.astype(np.float32))
    assert material.generated.shape[1:] == frames.shape[1:] and set(material.energies) == {"generated", "data"}
    median = np.median(material.energies["data"])
    assert evaluated.figures["energies"]["data"]["median"] == pytest.approx(median)
    assert len(material.log_weights[0]) == evaluated.figures["weights"][0]["samples"]
    assert dataclasses.replace(evaluated, material=None) == evaluated
    assert "material" not in json.loads(evaluated.to_json())
