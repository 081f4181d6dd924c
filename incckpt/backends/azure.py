"""A store in a container of Azure Blob Storage.

Options are those of adlfs, but requests go through Azure's own client, which adlfs uses too: adlfs keeps every file
system alive until the interpreter exits, and then waits for an event loop that a forked child does not have.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import aiohttp
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import (
    ClientAuthenticationError,
    DecodeError,
    HttpResponseError,
    IncompleteReadError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.core.pipeline.transport import AioHttpTransport
from azure.storage.blob.aio import BlobClient, BlobServiceClient, ContainerClient

from incckpt.backends.base import Backend, Entry, PagedListing, ReadableBuffer, redact, validate_key, validate_prefix
from incckpt.backends.remote import (
    NO_SUCH_ROOT,
    CredentialsExpired,
    Deadline,
    RemoteBackend,
    RequestFailed,
    WrongAnswer,
    gather,
    take_options,
)
from incckpt.errors import OptionError

__all__ = ["AzureBackend", "open_url"]

_URL = re.compile(
    r"(?:az|abfss?)://(?P<container>[a-z0-9$][a-z0-9-]{2,62})(?:@(?P<host>[a-z0-9.-]+))?(?:/(?P<path>[^?#]*))?",
    re.IGNORECASE,
)
_OPTIONS = {
    "account_name": "AZURE_STORAGE_ACCOUNT_NAME",
    "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
    "connection_string": "AZURE_STORAGE_CONNECTION_STRING",
    "sas_token": "AZURE_STORAGE_SAS_TOKEN",
    "client_id": "AZURE_STORAGE_CLIENT_ID",
    "client_secret": "AZURE_STORAGE_CLIENT_SECRET",
    "tenant_id": "AZURE_STORAGE_TENANT_ID",
    "anon": "AZURE_STORAGE_ANON",
    "account_host": None,
    "credential": None,
}
"""adlfs's options, and the environment variables that stand in for missing ones."""

_CLIENT: dict[str, Any] = {
    "retry_total": 0,
    "max_single_put_size": 256 << 20,  # in one conditional PUT; larger values are blocks and one conditional commit
    "max_single_get_size": 64 << 20,
    "max_chunk_get_size": 16 << 20,
}
_CONNECTING = 15  # seconds
_PARALLEL_RANGES = 4  # for a value larger than one get
_FOLDER = "hdi_isfolder"  # metadata that marks a folder, in accounts with a hierarchical namespace
_CAUSES = {
    NO_SUCH_ROOT: "there is no such container: create it, or correct the URL",
    "AuthorizationPermissionMismatch": "the identity has no role for blob data here: see docs/backends.md",
    "AuthorizationFailure": "a network rule or a missing role forbids this: see docs/backends.md",
    "AuthenticationFailed": "the key, SAS token or identity is wrong or has expired",
    "InvalidAuthenticationInfo": "the token is wrong or has expired",
    "NoAuthenticationInformation": "pass account_key, sas_token, connection_string or credential; or anon=True",
    "PublicAccessNotPermitted": "the container is not public: pass credentials",
    "ImmutableBlobStorageOverwrite": "an immutability policy forbids changing blobs here",
}


def open_url(url: str, storage_options: Mapping[str, Any]) -> Backend:
    """Return the backend for ``az://container/path`` or ``abfss://container@account.dfs.core.windows.net/path``.

    Parameters
    ----------
    storage_options
        Those of adlfs, and ``request_timeout``.

    Raises
    ------
    OptionError
        If the URL names no container, or an option is unknown.
    """
    match = _URL.fullmatch(url)
    if match is None:
        shown = redact(url)
        raise OptionError(f"not an Azure URL: {shown}; write az://container/path or abfss://container@host/path")
    options = dict(storage_options)
    limits = take_options(options, redact(url))
    if match["host"]:
        options.setdefault("account_name", match["host"].partition(".")[0])
        options.setdefault("account_host", match["host"].replace(".dfs.", ".blob."))
    return AzureBackend(match["container"], match["path"] or "", options, **limits)


class _Transport(AioHttpTransport):  # type: ignore[misc]
    """Streams bodies, since aiohttp sends bytes in one go and blocks the event loop meanwhile."""

    async def send(self, request: Any, **options: Any) -> Any:
        if request.method in ("GET", "HEAD"):
            request.headers["Cache-Control"] = "no-cache"
        if isinstance(request.data, bytes):
            request.data = io.BytesIO(request.data)
        return await super().send(request, **options)


