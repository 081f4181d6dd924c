"""From a URL to a backend."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeAlias
from urllib.parse import unquote

from incckpt.backends.base import Backend, redact
from incckpt.backends.retry import RetryBackend
from incckpt.backends.secrets import HidingBackend, Secrets
from incckpt.errors import MissingExtraError, OptionError
from incckpt.messages import shown
from incckpt.options import checked_mapping

__all__ = ["BackendFactory", "check_url", "open_backend"]

BackendFactory: TypeAlias = Callable[[str, Mapping[str, Any]], Backend]

ENTRY_POINT_GROUP = "incckpt.backends"

# Two letters at least: `C:` is a drive.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CHAIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)::")
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/?)")
_FILE = re.compile(r"(?i)file:(//(localhost)?/|/(?!/))")
_CACHES = frozenset({"blockcache", "cached", "filecache", "simplecache"})

# scheme -> module in this package, which is also the name of the extra that it needs
_REMOTE = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "http": "http",
    "https": "http",
}
_SCHEMES = ("file", "memory", *_REMOTE)


def open_backend(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Backend:
    """Return the backend for `url`; nothing is requested or created yet.

    Parameters
    ----------
    url
        A path, or a URL, in which a ``#`` has no special meaning. Schemes are ``file://`` (percent-encoded, as
        `pathlib.Path.as_uri` gives it), ``memory://``, ``s3://``, ``gs://``, ``gcs://``, ``az://``, ``abfs://``,
        ``abfss://``, ``http://`` and ``https://``; those that installed packages register in the entry-point group
        ``incckpt.backends`` (a callable that takes the URL and the options, named after the scheme); and fsspec's other
        protocols, where only one process may write to a store. Transient failures of a remote store are retried for up
        to three minutes.
    storage_options
        Passed to the file system (fsspec's names: ``key``, ``secret``, ``endpoint_url``, ``token`` …). For S3, GCS,
        Azure and HTTP, ``request_timeout`` is the time in seconds that a request may take besides moving bytes,
        60 by default.

    Raises
    ------
    OptionError
        If the URL cannot be opened; names it.
    MissingExtraError
        If the scheme needs a package that is not installed; names the extra.
    """
    text, options = os.fspath(url), checked_mapping("storage_options", storage_options)
    secrets = Secrets(text, options)
    try:
        backend = _open(text, options)
    except Exception as error:
        clean = secrets.without(error)
        if clean is error:
            raise
    else:
        hiding = HidingBackend(backend, secrets) if secrets else backend
        return RetryBackend(hiding) if backend.remote and not isinstance(backend, RetryBackend) else hiding
    raise clean from clean.__cause__  # out of the handler, where it would be chained to what it hides


def check_url(text: str) -> None:
    """Check that `text` is a path or a URL, and not a misspelt one.

    Raises
    ------
    OptionError
        If it is not; names it, and what to write instead.
    """
    if not text or "\0" in text:
        raise OptionError(f"not a store: {shown(text)}; give a path or a URL such as s3://bucket/prefix")
    try:
        os.fsencode(text)
    except UnicodeError as error:
        raise OptionError(f"not a store: {shown(text)} has characters that no path or URL can have") from error
    stripped = text.strip()
    if _SCHEME.match(stripped) and (text != stripped or not stripped.isprintable()):
        raise OptionError(f"spaces or control characters around or in the URL: {redact(text)!r}")
    if _FILE.match(text):
        return
    if text[:7].lower() == "file://":
        raise OptionError(f"a file URL needs an absolute path, such as file:///data/run, not {redact(text)}")
    chain = _CHAIN.match(text)
    if chain is not None and chain[1].lower() in _CACHES:
        raise OptionError(f"{redact(text)}: a cache may show an outdated store; pass the URL without {chain[1]}::")
    match = _ONE_SLASH.match(text)
    if match is None or chain is not None or _SCHEME.match(text):
        return
    if match[2] or match[1].lower() in _SCHEMES:
        raise OptionError(
            f"a URL has two slashes after '{match[1]}:', as {redact(f'{match[1]}://{text[match.end() :]}')}; known are "
            f"{', '.join(f'{scheme}://' for scheme in _SCHEMES)} and fsspec's protocols. (To name a folder "
            f"{match[1]}:, begin with './')"
        )


def _open(text: str, options: dict[str, Any]) -> Backend:
    check_url(text)
    file = _FILE.match(text)
    if file is not None:
        return _open_local(unquote("/" + text[file.end() :], errors="surrogateescape"), options)
    match = _CHAIN.match(text) or _SCHEME.match(text)
    if match is None:
        return _open_local(text, options)
    scheme = match[1].lower()
    rest = text[match.end() :]
    text = scheme + text[match.end(1) :]
    if scheme == "memory":
        from incckpt.backends.memory import MemoryBackend

        _refuse_options(text, options)
        return MemoryBackend(rest)
    if scheme in _REMOTE:
        return _factory(_REMOTE[scheme])(text, options)
    for point in entry_points(group=ENTRY_POINT_GROUP, name=scheme):
        backend = point.load()(text, options)
        if not isinstance(backend, Backend):
            raise OptionError(f"the entry point {point.value} for {scheme}:// returned {type(backend)}, not a Backend")
        return backend
    from incckpt.backends.generic import GenericBackend

    return GenericBackend(text, options)


def _open_local(path: str, options: dict[str, Any]) -> Backend:
    from incckpt.backends.local import LocalBackend

    if "\0" in path:
        raise OptionError(f"not a path: {path!r}")
    _refuse_options(path, options)
    return LocalBackend(os.path.expanduser(path))


def _refuse_options(url: str, options: dict[str, Any]) -> None:
    if options:
        raise OptionError(f"{redact(url)} takes no storage_options; given: {', '.join(sorted(options))}")


def _factory(name: str) -> BackendFactory:
    try:
        opener: BackendFactory = import_module(f"incckpt.backends.{name}").open_url
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing == "incckpt":
            raise
        message = f'{name} stores need the package {missing}: pip install "incckpt[{name}]"'
        raise MissingExtraError(message, name=missing) from exc
    return opener
