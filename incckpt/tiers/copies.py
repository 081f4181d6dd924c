"""Copies checkpoints of the local tier to the bucket, in the background, the newest at all costs."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import RLock

from incckpt.errors import BackendError, DeadlineError, IncckptError, OptionError, SaveError, SupersededError
from incckpt.retention import Record
from incckpt.run.attempt import IfExists
from incckpt.run.queue import BackgroundQueue
from incckpt.run.report import SaveReport
from incckpt.store.refs import Ref
from incckpt.threads import Future

__all__ = ["Copies", "PendingCopy"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingCopy:
    """A checkpoint of the local tier that the bucket does not have yet.

    Attributes
    ----------
    ref
        The local checkpoint.
    report
        That of its save, which is told how far it has come.
    if_exists
        As the save had it.
    """

    ref: Ref
    report: SaveReport
    if_exists: IfExists


class Copies:
    """Copies checkpoints one after the other. A copy that fails is made up for by the next one, which is newer.

    Parameters
    ----------
    copy
        Copies one checkpoint, and returns whether the bucket has it then; called in a thread of its own.
    bucket
        URL of the bucket, for messages.
    run
        The run's name.
    max_pending
        Checkpoints that may wait besides the one being copied; where there is a further one, the oldest does not.
    deadline
        Returns when the process has to have ended, by `time.monotonic`, once that is known.
    """

    def __init__(
        self,
        copy: Callable[[PendingCopy], bool],
        *,
        bucket: str,
        run: str,
        max_pending: int,
        deadline: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._copy = copy
        self._bucket = bucket
        self._max_pending = max_pending
        self._waiting: deque[PendingCopy] = deque()
        self._under_way: PendingCopy | None = None
        self._failed: PendingCopy | None = None  # the newest that could not be copied
        self._error: IncckptError | None = None  # what it failed with
        self._lock = RLock()
        self._deadline = deadline
        self._queue = BackgroundQueue(2, f"incckpt-copy-{run}")
        finish = weakref.WeakMethod(self.finish)
        self._queue.at_exit = lambda: None if (method := finish()) is None else method(last=True)

    def works_here(self) -> bool:
        """Return whether this thread copies."""
        return self._queue.works_here()

    def keep(self, history: Sequence[Record]) -> set[int]:
        """Keep what is still to be copied: a retention policy for the local tier."""
        with self._lock:
            return {item.ref.step for item in (*self._waiting, self._under_way, self._failed) if item is not None}

    def add(self, item: PendingCopy) -> None:
        """Let a checkpoint be copied; return at once."""
        skipped: list[PendingCopy] = []
        with self._lock:
            self._waiting.append(item)
            while len(self._waiting) > self._max_pending:
                skipped.append(self._waiting.popleft())
        item.report.tier("bucket").state = "waiting"
        self._skip(skipped)
        self._wake()

    def drop(self) -> None:
        """Give up what waits, and wait until nothing is being copied: a newer checkpoint goes there directly."""
        with self._lock:
            skipped, self._waiting = list(self._waiting), deque()
            self._failed = self._error = None
        self._skip(skipped)
        self.wait()

    def wait(self) -> None:
        """Wait until nothing waits or is being copied."""
        self._queue.wait()

    def raise_superseded(self) -> None:
        """Raise why the bucket takes no copies any more, if that is so.

        Raises
        ------
        SupersededError
            If another process has taken over the bucket's run.
        OptionError
            If the bucket's run has a later step than the checkpoints of this manager.
        """
        if isinstance(self._error, (SupersededError, OptionError)):
            raise self._error

    def wake(self) -> None:
        """Have a call that waits look at the deadline. Can be called in a signal handler."""
        self._queue.wake()

    def finish(self, deadline: float | None = None, *, last: bool = False) -> bool:
        """Wait until nothing waits or is being copied, or for a deadline; return whether it did not come to that.

        Once there is a deadline, what waits is left out in favour of the newest.

        Parameters
        ----------
        deadline
            By `time.monotonic`; by default that of the process, which may be announced meanwhile.
        last
            Whether to wait for nothing any more after the deadline, even if the interpreter exits.
        """
        limit = None
        while limit is None or time.monotonic() < limit:
            limit = before = self._deadline() if deadline is None else deadline
            if limit is not None:
                with self._lock:
                    skipped, self._waiting = list(self._waiting)[:-1], deque(list(self._waiting)[-1:])
                self._skip(skipped)
            moved = None if deadline is not None else partial(self._moved, before)
            if self._queue.wait(limit, moved):
                return True
        log.error("not copied to %s in the time that was left; what it had before stands", self._bucket)
        if last:
            error = DeadlineError("not copied in the time that was left")
            with self._lock:
                given_up = [item for item in (*self._waiting, self._under_way) if item is not None]
            for item in given_up:
                item.report.tier("bucket").state, item.report.tier("bucket").error = "failed", str(error)
            self._queue.abandon(error)
        return False

    def _moved(self, before: float | None) -> bool:
        return self._deadline() != before

    def stop(self) -> None:
        """Finish, and try the newest once more if it could not be copied.

        Raises
        ------
        SaveError, SupersededError, OptionError
            If the bucket does not have the newest checkpoint.
        """
        self.wait()
        failed = self._failed
        if failed is not None and isinstance(self._error, BackendError):
            self.add(failed)
        self._queue.stop()
        self.raise_superseded()
        if self._failed is not None:
            raise SaveError(
                f"step {self._failed.ref.step} is in the local tier alone: copying it to {self._bucket} failed: "
                f"{self._error}"
            ) from self._error

    def _wake(self) -> None:
        if not self._queue.full:  # else a job that has not begun will see it
            self._queue.put(self._work, Future[None]())

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                item = self._under_way = self._waiting.popleft()
            try:
                self._copy_one(item)
            finally:
                self._under_way = None

    def _copy_one(self, item: PendingCopy) -> None:
        tier = item.report.tier("bucket")
        tier.state = "copying"
        started = time.perf_counter()
        try:
            there = self._copy(item)
        except BaseException as error:
            tier.state = "failed"
            tier.error = str(error)
            again = self._failed is not None
            self._failed = item
            self._error = error if isinstance(error, IncckptError) else SaveError(f"interrupted: {error!r}")
            log.log(
                logging.DEBUG if again else logging.ERROR,
                "step %d is in the local tier alone: copying it to %s failed, and the next save's copy will make up "
                "for it: %s", item.ref.step, self._bucket, error,
            )  # fmt: skip
            if not isinstance(error, Exception):
                raise
        else:
            if self._failed is not None:
                log.warning("%s takes copies again: it has step %d now", self._bucket, item.ref.step)
            self._failed = self._error = None
            if there:
                item.report.reached("bucket")
            else:
                tier.state = "skipped"
        finally:
            tier.seconds = time.perf_counter() - started

    @staticmethod
    def _skip(items: Sequence[PendingCopy]) -> None:
        for item in items:
            item.report.tier("bucket").state = "skipped"
            log.info("step %d is not copied to the bucket: newer ones wait", item.ref.step)