class _Session:
    """A client of a storage account, and the identity to close with it."""

    def __init__(self, options: Mapping[str, Any], container: str) -> None:
        self._service, self._identity = _service(options)
        self.container: ContainerClient = self._service.get_container_client(container)

    async def close(self) -> None:
        """Close the connections."""
        await self._service.close()
        if self._identity is not None:
            await self._identity.close()


class AzureBackend(RemoteBackend[_Session]):
    """Keys below ``az://container/path``.

    Parameters
    ----------
    container, path
        The root; slashes around `path` are ignored.
    storage_options
        Those of adlfs: ``account_name`` with ``account_key``, ``sas_token``, ``credential`` (an asynchronous one of
        azure-identity), ``client_id``, ``client_secret`` and ``tenant_id``, or ``anon``; or ``connection_string``.
        Missing ones come from the environment, as in adlfs, and then from the machine's identity.
    timeout, min_rate
        As in :class:`~incckpt.backends.remote.RemoteBackend`.
    """

    def __init__(
        self, container: str, path: str = "", storage_options: Mapping[str, Any] | None = None, **limits: float
    ) -> None:
        path = path.strip("/")
        super().__init__(f"az://{container}/{path}".rstrip("/"), **limits)
        self._container = container
        self._root = f"{path}/" if path else ""
        self._options = dict(storage_options or {})
        unknown = sorted(set(self._options) - set(_OPTIONS))
        if unknown:
            raise OptionError(f"{self.url}: unknown storage_options {unknown}; known: {sorted(_OPTIONS)}")

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        name = self._name(key)

        async def request(session: _Session, deadline: Deadline) -> bytes:
            bounds: dict[str, Any] = {"offset": start} if start or end is not None else {}
            if end is not None:
                bounds["length"] = max(1, end - start)
            blob = session.container.get_blob_client(name)
            try:
                stream = await blob.download_blob(**bounds, max_concurrency=_PARALLEL_RANGES)
            except HttpResponseError as exc:
                if bounds and exc.status_code == 416:  # the value ends before `start`
                    return b""
                raise
            _check(stream.properties.etag, "there is no ETag")
            if _FOLDER in stream.properties.metadata:
                raise self._missing(key)
            deadline.expect(stream.size)
            data: bytes = await stream.readall()
            if len(data) != stream.size:
                raise self._cut_short(key, len(data), stream.size)
            return data if end is None else data[: max(0, end - start)]

        return self._call("get", key, request)

    def put(self, key: str, data: ReadableBuffer) -> None:
        self._put("put", key, data, overwrite=True)

    def create(self, key: str, data: ReadableBuffer) -> None:
        if self.exclusive:
            self._put("create", key, data, overwrite=False)
        else:
            self._look_then_put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        names = [self._name(key) for key in keys]
        if not names:
            return

        async def request(session: _Session, deadline: Deadline) -> None:
            async def delete(name: str) -> None:
                try:
                    await session.container.get_blob_client(name).delete_blob()
                except HttpResponseError as exc:
                    if exc.status_code != 404 or self._answer(exc).code == NO_SUCH_ROOT:
                        raise
                deadline.expect(0)

            await gather(delete, names)

        self._call("delete", f"{len(names)} keys", request)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        begin = self._root + validate_prefix(prefix)
        return PagedListing(lambda token: self._page(prefix, begin, token))

    def head(self, key: str) -> Entry:
        name = self._name(key)

        async def request(session: _Session, _: Deadline) -> Entry:
            found = await session.container.get_blob_client(name).get_blob_properties()
            _check(found.etag and found.last_modified, "there is no ETag and Last-Modified")
            if _FOLDER in found.metadata:
                raise self._missing(key)
            return Entry(key, found.size, found.last_modified.timestamp())

        return self._call("head", key, request)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return self._root + validate_key(key)

    def _put(self, verb: str, key: str, data: ReadableBuffer, *, overwrite: bool) -> None:
        name = self._name(key)
        body = bytes(data)

        async def request(session: _Session, _: Deadline) -> None:
            blob: BlobClient = session.container.get_blob_client(name)
            stored = await blob.upload_blob(
                body, length=len(body), overwrite=overwrite, max_concurrency=_PARALLEL_RANGES
            )
            _check(stored.get("etag"), "there is no ETag, so nothing says that the value was stored")

        self._call(verb, key, request, len(body))

    def _page(self, prefix: str, begin: str, token: str | None) -> tuple[Sequence[Entry], str | None]:
        async def request(session: _Session, _: Deadline) -> tuple[Sequence[Entry], str | None]:
            blobs = session.container.list_blobs(name_starts_with=begin, include=["metadata"])
            pages: Any = blobs.by_page(continuation_token=token)
            found = [blob async for blob in await anext(pages)]
            ours = pages.service_endpoint and pages.container == self._container and (pages.prefix or "") == begin
            _check(ours and all(blob.name.startswith(begin) for blob in found), f"not a listing of {begin!r}")
            entries = [
                Entry(blob.name[len(self._root) :], blob.size, blob.last_modified.timestamp())
                for blob in found
                if _FOLDER not in (blob.metadata or ())
            ]
            return entries, pages.continuation_token or None

        return self._call("list", prefix, request)

    # -- connection and errors ----------------------------------------------------------------------------------------

    def _connect(self) -> _Session:
        try:
            return _Session(self._options, self._container)
        except (TypeError, ValueError) as exc:
            raise OptionError(f"{self.url}: {exc}") from exc

    async def _disconnect(self, client: _Session) -> None:
        await client.close()

    def _failure(self, exc: Exception) -> RequestFailed | None:
        if isinstance(exc, ClientAuthenticationError) and exc.status_code is None:
            return CredentialsExpired(401, "", str(exc.message))
        if isinstance(exc, HttpResponseError) and exc.status_code is not None:
            return self._answer(exc)
        return None

    def _answer(self, exc: HttpResponseError) -> RequestFailed:
        named = getattr(exc, "error_code", None) or ""  # a member of an enumeration if the service documents it
        code = str(getattr(named, "value", named))
        status, message = exc.status_code or 0, str(exc.message).partition("\n")[0]
        if 200 <= status < 300:  # not the success that this request has, or one that cannot be read
            return WrongAnswer(status, message)
        if code == "BlobAlreadyExists":
            return RequestFailed(412, code, message)
        if code in ("ContainerNotFound", "ContainerDisabled", "ContainerBeingDeleted"):
            return RequestFailed(404, NO_SUCH_ROOT, message)
        if status == 401 or message.startswith("Server failed to authenticate the request"):
            if code == "AuthorizationFailure":  # azurite's name for it
                code = "AuthenticationFailed"
            return CredentialsExpired(status, code, message)
        return RequestFailed(status, code, message)

    def _is_transient(self, exc: Exception) -> bool:
        if isinstance(exc, HttpResponseError):  # no status: the answer could not be read to its end
            return exc.status_code is None
        return isinstance(exc, _CONNECTION_ERRORS)

    def _advice(self, failure: RequestFailed, verb: str) -> str:
        if failure.code in _CAUSES:
            return _CAUSES[failure.code]
        if failure.status in (401, 403):
            return "the credentials do not allow this, or there are none: see the roles in docs/backends.md"
        return ""


