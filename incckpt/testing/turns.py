"""Threads of one simulated process, which share its memory: one runs at a time, from one of its requests to the next.

Which of them goes on is a request of its own, ``turn``, so that :mod:`incckpt.testing.exploration` tries every order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from incckpt.testing.simulation import Process, Reply, Request, Violation, current, running_as

__all__ = ["TurnLock", "Turns"]

_T = TypeVar("_T")


class _Thread:
    """A thread that stands at a request, or waits until something is the case."""

    def __init__(self) -> None:
        self.go = threading.Lock()
        self.go.acquire()
        self.until: Callable[[], bool] | None = None
        self.done = False
        self.thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        return not self.done and (self.until is None or self.until())


class Turns:
    """The threads of a process. To be entered by its first one, which leaves it when all of them have ended.

    Parameters
    ----------
    process
        The process. While this is entered, its requests have to be made through `exchange`.
    offered_before
        Tells, with the thread's number, before which requests others may go first: those that another thread of the
        process can tell the order of.
    """

    def __init__(self, process: Process, offered_before: Callable[[int, Request], bool]) -> None:
        self._process = process
        self._offered_before = offered_before
        self._exchange = process.backend._exchange
        self._threads = [_Thread()]
        self._running = 0
        self._ended: BaseException | None = None  # what the process was ended with

    @property
    def running(self) -> int:
        """The number of the thread that runs, in the order in which they were started."""
        return self._running

    def exchange(self, request: Request) -> Reply:
        """Make a request, once it is this thread's turn."""
        if self._ended is None and self._offered_before(self._running, request):
            self._offer()
        return self._ask(request)

    def start(self, target: Callable[[], object]) -> int:
        """Start a thread; return its number."""
        number, made = len(self._threads), _Thread()
        self._threads.append(made)

        def run() -> None:
            made.go.acquire()
            with running_as(self._process), suppress(BaseException):
                try:
                    if self._ended is None:
                        target()
                except Exception as error:  # noqa: BLE001 -- told by the first thread
                    self._ended = Violation(f"a thread of {self._process.name} ended in {error!r}")
            made.done = True
            self._pass_on(self._next())

        made.thread = threading.Thread(target=run, daemon=True)
        made.thread.start()
        return number

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Let others run until something is the case."""
        thread = self._threads[self._running]
        while not done():
            thread.until = done
            self._switch(self._next())
            thread.until = None

    def __enter__(self) -> Self:
        self._process.turns = self
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._ended is None:
                self.wait_until(lambda: all(thread.done for thread in self._threads[1:]))
        finally:
            for thread in self._threads[1:]:
                if not thread.done:
                    thread.go.release()  # to find that the process has ended
                assert thread.thread is not None
                thread.thread.join()
            self._process.turns = None

    def _ask(self, request: Request) -> Reply:
        if self._ended is not None:
            raise self._ended
        try:
            return self._exchange(request)
        except BaseException as error:
            self._ended = error
            raise

    def _offer(self) -> None:
        """Let another thread go first, if it is chosen."""
        me = self._running
        chosen = self._choose([number for number, thread in enumerate(self._threads) if number == me or thread.ready])
        if chosen != me:
            self._switch(chosen)

    def _choose(self, ready: list[int]) -> int:
        if len(ready) == 1:
            return ready[0]
        first = self._running if self._running in ready else ready[0]
        reply = self._ask(Request("turn", tuple(map(str, ready)), start=first))
        assert isinstance(reply, int)
        return reply

    def _next(self) -> int:
        """Return the number of a thread that can go on in place of the one that runs."""
        ready = [number for number, thread in enumerate(self._threads) if number != self._running and thread.ready]
        if not ready and self._ended is None:
            self._ended = Violation(f"the threads of {self._process.name} wait for each other")
        with suppress(BaseException):
            if self._ended is None:
                return self._choose(ready)
        return 0  # the process has ended: its first thread ends the others

    def _switch(self, to: int) -> None:
        me = self._running
        if to != me:
            self._pass_on(to)
            self._threads[me].go.acquire()
        if self._ended is not None:
            raise self._ended

    def _pass_on(self, to: int) -> None:
        self._running = to
        if self._threads[to].go.locked():
            self._threads[to].go.release()


class TurnLock:
    """A lock between the threads of the process that is running."""

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        turns = current().turns
        if turns is not None:
            turns.wait_until(lambda: not self._held)
        self._held = True

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False
