"""The long lists of a manifest that several processes make together: JSON text from the start, never objects.

A thousand processes with a thousand tensors each have a million chunks. One process puts them together, and has no time
to make an object of each. So each process encodes its own chunks, and ranges of blocks are encoded from columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from incckpt.store.blocks import Int64s
from incckpt.store.document import Json, JsonList
from incckpt.store.manifest import Chunk, Range, chunk_from_json, chunk_to_json, range_from_json, range_to_json

__all__ = ["EncodedChunks", "EncodedRanges", "encoded_blocks", "encoded_range"]


class EncodedChunks(JsonList[Chunk]):
    """Chunks as JSON text.

    Parameters
    ----------
    texts
        The items of the list, in texts of one or more with commas between them.
    lengths
        ``int64[n]``: the raw bytes of each chunk.
    sizes
        The sizes in bytes of the objects that they are read from, by key.
    """

    def __init__(self, texts: Sequence[bytes], lengths: Int64s, sizes: Mapping[str, int]) -> None:
        super().__init__(texts, len(lengths), int(lengths.sum()))
        self.lengths = lengths
        self.sizes = sizes

    @classmethod
    def of(cls, chunks: Sequence[Chunk], sizes: Mapping[str, int]) -> EncodedChunks:
        """Encode chunks, given the sizes of their objects by key."""
        lengths = np.fromiter((chunk.nbytes for chunk in chunks), np.int64, len(chunks))
        text = _compact([chunk_to_json(chunk) for chunk in chunks])[1:-1]
        return cls([text] if text else [], lengths, sizes)

    @classmethod
    def joined(cls, parts: Iterable[EncodedChunks]) -> EncodedChunks:
        """Put lists end to end."""
        filled = [part for part in parts if len(part)]
        sizes: dict[str, int] = {}
        for part in filled:
            sizes.update(part.sizes)
        lengths = np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in filled)])
        return cls([text for part in filled for text in part.texts], lengths, sizes)

    def parse(self, item: Json) -> Chunk:
        """Return a chunk."""
        return chunk_from_json(item, "chunk")

    def __reduce__(self) -> tuple[type[EncodedChunks], tuple[Sequence[bytes], Int64s, Mapping[str, int]]]:
        return EncodedChunks, (self.texts, self.lengths, self.sizes)


class EncodedRanges(JsonList[Range]):
    """Ranges as JSON text.

    Parameters
    ----------
    items
        Each range.
    nbytes
        Their bytes together.
    chunks
        What they lie in.
    """

    def __init__(self, items: Sequence[bytes], nbytes: int, chunks: Sequence[Chunk]) -> None:
        super().__init__(items, len(items), nbytes)
        self._chunks = chunks

    def parse(self, item: Json) -> Range:
        """Return a range."""
        return range_from_json(item, self._chunks, "range")


def encoded_range(item: Range) -> bytes:
    """Return the JSON text of a range."""
    return _compact(range_to_json(item))


def encoded_blocks(itemsize: int, shape: Sequence[int], pieces: Int64s, at: Int64s, size: Int64s) -> bytes:
    """Return the JSON text of a range of blocks.

    Parameters
    ----------
    itemsize
        Element size for the codec.
    shape
        Of the array of bytes.
    pieces
        ``int64[m, 3]``: chunk, offset and bytes of each piece.
    at, size
        ``int64[n, len(shape)]``: the first index and the size of each block.
    """
    blocks = np.concatenate((at, size), axis=1)
    dimensions = ",".join(["%s"] * len(shape))
    text = '{"bytes":%d,"item":%d,"pieces":[%s],"shape":[%s],"blocks":[%s]}' % (  # noqa: UP031 -- the quickest by far
        int(pieces[:, 2].sum()),
        itemsize,
        _rows("[%s,%s,%s]", pieces),
        dimensions % tuple(shape),
        _rows(f"[[{dimensions}],[{dimensions}]]", blocks),
    )
    return text.encode()


def _rows(row: str, values: Int64s) -> str:
    """Return the text of each row, given the form of one; a number that all have becomes part of the form."""
    alike = (values == values[:1]).all(axis=0)
    row %= tuple(value if same else "%d" for value, same in zip(values[0].tolist(), alike.tolist(), strict=True))
    return ",".join([row] * len(values)) % tuple(values[:, ~alike].reshape(-1).tolist())


def _compact(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
