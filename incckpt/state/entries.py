"""One record per tensor of a state: where its bytes are in which byte range, and how they form the tensor.

Touches no bytes. ``docs/structure.md`` describes the JSON form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from incckpt.errors import CorruptionError, FormatError, StateError
from incckpt.messages import shown

__all__ = [
    "MAX_DIMENSIONS",
    "TORCH_DTYPES",
    "Json",
    "TensorEntry",
    "byte_extent",
    "byte_strides",
    "check_entries",
    "dtype_component",
    "entry_from_json",
    "entry_to_json",
    "numpy_dtype_from_json",
    "numpy_dtype_from_text",
    "numpy_dtype_to_json",
    "numpy_dtype_to_text",
    "packed_shape",
    "range_kinds",
    "range_names",
]

Json: TypeAlias = Any  # None | bool | int | str | list[Json] | dict[str, Json]; mypy has no recursive alias through Any
"""A value that ``json.dumps(..., allow_nan=False)`` takes; never a float."""

TORCH_DTYPES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("bool", "uint8", "int8", "bits8", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2"), (1, 1)),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), (1, 1)),
    **dict.fromkeys((f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")), (1, 1)),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "bits16"), (2, 2)),
    **dict.fromkeys(("int32", "uint32", "float32"), (4, 4)),
    **dict.fromkeys(("int64", "uint64", "float64"), (8, 8)),
    "complex32": (4, 2),
    "complex64": (8, 4),
    "complex128": (16, 8),
}
"""Name of a torch dtype -> bytes of an element, and of a component of it. Quantised dtypes are left out on purpose."""

MAX_DIMENSIONS = 64
"""The most that numpy supports; it could not view a tensor of more."""

_INT64_MAX = 2**63 - 1
_FLAGS = ("parameter", "requires_grad", "conj", "neg", "packed")
_DIFFERENTIABLE = re.compile(r"b?float\d|complex\d")
_SIMPLE_DTYPE = re.compile(
    r"[<>|](?:b1|[iu](?:1|2|4|8)|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[SUV]\d{1,9}"
    r"|[mM]8(?:\[\d{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)
_DTYPE_DEPTH = 8


class TensorEntry(NamedTuple):
    """One torch tensor or numpy array of a state.

    Attributes
    ----------
    name
        Dotted path in the state (``"model.layers.0.weight"``). Need not be unique: the index in the list of entries is.
    kind
        ``"torch"`` or ``"numpy"``.
    dtype
        torch: the dtype's name without ``torch.``; numpy: ``dtype.str``, or a structured dtype's compact JSON text.
    shape
        Elements in each dimension.
    stride
        torch: in elements, ``>= 0``; numpy: in bytes, any sign. Each library's own unit.
    range
        Index of the byte range that contains the elements; -1 for a tensor without bytes.
    offset
        Bytes from the start of the range to the element at index ``(0, 0, ...)``.
    device
        Where a torch tensor was (``"cpu"``, ``"cuda:0"``).
    parameter
        Whether it was a ``torch.nn.Parameter``.
    requires_grad, conj, neg
        Of a torch tensor: the flag and the two bits. The range holds the bytes without the bits' effect.
    packed
        Whether the tensor had gaps, so that the range holds only its elements, in row-major order, with dimensions of
        stride 0 counted once. `stride` is the original one.
    """

    name: str
    kind: Literal["torch", "numpy"]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    range: int
    offset: int
    device: str = "cpu"
    parameter: bool = False
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False
    packed: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        if self.kind == "torch":
            return TORCH_DTYPES[self.dtype][0]
        return self.numpy_dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, each counted as often as the shape says."""
        return math.prod(self.shape) * self.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of an array."""
        return numpy_dtype_from_text(self.dtype)


# --- geometry ---------------------------------------------------------------------------------------------------------


def range_kinds(entries: Sequence[TensorEntry], count: int) -> list[str]:
    """Return the kind of each of `count` ranges: the last part of its first tensor's name, and its dtype.

    Numbers of one kind are similar: all weights, all biases, all first moments of an optimizer, all second ones.
    """
    kinds = [""] * count
    for entry in reversed(entries):
        if entry.range >= 0:
            kinds[entry.range] = f"{entry.name.rpartition('.')[2]} {entry.dtype}"
    return kinds


def range_names(entries: Sequence[TensorEntry], count: int) -> list[str]:
    """Return the name of the first tensor in each of `count` ranges."""
    names = [""] * count
    for entry in reversed(entries):
        if entry.range >= 0:
            names[entry.range] = entry.name
    return names


def byte_strides(entry: TensorEntry) -> tuple[int, ...]:
    """Return the strides of `entry` in bytes."""
    if entry.kind == "numpy":
        return entry.stride
    itemsize = entry.itemsize
    return tuple(stride * itemsize for stride in entry.stride)


def byte_extent(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Return the bytes ``[low, high)`` that a non-empty tensor spans, relative to its first element.

    Parameters
    ----------
    shape
        Elements in each dimension, all positive.
    strides
        Bytes, any sign.
    itemsize
        Bytes of one element.
    """
    low, high = 0, itemsize
    for size, stride in zip(shape, strides, strict=True):
        reach = (size - 1) * stride
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high


