"""Writing into the memory of live tensors and arrays, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from incckpt.state.entries import TensorEntry, byte_extent, byte_strides
from incckpt.state.plain import type_name
from incckpt.state.ranges import overlap_groups, raw_array, raw_view

__all__ = ["Live", "copy_into", "find_destinations", "mark_changed", "overlaps_itself", "why_not_writable"]

_CPU = torch.device("cpu")

Live: TypeAlias = torch.Tensor | npt.NDArray[Any]


def why_not_writable(live: Live) -> str:
    """Return why `live` cannot be written to in place, or an empty string."""
    if isinstance(live, np.ndarray):
        if type(live) in (np.ndarray, np.memmap) and live.flags.writeable:
            return ""
        return f"is a read-only array, or a {type_name(live)}"
    plain = type(live) in (torch.Tensor, torch.nn.Parameter) and live.layout is torch.strided
    if not plain or live.is_meta or live.is_quantized:
        return f"is a {type_name(live)} of layout {live.layout} on {live.device}"
    if live.numel():
        _, strides, itemsize = _memory_of(live)
        end = live.storage_offset() * itemsize + byte_extent(live.shape, strides, itemsize)[1]
        if end > live.untyped_storage().nbytes() or not live.data_ptr():
            return "is a tensor whose memory has been freed"
    return ""


def find_destinations(
    entries: Sequence[TensorEntry],
    sizes: Sequence[int],
    live: Mapping[int, Live],
) -> tuple[dict[int, npt.NDArray[np.uint8]], set[int]]:
    """Return the live memory into which whole ranges can be read.

    Parameters
    ----------
    entries
        All entries of a checkpoint.
    sizes
        Bytes of each range.
    live
        Entry -> the tensor into which it is restored.

    Returns
    -------
    destinations
        Range -> ``uint8[sizes[range]]`` of any alignment: host memory with the layout of the range.
    contested
        Entries whose live memory also belongs to entries of other ranges, so that the order of writes matters.
    """
    spans: list[tuple[int, int, int]] = []  # range, address of the first byte and of the one after the last
    filled = [index for index in live if entries[index].range >= 0]
    devices: dict[torch.device, int] = {}
    spaces: list[int] = []
    for index in filled:
        target = live[index]
        start, strides, itemsize = _memory_of(target)
        low, high = byte_extent(target.shape, strides, itemsize)
        spans.append((entries[index].range, start + low, start + high))
        device = target.device if isinstance(target, torch.Tensor) else _CPU
        spaces.append(devices.setdefault(device, len(devices)))
    table = np.array(spans, np.uint64).reshape(-1, 3)
    groups = overlap_groups(table[:, 1], table[:, 2], np.array(spaces, np.int64)).tolist()
    ranges_at: dict[int, set[int]] = {}
    for group, (number, _, _) in zip(groups, spans, strict=True):
        ranges_at.setdefault(group, set()).add(number)
    contested: set[int] = set()
    found: dict[int, npt.NDArray[np.uint8]] = {}
    for group, index, (number, low, high) in zip(groups, filled, spans, strict=True):
        target, size = live[index], sizes[number]
        if len(ranges_at[group]) > 1:
            contested.add(index)
            continue
        on_host = isinstance(target, np.ndarray) or target.is_cpu
        if on_host and number not in found and high - low == size and _is_laid_out_alike(entries[index], target):
            found[number] = np.asarray(_Memory(target, low, size))
    return found, contested


def overlaps_itself(live: Live) -> bool:
    """Whether elements of `live` share memory, as in expanded tensors and sliding windows."""
    _, strides, reach = _memory_of(live)
    for step, size in sorted((abs(step), size) for size, step in zip(live.shape, strides, strict=True) if size > 1):
        if step < reach:
            return True
        reach += (size - 1) * step
    return False


def mark_changed(live: Live) -> None:
    """Tell autograd that `live` has changed."""
    if isinstance(live, torch.Tensor) and not live.is_inference():
        torch.autograd.graph.increment_version(live)


def copy_into(live: Live, source: Live) -> None:
    """Copy `source`, of the same shape and dtype, bit for bit, unless it is the same memory.

    If `live` overlaps itself, `source` must do so in the same way.
    """
    if isinstance(live, np.ndarray):
        assert isinstance(source, np.ndarray)
        if _memory_of(live) != _memory_of(source):
            raw_array(live)[...] = raw_array(source)
        return
    assert isinstance(source, torch.Tensor)
    if live.is_cpu and _memory_of(live) == _memory_of(source):
        return
    if (live.is_conj(), live.is_neg()) != (source.is_conj(), source.is_neg()):
        with torch.no_grad():
            live.copy_(source)
        return
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in live.stride())
    target, origin = raw_view(live)[once], raw_view(source)[once]
    if live.is_cpu and overlaps_itself(target):
        target.numpy()[...] = origin.numpy()  # torch refuses
    else:
        target.copy_(origin)


def _is_laid_out_alike(entry: TensorEntry, live: Live) -> bool:
    """Whether `live`, which spans as many bytes as the range of `entry`, has the same bytes in the same order."""
    _, strides, itemsize = _memory_of(live)
    old = byte_strides(entry)
    bits = (live.is_conj(), live.is_neg()) if isinstance(live, torch.Tensor) else (False, False)
    return (
        not entry.packed
        and bits == (entry.conj, entry.neg)
        and all(count == 1 or a == b for count, a, b in zip(live.shape, strides, old, strict=True))
        and entry.offset + byte_extent(entry.shape, old, itemsize)[0] == 0
        and _is_dense(live.shape, strides, itemsize)
    )


def _is_dense(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether every byte between the first and the last belongs to exactly one element."""
    reach = itemsize
    for step, size in sorted((abs(step), size) for size, step in zip(shape, strides, strict=True) if size > 1):
        if step != reach:
            return False
        reach *= size
    return True


def _memory_of(live: Live) -> tuple[int, tuple[int, ...], int]:
    """Return the address of the first element of `live`, its strides in bytes, and its element size."""
    if isinstance(live, np.ndarray):
        return live.__array_interface__["data"][0], live.strides, live.itemsize
    itemsize = live.element_size()
    return live.data_ptr(), tuple(step * itemsize for step in live.stride()), itemsize


class _Memory:
    """Memory of `owner` for numpy to view; keeps `owner` alive."""

    def __init__(self, owner: Live, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False)}
