"""Memory of live tensors and arrays, to restore into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from incckpt.entries import TensorEntry, byte_extent, byte_strides
from incckpt.memory import overlap_groups, raw_array, raw_view

__all__ = ["Live", "copy_into", "find_destinations", "overlaps_itself"]

Live: TypeAlias = torch.Tensor | npt.NDArray[Any]


def find_destinations(
    entries: Sequence[TensorEntry], sizes: Sequence[int], live: Mapping[int, Live]
) -> dict[int, npt.NDArray[np.uint8]]:
    """Return, by range, live memory that is laid out as the range is, and belongs to no other range.

    Parameters
    ----------
    entries
        All entries of a checkpoint.
    sizes
        Bytes of each range.
    live
        By entry, the tensor that it is restored into.

    Returns
    -------
    destinations
        ``uint8[sizes[range]]`` each, of any alignment.
    """
    spans: list[tuple[int, int, int, int]] = []  # entry, range, address of the first byte and of the one after the last
    for index, target in live.items():
        if entries[index].range >= 0 and (isinstance(target, np.ndarray) or target.is_cpu):
            start, strides, itemsize = _memory_of(target)
            low, high = byte_extent(target.shape, strides, itemsize)
            spans.append((index, entries[index].range, start + low, start + high))
    table = np.array(spans, np.uint64).reshape(-1, 4)
    groups = overlap_groups(table[:, 2], table[:, 3], np.zeros(len(spans), np.int64)).tolist()
    ranges_at: dict[int, set[int]] = {}
    for group, (_, number, _, _) in zip(groups, spans, strict=True):
        ranges_at.setdefault(group, set()).add(number)
    found: dict[int, npt.NDArray[np.uint8]] = {}
    for group, (index, number, low, high) in zip(groups, spans, strict=True):
        size = sizes[number]
        if number not in found and ranges_at[group] == {number} and high - low == size:
            target = live[index]
            if _is_laid_out_alike(entries[index], target):
                found[number] = np.asarray(_Memory(target, low, size))
    return found


def overlaps_itself(live: Live) -> bool:
    """Whether several elements of `live` share one place in memory (expanded tensors, sliding windows)."""
    _, strides, reach = _memory_of(live)
    for step, size in sorted((abs(step), size) for size, step in zip(live.shape, strides, strict=True) if size > 1):
        if step < reach:
            return True
        reach += (size - 1) * step
    return False


def copy_into(live: Live, source: Live) -> None:
    """Copy `source`, of the same shape and dtype, bit for bit, unless it is that memory itself.

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
    """Whether `live`, which spans as many bytes as the range of `entry`, has just those bytes in the same order."""
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
    """Bytes of `owner`, which it keeps alive, as numpy sees them."""

    def __init__(self, owner: Live, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False)}
