"""Credentials stay out of errors and logs: whatever a library raises is shown without them."""

from __future__ import annotations

import base64
import errno
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from incckpt.backends.base import Backend, Entry, Leftover, PagedListing, ReadableBuffer
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError

__all__ = ["HidingBackend", "Secrets"]

T = TypeVar("T")

_HIDDEN = "…"
_CONTAINER_FIRST = ("abfs", "abfss", "az")  # container@account
_SHORTEST = 3  # what is shorter would be found in any text
_PLACES = frozenset(
    {"account_host", "account_name", "consistency", "endpoint_url", "profile", "project", "region", "region_name"}
)  # storage options that say where to go: of these only what a URL hides is secret


class Secrets:
    """What must not be shown: of a URL the user, the password and the query; of storage options every text.

    Parameters
    ----------
    url
        As given.
    options
        The file system's.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        found = {form for text in (*_of_url(url), *_of_options(options)) for form in _forms(text)}
        self._texts = sorted((text for text in found if len(text) >= _SHORTEST), key=len, reverse=True)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def hide(self, text: str) -> str:
        """Return `text` without them."""
        for secret in self._texts:
            text = text.replace(secret, _HIDDEN)
        return text

    def shows(self, error: BaseException) -> bool:
        """Whether an error, or one that it came from, shows one of them."""
        text = "".join(traceback.format_exception(error))
        chained: list[BaseException] = [error]
        seen: set[int] = set()
        while chained:
            one = chained.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            text += f"{one!r} {one.args!r} {getattr(one, 'filename', '')!r}"
            chained += [other for other in (one.__cause__, one.__context__) if other is not None]
        return self.hide(text) != text

    def without(self, error: Exception) -> Exception:
        """Return an error that says the same without them, and is not chained to any that shows them."""
        if not self.shows(error):
            return error
        try:
            clean = type(error)(*(self.hide(part) if isinstance(part, str) else part for part in error.args))
        except Exception:  # noqa: BLE001 -- a library's error, made in a way of its own
            clean = error
        if clean is error or self.shows(clean):
            clean = BackendError(errno.EIO, self.hide(f"{type(error).__name__}: {error}"))
        if isinstance(error, BackendError) and isinstance(clean, BackendError):
            clean.transient = error.transient
        cause = error.__cause__ or error.__context__
        if cause is not None:
            clean.__cause__ = Exception(self.hide(f"{type(cause).__name__}: {cause}"))
        return clean


class HidingBackend(WrapperBackend):
    """Raises what `inner` raises, without the secrets that it was opened with.

    Parameters
    ----------
    inner
        The backend around which this one is.
    secrets
        Which.
    """

    def __init__(self, inner: Backend, secrets: Secrets) -> None:
        super().__init__(inner)
        self._secrets = secrets

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._hiding(lambda: self.inner.get(key, start, end))

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        return self._hiding(lambda: self.inner.get_into(key, parts))

    def put(self, key: str, data: ReadableBuffer) -> None:
        self._hiding(lambda: self.inner.put(key, data))

    def put_many(self, values: Sequence[tuple[str, ReadableBuffer]]) -> None:
        self._hiding(lambda: self.inner.put_many(values))

    def create(self, key: str, data: ReadableBuffer) -> None:
        self._hiding(lambda: self.inner.create(key, data))

    def delete(self, keys: Iterable[str]) -> None:
        self._hiding(lambda: self.inner.delete(keys))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        listing = self._hiding(lambda: self.inner.list(prefix))
        return _HidingPages(listing, self._hiding) if isinstance(listing, PagedListing) else self._each(listing)

    def head(self, key: str) -> Entry:
        return self._hiding(lambda: self.inner.head(key))

    def probe_exclusive(self) -> bool:
        return self._hiding(self.inner.probe_exclusive)

    def leftovers(self) -> Iterator[Leftover]:
        return self._each(self._hiding(self.inner.leftovers))

    def remove_leftover(self, leftover: Leftover) -> None:
        self._hiding(lambda: self.inner.remove_leftover(leftover))

    def close(self) -> None:
        self._hiding(self.inner.close)

    def _each(self, items: Iterator[T]) -> Iterator[T]:
        nothing = object()
        while (item := self._hiding(lambda: next(items, nothing))) is not nothing:
            yield item  # type: ignore[misc]

    def _hiding(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except Exception as error:
            clean = self._secrets.without(error)
            if clean is error:
                raise
        raise clean from clean.__cause__  # out of the handler, where it would be chained to what it hides


class _HidingPages(PagedListing):
    """A listing that can go on after an error, as `inner` can."""

    def __init__(self, inner: PagedListing, hiding: Callable[[Callable[[], Any]], Any]) -> None:
        self._inner = inner
        self._hiding = hiding

    def __next__(self) -> Entry:
        entry: Entry | None = self._hiding(lambda: next(self._inner, None))
        if entry is None:
            raise StopIteration
        return entry


def _of_url(url: str) -> Iterator[str]:
    scheme, mark, rest = url.partition("://")
    if not mark:
        return
    before, at, after = rest.rpartition("@")  # a password may hold any of '/', '?', '#' and '@'
    if at and scheme.lower() not in _CONTAINER_FIRST and ("/" not in before or ":" in before.partition("/")[0]):
        yield before
        yield from before.split(":", 1)
        rest = after
    query = rest.partition("?")[2].partition("#")[0]
    yield query
    for field in query.split("&"):
        yield field.partition("=")[2]


def _of_options(options: object, name: str = "") -> Iterator[str]:
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from _of_options(value, str(key))
    elif isinstance(options, list | tuple | set | frozenset):
        for value in options:
            yield from _of_options(value, name)
    elif isinstance(options, bytes):
        yield options.decode("latin-1")
    elif isinstance(options, str):
        yield from _of_url(options) if name in _PLACES else (options,)


def _forms(text: str) -> Iterator[str]:
    """Yield what a library may make of a secret before it shows it."""
    for form in (text, unquote(text), unquote_plus(text)):
        yield form
        yield quote(form, safe="")
        yield quote(form)
        yield quote_plus(form)
        yield repr(form)[1:-1]
        yield base64.b64encode(form.encode("utf-8", "surrogatepass")).decode().rstrip("=")
