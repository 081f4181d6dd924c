"""JSON documents (manifests, refs, pins, lists), all written in one form and checked on reading.

``docs/format.md`` is the specification.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias, TypeVar, overload

from incckpt.errors import CorruptionError, FormatError
from incckpt.messages import shown

__all__ = [
    "DOCUMENT_HEAD",
    "FORMAT",
    "Fields",
    "Json",
    "JsonList",
    "as_mapping",
    "decode_float",
    "decode_metrics",
    "dump_document",
    "encode_float",
    "encode_metrics",
    "is_count",
    "parse_document",
]

FORMAT = 1
_HIGHEST = {"manifest": 2}  # kinds that have changed; each document is written in the lowest format that can express it
DOCUMENT_HEAD = b'{"format":'
"""The first bytes of every document of every version."""

Json: TypeAlias = Any

_Item = TypeVar("_Item")

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=True)
_CHECK = b',"check":"%08x"}'
_CHECK_NBYTES = len(_CHECK % 0)


def dump_document(kind: str, fields: Mapping[str, Json], *, version: int = FORMAT) -> bytes:
    """Return a document as compact JSON in UTF-8; its last field is the CRC-32 of all bytes before.

    `version` is the lowest format that has all of `fields`, so that earlier versions read as many documents as
    possible. Refuses NaN and infinity, which are not JSON.
    """
    document = {"format": version, "kind": kind, **fields}
    pieces: list[bytes] = []  # put together once: a manifest of a thousand processes has hundreds of megabytes
    for name, value in document.items():
        pieces.append((b"," if pieces else b"{") + _encoded(name) + b":")
        if isinstance(value, JsonList):
            pieces += [b"[", *value.pieces(), b"]"]
        else:
            pieces.append(_encoded(value))
    check = 0
    for piece in pieces:
        check = zlib.crc32(piece, check)
    return b"".join([*pieces, _CHECK % check])


def _encoded(value: Json) -> bytes:
    return _ENCODER.encode(value).encode()


class JsonList(Sequence[_Item]):
    """A list of a document that is JSON text already, and parsed only where an item is looked at.

    Parameters
    ----------
    texts
        Its items, in texts of one or more with commas between them.
    count
        How many there are.
    nbytes
        The raw bytes that they stand for.
    """

    def __init__(self, texts: Sequence[bytes], count: int, nbytes: int) -> None:
        self.texts = texts
        self.nbytes = nbytes
        self._count = count

    def pieces(self) -> Iterator[bytes]:
        """Yield what its text consists of, without the brackets."""
        for number, text in enumerate(self.texts):
            if number:
                yield b","
            yield text

    def parse(self, item: Json) -> _Item:
        """Return the item that a JSON value stands for."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> _Item: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_Item]: ...

    def __getitem__(self, index: int | slice) -> _Item | Sequence[_Item]:
        return self._items[index]

    @cached_property
    def _items(self) -> tuple[_Item, ...]:
        return tuple(self.parse(item) for item in json.loads(b"[%b]" % b",".join(self.texts)))


def parse_document(data: bytes, kind: str, name: str) -> dict[str, Json]:
    """Return the fields of a document; `name` is its key, for messages.

    Raises
    ------
    FormatError
        If its format is one that this version does not read.
    CorruptionError
        If it is not a document of that kind, or damaged.
    """
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{name} is not a JSON document ({len(data)} bytes): {error}") from error
    if not isinstance(document, dict):
        raise CorruptionError(f"{name} is not a JSON object")
    version = document.get("format")
    if document.get("kind") != kind or isinstance(version, bool) or not isinstance(version, int):
        raise CorruptionError(f"{name} is not an incckpt {kind}")
    highest = _HIGHEST.get(kind, FORMAT)
    if not FORMAT <= version <= highest:
        raise FormatError(
            f"{name} is of format {version}; this version of incckpt reads format {highest}: update incckpt"
        )
    if data[-_CHECK_NBYTES:] != _CHECK % zlib.crc32(data[:-_CHECK_NBYTES]):
        raise CorruptionError(f"{name} is damaged: its checksum is wrong")
    return document


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def encode_float(value: float) -> float | str:
    """Return `value` as JSON: the number, or ``"nan"``, ``"inf"``, ``"-inf"``."""
    return value if math.isfinite(value) else str(value)


def decode_float(value: Json, name: str) -> float:
    """Reverse `encode_float`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if value in ("nan", "inf", "-inf"):
            return float(value)
        raise CorruptionError(f"{name}: not a number: {shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise CorruptionError(f"{name}: number out of range") from error


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Return metrics as JSON."""
    return {key: encode_float(value) for key, value in metrics.items()}


def decode_metrics(value: Json, name: str) -> dict[str, float]:
    """Reverse `encode_metrics`."""
    return {
        key: decode_float(item, f"{name}: metric {key!r}")
        for key, item in as_mapping(value, f"{name}: metrics").items()
    }


class Fields:
    """Typed access to the fields of a JSON object."""

    def __init__(self, document: Mapping[str, Json], name: str) -> None:
        self._document = document
        self._name = name

    def _get(self, field: str, check: Callable[[Json], bool], expected: str) -> Json:
        value = self._document.get(field)
        if not check(value):
            raise CorruptionError(f"{self._name}: field {field!r} is not {expected}: {shown(value)}")
        return value

    def string(self, field: str) -> str:
        return str(self._get(field, lambda value: isinstance(value, str), "a string"))

    def count(self, field: str) -> int:
        return int(self._get(field, is_count, "a count"))

    def number(self, field: str) -> float:
        self._get(field, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "a number")
        return decode_float(self._document[field], f"{self._name}: field {field!r}")

    def list(self, field: str) -> list[Json]:
        value = self._get(field, lambda value: isinstance(value, list), "a list")
        assert isinstance(value, list)
        return value


def is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def as_mapping(value: Json, name: str) -> dict[str, Json]:
    """Return `value` if it is a JSON object, else raise `CorruptionError`."""
    if not isinstance(value, dict):
        raise CorruptionError(f"{name} is not a JSON object: {shown(value)}")
    return value
