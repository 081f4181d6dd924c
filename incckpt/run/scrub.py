"""Looking, a few at a time, whether the objects are still there that saves rely on without looking."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from itertools import islice
from typing import Final

from incckpt.errors import BackendError
from incckpt.store.objects import ObjectKey, Objects

__all__ = ["LOOKS", "Scrubber"]

log = logging.getLogger(__name__)

LOOKS: Final = 8
_SLOW_SECONDS = 1.0


class Scrubber:
    """Goes round the objects of a run's latest checkpoint, a few of them each save.

    What the latest checkpoint needs is not looked up by a save, so an object that the store has lost would be relied on
    for ever. With n objects that saves keep relying on, each is looked at once in ``ceil(n / LOOKS)`` saves; those
    not looked at for longest, or put longest ago, come first.

    Parameters
    ----------
    objects
        Of the store.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._sizes: dict[str, int] = {}  # those not looked at for longest first
        self._lost: set[str] = set()
        self._trouble = False

    @property
    def lost(self) -> frozenset[str]:
        """Keys of objects that are gone, or have another size than when they were put."""
        return frozenset(self._lost)

    def rely_on(self, sizes: Mapping[str, int]) -> None:
        """Take note of what saves rely on from now on: object sizes in bytes, by key."""
        kept = {key: size for key, size in self._sizes.items() if key in sizes}
        self._sizes = kept | {key: size for key, size in sizes.items() if key not in kept}
        self._lost &= sizes.keys()

    def due(self) -> list[str]:
        """Return the keys to look at in this save: `LOOKS` of them, or one while looks are slow or fail."""
        count = 1 if self._trouble else LOOKS
        self._trouble = False
        return list(islice(self._sizes, count))

    def look(self, key: str) -> None:
        """Look at one object, once more if it is not as it was put; can be called from several threads."""
        started = time.monotonic()
        name = ObjectKey.parse(key)
        size = self._sizes[key]
        try:
            if self._objects.size(name) != size and self._objects.size(name) != size:
                self._lost.add(key)
        except BackendError as error:
            log.warning("could not look whether %s is still there; the save goes on without: %s", key, error)
            self._trouble = True
        else:
            self._trouble |= time.monotonic() - started >= _SLOW_SECONDS
            self._sizes[key] = self._sizes.pop(key)
