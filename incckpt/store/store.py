"""A store: the marker at its root, its objects and its runs, behind one URL."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from incckpt.backends.base import REMOTE_REQUESTS, Backend
from incckpt.backends.registry import open_backend
from incckpt.codec import objects as codec
from incckpt.errors import (
    CorruptionError,
    KeyNotFoundError,
    MissingObjectError,
    ReadOnlyError,
    StoreNotFoundError,
    StoreReplacedError,
)
from incckpt.store.document import Fields, dump_document, parse_document
from incckpt.store.lineage import Run
from incckpt.store.manifest import Manifest
from incckpt.store.objects import ObjectKey, Objects
from incckpt.store.refs import CondemnedLists, Ref, RefName, create_once
from incckpt.store.rereading import reread
from incckpt.store.untrusted import LIST_BYTES, MemoryLimit, fetch, reading

__all__ = ["Store"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_R = TypeVar("_R")

MARKER = "incckpt.json"


class Store:
    """An opened store.

    Parameters
    ----------
    backend
        Bytes by key.
    clock
        Returns seconds since the epoch; only written down, never compared.
    monotonic
        Returns seconds since any moment, for time limits within this process.
    max_bytes
        Most memory to take for what the store says, bytes; by default as `MemoryLimit` has it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        max_bytes: int | None = None,
    ) -> None:
        self.backend = backend
        self.memory = MemoryLimit(max_bytes)
        self.objects = Objects(backend)
        self.condemned = CondemnedLists(backend, self.memory)
        self._clock = clock
        self._monotonic = monotonic
        self._created = False
        self._id: str | None = None

    @property
    def id(self) -> str:
        """Random identifier that tells this store from any other at the same URL; known after `check` or `create`."""
        assert self._id is not None
        return self._id

    @classmethod
    def open(cls, url: str, storage_options: Mapping[str, Any] | None = None, *, max_bytes: int | None = None) -> Store:
        """Open the store at `url` (without a fragment); nothing is read or written yet."""
        return cls(open_backend(url, storage_options), max_bytes=max_bytes)

    @classmethod
    @contextmanager
    def lent(
        cls,
        url: object,
        store: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        max_bytes: int | None = None,
    ) -> Iterator[Self]:
        """Yield the store that a caller named, and close it afterwards, unless the caller passed a `Backend`.

        Parameters
        ----------
        url
            What the caller passed.
        store
            The part of it that names the store.
        """
        if isinstance(url, Backend):
            yield cls(url, max_bytes=max_bytes)
        else:
            with cls(open_backend(store, storage_options), max_bytes=max_bytes) as opened:
                yield opened

    def run(self, name: str) -> Run:
        """Return a run, whether it exists or not."""
        return Run(self.backend, name, clock=self._clock, monotonic=self._monotonic, memory=self.memory)

    def manifest(self, ref: Ref) -> Manifest:
        """Read the manifest of a checkpoint (one request, if it is sound).

        Raises
        ------
        MissingObjectError, CorruptionError, FormatError, MemoryLimitError
            Naming the step.
        """
        return reread(lambda: self._read_manifest(ref))

    def _read_manifest(self, ref: Ref) -> Manifest:
        key, what = ObjectKey.parse(ref.manifest), f"the manifest of step {ref.step}"
        try:
            self.memory.check(ref.manifest_size, what)
            data = self.objects.get(key, ref.manifest_size)
            with reading("it"):
                self.memory.check(codec.read_header(data).nbytes, what)  # a small object may hold a long document
                document = codec.decode_document(data, max_bytes=LIST_BYTES, identity=bytes.fromhex(key.identity))
            self.memory.check_json(document, what)
            manifest = Manifest.from_json(document, ref.manifest)
        except MissingObjectError as error:
            raise MissingObjectError(f"the manifest of step {ref.step} is missing: {error}") from error
        except CorruptionError as error:
            raise CorruptionError(f"the manifest of step {ref.step} ({key}) is damaged: {error}") from error
        found = RefName(manifest.attempt, manifest.step, manifest.nonce)
        if found != ref.name:
            raise CorruptionError(f"the ref {ref.name} names the manifest of {found}")
        return manifest

    def each(self, read: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Call `read` with every item, many at once if requests cross a network, and return the results."""
        if not self.backend.remote or len(items) < 2:
            return [read(item) for item in items]
        with ThreadPoolExecutor(min(REMOTE_REQUESTS, len(items)), "incckpt-read") as pool:
            return list(pool.map(read, items))

    def check(self) -> None:
        """Check that there is a store, in a format that this version reads.

        Raises
        ------
        StoreNotFoundError, FormatError, CorruptionError
        """
        if self._id is None:
            self._id = self._find_id()
        if self._id is None:
            raise StoreNotFoundError(
                f"there is no incckpt store at {self.backend.url} (no {MARKER}); is the URL right?"
            )

    def create(self) -> None:
        """Create the store unless it exists, check it as `check` does, and find out whether it is exclusive.

        Raises
        ------
        ReadOnlyError
            If the backend cannot be written.
        """
        if not self.backend.writable:
            raise ReadOnlyError(f"{self.backend.url} can only be read")
        if self._id is not None:
            self.check_unchanged()
        if self._created:
            return
        if not self.backend.probe_exclusive():
            log.warning(
                "%s cannot create exclusively: only one process may write to it, which is not checked, and the objects "
                "of pruned checkpoints are not deleted",
                self.backend.url,
            )
        if self._id is None:
            self._id = self._find_id()
        if self._id is None:
            marker = _new_marker()
            found = create_once(self.backend, MARKER, marker)
            self._id = self._parse_marker(marker if found is None else found)
        self.backend.reserve()
        self._created = True

    def damage(self) -> str | None:
        """Return what is wrong with the marker of a store in which refs stand; ``None`` if nothing is.

        Raises
        ------
        StoreNotFoundError
            If there is neither a marker nor a ref.
        FormatError
            If the marker is of a format that this version does not read.
        """
        try:
            self.check()
        except CorruptionError as error:
            return str(error)
        return None

    def restore_marker(self) -> None:
        """Put a new marker where it is gone, or cannot be read again and again."""
        try:
            self._id = self._read_id()
        except KeyNotFoundError:
            create_once(self.backend, MARKER, _new_marker())
        except CorruptionError:
            self.backend.put(MARKER, _new_marker())

    def check_unchanged(self) -> None:
        """Check that this is still the same store, since what is known about it applies to no other (one request).

        Raises
        ------
        StoreNotFoundError, StoreReplacedError
        """
        try:
            found = self._read_id()
        except KeyNotFoundError as error:
            raise StoreNotFoundError(
                f"the store at {self.backend.url} is gone: it was removed or renamed while it was in use. Put it back, "
                "or start afresh with a new CheckpointManager"
            ) from error
        if found != self._id:
            raise StoreReplacedError(
                f"the store at {self.backend.url} was replaced by another while it was in use (its id is {found}, it "
                f"was {self._id}). Make a new CheckpointManager to write to it"
            )

    def _read_id(self) -> str:
        return reread(lambda: self._parse_marker(fetch(self.backend, MARKER)))

    def _parse_marker(self, data: bytes) -> str:
        where = f"{self.backend.url}/{MARKER}"
        return Fields(parse_document(data, "store", where), where).string("id")

    def _find_id(self) -> str | None:
        """Return the store's id; ``None`` where there is no store.

        Raises
        ------
        CorruptionError
            If checkpoints stand where there is no marker: they would be taken for none.
        """
        with suppress(KeyNotFoundError):
            return self._read_id()
        refs = (entry.key for entry in self.backend.list("refs/") if RefName.parse(entry.key.rpartition("/")[2]))
        key = next(refs, None)
        if key is None:
            return None
        try:
            return self._read_id()  # somebody may have made the store meanwhile
        except KeyNotFoundError as error:
            raise CorruptionError(
                f"{self.backend.url} holds checkpoints ({key}), but its {MARKER} is gone. Put it back from a copy, or "
                f"incckpt.recover({self.backend.url!r}, run={key.split('/')[1]!r}, dry_run=False) makes another"
            ) from error

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _new_marker() -> bytes:
    return dump_document("store", {"id": secrets.token_hex(16)})
