"""Lets in one call to a manager at a time, from any thread, and none once it is closed."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from incckpt.errors import ManagerClosedError, SaveError

__all__ = ["OneAtATime", "one_at_a_time"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


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
        self._lock = threading.RLock()  # entered once; it knows which thread is inside
        self._pid = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that owns the manager."""
        return os.getpid() != self._pid

    def make(self, call: Callable[[], _T]) -> _T:
        """Make a call, and return what it returns.

        Raises
        ------
        ManagerClosedError
            If the manager is closed, or belongs to another process.
        SaveError
            If this thread is already in a call, or a call of another thread waits for this one.
        """
        if self.forked:
            raise ManagerClosedError("this manager belongs to the process that this one was forked from; make one here")
        if self._lock._is_owned():  # type: ignore[attr-defined]  # what `threading.Condition` asks a lock
            raise SaveError(
                "called in the middle of another call to this manager, by a signal handler or a state_dict(): let the "
                "handler set a flag, and save in the training loop"
            )
        if self._in_background():
            return self._make_without_waiting(call)
        # Use `with`: Ctrl-C between `acquire` and `try` would leave the lock held for good.
        with self._lock:
            return self._make(call)

    def _make(self, call: Callable[[], _T]) -> _T:
        if self.closed:
            raise ManagerClosedError("this manager is closed")
        return call()

    def _make_without_waiting(self, call: Callable[[], _T]) -> _T:
        if not self._lock.acquire(blocking=False):
            raise SaveError(
                "called by a callback of a save's future while another call waits for that save: call in another thread"
            )
        try:
            return self._make(call)
        finally:
            self._lock.release()


class _Called(Protocol):
    _calls: OneAtATime


_C = TypeVar("_C", bound=_Called)


def one_at_a_time(method: Callable[Concatenate[_C, _P], _T]) -> Callable[Concatenate[_C, _P], _T]:
    """Make calls of a method calls of its object's `OneAtATime`."""

    @functools.wraps(method)
    def call(self: _C, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._calls.make(functools.partial(method, self, *args, **kwargs))

    return call
