"""Host memory for copies of a state: arrays that are reused, but never written while anything refers to them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["HostPool", "new_buffer"]

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64


def new_buffer(nbytes: int) -> Bytes:
    """Return new memory, ``uint8[nbytes]``, aligned to 64 bytes; its contents are undefined."""
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes]


class HostPool:
    """Reusable host memory: first writing to fresh pages takes many times as long as writing to warm ones.

    Parameters
    ----------
    pinned
        Whether the memory is page-locked, for asynchronous copies from a CUDA device.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: dict[int, deque[memoryview]] = {}
        self.free_bytes = 0
        self.used_bytes = 0
        self.renew_lock()
        _pools.add(self)

    def renew_lock(self) -> None:
        """Replace the lock, which in a forked child may be held by a thread that exists only in the parent."""
        self._lock = threading.RLock()  # an array's finalizer may run inside any of these methods

    def take(self, nbytes: int) -> Bytes:
        """Return ``uint8[nbytes]`` with undefined contents; its memory is free again once its last view is gone."""
        with self._lock:
            free = self._free.get(nbytes)
            memory = free.pop() if free else None
            if memory is not None:
                self.free_bytes -= nbytes
            self.used_bytes += nbytes
        if memory is None:
            memory = self._allocate(nbytes)
        # Built on a memoryview: if it were built on another array, numpy would make its views refer to that one.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def trim(self, keep_bytes: int) -> None:
        """Return free buffers beyond `keep_bytes` to the system."""
        with self._lock:
            for nbytes in sorted(self._free):
                free = self._free[nbytes]
                while free and self.free_bytes > keep_bytes:
                    free.pop()
                    self.free_bytes -= nbytes

    def _give_back(self, memory: memoryview) -> None:
        with self._lock:
            self._free.setdefault(memory.nbytes, deque()).append(memory)
            self.free_bytes += memory.nbytes
            self.used_bytes -= memory.nbytes

    def _allocate(self, nbytes: int) -> memoryview:
        if self._pinned:
            # Name the device: a default device might not support `pin_memory`.
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True).numpy().data
        return new_buffer(nbytes).data


_pools: weakref.WeakSet[HostPool] = weakref.WeakSet()


def _renew_locks() -> None:
    for pool in list(_pools):
        pool.renew_lock()


os.register_at_fork(after_in_child=_renew_locks)
