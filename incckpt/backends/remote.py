"""What the remote backends share: a client per process, a deadline per request, errors by HTTP status.

Requests are coroutines on fsspec's event loop, which has its own thread; the caller's thread waits. Each is tried once:
the libraries' own retries are off, and :mod:`incckpt.backends.retry` retries transient failures.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
import weakref
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import aiohttp
from fsspec.asyn import get_loop

from incckpt.backends.base import REMOTE_REQUESTS, Backend, ReadableBuffer
from incckpt.errors import (
    BackendError,
    BackendPermissionError,
    BackendTimeoutError,
    IncckptError,
    KeyExistsError,
    KeyNotFoundError,
    UnreachableError,
    UnsupportedOperationError,
)
from incckpt.options import checked_seconds
from incckpt.threads import shielded

__all__ = [
    "CredentialsExpired",
    "Deadline",
    "RemoteBackend",
    "RequestFailed",
    "WrongAnswer",
    "check_range",
    "gather",
    "is_page",
    "take_options",
]

logger = logging.getLogger(__name__)

A = TypeVar("A")
C = TypeVar("C")
T = TypeVar("T")

NO_SUCH_ROOT = "NoSuchBucket"
"""The code of a 404 that is about the bucket or container, not about a key."""

_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 525, 527, 529})

_OPENING = 120.0  # seconds
CONNECTING = 15.0
_CLOSING = 10.0
_PIECE = 1 << 20  # bytes

_abandoned: list[object] = []
"""Clients inherited across a fork. They belong to the parent: closing or finalising them here would hang or cut its
connections, so they are kept forever."""


class Deadline:
    """The time that one request may take: a fixed part, and more for every byte it moves."""

    def __init__(self, timeout: asyncio.Timeout, patience: float, rate: float) -> None:
        self._timeout = timeout
        self._patience = patience
        self._rate = rate

    def expect(self, nbytes: int) -> None:
        """Restart the clock, with `nbytes` still to be moved."""
        if not self._timeout.expired():  # part of a request may get here while all of it is being cancelled
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
        Whether the same request may succeed when repeated; by default, the status decides.
    """

    def __init__(self, status: int, code: str, message: str, *, transient: bool | None = None) -> None:
        super().__init__(f"{status} {code}: {message}" if code else f"{status}: {message}")
        self.status = status
        self.code = code
        self.transient = status in _TRANSIENT if transient is None else transient


class CredentialsExpired(RequestFailed):
    """The server says that the credentials have expired; their source may have new ones."""


class WrongAnswer(RequestFailed):
    """A success, but not an answer of the service: a portal's page, say, or what a broken proxy has left of one."""

    def __init__(self, status: int, what: str) -> None:
        message = f"{what}; does a proxy or a login page answer in the service's place?"
        super().__init__(status, "", message, transient=True)


class _Connection(Generic[C]):
    """A client and its number of users; used only on the event loop, once made."""

    def __init__(self, client: C) -> None:
        self.client = client
        self.slots = asyncio.Semaphore(REMOTE_REQUESTS)
        self.users = 0
        self.retired = False


