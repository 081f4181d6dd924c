"""Encode and decode one frame: up to 1 MiB of a chunk's raw bytes.

A frame goes the way that a sample of it says is cheapest: *raw*; *intra* (elements rotated by one bit and split into
byte planes); *delta* (each element's difference to the base's, in the order of float values, split into byte planes);
or *zstd* (the whole frame). A plane is stored as a block: *raw*, *constant*, *masked* (a bitmap of the bytes unlike the
commonest, and those bytes), *sparse* (the gaps before those bytes, and the bytes) or *zstd* (used as an entropy coder).
The layout is in ``docs/objects.md``.

Everything that takes time lets go of the interpreter's lock. Scratch memory is kept and used again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import zstandard

from incckpt.codec import _planes
from incckpt.codec.environment import CODER
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
    "encode_chunks",
    "encode_text_frame",
]

FRAME_BYTES: Final = _planes.FRAME_BYTES
RAW, INTRA, DELTA, ZSTD = range(4)
WAYS: Final = ("raw", "intra", "delta", "zstd")
BLOCK_RAW, BLOCK_CONSTANT, BLOCK_MASKED, BLOCK_ZSTD, BLOCK_SPARSE = range(5)

_BLOCK = struct.Struct("<BI")
_SPARSE = struct.Struct("<BI")

# Encoder tuning, not format: decoders do not depend on it.
_WORTHWHILE = 0.97  # coded/raw size a block must reach to repay its decoding
_HUFFMAN_BITS = 1.0  # entropy per byte below which zstd wins: Huffman codes take at least a bit
_MASKED_SHARE = 0.31  # share of the commonest byte from which a mask beats plain Huffman, which spends 2 bits on it
_DELTA_GAIN = 0.985  # delta/intra cost below which a delta repays reading its base
_ZSTD_GAIN = 0.9  # zstd/planes cost below which zstd repays its slower decoding
_FEWEST = 64  # elements below which planes do not repay their headers


class CodedFrame(NamedTuple):
    """How a frame was coded.

    Attributes
    ----------
    way
        Index into `WAYS`.
    nbytes
        Coded bytes.
    full_nbytes
        Its size without a base: an estimate where `way` is a delta.
    """

    way: int
    nbytes: int
    full_nbytes: int


# ---- encoding --------------------------------------------------------------------------------------------------------


class _Encoder:
    """Compressors and scratch memory, for one call at a time."""

    def __init__(self) -> None:
        self._fast = zstandard.ZstdCompressor(level=1)
        self.general = zstandard.ZstdCompressor(level=3)
        # Blocks of fewer bits go to zstd, of which there are 8 at most.
        huffman_bits = _HUFFMAN_BITS if CODER == "huffman" else 8.0
        self._coder = _planes.Coder(_WORTHWHILE, huffman_bits, _MASKED_SHARE, _DELTA_GAIN, _ZSTD_GAIN, _FEWEST)

    def encode(
        self, chunks: Sequence[tuple[memoryview, memoryview | None, int, memoryview]]
    ) -> list[list[tuple[int, int, int]]]:
        return self._coder.encode(
            chunks, partial(_compress, self._fast), partial(_compress, self.general), _planes.BEST
        )


_idle: list[_Encoder] = []  # a stack: holds at most as many as ever ran at once


@contextmanager
def _encoder() -> Iterator[_Encoder]:
    try:
        encoder = _idle.pop()
    except IndexError:
        encoder = _Encoder()
    yield encoder
    _idle.append(encoder)


def _compress(compressor: zstandard.ZstdCompressor, data: Sequence[memoryview]) -> Iterator[zstandard.BufferSegment]:
    """Return each of `data`, none of them empty, coded in one call."""
    coded = compressor.multi_compress_to_buffer(list[bytes | bytearray | memoryview](data), threads=1)
    return (coded[i] for i in range(len(coded)))


def encode_chunks(
    chunks: Sequence[tuple[memoryview, memoryview | None, int, memoryview]],
) -> list[list[CodedFrame]]:
    """Encode the frames of chunks, each in the cheapest way.

    Takes and gives back the interpreter's lock one to three times, however many chunks there are: each time may put
    the training thread to sleep (docs/decisions/007).

    Parameters
    ----------
    chunks
        Of each: its raw bytes, ``uint8[n]``; those of the base, or ``None``; bytes of an element, 1, 2, 4 or 8; and
        where its frames go, end to end, ``uint8[n]``.
    """
    with _encoder() as encoder:
        return [[CodedFrame(*frame) for frame in frames] for frames in encoder.encode(chunks)]


def encode_text_frame(raw: memoryview, out: memoryview) -> CodedFrame:
    """Encode a frame, ``uint8[n]``, at the start of `out`, ``uint8[n]``, with zstd or stored raw."""
    with _encoder() as encoder:
        coded = encoder.general.compress(raw)
    if len(coded) < raw.nbytes:
        _planes.copy(coded, out[: len(coded)])
        return CodedFrame(ZSTD, len(coded), len(coded))
    _planes.copy(raw, out)
    return CodedFrame(RAW, raw.nbytes, raw.nbytes)


# ---- decoding --------------------------------------------------------------------------------------------------------


class _Decoder:
    """A decompressor and scratch memory, for one call at a time.

    Parameters
    ----------
    own
        Whether to try our own decoder before libzstd's.
    """

    def __init__(self, *, own: bool) -> None:
        self._own = own
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)
        # Not zeroed: what is not used is never touched.
        self._planes = np.empty(FRAME_BYTES + 8 * _planes.PLANE_GAP, np.uint8).data
        self._others = np.empty(FRAME_BYTES, np.uint8).data
        self._bitmap = np.empty(FRAME_BYTES // 8, np.uint8).data
        self._gaps = np.empty(FRAME_BYTES, np.uint8).data

    def planes(self, coded: memoryview, n: int, count: int) -> tuple[list[bytes | memoryview], int]:
        """Return `count` planes of `n` bytes, which may be scratch memory, and where their blocks end."""
        planes, at = [], 0
        for j in range(count):
            start = j * (n + _planes.PLANE_GAP)
            plane, at = self._read_block(coded, at, n, self._planes[start : start + n], masks=True)
            planes.append(plane)
        return planes, at

    def _read_block(
        self, coded: memoryview, at: int, n: int, scratch: memoryview, *, masks: bool
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
            if self._own and _planes.unhuffman(content, scratch, _planes.BEST):
                return scratch, end
            return self.inflate(content, n), end
        if kind == BLOCK_MASKED and masks and length >= 1:
            self._read_mask(content, n, scratch)
            return scratch, end
        if kind == BLOCK_SPARSE and masks and length >= _SPARSE.size:
            self._read_sparse(content, n, scratch)
            return scratch, end
        raise CodecError(f"a block of kind {kind} has {length} bytes for {n}")

    def _read_mask(self, content: memoryview, n: int, scratch: memoryview) -> None:
        """Put the `n` bytes of a masked block into `scratch`."""
        bitmap_nbytes = (n + 7) // 8
        bitmap, at = self._read_block(content, 1, bitmap_nbytes, self._bitmap[:bitmap_nbytes], masks=False)
        count = _planes.popcount(bitmap, _planes.BEST)
        if count > n:
            raise CodecError(f"a mask has {count} bits set for {n} bytes")
        others, at = self._read_block(content, at, count, self._others[:count], masks=False)
        if at != len(content):
            raise CodecError(f"a masked block is followed by {len(content) - at} bytes of its own")
        try:
            _planes.unmask(bitmap, others, content[0], scratch, _planes.BEST)
        except ValueError as error:
            raise CodecError(str(error)) from error

    def _read_sparse(self, content: memoryview, n: int, scratch: memoryview) -> None:
        """Put the `n` bytes of a sparse block into `scratch`."""
        common, gap_nbytes = _SPARSE.unpack_from(content)
        if gap_nbytes > n:
            raise CodecError(f"a sparse block has {gap_nbytes} gaps for {n} bytes")
        gaps, at = self._read_block(content, _SPARSE.size, gap_nbytes, self._gaps[:gap_nbytes], masks=False)
        count = _planes.gap_ends(gaps)
        others, at = self._read_block(content, at, count, self._others[:count], masks=False)
        if at != len(content):
            raise CodecError(f"a sparse block is followed by {len(content) - at} bytes of its own")
        try:
            _planes.fill_gaps(gaps, others, common, scratch)
        except ValueError as error:
            raise CodecError(str(error)) from error

    def inflate(self, coded: memoryview, nbytes: int) -> bytes:
        """Return the `nbytes` in a zstd frame; never allocate by the size it claims."""
        try:
            promised = zstandard.frame_content_size(coded)
            if promised != nbytes:
                raise CodecError(f"a zstd frame holds {promised} bytes, not {nbytes}")
            return self._decompressor.decompress(coded, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(str(error)) from error


_idle_decoders: dict[bool, list[_Decoder]] = {False: [], True: []}  # stacks, as above


def decode_frame(
    way: int, itemsize: int, coded: memoryview, base: memoryview | None, raw: memoryview, *, by_zstd: bool = False
) -> None:
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
    by_zstd
        Whether to bypass our own Huffman decoder.

    Raises
    ------
    CodecError
        If these are not the coded bytes of a frame of that size.
    """
    if way == RAW:
        if len(coded) != len(raw):
            raise CodecError(f"{len(coded)} bytes are stored for {len(raw)}")
        _planes.copy(coded, raw)
        return
    own = CODER == "huffman" and not by_zstd
    idle = _idle_decoders[own]
    try:
        decoder = idle.pop()
    except IndexError:
        decoder = _Decoder(own=own)
    try:
        _decode(decoder, way, itemsize, coded, base, raw)
    finally:
        idle.append(decoder)


def _decode(
    decoder: _Decoder, way: int, itemsize: int, coded: memoryview, base: memoryview | None, raw: memoryview
) -> None:
    if way == ZSTD:
        _planes.copy(decoder.inflate(coded, len(raw)), raw)
    else:
        n = len(raw) // itemsize
        body, tail = raw[: n * itemsize], raw[n * itemsize :]
        planes, at = decoder.planes(coded, n, itemsize)
        if len(coded) - at != len(tail):
            raise CodecError(f"{len(coded) - at} bytes follow the planes, not {len(tail)}")
        if way == INTRA:
            base = None
        elif base is None:
            raise CodecError("it is a delta, and there is no base")
        _planes.join(planes, None if base is None else base[: len(body)], body, _planes.BEST)
        tail[:] = coded[at:]
