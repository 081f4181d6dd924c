"""A store in this process's memory: fsspec's memory file system with a lock, for tests and examples."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from incckpt.backends.base import Backend, Entry, ReadableBuffer, validate_key, validate_prefix
from incckpt.errors import BackendError, KeyExistsError, KeyNotFoundError

__all__ = ["MemoryBackend"]

_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # a thread of the parent may have held it at the fork


os.register_at_fork(after_in_child=_renew_lock)


class MemoryBackend(Backend):
    """Keys below ``memory://name``, shared by every backend of that name in the process; gone when it ends.

    Parameters
    ----------
    root
        What follows ``memory://``.
    """

    remote = False

    def __init__(self, root: str) -> None:
        name = root.strip("/")
        self._root = f"/{name}/" if name else "/"
        self._fs: Any = MemoryFileSystem()
        self.url = f"memory://{name}"

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        path = self._path(key)
        with _lock, self._file(key, path).getbuffer() as view:
            return bytes(view[start:end])

    def put(self, key: str, data: ReadableBuffer) -> None:
        path = self._path(key)
        with _lock:
            self._store(key, path, data)

    def create(self, key: str, data: ReadableBuffer) -> None:
        path = self._path(key)
        with _lock:
            if path in self._fs.store:
                raise KeyExistsError(errno.EEXIST, f"{self.url}: key {key!r} exists")
            self._store(key, path, data)

    def probe_exclusive(self) -> bool:
        """Return `exclusive` without a test: the lock guarantees it."""
        return self.exclusive

    def delete(self, keys: Iterable[str]) -> None:
        paths = [self._path(key) for key in keys]
        with _lock:
            for path in paths:
                self._fs.store.pop(path, None)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        begin = self._root + validate_prefix(prefix)
        with _lock:
            found = [
                Entry(path[len(self._root) :], file.size, file.modified.timestamp())
                for path, file in self._fs.store.items()
                if path.startswith(begin)
            ]
        yield from found

    def head(self, key: str) -> Entry:
        path = self._path(key)
        with _lock:
            file = self._file(key, path)
            return Entry(key, file.size, file.modified.timestamp())

    def _path(self, key: str) -> str:
        return self._root + validate_key(key)

    def _file(self, key: str, path: str) -> Any:
        try:
            return self._fs.store[path]
        except KeyError:
            raise KeyNotFoundError(errno.ENOENT, f"{self.url}: no key {key!r}") from None

    def _store(self, key: str, path: str, data: ReadableBuffer) -> None:
        try:
            self._fs.pipe_file(path, memoryview(data).cast("B"))
        except OSError as exc:
            raise BackendError(errno.EISDIR, f"{self.url}: cannot put {key!r}: a folder or file is in the way") from exc
