"""Reads the JSON document of a state's structure: plain values, containers by kind, tensors by index.

Whatever the document says, reading it imports nothing, executes nothing and recurses to a bounded depth.
``docs/structure.md`` describes the grammar.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from incckpt.errors import CorruptionError, FormatError
from incckpt.state.contexts import check_context
from incckpt.state.entries import Json
from incckpt.state.names import join_name
from incckpt.state.plain import (
    DECODERS,
    MAX_DEPTH,
    Malformed,
    as_bytes,
    as_list,
    as_text,
    decode_device,
    decode_numpy_scalar,
    excerpt,
    shown,
    type_name,
)

__all__ = [
    "DEFAULT_FACTORIES",
    "FORMS",
    "MAPPINGS",
    "PACKED_KINDS",
    "GeneratorRef",
    "MappingNode",
    "PackedRef",
    "Pickled",
    "Plain",
    "PlainItems",
    "SequenceNode",
    "SubclassRef",
    "TensorRef",
    "Tree",
    "children",
    "describe",
    "leaves",
    "named_tuple_type",
    "packed_refs",
    "parse",
    "references",
]

MAPPINGS = ("dict", "ordereddict", "counter", "defaultdict")
"""The kinds of a `MappingNode`."""

PACKED_KINDS = (*MAPPINGS, "list", "tuple", "deque", "set", "frozenset", "bytes", "bytearray", "str", "pickle")

DEFAULT_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "None": None,
    **{factory.__name__: factory for factory in (bool, bytes, dict, float, int, list, set, str, tuple)},
}
"""The ``default_factory`` values that a ``defaultdict`` can be stored with."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A decoded value."""

    value: Any


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A torch tensor or numpy array, by its index in the list of entries."""

    index: int


@dataclass(frozen=True, slots=True)
class SubclassRef:
    """A tensor of the class named `cls`, made of `inner` tensors and a `context` (:mod:`incckpt.state.contexts`).

    `dtype` is what it passes for, by name, and `stride` is in elements.
    """

    cls: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    inner: tuple[tuple[str, TensorRef | SubclassRef], ...]
    context: Json
    parameter: bool
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class GeneratorRef:
    """A ``torch.Generator`` on `device`, whose state is the tensor `index`."""

    index: int
    device: str


@dataclass(frozen=True, slots=True)
class Pickled:
    """A pickle, not loaded. `type` is the name of the pickled type, for messages."""

    data: bytes
    type: str


@dataclass(frozen=True, slots=True)
class PackedRef:
    """A plain value in the packed range `index`. `extra`: as for the node of its kind, or a pickle's type."""

    index: int
    kind: str
    extra: Any = None


