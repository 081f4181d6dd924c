"""Transfers of large bodies over blocking sockets: in the caller's thread, without copies on the way.

On an event loop one thread handles all bodies: it allocates, copies and joins their pieces, which takes two to three
times the processor time of the kernel's share of a transfer. Here the standard library's connections let the kernel
copy from and to the caller's memory, while the interpreter's lock is free. The backend's own client signs each request
first, and so determines its address and credentials.
"""

from __future__ import annotations

import functools
import http.client
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

__all__ = ["Connections", "Patience", "Reply", "SignedRequest"]

_PIECE = 1 << 20  # bytes between checks of the deadline
_SMALL = 1 << 16  # bytes: if no more of a body is unread, read it and keep the connection
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request ready to be sent."""

    method: str
    url: str
    headers: Mapping[str, str | bytes]


class Patience:
    """The time that one request may take: a fixed part, and more for every byte it moves.

    Parameters
    ----------
    seconds
        The fixed part.
    rate
        Bytes per second; a slower transfer counts as stalled.
    """

    def __init__(self, seconds: float, rate: float) -> None:
        self._seconds = seconds
        self._rate = rate
        self.expect(0)

    def expect(self, nbytes: int) -> None:
        """Restart the clock, with `nbytes` still to be moved."""
        self._until = time.monotonic() + self._seconds + nbytes / self._rate

    def left(self) -> float:
        """Return the seconds left.

        Raises
        ------
        TimeoutError
            If none are.
        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        return left


class Reply:
    """A server's answer, with its body still unread.

    Attributes
    ----------
    status
        The HTTP status.
    headers
        Names in lower case.
    length
        Bytes of the body still unread; ``None`` if the server does not say.
    """

    def __init__(self, reply: http.client.HTTPResponse, connection: http.client.HTTPConnection, wait: Patience) -> None:
        self._reply = reply
        self._socket = connection.sock  # the connection drops its own reference if the server will close it
        self._wait = wait
        self.status = reply.status
        self.headers = {name.lower(): value for name, value in reply.headers.items()}

    @property
    def length(self) -> int | None:
        """Bytes of the body still unread; ``None`` if the server does not say."""
        return self._reply.length

    def read(self, nbytes: int) -> bytes:
        """Return the next bytes of the body, at most `nbytes`; fewer only at its end."""
        self._tick()
        return self._reply.read(nbytes)

    def read_into(self, parts: Sequence[memoryview]) -> int:
        """Read the body into `parts` (``uint8`` each), in order; return the number of bytes read."""
        done = 0
        for part in parts:
            at = 0
            while at < len(part):
                self._tick()
                got = self._reply.readinto(part[at : at + _PIECE])
                if not got:
                    return done + at
                at += got
            done += len(part)
        return done

    def _tick(self) -> None:
        if self._socket is not None:
            self._socket.settimeout(self._wait.left())


class Connections:
    """Connections to servers, kept for later requests and shared by threads.

    Parameters
    ----------
    limit
        The most requests in flight.
    connecting
        Seconds that making a connection may take.
    tls
        Returns the context for ``https``; called when it is needed first, as reading certificates takes a while.
    """

    def __init__(
        self, *, limit: int, connecting: float, tls: Callable[[], ssl.SSLContext] = ssl.create_default_context
    ) -> None:
        self._slots = threading.BoundedSemaphore(limit)
        self._connecting = connecting
        self._tls = functools.cache(tls)
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], deque[http.client.HTTPConnection]] = {}
        self._closed = False

    @contextmanager
    def request(self, request: SignedRequest, wait: Patience, body: memoryview | None = None) -> Iterator[Reply]:
        """Send a request and yield the answer; if an idle connection turns out to be closed, use another.

        Parameters
        ----------
        body
            ``uint8[n]``; the request's headers must state its length.

        Raises
        ------
        OSError, http.client.HTTPException
            If there is no answer; `TimeoutError` once `wait` is over.
        """
        with self._slots:
            connection, reply = self._ask(request, wait, body)
            keep = False
            try:
                yield Reply(reply, connection, wait)
                if reply.length is not None and 0 < reply.length <= _SMALL:
                    reply.read()
                keep = reply.isclosed() and connection.sock is not None
            finally:
                if keep:
                    self._give_back(request.url, connection)
                else:
                    reply.close()
                    connection.close()

    def close(self) -> None:
        """Close idle connections now, and each one in use after its request."""
        with self._lock:
            self._closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _ask(
        self, request: SignedRequest, wait: Patience, body: memoryview | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        _, _, path, query, _ = urlsplit(request.url)
        target = f"{path or '/'}?{query}" if query else path or "/"
        headers = {**request.headers, "Accept-Encoding": "identity"}
        while True:
            connection = self._take(request.url)
            used = connection.sock is not None
            try:
                if connection.sock is None:
                    connection.timeout = min(self._connecting, wait.left())
                    connection.connect()
                connection.sock.settimeout(wait.left())
                connection.request(request.method, target, headers=headers)
                if body is not None:
                    _send(connection, body, wait)
                connection.sock.settimeout(wait.left())
                return connection, connection.getresponse()
            except BaseException as error:
                connection.close()
                if not used or not isinstance(error, _STALE):
                    raise
                # The server had closed an idle connection. That is normal: try another.

    def _take(self, url: str) -> http.client.HTTPConnection:
        scheme, netloc, _, _, _ = urlsplit(url)
        while True:
            with self._lock:
                kept = self._idle.get((scheme, netloc))
                connection = kept.pop() if kept else None
            if connection is None:
                break
            if not _readable(connection):
                return connection
            connection.close()  # the server closed it, or it is out of step
        if scheme == "https":
            return http.client.HTTPSConnection(netloc, context=self._tls())
        return http.client.HTTPConnection(netloc)

    def _give_back(self, url: str, connection: http.client.HTTPConnection) -> None:
        scheme, netloc, _, _, _ = urlsplit(url)
        with self._lock:
            if not self._closed:
                self._idle.setdefault((scheme, netloc), deque()).append(connection)
                return
        connection.close()


def _send(connection: http.client.HTTPConnection, body: memoryview, wait: Patience) -> None:
    """Send a body after its headers."""
    try:
        for start in range(0, len(body), _PIECE):
            connection.sock.settimeout(wait.left())
            connection.send(body[start : start + _PIECE])
    except ConnectionError:
        # A server that refuses may answer and hang up before it has the whole body.
        if not _readable(connection):
            raise


def _readable(connection: http.client.HTTPConnection) -> bool:
    """Whether a read would not block: there is an early answer, or the connection is closed."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        return bool(poll.poll(0))
    return True
