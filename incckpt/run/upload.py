"""Stores the chunks of a save: hashes them, finds those already stored, encodes and puts the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from incckpt.backends.base import REMOTE_REQUESTS
from incckpt.codec import objects as codec
from incckpt.run.chunk_index import process_index
from incckpt.run.pipeline import Pipeline
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot
from incckpt.staging.baseline import Baseline
from incckpt.staging.content import Content, TextContent, compute_digests
from incckpt.staging.hostmem import HostPool
from incckpt.staging.layout import Layout, batches
from incckpt.store.manifest import Chunk, Stored
from incckpt.store.objects import ObjectKey, chunk_keys
from incckpt.store.store import Store

__all__ = ["Known", "Uploader", "full_of"]

_LOCAL_BATCH = 64 << 20  # bytes hashed, coded, put, without the interpreter's lock changing hands (docs/decisions/007)
_REMOTE_BATCH = 16 << 20  # the same without the putting, which should begin soon
_IN_FLIGHT = 256 << 20  # bytes


@dataclass
class Known:
    """What this save may reuse: keys in `vouched`, which a ref needs that was seen alive after this save put its pin;
    others if a look finds them; nothing in `condemned`, which is about to be deleted or was found lost. Where `sure`,
    two looks have told what is condemned.
    """

    condemned: frozenset[str]
    vouched: frozenset[str]
    sure: bool = False


class Uploader:
    """Stores the chunks of one save after the other.

    Parameters
    ----------
    store
        The store.
    threads
        Threads for hashing and encoding.
    baseline
        What deltas are against; without it there are none.
    pipeline
        Hashes, encodes and puts chunks; by default a new one with 256 MiB in flight.

    Attributes
    ----------
    tried
        Keys that this save has put or tried to put.
    look_up
        Whether to look in the store for content that this process does not know about.
    takes_up
        Whether a save that another process left unfinished may have put deltas that this one would put again.
    """

    def __init__(
        self,
        store: Store,
        *,
        threads: int,
        baseline: Baseline | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.tried: list[str] = []
        self.look_up = True
        self.takes_up = False
        self._store = store
        self._baseline = baseline
        # A put to a local disk keeps a core busy, syncing included; more threads than cores would gain nothing.
        remote = store.backend.remote
        requests = REMOTE_REQUESTS if remote else threads
        self._batch_bytes = _REMOTE_BATCH if remote else _LOCAL_BATCH
        self.pipeline = pipeline or Pipeline(
            requests=requests, threads=threads, bytes_in_flight=_IN_FLIGHT, name="incckpt-write"
        )
        self._threads = threads
        self._spare_bytes = min(threads * self._batch_bytes, _IN_FLIGHT)
        self._buffers = HostPool()  # for objects: fresh memory would be slow, and giving it back interrupts all cores
        self._index = process_index()

    def remember(self, chunks: Iterable[Chunk]) -> None:
        """Note the chunks of a checkpoint, which need not be put again."""
        self._index.add(self._store.id, chunks)

    def forget(self, keys: Iterable[str]) -> None:
        """Forget objects that were collected."""
        self._index.forget(self._store.id, keys)

    def close(self) -> None:
        """Release threads and memory, until the next save."""
        self.pipeline.close()
        self._buffers.trim(0)

    def put(self, key: ObjectKey, data: bytes) -> None:
        """Put an object that is not a chunk."""
        self.tried.append(str(key))
        self._store.objects.put(key, data)

    def store(
        self, snapshot: Snapshot, nonce: str, known: Known, report: SaveReport, turn: tuple[int, int] = (0, 1)
    ) -> list[Chunk]:
        """Make sure that every content is stored, each identity once; return where each chunk is stored.

        Parameters
        ----------
        turn
            The number of this process among those that save together, and how many there are. Each begins at another
            place: what equals another's shard is found stored when its turn comes (docs/decisions/039).
        """
        contents = [*snapshot.contents, *snapshot.packed.contents]
        claims: dict[str, int] = {}
        claiming = threading.Lock()

        def look(index: int) -> Content | None:
            content = contents[index]
            content.stored = self._reusable(content, known)
            if content.stored is not None or isinstance(content, TextContent):
                return None
            full = self._base(content, snapshot.layout, index, known)
            content.stored = self._left_delta(content, full, known)
            return full

        def store_batch(batch: Sequence[int]) -> None:
            held: list[Content] = []

            def hold(content: Content) -> None:
                held.append(content)
                content.hold()

            try:
                for index in batch:
                    hold(contents[index])
                self._hash([contents[index] for index in batch], report)
                with claiming:
                    mine = [index for index in batch if claims.setdefault(contents[index].identity, index) == index]
                bases = dict(zip(mine, self.pipeline.together(look, mine), strict=True))
                new = [(contents[index], bases[index]) for index in mine if contents[index].stored is None]
                if new:
                    for _, full in new:
                        if full is not None:
                            hold(full)
                    self._put_all(new, self._encode(new, report), nonce, report)
            finally:
                for content in held:
                    content.release()

        unsure = [
            index
            for index, content in enumerate(contents)
            if content.stored is None or not self._usable(content.stored, known, look=False)
        ]
        first = len(unsure) * turn[0] // turn[1]
        unsure = unsure[first:] + unsure[:first]
        sizes = [contents[index].nbytes for index in unsure]
        cut = batches(unsure, sizes, min(self._batch_bytes, sum(sizes) // (2 * self._threads)))
        self.pipeline.each(cut, lambda batch: sum(contents[index].weight for index in batch), store_batch)
        self._buffers.trim(self._spare_bytes)
        chunks: list[Chunk] = []
        for content in contents:
            if content.digest is not None:
                twin = contents[claims.get(content.identity, len(chunks))].stored
                if twin is not None:
                    content.stored = replace(twin, itemsize=content.itemsize)
            assert content.stored is not None
            chunks.append(content.stored)
        return chunks

    def _hash(self, contents: Sequence[Content], report: SaveReport) -> None:
        with self.pipeline.cpu:
            started = time.perf_counter()
            compute_digests(contents)
            report.spent("hash", time.perf_counter() - started)

    def _encode(self, contents: Sequence[tuple[Content, Content | None]], report: SaveReport) -> list[codec.Encoded]:
        """Return the objects of contents, each given with the content that it may be a delta against."""
        self._buffers.trim(self._spare_bytes)  # chunks of many sizes leave many buffers that fit none again
        sources: list[codec.Source] = []
        for content, full in contents:
            assert content.raw is not None
            assert content.digest is not None
            base = None
            if full is not None:
                assert full.raw is not None
                assert full.stored is not None
                base = codec.Base(bytes.fromhex(full.stored.identity), full.raw)
            out = self._buffers.take(codec.max_nbytes(content.nbytes))
            sources.append(codec.Source(content.raw, content.itemsize, content.digest, base, out))
        texts = [index for index, (content, _) in enumerate(contents) if isinstance(content, TextContent)]
        with self.pipeline.cpu:
            started = time.perf_counter()
            encoded = codec.encode_many([source for index, source in enumerate(sources) if index not in texts])
            for index in texts:
                source = sources[index]
                encoded.insert(index, codec.encode_text(source.raw, digest=source.digest, out=source.out))
            poor_deltas = [index for index, one in enumerate(encoded) if not Content.is_worthwhile(one)]
            again = codec.encode_many([sources[index]._replace(base=None) for index in poor_deltas])
            report.spent("encode", time.perf_counter() - started)
        for index, one in zip(poor_deltas, again, strict=True):
            encoded[index] = one
        return encoded

    def _usable(self, chunk: Chunk, known: Known, *, look: bool = True) -> bool:
        """Whether the objects of `chunk` may be reused: none is condemned, and each is vouched for or found now."""
        stored: tuple[Chunk | Stored, ...] = (chunk,) if chunk.base is None else (chunk, chunk.base)
        for key, one in zip(chunk_keys(chunk), stored, strict=True):
            if str(key) in known.condemned:
                return False
            if str(key) not in known.vouched and not (look and self._is_there(key, one.size, known)):
                return False
        return True

    def _is_there(self, key: ObjectKey, size: int, known: Known) -> bool:
        """Whether an object that no ref vouches for is there, and not condemned."""
        if not self._store.objects.exists(key, size):
            return False
        return str(key) not in self._surely_condemned(known)

    def _surely_condemned(self, known: Known) -> frozenset[str]:
        if not known.sure and self._store.backend.remote:
            known.condemned |= self._store.condemned.keys()
        known.sure = True
        return known.condemned

    def _reusable(self, content: Content, known: Known) -> Chunk | None:
        """Return where the content is already stored, if it is."""
        identity = content.identity
        candidates = [content.stored, self._index.find(self._store.id, identity)]
        for chunk in candidates:
            if chunk is not None and self._usable(chunk, known):
                return chunk
        # Where a killed put may leave a part behind, a listing does not prove that an object is whole.
        if self.look_up and self._store.backend.exclusive:
            for key, size in self._store.objects.find(identity):
                if str(key) not in self._surely_condemned(known):
                    return Chunk(identity, content.nbytes, content.itemsize, key.nonce, size)
        return None

    def _base(self, content: Content, layout: Layout, index: int, known: Known) -> Content | None:
        """Return the content of chunk `index`'s last full object, if `content` should be a delta against it."""
        full = None if self._baseline is None else self._baseline.full(layout, index)
        stored = None if full is None else full.base_of(content, index)
        return full if stored is not None and self._usable(stored, known) else None

    def _left_delta(self, content: Content, full: Content | None, known: Known) -> Chunk | None:
        """Return a delta of the content against `full`, which may be relied on, that an unfinished save has put."""
        if full is None or not self.takes_up or not self._store.backend.exclusive:
            return None
        assert full.stored is not None
        base = Stored(full.stored.identity, full.stored.nonce, full.stored.size)
        for key, size in self._store.objects.find_deltas(content.identity, base.identity):
            if self._is_there(key, size, known):
                assert key.base is not None
                against = replace(base, digits=len(key.base))
                return Chunk(content.identity, content.nbytes, content.itemsize, key.nonce, size, against)
        return None

    def _put_all(
        self,
        contents: Sequence[tuple[Content, Content | None]],
        encoded: Sequence[codec.Encoded],
        nonce: str,
        report: SaveReport,
    ) -> None:
        """Put the objects of contents, each given with its base in case it is a delta."""
        started = time.perf_counter()
        chunks: list[Chunk] = []
        for (content, full), one in zip(contents, encoded, strict=True):
            size, base = len(one.data), None
            if one.base is not None:
                assert full is not None
                assert full.stored is not None
                base = Stored(full.stored.identity, full.stored.nonce, full.stored.size)
            chunks.append(Chunk(content.identity, content.nbytes, content.itemsize, nonce, size, base))
        objects = [(chunk_keys(chunk)[0], one.data) for chunk, one in zip(chunks, encoded, strict=True)]
        self.tried += [str(key) for key, _ in objects]

        def note(index: int) -> None:
            content, full = contents[index]
            content.stored = chunks[index]
            if full is not None and chunks[index].base is not None:
                full.deltas.add(chunks[index].size)
            self._index.add(self._store.id, [chunks[index]])
            report.put(encoded[index])

        def put(index: int) -> None:
            self._store.objects.put(*objects[index])
            note(index)  # if another one fails, this one is not put again

        if self._store.backend.remote:
            self.pipeline.together(put, range(len(objects)))
        else:
            self._store.objects.put_many(objects)
            for index in range(len(objects)):
                note(index)
        report.spent("put", time.perf_counter() - started)

    # -- objects of another store, as they are

    def find(self, chunk: Chunk, known: Known, *, whole: bool = False) -> Chunk | None:
        """Return where the content of another store's chunk is stored here, if that may be relied on.

        Parameters
        ----------
        whole
            Whether it has to be a full object.
        """
        found = self._index.find(self._store.id, chunk.identity)
        if found is not None and not (whole and found.base) and self._usable(found, known):
            return replace(found, itemsize=chunk.itemsize)
        # Where a killed put may leave a part behind, a listing does not prove that an object is whole.
        if not self._store.backend.exclusive:
            return None
        for candidate in self._listed(chunk, known, whole):
            if self._usable(candidate, known):
                self._index.add(self._store.id, [candidate])
                return candidate
        return None

    def _listed(self, chunk: Chunk, known: Known, whole: bool) -> Iterator[Chunk]:
        for key, size in self._store.objects.find(chunk.identity):
            yield replace(chunk, nonce=key.nonce, size=size, base=None)
        if chunk.base is None or whole:
            return
        deltas = list(self._store.objects.find_deltas(chunk.identity, chunk.base.identity))
        base = self.find(full_of(chunk, chunk.base), known, whole=True) if deltas else None
        for key, size in deltas if base is not None else ():
            assert key.base is not None
            assert base is not None
            stored = Stored(base.identity, base.nonce, base.size, len(key.base))
            yield replace(chunk, nonce=key.nonce, size=size, base=stored)

    def put_copies(self, copies: Sequence[tuple[Chunk, bytes]], report: SaveReport) -> None:
        """Put objects of another store, each given with the chunk that it will be here."""
        started = time.perf_counter()
        objects = [(chunk_keys(chunk)[0], data) for chunk, data in copies]
        self.tried += [str(key) for key, _ in objects]
        if self._store.backend.remote:
            self.pipeline.together(lambda item: self._store.objects.put(*item), objects)
        else:
            self._store.objects.put_many(objects)
        for chunk, data in copies:
            self._index.add(self._store.id, [chunk])
            report.put_copy(len(data))
        report.spent("put", time.perf_counter() - started)


def full_of(chunk: Chunk, base: Stored) -> Chunk:
    """Return the chunk that the full object is which `chunk` is a delta against."""
    return Chunk(base.identity, chunk.nbytes, chunk.itemsize, base.nonce, base.size)
