"""OpenMM's algebraic expressions, read into the algebra.

The grammar is that of Lepton, the parser inside OpenMM: ``^`` binds tightest and to the right, then the sign, then
``*`` and ``/``, then ``+`` and ``-``, so that -x^2 is -(x^2) and 2^-x^2 is 2^(-(x^2)). Definitions follow the formula
after semicolons; each may use those after it, and of two with one name the first counts. A definition hides a
parameter of its name. Any word may be a parameter: ``or``, ``and``, ``step``; only what is followed by a parenthesis is
a function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ...errors import InputError
from .algebra import Node, function, number, symbol

#: Functions and how many arguments each takes.
FUNCTIONS: dict[str, int] = {
    **dict.fromkeys(("sqrt", "exp", "log", "sin", "cos", "sec", "csc", "tan", "cot", "asin", "acos", "atan"), 1),
    **dict.fromkeys(("sinh", "cosh", "tanh", "erf", "erfc", "step", "delta", "square", "cube", "recip"), 1),
    **dict.fromkeys(("abs", "floor", "ceil"), 1),
    **dict.fromkeys(("atan2", "min", "max"), 2),
    "select": 3,
}

#: Precedence of the binary operators, and of the sign between them.
PRECEDENCE = {"+": 0, "-": 0, "*": 1, "/": 1, "^": 3}
SIGN = 2

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<call>[^\s\d.,+\-*/^()][^\s,+\-*/^()]*)\(|"
    r"(?P<name>[^\s\d.,+\-*/^()][^\s,+\-*/^()]*)|(?P<sign>[,+\-*/^()]))"
)

Maker = Callable[..., Node]


class _Reader:
    """One formula, read from left to right."""

    def __init__(self, text: str, known: Mapping[str, Node], makers: Mapping[str, tuple[int, Maker]]) -> None:
        self.text, self.known, self.makers = text, known, makers
        self.tokens: list[tuple[str, str]] = []
        position = 0
        while text[position:].strip():
            found = _TOKEN.match(text, position)
            if found is None:
                raise self.wrong(f"{text[position:].strip()[0]!r} is not understood")
            self.tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
            position = found.end()
        self.at = 0

    def wrong(self, reason: str) -> InputError:
        return InputError(f"The expression {self.text.strip()!r} cannot be read: {reason}.")

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        if token[0] == "end":
            raise self.wrong("it ends too early")
        self.at += 1
        return token

    def whole(self) -> Node:
        node = self.operation(0)
        if self.at < len(self.tokens):
            raise self.wrong(f"{self.peek()[1]!r} is unexpected")
        return node

    def operation(self, least: int) -> Node:
        """Operands joined by operators that bind at least so tightly."""
        left = self.operand()
        while True:
            kind, sign = self.peek()
            if kind != "sign" or PRECEDENCE.get(sign, -1) < least:
                return left
            self.at += 1
            right = self.operation(PRECEDENCE[sign] + (sign != "^"))
            match sign:
                case "+":
                    left = left + right
                case "-":
                    left = left - right
                case "*":
                    left = left * right
                case "/":
                    left = left / right
                case _:
                    left = left**right

    def operand(self) -> Node:
        kind, text = self.take()
        if kind == "number":
            return number(float(text))
        if kind == "name":
            return self.known[text] if text in self.known else symbol(text)
        if kind == "call":
            return self.call(text)
        if text == "-":
            return -self.operation(SIGN)
        if text == "(":
            node = self.operation(0)
            self.close()
            return node
        raise self.wrong(f"{text!r} is unexpected")

    def close(self) -> None:
        if self.take() != ("sign", ")"):
            raise self.wrong("a parenthesis is not closed")

    def call(self, name: str) -> Node:
        arguments = []
        if self.peek() != ("sign", ")"):
            arguments.append(self.operation(0))
            while self.peek() == ("sign", ","):
                self.at += 1
                arguments.append(self.operation(0))
        self.close()
        if name in self.makers:
            count, make = self.makers[name]
        elif name in FUNCTIONS:
            count, make = FUNCTIONS[name], lambda *nodes: function(name, *nodes)
        else:
            raise self.wrong(f"there is no function {name}")
        if len(arguments) != count:
            raise self.wrong(f"{name} takes {count} argument{'s' * (count > 1)}, not {len(arguments)}")
        return make(*arguments)


def parse(text: str, functions: Mapping[str, tuple[int, Maker]] | None = None) -> Node:
    """Read an expression with its definitions.

    Parameters
    ----------
    text
        As OpenMM takes it: ``formula; name=formula; ...``.
    functions
        Further functions, which go before those of their name that Lepton has: number of arguments, and what makes
        a node of them.

    Returns
    -------
    Node
        The formula, definitions inserted.

    Raises
    ------
    InputError
        A syntax error, an unknown function, or a definition without ``=``.
    """
    formula, *definitions = text.split(";")
    known: dict[str, Node] = {}
    for definition in reversed([piece for piece in definitions if piece.strip()]):
        name, equals, meaning = definition.partition("=")
        if not equals or not name.strip():
            raise InputError(f"The expression {text.strip()!r} cannot be read: {definition.strip()!r} defines nothing.")
        known[name.strip()] = _Reader(meaning, known, functions or {}).whole()
    return _Reader(formula, known, functions or {}).whole()
