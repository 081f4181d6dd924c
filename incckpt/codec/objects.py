"""A chunk's raw bytes to an object's bytes, and back; the layout is in ``docs/objects.md``.

An object is a header and the chunk's frames, each coded on its own by :mod:`incckpt.codec.frames`. The header has the
SHA-256 digest of every frame's raw bytes, and the digest of those is the chunk's identity: it does not depend on how
anything is coded.

Calls run on the caller's thread and let go of the interpreter's lock in everything that takes time, so a pool of
threads codes as many chunks at once as there are cores.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from incckpt.codec.digests import frame_digests
from incckpt.codec.frames import (
    DELTA,
    FRAME_BYTES,
    RAW,
    WAYS,
    CodedFrame,
    decode_frame,
    encode_chunks,
    encode_text_frame,
)
from incckpt.errors import CodecError

__all__ = [
    "FRAME_BYTES",
    "WAYS",
    "Base",
    "Buffer",
    "Digest",
    "Encoded",
    "Header",
    "Source",
    "WayBytes",
    "decode",
    "decode_document",
    "decode_frames",
    "decode_in_place",
    "digest",
    "digest_many",
    "encode",
    "encode_document",
    "encode_many",
    "encode_text",
    "header_nbytes",
    "max_nbytes",
    "read_header",
]

Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

MAGIC: Final = b"\x93inc"
FORMAT: Final = 1

_HEAD = struct.Struct("<4sBBBBQ32s")
_ENTRY = struct.Struct("<B3sI32s")
_CHECK = struct.Struct("<I")
_HAS_BASE = 1
_NO_BASE = bytes(32)
_NO_PADDING = bytes(3)


class Digest(NamedTuple):
    """SHA-256 of a chunk's raw bytes.

    Attributes
    ----------
    identity
        SHA-256 of `frames`: what the chunk means, however it is stored.
    frames
        The digests of its frames of `FRAME_BYTES`, 32 bytes each, end to end.
    """

    identity: bytes
    frames: bytes


class Base(NamedTuple):
    """The content that a delta is against.

    Attributes
    ----------
    identity
        Its identity, 32 bytes.
    raw
        Its raw bytes, as many as the chunk has.
    """

    identity: bytes
    raw: Buffer


class WayBytes(NamedTuple):
    """Raw and stored bytes of the frames that went one way."""

    raw: int
    stored: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """An object, ready to be put.

    Attributes
    ----------
    data
        The object's bytes, no more than `max_nbytes` of the chunk's; a view of the `out` that `encode` got, if any.
    base
        Identity of the base, or ``None`` if no frame is a delta: the object is a full one then.
    ways
        For each of `WAYS` that frames went, their raw and stored bytes.
    full_nbytes
        About what `data` would be without a base, in bytes; an estimate from samples where frames are deltas.
    """

    data: memoryview
    base: bytes | None
    ways: dict[str, WayBytes]
    full_nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What an object says of itself.

    Attributes
    ----------
    itemsize
        Bytes of an element: 1, 2, 4 or 8.
    nbytes
        Raw bytes.
    base
        Identity of the base, or ``None`` for a full object.
    ways
        Way of each frame, an index into `WAYS`.
    offsets
        Where each frame's coded bytes begin in the object, and behind the last, where the object ends.
    digests
        The frames' digests, 32 bytes each, end to end.
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
        """Return the frames that raw bytes ``[start, stop)`` lie in."""
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"no bytes [{start}, {stop}) in a chunk of {self.nbytes}")
        return range(start // FRAME_BYTES, -(-stop // FRAME_BYTES)) if start < stop else range(0)

    def raw_span(self, frames: range) -> tuple[int, int]:
        """Return where the raw bytes of consecutive `frames` begin and end in the chunk."""
        return (frames.start * FRAME_BYTES, min(frames.stop * FRAME_BYTES, self.nbytes)) if frames else (0, 0)

    def coded_span(self, frames: range) -> tuple[int, int]:
        """Return where the coded bytes of consecutive `frames` begin and end in the object: what to fetch."""
        return (self.offsets[frames.start], self.offsets[frames.stop]) if frames else (0, 0)


def header_nbytes(nbytes: int) -> int:
    """Return the size of the header of an object of `nbytes` raw bytes."""
    return _HEAD.size + _ENTRY.size * -(-nbytes // FRAME_BYTES) + _CHECK.size


def max_nbytes(nbytes: int) -> int:
    """Return the most bytes that an object of `nbytes` raw bytes can have."""
    return header_nbytes(nbytes) + nbytes


def digest(raw: Buffer) -> Digest:
    """Return the digests of a chunk.

    Parameters
    ----------
    raw
        ``uint8[n]``, contiguous.
    """
    return digest_many([raw])[0]


def digest_many(chunks: Sequence[Buffer]) -> list[Digest]:
    """Return the digests of chunks, as `digest` does of one; the interpreter's lock is handed over once for all."""
    return [Digest(hashlib.sha256(frames).digest(), frames) for frames in frame_digests([_view(raw) for raw in chunks])]


