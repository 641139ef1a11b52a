"""One small, validated description of a training run, from YAML, a dict or Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from openmm_bg.errors import InputError
from openmm_bg.flow.config import FlowConfig

# Losses whose own value says nothing: a figure stands in the loss curve instead.
SURROGATES = ("path", "variance")
ENERGY_LOSSES = ("kl", "buffer", "path", "variance")
LOSS_NAMES = ("nll", "w2", "kl", "buffer", "path", "variance")


def _sentence(model: str, error: ValidationError) -> str:
    """The first problem of a pydantic report as one sentence; the rest is counted."""
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "extra_forbidden":
        what = "no such key exists, remove it or correct its spelling"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{model}{' ' + where if where else ''}: {what}{more}."


class _Strict(BaseModel):
    """Unknown keys are refused, and every refusal is an `InputError` of one sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InputError(_sentence(type(self).__name__, error)) from None


class LossWeights(_Strict):
    """Weights λ of the losses of a stage; a loss with weight 0 is not computed.

    Attributes
    ----------
    nll
        Negative log-likelihood of MD frames.
    w2
        Squared 2-Wasserstein (Fréchet) distance of backbone distance vectors, nm²; needs coordinates.
    kl
        Reverse Kullback-Leibler divergence, training by energy; needs a target.
    buffer
        Negative log-likelihood of a batch of MD frames and reweighted flow samples; needs a target.
    path
        Path-gradient estimator of the Kullback-Leibler divergence; needs a target.
    variance
        Variance of log π - log q over flow samples and MD frames (energies, no forces); needs a target.
    """

    nll: float = Field(default=0.0, ge=0.0)
    w2: float = Field(default=0.0, ge=0.0)
    kl: float = Field(default=0.0, ge=0.0)
    buffer: float = Field(default=0.0, ge=0.0)
    path: float = Field(default=0.0, ge=0.0)
    variance: float = Field(default=0.0, ge=0.0)

    def active(self) -> dict[str, float]:
        """The losses with a weight above zero."""
        return {name: getattr(self, name) for name in LOSS_NAMES if getattr(self, name) > 0.0}


