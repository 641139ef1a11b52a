"""A pass over all pairs as one loop in C++, made from the same instructions as its torch code.

A vector register holds one number of as many frames as fit (16 in single precision with AVX-512), so that every pair of
every frame is one straight line of vector instructions: nothing is gathered, scattered or kept between two operations,
and each pair is visited once. What varies along one particle only is computed outside the inner loop.

In single precision, energies and sums over an atom's pairs are added up in float64 once a few have been added up
(`BLOCK`); gradients, each of whose terms has been rounded and none of which enters another formula, are not.

The code needs a C++ compiler with vector extensions (g++ or clang++). The library is kept in the user's cache
directory under a digest of source and machine, so that a formula is compiled once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .program import FUNCTIONS, MASKS, Instruction, Program

if TYPE_CHECKING:
    from .pairs import PairPass

logger = logging.getLogger(__name__)

#: Bytes of a vector; on machines with shorter registers the compiler uses several.
VECTOR_BYTES = 64

#: Terms that are added up in single precision before their sum goes into one of double precision: those few round no
#: more than the terms do, and to convert every term would cost a fifth of a pair's energy.
BLOCK = 16

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w")

#: Functions written out below for vectors; the others are called for one number at a time.
VECTORISED = ("sqrt", "exp", "log", "abs")

PRELUDE = """
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
typedef @REAL@ T;
typedef @INT@ I;
constexpr int L = @LANES@;
typedef T V __attribute__((vector_size(64)));
typedef I M __attribute__((vector_size(64)));
typedef double W __attribute__((vector_size(8 * L), aligned(64)));  // what sums are made in
constexpr int BLOCK = sizeof(T) == 4 ? @BLOCK@ : 1 << 30;
#define INLINE static inline __attribute__((always_inline))

INLINE W wide(V a) { return __builtin_convertvector(a, W); }
INLINE V all(V a) { return a; }
INLINE V all(T a) { return a - V{}; }
INLINE V pick(M m, V a, V b) { return m ? a : b; }
INLINE V pick(bool m, V a, V b) { return m ? a : b; }
INLINE V least(V a, V b) { return (a < b) | (a != a) ? a : b; }
INLINE V most(V a, V b) { return (a > b) | (a != a) ? a : b; }
INLINE V f_abs(V a) { return a < T(0) ? -a : a; }
INLINE V f_sqrt(V a) {
#if defined(__AVX512F__)
    return (V)(sizeof(T) == 4 ? (V)_mm512_sqrt_ps((__m512)a) : (V)_mm512_sqrt_pd((__m512d)a));
#else
    V r;
    for (int k = 0; k < L; k++) r[k] = std::sqrt(a[k]);
    return r;
#endif
}
// e^a = 2^n e^t with |t| <= log(2)/2, by the series of e^t.
INLINE V f_exp(V a) {
    const T round = T(1.5) * T(@ROUND@);
    V n = (a * T(1.4426950408889634) + round) - round;
    V t = a - n * T(@LN2HIGH@) - n * T(@LN2LOW@);
    V p = all(T(1) / T(@EXPLAST@));
    @EXPSERIES@
    V m = most(least(n, all(T(2 * @BIAS@))), all(T(-2 * @BIAS@)));
    M whole = __builtin_convertvector(m, M), half = whole >> 1, rest = whole - half;
    p = p * (V)((half + I(@BIAS@)) << @MANTISSA@) * (V)((rest + I(@BIAS@)) << @MANTISSA@);
    p = a > T(@EXPMAX@) ? all(std::numeric_limits<T>::infinity()) : p;
    p = a < T(@EXPMIN@) ? V{} : p;
    return a != a ? a : p;
}
// log(2^e m) = e log(2) + 2 atanh((m - 1) / (m + 1)) with m between sqrt(1/2) and sqrt(2).
INLINE V f_log(V a) {
    M tiny = a < std::numeric_limits<T>::min();
    V b = tiny ? a * T(@ROUND@) : a;
    M bits = (M)b;
    M e = (bits >> @MANTISSA@) - I(@BIAS@);
    V m = (V)((bits & ((I(1) << @MANTISSA@) - 1)) | (I(@BIAS@) << @MANTISSA@));
    M big = m > T(1.4142135623730951);
    m = big ? m * T(0.5) : m;
    e = e - big;
    V n = __builtin_convertvector(e, V);
    n = tiny ? n - T(@MANTISSA@) : n;
    V s = (m - T(1)) / (m + T(1)), z = s * s;
    V p = all(T(1) / T(@LOGLAST@));
    @LOGSERIES@
    V r = n * T(@LN2HIGH@) + (T(2) * s * p + n * T(@LN2LOW@));
    r = a > std::numeric_limits<T>::max() ? a : r;
    r = a == T(0) ? all(-std::numeric_limits<T>::infinity()) : r;
    return (a < T(0)) | (a != a) ? all(std::numeric_limits<T>::quiet_NaN()) : r;
}
#define EACH(name, call) INLINE V name(V a) { V r; for (int k = 0; k < L; k++) r[k] = call(a[k]); return r; }
#define EACH2(name, call) \\
    INLINE V name(V a, V b) { V r; for (int k = 0; k < L; k++) r[k] = call(a[k], b[k]); return r; }
