"""Digests of frames, many in one call, are what hashlib says; with and without OpenSSL called directly."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.codec import digests
from incckpt.codec.digests import frame_digests
from incckpt.codec.frames import FRAME_BYTES

SIZES = st.sampled_from(
    [0, 1, 63, 64, 65, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES, 3 * FRAME_BYTES + 7]
)


def expected(raw: bytes) -> bytes:
    return b"".join(hashlib.sha256(raw[at : at + FRAME_BYTES]).digest() for at in range(0, len(raw), FRAME_BYTES))


@pytest.mark.slow
@given(sizes=st.lists(SIZES, max_size=4), seed=st.integers(0, 2**32), offset=st.integers(0, 9))
def test_each_frame_of_each_chunk(sizes: list[int], seed: int, offset: int) -> None:
    generator = np.random.default_rng(seed)
    chunks = [generator.bytes(size + offset)[offset:] for size in sizes]
    assert frame_digests([memoryview(chunk) for chunk in chunks]) == [expected(chunk) for chunk in chunks]


def test_without_openssl_to_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [np.random.default_rng(0).bytes(size) for size in (0, 5, FRAME_BYTES, 2 * FRAME_BYTES + 1)]
    monkeypatch.setattr(digests, "_SHA256", 0)
    assert frame_digests([memoryview(chunk) for chunk in chunks]) == [expected(chunk) for chunk in chunks]


def test_openssl_is_found_where_hashlib_has_it() -> None:
    pytest.importorskip("_hashlib")
    assert digests._SHA256, "hashing would hand over the interpreter's lock once a frame"
