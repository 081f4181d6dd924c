"""A small disk for a local store, which fills up."""

from __future__ import annotations

import errno
import os

from incckpt.backends.system import SystemCalls

__all__ = ["SmallDisk"]

_BLOCK = 4096


class SmallDisk(SystemCalls):
    """Makes and writes files and folders while they fit, and then fails with ENOSPC.

    Parameters
    ----------
    root
        The folder that stands for the disk. A file or folder takes whole blocks, at least one.
    nbytes
        Size of the disk.
    """

    def __init__(self, root: str | os.PathLike[str], nbytes: int) -> None:
        self._root = os.fspath(root)
        self._blocks = nbytes // _BLOCK

    @property
    def free(self) -> int:
        """Bytes left, in whole blocks."""
        used = 0
        for folder, folders, names in os.walk(self._root):
            used += len(folders)
            for name in names:
                used += _blocks(os.stat(os.path.join(folder, name)).st_size)
        return (self._blocks - used) * _BLOCK

    def _take(self, blocks: int, path: str | None = None) -> None:
        if blocks * _BLOCK > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open; a new file takes a block."""
        if flags & os.O_CREAT and not os.path.exists(path):
            self._take(1, path)
        return super().open(path, flags, mode)

    def write(self, fd: int, data: memoryview) -> int:
        """Write, if it fits."""
        size = os.fstat(fd).st_size
        self._take(_blocks(size + len(data)) - _blocks(size))
        return super().write(fd, data)

    def room(self, path: str) -> int:
        """Return `free`."""
        return self.free

    def mkdir(self, path: str) -> None:
        """Make a folder, if it fits."""
        self._take(1, path)
        super().mkdir(path)


def _blocks(nbytes: int) -> int:
    return max(1, -(-nbytes // _BLOCK))
