"""The contract of a backend: bytes by key, below one root URL.

Everything above this layer relies on what the docstrings here promise and on nothing else; the conformance suite in
:mod:`incckpt.testing` checks each promise.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeAlias

from incckpt.errors import BackendError, KeyExistsError, OptionError, UnsupportedOperationError

logger = logging.getLogger(__name__)

__all__ = [
    "FULL",
    "REMOTE_REQUESTS",
    "Backend",
    "Entry",
    "Leftover",
    "PagedListing",
    "ReadableBuffer",
    "is_key",
    "redact",
    "validate_key",
    "validate_prefix",
]

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview

REMOTE_REQUESTS: Final = 32
"""Requests that should be in flight at once to a store behind a network; so many connections are kept for each."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""`errno` of a `BackendError` that says that there is no space left."""

_SEGMENT = re.compile(r"[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]{0,254}")  # 255 bytes is the longest name of most file systems
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
    """What no listing of keys shows: a temporary file, an open multipart upload, an empty folder.

    One younger than an hour may belong to a put that is under way: only `modified`, by the server's clock, tells.
    """

    name: str
    modified: float | None


def is_key(key: str) -> bool:
    """Whether `key` may be used as one; listings pass over what is not (a hidden file, a console's folder marker)."""
    return len(key) <= _MAX_KEY and all(_SEGMENT.fullmatch(part) for part in key.split("/"))


def validate_key(key: str) -> str:
    """Return `key` if it is safe to join to any root: relative, ASCII, no empty, hidden, ``..`` or overlong segment.

    Raises
    ------
    OptionError
        Naming the key.
    """
    if is_key(key):
        return key
    raise OptionError(
        f"not a valid key: {key!r} (relative, ASCII, no empty, hidden or '..' segment, "
        f"segments of at most 255 characters, {_MAX_KEY} in all)"
    )


