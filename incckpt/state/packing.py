"""Packs large plain values: what would swell the structure is stored beside it, as bytes in chunks.

``docs/structure.md`` says what is packed and how; :mod:`incckpt.state._packing` does it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from incckpt.errors import CorruptionError, FormatError
from incckpt.state import _packing
from incckpt.state.entries import numpy_dtype_from_text
from incckpt.state.plain import MAX_DEPTH, PLAIN_TYPES, Malformed, encode_plain, shown
from incckpt.state.tree import (
    MAPPINGS,
    MappingNode,
    PackedRef,
    Pickled,
    Plain,
    PlainItems,
    SequenceNode,
    Tree,
    named_tuple_type,
    parse,
)

__all__ = ["BLOCK_BYTES", "HEAVY", "HEAVY_BYTES", "PackedValue", "opened", "pack", "unpack", "weighs_much"]

HEAVY = 1024
"""The weight from which a value is packed. Each value weighs 1; text and bytes, 1 more per 64 characters or bytes."""

HEAVY_BYTES = (HEAVY - 1) << 6
"""The same for a single text or ``bytes``: its length."""

BLOCK_BYTES = 1 << 20
"""A block of packed elements ends with the first that fills this much; appending changes only the last block."""

_NUMPY_SCALARS = {
    np.dtype(kind).type: np.dtype(kind).str
    for kind in ("?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "F", "D")
}


_NATIVE = frozenset((type(None), bool, int, float, complex, str, bytes, bytearray, set, frozenset))
_OTHERS = (PLAIN_TYPES - _NATIVE).union(
    {np.str_, np.bytes_, np.datetime64, np.timedelta64, np.longdouble, np.clongdouble}.difference(_NUMPY_SCALARS)
)


class PackedValue(NamedTuple):
    """A plain value stored beside the structure.

    Attributes
    ----------
    name
        Its dotted name.
    blocks
        Its bytes, immutable; or the ``bytes`` or ``str`` itself.
    """

    name: str
    blocks: list[bytes] | bytes | str


def weighs_much(value: Any, depth: int) -> bool:
    """Whether a container of any kind should be packed: it contains only plain values, and weighs `HEAVY` or more.

    Parameters
    ----------
    depth
        Number of containers around it.
    """
    return _packing.weigh(_RULES, value, depth, HEAVY) >= HEAVY


def pack(value: Any, depth: int) -> list[bytes]:
    """Return the elements of a container that `weighs_much`, or the pairs of a mapping, as bytes."""
    return _packing.pack(_RULES, value, depth, BLOCK_BYTES)


def unpack(data: Any, *, pairs: bool) -> Any:
    """Return the packed elements as a list or, with `pairs`, as a dict.

    Raises
    ------
    CorruptionError, FormatError
        If `pack` did not write `data`.
    """
    try:
        return _packing.unpack(_RULES, data, pairs)
    except Malformed as error:
        raise error.kind(str(error)) from error
    except (CorruptionError, FormatError):
        raise
    except (ValueError, TypeError, OverflowError, SyntaxError, RuntimeError) as error:
        raise CorruptionError(str(error)) from error


def opened(tree: Tree, data: Mapping[int, Any]) -> Tree:
    """Return `tree` with its references to packed values replaced by the values.

    Parameters
    ----------
    data
        Packed range -> its bytes; a range that is missing stays a reference.

    Raises
    ------
    CorruptionError, FormatError
        If the bytes are malformed; names the place.
    """
    if not data:
        return tree
    return _Opener(data).open(tree, "")


class _Opener:
    def __init__(self, data: Mapping[int, Any]) -> None:
        self._data = data

    def open(self, tree: Tree, path: str) -> Tree:
        match tree:
            case PackedRef(index) if index in self._data:
                try:
                    return _value_of(tree, self._data[index])
                except (CorruptionError, FormatError) as error:
                    raise type(error)(f"checkpoint structure, at state{path}, packed: {error}") from error
            case MappingNode(_, list(items), extra):
                found = [(key, self.open(child, f"{path}[{shown(key)}]")) for key, child in items]
                more = extra if tree.kind != "ordereddict" or extra is None else self.open(extra, f"{path}._metadata")
                if more is not extra or any(new is not old for (_, new), (_, old) in zip(found, items, strict=True)):
                    return replace(tree, items=found, extra=more)
            case SequenceNode(_, list(items)):
                parts = [self.open(child, f"{path}[{index}]") for index, child in enumerate(items)]
                if any(new is not old for new, old in zip(parts, items, strict=True)):
                    return replace(tree, items=parts)
        return tree


def _value_of(packed: PackedRef, data: Any) -> Tree:
    kind, extra = packed.kind, packed.extra
    if kind == "pickle":
        return Pickled(bytes(data), extra)
    if kind in ("bytes", "bytearray", "str"):
        raw = bytearray(data) if kind == "bytearray" else bytes(data)
        if kind != "str":
            return Plain(raw)
        try:
            return Plain(raw.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise CorruptionError(str(error)) from error
    if kind in MAPPINGS:
        return MappingNode(kind, PlainItems(unpack(data, pairs=True)), extra)
    items = unpack(data, pairs=False)
    if kind in ("set", "frozenset"):
        try:
            found = set(items)
        except TypeError as error:
            raise CorruptionError(str(error)) from error
        if len(found) != len(items):
            raise CorruptionError("an element of a set occurs twice")
        return Plain(found if kind == "set" else frozenset(found))
    if kind == "deque" and extra is not None and extra < len(items):
        raise CorruptionError(f"a deque of {len(items)} elements with maxlen {extra}")
    return SequenceNode(kind, PlainItems(items), extra)


def _encode_other(value: object) -> bytes:
    return json.dumps(encode_plain(value), separators=(",", ":")).encode()


def _decode_other(data: bytes) -> Any:
    tree = parse(json.loads(data), 0)
    if not isinstance(tree, Plain):
        raise CorruptionError("a node that is no plain value")
    return tree.value


def _fields_of(kind: type) -> tuple[str, tuple[str, ...]] | None:
    fields = getattr(kind, "_fields", None)
    if type(fields) is not tuple or any(type(field) is not str for field in fields) or hasattr(kind, "state_dict"):
        return None
    try:
        named_tuple_type(kind.__name__, fields)
    except ValueError:
        return None
    return kind.__name__, fields


def _scalar_of(text: str, data: bytes | None) -> Any:
    dtype = numpy_dtype_from_text(text)
    if dtype.kind not in "biufc":
        raise CorruptionError(f"no number has the dtype {text!r:.80}")
    return dtype.itemsize if data is None else np.frombuffer(data, dtype)[0]


_RULES = _packing.Rules(
    MAX_DEPTH,
    _NUMPY_SCALARS,
    _OTHERS,
    encode_other=_encode_other,
    decode_other=_decode_other,
    fields_of=_fields_of,
    type_of=named_tuple_type,
    scalar_of=_scalar_of,
)
