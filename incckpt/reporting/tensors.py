"""What a manifest says of each tensor: how large it is, whether it may have changed, how far it moved."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from incckpt.staging.threshold import float_ranges
from incckpt.state.entries import entry_from_json
from incckpt.store.document import Json
from incckpt.store.manifest import Manifest

__all__ = ["TensorTable", "object_sizes"]

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TensorTable:
    """The tensors of a checkpoint that have more than one element; those that share memory count once.

    Attributes
    ----------
    names
        By tensor; the first of those that share memory.
    content
        ``int64[t]``: a hash of where the bytes are. What has the same one has not changed.
    alone
        ``bool[t]``: whether no other tensor lies in its chunks.
    measured
        ``bool[t]``: whether the save would have listed it in `moved`, had it seen it change.
    moved
        Relative change and norm before, by name.
    """

    names: Sequence[str]
    content: Int64s
    alone: npt.NDArray[np.bool_]
    measured: npt.NDArray[np.bool_]
    moved: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, manifest: Manifest) -> TensorTable:
        """Read it from a manifest."""
        ranges, names, floating = _tensors(_Document(manifest.tensors, tuple(item.nbytes for item in manifest.ranges)))
        chunks = manifest.chunks
        content, alone = np.empty(len(ranges), np.int64), np.empty(len(ranges), np.bool_)
        for row, index in enumerate(ranges):
            pieces, blocks = manifest.ranges[index].pieces, manifest.ranges[index].blocks
            where = tuple((chunks[chunk].identity, offset, nbytes) for chunk, offset, nbytes in pieces)
            content[row] = hash((where, blocks))
            alone[row] = all(nbytes == chunks[chunk].nbytes for chunk, _, nbytes in pieces)
        measured = floating if manifest.norms is not None else np.zeros(len(ranges), np.bool_)
        return cls(names, content, alone, measured, manifest.norms or {})


class _Document:
    """A manifest's tensors and the sizes of its ranges; equal ones are taken apart once."""

    def __init__(self, tensors: Sequence[Mapping[str, Json]], sizes: tuple[int, ...]) -> None:
        self.tensors = tensors
        self.sizes = sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Document) and self.sizes == other.sizes and self.tensors == other.tensors


@functools.lru_cache(maxsize=2)
def _tensors(document: _Document) -> tuple[list[int], list[str], npt.NDArray[np.bool_]]:
    """Return the ranges that are tensors of more than one element, their names, and which are floating-point."""
    entries = [entry_from_json(item) for item in document.tensors]
    code, names = float_ranges(entries, document.sizes)
    large = {entry.range for entry in entries if math.prod(entry.shape) > 1 and entry.range >= 0}
    ranges = [index for index in range(len(names)) if index in large]
    return ranges, [names[index] for index in ranges], code[ranges] >= 0


def object_sizes(manifest: Manifest) -> dict[int, int]:
    """Return the stored bytes of every object that a manifest lists, by a hash of its key."""
    sizes: dict[int, int] = {}
    for chunk in manifest.chunks:
        base = chunk.base
        if base is None:
            sizes[hash((chunk.identity, chunk.nonce))] = chunk.size
        else:
            sizes[hash((chunk.identity, base.identity, chunk.nonce))] = chunk.size
            sizes[hash((base.identity, base.nonce))] = base.size
    return sizes
