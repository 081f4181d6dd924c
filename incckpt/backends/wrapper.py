"""A backend around another, which passes on whatever a subclass does not override."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from incckpt.backends.base import Backend, Entry, Leftover, ReadableBuffer

__all__ = ["WrapperBackend"]


class WrapperBackend(Backend):
    """Passes every operation on to `inner`; its attributes are the inner one's.

    Attributes
    ----------
    inner
        The wrapped backend.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.url = inner.url
        self.writable = inner.writable
        self.remote = inner.remote

    @property
    def place(self) -> str:
        return self.inner.place

    @property
    def exclusive(self) -> bool:
        """Whether the inner backend's `create` is exclusive."""
        return self.inner.exclusive

    @exclusive.setter
    def exclusive(self, value: bool) -> None:
        self.inner.exclusive = value

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self.inner.get(key, start, end)

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        return self.inner.get_into(key, parts)

    def put(self, key: str, data: ReadableBuffer) -> None:
        self.inner.put(key, data)

    def create(self, key: str, data: ReadableBuffer) -> None:
        self.inner.create(key, data)

    def probe_exclusive(self) -> bool:
        if self.remote:
            return super().probe_exclusive()  # by requests, so that they too go through the wrapper
        return self.inner.probe_exclusive()

    def delete(self, keys: Iterable[str]) -> None:
        self.inner.delete(keys)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self.inner.list(prefix)

    def head(self, key: str) -> Entry:
        return self.inner.head(key)

    def reserve(self) -> None:
        self.inner.reserve()

    def freeing(self) -> AbstractContextManager[None]:
        return self.inner.freeing()

    def room(self) -> int | None:
        return self.inner.room()

    def leftovers(self) -> Iterator[Leftover]:
        return self.inner.leftovers()

    def remove_leftover(self, leftover: Leftover) -> None:
        self.inner.remove_leftover(leftover)

    def close(self) -> None:
        self.inner.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"
