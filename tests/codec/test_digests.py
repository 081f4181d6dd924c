"""Digests of frames, many in one call, are what hashlib says, whichever function makes them."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from incckpt.codec import _sha256, digests
from incckpt.codec.digests import frame_digests
from incckpt.codec.frames import FRAME_BYTES

OPENSSL = digests._find_sha256()
FUNCTIONS = {"pairs": 0} if _sha256.PAIRED else {}
if OPENSSL:
    FUNCTIONS["openssl"] = OPENSSL
SIZES = [0, 1, 63, 64, 65, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES, 3 * FRAME_BYTES + 7]


def expected(raw: bytes, frame: int = FRAME_BYTES) -> bytes:
    return b"".join(hashlib.sha256(raw[at : at + frame]).digest() for at in range(0, len(raw), frame))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@given(
    sizes=st.lists(st.integers(0, 700), max_size=6),
    frame=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    offset=st.integers(0, 17),
)
@example(sizes=list(range(200)), frame=1000, seed=0, offset=0)  # every length of a tail, beside each of the next
@example(sizes=[64 * 40, 1, 1, 1, 64 * 9, 0, 55, 56], frame=64 * 50, seed=0, offset=1)  # one lane far ahead
def test_pieces_of_any_size_two_at_a_time(function: int, sizes: list[int], frame: int, seed: int, offset: int) -> None:
    generator = np.random.default_rng(seed)
    chunks = [memoryview(generator.bytes(size + offset))[offset:] for size in sizes]
    assert _sha256.digests(chunks, frame, function) == [expected(bytes(chunk), frame) for chunk in chunks]


def test_what_cannot_be_hashed_is_refused() -> None:
    with pytest.raises(ValueError, match="frames of 0 bytes"):
        _sha256.digests([b"x"], 0, OPENSSL or 1)
    with pytest.raises(ValueError, match="not C-contiguous"):
        _sha256.digests([b"x", np.zeros((4, 4), np.uint8)[:, ::2]], 10, OPENSSL)
    with pytest.raises(TypeError):
        _sha256.digests([b"x", 3], 10, OPENSSL)  # type: ignore[list-item]


@pytest.mark.parametrize("function", [*FUNCTIONS, "hashlib"])
@pytest.mark.slow
@given(sizes=st.lists(st.sampled_from(SIZES), max_size=4), seed=st.integers(0, 2**32), offset=st.integers(0, 9))
def test_each_frame_of_each_chunk(function: str, sizes: list[int], seed: int, offset: int) -> None:
    generator = np.random.default_rng(seed)
    chunks = [memoryview(generator.bytes(size + offset))[offset:] for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_PAIRED", function == "pairs")
        patch.setattr(digests, "_SHA256", OPENSSL if function == "openssl" else 0)
        assert frame_digests(chunks) == [expected(bytes(chunk)) for chunk in chunks]


def test_a_processor_that_gives_wrong_digests_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_sha256, "PAIRED", True)
    monkeypatch.setattr(_sha256, "digests", lambda texts, nbytes, function: [b"\0" * 32 for _ in texts])
    with caplog.at_level(logging.WARNING, "incckpt"):
        assert not digests._answers_right()
    assert "wrong digests" in caplog.text


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sha256, "PAIRED", False)
    assert not digests._answers_right()


def test_openssl_is_found_where_hashlib_has_it() -> None:
    pytest.importorskip("_hashlib")
    assert OPENSSL, "hashing would hand over the interpreter's lock once a frame"
