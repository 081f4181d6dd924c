"""Tensors × checkpoints: one byte for how far each tensor moved. Large runs are folded, so that a page has a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from incckpt.reporting.tensors import TensorTable

__all__ = [
    "ABSENT",
    "CHANGED",
    "FIRST",
    "FROM_ZERO",
    "HIGHEST",
    "LOWEST",
    "MOST_COLUMNS",
    "NOT_FINITE",
    "SCALE",
    "UNCHANGED",
    "UNSURE",
    "HeatMap",
    "HeatMapBuilder",
    "Mover",
    "decode",
    "encode",
]

Cells = npt.NDArray[np.uint8]

# Cells, by what they tell, so that of several that are folded into one the highest stands for all.
ABSENT: Final = 0
UNCHANGED: Final = 1
FIRST: Final = 2  # there is no earlier one to compare with
UNSURE: Final = 3  # it lies in a chunk with others, of which some changed
CHANGED: Final = 4  # by how much was not measured
SCALE: Final = 5  # the lowest of the cells that are measured
FROM_ZERO: Final = 254  # all was zero before
NOT_FINITE: Final = 255

LOWEST: Final = -7.0  # log10 of the relative change that SCALE stands for, and of what the highest such cell does
HIGHEST: Final = 2.0
_STEPS = FROM_ZERO - 1 - SCALE

MOST_COLUMNS: Final = 2048
_MOST_ROWS = 8192
_MOST_CELLS = 4 << 20

_RECENT = 20  # measured checkpoints that a jump is compared with
_FEWEST = 4
_JUMP = 4.0
_SHOWN = 12


def encode(relative: float, norm: float) -> int:
    """Return the cell of a relative change, given the norm before."""
    if math.isfinite(relative):
        if relative <= 0:
            return UNCHANGED
        place = (math.log10(relative) - LOWEST) / (HIGHEST - LOWEST)
        return SCALE + round(min(max(place, 0.0), 1.0) * _STEPS)
    return FROM_ZERO if norm == 0 and not math.isnan(relative) else NOT_FINITE


def decode(cells: Cells) -> npt.NDArray[np.float64]:
    """Return the relative changes that cells stand for: 0 for what did not change, NaN for what was not measured."""
    measured = (cells >= SCALE) & (cells < FROM_ZERO)
    relative = 10 ** (LOWEST + (cells.astype(np.float64) - SCALE) / _STEPS * (HIGHEST - LOWEST))
    return np.where(measured, relative, np.where(cells == UNCHANGED, 0.0, np.nan))


@dataclass(frozen=True)
class Mover:
    """A tensor that moved.

    Attributes
    ----------
    name
        Of the tensor, or of the module that its row stands for.
    relative
        Its latest relative change.
    usual
        The median of those before, if there are enough.
    """

    name: str
    relative: float
    usual: float | None = None


@dataclass
class HeatMap:
    """How far tensors moved from one checkpoint to the next.

    Attributes
    ----------
    rows
        Names of tensors, in the order of the state, or of modules where `depth` says so.
    cells
        ``uint8[rows, columns]``, as `encode` makes them.
    merged
        How many checkpoints a column stands for; the last one may have fewer.
    depth
        How many parts of their names the rows have at most; ``None`` if rows are tensors.
    tensors
        How many tensors there are.
    jumped, learning
        Tensors whose latest change is several times their usual one, and those of each component that moved most, the
        largest first.
    frozen
        Tensors that did not change in any checkpoint of this run.
    """

    rows: Sequence[str] = ()
    cells: Cells = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    merged: int = 1
    depth: int | None = None
    tensors: int = 0
    jumped: Sequence[Mover] = ()
    learning: Sequence[Mover] = ()
    frozen: Sequence[str] = ()


class HeatMapBuilder:
    """Adds one checkpoint after the other.

    Parameters
    ----------
    checkpoints
        How many there will be at most.
    """

    def __init__(self, checkpoints: int) -> None:
        self._merged = max(1, -(-checkpoints // MOST_COLUMNS))
        self._most_rows = min(_MOST_ROWS, _MOST_CELLS // max(1, -(-checkpoints // self._merged)))
        self._columns: list[Cells] = []
        self._added = 0
        self._rows: dict[str, int] = {}
        self._row_of: dict[str, int] = {}
        self._fold: Callable[[str], str] | None = None
        self._depth: int | None = None
        self._before: tuple[Sequence[str], npt.NDArray[np.int64]] | None = None

    def add(self, table: TensorTable | None) -> None:
        """Add a checkpoint; ``None`` for one that cannot be read."""
        rows, cells = (np.zeros(0, np.int64), np.zeros(0, np.uint8)) if table is None else self._compared(table)
        column = np.zeros(len(self._rows), np.uint8)
        np.maximum.at(column, rows, cells)
        if self._added % self._merged:
            before = self._columns.pop()
            column[: len(before)] = np.maximum(column[: len(before)], before)
        self._columns.append(column)
        self._added += 1
        if table is not None:
            self._before = table.names, table.content

    def finish(self) -> HeatMap:
        """Return the map."""
        cells = np.zeros((len(self._rows), len(self._columns)), np.uint8)
        for index, column in enumerate(self._columns):
            cells[: len(column), index] = column
        names = list(self._rows)
        jumped, learning = _movers(names, cells)
        return HeatMap(
            names, cells, self._merged, self._depth, len(self._row_of), jumped, learning, _frozen(names, cells)
        )

    def _compared(self, table: TensorTable) -> tuple[npt.NDArray[np.int64], Cells]:
        """Return rows, and what to show there."""
        rows = self._rows_of(table.names)
        cells = np.full(len(rows), FIRST, np.uint8)
        if self._before is not None:
            names, content = self._before
            if names == table.names:
                known, same = np.ones(len(rows), np.bool_), content == table.content
            else:
                earlier = dict(zip(names, content.tolist(), strict=True))
                known = np.array([name in earlier for name in table.names], np.bool_)
                then = np.array([earlier.get(name, 0) for name in table.names], np.int64)
                same = known & (then == table.content)
            # A change in a chunk with others is theirs, if the save would have seen it in this tensor.
            unseen = np.where(table.alone, CHANGED, np.where(table.measured, UNCHANGED, UNSURE))
            cells[known] = np.where(same, UNCHANGED, unseen)[known]
            for index, name in enumerate(table.names):
                if known[index] and not same[index] and name in table.moved:
                    cells[index] = encode(*table.moved[name])
        return rows, cells

    def _rows_of(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        if self._fold is None:
            self._fold, self._depth = _folding(names, self._most_rows)
        for name in names:
            if name not in self._row_of:
                row = self._fold(name)
                if row not in self._rows and len(self._rows) >= self._most_rows:
                    row = next(reversed(self._rows))  # tensors that came later, and are too many
                self._row_of[name] = self._rows.setdefault(row, len(self._rows))
        return np.fromiter((self._row_of[name] for name in names), np.int64, len(names))


def _folding(names: Sequence[str], most: int) -> tuple[Callable[[str], str], int | None]:
    """Return what gives the row of a tensor, so that there are at most `most`, and how many parts a row's name has."""
    if len(set(names)) <= most:
        return str, None
    depth = max(name.count(".") for name in names)
    while depth > 1 and len({_head(name, depth) for name in names}) > most:
        depth -= 1
    return (lambda name: _head(name, depth)), depth


