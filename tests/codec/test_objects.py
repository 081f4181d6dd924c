"""Objects: every path gives back the same bits, the layout is the documented one, and damage never passes for data.

``INCCKPT_FUZZ=100000`` runs that many mutations in place of a few thousand.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from incckpt.codec import _planes, frames
from incckpt.codec import objects as codec
from incckpt.codec.objects import FRAME_BYTES, Base, Digest
from incckpt.errors import CodecError
from tests.effort import tries

Bytes: TypeAlias = npt.NDArray[np.uint8]

ITEMSIZES = (1, 2, 4, 8)
MUTATIONS = int(os.environ.get("INCCKPT_FUZZ", "10000"))
TEXT = (codec.__doc__ or "").encode() + b"".join(f"{i * i}\n".encode() for i in range(5000))


# ---- data ------------------------------------------------------------------------------------------------------------


def noise(n: int, generator: np.random.Generator) -> Bytes:
    return generator.integers(0, 256, n, np.uint8)


def floats(n: int, generator: np.random.Generator) -> Bytes:
    return (generator.standard_normal(n // 4 + 1) * 0.02).astype("<f4").view(np.uint8)[:n]


def halves(n: int, generator: np.random.Generator) -> Bytes:
    """Return bfloat16 numbers: the upper halves of float32."""
    return (generator.standard_normal(n // 2 + 1) * 0.02).astype("<f4").view("<u2")[1::2].copy().view(np.uint8)[:n]


def doubles(n: int, generator: np.random.Generator) -> Bytes:
    return generator.standard_normal(n // 8 + 1).astype("<f8").view(np.uint8)[:n]


def special(n: int, generator: np.random.Generator) -> Bytes:
    """Return float32 zeros of both signs, infinities, subnormals, and NaNs quiet and signalling with payloads."""
    bits = [
        0,
        1 << 31,
        0x7F800000,
        0xFF800000,
        1,
        0x80000001,
        0x007FFFFF,
        0x7FC00000,
        0x7F800001,
        0xFFFFFFFF,
        0x7FA5A5A5,
    ]
    return generator.choice(np.array(bits, "<u4"), n // 4 + 1).view(np.uint8)[:n]


def skewed(n: int, generator: np.random.Generator) -> Bytes:
    """Return bytes of which 95 % are 3."""
    return np.where(generator.random(n) < 0.95, 3, noise(n, generator)).astype(np.uint8)


def constant(n: int, generator: np.random.Generator) -> Bytes:
    return np.full(n, generator.integers(256), np.uint8)


def integers(n: int, generator: np.random.Generator) -> Bytes:
    return generator.integers(-50, 50_000, n // 8 + 1).astype("<i8").view(np.uint8)[:n]


def text(n: int, generator: np.random.Generator) -> Bytes:
    return np.resize(np.frombuffer(TEXT, np.uint8), n)


def flags(n: int, generator: np.random.Generator) -> Bytes:
    return generator.integers(0, 2, n, np.uint8)


def mostly_constant(n: int, generator: np.random.Generator) -> Bytes:
    """Return zeros with a few bytes that a sample of the frame misses."""
    raw = np.zeros(n, np.uint8)
    raw[n // 2 + 13 : n // 2 + 17] = 9
    return raw


def rows(n: int, generator: np.random.Generator) -> Bytes:
    """Return bytes that are the same but in a few rows of 32."""
    chosen = np.repeat(generator.random(n // 32 + 1) < 0.03, 32)[:n]
    return np.where(chosen, noise(n, generator), 3).astype(np.uint8)


KINDS = [noise, floats, halves, doubles, special, skewed, constant, integers, text, flags, mostly_constant, rows]
Kind: TypeAlias = Callable[[int, np.random.Generator], Bytes]


def same(raw: Bytes, generator: np.random.Generator) -> Bytes:
    return raw.copy()


def unrelated(raw: Bytes, generator: np.random.Generator) -> Bytes:
    return noise(len(raw), generator)


def few_changed(raw: Bytes, generator: np.random.Generator) -> Bytes:
    return np.where(generator.random(len(raw)) < 0.01, noise(len(raw), generator), raw)


def small_steps(raw: Bytes, generator: np.random.Generator) -> Bytes:
    """Return what `raw` may have been before small steps of its float32 numbers."""
    base = raw.copy()
    whole = base[: len(base) // 4 * 4].view("<u4")
    whole -= generator.integers(0, 300, len(whole), np.uint32)
    return base


BASES = [same, unrelated, few_changed, small_steps]


def encode(
    raw: Bytes, itemsize: int, before: Bytes | None = None, out: codec.Buffer | None = None
) -> tuple[codec.Encoded, Digest, Base | None]:
    base = None if before is None else Base(codec.digest(before).identity, before)
    found = codec.digest(raw)
    return codec.encode(raw, itemsize, digest=found, base=base, out=out), found, base


# ---- the documented layout, read and written by hand -----------------------------------------------------------------


def read_plainly(data: bytes, base: bytes = b"") -> bytes:
    """Decode an object as docs/objects.md says, in the plainest way and without any check."""
    itemsize, has_base, nbytes = data[5], data[6], int.from_bytes(data[8:16], "little")
    count = -(-nbytes // (1 << 20))
    assert zlib.crc32(data[: 48 + 40 * count]) == int.from_bytes(data[48 + 40 * count : 52 + 40 * count], "little")
    at, raw = 52 + 40 * count, b""
    for i in range(count):
        way, length = struct.unpack_from("<B3xI", data, 48 + 40 * i)
        coded, at = data[at : at + length], at + length
        size = min(1 << 20, nbytes - (i << 20))
        assert has_base or way != 2
        if way == 0:
            raw += coded
        elif way == 3:
            raw += zstandard.decompress(coded)
        else:
            before = np.frombuffer(base[i << 20 : (i << 20) + size], np.uint8) if way == 2 else None
            raw += read_planes(coded, size, itemsize, before)
    assert at == len(data)
    return raw


def read_planes(coded: bytes, size: int, itemsize: int, base: Bytes | None) -> bytes:
    n, planes, at = size // itemsize, [], 0
    for _ in range(itemsize):
        plane, at = read_block(coded, at, n)
        planes.append(np.frombuffer(plane, np.uint8))
    elements = np.ascontiguousarray(np.stack(planes, 1)).view(f"<u{itemsize}").reshape(-1)
    bits, one = 8 * itemsize, elements.dtype.type(1)
    if base is not None:
        sign = (elements & one) * elements.dtype.type((1 << bits) - 1)
        elements = order(order(base[: n * itemsize].view(elements.dtype)) + ((elements >> one) ^ sign))
    elif itemsize > 1:
        elements = (elements >> one) | (elements << elements.dtype.type(bits - 1))
    return elements.tobytes() + coded[at:]


def order(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    bits = 8 * x.itemsize
    magnitude = x.dtype.type((1 << (bits - 1)) - 1)
    return np.where(x >> x.dtype.type(bits - 1), x ^ magnitude, x)


def read_block(coded: bytes, at: int, n: int) -> tuple[bytes, int]:
    kind, length = struct.unpack_from("<BI", coded, at)
    content, end = coded[at + 5 : at + 5 + length], at + 5 + length
    if kind == 0:
        return content, end
    if kind == 1:
        return content * n, end
    if kind == 3:
        return zstandard.decompress(content), end
    if kind == 4:
        (m,) = struct.unpack_from("<I", content, 1)
        gaps, inner = read_block(content, 5, m)
        others, inner = read_block(content, inner, m - gaps.count(255))
        assert inner == length
        plain, place, rest = bytearray(content[:1] * n), 0, iter(others)
        for gap in gaps:
            place += gap
            if gap < 255:
                plain[place] = next(rest)
                place += 1
        return bytes(plain), end
    bitmap, inner = read_block(content, 1, (n + 7) // 8)
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[:n].astype(bool)
    others, inner = read_block(content, inner, int(bits.sum()))
    assert inner == length
    masked = np.full(n, content[0], np.uint8)
    masked[bits] = np.frombuffer(others, np.uint8)
    return masked.tobytes(), end


def block(kind: int, content: bytes) -> bytes:
    return struct.pack("<BI", kind, len(content)) + content


def assemble(
    nbytes: int, coded: list[tuple[int, bytes]], digests: bytes, *, itemsize: int = 1, base: bytes | None = None
) -> bytes:
    """Write an object by hand; nothing is checked."""
    head = struct.pack("<4sBBBBQ32s", b"\x93inc", 1, itemsize, base is not None, 0, nbytes, base or bytes(32))
    for i, (way, part) in enumerate(coded):
        head += struct.pack("<B3xI32s", way, len(part), digests[32 * i : 32 * i + 32])
    return head + struct.pack("<I", zlib.crc32(head)) + b"".join(part for _, part in coded)


def one_frame(raw: bytes, way: int, coded: bytes, itemsize: int = 1, base: bytes | None = None) -> bytes:
    """Return an object of one frame with the digest of `raw`."""
    return assemble(len(raw), [(way, coded)], codec.digest(raw).frames, itemsize=itemsize, base=base)


def decode(data: codec.Buffer, found: Digest, nbytes: int, base: Base | None = None, *, verify: bool = True) -> Bytes:
    """Decode to memory between fences, which have to stand afterwards."""
    memory = np.full(nbytes + 128, 0x5A, np.uint8)
    try:
        codec.decode(data, memory[61 : 61 + nbytes], identity=found.identity, base=base, verify=verify)
    finally:
        assert (memory[:61] == 0x5A).all()
        assert (memory[61 + nbytes :] == 0x5A).all()
    return memory[61 : 61 + nbytes]


# ---- what goes in comes out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=tries(40), deadline=None, derandomize=True)
@given(
    n=st.one_of(st.integers(0, 40), st.integers(0, 40_000)),
    itemsize=st.sampled_from([*ITEMSIZES, 16]),
    make_base=st.sampled_from([None, *BASES]),
    seed=st.integers(0, 2**32),
    offset=st.integers(0, 9),
)
def test_round_trip(
    kind: Kind,
    n: int,
    itemsize: int,
    make_base: Callable[[Bytes, np.random.Generator], Bytes] | None,
    seed: int,
    offset: int,
) -> None:
    generator = np.random.default_rng(seed)
    raw = np.concatenate([np.zeros(offset, np.uint8), kind(n, generator)])[offset:]
    before = None if make_base is None else make_base(raw, generator)
    encoded, found, base = encode(raw, itemsize, before)
    data = bytes(encoded.data)
    assert len(data) <= codec.max_nbytes(n)
    assert decode(data, found, n, base).tobytes() == raw.tobytes()
    assert decode(data, found, n, base, verify=False).tobytes() == raw.tobytes()
    assert read_plainly(data, b"" if before is None else before.tobytes()) == raw.tobytes()
    header = codec.read_header(data)
    assert header.identity == found.identity
    assert header.base == encoded.base
    assert encoded.base in (None, None if base is None else base.identity)
    assert sum(total.raw for total in encoded.ways.values()) == n
    assert sum(total.stored for total in encoded.ways.values()) == len(data) - codec.header_nbytes(n)
    assert ("delta" in encoded.ways) == (encoded.base is not None)


@pytest.mark.slow
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize(
    "n", [FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES - 1, 2 * FRAME_BYTES, 2 * FRAME_BYTES + 1]
)
def test_round_trip_around_the_edges_of_frames(n: int, itemsize: int) -> None:
    generator = np.random.default_rng(n)
    raw = floats(n, generator)
    for before in (None, small_steps(raw, generator)):
        encoded, found, base = encode(raw, itemsize, before)
        assert decode(encoded.data, found, n, base).tobytes() == raw.tobytes()
        assert len(codec.read_header(encoded.data).ways) == -(-n // FRAME_BYTES)


@pytest.mark.parametrize(
    ("kind", "itemsize", "way", "most"),
    [
        (noise, 4, "raw", 1.0),
        (floats, 4, "intra", 0.86),
        (halves, 2, "intra", 0.70),
        (doubles, 8, "intra", 0.90),
        (skewed, 1, "intra", 0.12),
        (constant, 4, "intra", 0.001),
        (mostly_constant, 4, "intra", 0.001),
        (integers, 8, "intra", 0.26),
        (text, 1, "zstd", 0.35),
        (flags, 1, "intra", 0.13),
    ],
)
def test_the_way_taken(kind: Kind, itemsize: int, way: str, most: float) -> None:
    raw = kind(FRAME_BYTES, np.random.default_rng(0))
    encoded, _, _ = encode(raw, itemsize)
    assert list(encoded.ways) == [way]
    assert encoded.ways[way].stored <= most * FRAME_BYTES
    assert encoded.full_nbytes == len(encoded.data)


def test_a_piece_unlike_the_rest_does_not_mislead() -> None:
    raw = floats(FRAME_BYTES, np.random.default_rng(0))
    middle = slice(FRAME_BYTES // 2 - (8 << 10), FRAME_BYTES // 2 + (8 << 10))
    raw[middle] = 0  # what fast zstd is tried on
    assert list(encode(raw, 4)[0].ways) == ["intra"]
    raw = np.zeros(FRAME_BYTES, np.uint8)
    raw[middle] = noise(16 << 10, np.random.default_rng(0))
    assert len(encode(raw, 4)[0].data) < FRAME_BYTES // 32


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_a_delta_is_taken_where_it_is_smaller(itemsize: int) -> None:
    generator = np.random.default_rng(0)
    raw = floats(3 * FRAME_BYTES, generator)
    before = np.concatenate([few_changed(raw[:FRAME_BYTES], generator), noise(FRAME_BYTES, generator), raw[2 << 20 :]])
    encoded, found, base = encode(raw, itemsize, before)
    alone, _, _ = encode(raw, itemsize)
    ways = codec.read_header(encoded.data).ways
    assert [ways[0], ways[2]] == [frames.DELTA, frames.DELTA]
    assert ways[1] != frames.DELTA
    assert decode(encoded.data, found, len(raw), base).tobytes() == raw.tobytes()
    assert len(encoded.data) < 0.6 * len(alone.data)
    assert encoded.full_nbytes == pytest.approx(len(alone.data), rel=0.03)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_an_unchanged_frame_takes_next_to_nothing(itemsize: int) -> None:
    raw = noise(FRAME_BYTES, np.random.default_rng(0))
    encoded, found, base = encode(raw, itemsize, raw.copy())
    assert encoded.ways == {"delta": (FRAME_BYTES, 6 * itemsize)}
    assert decode(encoded.data, found, len(raw), base).tobytes() == raw.tobytes()


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_a_delta_is_decoded_in_the_memory_of_its_base(itemsize: int) -> None:
    generator = np.random.default_rng(0)
    raw = floats(FRAME_BYTES + 4321, generator)
    before = small_steps(raw, generator)
    before[FRAME_BYTES:] = noise(4321, generator)
    encoded, found, base = encode(raw, itemsize, before)
    assert base is not None
    assert encoded.base == base.identity
    codec.decode(encoded.data, before, identity=found.identity, base=base)
    assert before.tobytes() == raw.tobytes()


def test_the_object_does_not_depend_on_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for kind in KINDS:
        for itemsize in ITEMSIZES:
            raw = kind(20_001, generator)
            before = few_changed(raw, generator)
            objects = set()
            for variant in range(len(_planes.VARIANTS)):
                monkeypatch.setattr(_planes, "BEST", variant)
                encoded, found, base = encode(raw, itemsize, before)
                objects.add(bytes(encoded.data))
                assert decode(encoded.data, found, len(raw), base).tobytes() == raw.tobytes()
            assert len(objects) == 1


@pytest.mark.slow
def test_threads_do_not_share_scratch_memory() -> None:
    generator = np.random.default_rng(0)
    chunks = [kind(FRAME_BYTES + 99, generator) for kind in (floats, halves, skewed, text, integers)] * 4
    expected = [bytes(encode(raw, 4)[0].data) for raw in chunks]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda raw: bytes(encode(raw, 4)[0].data), chunks))
        assert found == expected
        back = pool.map(
            lambda pair: decode(pair[0], codec.digest(pair[1]), len(pair[1])), zip(found, chunks, strict=True)
        )
        assert [raw.tobytes() for raw in back] == [raw.tobytes() for raw in chunks]


SIZES = st.one_of(st.integers(0, 40_000), st.integers(FRAME_BYTES - 5, FRAME_BYTES + 40_000))


@settings(max_examples=tries(60), deadline=None, derandomize=True)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(KINDS), st.sampled_from(ITEMSIZES), SIZES, st.sampled_from([None, *BASES])),
        max_size=5,
    ),
    seed=st.integers(0, 2**32),
)
def test_chunks_coded_together_are_as_coded_alone(
    kinds: list[tuple[Kind, int, int, Callable[[Bytes, np.random.Generator], Bytes] | None]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    sources = []
    for kind, itemsize, n, make_base in kinds:
        raw = kind(n, generator)
        base = None
        if make_base is not None:
            before = make_base(raw, generator)
            base = Base(codec.digest(before).identity, before)
        sources.append(codec.Source(raw, itemsize, codec.digest(raw), base))
    together = codec.encode_many(sources)
    for source, found in zip(sources, together, strict=True):
        alone = codec.encode(source.raw, source.itemsize, digest=source.digest, base=source.base)
        assert found == alone


def test_memory_of_the_caller_is_used_and_not_outgrown() -> None:
    for kind in KINDS:
        raw = kind(70_001, np.random.default_rng(0))
        memory = np.full(codec.max_nbytes(len(raw)) + 64, 0x5A, np.uint8)
        encoded, found, _ = encode(raw, 4, out=memory[: codec.max_nbytes(len(raw))])
        assert np.shares_memory(np.frombuffer(encoded.data, np.uint8), memory)
        assert (memory[-64:] == 0x5A).all()
        assert decode(encoded.data, found, len(raw)).tobytes() == raw.tobytes()


def test_any_contiguous_memory_will_do() -> None:
    raw = floats(8000, np.random.default_rng(0)).tobytes()
    found = codec.digest(raw)
    expected = bytes(codec.encode(raw, 4, digest=found).data)
    matrix = np.frombuffer(raw, "<f4").reshape(20, -1)
    for same_bytes in (bytearray(raw), memoryview(raw), matrix.view(np.uint8), matrix.data):
        assert codec.digest(same_bytes) == found
        assert codec.encode(same_bytes, 4, digest=found).data == expected
    for data in (expected, bytearray(expected), memoryview(expected), np.frombuffer(expected, np.uint8)):
        out = np.zeros((20, 100), "<f4")
        codec.decode(data, out.view(np.uint8), identity=found.identity)
        assert out.tobytes() == raw


def test_arguments_that_do_not_fit() -> None:
    raw = np.zeros(100, np.uint8)
    found = codec.digest(raw)
    with pytest.raises(ValueError, match="itemsize"):
        codec.encode(raw, 3, digest=found)
    with pytest.raises(ValueError, match="digests"):
        codec.encode(raw, 4, digest=codec.digest(b""))
    with pytest.raises(ValueError, match="base"):
        codec.encode(raw, 4, digest=found, base=Base(found.identity, raw[:99]))
    with pytest.raises(ValueError, match="base"):
        codec.encode(raw, 4, digest=found, base=Base(b"short", raw))
    with pytest.raises(ValueError, match="out"):
        codec.encode(raw, 4, digest=found, out=bytearray(codec.max_nbytes(100) - 1))
    with pytest.raises(ValueError, match="out"):
        codec.encode(raw, 4, digest=found, out=bytes(codec.max_nbytes(100)))
    with pytest.raises(TypeError):
        codec.digest(np.zeros((4, 4), np.uint8)[:, ::2])


# ---- identity and format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, FRAME_BYTES, FRAME_BYTES + 1])
def test_identity_is_the_digest_of_the_digests(n: int) -> None:
    raw = noise(n, np.random.default_rng(0)).tobytes()
    parts = [raw[i : i + FRAME_BYTES] for i in range(0, n, FRAME_BYTES)]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    assert codec.digest(raw) == (hashlib.sha256(digests).digest(), digests)


def test_identity_does_not_depend_on_the_coding() -> None:
    raw = floats(50_000, np.random.default_rng(0))
    headers = [
        codec.read_header(encode(raw, itemsize, before)[0].data) for itemsize in ITEMSIZES for before in (None, raw)
    ]
    assert {header.identity for header in headers} == {codec.digest(raw).identity}


def pinned_input() -> tuple[Bytes, Bytes]:
    """Return a chunk and a base of which every frame goes a way, and every plane a kind, that leaves zstd out.

    Written in integers only, so that it is the same everywhere.
    """
    mixed = np.arange(1, FRAME_BYTES // 4 + 1, dtype=np.uint64)
    for multiplier in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xC2B2AE3D27D4EB4F):
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(multiplier)
    bits = (mixed >> np.uint64(32)).astype("<u4")
    half = np.where(mixed & np.uint64(1 << 30), bits, np.uint32(0x3C00_0000)).astype("<u4")
    constant_top = (bits & np.uint32(0x807F_FFFF)) | np.uint32(0x3C00_0000)
    raw = np.concatenate([bits, half, constant_top, constant_top[:1001]]).view(np.uint8)
    before = raw.copy()
    before[2 * FRAME_BYTES :: 4] ^= 1
    return np.append(raw, np.uint8(7)), np.append(before, np.uint8(9))


def test_objects_are_what_they_always_were() -> None:
    raw, before = pinned_input()
    alone, _, _ = encode(raw, 4)
    delta, _, _ = encode(raw, 4, before)
    assert codec.read_header(alone.data).ways == (frames.RAW, frames.INTRA, frames.INTRA, frames.INTRA)
    assert codec.read_header(delta.data).ways[2:] == (frames.DELTA, frames.DELTA)
    for encoded in (alone, delta):
        assert zstandard.MAGIC_NUMBER.to_bytes(4, "little") not in bytes(encoded.data)
    assert hashlib.sha256(alone.data).hexdigest() == "88079c430d17edba77f7434f58b5386414fe79b693c84db1e0234c2c1b5a6b79"
    assert hashlib.sha256(delta.data).hexdigest() == "91e0d9ef0039ff33bcd20cfcf15d1ab3f20b333308a9be480d4e4aaad39abf16"


def test_an_object_written_by_hand() -> None:
    """Every way and every kind of block, put together as docs/objects.md says."""
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 4, 1000 * 2 + 1, np.uint8).tobytes()
    elements = np.frombuffer(raw[:-1], "<u2")
    rotated = (elements << 1) | (elements >> 15)
    low, high = (rotated & 255).astype(np.uint8), (rotated >> 8).astype(np.uint8)
    compressor = zstandard.ZstdCompressor(level=19)

    def masked(plane: Bytes, inner: Callable[[bytes], bytes]) -> bytes:
        bits = np.packbits(plane != 2, bitorder="little").tobytes()
        return block(2, b"\x02" + inner(bits) + inner(plane[plane != 2].tobytes()))

    def sparse(plane: Bytes, inner: Callable[[bytes], bytes]) -> bytes:
        places = np.flatnonzero(plane != 2)
        gaps = b"".join(
            b"\xff" * (gap // 255) + bytes([gap % 255]) for gap in (np.diff(places, prepend=-1) - 1).tolist()
        )
        return block(4, b"\x02" + struct.pack("<I", len(gaps)) + inner(gaps) + inner(plane[places].tobytes()))

    for first in (
        block(0, low.tobytes()),
        sparse(low, lambda part: block(3, compressor.compress(part))),
        block(3, compressor.compress(low.tobytes())),
        masked(low, lambda part: block(0, part)),
        masked(low, lambda part: block(3, compressor.compress(part))),
    ):
        data = one_frame(raw, frames.INTRA, first + masked(high, lambda part: block(0, part)) + raw[-1:], itemsize=2)
        assert decode(data, codec.digest(raw), len(raw)).tobytes() == raw
        assert read_plainly(data) == raw
    ones = b"\x01" * 300
    for way, coded in (
        (frames.RAW, ones),
        (frames.ZSTD, compressor.compress(ones)),
        (frames.INTRA, block(1, b"\x01")),
        (frames.INTRA, block(2, b"\x01" + block(1, b"\0") + block(0, b""))),
        (frames.INTRA, block(4, b"\x01\0\0\0\0" + block(0, b"") + block(0, b""))),
        (frames.INTRA, block(4, b"\x01\x01\0\0\0" + block(1, b"\xff") + block(0, b""))),
        (frames.INTRA, block(4, b"\x07\x2c\x01\0\0" + block(1, b"\0") + block(1, b"\x01"))),
        (frames.INTRA, block(2, b"\x07" + block(0, b"\xff" * 37 + b"\x0f") + block(1, b"\x01"))),
    ):
        data = one_frame(ones, way, coded)
        assert decode(data, codec.digest(ones), 300).tobytes() == ones
    base = Base(codec.digest(b"\x03" * 300).identity, b"\x03" * 300)
    data = one_frame(ones, frames.DELTA, block(1, b"\x03"), base=base.identity)  # 1 - 3 = -2, zigzag 3
    assert decode(data, codec.digest(ones), 300, base).tobytes() == ones


def test_header_size_is_known_beforehand() -> None:
    for n in (0, 1, FRAME_BYTES, FRAME_BYTES + 1):
        data = bytes(encode(np.zeros(n, np.uint8), 4)[0].data)
        size = codec.header_nbytes(n)
        assert codec.read_header(data[:size]) == codec.read_header(data)
        with pytest.raises(CodecError):
            codec.read_header(data[: size - 1])


@pytest.mark.parametrize("with_base", [False, True])
def test_a_range_is_decoded_from_its_frames_alone(with_base: bool) -> None:
    generator = np.random.default_rng(0)
    raw = floats(3 * FRAME_BYTES + 1000, generator)
    encoded, _, base = encode(raw, 4, small_steps(raw, generator) if with_base else None)
    header = codec.read_header(encoded.data)
    for start, stop in [
        (0, 0),
        (0, 1),
        (FRAME_BYTES - 1, FRAME_BYTES + 1),
        (2 << 20, len(raw)),
        (5, len(raw)),
        (0, len(raw)),
    ]:
        wanted = header.frames(start, stop)
        first, last = header.coded_span(wanted)
        raw_start, raw_stop = header.raw_span(wanted)
        assert start == stop or raw_start <= start <= stop <= raw_stop
        out = np.zeros(raw_stop - raw_start, np.uint8)
        part = None if base is None else Base(base.identity, np.asarray(base.raw)[raw_start:raw_stop])
        codec.decode_frames(header, wanted, encoded.data[first:last], out, base=part)
        assert out.tobytes() == raw[raw_start:raw_stop].tobytes()
    for start, stop in [(-1, 1), (2, 1), (0, len(raw) + 1)]:
        with pytest.raises(ValueError, match="no bytes"):
            header.frames(start, stop)
    with pytest.raises(CodecError, match="coded bytes"):
        codec.decode_frames(
            header, range(1), encoded.data[: header.offsets[0]], np.zeros(FRAME_BYTES, np.uint8), base=base
        )


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [b"", b"{}", TEXT, bytes(3 << 20), os.urandom(5000)], ids=len)
def test_documents(document: bytes) -> None:
    found = codec.digest(document)
    data = codec.encode_document(document, digest=found)
    assert codec.decode_document(data, len(document)) == document
    assert codec.decode_document(data, len(document), found.identity) == document
    assert read_plainly(data) == document
    with pytest.raises(CodecError, match="holds"):
        codec.decode_document(data, len(document), bytes(32))
    if document:
        with pytest.raises(CodecError, match="too large"):
            codec.decode_document(data, len(document) - 1)


# ---- damage ----------------------------------------------------------------------------------------------------------


@cache
def sound_objects() -> list[tuple[bytes, Bytes, Digest, Base | None]]:
    """Return small objects in which every way and every kind of block occurs."""
    generator = np.random.default_rng(0)
    found = []
    for kind in KINDS:
        for itemsize in ITEMSIZES:
            raw = kind(int(generator.integers(300, 6000)), generator)
            for before in (None, few_changed(raw, generator), small_steps(raw, generator)):
                encoded, identity, base = encode(raw, itemsize, before)
                found.append((bytes(encoded.data), raw, identity, base))
    for kind in (constant, text):  # of two frames
        raw = kind(FRAME_BYTES + 500, generator)
        encoded, identity, _ = encode(raw, 4)
        found.append((bytes(encoded.data), raw, identity, None))
    document = np.frombuffer(TEXT, np.uint8)
    found.append((codec.encode_document(TEXT, digest=codec.digest(TEXT)), document, codec.digest(TEXT), None))
    return found


def mutate(data: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """Return `data` damaged in one to three places, as storage, software or spite may do."""
    damaged = bytearray(data)
    for _ in range(int(generator.integers(1, 4))):
        n = len(damaged)
        if n == 0:
            break
        at, length = int(generator.integers(n)), int(generator.integers(1, 40))
        match int(generator.integers(8)):
            case 0:
                damaged[at] ^= 1 << int(generator.integers(8))
            case 1:
                damaged[at] = int(generator.integers(256))
            case 2:
                del damaged[at:]
            case 3:
                damaged[at:at] = generator.bytes(length)
            case 4:
                del damaged[at : at + length]
            case 5:
                start = int(generator.integers(len(other)))
                damaged[at : at + length] = other[start : start + length]
            case 6:
                damaged[at : at + 4] = int(generator.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, n])).to_bytes(4, "little")
            case _:  # somewhere in the header or in the head of the first block
                damaged[int(generator.integers(min(n, 100)))] = int(generator.integers(256))
    return bytes(damaged)


def mend(data: bytes, found: Digest, generator: np.random.Generator) -> bytes:
    """Return `data` with its checksum, and mostly its digests, put right: so that damage gets past the header."""
    damaged = bytearray(data)
    nbytes = int.from_bytes(damaged[8:16], "little")
    end = codec.header_nbytes(nbytes) - 4
    if end + 4 > len(damaged):
        return data
    if generator.integers(4):
        for i in range(min(len(found.frames) // 32, (end - 48) // 40)):
            damaged[48 + 40 * i + 8 : 48 + 40 * i + 40] = found.frames[32 * i : 32 * i + 32]
    if generator.integers(2) and end == 88:
        damaged[52:56] = (len(damaged) - 92).to_bytes(4, "little", signed=True) if len(damaged) >= 92 else bytes(4)
    damaged[end : end + 4] = zlib.crc32(damaged[:end]).to_bytes(4, "little")
    return bytes(damaged)


def outcome(data: bytes, raw: Bytes, found: Digest, base: Base | None) -> str:
    """Decode, and return what came of it; wrong bytes are a failure here and now."""
    try:
        back = decode(data, found, len(raw), base)
    except CodecError:
        return "error"
    assert back.tobytes() == raw.tobytes()
    return "right"


@pytest.mark.slow
def test_damaged_objects_are_errors_or_the_right_bytes() -> None:
    generator = np.random.default_rng(MUTATIONS)
    sound = sound_objects()
    outcomes = {"error": 0, "right": 0}
    for _ in range(MUTATIONS):
        data, raw, found, base = sound[int(generator.integers(len(sound)))]
        other = sound[int(generator.integers(len(sound)))][0]
        damaged = mutate(data, other, generator)
        if generator.integers(2):
            damaged = mend(damaged, found, generator)
        outcomes[outcome(damaged, raw, found, base)] += 1
        try:  # unverified, anything may come out, but nothing else may happen
            decode(damaged, found, len(raw), base, verify=False)
        except CodecError:
            pass
    assert outcomes["error"] > 0.9 * MUTATIONS


@pytest.mark.slow
def test_damaged_frames_never_write_outside_or_crash() -> None:
    """Below the header's checks: coded bytes of any content and length, decoded at any size and way."""
    generator = np.random.default_rng(MUTATIONS + 1)
    sound = sound_objects()
    for _ in range(MUTATIONS):
        data, raw, _, base = sound[int(generator.integers(len(sound)))]
        header = codec.read_header(data)
        coded = mutate(data[header.offsets[0] : header.offsets[1]] or b"\0", data, generator)
        n = min(len(raw), FRAME_BYTES) + int(generator.choice([0, 0, 0, 0, -1, 1]))
        memory = np.full(n + 128, 0x5A, np.uint8)
        before = np.resize(np.asarray(raw if base is None else base.raw), n).data
        itemsize = header.itemsize if generator.integers(4) else int(generator.choice(ITEMSIZES))
        way = header.ways[0] if generator.integers(4) else int(generator.integers(4))
        try:
            frames.decode_frame(way, itemsize, memoryview(coded), before, memory[61 : 61 + n].data)
        except CodecError:
            pass
        assert (memory[:61] == 0x5A).all()
        assert (memory[61 + n :] == 0x5A).all()


