"""The codec's kernels against what numpy computes, for every instruction set that this processor has."""

from __future__ import annotations

import hashlib
import heapq
import math
import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from incckpt.codec import _planes
from tests.effort import tries

Bytes: TypeAlias = npt.NDArray[np.uint8]
Elements: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

EVERY_VARIANT = pytest.mark.parametrize("variant", range(len(_planes.VARIANTS)), ids=_planes.VARIANTS)
ITEMSIZES = (1, 2, 4, 8)
MUTATIONS = int(os.environ.get("INCCKPT_FUZZ", "10000"))
# Around the ends of vectors, of the kernels' blocks of 4096 bytes and of a bitmap's bytes.
LENGTHS = st.one_of(st.integers(0, 200), st.sampled_from([511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 9001]))
SEEDS = st.integers(0, 2**32)
OFFSETS = st.integers(0, 9)


def unsigned(itemsize: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(f"<u{itemsize}")


def order(x: Elements) -> Elements:
    """Map the bits of floats to integers that are in the floats' order."""
    bits = 8 * x.itemsize
    sign: Elements = (x.view(f"<i{x.itemsize}") >> (bits - 1)).view(x.dtype)
    return x ^ (sign >> x.dtype.type(1))


def reference_split(raw: Bytes, base: Bytes | None, itemsize: int) -> list[Bytes]:
    """Return the byte planes, in numpy."""
    x = raw.copy().view(unsigned(itemsize))
    one, top = x.dtype.type(1), x.dtype.type(8 * itemsize - 1)
    if base is not None:
        d = order(x) - order(base.copy().view(x.dtype))
        x = (d << one) ^ (d.view(f"<i{itemsize}") >> (8 * itemsize - 1)).view(x.dtype)
    elif itemsize > 1:
        x = (x << one) | (x >> top)
    return [x.view(np.uint8)[j::itemsize].copy() for j in range(itemsize)]


def random_bytes(n: int, seed: int, offset: int = 0) -> Bytes:
    """Return `n` random bytes that begin `offset` bytes into their memory."""
    return np.random.default_rng(seed).integers(0, 256, n + offset, np.uint8)[offset:]


def fenced(n: int, offset: int) -> tuple[Bytes, Bytes]:
    """Return memory filled with 0xA5, and `n` bytes inside it that begin at an odd place."""
    memory = np.full(n + offset + 70, 0xA5, np.uint8)
    return memory, memory[offset : offset + n]


def fence_holds(memory: Bytes, n: int, offset: int) -> bool:
    return bool((memory[:offset] == 0xA5).all() and (memory[offset + n :] == 0xA5).all())


def test_the_best_variant_is_the_last() -> None:
    assert _planes.VARIANTS[0] == "baseline"
    assert len(_planes.VARIANTS) - 1 == _planes.BEST


def test_an_unknown_variant_is_refused() -> None:
    for variant in (-1, len(_planes.VARIANTS)):
        with pytest.raises(IndexError, match="no variant"):
            _planes.constant(b"aa", variant)


@EVERY_VARIANT
@pytest.mark.parametrize("delta", [False, True], ids=["intra", "delta"])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@settings(max_examples=tries(40), deadline=None, derandomize=True)
@given(n=LENGTHS, seed=SEEDS, offset=OFFSETS)
def test_split_and_join(variant: int, delta: bool, itemsize: int, n: int, seed: int, offset: int) -> None:
    raw = random_bytes(n * itemsize, seed, offset)
    base = random_bytes(n * itemsize, seed + 1, offset // 2) if delta else None
    fences = [fenced(n, (offset + j) % 7) for j in range(itemsize)]
    planes = [plane for _, plane in fences]
    _planes.split(raw, base, planes, variant)
    for plane, expected in zip(planes, reference_split(raw, base, itemsize), strict=True):
        np.testing.assert_array_equal(plane, expected)
    assert all(fence_holds(memory, n, (offset + j) % 7) for j, (memory, _) in enumerate(fences))

    memory, back = fenced(n * itemsize, offset)
    _planes.join(planes, base, back, variant)
    np.testing.assert_array_equal(back, raw)
    assert fence_holds(memory, n * itemsize, offset)


@EVERY_VARIANT
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_join_in_the_memory_of_the_base(variant: int, itemsize: int) -> None:
    raw, base = random_bytes(8 * 5001, 1), random_bytes(8 * 5001, 2)
    planes = reference_split(raw, base, itemsize)
    _planes.join(planes, base, base, variant)
    np.testing.assert_array_equal(base, raw)


@EVERY_VARIANT
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_special_floats_come_back(variant: int, itemsize: int) -> None:
    # All of the sign, exponent and first mantissa bits; the rest of the mantissa empty, full and odd: NaN payloads,
    # infinities, subnormals and both zeros, of every type of this size.
    high = np.arange(1 << 16, dtype=np.uint64) << np.uint64(8 * itemsize - 16)
    low = np.array([0, (1 << (8 * itemsize - 16)) - 1, 1], np.uint64)
    raw = (high[:, None] | low).astype(unsigned(itemsize)).reshape(-1).view(np.uint8)
    for base in (None, np.roll(raw, 31 * itemsize)):
        planes = reference_split(raw, base, itemsize)
        back = np.empty_like(raw)
        _planes.join(planes, base, back, variant)
        np.testing.assert_array_equal(back, raw)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_small_step_is_a_small_difference(dtype: str) -> None:
    numbers = np.geomspace(1e-3, 1e3, 4096).astype(dtype)
    numbers[::2] *= -1
    for direction in (np.inf, -np.inf):
        stepped = np.nextafter(numbers, numbers.dtype.type(direction))
        planes = [np.empty(len(numbers), np.uint8) for _ in range(numbers.itemsize)]
        _planes.split(stepped.view(np.uint8), numbers.view(np.uint8), planes, _planes.BEST)
        assert np.isin(planes[0], [1, 2]).all()  # one up or one down, zigzag
        assert not np.concatenate(planes[1:]).any()


@EVERY_VARIANT
@settings(max_examples=tries(100), deadline=None, derandomize=True)
@given(n=LENGTHS, seed=SEEDS, share=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.99, 1.0]), offset=OFFSETS)
def test_mask_and_unmask(variant: int, n: int, seed: int, share: float, offset: int) -> None:
    generator = np.random.default_rng(seed)
    common = int(generator.integers(256))
    data = random_bytes(n, seed, offset)
    data[generator.random(n) >= share] = common
    differs = data != common
    bits_memory, bitmap = fenced((n + 7) // 8, offset)
    others_memory, others = fenced(n, offset)
    count = _planes.mask(data, common, bitmap, others, variant)
    np.testing.assert_array_equal(bitmap, np.packbits(differs, bitorder="little"))
    np.testing.assert_array_equal(others[:count], data[differs])
    assert count == differs.sum() == _planes.popcount(bitmap, variant)
    assert fence_holds(bits_memory, (n + 7) // 8, offset)
    assert fence_holds(others_memory, n, offset)

    memory, back = fenced(n, offset)
    _planes.unmask(bitmap, others[:count].copy(), common, back, variant)
    np.testing.assert_array_equal(back, data)
    assert fence_holds(memory, n, offset)


@settings(max_examples=tries(200), deadline=None, derandomize=True)
@given(n=LENGTHS, seed=SEEDS, share=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]), offset=OFFSETS)
def test_gaps(n: int, seed: int, share: float, offset: int) -> None:
    generator = np.random.default_rng(seed)
    data = random_bytes(n, seed, offset) | np.uint8(1)
    data[generator.random(n) >= share] = 0
    places = np.flatnonzero(data)
    expected: list[int] = []
    for gap in (np.diff(places, prepend=-1) - 1).tolist():
        expected += [255] * (gap // 255) + [gap % 255]
    bitmap = np.packbits(data != 0, bitorder="little")
    memory, gaps = fenced(len(expected), offset)
    assert _planes.gaps(bitmap, n, gaps) == len(expected)
    assert gaps.tolist() == expected
    assert fence_holds(memory, len(gaps), offset)
    assert _planes.gap_ends(gaps) == len(places)
    if expected:
        memory, short = fenced(int(generator.integers(len(expected))), offset)
        assert _planes.gaps(bitmap, n, short) == len(short) + 1
        assert fence_holds(memory, len(short), offset)

    memory, back = fenced(n, offset)
    _planes.fill_gaps(gaps, data[places], 0, back)
    np.testing.assert_array_equal(back, data)
    assert fence_holds(memory, n, offset)


@settings(max_examples=tries(200), deadline=None, derandomize=True)
@given(gaps=st.lists(st.one_of(st.integers(0, 3), st.integers(250, 255)), max_size=40), n=st.integers(0, 3000))
def test_gaps_that_lie_are_refused(gaps: list[int], n: int) -> None:
    places = np.cumsum([gap + (gap < 255) for gap in gaps])
    count = sum(gap < 255 for gap in gaps)
    memory, out = fenced(n, 3)
    with pytest.raises(ValueError, match=f"in front of {count} bytes, not {count + 1}"):
        _planes.fill_gaps(bytes(gaps), bytes(count + 1), 0, out)
    if gaps and places[-1] > n:
        with pytest.raises(ValueError, match=f"beyond {n} bytes"):
            _planes.fill_gaps(bytes(gaps), bytes(count), 0, out)
    else:
        _planes.fill_gaps(bytes(gaps), bytes(count), 0, out)
        assert not out.any()
    assert fence_holds(memory, n, 3)
    for bits in (0, 4, 9):
        with pytest.raises(ValueError, match=f"not a bitmap of {bits} bits"):
            _planes.gaps(b"\xff", bits, bytearray(9))


@EVERY_VARIANT
@given(n=st.integers(1, 9000), where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=tries(50), deadline=None, derandomize=True)
def test_constant(variant: int, n: int, where: float) -> None:
    data = np.full(n, 7, np.uint8)
    assert _planes.constant(data, variant)
    data[int(where * n)] ^= 0x80
    assert _planes.constant(data, variant) == (n == 1)
    assert _planes.constant(b"", variant)


@pytest.mark.slow
@EVERY_VARIANT
@pytest.mark.parametrize("delta", [False, True], ids=["intra", "delta"])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("n", [0, 1, 255, 256, 4095, 4096, 4097, 100_000])
def test_survey(variant: int, delta: bool, itemsize: int, n: int) -> None:
    generator = np.random.default_rng(n)
    raw = (generator.geometric(0.05, n * itemsize) % 256).astype(np.uint8)
    base = (generator.geometric(0.2, n * itemsize) % 256).astype(np.uint8) if delta else None
    starts = [(n - 256) * run // 15 for run in range(16)] if n > 4096 else []
    sampled = np.concatenate([np.arange(start, start + 256) for start in starts]) if starts else np.arange(n)
    found = _planes.survey(raw, base, itemsize, variant)
    assert len(found) == itemsize
    for (bits, share, commonest), plane in zip(found, reference_split(raw, base, itemsize), strict=True):
        counts = np.bincount(plane[sampled], minlength=256)
        if n == 0:
            assert (bits, share) == (0.0, 1.0)
            continue
        p = counts[counts > 0] / counts.sum()
        entropy = -(p * np.log2(p)).sum() + (len(p) - 1) / (2 * math.log(2) * counts.sum())
        assert bits == pytest.approx(min(entropy, 8.0), abs=1e-9)
        assert share == pytest.approx(counts.max() / counts.sum())
        assert counts[commonest] == counts.max()


def huffman(data: Bytes, variant: int, room: int | None = None) -> bytes:
    """Return the zstd frame of `data`, which must leave the memory beyond its room alone; empty if it does not fit."""
    memory, out = fenced(len(data) + 64 if room is None else room, 5)
    size = _planes.huffman(data, out, variant)
    assert fence_holds(memory, len(out), 5)
    return out[:size].tobytes()


def unhuffman(frame: bytes, n: int, variant: int, offset: int = 3) -> bytes | None:
    """Return the `n` bytes that our own decoder finds in `frame`, or ``None`` if it says that it is not for it.

    The frame lies at the end of its memory: a sanitizer would notice if anything beyond it was read.
    """
    memory, out = fenced(n, offset)
    found = _planes.unhuffman(np.frombuffer(frame, np.uint8).copy(), out, variant)
    assert fence_holds(memory, n, offset)
    return out.tobytes() if found else None


def unzstd(frame: bytes, n: int) -> bytes:
    assert zstandard.frame_content_size(frame) == n
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def drawn(n: int, weights: npt.NDArray[np.float64], symbols: npt.NDArray[np.int64], seed: int) -> Bytes:
    """Return `n` bytes of a distribution."""
    cumulative = np.cumsum(weights / weights.sum())
    where = np.searchsorted(cumulative, np.random.default_rng(seed).random(n))
    return symbols[np.minimum(where, len(symbols) - 1)].astype(np.uint8)


@st.composite
def skewed_bytes(draw: st.DrawFn) -> Bytes:
    """Draw bytes of 1 to 256 symbols anywhere, their shares alike, geometric or Zipf's; in any order, or sorted.

    Sorted, rare bytes are neighbours: the longest codes follow each other.
    """
    n = draw(st.one_of(st.integers(1, 300), st.sampled_from([4096, 65_535, 65_536, 65_537, 131_072, 150_001])))
    k = draw(st.integers(1, 256))
    first = draw(st.integers(0, 256 - k))
    falling = draw(st.sampled_from([1.0, 0.98, 0.9, 0.7, 0.618, 0.5]))
    zipf = draw(st.sampled_from([0.0, 1.0, 3.0]))
    seed = draw(SEEDS)
    rank = np.arange(k)
    symbols = np.random.default_rng(seed).permutation(k) if draw(st.booleans()) else rank
    data = drawn(n, falling**rank / (1.0 + rank) ** zipf, symbols + first, seed)
    return np.sort(data) if draw(st.booleans()) else data


@EVERY_VARIANT
@settings(max_examples=tries(150), deadline=None, derandomize=True)
@given(data=skewed_bytes())
def test_any_zstd_reads_the_huffman_codes(variant: int, data: Bytes) -> None:
    frame = huffman(data, variant)
    assert unzstd(frame, len(data)) == data.tobytes()
    assert frame == huffman(data, 0)
    assert unhuffman(frame, len(data), variant) == data.tobytes()


@EVERY_VARIANT
@pytest.mark.parametrize("order", ["random", "sorted", "descending", "rare in the middle"])
@pytest.mark.parametrize("first", [0, 100, 200])
def test_the_longest_codes(variant: int, order: str, first: int) -> None:
    # Fibonacci's numbers make the deepest tree; the limit of 11 bits shortens it.
    counts = [1, 1]
    while sum(counts) + counts[-1] + counts[-2] < 65_536:
        counts.append(counts[-1] + counts[-2])
    data = np.repeat(np.arange(first, first + len(counts)), counts).astype(np.uint8)
    if order == "random":
        data = np.random.default_rng(0).permutation(data)
    elif order == "descending":
        data = data[::-1].copy()
    elif order == "rare in the middle":
        data = np.roll(data, 30_000)
    frame = huffman(data, variant)
    assert unzstd(frame, len(data)) == data.tobytes()
    assert unhuffman(frame, len(data), variant) == data.tobytes()
    assert len(frame) < 0.36 * len(data)


def planes_like(n: int, seed: int) -> Bytes:
    """Return `n` bytes as planes have them: blocks of long codes and of short ones, of one byte and of noise."""
    generator = np.random.default_rng(seed)
    pieces: list[Bytes] = []
    while 65_536 * len(pieces) < n:
        width = generator.choice([0, 0.4, 2, 15, 70, 1000])
        pieces.append((generator.normal(0, width, 1 << 16) + generator.integers(256)).astype(np.int64).astype(np.uint8))
    return np.concatenate(pieces)[:n]


@EVERY_VARIANT
@settings(max_examples=tries(40), deadline=None, derandomize=True)
@given(blocks=st.integers(0, 5), rest=st.integers(0, 1 << 16), seed=SEEDS, offset=OFFSETS)
def test_our_own_decoder_reads_the_huffman_codes(variant: int, blocks: int, rest: int, seed: int, offset: int) -> None:
    data = planes_like((blocks << 16) + max(rest, 1), seed)
    frame = huffman(data, variant)
    assert unhuffman(frame, len(data), variant, offset) == data.tobytes()
    assert unhuffman(frame, len(data) - 1, variant) is None
    assert unhuffman(frame, len(data) + 1, variant) is None
    for cut in {0, 1, 8, 9, 11, 12, 17, 20, 60, len(frame) // 2, len(frame) - 1}:
        if cut < len(frame):
            assert unhuffman(frame[:cut], len(data), variant) is None
    assert unhuffman(frame + b"\0", len(data), variant) is None


def test_frames_of_zstd_itself_are_left_to_it() -> None:
    for data in (planes_like(200_000, 1).tobytes(), bytes(100_000), b"to be or not to be " * 999):
        for level in (-5, 1, 3, 19):
            frame = zstandard.ZstdCompressor(level=level).compress(data)
            assert unhuffman(frame, len(data), _planes.BEST) in (None, data)


@pytest.mark.slow
def test_our_own_decoder_never_disagrees_with_zstd() -> None:
    """Of a damaged frame it says that it is none, or what zstd says; and no memory but the output's is written."""
    generator = np.random.default_rng(7)
    frames = [(huffman(data, 0), len(data)) for data in (planes_like(n, n) for n in (70, 999, 66_000, 140_000))]
    accepted = 0
    for number in range(MUTATIONS):
        frame, n = frames[0] if number % 16 else frames[number // 16 % 4]
        damaged = bytearray(frame)
        head = number % 3 and min(len(damaged), 90)  # most of it is codes, in which damage is less interesting
        for _ in range(generator.integers(1, 4)):
            damaged[generator.integers(head or len(damaged))] = generator.integers(256)
        ours = unhuffman(bytes(damaged), n, number % len(_planes.VARIANTS))
        if ours is not None:
            accepted += 1
            assert ours == unzstd(bytes(damaged), n)
    assert accepted > 0


ELEVENS = int("1" + 16 * "00000000001", 2).to_bytes(23, "little").hex()  # sixteen codes of the most bits, and the end


def frame_of_one_block(n: int, table: bytes, stream: bytes) -> bytes:
    """Return the zstd frame of a block of `n` bytes: a described code, and the same stream four times."""
    coded = table + len(stream).to_bytes(2, "little") * 3 + stream * 4
    block = (2 | 3 << 2 | n << 4 | len(coded) << 22).to_bytes(5, "little") + coded + b"\0"
    return b"".join(
        [b"\x28\xb5\x2f\xfd\xa0", n.to_bytes(4, "little"), (1 | 2 << 1 | len(block) << 3).to_bytes(3, "little"), block]
    )


@EVERY_VARIANT
@pytest.mark.parametrize(
    ("table", "stream", "valid"),
    [
        pytest.param("80 10", "35 a2 01", True, id="two symbols of a bit each"),
        pytest.param("80 20", "35 a2 01", False, id="a code whose longest is of fewer bits than its table says"),
        pytest.param("8a ba 98 76 54 32 10", ELEVENS, False, id="longer than its content"),
    ],
)
def test_what_zstd_refuses_is_refused(variant: int, table: str, stream: str, valid: bool) -> None:
    """Both were found by fuzzing (`make fuzz-coder`)."""
    frame = frame_of_one_block(64, bytes.fromhex(table), bytes.fromhex(stream))
    ours = unhuffman(frame, 64, variant)
    if valid:
        assert ours == unzstd(frame, 64)
    else:
        assert ours is None
        with pytest.raises(zstandard.ZstdError):
            unzstd(frame, 64)


@pytest.mark.parametrize("seed", range(40))
def test_huffman_codes_are_nearly_as_short_as_can_be(seed: int) -> None:
    generator = np.random.default_rng(seed)
    k = int(generator.integers(6, 257))
    data = drawn(65_536, generator.random(k) ** generator.integers(1, 9), generator.permutation(256)[:k], seed)
    # Every merge of two nodes of Huffman's tree is a bit for each byte below it.
    nodes = [int(count) for count in np.bincount(data) if count]
    heapq.heapify(nodes)
    bits = 0
    while len(nodes) > 1:
        merged = heapq.heappop(nodes) + heapq.heappop(nodes)
        bits += merged
        heapq.heappush(nodes, merged)
    assert len(huffman(data, _planes.BEST)) <= min(1.01 * bits / 8 + 150, len(data) + 12)


def test_huffman_blocks_of_one_byte_take_nothing() -> None:
    data = np.concatenate([np.full(65_536, 4), np.full(65_536, 5), np.full(7, 6)]).astype(np.uint8)
    frame = huffman(data, _planes.BEST)
    assert len(frame) == 9 + 3 * 4
    assert unzstd(frame, len(data)) == data.tobytes()


def test_huffman_codes_that_do_not_fit() -> None:
    data = drawn(100_000, np.ones(16), np.arange(16), 0)
    whole = huffman(data, _planes.BEST)
    assert huffman(data, _planes.BEST, len(whole)) == whole
    for room in (0, 8, 9, 12, 1000, len(whole) - 1):
        assert huffman(data, _planes.BEST, room) == b""
    with pytest.raises(ValueError, match="a frame of 0 bytes"):
        huffman(data[:0], _planes.BEST)


def test_huffman_codes_are_what_they_always_were() -> None:
    i = np.arange(100_000, dtype=np.uint64)
    data = np.minimum((i * i * i) % 251, (i * 7919) % 127).astype(np.uint8)
    assert (
        hashlib.sha256(huffman(data, _planes.BEST)).hexdigest()
        == "d5fde8c5b5f1ce1697e9a5a7fdbf82cd2ffb428276dd82c34e26786ac963036d"
    )


def test_sizes_that_do_not_fit_are_refused() -> None:
    eight = np.zeros(8, np.uint8)
    four = [np.zeros(4, np.uint8), np.zeros(4, np.uint8)]
    with pytest.raises(ValueError, match="planes"):
        _planes.split(eight[:7], None, four, 0)
    with pytest.raises(ValueError, match="planes"):
        _planes.join(four, None, eight[:7], 0)
    with pytest.raises(ValueError, match="base"):
        _planes.split(eight, eight[:7], four, 0)
    with pytest.raises(ValueError, match="base"):
        _planes.join(four, eight[:7], eight, 0)
    with pytest.raises(ValueError, match="differ in length"):
        _planes.join([four[0], four[0][:3]], None, eight, 0)
    for count in (0, 3, 9):
        with pytest.raises(ValueError, match="1, 2, 4 or 8 planes"):
            _planes.join([four[0]] * count, None, eight, 0)
    with pytest.raises(ValueError, match="elements"):
        _planes.survey(eight, None, 3, 0)
    with pytest.raises(ValueError, match="elements"):
        _planes.survey(eight[:7], None, 2, 0)
    with pytest.raises(ValueError, match="base"):
        _planes.survey(eight, eight[:4], 2, 0)
    with pytest.raises(ValueError, match="masking"):
        _planes.mask(eight, 0, bytearray(2), bytearray(8), 0)
    with pytest.raises(ValueError, match="masking"):
        _planes.mask(eight, 0, bytearray(1), bytearray(7), 0)
    with pytest.raises(ValueError, match="a bitmap of 8 bytes"):
        _planes.unmask(b"\0\0", b"", 0, eight, 0)


def test_chunks_that_do_not_fit_are_refused() -> None:
    coder = _planes.Coder(0.97, 1.0, 0.36, 0.985, 0.9, 64)
    eight, out = np.zeros(8, np.uint8), bytearray(8)
    for chunk, reason in [
        ((eight, None, 3, out), "elements of 3"),
        ((eight, eight[:7], 2, out), "base has 7 bytes, not 8"),
        ((eight, None, 2, out[:7]), "8 bytes may not fit into 7"),
    ]:
        with pytest.raises(ValueError, match=reason):
            coder.encode([(eight, None, 4, bytearray(8)), chunk], list, list, _planes.BEST)
    with pytest.raises((BufferError, ValueError)):
        coder.encode([(eight, None, 4, bytes(8))], list, list, _planes.BEST)
    with pytest.raises(IndexError, match="variant"):
        coder.encode([(eight, None, 4, out)], list, list, 99)
    assert coder.encode([], list, list, _planes.BEST) == []
    assert coder.encode([(eight, None, 4, out)], list, list, _planes.BEST) == [[(0, 8, 8)]]
    sparse = np.where(np.arange(4096) % 64 == 0, np.arange(4096) % 251, 0).astype(np.uint8)
    with pytest.raises(ValueError, match="0 results for"):
        coder.encode([(sparse, None, 1, bytearray(4096))], lambda data: [], lambda data: [], _planes.BEST)
    with pytest.raises(ZeroDivisionError):
        coder.encode([(sparse, None, 1, bytearray(4096))], lambda data: [bytes(1 // 0)], list, _planes.BEST)
    # What does not help is left: the blocks that were set aside are stored as they are.
    (frame,) = coder.encode([(sparse, None, 1, bytearray(4096))], list, list, _planes.BEST)[0]
    assert frame[0] == 1
    assert 512 < frame[1] < 1024


@EVERY_VARIANT
def test_a_bitmap_that_lies_is_refused(variant: int) -> None:
    out = np.zeros(200, np.uint8)
    bitmap = np.full(25, 0xFF, np.uint8)
    for count in (0, 1, 199, 201):
        with pytest.raises(ValueError, match="bits set"):
            _planes.unmask(bitmap, bytes(count), 0, out, variant)
    with pytest.raises(ValueError, match="beyond its end"):
        _planes.unmask(bitmap, bytes(200), 0, out[:199], variant)
    assert not out.any()


def test_read_only_memory_is_not_written() -> None:
    with pytest.raises((BufferError, ValueError)):
        _planes.join([b"abcd"], None, b"....", 0)
    with pytest.raises((BufferError, ValueError)):
        _planes.split(b"abcd", None, [b"...."], 0)


@given(
    n=st.one_of(st.integers(0, 100), st.integers(4000, 4200), st.integers(100_000, 300_000)), offset=st.integers(0, 9)
)
def test_copy(n: int, offset: int) -> None:
    source = np.random.default_rng(n).integers(0, 256, n + offset, np.uint8)[offset:]
    target = np.full(n + 2, 0xA5, np.uint8)
    _planes.copy(source, target[1:-1])
    assert target[1:-1].tobytes() == source.tobytes()
    assert (target[0], target[-1]) == (0xA5, 0xA5)
    with pytest.raises(ValueError, match="do not fit"):
        _planes.copy(source, target[: n + 1])
