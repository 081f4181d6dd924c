"""Puts together what several processes have stored of one state: one structure, one list of tensors, one of chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from incckpt.errors import StateError
from incckpt.run.contents import check_read_back
from incckpt.run.parts import JoinedParts, TensorParts
from incckpt.run.shards import Shard
from incckpt.state.entries import TensorEntry, entry_to_json
from incckpt.state.flatten import no_garbage_collection
from incckpt.state.names import join_name
from incckpt.state.plain import encode_key
from incckpt.store.blocks import fault_of
from incckpt.store.document import Json
from incckpt.store.encoded import EncodedChunks, EncodedRanges, encoded_blocks, encoded_range
from incckpt.store.manifest import Manifest, Range
from incckpt.store.refs import RefName

__all__ = ["Leaf", "Merged", "merge"]


@dataclass(frozen=True)
class Leaf:
    """A tensor or another value of the state.

    Attributes
    ----------
    key
        Its key in the shards that have it, or a part of it.
    path
        The keys (strings) and positions (integers) that lead to it.
    shape
        Of the whole tensor; ``None`` if it is none.
    parts
        Of how many parts it was planned to be.
    requires_grad
        Whether the tensor requires a gradient.
    """

    key: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...] | None = None
    parts: int = 1
    requires_grad: bool = False


@dataclass(frozen=True)
class Merged:
    """A state, whole again: what its manifest holds, and what was put for it."""

    structure: Json
    tensors: tuple[Mapping[str, Json], ...]
    ranges: EncodedRanges
    sizes: Sequence[int]
    packed: tuple[Range, ...]
    chunks: EncodedChunks
    chunk_bytes: int
    put_objects: int
    put_bytes: int

    def manifest(self, run: str, name: RefName, time: float, metrics: Mapping[str, float]) -> Manifest:
        """Return the manifest of the checkpoint `name`.

        Raises
        ------
        StateError
            If no reader would accept it.
        """
        check_read_back(name.step, self.tensors, self.sizes, self.structure, len(self.packed))
        return Manifest(
            run=run,
            attempt=name.attempt,
            step=name.step,
            nonce=name.nonce,
            time=time,
            metrics=metrics,
            chunk_bytes=self.chunk_bytes,
            structure=self.structure,
            tensors=self.tensors,
            ranges=self.ranges,
            chunks=self.chunks,
            packed=self.packed,
        )


def merge(leaves: Sequence[Leaf], shards: Sequence[Shard]) -> Merged:
    """Put a state together.

    Parameters
    ----------
    leaves
        All of it.
    shards
        What each process has stored.

    Raises
    ------
    StateError
        If a part is missing, or the parts of a tensor are not the whole of it; names the tensor.
    """
    merger = _Merger(shards)
    root: dict[Any, Any] = {}
    with no_garbage_collection():
        for leaf in leaves:
            _place(root, leaf.path, merger.node(leaf))
        chunks = EncodedChunks.joined(shard.chunks for shard in shards)
    return Merged(
        structure=_structure(root),
        tensors=tuple(merger.tensors),
        ranges=EncodedRanges(merger.ranges, sum(merger.sizes), chunks),
        sizes=merger.sizes,
        packed=tuple(merger.packed),
        chunks=chunks,
        chunk_bytes=max((shard.chunk_bytes for shard in shards), default=1 << 20),
        put_objects=sum(shard.put_objects for shard in shards),
        put_bytes=sum(shard.put_bytes for shard in shards),
    )


class _Merger:
    """Renumbers tensors, ranges and chunks of shards.

    Attributes
    ----------
    tensors, packed
        As in the manifest.
    ranges, sizes
        The JSON text of each range, and its bytes.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.tensors: list[Mapping[str, Json]] = []
        self.ranges: list[bytes] = []
        self.sizes: list[int] = []
        self.packed: list[Range] = []
        self._shards = shards
        self._parts = JoinedParts([shard.parts for shard in shards], [shard.chunks.lengths for shard in shards])
        self._range_of: dict[tuple[int, int], int] = {}
        self._first = list(accumulate((len(shard.chunks) for shard in shards), initial=0))
        self._process: dict[str, int] = {}
        for process, shard in enumerate(shards):
            for key in shard.nodes:
                self._process.setdefault(key, process)

    def node(self, leaf: Leaf) -> Json:
        """Return the node of a leaf: a copy of what a process has stored, or a new one of several parts."""
        process = self._process.get(leaf.key)
        parts = self._parts.of(leaf.key) if leaf.key in self._parts else None
        found = (0 if parts is None else parts.count) + (process is not None)
        if not found:
            raise StateError(f"no process has stored {_name(leaf)!r}")
        if found != leaf.parts or (process is not None and parts is not None and len(parts.at)):
            raise StateError(
                f"{_name(leaf)!r} is not whole, or more than that: {found} parts of it were stored, and {leaf.parts} "
                "planned"
            )
        if process is not None:
            return self._renumbered(self._shards[process].nodes[leaf.key], leaf, process)
        assert parts is not None
        return self._tensor(leaf, parts)

    def _tensor(self, leaf: Leaf, parts: TensorParts) -> Json:
        name, itemsize, shape = _name(leaf), parts.entry.itemsize, leaf.shape
        if shape is None:
            raise StateError(f"{name!r} was planned as a value, and stored as parts of a tensor")
        if parts.at.shape[1] != len(shape):
            raise StateError(f"tensor {name!r} has {len(shape)} dimensions, and its parts have {parts.at.shape[1]}")
        nbytes = math.prod(shape) * itemsize
        index = -1
        if nbytes:
            in_bytes = np.array([*(1 for _ in shape[1:]), itemsize])
            array, at, size = (*shape[:-1], shape[-1] * itemsize), parts.at * in_bytes, parts.shape * in_bytes
            if wrong := fault_of(array, at, size):
                raise StateError(f"tensor {name!r} is not whole: {wrong} (the last dimension in bytes)")
            component = parts.itemsize
            while nbytes % component:
                component //= 2
            index = self._add_range(encoded_blocks(component, array, parts.pieces, at, size), nbytes)
        elif len(parts.pieces):
            raise StateError(f"tensor {name!r} is empty, and its parts are not")
        stride = [1] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            stride[axis - 1] = stride[axis] * max(shape[axis], 1)
        entry = parts.entry._replace(name=name, shape=shape, stride=tuple(stride), range=index)
        return self._add(entry._replace(requires_grad=leaf.requires_grad))

    def _add(self, entry: TensorEntry) -> Json:
        self.tensors.append(entry_to_json(entry))
        return {"tensor": len(self.tensors) - 1}

    def _add_range(self, text: bytes, nbytes: int) -> int:
        self.ranges.append(text)
        self.sizes.append(nbytes)
        return len(self.ranges) - 1

    def _renumbered(self, node: Json, leaf: Leaf, process: int) -> Json:
        """Return a copy of a node whose references are those of the whole."""
        if isinstance(node, list):
            return [self._renumbered(item, leaf, process) for item in node]
        if not isinstance(node, dict):
            return node
        found = dict(node)
        shard = self._shards[process]
        for member in ("tensor", "torch.Generator"):
            if member in node:
                entry = shard.tensors[node[member]]
                local = join_name("", leaf.key)
                entry = entry._replace(name=_name(leaf) + entry.name.removeprefix(local))
                if entry.range >= 0:
                    entry = entry._replace(range=self._range(process, entry.range))
                if leaf.shape is not None:
                    entry = entry._replace(requires_grad=leaf.requires_grad)
                found[member] = self._add(entry)["tensor"]
                return found
        if "packed" in node:
            self.packed.append(self._moved(process, shard.packed[node["packed"]]))
            found["packed"] = len(self.packed) - 1
            return found
        return {member: self._renumbered(item, leaf, process) for member, item in node.items()}

    def _range(self, process: int, index: int) -> int:
        key = process, index
        if key not in self._range_of:
            item = self._moved(process, self._shards[process].ranges[index])
            self._range_of[key] = self._add_range(encoded_range(item), item.nbytes)
        return self._range_of[key]

    def _moved(self, process: int, item: Range) -> Range:
        first = self._first[process]
        return replace(item, pieces=tuple((first + c, offset, nbytes) for c, offset, nbytes in item.pieces))


def _name(leaf: Leaf) -> str:
    name = ""
    for key in leaf.path:
        name = join_name(name, key)
    return name


def _place(root: dict[Any, Any], path: tuple[str | int, ...], node: Json) -> None:
    """Put a node into nested dicts, in which a list is a dict of positions."""
    where = root
    for key in path[:-1]:
        where = where.setdefault(key, {})
    where[path[-1]] = _Node(node)


@dataclass(frozen=True, slots=True)
class _Node:
    node: Json


def _structure(tree: Any) -> Json:
    if isinstance(tree, _Node):
        return tree.node
    if tree and all(isinstance(key, int) for key in tree):
        return {"list": [_structure(tree[index]) if index in tree else None for index in range(max(tree) + 1)]}
    return {"dict": [[encode_key(key), _structure(child)] for key, child in tree.items()]}
