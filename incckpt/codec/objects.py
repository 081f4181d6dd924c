"""Encode a chunk's raw bytes as an object, and decode them; for the layout see ``docs/objects.md``.

An object is a header and the chunk's frames, each coded on its own by :mod:`incckpt.codec.frames`. The header has the
SHA-256 digest of every frame's raw bytes, and the digest of those is the chunk's identity: it does not depend on how
anything is coded.

Calls run on the caller's thread and let go of the interpreter's lock in everything that takes time, so a pool of
threads codes as many chunks at once as there are cores.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from incckpt.codec.digests import frame_digests
from incckpt.codec.environment import VERIFY_WRITES
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
from incckpt.codec.header import Buffer, Header, flat, header_nbytes, max_nbytes, read_header, spans, write_header
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

log = logging.getLogger(__name__)

_faults = itertools.count()  # of the coder; only the first is logged


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
    """The content a delta is computed against.

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
    """Raw and stored bytes of the frames coded in one way."""

    raw: int
    stored: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """An object, ready to store.

    Attributes
    ----------
    data
        The object's bytes, no more than `max_nbytes` of the chunk's; a view of the `out` that `encode` got, if any.
    base
        Identity of the base, or ``None`` if no frame is a delta, so that the object is full.
    ways
        Raw and stored bytes for each of the `WAYS` used.
    full_nbytes
        About what `data` would be without a base, in bytes; an estimate from samples where frames are deltas.
    """

    data: memoryview
    base: bytes | None
    ways: dict[str, WayBytes]
    full_nbytes: int


def digest(raw: Buffer) -> Digest:
    """Return the digests of a chunk.

    Parameters
    ----------
    raw
        ``uint8[n]``, contiguous.
    """
    return digest_many([raw])[0]


def digest_many(chunks: Sequence[Buffer]) -> list[Digest]:
    """Return the digests of chunks, like `digest`, but release the GIL only once for all of them."""
    return [Digest(hashlib.sha256(frames).digest(), frames) for frames in frame_digests([flat(raw) for raw in chunks])]


# ---- encoding --------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A chunk to encode.

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
    """An object being written: the frames go in first, the header last."""

    def __init__(self, raw: memoryview, digest: Digest, out: Buffer | None) -> None:
        self.raw, self.digest = raw, digest
        if len(digest.frames) != 32 * len(range(0, len(raw), FRAME_BYTES)):
            raise ValueError(f"{len(digest.frames) // 32} frame digests cannot be those of {len(raw)} bytes")
        room = max_nbytes(len(raw))
        self.out = flat(np.empty(room, np.uint8) if out is None else out)
        if len(self.out) < room or self.out.readonly:
            raise ValueError(f"`out` must be writable, of at least {room} bytes")
        self._frames_at = header_nbytes(len(raw))
        self.frames_out = self.out[self._frames_at : room]

    def finish(self, frames: Sequence[CodedFrame], itemsize: int, base: Base | None) -> Encoded:
        """Write the header; if writes are verified, store the whole chunk raw if it fails to decode."""
        encoded = self._write_header(frames, itemsize, base)
        if VERIFY_WRITES and (fault := self._fault(encoded.data, base)):
            if next(_faults) == 0:
                log.error(
                    "the chunk %s of %d bytes was coded wrongly and is stored uncoded: %s. Please report this; "
                    "INCCKPT_CODEC=zstd avoids incckpt's own coder. Further cases are not logged",
                    self.digest.identity.hex(),
                    len(self.raw),
                    fault,
                )
            self.frames_out[:] = self.raw
            sizes = [stop - start for start, stop in spans(len(self.raw))]
            encoded = self._write_header([CodedFrame(RAW, size, size) for size in sizes], itemsize, None)
        return encoded

    def _write_header(self, frames: Sequence[CodedFrame], itemsize: int, base: Base | None) -> Encoded:
        identity = base.identity if base is not None and any(frame.way == DELTA for frame in frames) else None
        entries = [(frame.way, frame.nbytes) for frame in frames]
        write_header(self.out, itemsize, len(self.raw), identity, entries, self.digest.frames)
        totals: dict[str, WayBytes] = {}
        for (start, stop), frame in zip(spans(len(self.raw)), frames, strict=True):
            total = totals.get(WAYS[frame.way], WayBytes(0, 0))
            totals[WAYS[frame.way]] = WayBytes(total.raw + stop - start, total.stored + frame.nbytes)
        end = self._frames_at + sum(frame.nbytes for frame in frames)
        full_nbytes = self._frames_at + sum(frame.full_nbytes for frame in frames)
        return Encoded(self.out[:end], identity, totals, full_nbytes)

    def _fault(self, data: memoryview, base: Base | None) -> str | None:
        """Decode `data` with libzstd; return why it does not match the raw bytes, or ``None`` if it does."""
        scratch = np.empty(min(len(self.raw), FRAME_BYTES), np.uint8)
        try:
            header = read_header(data)
            for i, (start, stop) in enumerate(spans(len(self.raw))):
                frame = range(i, i + 1)
                coded = data[slice(*header.coded_span(frame))]
                before = None if base is None else Base(base.identity, flat(base.raw)[start:stop])
                found = scratch[: stop - start]
                decode_frames(header, frame, coded, found, base=before, verify=False, by_zstd=True)
                if not np.array_equal(found, np.frombuffer(self.raw[start:stop], np.uint8)):
                    return f"frame {i} ({WAYS[header.ways[i]]}) decodes to other bytes"
        except CodecError as error:
            return str(error)
        return None


