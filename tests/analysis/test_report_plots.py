"""The report's pictures: what is drawn is what was given, and nothing that is missing or infinite breaks one."""

import math

import numpy as np
import pytest
import torch  # noqa: F401  (before openmm)

from openmm_bg.analysis import ensemble_plots, residue_plots, style
from openmm_bg.analysis.density_figures import energy_figures
from openmm_bg.analysis.distances import mean_distances, pair_distances
from openmm_bg.analysis.plots import log_weight_histogram
from openmm_bg.analysis.structure_plots import (
    _smooth,
    distance_matrices,
    overlay,
    residue_axis,
    rmsf_curve,
    trace_paths,
)


def rotation(rng):
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return q * np.sign(np.linalg.det(q))


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines}


def words(figure):
    legends = [axes.get_legend() for axes in figure.axes] + list(figure.legends)
    found = [t.get_text() for legend in legends if legend is not None for t in legend.get_texts()]
    return found + [t.get_text() for axes in figure.axes for t in axes.texts]


# ------------------------------------------------------------------ structures


def test_rmsf_curves_are_the_rows():
    rows = [{"residue": f"ALA{k}", "generated": 1.0 + k, "data": 0.5 * k} for k in range(50)]
    (axes,) = rmsf_curve(rows).axes
    for name in ("generated", "data"):
        np.testing.assert_allclose(lines_of(axes)[name].get_ydata(), [row[name] for row in rows])
    ticks = axes.get_xticks()
    assert len(ticks) == 25 and axes.get_xticklabels()[1].get_text() == "ALA2"  # every second of fifty is named
    assert "No residue" in words(rmsf_curve([]))[0]


def test_residue_axis_names_all_of_a_few():
    axes = style.new_figure(2.0).add_subplot()
    residue_axis(axes.yaxis, ["A1", "B2", "C3"])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["A1", "B2", "C3"] and axes.get_ylim() == (-2.1, 4.1)


def test_mean_distances_are_those_of_the_frames(dipeptide, monkeypatch):
    rng = np.random.default_rng(0)
    frames = dipeptide.positions + rng.normal(0, 0.02, (37, 22, 3))
    atoms = [4, 6, 8, 14, 16]
    expected = 10 * np.linalg.norm(frames[:, atoms][:, :, None] - frames[:, atoms][:, None], axis=-1).mean(0)
    np.testing.assert_allclose(mean_distances(frames, atoms), expected, atol=1e-12)
    monkeypatch.setattr("openmm_bg.analysis.distances._PIECE", 25)  # two frames at once, the last one alone
    np.testing.assert_allclose(mean_distances(frames, atoms), expected, atol=1e-12)
    assert mean_distances(frames, atoms)[0, 1] == pytest.approx(10 * pair_distances(frames, atoms)[:, 0].mean())


def test_three_matrices_and_their_difference(dipeptide):
    ours, theirs = np.full((5, 5), 3.0), np.full((5, 5), 2.0)
    theirs[0, 4] = theirs[4, 0] = 3.5
    figure = distance_matrices(ours, theirs, [4, 6, 8, 14, 16], dipeptide.topology)
    images = [axes.images[0] for axes in figure.axes[:3]]
    for image, expected in zip(images, (ours, theirs, ours - theirs), strict=True):
        np.testing.assert_allclose(image.get_array(), expected)
    assert images[0].get_clim() == images[1].get_clim() == (0.0, 3.5) and images[2].get_clim() == (-1.0, 1.0)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["ACE1", "ALA2", "NME3"]
    np.testing.assert_allclose(figure.axes[0].get_xticks(), [0.0, 2.0, 4.0])
    same = distance_matrices(ours, ours, [4, 6, 8, 14, 16], dipeptide.topology).axes[2].images[0]
    assert same.get_clim()[1] > 0


def test_overlaid_frames_are_superposed(dipeptide):
    """Copies that stand anywhere are drawn as one; a mirror image is not."""
    rng = np.random.default_rng(1)
    frame = dipeptide.positions
    copies = np.stack([frame @ rotation(rng) + rng.normal(size=3) for _ in range(5)])
    atoms = [4, 6, 8, 14, 16]

    def segments(figure, panel):
        (found,) = figure.axes[panel].collections
        return np.sort(np.array(found.get_segments()).round(6).reshape(-1, 4), axis=0)

    figure = overlay(copies, copies[:3], dipeptide.topology, atoms)
    bonds = len(trace_paths(dipeptide.topology)[0])
    ours, data = segments(figure, 1), segments(figure, 0)
    assert len(ours) == 5 * bonds and len(data) == 3 * bonds
    np.testing.assert_allclose(ours[::5], data[::3], atol=2e-6)
    assert len(figure.axes[2].collections) == 2  # both kinds
    mirrored = segments(overlay(-copies, copies[:3], dipeptide.topology, atoms), 1)
    assert np.abs(mirrored[::5] - data[::3]).max() > 0.1
    for axes in figure.axes:  # nothing is cut off
        box = np.array([s for c in axes.collections for s in c.get_segments()]).reshape(-1, 2)
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert left < box[:, 0].min() and box[:, 0].max() < right and low < box[:, 1].min() and box[:, 1].max() < high


