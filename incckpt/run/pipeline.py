"""Work on many chunks at once, bounded in requests, computing threads and bytes in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

__all__ = ["LOCAL_REQUESTS", "REMOTE_REQUESTS", "Pipeline"]

_T = TypeVar("_T")
_R = TypeVar("_R")

REMOTE_REQUESTS: Final = 32
LOCAL_REQUESTS: Final = 4


class Pipeline:
    """A pool of workers, each of which takes an item through all its steps.

    Parameters
    ----------
    requests
        How many items, or calls of `together`, may be under way at once, most of them waiting; at least `threads` are.
    threads
        How many workers may compute at one time: they hold `cpu` while they do.
    bytes_in_flight
        Bound on the weight of the items being worked on; a heavier one goes alone.
    name
        Of the threads.
    """

    def __init__(self, *, requests: int, threads: int, bytes_in_flight: int, name: str) -> None:
        self._workers = ThreadPoolExecutor(max(requests, threads), name)
        # Another pool, since those who wait for its results are workers. Without it each does its requests by itself.
        self._requests = ThreadPoolExecutor(requests, f"{name}-request") if requests > threads else None
        self.cpu = threading.BoundedSemaphore(threads)
        self._limit = bytes_in_flight
        self._used = 0
        self._freed = threading.Condition()

    def each(self, items: Iterable[_T], weight: Callable[[_T], int], work: Callable[[_T], None]) -> None:
        """Call `work` with every item; return when all are done.

        Parameters
        ----------
        weight
            Bytes that an item takes while it is worked on.

        Raises
        ------
        BaseException
            The first that `work` raised, or that interrupted the caller; items not begun by then are left out, and none
            is under way any more.
        """
        errors: list[BaseException] = []

        def guarded(item: _T, nbytes: int) -> None:
            try:
                if not errors:
                    work(item)
            except BaseException as error:  # noqa: BLE001 -- raised again in the caller's thread
                errors.append(error)
            finally:
                self._release(nbytes)

        under_way: list[Future[None]] = []
        try:
            for item in items:
                nbytes = weight(item)
                self._acquire(nbytes)
                if errors:
                    self._release(nbytes)
                    break
                under_way.append(self._workers.submit(guarded, item, nbytes))
            wait(under_way)
        except BaseException as error:
            errors.append(error)
            wait(under_way)  # the caller's memory is being read or written
            raise
        if errors:
            raise errors[0]

    def together(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Return what `function` makes of each of `items`, called by a worker for requests that should not queue.

        Raises
        ------
        BaseException
            The first that `function` raised; none is under way any more.
        """
        if self._requests is None or len(items) == 1:
            return [function(item) for item in items]
        under_way = [self._requests.submit(function, item) for item in items]
        wait(under_way)
        return [future.result() for future in under_way]

    def close(self) -> None:
        """Let go of the threads."""
        self._workers.shutdown()
        if self._requests is not None:
            self._requests.shutdown()

    def _acquire(self, nbytes: int) -> None:
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + nbytes <= self._limit)
            self._used += nbytes

    def _release(self, nbytes: int) -> None:
        with self._freed:
            self._used -= nbytes
            self._freed.notify_all()
