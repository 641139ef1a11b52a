"""Fit of the completion g(s|y) to MD frames, after the flow: what gives a `reduced` flow the exact weights of C."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_bg.coordinates import CoordinateMap, MoleculeGraph, wrap
from openmm_bg.errors import InputError
from openmm_bg.flow.completion import Completion, CompletionLayout
from openmm_bg.training.dataset import Dataset, cumulative_weights, draw_indices, spread

logger = logging.getLogger(__name__)

#: A dihedral of s at least this concentrated (mean resultant length; a width of 26 degrees) is Gaussian in a window of
#: ±π, seven widths, and may be tied to its neighbours as the dihedrals of a flat ring are. Broader ones are von Mises.
NARROW = 0.9
#: Coordinates whose atoms are at most this many bonds apart may be tied to each other.
REACH = 4
#: Frames that take part, evenly spaced: more would not make so simple a density better.
MOST_FRAMES = 50_000
#: Frames from which the first guess of the ties is made.
GUESS_FRAMES = 20_000


@dataclass(frozen=True)
class FitOptions:
    """How long and how fast g is fitted; a few seconds for a dipeptide.

    Attributes
    ----------
    batch_size
        Frames per step.
    epochs, least_steps, most_steps
        Steps are those of ``epochs``, but within the two bounds.
    learning_rate
        Of Adam at the start; it falls along half a cosine.
    validate_every
        Steps between validations; the weights of the best one are kept.
    hidden, n_hidden
        Of the networks.
    """

    batch_size: int = 512
    epochs: float = 40.0
    least_steps: int = 500
    most_steps: int = 4000
    learning_rate: float = 2e-3
    validate_every: int = 100
    hidden: int = 64
    n_hidden: int = 2

    def steps(self, n_frames: int) -> int:
        """Number of steps for this many frames."""
        return min(self.most_steps, max(self.least_steps, math.ceil(self.epochs * n_frames / self.batch_size)))


def free_columns(coordinates: CoordinateMap) -> list[int]:
    """Columns of s [B, S] that no constraint holds: those that g covers."""
    fixed = [c for c in coordinates.coordinates if not c.modelled]
    return [k for k, c in enumerate(fixed) if not c.constrained]


def fit_completion(
    coordinates: CoordinateMap,
    topology: Any,
    train: Dataset,
    validation: Dataset | None,
    *,
    seed: int = 0,
    options: FitOptions | None = None,
) -> tuple[Completion, dict[str, float]]:
    """g(s|y) of a molecule, from its frames.

    Identical hydrogens of a methyl group change places at random in every frame: the flow draws all their labellings,
    of which MD may have visited one only.

    Parameters
    ----------
    coordinates, topology
        The map that made the frames, and the molecule.
    train, validation
        Frames as (y, s), with their weights; without validation frames the last parameters are kept.
    seed
        Of initial weights, relabelling and batches; torch's global generator is left as it was.
    options
        Length of the fit.

    Returns
    -------
    completion : Completion
        In eval mode.
    record : dict
        Steps, and NLL (nats per frame, over all completed coordinates) of the last 100 batches and of validation.

    Raises
    ------
    InputError
        Every coordinate is modelled or constrained; no frame has a weight.
    """
    options = options or FitOptions()
    columns = free_columns(coordinates)
    if not columns:
        raise InputError("There is nothing to complete: every coordinate is modelled or constrained.")
    fixed = [c for c in coordinates.coordinates if not c.modelled]
    free = [fixed[k] for k in columns]
    graph = MoleculeGraph(topology)
    distance = {atom: graph.distances(atom) for atom in {c.atom for c in free}}
    coupled = torch.tensor([[distance[a.atom].get(b.atom, REACH + 1) <= REACH for b in free] for a in free])
    generator = torch.Generator().manual_seed(seed)

    def parts(data: Dataset) -> tuple[Tensor, Tensor, Tensor | None]:
        some = data if len(data) <= MOST_FRAMES else data[spread(len(data), MOST_FRAMES)]
        some = some.to("cpu")
        y, s = relabel(coordinates, some.y, some.s, generator)
        return y, s[:, columns], some.log_weights

    y, s, log_weights = parts(train)
    periodic = [c.kind == "dihedral" for c in free]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout = describe(s, periodic, log_weights)
        completion = Completion(coordinates.layout, layout, coupled, options.hidden, options.n_hidden)
    held = None if validation is None else parts(validation)
    record = fit(completion, y, s, log_weights, held, generator=generator, options=options)
    shown = record.get("validation_nll", record["nll"])
    logger.info("Completion of %d coordinates: %.3f nats per frame.", len(columns), shown)
    return completion, record


def relabel(coordinates: CoordinateMap, y: Tensor, s: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The frames (y [B, D], s [B, S]) with the hydrogens of each methyl group permuted cyclically at random."""
    zmatrix = coordinates.zmatrix
    groups = [[zmatrix.rows[row][0] for row in triple] for triple in zmatrix.triple]
    if not groups:
        return y, s
    ys, ss = [], []
    for y_part, s_part in zip(y.split(2048), s.split(2048), strict=True):
        x = coordinates.to_positions(y_part, s_part)
        rows = torch.arange(len(x))[:, None]
        for atoms in groups:
            turn = torch.randint(3, (len(x), 1), generator=generator)
            source = torch.tensor(atoms)[(torch.arange(3) + turn) % 3]
            x[:, atoms] = x[rows, source]
        y_new, s_new = coordinates.to_internal(x)
        ys.append(y_new)
        ss.append(s_new)
    return torch.cat(ys), torch.cat(ss)


