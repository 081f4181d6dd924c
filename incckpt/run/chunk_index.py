"""Where content is stored, as far as this process knows; one index for all runs it writes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable

from incckpt.errors import CorruptionError
from incckpt.store.manifest import Chunk
from incckpt.store.objects import ObjectKey, chunk_keys

__all__ = ["ChunkIndex", "process_index"]

_MOST = 1 << 16


class ChunkIndex:
    """Chunks by store and identity; forgets the least recently used first.

    It only says where to look: an entry may have been collected since, so a save checks it before relying on it.

    Parameters
    ----------
    most
        The most entries kept. If one is forgotten, its content may be put again.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._chunks: OrderedDict[tuple[str, str], Chunk] = OrderedDict()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock, which in a forked child may be held by a thread that exists only in the parent."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, store_id: str, chunks: Iterable[Chunk]) -> None:
        """Note that a store holds these chunks."""
        with self._lock:
            for chunk in chunks:
                key = (store_id, chunk.identity)
                self._chunks[key] = chunk
                self._chunks.move_to_end(key)
            while len(self._chunks) > self._most:
                self._chunks.popitem(last=False)

    def find(self, store_id: str, identity: str) -> Chunk | None:
        """Return where a store was last known to hold this content."""
        key = (store_id, identity)
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def forget(self, store_id: str, object_keys: Iterable[str]) -> None:
        """Forget the chunks stored in these objects, which were collected."""
        for text in object_keys:
            try:
                key = ObjectKey.parse(text)
            except CorruptionError:
                continue  # a stray file that was collected
            with self._lock:
                chunk = self._chunks.get((store_id, key.identity))
                if chunk is not None and chunk_keys(chunk)[0] == key:
                    del self._chunks[store_id, key.identity]


_index = ChunkIndex()
os.register_at_fork(after_in_child=_index.renew_lock)


def process_index() -> ChunkIndex:
    """Return the index that all writers of this process share."""
    return _index
