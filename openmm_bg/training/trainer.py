"""The training loop: stages, moving average, validation, checkpoints, interruption and resumption."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openmm_bg.errors import BGError, CheckpointError, InputError
from openmm_bg.flow.coupling import economical
from openmm_bg.training import checkpoint
from openmm_bg.training.best import BestWeights
from openmm_bg.training.config import Stage, TrainingConfig
from openmm_bg.training.dataset import Dataset, spread
from openmm_bg.training.history import History
from openmm_bg.training.interruption import Interruption
from openmm_bg.training.losses import evaluation_mode, weighted_mean
from openmm_bg.training.objective import Objective
from openmm_bg.training.parallel import Ranks
from openmm_bg.training.progress import stage_bar
from openmm_bg.training.step import GradientStep
from openmm_bg.training.threads import product_precision

logger = logging.getLogger(__name__)

_VALIDATION_CHUNK = 512
# A resumed run may change these: they leave the loss curve as it is, but for rounding.
_FREE_KEYS = {
    "checkpoint_every", "checkpoint_seconds", "max_bad_steps", "gradient_checkpointing", "compile", "cuda_graphs"
}  # fmt: skip


class TrainingInterrupted(BGError, RuntimeError):
    """Training was stopped by Ctrl-C or SIGTERM; the message says what was saved."""


class TrainingDiverged(BGError, RuntimeError):
    """Too many steps in a row had no finite loss."""


class Trainer:
    """Trains a flow through the stages of a configuration.

    Parameters
    ----------
    density
        `openmm_bg.flow.FlowDensity`, trained in place, on the device where its parameters lie.
    dataset
        Frames in internal coordinates, in the order of time.
    config
        What `TrainingConfig.load` takes.
    target
        ``log_density(y, s) -> [B]``; needed by the losses `kl`, `buffer` and `path`.
    coordinates
        ``to_positions(y, s)``; needed by `w2`, taken from the target if it has them.
    backbone_atoms
        Indices of N, Cα and C for the loss `w2`.
    directory
        For checkpoints and ``losses.csv``; nothing is written without it.
    progress
        Show progress bars.
    identity
        Whatever else a resumed run must share with its checkpoint: the System and the temperature, say.
    ranks
        The processes that train together, from `openmm_bg.training.parallel.joined`; every one of them makes a trainer
        of the same input and calls its methods. Batch sizes are those of all together.

    Attributes
    ----------
    history : list of dict
        The loss curve, one row per step with the keys of `openmm_bg.training.history.COLUMNS`. The column
        `path` holds the mean square mismatch of the scores and `variance` that of log π - log q (clipped, kT²);
        neither is part of `loss`, which holds their surrogates.
    baselines : dict
        "w2": data against data at the batch sizes of training, nm².

    Notes
    -----
    Every stage begins with a fresh optimiser, for its losses differ in scale from those before. The moving
    average goes on over stages; it is what validation, the buffer and the finished flow use. All randomness
    comes from the seed: a run that was killed and resumed has the loss curve of an unbroken one, bit for bit,
    on one machine, if its stages are not limited in seconds and its target is deterministic. It is also that of any
    other number of processes, up to rounding, except that dropout draws other masks.
    """

    def __init__(
        self,
        density: nn.Module,
        dataset: Dataset,
        config: TrainingConfig | dict[str, Any] | str | os.PathLike[str],
        *,
        target: Any = None,
        coordinates: Any = None,
        backbone_atoms: Any = None,
        directory: str | os.PathLike[str] | None = None,
        progress: bool = True,
        identity: str = "",
        ranks: Ranks | None = None,
    ) -> None:
        self.config = TrainingConfig.load(config)
        self.density = density
        self.ranks = ranks or Ranks()
        self.progress = progress and self.ranks.is_main
        self.directory = None if directory is None else Path(directory)
        self._parameters: list[Tensor] = list(density.parameters())
        if not self._parameters:
            raise InputError("The flow has no parameters to train.")
        self.device = self._parameters[0].device
        n_features = getattr(density, "n_features", dataset.n_modelled)
        if n_features != dataset.n_modelled:
            raise InputError(
                f"The flow models {n_features} coordinates and the training data have {dataset.n_modelled}, "
                "use the coordinates that the flow was built for."
            )
        self._fingerprint = dataset.fingerprint() + identity
        self.ranks.require_same(f"{self._fingerprint} {self.config.model_dump_json()}", "data or another configuration")
        self.ranks.align(density)
        train, validation = dataset.split(
            self.config.validation_fraction, self.config.validation_blocks, self.config.seed
        )
        self._validation: tuple[Tensor, Tensor | None] | None = None
        if validation is not None:
            validation = validation[spread(len(validation), self.config.validation_frames)]
            dtype = torch.float32 if self.config.precision == "float32" else torch.float64
            weights = validation.weights
            self._validation = (
                validation.y.to(self.device, dtype), None if weights is None else weights.to(self.device)
            )  # fmt: skip
        self.ema = copy.deepcopy(density).eval() if self.config.ema_decay > 0.0 else None
        self._averaged: list[Tensor] = []
        if self.ema is not None:
            self._averaged = [p.requires_grad_(False) for p in self.ema.parameters()]
        self.objective = Objective(
            density, density if self.ema is None else self.ema, train.to(self.device), self.config,
            target=target,
            coordinates=coordinates if coordinates is not None else getattr(target, "coordinates", None),
            backbone_atoms=backbone_atoms,
            ranks=self.ranks,
        )  # fmt: skip
        self._gradient_step = GradientStep(self.objective, self._parameters, self.config, self.ranks)
        self._history = History(self.directory if self.ranks.is_main else None)
        self.baselines: dict[str, float] = {}
        self._n_train = len(train)
        # State of the run, all of it in every checkpoint.
        self.step = 0  # over all stages
        self._stage = 0  # index; number of stages when finished
        self._stage_step = 0
        self._stage_seconds = 0.0
        self._seconds = 0.0
        self._bad_in_a_row = 0
        self.best = BestWeights()
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved_step: int | None = None
        self._saved_at = time.perf_counter()
        self._interruption = Interruption(insist=self.ranks.size == 1)
        self._stop = False  # what all processes have agreed on

    @property
    def history(self) -> list[dict[str, Any]]:
        """The loss curve so far."""
        return self._history.rows

    def run(self, resume: bool = False) -> list[dict[str, Any]]:
        """Train through the remaining stages; afterwards `density` holds the averaged weights, in eval mode.

        Parameters
        ----------
        resume
            Continue from the checkpoint in `directory`; from the beginning if there is none yet.

        Returns
        -------
        list of dict
            The loss curve, that of earlier runs included.

        Raises
        ------
        InputError
            If the directory holds a checkpoint and `resume` is not set, or configuration or data differ.
        CheckpointError
            If a checkpoint cannot be read or written.
        TrainingInterrupted
            After Ctrl-C or SIGTERM, with a checkpoint of the last step.
        TrainingDiverged
            After `max_bad_steps` steps in a row without a finite loss.
        RankLost
            Another process failed.
        """
        cuda = [self.device] if self.device.type == "cuda" else []
        small = self.config.network_precision == "bfloat16"
        economy = economical(
            self.density, recompute=self.config.gradient_checkpointing, bfloat16=small and bool(cuda)
        )  # fmt: skip
        self._stop = False
        with torch.random.fork_rng(devices=cuda), economy, self._interruption.listening():
            torch.manual_seed(self.config.seed)
            if (directory := self.directory) is not None:
                if resume and self.ranks.from_main(lambda: checkpoint.exists(directory)):
                    self._restore()
                else:
                    if resume:
                        logger.info("No checkpoint in %s yet: training starts from the beginning.", self.directory)
                    self.ranks.from_main(self._begin_directory)
            if any(stage.needs_target for stage in self.config.stages[self._stage :]):
                self.objective.prepare_energies()
            if self._saved_step is None:
                self._save()  # a full disk shows now, not after the first minute
            try:
                while self._stage < len(self.config.stages):
                    self._run_stage(self.config.stages[self._stage])
            except KeyboardInterrupt:
                # Not between two steps (a second Ctrl-C, or one outside the main thread): nothing is saved.
                raise self._interrupted() from None
            finally:
                self._gradient_step.end_stage()
        self._finish()
        return self.history

    # --- the loop -------------------------------------------------------------------------------------------

    def _run_stage(self, stage: Stage) -> None:
        if self._optimizer is None:
            self._optimizer = self._new_optimizer()
            self.objective.begin_stage(stage)
        self.density.train()
        self.baselines |= self.objective.prepare_stage(stage)
        self._gradient_step.begin_stage(stage)
        with stage_bar(stage, self.progress) as bar:
            fraction = self._fraction(stage)
            while fraction < 1.0:
                started = time.perf_counter()
                with product_precision(self.config.network_precision):
                    row = self._train_step(stage, fraction)
                if self._stage_step % self.config.validate_every == 0:
                    row["validation_nll"] = self._validate(stage)
                elapsed = time.perf_counter() - started
                due = self._agree(elapsed)
                row["seconds"] = self._seconds
                fraction = self._fraction(stage)
                bar.show(row, fraction)
                if fraction < 1.0 and (self._stop or due):
                    self._save()
                    if self._stop:
                        raise self._interrupted()
        self._end_stage(stage)
        if self._stop and self._stage < len(self.config.stages):
            raise self._interrupted()

    def _agree(self, elapsed: float) -> bool:
        """Count the time of a step; whether a checkpoint is due, and to stop, is one decision of all processes.

        The clock is the main process's, the wish to stop anybody's.
        """
        main = self.ranks.is_main
        mine = (self._interruption.requested, elapsed if main else 0.0, main and self._checkpoint_due())
        stop, elapsed, due = self.ranks.agree(mine)
        self._stop = bool(stop)
        self._stage_seconds += elapsed
        self._seconds += elapsed
        return bool(due)

    def _fraction(self, stage: Stage) -> float:
        """How much of the stage is done: the largest of its limits reached, 1 at the end."""
        parts = []
        if stage.steps is not None:
            parts.append(self._stage_step / stage.steps)
        if stage.epochs is not None:
            parts.append(self._stage_step / math.ceil(stage.epochs * self._n_train / self.config.batch_size))
        if stage.seconds is not None:
            parts.append(self._stage_seconds / stage.seconds)
        return max(parts)

    def _learning_rate(self, stage: Stage, fraction: float) -> float:
        rate = stage.learning_rate
        if stage.schedule == "cosine":
            floor = stage.final_fraction
            rate *= floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(fraction, 1.0)))
        if self._stage_step < stage.warmup_steps:
            rate *= (self._stage_step + 1) / stage.warmup_steps
        return rate

    def _train_step(self, stage: Stage, fraction: float) -> dict[str, Any]:
        """One step; a step without a finite loss and gradient changes no weight and is counted."""
        assert self._optimizer is not None
        rate = self._learning_rate(stage, fraction)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        figures = self._gradient_step.take(stage, self.step, self._stage_step)
        good = all(math.isfinite(figures[name]) for name in ("loss", "gradient_norm", *stage.losses.active()))
        if good:
            self._optimizer.step()
            self._update_average()
            self._bad_in_a_row = 0
        else:
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= self.config.max_bad_steps:
                raise TrainingDiverged(
                    f"Stage {stage.name!r} had no finite loss in {self._bad_in_a_row} steps in a row up to "
                    f"step {self.step}, lower its learning rate or give the energies a lower energy_cut."
                )
        self.step += 1
        self._stage_step += 1
        return self._history.append(
            step=self.step, stage=stage.name, learning_rate=rate, skipped=int(not good), **figures
        )  # fmt: skip

    def _update_average(self) -> None:
        if self.ema is None:
            return
        # Early on a long memory would hold the starting weights.
        decay = min(self.config.ema_decay, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self._parameters, 1.0 - decay)
            for average, current in zip(self.ema.buffers(), self.density.buffers(), strict=True):
                average.copy_(current)

    def _validate(self, stage: Stage) -> float | None:
        """NLL of the held-out frames under the flow that would be kept; remembers the best if asked to."""
        if self._validation is None:
            return None
        kept, flow = self.density if self.ema is None else self.ema, self.objective.sampling_density
        y, weights = self._validation
        with evaluation_mode(kept), torch.no_grad():
            log_q = torch.cat([flow.log_prob(part) for part in y.split(_VALIDATION_CHUNK)])
        value = -float(weighted_mean(log_q.double(), weights))
        if stage.keep_best:
            self.best.offer(value, kept)
        return value

    def _end_stage(self, stage: Stage) -> None:
        if self.history and self.history[-1]["validation_nll"] is None:
            self.history[-1]["validation_nll"] = self._validate(stage)
        modules = [module for module in (self.density, self.ema) if module is not None]
        self.best.end_stage(modules[-1], modules)
        self._stage += 1
        self._stage_step, self._stage_seconds = 0, 0.0
        self._optimizer = None
        self._bad_in_a_row = 0
        self._gradient_step.end_stage()
        self.objective.buffer.clear()
        self._save()

    def _finish(self) -> None:
        if self.ema is not None:
            self.density.load_state_dict(self.ema.state_dict())
        self.density.eval()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.config.optimizer == "adamw" else torch.optim.Adam
        # fused: one call for all parameters, where the plain loop costs as much as a pass through the flow.
        return kind(self._parameters, lr=1e-3, weight_decay=self.config.weight_decay, fused=True)

    def _interrupted(self) -> TrainingInterrupted:
        self._finish()
        what = f"Training was interrupted at step {self.step}"
        if self.directory is None:
            return TrainingInterrupted(f"{what}; without a directory nothing is saved.")
        return TrainingInterrupted(f"{what}; {self.directory} holds step {self._saved_step}, resume to go on.")

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every
        if every is not None and self.step % every == 0:
            return True
        return time.perf_counter() - self._saved_at >= self.config.checkpoint_seconds

    def _begin_directory(self) -> None:
        assert self.directory is not None
        if checkpoint.exists(self.directory):
            raise InputError(f"{self.directory} already holds a checkpoint, resume it or choose another directory.")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"Cannot create the directory {self.directory}: {error.strerror}.") from None

    def _save(self) -> None:
        if self.directory is not None:
            directory = self.directory
            self.ranks.from_main(lambda: self._write_checkpoint(directory))
        self._saved_step = self.step
        self._saved_at = time.perf_counter()

    def _write_checkpoint(self, directory: Path) -> None:
        tensors, objective = self.objective.state()
        tensors["rng.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        modules = [("model.", self.density)] + ([("ema.", self.ema)] if self.ema is not None else [])
        for prefix, module in modules:
            tensors.update({prefix + name: value for name, value in module.state_dict().items()})
        tensors.update(self.best.tensors())
        if self._optimizer is not None:
            for k, state in self._optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{k}.{name}": torch.as_tensor(value) for name, value in state.items()})
        meta = {
            "stage": self._stage,
            "stage_step": self._stage_step,
            "stage_seconds": self._stage_seconds,
            "seconds": self._seconds,
            "bad_in_a_row": self._bad_in_a_row,
            "best": self.best.meta(),
            "in_stage": self._optimizer is not None,
            "objective": objective,
            "losses_size": self._history.flush(),
            "dataset": self._fingerprint,
            "config": self.config.model_dump(mode="json"),
        }
        checkpoint.save(directory, self.step, tensors, meta)

    def _restore(self) -> None:
        assert self.directory is not None
        directory = self.directory
        step, tensors, meta = self.ranks.from_main(lambda: checkpoint.load(directory))
        self._check_resumable(meta)
        checkpoint.load_module(self.density, tensors, "model.")
        if self.ema is not None:
            checkpoint.load_module(self.ema, tensors, "ema.")
        self.step, self._stage = step, meta["stage"]
        self._stage_step, self._stage_seconds = meta["stage_step"], meta["stage_seconds"]
        self._seconds, self._bad_in_a_row = meta["seconds"], meta["bad_in_a_row"]
        self.best.restore(tensors, meta["best"], self.device)
        if meta["in_stage"]:
            self._optimizer = self._new_optimizer()
            blank = self._optimizer.state_dict()
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".", 2)
                    state.setdefault(int(index), {})[key] = value
            self._optimizer.load_state_dict({"state": state, "param_groups": blank["param_groups"]})
        self.objective.restore(tensors, meta["objective"])
        self._history.restore(meta["losses_size"])
        self._history.rows = self.ranks.from_main(lambda: self._history.rows)
        torch.set_rng_state(tensors["rng.torch"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.ranks.from_main(lambda: checkpoint.clean(directory))
        self._saved_step = step
        logger.info("Resumed %s at step %d", self.directory, step)

    def _check_resumable(self, meta: dict[str, Any]) -> None:
        """Later stages may have been changed or added; the past must be the same."""
        if meta["dataset"] != self._fingerprint:
            raise InputError(f"{self.directory} was trained on other data, resume it with those it began with.")
        old, new = meta["config"], self.config.model_dump(mode="json")
        done = meta["stage"] + int(meta["in_stage"])
        changed = [key for key in new if key not in _FREE_KEYS | {"stages"} and old.get(key) != new[key]]
        if old["stages"][:done] != new["stages"][:done]:
            changed.append("stages")
        if changed:
            raise InputError(
                f"{self.directory} was trained with another value of {', '.join(sorted(changed))}, "
                "resume it with the configuration it began with."
            )