def _view(data: Buffer) -> memoryview:
    """Return the bytes of `data`, flat, without a copy."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


def _spans(nbytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, nbytes, FRAME_BYTES):
        yield start, min(start + FRAME_BYTES, nbytes)


# ---- encoding --------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A chunk to be coded.

    Attributes
    ----------
    raw
        ``uint8[n]``, contiguous, at any address.
    itemsize
        Bytes of an element (of a component, if they are complex): 1, 2, 4 or 8; 16 is taken for two of 8. A matter of
        size and speed only: any bytes can be coded at any of them.
    digest
        What `digest` returned for `raw`.
    base
        What frames may be coded as a delta against.
    out
        Memory to write the object to, at least `max_nbytes` of ``n``; new memory by default.
    """

    raw: Buffer
    itemsize: int
    digest: Digest
    base: Base | None = None
    out: Buffer | None = None


class _Object:
    """An object to be: memory for it, in which the frames come first and the header last."""

    def __init__(self, raw: memoryview, digest: Digest, out: Buffer | None) -> None:
        self.raw, self.digest = raw, digest
        if len(digest.frames) != 32 * len(range(0, len(raw), FRAME_BYTES)):
            raise ValueError(f"{len(digest.frames) // 32} frame digests cannot be those of {len(raw)} bytes")
        room = max_nbytes(len(raw))
        self.out = _view(np.empty(room, np.uint8) if out is None else out)
        if len(self.out) < room or self.out.readonly:
            raise ValueError(f"`out` must be writable, of at least {room} bytes")
        self._frames_at = header_nbytes(len(raw))
        self.frames_out = self.out[self._frames_at : room]

    def finish(self, frames: Sequence[CodedFrame], itemsize: int, base: bytes) -> Encoded:
        """Write the header."""
        delta = any(frame.way == DELTA for frame in frames)
        head = (itemsize, _HAS_BASE, 0, len(self.raw), base) if delta else (itemsize, 0, 0, len(self.raw), _NO_BASE)
        _HEAD.pack_into(self.out, 0, MAGIC, FORMAT, *head)
        at, end = _HEAD.size, self._frames_at
        totals: dict[str, WayBytes] = {}
        for i, ((start, stop), frame) in enumerate(zip(_spans(len(self.raw)), frames, strict=True)):
            frame_digest = self.digest.frames[32 * i : 32 * i + 32]
            _ENTRY.pack_into(self.out, at, frame.way, _NO_PADDING, frame.nbytes, frame_digest)
            at += _ENTRY.size
            end += frame.nbytes
            total = totals.get(WAYS[frame.way], WayBytes(0, 0))
            totals[WAYS[frame.way]] = WayBytes(total.raw + stop - start, total.stored + frame.nbytes)
        _CHECK.pack_into(self.out, at, zlib.crc32(self.out[:at]))
        full_nbytes = self._frames_at + sum(frame.full_nbytes for frame in frames)
        return Encoded(self.out[:end], base if delta else None, totals, full_nbytes)


def encode(
    raw: Buffer, itemsize: int, *, digest: Digest, base: Base | None = None, out: Buffer | None = None
) -> Encoded:
    """Return the object of a chunk; the arguments are those of a `Source`.

    Raises
    ------
    ValueError
        If the arguments do not fit each other.
    """
    return encode_many([Source(raw, itemsize, digest, base, out)])[0]


