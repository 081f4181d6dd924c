"""A read-only store behind a web server.

Checkpoints are found by listing, which HTTP does not offer. So the server must show its folders as HTML pages, as
``python -m http.server``, nginx (``autoindex on``), Apache (``Options +Indexes``) and Caddy (``browse``) do.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import aiohttp
from yarl import URL

from incckpt.backends.base import (
    Backend,
    Entry,
    PagedListing,
    ReadableBuffer,
    is_key,
    redact,
    validate_key,
    validate_prefix,
)
from incckpt.backends.remote import (
    Deadline,
    RemoteBackend,
    RequestFailed,
    byte_range,
    gather,
    open_http,
    take_options,
)
from incckpt.errors import BackendError, KeyNotFoundError, OptionError, UnsupportedOperationError

__all__ = ["HTTPBackend", "links_below", "open_url"]

logger = logging.getLogger(__name__)

_REDIRECTS = 5
_REDIRECTING = frozenset({301, 302, 303, 307, 308})
_TITLES = ("index of", "directory listing")
_CAUSES = {
    401: "the server wants credentials: https://user:password@host/…, or client_kwargs={'headers': {…}}",
    403: "the server refuses; for a folder, it may not show directory indexes",
}


def open_url(url: str, storage_options: Mapping[str, Any]) -> Backend:
    """Return the backend for an HTTP URL; its user, password and query go with every request.

    Parameters
    ----------
    storage_options
        ``client_kwargs``, for `aiohttp.ClientSession` as in fsspec (``headers``, ``auth``, ``trust_env`` …), and
        ``request_timeout``.

    Raises
    ------
    OptionError
        If the URL has no host, or an option is unknown.
    """
    options = dict(storage_options)
    limits = take_options(options, redact(url))
    client = options.pop("client_kwargs", {})
    if options:
        raise OptionError(f"{redact(url)}: unknown storage_options {sorted(options)}; known: client_kwargs")
    parts = urlsplit(url)
    if not parts.hostname or parts.fragment:
        raise OptionError(f"not an HTTP URL: {redact(url)}; write https://host/path")
    return HTTPBackend(url, client, **limits)


class _Session:
    """Connections to the server, and what every request carries."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._parts = urlsplit(url)
        self._options = dict(options)
        self._http: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the connection pool."""
        if self._http is None:
            self._http = open_http(**self._options)

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()

    @asynccontextmanager
    async def call(
        self, method: str, path: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Request `path` below the root and yield the answer; raise unless it succeeded."""
        assert self._http is not None
        target = f"{self._parts.path.rstrip('/')}/{quote(path)}"
        url = URL(urlunsplit((self._parts.scheme, self._parts.netloc, target, self._parts.query, "")), encoded=True)
        try:
            for _ in range(_REDIRECTS):
                async with self._http.request(method, url, headers=headers, allow_redirects=False) as reply:
                    if reply.status in _REDIRECTING and "Location" in reply.headers:
                        url = self._redirected(url, reply)
                        continue
                    if reply.status >= 400:
                        raise RequestFailed(reply.status, "", str(reply.reason))
                    yield reply
                    return
            raise RequestFailed(310, "", f"more than {_REDIRECTS} redirects")
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as exc:
            # Their messages show the whole URL, which may hold a password or a signature.
            raise RequestFailed(getattr(exc, "status", 0) or 400, type(exc).__name__, "") from None

    def _redirected(self, url: URL, reply: aiohttp.ClientResponse) -> URL:
        """Return where an answer leads: to the same server, or anywhere if nothing secret goes along."""
        target = url.join(URL(reply.headers["Location"], encoded=True))
        same = target.origin() == url.origin() or (target.scheme, target.host) == ("https", url.host)
        if target.scheme not in ("http", "https") or not (same or self._is_open):
            raise RequestFailed(
                reply.status,
                "",
                f"the server redirects to {target.scheme}://{target.host}, which is not sent the credentials and "
                "headers meant for this one; if the store is there, give that URL",
            )
        if same and url.user is not None and target.user is None:
            target = target.with_user(url.user).with_password(url.password)
        return target

    @property
    def _is_open(self) -> bool:
        """Whether requests carry nothing that only this server may know."""
        return not (self._parts.username or self._parts.query or self._options)


