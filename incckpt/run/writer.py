"""The background part of a save: pins, stores the chunks, puts the manifest and commits."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType

from incckpt.codec import objects as codec
from incckpt.errors import BackendError, CorruptionError, StateError, StoreNotFoundError, SupersededError
from incckpt.run.contents import Contents, ReadBack, names_by_chunk
from incckpt.run.discards import Discards
from incckpt.run.pipeline import Pipeline
from incckpt.run.report import SaveReport
from incckpt.run.scrub import Scrubber
from incckpt.run.snapshot import Snapshot, Source
from incckpt.run.upload import Known, Uploader
from incckpt.staging.baseline import Baseline
from incckpt.staging.movement import MovementMeter
from incckpt.store.lineage import Run
from incckpt.store.manifest import Chunk, Manifest
from incckpt.store.objects import ObjectKey, chunk_keys, manifest_sizes
from incckpt.store.refs import Ref, RefName, Tombstone
from incckpt.store.store import Store
from incckpt.store.untrusted import LIST_BYTES

__all__ = ["Writer"]

log = logging.getLogger(__name__)

_ABORTED_TRIES = 3


class _CommitUnknownError(Exception):
    """It is unknown whether the checkpoint is committed, because of `error`."""

    def __init__(self, error: BackendError) -> None:
        self.error = error


class _Heartbeat:
    """Renews the pin of a save in flight, so that no collector takes its writer for dead."""

    def __init__(self, run: Run, name: RefName, seconds: float) -> None:
        self._run = run
        self._name = name
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="incckpt-heartbeat", daemon=True)

    def __enter__(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit on threads, or an interpreter that exits
            log.warning("saving step %d without a heartbeat: no thread can be started (%s)", self._name.step, error)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Join before the pin is removed: a later beat would put it again.
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._done.wait(self._seconds):
            try:
                self._run.pin(self._name)
            except BackendError as error:
                log.warning("could not renew the pin of step %d: %s", self._name.step, error)


class Writer:
    """Writes the checkpoints of one attempt, one after the other.

    Parameters
    ----------
    store, run
        The run to write.
    discards
        Collects what saves leave behind.
    threads
        Threads for hashing and encoding.
    baseline
        What deltas are against; learns what is stored. Without it there are no deltas.
    pipeline
        Hashes, encodes and puts chunks; by default a new one with 256 MiB in flight.
    heartbeat_seconds
        Interval at which the pin of a save in flight is renewed.
    """

    def __init__(
        self,
        store: Store,
        run: Run,
        discards: Discards,
        *,
        threads: int,
        baseline: Baseline | None = None,
        pipeline: Pipeline | None = None,
        heartbeat_seconds: float = 60.0,
    ) -> None:
        self._discards = discards
        self._store = store
        self._run = run
        self._attempt = 0
        self._baseline = baseline
        self._uploader = Uploader(store, threads=threads, baseline=baseline, pipeline=pipeline)
        self._heartbeat_seconds = heartbeat_seconds
        self._read_back = ReadBack()
        self._movement = MovementMeter()
        self._previous: tuple[RefName, frozenset[str]] | None = None
        self._scrubber = Scrubber(store.objects)
        self._unsettled: list[tuple[Ref, Manifest, list[str]]] = []

    def begin(self, attempt: int, *, takes_up: bool) -> None:
        """Write as `attempt` from now on.

        Parameters
        ----------
        takes_up
            Whether another process has left a save unfinished, whose objects the first save looks for.
        """
        self._attempt = attempt
        self._uploader.takes_up = takes_up

    def continue_from(self, name: RefName, manifest: Manifest) -> None:
        """Take a checkpoint of the lineage as the previous one, whose chunks need not be put again."""
        self._rely_on(name, manifest)
        self._uploader.remember(manifest.chunks)

    def _rely_on(self, name: RefName, manifest: Manifest) -> None:
        sizes = manifest_sizes(manifest)
        self._previous = (name, frozenset(sizes))
        self._scrubber.rely_on(sizes)

    def interrupt(self) -> None:
        """End a save under way in another thread early, with `KeyboardInterrupt`, unless it is nearly over."""
        self._uploader.pipeline.interrupt()

    def forget(self, keys: Iterable[str]) -> None:
        """Forget objects that were collected."""
        self._uploader.forget(keys)

    def close(self) -> None:
        """Release threads and memory, until the next save."""
        self._uploader.close()

    def write(self, snapshot: Snapshot | Source, report: SaveReport) -> tuple[Ref, Manifest]:
        """Write a checkpoint and commit it.

        Returns
        -------
        ref, manifest
            The checkpoint, durable.

        Raises
        ------
        SupersededError
            If another process has taken over the run.
        StateError
            If no reader would accept the checkpoint; it is not committed.
        StoreNotFoundError
            If the store was removed or replaced.
        BackendError
            If the store failed; the next save uploads what is missing.
        """
        if isinstance(snapshot, Snapshot):
            self._read_back.check(snapshot)
            snapshot = self._measured(snapshot, report)
        for _ in range(_ABORTED_TRIES):
            name = RefName.new(self._attempt, snapshot.step)
            written = self._write_as(name, snapshot, report)
            if written is not None:
                return written
            # A collector took this save for dead, after an outage say. Unless another writer has the run, save again.
            self._run.check_not_superseded(self._attempt)
            log.warning("the save of step %d was aborted as stale; saving again", snapshot.step)
        raise SupersededError(f"run {self._run.name!r}: the save of step {snapshot.step} was aborted repeatedly")

    def _write_as(self, name: RefName, snapshot: Snapshot | Source, report: SaveReport) -> tuple[Ref, Manifest] | None:
        started = time.perf_counter()
        report.restart()
        self._uploader.tried = []
        pin = self._run.pin_key(name)
        if not self._store.backend.remote:
            self._store.check_unchanged()  # putting the pin would re-create a folder that was moved away
        try:
            self._run.pin(name)
            with _Heartbeat(self._run, name, self._heartbeat_seconds):
                known = self._look_around(name)
                storing = time.perf_counter()
                chunks: Sequence[Chunk]
                if isinstance(snapshot, Snapshot):
                    chunks = self._uploader.store(snapshot, name.nonce, known, report)
                else:
                    chunks = snapshot.store(self._uploader, name.nonce, known, report)
                stored = time.perf_counter() - storing
                report.spent("store", stored)
                took = report.changed_bytes, stored, storing - started
                manifest = self._manifest(name, snapshot, chunks, report, took)
                ref = self._put_manifest(name, manifest, report)
                outcome = self._commit(ref, manifest)
        except _CommitUnknownError as unknown:
            raise unknown.error from unknown  # keep the pin: the commit may still happen, and needs its objects
        except BaseException as error:
            self._discards.spend([pin])
            self._discards.waste(self._uploader.tried)
            if isinstance(error, StoreNotFoundError):
                self._discards.delete_spent()  # there will be no later save to do it
            elif isinstance(error, BackendError) and error.errno == errno.ENOENT:
                self._store.check_unchanged()  # a folder that is gone may be the store's
            raise
        self._discards.spend([pin])
        report.spent("commit", time.perf_counter() - started - stored)
        if outcome is Tombstone.ABORTED:
            self._discards.waste(self._uploader.tried)
            return None
        self._rely_on(name, manifest)
        self._uploader.look_up = self._uploader.takes_up = False
        self._movement.settle()
        if self._baseline is not None and isinstance(snapshot, Snapshot):
            self._baseline.settle(snapshot.layout, snapshot.contents)
        return ref, manifest

    def _commit(self, ref: Ref, manifest: Manifest) -> Tombstone | None:
        try:
            return self._run.commit(ref)
        except BackendError as error:
            # Commit and abort race for one key, so an abort tells which came first.
            log.warning("it is unknown whether step %d was committed (%s); finding out", ref.step, error)
            try:
                aborted = self._run.abort(ref.name)
            except BackendError:
                self._unsettled.append((ref, manifest, self._uploader.tried))
                raise _CommitUnknownError(error) from error
            if aborted:
                raise
            return None

    def settle_commits(self) -> Iterator[tuple[Ref, Manifest]]:
        """Settle earlier commits with unknown outcomes; yield those that were committed after all.

        Raises
        ------
        BackendError
            If an outcome is still unknown.
        """
        while self._unsettled:
            ref, manifest, tried = self._unsettled[0]
            aborted = self._run.abort(ref.name)
            del self._unsettled[0]
            self._discards.spend([self._run.pin_key(ref.name)])
            if aborted:
                self._discards.waste(tried)
            else:
                yield ref, manifest

    def _look_around(self, name: RefName) -> Known:
        """Return what may be reused; call it once the pin is put. The order of its requests does not matter."""
        known_lost = self._scrubber.lost
        # The writer before this one may still prune what is inherited from it.
        inherited = self._previous is not None and self._previous[0].attempt != self._attempt
        looks: list[Callable[[], frozenset[str]]]
        looks = [self._not_superseded, partial(self._store.condemned.keys, twice=inherited), self._vouched]
        if self._store.backend.remote:
            looks.append(partial(self._pinned, name))
        looks += [partial(self._scrub, key) for key in self._scrubber.due()]
        _, condemned, vouched, *_ = self._uploader.pipeline.together(lambda look: look(), looks)
        lost = self._scrubber.lost
        if vouched & (lost - known_lost):
            self._tell_lost(lost - known_lost)
        return Known(condemned | lost, vouched - lost, sure=inherited)

    def _pinned(self, name: RefName) -> frozenset[str]:
        self._run.check_pinned(name)
        return frozenset()

    def _scrub(self, key: str) -> frozenset[str]:
        self._scrubber.look(key)
        return frozenset()

    def _tell_lost(self, lost: frozenset[str]) -> None:
        assert self._previous is not None
        name, _ = self._previous
        tensors = ""
        try:
            ref = self._run.read(name)
            if isinstance(ref, Ref):
                manifest = self._store.manifest(ref)
                by_chunk = zip(manifest.chunks, names_by_chunk(manifest, Contents.of(manifest).names()), strict=True)
                names = [names for chunk, names in by_chunk if not lost.isdisjoint(map(str, chunk_keys(chunk)))]
                tensors = f" (tensors: {', '.join(dict.fromkeys(name for some in names for name in some))})"
        except (ValueError, BackendError) as error:
            log.warning("step %d cannot be read to tell which tensors need what is lost: %s", name.step, error)
        log.warning(
            "%d objects%s are gone from %s, or not of the size that was put: step %d is damaged, and so are earlier "
            "ones that need them. Their content is stored again",
            len(lost), tensors, self._store.backend.url, name.step,
        )  # fmt: skip

    def _not_superseded(self) -> frozenset[str]:
        try:
            self._run.check_not_superseded(self._attempt)
        except CorruptionError:
            self._store.check_unchanged()  # a store that was removed or replaced explains it
            raise
        return frozenset()

    def _vouched(self) -> frozenset[str]:
        """Return the keys that the previous checkpoint needs, if its ref still lives."""
        if self._previous is None:
            return frozenset()
        name, keys = self._previous
        try:
            return keys if isinstance(self._run.read(name), Ref) else frozenset()
        except ValueError as error:
            log.error("the ref of step %d is unreadable; what it needs is looked up one by one: %s", name.step, error)
            return frozenset()

    # -- manifest

    def _measured(self, snapshot: Snapshot, report: SaveReport) -> Snapshot:
        """Return the snapshot with the norms of what moved."""
        started = time.perf_counter()
        found = self._movement.measure(snapshot.step, snapshot.layout, snapshot.entries, snapshot.contents)
        report.spent("measure", time.perf_counter() - started)
        if snapshot.norms is not None or self._movement.since is None:
            return snapshot
        report.norms = found
        return replace(snapshot, norms=found)

    def _manifest(
        self,
        name: RefName,
        snapshot: Snapshot | Source,
        chunks: Sequence[Chunk],
        report: SaveReport,
        took: tuple[int, float, float],
    ) -> Manifest:
        if not isinstance(snapshot, Snapshot):
            return snapshot.manifest_as(self._run.name, name, chunks)
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
            packed=snapshot.packed_ranges,
            norms=snapshot.norms,
            norms_since=None if snapshot.norms is None else self._movement.since,
            blocked=report.blocked or None,
            took=took,
        )

    def _put_manifest(self, name: RefName, manifest: Manifest, report: SaveReport) -> Ref:
        document = manifest.to_json()
        if len(document) > LIST_BYTES:
            raise StateError(
                f"step {manifest.step} was not saved: its manifest would have {len(document):,} bytes, "
                f"and readers take {LIST_BYTES:,}; put many small values into long lists or arrays"
            )
        digest = codec.digest(document)
        data = codec.encode_document(document, digest=digest)
        key = ObjectKey(digest.identity.hex(), name.nonce)
        # Check the store last, to notice its removal during the save too.
        acts: Sequence[Callable[[], None]] = (partial(self._uploader.put, key, data), self._store.check_unchanged)
        self._uploader.pipeline.together(lambda act: act(), acts)
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
