"""A store in a Google Cloud Storage bucket.

gcsfs finds the credentials, the endpoint and the project. Requests use the JSON API directly, one per operation, so
that every status is known and nothing is retried unseen.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import google.auth.exceptions
import requests
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError
from yarl import URL

from incckpt.backends.base import Backend, Entry, PagedListing, ReadableBuffer, redact, validate_key, validate_prefix
from incckpt.backends.remote import (
    NO_SUCH_ROOT,
    CredentialsExpired,
    Deadline,
    RemoteBackend,
    RequestFailed,
    WrongAnswer,
    byte_range,
    gather,
    is_page,
    open_http,
    pieces,
    take_options,
)
from incckpt.errors import OptionError

__all__ = ["GCSBackend", "open_url"]

_URL = re.compile(r"(?:gs|gcs)://(?P<bucket>[a-z0-9][a-z0-9._-]{1,221})(?:/(?P<path>[^?#]*))?", re.IGNORECASE)
_RATE_LIMITS = frozenset({"rateLimitExceeded", "userRateLimitExceeded"})
_CAUSES = {
    NO_SUCH_ROOT: "there is no such bucket: create it, or correct the URL",
    "accountDisabled": "the account or its billing is disabled",
    "userProjectMissing": "the bucket makes the requester pay: pass requester_pays=True and a project",
}


def open_url(url: str, storage_options: Mapping[str, Any]) -> Backend:
    """Return the backend for ``gs://bucket/path``; `storage_options` are those of gcsfs, and ``request_timeout``.

    Raises
    ------
    OptionError
        If the URL names no bucket.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise OptionError(f"not a GCS URL: {redact(url)}; write gs://bucket/path")
    options = dict(storage_options)
    limits = take_options(options, redact(url))
    return GCSBackend(match["bucket"], match["path"] or "", options, **limits)


class _Session:
    """A gcsfs file system, for its credentials and endpoint, and connections of our own."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        # An empty project means none, and avoids gcsfs's warning that buckets cannot be listed.
        project = os.environ.get("GOOGLE_CLOUD_PROJECT") or os.environ.get("GCLOUD_PROJECT") or ""
        access = {"project": project, "access": "read_write"}
        self._fs = GCSFileSystem(**{**access, **options, "use_listings_cache": False, "skip_instance_cache": True})
        self._http: aiohttp.ClientSession | None = None
        self._headers: dict[str, str] = {}
        self.root = self._fs.base.removesuffix("/storage/v1/")

    async def open(self) -> None:
        """Make the connection pool, and renew the token if it has expired."""
        if self._http is None:
            self._http = open_http(**self._fs.session_kwargs)
        headers: dict[str, str] = {}
        await asyncio.to_thread(self._fs.credentials.apply, headers)  # may block to fetch a token
        self._headers = headers

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()

    @asynccontextmanager
    async def call(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        data: AsyncIterator[memoryview] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Make one request and yield its answer; raise unless it succeeded."""
        assert self._http is not None
        query = dict(parameters or {})
        if self._fs.requester_pays:
            named = isinstance(self._fs.requester_pays, str)
            query["userProject"] = self._fs.requester_pays if named else self._fs.project
        url = URL(f"{self.root}{path}?{urlencode(query)}", encoded=True)
        async with self._http.request(
            method, url, headers={**self._headers, **(headers or {})}, data=data, allow_redirects=False
        ) as reply:
            if reply.status >= 400:
                raise _failed(reply.status, await reply.read())
            if is_page(reply.headers):
                raise WrongAnswer(reply.status, "it is a web page")
            yield reply