def _head(name: str, depth: int) -> str:
    return ".".join(name.split(".", depth)[:depth])


def _movers(names: Sequence[str], cells: Cells) -> tuple[list[Mover], list[Mover]]:
    """Return the rows that just jumped, and those that moved most: of each component as many."""
    if cells.shape[1] < 2:
        return [], []
    relative = decode(cells)
    latest = relative[:, -1]
    jumped: list[Mover] = []
    moved: dict[str, list[Mover]] = {}
    for row in np.flatnonzero(latest > 0).tolist():
        earlier = relative[row, :-1]
        earlier = earlier[np.isfinite(earlier)][-_RECENT:]
        usual = float(np.median(earlier)) if len(earlier) >= _FEWEST else None
        mover = Mover(names[row], float(latest[row]), usual)
        moved.setdefault(mover.name.partition(".")[0], []).append(mover)
        if usual is not None and mover.relative > _JUMP * usual:
            jumped.append(mover)
    each = max(1, _SHOWN // max(1, len(moved)))
    largest = [sorted(movers, key=lambda mover: -mover.relative)[:each] for movers in moved.values()]
    jumped.sort(key=lambda mover: -mover.relative / mover.usual if mover.usual else -math.inf)
    return jumped[:_SHOWN], [mover for movers in largest for mover in movers][:_SHOWN]


def _frozen(names: Sequence[str], cells: Cells) -> list[str]:
    """Return the rows that never changed as far as is known, though there was something to compare with."""
    frozen = (cells.max(axis=1, initial=0) <= UNSURE) & (cells == UNCHANGED).any(axis=1)
    return [names[index] for index in np.flatnonzero(frozen).tolist()]
