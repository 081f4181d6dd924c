"""A store in an S3 bucket, of Amazon's or of a server that speaks its protocol.

s3fs makes the session (its options, credentials and endpoint); the requests are the S3 client's own, one per
operation. Values always go up in one PUT: a multipart upload is where some servers ignore the condition of `create`,
and where a kill leaves parts behind.
"""

from __future__ import annotations

import errno
import functools
import http.client
import logging
import os
import re
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import aiobotocore.session
import aiohttp
import botocore.config
import botocore.exceptions
import botocore.httpsession
import botocore.loaders
import botocore.parsers
import botocore.utils
import s3fs

from incckpt.backends.base import (
    Backend,
    Entry,
    Leftover,
    PagedListing,
    ReadableBuffer,
    redact,
    validate_key,
    validate_prefix,
)
from incckpt.backends.direct import Connections, Patience, SignedRequest
from incckpt.backends.remote import (
    CONNECTING,
    NO_SUCH_ROOT,
    POOL,
    CredentialsExpired,
    Deadline,
    RemoteBackend,
    RequestFailed,
    byte_range,
    gather,
    take_options,
)
from incckpt.errors import BackendError, IncckptError, OptionError

__all__ = ["S3Backend", "client_config", "open_url"]

logger = logging.getLogger(__name__)

_URL = re.compile(r"s3a?://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(?P<path>[^?#]*))?", re.IGNORECASE)
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
_MAY_PASS = frozenset({"RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest", "SlowDown"})
_NO_BULK = frozenset({400, 405, 411, 501})
_BATCH = 1_000  # keys in one bulk delete, S3's limit
_LARGEST = 5 << 30  # bytes in one PUT, S3's limit

_CONFIG: dict[str, Any] = {
    "connect_timeout": 15,
    "max_pool_connections": POOL,
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    # The body's checksum and signature cost more than sending it; TLS protects it, and every read checks SHA-256.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "s3": {"payload_signing_enabled": False},
    "tcp_keepalive": True,
}
_CAUSES = {
    "NoSuchBucket": "there is no such bucket here: create it, or correct the URL or endpoint_url",
    "InvalidAccessKeyId": "the access key is not known to this endpoint: check the credentials and endpoint_url",
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy changes the request",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "ExpiredToken": "the session token has expired, and no newer one was found where it came from",
    "PermanentRedirect": "the bucket is in another region: set client_kwargs={'region_name': …}",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set client_kwargs={'region_name': …}",
    "AccessDenied": "the credentials do not allow this: see the policy in docs/backends.md",
    "AllAccessDisabled": "the account or bucket is disabled",
}


def open_url(url: str, storage_options: Mapping[str, Any]) -> Backend:
    """Return the backend for ``s3://bucket/path``; `storage_options` are s3fs's, and ``request_timeout``.

    Raises
    ------
    OptionError
        If the URL names no bucket, or an option is not one of s3fs's.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise OptionError(f"not an S3 URL, as s3://bucket/path: {redact(url)}")
    options = dict(storage_options)
    limits = take_options(options, url)
    return S3Backend(match["bucket"], match["path"] or "", options, **limits)


class _Session:
    """An s3fs file system, for its session; the client is made on the event loop by the first request."""

    def __init__(self, options: Mapping[str, Any], bucket: str) -> None:
        self._fs = s3fs.S3FileSystem(
            **{
                **options,
                "config_kwargs": {**client_config(), **options.get("config_kwargs", {})},
                "use_listings_cache": False,
                "skip_instance_cache": True,
            }
        )
        self._bucket = bucket
        self._opened: Any = None
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self._direct: bool | None = None

    async def open(self) -> None:
        """Make the client, or make it again if its connections were closed."""
        try:
            if self._fs.session is None:  # as s3fs would, but for the loader
                session = aiobotocore.session.AioSession(**self._fs.kwargs)
                session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
                self._fs.session = session
            self._opened = await self._fs.set_session()
        except (TypeError, ValueError) as exc:
            raise OptionError(f"storage_options for S3 are not what s3fs takes: {exc}") from exc

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make one request, with those of s3fs's additional parameters that the operation takes."""
        return await self._call(await self._fs.get_s3(self._bucket), operation, parameters)

    async def sign(self, operation: str, **parameters: Any) -> SignedRequest | None:
        """Return the request that `call` would make; ``None`` if only the client itself can (through a proxy, say)."""
        client = await self._fs.get_s3(self._bucket)
        if self._direct is None:
            config, url = client.meta.config, client.meta.endpoint_url
            self._direct = not (config.client_cert or config.proxies or botocore.utils.get_environ_proxies(url))
        if not self._direct:
            return None
        client.meta.events.register("before-send.s3", _hand_over, unique_id="incckpt")
        signing = _signing.set(True)
        try:
            await self._call(client, operation, parameters)
        except _SignedError as signed:
            return SignedRequest(signed.request.method, signed.request.url, dict(signed.request.headers.items()))
        finally:
            _signing.reset(signing)
        return None

    def connections(self) -> Connections:
        """Return the connections for signed requests."""
        with self._lock:
            if self._connections is None:
                verify = self._fs.client_kwargs.get("verify")
                if verify is None:
                    found = self._fs.session.get_config_variable("ca_bundle")
                    verify = found or os.environ.get("REQUESTS_CA_BUNDLE") or True
                self._connections = Connections(limit=POOL, connecting=CONNECTING, tls=_tls(verify))
            return self._connections

    async def _call(self, client: Any, operation: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        takes = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation]).input_shape
        additional = {**self._fs.s3_additional_kwargs, **self._fs.req_kw}
        chosen = {name: value for name, value in additional.items() if name in takes.members}
        reply: dict[str, Any] = await getattr(client, operation)(Bucket=self._bucket, **chosen, **parameters)
        return reply

    async def close(self) -> None:
        """Close the client's connections."""
        with self._lock:
            if self._connections is not None:
                self._connections.close()
        if self._opened is not None:
            await self._opened.close()


