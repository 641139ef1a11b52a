"""One pass over all pairs of particles: energies, forces, and sums over each particle's pairs.

Each pair is visited once, the lower index first. A pass works through tiles of the upper triangle, whose temporary
arrays fit into the processor's cache; batches are the last axis. Formulas of several forces are added up and evaluated
together, so that they share distances and whatever else they have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .algebra import Node
from .formula import Formula, Globals, Values
from .tables import Table

#: Numbers in a temporary array of a tile. Below the 32,768 from which torch hands a part to another thread.
TILE = 24_576
#: The same on another device than the CPU, where launches count and caches do not; some seventy arrays live at once.
TILE_DEVICE = 2**22

ROW, COLUMN, PAIR = 1, 2, 4


@dataclass
class PairFormula:
    """An energy or a value of pairs, with its parameters.

    Attributes
    ----------
    node
        The formula, zero for pairs that do not count: multiplied by or selected with a table of ``values``.
    axes
        Axes of its symbols that are not dynamic: `ROW` for parameters of the first particle ([N]), `COLUMN` for the
        second ([N]), `PAIR` for tables [N, N] of pairs, of which the upper triangle is used.
    values
        Values of these symbols.
    tables
        Tabulated functions.
    """

    node: Node
    axes: dict[str, int]
    values: Values
    tables: dict[str, Table] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tile:
    rows: slice
    columns: slice
    statics: list[Tensor]
    offset: Tensor


class CompiledPass(Protocol):
    """A pass in another language than torch."""

    def prepare(self, statics: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Take over what is constant."""
        ...

    def run(self, x: Tensor, fields: Mapping[str, Tensor], gradient: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `PairPass.evaluate`."""
        ...


class PairPass:
    """Formulas of all pairs, evaluated together.

    Parameters
    ----------
    n_atoms
        N.
    outputs
        ``energy`` is summed over pairs; ``factor`` times the vector from the second particle to the first is
        the gradient; any other name ends in 1 or 2 and is summed over the pairs of the first or second particle.
    dynamic
        Fields [N, B] that change with positions, by name; a formula has ``name + "1"`` and ``name + "2"``.
    parts
        Where symbols that are not dynamic get their values.

    Attributes
    ----------
    kernel
        The pass in C++ or Triton, if it has been compiled; to be set before `prepare`.
    """

    def __init__(self, n_atoms: int, outputs: Mapping[str, Node], dynamic: list[str], parts: list[PairFormula]) -> None:
        self.n_atoms = n_atoms
        self.fields = dynamic  # names, without the side
        self.outputs = list(outputs)
        self._axes: dict[str, int] = {}
        self._values: list[Values] = []
        tables: dict[str, Table] = {}
        for part in parts:
            self._axes |= part.axes
            self._values.append(part.values)
            tables |= part.tables
        moving = {"r": PAIR} | {name + "1": ROW for name in dynamic} | {name + "2": COLUMN for name in dynamic}
        self.formula = Formula(outputs, moving, self._all_values, tables, self._axes)
        self.kernel: CompiledPass | None = None
        self._offset = torch.zeros(0)
        self._tiles: dict[int, list[_Tile]] = {}

    def _all_values(self, parameters: Globals) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for function in self._values:
            values |= function(parameters)
        shapes = {ROW: (-1, 1, 1), COLUMN: (1, -1, 1), PAIR: (self.n_atoms, self.n_atoms, 1)}
        return {name: value.reshape(shapes[self._axes[name]]) for name, value in values.items()}

    def prepare(self, parameters: Globals, dtype: torch.dtype, device: torch.device) -> None:
        """Take over global parameters."""
        self.formula.prepare(parameters, dtype, device)
        # A particle is 1 nm away from itself, lest the distance be zero where it does not count.
        self._offset = torch.eye(self.n_atoms, dtype=dtype, device=device)[..., None]
        self._tiles = {}
        if self.kernel is not None:
            self.kernel.prepare(self.formula.statics, dtype)

    def _tile(self, rows: slice, columns: slice) -> _Tile:
        def cut(tensor: Tensor) -> Tensor:
            if tensor.ndim < 3:
                return tensor
            return tensor[rows if len(tensor) > 1 else slice(None), columns if tensor.shape[1] > 1 else slice(None)]

        return _Tile(rows, columns, [cut(tensor) for tensor in self.formula.statics], cut(self._offset))

    def tiles(self, batch: int) -> list[_Tile]:
        """Tiles for batches of this size."""
        if batch not in self._tiles:
            size = TILE if self._offset.device.type == "cpu" else TILE_DEVICE
            tiles, start = [], 0
            while start < self.n_atoms:
                count = max(1, size // (batch * (self.n_atoms - start)))
                tiles.append(self._tile(slice(start, min(start + count, self.n_atoms)), slice(start, self.n_atoms)))
                start += count
            self._tiles[batch] = tiles
        return self._tiles[batch]

    def evaluate(
        self, x: Tensor, fields: Mapping[str, Tensor], gradient: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate a batch.

        Parameters
        ----------
        x
            Positions [3, N, B].
        fields
            The dynamic fields [N, B].
        gradient
            [3, N, B], to which the gradient is added.

        Returns
        -------
        tuple
            Energy [B] float64 (zero if there is none), and the sums [N, B] by name, those of a name's first and second
            particle added; in float64, and rounded once.
        """
        if self.kernel is not None:
            return self.kernel.run(x, fields, gradient)
        batch = x.shape[2]
        energy = x.new_zeros(batch, dtype=torch.float64)
        double, shape = torch.float64, (self.n_atoms, batch)
        sums = {
            name[:-1]: x.new_zeros(shape, dtype=double) for name in self.outputs if name not in ("energy", "factor")
        }
        for tile in self.tiles(batch):
            rows, columns = tile.rows, tile.columns
            d = x[:, rows, None] - x[:, None, columns]
            r2 = torch.addcmul(torch.addcmul(torch.addcmul(tile.offset, d[0], d[0]), d[1], d[1]), d[2], d[2])
            inputs = {"r2": r2}
            for name in self.fields:
                inputs[name + "1"] = fields[name][rows, None]
                inputs[name + "2"] = fields[name][None, columns]
            found = self.formula.program(inputs, tile.statics, self.formula.tables)
            for name, value in found.items():
                value = value.expand(r2.shape)
                if name == "energy":
                    energy += value.sum((0, 1), dtype=double)
                elif name == "factor":
                    assert gradient is not None
                    pull = value * d
                    gradient[:, rows] += pull.sum(2)
                    gradient[:, columns] -= pull.sum(1)
                elif name[-1] == "1":
                    sums[name[:-1]][rows] += value.sum(1, dtype=double)
                else:
                    sums[name[:-1]][columns] += value.sum(0, dtype=double)
        return energy, {name: found.to(x.dtype) for name, found in sums.items()}


def both_sides(names: list[str]) -> dict[str, str]:
    """Names of the first particle's quantities to those of the second's."""
    return {name + "1": name + "2" for name in names}


def upper(matrix: Tensor) -> Tensor:
    """The strictly upper triangle of [N, N], zeros elsewhere."""
    return torch.triu(matrix, diagonal=1)