def test_small_molecules_show_bonds_and_chains_their_trace(dipeptide):
    paths, name = trace_paths(dipeptide.topology)
    assert name == "heavy atoms" and len(paths) == 9 and [4, 6] in paths


def test_the_spline_passes_every_point():
    points = np.random.default_rng(2).normal(size=(2, 5, 3))
    curve = _smooth(points, pieces=4)
    assert curve.shape == (2, 17, 3)
    np.testing.assert_allclose(curve[:, ::4], points, atol=1e-12)
    straight = np.linspace(0, 1, 5)[None, :, None] * np.ones(3)
    np.testing.assert_allclose(_smooth(straight, 4)[0, :, 0], np.linspace(0, 1, 17), atol=1e-12)
    assert _smooth(points[:, :2]).shape == (2, 2, 3)


# ------------------------------------------------------------------ energies, weights, novelty, embedding


def test_energy_marks_are_the_figures():
    rng = np.random.default_rng(3)
    energies = {
        "generated": np.append(rng.normal(3.0, 2.0, 999), np.inf),
        "generated, completed": np.full(50, 1e9),
        "data": rng.normal(0.0, 1.0, 500),
    }
    figure = ensemble_plots.energy_histogram(energies)
    histogram, marks = figure.axes
    drawn = {round(float(line.get_xdata()[0]), 9) for line in marks.lines}
    for name in ("generated", "data"):
        values = energy_figures(energies[name])
        assert {round(values["below_median_mean"], 9), round(values["median"], 9)} <= drawn
    assert "generated, completed (100 % beyond)" in words(figure) and "mean 1e+09 →" in words(figure)
    low, high = histogram.get_xlim()
    assert low < -2 and 6 < high < 30
    for patch in histogram.patches:  # each histogram is a density of all samples: what lies beyond is missing from it
        counts, edges, _ = patch.get_data()
        assert (counts * np.diff(edges)).sum() <= 1.0 + 1e-9
    assert "No frame" in words(ensemble_plots.energy_histogram({"data": [np.inf], "generated": [1.0]}))[0]


def test_cumulative_energies_end_where_finite_samples_end():
    energies = {"data": np.arange(-50.0, 51.0), "generated": np.append(np.full(60, 1e6), np.full(40, np.inf))}
    (axes,) = ensemble_plots.energy_cumulative(energies).axes
    curves = lines_of(axes)
    assert curves["generated"].get_ydata()[-1] == pytest.approx(0.6)
    data = curves["data"]
    assert float(np.interp(0.0, data.get_xdata(), data.get_ydata())) == pytest.approx(0.5, abs=0.01)
    assert axes.get_xlim()[1] > 1e6
    assert "No frame" in words(ensemble_plots.energy_cumulative({"data": [np.nan], "generated": [1.0]}))[0]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((-20.0, 300.0, 10.0), ["−10", "0", "10", "100"]),
        ((-200.0, 3e16, 100.0), ["0", "$10^{6}$", "$10^{10}$", "$10^{14}$"]),
        ((-5.0, 5.0, 10.0), ["−10", "0", "10"]),
    ],
)
def test_ticks_have_room(limits, expected):
    ticks = ensemble_plots._symlog_ticks(*limits)
    assert [ensemble_plots._signed(tick) for tick in ticks] == expected and ticks == sorted(ticks)


def test_weights_of_a_hopeless_flow_leave_something_to_see():
    log_w = -np.geomspace(1.0, 1e18, 500)
    (axes,) = log_weight_histogram({"B": log_w}).axes
    assert axes.get_xlim()[0] == pytest.approx(-4 * np.median(-log_w), rel=0.01)
    gaussian = np.random.default_rng(0).normal(size=5000)
    low = log_weight_histogram({"B": gaussian}).axes[0].get_xlim()[0]
    assert low == pytest.approx(np.quantile(gaussian, 0.002) - 0.5 - 1.0, abs=0.05)  # log of the mean weight: σ²/2


