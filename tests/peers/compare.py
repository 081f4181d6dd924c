"""Are two states the same, to the last bit?"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch

__all__ = ["first_difference"]


def first_difference(a: Any, b: Any, place: str = "") -> str:
    """Return where two nested states first differ, and how; an empty string if they are the same.

    Tensors are the same if type, dtype, shape and every bit are: NaN equals NaN, but 0.0 is not -0.0. Keys have no
    order. Objects of other types are compared by their attributes.
    """
    if type(a) is not type(b):
        return f"{place} is {type(a).__name__}, not {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        return _tensors(a, b, place)
    if isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            return f"{place} differs"
        return ""
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return f"{place} has keys {_keys(a, b)}, not {_keys(b, a)}"
        return _first((a[key], b[key], f"{place}[{key!r}]") for key in a)
    if isinstance(a, (list, tuple, deque)):
        if len(a) != len(b):
            return f"{place} has {len(a)} items, not {len(b)}"
        return _first((x, y, f"{place}[{index}]") for index, (x, y) in enumerate(zip(a, b, strict=True)))
    if isinstance(a, float):
        return "" if np.float64(a).tobytes() == np.float64(b).tobytes() else f"{place} is {a!r}, not {b!r}"
    if a is b or isinstance(a, (str, bytes, int, Set, type)) or not hasattr(a, "__dict__"):
        return "" if a is b or a == b else f"{place} is {a!r}, not {b!r}"
    return first_difference(vars(a), vars(b), f"{place}.__dict__")


def _first(pairs: Any) -> str:
    return next(filter(None, (first_difference(*pair) for pair in pairs)), "")


def _keys(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> str:
    """Return the keys of `a` that `b` lacks, or some of them."""
    only = [repr(key) for key in a if key not in b]
    return f"{', '.join(only[:3])}{' …' if len(only) > 3 else ''}" if only else "no others"


def _tensors(a: torch.Tensor, b: torch.Tensor, place: str) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{place} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}"
    if a.is_quantized:
        return _first(
            [
                (a.int_repr(), b.int_repr(), f"{place}.int_repr()"),
                (a.q_scale() if a.qscheme() == torch.per_tensor_affine else a.q_per_channel_scales(),
                 b.q_scale() if b.qscheme() == torch.per_tensor_affine else b.q_per_channel_scales(), f"{place}.scale"),
            ]
        )  # fmt: skip
    if flatten := getattr(type(a), "__tensor_flatten__", None):
        (names, context), (_, other) = flatten(a), flatten(b)
        inner = ((getattr(a, name), getattr(b, name), f"{place}.{name}") for name in names)
        return first_difference(context, other, f"{place}.context") or _first(inner)
    if a.layout is not torch.strided:
        a, b = a.coalesce(), b.coalesce()
        return first_difference(a.indices(), b.indices(), place) or first_difference(a.values(), b.values(), place)
    if _bits(a) == _bits(b):
        return ""
    unlike = int((a.detach() != b.detach()).sum())
    return f"{place} differs in {unlike} of {a.numel()} elements"


def _bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy())
