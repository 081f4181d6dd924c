"""Host memory for copies of a state: buffers that are recycled, and never written while anything refers to them."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["HostBuffer", "HostPool", "new_buffer"]

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64


def new_buffer(nbytes: int) -> Bytes:
    """Return new memory, ``uint8[nbytes]``, aligned to 64 bytes; its contents are undefined."""
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes]


class HostPool:
    """Recycled host memory: the first touch of fresh pages costs many times what writing to warm ones does.

    Parameters
    ----------
    pinned
        Page-locked memory, for asynchronous copies from a CUDA device.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: dict[int, deque[Bytes]] = {}
        self.free_bytes = 0
        self.used_bytes = 0
        self._lock = threading.RLock()  # a buffer's finalizer may run inside any of these methods

    def take(self, nbytes: int) -> HostBuffer:
        """Return a buffer of `nbytes` whose contents are undefined."""
        with self._lock:
            free = self._free.get(nbytes)
            array = free.pop() if free else None
            if array is not None:
                self.free_bytes -= nbytes
            self.used_bytes += nbytes
        if array is None:
            array = self._allocate(nbytes)
        return HostBuffer(array, self)

    def trim(self, keep_bytes: int) -> None:
        """Give free buffers beyond `keep_bytes` back to the system."""
        with self._lock:
            for nbytes in sorted(self._free):
                free = self._free[nbytes]
                while free and self.free_bytes > keep_bytes:
                    free.pop()
                    self.free_bytes -= nbytes

    def _give_back(self, array: Bytes) -> None:
        with self._lock:
            self._free.setdefault(array.nbytes, deque()).append(array)
            self.free_bytes += array.nbytes
            self.used_bytes -= array.nbytes

    def _allocate(self, nbytes: int) -> Bytes:
        if self._pinned:
            pinned: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
            return pinned
        return new_buffer(nbytes)


class HostBuffer:
    """A buffer of a pool; goes back to it when the last reference to this object is dropped.

    Whoever uses `array` keeps this object alive meanwhile.
    """

    __slots__ = ("_pool", "array")

    def __init__(self, array: Bytes, pool: HostPool) -> None:
        self.array = array
        self._pool = pool

    def __del__(self) -> None:
        self._pool._give_back(self.array)