def describe(s: Tensor, periodic: list[bool], log_weights: Tensor | None = None) -> CompletionLayout:
    """Layout of completed coordinates from data [n, F]: what is broad on its circle, means and widths of the rest.

    Parameters
    ----------
    s
        [n, F] nm or rad.
    periodic
        [F], angles modulo 2π.
    log_weights
        [n], up to a constant.

    Raises
    ------
    InputError
        No frame has a weight.
    """
    weight = _normalised(log_weights, len(s))
    circular, shift, scale = [], [], []
    for k, angle in enumerate(periodic):
        x, centre = s[:, k], 0.0
        broad = False
        if angle:
            c, d = float((weight * x.cos()).sum()), float((weight * x.sin()).sum())
            broad, centre = math.hypot(c, d) < NARROW, math.atan2(d, c)
            x = wrap(x - centre)
        mean = float((weight * x).sum())
        width = float((weight * (x - mean).square()).sum().sqrt())
        circular.append(broad)
        shift.append(0.0 if broad else centre + mean)
        # A coordinate that never moved in the data still needs a density.
        scale.append(1.0 if broad else max(width, 1e-5))
    return CompletionLayout(circular, list(periodic), shift, scale)


def fit(
    completion: Completion,
    y: Tensor,
    s: Tensor,
    log_weights: Tensor | None = None,
    validation: tuple[Tensor, Tensor, Tensor | None] | None = None,
    *,
    generator: torch.Generator | None = None,
    options: FitOptions | None = None,
) -> dict[str, float]:
    """Minimise the NLL -E[log g(s|y)] over frames y [n, D], s [n, F]; weighted frames are drawn by their weights.

    Parameters
    ----------
    completion
        Changed in place and left in eval mode.
    y, s, log_weights
        [n, D], [n, F], and [n] or None.
    validation
        The same three of held-out frames.
    generator
        Of the batches.
    options
        Length of the fit.

    Returns
    -------
    dict
        ``steps``, ``nll`` and, with validation frames, ``validation_nll``.

    Raises
    ------
    InputError
        y and s have different numbers of rows; no frame has a weight.
    """
    options = options or FitOptions()
    if len(y) != len(s) or len(s) == 0:
        raise InputError(f"A completion is fitted to as many y as s, at least one: got {len(y)} and {len(s)}.")
    generator = generator or torch.Generator().manual_seed(0)
    y, s = y.detach().double(), s.detach().double()
    _first_guess(completion, s, log_weights)
    cumulative = cumulative_weights(log_weights)
    y_single, s_single = y.float(), s.float()  # five digits of a coordinate's width; weights are computed in float64
    parameters = list(completion.parameters())
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    steps = options.steps(len(s))
    best, best_state = math.inf, None
    recent: list[float] = []
    completion.train()
    for step in range(steps + 1):
        if validation is not None and (step % options.validate_every == 0 or step == steps):
            value = mean_nll(completion, *validation)
            if value < best:
                best, best_state = value, {k: v.detach().clone() for k, v in completion.state_dict().items()}
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        index = draw_indices(len(s), options.batch_size, generator, cumulative)
        loss = -completion.log_prob(s_single[index], y_single[index]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 100.0)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        recent = [*recent[-99:], float(loss.detach())]
    if best_state is not None:
        completion.load_state_dict(best_state)
    completion.eval()
    record = {"steps": float(steps), "nll": float(np.mean(recent))}
    if validation is not None:
        record["validation_nll"] = best
    return record


