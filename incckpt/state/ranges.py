"""Groups the tensors of a state by their memory: one entry per tensor, and the byte ranges that hold them.

Tensors whose memory overlaps, torch or numpy, share a range, so ties and views survive. Tensors without plain memory
(meta, sparse, sharded, ...) are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from incckpt.errors import StateError
from incckpt.state.entries import (
    MAX_DIMENSIONS,
    TORCH_DTYPES,
    TensorEntry,
    byte_extent,
    dtype_component,
    numpy_dtype_to_text,
    packed_shape,
)

__all__ = ["CARRIERS", "ByteRange", "TensorTable", "overlap_groups", "raw_array", "raw_view"]

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Element size -> a dtype whose copies only move bits, and which every version of torch can copy."""

_DTYPES = {getattr(torch, name): (name, *sizes) for name, sizes in TORCH_DTYPES.items() if hasattr(torch, name)}
_CPU = torch.device("cpu")


@dataclass(slots=True)
class ByteRange:
    """The smallest run of bytes that covers a group of overlapping tensors.

    Attributes
    ----------
    nbytes
        Length; never 0.
    itemsize
        Element size for the codec: 1, 2, 4, 8 or 16; divides `nbytes`.
    device
        Where the memory is.
    address
        Address of the first byte if `device` is the CPU, else 0.
    owner
        Keeps the memory alive.
    tensor
        On other devices, the range as a flat ``uint8[nbytes]`` tensor to copy from; else ``None``.
    names
        Names of the entries in it.
    """

    nbytes: int
    itemsize: int
    device: torch.device
    address: int
    owner: object
    tensor: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)


class _Record(NamedTuple):
    """A tensor and its memory. Addresses are absolute on the CPU; for devices see :meth:`TensorTable._origin`."""

    name: str
    kind: Literal["torch", "numpy"]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int
    component: int
    low: int
    first: int
    high: int
    gaps: bool
    device: torch.device
    origin: int  # where the storage begins
    owner: Any  # torch.UntypedStorage or numpy.ndarray
    flags: tuple[bool, bool, bool, bool]  # parameter, requires_grad, conj, neg


def raw_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the memory of `tensor` as integers, without conjugate or negative bit, and without autograd."""
    view = torch.empty(0, dtype=CARRIERS[tensor.element_size()], device=tensor.device)
    return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def raw_array(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view of the memory of `array` as integers or bare bytes; copies of it include padding."""
    size = array.itemsize
    return array.view(f"u{size}" if size in (1, 2, 4, 8) else f"V{size}")


