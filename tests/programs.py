"""Python programs in processes of their own, as ``python`` runs them but without seconds of importing torch.

A process is forked from one that has imported it (`tests.children.forkserver`, one for all processes of a test run).
What depends on an interpreter's start, its imports or what it reads from its environment then, needs a fresh one.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from types import TracebackType
from typing import IO

from tests.servers.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120.0  # seconds until a process counts as hung


@functools.cache
def _server() -> socket.socket:
    """Return where programs are asked for, from a server that ends when nobody can ask any more."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"alone-{os.getpid()}")
    address = f"\0incckpt-tests-{run}"  # Linux's abstract names: no file is left behind
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with open(Path(tempfile.gettempdir()) / f"incckpt-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            ours.connect(address)
        except ConnectionRefusedError:
            server = _start_server(address)
            ours.connect(address)
            atexit.register(server.wait)
    atexit.register(ours.close)  # before that
    return ours


def _start_server(address: str) -> subprocess.Popen[bytes]:
    """Start the server; what connects from now on waits until it has imported everything."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen()
        # One thread of OpenBLAS: a process with several must not be forked.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        number = listening.fileno()
        command = [sys.executable, "-m", "tests.children.forkserver", str(number)]
        return subprocess.Popen(command, pass_fds=[number], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)


class Program:
    """A program that runs.

    Parameters
    ----------
    words
        What would follow ``python``: a script, ``-m`` and a module, or ``-c`` and a program; then the arguments.
    output, error
        Where the program writes: open files; errors go where this process's do if nothing else is said.
    folder
        Where it runs.
    environment
        Its environment variables; by default this process's own.
    fresh
        Whether it runs in an interpreter of its own, which imports everything anew.
    """

    returncode: int | None = None

    def __init__(
        self,
        *words: object,
        output: IO[str],
        error: IO[str] | None = None,
        folder: Path = ROOT,
        environment: dict[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        environment = dict(os.environ) if environment is None else environment
        request = {"words": list(map(str, words)), "folder": str(folder), "environment": environment, "fresh": fresh}
        ours, its = socket.socketpair()
        with its, open(os.devnull) as nothing:
            standard = nothing.fileno(), output.fileno(), 2 if error is None else error.fileno()
            socket.send_fds(_server(), [json.dumps(request).encode()], [*standard, its.fileno()])
        self._report, self._told = ours, b""
        self.pid = int(self._line())

    def _line(self, patience: float = PATIENCE) -> str:
        self._report.settimeout(patience)
        while b"\n" not in self._told:
            told = self._report.recv(1000)
            assert told, "the keeper of the process is gone"
            self._told += told
        line, _, self._told = self._told.partition(b"\n")
        return line.decode()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not been seen to end."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def stopped(self) -> None:
        """Wait until a signal has stopped it."""
        line = self._line()
        assert line == "stopped", line

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for its end; return its exit status, or minus the signal that ended it.

        Raises
        ------
        TimeoutError
            If it runs, or stands still, after `patience` seconds more.
        """
        while self.returncode is None:
            word, *status = self._line(patience).split()
            if word == "ended":
                self.returncode = int(status[0])
                self._report.close()
        return self.returncode

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.returncode is None:
            if error is not None:
                self.send_signal(signal.SIGKILL)
            self.send_signal(signal.SIGCONT)
            self.wait()


class Process:
    """What assert_exact_resume needs of `multiprocessing.Process`."""

    exitcode: int | None = None

    def __init__(self, target: Callable[..., object], args: tuple[object, ...]) -> None:
        self._call = pickle.dumps((target, args))
        self._program: Program

    def start(self) -> None:
        """Call the function in a program; what it prints is dropped."""
        begin = f"import pickle, sys\nsys.path[:] = {sys.path}\ncall, args = pickle.loads({self._call!r})\ncall(*args)"
        with open(os.devnull, "w") as nothing:
            self._program = Program("-c", begin, output=nothing, error=nothing)

    def join(self, patience: float = PATIENCE) -> None:
        """Wait for its end, or `patience` seconds."""
        with suppress(TimeoutError):
            self.exitcode = self._program.wait(patience)

    def kill(self) -> None:
        """Kill it."""
        self._program.send_signal(signal.SIGKILL)


def run(
    *words: object, folder: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; return its status and what it printed."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
        with Program(*words, output=output, error=error, folder=folder, environment=environment) as program:
            status = program.wait()
        printed = []
        for file in (output, error):
            file.seek(0)
            printed.append(file.read())
    return subprocess.CompletedProcess(list(map(str, words)), status, *printed)


def rank_variables(processes: int) -> list[dict[str, str]]:
    """Return what ``torchrun`` would add to the environment of each of so many processes."""
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run_script(script: str, *arguments: object, status: int = 0) -> str:
    """Run a script that begins with the usual imports, to its end with `status`; return what it printed."""
    start = "import atexit, os, signal, sys, threading, torch, incckpt\nM, d = incckpt.CheckpointManager, sys.argv[1]\n"
    done = run("-c", start + dedent(script), *arguments)
    assert done.returncode == status, done.stderr
    return done.stdout
