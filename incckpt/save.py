"""The background part of a save: hash, find what is stored already, encode, put, commit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from incckpt import codec
from incckpt.chunking import batches
from incckpt.document import Json
from incckpt.entries import TensorEntry, entry_to_json
from incckpt.errors import BackendError, SupersededError
from incckpt.hostmem import HostPool
from incckpt.manifest import Chunk, Manifest, Stored
from incckpt.objects import ObjectKey, chunk_keys, manifest_keys
from incckpt.pipeline import REMOTE_REQUESTS, Pipeline
from incckpt.refs import Ref, RefName, Tombstone
from incckpt.report import SaveReport
from incckpt.runs import Run
from incckpt.staging import Content, Layout
from incckpt.store import Store

__all__ = ["Snapshot", "Writer"]

log = logging.getLogger(__name__)

_ABORTED_TRIES = 3
_REMEMBERED = 1 << 16  # chunks of the past; forgetting one costs at most that it is put again
_LOCAL_BATCH = 64 << 20  # bytes hashed, coded, put, without the interpreter's lock changing hands (docs/decisions/007)
_REMOTE_BATCH = 16 << 20  # the same, but for the putting, which should begin soon
_IN_FLIGHT = 256 << 20  # bytes
_DELTA_WORTHWHILE = 0.95  # of a full object's size; above, a delta is not worth that a restore reads two objects


@dataclass(frozen=True)
class Snapshot:
    """A state as staged: all that the background needs to write it.

    Attributes
    ----------
    layout, contents
        How its ranges lie in chunks, and one content per chunk.
    """

    step: int
    metrics: Mapping[str, float]
    time: float
    structure: Json
    tensors: tuple[Mapping[str, Json], ...]
    layout: Layout
    contents: Sequence[Content]
    norms: Mapping[str, tuple[float, float]] | None = None

    @classmethod
    def of(
        cls,
        step: int,
        metrics: Mapping[str, float],
        time: float,
        structure: Json,
        tensors: Sequence[TensorEntry],
        layout: Layout,
        contents: Sequence[Content],
        norms: Mapping[str, tuple[float, float]] | None = None,
    ) -> Snapshot:
        """Put a snapshot together from what flattening and staging gave."""
        entries = tuple(entry_to_json(entry) for entry in tensors)
        return cls(step, metrics, time, structure, entries, layout, contents, norms)


class _CommitUnknownError(Exception):
    """Whether the checkpoint is committed could not be found out, because of `error`."""

    def __init__(self, error: BackendError) -> None:
        self.error = error


class _Heartbeat:
    """Puts a pin again every minute while a save is written, so that nobody takes the writer for dead."""

    def __init__(self, run: Run, name: RefName, seconds: float) -> None:
        self._run = run
        self._name = name
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="incckpt-heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Joined before the pin is removed: a beat that lands later would leave a pin behind.
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._done.wait(self._seconds):
            try:
                self._run.pin(self._name)
            except BackendError as error:
                log.warning("could not renew the pin of step %d: %s", self._name.step, error)


@dataclass
class _Known:
    """What this save may reuse.

    `vouched` are keys that a ref needs which was read, alive, after this save's pin was put; others need a look.
    """

    condemned: frozenset[str]
    vouched: frozenset[str]


class Writer:
    """Writes the checkpoints of one attempt, one after the other.

    Parameters
    ----------
    store, run, attempt
        Where to, and as whom.
    threads
        For hashing and encoding.
    settle
        Called with layout, chunk index and content when the content is stored.
    base_of
        Given layout and chunk index, returns the content of the chunk's last full object, or ``None``; deltas are made
        against it.
    pipeline
        What takes chunks through hashing, encoding and putting; a new one, with 256 MiB in flight, if none is given.
    heartbeat_seconds
        How often the pin of a save in flight is put again.

    Attributes
    ----------
    spent
        Keys that nobody needs any more, pins of saves that are over first of all; `delete_spent` deletes them.
    wasted
        Keys of objects put by saves that came to nothing, until they are condemned; later saves may use some of them.
    """

    def __init__(
        self,
        store: Store,
        run: Run,
        attempt: int,
        *,
        threads: int,
        settle: Callable[[Layout, int, Content], None] = lambda layout, index, content: None,
        base_of: Callable[[Layout, int], Content | None] = lambda layout, index: None,
        pipeline: Pipeline | None = None,
        heartbeat_seconds: float = 60.0,
    ) -> None:
        self.spent: list[str] = []
        self.wasted: set[str] = set()
        self._store = store
        self._run = run
        self.attempt = attempt
        self._settle = settle
        self._base_of = base_of
        # On this machine's own disk a put is work for its cores, the syncing included, not waiting to be filled.
        remote = store.backend.remote
        requests = REMOTE_REQUESTS if remote else threads
        self._batch_bytes = _REMOTE_BATCH if remote else _LOCAL_BATCH
        self._pipeline = pipeline or Pipeline(
            requests=requests, threads=threads, bytes_in_flight=_IN_FLIGHT, name="incckpt-write"
        )
        self._threads = threads
        self._spare_bytes = min(threads * self._batch_bytes, _IN_FLIGHT)
        self._buffers = HostPool()  # for objects: fresh memory would be slow, and giving it back interrupts all cores
        self._heartbeat_seconds = heartbeat_seconds
        self._by_identity: dict[str, Chunk] = {}
        self._previous: tuple[RefName, frozenset[str]] | None = None
        self._look_up = True
        self._unsettled: list[tuple[Ref, Manifest, list[str]]] = []
        self._tried: list[str] = []  # keys that this save has put, or tried to

    def continue_from(self, name: RefName, manifest: Manifest) -> None:
        """Take a checkpoint of the lineage as the previous one: what it holds need not be put again."""
        self._previous = (name, manifest_keys(manifest))
        self._remember(manifest.chunks)

    def _remember(self, chunks: Iterable[Chunk]) -> None:
        self._by_identity.update((chunk.identity, chunk) for chunk in chunks)
        for identity in list(self._by_identity)[:-_REMEMBERED]:
            del self._by_identity[identity]

    def forget(self, keys: Iterable[str]) -> None:
        """Forget objects that were collected."""
        gone = frozenset(keys)
        self._by_identity = {
            identity: chunk
            for identity, chunk in self._by_identity.items()
            if not any(str(key) in gone for key in chunk_keys(chunk))
        }

    def close(self) -> None:
        """Let go of the threads."""
        self._pipeline.close()

    def write(self, snapshot: Snapshot, report: SaveReport) -> tuple[Ref, Manifest]:
        """Write a checkpoint and commit it.

        Returns
        -------
        ref, manifest
            The checkpoint, durable.

        Raises
        ------
        SupersededError
            If another process has taken over the run.
        BackendError
            If the store failed; the next save uploads what is missing.
        """
        for _ in range(_ABORTED_TRIES):
            name = RefName.new(self.attempt, snapshot.step)
            written = self._write_as(name, snapshot, report)
            if written is not None:
                return written
            # A collector took this save for dead, after an outage say. If nobody took the run over, save again.
            self._run.check_not_superseded(self.attempt)
            log.warning("the save of step %d was aborted as stale; saving again", snapshot.step)
        raise SupersededError(f"run {self._run.name!r}: the save of step {snapshot.step} was aborted again and again")

    def _write_as(self, name: RefName, snapshot: Snapshot, report: SaveReport) -> tuple[Ref, Manifest] | None:
        started = time.perf_counter()
        report.restart()
        self._tried = []
        pin = self._run.pin_key(name)
        try:
            self._run.pin(name)
            with _Heartbeat(self._run, name, self._heartbeat_seconds):
                known = self._look_around()
                storing = time.perf_counter()
                chunks = self._store_all(snapshot, name.nonce, known, report)
                report.spent("store", time.perf_counter() - storing)
                manifest = self._manifest(name, snapshot, chunks)
                ref = self._put_manifest(name, manifest, report)
                outcome = self._commit(ref, manifest)
        except _CommitUnknownError as unknown:
            raise unknown.error from unknown  # the pin has to stand: the commit may come yet, and needs its objects
        except BaseException:
            self.spent.append(pin)
            self.wasted.update(self._tried)
            raise
        self.spent.append(pin)
        report.spent("commit", time.perf_counter() - started - report.seconds["store"])
        if outcome is Tombstone.ABORTED:
            self.wasted.update(self._tried)
            return None
        self._previous = (name, manifest_keys(manifest))
        self._remember(chunks)
        self._look_up = False
        for index, content in enumerate(snapshot.contents):
            self._settle(snapshot.layout, index, content)
        return ref, manifest

    def _commit(self, ref: Ref, manifest: Manifest) -> Tombstone | None:
        try:
            return self._run.commit(ref)
        except BackendError as error:
            # Commit and abort race for one key, so aborting finds out.
            log.warning("the commit of step %d got no clear answer (%s); settling it", ref.step, error)
            try:
                aborted = self._run.abort(ref.name)
            except BackendError:
                self._unsettled.append((ref, manifest, self._tried))
                raise _CommitUnknownError(error) from error
            if aborted:
                raise
            return None

    def settle_commits(self) -> Iterator[tuple[Ref, Manifest]]:
        """Find out about earlier commits whose outcome was unknown; yields those that were committed after all.

        Raises
        ------
        BackendError
            If that cannot be found out now either.
        """
        while self._unsettled:
            ref, manifest, tried = self._unsettled[0]
            aborted = self._run.abort(ref.name)
            del self._unsettled[0]
            self.spent.append(self._run.pin_key(ref.name))
            if aborted:
                self.wasted.update(tried)
            else:
                yield ref, manifest

    def delete_spent(self) -> None:
        """Delete what is `spent`; if that fails, the next call tries again."""
        if self.spent:
            try:
                self._store.backend.delete(self.spent)
            except BackendError as error:
                log.warning("could not remove %s, trying again after the next save: %s", ", ".join(self.spent), error)
            else:
                self.spent.clear()

    def _look_around(self) -> _Known:
        """Return what may be reused; to be called once the pin is put. In which order it looks does not matter."""
        looks = (self._not_superseded, self._store.condemned.keys, self._vouched)
        _, condemned, vouched = self._pipeline.together(lambda look: look(), looks)
        return _Known(condemned, vouched)

    def _not_superseded(self) -> frozenset[str]:
        self._run.check_not_superseded(self.attempt)
        return frozenset()

    def _vouched(self) -> frozenset[str]:
        """Return the keys that the previous checkpoint needs, if its ref lives now."""
        if self._previous is None:
            return frozenset()
        name, keys = self._previous
        try:
            return keys if isinstance(self._run.read(name), Ref) else frozenset()
        except ValueError as error:
            log.error("the ref of step %d is unreadable; what it needs is looked up one by one: %s", name.step, error)
            return frozenset()

    # -- chunks

    def _store_all(self, snapshot: Snapshot, nonce: str, known: _Known, report: SaveReport) -> list[Chunk]:
        """Make sure that every content is stored, each identity once; return where, by chunk."""
        contents = snapshot.contents
        claims: dict[str, int] = {}
        claiming = threading.Lock()

        def look(index: int) -> Content | None:
            content = contents[index]
            content.stored = self._reusable(content, known)
            if content.stored is not None:
                return None
            return self._base(content, self._base_of(snapshot.layout, index), index, known)

        def store(batch: Sequence[int]) -> None:
            self._hash([contents[index] for index in batch], report)
            with claiming:
                mine = [index for index in batch if claims.setdefault(contents[index].identity, index) == index]
            bases = dict(zip(mine, self._pipeline.together(look, mine), strict=True))
            new = [(contents[index], bases[index]) for index in mine if contents[index].stored is None]
            if new:
                self._put_all(new, self._encode(new, report), nonce, report)

        unsure = [
            index
            for index, content in enumerate(contents)
            if content.stored is None or not self._usable(content.stored, known, look=False)
        ]
        sizes = [contents[index].nbytes for index in unsure]
        cut = batches(unsure, sizes, min(self._batch_bytes, sum(sizes) // (2 * self._threads)))
        self._pipeline.each(cut, lambda batch: sum(contents[index].nbytes for index in batch), store)
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
        raws = [(content, content.raw) for content in contents if content.digest is None]
        with self._pipeline.cpu:
            started = time.perf_counter()
            digests = codec.digest_many([raw for _, raw in raws if raw is not None])
            report.spent("hash", time.perf_counter() - started)
        for (content, _), digest in zip(raws, digests, strict=True):
            content.digest = digest

    def _encode(self, contents: Sequence[tuple[Content, Content | None]], report: SaveReport) -> list[codec.Encoded]:
        """Return the objects of contents, each with the one that it may be a delta against."""
        self._buffers.trim(self._spare_bytes)  # where chunks are of many sizes, few of them are used again
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
        with self._pipeline.cpu:
            started = time.perf_counter()
            encoded = codec.encode_many(sources)
            dear = [
                index
                for index, one in enumerate(encoded)
                if one.base is not None and len(one.data) > _DELTA_WORTHWHILE * one.full_nbytes
            ]
            again = codec.encode_many([sources[index]._replace(base=None) for index in dear])
            report.spent("encode", time.perf_counter() - started)
        for index, one in zip(dear, again, strict=True):
            encoded[index] = one
        return encoded

    def _usable(self, chunk: Chunk, known: _Known, *, look: bool = True) -> bool:
        """Whether the objects of `chunk` may be relied on: none condemned, each needed by a living ref or seen now."""
        for key in chunk_keys(chunk):
            if str(key) in known.condemned:
                return False
            if str(key) not in known.vouched and not (look and self._store.objects.exists(key)):
                return False
        return True

    def _reusable(self, content: Content, known: _Known) -> Chunk | None:
        """Return where the content is stored already, if it is."""
        identity = content.identity
        candidates = [content.stored, self._by_identity.get(identity)]
        for chunk in candidates:
            if chunk is not None and self._usable(chunk, known):
                return chunk
        if self._look_up:
            for key, size in self._store.objects.find(identity):
                if str(key) not in known.condemned:
                    return Chunk(identity, content.nbytes, content.itemsize, key.nonce, size)
        return None

    def _base(self, content: Content, full: Content | None, index: int, known: _Known) -> Content | None:
        """Return `full`, the last full object of chunk `index`, if `content` may be stored as a delta against it."""
        if full is None or full is content or full.raw is None or full.stored is None or full.stored.base is not None:
            return None
        due = full.deltas.is_over(full.stored.size, index)
        return full if not due and self._usable(full.stored, known) else None

    def _put_all(
        self,
        contents: Sequence[tuple[Content, Content | None]],
        encoded: Sequence[codec.Encoded],
        nonce: str,
        report: SaveReport,
    ) -> None:
        """Put the objects of contents, each given with the one that it is against if it is a delta."""
        started = time.perf_counter()
        chunks: list[Chunk] = []
        for (content, full), one in zip(contents, encoded, strict=True):
            size, base = len(one.data), None
            if one.base is not None:
                assert full is not None
                assert full.stored is not None
                full.deltas.add(size)
                base = Stored(full.stored.identity, full.stored.nonce, full.stored.size)
            chunks.append(Chunk(content.identity, content.nbytes, content.itemsize, nonce, size, base))
        objects = [(chunk_keys(chunk)[0], one.data) for chunk, one in zip(chunks, encoded, strict=True)]
        self._tried += [str(key) for key, _ in objects]

        def note(index: int) -> None:
            contents[index][0].stored = chunks[index]
            report.put(encoded[index])

        def put(index: int) -> None:
            self._store.objects.put(*objects[index])
            note(index)  # should another one fail, this one need not be put again

        if self._store.backend.remote:
            self._pipeline.together(put, range(len(objects)))
        else:
            self._store.objects.put_many(objects)
            for index in range(len(objects)):
                note(index)
        report.spent("put", time.perf_counter() - started)

    # -- manifest

    def _manifest(self, name: RefName, snapshot: Snapshot, chunks: Sequence[Chunk]) -> Manifest:
        return Manifest(
            run=self._run.name,
            attempt=name.attempt,
            step=name.step,
            nonce=name.nonce,
            time=snapshot.time,
            metrics=snapshot.metrics,
            chunk_bytes=snapshot.layout.chunk_bytes,
            structure=snapshot.structure,
            tensors=snapshot.tensors,
            ranges=snapshot.layout.ranges,
            chunks=tuple(chunks),
            norms=snapshot.norms,
        )

    def _put_manifest(self, name: RefName, manifest: Manifest, report: SaveReport) -> Ref:
        document = manifest.to_json()
        digest = codec.digest(document)
        data = codec.encode_document(document, digest=digest)
        key = ObjectKey(digest.identity.hex(), name.nonce)
        self._tried.append(str(key))
        self._store.objects.put(key, data)
        report.manifest_bytes = len(data)
        return Ref(
            name=name,
            time=manifest.time,
            metrics=manifest.metrics,
            manifest=str(key),
            manifest_size=len(data),
            nbytes=manifest.nbytes,
            written=report.put_bytes + len(data),
        )
