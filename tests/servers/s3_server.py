"""An S3 server for tests: moto, with its conditional writes made atomic.

moto looks whether a key exists and then stores it, with nothing in between to keep two requests apart. Here every
request's body is read first, and then the application runs under one lock. A body that ends early changes nothing.

werkzeug's development server closes every connection after one answer, having waited for what the client may still
send; here connections stay open.

Run as a script it prints its port, and stops when its standard input ends.
"""

from __future__ import annotations

import io
import threading
from http import HTTPStatus
from typing import Any

from moto.moto_server.werkzeug_app import create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import run_wsgi_app

from tests.servers.lifetime import serve_until_stdin_ends

_BODILESS = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


class Handler(WSGIRequestHandler):
    """Answers one request at a time, of all connections, and keeps the connections open; logs nothing."""

    protocol_version = "HTTP/1.1"  # with it, http.server itself answers 100 Continue
    disable_nagle_algorithm = True  # the head and the body of an answer are two writes
    _one_at_a_time = threading.Lock()

    def run_wsgi(self) -> None:
        """Read a request to its end, and answer it."""
        environ = self.make_environ()
        chunked = environ.get("wsgi.input_terminated", False)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(-1 if chunked else length)
        if not chunked and len(body) < length:
            self.close_connection = True
            return
        environ["wsgi.input"] = io.BytesIO(body)
        with self._one_at_a_time:
            pieces, status, headers = run_wsgi_app(self.server.app, environ, buffered=True)
        code, _, reason = status.partition(" ")
        self.send_response(int(code), reason)
        for name, value in headers:
            self.send_header(name, value)
        answer = b"".join(pieces)
        if self.command == "HEAD" or int(code) in _BODILESS:
            answer = b""
        elif "content-length" not in headers:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log(self, *_: Any) -> None:
        """Log nothing."""


def main() -> None:
    """Serve."""
    server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=True, request_handler=Handler)
    server.daemon_threads = True  # type: ignore[attr-defined]
    serve_until_stdin_ends(server, server.server_port)


if __name__ == "__main__":
    main()
