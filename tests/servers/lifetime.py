"""How a test server starts and ends: it says its port on standard output, and stops when its standard input ends.

So it cannot outlive the process that started it, however that one dies.
"""

from __future__ import annotations

import socketserver
import sys
import threading


def serve_until_stdin_ends(server: socketserver.BaseServer, port: int) -> None:
    """Print `port` and serve until standard input is closed."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    print(port, flush=True)
    sys.stdin.read()
    server.shutdown()
