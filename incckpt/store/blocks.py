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

__all__ = ["Block", "cut", "fault", "overlap", "row_major", "runs"]

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
    outside = ((at < 0) | (size <= 0) | (at + size > np.array(shape, np.int64))).any(axis=1)
    if outside.any():
        block = blocks[int(np.argmax(outside))]
        return f"block {block.at} of {block.shape} is outside {tuple(shape)}"
    total = sum(map(math.prod, size.tolist()))
    if total != math.prod(shape):
        return f"its blocks have {total} bytes together, not {math.prod(shape)}"
    pair = _overlapping(blocks, at, size)
    return "" if pair is None else f"blocks {pair[0].at} and {pair[1].at} overlap"


def _overlapping(blocks: Sequence[Block], at: Int64s, size: Int64s) -> tuple[Block, Block] | None:
    """Return two blocks that overlap, if any do: sweep along the dimension in which they begin at the most places."""
    if len(blocks) < 2:
        return None
    axis = max(range(at.shape[1]), key=lambda axis: len(np.unique(at[:, axis])))
    order = np.argsort(at[:, axis], kind="stable")
    first, end = at[order, axis], at[order, axis] + size[order, axis]
    if (first[1:] >= end[:-1]).all():
        return None
    active: list[Block] = []
    for block in (blocks[index] for index in order.tolist()):
        active = [other for other in active if other.at[axis] + other.shape[axis] > block.at[axis]]
        for other in active:
            if overlap(block, other) is not None:
                return other, block
        active.append(block)
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
