"""What the backends over a network share: a client per process, a deadline per request, errors by HTTP status.

Requests are coroutines on fsspec's event loop, in its own thread; the caller's thread waits. Each is tried once: the
libraries' own retries are switched off, and :mod:`incckpt.backends.retry` repeats what may pass.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterable, MutableMapping
from typing import Any, Generic, TypeAlias, TypeVar

from fsspec.asyn import get_loop

from incckpt.backends.base import Backend
from incckpt.errors import (
    BackendError,
    BackendPermissionError,
    BackendTimeoutError,
    IncckptError,
    KeyExistsError,
    KeyNotFoundError,
    OptionError,
    UnsupportedOperationError,
)

__all__ = ["CredentialsExpired", "Deadline", "RemoteBackend", "RequestFailed", "gather", "take_options"]

logger = logging.getLogger(__name__)

A = TypeVar("A")
C = TypeVar("C")
T = TypeVar("T")

POOL = 32
"""Requests in flight at once, and connections kept, for each backend."""

NO_SUCH_ROOT = "NoSuchBucket"
"""The code of a 404 that is about the bucket or container, not about a key."""

_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 525, 527, 529})

_OPENING = 120.0  # seconds
_CLOSING = 10.0

_abandoned: list[object] = []
"""Clients inherited over a fork. They are the parent's: closing or finalising them here would hang or cut its
connections, so they are kept for ever."""


class Deadline:
    """The time that one request may take: a fixed patience, and more for every byte that it moves."""

    def __init__(self, timeout: asyncio.Timeout, patience: float, rate: float) -> None:
        self._timeout = timeout
        self._patience = patience
        self._rate = rate

    def expect(self, nbytes: int) -> None:
        """Start the clock again: from now, `nbytes` are still to come."""
        self._timeout.reschedule(asyncio.get_running_loop().time() + self._patience + nbytes / self._rate)


class RequestFailed(Exception):
    """A server's answer that is not success.

    Attributes
    ----------
    status
        The HTTP status.
    code
        The server's own name for the error, or an empty string.
    transient
        Whether the same request may succeed when repeated; by default as the status says.
    """

    def __init__(self, status: int, code: str, message: str, *, transient: bool | None = None) -> None:
        super().__init__(f"{status} {code}: {message}" if code else f"{status}: {message}")
        self.status = status
        self.code = code
        self.transient = status in _TRANSIENT if transient is None else transient


class CredentialsExpired(RequestFailed):
    """The server says that the credentials are no longer good; new ones may be had from where they came."""


Request: TypeAlias = Callable[[C, Deadline], Coroutine[Any, Any, T]]


class RemoteBackend(Backend, Generic[C]):
    """A backend whose requests are coroutines that take a client of type `C`.

    Parameters
    ----------
    url
        The root, without credentials.
    timeout
        Seconds that a request may take besides moving bytes.
    min_rate
        Bytes per second below which moving bytes is taken for a stall.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, min_rate: float = 128 * 1024) -> None:
        self.url = url
        self._timeout = timeout
        self._min_rate = min_rate
        self._lock = threading.Lock()
        self._connection: tuple[C, asyncio.Semaphore] | None = None
        _backends.add(self)

    # -- for the subclass ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _connect(self) -> C:
        """Make a client, with credentials as they are now."""

    @abstractmethod
    def _failure(self, exc: Exception) -> RequestFailed | None:
        """Return what the server answered, or ``None`` where there was no answer (a lost connection, say)."""

    @abstractmethod
    def _is_transient(self, exc: Exception) -> bool:
        """Whether an exception other than an answer means that the connection failed, so that repeating may help."""

    @abstractmethod
    def _advice(self, failure: RequestFailed, verb: str) -> str:
        """Return the likely cause of an answer and what to do, or an empty string."""

    async def _open(self, client: C) -> None:
        """Do what a client needs before a request, such as asking for credentials; nothing once it is done."""

    async def _disconnect(self, client: C) -> None:
        """Let go of a client's connections."""

    def _call(self, verb: str, key: str, request: Request[C, T], nbytes: int = 0) -> T:
        """Run a request under a deadline that allows for `nbytes` to be sent; returns its result.

        Expired credentials are renewed once.

        Raises
        ------
        BackendError
            Naming `key`; see `_error`.
        """
        renewed = False
        while True:
            client, slots = self._client()
            future = asyncio.run_coroutine_threadsafe(self._bounded(client, slots, request, nbytes), get_loop())
            try:
                return future.result()
            except Exception as exc:
                if isinstance(exc, IncckptError):
                    raise
                failure = exc if isinstance(exc, RequestFailed) else self._failure(exc)
                if isinstance(failure, CredentialsExpired) and not renewed:
                    renewed = True
                    self._renew(client)
                    continue
                raise self._error(exc, failure, verb, key) from exc
            except BaseException:
                future.cancel()
                raise

    async def _bounded(self, client: C, slots: asyncio.Semaphore, request: Request[C, T], nbytes: int) -> T:
        async with slots:
            async with asyncio.timeout(_OPENING):
                await self._open(client)
            async with asyncio.timeout(self._timeout + nbytes / self._min_rate) as timeout:
                return await request(client, Deadline(timeout, self._timeout, self._min_rate))

    # -- clients ------------------------------------------------------------------------------------------------------

    def _client(self) -> tuple[C, asyncio.Semaphore]:
        with self._lock:
            if self._connection is None:
                self._connection = self._connect(), asyncio.Semaphore(POOL)
            return self._connection

    def _renew(self, used: C) -> None:
        """Forget the client, so that the next request makes one with new credentials."""
        with self._lock:
            if self._connection is not None and self._connection[0] is used:
                self._connection = None  # requests in flight still hold it; it closes when the last is done

    def close(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            closing = asyncio.run_coroutine_threadsafe(self._disconnect(connection[0]), get_loop())
            try:
                closing.result(_CLOSING)
            except TimeoutError:
                logger.warning("%s: its connections did not close in %g s", self.url, _CLOSING)

    # -- errors -------------------------------------------------------------------------------------------------------

    def _error(self, exc: Exception, failure: RequestFailed | None, verb: str, key: str) -> BackendError:
        subject = f"{self.url}: cannot {verb} {key!r}"
        if failure is not None:
            return self._refusal(failure, verb, key, subject)
        if isinstance(exc, TimeoutError):
            message = f"{subject}: no answer in time ({self._timeout:g} s, and 1 s for every {self._min_rate:g} bytes)"
            return BackendTimeoutError(errno.ETIMEDOUT, message, transient=True)
        message = f"{subject}: {type(exc).__name__}: {exc}"
        if isinstance(exc, OSError) and exc.errno is not None:
            return BackendError(exc.errno, message, transient=self._is_transient(exc))
        return BackendError(errno.EIO, message, transient=self._is_transient(exc))

    def _refusal(self, failure: RequestFailed, verb: str, key: str, subject: str) -> BackendError:
        advice = self._advice(failure, verb)
        message = f"{subject}: {failure}" + (f" ({advice})" if advice else "")
        status = failure.status
        if failure.transient:
            return BackendError(errno.EIO, message, transient=True)
        if status == 412:
            return KeyExistsError(errno.EEXIST, f"{self.url}: key {key!r} exists")
        if status in (401, 403):
            return BackendPermissionError(errno.EACCES, message)
        if status == 501:
            return UnsupportedOperationError(errno.ENOTSUP, message)
        if status in (404, 410):
            if failure.code == NO_SUCH_ROOT:
                return BackendError(errno.ENOENT, message)
            return self._missing(key)
        if status in (413, 507):
            return BackendError(errno.ENOSPC, message)
        return BackendError(errno.EIO, message)

    def _missing(self, key: str) -> KeyNotFoundError:
        return KeyNotFoundError(errno.ENOENT, f"{self.url}: no key {key!r}")

    def _cut_short(self, key: str, got: int, wanted: int) -> BackendError:
        message = f"{self.url}: the transfer of {key!r} ended after {got} of {wanted} bytes"
        return BackendError(errno.EIO, message, transient=True)


_backends: weakref.WeakSet[RemoteBackend[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in _backends:
        backend._lock = threading.Lock()  # a thread of the parent may have held the old one
        if backend._connection is not None:
            _abandoned.append(backend._connection)
            backend._connection = None


os.register_at_fork(after_in_child=_after_fork)


async def gather(function: Callable[[A], Coroutine[Any, Any, T]], arguments: Iterable[A]) -> list[T]:
    """Call `function` with each argument, at most `POOL` at once; the first exception cancels the rest."""
    slots = asyncio.Semaphore(POOL)

    async def run(argument: A) -> T:
        async with slots:
            return await function(argument)

    tasks = [asyncio.ensure_future(run(argument)) for argument in arguments]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def take_options(options: MutableMapping[str, Any], url: str) -> dict[str, float]:
    """Take this library's own options out of a file system's: ``request_timeout`` in seconds.

    Raises
    ------
    OptionError
        If it is not a positive number.
    """
    if "request_timeout" not in options:
        return {}
    timeout = options.pop("request_timeout")
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise OptionError(f"{url}: request_timeout is to be a number of seconds, not {timeout!r}")
    return {"timeout": float(timeout)}
