"""An HTTP proxy that breaks what it is told to break, between a client and a server on loopback.

It lives in the test's own process, on an event loop in a thread, so that a test can hand it rules as objects, ask what
went by, and hold a request for as long as it likes without a sleep::

    with FaultProxy(port) as proxy:
        proxy.rules = [Rule("lose_reply", method="PUT"), Rule("status", times=None, chance=0.1, status=503)]

What a rule can do:

=============  ========================================================================================================
status         answer with `status` and `code`; the server sees nothing
page           answer 200 with a web page, as a captive portal does; the server sees nothing
blank          answer 200 with nothing; the server sees nothing
reset          reset the connection before the server sees anything
lose_reply     let the server do the work, then reset the connection
cut_upload     pass on half of the request's body, then reset both connections
truncate       pass on the head of the reply and half of its body, then close
corrupt        flip one bit in the middle of the reply's body
shorten        pass on half of the reply's body, as if that were all
stale          answer as the same request was answered the time before last; the server sees nothing. The first two
               times it is passed on
hang           take the head of the request and say nothing more, not even 100 Continue
hang_upload    take all of the request, and say nothing more
hang_reply     let the server do the work, and say nothing
hang_download  pass on the head of the reply and half of its body, and no more
=============  ========================================================================================================
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_BUFFER = 1 << 20
_SMALL = 1 << 16  # bytes of a reply that is passed on, and remembered, as a whole
_REMEMBERED = 2  # replies to one request
_REQUESTS = 4096  # whose replies are remembered
_PIECE = 64 << 10
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected by the test</Message></Error>"
_PAGE = (
    '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title>Welcome</title></head>'
    "<body><p>Please sign in to use this network.</p></body></html>"
)


@dataclass
class Rule:
    """What to do to which requests.

    Attributes
    ----------
    do
        One of the names in the table above.
    method, target
        Regular expressions for the whole method, and for a part of path and query.
    header
        Regular expression for a part of the request's head; empty matches any.
    skip
        How many matching requests to let pass first.
    times
        How many to break, ``None`` for all.
    chance
        Break each matching request with this probability only (drawn from the proxy's seeded generator).
    status, code
        For ``status``: the reply's status, and the error's name in its body.
    body
        For ``status``: the whole body instead.
    """

    do: str
    method: str = ".*"
    target: str = ""
    header: str = ""
    skip: int = 0
    times: int | None = 1
    chance: float = 1.0
    status: int = 503
    code: str = "SlowDown"
    body: str = ""
    struck: int = field(default=0, init=False)


@dataclass(frozen=True)
class Seen:
    """A request that went by, and what was done to it (``None``: nothing)."""

    method: str
    target: str
    head: str
    done: str | None


class _Break(Exception):
    """The connection is over."""


class FaultProxy:
    """A proxy to a port of loopback; a context manager that ends all its connections.

    Parameters
    ----------
    upstream
        The server's port.
    seed
        Of the generator that rules with a chance draw from.
    error_body
        Template of the body of injected replies, with the fields ``status`` and ``code``.
    port
        Where to listen; by default any free port.
    tls
        To be spoken with the client.

    Attributes
    ----------
    port
        Where the proxy listens.
    rules
        The first that matches a request counts. To be replaced as a whole.
    seen
        Every request so far.
    """

    def __init__(
        self,
        upstream: int,
        *,
        seed: int = 0,
        error_body: str = _ERROR,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.rules: Sequence[Rule] = []
        self.seen: list[Seen] = []
        self._upstream = upstream
        self._random = random.Random(seed)
        self._error_body = error_body
        self.port = port
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._hanging: set[asyncio.Event] = set()
        self._past: dict[tuple[str, str], deque[bytes]] = {}  # the latest last

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=_BUFFER, ssl=self._tls), self._loop
        ).result(30)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(asyncio.CancelledError):
            await task

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer)
        try:
            while True:
                await self._exchange(connection)
        except (_Break, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            connection.close()

    async def _exchange(self, connection: _Connection) -> None:
        request = await _read_head(connection.reader)
        method, target = request.first.split(" ")[:2]
        rule = self._rule(method, target, request.text)
        do = rule.do if rule else None
        self.seen.append(Seen(method, target, request.text, do))
        if do == "reset":
            connection.reset()
        if do == "hang":
            await self._hang(connection)
        if rule is not None and do == "status":
            await self._refuse(connection, request, method, rule)
        if do in ("page", "blank"):
            await self._refuse(
                connection, request, method, Rule("status", status=200, body=_PAGE if do == "page" else " ")
            )
        past = self._past.pop((method, target), None) or deque(maxlen=_REMEMBERED)
        self._past[method, target] = past
        if len(self._past) > _REQUESTS:
            del self._past[next(iter(self._past))]
        if do == "stale" and len(past) == _REMEMBERED:
            connection.writer.write(past[0])
            await connection.writer.drain()
            return
        await connection.connect(self._upstream)
        head = request.raw
        if "100-continue" in request.headers.get("expect", ""):
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head, count=1)
            connection.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.up_writer.write(head)
        sent, length = 0, int(request.headers.get("content-length", 0))
        async for piece in _body(connection.reader, request):
            if do == "hang_upload":
                continue
            if do == "cut_upload" and sent + len(piece) > length // 2:
                connection.up_writer.write(piece[: max(0, length // 2 - sent)])
                await connection.up_writer.drain()
                connection.reset()
            sent += len(piece)
            connection.up_writer.write(piece)
            await connection.up_writer.drain()
        if do == "hang_upload":
            await self._hang(connection)
        await self._reply(connection, method, do, past)

    async def _reply(self, connection: _Connection, method: str, do: str | None, past: deque[bytes]) -> None:
        reply = await _read_head(connection.up_reader)
        status = int(reply.first.split(" ")[1])
        bodiless = method == "HEAD" or status in (204, 304) or status < 200
        pieces = _body(connection.up_reader, reply) if not bodiless else _nothing()
        if do in ("lose_reply", "hang_reply"):
            async for _ in pieces:
                pass
            if do == "hang_reply":
                await self._hang(connection)
            connection.reset()
        length = int(reply.headers.get("content-length", 0))
        if length <= _SMALL and "transfer-encoding" not in reply.headers:
            body = b"".join([piece async for piece in pieces])
            if method in ("GET", "HEAD"):
                past.append(reply.raw + body)
            if do == "shorten" and body:
                body = body[: length // 2]
                reply.raw = re.sub(rb"(?i)(\r\ncontent-length:)[^\r]*", b"\\1 %d" % len(body), reply.raw, count=1)
            pieces = _once(body)
        connection.writer.write(reply.raw)
        half = length // 2
        sent = 0
        async for piece in pieces:
            if do in ("truncate", "hang_download") and sent + len(piece) > half:
                connection.writer.write(piece[: max(0, half - sent)])
                await connection.writer.drain()
                if do == "hang_download":
                    await self._hang(connection)
                raise _Break
            if do == "corrupt" and sent <= half < sent + len(piece):
                changed = bytearray(piece)
                changed[half - sent] ^= 1
                piece = bytes(changed)
            sent += len(piece)
            connection.writer.write(piece)
            await connection.writer.drain()
        await connection.writer.drain()
        if reply.headers.get("connection", "").lower() == "close":
            raise _Break

    async def _refuse(self, connection: _Connection, request: _Head, method: str, rule: Rule) -> None:
        if "100-continue" not in request.headers.get("expect", ""):
            async for _ in _body(connection.reader, request):
                pass
        body = (rule.body or self._error_body.format(status=rule.status, code=rule.code)).strip().encode()
        kind = "application/json" if body.startswith(b"{") else "application/xml"
        if body == _PAGE.encode():
            kind = "text/html; charset=utf-8"
        head = f"HTTP/1.1 {rule.status} Injected\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        connection.writer.write(head.encode() + b"Connection: close\r\n\r\n" + (b"" if method == "HEAD" else body))
        await connection.writer.drain()
        raise _Break

    def release(self) -> None:
        """Break the connections of all requests that hang."""
        for hanging in list(self._hanging):
            self._loop.call_soon_threadsafe(hanging.set)

    async def _hang(self, connection: _Connection) -> None:
        released = asyncio.Event()
        self._hanging.add(released)
        try:
            await released.wait()
        finally:
            self._hanging.discard(released)
        connection.reset()

    def _rule(self, method: str, target: str, head: str) -> Rule | None:
        for rule in self.rules:
            matches = re.fullmatch(rule.method, method) and re.search(rule.target, target)
            if not matches or not re.search(rule.header, head):
                continue
            if rule.skip > 0:
                rule.skip -= 1
            elif (rule.times is None or rule.struck < rule.times) and self._random.random() < rule.chance:
                rule.struck += 1
                return rule
        return None


class _Connection:
    """A client's connection and the one to the server that goes with it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._up: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connect(self, port: int) -> None:
        if self._up is None:
            self._up = await asyncio.open_connection("127.0.0.1", port, limit=_BUFFER)

    @property
    def up_reader(self) -> asyncio.StreamReader:
        assert self._up is not None
        return self._up[0]

    @property
    def up_writer(self) -> asyncio.StreamWriter:
        assert self._up is not None
        return self._up[1]

    def reset(self) -> None:
        """End the client's connection with a TCP reset."""
        sock: socket.socket | None = self.writer.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise _Break

    def close(self) -> None:
        self.writer.close()
        if self._up is not None:
            self._up[1].close()


@dataclass
class _Head:
    raw: bytes
    first: str
    headers: dict[str, str]

    @property
    def text(self) -> str:
        return self.raw.decode("latin-1")


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return _Head(raw, first, headers)


async def _body(reader: asyncio.StreamReader, head: _Head) -> AsyncIterator[bytes]:
    """Yield a message's body as it is on the wire, chunk lines included."""
    if "chunked" in head.headers.get("transfer-encoding", "").lower():
        while True:
            line = await reader.readuntil(b"\r\n")
            yield line
            size = int(line.split(b";")[0], 16)
            if not size:
                break
            yield await reader.readexactly(size + 2)
        while line != b"\r\n":
            line = await reader.readuntil(b"\r\n")
            yield line
        return
    remaining = int(head.headers.get("content-length", 0))
    while remaining:
        piece = await reader.read(min(remaining, _PIECE))
        if not piece:
            raise _Break
        remaining -= len(piece)
        yield piece


async def _once(body: bytes) -> AsyncIterator[bytes]:
    if body:
        yield body


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
