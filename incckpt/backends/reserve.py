"""Space that a local store sets aside, since a safe deletion writes first, even on a full disk."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from incckpt.backends.system import SystemCalls

__all__ = ["Reserve"]

logger = logging.getLogger(__name__)

_NBYTES = 256 << 10  # a condemned list takes about 100 bytes for each object


class Reserve:
    """A file that is deleted when a deletion finds no space to write, and written again afterwards.

    Parameters
    ----------
    path
        Of the file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = threading.local()

    def keep(self, calls: SystemCalls) -> None:
        """Write the file if it is missing; if that fails, only warn."""
        try:
            calls.write_new(self._path, memoryview(os.urandom(_NBYTES)))  # random: some file systems compress
        except FileExistsError:
            pass
        except OSError as exc:
            with suppress(OSError):
                calls.unlink(self._path)
            logger.warning("%s: could not set space aside for deleting on a full disk: %s", self._path, exc.strerror)

    @contextmanager
    def freeing(self, calls: SystemCalls) -> Iterator[None]:
        """In this context, let this thread `release` the file."""
        if getattr(self._thread, "freeing", False):
            yield
            return
        self._thread.freeing, self._thread.released = True, False
        try:
            yield
        finally:
            self._thread.freeing = False
            if self._thread.released:
                self.keep(calls)

    def release(self, calls: SystemCalls) -> bool:
        """Delete the file if this thread is `freeing` space; return whether there is more space now."""
        if not getattr(self._thread, "freeing", False):
            return False
        try:
            calls.unlink(self._path)
        except OSError:
            return False
        self._thread.released = True
        return True
