"""Reading the chunks of a checkpoint: fetch, decode, verify, straight into the memory they are for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from incckpt import codec
from incckpt.assign import Assignment
from incckpt.build import MapLocation, build
from incckpt.entries import TensorEntry, check_entries, entry_from_json, range_kinds
from incckpt.errors import CodecError, CorruptionError, MissingObjectError
from incckpt.hostmem import HostPool, new_buffer
from incckpt.manifest import Chunk, Manifest, Stored
from incckpt.objects import ObjectKey, chunk_keys
from incckpt.pipeline import LOCAL_REQUESTS, REMOTE_REQUESTS, Pipeline
from incckpt.staging import Base, Content
from incckpt.store import Store
from incckpt.structure import Tree, parse, references, select

__all__ = ["ChunkRead", "Contents", "MapLocation", "Reader", "load_state", "reads_for", "restore_into"]

log = logging.getLogger(__name__)

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
    base_out
        The same for the full object that it is a delta against.
    pieces
        ``(offset in the chunk, array)``: where its parts are to be copied besides.
    names
        Tensors that need it, for messages.
    """

    chunk: Chunk
    out: Bytes | None = None
    base_out: Bytes | None = None
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
            out = self._scratch(chunk.nbytes)
        keys = chunk_keys(chunk)
        key = keys[0]
        try:
            base = None
            if chunk.base is not None:
                key = keys[1]
                kept = [item.base_out for item in group if item.base_out is not None]
                base = self._read_base(chunk.base, key, kept[0] if kept else out)
                for other in kept[1:]:
                    other[:] = kept[0]
                key = keys[0]
            identity = bytes.fromhex(chunk.identity)
            if base is None and chunk.size == codec.max_nbytes(chunk.nbytes):  # nothing in it is compressed
                head = bytearray(codec.header_nbytes(chunk.nbytes))
                self._store.objects.get_into(key, [memoryview(head), out.data])
                with self._pipeline.cpu:
                    codec.decode_in_place(head, out, identity=identity, verify=self._verify)
                    self._distribute(group, out, scratch)
            else:
                data = self._fetch(key, chunk.size)
                with self._pipeline.cpu:
                    codec.decode(data, out, identity=identity, base=base, verify=self._verify)
                    self._distribute(group, out, scratch)
        except MissingObjectError as error:
            raise MissingObjectError(f"{error} ({_needed_by(group)})") from error
        except CodecError as error:
            raise CodecError(f"object {key} is damaged: {error} ({_needed_by(group)})") from error
        except CorruptionError as error:
            raise CorruptionError(f"{error} ({_needed_by(group)})") from error

    def _read_base(self, stored: Stored, key: ObjectKey, out: Bytes) -> codec.Base:
        """Decode a delta's base; `out` may be the memory that the delta is decoded to."""
        data = self._fetch(key, stored.size)
        identity = bytes.fromhex(stored.identity)
        with self._pipeline.cpu:
            # Its digests are not checked: a wrong base gives a wrong chunk, and the chunk's digests are.
            codec.decode(data, out, identity=identity, verify=False)
        return codec.Base(identity, out)

    def _fetch(self, key: ObjectKey, size: int) -> Bytes:
        data = self._scratch(size)
        self._store.objects.get_into(key, [data.data])
        return data

    def _scratch(self, nbytes: int) -> Bytes:
        """Return memory for a moment: recycled, since to touch new pages costs more than to fill them."""
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


def reads_for(
    manifest: Manifest, buffers: Sequence[Bytes | None], names: Sequence[Sequence[str]]
) -> dict[int, ChunkRead]:
    """Return the reads that fill `buffers`, by chunk index.

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
    return reads


def _sole_destination(group: Sequence[ChunkRead]) -> Bytes | None:
    """Return a destination that takes the chunk whole, to decode straight into it."""
    for item in group:
        for _, target in item.pieces:
            if target.nbytes == item.chunk.nbytes:
                return target
    return None


def _weight(group: Sequence[ChunkRead]) -> int:
    """Return the bytes that reading a chunk takes besides its destinations: what `Reader._scratch` gives."""
    chunk = group[0].chunk
    base = 0 if chunk.base is None else chunk.base.size
    whole = any(item.out is not None for item in group) or _sole_destination(group) is not None
    coded = 0 if chunk.base is None and chunk.size == codec.max_nbytes(chunk.nbytes) else max(chunk.size, base)
    return _capacity(coded) + (0 if whole else _capacity(chunk.nbytes))


def _capacity(nbytes: int) -> int:
    """Return the size of the memory that is taken for `nbytes`: one of few, so that it can be recycled."""
    step = 1 << max(12, nbytes.bit_length() - 4)
    return -(-nbytes // step) * step


def _needed_by(group: Sequence[ChunkRead]) -> str:
    names = list(dict.fromkeys(name for item in group for name in item.names))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"needed by tensor {shown}" if names else "needed by the checkpoint"


@dataclass(frozen=True)
class Contents:
    """A manifest, parsed and checked: the nesting, and the tensors by index.

    Attributes
    ----------
    tree
        The structure, or the part of it that was selected.
    entries
        All tensors of the checkpoint.
    wanted
        Indexes of the ranges that `tree` needs.
    """

    manifest: Manifest
    tree: Tree
    entries: Sequence[TensorEntry]
    wanted: frozenset[int]

    @classmethod
    def of(cls, manifest: Manifest, keys: str | Sequence[str] | None = None) -> Contents:
        """Parse and check a manifest's structure and tensors; select what `keys` match.

        Raises
        ------
        FormatError
            If it is inconsistent.
        StateMismatchError
            If `keys` match nothing.
        """
        entries = [entry_from_json(item) for item in manifest.tensors]
        check_entries(entries, [item.nbytes for item in manifest.ranges])
        tree = parse(manifest.structure, len(entries))
        if keys is not None:
            tree = select(tree, keys)
        wanted = frozenset(entries[index].range for index in references(tree)) - {-1}
        return cls(manifest, tree, entries, wanted)

    def names(self) -> list[list[str]]:
        """Return the names of the tensors in each range."""
        names: list[list[str]] = [[] for _ in self.manifest.ranges]
        for entry in self.entries:
            if entry.range >= 0:
                names[entry.range].append(entry.name)
        return names


@contextmanager
def progress_bar(total: int, step: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` bytes are read, if asked to or if a terminal watches; give what counts them."""
    shown = sys.stderr.isatty() if show is None else show
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=f"step {step}", disable=not shown) as bar:
        yield bar.update


