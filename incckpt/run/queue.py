"""A bounded queue of background jobs, done one after the other and finished even when the interpreter exits."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 -- has to be imported before _register_atexit is called below
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from incckpt import threads
from incckpt.errors import ManagerClosedError, SaveError
from incckpt.threads import Future

__all__ = ["BackgroundQueue"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class BackgroundQueue:
    """Does jobs one after the other in a thread, which exists as long as there are jobs.

    Every job is done, every future resolves and every wait ends, whatever interrupts the thread that puts or waits. If
    no thread can be started (a limit on threads, an exiting interpreter), that thread does the jobs itself.

    Parameters
    ----------
    max_pending
        Jobs that may be unfinished; a further one waits for room.
    name
        Of the thread.

    Attributes
    ----------
    at_exit
        Is called when the interpreter exits, in place of `wait`.
    """

    def __init__(self, max_pending: int, name: str) -> None:
        self._max_pending = max_pending
        self._name = name
        self._stopped = False
        self._abandoned = False
        self.at_exit: Callable[[], object] | None = None
        self._reset()
        _queues.add(self)

    def _reset(self) -> None:
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()  # unfinished; the first may be under way
        self._worker: int | None = None  # the thread that does them
        self._starting = False  # whether one is about to
        self._lock = threading.RLock()
        self._changes = threads.Changes()

    def works_here(self) -> bool:
        """Return whether this thread is doing a job."""
        return self._worker == threading.get_ident()

    @property
    def full(self) -> bool:
        """Whether a job would have to wait for room now."""
        return len(self._jobs) >= self._max_pending

    @property
    def idle(self) -> bool:
        """Whether every job is done."""
        return not self._jobs or self._abandoned

    def wait_for_room(self, or_else: Callable[[], bool] = lambda: False) -> None:
        """Wait until there is room for a job, or until something else is the case: `wake` has it looked at again."""
        self._wait_until(lambda: not self.full or or_else())

    def wake(self) -> None:
        """Have those who wait look again. Can be called in a signal handler."""
        self._changes.notify()

    def put(self, job: Callable[[], _T], future: Future[_T]) -> None:
        """Add a job, whose result or error `future` takes; the caller has waited for room.

        If the call is interrupted, the job is done, or it is not and the future says so.

        Raises
        ------
        ManagerClosedError
            If the queue was stopped.
        """
        if self._stopped:
            raise ManagerClosedError("this manager was closed while a save was being made; it is not saved")
        entry = job, future
        try:
            self._jobs.append(entry)
            started = self._start_thread()
        except BaseException:
            with self._lock:
                begun = self._worker is not None
                if not begun:
                    with suppress(ValueError):
                        self._jobs.remove(entry)  # it would wait for the next call
            if not begun and not future.done():
                future.set_exception(SaveError("interrupted before it began"))
            raise
        if not started:
            self.wait()

    def wait(self, until: float | None = None, or_else: Callable[[], bool] | None = None) -> bool:
        """Wait until every job is done, or a time (of `time.monotonic`) has come; return whether every job is done.

        Parameters
        ----------
        or_else
            What ends the waiting, too; `wake` has it looked at again.

        Raises
        ------
        SaveError
            If a job, or something it calls, would wait for itself.
        """
        self._wait_until(lambda: self.idle or (or_else is not None and or_else()), until)
        return self.idle

    def abandon(self, error: BaseException) -> None:
        """Wait for no job any more, and accept none: those that are not done fail with `error`.

        The one under way may go on as long as the process does, whatever becomes of it.
        """
        self._stopped = self._abandoned = True
        for _, future in list(self._jobs):
            with suppress(InvalidStateError):
                future.set_exception(error)
        _queues.discard(self)
        self._changes.notify()
        threads.leave_behind()

    def stop(self) -> None:
        """Accept no more jobs, and finish those in the queue."""
        self._refuse_here()
        self._stopped = True
        self.wait()
        _queues.discard(self)

    def _refuse_here(self) -> None:
        if self.works_here():
            raise SaveError("a callback of a save's future would wait for that save: call in another thread")

    def _wait_until(self, done: Callable[[], bool], until: float | None = None) -> None:
        while not done() and (until is None or time.monotonic() < until):
            self._refuse_here()
            change = self._changes.watch()
            if done():
                return
            if self._start_thread():
                change.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic()))
            else:
                self._work()

    def _start_thread(self) -> bool:
        """Start a thread that does the jobs, unless there is one; return whether there is."""
        with self._lock:
            if self._worker is not None or self._starting or not self._jobs:
                return True
        if _exiting:
            return False
        try:
            self._starting = True
            threads.start(self._work, self._name)
        except BaseException as error:
            self._starting = False
            if not isinstance(error, RuntimeError):
                raise
            log.warning("no thread can be started (%s): saving in the foreground", error)
            return False
        return True

    def _work(self) -> None:
        """Do jobs until there are none, or another thread does them."""
        try:
            self._starting = False
            with self._lock:
                if self._worker is None and self._jobs:
                    self._worker = threading.get_ident()
            while self.works_here():
                self._do_first()
                with self._lock:  # a thread that puts a job either finds a worker, or starts one
                    if self.idle:
                        self._worker = None
                self._changes.notify()
        finally:
            if self._worker == threading.get_ident():
                self._worker = None
                self._changes.notify()

    def _do_first(self) -> None:
        job, future = self._jobs[0]
        try:
            future.set_result(job())
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
            if isinstance(error, KeyboardInterrupt):
                raise  # done in the foreground
        finally:
            self._jobs.popleft()
            if not future.done():
                future.set_exception(SaveError("interrupted"))


_queues: weakref.WeakSet[BackgroundQueue] = weakref.WeakSet()
_exiting = False


def _finish_all() -> None:
    global _exiting
    _exiting = True  # from here on other threads and atexit handlers save in the foreground
    for queue in list(_queues):
        (queue.at_exit or queue.wait)()


def _forget_all() -> None:
    for queue in list(_queues):
        queue._reset()  # the jobs are the parent's, and one of its threads may have held the lock


# atexit comes too late: by then no thread can be started. These run in reverse order, so this one comes before the one
# with which concurrent.futures stops its pools.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_forget_all)