_CONNECTION_ERRORS = (
    ServiceRequestError,
    ServiceResponseError,
    IncompleteReadError,
    DecodeError,
    aiohttp.ClientError,
    ConnectionError,
    EOFError,
    AttributeError,  # and what else comes of an answer that is not the service's: the client takes for granted what it
    KeyError,  # looks for
    ValueError,
)


def _check(given: object, otherwise: str) -> None:
    """Refuse an answer without what the service always gives.

    Raises
    ------
    WrongAnswer
    """
    if not given:
        raise WrongAnswer(200, otherwise)


def _service(options: Mapping[str, Any]) -> tuple[BlobServiceClient, Any]:
    """Return a client and its identity, if any, chosen as adlfs does."""
    given: dict[str, Any] = {
        name: options.get(name) or os.environ.get(variable or "") for name, variable in _OPTIONS.items()
    }
    client = {**_CLIENT, "transport": _Transport(connection_timeout=_CONNECTING)}
    if given["connection_string"]:
        return BlobServiceClient.from_connection_string(given["connection_string"], **client), None
    if not given["account_name"]:
        raise ValueError("pass account_name or connection_string, or set AZURE_STORAGE_ACCOUNT_NAME")
    host = given["account_host"] or f"{given['account_name']}.blob.core.windows.net"
    identity: Any = None
    credential = given["credential"]
    if credential is None and given["account_key"]:
        credential = AzureNamedKeyCredential(given["account_name"], given["account_key"])
    if credential is None and given["sas_token"]:
        credential = given["sas_token"].removeprefix("?")
    if credential is None and str(given["anon"] or "false").lower() in ("false", "0", "f"):
        from azure.identity.aio import ClientSecretCredential, DefaultAzureCredential

        if given["client_id"] and given["client_secret"]:
            identity = ClientSecretCredential(given["tenant_id"], given["client_id"], given["client_secret"])
        else:
            identity = DefaultAzureCredential()
        credential = identity
    return BlobServiceClient(f"https://{host}", credential=credential, **client), identity
