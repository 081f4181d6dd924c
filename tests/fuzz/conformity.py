"""What a reader may accept: the rules of docs/format.md, objects.md and structure.md, written down a second time.

While `watched`, whatever the readers of documents, objects and structures return without an error is held against these
rules. So a check that is gone shows, even where what it lets through does no harm later on.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import importlib
import json
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

__all__ = ["watched"]

Json = Any

FRAME = 1 << 20
HEX64, HEX16 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}")
REF = re.compile(r"[0-9]{6}-[0-9]{12}-[0-9a-f]{16}")
DTYPES = {
    **dict.fromkeys(["bool", "uint8", "int8", "bits8", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2"], 1),
    **dict.fromkeys([f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")], 1),
    **dict.fromkeys([f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)], 1),
    **dict.fromkeys(["int16", "uint16", "float16", "bfloat16", "bits16"], 2),
    **dict.fromkeys(["int32", "uint32", "float32", "complex32"], 4),
    **dict.fromkeys(["int64", "uint64", "float64", "complex64"], 8),
    "complex128": 16,
}
FACTORIES = ("None", "bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple")
MAPS = ("dict", "ordereddict", "defaultdict", "counter")
LISTS = ("list", "tuple", "deque")
SETS = ("set", "frozenset")
DEEPEST = 64


class Breach(Exception):
    """Something that no rule allows was accepted."""


def require(right: object, rule: str) -> None:
    """Check a rule."""
    if not right:
        raise Breach(rule)


# ---- documents and objects -------------------------------------------------------------------------------------------


def document(result: Json, data: bytes, kind: str, *_: object) -> None:
    """Check what `parse_document` returned."""
    require(data[-20:] == b',"check":"%08x"}' % zlib.crc32(data[:-20]), "the CRC of a document")
    require(isinstance(result, dict) and result["kind"] == kind, "a document is an object of its kind")


def header(_: object, data: Any) -> None:
    """Check what `read_header` took for a header."""
    data = bytes(memoryview(data).cast("B"))
    magic, version, item, flags, zero, nbytes, base = struct.unpack_from("<4sBBBBQ32s", data)
    frames = -(-nbytes // FRAME)
    require(magic == b"\x93inc" and version == 1 and zero == 0, "the head of an object")
    require(item in (1, 2, 4, 8) and flags in (0, 1) and (flags or base == bytes(32)), "element size, flags and base")
    (check,) = struct.unpack_from("<I", data, 48 + 40 * frames)
    require(check == zlib.crc32(data[: 48 + 40 * frames]), "the CRC of a header")
    for index in range(frames):
        way, padding, coded, _digest = struct.unpack_from("<B3sI32s", data, 48 + 40 * index)
        require(way < 4 and padding == bytes(3) and (flags or way != 2), "a frame's way")
        require(coded <= min(FRAME, nbytes - index * FRAME), "a frame is no longer than raw")


def decoded(_: None, data: Any, out: Any, *, identity: bytes, base: Any = None, verify: bool = True) -> None:
    """Check what `decode` made of an object."""
    data, raw = bytes(memoryview(data).cast("B")), bytes(memoryview(out).cast("B"))
    frames = -(-len(raw) // FRAME)
    entries = [struct.unpack_from("<B3sI32s", data, 48 + 40 * index) for index in range(frames)]
    require(struct.unpack_from("<Q", data, 8)[0] == len(raw), "raw bytes as the chunk has")
    require(len(data) == 52 + 40 * frames + sum(entry[2] for entry in entries), "an object ends with its last frame")
    require(hashlib.sha256(b"".join(entry[3] for entry in entries)).digest() == identity, "the identity of an object")
    if data[6]:
        require(base is not None and base.identity == data[16:48], "the base that a delta names")
        require(len(memoryview(base.raw).cast("B")) == len(raw), "a base as long as the chunk")
    if verify:
        require(identity_of(raw) == identity, "digests of what was decoded")


def decoded_in_place(_: None, head: Any, out: Any, *, identity: bytes, verify: bool = True) -> None:
    """Check what `decode_in_place` did."""
    require(struct.unpack_from("<Q", bytes(head), 8)[0] == len(out), "raw bytes as the chunk has")
    digests = b"".join(bytes(head)[56 + 40 * index :][:32] for index in range(-(-len(out) // FRAME)))
    require(hashlib.sha256(digests).digest() == identity, "the identity of an object")
    if verify:
        require(identity_of(bytes(out)) == identity, "digests of what was decoded")


def identity_of(raw: bytes) -> bytes:
    """Return the identity of raw bytes."""
    frames = (hashlib.sha256(raw[at : at + FRAME]).digest() for at in range(0, len(raw), FRAME))
    return hashlib.sha256(b"".join(frames)).digest()


def size(_: object, objects: Any, key: Any, parts: Sequence[memoryview]) -> None:
    """Check that an object was as long as its manifest says."""
    require(objects.backend.head(str(key)).size == sum(map(len, parts)), "the size of an object")


def natural(value: Json) -> bool:
    """Say whether a JSON value is a natural number of 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def number(value: Json) -> bool:
    """Say whether a JSON value is one of the forms of a double."""
    if value in ("nan", "inf", "-inf"):
        return True
    return type(value) is float or (type(value) is int and abs(value) < 1 << 1024)


