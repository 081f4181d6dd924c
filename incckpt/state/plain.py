"""Plain values <-> JSON: every value comes back unchanged and with its exact type, and reading runs no code."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from incckpt.errors import CorruptionError, FormatError, StateError
from incckpt.state.entries import Json, numpy_dtype_from_json, numpy_dtype_to_json

__all__ = [
    "DECODERS",
    "MAX_DEPTH",
    "PLAIN_TYPES",
    "Malformed",
    "as_bytes",
    "as_list",
    "as_text",
    "decode_device",
    "decode_numpy_scalar",
    "encode_key",
    "encode_plain",
    "excerpt",
    "shown",
    "type_name",
]

MAX_DEPTH = 64
"""The most nested containers. Reading one takes three levels of JSON and four Python frames, far from any limit."""

_SAFE_INT = 2**53 - 1  # every JSON reader keeps integers up to this exactly

# --- writing ----------------------------------------------------------------------------------------------------------


def _encode_int(value: int) -> Json:
    return value if -_SAFE_INT <= value <= _SAFE_INT else {"int": hex(value)}


def _float_text(value: float) -> str:
    if value == value:
        return repr(value)
    bits = struct.pack(">d", value).hex()
    return "nan" if bits == "7ff8000000000000" else f"nan:{bits}"


def _encode_str(value: str) -> Json:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate, as in a file name that is not UTF-8
            return {"str": _base64(value.encode("utf-8", "surrogatepass"))}
    return value


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _encode_set(value: set[Any] | frozenset[Any], depth: int = 0) -> Json:
    nodes = [encode_key(item, depth + 1) for item in value]
    return {type(value).__name__: sorted(nodes, key=lambda node: json.dumps(node, sort_keys=True))}


_ENCODERS: dict[type, Callable[[Any], Json]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    int: _encode_int,
    float: lambda value: {"float": _float_text(value)},
    complex: lambda value: {"complex": [_float_text(value.real), _float_text(value.imag)]},
    str: _encode_str,
    bytes: lambda value: {"bytes": _base64(value)},
    bytearray: lambda value: {"bytearray": _base64(value)},
    set: _encode_set,
    frozenset: _encode_set,
    torch.Size: lambda value: {"torch.Size": [_encode_int(size) for size in value]},
    torch.dtype: lambda value: {"torch.dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"torch.device": str(value)},
    torch.layout: lambda value: {"torch.layout": str(value).removeprefix("torch.")},
    torch.memory_format: lambda value: {"torch.memory_format": str(value).removeprefix("torch.")},
    TorchVersion: lambda value: {"torch.TorchVersion": str(value)},
}


PLAIN_TYPES = frozenset(_ENCODERS)
"""The types that `encode_plain` takes, besides numpy's scalars and dtypes."""


def encode_plain(value: object) -> Json | None:
    """Return the node of a plain value: a scalar, string, bytes, set, numpy scalar or dtype, small torch object.

    Returns
    -------
    node
        ``None`` for ``None``, and also if `value` is not plain.

    Raises
    ------
    StateError
        If `value` has a plain type but holds something that is not plain.
    """
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value)
    if isinstance(value, np.generic) and type(value) is value.dtype.type:
        if type(value) is np.str_:  # array elements and str(value) lose trailing NULs
            return {"numpy.str": _encode_str(str.__str__(value))}
        if type(value) is np.bytes_:
            return {"numpy.bytes": _base64(bytes(value))}
        return {"numpy.scalar": _base64(value.tobytes()), "dtype": numpy_dtype_to_json(value.dtype)}
    if isinstance(value, np.dtype):
        return {"numpy.dtype": numpy_dtype_to_json(value)}
    return None


def encode_key(value: object, depth: int = 0) -> Json:
    """Return the node of a dict key or a set's element: a plain hashable value, or a tuple or frozenset of such.

    Raises
    ------
    StateError
        If it is anything else.
    """
    if type(value) is str and value.isascii():
        return value
    if depth > MAX_DEPTH:
        raise StateError(f"nested more than {MAX_DEPTH} levels deep; store it flatter")
    if type(value) is tuple:
        return {"tuple": [encode_key(item, depth + 1) for item in value]}
    if type(value) is frozenset:
        return _encode_set(value, depth)
    node = encode_plain(value)
    if node is None and value is not None:
        raise StateError(
            f"a {type_name(value)} cannot be a stored key or set element; use a string, a number or a tuple of such"
        )
    return node