def load_state(
    reader: Reader,
    manifest: Manifest,
    *,
    keys: str | Sequence[str] | None = None,
    map_location: MapLocation = None,
    allow_pickle: bool = False,
    progress: bool | None = None,
) -> Any:
    """Return the state of a checkpoint, or the part of it that `keys` match, in new memory."""
    contents = Contents.of(manifest, keys)
    buffers = [
        new_buffer(item.nbytes) if index in contents.wanted else None for index, item in enumerate(manifest.ranges)
    ]
    reads = reads_for(manifest, buffers, contents.names())
    with progress_bar(sum(read.chunk.nbytes for read in reads.values()), manifest.step, progress) as count:
        reader.read(reads.values(), count)
    return build(contents.tree, contents.entries, buffers, map_location=map_location, allow_pickle=allow_pickle)


def restore_into(
    reader: Reader,
    manifest: Manifest,
    target: Any,
    *,
    base: Base,
    allow_pickle: bool = False,
    progress: bool | None = None,
) -> None:
    """Restore a checkpoint into `target`, in place, and keep its contents in `base` if that keeps any.

    Raises
    ------
    StateMismatchError
        If it does not fit; nothing was touched.
    MissingObjectError, CorruptionError
        If it is damaged; `target` is undefined until another restore succeeds.
    """
    contents = Contents.of(manifest)
    sizes = [(item.nbytes, item.itemsize) for item in manifest.ranges]
    assignment = Assignment(
        contents.tree, contents.entries, [nbytes for nbytes, _ in sizes], target, allow_pickle=allow_pickle
    )
    buffers: list[Bytes | None] = [None] * len(sizes)
    for index in assignment.ranges:
        own = assignment.destination(index)
        buffers[index] = new_buffer(sizes[index][0]) if own is None else own
    reads = reads_for(manifest, buffers, contents.names())
    base.forget()
    layout = None
    if base.keep and len(assignment.ranges) == len(sizes):
        layout = base.layout_for(sizes, range_kinds(contents.entries, len(sizes)))
    if layout is not None and layout.ranges != manifest.ranges:
        log.warning(
            "the first save will copy everything: the checkpoint was cut into other chunks (here of up to %d bytes)",
            base.chunk_bytes,
        )
        layout = None
    kept = {index: base.pool.take(chunk.nbytes) for index, chunk in enumerate(manifest.chunks)} if layout else {}
    for index, buffer in kept.items():
        if manifest.chunks[index].base is None:
            reads[index].out = buffer
        else:
            reads[index].base_out = buffer
    with progress_bar(sum(read.chunk.nbytes for read in reads.values()), manifest.step, progress) as count:
        reader.read(reads.values(), count)
    for index in assignment.ranges:
        delivered, buffers[index] = buffers[index], None
        assert delivered is not None
        assignment.deliver(index, delivered)
    assignment.finish()
    if layout is not None:
        base.adopt(layout, [_full_content(chunk, kept[index]) for index, chunk in enumerate(manifest.chunks)])


def _full_content(chunk: Chunk, buffer: Bytes) -> Content:
    """Return the content of the full object that `chunk` is, or is a delta against."""
    content = Content(buffer, chunk.itemsize)
    stored = chunk.base
    if stored is not None:
        content.deltas.add(chunk.size)
    content.stored = (
        chunk if stored is None else Chunk(stored.identity, chunk.nbytes, chunk.itemsize, stored.nonce, stored.size)
    )
    return content