def ref(_: object, __: type, data: bytes, key: str) -> None:
    """Check what was read as a ref."""
    fields = json.loads(data)
    require(REF.fullmatch(fields["ref"]) and fields["ref"] == key.rpartition("/")[2], "a ref's name is its key's")
    require(number(fields["time"]) and all(map(number, fields.get("metrics", {}).values())), "numbers of a ref")
    require(all(natural(fields[name]) for name in ("manifest_size", "bytes", "written")), "counts of a ref")


def manifest_of_ref(result: Any, _: object, its: Any) -> None:
    """Check that a ref's manifest is its own."""
    right = (its.name.attempt, its.name.step, its.name.nonce)
    require((result.attempt, result.step, result.nonce) == right, "a ref's manifest is its own")


def condemned(_: object, data: bytes, *__: object) -> None:
    """Check what was read as a condemned list."""
    require(all(isinstance(key, str) for key in json.loads(data)["keys"]), "condemned keys are text")


# ---- manifests -------------------------------------------------------------------------------------------------------


def manifest(_: object, __: type, data: bytes, *___: object) -> None:
    """Check what was read as a manifest."""
    fields = json.loads(data)
    require(HEX16.fullmatch(fields["nonce"]), "a nonce")
    require(number(fields["time"]) and all(map(number, fields.get("metrics", {}).values())), "numbers of a manifest")
    for one in fields["chunks"]:
        for stored in (one, *([one["base"]] if "base" in one else [])):
            require(HEX64.fullmatch(stored["id"]) and HEX16.fullmatch(stored["nonce"]), "an object's name")
            require(natural(stored["size"]), "an object's size")
        require(natural(one["bytes"]) and one["item"] in (1, 2, 4, 8, 16), "a chunk's bytes")
    chunks = [one["bytes"] for one in fields["chunks"]]
    for one in [*fields["ranges"], *fields.get("packed", [])]:
        require(natural(one["bytes"]) and one["item"] in (1, 2, 4, 8, 16), "a range's bytes")
        for index, offset, length in one["pieces"]:
            require(natural(index) and index < len(chunks), "a piece's chunk")
            require(natural(offset) and natural(length) and offset + length <= chunks[index], "a piece in its chunk")
        require(sum(length for _, _, length in one["pieces"]) == one["bytes"], "pieces fill their range")


def contents(_: object, __: type, found: Any, *___: object, **____: object) -> None:
    """Check what was taken for a structure and its tensors."""
    ranges = [one.nbytes for one in found.ranges]
    packings: dict[int, Any] = {}
    for entry in found.tensors:
        tensor(entry, ranges, packings)
    walk = Structure(len(found.tensors), len(found.packed))
    walk.node(found.structure, 0)


