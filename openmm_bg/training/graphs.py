"""Whole training steps as CUDA graphs: recorded once, then replayed without Python and without a wait per kernel.

A step of the flow is thousands of small kernels, whose launches cost more than their work. A graph replays them all at
once, but on the same memory, with the same shapes and with every number of Python's frozen. What cannot be frozen runs
*outside*: draws of frames and of base samples, energies (of Contexts or of the twin), the decomposition of the W2 loss.
A recorded step is therefore a list of graphs with calls between them, whose results are copied to where the next graph
expects them.

The first replay is compared with the same step taken without graphs, and so is every one until a gradient is finite. If
gradient or figures differ, or if recording fails, training goes on without graphs and says so.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Calls a function of tensors, whose result is a tensor or a tuple of tensors (and None), always of the same shapes.
Outside = Callable[..., Any]
#: What a step returns, and where it has left its gradient.
Result = dict[str, Tensor]

#: Steps before the recording: libraries load their kernels and reserve their memory.
WARMUP = 3


def called(function: Callable[..., Any], *inputs: Any) -> Any:
    """The result of the function: `Outside` where nothing is recorded."""
    return function(*inputs)


class Recorder(Protocol):
    """What records kernels. `CudaRecorder` is the one in use; tests have one that records torch's calls on a CPU."""

    def begin(self) -> None:
        """From now on, kernels are recorded and not run."""

    def end(self) -> Callable[[], None]:
        """No longer; calling the result runs what was recorded since `begin`."""

    def abandon(self) -> None:
        """No longer, and forget what was recorded; does nothing where nothing is being recorded."""

    def random_state(self) -> Any:
        """That of the generator whose numbers are drawn by recorded kernels."""

    def set_random_state(self, state: Any) -> None:
        """Put it back."""


class CudaRecorder:
    """CUDA graphs that share their memory, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._pool = torch.cuda.graph_pool_handle()
        # Of one's own: torch's for captures is kept for the whole process, on the device where it was first made.
        self._stream = torch.cuda.Stream(self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recording = ExitStack()

    def begin(self) -> None:
        """Kernels of this thread, and of autograd's, are recorded."""
        self._graph = torch.cuda.CUDAGraph()
        self._recording = ExitStack()
        self._recording.enter_context(torch.cuda.device(self._device))
        # `torch.cuda.graph` would not leave its stream after a failure.
        self._recording.enter_context(torch.cuda.stream(self._stream))
        # Other threads may evaluate energies meanwhile.
        self._recording.enter_context(
            torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        )

    def end(self) -> Callable[[], None]:
        """The graph's `replay`."""
        assert self._graph is not None
        graph = self._graph
        try:
            self._recording.close()
        except BaseException:
            self._repair()
            raise
        self._graph = None
        return graph.replay

    def abandon(self) -> None:
        """A recording that failed ends with an error of its own."""
        if self._graph is None:
            return
        with suppress(Exception):
            self._recording.close()
        self._repair()

    def _repair(self) -> None:
        """What a failed capture leaves behind up to torch 2.12: a generator and an allocator that believe in it."""
        self._graph = None
        generator = torch.cuda.default_generators[self._device.index]
        generator.graphsafe_set_state(generator.clone_state())
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)

    def random_state(self) -> Tensor:
        """Of torch's generator for the device."""
        return torch.cuda.get_rng_state(self._device)

    def set_random_state(self, state: Tensor) -> None:
        """Put it back."""
        torch.cuda.set_rng_state(state, self._device)


