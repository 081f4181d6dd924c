"""Objects of one store that are read from another one where that has the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from incckpt.backends.base import Backend
from incckpt.errors import BackendError, CorruptionError, MissingObjectError
from incckpt.store.objects import ObjectKey, Objects

__all__ = ["MixedObjects"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class MixedObjects(Objects):
    """The objects of a store, with those of another tier to read in their place: a copy has the same bytes.

    Only `get` and `get_into` ask the other tier: what a save relies on has to be in its own store.

    Parameters
    ----------
    backend
        Of the store.
    other
        The other tier's objects.
    nearer
        Whether the other tier is the nearer one, which is asked first. Otherwise it is asked for what is missing or
        damaged here.
    """

    def __init__(self, backend: Backend, other: Objects, *, nearer: bool) -> None:
        super().__init__(backend)
        self._own = Objects(backend)
        self._other = other
        self._nearer = nearer
        self._doubted: set[ObjectKey] = set()

    def get(self, key: ObjectKey, size: int | None = None) -> bytes:
        """Return the object's bytes, see `Objects.get`."""
        return self._from_either(key, size, lambda objects, name: objects.get(name, size))

    def get_into(self, key: ObjectKey, parts: list[memoryview]) -> None:  # type: ignore[override]
        """Read the object's bytes into `parts`, see `Objects.get_into`."""
        self._from_either(key, sum(map(len, parts)), lambda objects, name: objects.get_into(name, parts))

    def doubt(self, key: ObjectKey) -> None:
        """Ask the tier that was not asked first for this object from now on."""
        self._doubted.add(key)

    def _from_either(self, key: ObjectKey, size: int | None, get: Callable[[Objects, ObjectKey], _T]) -> _T:
        if self._nearer == (key in self._doubted):
            try:
                return get(self._own, key)
            except MissingObjectError:
                for twin in self._twins(key, size):
                    return get(self._other, twin)
                raise
        for twin in self._twins(key, size):
            try:
                return get(self._other, twin)
            except (BackendError, CorruptionError) as error:
                log.warning("%s; reading it from %s", error, self.backend.url)
        return get(self._own, key)

    def _twins(self, key: ObjectKey, size: int | None) -> Iterator[ObjectKey]:
        """Yield the other tier's object of the same bytes, if there is one."""
        if size is None:
            return
        try:
            found = (
                self._other.find(key.identity) if key.base is None else self._other.find_deltas(key.identity, key.base)
            )
            for twin, nbytes in found:
                if nbytes == size:
                    yield twin
                    return
        except BackendError as error:
            log.debug("looking for %s in the other tier: %s", key, error)
