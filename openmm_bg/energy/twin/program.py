"""Formulas made into straight-line code.

What depends on no position (parameters and what is computed from them alone) is evaluated once, in double precision,
and kept as tables; equal subexpressions of all outputs are computed once; powers are products. Operands that vary along
one axis only (a particle's own parameter, its Born radius) are combined with each other first, so that broadcasting
keeps them small for as long as possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .algebra import Node, multiply, number, symbol, total, whole_power
from .tables import Table

#: A literal, or the name of a variable of the code.
Operand: TypeAlias = str | float


@dataclass(frozen=True)
class Instruction:
    """One operation: ``target = op(*operands)``, varying along ``axes`` (see `_Value`)."""

    target: str
    op: str
    operands: tuple[Any, ...]
    axes: int


#: Torch code of each operation but ``table``, whose first two operands are a name and the orders of a derivative.
TORCH = {
    **{name: f"torch.{name}({{}})" for name in ("sqrt", "rsqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos")},
    **{name: f"torch.{name}({{}})" for name in ("atan", "sinh", "cosh", "tanh", "erf", "erfc", "abs", "floor", "ceil")},
    **{"mul": "{} * {}", "add": "{} + {}", "sub": "{} - {}", "recip": "torch.reciprocal({})"},
    **{"step": "{} >= 0.0", "delta": "{} == 0.0", "truth": "{} != 0.0"},  # masks
    "number": "({}).to({}.dtype)",  # of a mask, as precise as the second operand
    "where": "torch.where({}, {}, {})",
    "addcmul": "torch.addcmul({}, {}, {}, value={})",
    "axpy": "torch.add({}, {}, alpha={})",
    "min": "torch.minimum({}, {})",
    "max": "torch.maximum({}, {})",
    "at most": "torch.clamp({}, max={})",
    "at least": "torch.clamp({}, min={})",
    "pow": "torch.pow({}, {})",
    "atan2": "torch.atan2({}, {})",
    "fill": "torch.full_like({}, {})",
}
MASKS = ("step", "delta", "truth")
FUNCTIONS = (
    "sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "erf", "erfc", "abs",
    "floor", "ceil",
)  # fmt: skip


@dataclass(frozen=True)
class _Value:
    """An operand and the axes that it varies along: bit 1 for first particles, 2 for second ones, 4 for both."""

    operand: Operand
    axes: int


class Program:
    """Straight-line code for several formulas at once.

    Parameters
    ----------
    outputs
        Formulas by name; their values are returned in this order.
    dynamic
        Symbols that are given at every call, and the axes along which each varies (see `_Value`). The symbol ``r`` of a
        pair is given as its square, under the name ``r2``.
    axes
        Axes along which the other symbols vary; by default none.

    Attributes
    ----------
    inputs
        Dynamic symbols in the order in which `__call__` takes them.
    statics
        Formulas of what is constant, in the order in which `__call__` takes their values.
    instructions
        The code, in order.
    returned
        Name of each output's value.
    source
        The code for torch.
    """

    def __init__(
        self, outputs: Mapping[str, Node], dynamic: Mapping[str, int], axes: Mapping[str, int] | None = None
    ) -> None:
        self.names = list(outputs)
        self.dynamic = dict(dynamic)
        self._axes = {**(axes or {}), **dynamic}
        self.inputs: list[str] = []
        self.statics: list[Node] = []
        self.instructions: list[Instruction] = []
        self._values: dict[Node, _Value] = {}
        self._powers: dict[tuple[Operand, int], Operand] = {}
        self._distance: set[str] = set()
        self._count = 0
        self._static_program: Program | None = None
        self._scan_distance(outputs.values())
        self.returned = [self._as_tensor(node) for node in outputs.values()]
        self.source = "\n    ".join(
            [
                "def program(inputs, statics, tables):",
                *(f"x{i} = inputs[{i}]" for i in range(len(self.inputs))),
                *(f"s{i} = statics[{i}]" for i in range(len(self.statics))),
                *map(_torch_line, self.instructions),
                f"return ({', '.join(self.returned)}{',' if self.returned else ''})",
            ]
        )
        scope: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan}
        # The code consists of the operators above, numbers, and names made here: nothing of a System's own text.
        exec(compile(self.source, "<formulas of a System>", "exec"), scope)
        self.function: Callable[..., tuple[Tensor, ...]] = scope["program"]
        self.needed_tables = sorted({name for node in outputs.values() for name in node.tables})

    def __call__(
        self, inputs: Mapping[str, Tensor], statics: Sequence[Tensor], tables: Mapping[str, Table]
    ) -> dict[str, Tensor]:
        """Evaluate all outputs; an output that varies along fewer axes than its inputs is not expanded."""
        found = self.function([inputs[name] for name in self.inputs], statics, tables)
        return dict(zip(self.names, found, strict=True))

    def evaluate_statics(self, values: Mapping[str, Tensor], tables: Mapping[str, Table]) -> list[Tensor]:
        """Values of `statics`, float64.

        Parameters
        ----------
        values
            Float64 values of all symbols that are not dynamic, in shapes that broadcast with each other.
        tables
            Tabulated functions by name.
        """
        if self._static_program is None:
            wanted = {str(i): node for i, node in enumerate(self.statics) if node.op != "number"}
            self._static_program = Program(wanted, {name: 0 for node in wanted.values() for name in node.symbols})
        found = self._static_program(values, [], tables)
        like = next(iter(values.values()), torch.zeros((), dtype=torch.float64))
        return [
            torch.tensor(node.args[0], dtype=torch.float64, device=like.device)
            if node.op == "number"
            else found[str(i)]
            for i, node in enumerate(self.statics)
        ]

    # ------------------------------------------------------------------ what varies, and along what

    def _is_static(self, node: Node) -> bool:
        return not node.symbols & self.dynamic.keys()

    def _axes_of(self, node: Node) -> int:
        axes = 0
        for name in node.symbols:
            axes |= self._axes.get(name, 0)
        return axes

    def static_axes(self, index: int) -> int:
        """Axes along which one of `statics` varies."""
        return self._axes_of(self.statics[index])

    def _scan_distance(self, nodes: Any) -> None:
        """Which of r and 1/r the formulas need besides r²."""
        seen: set[Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node in seen or "r" not in node.symbols or "r" not in self.dynamic:
                continue
            seen.add(node)
            exponents = {child: e for child, e in node.args} if node.op == "product" else {}
            for child in node.children():
                if child.args == ("r",) and child.op == "symbol":
                    exponent = exponents.get(child, 1)
                    if exponent < 0:
                        self._distance.add("inverse")
                    elif exponent % 2:
                        self._distance.add("plain")
            stack.extend(node.children())
        if any(node.op == "symbol" and node.args == ("r",) for node in nodes):
            self._distance.add("plain")

    # ------------------------------------------------------------------ code

    def _write(self, op: str, *operands: Any, axes: int) -> str:
        name = f"v{len(self.instructions)}"
        self.instructions.append(Instruction(name, op, operands, axes))
        return name

    def _input(self, name: str) -> str:
        if name not in self.inputs:
            self.inputs.append(name)
        return f"x{self.inputs.index(name)}"

    def _static(self, node: Node) -> _Value:
        if node.value is not None:
            return _Value(node.value, 0)
        if node not in self.statics:
            self.statics.append(node)
        return _Value(f"s{self.statics.index(node)}", self._axes_of(node))

    def _as_tensor(self, node: Node) -> str:
        operand = self._emit(node).operand
        if isinstance(operand, float):
            if node not in self.statics:
                self.statics.append(node)
            return f"s{self.statics.index(node)}"
        return operand

    def _emit(self, node: Node) -> _Value:
        if self._is_static(node):
            return self._static(node)
        if node not in self._values:
            self._values[node] = _Value(self._code(node), self._axes_of(node))
        return self._values[node]

    def _code(self, node: Node) -> Operand:
        if node.op == "symbol":
            return self._r(1) if node.args[0] == "r" else self._input(node.args[0])
        if node.op == "sum":
            return self._sum(self._axes_of(node), *node.args)
        if node.op == "product":
            return self._product(self._axes_of(node), 1.0, node)
        if node.op == "table":
            name, orders, arguments = node.args
            operands = [self._emit(argument).operand for argument in arguments]
            return self._write("table", name, orders, *operands, axes=self._axes_of(node))
        return self._function(self._axes_of(node), *node.args)

    def _r(self, exponent: int) -> Operand:
        """A power of the distance, from its square."""
        square, axes = self._input("r2"), self.dynamic["r"]
        if ("plain", 1) not in self._powers and "plain" in self._distance:
            self._powers["plain", 1] = self._write("sqrt", square, axes=axes)
        if ("inverse", 1) not in self._powers and "inverse" in self._distance:
            if "plain" in self._distance:
                self._powers["inverse", 1] = self._write("recip", self._powers["plain", 1], axes=axes)
            else:
                self._powers["inverse", 1] = self._write("rsqrt", square, axes=axes)
        if exponent < 0:
            return self._raise(self._powers["inverse", 1], -exponent, axes)
        if exponent % 2 == 0:
            return self._raise(square, exponent // 2, axes)
        plain = self._powers["plain", 1]
        return (
            plain if exponent == 1 else self._write("mul", plain, self._raise(square, exponent // 2, axes), axes=axes)
        )

    def _raise(self, operand: Operand, exponent: int, axes: int) -> Operand:
        if exponent == 1:
            return operand
        if (operand, exponent) not in self._powers:
            half = self._raise(operand, exponent - 1 if exponent % 2 else exponent // 2, axes)
            self._powers[operand, exponent] = self._write("mul", half, operand if exponent % 2 else half, axes=axes)
        return self._powers[operand, exponent]

    def _whole_power(self, base: Node, exponent: int) -> _Value:
        axes = self._axes_of(base)
        if base.op == "symbol" and base.args[0] == "r":
            return _Value(self._r(exponent), axes)
        operand = self._emit(base).operand
        if exponent < 0:
            if (operand, -1) not in self._powers:
                self._powers[operand, -1] = self._write("recip", operand, axes=axes)
            operand = self._powers[operand, -1]
        return _Value(self._raise(operand, abs(exponent), axes), axes)

    def _factors(self, coefficient: float, node: Node) -> tuple[float, list[_Value]]:
        """A number, and operands whose product it multiplies, those along the same axes combined."""
        powers = node.args if node.op == "product" else ((node, 1),)
        static = [whole_power(base, exponent) for base, exponent in powers if self._is_static(base)]
        values = [self._whole_power(base, exponent) for base, exponent in powers if not self._is_static(base)]
        if static:
            values.append(self._static(multiply(number(coefficient), *static)))
            coefficient = 1.0
        values.sort(key=lambda value: value.axes)
        joined: list[_Value] = []
        for value in values:
            if joined and joined[-1].axes == value.axes:
                last = joined.pop()
                value = _Value(self._write("mul", last.operand, value.operand, axes=value.axes), value.axes)
            joined.append(value)
        return coefficient, joined

    def _times(self, factors: list[_Value]) -> _Value:
        product = factors[0]
        for factor in factors[1:]:
            axes = product.axes | factor.axes
            product = _Value(self._write("mul", product.operand, factor.operand, axes=axes), axes)
        return product

    def _product(self, axes: int, coefficient: float, node: Node) -> Operand:
        coefficient, factors = self._factors(coefficient, node)
        if coefficient != 1.0:
            scaled = self._write("mul", factors[0].operand, coefficient, axes=factors[0].axes)
            factors = [_Value(scaled, factors[0].axes), *factors[1:]]
        return self._times(factors).operand

    def _sum(self, axes: int, constant: float, terms: tuple[tuple[float, Node], ...]) -> Operand:
        static = [multiply(number(c), t) for c, t in terms if self._is_static(t)]
        pieces = sorted(
            ((c, t) for c, t in terms if not self._is_static(t)), key=lambda item: (self._axes_of(item[1]), -item[0])
        )
        fixed = self._static(total(static) + constant) if static or constant else None
        if fixed is None and len(pieces) == 1:
            return self._product(axes, *pieces[0])
        if fixed is not None and isinstance(fixed.operand, str):
            running = fixed
        else:
            (coefficient, node), pieces = pieces[0], pieces[1:]
            own = self._axes_of(node)
            if fixed is None:
                running = _Value(self._product(own, coefficient, node), own)
            elif coefficient == -1.0:
                running = _Value(self._write("sub", fixed.operand, self._product(own, 1.0, node), axes=own), own)
            else:
                running = _Value(
                    self._write("add", self._product(own, coefficient, node), fixed.operand, axes=own), own
                )
        for coefficient, node in pieces:
            factor, factors = self._factors(coefficient, node)
            reach = running.axes | self._axes_of(node)
            if len(factors) > 1:
                first, last = self._times(factors[:-1]), factors[-1]
                code = self._write("addcmul", running.operand, first.operand, last.operand, factor, axes=reach)
            elif factor in (1.0, -1.0):
                code = self._write("add" if factor > 0 else "sub", running.operand, factors[0].operand, axes=reach)
            else:
                code = self._write("axpy", running.operand, factors[0].operand, factor, axes=reach)
            running = _Value(code, reach)
        return running.operand

    def _function(self, axes: int, name: str, arguments: tuple[Node, ...]) -> Operand:
        if name == "select":
            condition, *branches = arguments
            if self._is_static(condition):
                mask: Operand = self._static(Node("function", ("mask", (condition,)))).operand
            else:
                reach, test = self._axes_of(condition), "truth"
                if condition.op == "function" and condition.args[0] in MASKS:
                    test, (condition,) = condition.args
                mask = self._write(test, self._emit(condition).operand, axes=reach)
            yes, no = (self._emit(branch).operand for branch in branches)
            return self._write("where", mask, yes, no, axes=axes)
        operands = [self._emit(argument).operand for argument in arguments]
        if name == "mask":
            return self._write("truth", operands[0], axes=axes)
        if name in MASKS:
            return self._write("number", self._write(name, operands[0], axes=axes), operands[0], axes=axes)
        if name in FUNCTIONS:
            return self._write(name, operands[0], axes=axes)
        a, b = operands
        if name in ("min", "max"):
            if isinstance(a, float) or isinstance(b, float):
                a, b = (b, a) if isinstance(a, float) else (a, b)
                name = "at most" if name == "min" else "at least"
        elif name == "atan2":
            if isinstance(a, float):
                a = self._write("fill", b, a, axes=axes)
            elif isinstance(b, float):
                b = self._write("fill", a, b, axes=axes)
        return self._write(name, a, b, axes=axes)


def _torch_line(instruction: Instruction) -> str:
    if instruction.op == "table":
        name, orders, *operands = instruction.operands
        return f"{instruction.target} = tables[{name!r}].evaluate({orders!r}, {', '.join(map(str, operands))})"
    operands = [repr(o) if isinstance(o, float) else o for o in instruction.operands]
    return f"{instruction.target} = " + TORCH[instruction.op].format(*operands)


def distance_factor(energy: Node) -> Node:
    """(dE/dr)/r of a pair's energy: times the vector between the two, it is the gradient."""
    return energy.derivative("r") / symbol("r")


def swap(node: Node, pairs: Mapping[str, str]) -> Node:
    """The formula with the names of two particles' quantities exchanged."""
    both = {**pairs, **{b: a for a, b in pairs.items()}}
    return node.substitute({a: symbol(b) for a, b in both.items()})
