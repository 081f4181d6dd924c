"""Forks, on request, processes that run a Python program; see ``tests.programs``, which asks.

    python -m tests.children.forkserver FILE-DESCRIPTOR

Everything that programs import at length is imported here, once, and nothing is ever computed: a program starts in
milliseconds, and its OpenMP from nothing. A program is run by the main thread of a process of its own, as ``python``
would run it: what it does not catch ends the interpreter, which waits for threads and calls what `atexit` was given.

Each program has a keeper, the parent of its process, which sends what becomes of it: first its process number, then
``stopped`` whenever a signal stops it, at last ``ended STATUS``.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from types import CodeType, ModuleType

import torch._dynamo  # what every optimizer of torch imports
import torch.distributed.checkpoint

import incckpt
import incckpt.manager
import incckpt.recovery  # noqa: F401

_REQUEST = 1 << 20  # bytes
_LONGEST = 1200  # seconds that a program may run, so that none outlives a test run that was killed
_FILES = 4  # standard input, output and error of the program, and where its keeper writes


def _program(words: list[str]) -> tuple[CodeType, ModuleType, str]:
    """Return a program's code, its main module, and what comes first in its `sys.path`."""
    main = ModuleType("__main__")
    if words[0] == "-c":
        return compile(words[1], "<string>", "exec"), main, ""
    if words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        assert spec is not None, words[1]
        assert spec.origin is not None, words[1]
        path = Path(spec.origin)
        main.__spec__, main.__package__ = spec, spec.parent
        main.__file__ = str(path)
        return compile(path.read_bytes(), path, "exec"), main, os.getcwd()
    main.__file__ = words[0]
    return compile(Path(words[0]).read_bytes(), words[0], "exec"), main, str(Path(words[0]).parent)


def _keep(files: list[int], environment: dict[str, str], folder: str) -> None:
    """Fork a process for the program, and tell what becomes of it; return in that process, ready to run it."""
    *standard, report = files
    program = os.fork()
    if program:
        for file in standard:
            os.close(file)
        os.write(report, f"{program}\n".encode())
        signal.signal(signal.SIGALRM, lambda *_: os.kill(program, signal.SIGKILL))
        signal.alarm(_LONGEST)
        while True:
            _, status = os.waitpid(program, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            os.write(report, b"stopped\n")
        os.write(report, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.close(report)
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # OpenMP has read it long ago


def _asked(listening: socket.socket) -> tuple[bytes, list[int]] | None:
    """Return each request, with its files, in a process of its own; ``None`` in this one at the end."""
    clients = [listening.accept()[0]]
    while clients:
        ready, _, _ = select.select([listening, *clients], [], [])
        for one in ready:
            if one is listening:
                clients.append(one.accept()[0])
                continue
            message, files, _, _ = socket.recv_fds(one, _REQUEST, _FILES)
            if not message:
                clients.remove(one)
                one.close()
                continue
            between = os.fork()
            if not between:
                for client in clients:
                    client.close()
                return message, files
            os.waitpid(between, 0)
            for file in files:
                os.close(file)
    return None


def main() -> None:
    """Serve requests until nobody can make any."""
    gc.collect()
    gc.freeze()  # or each process would copy all of this memory as it ends and collects garbage for the last time
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        asked = _asked(listening)
    if asked is None:
        return
    message, files = asked
    if os.fork():
        os._exit(0)  # so that keepers are nobody's children, and nothing has to wait for them
    request = json.loads(message)
    _keep(files, request["environment"], request["folder"])
    words = request["words"]
    if request["fresh"]:
        os.execv(sys.executable, [sys.executable, *words])
    code, module, first = _program(words)
    sys.argv = [words[0], *words[2:]] if words[0].startswith("-") else words
    sys.path[0] = first
    sys.modules["__main__"] = module
    exec(code, vars(module))


if __name__ == "__main__":
    main()
