"""Plain values and containers of a target: which of them a restore replaces or refills, and which it must match."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from incckpt.state.targets import is_stateful
from incckpt.state.tree import MappingNode, Plain, SequenceNode, Tree

__all__ = ["is_value", "needs_matching", "replace_contents", "takes_contents"]

_VALUES = (
    type(None), bool, int, float, complex, str, bytes, bytearray, set, frozenset, dict, list, tuple, deque,
    np.generic, np.dtype, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def is_value(target: object) -> bool:
    """Whether `target` is a value, which a restore can only replace."""
    return isinstance(target, _VALUES)


def takes_contents(target: Any, tree: Tree) -> bool:
    """Whether `target` can take the contents of `tree`; see `replace_contents`."""
    match tree:
        case MappingNode():
            return isinstance(target, dict)
        case SequenceNode(kind="list"):
            return isinstance(target, list)
        case SequenceNode(kind="deque"):
            return isinstance(target, deque)
        case Plain(value):
            return isinstance(target, set) and isinstance(value, set)
    return False


def replace_contents(target: Any, value: Any) -> Any:
    """Give `target` the contents of `value` if both are containers of one kind; return `target`, or else `value`."""
    if isinstance(target, dict) and isinstance(value, dict):
        target.clear()
        for key, item in value.items():
            target[key] = item
    elif isinstance(target, list) and isinstance(value, list):
        target[:] = value
    elif isinstance(target, set) and isinstance(value, set):
        target.clear()
        target.update(value)
    elif isinstance(target, deque) and isinstance(value, deque):
        target.clear()
        target.extend(value)
    else:
        return value
    return target


def needs_matching(value: object, seen: set[int]) -> bool:
    """Whether `value` is or contains something that is restored in place or cannot be replaced."""
    if isinstance(value, (torch.Tensor, np.ndarray, torch.Generator)) or is_stateful(value):
        return True
    if not isinstance(value, (dict, list, tuple, deque)):
        return not is_value(value)
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(needs_matching(item, seen) for item in (value.values() if isinstance(value, dict) else value))
