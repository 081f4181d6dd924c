"""The contract of a backend: bytes by key, below one root URL.

Everything above this layer relies on what the docstrings here promise and on nothing else; the conformance suite in
:mod:`incckpt.testing` checks each promise.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

from incckpt.errors import OptionError

__all__ = ["Backend", "Entry", "Leftover", "ReadableBuffer", "validate_key", "validate_prefix"]

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview

_SEGMENT = re.compile(r"[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]*")
_MAX_KEY = 900  # S3 allows 1,024 bytes, of which the root's own prefix takes a part


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as a listing or :meth:`Backend.head` shows it.

    Attributes
    ----------
    key
        Relative to the backend's root.
    size
        Bytes.
    modified
        Seconds since the epoch by the *server's* clock, or ``None`` where the server does not tell.
    """

    key: str
    size: int
    modified: float | None


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something a killed process left that no listing of keys shows: a temporary file, an open multipart upload."""

    name: str
    modified: float | None


def validate_key(key: str) -> str:
    """Return `key` if it is safe to join to any root: relative, ASCII, no empty, hidden or ``..`` segment.

    Raises
    ------
    OptionError
        Naming the key.
    """
    if len(key) <= _MAX_KEY and all(_SEGMENT.fullmatch(part) for part in key.split("/")):
        return key
    raise OptionError(f"not a valid key: {key!r} (relative, ASCII, no empty, hidden or '..' segment, <= {_MAX_KEY} chars)")


def validate_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or the beginning of a valid key (a trailing ``/`` included)."""
    if prefix:
        validate_key(prefix[:-1] if prefix.endswith("/") else prefix)
    return prefix


class Backend(ABC):
    """Bytes by key below one root.

    All methods are synchronous and may be called from any thread, many at once, and from a process forked from the one
    that made the backend. A request that fails raises a :class:`~incckpt.errors.BackendError` naming the key, whose
    ``transient`` says whether repeating may help; nothing else escapes but programming errors.

    Consistency: a successful `put`, `create` or `delete` is seen by every later `get`, `head` and `list`, from anywhere.

    Attributes
    ----------
    url
        The root, without credentials; for messages.
    exclusive
        Whether `create` has exactly one winner among any number of processes. Where it is ``False`` the store may be
        written by one process only.
    writable
        Whether anything can be put.
    remote
        Whether a request crosses a network (so that many should be in flight at once).
    """

    url: str
    exclusive: bool = True
    writable: bool = True
    remote: bool = True

    @abstractmethod
    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes ``[start, end)`` of the value, clipped at its end; all of it by default.

        ``0 <= start``; ``end`` is at least ``start``. A value is seen either whole or not at all: never a part of a put that is
        under way. A transfer that ends early is an error (transient), never a short result.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        """

    @abstractmethod
    def put(self, key: str, data: ReadableBuffer) -> None:
        """Store `data` at `key`, replacing what was there; durable when it returns.

        Readers see the old value or the new one. If it raises, either may be there, or (for a new key) nothing.
        """

    @abstractmethod
    def create(self, key: str, data: ReadableBuffer) -> None:
        """Store `data` at `key` if the key does not exist, in one atomic request; durable when it returns.

        Of any number of concurrent calls exactly one succeeds. After an error other than `KeyExistsError` the outcome is
        unknown: read back. A repeat of an own request whose reply was lost raises `KeyExistsError` too.

        Raises
        ------
        KeyExistsError
            If the key exists; its value is untouched.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete the keys; a missing key is no error. If it raises, any subset may be gone; repeating is safe."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every key that begins with `prefix` (a plain string prefix), in no particular order, each once.

        Complete for keys that exist throughout the call, however many; never from a cache. Temporary files and
        unfinished uploads are not keys. A prefix that matches nothing yields nothing.
        """

    @abstractmethod
    def head(self, key: str) -> Entry:
        """Return size and time of `key`.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        """

    def leftovers(self) -> Iterator[Leftover]:
        """Yield what killed processes left behind that is not a key (of this root only). None by default."""
        return iter(())

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove one of `leftovers`; no error if it is gone."""
        raise OptionError(f"{self.url} has no leftovers to remove: {leftover.name!r}")

    def close(self) -> None:
        """Let go of connections and threads. The backend is not used afterwards; closing twice is no error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"
