"""Large bodies over blocking sockets: in the caller's thread, straight out of and into the memory that they are in.

On the event loop every body of every request goes through one thread, in pieces that are allocated, copied and joined;
that costs a processor two to three times what the kernel's share of a transfer does. Here a connection is the standard
library's: the kernel copies from and to the caller's memory, and the interpreter's lock is free meanwhile. Who the
request is from, and where it goes, is settled by the backend's own client, which signs it.
"""

from __future__ import annotations

import http.client
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

__all__ = ["Connections", "Patience", "Reply", "SignedRequest"]

_PIECE = 1 << 20  # bytes between two looks at the clock
_SMALL = 1 << 16  # bytes left of a body that are read to keep a connection rather than to close it
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that can be sent as it is."""

    method: str
    url: str
    headers: Mapping[str, str | bytes]


class Patience:
    """The time that one request may take: a fixed one, and more for every byte that it moves.

    Parameters
    ----------
    seconds
        The fixed time.
    rate
        Bytes per second below which moving bytes is taken for a stall.
    """

    def __init__(self, seconds: float, rate: float) -> None:
        self._seconds = seconds
        self._rate = rate
        self.expect(0)

    def expect(self, nbytes: int) -> None:
        """Start the clock again: from now, `nbytes` are still to come."""
        self._until = time.monotonic() + self._seconds + nbytes / self._rate

    def left(self) -> float:
        """Return the seconds that are left.

        Raises
        ------
        TimeoutError
            If there are none.
        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        return left


class Reply:
    """A server's answer, its body still to come.

    Attributes
    ----------
    status
        The HTTP status.
    headers
        Names in lower case.
    length
        Bytes of the body that are still to come; ``None`` if the server does not say.
    """

    def __init__(self, reply: http.client.HTTPResponse, connection: http.client.HTTPConnection, wait: Patience) -> None:
        self._reply = reply
        self._socket = connection.sock  # the connection lets go of it if the server is going to close
        self._wait = wait
        self.status = reply.status
        self.headers = {name.lower(): value for name, value in reply.headers.items()}

    @property
    def length(self) -> int | None:
        """Bytes of the body that are still to come."""
        return self._reply.length

    def read(self, nbytes: int) -> bytes:
        """Return the next bytes of the body, at most `nbytes`; fewer only at its end."""
        self._tick()
        return self._reply.read(nbytes)

    def read_into(self, parts: Sequence[memoryview]) -> int:
        """Fill `parts`, ``uint8`` each, one after the other; returns how many bytes there were."""
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
    """Connections to servers, kept for the next request. May be used from many threads.

    Parameters
    ----------
    limit
        Requests at once, and connections kept.
    connecting
        Seconds that making a connection may take.
    tls
        For ``https``.
    """

    def __init__(self, *, limit: int, connecting: float, tls: ssl.SSLContext | None = None) -> None:
        self._slots = threading.BoundedSemaphore(limit)
        self._connecting = connecting
        self._tls = tls
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], deque[http.client.HTTPConnection]] = {}
        self._closed = False

    @contextmanager
    def request(self, request: SignedRequest, wait: Patience, body: memoryview | None = None) -> Iterator[Reply]:
        """Send a request; yields the answer. It is sent again if a connection that was idle turns out to be closed.

        Parameters
        ----------
        body
            ``uint8[n]``; its length is for the request's headers to say.

        Raises
        ------
        OSError, http.client.HTTPException
            If there is none. `TimeoutError` if `wait` is over.
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
        """Close what is idle now, and what is in use once it is not."""
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
                # The server closed an idle connection: that says nothing about it, and a new one will.

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
            connection.close()  # by the server, or out of step
        if scheme == "https":
            return http.client.HTTPSConnection(netloc, context=self._tls)
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
        # A server that refuses may say why, and hang up before it has all of the body.
        if not _readable(connection):
            raise


def _readable(connection: http.client.HTTPConnection) -> bool:
    """Whether there is something to read from a connection where nothing is expected: its end."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        return bool(poll.poll(0))
    return True
