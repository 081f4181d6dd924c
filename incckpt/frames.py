"""One frame: up to 1 MiB of a chunk's raw bytes to coded bytes, and back.

A frame goes the way that a sample of it says is cheapest: *raw*; *intra* (elements rotated by one bit and split into
byte planes); *delta* (each element's difference to the base's, in the order of float values, split into byte planes);
or *zstd* (the whole frame). A plane is stored as a block: *raw*, *constant*, *masked* (a bitmap of the bytes unlike the
commonest, and those bytes) or *zstd* (used as an entropy coder). The layout is in ``docs/objects.md``.

Everything that takes time lets go of the interpreter's lock. Compressors and scratch memory (about 6 MiB) are kept per
thread.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import zstandard

from incckpt import _planes
from incckpt.errors import CodecError

__all__ = [
    "DELTA",
    "FRAME_BYTES",
    "INTRA",
    "RAW",
    "WAYS",
    "ZSTD",
    "CodedFrame",
    "decode_frame",
    "encode_frame",
    "encode_text",
]

FRAME_BYTES: Final = 1 << 20
RAW, INTRA, DELTA, ZSTD = range(4)
WAYS: Final = ("raw", "intra", "delta", "zstd")
BLOCK_RAW, BLOCK_CONSTANT, BLOCK_MASKED, BLOCK_ZSTD = range(4)

_BLOCK = struct.Struct("<BI")

# From here on choice, not format: no decoder knows of it.
_WORTHWHILE = 0.97  # of its size, to which coding must bring a block; decoding it has to be paid for
_RAW_BITS = 8 * _WORTHWHILE  # of entropy in a byte, from which a plane is not tried
_HUFFMAN_BITS = 1.0  # of entropy in a byte, below which zstd's matches and runs beat codes of at least a bit
_MASKED_SHARE = 0.36  # of the commonest byte, from which a mask is smaller and faster than Huffman codes alone
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
    """Compressors and scratch memory of one thread."""

    def __init__(self) -> None:
        self.fast = zstandard.ZstdCompressor(level=1)
        self.general = zstandard.ZstdCompressor(level=3)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)
        self._planes = memoryview(bytearray(FRAME_BYTES + 8 * _PLANE_GAP))
        self.others = memoryview(bytearray(FRAME_BYTES))
        self.bitmap = memoryview(bytearray(FRAME_BYTES // 8))

    def plane(self, j: int, n: int) -> memoryview:
        """Return scratch memory for plane `j` of planes of `n` bytes."""
        start = j * (n + _PLANE_GAP)
        return self._planes[start : start + n]


_worker = _Worker()


# ---- encoding --------------------------------------------------------------------------------------------------------


def encode_frame(raw: memoryview, base: memoryview | None, itemsize: int, out: memoryview) -> CodedFrame:
    """Code a frame in its cheapest way.

    Parameters
    ----------
    raw
        ``uint8[n]``, ``0 < n <= FRAME_BYTES``.
    base
        ``uint8[n]``, the same place of the base, or ``None``.
    itemsize
        Bytes of an element: 1, 2, 4 or 8.
    out
        ``uint8[n]``, of which the coded bytes take the first.
    """
    nbytes = raw.nbytes
    elements = nbytes - nbytes % itemsize
    if elements >= _FEWEST * itemsize:
        body = raw[:elements]
        planes = _planes.survey(body, None, itemsize, _planes.BEST)
        cost, way = _cost(planes), INTRA
        zstd_cost = _probe(raw)
        full_cost = min(cost, zstd_cost, 1.0)
        if base is not None:
            base = base[:elements]
            differences = _planes.survey(body, base, itemsize, _planes.BEST)
            delta_cost = _cost(differences)
            if delta_cost < _DELTA_GAIN * full_cost:
                planes, cost, way = differences, delta_cost, DELTA
        if zstd_cost < _ZSTD_GAIN * min(cost, 1.0):
            coded = encode_text(raw, out)
            if coded.nbytes < min(_WORTHWHILE, cost) * nbytes:  # the piece may have been unlike the rest
                return coded
        if cost < 1.0:
            size = _write_planes(body, base if way == DELTA else None, planes, raw[elements:], out)
            if size < nbytes:
                return CodedFrame(way, size, size if way == INTRA else round(full_cost * nbytes))
    _planes.copy(raw, out)
    return CodedFrame(RAW, nbytes, nbytes)


def encode_text(raw: memoryview, out: memoryview) -> CodedFrame:
    """Code a frame by zstd, or not at all. Arguments as of `encode_frame`."""
    coded = _worker.general.compress(raw)
    if len(coded) < raw.nbytes:
        _planes.copy(coded, out[: len(coded)])
        return CodedFrame(ZSTD, len(coded), len(coded))
    _planes.copy(raw, out)
    return CodedFrame(RAW, raw.nbytes, raw.nbytes)


def _cost(planes: Sequence[tuple[float, float, int]]) -> float:
    """Return the size to expect of planes with these statistics, of their raw size."""
    return sum(bits if bits < _RAW_BITS else 8.0 for bits, _, _ in planes) / (8 * len(planes))


def _probe(raw: memoryview) -> float:
    """Return what fast zstd makes of a piece from the middle of `raw`, of its size."""
    start = max(0, (raw.nbytes - _PROBE_BYTES) // 2)
    piece = raw[start : start + _PROBE_BYTES]
    return len(_worker.fast.compress(piece)) / piece.nbytes


def _write_planes(
    body: memoryview,
    base: memoryview | None,
    statistics: Sequence[tuple[float, float, int]],
    tail: memoryview,
    out: memoryview,
) -> int:
    """Split `body` into planes, write their blocks and `tail`; return the size, all of `out` if they do not fit."""
    itemsize = len(statistics)
    n = body.nbytes // itemsize
    slot = _BLOCK.size + n
    # The low planes are mostly noise: those below the first that is not are split right to where they are stored.
    noise = 0
    while noise < itemsize and statistics[noise][0] >= _RAW_BITS and (noise + 1) * slot <= out.nbytes:
        noise += 1
    planes = [out[j * slot + _BLOCK.size : (j + 1) * slot] for j in range(noise)]
    planes += [_worker.plane(j, n) for j in range(noise, itemsize)]
    _planes.split(body, base, planes, _planes.BEST)
    for j in range(noise):
        _BLOCK.pack_into(out, j * slot, BLOCK_RAW, n)
    at = noise * slot
    try:
        for plane, found in zip(planes[noise:], statistics[noise:], strict=True):
            at = _write_block(out, at, plane, *found)
        return _write(out, at, tail)
    except _FullError:
        return len(out)


class _FullError(Exception):
    """The coded bytes would be as many as the raw ones."""


def _write(out: memoryview, at: int, part: bytes | memoryview) -> int:
    """Write `part` at `at` and return where it ends."""
    end = at + len(part)
    if end > len(out):
        raise _FullError
    _planes.copy(part, out[at:end])
    return end


def _write_block(out: memoryview, at: int, data: memoryview, bits: float, share: float, commonest: int) -> int:
    """Write a plane as a block at `at` and return where it ends."""
    if share <= _MASKED_SHARE or (share == 1.0 and _planes.constant(data, _planes.BEST)):
        return _write_plain_block(out, at, data, bits, share, commonest)
    bitmap = _worker.bitmap[: (len(data) + 7) // 8]
    count = _planes.mask(data, commonest, bitmap, _worker.others, _planes.BEST)
    end = _write(out, at + _BLOCK.size, bytes((commonest,)))
    for inner in (bitmap, _worker.others[:count]):
        (found,) = _planes.survey(inner, None, 1, _planes.BEST)
        end = _write_plain_block(out, end, inner, *found)
    _BLOCK.pack_into(out, at, BLOCK_MASKED, end - at - _BLOCK.size)
    return end


def _write_plain_block(out: memoryview, at: int, data: memoryview, bits: float, share: float, commonest: int) -> int:
    """Write a block without a mask at `at` and return where it ends."""
    start = at + _BLOCK.size
    if share == 1.0 and len(data) > 1 and _planes.constant(data, _planes.BEST):
        end = _write(out, start, bytes((commonest,)))
        kind = BLOCK_CONSTANT
    elif bits < _RAW_BITS and (end := _write_zstd(out, start, data, bits)):
        kind = BLOCK_ZSTD
    else:
        end = _write(out, start, data)
        kind = BLOCK_RAW
    _BLOCK.pack_into(out, at, kind, end - start)
    return end


def _write_zstd(out: memoryview, at: int, data: memoryview, bits: float) -> int:
    """Write `data` entropy-coded at `at` and return where it ends, or 0 if that does not save enough."""
    room = out[at : at + int(_WORTHWHILE * len(data))]
    if bits >= _HUFFMAN_BITS:
        size = _planes.huffman(data, room, _planes.BEST)
        return at + size if size else 0
    coded = _worker.fast.compress(data)
    return _write(out, at, coded) if len(coded) <= len(room) else 0


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


def _inflate(coded: memoryview, nbytes: int) -> bytes:
    """Return the `nbytes` that a zstd frame holds; nothing is allocated on the frame's own word."""
    try:
        promised = zstandard.frame_content_size(coded)
        if promised != nbytes:
            raise CodecError(f"a zstd frame holds {promised} bytes, not {nbytes}")
        return _worker.decompressor.decompress(coded, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(str(error)) from error
