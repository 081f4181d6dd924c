"""Threads and waiting that an exception in the main thread (Ctrl-C, a signal handler's own) cannot break.

Python runs signal handlers in the main thread, between any two calls. Much of the standard library is not made for
that: an exception right after `threading.Condition.__enter__` has taken the lock leaves it locked for good, and with it
every `Future`, `Semaphore`, `Event`, executor and event loop that shares it with another thread. So the main thread
only ever enters locks that are written in C (``with lock:`` is one step, in and out), hands what takes longer to
another thread (`shielded`), and starts threads in one step (`start`).
"""

from __future__ import annotations

import _thread
import concurrent.futures.thread
import threading
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

__all__ = ["Changes", "Future", "leave_behind", "shielded", "start"]

_T = TypeVar("_T")


class _Condition(threading.Condition):
    """A condition that is entered and left in one step each: `property` and `attrgetter` are written in C."""

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))


class Future(concurrent.futures.Future[_T]):
    """A future that can be waited for in the main thread, without being left locked for the thread that resolves it.

    It runs from the beginning: `cancel` has no effect.
    """

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition()
        self.set_running_or_notify_cancel()


class Changes:
    """Wakes those who wait for something to change. They look again, and wait again, as often as it takes."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Lock] = deque()

    def watch(self) -> threading.Lock:
        """Return a lock to acquire in order to wait for the next change from now on; to be had before looking."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiting.append(waiter)
        return waiter

    def notify(self) -> None:
        """Wake all who wait."""
        while True:
            try:
                self._waiting.popleft().release()
            except IndexError:
                return


def start(target: Callable[[], object], name: str) -> None:
    """Start a daemon thread: the interpreter does not wait for its end. It is started or not, whatever interrupts this.

    Raises
    ------
    RuntimeError
        If no thread can be started: at a limit on them, or when the interpreter exits.
    """

    def begin() -> None:
        try:  # here, since `Thread.start` itself must not be interrupted
            threading.Thread(target=target, name=name, daemon=True).start()
        except RuntimeError:
            target()

    _thread.start_new_thread(begin, ())


def leave_behind() -> None:
    """Have the interpreter not wait for threads of incckpt's pools when it exits: they would end too late."""
    waited_for: Any = concurrent.futures.thread._threads_queues
    for thread in list(waited_for):
        if thread.name.startswith("incckpt-") and thread.daemon:
            waited_for.pop(thread, None)


def shielded(function: Callable[[], _T], interrupt: Callable[[], object] = lambda: None) -> _T:
    """Return what `function` returns; where this is the main thread, another one calls it, and is waited for.

    Parameters
    ----------
    interrupt
        Called when the waiting is interrupted, to have `function` end early; it is waited for in any case, until a
        second interruption.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return function()
    ticket = [None]  # whoever takes it decides whether the function is called
    ended = threading.Lock()
    ended.acquire()
    results: list[_T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            ticket.pop()
        except IndexError:
            return
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 -- raised again in the caller's thread
            errors.append(error)
        finally:
            ended.release()

    try:
        try:
            start(call, "incckpt-call")
        except RuntimeError:  # at a limit on threads, or when the interpreter exits
            return function()
        ended.acquire()
    except BaseException:
        try:
            ticket.pop()
        except IndexError:
            if not (results or errors):
                interrupt()
                ended.acquire()
        raise
    if errors:
        raise errors[0]
    return results[0]
