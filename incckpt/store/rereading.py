"""Looking again before believing in damage or absence: one wrong answer must not cost a sound checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

from incckpt.errors import CorruptionError, FormatError, KeyNotFoundError, MissingObjectError

__all__ = ["TRIES", "reread"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

TRIES: Final = 3
"""How often something is read before it counts as damaged."""

_ABSENT_TRIES = 2


def reread(read: Callable[[], _T]) -> _T:
    """Return what `read` returns; where it finds damage, or nothing, it is called again.

    Remote backends ask every cache on the way for the server's own answer, so that the second one is another.

    Parameters
    ----------
    read
        Makes its requests anew each time.

    Raises
    ------
    CorruptionError, FormatError
        What the last of three tries found.
    KeyNotFoundError, MissingObjectError
        If it is absent twice.
    """
    absent = damaged = 0
    while True:
        try:
            found = read()
        except (KeyNotFoundError, MissingObjectError) as error:
            absent += 1
            if absent == _ABSENT_TRIES:
                raise
            log.debug("%s; looking again", error)
        except (CorruptionError, FormatError) as error:
            damaged += 1
            if damaged == TRIES:
                raise
            log.warning("%s; reading again, in case only this answer was wrong", error)
        else:
            if damaged:
                log.warning(
                    "read at try %d: only an answer was wrong. Does a proxy or a cache stand between?", damaged + 1
                )
            return found
