"""A store on any other file system that fsspec knows (sftp, smb, webdav, hdfs …).

Its guarantees are unknown, so this backend promises less than the contract, and logs that once.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import fsspec

from incckpt.backends.base import Backend, Entry, ReadableBuffer, is_key, redact, validate_key, validate_prefix
from incckpt.errors import (
    BackendError,
    BackendPermissionError,
    BackendTimeoutError,
    KeyExistsError,
    KeyNotFoundError,
    MissingExtraError,
    OptionError,
)

__all__ = ["GenericBackend"]

logger = logging.getLogger(__name__)

_TIMES = ("mtime", "modified", "last_modified", "LastModified", "created")


class GenericBackend(Backend):
    """Keys below a URL of any fsspec protocol.

    ``exclusive`` is false: `create` looks and then writes. A put that is killed may leave part of its value at the key,
    and readers may see that part. Durability depends on the file system.

    Parameters
    ----------
    url
        As fsspec takes it.
    storage_options
        The file system's own options.
    """

    exclusive = False

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.url = redact(url)
        self._full_url = url
        self._options = {"use_listings_cache": False, "skip_instance_cache": True, **storage_options}
        self._instance: tuple[int, Any, str] | None = None
        self._open()
        logger.warning(
            "%s: this file system's guarantees are unknown: only one process may write or collect here, and a "
            "kill during a put may leave part of the value",
            self.url,
        )

    @property
    def place(self) -> str:
        return self._full_url.rstrip("/")

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        fs, path = self._at(key)
        size = self.head(key).size
        stop = size if end is None else min(end, size)
        if start >= stop:
            return b""
        try:
            whole = start == 0 and stop == size
            data: bytes = fs.cat_file(path) if whole else fs.cat_file(path, start=start, end=stop)
        except Exception as exc:
            raise self._error(exc, "get", key) from exc
        if len(data) != stop - start:
            message = f"{self.url}: got {len(data)} bytes of {key!r}, not the {stop - start} it has there"
            raise BackendError(errno.EIO, message, transient=True)
        return data

    def put(self, key: str, data: ReadableBuffer) -> None:
        fs, path = self._at(key)
        try:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(path, bytes(data))
        except Exception as exc:
            raise self._error(exc, "put", key, missing_is_key=False) from exc

    def create(self, key: str, data: ReadableBuffer) -> None:
        if self._is_key(key):
            raise KeyExistsError(errno.EEXIST, f"{self.url}: key {key!r} exists")
        self.put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            fs, path = self._at(key)
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                continue
            except Exception as exc:
                if self._is_key(key):
                    raise self._error(exc, "delete", key) from exc

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder, _, begin = validate_prefix(prefix).rpartition("/")
        fs, root = self._open()
        pending = [(root + folder if folder else root.rstrip("/"), begin)]
        while pending:
            current, begin = pending.pop()
            try:
                found = fs.ls(current, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except Exception as exc:
                raise self._error(exc, "list", prefix) from exc
            for info in found:
                path = str(info["name"]).rstrip("/")
                name = path.rpartition("/")[2]
                here = f"{current}/{name}" if current or root else name
                key = here[len(root) :]
                if path == current.rstrip("/") or not name.startswith(begin) or not is_key(key):
                    continue
                if info["type"] == "directory":
                    pending.append((here, ""))
                else:
                    yield self._entry(key, info)

    def head(self, key: str) -> Entry:
        fs, path = self._at(key)
        try:
            info = fs.info(path)
        except Exception as exc:
            raise self._error(exc, "head", key) from exc
        if info["type"] == "directory":
            raise KeyNotFoundError(errno.ENOENT, f"{self.url}: no key {key!r}")
        return self._entry(key, info)

    def _is_key(self, key: str) -> bool:
        try:
            self.head(key)
        except KeyNotFoundError:
            return False
        return True

    def _open(self) -> tuple[Any, str]:
        """Return this process's file system and the prefix of its paths; an instance does not survive a fork."""
        if self._instance is None or self._instance[0] != os.getpid():
            try:
                fs, root = fsspec.core.url_to_fs(self._full_url, **self._options)
            except ImportError as exc:
                raise MissingExtraError(f"{self.url}: {exc}") from exc
            except ValueError as exc:
                raise OptionError(f"{self.url}: {self._scrub(str(exc))}") from exc
            except Exception as exc:
                raise self._error(exc, "open", "") from exc
            # The root of an archive is "", that of a server "/".
            self._instance = os.getpid(), fs, f"{str(root).rstrip('/')}/" if root else ""
        return self._instance[1], self._instance[2]

    def _at(self, key: str) -> tuple[Any, str]:
        validate_key(key)
        fs, root = self._open()
        return fs, root + key

    def _entry(self, key: str, info: Mapping[str, Any]) -> Entry:
        modified = next((info[name] for name in _TIMES if info.get(name) is not None), None)
        if isinstance(modified, datetime):
            modified = modified.timestamp()
        return Entry(key, int(info["size"] or 0), float(modified) if isinstance(modified, int | float) else None)

    def _scrub(self, text: str) -> str:
        """Return the file system's message without the password that the URL may contain."""
        return text.replace(self._full_url, self.url)

    def _error(self, exc: Exception, verb: str, key: str, *, missing_is_key: bool = True) -> BackendError:
        code = exc.errno if isinstance(exc, OSError) and exc.errno is not None else errno.EIO
        message = f"{self.url}: cannot {verb} {key!r}: {type(exc).__name__}: {self._scrub(str(exc))}"
        if isinstance(exc, FileNotFoundError) and missing_is_key:
            return KeyNotFoundError(errno.ENOENT, f"{self.url}: no key {key!r}")
        if isinstance(exc, PermissionError):
            return BackendPermissionError(code, message)
        if isinstance(exc, TimeoutError):
            return BackendTimeoutError(errno.ETIMEDOUT, message, transient=True)
        return BackendError(code, message, transient=isinstance(exc, ConnectionError | EOFError))
