"""Boxes of an array: they cover it or are refused, and bytes are found in them wherever they lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.errors import CorruptionError
from incckpt.run.reader import ChunkRead, read_box
from incckpt.store.blocks import Block, cut, fault, overlap
from incckpt.store.manifest import Chunk, Manifest, Range


@st.composite
def covers(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Block]]:
    """A shape, and blocks that cover it: boxes cut in two at random, again and again, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    blocks = [Block((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        at, size = blocks.pop(draw(st.integers(0, len(blocks) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        if size[axis] < 2:
            blocks.append(Block(at, size))
            continue
        first = draw(st.integers(1, size[axis] - 1))
        left, right, place = list(size), list(size), list(at)
        left[axis], right[axis] = first, size[axis] - first
        place[axis] += first
        blocks += [Block(at, tuple(left)), Block(tuple(place), tuple(right))]
    return shape, draw(st.permutations(blocks))


def _slices(block: Block) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(block.at, block.shape, strict=True))


@st.composite
def stored(draw: st.DrawFn) -> tuple[np.ndarray, Manifest, list[np.ndarray]]:
    """An array, a manifest with it as a range of blocks, and the bytes of its chunks."""
    shape, blocks = draw(covers())
    array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    data = np.concatenate([array[_slices(block)].reshape(-1) for block in blocks])
    ends = sorted({*draw(st.lists(st.integers(0, data.size), max_size=5)), 0, data.size})
    pieces: list[tuple[int, int, int]] = []
    chunks: list[np.ndarray] = []
    for low, high in itertools.pairwise(ends):
        before = draw(st.integers(0, 3))
        chunks.append(np.concatenate([np.full(before, 255, np.uint8), data[low:high], np.full(2, 255, np.uint8)]))
        pieces.append((len(chunks) - 1, before, high - low))
    item = Range(data.size, 1, tuple(pieces), shape, tuple(blocks))
    described = tuple(Chunk(f"{i:064x}", chunk.size, 1, "0" * 16, 9) for i, chunk in enumerate(chunks))
    manifest = Manifest("r", 1, 1, "0" * 16, 0.0, {}, 1 << 20, {"dict": []}, (), (item,), described)
    return array, manifest, chunks


@given(covers())
def test_blocks_that_cover_an_array_are_taken(case: tuple[tuple[int, ...], list[Block]]) -> None:
    """What cuts of a box give covers it."""
    assert fault(*case) == ""


@given(covers(), st.data())
def test_blocks_that_do_not_are_refused(case: tuple[tuple[int, ...], list[Block]], data: st.DataObject) -> None:
    """One block fewer, one twice, one moved or stretched: a byte is covered not once."""
    shape, blocks = case
    index = data.draw(st.integers(0, len(blocks) - 1))
    axis = data.draw(st.integers(0, len(shape) - 1))
    at, size = blocks[index]
    moved, longer = list(at), list(size)
    moved[axis] += 1
    longer[axis] += 1
    for wrong in (Block(tuple(moved), size), Block(at, tuple(longer)), Block((*at, 0), (*size, 1))):
        assert fault(shape, [*blocks[:index], wrong, *blocks[index + 1 :]])
    assert fault(shape, blocks[:index] + blocks[index + 1 :])
    assert fault(shape, [*blocks, blocks[index]])
    if len(blocks) > 1:
        other = blocks[index - 1]
        same_size = [block for block in blocks if block.shape == other.shape and block is not other]
        for twin in same_size:
            assert "overlap" in fault(shape, [other if block is twin else block for block in blocks])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_run_of_bytes_is_cut_into_boxes_in_order(sizes: Sequence[int], data: st.DataObject) -> None:
    """Together the boxes are the bytes, in order, and there are few."""
    array = np.arange(math.prod(sizes)).reshape(sizes)
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    boxes = list(cut(sizes, start, stop))
    found = [value for box in boxes for value in array[_slices(box)].reshape(-1)]
    assert found == list(range(start, stop))
    assert len(boxes) <= 2 * len(sizes) - 1


@given(stored(), st.data())
def test_bytes_are_found_in_blocks(case: tuple[np.ndarray, Manifest, list[np.ndarray]], data: st.DataObject) -> None:
    """A linear read and a boxed one give what was stored, and a manifest survives its JSON."""
    array, manifest, chunks = case
    assert Manifest.from_json(manifest.to_json(), "manifest") == manifest
    item = manifest.ranges[0]
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    linear = [value for index, offset, nbytes in item.part(start, stop) for value in chunks[index][offset:][:nbytes]]
    assert linear == array.reshape(-1)[start:stop].tolist()

    at = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    size = tuple(data.draw(st.integers(1, limit - first)) for first, limit in zip(at, array.shape, strict=True))
    out = np.full(size, 254, np.uint8)
    reads: dict[int, ChunkRead] = {}
    read_box(reads, manifest, item, Block(at, size), array.shape, out, ["w"])
    for index, read in reads.items():
        for offset, target in read.pieces:
            target[:] = chunks[index][offset : offset + target.nbytes]
        for offset, strides, part in read.boxes:
            part[...] = np.ndarray(part.shape, np.uint8, chunks[index], offset, strides)
    assert np.array_equal(out, array[_slices(Block(at, size))])
    wanted = {index for index, *_ in item.boxes(Block(at, size), array.shape)}
    assert set(reads) == wanted, "chunks are read that hold nothing of what is wanted"


def test_a_manifest_whose_blocks_leave_a_gap_is_damaged() -> None:
    """It names the range, and what is wrong."""
    chunk = Chunk("0" * 64, 8, 1, "0" * 16, 9)
    for blocks, message in (
        ((Block((0,), (4,)), Block((2,), (4,))), "overlap"),
        ((Block((0,), (4,)), Block((6,), (4,))), "outside"),
        ((Block((0,), (4,)),), "4 bytes together, not 8"),
    ):
        item = Range(8, 1, ((0, 0, 8),), (8,), blocks)
        manifest = Manifest("r", 1, 1, "0" * 16, 0.0, {}, 1 << 20, {"dict": []}, (), (item,), (chunk,))
        with pytest.raises(CorruptionError, match=f"range 0.*{message}"):
            Manifest.from_json(manifest.to_json(), "manifest")


def test_what_two_boxes_have_in_common() -> None:
    """A box, or nothing if they only touch."""
    assert overlap(Block((0, 0), (2, 2)), Block((1, 1), (2, 2))) == Block((1, 1), (1, 1))
    assert overlap(Block((0, 0), (2, 2)), Block((2, 0), (2, 2))) is None
