"""How long saves take, and which of the pending ones can still be made by a deadline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from incckpt.run.checkpoint import Checkpoint
from incckpt.run.report import SaveReport
from incckpt.threads import Future

__all__ = ["Job", "Rates", "to_cut"]

_TELLING = 0.25  # of a save has to be stored before its own rate counts: a small object says nothing of large ones
_REMEMBERED = 8  # saves: rates change with the network, and with what training changes


@dataclass(eq=False)
class Job:
    """A save that is pending.

    Attributes
    ----------
    begun
        When it was begun, by `time.monotonic`; ``None`` while it waits.
    cut
        Why it is not to be made.
    skipped
        Raw bytes that saves cut before it would have stored: this one has to, unless they changed again.
    """

    report: SaveReport
    future: Future[Checkpoint]
    begun: float | None = None
    cut: str | None = None
    skipped: int = 0

    @property
    def nbytes(self) -> int:
        """Raw bytes to store, at most."""
        return min(self.report.nbytes, self.report.changed_bytes + self.skipped)


class Rates:
    """What the last saves took: seconds for each byte that had changed, and seconds whatever had changed.

    Of both, the worse of the last save and the mean of the last few counts. Until this process has saved, what the save
    of the checkpoint took that it has restored counts, wherever that was.
    """

    def __init__(self) -> None:
        self._past: deque[tuple[int, float, float]] = deque(maxlen=_REMEMBERED)
        self._before: tuple[int, float, float] | None = None

    @property
    def carried_over(self) -> bool:
        """Whether all that is known is of another process."""
        return not self._past and self._before is not None

    def carry_over(self, took: tuple[int, float, float] | None) -> None:
        """Take what a manifest says of its save; ``None`` if that is nothing."""
        if took is None:
            self._before = None
            return
        changed, store, rest = took
        self._before = changed, store, 2 * rest  # as many requests come after the manifest as before the objects

    def learn(self, job: Job) -> None:
        """Take a save into account that was made."""
        store, commit = (job.report.seconds.get(phase, 0.0) for phase in ("store", "commit"))
        self._past.append((job.nbytes, store, commit))

    def seconds(self, nbytes: int, done: int = 0, elapsed: float = 0.0) -> float | None:
        """Return how long a save takes from now on; ``None`` if nothing is known.

        Parameters
        ----------
        nbytes
            Raw bytes that have changed.
        done, elapsed
            How many of them were stored, and in how many seconds, if it has begun.
        """
        per_byte = [store / changed for changed, store, _ in (self._total(), *self._last()) if changed]
        if done >= nbytes * _TELLING > 0:
            if self.carried_over:
                per_byte = []  # another machine may have been slower
            per_byte.append(elapsed / done)
        if not per_byte:
            return None
        fixed = [commit for _, _, commit in (self._total(), *self._last())]
        return max(per_byte) * max(0, nbytes - done) + max(fixed)

    def _last(self) -> list[tuple[int, float, float]]:
        return self._known()[-1:]

    def _known(self) -> list[tuple[int, float, float]]:
        return list(self._past) or ([] if self._before is None else [self._before])

    def _total(self) -> tuple[int, float, float]:
        known = self._known()
        changed, store, commit = zip(*known, strict=True) if known else ((), (), ())
        return sum(changed), sum(store), sum(commit) / max(1, len(commit))


def expected(job: Job, rates: Rates, skipped: int = 0) -> float | None:
    """Return how long a save takes from now on, in its turn; ``None`` if nothing is known.

    Parameters
    ----------
    skipped
        Raw bytes that further saves before it would have stored.
    """
    report = job.report
    nbytes = min(report.nbytes, job.nbytes + skipped)
    if job.begun is None:
        return rates.seconds(nbytes)
    return rates.seconds(nbytes, sum(way.raw for way in report.by_way.values()), time.monotonic() - job.begun)


def expected_together(jobs: Sequence[Job], rates: Rates) -> float | None:
    """Return how long it takes from now on until all of some saves are made; ``None`` if nothing is known."""
    each = [expected(job, rates) for job in jobs]
    return None if None in each else sum(seconds for seconds in each if seconds is not None)


def to_cut(jobs: Sequence[Job], left: float, rates: Rates) -> list[Job]:
    """Return which pending saves to leave out, so that the newest that can be made in the time left is made.

    The one under way is never among them: what it stores, a later one would have to store, too.
    """
    under_way = [job for job in jobs if job.begun is not None]
    waiting = [job for job in jobs if job.begun is None]
    rest = 0.0
    for job in under_way:
        seconds = expected(job, rates)
        if seconds is None:
            return waiting[:-1]  # nothing is known: the newest has a chance
        rest += seconds
    in_turn = [expected(job, rates) for job in waiting]
    if rest + sum(seconds for seconds in in_turn if seconds is not None) <= left and None not in in_turn:
        return []
    for newest in reversed(range(len(waiting))):
        skipped = sum(job.nbytes for job in waiting[:newest])
        alone = expected(waiting[newest], rates, skipped)
        if alone is None or rest + alone <= left:
            return waiting[:newest] + waiting[newest + 1 :]
    return waiting if under_way else waiting[1:]  # none fits; estimates may be wrong
