"""Whether a store can be used from here: rights, exclusive creation, clock, leftovers, and what a save costs."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from incckpt.backends.base import Backend, Entry, ReadableBuffer
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, CorruptionError, FormatError, StoreNotFoundError
from incckpt.manager import CheckpointManager
from incckpt.options import checked_flag
from incckpt.store.location import locate
from incckpt.store.refs import list_pins
from incckpt.store.store import Store

__all__ = ["Diagnosis", "Finding", "Status", "diagnose"]

Status: TypeAlias = Literal["ok", "warning", "failed", "skipped"]

_T = TypeVar("_T")

_SKEW = 300.0  # seconds
_OLD = 3600.0  # seconds, after which what a process left behind is that of a dead one
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    check
        What was looked at.
    status
        Whether that is as it should be.
    message
        What was found, and what to do about it.
    error
        What was raised, if something was.
    """

    check: str
    status: Status
    message: str
    error: Exception | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; true if nothing failed.

    Attributes
    ----------
    url
        Of the store.
    findings
        One per check, in order.
    save_requests
        Requests of a save of one small tensor, by kind.
    seconds
        How long a request of each kind took here, as far as they could be tried.
    """

    url: str
    findings: tuple[Finding, ...]
    save_requests: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def save_seconds(self) -> float | None:
        """How long these requests take, one after the other; ``None`` if they could not be tried."""
        if not self.save_requests.keys() <= self.seconds.keys():
            return None
        return sum(count * self.seconds[kind] for kind, count in self.save_requests.items())


def diagnose(
    url: str | os.PathLike[str] | Backend,
    *,
    write: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Find out whether a store can be used from here, and what a save to it costs.

    Parameters
    ----------
    url
        Of the store; there need not be one yet.
    write
        Whether to try writing: keys below ``probe/`` that mean nothing and are deleted again.
    storage_options
        For fsspec.

    Raises
    ------
    OptionError, MissingExtraError
        If the URL or an option is not usable; what fails at the store is in the result.

    Examples
    --------
    >>> import incckpt, tempfile
    >>> store = tempfile.mkdtemp()
    >>> _ = incckpt.save({"x": 1}, store)
    >>> found = incckpt.diagnose(store)
    >>> bool(found), [finding.check for finding in found.findings]
    (True, ['reading', 'store', 'writing', 'exclusive creation', 'clock', 'leftovers'])
    """
    checked_flag("write", write)
    location = locate(url)
    with Store.lent(url, location.store, storage_options) as store:
        doctor = _Doctor(store)
        doctor.examine(write)
        return Diagnosis(store.backend.url, tuple(doctor.findings), _requests(store.backend.remote), doctor.seconds)


