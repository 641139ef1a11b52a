"""`openmm-bg evaluate`: the row of the paper's Table 1 for a flow and held-out frames, and what else they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch  # noqa: F401  (before OpenMM, or its torch plugin does not load)
from numpy.typing import NDArray

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.analysis import geometry_checks
from openmm_bg.analysis.density_figures import (
    Samples,
    draw,
    energy_figures,
    frame_energies,
    held_out_nll,
    partial_move_acceptance,
    weight_figures,
)
from openmm_bg.analysis.distances import BATCH, backbone_atoms, delta_d
from openmm_bg.analysis.embedding import Method, choose_method, embed
from openmm_bg.analysis.evaluation import Evaluation, Material
from openmm_bg.analysis.evaluation_input import MIN_FRAMES, check_frames
from openmm_bg.analysis.novelty import heavy_atoms, minimise, nearest_rmsd
from openmm_bg.analysis.residues import chi_distances, ramachandran_distances, residue_rmsf
from openmm_bg.artifact import Flow, topology_digest
from openmm_bg.coordinates import MoleculeGraph, reduction_rmsd
from openmm_bg.energy import make_context
from openmm_bg.errors import InputError
from openmm_bg.progress import progress_bar
from openmm_bg.sampler import BoltzmannGeneratorSampler

Frames = NDArray[np.float32]
Bar = Callable[[int], object]

#: Frames in which clashes are counted, of each kind: pairs of atoms are many.
CLASH_FRAMES = 2000
#: Held-out frames whose frozen copies are looked at.
FROZEN_FRAMES = 500
#: Held-out frames from which partial moves start.
MOVE_FRAMES = 32
#: Generated and held-out frames whose nearest known frame is looked for.
NOVEL_FRAMES = 200
#: The farthest of them, which are minimised.
MINIMISED = 5
#: Frames of each kind in the embedding.
EMBEDDED = 1000


def evaluate(
    flows: Flow | Sequence[Flow],
    positions: Any,
    training: Any = None,
    *,
    n_samples: int = 10_000,
    system: openmm.System | None = None,
    batch: int = BATCH,
    embedding: Method = "auto",
    seed: int = 0,
    platform: str | None = None,
    n_workers: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """How good a flow is, held against MD frames that it has not seen.

    Energies are those of the flow's own System at its own temperature, unless another System is given. A `reduced`
    flow's frames are those at typical values of what it does not model, as in the paper; if it has a completion,
    energies and weights of the completed ones (formula C) stand beside them.

    Parameters
    ----------
    flows : Flow or sequence of Flow
        The first is evaluated; of all, the likelihoods are compared (seeds of one training).
    positions : array_like, shape [n, N, 3]
        nm; held-out frames in the order of time, at least 20.
    training : array_like, shape [m, N, 3], optional
        nm; the frames to which the nearest is looked for. Without them: the first half of ``positions``, against
        which the second half is then held.
    n_samples : int
        Samples of the flow, at least 1.
    system : openmm.System, optional
        Another force field for the same molecule, with the flow's constraints: that of energies, weights,
        moves and minimisations. The temperature stays the flow's.
    batch : int
        Frames in a batch of ΔD.
    embedding : {"auto", "umap", "pca"}
        As in `embedding.embed`.
    seed : int
        Of samples and of every random choice.
    platform, n_workers
        Of the Contexts that evaluate energies; None chooses by timing.
    progress : bool
        Show progress bars.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        Frames of another molecule, too few of them, n_samples < 1, flows of different molecules, or a System that
        cannot be sampled.

    References
    ----------
    Kim et al., arXiv 2401.04246 (2024), Table 1 and Figures 3 and 4.
    """
    several = [flows] if isinstance(flows, Flow) else list(flows)
    check_numbers(several, n_samples, batch, seed)
    embedding = choose_method(embedding)
    flow = several[0]
    topology = flow.topology
    data = check_frames(positions, topology, "the held-out trajectory")
    if len(data) < MIN_FRAMES:
        frames = "One held-out frame is" if len(data) == 1 else f"{len(data)} held-out frames are"
        raise InputError(f"{frames} too few: give at least {MIN_FRAMES}, better {2 * BATCH}.")
    known = None if training is None else check_frames(training, topology, "the training trajectory")
    notes: list[str] = []
    own = flow.system if system is None else system
    if not isinstance(own, openmm.System):
        raise InputError(f"The system must be an openmm.System, not a {type(own).__name__}.")
    if own.getNumParticles() != flow.coordinates.n_atoms:
        raise InputError(
            f"The System has {own.getNumParticles()} particles, the flow's molecule {flow.coordinates.n_atoms}."
        )
    figures: dict[str, Any] = {
        "about": {
            "atoms": flow.coordinates.n_atoms,
            "residues": topology.getNumResidues(),
            "representation": flow.representation,
            "temperature": flow.temperature,
            "system": "the flow's own" if system is None else "another",
            "samples": n_samples,
            "held_out_frames": len(data),
            "training_frames": None if known is None else len(known),
            "seed": seed,
        }
    }
    context = make_context(own)
    context.setPositions(data[0].astype(np.float64))
    with BoltzmannGeneratorSampler(
        flow, context, flow.temperature, seed=seed, platform=platform, n_workers=n_workers
    ) as sampler:
        figures["about"]["platform"] = sampler.pool.platform
        material = _density_part(figures, notes, several, sampler, data, n_samples, seed, progress)
        figures["reduction"] = _reduction(flow, data)
        generated = material.generated
        if len(generated) == 0:
            raise InputError("Not one sample lies in the domain of the coordinates: the flow is not fit for use.")
        _structure_part(figures, notes, topology, generated, data, known, batch, embedding, seed, progress)
        figures["novelty"] = _novelty_part(notes, sampler, generated, data, known, seed, progress)
    return Evaluation(figures, tuple(notes), material)


def check_numbers(flows: list[Flow], n_samples: Any, batch: Any, seed: Any) -> None:
    """Refuse numbers that are none, and flows that do not compare, with an `InputError`."""
    if not flows or not all(isinstance(flow, Flow) for flow in flows):
        raise InputError("Give a Flow, or a sequence of at least one.")
    for name, value, least in (("number of samples", n_samples, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"The {name} must be a whole number of at least {least}, got {value!r}.")
    for k, other in enumerate(flows[1:], start=2):
        if topology_digest(other.topology) != topology_digest(flows[0].topology):
            raise InputError(f"Flow {k} is of another molecule than the first: give flows of one molecule.")
        if other.representation != flows[0].representation:
            raise InputError(
                f"Flow {k} is {other.representation}, the first {flows[0].representation}: their likelihoods are of "
                "different coordinates and do not compare."
            )


@contextmanager
def _bar(what: str, total: int, shown: bool) -> Iterator[Bar]:
    with progress_bar(total=total, desc=what, shown=shown, leave=False) as bar:
        yield bar.update


def _evenly(frames: Frames, n: int) -> Frames:
    """At most n frames, evenly spread."""
    return frames[np.linspace(0, len(frames) - 1, min(n, len(frames))).astype(int)]


def _density_part(
    figures: dict[str, Any],
    notes: list[str],
    flows: list[Flow],
    sampler: BoltzmannGeneratorSampler,
    data: Frames,
    n_samples: int,
    seed: int,
    progress: bool,
) -> Material:
    """Samples, energies, weights, likelihoods and moves; what they were computed from is returned."""
    rigid = sampler.label == "rigid"
    with _bar("samples", n_samples, progress) as advance:
        found: Samples = draw(sampler, n_samples, completion=False, advance=advance)
    ours = "generated, rigid" if rigid else "generated"
    material = Material(found.positions, data, {ours: found.energies}, [found.log_weights])
    figures["weights"] = [weight_figures(found.log_weights, "B" if rigid else "A", found.label)]
    if rigid:
        notes.append(
            "Structures and rigid energies have typical bond lengths and angles: their energies lack about kT/2 for "
            "each coordinate that is kept, and do not compare with the data's."
        )
    if rigid and sampler.flow.completion is not None:
        with _bar("completed samples", n_samples, progress) as advance:
            completed = draw(sampler, n_samples, completion=True, advance=advance)
        material.energies["generated, completed"] = completed.energies
        material.log_weights.append(completed.log_weights)
        figures["weights"].append(weight_figures(completed.log_weights, "C", completed.label))
        del completed
    elif rigid:
        notes.append("The flow has no completion: there are no exact weights (formula C), train it anew for them.")
    with _bar("energies of the data", len(data), progress) as advance:
        material.energies["data"] = frame_energies(sampler, data, advance)
    figures["energies"] = {name: energy_figures(values) for name, values in material.energies.items()}
    nlls = []
    with _bar("likelihood of the data", len(data) * len(flows), progress) as advance:
        for flow in flows:
            device = sampler.device if flow is sampler.flow else None
            nlls.append(held_out_nll(flow, data, device, advance))
    figures["nll"] = {"flows": nlls}
    for key in ("per_dof", "total"):
        values = np.array([row[key] for row in nlls])
        figures["nll"][f"{key}_mean"] = float(values.mean())
        figures["nll"][f"{key}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    if nlls[0]["outside"]:
        notes.append(
            f"{nlls[0]['outside']} of {len(data)} held-out frames lie outside the sectors that the flow models; the "
            "NLL leaves them out."
        )
    starts = _evenly(data, MOVE_FRAMES)
    with _bar("partial moves", len(starts), progress) as advance:
        figures["moves"] = partial_move_acceptance(sampler, starts, seed=seed + 1, advance=advance)
    if len(found.positions) < n_samples:
        notes.append(f"{n_samples - len(found.positions)} samples lie outside the domain of the coordinates.")
    return material


def _reduction(flow: Flow, data: Frames) -> dict[str, float] | None:
    """RMSD (Å) from MD frames to their copies at typical values of what a `reduced` flow does not model."""
    if flow.representation != "reduced":
        return None
    some = _evenly(data, FROZEN_FRAMES)
    found = reduction_rmsd(flow.coordinates, flow.topology, some)
    figures: dict[str, float] = {"frames": len(some)}
    for name in ("heavy", "backbone"):
        values = 10.0 * getattr(found, name)
        figures |= {name: float(values.mean()), f"{name}_largest": float(values.max())}
    return figures


def _structure_part(
    figures: dict[str, Any],
    notes: list[str],
    topology: Any,
    generated: Frames,
    data: Frames,
    known: Frames | None,
    batch: int,
    embedding: Method,
    seed: int,
    progress: bool,
) -> None:
    """ΔD, residues, clashes, stereochemistry and the embedding; None where the molecule has no such thing."""
    atoms, name = backbone_atoms(topology)
    figures["delta_d"] = None
    if atoms.size >= 2:
        found = delta_d(generated, data, atoms, training=known, batch=batch, seed=seed)
        figures["delta_d"] = {**found, "atoms": name}
        size = figures["delta_d"]["batch"]
        if size < batch:
            notes.append(
                f"ΔD is of batches of {size} frames, not {batch}: there are {len(generated)} generated and {len(data)} "
                "held-out ones."
            )
        if len(data) < 2 * size:
            notes.append("Data against data pairs each held-out frame twice: there are fewer than two batches of them.")
    else:
        notes.append("ΔD is left out: the molecule has no two backbone atoms.")
    peptide = any(MoleculeGraph(topology).peptide_backbone())
    if not peptide:
        notes.append("The molecule has no amino acids: Ramachandran and χ rows are left out.")
    fit = atoms if atoms.size >= 3 else heavy_atoms(topology)
    figures["rmsf"] = residue_rmsf(generated, data, topology, fit)
    figures["ramachandran"] = (ramachandran_distances(generated, data, topology, seed) or None) if peptide else None
    figures["chi"] = (chi_distances(generated, data, topology, seed) or None) if peptide else None
    for key, what in (("ramachandran", "residue has both φ and ψ"), ("chi", "residue has a side chain torsion χ")):
        if peptide and figures[key] is None:
            notes.append(f"No {what}: its distances are left out.")
    few, some = _evenly(generated, CLASH_FRAMES), _evenly(data, CLASH_FRAMES)
    with _bar("clashes", len(few) + len(some), progress) as advance:
        figures["clashes"] = {
            "heavy_distance": geometry_checks.HEAVY_CLASH,
            "hydrogen_distance": geometry_checks.HYDROGEN_CLASH,
            "generated": geometry_checks.count_clashes(few, topology, advance),
            "data": geometry_checks.count_clashes(some, topology, advance),
        }
    chirality = geometry_checks.chirality(generated, data, topology)
    amides = geometry_checks.cis_amides(generated, data, topology)
    figures["chirality"] = chirality if chirality["centres"] else None
    figures["cis_amides"] = amides if amides["bonds"] else None
    if not chirality["centres"]:
        notes.append("The molecule has no stereocentre: the chirality row is left out.")
    figures["embedding"] = None
    if atoms.size >= 3:
        found = embed(_evenly(generated, EMBEDDED), _evenly(data, EMBEDDED), atoms, method=embedding, seed=seed)
        for key in ("generated", "data"):
            found[key] = np.round(found[key], 3)
        figures["embedding"] = found
    else:
        notes.append("The embedding is left out: the molecule has no three backbone atoms.")


def _novelty_part(
    notes: list[str],
    sampler: BoltzmannGeneratorSampler,
    generated: Frames,
    data: Frames,
    known: Frames | None,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Nearest known frames of generated and of held-out ones, and minimisation of the farthest of both."""
    atoms = heavy_atoms(sampler.flow.topology)
    reference = "training"
    if known is None:
        known, data, reference = data[: len(data) // 2], data[len(data) // 2 :], "held-out"
        notes.append(
            "Without training frames the nearest frame is looked for in the first half of the held-out ones, and the "
            "second half is what generated frames are held against."
        )
    ours = generated[np.random.default_rng(seed).permutation(len(generated))[:NOVEL_FRAMES]]
    theirs = _evenly(data, NOVEL_FRAMES)
    with _bar("nearest frames", len(ours) + len(theirs), progress) as advance:
        near, near_data = (nearest_rmsd(x, known, atoms, advance) for x in (ours, theirs))
    # Minimisation needs a Context; where a twin evaluates energies, OpenMM's own choice has to do.
    twin = sampler.pool.platform.startswith("twin")
    named = [] if twin else [openmm.Platform.getPlatformByName(sampler.pool.platform)]
    context = openmm.Context(sampler.context.getSystem(), openmm.VerletIntegrator(0.001), *named)
    far, far_data = np.argsort(-near)[:MINIMISED], np.argsort(-near_data)[:MINIMISED]
    with _bar("minimisation", len(far) + len(far_data), progress) as advance:
        minimised = minimise(context, ours[far], atoms, advance=advance)
        minimised_data = minimise(context, theirs[far_data], atoms, advance=advance)
    return {
        "reference": reference,
        "known": len(known),
        "generated": near,
        "data": near_data,
        "minimised": [{"nearest": float(near[k]), **row} for k, row in zip(far, minimised, strict=True)],
        "minimised_data": [
            {"nearest": float(near_data[k]), **row} for k, row in zip(far_data, minimised_data, strict=True)
        ],
    }
