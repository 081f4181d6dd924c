"""The reading half of DCP's storage: `IncrementalReader`."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.utils import find_state_dict_object

from incckpt.errors import CheckpointNotFoundError, FormatError, IncckptError, StateMismatchError
from incckpt.integrations.dcp.places import step_of
from incckpt.integrations.dcp.staging import keys_of, stored_form
from incckpt.retention import Mode
from incckpt.run.choose import Which, checked_which, not_found
from incckpt.run.contents import Contents, read_packed
from incckpt.run.reader import Bytes, ChunkRead, Reader, read_box, reads_for
from incckpt.run.shards import ShardWriter, Source
from incckpt.run.view import RunView
from incckpt.staging.detect import chosen_threads
from incckpt.staging.hostmem import new_buffer
from incckpt.state.build import Builder, build
from incckpt.state.entries import TensorEntry
from incckpt.state.ranges import raw_view
from incckpt.state.tree import MappingNode, SequenceNode, TensorRef, Tree, references
from incckpt.store.blocks import Block
from incckpt.store.location import locate
from incckpt.store.manifest import Range
from incckpt.store.refs import RefName
from incckpt.store.store import Store

__all__ = ["IncrementalReader"]

_Scratch: TypeAlias = tuple[Bytes, torch.dtype]
"""Memory to read a part of a tensor into that cannot be read into place, and the dtype that was saved."""


class IncrementalReader(StorageReader):
    """Loads checkpoints into the shards that DCP plans, whichever ranks, or single process, saved them.

    Each rank fetches only the chunks that hold what it needs. Nothing is unpickled.

    Parameters
    ----------
    url
        Of the store; a fragment names run and step, as in ``s3://bucket/sweep#lr3e-4@500``.
    run, step
        In place of the fragment. By default the latest checkpoint. Every rank has to find the same one: give the step
        where another process may be saving.
    metric, mode
        What ``"best"`` goes by, as for `incckpt.load`.
    verify
        Whether to check the digests of all that is read.
    threads
        For decoding, on each rank; by default all cores that the process may use.
    storage_options
        For fsspec.

    Raises
    ------
    OptionError
        If an argument is not usable.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        run: str | None = None,
        step: Which | None = None,
        metric: str | None = None,
        mode: Mode = "min",
        verify: bool = True,
        threads: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        location = locate(url, run=run, step=checked_which(step))
        self._url, self._run, self._step = location.store, location.run, location.step
        self._ranking: tuple[str | None, Mode] = metric, mode
        self._verify = verify
        self._threads = chosen_threads(threads)
        self._options = storage_options
        self._lent: Store | None = None
        self._opened: Store | None = None  # from `read_metadata` to the end of `read_data`
        self._found: _Found | None = None
        self._error: IncckptError | None = None

    def over(self, store: Store) -> Self:
        """Read from a store that is open already, and stays so."""
        self._lent = store
        return self

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load; `checkpoint_id` may end in the step."""
        self._close()
        self._found = None
        if checkpoint_id is not None:
            self._step = step_of(checkpoint_id, self._url, self._run)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether `checkpoint_id` may name a checkpoint."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def read_metadata(self) -> Metadata:
        """Return what the checkpoint holds."""
        self._close()
        self._error = None
        try:
            self._found = self._look(self._store())
        except IncckptError as error:
            # DCP would make an AssertionError of it; `set_up_storage_reader` raises it.
            self._close()
            self._error = error
            return Metadata({})
        return self._found.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a load.

        Raises
        ------
        StoreNotFoundError, CheckpointNotFoundError
            If there is no such store or checkpoint.
        CorruptionError
            If it is damaged.
        """
        if self._error is not None:
            raise self._error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan with the name of the checkpoint that this rank has found."""
        assert self._found is not None
        return replace(plan, storage_data=str(self._found.name))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that all ranks have found the same checkpoint.

        Raises
        ------
        CheckpointNotFoundError
            If they have not.
        """
        names = sorted({plan.storage_data for plan in plans})
        if len(names) > 1:
            raise CheckpointNotFoundError(
                f"the ranks have found different checkpoints of run {self._run!r} at {self._url}, since one was saved "
                f"or pruned meanwhile: {', '.join(names)}. Load again, or give the step"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read what the plan asks for, straight into place where that can be.

        Raises
        ------
        MissingObjectError, CorruptionError
            If the checkpoint is damaged, or was pruned meanwhile.
        """
        assert self._found is not None
        try:
            with Reader(self._store(), threads=self._threads, verify=self._verify) as reader:
                _Load(self._found, reader, planner).run(plan.items)
        finally:
            self._close()
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future

    def adopt_into(self, shards: ShardWriter, state: Mapping[str, Any]) -> None:
        """Let a writer compare its next save with `state`, which was loaded, where this rank has what a rank has saved.

        With another number of ranks nothing is adopted.
        """
        assert self._found is not None
        flat, _ = flatten_state_dict(dict(state))
        plan = create_default_local_save_plan(flat, is_coordinator=False)
        items = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO]
        keyed = list(zip(keys_of(items), items, strict=True))
        sources = {key: found for key, item in keyed if (found := self._found.source(item)) is not None}
        if sources:
            values = {key: stored_form(item, find_state_dict_object(flat, item.index)) for key, item in keyed}
            shards.adopt(values, sources, self._found.contents.manifest)

    def _store(self) -> Store:
        if self._lent is not None:
            return self._lent
        if self._opened is None:
            self._opened = Store.open(self._url, self._options)
        return self._opened

    def _close(self) -> None:
        """Close the store of a load that is over, or that failed on another rank before this one could read."""
        if self._opened is not None:
            store, self._opened = self._opened, None
            store.close()

    def _look(self, store: Store) -> _Found:
        metric, mode = self._ranking
        with RunView(store, self._run, threads=self._threads, verify=self._verify, metric=metric, mode=mode) as view:
            _, found = view.read(
                self._step,
                lambda reader, manifest: Contents.of(manifest, fetch=partial(read_packed, reader, manifest)),
            )
            if found is None:
                raise not_found(view.run)
        name, _, contents = found
        return _Found(name, contents)


class _Found:
    """A checkpoint, as DCP sees it: flat, by names that dots join."""

    def __init__(self, name: RefName, contents: Contents) -> None:
        self.name = name
        self.contents = contents
        if not isinstance(contents.tree, MappingNode):
            raise StateMismatchError(
                f"step {name.step} holds no dict, as torch.distributed.checkpoint does; load it whole"
            )
        self.leaves: dict[str, Tree] = {}
        self.paths: dict[str, tuple[str | int, ...]] = {}
        for path, leaf in _leaves(contents.tree, ()):
            fqn = ".".join(map(str, path))
            self.leaves[fqn] = leaf
            self.paths[fqn] = path

    def metadata(self) -> Metadata:
        """Return what DCP plans with."""
        described: dict[str, Any] = {}
        for fqn, leaf in self.leaves.items():
            entry = self.entry(leaf)
            described[fqn] = BytesStorageMetadata() if entry is None else self._tensor(entry)
        return Metadata(described, planner_data=self.paths)

    def entry(self, leaf: Tree) -> TensorEntry | None:
        """Return the entry of a leaf that is a torch tensor."""
        if not isinstance(leaf, TensorRef):
            return None
        entry = self.contents.entries[leaf.index]
        return entry if entry.kind == "torch" else None

    def source(self, item: WriteItem) -> Source | None:
        """Return where the checkpoint has just what a rank would write for an item."""
        leaf = self.leaves.get(item.index.fqn)
        entry = None if leaf is None else self.entry(leaf)
        data = item.tensor_data
        if entry is None or data is None or entry.range < 0 or not _is_plain(entry) or entry.shape != data.size:
            return None
        source = self.contents.manifest.ranges[entry.range]
        if not source.blocks:
            return Source(source, entry.offset) if data.chunk.sizes == data.size else None
        if not _fills(entry, source):
            return None
        at, size = ((*where[:-1], where[-1] * entry.itemsize) for where in (data.chunk.offsets, data.chunk.sizes))
        start = 0
        for block in source.blocks:
            if block == (at, size):
                return Source(source, start)
            start += math.prod(block.shape)
        return None

    def _tensor(self, entry: TensorEntry) -> TensorStorageMetadata:
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise FormatError(f"tensor {entry.name!r}: torch {torch.__version__} has no dtype {entry.dtype}")
        places = [((0,) * len(entry.shape), entry.shape)]
        if entry.range >= 0 and _fills(entry, found := self.contents.manifest.ranges[entry.range]):
            size = entry.itemsize
            places = [((*at[:-1], at[-1] // size), (*shape[:-1], shape[-1] // size)) for at, shape in found.blocks]
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(shape)) for at, shape in places]
        properties = TensorProperties(dtype=dtype, requires_grad=entry.requires_grad)
        return TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)


def _fills(entry: TensorEntry, found: Range) -> bool:
    """Return whether a tensor is the array of a range that several processes wrote."""
    if not found.blocks or not _is_plain(entry) or entry.offset:
        return False
    itemsize = entry.itemsize
    aligned = all(at[-1] % itemsize == 0 == shape[-1] % itemsize for at, shape in found.blocks)
    return aligned and found.shape == (*entry.shape[:-1], entry.shape[-1] * itemsize)


def _is_plain(entry: TensorEntry) -> bool:
    """Return whether the bytes are those of the elements, in row-major order."""
    expected = 1
    for size, stride in zip(reversed(entry.shape), reversed(entry.stride), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= max(size, 1)
    return not (entry.packed or entry.conj or entry.neg)


def _leaves(tree: Tree, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Tree]]:
    """Yield what DCP flattens a state to: lists without tensors and dicts in them stay whole."""
    if isinstance(tree, MappingNode):
        for key, child in tree.items:
            yield from _leaves(child, (*path, str(key)))
    elif _is_whole(tree):
        yield path, tree
    else:
        assert isinstance(tree, SequenceNode)
        for index, child in enumerate(tree.items):
            yield from _leaves(child, (*path, index))


def _is_whole(tree: Tree) -> bool:
    if isinstance(tree, MappingNode):
        return False
    if not isinstance(tree, SequenceNode) or tree.kind != "list":
        return True
    containers = (MappingNode, SequenceNode)
    return not any(
        isinstance(item, TensorRef) or (isinstance(item, containers) and not _is_whole(item)) for item in tree.items
    )


@dataclass
class _Load:
    """One rank's reads."""

    found: _Found
    reader: Reader
    planner: LoadPlanner
    reads: dict[int, ChunkRead] = field(default_factory=dict)

    def run(self, items: Sequence[ReadItem]) -> None:
        """Read all items, and hand them to the planner."""
        whole = self._whole(items)
        deliveries: list[tuple[ReadItem, torch.Tensor, _Scratch | None]] = []
        for item in items:
            entry = self.found.entry(self._leaf(item))
            if item.type is not LoadItemType.BYTE_IO and entry is not None and _is_plain(entry):
                deliveries.append(self._read_part(item, entry))
        self.reader.read(self.reads.values())
        for item, target, scratch in deliveries:
            if scratch is not None:
                memory, dtype = scratch
                target.copy_(torch.from_numpy(memory.reshape(-1)).view(dtype).view(target.shape))
            self.planner.commit_tensor(item, target)
        for item in items:
            leaf = self._leaf(item)
            entry = self.found.entry(leaf)
            if item.type is LoadItemType.BYTE_IO:
                value = build(leaf, self.found.contents.entries, whole)
                stream = io.BytesIO()
                torch.save(value, stream)
                stream.seek(0)
                self.planner.load_bytes(item, stream)
            elif entry is not None and not _is_plain(entry):
                self._copy_part(item, leaf, whole)

    def _leaf(self, item: ReadItem) -> Tree:
        return self.found.leaves[item.storage_index.fqn]

    def _whole(self, items: Sequence[ReadItem]) -> list[Bytes | None]:
        """Return memory for the ranges that are read whole, and add them to the reads."""
        contents = self.found.contents
        ranges = contents.manifest.ranges
        buffers: list[Bytes | None] = [None] * len(ranges)
        for item in items:
            leaf = self._leaf(item)
            entry = self.found.entry(leaf)
            if item.type is LoadItemType.BYTE_IO or (entry is not None and not _is_plain(entry)):
                for index in references(leaf):
                    number = contents.entries[index].range
                    if number >= 0 and buffers[number] is None:
                        buffers[number] = new_buffer(ranges[number].nbytes)
        self.reader.memory.check(sum(one.nbytes for one in buffers if one is not None), "what is read whole")
        self.reads = reads_for(contents.manifest, ranges, buffers, contents.names())
        return buffers

    def _read_part(self, item: ReadItem, entry: TensorEntry) -> tuple[ReadItem, torch.Tensor, _Scratch | None]:
        """Add to the reads what an item asks for; return where it is to go, and memory to read it into if not there."""
        target = self.planner.resolve_tensor(item).detach()
        if target.shape != item.lengths:
            raise StateMismatchError(
                f"tensor {item.storage_index.fqn!r}: {list(item.lengths)} is to be read into {list(target.shape)}"
            )
        if not target.numel():
            return item, target, None
        offset = item.storage_index.offset or (0,) * len(entry.shape)
        at = tuple(a + b for a, b in zip(offset, item.storage_offsets, strict=True))
        size = entry.itemsize
        wanted = (
            Block((*at[:-1], at[-1] * size), (*item.lengths[:-1], item.lengths[-1] * size))
            if at
            else Block((0,), (size,))
        )
        shape = (*entry.shape[:-1], entry.shape[-1] * size) if at else (size,)
        manifest = self.found.contents.manifest
        source = manifest.ranges[entry.range]
        if not _fills(entry, source):
            source = Range(entry.nbytes, size, tuple(source.part(entry.offset, entry.offset + entry.nbytes)))
        out = _bytes_of(target) if str(target.dtype) == f"torch.{entry.dtype}" else None
        scratch = None
        if out is None or out.shape != wanted.shape:
            out = np.empty(wanted.shape, np.uint8)
            scratch = out, getattr(torch, entry.dtype)
        read_box(self.reads, manifest, source, wanted, shape, out, [entry.name])
        return item, target, scratch

    def _copy_part(self, item: ReadItem, leaf: Tree, buffers: Sequence[Bytes | None]) -> None:
        """Copy a part of a tensor that does not lie in row-major order."""
        assert isinstance(leaf, TensorRef)
        given = {index: buffer for index, buffer in enumerate(buffers) if buffer is not None}
        tensor = Builder(self.found.contents.entries, given, map_location="cpu").tensor(leaf.index)
        assert isinstance(tensor, torch.Tensor)
        part = tensor.detach()
        for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        target = self.planner.resolve_tensor(item).detach()
        target.copy_(part)
        self.planner.commit_tensor(item, target)


def _bytes_of(tensor: torch.Tensor) -> Bytes | None:
    """Return the memory of a tensor as an array of bytes of its shape, the last dimension in bytes, if it has one."""
    if tensor.device.type != "cpu" or type(tensor) is not torch.Tensor or tensor.is_conj() or tensor.is_neg():
        return None
    array = raw_view(tensor).numpy()
    if not array.ndim:
        return array.reshape(1).view(np.uint8)
    if array.strides[-1] != array.itemsize and array.shape[-1] != 1:
        return None
    if array.strides[-1] != array.itemsize:
        array = np.lib.stride_tricks.as_strided(array, strides=(*array.strides[:-1], array.itemsize))
    return array.view(np.uint8)
