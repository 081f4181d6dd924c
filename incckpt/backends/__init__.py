"""Where checkpoints live: bytes by key below one URL.

:func:`open_backend` turns a URL into a :class:`Backend`; :mod:`incckpt.backends.base` is the contract that each keeps.
"""

from incckpt.backends.base import Backend, Entry, Leftover, ReadableBuffer, validate_key, validate_prefix
from incckpt.backends.registry import open_backend

__all__ = ["Backend", "Entry", "Leftover", "ReadableBuffer", "open_backend", "validate_key", "validate_prefix"]
