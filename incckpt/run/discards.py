"""What the saves of an attempt leave behind, until it is deleted or condemned."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from incckpt.backends.base import Backend
from incckpt.errors import BackendError

__all__ = ["Discards"]

log = logging.getLogger(__name__)


class Discards:
    """Keys that an attempt has to get rid of.

    Two kinds: keys that nothing refers to any more, such as the pins of saves that are over, which may be deleted at
    any time; and objects put by saves that came to nothing. A later save may be using these, here or elsewhere, so they
    have to be condemned before they are deleted.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._spent: list[str] = []
        self._wasted: set[str] = set()

    def spend(self, keys: Iterable[str]) -> None:
        """Add keys that nothing refers to any more."""
        self._spent.extend(keys)

    def delete_spent(self) -> None:
        """Delete what is spent; if that fails, the next call tries again."""
        if self._spent:
            try:
                self._backend.delete(self._spent)
            except BackendError as error:
                log.warning("could not remove %s, trying again after the next save: %s", ", ".join(self._spent), error)
            else:
                self._spent.clear()

    @property
    def wasted(self) -> frozenset[str]:
        """Objects of saves that came to nothing, not condemned yet."""
        return frozenset(self._wasted)

    def waste(self, keys: Iterable[str]) -> None:
        """Add objects of a save that came to nothing."""
        self._wasted.update(keys)

    def note_condemned(self) -> None:
        """Take note that what is wasted stands on a condemned list."""
        self._wasted.clear()
