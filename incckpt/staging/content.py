"""The bytes of a chunk at one moment, and the decision whether to store them in full or as a delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from incckpt.codec.objects import Digest, Encoded, digest_many
from incckpt.store.manifest import Chunk

__all__ = ["Bytes", "Content", "DeltaHistory", "LiveContent", "TextContent", "compute_digests"]

Bytes = npt.NDArray[np.uint8]

_DELTA_WORTHWHILE = 0.95  # of a full object's size; above, a second read on restore costs more than it saves
_NOTHING = np.empty(0, np.uint8)


@dataclass
class DeltaHistory:
    """The deltas stored against a full object, and when to store another full one.

    A cycle of one full object of F bytes and n deltas costs (F + d₁ + … + dₙ) / (n + 1) bytes per save. This cost falls
    as long as the next delta is smaller than it. So the cycle ends when the last delta was not: when (n + 1) dₙ -
    (d₁ + … + dₙ), which starts at d₁ and grows, has reached F.

    A chunk's `first` cycle ends earlier, at bounds spread evenly over the chunks, so that they do not all fall due in
    the same saves forever. Later cycles use F itself: the deltas of dense training grow so slowly that a bound 3 % too
    high makes a cycle four times as long (docs/decisions/005).
    """

    first: bool = True
    count: int = 0
    start: int = 0
    total: int = 0
    last: int = 0

    def add(self, nbytes: int) -> None:
        """Note a delta of `nbytes`."""
        if self.count == 0:
            self.start = nbytes
        self.count += 1
        self.total += nbytes
        self.last = nbytes

    def is_over(self, full_nbytes: int, index: int) -> bool:
        """Whether to store chunk `index`, whose full object takes `full_nbytes`, in full now."""
        bound: float = full_nbytes
        if self.first:
            bound -= index * 0.6180339887498949 % 1.0 * (full_nbytes - self.start)
        return self.count > 0 and self.last * (self.count + 1) - self.total >= bound


class Content:
    """The bytes of one chunk at one moment, immutable, and what is known about them.

    Parameters
    ----------
    raw
        ``uint8[nbytes]``; must not be written to any more.
    itemsize
        Element size for the codec.

    Attributes
    ----------
    nbytes, itemsize
        Raw length and element size.
    raw
        The bytes, or ``None`` while they are not in memory.
    digest
        Of `raw`, after `compute_digests`.
    stored
        Where it is stored, as far as this process knows. The uploader sets it, and checks it before relying on it.
    deltas
        The deltas against this content, if it is a base.
    """

    __slots__ = ("_digest", "deltas", "itemsize", "nbytes", "raw", "stored")

    def __init__(self, raw: Bytes, itemsize: int) -> None:
        self.nbytes = raw.nbytes
        self.itemsize = itemsize
        self.raw: Bytes | None = raw
        self.stored: Chunk | None = None
        self.deltas = DeltaHistory()
        self._digest: Digest | None = None

    @classmethod
    def of_full(cls, raw: Bytes, chunk: Chunk) -> Content:
        """Return the content of a full object with bytes `raw`: that of `chunk`, or of its base if it is a delta."""
        content = cls(raw, chunk.itemsize)
        base = chunk.base
        if base is None:
            content.stored = chunk
        else:
            content.stored = Chunk(base.identity, chunk.nbytes, chunk.itemsize, base.nonce, base.size)
            content.deltas.add(chunk.size)
        return content

    @property
    def digest(self) -> Digest | None:
        return self._digest

    @property
    def identity(self) -> str:
        """Identity of `raw`, 64 hexadecimal digits; needs the digest."""
        assert self._digest is not None
        return self._digest.identity.hex()

    @property
    def weight(self) -> int:
        """Bytes of memory needed to write it: room for its object."""
        return self.nbytes

    @property
    def readable(self) -> bool:
        """Whether `raw` is there once it is held."""
        return self.raw is not None

    def hold(self) -> None:
        """Keep `raw` in memory until `release`."""

    def release(self) -> None:
        """Drop what `hold` read."""

    # -- full or delta?

    def base_of(self, content: Content, index: int) -> Chunk | None:
        """Return where this content, the last full one of chunk `index`, is stored, if `content` should be a delta."""
        stored = self.stored
        if self is content or not self.readable or stored is None or stored.base is not None:
            return None
        return None if self.deltas.is_over(stored.size, index) else stored

    @staticmethod
    def is_worthwhile(encoded: Encoded) -> bool:
        """Whether an object is worth storing as it is; if not, it is a delta, and the chunk is stored in full."""
        return encoded.base is None or len(encoded.data) <= _DELTA_WORTHWHILE * encoded.full_nbytes


class LiveContent(Content):
    """A chunk of live memory, copied while it is held; the memory may change at any time.

    Everything is computed from the copy. So changing memory makes a torn checkpoint at worst, never an object that does
    not match its digest.

    Parameters
    ----------
    nbytes, itemsize
        Raw length and element size.
    read
        Returns a copy.
    """

    __slots__ = ("_read",)

    def __init__(self, nbytes: int, itemsize: int, read: Callable[[], Bytes]) -> None:
        super().__init__(_NOTHING, itemsize)
        self.nbytes = nbytes
        self.raw = None
        self._read = read

    @property
    def weight(self) -> int:
        """Bytes of memory needed to write it: the copy, and room for its object."""
        return 2 * self.nbytes

    def hold(self) -> None:
        """Copy the memory, which may have changed since the last time."""
        self.raw, self.stored, self._digest = self._read(), None, None

    def release(self) -> None:
        """Drop the copy."""
        self.raw = None


class TextContent(Content):
    """A content that is more like text than like numbers: coded with zstd, and never as a delta."""

    __slots__ = ()


def compute_digests(contents: Sequence[Content]) -> None:
    """Compute the digests of contents that have none, all in one call."""
    new = [(content, content.raw) for content in contents if content.digest is None and content.raw is not None]
    for (content, _), digest in zip(new, digest_many([raw for _, raw in new]), strict=True):
        content._digest = digest
