"""Starting and ending the processes that the test servers are."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ServerFailed(Exception):
    """A server did not come up; says what it printed."""


@contextlib.contextmanager
def python_server(module: str, *arguments: str) -> Iterator[int]:
    """Run a module of this package, which prints its port when it is ready; yields the port."""
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.{module}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise ServerFailed(f"{module} said {line!r}")
        yield int(line)
    finally:
        process.stdin.close()
        end(process)
        process.stdout.close()


@contextlib.contextmanager
def program_server(
    command: Sequence[str], port: int, log: Path, *, path: str = "/", limit: float = 60.0
) -> Iterator[int]:
    """Run a program that is to listen on `port`; yields once it answers a request for `path`, however it answers."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        give_up = time.monotonic() + limit
        while not answers(f"http://127.0.0.1:{port}{path}"):
            if process.poll() is not None or time.monotonic() > give_up:
                raise ServerFailed(f"{command[0]}: {log.read_text(errors='replace')[-2_000:]}")
            threading.Event().wait(0.02)
        yield port
    finally:
        end(process)


def answers(url: str) -> bool:
    """Whether a server answers at `url`, with whatever status."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as exc:
        exc.close()
        return True
    except OSError:
        return False


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process that we started, politely at first."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def free_port() -> int:
    """Return a port of loopback that nothing listens on, for programs that cannot choose one themselves."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
