"""A program together with the parameters of a force, and how names in a force's expressions become symbols."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .algebra import Node, symbol, table
from .expressions import Maker, parse
from .program import Program
from .tables import Table, read_table

#: Global parameters by name.
Globals = Mapping[str, float]
#: Values of a force's symbols, float64, given the global parameters.
Values = Callable[[Globals], dict[str, Tensor]]

#: Prefix of the symbols that stand for global parameters, which forces of one System share.
GLOBAL = "global:"


def as_float64(values: Any) -> Tensor:
    """A float64 tensor."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def plain(value: Any) -> float:
    """A number, or a Quantity in OpenMM's own units, as a number."""
    return float(getattr(value, "_value", value))


class Reader:
    """Reads the expressions of one Custom force.

    Its symbols get the force's prefix, so that formulas of several forces can be added up; global parameters get a
    common one, and what every force may call by its name (``r``, ``theta``, ``x``) stays as it is.

    Parameters
    ----------
    force
        A Custom force.
    prefix
        Unique among the System's forces.
    """

    def __init__(self, force: Any, prefix: str) -> None:
        self.force, self.prefix = force, prefix
        self.kind = type(force).__name__
        self.tables: dict[str, Table] = {}
        self._makers: dict[str, tuple[int, Maker]] = {}
        for i in range(getattr(force, "getNumTabulatedFunctions", lambda: 0)()):
            name = force.getTabulatedFunctionName(i)
            found = read_table(name, force.getTabulatedFunction(i))
            self.tables[prefix + name] = found
            self._makers[name] = (found.n_arguments, self._maker(prefix + name))
        self.globals = [force.getGlobalParameterName(i) for i in range(force.getNumGlobalParameters())]

    @staticmethod
    def _maker(name: str) -> Maker:
        return lambda *nodes: table(name, *nodes)

    def read(self, text: str, own: Iterable[str], common: Iterable[str]) -> Node:
        """An expression in the force's ``own`` names, global parameters and ``common`` names.

        Raises
        ------
        InputError
            The expression cannot be read, or has a name that the force does not define.
        """
        node = parse(text, self._makers)
        known = {name: symbol(GLOBAL + name) for name in self.globals}
        known |= {name: symbol(self.prefix + name) for name in own}
        known |= {name: symbol(name) for name in common}
        unknown = sorted(node.symbols - known.keys())
        if unknown:
            raise InputError(f"The expression {text!r} of the {self.kind} has an unknown name: {unknown[0]}.")
        return node.substitute(known)


class Formula:
    """Formulas of positions with a force's parameters in place.

    Parameters
    ----------
    outputs
        Formulas by name.
    dynamic
        What is given at every call: see `Program`.
    values
        Values of all other symbols.
    tables
        Tabulated functions by name.
    axes
        See `Program`.
    """

    def __init__(
        self,
        outputs: Mapping[str, Node],
        dynamic: Mapping[str, int],
        values: Values,
        tables: Mapping[str, Table],
        axes: Mapping[str, int] | None = None,
    ) -> None:
        self.program = Program(outputs, dynamic, axes)
        self.values, self.tables = values, tables
        self.statics: list[Tensor] = []

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None:
        """Evaluate what is constant, for these global parameters."""
        values = {GLOBAL + name: as_float64(value) for name, value in parameters.items()} | self.values(parameters)
        found = self.program.evaluate_statics(values, self.tables)
        self.statics = [tensor.to(device, tensor.dtype if tensor.dtype == torch.bool else dtype) for tensor in found]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Values of the outputs."""
        return self.program(inputs, self.statics, self.tables)
