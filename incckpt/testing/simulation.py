"""A simulated server and concurrent processes whose requests reach it in any order.

:mod:`incckpt.testing.exploration` tries *every* order within stated bounds; :mod:`incckpt.testing.shuffle` draws one
from a seed, for longer runs.

A process may crash (it never runs again). Its requests may be dropped, done without a reply, or done long after it gave
up on them, and its deletes may be repeated later.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from incckpt.backends.base import Backend, Entry, ReadableBuffer, validate_key, validate_prefix
from incckpt.errors import BackendError, KeyExistsError, KeyNotFoundError

if TYPE_CHECKING:
    from incckpt.testing.turns import Turns

__all__ = [
    "LOST",
    "WRITES",
    "Failure",
    "FolderBackend",
    "Killed",
    "Process",
    "Program",
    "Reply",
    "Request",
    "Server",
    "SimulatedBackend",
    "Violation",
    "current",
    "run_alone",
    "running_as",
]

WRITES = ("put", "create", "delete")


class Violation(AssertionError):
    """A promise was broken; the message names it and the steps that led there."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a process to the server.

    Attributes
    ----------
    op
        Name of a method of `Backend`; or ``"pause"``, which only lets others go first, ``"time"``, or ``"turn"``: which
        thread of the process goes on.
    keys
        The key, the prefix of a listing, the keys of a delete, or the numbers of the threads that can go on.
    data
        For ``put`` and ``create``.
    start, end
        For ``get``; for ``turn``, `start` is the thread that goes on unless another one is chosen.
    """

    op: str
    keys: tuple[str, ...] = ()
    data: bytes = b""
    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        if self.op == "delete" and len(self.keys) != 1:
            return f"delete {len(self.keys)} keys: {', '.join(self.keys)}"
        return f"{self.op} {', '.join(self.keys)}" + (f" {self.data.decode()}" if len(self.data) == 7 else "")

    def conflicts(self, other: Request) -> bool:
        """Whether the order of the two requests can make a difference."""
        mine, others = self.op in WRITES, other.op in WRITES
        if not mine and not others:
            return False
        if self.op == "list" or other.op == "list":
            listing, write = (self, other) if others else (other, self)
            return any(key.startswith(listing.keys[0]) for key in write.keys)
        return any(key in other.keys for key in self.keys)


@dataclass(frozen=True, slots=True)
class Failure:
    """A reply that the backend raises."""

    kind: type[BackendError]
    message: str
    transient: bool = False

    def error(self) -> BackendError:
        """Return the exception."""
        error = self.kind(self.message)
        error.transient = self.transient
        return error


Reply: TypeAlias = bytes | int | Entry | tuple[Entry, ...] | Failure | None

LOST = Failure(BackendError, "the reply was lost", transient=True)


class Server:
    """Bytes by key, strongly consistent, with a clock that moves only on request.

    Attributes
    ----------
    values
        Key -> value and time of its last change.
    time
        Seconds.
    mark
        A hash of the content.

    Parameters
    ----------
    timed
        Prefixes of the keys whose times are kept. Those of others are always 0, which reduces the number of states.
    """

    __slots__ = ("mark", "time", "timed", "values")

    def __init__(self, timed: tuple[str, ...] = ("",)) -> None:
        self.values: dict[str, tuple[bytes, int]] = {}
        self.time = 0
        self.mark = 0
        self.timed = timed

    def fork(self) -> Server:
        """Return a copy."""
        copy = Server.__new__(Server)
        copy.values, copy.time, copy.mark, copy.timed = self.values.copy(), self.time, self.mark, self.timed
        return copy

    def perform(self, request: Request) -> Reply:
        """Do the request and return the reply."""
        op, keys = request.op, request.keys
        if op == "list":
            return tuple(self._entry(key) for key in sorted(self.values) if key.startswith(keys[0]))
        if op == "delete":
            for key in keys:
                self._remove(key)
            return None
        if op == "pause":
            return None
        if op == "time":
            return self.time
        if op == "turn":
            return request.start
        key = keys[0]
        there = key in self.values
        if op == "put" or (op == "create" and not there):
            self._remove(key)
            modified = self.time if key.startswith(self.timed) else 0
            self.values[key] = (request.data, modified)
            self.mark ^= _digest(key, request.data, modified)
            return None
        if op == "create":
            return Failure(KeyExistsError, f"key {key!r} exists")
        if not there:
            return Failure(KeyNotFoundError, f"no key {key!r}")
        if op == "get":
            return self.values[key][0][request.start : request.end]
        assert op == "head", op
        return self._entry(key)

    def _entry(self, key: str) -> Entry:
        data, modified = self.values[key]
        return Entry(key, len(data), float(modified))

    def _remove(self, key: str) -> None:
        found = self.values.pop(key, None)
        if found is not None:
            self.mark ^= _digest(key, *found)


@functools.lru_cache(1 << 16)
def _digest(key: str, data: bytes, time: int) -> int:
    text = b"%d %s %s" % (time, key.encode(), data)
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest())


class SimulatedBackend(Backend):
    """A backend that passes every request to `exchange` and takes its reply.

    Parameters
    ----------
    exchange
        Returns the reply, or raises to end the process.
    """

    url = "simulated://"
    remote = False

    def __init__(self, exchange: Callable[[Request], Reply]) -> None:
        self._exchange = exchange

    def _ask(self, request: Request) -> Any:
        reply = self._exchange(request)
        if isinstance(reply, Failure):
            raise reply.error()
        return reply

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data: bytes = self._ask(Request("get", (validate_key(key),), start=start, end=end))
        return data

    def put(self, key: str, data: ReadableBuffer) -> None:
        self._ask(Request("put", (validate_key(key),), bytes(data)))

    def create(self, key: str, data: ReadableBuffer) -> None:
        self._ask(Request("create", (validate_key(key),), bytes(data)))

    def probe_exclusive(self) -> bool:
        """Return `exclusive`, without a request."""
        return self.exclusive

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(validate_key(key) for key in keys)
        if keys:
            self._ask(Request("delete", keys))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return iter(self._ask(Request("list", (validate_prefix(prefix),))))

    def head(self, key: str) -> Entry:
        entry: Entry = self._ask(Request("head", (validate_key(key),)))
        return entry


class FolderBackend(SimulatedBackend):
    """One of several stores that a simulated server has, each in a folder.

    Parameters
    ----------
    exchange
        See `SimulatedBackend`.
    folder
        What the keys of the store begin with there.
    """

    def __init__(self, exchange: Callable[[Request], Reply], folder: str) -> None:
        super().__init__(exchange)
        self.url = f"simulated://{folder}"
        self._folder = folder

    def _ask(self, request: Request) -> Any:
        keys = request.keys
        found = super()._ask(replace(request, keys=tuple(self._folder + key for key in keys)) if keys else request)
        if request.op == "list":
            return tuple(replace(entry, key=entry.key.removeprefix(self._folder)) for entry in found)
        return replace(found, key=keys[0]) if request.op == "head" else found


class Process:
    """The process in which a program runs.

    Attributes
    ----------
    name
        The process's name.
    backend
        Its connection to the server.
    turns
        Its threads, if it has several.
    """

    def __init__(self, name: str, number: int, exchange: Callable[[Request], Reply]) -> None:
        self.name = name
        self.backend = SimulatedBackend(exchange)
        self.turns: Turns | None = None
        self.events: list[object] = []
        self._number = number
        self._nonces = 0

    def emit(self, event: object) -> None:
        """Report an event to the checks of the promises, before the next request."""
        self.events.append(event)

    def pause(self) -> None:
        """Let others go first. An explorer interleaves processes once each has reached its first pause."""
        self.backend._exchange(Request("pause"))

    def time(self) -> float:
        """Return the server's time, as a clock of this process's own."""
        return float(self.backend._ask(Request("time")))

    def nonce(self, nbytes: int = 8) -> str:
        """Return hexadecimal digits that differ between processes and calls, but not between runs."""
        self._nonces += 1
        return f"{self._number:0{nbytes}x}{self._nonces:0{nbytes}x}"


Program: TypeAlias = Callable[[Process], None]

_running = threading.local()


@contextmanager
def running_as(process: Process) -> Iterator[None]:
    """In this context, make `current` return `process` in this thread."""
    before = getattr(_running, "process", None)
    _running.process = process
    try:
        yield
    finally:
        _running.process = before


def current() -> Process:
    """Return the simulated process that runs in this thread."""
    process: Process = _running.process
    return process


class Killed(BaseException):
    """The process is dead. No handler of `Exception` catches this, and every later request raises it again."""


def run_alone(
    server: Server, program: Program, name: str = "alone", number: int = 0xA, until: str | None = None
) -> Process:
    """Run a program alone, to its end, or up to a request whose text begins with `until`."""

    def exchange(request: Request) -> Reply:
        if until is not None and str(request).startswith(until):
            raise Killed
        return server.perform(request)

    process = Process(name, number, exchange)
    with running_as(process), suppress(Killed):
        program(process)
    return process