def unpacked_nbytes(entry: TensorEntry) -> int:
    """Return the bytes that a packed tensor spans once it is unpacked."""
    strides = byte_strides(entry)
    low, high = byte_extent(packed_shape(entry.shape, strides), strides, entry.itemsize)
    return high - low


def packed_shape(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a packed range's elements: dimensions of stride 0 (expanded ones) have one."""
    return tuple(size if stride else 1 for size, stride in zip(shape, strides, strict=True))


def _row_major(shape: Sequence[int], unit: int) -> tuple[int, ...]:
    strides = []
    for size in reversed(shape):
        strides.append(unit)
        unit *= max(size, 1)
    return tuple(reversed(strides))


# --- numpy dtypes -----------------------------------------------------------------------------------------------------


def numpy_dtype_to_json(dtype: np.dtype[Any], depth: int = 0) -> Json:
    """Return the JSON form of a numpy dtype: its ``str``, or an object for structured and subarray dtypes.

    Titles, offsets, padding and the ``align`` flag are kept; ``dtype.metadata`` is not.

    Raises
    ------
    StateError
        If the dtype holds references (object, variable-length strings) or is one that numpy cannot name (of another
        package, such as ``ml_dtypes``).
    """
    if depth > _DTYPE_DEPTH:
        raise StateError(f"a numpy dtype is nested more than {_DTYPE_DEPTH} levels deep; make it flatter")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": numpy_dtype_to_json(base, depth + 1), "shape": list(shape)}
    if dtype.names is not None and dtype.fields is not None:
        if dtype.type is not np.void:
            raise StateError(f"numpy dtype {dtype} cannot be stored; view the array with a plain structured dtype")
        fields = []
        for name in dtype.names:
            sub, offset, *title = dtype.fields[name]
            if any(not isinstance(text, str) for text in title):
                raise StateError(f"numpy dtype {dtype} has a title that is not a string; rename it")
            fields.append([name, numpy_dtype_to_json(sub, depth + 1), offset, *title])
        node: dict[str, Json] = {"fields": fields, "itemsize": dtype.itemsize}
        if dtype.isalignedstruct:
            node["align"] = True
        return node
    text = dtype.str
    if dtype.hasobject or not _SIMPLE_DTYPE.fullmatch(text) or np.dtype(text) != dtype:
        advice = "it holds references to Python objects" if dtype.hasobject else "numpy has no name for it"
        raise StateError(f"numpy dtype {dtype!r} cannot be stored: {advice}; convert the array, or view it as bytes")
    return text


def numpy_dtype_from_json(node: Json, depth: int = 0) -> np.dtype[Any]:
    """Return the dtype of a :func:`numpy_dtype_to_json` form.

    Raises
    ------
    CorruptionError
        If it is malformed.
    FormatError
        If this platform has no such dtype.
    """
    if depth > _DTYPE_DEPTH:
        raise CorruptionError("a numpy dtype is nested too deeply")
    try:
        match node:
            case str() if _SIMPLE_DTYPE.fullmatch(node):
                return np.dtype(node)
            case {"base": base, "shape": list(shape), **rest} if not rest:
                return np.dtype((numpy_dtype_from_json(base, depth + 1), tuple(_integers(shape))))
            case {"fields": list(fields), "itemsize": int(itemsize), **rest} if rest in ({}, {"align": True}):
                spec: dict[str, list[Any] | int] = {"itemsize": _natural(itemsize)}
                if any(not isinstance(field, list) or len(field) not in (3, 4) for field in fields):
                    raise CorruptionError("a field of a numpy dtype is not [name, dtype, offset(, title)]")
                spec["names"] = [_text(field[0]) for field in fields]
                spec["formats"] = [numpy_dtype_from_json(field[1], depth + 1) for field in fields]
                spec["offsets"] = [_natural(field[2]) for field in fields]
                if any(len(field) > 3 for field in fields):
                    spec["titles"] = [_text(field[3]) if len(field) > 3 else None for field in fields]
                return np.dtype(spec, align=bool(rest))  # type: ignore[call-overload, no-any-return]
    except (CorruptionError, FormatError):
        raise
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise FormatError(f"not a numpy dtype of this platform: {shown(node, 200)} ({error})") from error
    raise CorruptionError(f"not a numpy dtype: {shown(node, 200)}")


def numpy_dtype_to_text(dtype: np.dtype[Any]) -> str:
    """Return the dtype as :attr:`TensorEntry.dtype` holds it."""
    node = numpy_dtype_to_json(dtype)
    return node if isinstance(node, str) else json.dumps(node, separators=(",", ":"))


@lru_cache(maxsize=1024)
def numpy_dtype_from_text(text: str) -> np.dtype[Any]:
    """Return the dtype of a numpy entry."""
    if text.startswith("{"):
        try:
            return numpy_dtype_from_json(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorruptionError(f"not a numpy dtype: {shown(text, 200)}") from error
    return numpy_dtype_from_json(text)


def dtype_component(dtype: np.dtype[Any]) -> int:
    """Return the size of one number of this dtype for the byte-plane codec, in bytes: 1, 2, 4, 8 or 16."""
    if dtype.kind == "c":
        size = dtype.itemsize // 2
    elif dtype.kind == "U":
        size = 4
    elif dtype.kind in "iufmM":
        size = dtype.itemsize
    else:
        size = 1
    return size if size in (1, 2, 4, 8, 16) else 1


# --- JSON -------------------------------------------------------------------------------------------------------------


def entry_to_json(entry: TensorEntry) -> dict[str, Json]:
    """Return the JSON form of `entry`, without what is at its default (a row-major stride, offset 0, the CPU)."""
    node: dict[str, Json] = {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape)}
    if entry.kind == "numpy":
        node["kind"] = "numpy"
        if entry.dtype.startswith("{"):
            node["dtype"] = json.loads(entry.dtype)
    if entry.stride != _row_major(entry.shape, 1 if entry.kind == "torch" else entry.itemsize):
        node["stride"] = list(entry.stride)
    if entry.range >= 0:
        piece = {"range": entry.range}
        if entry.offset:
            piece["offset"] = entry.offset
        node["pieces"] = [piece]
    if entry.device != "cpu":
        node["device"] = entry.device
    if any(entry[-len(_FLAGS) :]):
        node["flags"] = [flag for flag in _FLAGS if getattr(entry, flag)]
    return node


def entry_from_json(node: Json) -> TensorEntry:
    """Return the entry of an :func:`entry_to_json` form, with each field checked by itself.

    :func:`check_entries` checks that it fits its range.

    Raises
    ------
    CorruptionError
        If a field is missing or malformed.
    FormatError
        If a field, flag or dtype is unknown to this version.
    """
    fields = dict(node) if isinstance(node, dict) else {}
    name = fields.pop("name", None)
    try:
        kind = fields.pop("kind", "torch")
        dtype, unit = _dtype(kind, fields.pop("dtype", None))
        shape = tuple([_natural(size) for size in _integers(fields.pop("shape", None))])
        stride = tuple(_integers(fields.pop("stride"))) if "stride" in fields else _row_major(shape, unit)
        range_, offset = _place(fields.pop("pieces", []))
        flags = fields.pop("flags", [])
        if not isinstance(flags, list) or any(flag not in _FLAGS for flag in flags):
            raise FormatError(f"unknown flags: {shown(flags, 200)}")
        entry = TensorEntry(
            name=_text(name),
            kind=kind,
            dtype=dtype,
            shape=shape,
            stride=stride,
            range=range_,
            offset=offset,
            device=_text(fields.pop("device", "cpu")),
            **dict.fromkeys(flags, True),
        )
        if fields:
            raise FormatError(f"unknown fields: {shown(sorted(fields), 200)}")
    except (CorruptionError, FormatError) as error:
        raise type(error)(f"tensor entry {shown(name, 200)}: {error}") from error
    return entry


def _place(pieces: Json) -> tuple[int, int]:
    """Return the range and offset of a tensor's only piece; an empty tensor has none."""
    if not isinstance(pieces, list) or not all(isinstance(piece, dict) for piece in pieces):
        raise CorruptionError(f"pieces: not a list of objects: {shown(pieces)}")
    if not pieces:
        return -1, 0
    piece = dict(pieces[0])
    if len(pieces) > 1 or "at" in piece:
        raise FormatError(f"it is stored in {len(pieces)} pieces, which needs a later incckpt")
    place = _natural(piece.pop("range", None)), _natural(piece.pop("offset", 0))
    if piece:
        raise FormatError(f"unknown fields of a piece: {shown(sorted(piece), 200)}")
    return place


def _dtype(kind: Json, dtype: Json) -> tuple[str, int]:
    """Return an entry's dtype, and the unit of its strides."""
    if kind == "numpy":
        text = json.dumps(dtype, separators=(",", ":")) if isinstance(dtype, dict) else _text(dtype)
        return text, numpy_dtype_from_text(text).itemsize
    if kind != "torch":
        raise FormatError(f"unknown kind {shown(kind)}")
    if _text(dtype) not in TORCH_DTYPES:
        raise FormatError(f"unknown dtype {shown(dtype)}: update incckpt")
    return dtype, 1


def check_entries(entries: Sequence[TensorEntry], sizes: Sequence[int]) -> None:
    """Check that every tensor lies inside its range, and that torch or numpy can represent it.

    Parameters
    ----------
    entries
        As read from a document.
    sizes
        Bytes of each range.

    Raises
    ------
    CorruptionError
        If one does not; names the tensor.
    """
    packings: dict[int, tuple[object, ...]] = {}
    for index, entry in enumerate(entries):
        fault = _fault(entry, sizes)
        if not fault and entry.range >= 0:
            packing = (entry.shape, byte_strides(entry), entry.itemsize) if entry.packed else ()
            if packings.setdefault(entry.range, packing) != packing:
                fault = f"disagrees with another tensor on how range {entry.range} is packed"
        if fault:
            raise CorruptionError(f"tensor {index} ({shown(entry.name, 200)}): {fault}")


def _fault(entry: TensorEntry, sizes: Sequence[int]) -> str:
    """Return what is wrong with an entry, or an empty string."""
    shape, stride = entry.shape, entry.stride
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        return f"shape {shape} with stride {stride}"
    if any(not 0 <= size <= _INT64_MAX for size in shape) or any(abs(step) > _INT64_MAX for step in stride):
        return f"shape {shape} or stride {stride} out of bounds"
    if entry.kind == "torch":
        if any(step < 0 for step in stride):
            return f"negative stride {stride}"
        if entry.conj and not entry.dtype.startswith("complex"):
            return f"conjugate bit on {entry.dtype}"
        if entry.requires_grad and not _DIFFERENTIABLE.match(entry.dtype):
            return f"requires_grad on {entry.dtype}"
    elif any(entry[8:12]) or entry.device != "cpu":
        return "a numpy array with a flag or device of a torch tensor"
    itemsize = entry.itemsize
    nbytes = math.prod(shape) * itemsize
    if max(nbytes, math.prod([size for size in shape if size])) > _INT64_MAX:
        return f"shape {shape} is too large"
    if nbytes == 0:
        return "an empty tensor with a range" if entry.range != -1 or entry.offset or entry.packed else ""
    if not 0 <= entry.range < len(sizes):
        return f"there is no range {entry.range}"
    size = sizes[entry.range]
    strides = byte_strides(entry)
    low, high = byte_extent(shape, strides, itemsize)
    if entry.packed:
        if entry.offset or math.prod(packed_shape(shape, strides)) * itemsize != size or high - low > _INT64_MAX:
            return f"packed, but does not fill its range of {size} bytes"
    elif entry.offset + low < 0 or entry.offset + high > size:
        return f"bytes [{entry.offset + low}, {entry.offset + high}) of a range of {size}"
    return ""


def _integers(values: Json) -> list[int]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise CorruptionError(f"not a list of integers: {shown(values, 200)}")
    return values


def _natural(value: Json) -> int:
    if type(value) is not int or not 0 <= value <= _INT64_MAX:
        raise CorruptionError(f"not a non-negative 64-bit integer: {shown(value, 200)}")
    return value


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise CorruptionError(f"not a string: {shown(value, 200)}")
    return value