def encode_many(sources: Sequence[Source]) -> list[Encoded]:
    """Return the objects of chunks; the interpreter's lock is handed over one to three times for all.

    Raises
    ------
    ValueError
        If the arguments of one do not fit each other.
    """
    objects: list[_Object] = []
    chunks: list[tuple[memoryview, memoryview | None, int, memoryview]] = []
    for source in sources:
        if source.itemsize not in (1, 2, 4, 8, 16):
            raise ValueError(f"itemsize must be 1, 2, 4, 8 or 16, not {source.itemsize}")
        raw = _view(source.raw)
        identity, before = (_NO_BASE, None) if source.base is None else (source.base.identity, _view(source.base.raw))
        if len(identity) != 32 or (before is not None and len(before) != len(raw)):
            raise ValueError(f"the base must have an identity of 32 bytes, and {len(raw)} raw bytes as the chunk has")
        objects.append(_Object(raw, source.digest, source.out))
        chunks.append((raw, before, min(source.itemsize, 8), objects[-1].frames_out))
    return [
        one.finish(frames, min(source.itemsize, 8), _NO_BASE if source.base is None else source.base.identity)
        for one, frames, source in zip(objects, encode_chunks(chunks), sources, strict=True)
    ]


def encode_document(raw: Buffer, *, digest: Digest) -> bytes:
    """Return the object of a document, such as a manifest; the arguments are those of `encode_text`."""
    return encode_text(raw, digest=digest).data.tobytes()


def encode_text(raw: Buffer, *, digest: Digest, out: Buffer | None = None) -> Encoded:
    """Return the object of text, or of what repeats itself as text does: frames go the way of zstd; see `Source`."""
    view = _view(raw)
    coded = _Object(view, digest, out)
    frames: list[CodedFrame] = []
    at = 0
    for start, stop in _spans(len(view)):
        frames.append(encode_text_frame(view[start:stop], coded.frames_out[at : at + stop - start]))
        at += frames[-1].nbytes
    return coded.finish(frames, 1, _NO_BASE)


# ---- decoding --------------------------------------------------------------------------------------------------------


def read_header(data: Buffer) -> Header:
    """Return the header that an object begins with, after checking it.

    Parameters
    ----------
    data
        The object, or its beginning, of at least `header_nbytes` of the chunk's size.

    Raises
    ------
    CodecError
        If it is not the header of an object, or not as it was written.
    """
    view = _view(data)
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
        raise CodecError("the header is damaged: its check sum is wrong")
    if itemsize not in (1, 2, 4, 8) or flags > _HAS_BASE or reserved or (base != _NO_BASE and not flags):
        raise CodecError(f"the header makes no sense: element size {itemsize}, flags {flags}, reserved {reserved}")
    ways, offsets, digests = [], [size], []
    for i, (start, stop) in enumerate(_spans(nbytes)):
        way, padding, coded, frame_digest = _ENTRY.unpack_from(view, _HEAD.size + _ENTRY.size * i)
        if way >= len(WAYS) or (way == DELTA and not flags) or padding != _NO_PADDING or coded > stop - start:
            raise CodecError(f"the header makes no sense: frame {i} of way {way} with {coded} coded bytes")
        ways.append(way)
        offsets.append(offsets[-1] + coded)
        digests.append(frame_digest)
    return Header(itemsize, nbytes, base if flags else None, tuple(ways), tuple(offsets), b"".join(digests))


def decode(data: Buffer, out: Buffer, *, identity: bytes, base: Base | None = None, verify: bool = True) -> None:
    """Fill `out` with the raw bytes of an object.

    Parameters
    ----------
    data
        The whole object.
    out
        ``uint8[n]``, contiguous and writable, ``n`` the object's raw bytes. May be the base's own memory. Undefined if
        an error is raised.
    identity
        What the raw bytes have to be.
    base
        The base, where the object is a delta.
    verify
        Whether to hash what was decoded. Without it, damage that leaves the frames decodable goes unnoticed.

    Raises
    ------
    CodecError
        If the object is damaged, is another one, or needs a base that it was not given.
    """
    view = _view(data)
    header = read_header(view)
    if header.identity != identity:
        raise CodecError(f"the object holds {header.identity.hex()}, not {identity.hex()}")
    if header.offsets[-1] != len(view):
        raise CodecError(f"the object has {len(view)} bytes, where its header says {header.offsets[-1]}")
    decode_frames(header, range(len(header.ways)), view[header.offsets[0] :], out, base=base, verify=verify)