class _RetiredError(Exception):
    """The connection takes no new requests."""


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
        Bytes per second; a slower transfer counts as stalled.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, min_rate: float = 128 * 1024) -> None:
        self.url = url
        self._timeout = timeout
        self._min_rate = min_rate
        self._lock = threading.Lock()
        self._connection: _Connection[C] | None = None
        _backends.add(self)

    # -- for the subclass ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _connect(self) -> C:
        """Make a client with the current credentials."""

    @abstractmethod
    def _failure(self, exc: Exception) -> RequestFailed | None:
        """Return the server's answer, or ``None`` if there was none (a lost connection, for example)."""

    @abstractmethod
    def _is_transient(self, exc: Exception) -> bool:
        """Whether an exception other than an answer means that the connection failed, so that a retry may help."""

    @abstractmethod
    def _advice(self, failure: RequestFailed, verb: str) -> str:
        """Return the likely cause of an answer and what to do, or an empty string."""

    async def _open(self, client: C) -> None:
        """Prepare a client for a request, by fetching credentials for example; does nothing if it is prepared."""

    async def _disconnect(self, client: C) -> None:
        """Close a client's connections."""

    def _call(self, verb: str, key: str, request: Request[C, T], nbytes: int = 0) -> T:
        """Run a request and return its result; its deadline allows for `nbytes` to be sent.

        Raises
        ------
        BackendError
            Naming `key`; see `_error`.
        """
        return self._connectedly(verb, key, lambda connection: self._on_loop(connection, request, nbytes))

    def _connectedly(self, verb: str, key: str, work: Callable[[_Connection[C]], T]) -> T:
        """Call `work` with the connection and return its result; if credentials expire, renew them and call it again.

        Raises
        ------
        BackendError
            Naming `key`; see `_error`.
        """
        return shielded(partial(self._connectedly_here, verb, key, work))

    def _connectedly_here(self, verb: str, key: str, work: Callable[[_Connection[C]], T]) -> T:
        renewed = False
        while True:
            try:
                connection = self._connected()
            except Exception as exc:
                if isinstance(exc, IncckptError):
                    raise
                raise self._error(exc, None, verb, key) from exc
            try:
                return work(connection)
            except Exception as exc:
                if isinstance(exc, IncckptError):
                    raise
                failure = exc if isinstance(exc, RequestFailed) else self._failure(exc)
                if isinstance(exc, _RetiredError) or (isinstance(failure, CredentialsExpired) and not renewed):
                    renewed = renewed or failure is not None
                    self._retire(connection)
                    continue
                raise self._error(exc, failure, verb, key) from exc

    def _on_loop(self, connection: _Connection[C], request: Request[C, T], nbytes: int = 0) -> T:
        """Run a request on the event loop and return its result."""
        future = asyncio.run_coroutine_threadsafe(self._bounded(connection, request, nbytes), get_loop())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _bounded(self, connection: _Connection[C], request: Request[C, T], nbytes: int) -> T:
        if connection.retired:  # by another thread, since we took it
            raise _RetiredError
        connection.users += 1
        try:
            async with connection.slots:
                async with asyncio.timeout(_OPENING):
                    await self._open(connection.client)
                async with asyncio.timeout(self._timeout + nbytes / self._min_rate) as timeout:
                    return await request(connection.client, Deadline(timeout, self._timeout, self._min_rate))
        finally:
            connection.users -= 1
            if connection.retired and not connection.users:
                await self._disconnect(connection.client)

    # -- clients ------------------------------------------------------------------------------------------------------

    def _connected(self) -> _Connection[C]:
        with self._lock:
            if self._connection is None:
                self._connection = _Connection(self._connect())
            return self._connection

    def _retire(self, connection: _Connection[C]) -> None:
        """Use a connection for no new request, and close it once those in flight are done."""

        async def retire() -> None:
            if not connection.retired:
                connection.retired = True
                if not connection.users:
                    await self._disconnect(connection.client)

        with self._lock:
            if self._connection is connection:
                self._connection = None
        try:
            asyncio.run_coroutine_threadsafe(retire(), get_loop()).result(_CLOSING)
        except TimeoutError:
            logger.warning("%s: its connections did not close in %g s", self.url, _CLOSING)

    def close(self) -> None:
        connection = self._connection
        if connection is not None:
            shielded(partial(self._retire, connection))

    # -- errors -------------------------------------------------------------------------------------------------------

    def _error(self, exc: Exception, failure: RequestFailed | None, verb: str, key: str) -> BackendError:
        subject = f"{self.url}: cannot {verb} {key!r}"
        if failure is not None:
            return self._refusal(failure, verb, key, subject)
        if isinstance(exc, TimeoutError):
            message = f"{subject}: no answer in time ({self._timeout:g} s, and 1 s for every {self._min_rate:g} bytes)"
            return BackendTimeoutError(errno.ETIMEDOUT, message, transient=True)
        message = f"{subject}: {type(exc).__name__}: {exc}"
        if _is_unreachable(exc):
            return UnreachableError(errno.ECONNREFUSED, message, transient=True)
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

    async def _read(
        self, key: str, reply: aiohttp.ClientResponse, deadline: Deadline, start: int, end: int | None
    ) -> bytes:
        """Read the body of an answer to a `byte_range` request."""
        if reply.status == 206:
            check_range(reply.headers.get("Content-Range"), start)
        length = reply.content_length
        if length is not None:
            deadline.expect(length)
        most = end if end is None or reply.status != 206 else max(1, end - start)
        if most is not None and (length is None or length > most):
            return (await _first(reply, most))[0 if reply.status == 206 else start : end]
        data = await reply.read()
        if length is not None and len(data) != length:
            raise self._cut_short(key, len(data), length)
        if reply.status == 206:
            return data if end is None else data[: max(0, end - start)]
        return data[start:end]  # the whole value, which a server that ignores ranges sends too

    def _look_then_put(self, key: str, data: ReadableBuffer) -> None:
        """Stand in for `create` where the server lacks it; does not protect against a second writer."""
        try:
            self.head(key)
        except KeyNotFoundError:
            self.put(key, data)
        else:
            raise KeyExistsError(errno.EEXIST, f"{self.url}: key {key!r} exists")

    def _missing(self, key: str) -> KeyNotFoundError:
        return KeyNotFoundError(errno.ENOENT, f"{self.url}: no key {key!r}")

    def _cut_short(self, key: str, got: int, wanted: int) -> BackendError:
        message = f"{self.url}: the transfer of {key!r} ended after {got} of {wanted} bytes"
        return BackendError(errno.EIO, message, transient=True)


