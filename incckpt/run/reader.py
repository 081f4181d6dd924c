"""Reads the chunks of a checkpoint: fetches, decodes and verifies them, directly in their destinations if possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from incckpt.backends.base import REMOTE_REQUESTS
from incckpt.codec import objects as codec
from incckpt.errors import CodecError, CorruptionError, MissingObjectError
from incckpt.run.pipeline import LOCAL_REQUESTS, Pipeline
from incckpt.staging.hostmem import HostPool
from incckpt.store.blocks import Block, row_major
from incckpt.store.manifest import Chunk, Manifest, Range, Stored
from incckpt.store.objects import ObjectKey, chunk_keys
from incckpt.store.rereading import reread
from incckpt.store.store import Store
from incckpt.store.untrusted import MemoryLimit, reading

__all__ = ["Bytes", "ChunkRead", "Reader", "read_box", "reads_for"]

Bytes = npt.NDArray[np.uint8]


@dataclass
class ChunkRead:
    """A chunk to be read.

    Attributes
    ----------
    chunk
        The chunk.
    out
        ``uint8[chunk.nbytes]`` to decode it into and to keep; ``None`` if the whole chunk is not kept.
    base_out
        The same for the full object behind a delta.
    pieces
        ``(offset in the chunk, array)``: where else to copy its parts.
    boxes
        ``(offset in the chunk, strides there, array)``: the same for parts that are boxes of a tensor.
    names
        Tensors that need it, for messages.
    base_damaged
        Set if `base_out` does not hold the base although the chunk is intact: a frame that the delta does not use is
        damaged.
    """

    chunk: Chunk
    out: Bytes | None = None
    base_out: Bytes | None = None
    pieces: list[tuple[int, Bytes]] = field(default_factory=list)
    boxes: list[tuple[int, tuple[int, ...], Bytes]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    base_damaged: bool = False


class Reader:
    """Reads chunks of a store, many at once.

    Parameters
    ----------
    threads
        Threads for decoding.
    verify
        Whether to check the digests of chunks. Chunks kept as the base of later saves are always checked: a delta
        against other bytes than the base's could never be read.
    bytes_in_flight
        The most host memory to use besides the destinations.

    Attributes
    ----------
    memory
        The store's limit.
    """

    def __init__(self, store: Store, *, threads: int, verify: bool = True, bytes_in_flight: int = 256 << 20) -> None:
        self._store = store
        self.memory: MemoryLimit = store.memory
        self._verify = verify
        self._bytes_in_flight = bytes_in_flight
        self._pool = HostPool()
        self._pipeline = Pipeline(
            requests=REMOTE_REQUESTS if store.backend.remote else LOCAL_REQUESTS,
            threads=threads,
            bytes_in_flight=bytes_in_flight,
            name="incckpt-read",
        )

    def read(self, reads: Iterable[ChunkRead], progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read the chunks; an object that several of them share is fetched once.

        Parameters
        ----------
        progress
            Called with the raw bytes of each chunk that is done, from any thread.

        Raises
        ------
        MissingObjectError, CorruptionError
            Naming the object and the tensors that need it; destinations are undefined by then.
        MemoryLimitError
            If a chunk is too large; nothing was read.
        """
        by_object: dict[ObjectKey, list[ChunkRead]] = {}
        for item in reads:
            by_object.setdefault(chunk_keys(item.chunk)[0], []).append(item)
        for key, group in by_object.items():
            self.memory.check(_weight(group), f"object {key}")

        def work(group: list[ChunkRead]) -> None:
            with reading(f"object {chunk_keys(group[0].chunk)[0]}"):
                self._read(group)
            for item in group:
                progress(item.chunk.nbytes)

        self._pipeline.each(by_object.values(), _weight, work)

    def close(self) -> None:
        """Stop the threads."""
        self._pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, group: Sequence[ChunkRead]) -> None:
        reread(lambda: self._read_or_doubt(group))

    def _read_or_doubt(self, group: Sequence[ChunkRead]) -> None:
        try:
            self._read_once(group)
        except CorruptionError:
            for key in chunk_keys(group[0].chunk):
                self._store.objects.doubt(key)
            raise

    def _read_once(self, group: Sequence[ChunkRead]) -> None:
        chunk = group[0].chunk
        whole = next((item.out for item in group if item.out is not None), None)
        out = whole if whole is not None else _sole_destination(group)
        scratch = out is None
        if out is None:
            out = self._scratch(chunk.nbytes)
        keys = chunk_keys(chunk)
        key = keys[0]
        verify = self._verify or whole is not None
        try:
            base = None
            if chunk.base is not None:
                key = keys[1]
                base = self._read_base(chunk.base, key, group, out)
                key = keys[0]
            identity = bytes.fromhex(chunk.identity)
            if base is None and chunk.size == codec.max_nbytes(chunk.nbytes):  # nothing in it is compressed
                head = bytearray(codec.header_nbytes(chunk.nbytes))
                self._store.objects.get_into(key, [memoryview(head), out.data])
                with self._pipeline.cpu:
                    codec.decode_in_place(head, out, identity=identity, verify=verify)
                    self._distribute(group, out, scratch)
            else:
                data = self._fetch(key, chunk.size)
                with self._pipeline.cpu:
                    codec.decode(data, out, identity=identity, base=base, verify=verify)
                    self._distribute(group, out, scratch)
        except MissingObjectError as error:
            raise MissingObjectError(f"{error} ({_needed_by(group)})") from error
        except CodecError as error:
            raise CodecError(f"object {key} is damaged: {error} ({_needed_by(group)})") from error
        except CorruptionError as error:
            raise CorruptionError(f"{error} ({_needed_by(group)})") from error

    def _read_base(self, stored: Stored, key: ObjectKey, group: Sequence[ChunkRead], out: Bytes) -> codec.Base:
        """Decode a delta's base, to where `group` keeps it or to `out`, which the delta is decoded to as well.

        For the delta it need not be verified: a wrong base gives a wrong chunk, whose digests are.
        """
        kept = [item.base_out for item in group if item.base_out is not None]
        target = kept[0] if kept else out
        identity = bytes.fromhex(stored.identity)

        def decode(verify: bool) -> None:
            data = self._fetch(key, stored.size)
            with self._pipeline.cpu:
                codec.decode(data, target, identity=identity, verify=verify)

        try:
            reread(lambda: decode(bool(kept)))
        except CodecError:
            if not kept:
                raise
            decode(False)
            for item in group:
                item.base_damaged = True
        with self._pipeline.cpu:
            for other in kept[1:]:
                other[:] = target
        return codec.Base(identity, target)

    def _fetch(self, key: ObjectKey, size: int) -> Bytes:
        data = self._scratch(size)
        self._store.objects.get_into(key, [data.data])
        return data

    def _scratch(self, nbytes: int) -> Bytes:
        """Return temporary memory, reused since first touching new pages costs more than filling them."""
        self._pool.trim(max(0, self._bytes_in_flight - self._pool.used_bytes - _capacity(nbytes)))
        return self._pool.take(_capacity(nbytes))[:nbytes]

    @staticmethod
    def _distribute(group: Sequence[ChunkRead], out: Bytes, scratch: bool) -> None:
        for item in group:
            if item.out is not None and item.out is not out:
                item.out[:] = out
            for offset, target in item.pieces:
                if scratch or target is not out:
                    target[:] = out[offset : offset + target.nbytes]
            for offset, strides, target in item.boxes:
                target[...] = np.ndarray(target.shape, np.uint8, out, offset, strides)


