"""The manifest, the immutable document that describes a checkpoint: frozen dataclasses <-> JSON, checked on read.

``docs/format.md`` is the specification of the JSON written here.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import numpy as np

from incckpt.errors import CorruptionError
from incckpt.messages import shown
from incckpt.state.entries import MAX_DIMENSIONS
from incckpt.store.blocks import Block, Int64s, cut, fault, overlap, row_major, runs
from incckpt.store.document import (
    Fields,
    Json,
    JsonList,
    as_mapping,
    decode_float,
    decode_metrics,
    dump_document,
    encode_float,
    encode_metrics,
    is_count,
    parse_document,
)

__all__ = [
    "DELTA_DIGITS",
    "Chunk",
    "Manifest",
    "Range",
    "Stored",
    "chunk_from_json",
    "chunk_to_json",
    "range_from_json",
    "range_to_json",
]

_IDENTITY = re.compile(r"[0-9a-f]{64}")
_NONCE = re.compile(r"[0-9a-f]{16}")
_ITEMSIZES = (1, 2, 4, 8, 16)
_ALL_DIGITS = 64

_Item = TypeVar("_Item")

DELTA_DIGITS = 32
"""Digits of the base's identity in a delta's name: 128 bits tell the bases of a chunk apart, and file systems that
encrypt names (eCryptfs) allow only 143 bytes. Manifests of format 1 have all 64."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The full object that a delta is against.

    Attributes
    ----------
    identity, nonce, size
        Its chunk's identity, the nonce of the save that put it, and its size in bytes.
    digits
        The number of digits of `identity` in the delta's name.
    """

    identity: str
    nonce: str
    size: int
    digits: int = DELTA_DIGITS


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a checkpoint.

    Attributes
    ----------
    identity
        Identity of its raw bytes (64 hexadecimal digits).
    nbytes
        Raw length.
    itemsize
        Element size for the codec, in bytes.
    nonce, size
        Of the object that stores it.
    base
        The full object that the object is a delta against, or ``None``.
    """

    identity: str
    nbytes: int
    itemsize: int
    nonce: str
    size: int
    base: Stored | None = None


