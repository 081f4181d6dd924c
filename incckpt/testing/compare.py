"""Whether two states are the same, bit for bit."""

from __future__ import annotations

import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from incckpt.state.plain import shown
from incckpt.state.ranges import overlap_groups, raw_array, raw_view

__all__ = ["aliases", "assert_same_state", "difference"]


def assert_same_state(left: object, right: object) -> None:
    """Check that two states are the same, and that their tensors share memory in the same way.

    Raises
    ------
    AssertionError
        Naming the first difference.
    """
    if found := difference(left, right):
        raise AssertionError(found)
    if aliases(left) != aliases(right):
        raise AssertionError(f"tensors share memory differently: {aliases(left)} and {aliases(right)}")


def difference(left: Any, right: Any, path: str = "state") -> str:
    """Return where `left` and `right` first differ, or an empty string.

    Types, nesting, order and keys count, and for tensors dtype, shape, stride, flags and bits. Namedtuple types with
    the same name and fields count as one.
    """
    named = isinstance(left, tuple) and hasattr(left, "_fields") and hasattr(right, "_fields")
    if named and (type(left).__name__, left._fields) != (type(right).__name__, right._fields):
        return f"{path}: {type(left)} with {left._fields} and {type(right)} with {right._fields}"
    if not named and type(left) is not type(right):
        return f"{path}: {type(left)} and {type(right)}"
    facts = _facts(left), _facts(right)
    if facts[0] != facts[1]:
        return f"{path}: {shown(facts[0])} and {shown(facts[1])}"
    children = list(_children(left)), list(_children(right))
    if len(children[0]) != len(children[1]):
        return f"{path}: {len(children[0])} and {len(children[1])} elements"
    for (segment, one), (_, other) in zip(*children, strict=True):
        if found := difference(one, other, f"{path}{segment}"):
            return found
    return ""


def aliases(state: Any) -> list[tuple[int, int]]:
    """Return for each tensor and array, in order, the number of its block of memory and its offset there in bytes."""
    spans = [span for leaf in _leaves(state) if (span := _span(leaf))]
    table = np.array(spans, np.uint64).reshape(-1, 3)
    groups = overlap_groups(table[:, 0], table[:, 2], np.zeros(len(spans), np.int64)).tolist()
    lowest: dict[int, int] = {}
    for group, (low, _, _) in zip(groups, spans, strict=True):
        lowest[group] = min(low, lowest.get(group, low))
    return [(group, first - lowest[group]) for group, (_, first, _) in zip(groups, spans, strict=True)]


def _facts(value: Any) -> object:
    """Return all that matters of `value` except its children, in a form that ``==`` compares."""
    match value:
        case torch.Tensor():
            bits = (value.requires_grad, value.is_conj(), value.is_neg())
            return str(value.dtype), tuple(value.shape), value.stride(), str(value.device), bits, _raw_bytes(value)
        case np.ndarray():
            return value.dtype, value.dtype.isalignedstruct, value.shape, value.strides, _raw_bytes(value)
        case np.str_():
            return str.__str__(value)
        case np.generic():
            return value.dtype, value.tobytes()
        case torch.Generator():
            return str(value.device), value.get_state().tolist()
        case float():
            return struct.pack("<d", value)
        case complex():
            return struct.pack("<dd", value.real, value.imag)
        case set() | frozenset():
            return sorted(map(_in_order, value))
        case defaultdict():
            return value.default_factory
        case deque():
            return value.maxlen
        case dict() | list():
            return None
        case tuple() if not isinstance(value, torch.Size):
            return None
    return value


def _in_order(item: object) -> str:
    """Return a text for an element of a set, unlike ``repr`` the same for equal frozensets."""
    if isinstance(item, (tuple, frozenset)):
        parts = map(_in_order, item)
        return f"{type(item).__name__}({', '.join(sorted(parts) if isinstance(item, frozenset) else parts)})"
    text = hex(item) if type(item) is int else repr(item)  # Python refuses to write over 4,300 decimal digits
    return f"{type(item).__name__}({text})"


def _raw_bytes(value: torch.Tensor | npt.NDArray[Any]) -> bytes:
    """Return the elements in row-major order, including padding inside them."""
    if isinstance(value, torch.Tensor):
        return raw_view(value).cpu().numpy().tobytes()
    return raw_array(value).tobytes() if value.nbytes else b""


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield f" key {shown(key)}", key
            yield f"[{shown(key)}]", child
        if isinstance(value, OrderedDict):
            yield "._metadata", getattr(value, "_metadata", None)
    elif isinstance(value, (list, deque)) or (isinstance(value, tuple) and not isinstance(value, torch.Size)):
        for index, child in enumerate(value):
            yield f"[{index}]", child


def _leaves(value: Any) -> Iterator[Any]:
    children = list(_children(value))
    if not children:
        yield value
    for _, child in children:
        yield from _leaves(child)


def _span(value: Any) -> tuple[int, int, int] | None:
    """Return the addresses of the lowest byte, the first element, and the byte after the highest one."""
    if isinstance(value, torch.Tensor) and value.numel():
        first, itemsize = value.data_ptr(), value.element_size()
        strides = [step * itemsize for step in value.stride()]
    elif isinstance(value, np.ndarray) and value.nbytes:
        first, strides, itemsize = value.__array_interface__["data"][0], list(value.strides), value.itemsize
    else:
        return None
    reaches = [(size - 1) * step for size, step in zip(value.shape, strides, strict=True)]
    low = first + sum(reach for reach in reaches if reach < 0)
    return low, first, first + itemsize + sum(reach for reach in reaches if reach > 0)
