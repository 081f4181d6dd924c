"""States whose memory is mapped files: read for as long as a chunk is worked on, then let go of again.

A file that is mapped takes no memory until it is read; what was read counts as this process's until it is let go of.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from incckpt.codec.objects import digest_many
from incckpt.errors import StateError
from incckpt.staging.baseline import Baseline, ChunkSegments
from incckpt.staging.content import Bytes, Content, LiveContent
from incckpt.staging.hostmem import HostPool
from incckpt.staging.layout import DEFAULT_CHUNK_BYTES, Layout
from incckpt.state.flatten import FlatState

__all__ = ["FileBaseline", "FileContent", "Mappings", "file_contents"]

log = logging.getLogger(__name__)

_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class Mappings:
    """Where files are mapped into this process, as far as the system tells: elsewhere than on Linux nowhere.

    Parameters
    ----------
    paths
        The files, or their descriptors, mapped by now.
    """

    def __init__(self, paths: Iterable[Path | int]) -> None:
        self._spans: list[tuple[int, int]] = []
        if sys.platform != "linux" or _DONTNEED is None:
            return
        wanted = {(os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino) for stat in map(os.stat, paths)}
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                addresses, _, _, device, inode, *_ = line.split(maxsplit=5)
                major, _, minor = device.partition(":")
                if (int(major, 16), int(minor, 16), int(inode)) in wanted:
                    low, _, high = addresses.partition("-")
                    self._spans.append((int(low, 16), int(high, 16)))
        self._spans.sort()

    def release(self, address: int, nbytes: int) -> None:
        """Let go of memory, if it is that of a file: it is read from there again when it is asked for."""
        place = bisect_right(self._spans, (address, sys.maxsize)) - 1
        if place < 0 or address + nbytes > self._spans[place][1] or not nbytes:
            return
        low = address - address % mmap.PAGESIZE
        high = min(address + nbytes + -(address + nbytes) % mmap.PAGESIZE, self._spans[place][1])
        # These pages are private to this process and never written: none of them differs from the file.
        _advise()(low, high - low, _DONTNEED)


@functools.cache
def _advise() -> Callable[[int, int, int | None], int]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


class FileContent(LiveContent):
    """A chunk of a file, in memory while it is held. The file does not change."""

    __slots__ = ()

    @property
    def weight(self) -> int:
        """Bytes of memory that writing it takes: the copy, that of its base, and room for its object."""
        return 3 * self.nbytes

    @property
    def readable(self) -> bool:
        return True

    def hold(self) -> None:
        """Read the chunk.

        Raises
        ------
        StateError
            If it is not what it was when it was read before.
        """
        self.raw = self._read()
        known = self._digest
        if known is not None and digest_many([self.raw])[0].identity != known.identity:
            self.raw = None
            raise StateError("a file was changed while it was imported; import it again when nothing writes to it")


def file_contents(
    flat: FlatState, layout: Layout, mappings: Mappings, progress: Callable[[int], None]
) -> list[FileContent]:
    """Return the contents of a state that lies in mapped files.

    Parameters
    ----------
    progress
        Called with the bytes of each chunk when it is read for the first time, from any thread.
    """
    table = layout.table
    source = layout.addresses(flat.ranges)
    segments = ChunkSegments(table, source, flat.ranges)
    first = np.searchsorted(table.seg_chunk, np.arange(len(table.chunk_nbytes) + 1))
    pool = HostPool()
    new = np.ones(len(table.chunk_nbytes), np.bool_)

    def read(index: int) -> Bytes:
        out = pool.take(int(table.chunk_nbytes[index]))
        segments.copy(index, out, torch.Tensor.copy_)
        own = slice(first[index], first[index + 1])
        for address, nbytes in zip(source[own].tolist(), table.seg_nbytes[own].tolist(), strict=True):
            mappings.release(address, nbytes)
        if new[index]:
            new[index] = False
            progress(out.nbytes)
        return out

    sizes = zip(table.chunk_nbytes.tolist(), table.chunk_itemsize.tolist(), strict=True)
    return [
        FileContent(nbytes, itemsize, functools.partial(read, index)) for index, (nbytes, itemsize) in enumerate(sizes)
    ]


class FileBaseline(Baseline):
    """The base of an import: chunks of the files before, read again where a delta is made against them."""

    def __init__(self) -> None:
        super().__init__(DEFAULT_CHUNK_BYTES, keep=False)
        self._stored: tuple[Layout | None, list[Content | None]] = None, []

    def settle(self, layout: Layout, contents: Sequence[Content]) -> None:
        """Note that a file's contents are stored: full objects become the base."""
        last, fulls = self._stored
        if layout is not last:
            fulls = [None] * len(contents)
        self._stored = layout, [_newer(old, new) for old, new in zip(fulls, contents, strict=True)]

    def full(self, layout: Layout, index: int) -> Content | None:
        """Return the content of the last full object of chunk `index`, if a delta may be against it."""
        last, fulls = self._stored
        return fulls[index] if layout is last else None


def _newer(old: Content | None, new: Content) -> Content | None:
    """Return which of two contents of a chunk, stored one after the other, is its last full object."""
    assert new.stored is not None
    if new.stored.base is not None or (old is not None and old.stored == new.stored):
        return old
    new.deltas.first = old is None
    return new
