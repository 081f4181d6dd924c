"""Ranges that several processes wrote: each put some boxes of a tensor, which together are the whole.

A *block* is a box of a range seen as a row-major array of bytes: its first byte in each dimension, and its size. The
last dimension counts bytes, so that nothing here depends on dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Block", "cut", "fault", "fault_of", "overlap", "row_major", "runs"]

Int64s = npt.NDArray[np.int64]

_MOST = 2**62


class Block(NamedTuple):
    """A box of an array of bytes.

    Attributes
    ----------
    at
        Its first index in each dimension.
    shape
        Its size in each dimension, positive.
    """

    at: tuple[int, ...]
    shape: tuple[int, ...]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a row-major array of bytes."""
    strides = [1] * len(shape)
    for index in range(len(shape) - 1, 0, -1):
        strides[index - 1] = strides[index] * shape[index]
    return tuple(strides)


def fault(shape: Sequence[int], blocks: Sequence[Block]) -> str:
    """Return why `blocks` do not cover an array of `shape` exactly once, or an empty string if they do."""
    rank = len(shape)
    for block in blocks:
        if len(block.at) != rank or len(block.shape) != rank:
            return f"block {block.at} has another number of dimensions than {tuple(shape)}"
    if max((*shape, *(n for block in blocks for part in block for n in part)), default=0) > _MOST:
        return f"an array of {tuple(shape)} is too large"
    at = np.array([block.at for block in blocks], np.int64).reshape(len(blocks), rank)
    size = np.array([block.shape for block in blocks], np.int64).reshape(len(blocks), rank)
    return fault_of(shape, at, size)


def fault_of(shape: Sequence[int], at: Int64s, size: Int64s) -> str:
    """Return why blocks do not cover an array of `shape` exactly once, or an empty string if they do.

    Parameters
    ----------
    at, size
        ``int64[n, len(shape)]``: their first indexes and sizes; none of these numbers is beyond 2⁶².
    """
    outside = ((at < 0) | (size <= 0) | (size > np.array(shape, np.int64) - at)).any(axis=1)
    if outside.any():
        index = int(np.argmax(outside))
        return f"block {_text(at[index])} of {_text(size[index])} is outside {tuple(shape)}"
    whole = math.prod(shape)
    each: list[int] = size.prod(axis=1).tolist() if whole <= _MOST else list(map(math.prod, size.tolist()))
    if (total := sum(each)) != whole:
        return f"its blocks have {total} bytes together, not {whole}"
    pair = _overlapping(shape, at, size)
    return "" if pair is None else f"blocks {_text(at[pair[0]])} and {_text(at[pair[1]])} overlap"


def _text(row: Int64s) -> str:
    return str(tuple(row.tolist()))


def _overlapping(shape: Sequence[int], at: Int64s, size: Int64s) -> tuple[int, int] | None:
    """Return the numbers of two blocks that overlap, if any do: where blocks form a row or a grid, none do."""
    split = np.flatnonzero((size != np.array(shape, np.int64)).any(axis=0))
    if len(at) < 2 or _is_row(at, size, split) or _is_grid(at[:, split], size[:, split]):
        return None
    return _swept(at, size)


def _is_row(at: Int64s, size: Int64s, split: Int64s) -> bool:
    """Return whether blocks follow each other along the only dimension that is split."""
    if len(split) != 1:
        return False
    first, nbytes = at[:, split[0]], size[:, split[0]]
    order = np.argsort(first, kind="stable")
    return bool((first[order][1:] >= (first + nbytes)[order][:-1]).all())


def _is_grid(at: Int64s, size: Int64s) -> bool:
    """Return whether blocks are cells of a grid, each another one; ``False`` where that takes too long to say."""
    cells = np.zeros(len(at), np.int64)
    count = 1
    for axis in range(at.shape[1]):
        starts, cell = np.unique(at[:, axis], return_inverse=True)
        ends = np.append(starts[1:], _MOST)
        if (at[:, axis] + size[:, axis] > ends[cell]).any():
            return False
        count *= len(starts)
        if count > _MOST:
            return False
        cells = cells * len(starts) + cell
    return len(np.unique(cells)) == len(at)


def _swept(at: Int64s, size: Int64s) -> tuple[int, int] | None:
    """Sweep along the dimension in which the blocks begin at the most places."""
    axis = max(range(at.shape[1]), key=lambda axis: len(np.unique(at[:, axis])))
    order = np.argsort(at[:, axis], kind="stable").tolist()
    blocks = [Block(tuple(one), tuple(other)) for one, other in zip(at.tolist(), size.tolist(), strict=True)]
    active: list[int] = []
    for index in order:
        block = blocks[index]
        active = [other for other in active if blocks[other].at[axis] + blocks[other].shape[axis] > block.at[axis]]
        for other in active:
            if overlap(block, blocks[other]) is not None:
                return other, index
        active.append(index)
    return None


def overlap(one: Block, other: Block) -> Block | None:
    """Return the box that both have, if there is one."""
    at: list[int] = []
    shape: list[int] = []
    for a, n, b, m in zip(one.at, one.shape, other.at, other.shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        at.append(low)
        shape.append(high - low)
    return Block(tuple(at), tuple(shape))


def cut(shape: Sequence[int], start: int, stop: int) -> Iterator[Block]:
    """Cut the bytes ``[start, stop)`` of a row-major array into boxes, in order; each is contiguous."""
    if len(shape) == 1:
        if start < stop:
            yield Block((start,), (stop - start,))
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        if inside or stop - start < row:
            end = min(stop, (index + 1) * row)
            for at, size in cut(shape[1:], inside, end - index * row):
                yield Block((index, *at), (1, *size))
        else:
            end = stop - stop % row
            yield Block((index, *(0 for _ in shape[1:])), (end // row - index, *shape[1:]))
        start = end


def runs(shape: Sequence[int], blocks: Sequence[Block]) -> tuple[Int64s, Int64s, Int64s]:
    """Return where the bytes of an array are among those of its blocks, which lie end to end.

    Returns
    -------
    start, source, nbytes
        ``int64[n]``: the first byte of each run in the array, in ascending order; its place among the blocks' bytes;
        and its length.
    """
    strides = np.array(row_major(shape), np.int64)
    parts: list[tuple[Int64s, Int64s, Int64s]] = []
    before = 0
    for at, size in blocks:
        whole = len(shape) - 1  # dimensions from here on are contiguous in the array
        while whole and size[whole] == shape[whole]:
            whole -= 1
        nbytes = math.prod(size[whole:])
        starts = np.array([int(np.dot(strides, np.array(at, np.int64)))], np.int64)
        for axis in range(whole):
            starts = (starts[:, None] + np.arange(size[axis], dtype=np.int64) * strides[axis]).reshape(-1)
        sources = before + np.arange(len(starts), dtype=np.int64) * nbytes
        parts.append((starts, sources, np.full(len(starts), nbytes, np.int64)))
        before += math.prod(size)
    start, source, length = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(start)
    return start[order], source[order], length[order]