def validate_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or the beginning of a valid key (a trailing ``/`` included)."""
    if prefix:
        validate_key(prefix[:-1] if prefix.endswith("/") else prefix)
    return prefix


_FRAGMENT = re.compile(r"#[A-Za-z0-9._=+-]*(@[A-Za-z0-9]*)?$")  # ours, of a run and step
_NO_PORT = re.compile(r"^[^\[].*:[0-9]*[^0-9]")


def redact(url: str) -> str:
    """Return `url` without what may be secret: the user and password before the host, the query, the fragment."""
    head, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = _FRAGMENT.sub("", rest)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        rest = authority.rpartition("@")[2] + rest[len(authority) :]
    elif ":" in authority and "@" in rest:
        rest = rest.rpartition("@")[2]  # a password with a '/', '?' or '#' in it
    elif _NO_PORT.search(authority):
        rest = "…" + rest[len(authority) :]  # a password cut at its '#'
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{head}://{rest}".rstrip("/")


class PagedListing(Iterator[Entry]):
    """A listing that can go on after an error: when a page fails, the next ``next()`` asks for that page again.

    Parameters
    ----------
    fetch
        Called with the token of a page (``None``: the first); returns its entries and the next page's token.
    """

    def __init__(self, fetch: Callable[[str | None], tuple[Sequence[Entry], str | None]]) -> None:
        self._fetch = fetch
        self._page: Iterator[Entry] = iter(())
        self._token: str | None = None
        self._more = True

    def __next__(self) -> Entry:
        while True:
            for entry in self._page:
                if is_key(entry.key):  # a console's folder marker, say, is not one of ours
                    return entry
            if not self._more:
                raise StopIteration
            found, self._token = self._fetch(self._token)
            self._page = iter(found)
            self._more = self._token is not None


class Backend(ABC):
    """Bytes by key below one root.

    All methods are synchronous and may be called from any thread, many at once, and from a process forked from the one
    that made the backend. A request that fails raises a :class:`~incckpt.errors.BackendError` naming the key, whose
    ``transient`` says whether repeating may help; nothing else escapes but programming errors.

    Consistency: a successful `put`, `create` or `delete` is seen by every later `get`, `head` and `list`, from
    anywhere.

    Durability: what `head` and `list` report, that a key is there and also that it is not, is durable when they report
    it, even if the call that made it so has not returned yet, in whatever process: a save relies on an object that it
    finds as on one that it has put. `get` promises nothing of the kind.

    Keys are checked by every method (:func:`validate_key`; `OptionError`). No key may also be the folder of another
    (``a`` beside ``a/b``): object stores would take both, file systems cannot.

    Attributes
    ----------
    url
        The root, without credentials; for messages.
    exclusive
        Whether `create` has exactly one winner among any number of processes, as far as is known: a server may take
        a condition and ignore it, which `probe_exclusive` finds out. Where it is ``False`` the store may be written
        by one process only.
    writable
        Whether anything can be put.
    remote
        Whether a request crosses a network (so that many should be in flight at once).
    """

    url: str
    exclusive: bool = True
    writable: bool = True
    remote: bool = True

    @property
    def place(self) -> str:
        """The same for every spelling of one root, as far as can be told without a request. May hold credentials."""
        return self.url

    @abstractmethod
    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes ``[start, end)`` of the value, clipped at its end; all of it by default.

        ``0 <= start``; ``end`` is at least ``start``. A value is seen either whole or not at all: never a part of a
        put that is under way. A transfer that ends early is an error (transient), never a short result.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        """

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        """Fill `parts` with the value, one after the other, without memory of the value's size besides if possible.

        What they hold is undefined if it raises, or if the value is not as long as they are together.

        Parameters
        ----------
        parts
            Writable, contiguous, ``uint8`` each.

        Returns
        -------
        int
            Bytes of the value; or, if it is longer than `parts`, any number beyond theirs.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        """
        data = memoryview(self.get(key, 0, sum(map(len, parts)) + 1))
        at = 0
        for part in parts:
            piece = data[at : at + len(part)]
            part[: len(piece)] = piece
            at += len(part)
        return len(data)

    @abstractmethod
    def put(self, key: str, data: ReadableBuffer) -> None:
        """Store `data` at `key`, replacing what was there; durable when it returns.

        Readers see the old value or the new one. If it raises, either may be there, or (for a new key) nothing.
        """

    def put_many(self, values: Sequence[tuple[str, ReadableBuffer]]) -> None:
        """Store values at their keys, as `put` does, together if that is cheaper; if it raises, any may be there."""
        for key, data in values:
            self.put(key, data)

    @abstractmethod
    def create(self, key: str, data: ReadableBuffer) -> None:
        """Store `data` at `key` if the key does not exist, in one atomic request; durable when it returns.

        Of any number of concurrent calls exactly one succeeds. After an error the outcome is unknown: read back. That
        goes for `KeyExistsError` too, which a repeat of an own request raises whose reply was lost; and aiohttp, as
        well as many a proxy, repeats a PUT by itself when a connection breaks.

        Raises
        ------
        KeyExistsError
            If the key exists; its value is untouched.
        UnsupportedOperationError
            If the store cannot do this exclusively and `exclusive` is still true. Once `probe_exclusive` has set it
            to false, `create` looks first and then puts, which is no protection against a second writer.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete the keys; a missing key is no error. Durable when it returns.

        If it raises, any subset may be gone; repeating is safe.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every key that begins with `prefix` (a plain string prefix), in no particular order, each once.

        Complete for keys that exist throughout the call, however many; never from a cache. Temporary files, unfinished
        uploads and whatever else has a name that is no valid key are passed over. A prefix that matches nothing yields
        nothing.
        """

    @abstractmethod
    def head(self, key: str) -> Entry:
        """Return size and time of `key`.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        """

    def probe_exclusive(self) -> bool:
        """Find out whether `create` really is exclusive, by creating one random key below ``probe/`` twice.

        To be called once per store by whoever is going to write to it. Costs two puts and a delete; nothing where
        `exclusive` is false already, or the backend knows.

        Returns
        -------
        bool
            The new value of `exclusive`.
        """
        if not self.exclusive:
            return False
        key = f"probe/{secrets.token_hex(16)}"
        try:
            self.create(key, b"first")
            self.create(key, b"second")
        except KeyExistsError:
            pass
        except UnsupportedOperationError:
            self.exclusive = False
        else:
            self.exclusive = False
        finally:
            try:
                self.delete([key])
            except BackendError as exc:
                logger.warning("%s: the key %s of a probe stays behind: %s", self.url, key, exc)
        return self.exclusive

    def reserve(self) -> None:  # noqa: B027 - most stores are never full
        """Set space aside for `freeing`, once per store, where a store that is full may refuse to be freed."""

    def freeing(self) -> AbstractContextManager[None]:
        """While this lasts, writes of this thread that find no space left use what `reserve` has set aside.

        Deleting takes small writes first, condemned lists and tombstones, or other processes would not be safe.
        """
        return nullcontext()

    def leftovers(self) -> Iterator[Leftover]:
        """Yield what processes left behind that is not a key (of this root only). None by default."""
        return iter(())

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove one of `leftovers`; no error if it is gone, or in use again."""
        raise OptionError(f"{self.url} has no leftovers to remove: {leftover.name!r}")

    def close(self) -> None:  # noqa: B027 - most backends have nothing to let go of
        """Let go of connections and threads. The backend is not used afterwards; closing twice is no error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"
