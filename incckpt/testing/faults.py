"""Backends that fail, count, or lose power on demand.

A test states as data *at which operation* something happens::

    store = FaultyBackend(MemoryBackend("t"), [
        Fault("put", "objects/*", nth=3, do=Fail(BackendError("no", transient=True))),
        Fault("create", "refs/*", do=Fail(BackendError("reset"), after_work=True)),  # done, but the reply is lost
        Fault(nth=17, do=Kill()),                                                # any operation, the 17th
    ])

For a local store, `StopAt` and `UnsyncedDisk` do the same one level lower, at each system call.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NoReturn, Protocol

from incckpt.backends.base import Backend, Entry, ReadableBuffer
from incckpt.backends.system import COMPOSED, SystemCalls
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
    "Operation",
    "Pause",
    "PowerCut",
    "StopAt",
    "UnsyncedDisk",
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


class _ObservedBackend(WrapperBackend):
    """Does every operation of the inner backend in the context `_around`."""

    @contextmanager
    def _around(self, operation: Operation) -> Iterator[None]:
        yield

    def _received(self, operation: Operation, nbytes: int) -> None:
        """Called with the number of bytes that a `get` received."""

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        operation = Operation("get", (key,))
        with self._around(operation):
            data = self.inner.get(key, start, end)
            self._received(operation, len(data))
        return data

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        operation = Operation("get", (key,))
        with self._around(operation):
            nbytes = self.inner.get_into(key, parts)
            self._received(operation, nbytes)
        return nbytes

    def put(self, key: str, data: ReadableBuffer) -> None:
        with self._around(Operation("put", (key,), memoryview(data).nbytes)):
            self.inner.put(key, data)

    def create(self, key: str, data: ReadableBuffer) -> None:
        with self._around(Operation("create", (key,), memoryview(data).nbytes)):
            self.inner.create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        with self._around(Operation("delete", keys)):
            self.inner.delete(keys)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._around(Operation("list", (prefix,))):
            found = list(self.inner.list(prefix))
        yield from found

    def head(self, key: str) -> Entry:
        with self._around(Operation("head", (key,))):
            return self.inner.head(key)


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
    def _around(self, operation: Operation) -> Iterator[None]:
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
        yield
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
    def _around(self, operation: Operation) -> Iterator[None]:
        with self._lock:
            self.operations.append(operation)
            self.calls[operation.name] += 1
            self.bytes_put += operation.nbytes
        yield

    def _received(self, operation: Operation, nbytes: int) -> None:
        with self._lock:
            self.bytes_got += nbytes

    def keys(self, op: str = "*") -> list[str]:
        """Return the keys of the operations whose names match, in order."""
        with self._lock:
            return [key for done in self.operations if fnmatchcase(done.name, op) for key in done.keys]


# -- below a local store ----------------------------------------------------------------------------------------------


class _WatchedCalls(SystemCalls):
    """Sends every system call through `_call`."""

    def __init__(self, inner: SystemCalls | None = None) -> None:
        self._inner = inner if inner is not None else SystemCalls()

    def _call(self, name: str, *args: Any) -> Any:
        return getattr(self._inner, name)(*args)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name not in _SYSTEM_CALLS:
            return super().__getattribute__(name)
        return lambda *args: self._call(name, *args)


_SYSTEM_CALLS = frozenset(name for name in vars(SystemCalls) if not name.startswith("_")) - COMPOSED


class PowerCut(BaseException):
    """The process is dead. No handler of `Exception` catches this, and every later system call raises it again."""


class StopAt(_WatchedCalls):
    """Acts just before the n-th system call.

    Parameters
    ----------
    nth
        From 1. With 0 nothing happens, and `count` tells how many calls were made.
    action
        Called with the call's name, such as :func:`kill_process`. If it returns, the call is made. By default a
        `PowerCut` is raised, by this and every later call.
    only
        Shell pattern: counts only calls of matching names (``fsync``, ``link`` …).
    inner
        Makes the calls.
    """

    def __init__(
        self,
        nth: int,
        action: Callable[[str], object] | None = None,
        *,
        only: str = "*",
        inner: SystemCalls | None = None,
    ) -> None:
        super().__init__(inner)
        self._nth = nth
        self._action = action
        self._only = only
        self._lock = threading.Lock()
        self._dead = False
        self._names: list[str] = []

    @property
    def count(self) -> int:
        """Number of calls counted."""
        return len(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """The calls counted, by name, in order."""
        return tuple(self._names)

    def _call(self, name: str, *args: Any) -> Any:
        with self._lock:
            if self._dead:
                raise PowerCut(name)
            strike = False
            if fnmatchcase(name, self._only):
                self._names.append(name)
                strike = len(self._names) == self._nth
                self._dead = strike and self._action is None
        if strike:
            if self._action is None:
                raise PowerCut(name)
            self._action(name)
        return super()._call(name, *args)


class UnsyncedDisk(_WatchedCalls):
    """A disk that keeps only what POSIX guarantees.

    A file's content is durable as of its last fsync, a folder's entries as of the folder's last fsync. Whatever existed
    when the disk was made is durable.

    Parameters
    ----------
    root
        An existing folder. The store may lie in a folder below it that does not exist yet.
    skip_fsync
        The number of an fsync, from 1, that succeeds but does nothing: a mutation that tests must detect.

    Attributes
    ----------
    fsyncs
        Number of fsyncs requested.
    """

    def __init__(self, root: str | os.PathLike[str], *, skip_fsync: int = 0) -> None:
        super().__init__()
        self._root = os.path.abspath(os.fspath(root))
        self._skip_fsync = skip_fsync
        self.fsyncs = 0
        self._lock = threading.RLock()
        self._next = 0
        self._ids: dict[tuple[int, int], int] = {}  # (device, inode) -> our number, never reused as inodes are
        self._content: dict[int, bytes] = {}  # number -> durable content
        self._entries: dict[str, dict[str, int | None]] = {}  # folder -> durable entries by name; None: a folder
        self._opened: dict[int, str] = {}
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    self._content[self._number(os.stat(path))] = file.read()
            self._entries[folder] = self._now(folder)

    def crash(self, *, keep_entries: bool = False) -> None:
        """Reduce the root to what survives a power cut.

        Parameters
        ----------
        keep_entries
            Whether all changes of folders happen to be on disk already; unsynced content is lost all the same. By
            default the worst case: every change since a folder's last fsync is undone.
        """
        with self._lock:
            if keep_entries:
                for folder, _, _ in os.walk(self._root):
                    self._entries[folder] = self._now(folder)
            for name in os.listdir(self._root):
                path = os.path.join(self._root, name)
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)
            self._restore(self._root)

    def _restore(self, folder: str) -> None:
        for name, number in self._entries.get(folder, {}).items():
            path = os.path.join(folder, name)
            if number is None:
                os.mkdir(path)
                self._restore(path)
            else:
                with open(path, "wb") as file:
                    file.write(self._content.get(number, b""))

    def _call(self, name: str, *args: Any) -> Any:
        with self._lock:
            result = super()._call(name, *args)
            if name == "open":
                self._opened[result] = args[0]
                if args[1] & os.O_CREAT:
                    self._renumber(os.fstat(result))
            elif name == "fsync":
                self._synced(self._opened[args[0]])
            return result

    def _synced(self, path: str) -> None:
        self.fsyncs += 1
        if self.fsyncs == self._skip_fsync:
            return
        if os.path.isdir(path):
            self._entries[path] = self._now(path)
        else:
            with open(path, "rb") as file:
                self._content[self._number(os.stat(path))] = file.read()

    def _now(self, folder: str) -> dict[str, int | None]:
        entries: dict[str, int | None] = {}
        with os.scandir(folder) as found:
            for entry in found:
                entries[entry.name] = None if entry.is_dir() else self._number(entry.stat())
        return entries

    def _number(self, found: os.stat_result) -> int:
        inode = found.st_dev, found.st_ino
        return self._ids[inode] if inode in self._ids else self._renumber(found)

    def _renumber(self, found: os.stat_result) -> int:
        self._next += 1
        self._ids[found.st_dev, found.st_ino] = self._next
        return self._next
