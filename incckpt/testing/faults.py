"""Backends that fail, count, or lose power on demand.

A test states as data *at which operation* something happens::

    store = FaultyBackend(MemoryBackend("t"), [
        Fault("put", "objects/*", nth=3, do=Fail(BackendError("no", transient=True))),
        Fault("create", "refs/*", do=Fail(BackendError("reset"), after_work=True)),  # done, but the reply is lost
        Fault(nth=17, do=Kill()),                                                # any operation, the 17th
        Fault("list", "pins/*", do=Lie(lambda entries: [])),                     # an answer that is wrong
    ])

For a local store, :mod:`incckpt.testing.disk` does the same one level lower, at each system call.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NoReturn, Protocol

from incckpt.backends.base import Backend, Entry, ReadableBuffer
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError

__all__ = [
    "Action",
    "Call",
    "CountingBackend",
    "Fail",
    "Fault",
    "FaultyBackend",
    "Kill",
    "Lie",
    "Operation",
    "Pause",
    "kill_process",
]


@dataclass(frozen=True, slots=True)
class Operation:
    """One request to a backend.

    Attributes
    ----------
    name
        ``get``, ``put``, ``create``, ``delete``, ``list`` or ``head``.
    keys
        The key, the prefix of a listing, or the keys of a delete.
    nbytes
        Bytes sent; 0 for operations that send no value.
    """

    name: str
    keys: tuple[str, ...]
    nbytes: int = 0


class Action(Protocol):
    """What a fault does, before and after the operation."""

    def before(self, operation: Operation) -> None:
        """Run before the inner backend does the operation."""

    def after(self, operation: Operation) -> None:
        """Run after the inner backend has done the operation, and before the caller gets the result."""


@dataclass
class Fail:
    """Raise an error; with ``after_work=True`` after the operation, as if its reply were lost."""

    error: BaseException = field(default_factory=lambda: BackendError("injected fault", transient=True))
    after_work: bool = False

    def before(self, operation: Operation) -> None:
        """Raise the error, unless the operation comes first."""
        if not self.after_work:
            raise self.error

    def after(self, operation: Operation) -> None:
        """Raise the error in place of the reply."""
        raise self.error


@dataclass
class Call:
    """Call a function with the operation, before or after it is done; what the function raises reaches the caller."""

    function: Callable[[Operation], object]
    after_work: bool = False

    def before(self, operation: Operation) -> None:
        """Call the function, unless the operation comes first."""
        if not self.after_work:
            self.function(operation)

    def after(self, operation: Operation) -> None:
        """Call the function, if the operation comes first."""
        if self.after_work:
            self.function(operation)


def kill_process(*_: object) -> NoReturn:
    """Kill this process at once, as ``kill -9`` does: no clean-up code runs."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived SIGKILL")


class Kill(Call):
    """Kill this process, before or after the operation."""

    def __init__(self, *, after_work: bool = False) -> None:
        super().__init__(kill_process, after_work)


@dataclass
class Lie:
    """Answer something else than the truth; the work is done, but for writes as `tell` says.

    Attributes
    ----------
    tell
        Given the answer, returns what the caller gets: the bytes of a value, the entries of a listing, the entry of a
        head. Given ``True`` before a put, a create or a delete: whether it is done. It is answered either way.
    """

    tell: Callable[[Any], Any]

    def before(self, operation: Operation) -> None:
        """Do nothing."""

    def after(self, operation: Operation) -> None:
        """Do nothing."""


@dataclass
class Pause:
    """Stop at the operation until the test resumes it.

    Attributes
    ----------
    reached
        Set when the operation has reached the pause.
    resume
        The test sets it to go on.
    """

    after_work: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)
    limit: float = 60.0

    def before(self, operation: Operation) -> None:
        """Wait, unless the operation comes first."""
        if not self.after_work:
            self._wait(operation)

    def after(self, operation: Operation) -> None:
        """Wait, if the operation comes first."""
        if self.after_work:
            self._wait(operation)

    def _wait(self, operation: Operation) -> None:
        self.reached.set()
        if not self.resume.wait(self.limit):
            raise AssertionError(f"{operation} was not resumed within {self.limit} s")


