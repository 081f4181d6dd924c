"""States through their JSON and their bytes and back, as a store would take them, but without one."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from incckpt.state.assign import Assignment
from incckpt.state.build import MapLocation, build
from incckpt.state.entries import TensorEntry, check_entries, entry_from_json, entry_to_json
from incckpt.state.flatten import FlatState, flatten
from incckpt.state.packing import opened
from incckpt.state.ranges import ByteRange
from incckpt.state.selection import select
from incckpt.state.tree import Tree, parse, references

Bytes = npt.NDArray[np.uint8]


def live_bytes(item: ByteRange) -> Bytes:
    """Return the memory of a range on the CPU, live."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * item.nbytes).from_address(item.address)), np.uint8)


def new_buffer(nbytes: int) -> Bytes:
    """Return new memory, aligned to 64 bytes, full of rubbish."""
    raw = np.full(nbytes + 64, 0xA5, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


class Stored:
    """A state as it is stored: a JSON document and the bytes of the ranges."""

    def __init__(self, state: Any, *, allow_pickle: bool = False) -> None:
        flat: FlatState = flatten(state, allow_pickle=allow_pickle)
        document = {"structure": flat.structure, "tensors": [entry_to_json(entry) for entry in flat.tensors]}
        self.document: Any = json.loads(json.dumps(document, allow_nan=False))
        self.ranges = [
            live_bytes(item).tobytes() if item.tensor is None else item.tensor.cpu().numpy().tobytes()
            for item in flat.ranges
        ]
        self.packed = [
            b"".join(value.blocks)
            if isinstance(value.blocks, list)
            else value.blocks.encode("utf-8", "surrogatepass")
            if isinstance(value.blocks, str)
            else value.blocks
            for value in flat.packed
        ]
        self.sizes = [len(data) for data in self.ranges]
        assert self.sizes == [item.nbytes for item in flat.ranges]

    def entries(self) -> list[TensorEntry]:
        entries = [entry_from_json(node) for node in self.document["tensors"]]
        check_entries(entries, self.sizes)
        return entries

    def tree(self, keys: str | Sequence[str] | None = None) -> Tree:
        tree = parse(self.document["structure"], len(self.document["tensors"]), len(self.packed))
        tree = opened(tree, dict(enumerate(self.packed)))
        return tree if keys is None else select(tree, keys)

    def load(
        self,
        *,
        keys: str | Sequence[str] | None = None,
        map_location: MapLocation = None,
        allow_pickle: bool = False,
    ) -> Any:
        """Return the state, or what `keys` select of it, in new memory."""
        entries, tree = self.entries(), self.tree(keys)
        wanted = {entries[index].range for index in references(tree)}
        buffers = [self._copy(index) if index in wanted else None for index in range(len(self.ranges))]
        return build(tree, entries, buffers, map_location=map_location, allow_pickle=allow_pickle)

    def restore(self, target: Any, *, in_place: bool = True, **options: Any) -> tuple[Any, Assignment]:
        """Restore into `target`; with `in_place`, straight into its memory wherever it offers that."""
        assignment = Assignment(self.tree(), self.entries(), self.sizes, target, **options)
        for index in assignment.ranges:
            buffer = assignment.destination(index) if in_place else None
            if buffer is None:
                buffer = new_buffer(self.sizes[index])
            buffer[:] = np.frombuffer(self.ranges[index], np.uint8)
            assignment.deliver(index, buffer)
        return assignment.finish(), assignment

    def _copy(self, index: int) -> Bytes:
        buffer = new_buffer(self.sizes[index])
        buffer[:] = np.frombuffer(self.ranges[index], np.uint8)
        return buffer
