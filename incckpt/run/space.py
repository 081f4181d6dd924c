"""Whether a save fits into the room that its store's disk has left, before anything of it is put."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence

from incckpt.backends.base import Backend
from incckpt.codec import objects as codec
from incckpt.errors import BackendError
from incckpt.run.report import SaveReport
from incckpt.staging.content import Content, TextContent, compute_digests

__all__ = ["SpaceGuard"]

log = logging.getLogger(__name__)

_SAMPLES = 4  # chunks


class SpaceGuard:
    """Compares what saves need with the room that a store's disk has, where it has one that can be asked for.

    What is needed is an estimate that refuses as little as possible: a save that finds the disk full in spite of it
    deletes what it has put.

    Parameters
    ----------
    backend
        Of the store.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._raw = 0
        self._ratio: float | None = None  # of the last save: stored bytes for each raw byte that was new
        self._short = False

    def check(self, step: int, contents: Sequence[Content], *, first: bool) -> None:
        """Check that what `contents` add to the store fits.

        Parameters
        ----------
        first
            Whether this is the run's first save: of a later one the store may have everything already, though this
            process does not know it yet.

        Raises
        ------
        BackendError
            If not, with ``errno.ENOSPC``.
        """
        new = [content for content in contents if content.stored is None]
        self._raw = sum(content.nbytes for content in new)
        room = self._backend.room()
        if room is None or self._raw <= room:
            return
        ratio = self._ratio
        if ratio is None and (first or len(new) < len(contents)):
            ratio = _sampled_ratio(new)
        if ratio is not None and (needed := int(self._raw * ratio)) > room:
            raise BackendError(
                errno.ENOSPC,
                f"step {step} was not saved: it needs about {needed:,} bytes, and the disk of {self._backend.url} has "
                f"{room:,} left. Nothing was put; free space, or prune checkpoints, and save again",
            )

    def learn(self, report: SaveReport) -> None:
        """Learn from a save that was made, and warn, once, if there is no room for another like it."""
        if self._raw:
            self._ratio = report.put_bytes / self._raw
        took, room = report.put_bytes + report.manifest_bytes, self._backend.room()
        short = room is not None and took > room
        if short and not self._short:
            log.warning(
                "the disk of %s has %s bytes left, and step %d took %s: another save like it will not fit. Free "
                "space, or keep fewer checkpoints",
                *(self._backend.url, f"{room:,}", report.step, f"{took:,}"),
            )
        self._short = short


def _sampled_ratio(contents: Sequence[Content]) -> float:
    """Return how many bytes some of the contents take when coded, for each raw byte."""
    raw = coded = 0
    for content in contents[:: -(-len(contents) // _SAMPLES)]:
        content.hold()
        try:
            compute_digests([content])
            assert content.raw is not None
            assert content.digest is not None
            raw += content.nbytes
            if isinstance(content, TextContent):
                coded += len(codec.encode_text(content.raw, digest=content.digest).data)
            else:
                coded += len(codec.encode(content.raw, content.itemsize, digest=content.digest).data)
        finally:
            content.release()
    return coded / max(1, raw)
