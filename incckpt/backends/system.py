"""The system calls of a local store, as one object that tests can replace.

:mod:`incckpt.testing.faults` has replacements that fail or kill the process at the n-th call, and one that models what
survives a power cut.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial

from incckpt.backends import _files

__all__ = ["ADVICE", "COMPOSED", "NativeCalls", "SystemCalls", "UnsyncedCalls"]

COMPOSED = frozenset({"make_folder", "read_folder", "sync_folder", "write_new", "write_over"})
"""The methods of `SystemCalls` that combine others."""

ADVICE = {
    errno.ENOSPC: "the file system is full: free space, or prune checkpoints",
    errno.EDQUOT: "the disk quota is used up: free space, or prune checkpoints",
    errno.EROFS: "the file system is mounted read-only: to read, make the manager with read_only=True",
    errno.EIO: "the device failed: look at the system's log before trusting it again",
    errno.EACCES: "the process may not use this path",
    errno.EPERM: "the process may not use this path",
    errno.EISDIR: "a folder is in the way",
    errno.ENOTDIR: "a file is in the way of a folder",
    errno.ENOENT: "the folder was removed meanwhile",
}
"""What an `errno` means for the user, and what to do."""

_AT_FDCWD = -100
_LINUX_NOREPLACE = 1
_MACOS_EXCL = 4


@cache
def _exclusive_rename() -> Callable[[bytes, bytes], int] | None:
    """Return the C library's rename that refuses to replace, as a function of two paths; ``None`` if it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        renamex = getattr(libc, "renamex_np", None)
        if renamex is None:
            return None
        renamex.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
        return lambda source, target: int(renamex(source, target, _MACOS_EXCL))
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is None:
        return None
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return lambda source, target: int(renameat2(_AT_FDCWD, source, _AT_FDCWD, target, _LINUX_NOREPLACE))


class SystemCalls:
    """Each method makes one system call, or combines other methods; it raises `OSError` as :mod:`os` does."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open a file or folder; `mode` is narrowed by the umask."""
        return os.open(path, flags, mode)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write(self, fd: int, data: memoryview) -> int:
        """Write at the descriptor's position; return the number of bytes written, perhaps fewer than given."""
        return os.write(fd, data)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """Read at `offset`; perhaps fewer bytes than asked for, none at the end."""
        return os.pread(fd, nbytes, offset)

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read at `offset` into `buffer`; return the number of bytes read, perhaps fewer than fit, 0 at the end."""
        if hasattr(os, "preadv"):
            return os.preadv(fd, [buffer], offset)
        data = os.pread(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def fstat(self, fd: int) -> os.stat_result:
        """Describe an open file."""
        return os.fstat(fd)

    def stat(self, path: str) -> os.stat_result:
        """Describe what a path leads to."""
        return os.stat(path)

    def fsync(self, fd: int) -> None:
        """Make an open file's content, or an open folder's entries, durable.

        macOS's own fsync leaves the data in the drive's cache; F_FULLFSYNC does not.
        """
        if sys.platform == "darwin":
            import fcntl

            try:
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
            except OSError as exc:
                if exc.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                    raise
        os.fsync(fd)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; EEXIST if the name is taken."""
        os.link(source, target)

    def rename_new(self, source: str, target: str) -> None:
        """Rename a file unless the new name is taken (EEXIST); ENOTSUP where the system cannot."""
        rename = _exclusive_rename()
        if rename is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), target)
        if rename(os.fsencode(source), os.fsencode(target)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), target)

    def replace(self, source: str, target: str) -> None:
        """Rename a file over whatever has the new name."""
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make a folder."""
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Remove a folder, if it is empty."""
        os.rmdir(path)

    def room(self, path: str) -> int | None:
        """Return the bytes left for files in folder `path`; ``None`` where the file system has no size."""
        found = shutil.disk_usage(path)
        return found.free if found.total else None

    def scandir(self, path: str) -> list[os.DirEntry[str]]:
        """Read a folder's entries."""
        with os.scandir(path) as entries:
            return list(entries)

    def make_folder(self, path: str) -> None:
        """Make a folder and sync its parent, which makes its name durable; after an error it may exist."""
        self.mkdir(path)
        self.sync_folder(os.path.dirname(path))

    def read_folder(self, path: str) -> tuple[list[tuple[str, bool]], int, int]:
        """Return a folder's entries as (name, is a folder), and its modification time before and after, in ns."""
        before = self.stat(path).st_mtime_ns
        names = [(entry.name, entry.is_dir()) for entry in self.scandir(path)]
        return names, before, self.stat(path).st_mtime_ns

    def write_new(self, path: str, data: memoryview) -> None:
        """Create a file with `data` (flat bytes) as its content, durably.

        After an error other than `FileExistsError` the file may hold part of the data.
        """
        fd = self._filled(path, data)
        try:
            self.fsync(fd)
        finally:
            self.close(fd)

    def _filled(self, path: str, data: memoryview) -> int:
        fd = self.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = 0
            while written < len(data):
                written += self.write(fd, data[written:])
        except BaseException:
            self.close(fd)
            raise
        return fd

    def sync_folder(self, path: str) -> None:
        """Make the entries of a folder durable."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        finally:
            self.close(fd)

    def write_over(self, files: Sequence[tuple[str, str, memoryview]]) -> None:
        """Write `files` (temporary path, path, data) durably, over existing ones, step by step for all together.

        They are open at once. An error names one of the paths or their folder; any of the files may be complete then.
        """
        opened: list[tuple[int, str]] = []
        try:
            for temporary, _, data in files:
                opened.append((self._filled(temporary, data), temporary))
            while opened:
                fd, temporary = opened[0]
                _named(temporary, partial(self.fsync, fd))
                self.close(opened.pop(0)[0])
        finally:
            for fd, _ in opened:
                self.close(fd)
        for temporary, path, _ in files:
            self.replace(temporary, path)
        for folder in dict.fromkeys(os.path.dirname(path) for _, path, _ in files):
            _named(folder, partial(self.sync_folder, folder))


def _named(path: str, call: Callable[[], None]) -> None:
    """Call, and have an error name `path`."""
    try:
        call()
    except OSError as exc:
        exc.filename = path
        raise


class NativeCalls(SystemCalls):
    """The same, but combined calls do not take the interpreter's lock in between."""

    def make_folder(self, path: str) -> None:
        """See `SystemCalls`."""
        _files.make_folder(path)

    def read_folder(self, path: str) -> tuple[list[tuple[str, bool]], int, int]:
        """See `SystemCalls`."""
        return _files.read_folder(path)

    def write_new(self, path: str, data: memoryview) -> None:
        """See `SystemCalls`."""
        _files.write_new(path, data)

    def sync_folder(self, path: str) -> None:
        """See `SystemCalls`."""
        _files.sync_folder(path)

    def write_over(self, files: Sequence[tuple[str, str, memoryview]]) -> None:
        """See `SystemCalls`."""
        _files.write_over(files)


class UnsyncedCalls(SystemCalls):
    """Calls for a file system that cannot sync: syncing does nothing.

    Parameters
    ----------
    calls
        Makes all other calls.
    """

    def __init__(self, calls: SystemCalls) -> None:
        for name in vars(SystemCalls).keys() - COMPOSED - {"fsync"}:
            if not name.startswith("_"):
                setattr(self, name, getattr(calls, name))

    def fsync(self, fd: int) -> None:
        """Do nothing."""
