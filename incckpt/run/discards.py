"""What the saves of an attempt leave behind until it is deleted or condemned."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from incckpt.backends.base import Backend
from incckpt.errors import BackendError

__all__ = ["Discards"]

log = logging.getLogger(__name__)


class Discards:
    """Keys that an attempt must delete.

    *Spent* keys, such as the pins of finished saves, are not referred to any more and may be deleted at any time.
    *Wasted* ones are objects of failed saves. Later saves, here or elsewhere, may use these, so they must be condemned
    before they are deleted.
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
        """Objects of failed saves that are not condemned yet."""
        return frozenset(self._wasted)

    def waste(self, keys: Iterable[str]) -> None:
        """Add objects of a failed save."""
        self._wasted.update(keys)

    def note_condemned(self) -> None:
        """Note that all wasted objects are on a condemned list."""
        self._wasted.clear()
