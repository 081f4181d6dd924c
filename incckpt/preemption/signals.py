"""Signals that announce the end of a process, noted without disturbing others that handle them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from incckpt.errors import OptionError

__all__ = ["SignalWatch"]

log = logging.getLogger(__name__)


class SignalWatch:
    """Calls `on_signal` when one of some signals arrives, and then the handler that was there before.

    A signal that would have ended the process no longer does: whoever watches it ends the process in time. Processes
    that are forked meanwhile (those of a `multiprocessing.Pool`, which ends them by a signal) are not watched.

    Parameters
    ----------
    signals
        Numbers.
    on_signal
        Is called with the number, in the handler: it sets something, and returns.
    """

    def __init__(self, signals: Iterable[int], on_signal: Callable[[int], object]) -> None:
        self._signals = tuple(signals)
        self._on_signal = on_signal
        self._before: dict[int, Any] = {}
        self._process = 0  # which is watched

    def start(self) -> None:
        """Install the handlers.

        Raises
        ------
        OptionError
            If this is not the main thread, the only one that may.
        """
        if not self._signals:
            return
        if threading.current_thread() is not threading.main_thread():
            raise OptionError(
                "preemption= handles signals, and only the main thread may install their handlers; make the manager "
                "there, or pass preemption=incckpt.Preemption(signals=())"
            )
        self._process = os.getpid()
        for number in self._signals:
            before = signal.getsignal(number)
            if before == self._handle:  # of the process that this one was forked from
                continue
            self._before[number] = before
            if before is None:
                log.warning("%s had a handler that Python cannot call; it is replaced", signal.Signals(number).name)
            signal.signal(number, self._handle)

    def stop(self) -> None:
        """Put the handlers back that were there before, where ours still are; in the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            return  # ours pass the signal on, and go on noting it
        while self._before:
            number, before = self._before.popitem()
            if signal.getsignal(number) == self._handle and before is not None:
                signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if self._process != os.getpid():
            signal.signal(number, signal.SIG_DFL if before is None else before)
            os.kill(os.getpid(), number)
            return
        self._on_signal(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