class _Call:
    """A call between two graphs, and the tensors that stay in their places."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...], recorder: Recorder) -> None:
        self._function, self._inputs, self._recorder = function, inputs, recorder
        result = function(*inputs)
        self._single = not isinstance(result, tuple)
        # Copies: what the function returned may be a view of something that changes.
        self._places = [None if part is None else part.detach().clone() for part in self._parts(result)]
        self.state = recorder.random_state()

    @property
    def draws(self) -> bool:
        """Whether the result depends on a generator and on nothing else."""
        return not self._inputs

    @property
    def result(self) -> Any:
        """What the call returned last, in place."""
        return self._places[0] if self._single else tuple(self._places)

    def __call__(self) -> None:
        result = self._parts(self._function(*self._inputs))
        for place, part in zip(self._places, result, strict=True):
            if place is None and part is None:
                continue
            if place is None or part is None or place.shape != part.shape:
                raise RuntimeError("A call between CUDA graphs returned other shapes than when it was recorded.")
            place.copy_(part)

    def remember_state(self) -> None:
        """Where the generator of recorded numbers stands after this call."""
        self.state = self._recorder.random_state()

    def _parts(self, result: Any) -> tuple[Tensor | None, ...]:
        return (result,) if self._single else tuple(result)


class StepGraphs:
    """A step that is taken again and again, recorded once it is warm.

    Parameters
    ----------
    recorder
        What records.
    gradient
        The tensors in which the step leaves its gradient, always the same ones.
    name
        Of the stage, for messages.
    precision
        In which the step computes. A replay may differ from the plain step by half of its digits, for sums of a GPU
        have no fixed order.

    Attributes
    ----------
    replays
        Steps taken by replay, those that were compared included.
    given_up
        Why there are no graphs (any more), or None.
    """

    def __init__(
        self, recorder: Recorder, gradient: list[Tensor], name: str, precision: torch.dtype = torch.float32
    ) -> None:
        self.replays = 0
        self.given_up: str | None = None
        self._recorder, self._gradient, self._name = recorder, gradient, name
        self._tolerance = torch.finfo(precision).eps ** 0.5
        self._steps = 0
        self._pieces: list[Callable[[], None]] = []
        self._result: Result | None = None
        self._recording = self._compared = False
        self._recalled: list[_Call] = []

    def outside(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Result of ``function(*inputs)``, called anew in every step between graphs.

        Parameters
        ----------
        function
            Takes tensors and returns a tensor, or a tuple of tensors and None, without a graph of autograd and always
            of the same shapes. Without inputs it is a draw; with inputs it depends on nothing else.
        """
        if self._recalled and not inputs:
            call = self._recalled.pop(0)
            self._recorder.set_random_state(call.state)
            return call.result
        if not self._recording:
            return function(*inputs)
        self._end_piece()
        call = _Call(function, inputs, self._recorder)
        self._pieces.append(call)
        self._recorder.begin()
        return call.result

    def run(self, step: Callable[[], Result]) -> Result:
        """Take the step: as it is, while recording it, or by replay.

        Parameters
        ----------
        step
            Returns tensors by name, without a graph of autograd, and leaves its gradient in `gradient`; everything in
            it that draws numbers on the CPU, looks at a number or changes a shape is called through `outside`.
        """
        self._steps += 1
        if self.given_up is not None or self._steps <= WARMUP:
            return step()
        if self._result is None:
            return self._record(step)
        self.replays += 1
        if not self._compared:
            return self._compare(step)
        for piece in self._pieces:
            piece()
        return self._result

    def _record(self, step: Callable[[], Result]) -> Result:
        """Record, and take the step without graphs: nothing has compared them yet."""
        state = self._recorder.random_state()
        gc.collect()  # graphs of an earlier training must not end inside this recording
        self._recording, reason = True, None
        try:
            self._recorder.begin()
            self._result = step()
            self._end_piece()
        except BaseException as error:
            self._recorder.abandon()
            if not isinstance(error, Exception):
                raise
            reason = f"they could not be recorded ({_first_line(error)})"
        finally:
            self._recording = False
        draws = self._draws()
        if reason is not None:  # here, where the error no longer holds the memory of the step
            self._give_up(reason)
        else:
            n_graphs = sum(not isinstance(piece, _Call) for piece in self._pieces)
            logger.info("Stage %s: every step is replayed as %d CUDA graphs.", self._name, n_graphs)
        return self._plainly(step, state, draws)

    def _end_piece(self) -> None:
        """What was recorded runs at once: the call that follows needs its results."""
        piece = self._recorder.end()
        piece()
        self._pieces.append(piece)

    def _compare(self, step: Callable[[], Result]) -> Result:
        """Replay, and take the same step without graphs: the same draws and dropout, everything else anew."""
        assert self._result is not None
        state = self._recorder.random_state()
        for piece in self._pieces:
            piece()
            if isinstance(piece, _Call):
                piece.remember_state()
        gradient = [part.clone() for part in self._gradient]
        replayed = {name: float(value) for name, value in self._result.items()}
        draws = self._draws()
        try:
            result: Result | None = self._plainly(step, state, draws)
        except torch.OutOfMemoryError:
            result = None
        if result is None:  # the graphs hold the memory of a step, and that of another is not there
            self._give_up("memory does not hold a step beside them, with which to compare them")
            return self._plainly(step, state, draws)
        error = float(nn.utils.get_total_norm([a - b for a, b in zip(gradient, self._gradient, strict=True)]))
        norm = float(nn.utils.get_total_norm(self._gradient))
        if not math.isfinite(norm):
            return result  # it proves nothing
        if not error <= self._tolerance * norm:
            self._give_up(f"the gradient of a replayed step is wrong by {error:.2g}, its norm is {norm:.2g}")
            return result
        plain = {name: float(value) for name, value in result.items()}
        wrong = [name for name, value in plain.items() if not self._agree(replayed.get(name, math.nan), value)]
        if wrong:
            self._give_up(f"figures of a replayed step are wrong ({', '.join(wrong)})")
        self._compared = True
        return result

    def _agree(self, a: float, b: float) -> bool:
        return a == b or abs(a - b) <= self._tolerance * max(1.0, abs(b)) or (math.isnan(a) and math.isnan(b))

    def _plainly(self, step: Callable[[], Result], state: Any, draws: list[_Call]) -> Result:
        """The step without graphs, from a state of the generator, with the draws that were made for it."""
        self._recorder.set_random_state(state)
        self._recalled = list(draws)
        try:
            return step()
        finally:
            self._recalled = []

    def _draws(self) -> list[_Call]:
        return [piece for piece in self._pieces if isinstance(piece, _Call) and piece.draws]

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        self._pieces, self._result = [], None
        logger.warning("Stage %s trains without CUDA graphs: %s.", self._name, reason)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
