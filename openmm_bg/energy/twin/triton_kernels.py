"""A pass over all pairs as one Triton kernel, made from the same instructions as its torch and its C++ code.

A program of the kernel holds ``ROWS`` atoms of ``FRAMES`` frames and walks through all other atoms, one after another:
neighbouring threads do the same to neighbouring frames, so that what they read lies side by side, and parameters of a
pair are one number for all of them. Every atom's sums belong to one program: nothing is added up across threads, there
are no atomic additions, and a batch gives the same bits each time. A pair is visited from both of its ends, in two
loops, for its formula may treat the lower index differently; its energy is counted from the lower end only.

Pairs are evaluated in the twin's precision. Energies and sums over an atom's pairs are added up in float64: weights are
made of differences of energies, and a Born radius enters the energy of every pair. Gradients are added up in the twin's
precision: each of their terms has been rounded so, and none enters another formula.

The kernels have been run by Triton's interpreter and compiled for a GPU, **but never run on one**. The interpreter (the
environment has ``TRITON_INTERPRET=1`` when the twin is made) takes tensors on the CPU; it is slow, and meant for tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import linecache
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .program import MASKS, Instruction, Program

if TYPE_CHECKING:
    from .pairs import PairPass

logger = logging.getLogger(__name__)

#: Atoms and frames of a program, powers of two. To be tuned where there is a GPU, as are the warps that share them.
ROWS, FRAMES = 4, 64
#: How kernels are compiled.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}

#: Operations of Triton's own language; all others are called in CUDA's libdevice.
OPERATIONS = {
    **{"mul": "{} * {}", "add": "{} + {}", "sub": "{} - {}", "recip": "one / {}"},
    **{"step": "{} >= 0.0", "delta": "{} == 0.0", "truth": "{} != 0.0"},  # masks
    **{name: f"tl.{name}({{}})" for name in ("sqrt", "rsqrt", "exp", "log", "sin", "cos", "erf", "abs")},
    **{name: f"tl.{name}({{}})" for name in ("floor", "ceil")},
}

KERNEL = """
def @NAME@(@ARGUMENTS@, ROWS: tl.constexpr, FRAMES: tl.constexpr):
    first = tl.program_id(0) * ROWS
    i = first + tl.arange(0, ROWS)[:, None]
    b = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)[None, :]
    atom = i < n
    frame = b < batch
    inside = atom & frame
    wide = n.to(tl.int64)
    zero = tl.full((ROWS, FRAMES), 0.0, @REAL@)
    one = tl.full((1, 1), 1.0, @REAL@)  # of no particle and frame yet: what it divides may be of one only
    @CONSTANTS@
    own = i * batch + b
    xi = tl.load(x + own, mask=inside, other=0.0)
    yi = tl.load(x + n * batch + own, mask=inside, other=0.0)
    zi = tl.load(x + 2 * n * batch + own, mask=inside, other=0.0)
    @START@
"""

#: A loop over the other atoms; ``@P@`` is the prefix of its variables.
LOOP = """
    @BEFORE@
    for j in range(@RANGE@):
        @P@at = x + j * batch + b
        @P@dx = xi - tl.load(@P@at, mask=frame, other=0.0)
        @P@dy = yi - tl.load(@P@at + n * batch, mask=frame, other=0.0)
        @P@dz = zi - tl.load(@P@at + 2 * n * batch, mask=frame, other=0.0)
        @P@counts = @COUNTS@
        @P@r2 = tl.where(@P@counts, @P@dx * @P@dx + @P@dy * @P@dy + @P@dz * @P@dz, one)
        @INSIDE@