def decode_in_place(head: Buffer, out: Buffer, *, identity: bytes, verify: bool = True) -> None:
    """Turn coded bytes into raw ones where they are: of an object that is as long as its raw bytes and their header.

    Parameters
    ----------
    head
        The object's header.
    out
        ``uint8[n]``, contiguous and writable: the rest of the object. Undefined if an error is raised.
    identity, verify
        As for `decode`.

    Raises
    ------
    CodecError
        As `decode`.
    """
    view = _view(out)
    header = read_header(head)
    if header.identity != identity:
        raise CodecError(f"the object holds {header.identity.hex()}, not {identity.hex()}")
    if header.nbytes != len(view) or header.base is not None or any(way != RAW for way in header.ways):
        decode(bytes(head) + bytes(view), out, identity=identity, verify=verify)
    elif verify and (digests := frame_digests([view])[0]) != header.digests:
        frame = next(i for i in range(len(header.ways)) if digests[32 * i :][:32] != header.digests[32 * i :][:32])
        raise CodecError(f"frame {frame} ({WAYS[RAW]}) is damaged: its digest is wrong")


def decode_frames(
    header: Header, frames: range, coded: Buffer, out: Buffer, *, base: Base | None = None, verify: bool = True
) -> None:
    """Fill `out` with the raw bytes of consecutive frames of an object.

    Parameters
    ----------
    header
        The object's. Whether its ``identity`` is the one wanted is for the caller to see.
    frames
        Which ones; see ``header.frames``.
    coded
        The object's bytes ``header.coded_span(frames)``.
    out
        ``uint8[m]``, contiguous and writable, for the chunk's raw bytes ``header.raw_span(frames)``. May be the base's
        own memory. Undefined if an error is raised.
    base
        The base's identity and, of its raw bytes, those of the same span; where the object is a delta.
    verify
        Whether to hash what was decoded.

    Raises
    ------
    CodecError
        As `decode`.
    """
    source, target = _view(coded), _view(out)
    origin, end = header.raw_span(frames)
    coded_origin, coded_end = header.coded_span(frames)
    if len(target) != end - origin:
        raise CodecError(f"the object has {end - origin} raw bytes, where {len(target)} are expected")
    if len(source) != coded_end - coded_origin:
        raise CodecError(f"there are {len(source)} coded bytes, where the header says {coded_end - coded_origin}")
    before = _base_of(header, base, len(target))
    for i in frames:
        start, stop = i * FRAME_BYTES - origin, min((i + 1) * FRAME_BYTES, end) - origin
        piece = source[header.offsets[i] - coded_origin : header.offsets[i + 1] - coded_origin]
        raw = target[start:stop]
        try:
            decode_frame(header.ways[i], header.itemsize, piece, None if before is None else before[start:stop], raw)
        except CodecError as error:
            raise CodecError(f"frame {i} ({WAYS[header.ways[i]]}) is damaged: {error}") from error
        if verify and hashlib.sha256(raw).digest() != header.digests[32 * i : 32 * i + 32]:
            raise CodecError(f"frame {i} ({WAYS[header.ways[i]]}) is damaged: its digest is wrong")


def _base_of(header: Header, base: Base | None, nbytes: int) -> memoryview | None:
    """Return the raw bytes of the base that `header` names."""
    if header.base is None:
        return None
    if base is None:
        raise CodecError(f"the object is a delta against {header.base.hex()}, which is needed to decode it")
    if base.identity != header.base:
        raise CodecError(f"the object is a delta against {header.base.hex()}, not against {base.identity.hex()}")
    view = _view(base.raw)
    if len(view) != nbytes:
        raise CodecError(f"the base has {len(view)} raw bytes, where the object has {nbytes}")
    return view


def decode_document(data: Buffer, max_bytes: int, identity: bytes | None = None) -> bytes:
    """Return the bytes of a document, verified.

    Parameters
    ----------
    data
        The whole object.
    max_bytes
        The most that the document may have.
    identity
        What it has to be; by default only the object's own digests are held against it.

    Raises
    ------
    CodecError
        If the object is damaged, is another one, is a delta, or is too large.
    """
    header = read_header(data)
    if header.nbytes > max_bytes:
        raise CodecError(f"a document of {header.nbytes} bytes is too large: at most {max_bytes} are read")
    out = bytearray(header.nbytes)
    decode(data, out, identity=header.identity if identity is None else identity)
    return bytes(out)
