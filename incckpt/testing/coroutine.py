"""Simulated processes that wait, in the middle of a call, for the reply to a request."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Generic, TypeVar

from incckpt.testing.simulation import Killed, Process, Program, Reply, Request, running_as

__all__ = ["Coroutine"]

P = TypeVar("P", bound=Process)


class Coroutine(Generic[P]):
    """A simulated process in a thread, which runs only while its owner waits for its next request.

    Parameters
    ----------
    make
        Returns the process, given what it calls with each request.
    program
        What the process runs.
    replies
        To its first requests, for which it does not stop.

    Attributes
    ----------
    process
        What `make` returned.
    request
        What the process waits for; ``None`` if it has ended.
    error
        What came out of the program.
    """

    def __init__(
        self, make: Callable[[Callable[[Request], Reply]], P], program: Program, replies: Iterable[Reply] = ()
    ) -> None:
        self.process = make(self._exchange)
        self.request: Request | None = None
        self.error: BaseException | None = None
        self._replies = deque(replies)
        self._killed = False
        self._go = threading.Lock()
        self._back = threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, args=(program,), name=self.process.name, daemon=True)
        self._thread.start()
        self._back.acquire()

    def _run(self, program: Program) -> None:
        try:
            with running_as(self.process), suppress(Killed):
                program(self.process)
        except BaseException as error:  # noqa: BLE001 -- raised again where the owner is
            self.error = error
        self.request = None
        self._back.release()

    def _exchange(self, request: Request) -> Reply:
        if self._killed:
            raise Killed
        if not self._replies:
            self.request = request
            self._back.release()
            self._go.acquire()
            if self._killed:
                raise Killed
        return self._replies.popleft()

    def answer(self, reply: Reply) -> None:
        """Let the process go on to its next request."""
        self._replies.append(reply)
        self._go.release()
        self._back.acquire()
        if self.request is None:
            self._thread.join()

    def kill(self) -> None:
        """End the process where it is: its request raises `Killed`, and so does every later one."""
        if self.request is not None:
            self._killed = True
            self._go.release()
            self._back.acquire()
        self._thread.join()
