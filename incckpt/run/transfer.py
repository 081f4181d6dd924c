"""A checkpoint of another store or run, saved here as it is: its objects are checked and copied, not coded anew.

What is new here are the nonces, and with them the keys: no two saves put one key. A delta is good against any full
object of its base's content, so it is copied too, after its base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from incckpt.codec import objects as codec
from incckpt.errors import CodecError, CorruptionError
from incckpt.run.report import SaveReport
from incckpt.run.upload import Known, Uploader, full_of
from incckpt.store.manifest import Chunk, Manifest, Stored
from incckpt.store.objects import ObjectKey, chunk_keys
from incckpt.store.refs import RefName
from incckpt.store.store import Store

__all__ = ["Transfer"]

_BATCH = 16 << 20  # raw bytes


@dataclass(frozen=True)
class Transfer:
    """A checkpoint to be copied.

    Attributes
    ----------
    source
        The store that has it.
    manifest
        What it is there.
    step, time
        As it will be.
    verify
        Whether to decode and hash what is copied; without, only the objects' headers are checked.
    progress
        Called with the raw bytes of each chunk that is done, from any thread.
    """

    source: Store
    manifest: Manifest
    step: int
    time: float
    verify: bool = True
    progress: Callable[[int], None] = field(default=lambda nbytes: None, repr=False)

    def manifest_as(self, run: str, name: RefName, chunks: Sequence[Chunk]) -> Manifest:
        """Return the manifest of the copy, its objects being those of `chunks`."""
        return replace(
            self.manifest,
            run=run,
            attempt=name.attempt,
            step=name.step,
            nonce=name.nonce,
            time=self.time,
            took=None,  # where it was saved
            chunks=tuple(chunks),
        )

    def store(self, uploader: Uploader, nonce: str, known: Known, report: SaveReport) -> list[Chunk]:
        """Make sure that every content is stored, each identity once; return where, by chunk.

        Raises
        ------
        MissingObjectError, CorruptionError
            If an object of the source is missing or damaged; nothing is committed then.
        """
        copier = _Copier(self, uploader, nonce, known, report)
        contents = {chunk.identity: chunk for chunk in self.manifest.chunks}
        uploader.pipeline.each(_batches(contents.values()), copier.weight, copier.look)
        missing = [chunk for chunk in contents.values() if chunk.identity not in copier.found]
        # Chunks that stand for themselves come first: others may be deltas against them.
        groups: defaultdict[str, list[Chunk]] = defaultdict(list)
        for chunk in sorted(missing, key=lambda chunk: chunk.base is not None):
            groups[chunk.identity if chunk.base is None else chunk.base.identity].append(chunk)
        uploader.pipeline.each(groups.values(), copier.group_weight, copier.copy)
        return [replace(copier.found[chunk.identity], itemsize=chunk.itemsize) for chunk in self.manifest.chunks]


class _Copier:
    """Copies the objects of one checkpoint.

    Attributes
    ----------
    found
        Where each content is stored here, by identity.
    """

    def __init__(self, transfer: Transfer, uploader: Uploader, nonce: str, known: Known, report: SaveReport) -> None:
        self.found: dict[str, Chunk] = {}
        self._source = transfer.source
        self._verify = transfer.verify
        self._progress = transfer.progress
        self._uploader = uploader
        self._nonce = nonce
        self._known = known
        self._report = report

    @staticmethod
    def weight(batch: Sequence[Chunk]) -> int:
        """Looking takes no memory."""
        return 0

    @staticmethod
    def group_weight(group: Sequence[Chunk]) -> int:
        """Return the bytes of memory that copying a group takes: its base and one delta, raw and coded."""
        return 2 * group[0].nbytes + max(chunk.nbytes + chunk.size for chunk in group)

    def look(self, batch: Sequence[Chunk]) -> None:
        """Find out which contents are here already."""
        for chunk in batch:
            found = self._uploader.find(chunk, self._known)
            if found is not None:
                self.found[chunk.identity] = found
                self._progress(chunk.nbytes)

    def copy(self, group: Sequence[Chunk]) -> None:
        """Copy a full object and the deltas against it, or some of these."""
        first, *_ = group
        whole = first if first.base is None else full_of(first, first.base)
        deltas = [chunk for chunk in group if chunk.base is not None]
        base = self._uploader.find(whole, self._known, whole=True)
        raw = None
        if base is None or (deltas and self._verify):
            data, raw = self._fetch(whole, None)
            if base is None:
                base = replace(whole, nonce=self._nonce, size=len(data))
                self._uploader.put_copies([(base, data)], self._report)
            del data
        if first.base is None:
            self._done(first, base)
        for chunk in deltas:
            data, _ = self._fetch(chunk, raw)
            stored = Stored(base.identity, base.nonce, base.size)
            copied = replace(chunk, nonce=self._nonce, size=len(data), base=stored)
            self._uploader.put_copies([(copied, data)], self._report)
            self._done(chunk, copied)

    def _done(self, chunk: Chunk, copied: Chunk) -> None:
        self.found[chunk.identity] = copied
        self._progress(chunk.nbytes)

    def _fetch(self, chunk: Chunk, base: codec.Buffer | None) -> tuple[bytes, codec.Buffer | None]:
        """Return an object of the source, and its raw bytes if they were decoded to check it."""
        key = chunk_keys(chunk)[0]
        data = self._source.objects.get(key, chunk.size)
        try:
            with self._uploader.pipeline.cpu:
                return data, self._check(chunk, key, data, base)
        except CodecError as error:
            raise CodecError(f"object {key} is damaged: {error}") from error

    def _check(self, chunk: Chunk, key: ObjectKey, data: bytes, base: codec.Buffer | None) -> codec.Buffer | None:
        identity = bytes.fromhex(chunk.identity)
        against = None if chunk.base is None else bytes.fromhex(chunk.base.identity)
        header = codec.read_header(data)
        if header.identity != identity or header.base != against or header.offsets[-1] != len(data):
            raise CorruptionError(f"object {key} is damaged: its header is that of another object")
        if not self._verify:
            return None
        out = np.empty(chunk.nbytes, np.uint8)
        before = None if against is None or base is None else codec.Base(against, base)
        codec.decode(data, out, identity=identity, base=before)
        return out


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Cut chunks into batches, so that small ones are not passed on one by one."""
    batch: list[Chunk] = []
    nbytes = 0
    for chunk in chunks:
        batch.append(chunk)
        nbytes += chunk.nbytes
        if nbytes >= _BATCH:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