class HTTPBackend(RemoteBackend[_Session]):
    """Keys below an HTTP URL, read-only.

    Parameters
    ----------
    url
        The root, with any credentials it needs.
    client_options
        For `aiohttp.ClientSession`.
    timeout, min_rate
        As in :class:`~incckpt.backends.remote.RemoteBackend`.
    """

    exclusive = False
    writable = False

    def __init__(self, url: str, client_options: Mapping[str, Any] | None = None, **limits: float) -> None:
        super().__init__(redact(url), **limits)
        self._full_url = url
        self._options = dict(client_options or {})
        self._said_no_ranges = False

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        validate_key(key)
        wanted = byte_range(start, end)

        async def request(session: _Session, deadline: Deadline) -> bytes:
            try:
                async with session.call("GET", key, wanted) as reply:
                    self._refuse_folder_or_coding(key, reply)
                    longer = end is None or reply.content_length is None or reply.content_length > end
                    if wanted and reply.status != 206 and (start or longer):
                        self._say_no_ranges()
                    return await self._read(key, reply, deadline, start, end)
            except RequestFailed as failure:
                if wanted and failure.status == 416:  # the value ends before `start`
                    return b""
                raise

        return self._call("get", key, request)

    def head(self, key: str) -> Entry:
        validate_key(key)

        async def request(session: _Session, _: Deadline) -> Entry:
            return await self._entry(session, key)

        return self._call("head", key, request)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Backend.list`; costs a request for each folder and each key."""
        validate_prefix(prefix)
        return PagedListing(lambda token: self._page(prefix, token))

    def put(self, key: str, data: ReadableBuffer) -> None:
        validate_key(key)
        self._read_only()

    def create(self, key: str, data: ReadableBuffer) -> None:
        validate_key(key)
        self._read_only()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            validate_key(key)
        self._read_only()

    def _read_only(self) -> NoReturn:
        raise UnsupportedOperationError(errno.EROFS, f"{self.url}: a store behind a web server can only be read")

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _entry(self, session: _Session, key: str) -> Entry:
        async with session.call("HEAD", key) as reply:
            self._refuse_folder_or_coding(key, reply)
            size = reply.headers.get("Content-Length")
            if size is None:
                raise BackendError(errno.EIO, f"{self.url}: the server does not send the size of {key!r}")
            modified = reply.headers.get("Last-Modified")
            return Entry(key, int(size), parsedate_to_datetime(modified).timestamp() if modified else None)

    def _page(self, prefix: str, token: str | None) -> tuple[Sequence[Entry], str | None]:
        """Return the keys in one folder. The token lists the folders still to be read, one per line."""
        folders = token.split("\n") if token is not None else [f"/{prefix}".rpartition("/")[0] + "/"]
        folder = folders.pop().removeprefix("/")

        async def request(session: _Session, deadline: Deadline) -> Sequence[Entry]:
            keys = []
            for name, is_folder in await self._index(session, folder):
                path = f"{folder}{name}"
                if is_folder:
                    if f"{path}/".startswith(prefix):
                        folders.append(f"/{path}/")
                elif path.startswith(prefix):
                    keys.append(path)

            async def entry(key: str) -> Entry | None:
                try:
                    found = await self._entry(session, key)
                except (RequestFailed, KeyNotFoundError) as exc:
                    if isinstance(exc, RequestFailed) and exc.status != 404:
                        raise
                    found = None  # deleted meanwhile
                deadline.expect(0)
                return found

            return [found for found in await gather(entry, keys) if found is not None]

        entries = self._call("list", prefix, request)
        return entries, "\n".join(folders) or None

    async def _index(self, session: _Session, folder: str) -> Iterable[tuple[str, bool]]:
        """Return a folder's entries as (name, is a folder); none if there is no such folder."""
        try:
            async with session.call("GET", folder) as reply:
                text = await reply.text(errors="replace") if reply.content_type == "text/html" else ""
                found = links_below(str(reply.url), text)
        except RequestFailed as failure:
            if failure.status in (404, 410):
                return ()
            raise
        if found is None:
            raise UnsupportedOperationError(
                errno.ENOTSUP,
                f"{self.url}: the server shows no directory index for {folder or '/'!r}, and checkpoints are found by "
                "listing: have it show one (autoindex in nginx, Options +Indexes in Apache)",
            )
        return [(name, is_folder) for name, is_folder in found.items() if is_key(name)]

    def _refuse_folder_or_coding(self, key: str, reply: aiohttp.ClientResponse) -> None:
        if reply.url.path.endswith("/"):  # servers redirect to this if the path is a folder
            raise self._missing(key)
        coding = reply.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise BackendError(errno.EIO, f"{self.url}: the server sends {key!r} as {coding}; have it not compress")

    def _say_no_ranges(self) -> None:
        if not self._said_no_ranges:
            self._said_no_ranges = True
            logger.warning("%s: the server does not support byte ranges; each read costs the whole object", self.url)

    # -- connection and errors ----------------------------------------------------------------------------------------

    def _connect(self) -> _Session:
        return _Session(self._full_url, self._options)

    async def _open(self, client: _Session) -> None:
        try:
            await client.open()
        except TypeError as exc:
            raise OptionError(f"{self.url}: client_kwargs are not what aiohttp takes: {exc}") from exc

    async def _disconnect(self, client: _Session) -> None:
        await client.close()

    def _failure(self, exc: Exception) -> RequestFailed | None:
        return None

    def _is_transient(self, exc: Exception) -> bool:
        return isinstance(exc, aiohttp.ClientError | ConnectionError | EOFError) and not isinstance(
            exc, aiohttp.ClientSSLError
        )

    def _advice(self, failure: RequestFailed, verb: str) -> str:
        return _CAUSES.get(failure.status, "")


def links_below(url: str, page: str) -> dict[str, bool] | None:
    """Return the entries directly below `url` that its HTML page, a folder's index, links to.

    Returns
    -------
    dict or None
        Whether each name is a folder; ``None`` if the page does not look like an index.
    """
    parser = _Links()
    parser.feed(page)
    base = urlsplit(url)
    found = {}
    for link in parser.links:
        target = urlsplit(urljoin(url, link))
        below = target.path.removeprefix(base.path)
        if (target.scheme, target.hostname, target.port) != (base.scheme, base.hostname, base.port):
            continue
        name = unquote(below.rstrip("/"))
        if below != target.path and name and "/" not in name:
            found[name] = below.endswith("/")
    if not found and not any(title in parser.title.lower() for title in _TITLES):
        return None
    return found


class _Links(HTMLParser):
    """Collects the targets of a page's links, and its title and main headings."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []
        self.title = ""
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.extend(value for name, value in attrs if name == "href" and value)
        elif tag in ("title", "h1"):
            self._in_title = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("title", "h1"):
            self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += f" {data}"
