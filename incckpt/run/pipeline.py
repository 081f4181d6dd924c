"""Works on many chunks at once, with bounds on requests, computing threads and bytes in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Final, TypeVar

from incckpt.threads import shielded

__all__ = ["LOCAL_REQUESTS", "Pipeline"]

_T = TypeVar("_T")
_R = TypeVar("_R")

LOCAL_REQUESTS: Final = 4


class Pipeline:
    """A pool of workers, each of which takes an item through all its steps. For use by one thread at a time.

    The main thread keeps out of it, see :mod:`incckpt.threads`: another one submits the work, and waits.

    Parameters
    ----------
    requests
        The most items, or calls of `together`, in progress at once, most of which wait; at least `threads` are allowed.
    threads
        The most workers that compute at once; they hold `cpu` meanwhile.
    bytes_in_flight
        The largest total weight of the items in progress; a heavier item is processed alone.
    name
        Prefix of the threads' names.
    """

    def __init__(self, *, requests: int, threads: int, bytes_in_flight: int, name: str) -> None:
        self._size = max(requests, threads)
        self._name = name
        self._workers: ThreadPoolExecutor | None = None
        # A separate pool avoids deadlock: workers block on its results. Without it each makes its own requests.
        self._separate = requests > threads
        self._requests: ThreadPoolExecutor | None = None
        self.cpu = threading.BoundedSemaphore(threads)
        self._limit = bytes_in_flight
        self._used = 0
        self._freed = threading.Condition()
        self._starting = threading.Lock()
        self._errors: list[BaseException] = []  # of the call of `each` under way

    def each(self, items: Iterable[_T], weight: Callable[[_T], int], work: Callable[[_T], None]) -> None:
        """Call `work` with every item; return when all are done.

        Parameters
        ----------
        weight
            Returns the bytes that an item takes while in progress.

        Raises
        ------
        BaseException
            The first that `work` raised, or that interrupted the caller. Items not begun by then are skipped, and none
            is still in progress.
        """
        shielded(partial(self._each, items, weight, work), self.interrupt)

    def interrupt(self) -> None:
        """Have `each`, if it is under way in another thread, raise `KeyboardInterrupt` soon."""
        self._errors.append(KeyboardInterrupt())

    def _each(self, items: Iterable[_T], weight: Callable[[_T], int], work: Callable[[_T], None]) -> None:
        errors = self._errors = []

        def guarded(item: _T, nbytes: int) -> None:
            try:
                if not errors:
                    work(item)
            except BaseException as error:  # noqa: BLE001 -- raised again in the caller's thread
                errors.append(error)
            finally:
                self._release(nbytes)

        if self._workers is None:
            self._workers = ThreadPoolExecutor(self._size, self._name)
        under_way: list[Future[None]] = []
        try:
            for item in items:
                nbytes = weight(item)
                self._acquire(nbytes)
                if errors:
                    self._release(nbytes)
                    break
                under_way.append(_submit(self._workers, guarded, item, nbytes))
            wait(under_way)
        except BaseException as error:
            errors.append(error)
            wait(under_way)  # the caller's memory is being read or written
            raise
        if errors:
            raise errors[0]

    def together(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Call `function` with each of `items` at once and return the results; for a worker's requests.

        Raises
        ------
        BaseException
            The first that `function` raised; no call is still in progress.
        """
        if not self._separate or len(items) < 2:
            return [function(item) for item in items]
        return shielded(partial(self._together, function, items))

    def _together(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        with self._starting:
            if self._requests is None:
                self._requests = ThreadPoolExecutor(self._size, f"{self._name}-request")
            requests = self._requests
        under_way = [_submit(requests, function, item) for item in items]
        wait(under_way)
        return [future.result() for future in under_way]

    def close(self) -> None:
        """Stop the threads; the next call starts new ones."""
        if self._workers is not None or self._requests is not None:
            shielded(self._close)

    def _close(self) -> None:
        for pool in (self._workers, self._requests):
            if pool is not None:
                pool.shutdown()
        self._workers = self._requests = None

    def _acquire(self, nbytes: int) -> None:
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + nbytes <= self._limit)
            self._used += nbytes

    def _release(self, nbytes: int) -> None:
        with self._freed:
            self._used -= nbytes
            self._freed.notify_all()


def _submit(pool: ThreadPoolExecutor, function: Callable[..., _R], *arguments: Any) -> Future[_R]:
    """Submit a call to a pool; make it here if the pool refuses, at a limit on threads or as the interpreter exits."""
    turns = iter([function])

    def call_once() -> Any:  # a pool that could not start a thread may still run it later
        return next(turns, _nothing)(*arguments)

    try:
        return pool.submit(call_once)
    except RuntimeError:
        done: Future[_R] = Future()
        try:
            done.set_result(call_once())
        except Exception as error:  # noqa: BLE001 -- as the pool does
            done.set_exception(error)
        return done


def _nothing(*arguments: object) -> None:
    """Replace a call that was already made."""
