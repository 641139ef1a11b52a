"""The demo's page from synthetic results whose figures are known."""

import base64
import dataclasses
import html
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from openmm_bg.analysis.demo_report import (
    DemoResult,
    FreeEnergyRow,
    demo_page,
    disagreements,
    format_estimate,
    format_share,
)
from openmm_bg.errors import InputError

PLAIN, BALANCED = 0.009, 0.5  # population of the φ > 0 basin
ROWS = [
    FreeEnergyRow("weights", 4.7331, 0.0062, 100_000, "after training with 1,234,567 energies"),
    FreeEnergyRow("MD + moves", 4.751, 0.041, 232_000, "acceptance 58%"),
    FreeEnergyRow("tempered MD", 4.688, 0.049, 18_500_000, "pilot run included"),
]


def log_density(phi, psi, population, width=0.42):
    """Two basins: von Mises in φ and ψ, a common one at (-1.4, 1.2) and a rare one at (1.1, -0.9)."""

    def basin(centre_phi, centre_psi, sigma_phi, sigma_psi):
        shape = (np.cos(phi - centre_phi) - 1) / sigma_phi**2 + (np.cos(psi - centre_psi) - 1) / sigma_psi**2
        return (
            shape
            - 2 * np.log(2 * np.pi)
            - np.log(np.i0(sigma_phi**-2.0) * np.i0(sigma_psi**-2.0))
            + (sigma_phi**-2 + sigma_psi**-2)
        )

    return np.logaddexp(
        np.log1p(-population) + basin(-1.4, 1.2, width, 0.6), np.log(population) + basin(1.1, -0.9, 0.3, 0.45)
    )


def draw(rng, n, population, width=0.42):
    rare = rng.random(n) < population
    phi = np.where(rare, rng.vonmises(1.1, 0.3**-2, n), rng.vonmises(-1.4, width**-2, n))
    psi = np.where(rare, rng.vonmises(-0.9, 0.45**-2, n), rng.vonmises(1.2, 0.6**-2, n))
    return phi, psi


def synthetic_history(rng):
    history = []
    for i in range(600):
        stage = "nll" if i < 200 else "buffer"
        row = {"step": i + 1, "stage": stage, "seconds": 0.5 * (i + 1), "loss": 0.0, "nll": None, "buffer": None}
        value = -70.0 + 40.0 * math.exp(-i / 40) - 0.004 * i + rng.normal(0, 0.6)
        row["nll" if stage == "nll" else "buffer"] = row["loss"] = value
        row["validation_nll"] = value + 0.5 if i % 40 == 0 else None
        row["ess"] = min(0.95, 0.15 + 0.0015 * (i - 200) + rng.normal(0, 0.02)) if i >= 200 and i % 4 == 0 else None
        history.append(row)
    return history


def synthetic_result(n=20_000, seed=1, **changes):
    rng = np.random.default_rng(seed)
    md_phi, md_psi = draw(rng, n, BALANCED)
    phi, psi = draw(rng, n, 0.45, width=0.5)  # the flow is not quite right
    log_q = log_density(phi, psi, 0.45, width=0.5) + 0.0
    noise = rng.normal(0, 0.35, n)  # and neither are its other coordinates
    balanced = log_density(phi, psi, BALANCED) - log_q + noise
    plain = log_density(phi, psi, PLAIN) - log_q + noise
    balanced[:7] = plain[:7] = -np.inf
    energies = 20.0 + rng.gamma(27, 1.0, n) - 0.6 * noise
    energies[:7], energies[7:60] = np.inf, 1e6
    chain_phi, _ = draw(rng, 4000, PLAIN)
    chain_phi[100:103] = np.nan
    values = dict(
        md_phi=md_phi,
        md_psi=md_psi,
        md_log_weights=log_density(md_phi, md_psi, PLAIN) - log_density(md_phi, md_psi, BALANCED),
        md_reduced_potentials=20.0 + rng.gamma(27, 1.0, n)[::3],
        flow_phi=phi,
        flow_psi=psi,
        flow_log_weights=plain,
        flow_log_weights_balanced=balanced,
        flow_reduced_potentials=energies,
        flow_in_basin=(phi > 0) & (phi < 2),
        history=synthetic_history(rng),
        chain_phi=chain_phi,
        rows=list(ROWS),
        figures={
            "ESS plain, total": 0.123,
            "k-hat": 0.3141,
            "largest weight": 0.00021,
            "samples": n,
            "acceptance": 0.58,
            "cis frames, tempered MD": 41,
            "seconds, MD": 90.4,
            "seconds, training": 301.0,
            "machine": "x86_64 <2 cores> & more",
        },
        quick=False,
        seconds=541.0,
    )
    return DemoResult(**{**values, **changes})


