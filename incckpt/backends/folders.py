"""The folders of a local store, and which of them are known to be durable."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

from incckpt.backends.system import SystemCalls

__all__ = ["NO_SUCH_CALL", "Folders"]

logger = logging.getLogger(__name__)

NO_SUCH_CALL = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_DURABLE_SECONDS = 1800.0  # half the age at which a collection may remove an empty folder


class Folders:
    """Makes folders, and makes folders and their entries durable.

    Parameters
    ----------
    root
        The store's folder.
    calls
        The system calls to use.
    """

    def __init__(self, root: str, calls: SystemCalls) -> None:
        self._root = root
        self.calls = calls
        self._durable: dict[str, float] = {}  # folder -> when its own name was known to be on disk
        self._sync_refused = False

    def make(self, folder: str) -> None:
        """Make a folder and its parents, durably.

        An existing folder may be another process's and not yet durable, so its parent is synced too, once.
        """
        if self._is_durable(folder):
            return
        inside = len(folder) > len(self._root)
        parent = os.path.dirname(folder)
        if inside:
            self.make(parent)
            with suppress(FileExistsError, FileNotFoundError):  # handled below
                try:
                    self.calls.make_folder(folder)
                except OSError as exc:
                    self.accept_unsynced(exc)
                self._durable[folder] = time.monotonic()
                return
        made = False
        if not self.is_one(folder):
            try:
                self._mkdir(folder)
            except FileNotFoundError:
                self.forget()  # the parent has been removed since it was made
                self.make(parent)
                self.calls.mkdir(folder)
            made = True
        try:
            self.sync(parent)
        except PermissionError:
            if made or inside:
                raise  # but folders above an existing root need not be ours to read
        self._durable[folder] = time.monotonic()

    def make_all(self, folders: Iterable[str]) -> None:
        """Make folders, durably, with one sync for those in the same folder."""
        by_parent: defaultdict[str, list[str]] = defaultdict(list)
        for folder in dict.fromkeys(folders):
            if not self._is_durable(folder):
                by_parent[os.path.dirname(folder)].append(folder)
        for parent, inside in by_parent.items():
            if len(inside) < 2 or len(parent) < len(self._root):
                for folder in inside:
                    self.make(folder)
                continue
            self.make(parent)
            for folder in inside:
                self._mkdir(folder)
            self.sync(parent)
            self._durable.update(dict.fromkeys(inside, time.monotonic()))

    def _mkdir(self, folder: str) -> None:
        """Make a folder, unless it is there."""
        try:
            self.calls.mkdir(folder)
        except FileExistsError:
            if not self.is_one(folder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None

    def forget(self) -> None:
        """Forget which folders are durable, since one has disappeared."""
        self._durable.clear()

    def settle(self, folder: str) -> None:
        """Make a folder's entries and its own name durable."""
        self.sync(folder)  # first: it fails if there is no such folder
        self._settle_name(folder)

    def _settle_name(self, folder: str) -> None:
        """Make the names of a folder and its parents durable, once each."""
        if not self._is_durable(folder):
            parent = os.path.dirname(folder)
            if len(folder) > len(self._root):
                self._settle_name(parent)
            self.sync(parent)
            self._durable[folder] = time.monotonic()

    def _is_durable(self, folder: str) -> bool:
        """Whether a folder's name is known to be on the disk.

        Only for a while: after an hour a collection may remove an empty folder, and another process make it again.
        """
        since = self._durable.get(folder)
        return since is not None and time.monotonic() - since < _DURABLE_SECONDS

    def sync(self, folder: str) -> None:
        """Make a folder's entries durable, if the file system can."""
        try:
            self.calls.sync_folder(folder)
        except OSError as exc:
            self.accept_unsynced(exc)

    def accept_unsynced(self, exc: OSError) -> None:
        """Warn once if a sync failed because this file system cannot sync folders; else raise `exc`."""
        if exc.errno not in NO_SUCH_CALL:
            raise exc
        if not self._sync_refused:
            self._sync_refused = True
            message = "%s: this file system cannot sync a folder (%s); a power cut may undo the last seconds of writes"
            logger.warning(message, f"file://{self._root}", exc.strerror)

    def is_one(self, path: str) -> bool:
        """Whether there is a folder at `path`."""
        try:
            return stat.S_ISDIR(self.calls.stat(path).st_mode)
        except OSError:
            return False  # the next call fails with the reason
