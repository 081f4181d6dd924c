"""One frame: up to 1 MiB of a chunk's raw bytes to coded bytes, and back.

A frame goes the way that a sample of it says is cheapest: *raw*; *intra* (elements rotated by one bit and split into
byte planes); *delta* (each element's difference to the base's, in the order of float values, split into byte planes);
or *zstd* (the whole frame). A plane is stored as a block: *raw*, *constant*, *masked* (a bitmap of the bytes unlike the
commonest, and those bytes), *sparse* (the gaps before those bytes, and the bytes) or *zstd* (used as an entropy coder).
The layout is in ``docs/objects.md``.

Everything that takes time lets go of the interpreter's lock. Scratch memory is kept and used again.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
import zstandard

from incckpt import _planes
from incckpt.errors import CodecError

__all__ = [
    "BATCH",
    "DELTA",
    "FRAME_BYTES",
    "INTRA",
    "RAW",
    "WAYS",
    "ZSTD",
    "CodedFrame",
    "decode_frame",
    "encode_frames",
    "encode_text",
]

FRAME_BYTES: Final = 1 << 20
BATCH: Final = 16
RAW, INTRA, DELTA, ZSTD = range(4)
WAYS: Final = ("raw", "intra", "delta", "zstd")
BLOCK_RAW, BLOCK_CONSTANT, BLOCK_MASKED, BLOCK_ZSTD, BLOCK_SPARSE = range(5)

_BLOCK = struct.Struct("<BI")
_SPARSE = struct.Struct("<BI")

# From here on choice, not format: no decoder knows of it.
_WORTHWHILE = 0.97  # of its size, to which coding must bring a block; decoding it has to be paid for
_RAW_BITS = 8 * _WORTHWHILE  # of entropy in a byte, from which a plane is not tried
_HUFFMAN_BITS = 1.0  # of entropy in a byte, below which zstd's matches and runs beat codes of at least a bit
_MASKED_SHARE = 0.31  # of the commonest byte, from which a mask beats Huffman codes alone: they take 2 bits for it
_DELTA_GAIN = 0.985  # of intra's cost, below which a delta is worth the reading of its base
_ZSTD_GAIN = 0.9  # of the planes' cost, below which zstd is worth its slower decoding
_PROBE_BYTES = 16 << 10
_FEWEST = 64  # elements, below which planes do not pay for their heads
_PLANE_GAP = 192  # bytes between planes in scratch memory: at a distance of a power of two they would share cache sets


class CodedFrame(NamedTuple):
    """How a frame was coded.

    Attributes
    ----------
    way
        Index into `WAYS`.
    nbytes
        Coded bytes.
    full_nbytes
        What it would have been without a base: an estimate where `way` is a delta.
    """

    way: int
    nbytes: int
    full_nbytes: int


class _Worker(threading.local):
    """A decompressor and scratch memory of one thread, for decoding."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)
        self._planes = memoryview(bytearray(FRAME_BYTES + 8 * _PLANE_GAP))
        self.others = memoryview(bytearray(FRAME_BYTES))
        self.bitmap = memoryview(bytearray(FRAME_BYTES // 8))
        self.gaps = memoryview(bytearray(FRAME_BYTES))

    def plane(self, j: int, n: int) -> memoryview:
        """Return scratch memory for plane `j` of planes of `n` bytes."""
        start = j * (n + _PLANE_GAP)
        return self._planes[start : start + n]


_worker = _Worker()


# ---- encoding --------------------------------------------------------------------------------------------------------


class _Encoder:
    """Compressors and scratch memory (about 37 MiB, where all of it is used), for one call at a time."""

    def __init__(self) -> None:
        self.fast = zstandard.ZstdCompressor(level=1)
        self.general = zstandard.ZstdCompressor(level=3)
        self.planes = _planes.Coder(BATCH, FRAME_BYTES, _RAW_BITS, _HUFFMAN_BITS, _MASKED_SHARE, _WORTHWHILE)


_idle: list[_Encoder] = []  # the last one used is the next: there are as many as ever encoded at one time


@contextmanager
def _encoder() -> Iterator[_Encoder]:
    try:
        encoder = _idle.pop()
    except IndexError:
        encoder = _Encoder()
    yield encoder
    _idle.append(encoder)


class _Plan(NamedTuple):
    """What the sample of a frame says.

    Attributes
    ----------
    delta
        Whether the planes should be those of a delta.
    cost, full_cost
        The size to expect, of the raw size: of these planes, and of the best way without a base.
    text
        Whether zstd looks better than planes.
    planes
        Statistics of the planes.
    """

    delta: bool
    cost: float
    full_cost: float
    text: bool
    planes: Sequence[tuple[float, float, int]]


def encode_frames(raw: memoryview, base: memoryview | None, itemsize: int, out: memoryview) -> list[CodedFrame]:
    """Code frames, each in its cheapest way.

    Takes and gives back the interpreter's lock some five times, however many frames there are: each time may put
    the training thread to sleep (docs/decisions/007).

    Parameters
    ----------
    raw
        ``uint8[n]``, ``0 < n <= BATCH * FRAME_BYTES``: frames one after the other, only the last may be shorter.
    base
        ``uint8[n]``, the same place of the base, or ``None``.
    itemsize
        Bytes of an element: 1, 2, 4 or 8.
    out
        ``uint8[n]``, of which the coded bytes take the first, end to end.
    """
    frames = [raw[start : start + FRAME_BYTES] for start in range(0, raw.nbytes, FRAME_BYTES)]
    with _encoder() as encoder:
        plans = _plans(encoder, raw, base, itemsize, frames)
        texts = _texts(encoder, plans, frames)
        wanted = [
            None if plan is None or plan.cost >= 1.0 or i in texts else (plan.delta, plan.planes)
            for i, plan in enumerate(plans)
        ]
        spans, asides = encoder.planes.code(raw, base, itemsize, wanted, _planes.BEST)
        contents = _fill(encoder, asides)
        parts: list[memoryview | zstandard.BufferSegment] = []
        coded: list[CodedFrame] = []
        for i, (frame, plan, span) in enumerate(zip(frames, plans, spans, strict=True)):
            whole = frame.nbytes
            if span is not None and plan is not None:
                pieces, size = _pieces(encoder, span, contents)
                if size < whole:
                    parts += pieces
                    full = round(plan.full_cost * whole) if plan.delta else size
                    coded.append(CodedFrame(DELTA if plan.delta else INTRA, size, full))
                    continue
            if i in texts:
                parts.append(texts[i])
                coded.append(CodedFrame(ZSTD, len(texts[i]), len(texts[i])))
            else:
                parts.append(frame)
                coded.append(CodedFrame(RAW, whole, whole))
        _planes.gather(parts, out)
    return coded


def encode_text(raw: memoryview, out: memoryview) -> CodedFrame:
    """Code a frame, ``uint8[n]``, to the first bytes of `out`, ``uint8[n]``, by zstd or not at all."""
    with _encoder() as encoder:
        coded = encoder.general.compress(raw)
    if len(coded) < raw.nbytes:
        _planes.copy(coded, out[: len(coded)])
        return CodedFrame(ZSTD, len(coded), len(coded))
    _planes.copy(raw, out)
    return CodedFrame(RAW, raw.nbytes, raw.nbytes)


def _plans(
    encoder: _Encoder, raw: memoryview, base: memoryview | None, itemsize: int, frames: list[memoryview]
) -> list[_Plan | None]:
    """Return what samples of the frames say; ``None`` where there is too little to say anything."""
    surveys, differences = _planes.survey_frames(raw, base, itemsize, FRAME_BYTES, _planes.BEST)
    large = [frame for frame in frames if frame.nbytes // itemsize >= _FEWEST]
    pieces = [_middle(frame) for frame in large]
    probes = [len(coded) / len(piece) for coded, piece in zip(_compress(encoder.fast, pieces), pieces, strict=True)]
    plans: list[_Plan | None] = []
    for planes, different, zstd_cost in zip(
        surveys, differences or surveys, probes, strict=False
    ):  # only the last can be small
        delta, cost = False, _cost(planes)
        full_cost = min(cost, zstd_cost, 1.0)
        if base is not None and (delta_cost := _cost(different)) < _DELTA_GAIN * full_cost:
            delta, cost, planes = True, delta_cost, different
        plans.append(_Plan(delta, cost, full_cost, zstd_cost < _ZSTD_GAIN * min(cost, 1.0), planes))
    return plans + [None] * (len(frames) - len(plans))


def _texts(
    encoder: _Encoder, plans: Sequence[_Plan | None], frames: Sequence[memoryview]
) -> dict[int, zstandard.BufferSegment]:
    """Return, by number, what zstd makes of the frames that look like text, where the whole frame is as its sample."""
    likely = [(i, plan) for i, plan in enumerate(plans) if plan is not None and plan.text]
    coded = _compress(encoder.general, [frames[i] for i, _ in likely])
    return {
        i: text
        for (i, plan), text in zip(likely, coded, strict=True)
        if len(text) < min(_WORTHWHILE, plan.cost) * frames[i].nbytes
    }


class _Content(NamedTuple):
    """The content of a block that the planes' coder set aside, to be put in behind its head."""

    head: int
    data: memoryview | zstandard.BufferSegment


def _fill(encoder: _Encoder, asides: Sequence[tuple[int, int, int, int]]) -> deque[_Content]:
    """Code what was set aside and complete the heads; return the contents in order."""
    out, side = encoder.planes.out, memoryview(encoder.planes.side)
    data = [side[start : start + nbytes] for _, _, start, nbytes in asides]
    contents: deque[_Content] = deque()
    for (head, outer, _, _), plain, coded in zip(asides, data, _compress(encoder.fast, data), strict=True):
        worthwhile = len(coded) <= int(_WORTHWHILE * len(plain))
        content = coded if worthwhile else plain
        _BLOCK.pack_into(out, head, BLOCK_ZSTD if worthwhile else BLOCK_RAW, len(content))
        if outer >= 0:
            kind, length = _BLOCK.unpack_from(out, outer)
            _BLOCK.pack_into(out, outer, kind, length + len(content))
        contents.append(_Content(head, content))
    return contents


def _pieces(
    encoder: _Encoder, span: tuple[int, int], contents: deque[_Content]
) -> tuple[list[memoryview | zstandard.BufferSegment], int]:
    """Return the parts of a frame in order, taking those of its blocks that were set aside, and their size."""
    out = memoryview(encoder.planes.out)
    at, end = span
    pieces: list[memoryview | zstandard.BufferSegment] = []
    while contents and contents[0].head < end:
        head, data = contents.popleft()
        pieces += (out[at : head + _BLOCK.size], data)
        at = head + _BLOCK.size
    pieces.append(out[at:end])
    return pieces, sum(len(piece) for piece in pieces)


def _compress(compressor: zstandard.ZstdCompressor, data: list[memoryview]) -> list[zstandard.BufferSegment]:
    """Return what becomes of each of `data`, none of them empty, coded in one call."""
    if not data:
        return []
    coded = compressor.multi_compress_to_buffer(list(data), threads=1)
    return [coded[i] for i in range(len(coded))]


def _middle(frame: memoryview) -> memoryview:
    """Return the piece of a frame that zstd is tried on."""
    start = max(0, (frame.nbytes - _PROBE_BYTES) // 2)
    return frame[start : start + _PROBE_BYTES]


def _cost(planes: Sequence[tuple[float, float, int]]) -> float:
    """Return the size to expect of planes with these statistics, of their raw size."""
    return sum(bits if bits < _RAW_BITS else 8.0 for bits, _, _ in planes) / (8 * len(planes))


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode_frame(way: int, itemsize: int, coded: memoryview, base: memoryview | None, raw: memoryview) -> None:
    """Decode a frame, from all of `coded` to all of `raw`.

    Parameters
    ----------
    way
        Index into `WAYS`.
    itemsize
        Bytes of an element: 1, 2, 4 or 8.
    coded
        The frame's coded bytes; not trusted.
    base
        ``uint8[n]``, the same place of the base; needed where `way` is a delta. May be the memory of `raw`.
    raw
        ``uint8[n]``, ``n <= FRAME_BYTES``. Undefined if an error is raised.

    Raises
    ------
    CodecError
        If these are not the coded bytes of a frame of that size.
    """
    if way == RAW:
        if len(coded) != len(raw):
            raise CodecError(f"{len(coded)} bytes are stored for {len(raw)}")
        _planes.copy(coded, raw)
    elif way == ZSTD:
        _planes.copy(_inflate(coded, len(raw)), raw)
    else:
        n = len(raw) // itemsize
        body, tail = raw[: n * itemsize], raw[n * itemsize :]
        planes, at = [], 0
        for j in range(itemsize):
            plane, at = _read_block(coded, at, n, _worker.plane(j, n), masks=True)
            planes.append(plane)
        if len(coded) - at != len(tail):
            raise CodecError(f"{len(coded) - at} bytes follow the planes, not {len(tail)}")
        if way == INTRA:
            base = None
        elif base is None:
            raise CodecError("it is a delta, and there is no base")
        _planes.join(planes, None if base is None else base[: len(body)], body, _planes.BEST)
        tail[:] = coded[at:]


def _read_block(
    coded: memoryview, at: int, n: int, scratch: memoryview, *, masks: bool
) -> tuple[bytes | memoryview, int]:
    """Return the `n` bytes of the block at `at`, which may be `scratch`, and where the block ends."""
    if len(coded) - at < _BLOCK.size:
        raise CodecError("it ends within the head of a block")
    kind, length = _BLOCK.unpack_from(coded, at)
    at += _BLOCK.size
    end = at + length
    if end > len(coded):
        raise CodecError(f"a block has {length} bytes where {len(coded) - at} are left")
    content = coded[at:end]
    if kind == BLOCK_RAW and length == n:
        return content, end
    if kind == BLOCK_CONSTANT and length == 1:
        np.frombuffer(scratch, np.uint8).fill(content[0])
        return scratch, end
    if kind == BLOCK_ZSTD:
        return _inflate(content, n), end
    if kind == BLOCK_MASKED and masks and length >= 1:
        _read_mask(content, n, scratch)
        return scratch, end
    if kind == BLOCK_SPARSE and masks and length >= _SPARSE.size:
        _read_sparse(content, n, scratch)
        return scratch, end
    raise CodecError(f"a block of kind {kind} has {length} bytes for {n}")


def _read_mask(content: memoryview, n: int, scratch: memoryview) -> None:
    """Put the `n` bytes of a masked block into `scratch`."""
    bitmap_nbytes = (n + 7) // 8
    bitmap, at = _read_block(content, 1, bitmap_nbytes, _worker.bitmap[:bitmap_nbytes], masks=False)
    count = _planes.popcount(bitmap, _planes.BEST)
    if count > n:
        raise CodecError(f"a mask has {count} bits set for {n} bytes")
    others, at = _read_block(content, at, count, _worker.others[:count], masks=False)
    if at != len(content):
        raise CodecError(f"a masked block is followed by {len(content) - at} bytes of its own")
    try:
        _planes.unmask(bitmap, others, content[0], scratch, _planes.BEST)
    except ValueError as error:
        raise CodecError(str(error)) from error


def _read_sparse(content: memoryview, n: int, scratch: memoryview) -> None:
    """Put the `n` bytes of a sparse block into `scratch`."""
    common, gap_nbytes = _SPARSE.unpack_from(content)
    if gap_nbytes > n:
        raise CodecError(f"a sparse block has {gap_nbytes} gaps for {n} bytes")
    gaps, at = _read_block(content, _SPARSE.size, gap_nbytes, _worker.gaps[:gap_nbytes], masks=False)
    count = _planes.gap_ends(gaps)
    others, at = _read_block(content, at, count, _worker.others[:count], masks=False)
    if at != len(content):
        raise CodecError(f"a sparse block is followed by {len(content) - at} bytes of its own")
    try:
        _planes.fill_gaps(gaps, others, common, scratch)
    except ValueError as error:
        raise CodecError(str(error)) from error


def _inflate(coded: memoryview, nbytes: int) -> bytes:
    """Return the `nbytes` that a zstd frame holds; nothing is allocated on the frame's own word."""
    try:
        promised = zstandard.frame_content_size(coded)
        if promised != nbytes:
            raise CodecError(f"a zstd frame holds {promised} bytes, not {nbytes}")
        return _worker.decompressor.decompress(coded, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(str(error)) from error
