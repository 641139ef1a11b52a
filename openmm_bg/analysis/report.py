"""The page of ``openmm-bg report``: an `Evaluation` as the paper's Table 1, Figures 3 and 4, and what else it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_bg.analysis import ensemble_plots, structure_plots
from openmm_bg.analysis.distances import backbone_atoms, mean_distances
from openmm_bg.analysis.evaluation import Evaluation, Material
from openmm_bg.analysis.novelty import heavy_atoms
from openmm_bg.analysis.page import Block, Paragraph, Picture, Row, Section, Table, write_page
from openmm_bg.analysis.plots import log_weight_histogram
from openmm_bg.analysis.report_text import (
    checks_table,
    energy_words,
    highlights,
    lead,
    minimisation_table,
    number,
    table_one,
    title,
    warnings,
    weights_table,
)
from openmm_bg.analysis.residue_plots import chi_grid, chi_histograms, ramachandran_bars, ramachandran_grid
from openmm_bg.analysis.residues import chi_torsions, ramachandran_torsions
from openmm_bg.analysis.training_plots import loss_curve
from openmm_bg.artifact import Flow
from openmm_bg.errors import InputError
from openmm_bg.progress import progress_bar

__all__ = ["report_page"]

#: Frames of each kind in the picture of overlaid structures.
OVERLAID = 12
#: Residues whose (φ, ψ) and torsions whose χ are shown one by one: those that differ most.
SHOWN = 6


def report_page(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    flow: Flow,
    history: Sequence[Mapping[str, Any]] = (),
    provenance: Sequence[tuple[str, str]] = (),
    *,
    progress: bool = False,
) -> Path:
    """Write the report of an evaluation as one HTML file that loads nothing from anywhere.

    Sections that the molecule does not have are left out; the evaluation's notes say which.

    Parameters
    ----------
    path
        Of the HTML file; its folder must exist, an earlier file is replaced in one step.
    evaluation : Evaluation
        From `evaluate`, with its material.
    flow : Flow
        The one that was evaluated.
    history
        The loss curve: rows with keys of `openmm_bg.training.history.COLUMNS`; none leaves the section out.
    provenance
        (name, value) pairs of files, versions, seeds and dates.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        The evaluation has no material (it was read back, say), or the file cannot be written.

    References
    ----------
    Kim et al., arXiv 2401.04246 (2024), Table 1 and Figures 3 and 4.
    """
    if evaluation.material is None:
        raise InputError("The evaluation has no frames: make the report from what evaluate() returned.")
    figures, material = evaluation.figures, evaluation.material
    builders: list[tuple[str, Callable[[], Section | None]]] = [
        ("table", lambda: _table_section(figures)),
        ("structures", lambda: _structure_section(figures, material, flow)),
        ("energies", lambda: _energy_section(figures, material)),
        ("weights", lambda: _weight_section(figures, material)),
        ("backbone torsions", lambda: _ramachandran_section(figures, material, flow)),
        ("side chains", lambda: _chi_section(figures, material, flow)),
        ("checks", lambda: _check_section(figures)),
        ("novelty", lambda: _novelty_section(figures)),
        ("training", lambda: _training_section(history)),
        ("notes", lambda: _list_section("What to bear in mind", evaluation.notes)),
        ("provenance", lambda: _provenance_section(provenance)),
    ]

    def sections() -> Iterator[Section]:  # one at a time: what takes long is the drawing of each, by write_page
        with progress_bar(builders, desc="page", shown=progress, leave=False) as bar:
            for name, build in bar:
                bar.set_postfix_str(name)
                section = build()
                if section is not None:
                    yield section

    return write_page(path, title(figures), lead(figures), sections(), highlights(figures), warnings(figures))


def _table_section(figures: dict[str, Any]) -> Section:
    return Section(
        "The row of Table 1",
        [
            Paragraph(
                "Kim et al. (arXiv 2401.04246) judge a flow by these figures. ΔD pairs generated and held-out frames "
                "at random and averages the difference of all distances between backbone atoms: the value of data "
                "against data is the best there is, and one below it means too little spread. Energies are given "
                "below the median, because a few clashes own the mean of all of them. NLL is how unlikely held-out "
                "frames are under the flow: lower is better, and only flows of one representation compare."
            ),
            Table(("figure", "generated", "data", "in words"), table_one(figures), text_last=True),
        ],
    )


def _structure_section(figures: dict[str, Any], material: Material, flow: Flow) -> Section:
    topology = flow.topology
    atoms, name = backbone_atoms(topology)
    fit = atoms if atoms.size >= 3 else heavy_atoms(topology)
    blocks: list[Block] = [
        Picture(
            structure_plots.rmsf_curve(figures["rmsf"]),
            "Root mean square fluctuation of each residue, generated frames and data",
            "RMSF of the heavy atoms of each residue about the mean structure, backbone superposed. The curves should "
            "lie on one another: a generated chain that moves less has lost states, one that moves more has unfolded.",
        )
    ]
    if atoms.size >= 3:
        ours, theirs = (mean_distances(x, atoms) for x in (material.generated, material.data))
        blocks.append(
            Picture(
                structure_plots.distance_matrices(ours, theirs, atoms, topology),
                "Mean distance matrices of backbone atoms: generated, data, and their difference",
                f"Mean distances between backbone atoms ({name}). Left and middle should look alike; on the right, "
                "purple pairs are too far apart in generated frames and orange ones too near. The largest difference "
                f"is {number(float(np.abs(ours - theirs).max()))} Å.",
            )
        )
    what = structure_plots.trace_paths(topology)[1]
    blocks.append(
        Picture(
            structure_plots.overlay(_evenly(material.generated), _evenly(material.data), topology, fit),
            "Overlaid structures of data and generated frames from two directions",
            f"Up to {OVERLAID} frames of each kind ({what}), superposed on the mean of the data's, seen along the "
            "direction in which the molecule is thinnest and turned by 90°. Paler lines lie further back.",
        )
    )
    embedding = figures["embedding"]
    if embedding is not None:
        how = (
            "UMAP of the distances between backbone atoms"
            if embedding["method"] == "umap"
            else "First two principal components of the distances between backbone atoms, "
            f"{100 * embedding['explained']:.0f}\u00a0% of the data's variance"
        )
        blocks.append(
            Row(
                [
                    Picture(
                        ensemble_plots.embedding_map(embedding, ("data",)),
                        "Embedding of the data in two dimensions",
                        f"{how}, fitted to the data.",
                    ),
                    Picture(
                        ensemble_plots.embedding_map(embedding, ("data", "generated")),
                        "Embedding of the data with generated frames above them",
                        "The same with generated frames above: they should cover every cloud of dots, and no more.",
                    ),
                ]
            )
        )
    return Section("Structures", blocks)


def _evenly(frames: Any) -> Any:
    return frames[np.linspace(0, len(frames) - 1, min(OVERLAID, len(frames))).astype(int)]


def _energy_section(figures: dict[str, Any], material: Material) -> Section:
    return Section(
        "Energies",
        [
            Paragraph(energy_words(figures)),
            Row(
                [
                    Picture(
                        ensemble_plots.energy_histogram(material.energies),
                        "Histograms of the potential energy of data and generated frames",
                        "Histograms near the data. Below them: the mean (dot) and standard deviation (bar) of the "
                        "energies below the median, and the median (tick).",
                    ),
                    Picture(
                        ensemble_plots.energy_cumulative(material.energies),
                        "Share of frames below an energy, on an axis that becomes logarithmic far from the data",
                        "The same energies in full. The axis is logarithmic far from the data's median, so that "
                        "clashes of any energy have their place.",
                    ),
                ]
            ),
        ],
    )


def _weight_section(figures: dict[str, Any], material: Material) -> Section:
    named = {
        f"formula {row['formula']} ({row['label']})": values
        for row, values in zip(figures["weights"], material.log_weights, strict=True)
    }
    blocks: list[Block] = [
        Paragraph(
            "Importance weights turn samples of the flow into averages of the force field. The effective sample size "
            "(ESS) is the share that they are worth; Pareto's k̂ measures the tail of the largest weights, and above "
            "its limit error bars deserve no trust. Moves need no weights: each is accepted or rejected exactly."
        ),
        Table(("", "value", "in words"), weights_table(figures), text_last=True),
        Picture(
            log_weight_histogram(named),
            "Histogram of the logarithm of the importance weights",
            "Logarithms of the weights, counted from the mean weight (dashed). A perfect flow would put every sample "
            "there. A tail to the left only wastes samples; the few on the far right decide everything.",
        ),
        Picture(
            ensemble_plots.weight_shares(named),
            "Share of all weight that the largest weights carry",
            "Share of all weight that the samples with the largest weights carry together. The nearer to the dashed "
            "line, the better; a curve that is high at 1 says that one sample decides.",
        ),
    ]
    return Section("Weights and moves", blocks)


def _ramachandran_section(figures: dict[str, Any], material: Material, flow: Flow) -> Section | None:
    rows = figures["ramachandran"]
    if not rows:
        return None
    torsions = ramachandran_torsions(flow.topology)
    alone = len(torsions) == 1
    worst = [torsions[k] for k in _worst(rows, 1 if alone else SHOWN - 1)]
    data, ours = ([t.angles(x) for t in worst] for x in (material.data, material.generated))
    maps: list[tuple[str, Any, Any]] = [(t.residue, a, b) for t, a, b in zip(worst, data, ours, strict=True)]
    if not alone:
        every, all_ours = (
            np.concatenate([t.angles(_thin(x)) for t in torsions]) for x in (material.data, material.generated)
        )
        maps = [("all residues", every, all_ours), *maps]
    which = "" if alone else " of all residues together, and of those that differ most"
    return Section(
        "Backbone torsions",
        [
            Picture(
                ramachandran_bars(rows),
                "Jensen-Shannon divergence between the distributions of φ and ψ, residue by residue",
                "How far the distributions of (φ, ψ) lie apart: 0 bits for equal ones, 1 for ones that never meet. "
                "Bars should end near the black dashes, what two random halves of the data have between them; orange "
                "diamonds are what the MD does not agree on with itself between its first and second half.",
            ),
            Picture(
                ramachandran_grid(maps),
                "Maps of φ and ψ of data and generated frames",
                f"Free energy over φ and ψ{which}. White: no frame.",
            ),
        ],
    )


def _chi_section(figures: dict[str, Any], material: Material, flow: Flow) -> Section | None:
    rows = figures["chi"]
    if not rows:
        return None
    torsions = chi_torsions(flow.topology)
    shown = []
    for k in _worst(rows):
        t = torsions[k]
        name = f"{t.residue} χ{t.number}" + (", doubled" if t.fold else "")
        shown.append((name, t.angles(material.data)[:, 0], t.angles(material.generated)[:, 0]))
    return Section(
        "Side chain torsions",
        [
            Picture(
                chi_grid(rows),
                "Jensen-Shannon divergence of each side chain torsion, generated against data and data against data",
                "How far the distributions of each χ lie apart. The upper field should be as dark as the lower one.",
            ),
            Picture(
                chi_histograms(shown),
                "Histograms of the side chain torsions that differ most",
                "The χ that differ most. “Doubled”: half a turn exchanges equal atoms, so that twice the angle is "
                "shown.",
            ),
        ],
    )


def _worst(rows: Sequence[Mapping[str, Any]], most: int = SHOWN) -> list[int]:
    """Places of the rows that differ most, in the order of the residues."""
    order = np.argsort([-row["generated"] for row in rows], kind="stable")[:most]
    return sorted(int(k) for k in order)


def _thin(frames: Any, most: int = 2000) -> Any:
    return frames[np.linspace(0, len(frames) - 1, min(most, len(frames))).astype(int)]


def _check_section(figures: dict[str, Any]) -> Section:
    return Section(
        "What hardly ever happens in MD",
        [
            Paragraph(
                "Atoms inside one another, centres of the wrong hand, amides turned to cis. Raw samples of a flow may "
                "have them; exact weights and moves let none of the impossible ones through."
            ),
            Table(("", "generated", "data", "in words"), checks_table(figures), text_last=True),
        ],
    )


def _novelty_section(figures: dict[str, Any]) -> Section:
    found = figures["novelty"]
    reference = f"{found['known']:,} {found['reference']} frames"
    blocks: list[Block] = [
        Paragraph(
            "Does the flow repeat what it has seen? Each frame's RMSD of heavy atoms to the nearest of "
            f"{reference} is held against that of MD frames. The farthest of both kinds are then minimised: sound ones "
            "lose energy and stay where they are."
        ),
        Row(
            [
                Picture(
                    ensemble_plots.nearest_histogram(found["generated"], found["data"], found["reference"]),
                    "Histogram of the RMSD to the nearest known frame, generated and held-out frames",
                    "New frames lie as far from known ones as held-out MD frames do. Much nearer: learned by heart; "
                    "much farther: no conformation of this molecule's MD.",
                ),
                Picture(
                    ensemble_plots.minimised_scatter(found["minimised"], found["minimised_data"]),
                    "Energy after minimisation against the distance that the frame moved, generated and held-out",
                    "The farthest frames after minimisation. Generated ones should end near held-out ones: at their "
                    "energies, without having moved much farther.",
                ),
            ]
        ),
        Table(
            ("minimised", "RMSD to the nearest", "moved", "energy before", "energy after"),
            minimisation_table(found),
            caption="The farthest frames, before and after minimisation; Å and kcal/mol",
        ),
    ]
    return Section("Novelty", blocks)


def _training_section(history: Sequence[Mapping[str, Any]]) -> Section | None:
    if not history:
        return None
    return Section(
        "Training",
        [
            Picture(
                loss_curve(history),
                "Losses during training, stage by stage",
                "Losses against time, one stage after another: moving averages over faint single steps. Black dots "
                "are MD frames that training never saw; if they rise while the blue line falls, the flow learns its "
                "data by heart.",
            )
        ],
    )


def _list_section(heading: str, sentences: Sequence[str]) -> Section | None:
    return Section(heading, [Paragraph(text) for text in sentences]) if sentences else None


def _provenance_section(rows: Sequence[tuple[str, str]]) -> Section | None:
    if not rows:
        return None
    return Section("Where this comes from", [Table(("what", "which"), rows, text_last=True)])