@dataclass(frozen=True)
class Fault:
    """Where something happens, and what.

    Attributes
    ----------
    op, key
        Shell patterns for the operation's name and one of its keys; they match everything by default.
    nth
        The first matching operation to strike, from 1.
    times
        How many to strike in a row; ``None`` for all from there.
    do
        What happens.
    """

    op: str = "*"
    key: str = "*"
    nth: int = 1
    times: int | None = 1
    do: Action = field(default_factory=Fail)

    def matches(self, operation: Operation) -> bool:
        """Whether the patterns match `operation`."""
        return fnmatchcase(operation.name, self.op) and any(fnmatchcase(key, self.key) for key in operation.keys)


def _truth(answer: Any) -> Any:
    return answer


class _ObservedBackend(WrapperBackend):
    """Does every operation of the inner backend in the context `_around`.

    What the context gives turns an answer into what the caller is told, and says of a write whether it is done.
    """

    @contextmanager
    def _around(self, operation: Operation) -> Iterator[Callable[[Any], Any]]:
        yield _truth

    def _received(self, operation: Operation, nbytes: int) -> None:
        """Called with the number of bytes that a `get` received."""

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        operation = Operation("get", (key,))
        with self._around(operation) as told:
            data: bytes = told(self.inner.get(key, start, end))
            self._received(operation, len(data))
        return data

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        operation = Operation("get", (key,))
        with self._around(operation) as told:
            if told is _truth:
                nbytes = self.inner.get_into(key, parts)
            else:
                data: bytes = told(self.inner.get(key))
                nbytes, rest = len(data), memoryview(data)
                for part in parts:
                    piece, rest = rest[: len(part)], rest[len(part) :]
                    part[: len(piece)] = piece
            self._received(operation, nbytes)
        return nbytes

    def put(self, key: str, data: ReadableBuffer) -> None:
        with self._around(Operation("put", (key,), memoryview(data).nbytes)) as told:
            if told(True):
                self.inner.put(key, data)

    def create(self, key: str, data: ReadableBuffer) -> None:
        with self._around(Operation("create", (key,), memoryview(data).nbytes)) as told:
            if told(True):
                self.inner.create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        with self._around(Operation("delete", keys)) as told:
            if told(True):
                self.inner.delete(keys)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._around(Operation("list", (prefix,))) as told:
            found = told(list(self.inner.list(prefix)))
        yield from found

    def head(self, key: str) -> Entry:
        with self._around(Operation("head", (key,))) as told:
            entry: Entry = told(self.inner.head(key))
            return entry


class FaultyBackend(_ObservedBackend):
    """Applies a script of faults to a backend's operations.

    Parameters
    ----------
    inner
        The backend that does the work.
    script
        Each fault counts its own matches. Several may strike the same operation, in order.
    """

    def __init__(self, inner: Backend, script: Sequence[Fault] = ()) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._script = [(fault, Counter[str]()) for fault in script]

    @contextmanager
    def _around(self, operation: Operation) -> Iterator[Callable[[Any], Any]]:
        striking = []
        with self._lock:
            for fault, seen in self._script:
                if fault.matches(operation):
                    seen["matched"] += 1
                    past = seen["matched"] - fault.nth
                    if past >= 0 and (fault.times is None or past < fault.times):
                        seen["struck"] += 1
                        striking.append(fault)
        for fault in striking:
            fault.do.before(operation)
        lies = [fault.do.tell for fault in striking if isinstance(fault.do, Lie)]
        yield functools.partial(functools.reduce, lambda told, tell: tell(told), lies) if lies else _truth
        for fault in striking:
            fault.do.after(operation)

    @property
    def struck(self) -> int:
        """How many times a fault has struck; tests that expect one should check."""
        with self._lock:
            return sum(seen["struck"] for _, seen in self._script)


class CountingBackend(_ObservedBackend):
    """Counts operations and bytes.

    Attributes
    ----------
    operations
        Every operation begun, in order.
    calls
        Number of operations by name.
    bytes_put, bytes_got
        Bytes of values sent (including failed attempts) and received.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        with self._lock:
            self.operations: list[Operation] = []
            self.calls: Counter[str] = Counter()
            self.bytes_put = 0
            self.bytes_got = 0

    @contextmanager
    def _around(self, operation: Operation) -> Iterator[Callable[[Any], Any]]:
        with self._lock:
            self.operations.append(operation)
            self.calls[operation.name] += 1
            self.bytes_put += operation.nbytes
        yield _truth

    def _received(self, operation: Operation, nbytes: int) -> None:
        with self._lock:
            self.bytes_got += nbytes

    def keys(self, op: str = "*") -> list[str]:
        """Return the keys of the operations whose names match, in order."""
        with self._lock:
            return [key for done in self.operations if fnmatchcase(done.name, op) for key in done.keys]
