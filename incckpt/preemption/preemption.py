"""`Preemption`: what announces that this process has to end soon, and when."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Self, SupportsFloat

from incckpt import threads
from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.options import checked_seconds
from incckpt.preemption.notices import Notice, Source, Watcher, sources_of
from incckpt.preemption.signals import SignalWatch

__all__ = ["Preemption", "chosen_preemption"]

log = logging.getLogger(__name__)


class Preemption:
    """Watches for what announces the end of this process, as long as a manager uses it.

    The first announcement counts; a later one can only bring the end nearer. Several managers may share one.

    Parameters
    ----------
    signals
        That announce it, as numbers or `signal.Signals`: ``SIGTERM`` by default, which Kubernetes, Slurm, torchrun and
        an operating system that shuts down send first. Handlers that were there before are called, too. A signal that
        would have ended the process no longer does: the training loop has to, by looking at `manager.preempted`.
    grace
        Seconds to the end from a signal, or from a notice that does not say when, or whose time has passed by this
        machine's clock. Kubernetes gives 30 unless ``terminationGracePeriodSeconds`` says otherwise, Slurm
        ``KillWait`` (30), torchrun 30, docker stop 10.
    clouds
        Whose notices to look for every second: ``"auto"`` (whichever answers), or some of ``"aws"``, ``"gcp"``,
        ``"azure"`` or of a `Source`; none by default.
    margin
        Seconds before the end at which saves are given up, so that the process can still end in order, even if the
        machine is busy.
    on_notice
        Is called once with each `Notice`, in a thread of its own.

    Raises
    ------
    OptionError
        If an argument is not usable.
    """

    def __init__(
        self,
        *,
        signals: Iterable[int] = (signal.SIGTERM,),
        grace: SupportsFloat | timedelta = 30.0,
        clouds: str | Source | Iterable[str | Source] = (),
        margin: SupportsFloat | timedelta = 2.0,
        on_notice: Callable[[Notice], object] | None = None,
    ) -> None:
        try:
            numbers = [signal.Signals(number) for number in signals]
        except (TypeError, ValueError):
            raise OptionError(f"signals must be numbers of signals, as signal.SIGTERM; not {shown(signals)}") from None
        if fatal := {signal.SIGKILL, signal.SIGSTOP}.intersection(numbers):
            raise OptionError(f"signals: {fatal.pop().name} cannot be handled by any process")
        self._grace = checked_seconds("grace", grace)
        self._margin = checked_seconds("margin", margin)
        self._on_notice = on_notice
        self._signals = SignalWatch(numbers, self._signalled)
        sources = sources_of(clouds)
        self._watcher = Watcher(sources, self.announce) if sources else None
        self._end: float | None = None
        self._users = 0
        self._process = os.getpid()
        self._changed: list[Callable[[], object]] = []

    @property
    def preempted(self) -> bool:
        """Whether the end was announced."""
        return self._end is not None

    @property
    def deadline(self) -> float | None:
        """When saves are given up, by `time.monotonic`; ``None`` while nothing was announced."""
        return None if self._end is None else self._end - self._margin

    def announce(self, notice: Notice) -> None:
        """Take a notice: one of a source that this class does not know, say. Can be called in a signal handler."""
        left = self._grace if notice.deadline is None else notice.deadline - time.time()
        if left <= 0:  # by a clock that is wrong, or the end is late: nothing is lost by trying
            left = self._grace
        end = time.monotonic() + left
        if self._end is None or end < self._end:
            self._end = end
        for changed in tuple(self._changed):  # another thread may take one away meanwhile
            changed()
        try:
            threads.start(lambda: self._tell(notice, left), "incckpt-notice")
        except RuntimeError:  # no thread can be started: whoever saves next logs it
            return

    def start(self, changed: Callable[[], object]) -> Self:
        """Watch, and call `changed`, which only wakes somebody, whenever something is announced."""
        if self._process != os.getpid():  # forked from another one, whose users are not this one's
            self._process, self._users, self._changed, self._end = os.getpid(), 0, [], None
        self._changed.append(changed)
        if not self._users:
            self._signals.start()
            if self._watcher is not None:
                self._watcher.start()
        self._users += 1
        return self

    def stop(self, changed: Callable[[], object]) -> None:
        """Watch no more, once every user has stopped."""
        if changed not in self._changed:
            return
        self._changed.remove(changed)
        self._users -= 1
        if not self._users:
            self._signals.stop()
            if self._watcher is not None:
                self._watcher.stop()

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        self.announce(Notice(name, None, f"the process was sent {name}"))

    def _tell(self, notice: Notice, left: float) -> None:
        log.warning("preempted: %s; %.1f s are left", notice.what, left)
        if self._on_notice is not None:
            self._on_notice(notice)


def chosen_preemption(given: bool | Preemption) -> Preemption:
    """Return what the option `preemption` says.

    Raises
    ------
    OptionError
        If it is neither True, False nor a `Preemption`.
    """
    if isinstance(given, Preemption):
        return given
    if not isinstance(given, bool):
        raise OptionError(f"preemption must be True, False or an incckpt.Preemption, not {shown(given)}")
    return Preemption() if given else Preemption(signals=())