"""


class TritonKernel:
    """The Triton code of one pass.

    Parameters
    ----------
    name
        Of the kernel.
    pairs
        The pass.
    dtype
        Precision of pairs.

    Attributes
    ----------
    source
        The code.
    arguments
        Names of the kernel's arguments that are no compile-time constants.
    """

    def __init__(self, name: str, pairs: PairPass, dtype: torch.dtype) -> None:
        self.name, self.pairs, self.dtype = name, pairs, dtype
        self.program: Program = pairs.formula.program
        self.sums = list(dict.fromkeys(o[:-1] for o in pairs.outputs if o not in ("energy", "factor")))
        self.arguments = ["n", "batch", "x"]
        self.arguments += [output for output in ("energy", "factor") if output in pairs.outputs]
        self.arguments += [f"field{k}" for k in range(len(pairs.fields))]
        self.arguments += [f"s{k}" for k in range(len(self.program.statics))]
        self.arguments += [f"sum{k}" for k in range(len(self.sums))]
        self.source = _Writer(self).source
        self.call: Any = None
        self.interpreted = False
        self._statics: list[Tensor] = []

    def prepare(self, statics: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Lay out what is constant: tables of pairs are made symmetric, so that either end finds its row."""
        n = self.pairs.n_atoms
        self._statics = []
        for k, tensor in enumerate(statics):
            axes = self.program.static_axes(k)
            if axes in (0, 1, 2):
                self._statics.append(tensor.to(dtype).expand({0: (1,), 1: (n, 1, 1), 2: (1, n, 1)}[axes]).contiguous())
                continue
            upper = torch.triu(tensor.to(dtype).expand(n, n, 1)[..., 0], diagonal=1)
            self._statics.append((upper + upper.T).contiguous())

    def run(self, x: Tensor, fields: Mapping[str, Tensor], gradient: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `PairPass.evaluate`."""
        n, batch = self.pairs.n_atoms, x.shape[2]
        energies = x.new_empty((n, batch), dtype=torch.float64)
        sums = {name: x.new_empty((n, batch)) for name in self.sums}
        given = [x, *([energies] if "energy" in self.pairs.outputs else [])]
        if "factor" in self.pairs.outputs:
            assert gradient is not None
            given.append(gradient)
        given += [fields[name].contiguous() for name in self.pairs.fields]
        given += [*self._statics, *sums.values()]
        grid = (-(-n // ROWS), -(-batch // FRAMES))
        around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.interpreted:
            around = np.errstate(all="ignore")  # as on a device, where infinities are numbers like others
        elif x.device.type == "cuda":
            around = torch.cuda.device(x.device)  # Triton launches on the current device, wherever the tensors are
        with around:
            self.call[grid](n, batch, *given, ROWS=ROWS, FRAMES=FRAMES, **OPTIONS)
        return energies.sum(0) if "energy" in self.pairs.outputs else energies.new_zeros(batch), sums


class _Writer:
    """Writes the source of one kernel."""

    def __init__(self, kernel: TritonKernel) -> None:
        self.kernel, self.program, self.fields = kernel, kernel.program, kernel.pairs.fields
        self.real = "tl.float32" if kernel.dtype == torch.float32 else "tl.float64"
        self.constants: dict[float, str] = {}
        self.shared: list[str] = []  # what both loops load before they begin
        outputs = dict(zip(self.program.names, self.program.returned, strict=True))
        lower = {name: o for name, o in outputs.items() if name in ("energy", "factor") or name[-1] == "1"}
        upper = {name: o for name, o in outputs.items() if name == "factor" or name[-1] == "2"}
        loops = self._loop("l_", 1, "first + 1, n", "inside & (i < j)", lower)
        if upper:
            loops = self._loop("u_", 2, "0, tl.minimum(first + ROWS - 1, n)", "inside & (j < i)", upper) + loops
        start = list(self.shared)
        end: list[str] = []
        if "energy" in outputs:
            start.append("e = tl.full((ROWS, FRAMES), 0.0, tl.float64)")
            end.append("tl.store(energy + own, e, mask=inside)")
        if "factor" in outputs:
            for k, axis in enumerate("xyz"):
                start.append(f"g{axis} = zero")
                end.append(f"to{axis} = factor + {k} * n * batch + own")
                end.append(f"tl.store(to{axis}, tl.load(to{axis}, mask=inside, other=0.0) + g{axis}, mask=inside)")
        for k in range(len(kernel.sums)):
            start.append(f"q{k} = tl.full((ROWS, FRAMES), 0.0, tl.float64)")
            end.append(f"tl.store(sum{k} + own, q{k}.to({self.real}), mask=inside)")
        constants = [f"{name} = tl.full((1, 1), {_literal(c)}, {self.real})" for c, name in self.constants.items()]
        text = KERNEL.replace("@NAME@", kernel.name).replace("@ARGUMENTS@", ", ".join(kernel.arguments))
        text = text.replace("@CONSTANTS@", "\n    ".join(constants)).replace("@START@", "\n    ".join(start))
        text = text + loops + "".join(f"    {line}\n" for line in end)
        lines = [line for line in text.replace("@REAL@", self.real).splitlines() if line.strip()]
        self.source = "\n".join(lines) + "\n"

    def _loop(self, p: str, own_axis: int, bounds: str, counts: str, outputs: Mapping[str, str]) -> str:
        """The loop in which the program's atoms are the first (``own_axis`` 1) or second (2) ones of their pairs."""
        before: list[str] = []
        inside: list[str] = []
        loaded: dict[str, str] = {}

        def static(name: str) -> str:
            axes = self.program.static_axes(int(name[1:]))
            variable = f"p_{name}" if axes == 0 else p + name
            if name not in loaded:
                loaded[name] = variable
                if axes == 0:
                    line = f"{variable} = tl.load({name})"
                    if line not in self.shared:
                        self.shared.append(line)
                elif axes == own_axis:
                    before.append(f"{variable} = tl.load({name} + i, mask=atom, other=0.0)")
                elif axes in (1, 2):
                    inside.append(f"{variable} = tl.load({name} + j)")
                else:
                    inside.append(f"{variable} = tl.load({name} + j * wide + i, mask=atom, other=0.0)")
            return variable

        def dynamic(name: str) -> str:
            given = self.program.inputs[int(name[1:])]
            if given == "r2":
                return p + "r2"
            k = self.fields.index(given[:-1])
            if int(given[-1]) == own_axis:
                line = f"p_field{k} = tl.load(field{k} + own, mask=inside, other=0.0)"
                if line not in self.shared:
                    self.shared.append(line)
                return f"p_field{k}"
            variable = f"{p}field{k}"
            if given not in loaded:
                loaded[given] = variable
                inside.append(f"{variable} = tl.load(field{k} + j * batch + b, mask=frame, other=0.0)")
            return variable

        def operand(given: Any) -> str:
            if isinstance(given, float):
                return self.constants.setdefault(given, f"c{len(self.constants)}")
            return {"s": static, "x": dynamic}.get(given[0], lambda name: p + name)(given)

        needed = set(outputs.values())
        wanted: list[Instruction] = []
        for instruction in reversed(self.program.instructions):
            if instruction.target in needed:
                wanted.append(instruction)
                needed.update(o for o in instruction.operands if isinstance(o, str))
        for instruction in reversed(wanted):
            shape = "(1, FRAMES)" if instruction.axes == 3 - own_axis else "(ROWS, FRAMES)"
            code = self._expression(instruction, [operand(o) for o in instruction.operands], shape)
            (before if instruction.axes == own_axis else inside).append(f"{p}{instruction.target} = {code}")
        for output, name in outputs.items():
            value = f"tl.where({p}counts, tl.broadcast_to({operand(name)}, (ROWS, FRAMES)), zero)"
            if output == "factor":  # the vector points to the own atom from either end
                inside.append(f"{p}pull = {value}")
                inside += [f"g{axis} = g{axis} + {p}pull * {p}d{axis}" for axis in "xyz"]
            else:
                total = "e" if output == "energy" else f"q{self.kernel.sums.index(output[:-1])}"
                inside.append(f"{total} = {total} + {value}.to(tl.float64)")
        text = LOOP.replace("@RANGE@", bounds).replace("@COUNTS@", counts).replace("@P@", p)
        return text.replace("@BEFORE@", "\n    ".join(before)).replace("@INSIDE@", "\n        ".join(inside))

    def _expression(self, instruction: Instruction, names: list[str], shape: str) -> str:
        """Triton code of an instruction."""

        def full(k: int) -> str:
            return f"tl.broadcast_to({names[k]}, {shape})"

        match instruction.op:
            case "addcmul":
                scale = "" if instruction.operands[3] == 1.0 else f" * {names[3]}"
                return f"{names[0]} + {names[1]} * {names[2]}{scale}"
            case "axpy":
                return f"{names[0]} + {names[1]} * {names[2]}"
            case "number":
                return f"{names[0]}.to({self.real})"
            case "where":
                mask = instruction.operands[0]
                if not (isinstance(mask, str) and self._is_mask(mask)):
                    names = [f"({names[0]} != 0.0)", *names[1:]]
                return f"tl.where({full(0)}, {full(1)}, {full(2)})"
            case "min" | "at most":  # NaN stays, as in torch
                return f"tl.where(({full(0)} < {full(1)}) | ({full(0)} != {full(0)}), {full(0)}, {full(1)})"
            case "max" | "at least":
                return f"tl.where(({full(0)} > {full(1)}) | ({full(0)} != {full(0)}), {full(0)}, {full(1)})"
            case "fill":
                return full(1)
            case op if op in OPERATIONS:
                return OPERATIONS[op].format(*names)
        return f"libdevice.{instruction.op}({', '.join(full(k) for k in range(len(names)))})"

    def _is_mask(self, name: str) -> bool:
        return any(i.target == name and i.op in MASKS for i in self.program.instructions)


def _literal(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value!r}")'


class _Interpreted:
    """What CUDA's libdevice does, for the interpreter, which has none: torch's functions of the numbers inside."""

    def __init__(self, language: Any, handle: Any) -> None:
        self._language, self._handle = language, handle

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> Any:
            numbers = [torch.from_numpy(argument.handle.data.copy()) for argument in arguments]
            found = getattr(torch, name)(*numbers).numpy()
            return self._language.tensor(self._handle(found, arguments[0].dtype), arguments[0].type)

        return function


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot be used on a device, as the end of a sentence; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and not importlib.import_module("triton").knobs.runtime.interpret:
        return f"Triton needs a CUDA device and not {device.type}, unless TRITON_INTERPRET=1 has it interpreted"
    return None


def build(kernels: Sequence[TritonKernel]) -> None:
    """Make the kernels callable; Triton compiles each when it is first called, and keeps what it has compiled."""
    triton = importlib.import_module("triton")
    interpreted = bool(triton.knobs.runtime.interpret)
    language = importlib.import_module("triton.language")
    scope: dict[str, Any] = {"tl": language, "libdevice": importlib.import_module("triton.language.extra.libdevice")}
    if interpreted:
        handle = importlib.import_module("triton.runtime.interpreter").TensorHandle
        scope |= {"libdevice": _Interpreted(language, handle), "range": _interpreted_range}
    for kernel in kernels:
        kernel.call = triton.jit(_function(kernel, scope), do_not_specialize=["n", "batch"])
        kernel.interpreted = interpreted


def _interpreted_range(start: Any, stop: Any) -> range:
    """Python's range of the interpreter's numbers, which are arrays of one element."""

    def whole(bound: Any) -> int:
        return bound if isinstance(bound, int) else int(bound.handle.data.item())

    return range(whole(start), whole(stop))


def _function(kernel: TritonKernel, names: Mapping[str, Any]) -> Any:
    """The kernel's source as a Python function, whose source Triton can look up in its turn."""
    digest = hashlib.blake2b(kernel.source.encode(), digest_size=8).hexdigest()
    file = f"<{kernel.name} of a twin, {digest}>"
    linecache.cache[file] = (len(kernel.source), None, kernel.source.splitlines(keepends=True), file)
    # The code consists of the operations above, numbers, and names made here: nothing of a System's own text.
    scope: dict[str, Any] = {"__name__": f"{__name__}.{kernel.name}", **names}
    exec(compile(kernel.source, file, "exec"), scope)
    return scope[kernel.name]


def trial(kernels: Sequence[TritonKernel], device: torch.device) -> str | None:
    """Run prepared kernels on one frame.

    Returns
    -------
    str or None
        Why that was not possible, as the end of a sentence. The interpreter, which compiles nothing, is not tried.
    """
    try:
        for kernel in kernels:
            if kernel.interpreted:
                continue
            n = kernel.pairs.n_atoms
            x = torch.zeros((3, n, 1), dtype=kernel.dtype, device=device)
            kernel.run(x, {name: x[0] for name in kernel.pairs.fields}, torch.zeros_like(x))
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever Triton, its compilers and the driver may raise
        logger.debug("Triton failed.", exc_info=True)
        lines = str(error).strip().splitlines() or [""]
        return f"Triton cannot compile or start them ({type(error).__name__}: {lines[0].rstrip('.')})"
    return None
