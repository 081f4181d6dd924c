"""The client of an S3 store: s3fs's session, our settings, and requests signed for direct sending."""

from __future__ import annotations

import functools
import io
import os
import ssl
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import aiobotocore.session
import botocore.config
import botocore.httpsession
import botocore.loaders
import botocore.utils
import s3fs

from incckpt.backends.base import REMOTE_REQUESTS
from incckpt.backends.direct import Connections, SignedRequest
from incckpt.backends.remote import CONNECTING
from incckpt.errors import OptionError

__all__ = ["Body", "Session", "client_config"]

_CONFIG: dict[str, Any] = {
    "connect_timeout": 15,
    "max_pool_connections": REMOTE_REQUESTS,
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    # The body's checksum and signature cost more than sending it; TLS protects it, and every read checks SHA-256.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "s3": {"payload_signing_enabled": False},
    "tcp_keepalive": True,
}


def client_config() -> dict[str, Any]:
    """Return our settings for botocore's client, for s3fs's ``config_kwargs``; only those that this botocore knows."""
    known = botocore.config.Config.OPTION_DEFAULTS
    return {name: value for name, value in _CONFIG.items() if name in known}


class Session:
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
            if self._fs.session is None:  # as s3fs does, except for the loader
                session = aiobotocore.session.AioSession(**self._fs.kwargs)
                session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
                self._fs.session = session
            self._opened = await self._fs.set_session()
        except (TypeError, ValueError) as exc:
            raise OptionError(f"s3fs refuses the storage_options: {exc}") from exc

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make one request, with those of s3fs's additional parameters that the operation takes."""
        return await self._call(await self._fs.get_s3(self._bucket), operation, parameters)

    async def sign(self, operation: str, **parameters: Any) -> SignedRequest | None:
        """Return `call`'s request, signed; ``None`` if only the client can send it (through a proxy, for example)."""
        client = await self._fs.get_s3(self._bucket)
        if self._direct is None:
            config, url = client.meta.config, client.meta.endpoint_url
            self._direct = not (config.client_cert or config.proxies or botocore.utils.get_environ_proxies(url))
        if not self._direct:
            return None
        signing = _signing.set(True)
        try:
            await self._call(client, operation, parameters)
        except _SignedError as signed:
            request = signed.request
            if request.body not in (None, b"", parameters.get("Body")):
                return None  # the client has wrapped the body, with checksums for example
            headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
            return SignedRequest(request.method, request.url, headers)
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
                self._connections = Connections(
                    limit=REMOTE_REQUESTS, connecting=CONNECTING, tls=functools.partial(_tls, verify)
                )
            return self._connections

    async def _call(self, client: Any, operation: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        takes = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation]).input_shape
        additional = {**self._fs.s3_additional_kwargs, **self._fs.req_kw}
        chosen = {name: value for name, value in additional.items() if name in takes.members}
        client.meta.events.register("before-send.s3", _before_send, unique_id="incckpt")
        reply: dict[str, Any] = await getattr(client, operation)(Bucket=self._bucket, **chosen, **parameters)
        return reply

    async def close(self) -> None:
        """Close the client's connections."""
        with self._lock:
            if self._connections is not None:
                self._connections.close()
        if self._opened is not None:
            await self._opened.close()


class _SignedError(Exception):
    """Not an error: carries a request out of the client, ready to be sent."""

    def __init__(self, request: Any) -> None:
        super().__init__("signed")
        self.request = request


_signing: ContextVar[bool] = ContextVar("_signing", default=False)


def _before_send(request: Any, **_: Any) -> None:
    """Have no cache answer in the server's place; keep the client from sending what was only to be signed."""
    if request.method in ("GET", "HEAD"):  # after the signature: a proxy may change it
        request.headers["Cache-Control"] = "no-cache"
    if _signing.get():
        raise _SignedError(request)


@functools.cache
def _loader(data_path: str | None) -> Any:
    """Return a loader that keeps botocore's service descriptions, so that the next client takes half the time."""
    return botocore.loaders.create_loader(data_path)


def _tls(verify: bool | str) -> ssl.SSLContext:
    """Return a context that verifies servers as botocore does.

    Parameters
    ----------
    verify
        Whether to verify them, or a file of certificates to do so by.
    """
    context: ssl.SSLContext = botocore.httpsession.create_urllib3_context()
    if verify:
        context.check_hostname = True
        context.load_verify_locations(botocore.httpsession.get_cert_path(verify))
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Body(io.RawIOBase):
    """A body for botocore, which asks for its length, and reads it only if it must sign it."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
