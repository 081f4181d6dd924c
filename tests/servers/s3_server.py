"""An S3 server for tests: moto, with its conditional writes made atomic.

moto looks whether a key exists and then stores it, with nothing in between to keep two requests apart. Here every
request's body is read first, and then the application runs under one lock. A body that ends early changes nothing.

Run as a script it prints its port, and stops when its standard input ends.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.servers.lifetime import serve_until_stdin_ends


class OneAtATime:
    """A WSGI application around another that takes one request at a time."""

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self._inner = inner
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length:
            body = environ["wsgi.input"].read(length)
            if len(body) < length:
                start_response("400 Bad Request", [("Content-Length", "0")])
                return []
            environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            return list(self._inner(environ, start_response))


class QuietHandler(WSGIRequestHandler):
    """Keeps connections open between requests, and logs nothing."""

    protocol_version = "HTTP/1.1"

    def log(self, *_: object) -> None:
        """Log nothing."""


def main() -> None:
    """Serve."""
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=QuietHandler)
    server.daemon_threads = True  # type: ignore[attr-defined]
    serve_until_stdin_ends(server, server.server_port)


if __name__ == "__main__":
    main()
