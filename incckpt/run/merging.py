"""Puts together what several processes have stored of one state: one structure, one list of tensors, one of chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from incckpt.errors import StateError
from incckpt.run.contents import Contents, read_back
from incckpt.run.shards import Shard
from incckpt.state.entries import TensorEntry, entry_to_json
from incckpt.state.flatten import no_garbage_collection
from incckpt.state.plain import encode_key
from incckpt.state.tree import join_name
from incckpt.store.blocks import Block, fault
from incckpt.store.document import Json
from incckpt.store.manifest import Chunk, Manifest, Range
from incckpt.store.refs import RefName

__all__ = ["Leaf", "Merged", "Part", "merge"]


@dataclass(frozen=True)
class Part:
    """A part of a leaf that one process has stored.

    Attributes
    ----------
    process
        Whose shard.
    key
        Its key there.
    at, shape
        Of a tensor: the box that it is, in elements.
    """

    process: int
    key: str
    at: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """A tensor or another value of the state.

    Attributes
    ----------
    path
        The keys (strings) and positions (integers) that lead to it.
    parts
        Where it is: one part of a value, any number of a tensor.
    shape
        Of the whole tensor; ``None`` if it is none.
    requires_grad
        Whether the tensor requires a gradient.
    """

    path: tuple[str | int, ...]
    parts: Sequence[Part]
    shape: tuple[int, ...] | None = None
    requires_grad: bool = False


@dataclass(frozen=True)
class Merged:
    """A state, whole again: what its manifest holds, and what was put for it."""

    structure: Json
    tensors: tuple[Mapping[str, Json], ...]
    ranges: tuple[Range, ...]
    packed: tuple[Range, ...]
    chunks: tuple[Chunk, ...]
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
        manifest = Manifest(
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
        with read_back(name.step):
            Contents.of(manifest)
        return manifest


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
            node = merger.value(leaf) if leaf.shape is None else merger.tensor(leaf, leaf.shape)
            _place(root, leaf.path, node)
    return Merged(
        structure=_structure(root),
        tensors=tuple(merger.tensors),
        ranges=tuple(merger.ranges),
        packed=tuple(merger.packed),
        chunks=tuple(chunk for shard in shards for chunk in shard.chunks),
        chunk_bytes=max((shard.chunk_bytes for shard in shards), default=1 << 20),
        put_objects=sum(shard.put_objects for shard in shards),
        put_bytes=sum(shard.put_bytes for shard in shards),
    )


class _Merger:
    """Renumbers tensors, ranges and chunks of shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.tensors: list[Mapping[str, Json]] = []
        self.ranges: list[Range] = []
        self.packed: list[Range] = []
        self._shards = shards
        self._first: list[int] = []
        self._range_of: dict[tuple[int, int], int] = {}
        chunks = 0
        for shard in shards:
            self._first.append(chunks)
            chunks += len(shard.chunks)

    def value(self, leaf: Leaf) -> Json:
        """Return the node of a value, whose tensors and packed values go with it."""
        if len(leaf.parts) != 1:
            raise StateError(f"{_name(leaf)!r} was stored {len(leaf.parts)} times, not once")
        return self._renumbered(self._node(leaf, leaf.parts[0]), leaf, leaf.parts[0])

    def tensor(self, leaf: Leaf, shape: tuple[int, ...]) -> Json:
        """Return the node of a tensor: a copy of its only part, or a new one of several."""
        first = leaf.parts[0] if leaf.parts else None
        if first is None:
            raise StateError(f"no process has stored anything of tensor {_name(leaf)!r}")
        if len(leaf.parts) == 1 and first.shape == shape:
            return self._renumbered(self._node(leaf, first), leaf, first)
        entry = self._entry(leaf, first)
        itemsize = entry.itemsize
        blocks: list[Block] = []
        pieces: list[tuple[int, int, int]] = []
        component = 1
        for part in leaf.parts:
            one = self._entry(leaf, part)
            if one.dtype != entry.dtype or one.shape != part.shape:
                raise StateError(
                    f"tensor {_name(leaf)!r}: a process has stored {one.dtype}{list(one.shape)} where {entry.dtype}"
                    f"{list(part.shape)} was planned"
                )
            if one.range < 0:
                continue
            block = _in_bytes(part, itemsize)
            stored = self._shards[part.process].ranges[one.range]
            component = stored.itemsize
            before = self._first[part.process]
            part_nbytes = math.prod(block.shape)
            whole = stored.pieces if stored.nbytes == part_nbytes else stored.part(one.offset, one.offset + part_nbytes)
            blocks.append(block)
            pieces += [(before + c, o, n) for c, o, n in whole]
        nbytes = math.prod(shape) * itemsize
        index = -1
        if nbytes:
            array = (*shape[:-1], shape[-1] * itemsize)
            if wrong := fault(array, blocks):
                raise StateError(f"tensor {_name(leaf)!r} is not whole: {wrong} (the last dimension in bytes)")
            while nbytes % component:
                component //= 2
            index = len(self.ranges)
            self.ranges.append(Range(nbytes, component, tuple(pieces), array, tuple(blocks)))
        stride = [1] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            stride[axis - 1] = stride[axis] * max(shape[axis], 1)
        entry = entry._replace(name=_name(leaf), shape=shape, stride=tuple(stride), range=index, offset=0, packed=False)
        return self._add(entry._replace(requires_grad=leaf.requires_grad))

    def _entry(self, leaf: Leaf, part: Part) -> TensorEntry:
        node = self._node(leaf, part)
        if not isinstance(node, dict) or "tensor" not in node:
            raise StateError(f"{_name(leaf)!r} is no tensor on process {part.process}")
        return self._shards[part.process].tensors[node["tensor"]]

    def _node(self, leaf: Leaf, part: Part) -> Json:
        nodes = self._shards[part.process].nodes
        if part.key not in nodes:
            raise StateError(f"process {part.process} has stored nothing of {_name(leaf)!r} at {list(part.at)}")
        return nodes[part.key]

    def _add(self, entry: TensorEntry) -> Json:
        self.tensors.append(entry_to_json(entry))
        return {"tensor": len(self.tensors) - 1}

    def _renumbered(self, node: Json, leaf: Leaf, part: Part) -> Json:
        """Return a copy of a node whose references are those of the whole."""
        if isinstance(node, list):
            return [self._renumbered(item, leaf, part) for item in node]
        if not isinstance(node, dict):
            return node
        found = dict(node)
        shard = self._shards[part.process]
        for member in ("tensor", "torch.Generator"):
            if member in node:
                entry = shard.tensors[node[member]]
                local = join_name("", part.key)
                entry = entry._replace(name=_name(leaf) + entry.name.removeprefix(local))
                if entry.range >= 0:
                    entry = entry._replace(range=self._range(part.process, entry.range))
                if leaf.shape is not None:
                    entry = entry._replace(requires_grad=leaf.requires_grad)
                found[member] = self._add(entry)["tensor"]
                return found
        if "packed" in node:
            self.packed.append(self._moved(part.process, shard.packed[node["packed"]]))
            found["packed"] = len(self.packed) - 1
            return found
        return {member: self._renumbered(item, leaf, part) for member, item in node.items()}

    def _range(self, process: int, index: int) -> int:
        key = process, index
        if key not in self._range_of:
            self._range_of[key] = len(self.ranges)
            self.ranges.append(self._moved(process, self._shards[process].ranges[index]))
        return self._range_of[key]

    def _moved(self, process: int, item: Range) -> Range:
        first = self._first[process]
        return replace(item, pieces=tuple((first + c, offset, nbytes) for c, offset, nbytes in item.pieces))


def _in_bytes(part: Part, itemsize: int) -> Block:
    return Block((*part.at[:-1], part.at[-1] * itemsize), (*part.shape[:-1], part.shape[-1] * itemsize))


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
