"""Cuts byte ranges into chunks, deterministically: the same state has the same chunks at every save.

A range of 1 MiB or more has chunks of its own, so that a change in one tensor never rewrites another. Smaller ranges of
one element size lie end to end in chunks of at most 1 MiB, one frame of the codec. So 10,000 tiny tensors make few
objects, and a changed bias rewrites at most a frame. Ranges of one kind lie together: the codec codes each frame in one
way, and the way that suits an optimizer's second moments does not suit its first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from incckpt.codec.frames import FRAME_BYTES
from incckpt.errors import OptionError
from incckpt.options import checked_count
from incckpt.state.ranges import ByteRange
from incckpt.store.manifest import Manifest, Range

__all__ = ["DEFAULT_CHUNK_BYTES", "ChunkTable", "Layout", "batches", "check_chunk_bytes", "plan"]

DEFAULT_CHUNK_BYTES = 16 << 20
_MOST_CHUNK_BYTES = 4 << 30

Int64s = npt.NDArray[np.int64]
Addresses = npt.NDArray[np.uintp]


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Which bytes of which range lie in which chunk.

    A segment is a contiguous run of bytes of one range in one chunk. Segments are ordered by chunk, then by offset in
    the chunk; every byte of every range, and of every chunk, is covered exactly once.

    Attributes
    ----------
    chunk_nbytes, chunk_itemsize
        ``int64[n]``: bytes of each chunk, and the element size of everything in it.
    seg_range, seg_range_offset
        ``int64[m]``: the range of each segment, and the segment's offset there in bytes.
    seg_chunk, seg_chunk_offset
        ``int64[m]``: the chunk of each segment, and the segment's offset there in bytes.
    seg_nbytes
        ``int64[m]``: the length of each segment in bytes.
    """

    chunk_nbytes: Int64s
    chunk_itemsize: Int64s
    seg_range: Int64s
    seg_range_offset: Int64s
    seg_chunk: Int64s
    seg_chunk_offset: Int64s
    seg_nbytes: Int64s


@dataclass(frozen=True)
class Layout:
    """How the ranges of a state lie in chunks.

    Attributes
    ----------
    chunk_bytes
        The most that a chunk holds.
    sizes, kinds, names
        ``(bytes, element size)`` of each range, its kind, from `range_kinds`, and the name of its first tensor.
    table
        The segments.
    ranges
        The same, in the form of a manifest.
    """

    chunk_bytes: int
    sizes: list[tuple[int, int]]
    kinds: list[str]
    names: Sequence[str]
    table: ChunkTable
    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, sizes: list[tuple[int, int]], kinds: list[str], chunk_bytes: int, names: Sequence[str] = ()) -> Layout:
        """Plan the chunks of ranges of these sizes and kinds."""
        table = plan(sizes, kinds, chunk_bytes=chunk_bytes)
        pieces: list[list[tuple[int, int, int]]] = [[] for _ in sizes]
        order = np.lexsort((table.seg_range_offset, table.seg_range))
        columns = (table.seg_range, table.seg_chunk, table.seg_chunk_offset, table.seg_nbytes)
        for index, *piece in zip(*(column[order].tolist() for column in columns), strict=True):
            pieces[index].append((piece[0], piece[1], piece[2]))
        ranges = (Range(nbytes, item, tuple(parts)) for (nbytes, item), parts in zip(sizes, pieces, strict=True))
        return cls(chunk_bytes, sizes, kinds, names, table, tuple(ranges))

    def compositions(self) -> list[Hashable]:
        """Return what each chunk is made of: which bytes of which tensors. Across layouts, equal ones are the same."""
        table = self.table
        found: list[list[Hashable]] = [[itemsize] for itemsize in table.chunk_itemsize.tolist()]
        columns = (table.seg_chunk, table.seg_range, table.seg_range_offset, table.seg_nbytes)
        for chunk, index, offset, nbytes in zip(*(column.tolist() for column in columns), strict=True):
            found[chunk].append((self.names[index] if self.names else index, offset, nbytes))
        return [tuple(parts) for parts in found]

    def describes(self, manifest: Manifest) -> bool:
        """Return whether a checkpoint's tensors lie in these very chunks; its packed values come after."""
        sizes = self.table.chunk_nbytes.tolist()
        return self.ranges == manifest.ranges and sizes == [chunk.nbytes for chunk in manifest.chunks[: len(sizes)]]

    def addresses(self, ranges: Sequence[ByteRange]) -> Addresses:
        """Return the address of each segment in the ranges' memory; ``uintp[m]``."""
        starts = np.fromiter((item.address for item in ranges), np.uintp, len(ranges))
        addresses: Addresses = starts[self.table.seg_range] + self.table.seg_range_offset.astype(np.uintp)
        return addresses


