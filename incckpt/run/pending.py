"""The saves of a manager that are pending: their futures, and what becomes of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal, TypeAlias, get_args

from incckpt.errors import BacklogFullError, IncckptError, SaveError
from incckpt.options import check_choice, checked_count
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.queue import BackgroundQueue
from incckpt.run.report import SaveReport
from incckpt.threads import Future

__all__ = ["OnBacklog", "PendingSaves", "resolved"]

log = logging.getLogger(__name__)

OnBacklog: TypeAlias = Literal["wait", "skip"]

_HISTORY = 1000


class PendingSaves:
    """Saves written one after the other in the background. What fails is reported once, by a later call.

    Parameters
    ----------
    name
        Of the run.
    max_pending
        Saves that may be pending.
    on_backlog
        What becomes of a further one: it ``"wait"``s, or is ``"skip"``ped.

    Attributes
    ----------
    reports
        Of the last saves that were committed, oldest first.
    """

    def __init__(self, name: str, *, max_pending: int, on_backlog: OnBacklog) -> None:
        checked_count("max_pending", max_pending, 1)
        check_choice("on_backlog", on_backlog, get_args(OnBacklog))
        self._skips = on_backlog == "skip"
        self._queue = BackgroundQueue(max_pending, f"incckpt-save-{name}")
        self._futures: dict[int, Future[Checkpoint]] = {}  # by step, the latest of each
        self._error: BaseException | None = None
        self.reports: deque[SaveReport] = deque(maxlen=_HISTORY)

    @property
    def steps(self) -> Collection[int]:
        """The steps of the saves that are pending."""
        self._futures = {step: future for step, future in self._futures.items() if not future.done()}
        return self._futures.keys()

    def works_here(self) -> bool:
        """Return whether it is this thread that writes a save now."""
        return self._queue.works_here()

    def future(self, step: int) -> Future[Checkpoint] | None:
        """Return the future of the pending save of `step`, if there is one."""
        return self._futures[step] if step in self.steps else None

    def make_room(self, report: SaveReport) -> Future[Checkpoint] | None:
        """Wait until there is room for a save; if it is skipped instead, return its future, which says so."""
        if self._skips and self._queue.full:
            log.warning("step %d was skipped: max_pending earlier saves are still being written", report.step)
            skipped = Future[Checkpoint]()
            skipped.set_exception(
                BacklogFullError(f"step {report.step} was not saved: earlier saves are being written")
            )
            return skipped
        started = time.perf_counter()
        self._queue.wait_for_room()
        report.spent("wait", time.perf_counter() - started)
        return None

    def put(self, write: Callable[[], Checkpoint], report: SaveReport) -> Future[Checkpoint]:
        """Let a save be written in the background; there must be room. Return its future.

        Raises
        ------
        ManagerClosedError
            If the saves were stopped.
        """
        future = self._futures[report.step] = Future[Checkpoint]()
        self._queue.put(partial(self._do, write, report), future)
        return future

    def _do(self, write: Callable[[], Checkpoint], report: SaveReport) -> Checkpoint:
        try:
            checkpoint = write()
        except BaseException as error:
            log.error("saving step %d failed: %s", report.step, error)
            self._error = error
            raise
        self.reports.append(report)
        return checkpoint

    def raise_failure(self, url: str) -> None:
        """Raise what a save to `url` has failed with, unless it was raised before.

        Raises
        ------
        IncckptError
            As it is; a `SaveError` in place of any other exception, and of an `OSError`.
        """
        error, self._error = self._error, None
        if isinstance(error, IncckptError) and not isinstance(error, OSError):
            raise error
        if error is not None:
            raise SaveError(f"an earlier save to {url} failed: {error}") from error

    def wait(self) -> None:
        """Wait until no save is pending."""
        self._queue.wait()

    def stop(self) -> None:
        """Take no more saves, and finish the pending ones."""
        self._queue.stop()


def resolved(checkpoint: Checkpoint) -> Future[Checkpoint]:
    """Return the future of a checkpoint that is there already."""
    future = Future[Checkpoint]()
    future.set_result(checkpoint)
    return future