EACH2(f_pow, std::pow)
EACH2(f_atan2, std::atan2)
"""

LOOPS = """
extern "C" void @NAME@(int64_t n, int64_t batch, const T* x, const T* const* fields, const T* const* statics,
                       double* energy, T* gradient, T* const* sums, T* scratch) {
    V* work = (V*)scratch;
    V *X = work, *Y = X + n, *Z = Y + n, *GX = Z + n, *GY = GX + n, *GZ = GY + n;
    V *F = GZ + n, *C = F + @FIELDS@ * n, *S = C + @COLUMNS@ * n;
    W *D = (W*)(S + @SUMS@ * n);
@STATICS@
    for (int64_t start = 0; start < batch; start += L) {
        for (int64_t i = 0; i < n; i++) {
            std::memcpy(X + i, x + i * batch + start, sizeof(V));
            std::memcpy(Y + i, x + (n + i) * batch + start, sizeof(V));
            std::memcpy(Z + i, x + (2 * n + i) * batch + start, sizeof(V));
            GX[i] = GY[i] = GZ[i] = V{};
            for (int k = 0; k < @FIELDS@; k++) std::memcpy(F + k * n + i, fields[k] + i * batch + start, sizeof(V));
            for (int k = 0; k < @SUMS@; k++) S[k * n + i] = V{}, D[k * n + i] = W{};
        }
        for (int64_t j = 0; j < n; j++) {
@COLUMN@
        }
        double total[L] = {0.0};
        for (int64_t i = 0; i < n; i++) {
@ROW@
            const V xi = X[i], yi = Y[i], zi = Z[i];
            V gx = {}, gy = {}, gz = {};
            W row = {};
            for (int64_t begin = i + 1, end; begin < n; begin = end) {
                end = n - begin < BLOCK ? n : begin + BLOCK;
                V e = {};@BLOCKSUMS@
                for (int64_t j = begin; j < end; j++) {
                    const V dx = xi - X[j], dy = yi - Y[j], dz = zi - Z[j];
                    const V x_r2 = dx * dx + dy * dy + dz * dz;
@PAIR@
                }
                row += wide(e);@BLOCKSTORE@
            }
            GX[i] += gx; GY[i] += gy; GZ[i] += gz;
            for (int l = 0; l < L; l++) total[l] += row[l];
            if (i % BLOCK == BLOCK - 1 || i == n - 1)
                for (int64_t k = 0; k < @SUMS@ * n; k++) D[k] += wide(S[k]), S[k] = V{};
        }
        for (int l = 0; l < L; l++) energy[start + l] += total[l];
        for (int64_t i = 0; i < n; i++) {
            for (int l = 0; l < L; l++) {
                const int64_t at = i * batch + start + l;
                if (gradient) {
                    gradient[at] += GX[i][l];
                    gradient[n * batch + at] += GY[i][l];
                    gradient[2 * n * batch + at] += GZ[i][l];
                }
                for (int k = 0; k < @SUMS@; k++) sums[k][at] += D[k * n + i][l];
            }
        }
    }
}
"""


def lanes(dtype: torch.dtype) -> int:
    """Frames in a vector."""
    return VECTOR_BYTES // dtype.itemsize


def _prelude(dtype: torch.dtype) -> str:
    single = dtype == torch.float32
    exp_terms, log_terms = (7, 4) if single else (13, 10)
    factorial = [1]
    for k in range(1, exp_terms + 1):
        factorial.append(factorial[-1] * k)
    values = {
        "REAL": "float" if single else "double",
        "INT": "int32_t" if single else "int64_t",
        "LANES": str(lanes(dtype)),
        "BLOCK": str(BLOCK),
        "ROUND": "8388608.0" if single else "4503599627370496.0",
        "MANTISSA": "23" if single else "52",
        "BIAS": "127" if single else "1023",
        # log 2 in two parts, of which the first has few enough bits for its whole multiples to be exact
        "LN2HIGH": "0.693359375" if single else "0.693147180369123816490",
        "LN2LOW": "-2.12194440054690583e-4" if single else "1.90821492927058770002e-10",
        "EXPLAST": f"{factorial[-1]}.0",
        "EXPSERIES": " ".join(f"p = p * t + T(1) / T({f}.0);" for f in reversed(factorial[:-1])),
        "EXPMAX": "88.72283" if single else "709.782712893384",
        "EXPMIN": "-103.97" if single else "-745.13",
        "LOGLAST": f"{2 * log_terms + 1}.0",
        "LOGSERIES": " ".join(f"p = p * z + T(1) / T({2 * k + 1}.0);" for k in reversed(range(log_terms))),
    }
    text = _fill(PRELUDE, values)
    names = [name for name in (*FUNCTIONS,) if name not in VECTORISED]
    return text + "".join(f"EACH(f_{name}, std::{name})\n" for name in names)


def _fill(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _expression(instruction: Instruction, name: Any) -> str:
    """C++ of an instruction; ``name`` writes an operand."""
    op, operands = instruction.op, [name(o) for o in instruction.operands]
    v = [f"all({o})" for o in operands]
    match op:
        case "mul" | "add" | "sub":
            return f"{v[0]} {dict(mul='*', add='+', sub='-')[op]} {v[1]}"
        case "addcmul":
            return f"{v[0]} + {v[1]} * {v[2]}" + ("" if instruction.operands[3] == 1.0 else f" * {operands[3]}")
        case "axpy":
            return f"{v[0]} + {v[1]} * {operands[2]}"
        case "recip":
            return f"T(1) / {v[0]}"
        case "rsqrt":
            return f"T(1) / f_sqrt({v[0]})"
        case "step" | "delta" | "truth":
            return f"({v[0]} {dict(step='>=', delta='==', truth='!=')[op]} T(0))"
        case "number":
            return f"pick({operands[0]}, all(T(1)), V{{}})"
        case "where":
            mask = operands[0] if operands[0].startswith("v") else f"({operands[0]} != T(0))"
            return f"pick({mask}, {v[1]}, {v[2]})"
        case "min" | "at most":
            return f"least({v[0]}, {v[1]})"
        case "max" | "at least":
            return f"most({v[0]}, {v[1]})"
        case "fill":
            return v[1]
        case "pow" | "atan2":
            return f"f_{op}({v[0]}, {v[1]})"
    return f"f_{op}({v[0]})"


def looks_up_nothing(pairs: PairPass) -> bool:
    """Whether a pass looks up no table while positions change, which only torch can."""
    return all(instruction.op != "table" for instruction in pairs.formula.program.instructions)


class Kernel:
    """The C++ of one pass.

    Parameters
    ----------
    name
        Of the C function.
    pairs
        The pass.
    """

    def __init__(self, name: str, pairs: PairPass) -> None:
        self.name, self.pairs = name, pairs
        self.program: Program = pairs.formula.program
        self.sums = list(dict.fromkeys(name[:-1] for name in pairs.outputs if name not in ("energy", "factor")))
        self.columns: list[str] = []
        self.source = self._source()
        self.call: Any = None
        self._statics: list[Tensor] = []

    def _source(self) -> str:
        program = self.program
        kept = {i.target for i in program.instructions if i.axes == 2}

        def name_in(part: int) -> Any:
            def name(operand: Any) -> str:
                if isinstance(operand, float):
                    return f"T({operand!r})" if math.isfinite(operand) else f'T(std::atof("{operand!r}"))'
                if operand.startswith("s"):
                    axes = program.static_axes(int(operand[1:]))
                    index = {0: "0", 1: "i", 2: "j"}.get(axes, "i * n + j")
                    return f"{operand}[{index}]"
                if operand.startswith("x"):
                    given = program.inputs[int(operand[1:])]
                    if given == "r2":
                        return "x_r2"
                    return f"F[{self.pairs.fields.index(given[:-1])} * n + {'i' if given[-1] == '1' else 'j'}]"
                if operand in kept and part != 2:
                    return f"C[{self._column(operand)} * n + j]"
                return str(operand)

            return name

        def type_of(instruction: Instruction) -> str:
            return "const M" if instruction.op in MASKS else "const V"

        row: list[str] = []
        column: list[str] = []
        pair: list[str] = []
        for instruction in program.instructions:
            part = instruction.axes if instruction.axes in (1, 2) else 4
            line = f"{type_of(instruction)} {instruction.target} = {_expression(instruction, name_in(part))};"
            if part == 2:
                kept_value = instruction.target
                if instruction.op in MASKS:  # as a number, which is what `where` takes for a mask that it does not know
                    kept_value = f"pick({instruction.target}, all(T(1)), V{{}})"
                line += f" C[{self._column(instruction.target)} * n + j] = {kept_value};"
                column.append(line)
            else:
                (row if part == 1 else pair).append(line)
        use = name_in(4)
        for output, operand in zip(program.names, program.returned, strict=True):
            value = f"all({use(operand)})"
            if output == "energy":
                pair.append(f"e += {value};")
            elif output == "factor":
                pair.append(f"const V f = {value}, fx = f * dx, fy = f * dy, fz = f * dz;")
                pair.append("gx += fx; gy += fy; gz += fz; GX[j] -= fx; GY[j] -= fy; GZ[j] -= fz;")
            else:
                k = self.sums.index(output[:-1])
                pair.append(f"q{k} += {value};" if output[-1] == "1" else f"S[{k} * n + j] += {value};")
        statics = [f"const T* s{i} = statics[{i}];" for i in range(len(program.statics))]
        return _fill(
            LOOPS,
            {
                "NAME": self.name,
                "FIELDS": str(len(self.pairs.fields)),
                "SUMS": str(len(self.sums)),
                "COLUMNS": str(len(self.columns)),
                "STATICS": "\n".join("    " + line for line in statics),
                "COLUMN": "\n".join(" " * 12 + line for line in column),
                "ROW": "\n".join(" " * 12 + line for line in row),
                "BLOCKSUMS": "".join(f" V q{k} = {{}};" for k in range(len(self.sums))),
                "BLOCKSTORE": "".join(f" D[{k} * n + i] += wide(q{k});" for k in range(len(self.sums))),
                "PAIR": "\n".join(" " * 20 + line for line in pair),
            },
        )

    def _column(self, name: str) -> int:
        if name not in self.columns:
            self.columns.append(name)
        return self.columns.index(name)

    def prepare(self, statics: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Lay out what is constant."""
        n = self.pairs.n_atoms
        shapes = {0: (1,), 1: (n, 1, 1), 2: (1, n, 1)}
        self._statics = [
            tensor.to(dtype).expand(shapes.get(self.program.static_axes(i), (n, n, 1))).contiguous()
            for i, tensor in enumerate(statics)
        ]

    def run(self, x: Tensor, fields: Mapping[str, Tensor], gradient: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `PairPass.evaluate`; the batch must fill whole vectors."""
        n, batch = self.pairs.n_atoms, x.shape[2]
        energy = x.new_zeros(batch, dtype=torch.float64)
        sums = {name: x.new_zeros((n, batch)) for name in self.sums}
        given = [fields[name].contiguous() for name in self.pairs.fields]
        wide = torch.float64.itemsize // x.dtype.itemsize  # vectors for the numbers of one in double precision
        widths = 6 + len(given) + len(self.columns) + len(sums) * (1 + wide)
        count = lanes(x.dtype)
        scratch = x.new_empty((n * widths + 1) * count)
        start = -scratch.data_ptr() % VECTOR_BYTES
        self.call(
            ctypes.c_int64(n), ctypes.c_int64(batch), ctypes.c_void_p(x.data_ptr()), _pointers(given),
            _pointers(self._statics), ctypes.c_void_p(energy.data_ptr()),
            ctypes.c_void_p(0 if gradient is None else gradient.data_ptr()), _pointers(list(sums.values())),
            ctypes.c_void_p(scratch.data_ptr() + start),
        )  # fmt: skip
        return energy, sums


def _pointers(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else g++ or clang++, if there is one."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def cache_folder() -> Path:
    """Where compiled passes are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "openmm_bg" / "twin"


def build(kernels: Sequence[Kernel], dtype: torch.dtype) -> str | None:
    """Compile the kernels and make them callable.

    Returns
    -------
    str or None
        Why it was not possible, as the end of a sentence.
    """
    path = compiler()
    if path is None:
        return "there is no C++ compiler (g++ or clang++)"
    started = time.perf_counter()
    source = _prelude(dtype) + "".join(kernel.source for kernel in kernels)
    try:
        # What -march=native means here shows in the macros that it sets.
        machine = subprocess.run(
            [path, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True, timeout=60
        ).stdout
        digest = hashlib.blake2b(source.encode() + repr(FLAGS).encode() + machine, digest_size=16).hexdigest()
        library = cache_folder() / f"{digest}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                text, made = Path(folder) / "pairs.cpp", Path(folder) / "pairs.so"
                text.write_text(source, encoding="utf-8")
                subprocess.run([path, *FLAGS, str(text), "-o", str(made)], capture_output=True, check=True, timeout=300)
                logger.info("The loops over pairs were compiled in %.1f s.", time.perf_counter() - started)
                os.replace(made, library)  # whole or not at all, whoever else compiles it
        loaded = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        logger.debug("%s", error.stderr.decode(errors="replace"))
        return f"{Path(path).name} cannot compile them"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error).rstrip(".")
    for kernel in kernels:
        kernel.call = getattr(loaded, kernel.name)
        kernel.call.restype = None
    return None