class TensorTable:
    """Collects the tensors of one state; :meth:`finish` groups them into ranges.

    The table, and then the ranges, keep the memory of every tensor alive. Otherwise another tensor could get the
    address of a freed temporary, and the two would look like aliases.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._origins: dict[tuple[torch.device, int], int] = {}
        self._next_origin = 1 << 20
        self._numpy_dtypes: dict[np.dtype[Any], str] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add_torch(self, tensor: torch.Tensor, name: str, *, parameter: bool = False) -> int:
        """Add a tensor of exactly the type ``torch.Tensor`` or ``torch.nn.Parameter``; return its index.

        Raises
        ------
        StateError
            If it has no plain memory; says what to do instead.
        """
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            raise StateError(_no_memory(tensor))
        try:
            storage = tensor.untyped_storage()
            first = tensor.data_ptr()
        except RuntimeError as error:
            raise StateError(f"a tensor inside a torch.func transform has no memory to save ({error})") from error
        dtype_name, itemsize, component = dtype
        offset = int(tensor.storage_offset()) * itemsize
        if tensor.is_cpu:
            device, origin = _CPU, first - offset
        else:
            device = tensor.device
            origin = self._origin(device, storage)
            first = origin + offset
        shape, stride = tuple(tensor.shape), tensor.stride()
        if len(shape) > MAX_DIMENSIONS:
            raise StateError(
                f"a tensor of {len(shape)} dimensions cannot be saved; reshape it to {MAX_DIMENSIONS} at most"
            )
        low, high, gaps = first, first + tensor.numel() * itemsize, False
        if high != low:
            if not tensor.is_contiguous():
                strides = [step * itemsize for step in stride]
                high = first + byte_extent(shape, strides, itemsize)[1]
                gaps = _has_gaps(shape, strides, itemsize)
            if high - origin > storage.nbytes():
                raise StateError(
                    f"the tensor's memory has been freed ({storage.nbytes()} bytes are left of {high - origin}); "
                    "gather sharded parameters before saving"
                )
            if first == 0:
                raise StateError("the tensor has no memory: something else holds its elements; save tensor.clone()")
        flags = (parameter, tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
        self._records.append(
            _Record(
                name, "torch", dtype_name, shape, stride, itemsize, component,
                low, first, high, gaps, device, origin, storage, flags,
            )
        )  # fmt: skip
        return len(self._records) - 1

    def add_numpy(self, array: npt.NDArray[Any], name: str) -> int:
        """Add an array of exactly the type ``numpy.ndarray`` (or a memory map); return its index.

        Raises
        ------
        StateError
            If its dtype cannot be stored.
        """
        dtype = array.dtype
        text = self._numpy_dtypes.get(dtype)
        if text is None:
            text = numpy_dtype_to_text(dtype)
            if not dtype.fields:  # equal structured dtypes may differ in their padding flag
                self._numpy_dtypes[dtype] = text
        shape, stride, itemsize = array.shape, array.strides, dtype.itemsize
        first = array.__array_interface__["data"][0]
        low, high, gaps = first, first + array.nbytes, False
        if itemsize == 0:
            stride = (0,) * array.ndim  # meaningless, but numpy would require memory for them
        if high != low and not array.flags.c_contiguous:
            down, up = byte_extent(shape, stride, itemsize)
            low, high = first + down, first + up
            gaps = _has_gaps(shape, stride, itemsize)
        self._records.append(
            _Record(
                name, "numpy", text, shape, stride, itemsize, dtype_component(dtype),
                low, first, high, gaps, _CPU, low, array, (False, False, False, False),
            )
        )  # fmt: skip
        return len(self._records) - 1

    def finish(self) -> tuple[list[TensorEntry], list[ByteRange]]:
        """Return the entries, in the order they were added, and the ranges, in the order of their first entries."""
        records = self._records
        range_of, groups = _group(records)
        ranges: list[ByteRange] = []
        starts: list[int] = []
        packed: list[bool] = []
        for members in groups:
            made, start = self._range([records[index] for index in members])
            ranges.append(made)
            starts.append(start)
            packed.append(start < 0)
        entries = [
            TensorEntry(
                record.name,
                record.kind,
                record.dtype,
                record.shape,
                record.stride,
                index,
                0 if index < 0 or packed[index] else record.first - starts[index],
                "cpu" if record.device is _CPU else str(record.device),
                *record.flags,
                index >= 0 and packed[index],
            )
            for record, index in zip(records, range_of, strict=True)
        ]
        return entries, ranges

    def _origin(self, device: torch.device, storage: torch.UntypedStorage) -> int:
        """Return an invented address for a storage on a device, such that storages never overlap.

        There ``data_ptr()`` need not be an address (on MPS it is not).
        """
        key = (device, storage.data_ptr())
        origin = self._origins.get(key)
        if origin is None:
            origin = self._origins[key] = self._next_origin
            self._next_origin += (1 << 50) + storage.nbytes()
        return origin

    def _range(self, members: Sequence[_Record]) -> tuple[ByteRange, int]:
        """Return the range of overlapping `members`, and the address of its first byte, or -1 if it is packed."""
        record = members[0]
        names = [member.name for member in members]
        if record.gaps and all(_same_geometry(member, record) for member in members):
            return _pack(record, _itemsize(members, 0), names), -1
        low = record.low
        high = record.high
        owner: Any = record.owner
        if len(members) > 1:
            low = min(member.low for member in members)
            high = max(member.high for member in members)
            low -= _misalignment(members, low)
            owner = [member.owner for member in members]
        nbytes = high - low
        itemsize = _itemsize(members, nbytes)
        if record.device is _CPU:
            return ByteRange(nbytes, itemsize, _CPU, low, owner, None, names), low
        storage = max((member.owner for member in members), key=lambda storage: storage.nbytes())
        flat = torch.empty(0, dtype=torch.uint8, device=record.device)
        flat.set_(storage, low - record.origin, (nbytes,), (1,))
        return ByteRange(nbytes, itemsize, record.device, 0, storage, flat, names), low


def overlap_groups(
    low: npt.NDArray[np.uint64], high: npt.NDArray[np.uint64], space: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return for each interval the number of its group: intervals that overlap, directly or through others, share one.

    Intervals that merely touch do not overlap. Groups are numbered in the order of their first members.

    Parameters
    ----------
    low, high
        The intervals ``[low, high)``, none of them empty.
    space
        Only intervals in the same space overlap.
    """
    order = np.lexsort((low, space))
    begins = np.ones(len(low), np.bool_)
    for i in np.unique(space):
        here = np.flatnonzero(space[order] == i)
        reach = np.maximum.accumulate(high[order[here]])
        begins[here[1:]] = low[order[here[1:]]] >= reach[:-1]
    found = np.empty(len(low), np.int64)
    found[order] = np.cumsum(begins) - 1
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _group(records: Sequence[_Record]) -> tuple[list[int], list[list[int]]]:
    """Return for each record the number of its group (-1: it has no bytes), and the members of each group."""
    filled = [index for index, record in enumerate(records) if record.high != record.low]
    n = len(filled)
    low = np.fromiter((records[index].low for index in filled), np.uint64, n)
    high = np.fromiter((records[index].high for index in filled), np.uint64, n)
    devices = {record.device for record in records}
    space = np.zeros(n, np.int64)
    if len(devices) > 1:
        number = {device: i for i, device in enumerate(devices)}
        space = np.fromiter((number[records[index].device] for index in filled), np.int64, n)
    labels = overlap_groups(low, high, space).tolist()
    range_of = [-1] * len(records)
    groups: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for index, group in zip(filled, labels, strict=True):
        range_of[index] = group
        groups[group].append(index)
    return range_of, groups


