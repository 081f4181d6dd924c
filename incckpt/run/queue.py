"""A bounded queue of jobs and the one thread that does them, finished even when the interpreter exits."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 -- has to be imported before _register_atexit is called below
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

__all__ = ["BackgroundQueue"]


class BackgroundQueue:
    """Does jobs one after the other in a thread of its own.

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
        self._jobs: deque[Callable[[], None]] = deque()
        self._unfinished = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._pid = os.getpid()
        _queues.add(self)

    @property
    def full(self) -> bool:
        """Whether a job would have to wait for room now."""
        with self._changed:
            return self._unfinished >= self._max_pending

    def wait_for_room(self) -> None:
        """Wait until there is room for a job."""
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished < self._max_pending)

    def put(self, job: Callable[[], None]) -> None:
        """Add a job, which has to deal with its own errors; there must be room."""
        with self._changed:
            assert self._unfinished < self._max_pending
            self._unfinished += 1
            self._jobs.append(job)
            self._changed.notify_all()
        if self._thread is None:
            # A daemon, since the interpreter waits for other threads before it lets anybody finish what is pending.
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until every job is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished)

    def stop(self) -> None:
        """Finish the jobs, and let go of the thread. A process forked from the queue's has neither."""
        if os.getpid() == self._pid:
            self.wait()
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
        _queues.discard(self)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            job()
            del job  # what it held goes back to its pool before the next is waited for
            with self._changed:
                self._unfinished -= 1
                self._changed.notify_all()


_queues: weakref.WeakSet[BackgroundQueue] = weakref.WeakSet()


def _finish_all() -> None:
    for queue in list(_queues):
        queue.stop()


# atexit comes too late: by then no thread can be started. Registered after concurrent.futures has registered what stops
# its pools, this runs before it.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