class PlainItems(Sequence[Any]):
    """The items of a `MappingNode` or `SequenceNode` whose value is already decoded; makes nodes on demand.

    Attributes
    ----------
    value
        A list or tuple or, for a mapping, a dict.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return ((key, _plain_tree(item)) for key, item in self.value.items())
        return map(_plain_tree, self.value)


def _plain_tree(value: Any) -> Tree:
    kind = type(value)
    if kind is dict:
        return MappingNode("dict", PlainItems(value))
    if kind is list or kind is tuple:
        return SequenceNode(kind.__name__, PlainItems(value))
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return SequenceNode("namedtuple", PlainItems(value), kind)
    return Plain(value)


@dataclass(frozen=True, slots=True)
class MappingNode:
    """A dict, or a kind of one. `extra`: a defaultdict's factory name, an OrderedDict's ``_metadata`` tree or None."""

    kind: str
    items: Sequence[tuple[Hashable, Tree]]
    extra: Any = None


@dataclass(frozen=True, slots=True)
class SequenceNode:
    """A list, tuple, deque or namedtuple. `extra`: a deque's ``maxlen``, a namedtuple's type."""

    kind: str
    items: Sequence[Tree]
    extra: Any = None


Tree: TypeAlias = Plain | TensorRef | SubclassRef | GeneratorRef | Pickled | PackedRef | MappingNode | SequenceNode
"""A structure document, parsed and checked."""


@lru_cache(maxsize=256)
def named_tuple_type(name: str, fields: tuple[str, ...]) -> type[tuple[Any, ...]]:
    """Return a new namedtuple type.

    Parameters
    ----------
    fields
        Names that ``collections.namedtuple`` accepts, or makes with ``rename=True`` (``_0``, ``_1``, ...).

    Raises
    ------
    ValueError
        If Python can make no such type.
    """
    reason = ""
    try:
        cls = collections.namedtuple(name, fields, rename=True, module=__name__)  # type: ignore[misc]
        if cls._fields == fields:
            return cls
    except (ValueError, SyntaxError) as error:  # two names may be the same identifier: Python normalises them
        reason = f": {error}"
    raise ValueError(f"there is no namedtuple type {name!r:.80} with the fields {', '.join(fields)!r:.200}{reason}")


# --- reading -----------------------------------------------------------------------------------------------------


def parse(structure: Json, tensors: int, packed: int = 0) -> Tree:
    """Return the tree of a structure document.

    Parameters
    ----------
    structure
        As returned by ``json.loads``.
    tensors
        Length of the list of entries that it refers to.
    packed
        Length of the list of packed ranges that it refers to.

    Raises
    ------
    CorruptionError
        If it is malformed; says where.
    FormatError
        If it needs a newer version of incckpt, torch or numpy, or another platform.
    """
    try:
        return _Parser(tensors, packed).tree(structure)
    except Malformed as error:
        where = "".join(reversed(error.path))
        raise error.kind(f"checkpoint structure, at state{where}: {error}") from error


class _Parser:
    def __init__(self, tensors: int, packed: int) -> None:
        self._tensors = tensors
        self._packed = packed
        self._seen: set[int] = set()
        self._seen_packed: set[int] = set()
        self._depth = 0

    def tree(self, node: Json) -> Tree:
        if node is None or isinstance(node, (bool, int, str)):
            return Plain(node)
        if not isinstance(node, dict):
            raise Malformed(f"not a node: {excerpt(node)}")
        if len(node) == 1:
            ((tag, payload),) = node.items()
            if tag == "tensor":
                return TensorRef(self._tensor(payload))
            if tag in DECODERS:
                try:
                    return Plain(DECODERS[tag](payload))
                except (ValueError, TypeError, OverflowError, RuntimeError) as error:
                    kind = FormatError if isinstance(error, FormatError) else CorruptionError
                    raise Malformed(f"not a {tag}: {excerpt(payload)} ({error})", kind) from error
        form = FORMS.get(frozenset(node))
        if form is None:
            raise Malformed(f"unknown kind of node: {excerpt(node)}; update incckpt", FormatError)
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:  # the deepest container may contain a leaf, such as a set
            raise Malformed("nested too deeply")
        tree = form(self, node)
        self._depth -= 1
        return tree

    def key(self, node: Json, depth: int = 0) -> Hashable:
        if type(node) is str:
            return node
        if depth > MAX_DEPTH:
            raise Malformed("a key is nested too deeply")
        if isinstance(node, dict) and len(node) == 1 and ("tuple" in node or "frozenset" in node):
            ((tag, items),) = node.items()
            if tag == "frozenset":
                return frozenset(self.elements(items, depth))
            return tuple([self.key(item, depth + 1) for item in as_list(items)])
        tree = self.tree(node)
        if not isinstance(tree, Plain):
            raise Malformed(f"not a key: {excerpt(node)}")
        try:
            hash(tree.value)
        except (TypeError, ValueError) as error:  # ValueError: a timedelta64 without a unit
            raise Malformed(f"not a key: {excerpt(node)} ({error})") from error
        return tree.value  # type: ignore[no-any-return]

    def elements(self, node: Json, depth: int = 0) -> set[Hashable]:
        items = [self.key(item, depth + 1) for item in as_list(node)]
        if len(found := set(items)) != len(items):
            raise Malformed("an element of a set occurs twice")
        return found

    def mapping(self, kind: str, node: Json, extra: Any = None) -> MappingNode:
        items: list[tuple[Hashable, Tree]] = []
        seen: set[Hashable] = set()
        for pair in as_list(node[kind]):
            if not isinstance(pair, list) or len(pair) != 2:
                raise Malformed(f"not a [key, value] pair: {excerpt(pair)}")
            key = self.key(pair[0])
            if key in seen:
                raise Malformed(f"key {shown(key)} occurs twice")
            seen.add(key)
            items.append((key, self._child(pair[1], key)))
        return MappingNode(kind, items, extra)

    def sequence(self, kind: str, node: Json) -> SequenceNode:
        return SequenceNode(kind, [self._child(item, i) for i, item in enumerate(as_list(node[kind]))])

    def ordered_dict(self, node: Json) -> MappingNode:
        metadata = self._member(node["metadata"], "_metadata") if "metadata" in node else None
        return self.mapping("ordereddict", node, metadata)

    def default_dict(self, node: Json) -> MappingNode:
        return self.mapping("defaultdict", node, _factory(node["factory"]))

    def deque(self, node: Json) -> SequenceNode:
        sequence, maxlen = self.sequence("deque", node), node["maxlen"]
        if (most := _maxlen(maxlen)) is not None and most < len(sequence.items):
            raise Malformed(f"a deque of {len(sequence.items)} elements with maxlen {excerpt(maxlen)}")
        return replace(sequence, extra=most)

    def named_tuple(self, node: Json) -> SequenceNode:
        pairs = as_list(node["namedtuple"])
        if any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
            raise Malformed("the fields of a namedtuple are no pairs")
        try:
            cls = named_tuple_type(as_text(node["name"]), tuple([as_text(pair[0]) for pair in pairs]))
        except ValueError as error:
            raise Malformed(str(error)) from error
        return SequenceNode("namedtuple", [self._member(value, field) for field, value in pairs], cls)

    def subclass(self, node: Json) -> SubclassRef:
        inner: dict[str, TensorRef | SubclassRef] = {}
        for pair in as_list(node["inner"]):
            if not isinstance(pair, list) or len(pair) != 2 or as_text(pair[0]) in inner:
                raise Malformed(f"not an inner tensor: {excerpt(pair)}")
            child = self._member(pair[1], pair[0])
            if not isinstance(child, (TensorRef, SubclassRef)):
                raise Malformed(f"not a tensor: {excerpt(pair[1])}")
            inner[pair[0]] = child
        shape, stride, flags = (as_list(node[member]) for member in ("shape", "stride", "flags"))
        if len(shape) != len(stride) or any(
            type(size) is not int or not 0 <= size < 1 << 63 for size in shape + stride
        ):
            raise Malformed(f"not a shape and strides: {excerpt(shape)}, {excerpt(stride)}")
        if any(flag not in ("parameter", "requires_grad") for flag in flags):
            raise Malformed(f"unknown flags: {excerpt(flags)}; update incckpt", FormatError)
        check_context(node["context"])
        cls, dtype = as_text(node["subclass"]), as_text(node["dtype"])
        requires = "parameter" in flags, "requires_grad" in flags
        return SubclassRef(cls, dtype, tuple(shape), tuple(stride), tuple(inner.items()), node["context"], *requires)

    def generator(self, node: Json) -> GeneratorRef:
        return GeneratorRef(self._tensor(node["torch.Generator"]), str(decode_device(node["device"])))

    def pickled(self, node: Json) -> Pickled:
        return Pickled(as_bytes(node["pickle"]), as_text(node["type"]))

    def packed(self, node: Json) -> PackedRef:
        index, kind = node["packed"], as_text(node["kind"])
        extra: int | str | None = None
        if type(index) is not int or not 0 <= index < self._packed:
            raise Malformed(f"there is no packed range {excerpt(index)}")
        if index in self._seen_packed:
            raise Malformed(f"packed range {index} occurs twice")
        self._seen_packed.add(index)
        if kind not in PACKED_KINDS:
            raise Malformed(f"unknown kind of packed value: {excerpt(kind)}; update incckpt", FormatError)
        more = node.keys() - {"packed", "kind"}
        if more != _PACKED_EXTRA.get(kind, set()):
            raise Malformed(f"a packed {kind} with the members {', '.join(sorted(more))}")
        if kind == "deque":
            extra = _maxlen(node["maxlen"])
        elif kind == "defaultdict":
            extra = _factory(node["factory"])
        elif kind == "pickle":
            extra = as_text(node["type"])
        return PackedRef(index, kind, extra)

    def _child(self, node: Json, key: Hashable) -> Tree:
        try:
            return self.tree(node)
        except Malformed as error:
            error.path.append(f"[{shown(key)}]")
            raise

    def _member(self, node: Json, name: str) -> Tree:
        try:
            return self.tree(node)
        except Malformed as error:
            error.path.append(f".{name}")
            raise

    def _tensor(self, index: Json) -> int:
        if type(index) is not int or not 0 <= index < self._tensors:
            raise Malformed(f"there is no tensor {excerpt(index)}")
        if index in self._seen:
            raise Malformed(f"tensor {index} occurs twice")
        self._seen.add(index)
        return index


_PACKED_EXTRA = {"deque": {"maxlen"}, "defaultdict": {"factory"}, "pickle": {"type"}}


def _factory(node: Json) -> str:
    if not isinstance(node, str) or node not in DEFAULT_FACTORIES:
        raise Malformed(f"unknown default factory {excerpt(node)}")
    return node


def _maxlen(node: Json) -> int | None:
    if node is not None and (type(node) is not int or not 0 <= node <= sys.maxsize):
        raise Malformed(f"not the maxlen of a deque: {excerpt(node)}")
    return node


FORMS: dict[frozenset[str], Callable[[_Parser, Json], Tree]] = {
    frozenset(members): form
    for members, form in (
        (("list",), lambda parser, node: parser.sequence("list", node)),
        (("tuple",), lambda parser, node: parser.sequence("tuple", node)),
        (("deque", "maxlen"), _Parser.deque),
        (("namedtuple", "name"), _Parser.named_tuple),
        (("dict",), lambda parser, node: parser.mapping("dict", node)),
        (("counter",), lambda parser, node: parser.mapping("counter", node)),
        (("ordereddict",), _Parser.ordered_dict),
        (("ordereddict", "metadata"), _Parser.ordered_dict),
        (("defaultdict", "factory"), _Parser.default_dict),
        (("set",), lambda parser, node: Plain(parser.elements(node["set"]))),
        (("frozenset",), lambda parser, node: Plain(frozenset(parser.elements(node["frozenset"])))),
        (("numpy.scalar", "dtype"), lambda parser, node: Plain(decode_numpy_scalar(node))),
        (("subclass", "dtype", "shape", "stride", "inner", "context", "flags"), _Parser.subclass),
        (("torch.Generator", "device"), _Parser.generator),
        (("pickle", "type"), _Parser.pickled),
        (("packed", "kind"), _Parser.packed),
        *((("packed", "kind", extra), _Parser.packed) for extra in ("maxlen", "factory", "type")),
    )
}
"""The exact set of a node's members -> how to parse it."""


