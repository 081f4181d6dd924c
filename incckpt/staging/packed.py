"""Cuts packed values, the large ones that are no tensors, into chunks. They are immutable bytes, so nothing is copied.

They have chunks of their own, so that a growing log leaves the layout of the tensors, and so the base, unchanged.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from incckpt.codec.frames import FRAME_BYTES
from incckpt.staging.content import TextContent
from incckpt.state.packing import PackedValue
from incckpt.store.manifest import Range

__all__ = ["NOTHING_PACKED", "PackedChunks", "PackedStage"]


class PackedChunks(NamedTuple):
    """The packed values of a save.

    Attributes
    ----------
    ranges
        One per value; chunks are numbered from 0.
    contents
        One per chunk.
    new
        The number of chunks that the last save did not have, and of their bytes.
    """

    ranges: tuple[Range, ...] = ()
    contents: tuple[TextContent, ...] = ()
    new: tuple[int, int] = (0, 0)


NOTHING_PACKED = PackedChunks()


class _Part(NamedTuple):
    """A run of bytes that is a chunk or goes into one; `key` tells whether the last save had it."""

    key: Hashable
    raw: memoryview


class PackedStage:
    """Cuts packed values into chunks, and remembers those of the last save, so that each is hashed only once.

    Parameters
    ----------
    chunk_bytes
        The most that a chunk holds.
    keep
        Whether to remember.
    """

    def __init__(self, chunk_bytes: int, *, keep: bool = True) -> None:
        self._chunk_bytes = chunk_bytes
        self._keep = keep
        self._held: dict[Hashable, tuple[TextContent, memoryview]] = {}
        self._encoded: dict[int, tuple[str, bytes]] = {}

    def forget(self) -> None:
        """Forget the last save's values."""
        self._held, self._encoded = {}, {}

    def stage(self, values: Sequence[PackedValue]) -> PackedChunks:
        """Cut values into chunks: parts of 1 MiB or more by themselves, smaller ones end to end."""
        encoded = self._encoded
        if self._keep:
            self._encoded = {}
        chunks: list[_Part | list[_Part]] = []
        ranges: list[Range] = []
        joined, room = -1, 0
        for value in values:
            pieces: list[tuple[int, int, int]] = []
            for part in self._parts(value, encoded):
                nbytes = part.raw.nbytes
                if nbytes >= FRAME_BYTES:
                    chunks.append(part)
                    pieces.append((len(chunks) - 1, 0, nbytes))
                    continue
                if nbytes > room:
                    joined, room = len(chunks), FRAME_BYTES
                    chunks.append([])
                small = chunks[joined]
                assert isinstance(small, list)
                small.append(part)
                pieces.append((joined, FRAME_BYTES - room, nbytes))
                room -= nbytes
            ranges.append(Range(sum(nbytes for _, _, nbytes in pieces), 1, tuple(pieces)))
        return self._contents_of(ranges, chunks)

    def _contents_of(self, ranges: Sequence[Range], chunks: Sequence[_Part | list[_Part]]) -> PackedChunks:
        before, now = self._held, dict[Hashable, tuple[TextContent, memoryview]]()
        contents: list[TextContent] = []
        new = nbytes = 0
        for chunk in chunks:
            part = _joined(chunk) if isinstance(chunk, list) else chunk
            held = now.get(part.key) or before.get(part.key)
            if held is None:
                held = TextContent(np.frombuffer(part.raw, np.uint8), 1), part.raw
                new, nbytes = new + 1, nbytes + part.raw.nbytes
            now[part.key] = held
            contents.append(held[0])
        if self._keep:
            self._held = now
        return PackedChunks(tuple(ranges), tuple(contents), (new, nbytes))

    def _parts(self, value: PackedValue, encoded: dict[int, tuple[str, bytes]]) -> Iterator[_Part]:
        if isinstance(value.blocks, list):
            for block in value.blocks:
                yield from self._cut(block, block)
            return
        data = value.blocks
        if isinstance(data, str):
            text, utf8 = encoded.get(id(data), ("", b""))
            if text is not data:  # the id may have been reused
                utf8 = data.encode("utf-8", "surrogatepass")
            if self._keep:
                self._encoded[id(data)] = data, utf8
            data = utf8
        # Large values are recognised by their id, which is not reused while their chunks are held; others are compared.
        yield from self._cut(data, id(data) if len(data) >= FRAME_BYTES else data)

    def _cut(self, data: bytes, key: Hashable) -> Iterator[_Part]:
        view = memoryview(data)
        for start in range(0, len(data), self._chunk_bytes):
            yield _Part((key, start), view[start : start + self._chunk_bytes])


def _joined(parts: Sequence[_Part]) -> _Part:
    data = b"".join(part.raw for part in parts)
    return _Part((data, 0), memoryview(data))
