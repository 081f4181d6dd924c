"""SHA-256 of the frames of many chunks in one call, without the interpreter's lock.

:mod:`hashlib` releases and takes the lock for every frame, and may put the training thread to sleep each time
(docs/decisions/007). So where a processor has instructions for SHA-256, this module hashes two frames at a time with
them (docs/decisions/040); elsewhere it calls the same OpenSSL function as :mod:`hashlib` directly, if it finds it, and
else :mod:`hashlib`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Sequence
from typing import Final

from incckpt.codec import _sha256
from incckpt.codec.frames import FRAME_BYTES

__all__ = ["frame_digests"]

log = logging.getLogger(__name__)


def _answers_right() -> bool:
    """Whether the processor's instructions give what :mod:`hashlib` does: an emulator or a compiler may be wrong."""
    if not _sha256.PAIRED:
        return False
    texts = [bytes(range(size)) for size in (0, 3, 55, 56, 64, 129, 247)]
    if _sha256.digests(texts, FRAME_BYTES, 0) == [hashlib.sha256(text).digest() if text else b"" for text in texts]:
        return True
    log.warning("this processor's instructions for SHA-256 give wrong digests; hashing without them takes longer")
    return False


def _find_sha256() -> int:
    """Return the address of ``SHA256`` in the OpenSSL that Python has loaded, or 0."""
    try:
        import _hashlib

        library = ctypes.CDLL(getattr(_hashlib, "__file__", None))
        address = ctypes.cast(library.SHA256, ctypes.c_void_p).value or 0
    except (ImportError, OSError, AttributeError, TypeError) as error:
        log.info(
            "OpenSSL cannot be called directly (%s); hashing takes the interpreter's lock anew for each MiB", error
        )
        return 0
    return address


_PAIRED: Final = _answers_right()
_SHA256: Final = 0 if _PAIRED else _find_sha256()


def frame_digests(chunks: Sequence[memoryview]) -> list[bytes]:
    """Return, for each chunk, the concatenated SHA-256 digests of its frames, 32 bytes each.

    Parameters
    ----------
    chunks
        ``uint8[n]`` each; a chunk's last frame may be shorter.
    """
    if _PAIRED or _SHA256:
        return _sha256.digests(chunks, FRAME_BYTES, _SHA256)
    return [
        b"".join(
            hashlib.sha256(raw[start : start + FRAME_BYTES]).digest() for start in range(0, raw.nbytes, FRAME_BYTES)
        )
        for raw in chunks
    ]
