"""Lets in one call to a manager at a time, from any thread, and none once it is closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from incckpt.errors import ManagerClosedError, SaveError

__all__ = ["OneAtATime"]


class OneAtATime:
    """Lets one call in at a time.

    Parameters
    ----------
    in_background
        Whether this thread is one that a call inside may wait for: such a one is not made to wait for that call.

    Attributes
    ----------
    closed
        Whether calls are refused from now on.
    """

    def __init__(self, in_background: Callable[[], bool]) -> None:
        self.closed = False
        self._in_background = in_background
        self._lock = threading.Lock()
        self._inside: int | None = None  # the thread that made the call
        self._pid = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that owns the manager."""
        return os.getpid() != self._pid

    @contextmanager
    def call(self) -> Iterator[None]:
        """Keep other calls out during a block.

        Raises
        ------
        ManagerClosedError
            If the manager is closed, or belongs to another process.
        SaveError
            If this thread is already in a call, or a call of another thread waits for this one.
        """
        if self.forked:
            raise ManagerClosedError("this manager belongs to the process that this one was forked from; make one here")
        if self._inside == threading.get_ident():
            raise SaveError(
                "called in the middle of another call to this manager, by a signal handler or a state_dict(): let the "
                "handler set a flag, and save in the training loop"
            )
        # Use `with`: Ctrl-C between `acquire` and `try` would leave the lock held for good.
        with _without_waiting(self._lock) if self._in_background() else self._lock:
            try:
                self._inside = threading.get_ident()
                if self.closed:
                    raise ManagerClosedError("this manager is closed")
                yield
            finally:
                self._inside = None


@contextmanager
def _without_waiting(lock: threading.Lock) -> Iterator[None]:
    if not lock.acquire(blocking=False):
        raise SaveError(
            "called by a callback of a save's future while another call waits for that save: call in another thread"
        )
    try:
        yield
    finally:
        lock.release()
