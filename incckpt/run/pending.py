"""The saves of a manager that are pending: their futures, and what becomes of them."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Literal, TypeAlias, get_args

from incckpt.errors import BacklogFullError, DeadlineError, IncckptError, ManagerClosedError, SaveError
from incckpt.options import check_choice, checked_count
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.deadline import Job, Rates, expected, expected_together, to_cut
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
    deadline
        Returns when the process has to have ended, by `time.monotonic`, once that is known. From then on the newest
        save that can be made in time is what counts.

    Attributes
    ----------
    reports
        Of the last saves that were committed, oldest first.
    abandoned
        Whether saves were given up that may still be under way: nothing that they use is to be closed.
    """

    def __init__(
        self,
        name: str,
        *,
        max_pending: int,
        on_backlog: OnBacklog,
        deadline: Callable[[], float | None] = lambda: None,
    ) -> None:
        checked_count("max_pending", max_pending, 1)
        check_choice("on_backlog", on_backlog, get_args(OnBacklog))
        self._skips = on_backlog == "skip"
        self._queue = BackgroundQueue(max_pending, f"incckpt-save-{name}")
        self._futures: dict[int, Future[Checkpoint]] = {}  # by step, the latest of each
        self._error: BaseException | None = None
        self._jobs: deque[Job] = deque()  # those that are pending, oldest first
        self._rates = Rates()
        self._deadline = deadline
        self._skipped = 0  # raw bytes of saves that were cut, which the next one will have to store
        self._last: Checkpoint | None = None
        flush = weakref.WeakMethod(self.flush)  # no cycle: what is dropped is freed at once
        self._queue.at_exit = lambda: method() if (method := flush()) is not None else None
        self.abandoned = False
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

    def carry_over(self, took: tuple[int, float, float] | None) -> None:
        """Take what the save of the restored checkpoint took, until this process has saved (`Manifest.took`)."""
        self._rates.carry_over(took)

    def make_room(self, report: SaveReport) -> Future[Checkpoint] | None:
        """Wait until there is room for a save; if it is skipped instead, return its future, which says so.

        Once there is a deadline, nothing is skipped or waited for: the newest save is what counts.
        """
        if self._skips and self._queue.full and self._deadline() is None:
            log.warning("step %d was skipped: max_pending earlier saves are still being written", report.step)
            skipped = Future[Checkpoint]()
            skipped.set_exception(
                BacklogFullError(f"step {report.step} was not saved: earlier saves are being written")
            )
            return skipped
        started = time.perf_counter()
        self._queue.wait_for_room(lambda: self._deadline() is not None)
        report.spent("wait", time.perf_counter() - started)
        return None

    def put(self, write: Callable[[], Checkpoint], report: SaveReport) -> Future[Checkpoint]:
        """Let a save be written in the background, once `make_room` has made room. Return its future.

        Raises
        ------
        ManagerClosedError
            If the saves were stopped.
        """
        job = Job(report, Future[Checkpoint](), skipped=self._skipped)
        self._skipped = 0
        self._jobs.append(job)
        try:
            report.expected_seconds = expected(job, self._rates)
            report.expected_by_another = report.expected_seconds is not None and self._rates.carried_over
            self._futures[report.step] = job.future
            self._cut(self._deadline())
            self._queue.put(partial(self._do, write, job), job.future)
        except BaseException:
            with suppress(ValueError):
                self._jobs.remove(job)
            raise
        return job.future

    def _do(self, write: Callable[[], Checkpoint], job: Job) -> Checkpoint:
        report = job.report
        if job.cut is not None:
            self._jobs.remove(job)
            raise DeadlineError(f"step {report.step} was not saved: {job.cut}")
        job.begun = time.monotonic()
        try:
            checkpoint = self._last = write()
        except BaseException as error:
            if not self.abandoned:  # otherwise it was told
                log.error("saving step %d failed: %s", report.step, error)
                self._error = error
            raise
        finally:
            self._jobs.remove(job)
        self._rates.learn(job)
        if (deadline := self._deadline()) is not None:
            now = time.monotonic()
            log.info(
                "step %d was saved with %.1f s left, in %.1f s, where it was expected to take %s",
                *(report.step, deadline - now, now - job.begun, _in_words(report.expected_seconds)),
            )
        self.reports.append(report)
        return checkpoint

    def _cut(self, deadline: float | None) -> None:
        """Leave out what would keep the newest save that can be made by the deadline from being made."""
        jobs = [job for job in list(self._jobs) if job.cut is None]
        if deadline is None or not jobs:
            return
        left = deadline - time.monotonic()
        cut = to_cut(jobs, left, self._rates)
        for job in jobs:
            if job in cut:
                job.cut = f"in the {max(0.0, left):.1f} s left, another save is to be made"
                self._skipped += job.nbytes
            else:
                job.skipped += self._skipped
                self._skipped = 0
        kept = [job for job in jobs if job not in cut]
        log.info(
            "%.1f s are left, and step %d is expected to be saved in %s%s%s",
            *(left, kept[-1].report.step, _in_words(expected_together(kept, self._rates))),
            " (by what another process took)" if self._rates.carried_over else "",
            "".join(f"; step {job.report.step} is left out" for job in cut),
        )

    def flush(self, deadline: float | None = None) -> Checkpoint | None:
        """Finish the pending saves by a deadline (of `time.monotonic`), by default that of the process, if any.

        Those that cannot be made are left out in favour of the newest that can. What is still under way at the deadline
        is given up; no more saves are taken then.

        Returns
        -------
        Checkpoint or None
            The last one that was made.
        """
        limit = None
        while limit is None or time.monotonic() < limit:
            limit = before = self._deadline() if deadline is None else deadline
            self._cut(limit)
            moved = partial(self._moved, before) if deadline is None else None
            if self._queue.wait(limit, moved):
                return self._last
        steps = ", ".join(str(job.report.step) for job in list(self._jobs))
        self._error = DeadlineError(f"not saved in the time that was left: step {steps}")
        log.error("%s; the checkpoint before it stands", self._error)
        self.abandoned = True
        self._queue.abandon(self._error)
        return self._last

    def _moved(self, before: float | None) -> bool:
        return self._deadline() != before

    def wake(self) -> None:
        """Have a call that waits look at the deadline. Can be called in a signal handler."""
        self._queue.wake()

    def check(self, url: str) -> None:
        """Check that another save to `url` can be taken; raise what an earlier one has failed with.

        Raises
        ------
        IncckptError
            As `raise_failure` does.
        ManagerClosedError
            If saves were given up.
        """
        self.raise_failure(url)
        if self.abandoned:
            raise ManagerClosedError("this manager gave up saves at a deadline; make another one to save again")

    def raise_failure(self, url: str) -> None:
        """Raise what a save to `url` has failed with, unless it was raised before.

        Raises
        ------
        IncckptError
            As it is; a `SaveError` in place of any other exception, and of an `OSError`.
        """
        error, self._error = self._error, None
        if isinstance(error, SaveError) or (isinstance(error, IncckptError) and not isinstance(error, OSError)):
            raise error
        if error is not None:
            raise SaveError(f"an earlier save to {url} failed: {error}") from error

    def stop(self) -> None:
        """Take no more saves, and finish the pending ones, as `flush` does."""
        self.flush()
        self._queue.stop()


def resolved(checkpoint: Checkpoint) -> Future[Checkpoint]:
    """Return the future of a checkpoint that is there already."""
    future = Future[Checkpoint]()
    future.set_result(checkpoint)
    return future


def _in_words(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.1f} s"
