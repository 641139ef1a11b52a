"""The losses of a stage, evaluated for one step: where samples, frames and energies come from."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openmm_bg.errors import EnergyError, InputError
from openmm_bg.training import losses
from openmm_bg.training.buffer import ResampledBuffer
from openmm_bg.training.compiled import CompiledDensity
from openmm_bg.training.config import ENERGY_LOSSES, Stage, TrainingConfig
from openmm_bg.training.dataset import Dataset, MinibatchSampler, cumulative_weights, draw_indices, spread
from openmm_bg.training.graphs import Outside, called
from openmm_bg.training.parallel import Ranks
from openmm_bg.training.sharing import (
    SharedDensity,
    SharedTarget,
    share_coordinates,
    share_density,
    share_target,
)
from openmm_bg.training.threads import product_precision

logger = logging.getLogger(__name__)

_REFERENCE_FRAMES = 256
_ENERGY_CHUNK = 4096
# Flow samples this far below the median of log w are clashes: their residual says nothing but "not here".
_CLASH = 12.0


class Objective:
    """Everything a step of training draws on, with a state that goes into a checkpoint.

    Parameters
    ----------
    density
        The flow in training, and `sampling_density`, which fills the buffer: its moving average, if any.
    data
        The training split, on the device of the flow.
    target
        Object with ``log_density(y, s)``, needed by the losses `kl`, `buffer` and `path`.
    coordinates
        Object with ``to_positions(y, s)``, needed by `w2`; so are the indices `backbone_atoms`.
    ranks
        The processes that share the work. Everything here is that of the joint batch, in each of them.

    Attributes
    ----------
    reference
        Median reduced energy -log π of the data, from which the regulariser counts.
    outside
        Calls what a recorded step must not contain: draws, energies, decompositions (`openmm_bg.training.graphs`).
    """

    def __init__(
        self,
        density: Any,
        sampling_density: Any,
        data: Dataset,
        config: TrainingConfig,
        *,
        target: Any = None,
        coordinates: Any = None,
        backbone_atoms: Any = None,
        ranks: Ranks | None = None,
    ) -> None:
        ranks = ranks or Ranks()
        self._compiled = CompiledDensity(density) if config.compile else None
        self._n_ranks = ranks.size
        self.density = share_density(density if self._compiled is None else self._compiled, ranks, config.seed)
        self.sampling_density = share_density(sampling_density, ranks, config.seed)
        self.data, self.config = data, config
        self.target, self.coordinates = share_target(target, ranks), share_coordinates(coordinates, ranks)
        self._require(config, backbone_atoms)
        self.device = data.y.device
        self.dtype = torch.float32 if config.precision == "float32" else torch.float64
        self.y = data.y.to(self.dtype)
        self.weights = data.weights
        atoms = [] if backbone_atoms is None else backbone_atoms
        self.backbone = torch.as_tensor(atoms, device=self.device).long()
        self._cumulative = cumulative_weights(data.log_weights)
        self._s_is_constant = data.s_is_constant
        self.sampler = MinibatchSampler(
            len(data), config.batch_size, log_weights=data.log_weights, weighting=config.weighting,
            seed=config.seed + 1,
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(config.seed + 2)
        self.buffer = ResampledBuffer(config.buffer.n_batches)
        self.reference: float | None = None
        self._data_log_density: Tensor | None = None
        self._energies_before = 0  # of the process that this one resumes
        self._regulariser: losses.Regulariser | None = None
        self.outside: Outside = called

    def _require(self, config: TrainingConfig, backbone_atoms: Any) -> None:
        """Refuse before the first step what a later stage could not do."""
        for stage in config.stages:
            if stage.needs_target and self.target is None:
                names = [name for name in ENERGY_LOSSES if getattr(stage.losses, name) > 0]
                raise InputError(
                    f"Stage {stage.name!r} trains by energy (loss {' and '.join(names)}) and there is no "
                    "target, give target=."
                )
            if stage.losses.variance > 0.0 and not self.data.s_is_constant:
                raise InputError(
                    f"Stage {stage.name!r} has the loss variance, which needs the same s for all frames: use the "
                    "representation 'full', or the loss buffer."
                )
            if stage.losses.w2 > 0.0:
                if self.coordinates is None:
                    raise InputError(
                        f"Stage {stage.name!r} has the loss w2 and there are no coordinates to rebuild "
                        "positions, give coordinates= or a target that has them."
                    )
                if backbone_atoms is None or len(backbone_atoms) < 2:
                    raise InputError(
                        f"Stage {stage.name!r} has the loss w2, give backbone_atoms= (those of N, CA and C)."
                    )
                self.data.require(config.w2_data_batch, f"w2 loss of stage {stage.name!r}")

    def prepare_energies(self) -> None:
        """Evaluate the target on some frames: a wrong System shows before hours of work, not after.

        Raises
        ------
        EnergyError
            If more than half of the frames have no finite energy.
        """
        if self._regulariser is None:
            from openmm_bg.energy import regularise_energy

            self._regulariser = partial(
                regularise_energy, cut=self.config.energy_cut, maximum=self.config.energy_maximum
            )
        if self.reference is not None:
            return
        rows = spread(len(self.data), _REFERENCE_FRAMES).to(self.device)
        energy = -losses.evaluate_target(self.target, self.data.y[rows], self.data.s[rows], gradient=False).log_density
        finite = torch.isfinite(energy)
        if int(finite.sum()) * 2 <= rows.numel():
            raise EnergyError(
                f"{rows.numel() - int(finite.sum())} of {rows.numel()} training frames have no finite "
                "energy, check that the System and the atom order are those of the trajectory."
            )
        self.reference = float(energy[finite].median())

    @property
    def n_energies(self) -> int:
        """Energies evaluated for this run, those of earlier processes included; 0 for a target that does not count."""
        counter = self.target if isinstance(self.target, SharedTarget) else getattr(self.target, "pool", None)
        return self._energies_before + int(getattr(counter, "n_energies", 0))

    def begin_stage(self, stage: Stage) -> None:
        """Forget the samples of an earlier stage; their proposal is far away by now."""
        if stage.losses.variance > 0.0 and self._data_log_density is None:
            self._data_log_density = torch.cat(
                [
                    losses.evaluate_target(self.target, y, s, gradient=False).log_density
                    for y, s in zip(self.data.y.split(_ENERGY_CHUNK), self.data.s.split(_ENERGY_CHUNK), strict=True)
                ]
            )
        gradients = stage.losses.path > 0.0 and stage.path_samples == "buffer"
        self.buffer.clear(gradients=gradients)

    def prepare_stage(self, stage: Stage) -> dict[str, float]:
        """Compile, and evaluate what to compare with, before the clock of a stage runs, of one that is resumed too.

        Returns
        -------
        dict
            "w2", if the stage has that loss: data against data at its batch sizes, nm².
        """
        active = stage.losses.active()
        if self._compiled is not None and {"nll", "buffer", "variance"} & set(active):
            rows = -(-self.config.batch_size // self._n_ranks)  # of one process
            with product_precision(self.config.network_precision):
                self._compiled.prepare(self.y[torch.arange(rows, device=self.device) % len(self.y)])
        if "w2" not in active:
            return {}
        baseline = self.w2_baseline(stage)
        logger.info("W2 of data against data at these batch sizes: %.3g nm^2", baseline)
        return {"w2": baseline}

    def begin_step(self, stage: Stage, step: int, stage_step: int) -> dict[str, Any]:
        """Tell the step, counted over all stages and in this one; fill the buffer if it is time.

        Returns
        -------
        dict
            Figures about a buffer that was filled: `dropped` and `ess`, as in `terms`.
        """
        if isinstance(self.density, SharedDensity):
            self.density.begin_step(step)
        config = self.config.buffer
        if not stage.uses_buffer or (stage_step % config.draw_every and len(self.buffer)):
            return {}
        with product_precision("float32"):  # these samples get weights
            ess, dropped = self.buffer.refill(
                self.sampling_density, self.target, self.draw_s(config.draw_size),
                regulariser=self._regulariser, reference=self.reference or 0.0,
            )  # fmt: skip
        return {"ess": ess, "dropped": dropped}

    def repeats(self, stage: Stage) -> bool:
        """Whether the steps of the stage are all alike: not while they have no samples to train on."""
        return not stage.uses_buffer or len(self.buffer) > 0

    def draw_s(self, n: int) -> Tensor:
        """[n, S] float64: the constant s if all frames share it, else s of frames drawn by weight."""
        if self._s_is_constant:
            return self.data.s[:1].expand(n, -1)
        return self.data.s[self._draw(n)]

    def _draw(self, n: int) -> Tensor:
        return draw_indices(len(self.data), n, self.generator, self._cumulative).to(self.device)

    def _batch(self, size: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Indices, frames and loss weights of a minibatch."""
        index = self.sampler.next(size).to(self.device)
        weights = self.weights[index] if self.weights is not None and self.config.weighting == "loss" else None
        return index, self.y[index], weights

    def terms(self, stage: Stage) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of a step of the stage (those with a weight), and figures about it.

        Returns
        -------
        terms : dict
            Scalars with a graph; one without finite samples is NaN.
        figures : dict
            Scalars: `dropped` (count), `ess` (share, if energies of fresh samples were evaluated), `path` and
            `variance` (mean squares, in place of the surrogates' values).
        """
        active = stage.losses.active()
        terms: dict[str, Tensor] = {}
        figures = {"dropped": torch.zeros((), dtype=torch.int64, device=self.device)}
        if "nll" in active:
            _, y, weights = self.outside(self._batch)
            terms["nll"] = losses.nll(self.density, y, weights)
        if "buffer" in active:
            terms["buffer"] = self._buffer_term()
        if "w2" in active or "kl" in active:
            self._sampled_terms(stage, terms, figures)
        if "path" in active:
            terms["path"] = self._path_term(stage, figures)
        if "variance" in active:
            terms["variance"] = self._variance_term(figures)
        return terms, figures

    def _nothing(self) -> Tensor:
        """The loss of no samples."""
        return torch.full((), float("nan"), dtype=self.dtype, device=self.device)

    def _buffer_term(self) -> Tensor:
        if len(self.buffer) == 0:
            return self._nothing()
        return losses.nll(self.density, *self.outside(self._buffer_batch))

    def _buffer_batch(self) -> tuple[Tensor, Tensor]:
        """Fresh samples and frames with their weights."""
        config = self.config.buffer
        n_fresh = min(max(round(config.fresh_share * self.config.batch_size), 1), self.config.batch_size)
        fresh = self.buffer.draw(n_fresh, self.generator)
        w_fresh = losses.clipped_weights(fresh.log_w, config.clip, self.buffer.median)
        y, w = fresh.y.to(self.dtype), w_fresh / w_fresh.sum() * n_fresh
        n_data = self.config.batch_size - n_fresh
        if n_data:
            _, y_data, w_data = self._batch(n_data)
            w_data = torch.ones_like(w[:1]).expand(n_data) if w_data is None else w_data / w_data.sum() * n_data
            # One pass through the flow for both halves; each keeps its share of the weight.
            y, w = torch.cat([y, y_data]), torch.cat([w, w_data.to(w.dtype)])
        return y, w

    def _n_samples(self, stage: Stage) -> int:
        return self.config.sample_batch if stage.sample_batch is None else stage.sample_batch

    def _sampled_terms(self, stage: Stage, terms: dict[str, Tensor], figures: dict[str, Tensor]) -> None:
        """`kl` and `w2` from one batch of samples: the pass through the flow is what costs."""
        n, active = self._n_samples(stage), stage.losses.active()
        z, s = self.outside(partial(self._draw_base, n))
        y, logdet = self.density(z)
        if "kl" in active:
            log_q = self.density.base_log_prob(z).detach() - logdet
            result = losses.reverse_kl_of_samples(
                y, log_q, s, self.target, regulariser=self._regulariser, reference=self.reference or 0.0,
                outside=self.outside,
            )  # fmt: skip
            terms["kl"] = result.loss
            figures["dropped"] = figures["dropped"] + result.n_dropped
            figures["ess"] = ess_share(result.log_weights)
        if "w2" in active:
            y, keep = losses.masked_gradient(y)
            generated = self._distances(self.coordinates.to_positions(y, s.to(y.dtype)))
            keep.copy_(torch.isfinite(generated.detach()).all(dim=1))
            figures["dropped"] = figures["dropped"] + (~keep).sum()
            data = self._data_distances(self.outside(partial(self._draw, self.config.w2_data_batch)))
            terms["w2"] = losses.w2_distance(generated, data, keep, self.outside).to(self.dtype)

    def _draw_base(self, n: int) -> tuple[Tensor, Tensor]:
        """z [n, D] of the base and s [n, S]."""
        z = self.density.sample_base(n).to(device=self.device, dtype=self.dtype)
        return z, self.draw_s(n)

    def _distances(self, positions: Tensor) -> Tensor:
        return losses.backbone_distances(positions, self.backbone)

    def _data_distances(self, index: Tensor) -> Tensor:
        with torch.no_grad():
            if self.data.positions is not None:
                return self._distances(self.data.positions[index])
            return self._distances(self.coordinates.to_positions(self.y[index], self.data.s[index].to(self.dtype)))

    def w2_baseline(self, stage: Stage, repeats: int = 4) -> float:
        """W2 of data against data at the batch sizes of the stage (nm²): what a perfect flow would get."""
        generator = torch.Generator().manual_seed(self.config.seed + 3)
        total = 0.0
        for _ in range(repeats):
            a, b = (
                draw_indices(len(self.data), n, generator, self._cumulative).to(self.device)
                for n in (self._n_samples(stage), self.config.w2_data_batch)
            )
            total += float(losses.w2_distance(self._data_distances(a), self._data_distances(b)))
        return total / repeats

    def _path_term(self, stage: Stage, figures: dict[str, Tensor]) -> Tensor:
        if stage.path_samples == "buffer" and len(self.buffer) == 0:
            return self._nothing()
        y, gradient, finite, log_w, ess = self.outside(partial(self._path_batch, stage))
        if ess is not None:
            figures["ess"] = ess
        result = losses.path_gradient(self.density, y, gradient, log_w, finite=finite)
        figures["dropped"] = figures["dropped"] + result.n_dropped
        figures["path"] = result.mismatch
        return result.loss

    def _path_batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Samples, gradients of log π there, which of them are finite, log-weights, ESS of fresh samples."""
        n = self._n_samples(stage)
        if stage.path_samples == "buffer":
            batch = self.buffer.draw(n, self.generator)
            assert batch.gradient is not None
            log_w = torch.clamp(batch.log_w - self.buffer.median, max=self.config.buffer.clip)
            return batch.y.to(self.dtype), batch.gradient, None, log_w, None
        weights, log_q = None, None
        if stage.path_samples == "data":
            index, y, weights = self._batch(n)
            y64, s = self.data.y[index], self.data.s[index]
        else:
            with product_precision("float32"), losses.evaluation_mode(self.density), torch.no_grad():
                y64, log_q = self.density.sample(n)
            s = self.draw_s(n)
            y64, y = y64.double(), y64.to(self.dtype)
        found = losses.evaluate_target(
            self.target, y64, s, regulariser=self._regulariser, reference=self.reference or 0.0
        )
        ess = None if log_q is None else ess_share(found.log_density - log_q.double())
        return y, -found.gradient, found.finite, None if weights is None else weights.log(), ess

    def _variance_term(self, figures: dict[str, Tensor]) -> Tensor:
        if len(self.buffer) == 0:
            return self._nothing()
        y, log_density, sound, log_z = self.outside(self._variance_batch)
        figures["dropped"] = figures["dropped"] + (~sound).sum()
        result = losses.log_variance(self.density, y, log_density, log_z, self.config.buffer.clip, sound)
        figures["variance"] = result.residual
        return result.loss

    def _variance_batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fresh samples as the flow gives them, MD frames as they come: neither needs weights, for the minimum
        does not depend on where the samples are from."""
        assert self._data_log_density is not None
        config = self.config.buffer
        n_fresh = min(max(round(config.fresh_share * self.config.batch_size), 1), self.config.batch_size)
        fresh = self.buffer.draw(n_fresh, self.generator)
        index = draw_indices(len(self.data), self.config.batch_size - n_fresh, self.generator).to(self.device)
        y = torch.cat([fresh.y, self.data.y[index]]).to(self.dtype)
        log_density = torch.cat([fresh.log_density, self._data_log_density[index]])
        sound = torch.cat([fresh.log_w > self.buffer.median - _CLASH, torch.isfinite(self._data_log_density[index])])
        return y, log_density, sound, torch.tensor(self.buffer.log_z, dtype=torch.float64, device=self.device)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values of a checkpoint."""
        sampler, buffer = self.sampler.state_dict(), self.buffer.state_dict()
        tensors = {
            "objective.sampler": sampler["generator"],
            "objective.generator": self.generator.get_state(),
            **{f"buffer.{name}": value for name, value in buffer["tensors"].items()},
        }
        meta = {
            "sampler_position": sampler["position"],
            "buffer": {name: buffer[name] for name in ("n", "drawn", "gradients", "ess")},
            "reference": self.reference,
            "n_energies": self.n_energies,
        }
        return tensors, meta

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Inverse of `state`."""
        position = meta["sampler_position"]
        self.sampler.load_state_dict({"generator": tensors["objective.sampler"], "position": position})
        self.generator.set_state(tensors["objective.generator"])
        kept = {
            name.removeprefix("buffer."): value.to(self.device)
            for name, value in tensors.items()
            if name.startswith("buffer.")
        }
        self.buffer.load_state_dict({**meta["buffer"], "tensors": kept})
        self.reference = meta["reference"]
        self._energies_before = int(meta["n_energies"]) - self.n_energies


def ess_share(log_w: Tensor) -> Tensor:
    """Effective sample size as a share of all samples; those without a finite log-weight have weight 0."""
    finite = torch.isfinite(log_w)
    largest = torch.where(finite, log_w, -torch.inf).max()
    w = torch.where(finite, torch.exp(log_w - largest), 0.0)
    # None is finite: 0, not 0 / 0.
    return w.sum().square() / w.square().sum().clamp(min=1.0) / log_w.numel()
