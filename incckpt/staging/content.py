"""The bytes of a chunk at one moment, and whether the next ones are stored in full or as a delta."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from incckpt.codec.objects import Digest
from incckpt.store.manifest import Chunk

__all__ = ["Bytes", "Content", "DeltaHistory"]

Bytes = npt.NDArray[np.uint8]


@dataclass
class DeltaHistory:
    """The deltas stored against a full object, and when it is time for another full one.

    A cycle of one full object and n deltas costs (F + d₁ + … + dₙ) / (n + 1) bytes a save. This falls while the next
    delta is smaller than it, so the cycle ends when the last delta was not: when (n + 1) dₙ - (d₁ + … + dₙ), which is
    d₁ at first and grows, has reached F.

    A chunk's `first` cycle ends on the way there, evenly spread over the chunks, so that not all of them are due at
    once ever after. Later ones do not: deltas of dense training grow so slowly that, of the cost, 3 % more make a cycle
    four times as long.
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
        """Whether chunk `index`, whose full object takes `full_nbytes`, should be stored in full now."""
        bound: float = full_nbytes
        if self.first:
            bound -= index * 0.6180339887498949 % 1.0 * (full_nbytes - self.start)
        return self.count > 0 and self.last * (self.count + 1) - self.total >= bound


class Content:
    """The bytes of one chunk at one moment, immutable, and what is known of them.

    Attributes
    ----------
    nbytes, itemsize
        Raw length and element size.
    raw
        ``uint8[nbytes]``, or ``None`` once only the stored copy is of use.
    digest
        Of `raw`, when it has been computed.
    stored
        Where it is stored, as far as this process knows; a save checks that before it relies on it.
    deltas
        The deltas against it, if it is a base.
    """

    __slots__ = ("_memory", "deltas", "digest", "itemsize", "nbytes", "raw", "stored")

    def __init__(self, raw: Bytes, itemsize: int, memory: object = None) -> None:
        self.nbytes = raw.nbytes
        self.itemsize = itemsize
        self.raw: Bytes | None = raw
        self._memory = memory  # kept alive, where `raw` does not do so itself
        self.digest: Digest | None = None
        self.stored: Chunk | None = None
        self.deltas = DeltaHistory()

    @property
    def identity(self) -> str:
        """Identity of `raw`, 64 hexadecimal digits, once there is a digest."""
        assert self.digest is not None
        return self.digest.identity.hex()
