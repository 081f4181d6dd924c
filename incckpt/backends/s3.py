"""A store in an S3 bucket, at Amazon or at any server that speaks its protocol.

s3fs makes the session (options, credentials, endpoint); requests use the S3 client directly, one per operation.
Requests with large bodies it only signs: :mod:`incckpt.backends.direct` sends them. A value always goes up in one PUT:
in multipart uploads some servers ignore the condition of `create`, and a kill leaves parts behind.
"""

from __future__ import annotations

import errno
import http.client
import logging
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_plus

import aiohttp
import botocore.exceptions
import botocore.parsers

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
from incckpt.backends.direct import Patience, SignedRequest
from incckpt.backends.remote import (
    NO_SUCH_ROOT,
    CredentialsExpired,
    Deadline,
    RemoteBackend,
    RequestFailed,
    WrongAnswer,
    byte_range,
    check_range,
    gather,
    is_page,
    take_options,
)
from incckpt.backends.s3_session import Body, Session, client_config
from incckpt.errors import BackendError, IncckptError, OptionError

__all__ = ["S3Backend", "client_config", "open_url"]

logger = logging.getLogger(__name__)

_URL = re.compile(r"s3a?://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(?P<path>[^?#]*))?", re.IGNORECASE)
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
_MAY_PASS = frozenset({"RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest", "SlowDown"})
_NO_BULK = frozenset({400, 405, 411, 501})
_BATCH = 1_000  # keys in one bulk delete, S3's limit
_LARGEST = 5 << 30  # bytes in one PUT, S3's limit
_LONGEST_ANSWER = 1 << 20  # bytes
_ELSEWHERE = frozenset({"AuthorizationHeaderMalformed"})  # and every redirection

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
    """Return the backend for ``s3://bucket/path``; `storage_options` are those of s3fs, and ``request_timeout``.

    Raises
    ------
    OptionError
        If the URL names no bucket, or `request_timeout` is not usable.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise OptionError(f"not an S3 URL: {redact(url)}; write s3://bucket/path")
    options = dict(storage_options)
    limits = take_options(options, redact(url))
    return S3Backend(match["bucket"], match["path"] or "", options, **limits)


class S3Backend(RemoteBackend[Session]):
    """Keys below ``s3://bucket/path``.

    Parameters
    ----------
    bucket, path
        The root; slashes around `path` are ignored.
    storage_options
        Those of s3fs: ``key``, ``secret``, ``token``, ``profile``, ``anon``, ``endpoint_url``, ``client_kwargs``,
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

        async def request(session: Session, deadline: Deadline) -> bytes:
            try:
                reply = await session.call("get_object", Key=name, **wanted)
            except botocore.exceptions.ClientError as exc:
                if wanted and _status(exc) == 416:  # the value ends before `start`
                    return b""
                raise
            _check_fields(reply, "ETag", "ContentLength")
            length = reply["ContentLength"]
            if "ContentRange" in reply:
                check_range(reply["ContentRange"], start)
            deadline.expect(length)
            async with reply["Body"] as body:
                data: bytes = await body.read()
            if len(data) != length:
                raise self._cut_short(key, len(data), length)
            if "ContentRange" in reply:
                return data if end is None else data[: max(0, end - start)]
            return data[start:end]  # the whole value, which a server that ignores ranges sends too

        return self._call("get", key, request)

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        name = self._name(key)
        room = sum(map(len, parts))

        async def sign(session: Session, _: Deadline) -> SignedRequest | None:
            return await session.sign("get_object", Key=name)

        def transfer(connection: Any) -> int | None:
            session: Session = connection.client
            signed = self._on_loop(connection, sign)
            if signed is None:
                return None
            wait = Patience(self._timeout, self._min_rate)
            with session.connections().request(signed, wait) as reply:
                length = reply.length
                if reply.status != 200 or length is None or "etag" not in reply.headers:
                    return None  # let the client ask again and interpret the answer
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

        async def request(session: Session, _: Deadline) -> Entry:
            reply = await session.call("head_object", Key=name)
            _check_fields(reply, "ETag", "ContentLength", "LastModified")
            return Entry(key, reply["ContentLength"], reply["LastModified"].timestamp())

        return self._call("head", key, request)

    def leftovers(self) -> Iterator[Leftover]:
        """Yield the unfinished multipart uploads below the root; this backend makes none, but other tools do."""
        markers: dict[str, str] = {}
        while True:

            async def request(session: Session, _: Deadline) -> dict[str, Any]:
                try:
                    reply = await session.call("list_multipart_uploads", Prefix=self._root, **markers)  # noqa: B023
                    _check_fields(reply, "IsTruncated")
                    return reply
                except botocore.exceptions.ClientError as exc:
                    if _status(exc) in (404, 501) and _code(exc) != NO_SUCH_ROOT:
                        return {}  # there are none, or the server lacks multipart uploads
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

        async def request(session: Session, _: Deadline) -> None:
            try:
                _check_fields(await session.call("abort_multipart_upload", Key=self._root + name, UploadId=upload))
            except botocore.exceptions.ClientError as exc:
                if _status(exc) != 404:
                    raise

        self._call("abort the upload of", name, request)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return self._root + validate_key(key)

    def _put(self, verb: str, key: str, data: ReadableBuffer, condition: Mapping[str, str]) -> None:
        name = self._name(key)
        view = memoryview(data).cast("B")
        if len(view) > _LARGEST:
            raise BackendError(
                errno.EFBIG, f"{self.url}: {key!r} has {len(view)} bytes; S3 takes {_LARGEST} in one PUT"
            )

        async def sign(session: Session, _: Deadline) -> SignedRequest | None:
            return await session.sign("put_object", Key=name, Body=Body(view), **condition)

        def transfer(connection: Any) -> bool:
            session: Session = connection.client
            signed = self._on_loop(connection, sign)
            if signed is None:
                return False
            wait = Patience(self._timeout, self._min_rate)
            wait.expect(len(view))
            with session.connections().request(signed, wait, view) as reply:
                answer = reply.read(_LONGEST_ANSWER)
            if 200 <= reply.status < 300 and "etag" not in reply.headers:
                raise WrongAnswer(reply.status, "there is no ETag, so nothing says that the value was stored")
            if 200 <= reply.status < 300:
                return True
            error = _parsed("PutObject", reply.status, reply.headers, answer)
            if reply.status < 400 or _code(error) in _ELSEWHERE:
                return False  # the client may find the right place
            raise error

        async def request(session: Session, _: Deadline) -> None:
            body = bytes(view)  # botocore refuses a memoryview
            _check_fields(await session.call("put_object", Key=name, Body=body, **condition), "ETag")

        if not self._connectedly(verb, key, transfer):
            self._call(verb, key, request, len(view))

    def _page(self, begin: str, token: str | None) -> tuple[Sequence[Entry], str | None]:
        async def request(session: Session, _: Deadline) -> dict[str, Any]:
            following = {"ContinuationToken": token} if token is not None else {}
            reply = await session.call("list_objects_v2", Prefix=begin, **following)
            self._check_listing(reply, begin)
            return reply

        reply = self._call("list", begin[len(self._root) :], request)
        entries = [
            Entry(found["Key"][len(self._root) :], found["Size"], found["LastModified"].timestamp())
            for found in reply.get("Contents", ())
        ]
        if not reply.get("IsTruncated"):
            return entries, None
        if not reply.get("NextContinuationToken"):
            raise BackendError(
                errno.EIO, f"{self.url}: the listing of {begin!r} is cut short, without a continuation token"
            )
        return entries, reply["NextContinuationToken"]

    def _check_listing(self, reply: Mapping[str, Any], begin: str) -> None:
        """Refuse what is not a listing of our bucket and prefix: one that looks empty would make others' data garbage.

        Raises
        ------
        WrongAnswer
        """
        _check_fields(reply, "IsTruncated")
        bucket = reply.get("Name", self._bucket)  # of an access point, the name of the bucket behind it
        others = [] if bucket == self._bucket or self._bucket.endswith("-s3alias") else [f"bucket {bucket!r}"]
        # Ceph says that the prefix is URL-encoded, but repeats it as it is; the client decodes it all the same.
        if reply.get("Prefix", begin) not in (begin, unquote_plus(begin)):
            others.append(f"prefix {reply['Prefix']!r}")
        others += [found["Key"] for found in reply.get("Contents", ()) if not found["Key"].startswith(begin)][:1]
        if others:
            raise WrongAnswer(200, f"not a listing of {begin!r} but of {', '.join(others)}")

    def _delete_at_once(self, names: Sequence[str]) -> None:
        async def request(session: Session, _: Deadline) -> dict[str, Any]:
            try:
                objects = [{"Key": name} for name in names]
                reply = await session.call("delete_objects", Delete={"Objects": objects})
                if not reply.get("Deleted") and not reply.get("Errors"):
                    raise WrongAnswer(200, "it names neither a deleted key nor an error")
                return reply
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
        async def request(session: Session, deadline: Deadline) -> None:
            async def delete(name: str) -> None:
                try:
                    _check_fields(await session.call("delete_object", Key=name))
                except botocore.exceptions.ClientError as exc:
                    if _status(exc) != 404 or _code(exc) == NO_SUCH_ROOT:
                        raise
                deadline.expect(0)

            await gather(delete, names)

        self._call("delete", names[0][len(self._root) :], request)

    # -- connection and errors ----------------------------------------------------------------------------------------

    def _connect(self) -> Session:
        try:
            return Session(self._options, self._bucket)
        except (TypeError, ValueError, KeyError) as exc:
            raise OptionError(f"{self.url}: s3fs refuses the storage_options: {exc}") from exc

    async def _open(self, client: Session) -> None:
        await client.open()

    async def _disconnect(self, client: Session) -> None:
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


def _parsed(operation: str, status: int, headers: Mapping[str, str], body: bytes) -> botocore.exceptions.ClientError:
    """Return the error that the client would raise for an answer."""
    parsed = botocore.parsers.create_parser("rest-xml").parse(
        {"status_code": status, "headers": headers, "body": body}, None
    )
    return botocore.exceptions.ClientError(
        {"Error": parsed.get("Error", {}), "ResponseMetadata": {"HTTPStatusCode": status}}, operation
    )


def _check_fields(reply: Mapping[str, Any], *fields: str) -> None:
    """Refuse an answer without the fields that the service always gives, or that says that it is a web page.

    Raises
    ------
    WrongAnswer
    """
    metadata = reply.get("ResponseMetadata", {})
    lacking = [name for name in fields if reply.get(name) is None]
    is_ours = metadata.get("HTTPStatusCode") == 204 or not is_page(metadata.get("HTTPHeaders", {}))
    if lacking or not (fields or is_ours):
        what = f"there is no {' and no '.join(lacking)}" if lacking else "it is a web page"
        raise WrongAnswer(metadata.get("HTTPStatusCode", 0), what)


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


def _status(exc: botocore.exceptions.ClientError) -> int:
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(exc: botocore.exceptions.ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))
