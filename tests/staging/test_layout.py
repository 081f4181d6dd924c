"""Ranges to chunks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incckpt.codec.frames import FRAME_BYTES
from incckpt.errors import OptionError
from incckpt.staging.layout import plan
from tests.effort import tries

MIB = 1 << 20
FIELDS = ("seg_range", "seg_range_offset", "seg_chunk", "seg_chunk_offset", "seg_nbytes")


@st.composite
def sizes(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw ranges, many of them at the borders that matter."""
    found = []
    for _ in range(draw(st.integers(0, 40))):
        itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
        about = draw(st.sampled_from([1, 100, FRAME_BYTES // 3, FRAME_BYTES - 16, FRAME_BYTES, 2 * MIB, 5 * MIB]))
        items = max(1, about // itemsize + draw(st.integers(-2, 2)))
        found.append((items * itemsize, itemsize))
    return found


@pytest.mark.slow
@settings(max_examples=tries(300), deadline=None)
@given(sizes(), st.sampled_from([MIB, 2 * MIB, 16 * MIB]), st.data())
def test_every_byte_lies_in_one_chunk_of_its_element_size(
    ranges: list[tuple[int, int]], chunk_bytes: int, data: st.DataObject
) -> None:
    kinds = data.draw(st.none() | st.lists(st.sampled_from("abc"), min_size=len(ranges), max_size=len(ranges)))
    table = plan(ranges, kinds, chunk_bytes=chunk_bytes)
    covered = [0] * len(ranges)
    filled = [0] * len(table.chunk_nbytes)
    order = []
    for number, start, chunk, offset, nbytes in zip(*(getattr(table, field).tolist() for field in FIELDS), strict=True):
        assert nbytes > 0
        assert start == covered[number]
        covered[number] += nbytes
        assert offset == filled[chunk]
        filled[chunk] += nbytes
        assert table.chunk_itemsize[chunk] == ranges[number][1]
        order.append(chunk)
    assert covered == [nbytes for nbytes, _ in ranges]
    assert filled == table.chunk_nbytes.tolist()
    assert order == sorted(order)
    assert max(filled, default=0) <= chunk_bytes
    assert not table.chunk_nbytes.size or (table.chunk_nbytes % table.chunk_itemsize == 0).all()


@settings(max_examples=tries(100), deadline=None)
@given(sizes())
def test_large_ranges_are_alone_and_small_ones_whole(ranges: list[tuple[int, int]]) -> None:
    table = plan(ranges, chunk_bytes=2 * MIB)
    for chunk in range(len(table.chunk_nbytes)):
        members = np.flatnonzero(table.seg_chunk == chunk)
        large = [ranges[number][0] >= FRAME_BYTES for number in table.seg_range[members]]
        if any(large):
            assert len(members) == 1
            assert table.seg_range_offset[members[0]] % FRAME_BYTES == 0
        else:
            assert table.chunk_nbytes[chunk] <= FRAME_BYTES
            assert (table.seg_range_offset[members] == 0).all()
            assert [ranges[number][0] for number in table.seg_range[members]] == table.seg_nbytes[members].tolist()


@settings(max_examples=tries(100), deadline=None)
@given(sizes())
def test_small_ranges_make_few_chunks(ranges: list[tuple[int, int]]) -> None:
    table = plan(ranges)
    for itemsize in {itemsize for _, itemsize in ranges}:
        small = [nbytes for nbytes, size in ranges if size == itemsize and nbytes < FRAME_BYTES]
        heads = np.unique(
            table.seg_chunk[
                np.isin(
                    table.seg_range,
                    [
                        number
                        for number, (nbytes, size) in enumerate(ranges)
                        if size == itemsize and nbytes < FRAME_BYTES
                    ],
                )
            ]
        )
        # Any two that follow one another are together more than a frame, or they would be one.
        assert len(heads) <= max(1, 2 * sum(small) // FRAME_BYTES + 1)


def test_ten_thousand_tiny_tensors_make_one_chunk_per_frame() -> None:
    table = plan([(400, 4)] * 10_000)
    assert len(table.chunk_nbytes) == 4
    assert len(table.seg_range) == 10_000


@settings(max_examples=tries(200), deadline=None)
@given(sizes(), st.data())
def test_small_ranges_of_one_kind_lie_together(ranges: list[tuple[int, int]], data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from("abc"), min_size=len(ranges), max_size=len(ranges)))
    table = plan(ranges, kinds)
    for itemsize in {itemsize for _, itemsize in ranges}:
        small = [i for i, (nbytes, size) in enumerate(ranges) if nbytes < FRAME_BYTES and size == itemsize]
        chunks = [list(map(int, table.seg_range[table.seg_chunk == chunk])) for chunk in range(len(table.chunk_nbytes))]
        chunks = [members for members in chunks if members[0] in small]
        by_kind = [i for kind in dict.fromkeys(kinds) for i in small if kinds[i] == kind]
        at = {number: place for place, number in enumerate(by_kind)}
        assert sorted(i for members in chunks for i in members) == small
        assert all([at[i] for i in members] == list(range(at[members[0]], at[members[-1]] + 1)) for members in chunks)
        # As many chunks as without kinds of that order would be: each is full but for what comes next.
        chunks.sort(key=lambda members: at[members[0]])
        for members, after in pairwise(chunks):
            assert sum(ranges[i][0] for i in [*members, after[0]]) > FRAME_BYTES


def test_what_is_appended_moves_nothing_before_it() -> None:
    before = plan([(3 * MIB, 4), (100, 4), (200, 2), (300, 4)])
    after = plan([(3 * MIB, 4), (100, 4), (200, 2), (300, 4), (5 * MIB, 2), (64, 8)])
    kept = slice(0, len(before.seg_range))
    for field in FIELDS:
        assert getattr(after, field)[kept].tolist() == getattr(before, field).tolist()


def test_chunks_are_in_the_order_of_the_ranges_that_they_begin_with() -> None:
    table = plan([(10, 1), (5 * MIB, 4), (12, 4), (7, 1)], chunk_bytes=2 * MIB)
    assert table.seg_range.tolist() == [0, 3, 1, 1, 1, 2]
    assert table.seg_chunk.tolist() == [0, 0, 1, 2, 3, 4]
    assert table.chunk_nbytes.tolist() == [17, 2 * MIB, 2 * MIB, MIB, 12]


@pytest.mark.parametrize("chunk_bytes", [0, -MIB, MIB + 1, MIB // 2, 1.0 * MIB, True])
def test_chunk_bytes_has_to_be_a_multiple_of_a_mebibyte(chunk_bytes: int) -> None:
    with pytest.raises(OptionError, match="chunk_bytes must be"):
        plan([(4, 4)], chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("wrong", [(0, 1), (-4, 4), (6, 4), (4, 3), (4, 0), (64, 32)])
def test_a_range_that_cannot_be_is_named(wrong: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match=r"range 1 has"):
        plan([(4, 4), wrong])