# --- trees ------------------------------------------------------------------------------------------------------------


def children(tree: Tree) -> Iterator[tuple[Hashable, Tree]]:
    """Yield ``(key, child)`` of a container, by key, position or namedtuple field; nothing for a leaf."""
    if isinstance(tree, MappingNode):
        yield from tree.items
    elif isinstance(tree, SequenceNode):
        fields = tree.extra._fields if tree.kind == "namedtuple" else range(len(tree.items))
        yield from zip(fields, tree.items, strict=True)


def leaves(tree: Tree) -> Iterator[Plain | TensorRef | GeneratorRef | Pickled | PackedRef]:
    """Yield every leaf of `tree`, including those of an OrderedDict's ``_metadata``; an unpacked container is one."""
    if isinstance(tree, SubclassRef):
        for _, inner in tree.inner:
            yield from leaves(inner)
    elif not isinstance(tree, (MappingNode, SequenceNode)):
        yield tree
    elif isinstance(tree.items, PlainItems):
        yield Plain(tree.items.value)
    else:
        for _, child in children(tree):
            yield from leaves(child)
        if tree.kind == "ordereddict" and tree.extra is not None:
            yield from leaves(tree.extra)


def packed_refs(tree: Tree, name: str = "") -> Iterator[tuple[str, PackedRef]]:
    """Yield each packed value's dotted name and reference; within an OrderedDict's ``_metadata``, the dict's name."""
    if isinstance(tree, PackedRef):
        yield name, tree
    elif isinstance(tree, (MappingNode, SequenceNode)) and not isinstance(tree.items, PlainItems):
        for key, child in children(tree):
            yield from packed_refs(child, join_name(name, key))
        if tree.kind == "ordereddict" and tree.extra is not None:
            for _, ref in packed_refs(tree.extra):
                yield name, ref


def references(tree: Tree) -> list[int]:
    """Return the indexes of all tensors that `tree` needs, ascending."""
    return sorted(leaf.index for leaf in leaves(tree) if isinstance(leaf, (TensorRef, GeneratorRef)))


def describe(tree: Tree) -> str:
    """Return a description of `tree`, for messages."""
    match tree:
        case TensorRef():
            return "a tensor"
        case SubclassRef(cls, dtype, shape):
            return f"a {cls} {dtype} {shape}"
        case GeneratorRef():
            return "a torch.Generator"
        case Pickled(_, name):
            return f"a pickled {name}"
        case PackedRef(_, kind):
            return f"a packed {kind}"
        case Plain(value):
            return f"a value of type {type_name(value)}"
        case MappingNode(kind, items) | SequenceNode(kind, items):
            return f"a {kind} of {len(items)}"