def _has_gaps(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether there are bytes between the elements, and elements overlap only by strides of 0."""
    reach = dense = itemsize
    for step, size in sorted((abs(step), size) for size, step in zip(shape, strides, strict=True) if step and size > 1):
        if step < reach:
            return False
        reach += (size - 1) * step
        dense *= size
    return dense < reach


def _byte_strides(record: _Record) -> tuple[int, ...]:
    return record.stride if record.kind == "numpy" else tuple(step * record.itemsize for step in record.stride)


def _same_geometry(a: _Record, b: _Record) -> bool:
    return a is b or (
        a.first == b.first and a.shape == b.shape and a.itemsize == b.itemsize and _byte_strides(a) == _byte_strides(b)
    )


def _itemsize(members: Sequence[_Record], nbytes: int) -> int:
    """Return the component size of most of the members' bytes, reduced until it divides `nbytes`."""
    if len(members) == 1:
        size = members[0].component
    else:
        votes: dict[int, int] = {}
        for member in members:
            votes[member.component] = votes.get(member.component, 0) + member.high - member.low
        size = max(votes, key=lambda size: (votes[size], size))
    while nbytes % size:
        size //= 2
    return size


def _misalignment(members: Sequence[_Record], low: int) -> int:
    """Return how far before `low` a range must start to place torch tensors at multiples of their element sizes.

    A view of bytes may start anywhere in its storage. A view of wider elements that overlaps it must keep the storage's
    alignment, or a storage that begins with the range could not hold it.
    """
    views = [member for member in members if member.kind == "torch"]
    if all((view.first - low) % view.itemsize == 0 for view in views):
        return 0
    room = max((low - view.origin for view in views if view.origin <= low), default=0)
    for shift in range(1, min(room, 15) + 1):
        if all((view.first - low + shift) % view.itemsize == 0 for view in views):
            return shift
    return 0  # numpy memory that torch views at odd places: restored as separate storages over the same bytes


def _pack(record: _Record, itemsize: int, names: list[str]) -> ByteRange:
    """Copy only the elements, in row-major order, each once."""
    shape = packed_shape(record.shape, _byte_strides(record))
    if record.kind == "numpy":
        array = np.lib.stride_tricks.as_strided(raw_array(record.owner), shape, record.stride).copy(order="C")
        address = array.__array_interface__["data"][0]
        return ByteRange(array.nbytes, itemsize, _CPU, address, array, None, names)
    view = torch.empty(0, dtype=CARRIERS[record.itemsize], device=record.device)
    view.set_(record.owner, (record.first - record.origin) // record.itemsize, shape, record.stride)
    flat = view.contiguous().reshape(-1).view(torch.uint8)
    if record.device is _CPU:
        return ByteRange(flat.numel(), itemsize, _CPU, flat.data_ptr(), flat, None, names)
    return ByteRange(flat.numel(), itemsize, record.device, 0, flat, flat, names)


def _no_memory(tensor: torch.Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor cannot be saved; save a list of its components: tensor.unbind()"
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        return f"a tensor of layout {kind} cannot be saved; save tensor.to_dense(), or its indices and values"
    if tensor.is_quantized:
        return "a quantised tensor cannot be saved; save tensor.int_repr() with its scale and zero point"
    if tensor.is_meta:
        return "a meta tensor has no data; materialise the module before saving (module.to_empty(), then initialise it)"
    return f"tensors of dtype {tensor.dtype} cannot be saved; view it as an integer dtype: tensor.view(torch.uint8)"