@pytest.fixture(scope="module")
def result():
    return synthetic_result()


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    return demo_page(tmp_path_factory.mktemp("page") / "demo.html", result).read_text(encoding="utf-8")


def pictures(page):
    return [
        ElementTree.fromstring(base64.b64decode(data, validate=True))
        for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    ]


def rows_of(page):
    """Cells of every table row, as a reader sees them."""
    return [
        [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]


def warnings_of(page):
    return [html.unescape(text) for text in re.findall(r'<p class="note">(.*?)</p>', page)]


def test_every_estimate_stands_in_the_table(page):
    rows = rows_of(page)
    assert ["weights", "4.733 ± 0.006", "100,000", "after training with 1,234,567 energies"] in rows
    assert ["MD + moves", "4.751 ± 0.041", "232,000", "acceptance 58%"] in rows
    assert ["tempered MD", "4.688 ± 0.049", "18,500,000", "pilot run included"] in rows


def test_ess_in_total_and_inside_each_basin(page, result):
    inside = result.flow_in_basin
    for name, log_w in (("plain", result.flow_log_weights), ("balanced", result.flow_log_weights_balanced)):
        expected = [name]
        for mask in (np.ones_like(inside), inside, ~inside):
            w = np.exp(log_w[mask])
            share = w.sum() ** 2 / (w @ w) / w.size
            expected.append(f"{100 * share:.1f}\u00a0% ({share * w.size:,.0f} of {w.size:,})")
        assert expected in rows_of(page)


def test_lead_and_highlights_state_the_main_result(page):
    lead = html.unescape(page.split('<div class="lead">')[1].split("</div>")[0])
    assert "4.733 ± 0.006 kT" in lead
    assert "20,000 independent structures" in lead
    assert "population of 0.87\u00a0%" in lead  # 1 / (1 + exp(4.7331))
    assert "agree within 2 standard errors" in lead
    assert "in 9 min" in lead
    assert "<dd>4.733 ± 0.006</dd>" in page
    assert warnings_of(page) == []


def test_figures_of_the_run_are_listed_and_escaped(page):
    rows = rows_of(page)
    for row in (
        ["samples", "20,000"], ["k-hat", "0.314"], ["largest weight", "0.00021"], ["acceptance", "58.0\u00a0%"],
        ["cis frames, tempered MD", "41"], ["MD, wall time", "90 s"], ["training, wall time", "5 min"],
        ["machine", "x86_64 <2 cores> & more"],
    ):  # fmt: skip
        assert row in rows
    assert "x86_64 &lt;2 cores&gt; &amp; more" in page
    assert "0.123" not in page  # ESS is computed from the weights, never copied


def test_seven_pictures_are_inside_and_whole(page):
    found = pictures(page)
    assert len(found) == 7
    for picture in found:
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        drawn = [e for e in picture.iter() if e.tag.endswith(("}path", "}image"))]
        assert len(drawn) > 20
        for element in picture.iter():  # nothing inside a picture points outside it either
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:"))
    assert len(re.findall(r'<img alt="[^"]{30,}"', page)) == 7
    assert page.count("<figcaption>") == 7


def test_the_page_loads_nothing(page):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "://" not in text
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\(", text)
    assert "default-src 'none'" in text


def test_disagreement_short_form_and_poor_weights_are_said(tmp_path, result):
    log_w = np.random.default_rng(0).normal(0.0, 2.5, result.flow_log_weights.size)
    off = [ROWS[0], dataclasses.replace(ROWS[2], value_kT=5.0)]
    changed = dataclasses.replace(result, rows=off, quick=True, flow_log_weights=log_w)
    page = demo_page(tmp_path / "demo.html", changed).read_text(encoding="utf-8")
    quick, differ, khat = warnings_of(page)
    assert "--quick" in quick
    sigmas = (5.0 - 4.7331) / math.hypot(0.0062, 0.049)
    assert f"“weights” and “tempered MD” differ in ΔF by {sigmas:.1f} standard errors" in differ
    assert "Pareto k̂" in khat
    assert "agree within" not in page


def test_one_sample_that_decides_everything_is_said(tmp_path, result):
    log_w = result.flow_log_weights.copy()
    log_w[500] = 900.0
    page = demo_page(tmp_path / "demo.html", dataclasses.replace(result, flow_log_weights=log_w)).read_text("utf-8")
    assert any("One sample carries 100\u00a0% of all weight" in text for text in warnings_of(page))


def test_agreement_needs_two_sigma():
    far = FreeEnergyRow("a", 1.0, 0.03, 1), FreeEnergyRow("b", 1.11, 0.04, 1)  # 2.2 combined errors
    near = FreeEnergyRow("a", 1.0, 0.03, 1), FreeEnergyRow("b", 1.09, 0.04, 1)  # 1.8
    assert [(a, b) for a, b, _ in disagreements(far)] == [("a", "b")]
    assert disagreements(near) == []


def test_a_run_in_which_everything_failed_still_has_its_page(tmp_path):
    n = 60
    nothing = np.full(n, np.nan)
    zero = np.full(n, -np.inf)
    result = DemoResult(
        md_phi=np.full(n, -1.0), md_psi=np.zeros(n), md_log_weights=np.zeros(n), md_reduced_potentials=nothing,
        flow_phi=nothing, flow_psi=nothing, flow_log_weights=zero, flow_log_weights_balanced=zero,
        flow_reduced_potentials=np.full(n, np.inf), flow_in_basin=np.zeros(n, dtype=bool), history=[],
        chain_phi=np.full(10, np.nan),
        rows=[FreeEnergyRow("weights", math.nan, math.nan, n), FreeEnergyRow("MD + moves", 1.25, math.inf, 0)],
        figures={"k-hat": math.inf, "acceptance": math.nan},
    )  # fmt: skip
    page = demo_page(tmp_path / "demo.html", result).read_text(encoding="utf-8")
    rows = rows_of(page)
    assert ["weights", "no estimate", "60", ""] in rows
    assert ["MD + moves", "1.2, error unknown", "0", ""] in rows
    assert ["plain", "0.0\u00a0% (0 of 60)", "no sample", "0.0\u00a0% (0 of 60)"] in rows
    assert ["k-hat", "inf"] in rows and ["acceptance", "not available"] in rows
    assert "No free-energy difference could be computed" in page
    assert len(pictures(page)) == 7


def test_arrays_that_do_not_belong_together_are_refused(tmp_path, result):
    target = tmp_path / "demo.html"
    with pytest.raises(InputError, match="flow_psi"):
        demo_page(target, dataclasses.replace(result, flow_psi=result.flow_psi[1:]))
    with pytest.raises(InputError, match="every k-th of 20000"):
        demo_page(target, dataclasses.replace(result, md_reduced_potentials=np.zeros(6)[:0]))
    with pytest.raises(InputError, match="every k-th of 20000"):
        demo_page(target, dataclasses.replace(result, md_reduced_potentials=np.zeros(15_000)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (4.7331, 0.0062, "4.733 ± 0.006"),
        (4.7, 0.12, "4.70 ± 0.12"),
        (-4.7, 1.2, "−4.7 ± 1.2"),
        (4.73, math.inf, "4.7, error unknown"),
        (math.inf, 0.1, "no estimate"),
    ],
)
def test_estimates_carry_the_decimals_their_error_deserves(value, error, text):
    assert format_estimate(value, error) == text


def test_share_of_unequal_weights():
    log_w = np.log([3.0, 1.0, 1.0, 1.0])  # (3+1+1+1)² / (4·12) = 0.75
    assert format_share(log_w) == "75.0\u00a0% (3 of 4)"
    assert format_share(log_w, [False, True, True, False]) == "100.0\u00a0% (2 of 2)"
