"""A web server for tests over a folder: the standard library's, with its directory indexes, and byte ranges if asked.

``python -m tests.servers.http_server FOLDER [ranges]`` prints its port, and stops when its standard input ends.
"""

from __future__ import annotations

import io
import os
import re
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO

from tests.servers.lifetime import serve_until_stdin_ends

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Handler(SimpleHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class RangeHandler(Handler):
    """Answers requests for a byte range with that range."""

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        """Send the head of the answer; return what is to follow it."""
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if match is None or not os.path.isfile(path):
            return super().send_head()
        with open(path, "rb") as file:
            data = file.read()
        start, end = int(match[1]), min(int(match[2]) + 1, len(data)) if match[2] else len(data)
        if start >= len(data):
            self.send_error(416)
            return None
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        return io.BytesIO(data[start:end])


class Server(ThreadingHTTPServer):
    """Takes many connections at once."""

    daemon_threads = True
    request_queue_size = 128


def main(folder: str, ranges: str = "") -> None:
    """Serve."""
    server = Server(("127.0.0.1", 0), partial(RangeHandler if ranges else Handler, directory=folder))
    serve_until_stdin_ends(server, server.server_port)


if __name__ == "__main__":
    main(*sys.argv[1:])
