"""A Google Cloud Storage server for tests: the part of the JSON API that stores need, in memory, exact.

Every look and change is one step under one lock, so ``ifGenerationMatch=0`` has exactly one winner. A body that ends
early changes nothing. Run as a script it prints its port, and stops when its standard input ends.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers.lifetime import serve_until_stdin_ends

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Object:
    """A stored value and what is told of it."""

    name: str
    data: bytes
    generation: int
    updated: datetime = field(default_factory=lambda: datetime.now(UTC))

    def resource(self) -> dict[str, str]:
        """Return the object as the API describes it."""
        return {
            "kind": "storage#object",
            "name": self.name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "updated": self.updated.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }


class Refused(Exception):
    """An answer that is not success."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Storage:
    """Buckets of objects."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Object]] = {}
        self._generation = 0

    def create_bucket(self, name: str) -> None:
        """Make a bucket if there is none of the name."""
        with self._lock:
            self._buckets.setdefault(name, {})

    def put(self, bucket: str, name: str, data: bytes, wanted_generation: int | None) -> Object:
        """Store an object, if the generation that is there (0: none) is the one wanted."""
        with self._lock:
            objects = self._objects(bucket)
            there = objects[name].generation if name in objects else 0
            if wanted_generation is not None and there != wanted_generation:
                raise Refused(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")
            self._generation += 1
            objects[name] = Object(name, data, self._generation)
            return objects[name]

    def get(self, bucket: str, name: str) -> Object:
        """Return an object."""
        with self._lock:
            return self._object(bucket, name)

    def delete(self, bucket: str, name: str) -> None:
        """Remove an object."""
        with self._lock:
            self._object(bucket, name)
            del self._buckets[bucket][name]

    def list(self, bucket: str, prefix: str, after: str, limit: int) -> tuple[list[Object], str | None]:
        """Return a page of the objects whose names begin with `prefix` and follow `after`, and where it goes on."""
        with self._lock:
            objects = self._objects(bucket)
            names = sorted(name for name in objects if name.startswith(prefix) and name > after)
            more = names[limit - 1] if len(names) > limit else None
            return [objects[name] for name in names[:limit]], more

    def _objects(self, bucket: str) -> dict[str, Object]:
        try:
            return self._buckets[bucket]
        except KeyError:
            raise Refused(404, "notFound", "The specified bucket does not exist.") from None

    def _object(self, bucket: str, name: str) -> Object:
        try:
            return self._objects(bucket)[name]
        except KeyError:
            raise Refused(404, "notFound", f"No such object: {bucket}/{name}") from None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out separately, and the body must not wait for an answer
    storage = Storage()

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def handle_request(self) -> None:
        """Answer one request."""
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return
        target = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(target.query, keep_blank_values=True))
        try:
            self._route(target.path, query, body)
        except Refused as refused:
            if query.get("alt") == "media":
                self._send(refused.status, str(refused).encode(), {"Content-Type": "text/html"})
            else:
                error = {"code": refused.status, "message": str(refused), "errors": [{"reason": refused.reason}]}
                self._send_json({"error": error}, refused.status)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if path == "/storage/v1/b" and self.command == "POST":
            name = json.loads(body)["name"]
            self.storage.create_bucket(name)
            self._send_json({"kind": "storage#bucket", "name": name})
            return
        match = re.fullmatch(r"(/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", path)
        if match is None:
            raise Refused(404, "notFound", "Not Found")
        upload, bucket, name = match[1], urllib.parse.unquote(match[2]), urllib.parse.unquote(match[3] or "")
        if upload and self.command == "POST" and query.get("uploadType") == "media":
            wanted = int(query["ifGenerationMatch"]) if "ifGenerationMatch" in query else None
            self._send_json(self.storage.put(bucket, query["name"], body, wanted).resource())
        elif not name and self.command == "GET":
            self._list(bucket, query)
        elif name and self.command == "DELETE":
            self.storage.delete(bucket, name)
            self._send(204)
        elif name and self.command == "GET":
            found = self.storage.get(bucket, name)
            if query.get("alt") == "media":
                self._download(found)
            else:
                self._send_json(found.resource())
        else:
            raise Refused(400, "invalid", f"not understood: {self.command} {self.path}")

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        limit = int(query.get("maxResults", 1_000))
        found, more = self.storage.list(bucket, query.get("prefix", ""), query.get("pageToken", ""), limit)
        page: dict[str, Any] = {"kind": "storage#objects", "items": [one.resource() for one in found]}
        if more is not None:
            page["nextPageToken"] = more
        self._send_json(page)

    def _download(self, found: Object) -> None:
        size = len(found.data)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None:
            self._send(200, found.data)
            return
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        if start >= size:
            raise Refused(416, "requestedRangeNotSatisfiable", "Request range not satisfiable")
        self._send(206, found.data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{size}"})

    def _send_json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Type": "application/octet-stream"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = handle_request  # noqa: N815


class Server(ThreadingHTTPServer):
    """Takes many connections at once."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Serve."""
    server = Server(("127.0.0.1", 0), Handler)
    serve_until_stdin_ends(server, server.server_port)


if __name__ == "__main__":
    main()
