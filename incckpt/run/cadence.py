"""How often to save: so that saving takes a small share of training time, and a crash does not cost too much of it."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, SupportsFloat, TypeAlias

from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.options import checked_count, checked_seconds
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.report import SaveReport
from incckpt.threads import Future

__all__ = ["Cadence", "Every", "cadence_of"]

log = logging.getLogger(__name__)

Every: TypeAlias = int | timedelta | Literal["auto"]

_FIRST = 8  # steps before the first save, which show how long they take without one
_STEPS = 256  # whose median counts: it knows nothing of an evaluation in between


class Cadence:
    """Decides at which steps to save. It is asked after every step, since it measures how long steps take.

    What a save costs is how long its call blocked, and by how much steps were slower until it was durable.

    Parameters
    ----------
    every
        ``"auto"``: after a save, as long as its cost is more than `share` of the time since. Or plainly a number of
        steps, of which every multiple is saved, or a `timedelta`.
    share
        Of training time that saves may cost, for ``"auto"``.
    most_lost
        Seconds of work, or a `timedelta`, that a crash may cost, for ``"auto"``: from one save's call until the next is
        durable. It prevails over `share`; that is logged, once.
    shortest
        Seconds between saves, or a `timedelta`, for ``"auto"``: however little they cost, they fill the store.
        `most_lost` prevails.
    clock
        Returns seconds.

    Raises
    ------
    OptionError
        If an argument is not usable.
    """

    def __init__(
        self,
        every: Every = "auto",
        *,
        share: SupportsFloat = 0.01,
        most_lost: SupportsFloat | timedelta = 1800.0,
        shortest: SupportsFloat | timedelta = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = self._seconds = None
        if isinstance(every, timedelta):
            self._seconds = checked_seconds("save_every", every, positive=True)
        elif every != "auto":
            if isinstance(every, (str, float)):
                raise OptionError(f"save_every must be a number of steps, a timedelta or 'auto', not {shown(every)}")
            self._steps = checked_count("save_every", every, 1)
        try:
            self._share = float(share)
        except (TypeError, ValueError, OverflowError):
            self._share = math.nan
        if not 0 < self._share < 1:
            raise OptionError(f"share must be a part of training time, between 0 and 1, not {shown(share)}")
        self._most_lost = checked_seconds("most_lost", most_lost, positive=True, endless=True)
        self._shortest = checked_seconds("shortest", shortest, positive=True)
        self._clock = clock
        self._asked: float | None = None  # when `due` was called last
        self._safe = 0.0  # the time whose work is saved
        self._retry = -math.inf
        self._quiet: deque[float] = deque(maxlen=_STEPS)  # seconds of steps, while no save was pending
        self._busy: deque[float] = deque(maxlen=_STEPS)
        self._busy_steps = 0
        self._pending: Future[Checkpoint] | None = None
        self._called = 0.0  # when the pending save was
        self._blocked = self._unseen = 0.0  # by the pending save; since the last call of `due`
        self._durable = 0.0
        self._cost: float | None = None
        self._told = False

    @property
    def cost(self) -> float | None:
        """Seconds of training that the last save has cost; ``None`` until one is durable."""
        return self._cost

    @property
    def interval(self) -> float:
        """Seconds between saves, as known now, for ``"auto"``."""
        return max(0.0, min(max(self._shortest, (self._cost or 0.0) / self._share), self._latest))

    @property
    def _latest(self) -> float:
        """Seconds after a save at which the next one is due, so that it is durable in time, even a step later."""
        return self._most_lost - self._durable - (statistics.median(self._quiet) if self._quiet else 0.0)

    def due(self, step: int) -> bool:
        """Return whether to save now, after `step`."""
        now = self._clock()
        self._observe(now)
        if self._steps is not None:
            return step % self._steps == 0
        age = now - self._safe
        if self._seconds is not None:
            return now - max(self._safe, self._called) >= self._seconds
        if self._pending is not None or now < self._retry:
            return False
        if self._cost is None:
            return len(self._quiet) >= _FIRST or age >= self._latest
        return age >= self.interval

    def saved(self, report: SaveReport, future: Future[Checkpoint]) -> None:
        """Take note of a save that was called just now."""
        blocked = report.blocked_seconds
        if self._pending is None:
            self._blocked = 0.0
            self._busy.clear()
            self._busy_steps = 0
        self._called = self._clock() - blocked
        self._blocked += blocked
        self._unseen += blocked
        self._pending = future

    def _observe(self, now: float) -> None:
        """Measure the step that has ended, and what the pending save has cost, if it has ended, too."""
        if self._asked is None:
            self._safe = self._called = now
        else:
            seconds = now - self._asked - self._unseen
            if self._pending is None:
                self._quiet.append(seconds)
            else:
                self._busy.append(seconds)
                self._busy_steps += 1
        self._asked, self._unseen = now, 0.0
        if self._pending is not None and self._pending.done():
            failed = self._pending.exception() is not None
            self._pending = None
            self._settle(now, failed)

    def _settle(self, now: float, failed: bool) -> None:
        slower = 0.0
        if self._quiet and self._busy:
            slower = self._busy_steps * (statistics.median(self._busy) - statistics.median(self._quiet))
        if failed:
            self._retry = now + min(self._shortest, self._most_lost)
            return
        self._cost = self._blocked + max(0.0, slower)
        self._durable = now - self._called
        self._safe = self._called
        wanted = self._cost / self._share
        if self._steps is None and self._seconds is None and wanted > self._latest and not self._told:
            self._told = True
            log.warning(
                "a save costs %.3g s of training and is durable after %.3g s. To lose no more than %.3g s of work, "
                "saves are made every %.3g s, where %.3g s would keep their cost below %.3g %%",
                *(self._cost, self._durable, self._most_lost, self.interval, wanted, 100 * self._share),
            )


def cadence_of(given: Any) -> Cadence | None:
    """Return what the option `save_every` says.

    Raises
    ------
    OptionError
        If it says nothing that is known.
    """
    return given if given is None or isinstance(given, Cadence) else Cadence(given)
