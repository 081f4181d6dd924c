"""A backend that retries transient failures."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from incckpt.backends.base import Backend, Entry, Leftover, PagedListing, ReadableBuffer
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, BackendTimeoutError, KeyExistsError, KeyNotFoundError, UnreachableError

__all__ = ["RetryBackend"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH = 1_000  # keys of a delete that are retried together


class RetryBackend(WrapperBackend):
    """Retries every operation of `inner` that fails with a transient error, waiting longer each time.

    The wait before retry n is drawn uniformly from 0 to ``first_wait * 2**(n - 1)``, at most `longest_wait` (full
    jitter, which spreads out clients that failed together). Other errors are raised at once.

    Parameters
    ----------
    inner
        The wrapped backend.
    limit
        Seconds from an operation's start after which it is not retried.
    first_limit
        The same until the first answer ever: without one, the address is probably wrong.
    first_wait, longest_wait
        Seconds.
    sleep, clock
        For tests.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        limit: float = 180.0,
        first_limit: float = 10.0,
        first_wait: float = 0.2,
        longest_wait: float = 20.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._limit = limit
        self._first_limit = min(first_limit, limit)
        self._answered = False
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self._sleep = sleep
        self._clock = clock
        self._random = random.Random()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._repeat(lambda: self.inner.get(key, start, end))

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        return self._repeat(lambda: self.inner.get_into(key, parts))

    def put(self, key: str, data: ReadableBuffer) -> None:
        self._repeat(lambda: self.inner.put(key, data))

    def create(self, key: str, data: ReadableBuffer) -> None:
        """See `Backend.create`; also succeeds if an earlier attempt did, but its reply was lost.

        If the key is taken, the value is read back. If it is `data`, an earlier attempt succeeded: ours, or one by
        something on the way that repeats requests. So created values must differ between writers (hold a nonce) or
        mean the same.
        """

        def attempt() -> None:
            try:
                self.inner.create(key, data)
            except KeyExistsError:
                if not self._holds(key, data):
                    raise

        self._repeat(attempt)

    def delete(self, keys: Iterable[str]) -> None:
        remaining = iter(keys)
        while batch := list(itertools.islice(remaining, _BATCH)):
            self._repeat(partial(self.inner.delete, batch))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        listing = self._repeat(lambda: self.inner.list(prefix))
        if isinstance(listing, PagedListing):
            return self._resumed(listing)
        return iter(self._repeat(lambda: list(self.inner.list(prefix))))

    def head(self, key: str) -> Entry:
        return self._repeat(lambda: self.inner.head(key))

    def leftovers(self) -> Iterator[Leftover]:
        return iter(self._repeat(lambda: list(self.inner.leftovers())))

    def remove_leftover(self, leftover: Leftover) -> None:
        self._repeat(lambda: self.inner.remove_leftover(leftover))

    def _resumed(self, listing: PagedListing) -> Iterator[Entry]:
        while (entry := self._repeat(lambda: next(listing, None))) is not None:
            yield entry

    def _holds(self, key: str, data: ReadableBuffer) -> bool:
        """Whether `key` exists and its value is `data`."""
        try:
            return self.inner.get(key) == memoryview(data).cast("B")
        except KeyNotFoundError:
            return False

    def _repeat(self, attempt: Callable[[], T]) -> T:
        started = self._clock()
        for number in itertools.count(1):
            try:
                result = attempt()
            except BackendError as exc:
                self._answered |= not isinstance(exc, UnreachableError)
                if not exc.transient:
                    raise
                failure = exc
            else:
                self._answered = True
                return result
            limit = self._limit if self._answered else self._first_limit
            passed = self._clock() - started
            wait = self._random.uniform(0, min(self._longest_wait, self._first_wait * 2 ** min(number - 1, 30)))
            if passed + wait >= limit:
                message = f"{failure.strerror or failure} (gave up after {number} attempts in {passed:.0f} s)"
                if not self._answered:
                    message += "; the server has not answered once: is the address right, and is the server up?"
                raise BackendTimeoutError(failure.errno, message, transient=True) from failure
            logger.warning(
                "%s; attempt %d failed, the next in %.1f s, giving up in %.0f s",
                failure.strerror or failure,
                number,
                wait,
                limit - passed,
            )
            self._sleep(wait)
        raise AssertionError("itertools.count ended")