class Stage(_Strict):
    """One stage of the curriculum: how long, how fast, towards which losses.

    Attributes
    ----------
    name
        Shown in the progress bar and the loss curve.
    losses
        Weights of the losses, at least one above zero.
    steps, epochs, seconds
        Duration; at least one. Of several, the first reached ends the stage. An epoch is as many frames as
        the training split has; seconds count only while training, over interruptions.
    learning_rate, schedule, final_fraction, warmup_steps
        After a linear warm-up the rate is constant, or falls along a half cosine to
        ``final_fraction * learning_rate`` at the end of the stage.
    keep_best
        Restore, at the end of the stage, the weights of its lowest validation NLL.
    sample_batch
        Samples per step of the `kl`, `path` and `w2` losses in this stage; None: as the configuration has it.
        Energies cost, and the W2 of few samples is biased: the stages want different numbers.
    path_samples
        Where the samples of the `path` loss come from: "data" (forward KL, MD frames), "flow" (reverse KL,
        fresh samples) or "buffer" (reweighted samples of the buffer, towards the forward KL).
    """

    name: str = Field(min_length=1)
    losses: LossWeights
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0.0)
    seconds: float | None = Field(default=None, gt=0.0)
    learning_rate: float = Field(default=1e-3, gt=0.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    warmup_steps: int = Field(default=100, ge=0)
    keep_best: bool = False
    sample_batch: int | None = Field(default=None, ge=2)
    path_samples: Literal["data", "flow", "buffer"] = "data"

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if self.steps is None and self.epochs is None and self.seconds is None:
            raise ValueError(f"stage {self.name!r} needs a duration, give steps, epochs or seconds")
        if not self.losses.active():
            raise ValueError(f"stage {self.name!r} has no loss, give at least one a weight above 0")
        return self

    @property
    def needs_target(self) -> bool:
        """Whether a loss of this stage evaluates energies."""
        return any(getattr(self.losses, name) > 0.0 for name in ENERGY_LOSSES)

    @property
    def uses_buffer(self) -> bool:
        """Whether the resampled buffer is filled in this stage."""
        from_buffer = self.losses.path > 0.0 and self.path_samples == "buffer"
        return self.losses.buffer > 0.0 or self.losses.variance > 0.0 or from_buffer


class BufferConfig(_Strict):
    """The resampled buffer: fresh flow samples, reweighted towards the target.

    Attributes
    ----------
    fresh_share
        Share of flow samples in a batch of the `buffer` or `variance` loss, at most 0.75; the rest are MD frames.
    draw_size, draw_every, n_batches
        Every `draw_every` steps `draw_size` samples are drawn; the last `n_batches` draws are kept.
    clip
        Weights of `buffer` are ``exp(min(log w - median, clip))``, residuals of `variance` lie within ±clip: in
        training only, never in a result.
    """

    fresh_share: float = Field(default=0.5, gt=0.0, le=0.75)
    draw_size: int = Field(default=1024, ge=2)
    draw_every: int = Field(default=8, ge=1)
    n_batches: int = Field(default=8, ge=1)
    clip: float = Field(default=2.0, gt=0.0)


class TrainingConfig(_Strict):
    """Everything a training run depends on besides its data and its target.

    Attributes
    ----------
    seed
        Of the data split, the batches, dropout and the samples.
    batch_size
        Frames per step of the `nll` and `buffer` losses.
    sample_batch
        Samples per step of the `kl`, `path` and `w2` losses.
    w2_data_batch
        MD frames per step of the `w2` loss; large, for finite batches bias the fit to a small spread.
    precision
        Of the coordinates in training; energies are always summed in float64.
    network_precision
        Of the networks inside the flow while it trains. "bfloat16" allows that precision to their products on a CPU
        (torch's "medium") and to whole networks on a GPU; splines, log-determinants and base densities keep
        `precision`, and samples, weights and moves know nothing of it.
    gradient_checkpointing
        Keep the inputs of the coupling layers alone and pass each a second time in the backward pass: the same
        gradients from a fraction of the memory, for the time of one more forward pass.
    compile
        Pass the likelihood of whole batches through code that torch.compile makes of the flow: the same training up to
        rounding, with about half the time for these passes (docs/benchmarks.md), after a minute or more of compiling,
        seconds once it is in torch's cache. That time comes on top of the `seconds` of a stage. Without a C++ compiler
        (on a CPU), or where compiling fails, one warning says so and training goes on uncompiled. Not together with
        `gradient_checkpointing`.
    cuda_graphs
        On a GPU that one process trains on: record the steps of each stage and replay them as CUDA graphs, which spares
        the launches of thousands of small kernels. Draws, energies and the decomposition of `w2` stay between the
        graphs. The first replay is compared with the same step without graphs; where that, or recording, fails, one
        warning says so and training goes on without them. **Never run on a GPU yet.** Not together with
        `gradient_checkpointing`.
    optimizer, weight_decay, gradient_clip
        Adam or AdamW (decoupled decay), and the largest norm of the gradient of each loss before its weight λ
        (None: not clipped). A clipped gradient has lost its scale: then λ sets what share of a step the loss has.
    ema_decay
        Decay per step of the exponential moving average of the weights, the one that is kept (0: none).
    weighting
        Frames that carry weights: "resample" draws them with these probabilities (with replacement),
        "loss" draws evenly and weights the loss.
    energy_cut, energy_maximum
        Reduced energies of the `kl` and `path` losses, counted from the median of the data, are linear up
        to the cut, logarithmic above it (an e-fold counts as much as the cut), constant above the maximum (kT).
    validation_fraction, validation_blocks, validation_frames, validate_every
        Share of the frames held out, in how many blocks of time the trajectory is cut for that, the largest
        number of them evaluated, and the steps between evaluations.
    checkpoint_every, checkpoint_seconds
        Steps and seconds between checkpoints; the first reached counts.
    max_bad_steps
        This many steps in a row without a finite loss end the run.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=256, ge=1)
    sample_batch: int = Field(default=256, ge=2)
    w2_data_batch: int = Field(default=1024, ge=2)
    precision: Literal["float32", "float64"] = "float32"
    network_precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: float = Field(default=0.0, ge=0.0)
    gradient_clip: float | None = Field(default=5.0, gt=0.0)
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0)
    weighting: Literal["resample", "loss"] = "resample"
    energy_cut: float = Field(default=100.0, gt=0.0)
    energy_maximum: float = Field(default=1e20, gt=0.0)
    validation_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    validation_blocks: int = Field(default=20, ge=2)
    validation_frames: int = Field(default=4096, ge=1)
    validate_every: int = Field(default=250, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    checkpoint_seconds: float = Field(default=60.0, gt=0.0)
    max_bad_steps: int = Field(default=50, ge=1)
    buffer: BufferConfig = Field(default_factory=BufferConfig)
    flow: FlowConfig = Field(default_factory=lambda: FlowConfig.preset("cpu"))
    stages: list[Stage] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _distinct(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages share a name, give each its own")
        return stages

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.energy_maximum <= self.energy_cut:
            raise ValueError("energy_maximum must lie above energy_cut")
        if self.compile and self.gradient_checkpointing:
            # Compiled, the second pass of a layer has another dropout than the first: the gradients would be wrong.
            raise ValueError("compile and gradient_checkpointing exclude each other, switch one of them off")
        if self.cuda_graphs and self.gradient_checkpointing:
            # The second pass puts back the generator of dropout, which a recorded step must not touch.
            raise ValueError("cuda_graphs and gradient_checkpointing exclude each other, switch one of them off")
        if self.validation_fraction == 0.0 and any(stage.keep_best for stage in self.stages):
            raise ValueError("keep_best needs validation frames, set validation_fraction above 0")
        return self

    @classmethod
    def load(cls, source: str | os.PathLike[str] | dict[str, Any] | TrainingConfig) -> TrainingConfig:
        """A configuration from a YAML file, a dict or an existing configuration.

        Raises
        ------
        InputError
            For a file that cannot be read and for every unknown key or value out of range.
        """
        if isinstance(source, TrainingConfig):
            return source
        if isinstance(source, dict):
            return cls(**{str(key): value for key, value in source.items()})
        path = Path(source)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise InputError(f"Cannot read the training configuration {path}: {reason}.") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 1}" if mark is not None else ""
            raise InputError(f"The training configuration {path} is not valid YAML{line}.") from None
        if not isinstance(data, dict):
            raise InputError(f"The training configuration {path} must hold keys and values, such as 'seed: 0'.")
        try:
            return cls(**{str(key): value for key, value in data.items()})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """YAML that `load` reads back to an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def preset(cls, name: Literal["cpu", "protein", "paper"] = "cpu") -> TrainingConfig:
        """Ready configurations.

        "cpu": a dipeptide in minutes on two cores: NLL until the validation turns, then the variance of
        log π - log q over fresh samples and MD frames. "protein": the paper's stages at a size for CPUs, but for the
        fourth, an hour over the `reduced` coordinates of some thousand frames. "paper": the four stages of Kim et al.,
        arXiv 2401.04246 (200, 50, 20 and 10 epochs, the weight of W2 falling and that of the energies rising), followed
        by the resampled buffer. The weights λ are ours.
        """
        if name == "cpu":
            return cls(
                batch_size=512,
                ema_decay=0.998,
                network_precision="bfloat16",
                buffer=BufferConfig(fresh_share=0.75, draw_size=3072, draw_every=8, n_batches=16),
                flow=FlowConfig.preset("cpu"),
                stages=[
                    Stage(
                        name="nll", losses=LossWeights(nll=1.0), epochs=4, seconds=60.0, learning_rate=2e-3,
                        keep_best=True,
                    ),
                    Stage(name="variance", losses=LossWeights(variance=1.0), seconds=300.0, learning_rate=1e-3),
                ],
            )  # fmt: skip
        if name == "protein":
            # The gradients of all three are clipped: the weights are shares of a step.
            return cls(
                batch_size=64,
                w2_data_batch=512,
                ema_decay=0.99,
                energy_cut=300.0,
                validate_every=50,
                flow=FlowConfig.preset("protein"),
                stages=[
                    Stage(
                        name="nll", losses=LossWeights(nll=1.0), seconds=720.0, learning_rate=1e-3,
                        schedule="constant", keep_best=True,
                    ),
                    Stage(
                        name="nll+w2", losses=LossWeights(nll=1.0, w2=1.0), seconds=1260.0, learning_rate=1e-3,
                        sample_batch=64,
                    ),
                    # No fourth stage: without W2, ΔD rises again, and energies fall no further (docs/benchmarks.md).
                    Stage(
                        name="nll+w2+kl", losses=LossWeights(nll=1.0, w2=1.0, kl=1.0), seconds=1620.0,
                        learning_rate=1e-3, sample_batch=16,
                    ),
                ],
            )  # fmt: skip
        if name == "paper":
            return cls(
                flow=FlowConfig.preset("paper"),
                checkpoint_seconds=600.0,
                stages=[
                    Stage(name="nll", losses=LossWeights(nll=1.0), epochs=200, learning_rate=1e-3),
                    Stage(name="nll+w2", losses=LossWeights(nll=1.0, w2=1.0), epochs=50, learning_rate=5e-4),
                    # Gradients are clipped, so that λ are shares of a step: near those that served "protein", whose
                    # fourth stage unlearns W2 unless it is slow (docs/benchmarks.md).
                    Stage(
                        name="nll+w2+kl", losses=LossWeights(nll=1.0, w2=0.9, kl=0.9), epochs=20,
                        learning_rate=2e-4,
                    ),
                    Stage(name="nll+kl", losses=LossWeights(nll=1.0, kl=1.0), epochs=10, learning_rate=1e-5),
                    Stage(name="buffer", losses=LossWeights(buffer=1.0), epochs=10, learning_rate=2e-4),
                ],
            )  # fmt: skip
        raise InputError(f"There is no training preset {name!r}, use 'cpu', 'protein' or 'paper'.")