def shown(value: object) -> str:
    """Return ``repr(value)``, or the type if that fails: Python refuses to write integers of over 4,300 digits."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 -- an object's own __repr__ may raise anything, and a message must not fail over it
        return f"<{type_name(value)}>"


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


# --- reading -----------------------------------------------------------------------------------------------------


class Malformed(Exception):
    """A reason and a path, which grows by a segment per level on the way up, so that a successful read builds none."""

    def __init__(self, reason: str, kind: type[CorruptionError | FormatError] = CorruptionError) -> None:
        super().__init__(reason)
        self.kind = kind
        self.path: list[str] = []


def excerpt(node: Json) -> str:
    """Return the beginning of `node`, one level deep; ``repr`` would recurse as deep as the document."""
    if isinstance(node, dict):
        text = "{" + ", ".join(f"{key!r}: ..." for key in list(node)[:4]) + "}"
    elif isinstance(node, list):
        text = "[" + ", ".join(repr(item) if isinstance(item, str) else "..." for item in node[:4]) + "]"
    else:
        text = shown(node)
    return text if len(text) <= 80 else text[:77] + "..."


def as_list(node: Json) -> list[Json]:
    if not isinstance(node, list):
        raise Malformed(f"not a list: {excerpt(node)}")
    return node


def as_text(node: Json) -> str:
    if not isinstance(node, str):
        raise Malformed(f"not a string: {excerpt(node)}")
    return node


def as_bytes(node: Json) -> bytes:
    try:
        return base64.b64decode(as_text(node), validate=True)
    except ValueError as error:
        raise Malformed(f"not base64: {excerpt(node)}") from error


def _big_int(node: Json) -> int:
    if not re.fullmatch(r"-?0x[0-9a-f]+", text := as_text(node)):
        raise Malformed(f"not a hexadecimal integer: {excerpt(node)}")
    return int(text, 16)


def _int(node: Json) -> int:
    if isinstance(node, dict) and len(node) == 1 and "int" in node:
        return _big_int(node["int"])
    if type(node) is not int:
        raise Malformed(f"not an integer: {excerpt(node)}")
    return node


def _float(node: Json) -> float:
    text = as_text(node)
    if match := re.fullmatch(r"nan(?::([0-9a-f]{16}))?", text):
        value: float = struct.unpack(">d", bytes.fromhex(match[1] or "7ff8000000000000"))[0]
        if math.isnan(value):
            return value
    elif text in ("inf", "-inf"):
        return float(text)
    elif re.fullmatch(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text, re.ASCII) and math.isfinite(value := float(text)):
        return value
    raise Malformed(f"not a float: {excerpt(node)}")


def _complex(node: Json) -> complex:
    real, imag = as_list(node)
    return complex(_float(real), _float(imag))


def _any_str(node: Json) -> str:
    return as_bytes(node).decode("utf-8", "surrogatepass")


def _str(node: Json) -> str:
    return _any_str(node["str"]) if isinstance(node, dict) and len(node) == 1 and "str" in node else as_text(node)


def decode_device(node: Json) -> torch.device:
    try:
        return torch.device(as_text(node))
    except RuntimeError as error:
        raise Malformed(f"torch {torch.__version__} has no device {excerpt(node)}", FormatError) from error


def decode_numpy_scalar(node: Json) -> Any:
    """Return the numpy scalar of a ``{"numpy.scalar", "dtype"}`` node."""
    try:
        data, dtype = as_bytes(node["numpy.scalar"]), numpy_dtype_from_json(node["dtype"])
    except (CorruptionError, FormatError) as error:
        raise Malformed(str(error), type(error)) from error
    if dtype.subdtype is not None or dtype.kind in "US" or len(data) != dtype.itemsize:
        raise Malformed(f"{len(data)} bytes are no scalar of dtype {dtype}")
    return np.ndarray((), dtype, buffer=bytearray(data))[()]


_TORCH_NAMES: dict[type, dict[str, Any]] = {
    cls: {str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is cls}
    for cls in (torch.dtype, torch.layout, torch.memory_format)
}


def _torch_constant(cls: type, node: Json) -> Any:
    value = _TORCH_NAMES[cls].get(as_text(node))
    if value is None:
        raise Malformed(f"torch {torch.__version__} has no {cls.__name__} {excerpt(node)}", FormatError)
    return value


DECODERS: dict[str, Callable[[Json], Any]] = {
    "int": _big_int,
    "float": _float,
    "complex": _complex,
    "str": _any_str,
    "bytes": as_bytes,
    "bytearray": lambda node: bytearray(as_bytes(node)),
    "numpy.str": lambda node: np.str_(_str(node)),
    "numpy.bytes": lambda node: np.bytes_(as_bytes(node)),
    "numpy.dtype": numpy_dtype_from_json,
    "torch.Size": lambda node: torch.Size([_int(size) for size in as_list(node)]),
    "torch.dtype": lambda node: _torch_constant(torch.dtype, node),
    "torch.layout": lambda node: _torch_constant(torch.layout, node),
    "torch.memory_format": lambda node: _torch_constant(torch.memory_format, node),
    "torch.device": decode_device,
    "torch.TorchVersion": lambda node: TorchVersion(as_text(node)),
}
