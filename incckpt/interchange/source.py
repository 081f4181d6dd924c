"""What a checkpoint holds, for writers of other formats: its tensors by name, and their bytes in bounded memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from incckpt.errors import OptionError, StateError
from incckpt.run.contents import Contents
from incckpt.run.reader import Bytes, ChunkRead, Reader
from incckpt.staging.hostmem import HostPool
from incckpt.state.build import Builder
from incckpt.state.entries import TensorEntry, byte_strides, packed_shape
from incckpt.state.names import join_name
from incckpt.state.ranges import raw_view
from incckpt.state.selection import UNSELECTED
from incckpt.state.tree import MappingNode, SequenceNode, TensorRef, Tree, children
from incckpt.store.manifest import Manifest

__all__ = ["CheckpointBytes", "NamedTensor", "leaves_by_name", "named_tensors", "subtree"]

_WINDOW = 128 << 20  # bytes of chunks in memory at once
_PIECE = 32 << 20  # bytes given to a writer at once


class CheckpointBytes:
    """The bytes of a checkpoint's ranges, a window of chunks in memory at a time.

    Any order is right. In the order that `in_order` gives, every chunk is read once, many of them in parallel.

    Parameters
    ----------
    contents
        Which checkpoint, and what of it is wanted.
    progress
        Called with the raw bytes of each chunk that was read, from any thread.
    """

    def __init__(self, reader: Reader, contents: Contents, progress: Callable[[int], None]) -> None:
        self.manifest: Manifest = contents.manifest
        self._reader = reader
        self._progress = progress
        names = contents.names()
        self._names: dict[int, tuple[str, ...]] = {}
        for index in sorted(contents.wanted):
            for chunk, _, _ in self.manifest.ranges[index].pieces:
                self._names[chunk] = self._names.get(chunk, ()) + tuple(names[index][:3])
        self._order = sorted(self._names)
        self._window: dict[int, Bytes] = {}
        self._pool = HostPool()

    @property
    def nbytes(self) -> int:
        """Raw bytes of all chunks that are wanted."""
        return sum(self.manifest.chunks[index].nbytes for index in self._order)

    def in_order(self, ranges: Iterable[int]) -> list[int]:
        """Return ranges in the order that their bytes lie in the chunks."""
        return sorted(set(ranges), key=lambda index: self.manifest.ranges[index].pieces[:1])

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes ``[start, stop)`` of a range, new memory."""
        item = self.manifest.ranges[index]
        stop = item.nbytes if stop is None else stop
        out = np.empty(stop - start, np.uint8)
        position = 0
        for chunk, offset, nbytes in item.part(start, stop):
            out[position : position + nbytes] = self._chunk(chunk)[offset : offset + nbytes]
            position += nbytes
        return out

    def pieces(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[Bytes]:
        """Yield the bytes ``[start, stop)`` of a range in order, a part at a time."""
        stop = self.manifest.ranges[index].nbytes if stop is None else stop
        for low in range(start, stop, _PIECE):
            yield self.read(index, low, min(low + _PIECE, stop))

    def _chunk(self, index: int) -> Bytes:
        if index not in self._window:
            self._window.clear()
            nbytes = 0
            reads: dict[int, ChunkRead] = {}
            for following in self._order[bisect_left(self._order, index) :]:
                chunk = self.manifest.chunks[following]
                nbytes += chunk.nbytes
                if reads and nbytes > _WINDOW:
                    break
                reads[following] = ChunkRead(chunk, names=list(self._names[following]))
            for read in reads.values():
                read.pieces.append((0, self._pool.take(read.chunk.nbytes)))
            self._reader.read(reads.values(), self._progress)
            self._window = {following: read.pieces[0][1] for following, read in reads.items()}
            self._pool.trim(_WINDOW - nbytes if nbytes < _WINDOW else 0)
        return self._window[index]


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a checkpoint, under the name that another format knows it by.

    Attributes
    ----------
    name, entry
        Name, and how its bytes lie in which range.
    """

    name: str
    entry: TensorEntry

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.entry.nbytes

    @property
    def is_row_major(self) -> bool:
        """Whether its elements lie in its range, or are packed there, in row-major order without gaps."""
        entry = self.entry
        strides = byte_strides(entry)
        if entry.conj or entry.neg:
            return False
        if entry.packed:
            return packed_shape(entry.shape, strides) == entry.shape
        expected = entry.itemsize
        for size, stride in zip(reversed(entry.shape), reversed(strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def pieces(self, source: CheckpointBytes) -> Iterator[Bytes]:
        """Yield its elements' bytes in row-major order. Only a tensor of another order is in memory whole."""
        if not self.nbytes:
            return iter(())
        if self.is_row_major:
            return source.pieces(self.entry.range, self.entry.offset, self.entry.offset + self.nbytes)
        return iter([self._row_major(source)])

    def _row_major(self, source: CheckpointBytes) -> Bytes:
        entry = self.entry
        value = Builder([entry], {entry.range: source.read(entry.range)}, map_location="cpu").tensor(0)
        if isinstance(value, np.ndarray):
            return np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        try:
            plain = value.detach().resolve_conj().resolve_neg()
        except NotImplementedError as error:
            raise StateError(f"torch cannot resolve the negative bit of tensor {self.name!r}: {error}") from error
        carrier = raw_view(plain)  # copies of some dtypes are not implemented
        dense: Bytes = carrier.contiguous().reshape(-1).view(torch.uint8).numpy()
        return dense


def subtree(tree: Tree, root: str) -> Tree:
    """Return the part of `tree` that has the dotted name `root`.

    Raises
    ------
    OptionError
        If there is none, or several.
    """
    found = list(_at(tree, "", root))
    if len(found) != 1:
        names = ", ".join(repr(join_name("", key)) for key, _ in list(children(tree))[:10]) or "nothing"
        what = "no part of" if not found else f"{len(found)} parts of"
        raise OptionError(f"root={root!r} names {what} the checkpoint; at the top there are {names}")
    return found[0]


def _at(tree: Tree, name: str, wanted: str) -> Iterator[Tree]:
    if name == wanted:
        yield tree
    elif not name or wanted.startswith(f"{name}."):
        for key, child in children(tree):
            yield from _at(child, join_name(name, key), wanted)


def named_tensors(tree: Tree, entries: Sequence[TensorEntry]) -> tuple[list[NamedTensor], list[str]]:
    """Return the tensors and arrays of `tree` by dotted name, and the names of what else there is.

    Raises
    ------
    StateError
        If two tensors have one name.
    """
    tensors: dict[str, NamedTensor] = {}
    others: list[str] = []
    for name, leaf in leaves_by_name(tree):
        if not isinstance(leaf, TensorRef):
            others.append(name)
        elif name in tensors:
            raise StateError(f"two tensors would have the name {name!r} in the file; export them apart with root=")
        else:
            tensors[name] = NamedTensor(name, entries[leaf.index])
    return list(tensors.values()), others


def leaves_by_name(tree: Tree, name: str = "") -> Iterator[tuple[str, Tree]]:
    """Yield every leaf of `tree` that was selected, with its dotted name."""
    if isinstance(tree, (MappingNode, SequenceNode)):
        for key, child in children(tree):
            yield from leaves_by_name(child, join_name(name, key))
    elif tree is not UNSELECTED:
        yield name, tree