async def _first(reply: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the first bytes of a body, and leave the rest unread: a server may send any number of them."""
    data = bytearray()
    while len(data) < most and (piece := await reply.content.read(most - len(data))):
        data += piece
    return bytes(data)


def _is_unreachable(exc: BaseException) -> bool:
    """Whether no connection could be made; clients wrap that error in their own."""
    reason: BaseException | None = exc
    while reason is not None:
        if isinstance(reason, aiohttp.ClientConnectorError | ConnectionRefusedError | socket.gaierror):
            return not isinstance(reason, aiohttp.ClientSSLError)
        reason = reason.__cause__ or reason.__context__
    return False


_backends: weakref.WeakSet[RemoteBackend[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in _backends:
        backend._lock = threading.Lock()  # a thread of the parent may have held the old one
        if backend._connection is not None:
            _abandoned.append(backend._connection)
            backend._connection = None


os.register_at_fork(after_in_child=_after_fork)


def byte_range(start: int, end: int | None) -> dict[str, str]:
    """Return the header that requests bytes ``[start, end)``; none for a whole value.

    HTTP knows no empty ranges: the header requests one byte instead, which the caller cuts off.
    """
    if start == 0 and end is None:
        return {}
    return {"Range": f"bytes={start}-" if end is None else f"bytes={start}-{max(start, end - 1)}"}


def check_range(content_range: str | None, start: int) -> None:
    """Refuse a part of a value that does not begin at `start`, by the header that says where it does.

    Raises
    ------
    WrongAnswer
    """
    if content_range is None or not content_range.replace("=", " ").startswith(f"bytes {start}-"):
        raise WrongAnswer(206, f"not the part that begins at byte {start} but {content_range!r}")


def is_page(headers: Mapping[str, str]) -> bool:
    """Whether an answer says that it is a web page, which no service sends with a success."""
    return "html" in next((value for name, value in headers.items() if name.lower() == "content-type"), "").lower()


def open_http(**options: Any) -> aiohttp.ClientSession:
    """Return a connection pool that leaves the deadlines of requests to us."""
    defaults: dict[str, Any] = {
        "connector": aiohttp.TCPConnector(limit=REMOTE_REQUESTS),
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECTING),
        "auto_decompress": False,
    }
    own = {"Accept-Encoding": "identity", "User-Agent": "incckpt", "Cache-Control": "no-cache"}
    headers = {**own, **options.pop("headers", {})}
    return aiohttp.ClientSession(**{**defaults, **options, "headers": headers})


async def pieces(view: memoryview) -> AsyncIterator[memoryview]:
    """Yield a body in pieces, so that sending it does not block the event loop."""
    for start in range(0, len(view), _PIECE):
        yield view[start : start + _PIECE]


async def gather(function: Callable[[A], Coroutine[Any, Any, T]], arguments: Iterable[A]) -> list[T]:
    """Call `function` with each argument, at most `REMOTE_REQUESTS` at once; the first exception cancels the rest."""
    slots = asyncio.Semaphore(REMOTE_REQUESTS)

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
    """Remove incckpt's own options from a file system's and return them: ``request_timeout``, in seconds.

    Raises
    ------
    OptionError
        If it is not a positive number.
    """
    if "request_timeout" not in options:
        return {}
    return {"timeout": checked_seconds(f"{url}: request_timeout", options.pop("request_timeout"), positive=True)}
