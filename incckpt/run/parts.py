"""Parts of tensors that several processes store, as columns: a process makes a table, the coordinator joins them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from incckpt.errors import StateError
from incckpt.state.entries import TensorEntry
from incckpt.store.blocks import Int64s
from incckpt.store.document import Json
from incckpt.store.manifest import Range

__all__ = ["JoinedParts", "Parts", "Place", "TensorParts"]


class Place(NamedTuple):
    """Which part of a tensor a process has.

    Attributes
    ----------
    name
        Of the tensor.
    at
        The part's first index in each dimension.
    """

    name: str
    at: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """The parts that a process has stored; a row is a part.

    Attributes
    ----------
    names
        Of the tensors; one may have several parts.
    kinds, kind
        What else is known of a tensor (dtype, device, flags), and ``int64[n]``: which of these a row is.
    dimensions
        ``int64[n]``: how many dimensions it has.
    at, shape
        ``int64[sum(dimensions)]``: its first index and its size in each dimension, row after row.
    itemsize
        ``int64[n]``: its element size for the codec.
    counts
        ``int64[n]``: how many pieces it has.
    pieces
        ``int64[sum(counts), 3]``: chunk, offset there and bytes of each piece, row after row.
    """

    names: Sequence[str]
    kinds: Sequence[TensorEntry]
    kind: Int64s
    dimensions: Int64s
    at: Int64s
    shape: Int64s
    itemsize: Int64s
    counts: Int64s
    pieces: Int64s

    @classmethod
    def of(
        cls,
        places: Mapping[str, Place],
        nodes: Mapping[str, Json],
        entries: Sequence[TensorEntry],
        ranges: Sequence[Range],
    ) -> Parts:
        """Make the table of a process.

        Parameters
        ----------
        places
            Its parts, by key.
        nodes
            The structure's node of each value, by key.
        entries, ranges
            What they refer to.

        Raises
        ------
        StateError
            If a part is not a plain tensor.
        """
        kinds: dict[TensorEntry, int] = {}
        kind, dimensions, itemsize, counts = [], [], [], []
        at: list[int] = []
        shape: list[int] = []
        pieces: list[tuple[int, int, int]] = []
        for key, place in places.items():
            node = nodes[key]
            if not isinstance(node, dict) or "tensor" not in node:
                raise StateError(f"a part of tensor {place.name!r} is stored as something else than a tensor")
            entry = entries[node["tensor"]]
            if entry.packed or entry.kind != "torch" or not len(entry.shape) == len(place.at) > 0:
                raise StateError(f"a part of tensor {place.name!r} does not lie in its memory as planned")
            alike = entry._replace(name="", shape=(), stride=(), range=-1, offset=0)
            kind.append(kinds.setdefault(alike, len(kinds)))
            dimensions.append(len(place.at))
            at += place.at
            shape += entry.shape
            found: list[tuple[int, int, int]] = []
            if entry.range >= 0:
                found = list(ranges[entry.range].part(entry.offset, entry.offset + entry.nbytes))
            itemsize.append(ranges[entry.range].itemsize if found else 1)
            counts.append(len(found))
            pieces += found
        return cls(
            names=[place.name for place in places.values()],
            kinds=list(kinds),
            kind=np.array(kind, np.int64),
            dimensions=np.array(dimensions, np.int64),
            at=np.array(at, np.int64),
            shape=np.array(shape, np.int64),
            itemsize=np.array(itemsize, np.int64),
            counts=np.array(counts, np.int64),
            pieces=np.array(pieces, np.int64).reshape(-1, 3),
        )


@dataclass(frozen=True)
class TensorParts:
    """All parts of one tensor that have bytes.

    Attributes
    ----------
    count
        How many there are, with those that have none.
    entry
        What is known of the tensor, besides its name, its shape and its place.
    at, shape
        ``int64[n, dimensions]``, in elements.
    pieces
        ``int64[m, 3]``: their bytes, one part after the other.
    itemsize
        Element size for the codec.
    """

    count: int
    entry: TensorEntry
    at: Int64s
    shape: Int64s
    pieces: Int64s
    itemsize: int


class JoinedParts:
    """The parts of all processes, by tensor.

    Parameters
    ----------
    tables
        Of each process.
    lengths
        The raw bytes of each process's chunks; chunks are numbered on from one process to the next.

    Raises
    ------
    StateError
        If a piece is not within its chunk, or a part has not the bytes of its shape.
    """

    def __init__(self, tables: Sequence[Parts], lengths: Sequence[Int64s]) -> None:
        self._numbers: dict[str, int] = {}
        kinds: dict[TensorEntry, int] = {}
        tensor = _joined(list(self._numbered(tables)))
        order = np.argsort(tensor, kind="stable")
        self._ends = np.cumsum(np.bincount(tensor, minlength=len(self._numbers)))
        self._kind = _joined([_renamed(table, kinds)[table.kind] for table in tables])[order]
        self._kinds = list(kinds)
        self._itemsize = _joined([table.itemsize for table in tables])[order]
        dimensions, counts = (
            _joined([table.dimensions for table in tables]),
            _joined([table.counts for table in tables]),
        )
        self._dimensions = dimensions[order]
        self._first_index, cells = _moved(dimensions, order)
        self._at, self._shape = (
            _joined([table.at for table in tables])[cells],
            _joined([table.shape for table in tables])[cells],
        )
        self._first_piece, rows = _moved(counts, order)
        self._pieces = _numbered_on(tables, lengths)[rows]
        self._check_bytes(order)

    def _numbered(self, tables: Sequence[Parts]) -> Iterator[Int64s]:
        """Yield the number of each row's tensor, table after table; most have the same tensors."""
        names: Sequence[str] = ()
        numbers = np.zeros(0, np.int64)
        for table in tables:
            if table.names != names:
                names = table.names
                known = self._numbers
                numbers = np.array([known.setdefault(name, len(known)) for name in names], np.int64)
            yield numbers

    def _check_bytes(self, order: Int64s) -> None:
        """Check that each part has as many bytes as its shape says."""
        if not len(order):
            return
        sizes = np.array([kind.itemsize for kind in self._kinds], np.int64)
        ends = np.append(0, np.cumsum(self._pieces[:, 2]))
        stored = ends[self._first_piece[1:]] - ends[self._first_piece[:-1]]
        wrong = np.multiply.reduceat(self._shape, self._first_index[:-1]) * sizes[self._kind] != stored
        if wrong.any():
            number = int(np.searchsorted(self._ends, int(np.argmax(wrong)), "right"))
            name = list(self._numbers)[number]
            raise StateError(f"a process has reported fewer or more bytes of tensor {name!r} than its part has")

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    def of(self, name: str) -> TensorParts:
        """Return the parts of a tensor.

        Raises
        ------
        StateError
            If they do not fit together.
        """
        number = self._numbers[name]
        first, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        kinds = [self._kinds[kind] for kind in np.unique(self._kind[first:end]).tolist()]
        if len({kind.dtype for kind in kinds}) > 1:
            raise StateError(f"tensor {name!r} is {kinds[0].dtype} on one process and {kinds[1].dtype} on another")
        dimensions = int(self._dimensions[first])
        if (self._dimensions[first:end] != dimensions).any():
            raise StateError(f"tensor {name!r} has more dimensions on one process than on another")
        cells = slice(self._first_index[first], self._first_index[end])
        at, shape = self._at[cells].reshape(-1, dimensions), self._shape[cells].reshape(-1, dimensions)
        pieces = self._pieces[self._first_piece[first] : self._first_piece[end]]
        filled = (shape > 0).all(axis=1)
        itemsize = int(self._itemsize[first:end][filled].min(initial=16))
        return TensorParts(end - first, kinds[0], at[filled], shape[filled], pieces, itemsize)


