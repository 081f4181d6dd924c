"""What a checkpoint is restored into: objects that load themselves, and the memory of live tensors and arrays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from incckpt.errors import StateMismatchError
from incckpt.state.entries import TensorEntry, byte_extent, byte_strides
from incckpt.state.plain import MAX_DEPTH
from incckpt.state.ranges import overlap_groups, raw_array, raw_view

__all__ = [
    "Live",
    "Place",
    "addresses",
    "copy_into",
    "find_destinations",
    "is_stateful",
    "load_and_compare",
    "load_module",
    "load_object",
    "load_optimizer",
    "overlaps_itself",
    "tensors_in",
]

log = logging.getLogger(__name__)

Place: TypeAlias = tuple[Any, ...]
"""Keys and positions that lead from a container to something in it."""


def is_stateful(value: object) -> bool:
    """Whether `value` is an object that saves and restores itself by ``state_dict()`` and ``load_state_dict()``."""
    return (
        callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
        and not isinstance(value, type)
    )


def tensors_in(value: object, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """Yield every torch tensor in nested dicts, lists and tuples, with the place where it is."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif len(place) < MAX_DEPTH:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        for key, child in items:
            yield from tensors_in(child, (*place, key))


def addresses(tensors: Iterable[torch.Tensor]) -> set[tuple[torch.device, int]]:
    """Return where the first elements of `tensors` are; those that have no address are left out."""
    return {
        (tensor.device, tensor.data_ptr())
        for tensor in tensors
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    }


def load_module(module: torch.nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Load a module's state.

    Raises
    ------
    StateMismatchError
        If the module refuses it; it may have taken a part by then.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise StateMismatchError(f"{path} cannot be restored: {error}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: str) -> None:
    """Load an optimizer's state exactly.

    ``Optimizer.load_state_dict`` casts floating-point state to the dtype of the parameter: the float32 moments of a
    bfloat16 parameter would lose half their bits. What comes back in another dtype is replaced by what was stored.
    """
    stored = list(tensors_in(state["state"]))
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    load_object(optimizer, state, path)
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    for (number, *keys), tensor in stored:
        container: Any = optimizer.state
        *way, last = (parameters.get(number, number), *keys)
        for key in way:
            container = container[key] if _has(container, key) else None
        now = container[last] if _has(container, last) else None
        if isinstance(now, torch.Tensor) and now.dtype != tensor.dtype and now.shape == tensor.shape:
            container[last] = tensor.to(now.device)


def load_object(target: Any, state: Any, path: str) -> None:
    """Call ``target.load_state_dict(state)``; what it raises says where that was."""
    try:
        target.load_state_dict(state)
    except Exception as error:
        error.add_note(f"raised while incckpt restored {path}")
        raise


def load_and_compare(target: Any, state: Any, path: str) -> None:
    """Load `state` into an object of unknown kind, and log which tensors it then gives back in another dtype."""
    dtypes = {place: tensor.dtype for place, tensor in tensors_in(state)}
    load_object(target, state, path)
    if not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes.values()):
        return
    changed = [
        f"{''.join(f'[{key!r}]' for key in place)} ({dtypes[place]} to {tensor.dtype})"
        for place, tensor in tensors_in(target.state_dict())
        if dtypes.get(place, tensor.dtype) != tensor.dtype
    ]
    if changed:
        log.warning("%s converted what it loaded, so it is not as it was saved: %s", path, ", ".join(changed))


def _has(container: Any, key: Any) -> bool:
    if isinstance(container, dict):
        return key in container
    return isinstance(container, list) and isinstance(key, int) and key < len(container)


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
