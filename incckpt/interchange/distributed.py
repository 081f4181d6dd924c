"""Folders of ``torch.distributed.checkpoint`` (DCP): written and read by its own writer and reader."""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from incckpt.errors import CorruptionError, PickleRefusedError, StateError
from incckpt.interchange.foreign import Foreign
from incckpt.interchange.mapped import Mappings
from incckpt.interchange.source import CheckpointBytes, NamedTensor
from incckpt.interchange.torch_files import array_globals, refusal, untouched_state
from incckpt.run.contents import Contents
from incckpt.state.build import Builder
from incckpt.state.entries import TensorEntry
from incckpt.state.ranges import CARRIERS

__all__ = ["METADATA", "read_dcp", "write_dcp"]

METADATA: Final = ".metadata"

_PART: Final = 64 << 20  # bytes of a tensor that are one item of the folder
_ALIGNMENT: Final = 64
_CLASSES: Final = frozenset(
    {
        *((dcp_metadata.__name__, name) for name in (*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        *((module, kind) for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")),
    }
)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_dcp(folder: Path, contents: Contents, source: CheckpointBytes, *, allow_pickle: bool) -> None:
    """Write a state as ``dcp.save`` of one process does, a part of a tensor in memory at a time.

    Parameters
    ----------
    folder
        Not there yet, or empty.

    Raises
    ------
    StateError
        If it is no dict, or a value cannot be pickled.
    """
    state, indexes = untouched_state(contents, source, allow_pickle=allow_pickle)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise StateError("torch.distributed.checkpoint holds dicts with strings as keys; choose one with root=")
    tensors = {address: NamedTensor("", contents.entries[index]) for address, index in indexes.items()}
    planner = _SavePlanner(tensors, source)
    writer = FileSystemWriter(folder)
    planner.set_up_planner(state, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    try:
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        written = writer.write_data(plan, planner)
        written.wait()
    except (pickle.PicklingError, TypeError, AttributeError, KeyError) as error:
        raise StateError(f"the state cannot be written for torch.distributed.checkpoint: {error}") from error
    writer.finish(metadata, [written.value()])


class _SavePlanner(DefaultSavePlanner):
    """Plans over a state whose memory was never touched, and gives the writer the bytes when it asks for them.

    Parameters
    ----------
    tensors
        What to read, by the identity of the tensor that stands for it.
    """

    def __init__(self, tensors: Mapping[int, NamedTensor], source: CheckpointBytes) -> None:
        super().__init__()
        self._tensors = tensors
        self._source = source

    def create_local_plan(self) -> SavePlan:
        """Return the usual plan, with large tensors in parts, in the order that their bytes lie in the checkpoint."""
        plan = super().create_local_plan()
        items = [part for item in plan.items for part in self._parts(item)]
        self.plan = replace(plan, items=sorted(items, key=self._place))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return what an item holds."""
        data = write_item.tensor_data
        if data is None:
            return super().resolve_data(write_item)
        tensor = self._tensor(write_item)
        assert tensor is not None
        shape, rows = tuple(data.chunk.sizes), tuple(data.chunk.offsets)
        if tensor.is_row_major and shape:
            start = tensor.entry.offset + rows[0] * (tensor.nbytes // max(tensor.entry.shape[0], 1))
            nbytes = math.prod(shape) * tensor.entry.itemsize
            found = self._source.read(tensor.entry.range, start, start + nbytes) if nbytes else np.empty(0, np.uint8)
        else:
            pieces = list(tensor.pieces(self._source))
            found = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
        stride = torch.empty(shape, device="meta").stride()
        entry = TensorEntry("", "torch", tensor.entry.dtype, shape, tuple(stride), 0 if found.nbytes else -1, 0)
        value = Builder([entry], {0: found}).tensor(0)
        assert isinstance(value, torch.Tensor)
        return value

    def _tensor(self, item: WriteItem) -> NamedTensor | None:
        return self._tensors.get(id(self.state_dict[item.index.fqn]))

    def _place(self, item: WriteItem) -> tuple[float, ...]:
        tensor = self._tensor(item)
        if item.tensor_data is None or tensor is None or not tensor.nbytes:
            return (-1,)
        offsets = tuple(item.tensor_data.chunk.offsets)
        first = self._source.manifest.ranges[tensor.entry.range].pieces[0]
        return (first[0], first[1], tensor.entry.offset, offsets[0] if offsets else 0)

    def _parts(self, item: WriteItem) -> list[WriteItem]:
        tensor = self._tensor(item)
        data = item.tensor_data
        if data is None or tensor is None or not tensor.is_row_major or tensor.nbytes <= _PART or not data.size:
            return [item]
        rows = data.size[0]
        step = max(1, _PART * rows // tensor.nbytes)
        parts = []
        for first in range(0, rows, step):
            offsets = torch.Size([first, *(0 for _ in data.size[1:])])
            sizes = torch.Size([min(step, rows - first), *data.size[1:]])
            chunk = TensorWriteData(ChunkStorageMetadata(offsets, sizes), data.properties, data.size)
            parts.append(WriteItem(MetadataIndex(item.index.fqn, offsets), WriteItemType.SHARD, tensor_data=chunk))
        return parts


# --- reading ----------------------------------------------------------------------------------------------------------


def read_dcp(folder: Path, *, allow_pickle: bool) -> Foreign:
    """Return the state that a folder holds, of however many processes. Shards are put together in a temporary file.

    Raises
    ------
    PickleRefusedError
        If it holds more than tensors, arrays and plain values, and `allow_pickle` is not set.
    CorruptionError
        If it is damaged.
    """
    metadata = _metadata(folder)
    described = metadata.state_dict_metadata
    sizes = {name: _nbytes(one) for name, one in described.items() if isinstance(one, TensorStorageMetadata)}
    places: dict[str, int] = {}
    total = 0
    for name, nbytes in sizes.items():
        places[name] = total
        total += nbytes + -nbytes % _ALIGNMENT
    values: dict[str, Any] = dict.fromkeys(described)
    with tempfile.TemporaryFile() as file:
        file.truncate(max(total, 1))
        memory = np.frombuffer(mmap.mmap(file.fileno(), max(total, 1)), np.uint8)
        mappings = Mappings([file.fileno()])
    for name, place in places.items():
        values[name] = _tensor_at(memory[place : place + sizes[name]], described[name])
    planner = _LoadPlanner(values, mappings, allow_pickle)
    reader = FileSystemReader(folder)
    try:
        planner.set_up_planner(dict(values), metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = planner.finish_plan(reader.prepare_global_plan(planner.create_global_plan([plan]))[0])
        reader.read_data(plan, planner).wait()
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AssertionError, pickle.UnpicklingError) as error:
        if isinstance(error, PickleRefusedError):
            raise
        raise CorruptionError(f"{folder} is no checkpoint of torch.distributed, or it is damaged: {error}") from error
    return Foreign(_nested(values, metadata.planner_data), (), mappings=mappings)


class _LoadPlanner(DefaultLoadPlanner):
    """Puts values where they belong, and lets go of the memory of what is written."""

    def __init__(self, values: dict[str, Any], mappings: Mappings, allow_pickle: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values = values
        self._mappings = mappings
        self._allow_pickle = allow_pickle

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickle a value."""
        name = read_item.dest_index.fqn
        with torch.serialization.safe_globals(array_globals()):
            try:
                self._values[name] = torch.load(value, map_location="cpu", weights_only=not self._allow_pickle)
            except pickle.UnpicklingError as error:
                raise refusal(repr(name), error) from error

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Let go of the pages that were written: they go to the file."""
        whole = self._values[read_item.dest_index.fqn]
        self._mappings.release(whole.data_ptr(), whole.nbytes)


class _Unpickler(pickle.Unpickler):
    """Reads what describes a folder: a pickle, of which nothing but plain records is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _metadata(folder: Path) -> Metadata:
    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
    except Exception as error:
        raise CorruptionError(f"{folder / METADATA} does not describe a checkpoint: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CorruptionError(f"{folder / METADATA} does not describe a checkpoint of torch.distributed")
    for stored in metadata.storage_data.values():
        path = folder / stored.relative_path
        if os.path.isabs(stored.relative_path) or ".." in Path(stored.relative_path).parts or not path.is_file():
            raise CorruptionError(f"{folder / METADATA} names the file {stored.relative_path!r}, which is not there")
    return metadata


def _nbytes(described: TensorStorageMetadata) -> int:
    return math.prod(described.size) * described.properties.dtype.itemsize


def _tensor_at(memory: np.ndarray[Any, np.dtype[np.uint8]], described: Any) -> torch.Tensor:
    dtype, shape = described.properties.dtype, described.size
    tensor = torch.empty(0, dtype=CARRIERS[dtype.itemsize]).view(dtype)
    if not memory.nbytes:
        return tensor.reshape(shape)
    stride = torch.empty(shape, device="meta").stride()
    return tensor.set_(torch.from_numpy(memory).untyped_storage(), 0, shape, stride)


def _nested(values: Mapping[str, Any], paths: object) -> dict[str, Any]:
    """Return flat values in the nesting that they had when they were saved, as far as the folder says."""
    nested: dict[str, Any] = {}
    known = paths if isinstance(paths, Mapping) else {}
    for name, value in values.items():
        path: Sequence[Any] = known.get(name, (name,))
        where: Any = nested
        for key, following in zip(path, [*path[1:], None], strict=True):
            if isinstance(where, list):
                where.extend([None] * (key + 1 - len(where)))
            inner = where[key] if isinstance(where, list) else where.get(key)
            if following is None:
                where[key] = value
            elif inner is None:
                where[key] = [] if isinstance(following, int) else {}
            where = where[key]
    return nested