class _Doctor:
    """Makes the findings of one store."""

    def __init__(self, store: Store) -> None:
        self.findings: list[Finding] = []
        self.seconds: dict[str, float] = {}
        self._store = store
        self._backend = store.backend
        self._there = True
        self._modified: float | None = None

    def examine(self, write: bool) -> None:
        """Check everything, as far as what fails allows it."""
        if not self._check("reading", self._reading):
            return
        self._check("store", self._marker)
        if not (self._there or self._backend.remote):
            self._found("writing", "skipped", "not tried where there is no store: that would make its folder")
        elif not self._backend.writable:
            self._found("writing", "skipped", "this store can only be read")
        elif not write:
            self._found("writing", "skipped", "not tried; exclusive creation and the clock neither")
        elif self._check("writing", self._writing):
            self._check("exclusive creation", self._exclusive)
            self._check("clock", self._clock)
        self._check("leftovers", self._leftovers)

    def _found(self, check: str, status: Status, message: str, error: Exception | None = None) -> None:
        self.findings.append(Finding(check, status, message, error))

    def _check(self, check: str, examine: Callable[[], tuple[Status, str]]) -> bool:
        try:
            status, message = examine()
        except (BackendError, CorruptionError, FormatError) as error:
            message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._found(check, "failed", message, error)
            return False
        self._found(check, status, message)
        return status != "failed"

    def _timed(self, kind: str, request: Callable[[], _T]) -> _T:
        """Make a request a few times, and note how long it takes; the first may have to connect."""
        found = request()
        taken = []
        for _ in range(_TRIES):
            started = time.perf_counter()
            found = request()
            taken.append(time.perf_counter() - started)
        self.seconds[kind] = min(taken)
        return found

    def _reading(self) -> tuple[Status, str]:
        self._timed("list", lambda: next(iter(self._backend.list("pins/")), None))
        return "ok", "keys can be listed"

    def _marker(self) -> tuple[Status, str]:
        try:
            self._store.check()
        except StoreNotFoundError:
            self._there = False
            return "ok", "there is no store yet; the first save makes one"
        return "ok", "there is a store, of a format that this version reads"

    def _writing(self) -> tuple[Status, str]:
        keys = [f"probe/{secrets.token_hex(16)}" for _ in range(2 * (_TRIES + 1))]
        created = iter(keys)
        try:
            self._timed("create", lambda: self._backend.create(next(created), b"new"))
            self._timed("put", lambda: self._backend.put(keys[0], b"what time is it?"))
            if self._timed("get", lambda: self._backend.get(keys[0])) != b"what time is it?":
                return "failed", "what is read is not what was written: does a cache stand between?"
            self._modified = self._timed("head", lambda: self._backend.head(keys[0])).modified
        finally:
            left = iter(keys)
            self._timed("delete", lambda: self._backend.delete([next(left), next(left)]))
        if next((entry for entry in self._backend.list(keys[0])), None) is not None:
            return "failed", "a deleted key is still listed: does a cache stand between?"
        return "ok", "keys can be created, replaced, read and deleted"

    def _exclusive(self) -> tuple[Status, str]:
        if self._backend.probe_exclusive():
            return "ok", "of two processes that create one key, one wins: any number may write"
        return "warning", "not here: only one process at a time may write, and nothing is collected"

    def _clock(self) -> tuple[Status, str]:
        if self._modified is None:
            return "warning", "the server does not tell the time: saves of killed processes are never given up"
        ahead = self._modified - time.time()
        if abs(ahead) <= _SKEW:
            return "ok", "the server's and this machine's agree"
        return "warning", (
            f"the server's is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: nothing is "
            "lost by that, but times and the ages in plans are wrong"
        )

    def _leftovers(self) -> tuple[Status, str]:
        now = time.time()

        def old(item: Any) -> bool:
            return item.modified is not None and now - item.modified >= _OLD

        counts = {
            "temporary files, unfinished uploads or empty folders": sum(map(old, self._backend.leftovers())),
            "probes": sum(map(old, self._backend.list("probe/"))),
            "saves without a heartbeat for an hour": sum(map(old, list_pins(self._backend))),
            "lists of collections that did not finish": sum(map(old, self._backend.list("gc/"))),
        }
        found = [f"{count} {what}" for what, count in counts.items() if count]
        if found:
            return "warning", f"{', '.join(found)}: 'incckpt gc' removes them"
        return "ok", "none of dead processes"


class _Counting(WrapperBackend):
    """Counts requests by kind."""

    def __init__(self, inner: Backend, remote: bool) -> None:
        super().__init__(inner)
        self.remote = remote
        self.counts: Counter[str] = Counter()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.counts["get"] += 1
        return super().get(key, start, end)

    def put(self, key: str, data: ReadableBuffer) -> None:
        self.counts["put"] += 1
        super().put(key, data)

    def create(self, key: str, data: ReadableBuffer) -> None:
        self.counts["create"] += 1
        super().create(key, data)

    def delete(self, keys: Any) -> None:
        self.counts["delete"] += 1
        super().delete(keys)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self.counts["list"] += 1
        return super().list(prefix)

    def head(self, key: str) -> Entry:
        self.counts["head"] += 1
        return super().head(key)


def _requests(remote: bool) -> dict[str, int]:
    """Return the requests of a save of one small tensor, by kind: counted on one, in memory."""
    with MemoryBackend(f"incckpt-doctor-{secrets.token_hex(8)}") as memory:
        backend = _Counting(memory, remote)
        with CheckpointManager(backend, threads=1) as manager:
            for step in (1, 2):
                backend.counts.clear()
                manager.save(step, {"tensor": torch.full((8,), step)}).result()
                manager.wait()
            counts = {kind: count for kind, count in backend.counts.items() if count}
        memory.delete([entry.key for entry in memory.list()])
    return counts
