"""A relay to a server that lets requests through at a rate, or hangs; answers pass at once, or at the same rate.

Run as a script, with the server's port and the rate of both directions, it prints its own port, and stops when its
standard input ends: a link of its own process, which takes no time from those that use it.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Limit", "slowed"]

_BUFFER = 1 << 16  # of the sockets, too: what a killed client has left in them still goes through


class Limit:
    """How many bytes per second pass, all connections together; 0 to hang."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._lock, self._due = threading.Lock(), time.monotonic()

    def wait(self, nbytes: int) -> None:
        """Wait until so many bytes may pass."""
        while not (rate := self.rate):
            time.sleep(0.1)
        with self._lock:
            self._due = until = max(self._due, time.monotonic()) + nbytes / rate
        time.sleep(max(0.0, until - time.monotonic()))


@contextmanager
def slowed(
    port: int, rate: float, host: str = "127.0.0.1", *, answers: float | None = None
) -> Iterator[tuple[int, Limit]]:
    """Yield the port of a relay to a server, and the limit of the requests, which can be changed.

    Parameters
    ----------
    rate, answers
        Bytes per second of the requests, and of the answers; without the latter these pass at once.
    """
    limit = Limit(rate)
    back = None if answers is None else Limit(answers)

    def pump(source: socket.socket, target: socket.socket, slow: Limit | None) -> None:
        try:
            while data := source.recv(_BUFFER):
                if slow is not None:
                    slow.wait(len(data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            target.close()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, port))
            threading.Thread(target=pump, args=(client, server, limit), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, back), daemon=True).start()

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], limit
        listener.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Relay."""
    rate = float(sys.argv[2])
    with slowed(int(sys.argv[1]), rate, answers=rate) as (port, _):
        print(port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
