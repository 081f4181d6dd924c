"""Faults below a local store: a kill or a power cut at any system call, and a disk that keeps only what was synced."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from incckpt.backends.system import COMPOSED, SystemCalls

__all__ = ["PowerCut", "StopAt", "UnsyncedDisk"]


class _WatchedCalls(SystemCalls):
    """Sends every system call through `_call`."""

    def __init__(self, inner: SystemCalls | None = None) -> None:
        self._inner = inner if inner is not None else SystemCalls()

    def _call(self, name: str, *args: Any) -> Any:
        return getattr(self._inner, name)(*args)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name not in _SYSTEM_CALLS:
            return super().__getattribute__(name)
        return lambda *args: self._call(name, *args)


_SYSTEM_CALLS = frozenset(name for name in vars(SystemCalls) if not name.startswith("_")) - COMPOSED


class PowerCut(BaseException):
    """The process is dead. No handler of `Exception` catches this, and every later system call raises it again."""


class StopAt(_WatchedCalls):
    """Acts just before the n-th system call.

    Parameters
    ----------
    nth
        From 1. With 0 nothing happens, and `count` tells how many calls were made.
    action
        Called with the call's name, such as :func:`kill_process`. If it returns, the call is made. By default a
        `PowerCut` is raised, by this and every later call.
    only
        Shell pattern: counts only calls of matching names (``fsync``, ``link`` …).
    inner
        Makes the calls.
    """

    def __init__(
        self,
        nth: int,
        action: Callable[[str], object] | None = None,
        *,
        only: str = "*",
        inner: SystemCalls | None = None,
    ) -> None:
        super().__init__(inner)
        self._nth = nth
        self._action = action
        self._only = only
        self._lock = threading.Lock()
        self._dead = False
        self._names: list[str] = []

    @property
    def count(self) -> int:
        """Number of calls counted."""
        return len(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """The calls counted, by name, in order."""
        return tuple(self._names)

    def _call(self, name: str, *args: Any) -> Any:
        with self._lock:
            if self._dead:
                raise PowerCut(name)
            strike = False
            if fnmatchcase(name, self._only):
                self._names.append(name)
                strike = len(self._names) == self._nth
                self._dead = strike and self._action is None
        if strike:
            if self._action is None:
                raise PowerCut(name)
            self._action(name)
        return super()._call(name, *args)


class UnsyncedDisk(_WatchedCalls):
    """A disk that keeps only what POSIX guarantees.

    A file's content is durable as of its last fsync, a folder's entries as of the folder's last fsync. Whatever existed
    when the disk was made is durable.

    Parameters
    ----------
    root
        An existing folder. The store may lie in a folder below it that does not exist yet.
    skip_fsync
        The number of an fsync, from 1, that succeeds but does nothing: a mutation that tests must detect.

    Attributes
    ----------
    fsyncs
        Number of fsyncs requested.
    """

    def __init__(self, root: str | os.PathLike[str], *, skip_fsync: int = 0) -> None:
        super().__init__()
        self._root = os.path.abspath(os.fspath(root))
        self._skip_fsync = skip_fsync
        self.fsyncs = 0
        self._lock = threading.RLock()
        self._next = 0
        self._ids: dict[tuple[int, int], int] = {}  # (device, inode) -> our number, never reused as inodes are
        self._content: dict[int, bytes] = {}  # number -> durable content
        self._entries: dict[str, dict[str, int | None]] = {}  # folder -> durable entries by name; None: a folder
        self._opened: dict[int, str] = {}
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    self._content[self._number(os.stat(path))] = file.read()
            self._entries[folder] = self._now(folder)

    def crash(self, *, keep_entries: bool = False) -> None:
        """Reduce the root to what survives a power cut.

        Parameters
        ----------
        keep_entries
            Whether all changes of folders happen to be on disk already; unsynced content is lost all the same. By
            default the worst case: every change since a folder's last fsync is undone.
        """
        with self._lock:
            if keep_entries:
                for folder, _, _ in os.walk(self._root):
                    self._entries[folder] = self._now(folder)
            for name in os.listdir(self._root):
                path = os.path.join(self._root, name)
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)
            self._restore(self._root)

    def _restore(self, folder: str) -> None:
        for name, number in self._entries.get(folder, {}).items():
            path = os.path.join(folder, name)
            if number is None:
                os.mkdir(path)
                self._restore(path)
            else:
                with open(path, "wb") as file:
                    file.write(self._content.get(number, b""))

    def _call(self, name: str, *args: Any) -> Any:
        with self._lock:
            result = super()._call(name, *args)
            if name == "open":
                self._opened[result] = args[0]
                if args[1] & os.O_CREAT:
                    self._renumber(os.fstat(result))
            elif name == "fsync":
                self._synced(self._opened[args[0]])
            return result

    def _synced(self, path: str) -> None:
        self.fsyncs += 1
        if self.fsyncs == self._skip_fsync:
            return
        if os.path.isdir(path):
            self._entries[path] = self._now(path)
        else:
            with open(path, "rb") as file:
                self._content[self._number(os.stat(path))] = file.read()

    def _now(self, folder: str) -> dict[str, int | None]:
        entries: dict[str, int | None] = {}
        with os.scandir(folder) as found:
            for entry in found:
                entries[entry.name] = None if entry.is_dir() else self._number(entry.stat())
        return entries

    def _number(self, found: os.stat_result) -> int:
        inode = found.st_dev, found.st_ino
        return self._ids[inode] if inode in self._ids else self._renumber(found)

    def _renumber(self, found: os.stat_result) -> int:
        self._next += 1
        self._ids[found.st_dev, found.st_ino] = self._next
        return self._next
