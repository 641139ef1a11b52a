"""The page writer and the pictures by themselves."""

import base64
import html
import re
import subprocess
import sys

import numpy as np
import pytest

from openmm_bg.analysis import plots
from openmm_bg.analysis.page import Paragraph, Picture, Section, Table, render_page, write_page
from openmm_bg.analysis.plots import Sample
from openmm_bg.analysis.training_plots import loss_curve
from openmm_bg.errors import InputError

NASTY = '<script>alert("x & y")</script>'


def small_picture():
    return plots.chain_trace([0.1, -1.0, np.nan, 1.0])


def test_every_text_is_escaped():
    text = render_page(
        NASTY,
        [NASTY],
        [
            Section(
                NASTY,
                [
                    Paragraph(NASTY),
                    Table((NASTY, NASTY), [(NASTY, NASTY)], caption=NASTY),
                    Picture(small_picture(), NASTY, NASTY),
                ],
            )
        ],
        highlights=[(NASTY, NASTY)],
        warnings=[NASTY],
    )
    assert "<script" not in text
    assert text.count(html.escape(NASTY)) == 15
    assert re.search(r'<img alt="&lt;script&gt;alert\(&quot;x &amp; y&quot;\)&lt;/script&gt;" src="data:', text)


def test_same_content_gives_the_same_bytes():
    pages = [render_page("t", "l", [Section("s", [Picture(small_picture(), "a")])]) for _ in range(2)]
    assert pages[0] == pages[1]


def test_ragged_table_is_refused_and_leaves_the_earlier_page(tmp_path):
    path = write_page(tmp_path / "p.html", "first", "lead", [])
    with pytest.raises(InputError, match="2 columns has a row of 3"):
        write_page(path, "second", "lead", [Section("s", [Table(("a", "b"), [("1", "2", "3")])])])
    assert "first" in path.read_text()
    write_page(path, "third", "lead", [])
    assert "third" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]


def test_a_wide_table_has_a_box_to_move_in_and_words_of_their_own_line():
    """On a phone a table was cut without a sign of it. Looked at in a browser; here what the style sheet relies on."""
    plain = Table(tuple("abcde"), [tuple("12345")], caption="numbers")
    words = Table(("figure", "generated", "data", "in words"), [("ΔD", "1", "2", "a sentence")], text_last=True)
    text = render_page("t", "l", [Section("s", [plain, words])])
    boxes = re.findall(r'<div class="scroll" tabindex="0"><table([^>]*)>(.*?)</table></div>', text, flags=re.DOTALL)
    assert [attributes for attributes, _ in boxes] == ["", ' class="text-last" style="--figures: 2"']
    assert text.count("<table") == 2 and "<caption><span>numbers</span></caption>" in boxes[0][1]
    style = re.search(r"<style>(.*?)</style>", text, flags=re.DOTALL)[1]
    assert re.search(r"\.scroll \{ overflow-x: auto;", style)
    narrow = style[style.index("@media (max-width: 640px)") :]
    assert "repeat(var(--figures), auto)" in narrow and "grid-column: 1 / -1" in narrow


def test_full_disk_leaves_the_earlier_page_and_nothing_else(tmp_path, monkeypatch):
    path = write_page(tmp_path / "p.html", "first", "lead", [])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"p\.html \(No space left on device\)"):
        write_page(path, "second", "lead", [])
    assert "first" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]


def test_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="Cannot write the page"):
        write_page(tmp_path / "absent" / "p.html", "t", "l", [])


def test_pyplot_backend_and_settings_stay_untouched():
    code = (
        "import sys; from openmm_bg.analysis import plots; assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        # Asking for rcParams["backend"] would choose one and import pyplot.
        "settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from openmm_bg.analysis.page import Picture, Section, render_page\n"
        "render_page('t', 'l', [Section('s', [Picture(plots.chain_trace([0.1, 0.2]), 'a')])])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pictures_are_svg_of_the_size_of_the_page():
    text = render_page("t", "l", [Section("s", [Picture(small_picture(), "a")])])
    svg = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1]).decode()
    assert re.search(r'width="691\.2pt"', svg)  # 9.6 inches
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>', "", svg, flags=re.S)


