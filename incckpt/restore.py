"""Reading the chunks of a checkpoint: fetch, decode, verify, straight into the memory they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from incckpt import codec
from incckpt.errors import CodecError, CorruptionError, MissingObjectError
from incckpt.manifest import Chunk, Manifest, Stored
from incckpt.objects import ObjectKey
from incckpt.pipeline import Pipeline
from incckpt.save import chunk_keys
from incckpt.store import Store

__all__ = ["ChunkRead", "Reader", "reads_for"]

Bytes = npt.NDArray[np.uint8]


@dataclass
class ChunkRead:
    """A chunk to be read.

    Attributes
    ----------
    chunk
        Which.
    out
        ``uint8[chunk.nbytes]`` to decode it into, or ``None`` if nobody wants it whole.
    pieces
        ``(offset in the chunk, array)``: where its parts are to be copied besides.
    names
        Tensors that need it, for messages.
    """

    chunk: Chunk
    out: Bytes | None = None
    pieces: list[tuple[int, Bytes]] = field(default_factory=list)
    names: tuple[str, ...] = ()


class Reader:
    """Reads chunks of a store, many at once.

    Parameters
    ----------
    threads
        For decoding.
    verify
        Whether to check digests.
    bytes_in_flight
        Bound on host memory beyond the destinations.
    """

    def __init__(self, store: Store, *, threads: int, verify: bool = True, bytes_in_flight: int = 256 << 20) -> None:
        self._store = store
        self._verify = verify
        self._pipeline = Pipeline(
            remote=store.backend.remote, threads=threads, bytes_in_flight=bytes_in_flight, name="incckpt-read"
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
        """
        by_object: dict[ObjectKey, list[ChunkRead]] = {}
        for item in reads:
            by_object.setdefault(chunk_keys(item.chunk)[0], []).append(item)

        def work(group: list[ChunkRead]) -> None:
            self._read(group)
            for item in group:
                progress(item.chunk.nbytes)

        self._pipeline.each(by_object.values(), _weight, work)

    def close(self) -> None:
        """Let go of the threads."""
        self._pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, group: Sequence[ChunkRead]) -> None:
        chunk = group[0].chunk
        whole = next((item.out for item in group if item.out is not None), None)
        out = whole if whole is not None else _sole_destination(group)
        scratch = out is None
        if out is None:
            out = np.empty(chunk.nbytes, np.uint8)
        keys = chunk_keys(chunk)
        key = keys[0]
        try:
            base = None
            if chunk.base is not None:
                key = keys[1]
                base = self._read_base(chunk.base, key, out)
                key = keys[0]
            data = self._store.objects.get(key, chunk.size)
            with self._pipeline.cpu:
                codec.decode(data, out, identity=bytes.fromhex(chunk.identity), base=base, verify=self._verify)
                self._distribute(group, out, scratch)
        except MissingObjectError as error:
            raise MissingObjectError(f"{error} ({_needed_by(group)})") from error
        except CodecError as error:
            raise CodecError(f"object {key} is damaged: {error} ({_needed_by(group)})") from error
        except CorruptionError as error:
            raise CorruptionError(f"{error} ({_needed_by(group)})") from error

    def _read_base(self, stored: Stored, key: ObjectKey, out: Bytes) -> codec.Base:
        """Decode a delta's base into the memory where the delta is applied to it."""
        data = self._store.objects.get(key, stored.size)
        identity = bytes.fromhex(stored.identity)
        with self._pipeline.cpu:
            # Its digests are not checked: a wrong base gives a wrong chunk, and the chunk's digests are.
            codec.decode(data, out, identity=identity, verify=False)
        return codec.Base(identity, out)

    @staticmethod
    def _distribute(group: Sequence[ChunkRead], out: Bytes, scratch: bool) -> None:
        for item in group:
            if item.out is not None and item.out is not out:
                item.out[:] = out
            for offset, target in item.pieces:
                if scratch or target is not out:
                    target[:] = out[offset : offset + target.nbytes]


def reads_for(manifest: Manifest, buffers: Sequence[Bytes | None], names: Sequence[Sequence[str]]) -> list[ChunkRead]:
    """Return the reads that fill `buffers`.

    Parameters
    ----------
    buffers
        One per range of the manifest, ``uint8[range.nbytes]``; ``None`` for a range that is not wanted.
    names
        The tensors in each range.
    """
    reads: dict[int, ChunkRead] = {}
    for item, buffer, needed_by in zip(manifest.ranges, buffers, names, strict=True):
        if buffer is None:
            continue
        position = 0
        for index, offset, nbytes in item.pieces:
            read = reads.setdefault(index, ChunkRead(manifest.chunks[index]))
            read.pieces.append((offset, buffer[position : position + nbytes]))
            read.names += tuple(needed_by[:3])
            position += nbytes
    return list(reads.values())


def _sole_destination(group: Sequence[ChunkRead]) -> Bytes | None:
    """Return a destination that takes the chunk whole, to decode straight into it."""
    for item in group:
        for _, target in item.pieces:
            if target.nbytes == item.chunk.nbytes:
                return target
    return None


def _weight(group: Sequence[ChunkRead]) -> int:
    chunk = group[0].chunk
    base = 0 if chunk.base is None else chunk.base.size
    whole = any(item.out is not None for item in group) or _sole_destination(group) is not None
    return max(chunk.size, base) + (0 if whole else chunk.nbytes)


def _needed_by(group: Sequence[ChunkRead]) -> str:
    names = list(dict.fromkeys(name for item in group for name in item.names))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"needed by tensor {shown}" if names else "needed by the checkpoint"


MapLocation = Any


def load_state(reader, manifest, **kw):
    raise NotImplementedError


def restore_into(reader, manifest, app, **kw):
    raise NotImplementedError