class GCSBackend(RemoteBackend[_Session]):
    """Keys below ``gs://bucket/path``.

    Parameters
    ----------
    bucket, path
        The root; slashes around `path` are ignored.
    storage_options
        Those of gcsfs: ``token``, ``project``, ``requester_pays``, ``endpoint_url``, ``session_kwargs`` …
    timeout, min_rate
        As in :class:`~incckpt.backends.remote.RemoteBackend`.
    """

    def __init__(
        self, bucket: str, path: str = "", storage_options: Mapping[str, Any] | None = None, **limits: float
    ) -> None:
        path = path.strip("/")
        super().__init__(f"gs://{bucket}/{path}".rstrip("/"), **limits)
        self._objects = f"/storage/v1/b/{quote(bucket, safe='')}/o"
        self._root = f"{path}/" if path else ""
        self._options = dict(storage_options or {})

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        path = self._path(key)
        wanted = byte_range(start, end)

        async def request(session: _Session, deadline: Deadline) -> bytes:
            try:
                async with session.call("GET", path, {"alt": "media"}, headers=wanted) as reply:
                    data = await self._read(key, reply, deadline, start, end)
                    is_doubtful = not data and reply.status == 200 and "X-Goog-Generation" not in reply.headers
            except RequestFailed as failure:
                if wanted and failure.status == 416:  # the value ends before `start`
                    return b""
                raise
            if is_doubtful and (end is None or start < end):  # an empty value, or no answer of the service
                async with session.call("GET", path, {"fields": "size"}) as reply:
                    size = int((await _fields(reply, "size"))["size"])
                if size > start:
                    raise WrongAnswer(200, f"it is empty, and the value has {size} bytes")
            return data

        return self._call("get", key, request)

    def put(self, key: str, data: ReadableBuffer) -> None:
        self._put("put", key, data, {})

    def create(self, key: str, data: ReadableBuffer) -> None:
        if self.exclusive:
            self._put("create", key, data, {"ifGenerationMatch": "0"})
        else:
            self._look_then_put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        paths = [self._path(key) for key in keys]
        if not paths:
            return

        async def request(session: _Session, deadline: Deadline) -> None:
            async def delete(path: str) -> None:
                try:
                    async with session.call("DELETE", path):
                        pass
                except RequestFailed as failure:
                    if failure.status != 404 or failure.code == NO_SUCH_ROOT:
                        raise
                deadline.expect(0)

            await gather(delete, paths)

        self._call("delete", f"{len(paths)} keys", request)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        begin = self._root + validate_prefix(prefix)
        return PagedListing(lambda token: self._page(prefix, begin, token))

    def head(self, key: str) -> Entry:
        path = self._path(key)

        async def request(session: _Session, _: Deadline) -> Entry:
            async with session.call("GET", path, {"fields": "size,updated"}) as reply:
                return _entry(key, await _fields(reply, "size", "updated"))

        return self._call("head", key, request)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._objects}/{quote(self._root + validate_key(key), safe='')}"

    def _put(self, verb: str, key: str, data: ReadableBuffer, condition: Mapping[str, str]) -> None:
        parameters = {"uploadType": "media", "name": self._root + validate_key(key), "fields": "size", **condition}
        view = memoryview(data).cast("B")
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(view))}

        async def request(session: _Session, _: Deadline) -> None:
            async with session.call(
                "POST", f"/upload{self._objects}", parameters, headers=headers, data=pieces(view)
            ) as reply:
                stored = int((await _fields(reply, "size"))["size"])
            if stored != len(view):
                raise self._cut_short(key, stored, len(view))

        self._call(verb, key, request, len(view))

    def _page(self, prefix: str, begin: str, token: str | None) -> tuple[Sequence[Entry], str | None]:
        parameters = {"prefix": begin, "fields": "kind,items(name,size,updated),nextPageToken", "maxResults": "1000"}
        if token is not None:
            parameters["pageToken"] = token

        async def request(session: _Session, _: Deadline) -> dict[str, Any]:
            async with session.call("GET", self._objects, parameters) as reply:
                page = await _fields(reply, "kind")
            names = [str(found.get("name")) for found in page.get("items", ())]
            if page["kind"] != "storage#objects" or not all(name.startswith(begin) for name in names):
                raise WrongAnswer(200, f"not a listing of {begin!r}")
            return page

        page = self._call("list", prefix, request)
        entries = [_entry(found["name"][len(self._root) :], found) for found in page.get("items", ())]
        return entries, page.get("nextPageToken")

    # -- connection and errors ----------------------------------------------------------------------------------------

    def _connect(self) -> _Session:
        try:
            return _Session(self._options)
        except (TypeError, ValueError, KeyError) as exc:
            raise OptionError(f"{self.url}: gcsfs refuses the storage_options: {exc}") from exc

    async def _open(self, client: _Session) -> None:
        await client.open()

    async def _disconnect(self, client: _Session) -> None:
        await client.close()

    def _failure(self, exc: Exception) -> RequestFailed | None:
        if isinstance(exc, HttpError):  # gcsfs could not renew the token
            return CredentialsExpired(401, "", str(exc))
        if isinstance(exc, google.auth.exceptions.GoogleAuthError) and not self._is_transient(exc):
            return RequestFailed(401, "", str(exc))
        return None

    def _is_transient(self, exc: Exception) -> bool:
        if isinstance(exc, aiohttp.ClientSSLError):
            return False
        return isinstance(
            exc,
            aiohttp.ClientError
            | google.auth.exceptions.TransportError
            | requests.exceptions.RequestException
            | json.JSONDecodeError
            | ConnectionError
            | EOFError,
        )

    def _advice(self, failure: RequestFailed, verb: str) -> str:
        if failure.code in _CAUSES:
            return _CAUSES[failure.code]
        if failure.status in (401, 403):
            return "the credentials do not allow this, or there are none: see the roles in docs/backends.md"
        return ""


async def _fields(reply: aiohttp.ClientResponse, *fields: str) -> dict[str, Any]:
    """Return an answer's JSON object.

    Raises
    ------
    WrongAnswer
        If it is none, or lacks fields that the service always gives.
    """
    text = await reply.read()
    try:
        document = json.loads(text)
    except ValueError as exc:
        raise WrongAnswer(reply.status, f"not JSON but {text[:40]!r}") from exc
    if not isinstance(document, dict) or any(name not in document for name in fields):
        raise WrongAnswer(reply.status, f"there is no {' and '.join(fields)} in it")
    return document


def _entry(key: str, resource: Mapping[str, Any]) -> Entry:
    return Entry(key, int(resource["size"]), datetime.fromisoformat(resource["updated"]).timestamp())


def _failed(status: int, body: bytes) -> RequestFailed:
    """Return the failure that an answer describes, in JSON or (for a download) plain text."""
    text = body.decode(errors="replace")
    code = ""
    try:
        error = json.loads(text)["error"]
        text = error["message"]
        code = error["errors"][0]["reason"]
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    if status == 404 and "bucket does not exist" in text:
        code = NO_SUCH_ROOT
    if status == 401:
        return CredentialsExpired(status, code, text)
    return RequestFailed(status, code, text[:500], transient=True if code in _RATE_LIMITS else None)