def texts(figure):
    axes_texts = [t.get_text() for axes in figure.axes for t in (*axes.texts, axes.title, axes._left_title)]
    legends = [axes.get_legend() for axes in figure.axes] + list(figure.legends)
    return axes_texts + [t.get_text() for legend in legends if legend is not None for t in legend.get_texts()]


def test_histogram_of_energies_says_what_lies_beyond():
    rng = np.random.default_rng(0)
    md = rng.normal(40, 5, 5000)
    flow = np.concatenate([rng.normal(41, 5, 900), np.full(60, 1e7), np.full(40, np.inf)])
    weights = np.concatenate([np.zeros(900), np.full(100, -np.inf)])
    figure = plots.reduced_potential_histogram(
        [Sample("tempered MD", md), Sample("flow, raw", flow), Sample("flow, reweighted", flow, weights)]
    )
    labels = texts(figure)
    assert "flow, raw (10 % beyond the picture)" in labels
    assert "flow, reweighted" in labels  # clashes have no weight, so nothing lies beyond
    low, high = figure.axes[0].get_xlim()
    assert 0 < low < 25 and 55 < high < 100


def test_weights_carry_their_ess_and_khat():
    rng = np.random.default_rng(1)
    log_w = np.concatenate([rng.normal(0, 0.5, 9_000), np.full(1_000, -np.inf)])
    (label,) = (t for t in texts(plots.log_weight_histogram({"plain": log_w})) if "plain" in t)
    w = np.exp(log_w)
    assert f"ESS {100 * w.sum() ** 2 / (w @ w) / w.size:.1f} %" in label
    assert re.search(r"k̂ = −?-?0\.\d\d", label)
    assert re.search(r"\(10 % further left", label)
    assert any("no sample has a weight" in t for t in texts(plots.log_weight_histogram({"x": np.full(9, -np.inf)})))


def test_chain_trace_counts_without_cis_frames():
    phi = np.array([-1.0, 1.0, np.nan, 1.0, -1.0, -1.0])  # two of five in the basin, in and out
    assert "40.00 % of the frames in 0 < φ < 2 rad, 2 crossings" in texts(plots.chain_trace(phi))


def test_free_energy_profiles_are_compared_without_a_shift():
    rng = np.random.default_rng(2)
    phi = rng.vonmises(-1.0, 2.0, 4000)
    half = np.where(rng.random(4000) < 0.5, phi, np.nan)
    figure = plots.free_energy_along_phi([Sample("a", phi), Sample("b", half), Sample("c", np.full(9, np.nan))])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    first, second = lines["a"].get_ydata(), lines["b"].get_ydata()
    assert np.nanmin(first) == 0.0
    near = first < 2.0
    assert np.abs(second - first)[near].max() < 0.5
    assert "c (no weight)" in lines


def test_loss_curve_shows_the_losses_that_there_are():
    rows = [
        {"step": i, "stage": "nll" if i < 30 else "kl", "nll": -1.0 * i, "kl": None if i < 30 else 5.0, "ess": None}
        for i in range(60)
    ]
    rows[20]["validation_nll"] = -19.0
    figure = loss_curve(rows)
    assert len(figure.axes) == 2
    labels = texts(figure)
    for text in ("stage “nll”", "stage “kl”", "MD frames", "held-out MD frames", "reverse KL"):
        assert labels.count(text) == 1
    assert figure.axes[-1].get_xlabel() == "step"
    assert "No loss was recorded." in texts(loss_curve([]))
    timed = loss_curve([{"loss": 1.0 / (i + 1), "seconds": 6.0 * i} for i in range(11)])
    assert timed.axes[-1].get_xlabel() == "training time (minutes)"
    assert timed.axes[-1].get_xlim() == (0.0, 1.0)
    assert len(loss_curve([{"loss": 1.0}]).axes) == 1