@dataclass(frozen=True)
class Range:
    """A byte range of tensor memory.

    Attributes
    ----------
    nbytes, itemsize
        Length, and element size for the codec.
    pieces
        Where its bytes are: ``(chunk index, offset there, bytes)``; end to end they are the range, or its blocks.
    shape, blocks
        Of a range that several processes wrote: an array of bytes of that shape, and its boxes, whose bytes `pieces`
        hold one box after the other. Otherwise empty.
    """

    nbytes: int
    itemsize: int
    pieces: tuple[tuple[int, int, int], ...]
    shape: tuple[int, ...] = ()
    blocks: tuple[Block, ...] = ()

    def part(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the pieces of the bytes ``[start, stop)``."""
        if not self.blocks:
            yield from self.stored(start, stop)
            return
        starts, sources, lengths = self._runs
        for index in range(int(np.searchsorted(starts, start, "right")) - 1, int(np.searchsorted(starts, stop))):
            first, source, nbytes = int(starts[index]), int(sources[index]), int(lengths[index])
            low, high = max(start, first), min(stop, first + nbytes)
            yield from self.stored(source + low - first, source + high - first)

    def boxes(self, wanted: Block, shape: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...], Block]]:
        """Yield which bytes of which chunks fill a box of the range.

        Parameters
        ----------
        wanted
            The box, of the range seen as an array of bytes.
        shape
            Of that array; if the range has blocks, theirs.

        Yields
        ------
        chunk, offset, strides, box
            A box of the array, and where it is in a chunk: its first byte, and the bytes between neighbours.
        """
        before = 0
        for block in self.blocks or (Block((0,) * len(shape), shape),):
            nbytes = math.prod(block.shape)
            if overlap(block, wanted) is not None:
                strides = row_major(block.shape)
                position = 0
                for chunk, offset, length in self.stored(before, before + nbytes):
                    for at, size in cut(block.shape, position, position + length):
                        place = Block(tuple(a + b for a, b in zip(block.at, at, strict=True)), size)
                        inner = overlap(place, wanted)
                        if inner is not None:
                            steps = zip(inner.at, block.at, strides, strict=True)
                            here = sum((a - b) * step for a, b, step in steps)
                            yield chunk, offset + here - position, strides, inner
                    position += length
            before += nbytes

    def stored(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the pieces that hold bytes ``[start, stop)`` of what is stored."""
        ends = self._ends
        for at in range(bisect_right(ends, start), len(ends)):
            index, offset, nbytes = self.pieces[at]
            position = ends[at] - nbytes
            if position >= stop:
                return
            low, high = max(start, position), min(stop, position + nbytes)
            if low < high:
                yield index, offset + low - position, high - low

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(nbytes for _, _, nbytes in self.pieces))

    @cached_property
    def _runs(self) -> tuple[Int64s, Int64s, Int64s]:
        return runs(self.shape, self.blocks)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The document that describes a checkpoint.

    Attributes
    ----------
    run, attempt, step, nonce
        Which checkpoint it is; the nonce is its save's.
    time
        Seconds since the epoch by the writer's clock.
    metrics
        As given to ``save``.
    chunk_bytes
        The chunk size of the writer, bytes.
    structure
        The nesting of the state (``docs/structure.md``).
    tensors
        The tensor entries, as JSON (``docs/structure.md``); the structure refers to them by index.
    ranges, chunks
        Where the tensors' bytes are.
    packed
        Byte ranges of plain values that are packed; the structure refers to them by index.
    norms
        Per tensor name ``(relative change, norm before)`` where the save measured them.
    norms_since
        The step of the checkpoint that `norms` compare with.
    blocked
        How long the caller waited for the save, by phase, in seconds.
    took
        What the save took until its manifest was put: the raw bytes that had changed, the seconds to store them, and
        those of everything else.
    """

    run: str
    attempt: int
    step: int
    nonce: str
    time: float
    metrics: Mapping[str, float]
    chunk_bytes: int
    structure: Json
    tensors: tuple[Mapping[str, Json], ...]
    ranges: Sequence[Range]
    chunks: Sequence[Chunk]
    packed: tuple[Range, ...] = ()
    norms: Mapping[str, tuple[float, float]] | None = None
    norms_since: int | None = None
    blocked: Mapping[str, float] | None = None
    took: tuple[int, float, float] | None = None

    @property
    def nbytes(self) -> int:
        """Raw bytes of all chunks."""
        if isinstance(self.chunks, JsonList):
            return self.chunks.nbytes
        return sum(chunk.nbytes for chunk in self.chunks)

    def to_json(self) -> bytes:
        """Return the document."""
        document: dict[str, Json] = {
            "run": self.run,
            "attempt": self.attempt,
            "step": self.step,
            "nonce": self.nonce,
            "time": self.time,
            "metrics": encode_metrics(self.metrics),
            "chunk_bytes": self.chunk_bytes,
            "structure": self.structure,
            "tensors": list(self.tensors),
            "ranges": _listed(self.ranges, range_to_json),
            "chunks": _listed(self.chunks, chunk_to_json),
        }
        if self.packed:
            document["packed"] = [range_to_json(item) for item in self.packed]
        if self.norms is not None:
            document["norms"] = {name: [encode_float(x) for x in pair] for name, pair in self.norms.items()}
        if self.norms_since is not None:
            document["norms_since"] = self.norms_since
        if self.blocked is not None:
            document["blocked"] = {phase: round(seconds, 6) for phase, seconds in self.blocked.items()}
        if self.took is not None:
            nbytes, *seconds = self.took
            document["took"] = [nbytes, *(round(one, 6) for one in seconds)]
        return dump_document("manifest", document, version=2 if self._needs_format_2() else 1)

    def _needs_format_2(self) -> bool:
        if self.packed or isinstance(self.ranges, JsonList):
            return True
        short = any(chunk.base is not None and chunk.base.digits != _ALL_DIGITS for chunk in self.chunks)
        return short or any(item.blocks for item in self.ranges)

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Manifest:
        """Read a manifest; `name` is its key, for messages.

        Raises
        ------
        FormatError
            If it was written by a later version.
        CorruptionError
            If it is not a manifest, or inconsistent.
        """
        document = parse_document(data, "manifest", name)
        fields = Fields(document, name)
        chunks = tuple(chunk_from_json(item, f"{name}: chunk {i}") for i, item in enumerate(fields.list("chunks")))
        ranges = _ranges_from_json(fields, "ranges", chunks, f"{name}: range")
        packed = _ranges_from_json(fields, "packed", chunks, f"{name}: packed range") if "packed" in document else ()
        tensors = tuple(as_mapping(item, f"{name}: tensor {i}") for i, item in enumerate(fields.list("tensors")))
        norms = None
        if "norms" in document:
            pairs = as_mapping(document["norms"], f"{name}: norms")
            norms = {key: _norm_pair(value, f"{name}: norms of {key!r}") for key, value in pairs.items()}
        return cls(
            run=fields.string("run"),
            attempt=fields.count("attempt"),
            step=fields.count("step"),
            nonce=_nonce(fields.string("nonce"), name),
            time=fields.number("time"),
            metrics=decode_metrics(document.get("metrics"), name),
            chunk_bytes=fields.count("chunk_bytes"),
            structure=document.get("structure"),
            tensors=tensors,
            ranges=ranges,
            chunks=chunks,
            packed=packed,
            norms=norms,
            norms_since=fields.count("norms_since") if "norms_since" in document else None,
            blocked=_blocked(document["blocked"], f"{name}: blocked") if "blocked" in document else None,
            took=_took(document["took"], f"{name}: took") if "took" in document else None,
        )


def _listed(items: Sequence[_Item], to_json: Callable[[_Item], Json]) -> Json:
    return items if isinstance(items, JsonList) else [to_json(item) for item in items]


def _nonce(value: str, name: str) -> str:
    if _NONCE.fullmatch(value) is None:
        raise CorruptionError(f"{name}: not a nonce: {shown(value)}")
    return value


def _identity(value: str, name: str) -> str:
    if _IDENTITY.fullmatch(value) is None:
        raise CorruptionError(f"{name}: not an identity: {shown(value)}")
    return value


def _norm_pair(value: Json, name: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise CorruptionError(f"{name}: not a pair")
    return decode_float(value[0], name), decode_float(value[1], name)


def _blocked(value: Json, name: str) -> dict[str, float]:
    return {phase: decode_float(seconds, f"{name}: {phase!r}") for phase, seconds in as_mapping(value, name).items()}


def _took(value: Json, name: str) -> tuple[int, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise CorruptionError(f"{name}: not bytes and two times")
    nbytes, store, rest = (decode_float(one, name) for one in value)
    if not (nbytes.is_integer() and nbytes >= 0 and 0 <= store < math.inf and 0 <= rest < math.inf):
        raise CorruptionError(f"{name}: not bytes and two times: {shown(value)}")
    return int(nbytes), store, rest


def chunk_to_json(chunk: Chunk) -> dict[str, Json]:
    """Return the JSON form of a chunk."""
    item: dict[str, Json] = {
        "id": chunk.identity,
        "bytes": chunk.nbytes,
        "item": chunk.itemsize,
        "nonce": chunk.nonce,
        "size": chunk.size,
    }
    if chunk.base is not None:
        item["base"] = {"id": chunk.base.identity, "nonce": chunk.base.nonce, "size": chunk.base.size}
        if chunk.base.digits != _ALL_DIGITS:
            item["base"]["digits"] = chunk.base.digits
    return item


def chunk_from_json(item: Json, name: str) -> Chunk:
    """Reverse `chunk_to_json`; `name` is for messages.

    Raises
    ------
    CorruptionError
    """
    fields = Fields(as_mapping(item, name), name)
    base = None
    if "base" in item:
        inner = Fields(as_mapping(item["base"], f"{name}: base"), f"{name}: base")
        digits = inner.count("digits") if "digits" in item["base"] else _ALL_DIGITS
        if digits not in (DELTA_DIGITS, _ALL_DIGITS):
            raise CorruptionError(f"{name}: a delta's name with {digits} digits of its base")
        identity, nonce = _identity(inner.string("id"), name), _nonce(inner.string("nonce"), name)
        base = Stored(identity, nonce, inner.count("size"), digits)
    itemsize = fields.count("item")
    if itemsize not in _ITEMSIZES:
        raise CorruptionError(f"{name}: element size {itemsize}")
    return Chunk(
        identity=_identity(fields.string("id"), name),
        nbytes=fields.count("bytes"),
        itemsize=itemsize,
        nonce=_nonce(fields.string("nonce"), name),
        size=fields.count("size"),
        base=base,
    )


def range_to_json(item: Range) -> dict[str, Json]:
    """Return the JSON form of a range."""
    node = {"bytes": item.nbytes, "item": item.itemsize, "pieces": [list(piece) for piece in item.pieces]}
    if item.blocks:
        node["shape"] = list(item.shape)
        node["blocks"] = [[list(block.at), list(block.shape)] for block in item.blocks]
    return node


def _ranges_from_json(fields: Fields, field: str, chunks: tuple[Chunk, ...], name: str) -> tuple[Range, ...]:
    return tuple(range_from_json(item, chunks, f"{name} {i}") for i, item in enumerate(fields.list(field)))


def range_from_json(item: Json, chunks: Sequence[Chunk], name: str) -> Range:
    """Reverse `range_to_json`, and check the range against the chunks that it lies in; `name` is for messages.

    Raises
    ------
    CorruptionError
    """
    fields = Fields(as_mapping(item, name), name)
    nbytes, itemsize = fields.count("bytes"), fields.count("item")
    if itemsize not in _ITEMSIZES:
        raise CorruptionError(f"{name}: element size {itemsize}")
    pieces: list[tuple[int, int, int]] = []
    for piece in fields.list("pieces"):
        if not isinstance(piece, list) or len(piece) != 3 or not all(map(is_count, piece)):
            raise CorruptionError(f"{name}: not a piece: {shown(piece)}")
        chunk, offset, length = piece
        if chunk >= len(chunks) or offset + length > chunks[chunk].nbytes:
            raise CorruptionError(f"{name}: piece {piece} is outside its chunk")
        pieces.append((chunk, offset, length))
    if sum(length for _, _, length in pieces) != nbytes:
        raise CorruptionError(f"{name}: its pieces are not {nbytes} bytes together")
    if "blocks" not in item:
        return Range(nbytes, itemsize, tuple(pieces))
    if len(fields.list("shape")) > MAX_DIMENSIONS:
        raise CorruptionError(f"{name}: an array of {len(fields.list('shape'))} dimensions")
    shape, blocks = _counts(fields.list("shape"), name), tuple(_block(node, name) for node in fields.list("blocks"))
    if not shape or math.prod(shape) != nbytes:
        raise CorruptionError(f"{name}: an array of {shown(shape)} does not have {nbytes} bytes")
    if wrong := fault(shape, blocks):
        raise CorruptionError(f"{name}: {wrong}")
    return Range(nbytes, itemsize, tuple(pieces), shape, blocks)


def _block(node: Json, name: str) -> Block:
    if not isinstance(node, list) or len(node) != 2:
        raise CorruptionError(f"{name}: not a block: {shown(node)}")
    return Block(_counts(node[0], name), _counts(node[1], name))


def _counts(node: Json, name: str) -> tuple[int, ...]:
    if not isinstance(node, list) or not all(map(is_count, node)):
        raise CorruptionError(f"{name}: not a list of natural numbers: {shown(node)}")
    return tuple(node)
