"""What an artifact remembers of its making."""

from __future__ import annotations

import datetime
import logging
import platform as machine
import time
from typing import Any

import torch

from openmm_bg.progress import progress_bar

import openmm  # isort: skip  (after torch: OpenMM's torch plugin loads only then)

from openmm_bg.coordinates import CoordinateMap
from openmm_bg.flow.completion import Completion
from openmm_bg.training.completion import free_columns
from openmm_bg.training.sharing import share_density
from openmm_bg.training.trainer import Trainer
from openmm_bg.weights import effective_sample_size

logger = logging.getLogger(__name__)

#: Flow samples whose weights go into the record: at most so many, or as many as there is time for (s).
RECORD_SAMPLES = 10_000
RECORD_SECONDS = 120.0
RECORD_BATCH = 500


def training_record(
    trainer: Trainer,
    density: torch.nn.Module,
    coordinates: CoordinateMap,
    n_frames: int,
    completion: Completion | None,
) -> dict[str, Any]:
    """Configuration, length and figures of a training, among them the ESS of samples on the System trained for.

    Of a flow with a completion also that of formula C of docs/theory.md. Large molecules are not worth an hour for it:
    sampling ends after `RECORD_SECONDS`, and the record says how many samples there were.
    """
    n_energies = trainer.objective.n_energies  # before those of the record itself
    shared, target = share_density(density, trainer.ranks, trainer.config.seed), trainer.objective.target
    log_w: list[torch.Tensor] = []
    log_w_completed: list[torch.Tensor] = []
    columns = free_columns(coordinates)
    shown = trainer.progress and trainer.ranks.is_main
    bar = progress_bar(total=RECORD_SAMPLES, desc="effective sample size", unit=" samples", leave=False, shown=shown)
    with bar, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(trainer.config.seed + 1)
        begin = time.perf_counter()
        while len(log_w) * RECORD_BATCH < RECORD_SAMPLES:
            y, log_q = shared.sample(min(RECORD_BATCH, RECORD_SAMPLES))
            s = coordinates.reference_fixed.repeat(len(y), 1)
            value = target.log_density(y, s) - log_q
            log_w.append(value.nan_to_num(nan=-torch.inf, posinf=-torch.inf))
            if completion is not None:
                s[:, columns], log_g = completion.sample(y)
                value = target.log_density(y, s) - log_q - log_g
                log_w_completed.append(value.nan_to_num(nan=-torch.inf, posinf=-torch.inf))
            bar.update(len(y))
            if trainer.ranks.agree([time.perf_counter() - begin])[0] > RECORD_SECONDS:
                break
    n_samples = sum(map(len, log_w))
    ess = effective_sample_size(torch.cat(log_w).numpy())
    what = " at fixed s" if completion is not None else ""
    logger.info("Effective sample size of %d samples%s: %.1f %%.", n_samples, what, 100 * ess)
    figures = {"reverse_ess": ess, "reverse_ess_samples": n_samples}  # on the System trained for
    if completion is not None:
        figures["completed_ess"] = effective_sample_size(torch.cat(log_w_completed).numpy())
        logger.info("With the completion (exact weights): %.2g %%.", 100 * figures["completed_ess"])
    last = trainer.history[-1] if trainer.history else {}
    return {
        "config": trainer.config.model_dump(mode="json"),
        "frames": n_frames,
        "steps": trainer.step,
        "n_energies": n_energies,
        **figures,
        "last": {k: v for k, v in last.items() if isinstance(v, (int, float, str)) and v == v},
        "date": datetime.date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """What the flow was made with."""
    from importlib.metadata import version

    return {
        "openmm_bg": version("openmm-bg"),
        "openmm": openmm.version.version,
        "torch": torch.__version__,
        "python": machine.python_version(),
    }
