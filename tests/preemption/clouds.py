"""The metadata services of clouds, as small servers with their paths, headers, tokens and errors.

>>> with cloud("aws") as service:   # doctest: +SKIP
...     service.announce(120)
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

__all__ = ["Aws", "Azure", "Cloud", "Gcp", "cloud"]

Reply = tuple[int, bytes, dict[str, str]]  # status, body, headers

NOT_FOUND: Reply = (404, b"not found", {})


class Cloud:
    """A metadata service.

    Attributes
    ----------
    requests
        Methods and paths of the requests so far.
    fault
        Asked first, if set: returns the bytes to send in place of an answer, or a reply, or ``None`` to let it answer.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[], bytes | Reply | None] | None = None
        self.url = ""

    def announce(self, seconds: float) -> float:
        """Announce the end of the machine in so many seconds; return when that is, by `time.time`, as announced."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Announce nothing any more."""
        raise NotImplementedError

    def reply(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        """Answer a request; header names are in lower case."""
        raise NotImplementedError


class Aws(Cloud):
    """EC2's, version 2: no answer without a token, which `expire` makes worthless."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        self.action: bytes | None = None
        self.rebalance = False

    def announce(self, seconds: float) -> float:
        when = datetime.fromtimestamp(int(time.time() + seconds), UTC)
        self.action = json.dumps({"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()
        return when.timestamp()

    def withdraw(self) -> None:
        self.action = None

    def expire(self) -> None:
        """Let the token that was given out expire."""
        self.tokens += 1

    def reply(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        if path == "/latest/api/token":
            if method != "PUT":
                return 405, b"", {}
            if not 1 <= int(headers.get("x-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600:
                return 400, b"", {}
            self.tokens += 1
            return 200, self._token, {}
        if headers.get("x-aws-ec2-metadata-token", "").encode() != self._token or not self.tokens:
            return 401, b"", {}
        if path == "/latest/meta-data/spot/instance-action" and self.action is not None:
            return 200, self.action, {}
        if path == "/latest/meta-data/events/recommendations/rebalance" and self.rebalance:
            return 200, b'{"noticeTime": "2026-11-30T07:00:00Z"}', {}
        return NOT_FOUND

    @property
    def _token(self) -> bytes:
        return b"AQAEAL%d==" % self.tokens


class Gcp(Cloud):
    """Compute Engine's."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.flavor = "Google"

    def announce(self, seconds: float) -> float:
        self.values["preempted"] = "TRUE"
        return time.time() + seconds

    def withdraw(self) -> None:
        self.values["preempted"] = "FALSE"

    def reply(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        answer = {"Metadata-Flavor": self.flavor}
        if headers.get("metadata-flavor") != "Google":
            return 403, b"", answer
        folder, _, name = path.rpartition("/")
        if method != "GET" or folder != "/computeMetadata/v1/instance" or name not in self.values:
            return 404, b"", answer
        return 200, self.values[name].encode(), answer


class Azure(Cloud):
    """Azure's, asked by a machine called ``worker_7``."""

    name = "worker_7"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, object]] = []
        self.named = True

    def announce(self, seconds: float, kind: str = "Preempt", machine: str = "worker_7", event: str = "E1") -> float:
        when = int(time.time() + seconds)
        self.events.append(
            {
                "EventId": event,
                "EventStatus": "Scheduled",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": [machine],
                "NotBefore": formatdate(when, usegmt=True),
                "EventSource": "Platform",
            }
        )
        return float(when)

    def begin(self) -> None:
        """Let the events begin: their times are blank from then on."""
        for event in self.events:
            event |= {"EventStatus": "Started", "NotBefore": ""}

    def withdraw(self) -> None:
        self.events.clear()

    def reply(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if headers.get("metadata") != "true" or method != "GET" or "api-version" not in query:
            return 400, b'{"error": "Bad request"}', {}
        if parts.path == "/metadata/instance/compute/name" and query.get("format") == ["text"]:
            return (200, self.name.encode(), {}) if self.named else (500, b"", {})
        if parts.path == "/metadata/scheduledevents":
            return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.events}).encode(), {}
        return NOT_FOUND


_KINDS: dict[str, type[Cloud]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


@contextmanager
def cloud(name: str) -> Iterator[Cloud]:
    """Run the metadata service of a cloud."""
    service = _KINDS[name]()
    with serving(service):
        yield service


@contextmanager
def serving(service: Cloud) -> Iterator[None]:
    """Run a metadata service."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            self.close_connection = True
            if not self.raw_requestline or not self.parse_request():
                return
            service.requests.append((self.command, self.path))
            reply = service.fault() if service.fault is not None else None
            if reply is None:
                reply = service.reply(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            try:
                if isinstance(reply, bytes):
                    self.wfile.write(reply)
                    return
                status, body, headers = reply
                self.send_response(status)
                for header, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:  # the client has given up
                return

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        service.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
