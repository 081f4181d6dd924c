"""A bounded queue of background jobs, done one after the other and finished even when the interpreter exits."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 -- has to be imported before _register_atexit is called below
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from incckpt.errors import ManagerClosedError, SaveError

__all__ = ["BackgroundQueue", "resolved"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class BackgroundQueue:
    """Does jobs one after the other in a thread, which exists as long as there are jobs.

    Every job is done and every wait ends: if no thread can be started (a limit on threads, an exiting interpreter), the
    thread that puts or waits does the jobs itself.

    Parameters
    ----------
    max_pending
        Jobs that may be unfinished; a further one waits for room.
    name
        Of the thread.
    """

    def __init__(self, max_pending: int, name: str) -> None:
        self._max_pending = max_pending
        self._name = name
        self._stopped = False
        self._reset()
        _queues.add(self)

    def _reset(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._doing: int | None = None  # the thread that does a job now
        self._changed = threading.Condition()

    def works_here(self) -> bool:
        """Return whether this thread is doing a job."""
        return self._doing == threading.get_ident()

    @property
    def full(self) -> bool:
        """Whether a job would have to wait for room now."""
        with self._changed:
            return self._unfinished() >= self._max_pending

    def wait_for_room(self) -> None:
        """Wait until there is room for a job."""
        self._wait_until(lambda: self._unfinished() < self._max_pending)

    def put(self, job: Callable[[], None]) -> None:
        """Add a job, which must handle its own errors; there must be room.

        Raises
        ------
        ManagerClosedError
            If the queue was stopped.
        """
        with self._changed:
            if self._stopped:
                raise ManagerClosedError("this manager was closed while a save was being made; it is not saved")
            assert self._unfinished() < self._max_pending
            self._jobs.append(job)
        if not self._start_thread():
            self.wait()

    def wait(self) -> None:
        """Wait until every job is done.

        Raises
        ------
        SaveError
            If a job, or something it calls, would wait for itself.
        """
        self._wait_until(lambda: not self._unfinished())

    def stop(self) -> None:
        """Accept no more jobs, and finish those in the queue."""
        with self._changed:
            self._refuse_here()
            self._stopped = True
        self.wait()
        _queues.discard(self)

    def _refuse_here(self) -> None:
        if self.works_here():
            raise SaveError("a callback of a save's future would wait for that save: call in another thread")

    def _unfinished(self) -> int:
        return len(self._jobs) + (self._doing is not None)

    def _wait_until(self, done: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                if done():
                    return
                self._refuse_here()
                if self._doing is not None:
                    self._changed.wait()
                    continue
            # Jobs but no worker: a thread is about to begin, or could not be started.
            if not self._start_thread():
                self._work()
                continue
            with self._changed:
                self._changed.wait_for(lambda: done() or self._doing is not None)

    def _start_thread(self) -> bool:
        """Start a thread that does the jobs, unless there is one; return whether there is."""
        with self._changed:
            if self._doing is not None or not self._jobs:
                return not _exiting
        if _exiting:
            return False
        try:
            # A daemon: the interpreter joins other threads before `_finish_all` could run.
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError as error:
            log.warning("no thread can be started (%s): saving in the foreground", error)
            return False
        return True

    def _work(self) -> None:
        """Do jobs until there are none, or another thread does them."""
        while True:
            with self._changed:
                if self._doing is not None or not self._jobs:
                    return
                job = self._jobs.popleft()
                self._doing = threading.get_ident()
                self._changed.notify_all()
            try:
                job()
            finally:
                del job  # return its memory to the pool before waiting for the next job
                with self._changed:
                    self._doing = None
                    self._changed.notify_all()


def resolved(result: _T) -> Future[_T]:
    """Return a completed future."""
    future: Future[_T] = Future()
    future.set_result(result)
    return future


_queues: weakref.WeakSet[BackgroundQueue] = weakref.WeakSet()
_exiting = False


def _finish_all() -> None:
    global _exiting
    _exiting = True  # from here on other threads and atexit handlers save in the foreground
    for queue in list(_queues):
        queue.wait()


def _forget_all() -> None:
    for queue in list(_queues):
        queue._reset()  # the jobs are the parent's, and one of its threads may have held the lock


# atexit comes too late: by then no thread can be started. These run in reverse order, so this one comes before the one
# with which concurrent.futures stops its pools.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_forget_all)