def reads_for(
    manifest: Manifest, ranges: Sequence[Range], buffers: Sequence[Bytes | None], names: Sequence[Sequence[str]]
) -> dict[int, ChunkRead]:
    """Return the reads that fill `buffers`, by chunk index.

    Parameters
    ----------
    ranges
        Of the manifest: those of the tensors, or those of packed values.
    buffers
        One per range, ``uint8[range.nbytes]``; ``None`` for a range that is not wanted.
    names
        The names of what is in each range.
    """
    reads: dict[int, ChunkRead] = {}
    for item, buffer, needed_by in zip(ranges, buffers, names, strict=True):
        if buffer is None:
            continue
        if item.blocks:
            whole = Block((0,) * len(item.shape), item.shape)
            read_box(reads, manifest, item, whole, item.shape, buffer.reshape(item.shape), needed_by[:3])
            continue
        position = 0
        for index, offset, nbytes in item.pieces:
            read = reads.get(index)
            if read is None:
                read = reads[index] = ChunkRead(manifest.chunks[index])
            read.pieces.append((offset, buffer[position : position + nbytes]))
            read.names += needed_by[:3]
            position += nbytes
    return reads


def read_box(
    reads: dict[int, ChunkRead],
    manifest: Manifest,
    item: Range,
    wanted: Block,
    shape: tuple[int, ...],
    target: Bytes,
    names: Sequence[str],
) -> None:
    """Add to `reads` what fills `target` with a box of a range.

    Parameters
    ----------
    reads
        By chunk index.
    wanted, shape
        The box, and the shape of the range as an array of bytes.
    target
        ``uint8`` of the box's shape, with any strides.
    names
        Of the tensor, for messages.
    """
    for index, offset, strides, (at, size) in item.boxes(wanted, shape):
        read = reads.get(index)
        if read is None:
            read = reads[index] = ChunkRead(manifest.chunks[index])
        place = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, wanted.at, size, strict=True))
        part = target[place]
        dense = zip(size, strides, row_major(size), strict=True)
        if part.flags.c_contiguous and all(a == b for n, a, b in dense if n > 1):
            read.pieces.append((offset, part.reshape(-1)))
        else:
            read.boxes.append((offset, strides, part))
        read.names += names


def _sole_destination(group: Sequence[ChunkRead]) -> Bytes | None:
    """Return a destination for the whole chunk, if there is one, to decode directly into."""
    for item in group:
        for _, target in item.pieces:
            if target.nbytes == item.chunk.nbytes:
                return target
    return None


def _weight(group: Sequence[ChunkRead]) -> int:
    """Return the memory needed to read a chunk besides its destinations: what `Reader._scratch` returns."""
    chunk = group[0].chunk
    base = 0 if chunk.base is None else chunk.base.size
    whole = any(item.out is not None for item in group) or _sole_destination(group) is not None
    coded = 0 if chunk.base is None and chunk.size == codec.max_nbytes(chunk.nbytes) else max(chunk.size, base)
    return _capacity(coded) + (0 if whole else _capacity(chunk.nbytes))


def _capacity(nbytes: int) -> int:
    """Round `nbytes` up to one of a few sizes of memory, so that it can be reused."""
    step = 1 << max(12, nbytes.bit_length() - 4)
    return -(-nbytes // step) * step


def _needed_by(group: Sequence[ChunkRead]) -> str:
    names = list(dict.fromkeys(name for item in group for name in item.names))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"needed by tensor {shown}" if names else "needed by the checkpoint"
