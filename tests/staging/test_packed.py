"""Packed values in chunks: cut where they were before, and taken over from the last save where they are the same."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incckpt.codec.frames import FRAME_BYTES
from incckpt.staging.packed import PackedChunks, PackedStage
from incckpt.state.packing import PackedValue
from tests.effort import tries

MIB = 1 << 20


def values(*blocks: list[bytes] | bytes | str) -> list[PackedValue]:
    return [PackedValue(f"v{index}", one) for index, one in enumerate(blocks)]


def read(packed: PackedChunks) -> list[bytes]:
    """Return the bytes of each range, as a reader puts them together."""
    found = []
    for item in packed.ranges:
        raw = [packed.contents[chunk].raw for chunk, _, _ in item.pieces]
        parts = [
            data[offset : offset + nbytes].tobytes()
            for data, (_, offset, nbytes) in zip(raw, item.pieces, strict=True)
            if data is not None
        ]
        found.append(b"".join(parts))
        assert len(found[-1]) == item.nbytes
    return found


def expected(some: Sequence[PackedValue]) -> list[bytes]:
    return [
        b"".join(one) if isinstance(one, list) else one.encode() if isinstance(one, str) else one for _, one in some
    ]


sizes = st.sampled_from([1, 100, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 5, 3 * FRAME_BYTES + 1])
blocks = sizes.map(lambda size: os.urandom(size))
kinds = st.one_of(blocks, st.lists(blocks, min_size=1, max_size=4), sizes.map(lambda size: "é" * size))


@settings(max_examples=tries(40), deadline=None)
@given(st.lists(kinds, max_size=6))
def test_every_byte_is_in_its_place_and_no_chunk_too_large(some: list[list[bytes] | bytes | str]) -> None:
    given_values = values(*some)
    stage = PackedStage(2 * MIB)
    packed = stage.stage(given_values)
    assert read(packed) == expected(given_values)
    assert all(0 < content.nbytes <= 2 * MIB for content in packed.contents)
    again = stage.stage(given_values)
    assert again.new == (0, 0)
    assert all(one is other for one, other in zip(again.contents, packed.contents, strict=True))


def test_what_changed_is_new_and_the_rest_is_taken_over() -> None:
    stage = PackedStage(16 * MIB)
    log = [os.urandom(MIB + 7) for _ in range(5)]
    blob, text = os.urandom(20 * MIB), "x" * (2 * MIB)
    stage.stage(values([*log, b"tail"], blob, text))
    packed = stage.stage(values([*log, b"a longer tail"], blob, text))
    assert packed.new == (1, len(b"a longer tail"))
    assert stage.stage(values(log, blob, text, bytes(bytearray(text, "ascii")))).new == (1, 2 * MIB)


def test_an_address_that_is_another_values_by_now_is_not_taken_for_the_first() -> None:
    stage = PackedStage(16 * MIB)
    for index in range(20):
        text = chr(97 + index) * (2 * MIB)
        packed = stage.stage(values(text, bytes([index]) * (2 * MIB)))
        assert read(packed) == [text.encode(), bytes([index]) * (2 * MIB)]
        del text, packed


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_not_kept_is_new_every_time(keep: bool) -> None:
    stage = PackedStage(16 * MIB, keep=keep)
    some = values(os.urandom(2 * MIB), [b"small"])
    stage.stage(some)
    assert stage.stage(some).new == ((0, 0) if keep else (2, 2 * MIB + 5))
    stage.forget()
    assert stage.stage(some).new == (2, 2 * MIB + 5)
