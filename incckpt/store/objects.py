"""Content-addressed objects: names, existence, and the puts and gets of their bytes.

An object's key begins with the identity of the raw bytes it holds and ends with the nonce of the save that put it. So
no two saves put the same key, and a late delete never hits a newer object with the same content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from incckpt.backends.base import Backend, ReadableBuffer
from incckpt.errors import CorruptionError, KeyNotFoundError, MissingObjectError
from incckpt.store.encoded import EncodedChunks
from incckpt.store.manifest import DELTA_DIGITS, Chunk, Manifest
from incckpt.store.rereading import reread

__all__ = [
    "DELTAS",
    "OBJECTS",
    "ObjectKey",
    "Objects",
    "chunk_keys",
    "chunk_sizes",
    "is_object",
    "manifest_keys",
    "manifest_sizes",
]

OBJECTS = "objects/"
DELTAS = "deltas/"

_KEY = re.compile(
    r"(?P<space>objects|deltas)/(?P<head>[0-9a-f]{2})/(?P<tail>[0-9a-f]{62})(\.(?P<base>[0-9a-f]{32}|[0-9a-f]{64}))?\.(?P<nonce>[0-9a-f]{16})"
)


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """The name of an object.

    Attributes
    ----------
    identity
        Identity of the chunk's raw bytes, 64 hexadecimal digits.
    nonce
        Of the save that put it, 16 hexadecimal digits.
    base
        For a delta, the first 32 or all 64 digits of the identity of its full object; ``None`` for a full object.
    """

    identity: str
    nonce: str
    base: str | None = None

    def __str__(self) -> str:
        head, tail = self.identity[:2], self.identity[2:]
        if self.base is None:
            return f"{OBJECTS}{head}/{tail}.{self.nonce}"
        return f"{DELTAS}{head}/{tail}.{self.base}.{self.nonce}"

    @classmethod
    def parse(cls, key: str) -> ObjectKey:
        """Return the parts of `key`.

        Raises
        ------
        CorruptionError
            If it is not the key of an object.
        """
        match = _KEY.fullmatch(key)
        if match is None or (match["space"] == "deltas") != (match["base"] is not None):
            raise CorruptionError(f"not the key of an object: {key!r}")
        return cls(match["head"] + match["tail"], match["nonce"], match["base"])


def is_object(key: str) -> bool:
    """Whether `key` has the form of an object's key; other files in the folder are not ours."""
    return _KEY.fullmatch(key) is not None


def chunk_keys(chunk: Chunk) -> tuple[ObjectKey, ...]:
    """Return the keys of every object needed to rebuild `chunk`: its own, and that of its base."""
    if chunk.base is None:
        return (ObjectKey(chunk.identity, chunk.nonce),)
    return (
        ObjectKey(chunk.identity, chunk.nonce, chunk.base.identity[: chunk.base.digits]),
        ObjectKey(chunk.base.identity, chunk.base.nonce),
    )


def manifest_keys(manifest: Manifest) -> frozenset[str]:
    """Return the keys of all objects that a manifest lists, which do not include its own."""
    if isinstance(manifest.chunks, EncodedChunks):
        return frozenset(manifest.chunks.sizes)
    return frozenset(str(key) for chunk in manifest.chunks for key in chunk_keys(chunk))


def manifest_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the sizes in bytes of these objects, by key."""
    return chunk_sizes(manifest.chunks)


def chunk_sizes(chunks: Iterable[Chunk]) -> dict[str, int]:
    """Return the sizes in bytes of the objects that chunks are read from, by key."""
    if isinstance(chunks, EncodedChunks):
        return dict(chunks.sizes)
    sizes: dict[str, int] = {}
    for chunk in chunks:
        stored = (chunk,) if chunk.base is None else (chunk, chunk.base)
        sizes.update(zip(map(str, chunk_keys(chunk)), (one.size for one in stored), strict=True))
    return sizes


class Objects:
    """The objects of a store."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def put(self, key: ObjectKey, data: ReadableBuffer) -> None:
        """Store `data`, durable on return. Repeating is safe: no other save ever uses this key."""
        self.backend.put(str(key), data)

    def put_many(self, objects: Sequence[tuple[ObjectKey, ReadableBuffer]]) -> None:
        """Store objects as `put` does; if this raises, any of them may be stored."""
        self.backend.put_many([(str(key), data) for key, data in objects])

    def get(self, key: ObjectKey, size: int | None = None) -> bytes:
        """Return the object's bytes.

        Parameters
        ----------
        size
            Its size in bytes according to the manifest.

        Raises
        ------
        MissingObjectError
            If it is not in the store.
        CorruptionError
            If its size is another one.
        """
        try:
            data = self.backend.get(str(key), 0, None if size is None else size + 1)
        except KeyNotFoundError as error:
            raise self._missing(key) from error
        if size is not None:
            _check_size(key, size, len(data))
        return data

    def get_into(self, key: ObjectKey, parts: Sequence[memoryview]) -> None:
        """Read the object's bytes into `parts`, in order; their content is undefined after an error.

        Parameters
        ----------
        parts
            ``uint8`` each, together as long as the object according to the manifest.

        Raises
        ------
        MissingObjectError
            If it is not in the store.
        CorruptionError
            If its size is another one.
        """
        try:
            found = self.backend.get_into(str(key), parts)
        except KeyNotFoundError as error:
            raise self._missing(key) from error
        _check_size(key, sum(map(len, parts)), found)

    def doubt(self, key: ObjectKey) -> None:
        """Take note that what was read of an object is damaged; where it is kept twice, the other one is read next."""

    def _missing(self, key: ObjectKey) -> MissingObjectError:
        return MissingObjectError(f"object {key} is missing from {self.backend.url}")

    def size(self, key: ObjectKey) -> int | None:
        """Return the object's size in bytes, or ``None`` if it is not there now (one request, two where it is not)."""
        try:
            return reread(lambda: self.backend.head(str(key))).size
        except KeyNotFoundError:
            return None

    def exists(self, key: ObjectKey, size: int) -> bool:
        """Return whether the object is there now, of that size in bytes (one request, over a network two).

        A save relies on what it finds, and an answer of yesterday shows what has been deleted since.
        """
        return all(self.size(key) == size for _ in range(2 if self.backend.remote else 1))

    def find(self, identity: str) -> Iterator[tuple[ObjectKey, int]]:
        """Yield key and size in bytes of every full object of that content there is now (a listing, and two looks)."""
        for entry in self.backend.list(f"{OBJECTS}{identity[:2]}/{identity[2:]}."):
            key = ObjectKey.parse(entry.key)
            if not self.backend.remote or self.exists(key, entry.size):
                yield key, entry.size

    def find_deltas(self, identity: str, base: str) -> Iterator[tuple[ObjectKey, int]]:
        """Yield key and size in bytes of every delta of that content against content `base` there is (one listing)."""
        for entry in self.backend.list(f"{DELTAS}{identity[:2]}/{identity[2:]}.{base[:DELTA_DIGITS]}"):
            key = ObjectKey.parse(entry.key)
            if key.base is not None and base.startswith(key.base):
                yield key, entry.size


def _check_size(key: ObjectKey, size: int, found: int) -> None:
    if found != size:
        is_now = "longer" if found > size else f"{found} bytes"
        raise CorruptionError(f"object {key} is damaged: {size} bytes were written, it is {is_now}")
