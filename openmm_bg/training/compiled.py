"""Passes through the flow whose gradients a training takes, compiled by torch.compile.

What is compiled is decided by measurement (docs/benchmarks.md, "Compiled training"): log q of batches of one size, of
which every loss but `kl`, `w2` and `path` consists. The first call costs a minute or more, so it is made before the
clock of a stage runs; torch keeps the result in its cache (``TORCHINDUCTOR_CACHE_DIR``).

torch.compile's own CUDA graphs are left out: they write over gradients that are held (pytorch issue 169545).
`openmm_bg.training.graphs` records whole steps instead.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Rows that fill a batch up to the size compiled for are thrown away; a batch with more than this share of them does
#: not gain, and is passed as it is.
FILLED = 0.25


class CompiledDensity:
    """Stand-in for a flow in training: the same numbers up to rounding, parameters and state, from compiled code.

    Compiled code serves log q of rows in training mode that take a gradient with respect to parameters, once `prepare`
    has been called for their number. Its graph can be run backwards once: torch gives the memory away. Everything else,
    validation, samples and gradients with respect to coordinates, is the flow's own.

    Parameters
    ----------
    density
        `openmm_bg.flow.FlowDensity` or its like. It is not changed: weights, their names, checkpoints and artifacts are
        those of an eager training.
    backend
        Of torch.compile. "inductor" writes C++ for a CPU and Triton for a GPU.

    Attributes
    ----------
    seconds
        Spent compiling.
    """

    def __init__(self, density: Any, backend: str = "inductor") -> None:
        self.density = density
        self.seconds = 0.0
        self._backend = backend
        self._log_prob: Callable[[Tensor], Tensor] | None = None
        self._example: Tensor | None = None
        self._given_up = False

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        return self.density.training

    def train(self) -> None:
        """Dropout on."""
        self.density.train()

    def eval(self) -> None:
        """Dropout off."""
        self.density.eval()

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The density's `forward`."""
        return self.density.forward(z)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The density's."""
        return self.density.forward(z)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The density's."""
        return self.density.inverse(y)

    def base_log_prob(self, z: Tensor) -> Tensor:
        """The density's."""
        return self.density.base_log_prob(z)

    def sample_base(self, n: int) -> Tensor:
        """The density's."""
        return self.density.sample_base(n)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """The density's."""
        return self.density.sample(n)

    def log_prob(self, y: Tensor) -> Tensor:
        """[B] of y [B, D]: compiled if this is a batch of training, at most a little smaller than prepared for."""
        missing = self._missing_rows(y)
        if missing is None:
            return self.density.log_prob(y)
        assert self._log_prob is not None
        whole = y if missing == 0 else torch.cat([y, y[-1:].expand(missing, -1)])
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                return self._log_prob(whole)[: y.shape[0]]
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            # Seen before anything ran: no random number is lost.
            logger.warning("The flow trains on without its compiled code, which no longer fits: %s.", _reason(error))
        self._give_up()
        return self.density.log_prob(y)

    def _missing_rows(self, y: Tensor) -> int | None:
        """How many rows make this the batch compiled for; None where compiled code does not serve."""
        if self._log_prob is None or self._example is None or not self.training:
            return None
        if not torch.is_grad_enabled() or y.requires_grad or y.dtype != self._example.dtype:
            return None
        missing = self._example.shape[0] - y.shape[0]
        return missing if 0 <= missing <= FILLED * self._example.shape[0] else None

    def prepare(self, y: Tensor) -> None:
        """Compile log q and its gradient for batches like y [B, D]; nothing is left of the call but the code.

        Where it is not possible, one warning says why, and everything goes on uncompiled.
        """
        if self._given_up or (self._example is not None and self._example.shape == y.shape):
            return
        obstacle = missing_compiler(y.device) if self._backend == "inductor" else None
        if obstacle is not None:
            logger.warning("The flow trains without torch.compile: %s.", obstacle)
            self._give_up()
            return
        logger.info("Compiling the flow for batches of %d: a minute or more, seconds if it was done before.", len(y))
        began = time.perf_counter()
        try:
            with _settings(), torch.random.fork_rng(devices=[y.device] if y.device.type == "cuda" else []):
                # torch's own random numbers, so that dropout draws the masks of an eager training.
                options: Any = {"fallback_random": True} if self._backend == "inductor" else None
                compiled = torch.compile(
                    self.density.log_prob, dynamic=False, fullgraph=True, backend=self._backend, options=options
                )
                compiled(y).mean().backward()
            self._log_prob, self._example = compiled, y
        except Exception as error:  # whatever torch's compiler and the C++ compiler raise
            logger.warning("The flow trains without torch.compile, which failed here: %s.", _reason(error))
            self._give_up()
        finally:
            _end_workers()
            for parameter in self.density.parameters():
                parameter.grad = None
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if not self._given_up:
            logger.info("Compiled in %.0f s, which do not count as training.", seconds)

    def _give_up(self) -> None:
        self._given_up, self._log_prob = True, None


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, as the end of a sentence; None if there is a C++ compiler.

    A GPU needs none, its kernels are Triton's.
    """
    if device.type != "cpu":
        return None
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses
    if shutil.which(name) is not None:
        return None
    return f"there is no C++ compiler {name} (install g++, or name another in the environment variable CXX)"


@contextmanager
def _settings() -> Iterator[None]:
    """Settings that code compiled inside keeps."""
    import torch._dynamo.config as tracing

    # Every flow that this process trains is one more version of the same function, of which torch allows eight.
    with tracing.patch(recompile_limit=256):
        yield


def _end_workers() -> None:
    """Processes that compiled are not needed while the flow trains, and each holds a copy of torch."""
    end = getattr(sys.modules.get("torch._inductor.async_compile"), "shutdown_compile_workers", None)
    if end is not None:
        end()


def _reason(error: BaseException) -> str:
    """The first telling line of what torch says."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.endswith("raised:")]
    return telling[0].rstrip(".") if telling else type(error).__name__