def test_shares_of_the_largest_weights():
    log_w = np.log([0.1, 0.6, 0.2, 0.1])
    (axes,) = ensemble_plots.weight_shares({"A": np.append(log_w, -np.inf), "none": np.full(3, -np.inf)}).axes
    curve = lines_of(axes)["A"]
    np.testing.assert_allclose(curve.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(curve.get_ydata(), [0.6, 0.8, 0.9, 1.0, 1.0])
    equal = lines_of(axes)["equal weights"]
    np.testing.assert_allclose(equal.get_ydata(), equal.get_xdata() / 5)
    assert "none: no sample has a weight" in lines_of(axes)


def test_nearest_frames_and_minimised_ones():
    figure = ensemble_plots.nearest_histogram([1.0, 1.1, np.nan], [0.5], "training")
    assert figure.axes[0].get_xlabel() == "RMSD to the nearest training frame (Å)"
    for patch in figure.axes[0].patches:
        assert patch.get_data()[0].sum() == pytest.approx(1.0)
    assert "No distance" in words(ensemble_plots.nearest_histogram([], [], "training"))[0]
    row = {"rmsd": 0.4, "before": 3.0, "after": -7.0}
    gone = dict.fromkeys(row, math.nan)
    (axes,) = ensemble_plots.minimised_scatter([row, gone], [row]).axes
    assert lines_of(axes)["generated (1 given up)"].get_xydata().tolist() == [[0.4, -7.0]]
    assert ensemble_plots.minimised_scatter([gone], [gone]).axes  # nothing to draw, and no error


def test_embeddings_share_their_limits():
    rng = np.random.default_rng(4)
    found = {"method": "pca", "data": rng.normal(size=(200, 2)), "generated": rng.normal(5.0, 1.0, (100, 2))}
    alone, both = (ensemble_plots.embedding_map(found, w).axes[0] for w in (("data",), ("data", "generated")))
    assert alone.get_xlim() == both.get_xlim() and alone.get_xlim()[1] > 5.0
    assert set(lines_of(alone)) == {"data"} and set(lines_of(both)) == {"data", "generated"}
    assert "principal" in alone.get_xlabel()
    assert ensemble_plots.embedding_map({**found, "method": "umap"}, ("data",)).axes[0].get_ylabel() == "UMAP 2"


# ------------------------------------------------------------------ torsions


def test_bars_of_residues():
    rows = [{"residue": f"LEU{k + 1}", "generated": 0.1 * k, "data": 0.05, "data_time": 0.2} for k in range(5)]
    (axes,) = residue_plots.ramachandran_bars(rows).axes
    np.testing.assert_allclose([p.get_height() for p in axes.patches], [0.0, 0.1, 0.2, 0.3, 0.4])
    assert axes.get_ylim()[1] == pytest.approx(0.46)


def test_maps_of_data_lie_above_those_of_generated_frames():
    data, ours = np.tile([[-1.0, 2.0]], (50, 1)), np.tile([[1.0, -2.0]], (50, 1))

    def where(axes):
        """Bin of the only occupied spot: its φ and ψ."""
        image = np.asarray(axes.images[0].get_array().filled(np.nan))
        ((row, column),) = np.argwhere(np.isfinite(image))
        edges = np.linspace(-np.pi, np.pi, image.shape[0] + 1)
        return pytest.approx((edges[column], edges[row]), abs=2 * np.pi / image.shape[0])

    alone = residue_plots.ramachandran_grid([("ALA2", data, ours)])
    assert (-1.0, 2.0) == where(alone.axes[0]) and (1.0, -2.0) == where(alone.axes[1])
    many = residue_plots.ramachandran_grid([("all", data, ours), ("LEU3", ours, data)])
    assert (-1.0, 2.0) == where(many.axes[0]) and (1.0, -2.0) == where(many.axes[1])
    assert (1.0, -2.0) == where(many.axes[2]) and (-1.0, 2.0) == where(many.axes[3])


def test_chi_fields_and_histograms():
    rows = [
        {"residue": "LEU1", "chi": 1, "generated": 0.3, "data_time": 0.1},
        {"residue": "LEU1", "chi": 2, "generated": 0.4, "data_time": 0.2},
        {"residue": "SER5", "chi": 1, "generated": 0.5, "data_time": 0.3},
    ]
    figure = residue_plots.chi_grid(rows)
    upper, lower = (np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes[:2])
    np.testing.assert_allclose(upper, [[0.3, 0.5], [0.4, np.nan]])
    np.testing.assert_allclose(lower, [[0.1, 0.3], [0.2, np.nan]])
    angles = np.array([1.0, 1.0, -2.0])
    figure = residue_plots.chi_histograms([("LEU1 χ1", angles, angles), ("LEU1 χ2", angles, -angles)])
    data, ours = figure.axes[1].patches
    assert data.get_data()[0].argmax() == 35 - ours.get_data()[0].argmax()
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == ["LEU1 χ1", "LEU1 χ2"]