def encode(
    raw: Buffer, itemsize: int, *, digest: Digest, base: Base | None = None, out: Buffer | None = None
) -> Encoded:
    """Return the object of a chunk; the arguments are those of a `Source`.

    Raises
    ------
    ValueError
        If the arguments are inconsistent.
    """
    return encode_many([Source(raw, itemsize, digest, base, out)])[0]


def encode_many(sources: Sequence[Source]) -> list[Encoded]:
    """Return the objects of chunks; the GIL is released one to three times in total.

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
        raw = flat(source.raw)
        before = None if source.base is None else flat(source.base.raw)
        if source.base is not None and (len(source.base.identity) != 32 or before is None or len(before) != len(raw)):
            raise ValueError(f"the base must have an identity of 32 bytes, and {len(raw)} raw bytes as the chunk has")
        objects.append(_Object(raw, source.digest, source.out))
        chunks.append((raw, before, min(source.itemsize, 8), objects[-1].frames_out))
    return [
        one.finish(frames, min(source.itemsize, 8), source.base)
        for one, frames, source in zip(objects, encode_chunks(chunks), sources, strict=True)
    ]


def encode_document(raw: Buffer, *, digest: Digest) -> bytes:
    """Return the object of a document, such as a manifest; the arguments are those of `encode_text`."""
    return encode_text(raw, digest=digest).data.tobytes()


def encode_text(raw: Buffer, *, digest: Digest, out: Buffer | None = None) -> Encoded:
    """Return the object of text or similarly repetitive data, coded with zstd; see `Source`."""
    view = flat(raw)
    coded = _Object(view, digest, out)
    frames: list[CodedFrame] = []
    at = 0
    for start, stop in spans(len(view)):
        frames.append(encode_text_frame(view[start:stop], coded.frames_out[at : at + stop - start]))
        at += frames[-1].nbytes
    return coded.finish(frames, 1, None)


# ---- decoding --------------------------------------------------------------------------------------------------------


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
        Identity the raw bytes must have.
    base
        The base, where the object is a delta.
    verify
        Whether to hash what was decoded. Without it, damage that leaves the frames decodable goes unnoticed.

    Raises
    ------
    CodecError
        If the object is damaged, is another one, or needs a base that it was not given.
    """
    view = flat(data)
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
    view = flat(out)
    header = read_header(head)
    if header.identity != identity:
        raise CodecError(f"the object holds {header.identity.hex()}, not {identity.hex()}")
    if header.nbytes != len(view) or header.base is not None or any(way != RAW for way in header.ways):
        decode(bytes(head) + bytes(view), out, identity=identity, verify=verify)
    elif verify:
        _check(header, range(len(header.ways)), view)


def decode_frames(
    header: Header,
    frames: range,
    coded: Buffer,
    out: Buffer,
    *,
    base: Base | None = None,
    verify: bool = True,
    by_zstd: bool = False,
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
    by_zstd
        Whether to bypass our own decoder; true is the default only under ``INCCKPT_CODEC=zstd``.

    Raises
    ------
    CodecError
        As `decode`.
    """
    source, target = flat(coded), flat(out)
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
        its_base = None if before is None else before[start:stop]
        try:
            decode_frame(header.ways[i], header.itemsize, piece, its_base, raw, by_zstd=by_zstd)
        except CodecError as error:
            raise CodecError(f"frame {i} ({WAYS[header.ways[i]]}) is damaged: {error}") from error
    if verify:
        _check(header, frames, target)


def _check(header: Header, frames: range, raw: memoryview) -> None:
    """Raise `CodecError` unless consecutive frames have the digests that `header` says."""
    found = frame_digests([raw])[0]
    right = header.digests[32 * frames.start : 32 * frames.stop]
    if found != right:
        i = next(i for i, at in enumerate(range(0, len(right), 32), frames.start) if found[at:][:32] != right[at:][:32])
        raise CodecError(f"frame {i} ({WAYS[header.ways[i]]}) is damaged: its digest is wrong")


def _base_of(header: Header, base: Base | None, nbytes: int) -> memoryview | None:
    """Return the raw bytes of the base that `header` names."""
    if header.base is None:
        return None
    if base is None:
        raise CodecError(f"the object is a delta against {header.base.hex()}, which is needed to decode it")
    if base.identity != header.base:
        raise CodecError(f"the object is a delta against {header.base.hex()}, not against {base.identity.hex()}")
    view = flat(base.raw)
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
        Maximum size of the document.
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
