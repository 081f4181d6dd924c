"""Doing something in one process of a job, or in all of them, so that all go on or all raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from incckpt.errors import CorruptionError, IncckptError

__all__ = ["Ranks"]

_T = TypeVar("_T")


class Ranks:
    """The processes of a job. Every method is called by all of them.

    Parameters
    ----------
    rank, count
        The number of this process, and of processes; alone, nothing is exchanged.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank = rank
        self._count = count if dist.is_available() and dist.is_initialized() else 1

    def gather(self, value: _T) -> list[_T]:
        """Return the `value` of every process, by rank."""
        if self._count == 1:
            return [value]
        values: list[Any] = [None] * self._count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait for all others."""
        self.gather(None)

    def on_first(self, act: Callable[[], _T]) -> _T:
        """Return what `act` returns in the first process; raise everywhere what it raises there."""
        value: Any = None
        failure: Exception | None = None
        if self._rank == 0:
            try:
                value = act()
            except (IncckptError, OSError) as error:
                failure = error
        result, sent = self.gather((value, _sendable(failure)))[0]
        if sent is not None:
            raise failure or sent
        chosen: _T = result
        return chosen

    def on_every(self, act: Callable[[], None]) -> None:
        """Do something in every process; if it fails in one, raise in all of them."""
        failure: Exception | None = None
        try:
            act()
        except (IncckptError, OSError) as error:
            failure = error
        sent = [one for one in self.gather(_sendable(failure)) if one is not None]
        if sent:
            raise failure or sent[0]


def _sendable(failure: Exception | None) -> Exception | None:
    """Return an error that every process can unpickle, with its message."""
    if failure is None:
        return None
    return (CorruptionError if isinstance(failure, CorruptionError) else IncckptError)(str(failure))