def tensor(entry: Json, ranges: Sequence[int], packings: dict[int, Any]) -> None:
    """Check a tensor entry."""
    allowed = {"name", "kind", "dtype", "shape", "stride", "pieces", "device", "flags"}
    require(entry.keys() <= allowed and isinstance(entry["name"], str), "members of a tensor entry")
    is_torch = "kind" not in entry or entry["kind"] == "torch"
    shape, flags = entry["shape"], entry.get("flags", [])
    require(is_torch or not set(flags) - {"packed"}, "flags of an array")
    require(all(map(natural, shape)) and len(shape) <= DEEPEST, "a shape")
    if is_torch:
        require(entry["dtype"] in DTYPES, "a dtype of torch")
        item = unit = DTYPES[entry["dtype"]]
    else:
        require(entry["kind"] == "numpy", "a kind of tensor")
        item, unit = itemsize_of(entry["dtype"]), 1
    if "stride" in entry:
        stride = entry["stride"]
        require(len(stride) == len(shape) and all(type(step) is int for step in stride), "a stride for each dimension")
        require(not is_torch or all(step >= 0 for step in stride), "strides of torch are not negative")
    else:
        sizes = [max(size, 1) for size in shape]
        stride = [math.prod(sizes[at + 1 :]) * (item // unit) for at in range(len(shape))]
    places = entry.get("pieces", [])
    total = math.prod(shape) * item
    require(total < 1 << 63 and math.prod([one for one in shape if one]) < 1 << 63, "a tensor of 63 bits")
    require((total == 0) == (not places), "a tensor with bytes has a piece")
    if not places:
        return
    require(len(places) == 1 and places[0].keys() <= {"range", "offset"}, "one piece")
    index, offset = places[0]["range"], places[0].get("offset", 0)
    require(natural(index) and index < len(ranges) and natural(offset), "a tensor's range")
    reach = [(one - 1) * step * unit for one, step in zip(shape, stride, strict=True)]
    low, high = sum(one for one in reach if one < 0), sum(one for one in reach if one > 0)
    packing = (tuple(shape), tuple(step * unit for step in stride), item) if "packed" in flags else None
    if packing:
        stored = math.prod([one if step else 1 for one, step in zip(shape, stride, strict=True)]) * item
        require(offset == 0 and stored == ranges[index], "a packed tensor fills its range")
    else:
        require(offset + low >= 0 and offset + high + item <= ranges[index], "a tensor within its range")
    require(packings.setdefault(index, packing) == packing, "tensors agree how a range is packed")


def itemsize_of(dtype: Json) -> int:
    """Return the bytes of an element of a dtype of NumPy's."""
    if isinstance(dtype, dict):
        if "base" in dtype:
            return math.prod(dtype["shape"]) * itemsize_of(dtype["base"])
        return int(dtype["itemsize"])
    kind, digits = re.fullmatch(r"[<>|](\w)(\d+)(?:\[.*\])?", dtype).groups()  # type: ignore[union-attr]
    return int(digits) * (4 if kind == "U" else 1)


class Structure:
    """Walks a structure.

    Parameters
    ----------
    tensors, packed
        How many there are to refer to.
    """

    def __init__(self, tensors: int, packed: int) -> None:
        self._numbers = {"tensor": tensors, "torch.Generator": tensors, "packed": packed}
        self._seen: collections.defaultdict[str, set[int]] = collections.defaultdict(set)

    def node(self, node: Json, depth: int) -> None:
        """Check a node within `depth` containers."""
        if node is None or isinstance(node, bool | int | str):
            return
        require(isinstance(node, dict), "a node is no list")
        tag = next((tag for tag in (*MAPS, *LISTS, "namedtuple", "subclass", *self._numbers) if tag in node), None)
        if tag in self._numbers:
            index, kind = node[tag], "packed" if tag == "packed" else "tensor"
            require(natural(index) and index < self._numbers[tag], f"there is such a {kind}")
            require(index not in self._seen[kind], f"a {kind} is named once")
            self._seen[kind].add(index)
        if "factory" in node:
            require(node["factory"] in FACTORIES, "a default factory")
        if tag in (*MAPS, *LISTS, "namedtuple"):
            require(depth <= DEEPEST, "nesting")
            for child in node[tag]:
                self.node(child if tag in LISTS else child[1], depth + 1)
            if tag in MAPS:
                keys = [json.dumps(key, sort_keys=True) for key, _ in node[tag]]
                require(len(keys) == len(set(keys)), "keys differ")
            self.node(node.get("metadata"), depth + 1)
        if tag == "subclass":
            for _, child in node["inner"]:
                self.node(child, depth + 1)
        for one in SETS:
            require(
                one not in node or len({json.dumps(key) for key in node[one]}) == len(node[one]), "a set's elements"
            )


# ---- watching --------------------------------------------------------------------------------------------------------

RULES: list[tuple[str, Callable[..., None]]] = [
    ("store.document:parse_document", document),
    ("codec.header:read_header", header),
    ("codec.objects:decode", decoded),
    ("codec.objects:decode_in_place", decoded_in_place),
    ("store.objects:Objects.get_into", size),
    ("store.refs:Ref.from_json", ref),
    ("store.refs:CondemnedLists.parse", condemned),
    ("store.store:Store._read_manifest", manifest_of_ref),
    ("store.manifest:Manifest.from_json", manifest),
    ("run.contents:Contents.of", contents),
]


@contextlib.contextmanager
def watched(happened: list[str]) -> Iterator[None]:
    """Note in `happened` whatever is accepted against a rule."""
    with ExitStack() as stack:
        for place, rule in RULES:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(f"incckpt.{module}")
            *classes, name = path.split(".")
            for one in classes:
                owner = getattr(owner, one)
            static = owner.__dict__[name]
            function = static.__func__ if isinstance(static, staticmethod | classmethod) else static
            checked: Any = _checked(function, rule, happened)
            if isinstance(static, staticmethod | classmethod):
                checked = type(static)(checked)
            places = [owner]
            if not classes:
                modules = [module for key, module in list(sys.modules.items()) if key.startswith("incckpt.")]
                places = [module for module in modules if getattr(module, name, None) is static]
            for one in places:
                stack.enter_context(mock.patch.object(one, name, checked))
        yield


def _checked(function: Callable[..., Any], rule: Callable[..., None], happened: list[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        try:
            rule(result, *arguments, **options)
        except Exception as error:  # noqa: BLE001 -- a rule that cannot even be applied is not kept either
            happened.append(f"{function.__qualname__} has accepted what breaks a rule: {type(error).__name__} {error}")
        return result

    return call