def _renamed(table: Parts, kinds: dict[TensorEntry, int]) -> Int64s:
    """Return the number among all kinds of each kind of a table."""
    return np.array([kinds.setdefault(kind, len(kinds)) for kind in table.kinds], np.int64)


def _moved(counts: Int64s, order: Int64s) -> tuple[Int64s, Int64s]:
    """Put items in the order of their owners, given how many each owner has.

    Returns
    -------
    first, index
        ``int64[owners + 1]``: the first item of each owner, in the new order; and which item comes at each place.
    """
    before = np.cumsum(counts) - counts
    counts = counts[order]
    first = np.append(0, np.cumsum(counts))
    return first, np.repeat(before[order] - first[:-1], counts) + np.arange(first[-1])


def _numbered_on(tables: Sequence[Parts], lengths: Sequence[Int64s]) -> Int64s:
    """Return all pieces, their chunks numbered on from one table to the next."""
    pieces = np.concatenate([np.zeros((0, 3), np.int64), *(table.pieces for table in tables)])
    counts = np.array([len(part) for part in lengths], np.int64)
    owner = np.repeat(np.arange(len(tables)), [len(table.pieces) for table in tables])
    chunk, offset, nbytes = pieces.T
    wrong = (chunk < 0) | (chunk >= counts[owner]) | (offset < 0) | (nbytes <= 0)
    if not wrong.any():
        chunk += (np.cumsum(counts) - counts)[owner]
        wrong = offset + nbytes > _joined(lengths)[chunk]
    if wrong.any():
        raise StateError("a process has reported a piece that is not within its chunk; please report this")
    return pieces


def _joined(columns: Sequence[Int64s]) -> Int64s:
    return np.concatenate([np.zeros(0, np.int64), *columns])