def test_every_single_bit_of_an_object_matters() -> None:
    generator = np.random.default_rng(0)
    raw = skewed(400, generator)
    encoded, found, _ = encode(raw, 2)
    assert list(encoded.ways) == ["intra"]
    data = bytes(encoded.data)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        assert outcome(bytes(damaged), raw, found, None) == "error", f"bit {bit}"


def test_frames_of_one_object_do_not_pass_for_each_other() -> None:
    generator = np.random.default_rng(0)
    raw = noise(2 * FRAME_BYTES, generator)
    encoded, found, _ = encode(raw, 4)
    data = bytes(encoded.data)
    head = codec.header_nbytes(len(raw))
    swapped = data[:head] + data[head + FRAME_BYTES :] + data[head : head + FRAME_BYTES]
    with pytest.raises(CodecError, match=r"frame 0 \(raw\) is damaged: its digest"):
        decode(swapped, found, len(raw))
    digests = found.frames[32:] + found.frames[:32]
    renamed = assemble(len(raw), [(0, data[head + FRAME_BYTES :]), (0, data[head : head + FRAME_BYTES])], digests)
    with pytest.raises(CodecError, match="holds"):
        decode(renamed, found, len(raw))


ZEROS = bytes(300)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an object"),
        (b"PK\x03\x04" + bytes(100), "begins with"),
        (one_frame(ZEROS, 0, ZEROS)[:4] + b"\x02" + one_frame(ZEROS, 0, ZEROS)[5:], "format 2"),
        (one_frame(ZEROS, 0, ZEROS)[:9] + b"\xff" + one_frame(ZEROS, 0, ZEROS)[10:], "checksum"),
        (one_frame(ZEROS, 0, ZEROS)[:15] + b"\xff" + one_frame(ZEROS, 0, ZEROS)[16:], "there are 392"),
        (one_frame(ZEROS, 0, ZEROS)[:-1], "has 391 bytes"),
        (one_frame(ZEROS, 0, ZEROS) + b"\0", "has 393 bytes"),
        (one_frame(ZEROS, 0, ZEROS, itemsize=3), "element size 3"),
        (one_frame(ZEROS, 4, ZEROS), "way 4"),
        (one_frame(ZEROS, 2, ZEROS), "way 2"),
        (one_frame(ZEROS, 0, ZEROS + b"\0"), "301 coded bytes"),
        (one_frame(ZEROS, 0, ZEROS[1:]), "299 bytes are stored"),
        (one_frame(bytes(299), 0, bytes(299)), "holds"),
        (one_frame(ZEROS, 1, b""), "head of a block"),
        (one_frame(ZEROS, 1, block(0, ZEROS[:200])), "kind 0 has 200"),
        (one_frame(ZEROS, 1, block(1, b"\0\0")), "kind 1 has 2"),
        (one_frame(ZEROS, 1, block(5, b"\0")), "kind 5"),
        (one_frame(ZEROS, 1, block(4, b"\0\0\0\0")), "kind 4 has 4"),
        (one_frame(ZEROS, 1, block(4, b"\0" + struct.pack("<I", 301))), "301 gaps for 300"),
        (one_frame(ZEROS, 1, block(4, b"\0\1\0\0\0" + block(0, b"\0") + block(0, b""))), "kind 0 has 0 bytes for 1"),
        (one_frame(ZEROS, 1, block(4, b"\0\2\0\0\0" + block(1, b"\xff") + block(0, b""))), "gaps go beyond"),
        (
            one_frame(ZEROS, 1, block(4, b"\0\2\0\0\0" + block(1, b"\xfe") + block(0, b"\1\1"))),
            "gaps go beyond 300",
        ),
        (one_frame(ZEROS, 1, block(4, b"\0\0\0\0\0" + block(0, b"") + block(0, b"") + b"\0")), "followed by 1"),
        (
            one_frame(ZEROS, 1, block(4, b"\0\0\0\0\0" + block(4, b"\0\0\0\0\0" + 2 * block(0, b"")))),
            "kind 4",
        ),
        (one_frame(ZEROS, 1, block(1, b"\0") + b"\0"), "1 bytes follow"),
        (one_frame(ZEROS, 1, struct.pack("<BI", 0, 0xFFFFFFFF)), "block has 4294967295 bytes"),
        (one_frame(ZEROS, 1, block(2, b"")), "kind 2 has 0"),
        (one_frame(ZEROS, 1, block(2, b"\0" + block(1, b"\xff") + block(0, b""))), "304 bits set"),
        (one_frame(ZEROS, 1, block(2, b"\0" + block(0, bytes(37) + b"\xf0") + block(0, bytes(4)))), "beyond its end"),
        (one_frame(ZEROS, 1, block(2, b"\0" + block(1, b"\0") + block(0, b"") + b"\0")), "followed by 1"),
        (one_frame(ZEROS, 1, block(2, b"\0" + block(2, b"\0" + block(1, b"\0") + block(0, b"")))), "kind 2"),
        (one_frame(ZEROS, 1, block(3, b"")), "damaged"),
        (one_frame(ZEROS, 3, zstandard.compress(bytes(299))), "299 bytes, not 300"),
        (one_frame(ZEROS, 3, zstandard.compress(ZEROS)[:-1]), "damaged"),
        (one_frame(ZEROS, 3, zstandard.compress(ZEROS) + b"\0"), "damaged"),
        (one_frame(ZEROS, 3, zstandard.ZstdCompressor(write_content_size=False).compress(ZEROS)), "-1 bytes"),
        (one_frame(ZEROS, 3, b"\x50\x2a\x4d\x18\x04\0\0\0abcd"), "0 bytes"),
        (one_frame(ZEROS, 1, block(1, b"\x01")), "digest is wrong"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode(data, codec.digest(ZEROS), 300)


def test_a_delta_needs_its_base() -> None:
    generator = np.random.default_rng(0)
    raw = floats(5000, generator)
    encoded, found, base = encode(raw, 4, small_steps(raw, generator))
    assert base is not None
    with pytest.raises(CodecError, match=base.identity.hex()):
        decode(encoded.data, found, len(raw))
    with pytest.raises(CodecError, match=f"not against {found.identity.hex()}"):
        decode(encoded.data, found, len(raw), Base(found.identity, raw))
    with pytest.raises(CodecError, match="base has 4999"):
        decode(encoded.data, found, len(raw), Base(base.identity, np.asarray(base.raw)[1:]))
    wrong = np.asarray(base.raw).copy()
    wrong[77] ^= 1
    with pytest.raises(CodecError, match="digest"):
        decode(encoded.data, found, len(raw), Base(base.identity, wrong))
    with pytest.raises(CodecError, match="delta"):
        codec.decode_document(encoded.data, 10_000)


def test_the_length_is_what_the_caller_expects() -> None:
    data = one_frame(ZEROS, 0, ZEROS)
    for n in (0, 299, 301):
        with pytest.raises(CodecError, match="300 raw bytes"):
            decode(data, codec.digest(ZEROS), n)


def test_a_bomb_takes_no_memory() -> None:
    """A few bytes that promise a terabyte, in every place that has a length."""
    huge = b"\x28\xb5\x2f\xfd" + b"\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\0\0"  # single segment, 8-byte size
    assert zstandard.frame_content_size(huge) == 1 << 40
    small_window = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    bombs = [
        one_frame(ZEROS, 3, huge),
        one_frame(ZEROS, 1, block(3, huge)),
        one_frame(bytes(10_000), 3, small_window),
        one_frame(ZEROS, 1, block(2, b"\0" + block(3, huge) + block(0, b""))),
        one_frame(ZEROS, 1, block(2, b"\0" + block(0, bytes(37) + b"\x01") + block(3, huge))),
        assemble(1 << 62, [(0, b"")], bytes(32)),
    ]
    for bomb in bombs:
        with pytest.raises(CodecError):
            decode(bomb, codec.digest(ZEROS), 300)
    tracemalloc.start()
    for bomb in bombs:
        with pytest.raises(CodecError):
            codec.decode_document(bomb, 1 << 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_object_that_is_decoded_where_it_is() -> None:
    """As long as its header and its raw bytes: then it is the raw bytes, or something else of the same length."""
    raw = np.frombuffer(np.random.default_rng(0).bytes(2 * FRAME_BYTES + 77), np.uint8)
    digest = codec.digest(raw)
    data = bytes(codec.encode(raw, 4, digest=digest).data)
    size = codec.header_nbytes(raw.nbytes)
    assert len(data) == codec.max_nbytes(raw.nbytes) == size + raw.nbytes
    for verify in (True, False):
        out = bytearray(data[size:])
        codec.decode_in_place(data[:size], out, identity=digest.identity, verify=verify)
        assert out == raw.tobytes()
    for at in (0, FRAME_BYTES - 1, FRAME_BYTES, raw.nbytes - 1):
        out = bytearray(data[size:])
        out[at] ^= 1
        with pytest.raises(CodecError, match=f"frame {at // FRAME_BYTES} .*digest"):
            codec.decode_in_place(data[:size], out, identity=digest.identity)
    with pytest.raises(CodecError, match="the object holds"):
        codec.decode_in_place(data[:size], bytearray(data[size:]), identity=bytes(32))
    with pytest.raises(CodecError, match="its header says"):
        codec.decode_in_place(data[:size], bytearray(raw.nbytes - 1), identity=digest.identity)
