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
    "keys_in",
    "redact",
    "validate_key",
    "validate_prefix",
]

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview

REMOTE_REQUESTS: Final = 32
"""Requests to keep in flight to a remote store; as many connections are kept for each."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The `errno` of a `BackendError` if no space is left."""

_SEGMENT = re.compile(r"[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]{0,254}")  # 255 bytes is the longest name of most file systems
_MAX_KEY = 900  # S3 allows 1,024 bytes, the root's own prefix included


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
        Seconds since the epoch by the *server's* clock, or ``None`` if the server does not say.
    """

    key: str
    size: int
    modified: float | None


@dataclass(frozen=True, slots=True)
class Leftover:
    """What no listing of keys shows: a temporary file, an open multipart upload, an empty folder.

    One younger than an hour, by the server's clock, may belong to a put in progress.
    """

    name: str
    modified: float | None


def is_key(key: str) -> bool:
    """Whether `key` is a valid key; listings skip other names (a hidden file, a console's folder marker)."""
    return len(key) <= _MAX_KEY and all(_SEGMENT.fullmatch(part) for part in key.split("/"))


def keys_in(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the valid keys among the names in a folder, which ends with ``/`` or is empty."""
    if not folder or is_key(folder[:-1]):
        longest = _MAX_KEY - len(folder)
        for name in names:
            if _SEGMENT.fullmatch(name) and len(name) <= longest:
                yield folder + name


def validate_key(key: str) -> str:
    """Return `key` if it is safe to join to any root: relative, ASCII, no empty, hidden, ``..`` or overlong segment.

    Raises
    ------
    OptionError
        If it is not; names the key.
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


_FRAGMENT = re.compile(r"#[A-Za-z0-9._=+-]*(@(latest|best|[0-9-]{1,12}|[0-9a-f-]{36})?)?$")  # our own: a run and step
_NO_PORT = re.compile(r"^[^\[].*:[0-9]*[^0-9]")


def redact(url: str) -> str:
    """Return `url` without what may be secret: user and password, query and fragment."""
    head, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = _FRAGMENT.sub("", rest)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    within, beyond = "@" in authority, "@" in rest[len(authority) :]
    if beyond and ":" in authority:  # a password with a '/', '?' or '#' in it
        rest = "…" if within else rest.rpartition("@")[2]
    elif within:
        rest = authority.rpartition("@")[2] + rest[len(authority) :]
    elif _NO_PORT.search(authority):  # a password cut at its '#'
        rest = "…"
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{head}://{rest}".rstrip("/")


class PagedListing(Iterator[Entry]):
    """A listing that survives errors: if fetching a page fails, the next ``next()`` fetches that page again.

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
                if is_key(entry.key):  # a console's folder marker is none
                    return entry
            if not self._more:
                raise StopIteration
            found, self._token = self._fetch(self._token)
            self._page = iter(found)
            self._more = self._token is not None


class Backend(ABC):
    """Bytes by key below one root.

    All methods are synchronous. Any thread may call them, many at once, and so may a fork of the process that made the
    backend. A failed request raises a :class:`~incckpt.errors.BackendError` that names the key, and whose ``transient``
    says whether a retry may help. Only programming errors raise anything else.

    Consistency: a successful `put`, `create` or `delete` is seen by every later `get`, `head` and `list`, from
    anywhere.

    Durability: when `head` or `list` reports that a key exists, or that it does not, this is durable, even if the call
    that caused it, in whatever process, has not returned yet. A save relies on objects that it finds as on those that
    it put. `get` makes no such promise.

    Keys are checked by every method (:func:`validate_key`; `OptionError`). No key may also be the folder of another
    (``a`` beside ``a/b``): object stores would take both, file systems cannot.

    Attributes
    ----------
    url
        The root, without credentials; for messages.
    exclusive
        Whether `create` has exactly one winner among any number of processes, as far as is known: a server may accept
        a condition and ignore it, which `probe_exclusive` detects. If ``False``, only one process may write to the
        store.
    writable
        Whether anything can be put.
    remote
        Whether a request crosses a network, so that many should be in flight at once.
    """

    url: str
    exclusive: bool = True
    writable: bool = True
    remote: bool = True

    @property
    def place(self) -> str:
        """The root, in one form for all its spellings, as far as known without a request. May hold credentials."""
        return self.url

    @abstractmethod
    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes ``[start, end)`` of the value, clipped at its end; all of it by default.

        ``0 <= start``; ``end`` is at least ``start``. Readers see a whole value or none, never part of a put in
        progress. A transfer that ends early is a transient error, never a short result.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        """

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        """Read the value into `parts`, in order, without a second copy of it in memory if possible.

        If it raises, or if the value is not exactly as long as all `parts`, their content is undefined.

        Parameters
        ----------
        parts
            Writable, contiguous, ``uint8`` each.

        Returns
        -------
        int
            The value's length in bytes; if it exceeds that of `parts`, any number that does.

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
        """Put several values, together if that is cheaper; if it raises, any of them may be stored."""
        for key, data in values:
            self.put(key, data)

    @abstractmethod
    def create(self, key: str, data: ReadableBuffer) -> None:
        """Store `data` at `key` if the key does not exist, in one atomic request; durable when it returns.

        Of any number of concurrent calls exactly one succeeds. After an error the outcome is unknown: read back. This
        includes `KeyExistsError`: it may come from a repeat of the caller's own request, whose reply was lost. aiohttp
        and many proxies repeat a PUT on their own when a connection breaks.

        Raises
        ------
        KeyExistsError
            If the key exists; its value is untouched.
        UnsupportedOperationError
            If the store cannot do this exclusively and `exclusive` is still true. Once `probe_exclusive` has set it
            to false, `create` looks first and then puts, which does not protect against a second writer.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete the keys; a missing key is no error. Durable when it returns.

        If it raises, any subset may be gone; repeating is safe.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every key that begins with `prefix` (a plain string prefix), in no particular order, each once.

        Complete for keys that exist throughout the call, however many; never from a cache. Skips temporary files,
        unfinished uploads and all other names that are not valid keys. A prefix that matches nothing yields nothing.
        """

    @abstractmethod
    def head(self, key: str) -> Entry:
        """Return the size and modification time of `key`.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        """

    def probe_exclusive(self) -> bool:
        """Test whether `create` really is exclusive, by creating a random key below ``probe/`` twice.

        Writers call this once per store. It costs two puts and a delete, or nothing if `exclusive` is already false or
        the backend knows the answer.

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
                logger.warning("%s: could not delete the key %s of a probe: %s", self.url, key, exc)
        return self.exclusive

    def reserve(self) -> None:  # noqa: B027 - most stores are never full
        """Set space aside for `freeing`, once per store, if a full store may be unable to delete."""

    def freeing(self) -> AbstractContextManager[None]:
        """In this context, writes of this thread that find no space left use what `reserve` set aside.

        To be safe for other processes, a deletion first writes condemned lists and tombstones.
        """
        return nullcontext()

    def room(self) -> int | None:
        """Return how many more bytes can be put, as far as is known; ``None`` if nothing is, as of most servers."""
        return None

    def leftovers(self) -> Iterator[Leftover]:
        """Yield what interrupted processes left below this root besides keys; by default nothing."""
        return iter(())

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove one of `leftovers`; no error if it is gone, or in use again."""
        raise OptionError(f"{self.url} has no leftovers to remove: {leftover.name!r}")

    def close(self) -> None:  # noqa: B027 - most backends have nothing to let go of
        """Release connections and threads. Do not use the backend afterwards; closing twice is no error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"
