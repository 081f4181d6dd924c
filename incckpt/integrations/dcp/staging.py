"""Staging for saves in the background: what a rank is known to write is compared first, and copied only if it changed.

Which part of the state a rank writes is planned after staging, by all ranks together. But the plan is that of the last
save, as long as the state has the same tensors. What the rank wrote then goes through the detection of changes now; in
the state that DCP plans with, tensors without memory stand in its place. All other tensors are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

from incckpt.errors import StateError
from incckpt.run.parts import Place
from incckpt.run.shards import ShardWriter
from incckpt.run.snapshot import Snapshot
from incckpt.staging.content import Bytes

__all__ = ["Copy", "Staged", "copied", "is_plain", "keys_of", "places_of", "plans_with", "staged", "stored_form"]


@dataclass(frozen=True)
class Staged:
    """What a rank has staged of what it is to write.

    Attributes
    ----------
    snapshot
        All of it.
    items
        What it was planned to be.
    objects
        What the state that DCP plans with has in its place, by name.
    """

    snapshot: Snapshot
    items: Sequence[WriteItem]
    objects: Mapping[str, Any]

    def value(self, item: WriteItem) -> Any:
        """Return a copy of what was staged for an item.

        Raises
        ------
        StateError
            If nothing was.
        """
        if item.index in self._tensors:
            entry = self.snapshot.entries[self._tensors[item.index]]
            found = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            if not found.numel():
                return found
            if not entry.packed and found.stride() == entry.stride:
                pieces = self.snapshot.layout.ranges[entry.range].part(entry.offset, entry.offset + entry.nbytes)
                raw = np.concatenate([self._bytes(*piece) for piece in pieces])
                return torch.from_numpy(raw).view(found.dtype).view(found.shape)
        raise StateError(f"{item.index.fqn!r} was not staged, since another rank wrote it in the last save; save again")

    @cached_property
    def _tensors(self) -> dict[MetadataIndex, int]:
        """The entry of each item that is a tensor."""
        nodes = dict(self.snapshot.structure["dict"])
        items = zip(keys_of(self.items), self.items, strict=True)
        tensors = [(item.index, nodes[key]) for key, item in items if item.type is not WriteItemType.BYTE_IO]
        return {index: node["tensor"] for index, node in tensors if "tensor" in node}

    def _bytes(self, chunk: int, start: int, nbytes: int) -> Bytes:
        raw = self.snapshot.contents[chunk].raw
        assert raw is not None
        return raw[start : start + nbytes]


def is_plain(planner: SavePlanner) -> bool:
    """Return whether a planner hands over what is in the state as it is."""
    kind = type(planner)
    return isinstance(planner, DefaultSavePlanner) and all(
        getattr(kind, name) is getattr(DefaultSavePlanner, name)
        for name in ("set_up_planner", "lookup_object", "transform_object", "resolve_data")
    )


def plans_with(planner: SavePlanner, objects: Mapping[str, Any]) -> bool:
    """Return whether these objects, by name, are what `planner` plans with and hands over."""
    state = getattr(planner, "state_dict", {})
    return is_plain(planner) and all(state.get(name) is one for name, one in objects.items())


def keys_of(items: Sequence[WriteItem]) -> list[str]:
    """Return a key for each item: its name, made unique."""
    keys: dict[str, None] = {}
    for item in items:
        key = item.index.fqn
        while key in keys:
            key += f"@{len(keys)}"
        keys[key] = None
    return list(keys)


def places_of(items: Sequence[WriteItem]) -> dict[str, Place]:
    """Return where the items belong that are parts of tensors, by key."""
    return {
        key: Place(item.index.fqn, tuple(item.tensor_data.chunk.offsets))
        for key, item in zip(keys_of(items), items, strict=True)
        if item.tensor_data is not None and item.tensor_data.chunk.sizes != item.tensor_data.size
    }


def stored_form(item: WriteItem, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that is stored for an item.

    Raises
    ------
    StateError
        If it is not of the planned shape.
    """
    tensor = tensor.detach()
    data = item.tensor_data
    if data is not None and tensor.shape != data.chunk.sizes:
        raise StateError(
            f"tensor {item.index.fqn!r}: {list(data.chunk.sizes)} was planned, and it is {list(tensor.shape)} now"
        )
    if data is not None and data.chunk.sizes != data.size:
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor


def copied(state: Mapping[str, Any]) -> Any:
    """Return a copy of a state in host memory."""
    return BlockingAsyncStager().stage(dict(state))


@dataclass(frozen=True)
class Copy:
    """A copy of a whole state.

    Attributes
    ----------
    objects
        What is in it, by name.
    storages
        Addresses of the memory of its tensors, which the state does not have.
    """

    objects: Mapping[str, Any]
    storages: frozenset[int]

    @classmethod
    def of(cls, state: Mapping[str, Any], copy: Mapping[str, Any]) -> Copy:
        """Describe the `copy` of a state."""
        before, _ = flatten_state_dict(dict(state))
        objects, _ = flatten_state_dict(dict(copy))
        return cls(objects, _storages(objects) - _storages(before))


def _storages(objects: Mapping[str, Any]) -> frozenset[int]:
    """Return the addresses of the memory of those that are plain tensors, or whose shards are."""
    tensors = [one.to_local() if isinstance(one, DTensor) else one for one in objects.values()]
    plain = [one for one in tensors if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu"]
    return frozenset(one.untyped_storage().data_ptr() for one in plain)


def staged(state: Mapping[str, Any], items: Sequence[WriteItem], shards: ShardWriter) -> tuple[Any, Staged] | None:
    """Stage a state of which this rank is to write `items`.

    Returns
    -------
    state, staged
        What DCP is to plan with, and what this rank is to write; ``None`` if the state is not like that of which
        `items` were planned.
    """
    flat, paths = flatten_state_dict(dict(state))
    values: dict[str, Any] = {}
    stand_ins: dict[str, Any] = {}
    for key, item in zip(keys_of(items), items, strict=True):
        name = item.index.fqn
        if name not in flat:
            return None
        value = flat[name]
        if isinstance(value, torch.Tensor) == (item.type is WriteItemType.BYTE_IO):
            return None
        if isinstance(value, torch.Tensor):
            try:
                local = find_state_dict_object(flat, item.index)
            except ValueError:  # it has no such shard any more
                return None
            data = item.tensor_data
            if data is None or local.shape != data.chunk.sizes or value.shape != data.size:
                return None
            values[key] = stored_form(item, local)
            stand_ins[name] = _stand_in(value)
        else:
            values[key] = stand_ins[name] = value
    others = {name: one for name, one in flat.items() if isinstance(one, torch.Tensor) and name not in stand_ins}
    snapshot = shards.stage(values)
    planned = unflatten_state_dict({**flat, **copied(others), **stand_ins}, paths)
    return planned, Staged(snapshot, items, stand_ins)


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without memory that is planned like `tensor`; a copy where there can be none."""
    if isinstance(tensor, DTensor):
        local = torch.empty_like(tensor.to_local().detach(), device="meta")
        return DTensor.from_local(
            local.requires_grad_(tensor.requires_grad), tensor.device_mesh, tensor.placements,
            run_check=False, shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return torch.empty_like(tensor.detach(), device="meta").requires_grad_(tensor.requires_grad)
    one: torch.Tensor = copied({"": tensor})[""]
    return one
