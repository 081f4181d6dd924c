"""The header of an object: each frame's way of coding, coded bytes and digest.

The layout is in ``docs/objects.md``.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from incckpt.codec.frames import DELTA, FRAME_BYTES, WAYS
from incckpt.errors import CodecError

__all__ = ["Buffer", "Header", "flat", "header_nbytes", "max_nbytes", "read_header", "spans", "write_header"]

Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

MAGIC: Final = b"\x93inc"
FORMAT: Final = 1

_HEAD = struct.Struct("<4sBBBBQ32s")
_ENTRY = struct.Struct("<B3sI32s")
_CHECK = struct.Struct("<I")
_HAS_BASE = 1
_NO_BASE = bytes(32)
_NO_PADDING = bytes(3)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an object.

    Attributes
    ----------
    itemsize
        Bytes of an element: 1, 2, 4 or 8.
    nbytes
        Length of the raw bytes.
    base
        Identity of the base, or ``None`` for a full object.
    ways
        How each frame is coded, as an index into `WAYS`.
    offsets
        Where each frame's coded bytes begin in the object; the last element is the object's size.
    digests
        The frames' digests, 32 bytes each, concatenated.
    """

    itemsize: int
    nbytes: int
    base: bytes | None
    ways: tuple[int, ...]
    offsets: tuple[int, ...]
    digests: bytes

    @property
    def identity(self) -> bytes:
        """Identity of the raw bytes."""
        return hashlib.sha256(self.digests).digest()

    def frames(self, start: int, stop: int) -> range:
        """Return the frames that contain raw bytes ``[start, stop)``."""
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"no bytes [{start}, {stop}) in a chunk of {self.nbytes}")
        return range(start // FRAME_BYTES, -(-stop // FRAME_BYTES)) if start < stop else range(0)

    def raw_span(self, frames: range) -> tuple[int, int]:
        """Return where the raw bytes of consecutive `frames` begin and end in the chunk."""
        return (frames.start * FRAME_BYTES, min(frames.stop * FRAME_BYTES, self.nbytes)) if frames else (0, 0)

    def coded_span(self, frames: range) -> tuple[int, int]:
        """Return where the coded bytes of consecutive `frames` begin and end in the object: the range to fetch."""
        return (self.offsets[frames.start], self.offsets[frames.stop]) if frames else (0, 0)


def header_nbytes(nbytes: int) -> int:
    """Return the size of the header of an object of `nbytes` raw bytes."""
    return _HEAD.size + _ENTRY.size * -(-nbytes // FRAME_BYTES) + _CHECK.size


def max_nbytes(nbytes: int) -> int:
    """Return the largest size of an object of `nbytes` raw bytes."""
    return header_nbytes(nbytes) + nbytes


def flat(data: Buffer) -> memoryview:
    """Return a flat view of the bytes of `data`."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


def spans(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield where each frame of `nbytes` raw bytes begins and ends."""
    for start in range(0, nbytes, FRAME_BYTES):
        yield start, min(start + FRAME_BYTES, nbytes)


def write_header(
    out: memoryview, itemsize: int, nbytes: int, base: bytes | None, frames: Sequence[tuple[int, int]], digests: bytes
) -> None:
    """Write the header of an object to the first bytes of `out`.

    Parameters
    ----------
    itemsize, nbytes, base, digests
        As in `Header`.
    frames
        Way and coded length of each frame.
    """
    _HEAD.pack_into(out, 0, MAGIC, FORMAT, itemsize, 0 if base is None else _HAS_BASE, 0, nbytes, base or _NO_BASE)
    at = _HEAD.size
    for i, (way, coded_nbytes) in enumerate(frames):
        _ENTRY.pack_into(out, at, way, _NO_PADDING, coded_nbytes, digests[32 * i : 32 * i + 32])
        at += _ENTRY.size
    _CHECK.pack_into(out, at, zlib.crc32(out[:at]))


def read_header(data: Buffer) -> Header:
    """Return an object's header, checked.

    Parameters
    ----------
    data
        The object, or at least its first ``header_nbytes(nbytes)`` bytes.

    Raises
    ------
    CodecError
        If this is not a header, or a damaged one.
    """
    view = flat(data)
    if len(view) < header_nbytes(0):
        raise CodecError(f"not an object: {len(view)} bytes are fewer than any header has")
    magic, version, itemsize, flags, reserved, nbytes, base = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise CodecError(f"not an object: it begins with {magic!r}, not with {MAGIC!r}")
    if version != FORMAT:
        raise CodecError(f"the object is of format {version}, and this version reads format {FORMAT}")
    size = header_nbytes(nbytes)
    if len(view) < size:
        raise CodecError(f"the header of {nbytes} raw bytes takes {size} bytes, and there are {len(view)}")
    (check,) = _CHECK.unpack_from(view, size - _CHECK.size)
    if zlib.crc32(view[: size - _CHECK.size]) != check:
        raise CodecError("the header is damaged: its checksum is wrong")
    if itemsize not in (1, 2, 4, 8) or flags > _HAS_BASE or reserved or (base != _NO_BASE and not flags):
        raise CodecError(f"the header is invalid: element size {itemsize}, flags {flags}, reserved {reserved}")
    ways, offsets, digests = [], [size], []
    for i, (start, stop) in enumerate(spans(nbytes)):
        way, padding, coded, frame_digest = _ENTRY.unpack_from(view, _HEAD.size + _ENTRY.size * i)
        if way >= len(WAYS) or (way == DELTA and not flags) or padding != _NO_PADDING or coded > stop - start:
            raise CodecError(f"the header is invalid: frame {i} of way {way} with {coded} coded bytes")
        ways.append(way)
        offsets.append(offsets[-1] + coded)
        digests.append(frame_digest)
    return Header(itemsize, nbytes, base if flags else None, tuple(ways), tuple(offsets), b"".join(digests))