class S3Backend(RemoteBackend[_Session]):
    """Keys below ``s3://bucket/path``.

    Parameters
    ----------
    bucket, path
        Where the root is; slashes around `path` do not count.
    storage_options
        s3fs's: ``key``, ``secret``, ``token``, ``profile``, ``anon``, ``endpoint_url``, ``client_kwargs``,
        ``config_kwargs`` …
    timeout, min_rate
        As in :class:`~incckpt.backends.remote.RemoteBackend`.
    """

    def __init__(
        self, bucket: str, path: str = "", storage_options: Mapping[str, Any] | None = None, **limits: float
    ) -> None:
        path = path.strip("/")
        super().__init__(f"s3://{bucket}/{path}".rstrip("/"), **limits)
        self._bucket = bucket
        self._root = f"{path}/" if path else ""
        self._options = dict(storage_options or {})
        self._bulk_delete = True

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        name = self._name(key)
        wanted = byte_range(start, end)

        async def request(session: _Session, deadline: Deadline) -> bytes:
            try:
                reply = await session.call("get_object", Key=name, **wanted)
            except botocore.exceptions.ClientError as exc:
                if wanted and _status(exc) == 416:  # the value ends before `start`
                    return b""
                raise
            length = reply["ContentLength"]
            deadline.expect(length)
            async with reply["Body"] as body:
                data: bytes = await body.read()
            if len(data) != length:
                raise self._cut_short(key, len(data), length)
            if "ContentRange" in reply:
                return data if end is None else data[: max(0, end - start)]
            return data[start:end]  # all of it: also from a server that does not know ranges

        return self._call("get", key, request)

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        name = self._name(key)
        room = sum(map(len, parts))

        async def sign(session: _Session, _: Deadline) -> SignedRequest | None:
            return await session.sign("get_object", Key=name)

        def transfer(connection: Any) -> int | None:
            session: _Session = connection.client
            signed = self._on_loop(connection, sign)
            if signed is None:
                return None
            wait = Patience(self._timeout, self._min_rate)
            with session.connections().request(signed, wait) as reply:
                length = reply.length
                if reply.status != 200 or length is None:
                    return None  # what the answer means is for the client to say, which asks again
                if length <= room:
                    wait.expect(length)
                    got = reply.read_into(_first(parts, length))
                    if got != length:
                        raise self._cut_short(key, got, length)
                return length

        found = self._connectedly("get", key, transfer)
        return super().get_into(key, parts) if found is None else found

    def put(self, key: str, data: ReadableBuffer) -> None:
        self._put("put", key, data, {})

    def create(self, key: str, data: ReadableBuffer) -> None:
        if self.exclusive:
            self._put("create", key, data, {"IfNoneMatch": "*"})
        else:
            self._look_then_put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        remaining = [self._name(key) for key in keys]
        while remaining:
            batch, remaining = remaining[:_BATCH], remaining[_BATCH:]
            if len(batch) > 1 and self._bulk_delete:
                try:
                    self._delete_at_once(batch)
                    continue
                except _NoBulkDelete as exc:
                    self._bulk_delete = False
                    logger.warning("%s: no bulk delete (%s); each key costs a request", self.url, exc)
            self._delete_singly(batch)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        begin = self._root + validate_prefix(prefix)
        return PagedListing(lambda token: self._page(begin, token))

    def head(self, key: str) -> Entry:
        name = self._name(key)

        async def request(session: _Session, _: Deadline) -> Entry:
            reply = await session.call("head_object", Key=name)
            return Entry(key, reply["ContentLength"], reply["LastModified"].timestamp())

        return self._call("head", key, request)

    def leftovers(self) -> Iterator[Leftover]:
        """Yield the multipart uploads under way below the root; this backend makes none, but other tools do."""
        markers: dict[str, str] = {}
        while True:

            async def request(session: _Session, _: Deadline) -> dict[str, Any]:
                try:
                    return await session.call("list_multipart_uploads", Prefix=self._root, **markers)  # noqa: B023
                except botocore.exceptions.ClientError as exc:
                    if _status(exc) in (404, 501) and _code(exc) != NO_SUCH_ROOT:
                        return {}  # a server that has no multipart uploads, or says so when there is none
                    raise

            reply = self._call("list the uploads below", self._root, request)
            for upload in reply.get("Uploads", []):
                name = f"{upload['Key'][len(self._root) :]}?uploadId={upload['UploadId']}"
                yield Leftover(name, upload["Initiated"].timestamp())
            if not reply.get("IsTruncated"):
                return
            markers = {"KeyMarker": reply["NextKeyMarker"], "UploadIdMarker": reply["NextUploadIdMarker"]}

    def remove_leftover(self, leftover: Leftover) -> None:
        name, separator, upload = leftover.name.partition("?uploadId=")
        if not separator or not upload:
            raise OptionError(f"not an upload of {self.url}: {leftover.name!r}")

        async def request(session: _Session, _: Deadline) -> None:
            try:
                await session.call("abort_multipart_upload", Key=self._root + name, UploadId=upload)
            except botocore.exceptions.ClientError as exc:
                if _status(exc) != 404:
                    raise

        self._call("abort the upload of", name, request)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return self._root + validate_key(key)

    def _put(self, verb: str, key: str, data: ReadableBuffer, condition: Mapping[str, str]) -> None:
        name = self._name(key)
        body = data if isinstance(data, bytes | bytearray) else bytes(data)  # botocore refuses a memoryview
        if len(body) > _LARGEST:
            raise BackendError(
                errno.EFBIG, f"{self.url}: {key!r} has {len(body)} bytes; S3 takes {_LARGEST} in one PUT"
            )

        async def request(session: _Session, _: Deadline) -> None:
            await session.call("put_object", Key=name, Body=body, **condition)

        self._call(verb, key, request, len(body))

    def _page(self, begin: str, token: str | None) -> tuple[Sequence[Entry], str | None]:
        async def request(session: _Session, _: Deadline) -> dict[str, Any]:
            following = {"ContinuationToken": token} if token is not None else {}
            return await session.call("list_objects_v2", Prefix=begin, **following)

        reply = self._call("list", begin[len(self._root) :], request)
        entries = [
            Entry(found["Key"][len(self._root) :], found["Size"], found["LastModified"].timestamp())
            for found in reply.get("Contents", ())
        ]
        if not reply.get("IsTruncated"):
            return entries, None
        if not reply.get("NextContinuationToken"):
            raise BackendError(
                errno.EIO, f"{self.url}: the listing of {begin!r} goes on, but the server does not say how"
            )
        return entries, reply["NextContinuationToken"]

    def _delete_at_once(self, names: Sequence[str]) -> None:
        async def request(session: _Session, _: Deadline) -> dict[str, Any]:
            try:
                objects = [{"Key": name} for name in names]
                return await session.call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            except botocore.exceptions.ClientError as exc:
                failure = self._answer(exc)
                if failure.status in _NO_BULK and not failure.transient and not isinstance(failure, CredentialsExpired):
                    raise _NoBulkDelete(str(failure)) from exc
                raise

        first = names[0][len(self._root) :]
        reply = self._call("delete", first, request)
        for refused in reply.get("Errors", ()):
            code = refused.get("Code", "")
            if code != "NoSuchKey":
                status = {"AccessDenied": 403, "InternalError": 500, "SlowDown": 503}.get(code, 400)
                failure = RequestFailed(status, code, refused.get("Message", ""))
                key = refused.get("Key", names[0])[len(self._root) :]
                raise self._error(failure, failure, "delete", key)

    def _delete_singly(self, names: Sequence[str]) -> None:
        async def request(session: _Session, deadline: Deadline) -> None:
            async def delete(name: str) -> None:
                try:
                    await session.call("delete_object", Key=name)
                except botocore.exceptions.ClientError as exc:
                    if _status(exc) != 404 or _code(exc) == NO_SUCH_ROOT:
                        raise
                deadline.expect(0)

            await gather(delete, names)

        self._call("delete", names[0][len(self._root) :], request)

    # -- connection and errors ----------------------------------------------------------------------------------------

    def _connect(self) -> _Session:
        try:
            return _Session(self._options, self._bucket)
        except (TypeError, ValueError, KeyError) as exc:
            raise OptionError(f"{self.url}: storage_options are not what s3fs takes: {exc}") from exc

    async def _open(self, client: _Session) -> None:
        await client.open()

    async def _disconnect(self, client: _Session) -> None:
        await client.close()

    def _failure(self, exc: Exception) -> RequestFailed | None:
        if isinstance(exc, botocore.exceptions.ClientError):
            return self._answer(exc)
        if isinstance(exc, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
            return RequestFailed(401, "NoCredentials", str(exc))
        if isinstance(exc, botocore.exceptions.ParamValidationError) and "IfNoneMatch" in str(exc):
            return RequestFailed(501, "NotImplemented", "this botocore is too old for exclusive creation: upgrade s3fs")
        return None

    def _answer(self, exc: botocore.exceptions.ClientError) -> RequestFailed:
        code, message = _code(exc), str(exc.response.get("Error", {}).get("Message", ""))
        if code in _EXPIRED:
            return CredentialsExpired(403, code, message)
        return RequestFailed(_status(exc), code, message, transient=True if code in _MAY_PASS else None)

    def _is_transient(self, exc: Exception) -> bool:
        if isinstance(exc, botocore.exceptions.SSLError | aiohttp.ClientSSLError | ssl.SSLCertVerificationError):
            return False
        return isinstance(exc, _CONNECTION_ERRORS)

    def _advice(self, failure: RequestFailed, verb: str) -> str:
        if failure.code in _CAUSES:
            return _CAUSES[failure.code]
        if failure.code == "NoCredentials":
            return "pass key and secret, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or anon=True"
        if failure.status == 403:
            return _CAUSES["AccessDenied"]
        return ""


class _SignedError(Exception):
    """Not an error: carries a request out of the client, ready to be sent."""

    def __init__(self, request: Any) -> None:
        super().__init__("signed")
        self.request = request


_signing: ContextVar[bool] = ContextVar("_signing", default=False)


def _hand_over(request: Any, **_: Any) -> None:
    """Keep the client from sending a request that was only to be signed."""
    if _signing.get():
        raise _SignedError(request)


@functools.cache
def _loader(data_path: str | None) -> Any:
    """Return what reads botocore's descriptions of services and keeps them: the next client takes half the time."""
    return botocore.loaders.create_loader(data_path)


def _tls(verify: bool | str) -> ssl.SSLContext:
    """Return how to verify a server, as botocore does: by default certificates, a file of them, or not at all."""
    context: ssl.SSLContext = botocore.httpsession.create_urllib3_context()
    if verify:
        context.check_hostname = True
        context.load_verify_locations(botocore.httpsession.get_cert_path(verify))
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _first(parts: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """Return the first `nbytes` of `parts`."""
    chosen = []
    for part in parts:
        chosen.append(part[:nbytes])
        nbytes -= len(chosen[-1])
    return chosen


class _NoBulkDelete(IncckptError):
    """The server does not take a bulk delete as this client sends it."""


_CONNECTION_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.parsers.ResponseParserError,
    aiohttp.ClientError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    EOFError,
)


def client_config() -> dict[str, Any]:
    """Return our settings for botocore's client, as s3fs takes them in ``config_kwargs``; only those that it knows."""
    known = botocore.config.Config.OPTION_DEFAULTS
    return {name: value for name, value in _CONFIG.items() if name in known}


def _status(exc: botocore.exceptions.ClientError) -> int:
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(exc: botocore.exceptions.ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))
