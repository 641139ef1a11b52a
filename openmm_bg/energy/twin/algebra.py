"""Symbolic algebra: just enough to differentiate the expressions of a force and to write out few operations.

Nodes are immutable and in one canonical form: equal sums and products compare equal however they were written, numbers
are folded, and whole powers are collected (r/r^3 is r^-2). Two nodes are equal if their digests are, so that common
parts of a formula and of its derivatives are recognised and computed once, and whether a formula is symmetric in two
particles can be asked by exchanging their names.

Derivatives at kinks are those of OpenMM's Lepton: zero for ``step``, ``delta``, ``floor`` and ``ceil``, one-sided for
``abs``, ``min`` and ``max``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, reduce
from typing import Any, TypeAlias

import torch

Number: TypeAlias = float | int


class Node:
    """A formula: a number, a symbol, a sum, a product of whole powers, a function, or a tabulated function.

    Attributes
    ----------
    op
        ``number``, ``symbol``, ``sum``, ``product``, ``function`` or ``table``.
    args
        ``(value,)``; ``(name,)``; ``(constant, ((coefficient, node), ...))``; ``((base, exponent), ...)``;
        ``(name, nodes)``; ``(name, orders of derivatives, nodes)``.
    key
        Digest of op and args; equal formulas have equal keys, in every process.
    """

    __slots__ = ("__dict__", "args", "key", "op")

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op = op
        self.args = args
        self.key = hashlib.blake2b(repr((op, _printable(args))).encode(), digest_size=12).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Node({self.op}, {self.args!r})"

    def __add__(self, other: Node | Number) -> Node:
        return add(self, as_node(other))

    __radd__ = __add__

    def __sub__(self, other: Node | Number) -> Node:
        return add(self, as_node(other) * -1.0)

    def __rsub__(self, other: Node | Number) -> Node:
        return add(as_node(other), self * -1.0)

    def __mul__(self, other: Node | Number) -> Node:
        return multiply(self, as_node(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Node | Number) -> Node:
        return multiply(self, whole_power(as_node(other), -1))

    def __rtruediv__(self, other: Node | Number) -> Node:
        return multiply(as_node(other), whole_power(self, -1))

    def __pow__(self, exponent: Node | Number) -> Node:
        return power(self, as_node(exponent))

    def __neg__(self) -> Node:
        return self * -1.0

    @property
    def value(self) -> float | None:
        """The number that this node is, or None."""
        return self.args[0] if self.op == "number" else None

    def children(self) -> Iterator[Node]:
        """Nodes that this one is made of."""
        if self.op == "sum":
            yield from (node for _, node in self.args[1])
        elif self.op == "product":
            yield from (base for base, _ in self.args)
        elif self.op in ("function", "table"):
            yield from self.args[-1]

    @cached_property
    def symbols(self) -> frozenset[str]:
        """Names of all symbols in the formula."""
        if self.op == "symbol":
            return frozenset(self.args)
        return frozenset().union(*(child.symbols for child in self.children()))

    @cached_property
    def tables(self) -> frozenset[str]:
        """Names of all tabulated functions in the formula."""
        own = frozenset(self.args[:1]) if self.op == "table" else frozenset()
        return own.union(*(child.tables for child in self.children()))

    def substitute(self, replacements: Mapping[str, Node]) -> Node:
        """The formula with symbols replaced, all at once."""
        memory: dict[Node, Node] = {}

        def visit(node: Node) -> Node:
            if node.op == "number" or not node.symbols & replacements.keys():
                return node
            if node not in memory:
                memory[node] = replacements[node.args[0]] if node.op == "symbol" else _rebuild(node, visit)
            return memory[node]

        return visit(self)

    def derivative(self, name: str) -> Node:
        """The derivative by a symbol, all other symbols held fixed."""
        memory: dict[Node, Node] = {}

        def visit(node: Node) -> Node:
            if name not in node.symbols:
                return ZERO
            if node not in memory:
                memory[node] = _derivative(node, visit)
            return memory[node]

        return visit(self)


def _printable(value: Any) -> Any:
    if isinstance(value, Node):
        return value.key
    if isinstance(value, tuple):
        return tuple(map(_printable, value))
    return value


def number(value: Number) -> Node:
    """A number."""
    return Node("number", (float(value) + 0.0,))  # + 0.0: one zero only


ZERO, ONE = number(0.0), number(1.0)


def symbol(name: str) -> Node:
    """A symbol."""
    return Node("symbol", (name,))


def as_node(value: Node | Number) -> Node:
    """A node as it is, a number as a node."""
    return value if isinstance(value, Node) else number(value)


def add(*nodes: Node) -> Node:
    """Sum, with equal terms collected."""
    constant, terms = 0.0, dict[Node, float]()
    for node in nodes:
        if node.op == "number":
            constant += node.args[0]
            continue
        own_constant, own_terms = node.args if node.op == "sum" else (0.0, ((1.0, node),))
        constant += own_constant
        for coefficient, term in own_terms:
            terms[term] = terms.get(term, 0.0) + coefficient
    left = sorted(((c, t) for t, c in terms.items() if c != 0.0), key=lambda item: item[1].key)
    if not left:
        return number(constant)
    if constant == 0.0 and len(left) == 1 and left[0][0] == 1.0:
        return left[0][1]
    return Node("sum", (constant, tuple(left)))


def multiply(*nodes: Node) -> Node:
    """Product, with whole powers of equal bases collected. Sums are not multiplied out."""
    coefficient, powers = 1.0, dict[Node, int]()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.op == "number":
            coefficient *= node.args[0]
        elif node.op == "sum" and node.args[0] == 0.0 and len(node.args[1]) == 1:
            coefficient *= node.args[1][0][0]
            pending.append(node.args[1][0][1])
        else:
            for base, exponent in node.args if node.op == "product" else ((node, 1),):
                powers[base] = powers.get(base, 0) + exponent
    if coefficient == 0.0:
        return ZERO
    left = sorted(((b, e) for b, e in powers.items() if e != 0), key=lambda item: item[0].key)
    if not left:
        return number(coefficient)
    if len(left) == 1 and left[0][1] == 1:
        (base, _), constant_free = left[0], left[0][0].op != "sum"
        if coefficient == 1.0:
            return base
        if not constant_free:  # a number goes into a sum
            constant, terms = base.args
            return add(number(coefficient * constant), *(_scaled(coefficient * c, t) for c, t in terms))
        return _scaled(coefficient, base)
    product = Node("product", tuple(left))
    return product if coefficient == 1.0 else _scaled(coefficient, product)


def _scaled(coefficient: float, node: Node) -> Node:
    return node if coefficient == 1.0 else Node("sum", (0.0, ((coefficient, node),)))


def whole_power(base: Node, exponent: int) -> Node:
    """A whole power."""
    if exponent == 0:
        return ONE
    if base.op == "number":
        try:
            return number(base.args[0] ** exponent)
        except (ZeroDivisionError, OverflowError):
            return number(-math.inf if exponent % 2 and base.args[0] < 0.0 else math.inf)
    if base.op == "product":
        return multiply(*(Node("product", ((b, e * exponent),)) if e * exponent != 1 else b for b, e in base.args))
    if base.op == "sum" and base.args[0] == 0.0 and len(base.args[1]) == 1:
        coefficient, node = base.args[1][0]
        return multiply(whole_power(number(coefficient), exponent), whole_power(node, exponent))
    return base if exponent == 1 else Node("product", ((base, exponent),))


def power(base: Node, exponent: Node) -> Node:
    """base ^ exponent: collected if the exponent is a whole number, a function otherwise."""
    value = exponent.value
    if value is not None and abs(value) <= 64 and value == int(value):  # False for NaN
        return whole_power(base, int(value))
    return function("pow", base, exponent)


def select(condition: Node, yes: Node, no: Node) -> Node:
    """``yes`` where the condition is not zero, else ``no``."""
    return function("select", condition, yes, no)


def table(name: str, *arguments: Node, orders: tuple[int, ...] | None = None) -> Node:
    """A tabulated function, or one of its derivatives."""
    return Node("table", (name, orders if orders is not None else (0,) * len(arguments), arguments))


def function(name: str, *arguments: Node) -> Node:
    """A function of Lepton by its name; those that sums, powers and a few others express are written with them."""
    a = arguments[0]
    match name:
        case "square" | "cube" | "recip":
            return whole_power(a, {"square": 2, "cube": 3, "recip": -1}[name])
        case "sec":
            return whole_power(function("cos", a), -1)
        case "csc":
            return whole_power(function("sin", a), -1)
        case "cot":
            return function("cos", a) / function("sin", a)
    values = [node.value for node in arguments]
    if name == "select":
        if values[0] is not None:
            return arguments[1] if values[0] != 0.0 else arguments[2]
        if arguments[1] == arguments[2]:
            return arguments[1]
        yes, no = values[1:]
        if yes is not None and no is not None:  # of numbers alone, torch would not know the type
            truth = a if a.op == "function" and a.args[0] in ("step", "delta") else Node("function", ("truth", (a,)))
            if math.isfinite(yes - no):
                return number(no) + (yes - no) * truth
            if math.isfinite(yes) and math.isinf(no):  # times infinity, zero would be no number
                return number(yes) + math.copysign(1.0, no) * (1.0 / truth - 1.0)
            if math.isfinite(no) and math.isinf(yes):
                return number(no) + math.copysign(1.0, yes) * (1.0 / (1.0 - truth) - 1.0)
    elif all(value is not None for value in values):
        try:
            return number(FOLD[name](*values))
        except (ValueError, ZeroDivisionError, OverflowError):  # e.g. log(0), for which Python has no number
            return number(getattr(torch, name)(*(torch.tensor(value, dtype=torch.float64) for value in values)).item())
    return Node("function", (name, arguments))


#: Functions of numbers.
FOLD: dict[str, Callable[..., float]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan")},
    **{name: getattr(math, name) for name in ("atan2", "sinh", "cosh", "tanh", "erf", "erfc", "pow")},
    "step": lambda x: float(x >= 0.0),
    "delta": lambda x: float(x == 0.0),
    "truth": lambda x: float(x != 0.0),
    "min": min,
    "max": max,
    "abs": abs,
    "floor": lambda x: float(math.floor(x)),
    "ceil": lambda x: float(math.ceil(x)),
}


def _rebuild(node: Node, visit: Callable[[Node], Node]) -> Node:
    """The node with each child replaced by ``visit`` of it."""
    if node.op == "sum":
        return add(number(node.args[0]), *(multiply(number(c), visit(t)) for c, t in node.args[1]))
    if node.op == "product":
        return multiply(*(whole_power(visit(base), exponent) for base, exponent in node.args))
    if node.op == "function":
        return function(node.args[0], *map(visit, node.args[1]))
    name, orders, arguments = node.args
    return table(name, *map(visit, arguments), orders=orders)


def _derivative(node: Node, visit: Callable[[Node], Node]) -> Node:
    """Derivative of a node, given those of its children."""
    if node.op == "symbol":
        return ONE
    if node.op == "sum":
        return add(*(multiply(number(c), visit(t)) for c, t in node.args[1]))
    if node.op == "product":
        return add(*(multiply(number(e), visit(b), node, whole_power(b, -1)) for b, e in node.args))
    if node.op == "table":
        name, orders, arguments = node.args
        terms = []
        for i, argument in enumerate(arguments):
            raised = tuple(order + (i == k) for k, order in enumerate(orders))
            terms.append(multiply(visit(argument), table(name, *arguments, orders=raised)))
        return add(*terms)
    name, arguments = node.args
    a = arguments[0]
    if name in ("step", "delta", "truth", "floor", "ceil"):
        return ZERO
    if name == "select":
        return select(a, visit(arguments[1]), visit(arguments[2]))
    if name in ("min", "max"):
        first, second = arguments if name == "max" else reversed(arguments)
        above = function("step", arguments[0] - arguments[1])
        return select(above, visit(first), visit(second))
    if name == "atan2":
        y, x = arguments
        return (visit(y) * x - visit(x) * y) / (x * x + y * y)
    if name == "pow":
        base, exponent = arguments
        slope = visit(base) * exponent * power(base, exponent - 1.0)
        changing = visit(exponent)
        return slope if changing == ZERO else slope + changing * node * function("log", base)
    return visit(a) * _slope(name, a, node)


def _slope(name: str, x: Node, node: Node) -> Node:
    """Derivative of a function of one argument by that argument."""
    match name:
        case "sqrt":
            return 0.5 / node
        case "exp":
            return node
        case "log":
            return 1.0 / x
        case "sin":
            return function("cos", x)
        case "cos":
            return -function("sin", x)
        case "tan":
            return 1.0 + node**2
        case "asin":
            return 1.0 / function("sqrt", 1.0 - x**2)
        case "acos":
            return -1.0 / function("sqrt", 1.0 - x**2)
        case "atan":
            return 1.0 / (1.0 + x**2)
        case "sinh":
            return function("cosh", x)
        case "cosh":
            return function("sinh", x)
        case "tanh":
            return 1.0 - node**2
        case "erf":
            return 2.0 / math.sqrt(math.pi) * function("exp", -(x**2))
        case "erfc":
            return -2.0 / math.sqrt(math.pi) * function("exp", -(x**2))
        case "abs":
            return 2.0 * function("step", x) - 1.0
    raise KeyError(name)


def total(nodes: Iterable[Node]) -> Node:
    """Sum of any number of nodes."""
    return reduce(add, nodes, ZERO)