def check_chunk_bytes(chunk_bytes: int) -> int:
    """Return `chunk_bytes` if it is a multiple of 1 MiB, and what a single request can put everywhere.

    Raises
    ------
    OptionError
        If it is not.
    """
    number = checked_count("chunk_bytes", chunk_bytes, FRAME_BYTES, _MOST_CHUNK_BYTES)
    if number % FRAME_BYTES:
        raise OptionError(f"chunk_bytes must be a multiple of 1 MiB ({FRAME_BYTES}), not {number}")
    return number


def plan(
    sizes: Sequence[tuple[int, int]],
    kinds: Sequence[Hashable] | None = None,
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> ChunkTable:
    """Cut ranges into chunks.

    Chunks are ordered by the ranges of their first bytes.

    Parameters
    ----------
    sizes
        ``(bytes, element size)`` of each range: at least one byte, a multiple of the element size, which is 1, 2, 4, 8
        or 16.
    kinds
        The kind of each range: small ranges of one kind follow each other. By default all are of one kind.
    chunk_bytes
        The most that a chunk may hold, a positive multiple of 1 MiB.

    Raises
    ------
    OptionError
        If `chunk_bytes` or a size is not usable.
    """
    check_chunk_bytes(chunk_bytes)
    table = np.array(sizes, np.int64).reshape(-1, 2)
    nbytes, itemsize = table[:, 0], table[:, 1]
    wrong = (nbytes <= 0) | ~np.isin(itemsize, (1, 2, 4, 8, 16)) | (nbytes % np.maximum(itemsize, 1) != 0)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise OptionError(f"range {index} has {nbytes[index]} bytes of element size {itemsize[index]}")

    rank = _ranks(kinds, len(table))
    # Sort segments by the first range of their chunk: this places chunks of small ranges among the others.
    large = np.flatnonzero(nbytes >= FRAME_BYTES)
    counts = -(-nbytes[large] // chunk_bytes)
    large_range = np.repeat(large, counts)
    piece = np.arange(len(large_range)) - np.repeat(np.cumsum(counts) - counts, counts)
    large_offset = piece * chunk_bytes
    parts = [(large_range, large_offset, np.minimum(nbytes[large_range] - large_offset, chunk_bytes), large_range)]
    for size in np.unique(itemsize):
        small = np.flatnonzero((nbytes < FRAME_BYTES) & (itemsize == size))
        small = small[np.argsort(rank[small])]
        parts.append((small, np.zeros_like(small), nbytes[small], small[_heads(nbytes[small])]))
    seg_range, seg_range_offset, seg_nbytes, head = (np.concatenate(column) for column in zip(*parts, strict=True))

    order = np.lexsort((seg_range_offset, rank[seg_range], head))
    seg_range, seg_range_offset, seg_nbytes, head = (
        column[order].astype(np.int64) for column in (seg_range, seg_range_offset, seg_nbytes, head)
    )
    starts = np.flatnonzero(seg_range == head)  # the head's own segments: a chunk begins at each
    seg_chunk = np.cumsum(seg_range == head) - 1
    before = np.cumsum(seg_nbytes) - seg_nbytes
    return ChunkTable(
        chunk_nbytes=np.add.reduceat(seg_nbytes, starts) if len(starts) else np.zeros(0, np.int64),
        chunk_itemsize=itemsize[head[starts]],
        seg_range=seg_range,
        seg_range_offset=seg_range_offset,
        seg_chunk=seg_chunk,
        seg_chunk_offset=before - before[starts[seg_chunk]],
        seg_nbytes=seg_nbytes,
    )


def _ranks(kinds: Sequence[Hashable] | None, count: int) -> Int64s:
    """Return the rank of each range, in the order of kinds as first seen, and of ranges within a kind."""
    if kinds is None:
        return np.arange(count)
    seen: dict[Hashable, int] = {}
    order = np.fromiter((seen.setdefault(kind, len(seen)) for kind in kinds), np.int64, count)
    ranks = np.empty(count, np.int64)
    ranks[np.argsort(order, kind="stable")] = np.arange(count)
    return ranks


def _heads(nbytes: Int64s) -> Int64s:
    """Return for each small range the position of the first one in its chunk. A chunk ends before the range that would
    exceed a frame.
    """
    heads = np.empty(len(nbytes), np.int64)
    ends = np.cumsum(nbytes)
    first = 0
    while first < len(nbytes):
        after = int(np.searchsorted(ends, ends[first] - nbytes[first] + FRAME_BYTES, side="right"))
        heads[first:after] = first
        first = after
    return heads


def batches(indexes: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Divide chunks, of `sizes` in bytes, into batches of at most `most` bytes or of a single chunk."""
    batch: list[int] = []
    nbytes = 0
    for index, size in zip(indexes, sizes, strict=True):
        if batch and nbytes + size > most:
            yield batch
            batch, nbytes = [], 0
        batch.append(index)
        nbytes += size
    if batch:
        yield batch