def mean_nll(completion: Completion, y: Tensor, s: Tensor, log_weights: Tensor | None = None) -> float:
    """-E[log g(s|y)] over at most 8192 frames, nats."""
    rows = spread(len(s), 8192)
    weight = _normalised(None if log_weights is None else log_weights[rows], len(rows))
    with torch.no_grad():
        return -float((weight * completion.log_prob(s[rows].double(), y[rows].double())).sum())


def _normalised(log_weights: Tensor | None, n: int) -> Tensor:
    """[n] weights that add up to one."""
    if log_weights is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    weight = torch.softmax(log_weights.double().cpu(), dim=0)
    if not bool(torch.isfinite(weight).all()):
        raise InputError("No frame for the completion has a weight, check log_weights.")
    return weight


def _first_guess(completion: Completion, s: Tensor, log_weights: Tensor | None) -> None:
    """Widths and ties from regressions of each coordinate on its predecessors, directions from circular means.

    Gradient descent alone would take long to find the strong ties of rings and of angles around one atom.
    """
    rows = spread(len(s), GUESS_FRAMES)
    weight = _normalised(None if log_weights is None else log_weights[rows], len(rows))
    s = s[rows]
    with torch.no_grad():
        angles = s[:, completion.circular]
        for k in range(completion.n_circular):
            c, d = ((weight * f(angles[:, k])).sum() for f in (torch.cos, torch.sin))
            mean = torch.hypot(c, d).clamp(max=0.99)
            kappa = mean * (2.0 - mean**2) / (1.0 - mean**2)  # Banerjee et al., J. Mach. Learn. Res. 6, 1345 (2005)
            angle = torch.atan2(d, c)
            completion.direction[k] = kappa * torch.cos(angle)
            completion.direction[completion.n_circular + k] = kappa * torch.sin(angle)
        if completion.n_linear == 0:
            return
        v = s[:, completion.linear] - completion.shift.t()
        v = torch.where(completion.window.t(), wrap(v), v) / completion.scale.t()
        covariance = (v * weight[:, None]).t() @ v
        n_effective = float(1.0 / weight.square().sum())
        for i in range(completion.n_linear):
            before = completion.mask[i].nonzero()[:, 0]
            residual = covariance[i, i]
            if len(before):
                # The ridge keeps few frames from tying what only chance ties.
                ridge = 1e-4 + 0.1 * len(before) / n_effective
                gram = covariance[before][:, before] + ridge * torch.eye(len(before), dtype=v.dtype)
                shared = covariance[before, i]
                slope = torch.linalg.solve(gram, shared)
                completion.coupling[i, before] = -slope.to(completion.coupling.dtype)
                residual = residual - 2.0 * slope @ shared + slope @ covariance[before][:, before] @ slope
            completion.log_width[i] = 0.5 * torch.log(residual.clamp(min=1e-6))
