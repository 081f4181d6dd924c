"""What a tensor subclass keeps beside its inner tensors, as JSON: plain values, containers of them, enums, dataclasses.

Reading imports nothing. A class is found among those that live objects have, or that
``torch.serialization.add_safe_globals`` has been given; a document only says which of them it needs.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from incckpt.errors import FormatError, StateError
from incckpt.state.entries import Json
from incckpt.state.plain import (
    DECODERS,
    MAX_DEPTH,
    Malformed,
    as_list,
    as_text,
    decode_numpy_scalar,
    encode_key,
    encode_plain,
    excerpt,
    shown,
    type_name,
)

__all__ = [
    "DTENSOR",
    "Classes",
    "check_context",
    "class_name",
    "context_difference",
    "decode_context",
    "encode_context",
]

Find: TypeAlias = Callable[[str], Any]

DTENSOR = (
    "torch.distributed.tensor.DTensor",
    "torch.distributed.tensor._api.DTensor",
    "torch.distributed._tensor.api.DTensor",
)
"""The names that the class has had."""

_OF_THE_TARGET = ("device", "requires_grad")
"""Fields in which a tensor and what is restored into it may differ, as plain tensors may."""


def class_name(cls: type) -> str:
    """Return the name of a class in a document."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Classes:
    """The classes that may be instantiated: of live tensors and their contexts, and torch's safe globals."""

    def __init__(self) -> None:
        self._learned: dict[str, type] = {}
        self._distributed: dict[tuple[int, ...], torch.Tensor] = {}

    def learn(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take in the classes of live tensors, of their inner tensors, and of what their contexts hold."""
        for tensor in tensors:
            if class_name(type(tensor)) in DTENSOR:
                self._distributed.setdefault(tuple(tensor.shape), tensor)
            elif type(tensor) not in (torch.Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(tensor):
                self._add(type(tensor))
                names, context = tensor.__tensor_flatten__()
                self._learn_context(context, 0)
                inner = (getattr(tensor, name) for name in names)
                self.learn(item for item in inner if isinstance(item, torch.Tensor))

    def find(self, name: str) -> type:
        """Return the class of that name.

        Raises
        ------
        FormatError
            If there is none; says what to do.
        """
        cls = self._learned.get(name)
        if cls is None:
            for known in torch.serialization.get_safe_globals():
                if isinstance(known, type) and _is_data(known):
                    self._learned.setdefault(class_name(known), known)
            cls = self._learned.get(name)
        if cls is None:
            raise FormatError(
                f"the class {name} is needed and not known here: import what defines it, and, unless that registers "
                f"it, call torch.serialization.add_safe_globals([{name.rpartition('.')[2]}]); or restore into a state "
                "that has instances of it"
            )
        return cls

    def distributed(self, local: torch.Tensor) -> torch.Tensor:
        """Return the ``DTensor`` of `local` on the mesh of live ones, if there are any, placed as one of its shape."""
        alike: Any = self._distributed.get(tuple(local.shape))
        some: Any = alike if alike is not None else next(iter(self._distributed.values()), None)
        if some is None:
            return local
        made: torch.Tensor = type(some).from_local(local, some.device_mesh, None if alike is None else alike.placements)
        return made

    def _add(self, cls: type) -> None:
        self._learned[class_name(cls)] = cls

    def _learn_context(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            return
        items: Iterable[Any] = ()
        if isinstance(value, enum.Enum):
            self._add(type(value))
        elif _is_instance(value):
            self._add(type(value))
            items = [child for _, child in _fields(value)]
        elif isinstance(value, dict):
            items = value.values()
        elif isinstance(value, (list, tuple)):
            items = value
        for item in items:
            self._learn_context(item, depth + 1)


def _is_data(cls: type) -> bool:
    """Whether `cls` is of a kind that documents may name."""
    return (
        issubclass(cls, (torch.Tensor, enum.Enum))
        or dataclasses.is_dataclass(cls)
        or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    )


def _is_instance(value: object) -> bool:
    if isinstance(value, type):
        return False
    return dataclasses.is_dataclass(value) or (isinstance(value, tuple) and hasattr(type(value), "_fields"))


def _fields(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, tuple):
        return list(zip(value._fields, value, strict=True))  # type: ignore[attr-defined]
    return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]


# --- writing ----------------------------------------------------------------------------------------------------------


def encode_context(value: Any, depth: int = 0) -> Json:
    """Return the node of what ``__tensor_flatten__`` gives beside the names of the inner tensors.

    Raises
    ------
    StateError
        If it holds something else than plain values, containers of them, members of enums, dataclasses and namedtuples.
    """
    if depth > MAX_DEPTH:
        raise StateError(f"nested more than {MAX_DEPTH} levels deep")
    node = encode_plain(value)
    if node is not None or value is None:
        return node
    kind = type(value)
    if kind is list or kind is tuple:
        return {kind.__name__: [encode_context(item, depth + 1) for item in value]}
    if kind is dict:
        return {"dict": [[encode_key(key), encode_context(item, depth + 1)] for key, item in value.items()]}
    if isinstance(value, enum.Enum) and kind.__members__.get(value.name) is value:
        return {"enum": class_name(kind), "member": value.name}
    if _is_instance(value):
        return {
            "instance": class_name(kind),
            "fields": [[name, encode_context(item, depth + 1)] for name, item in _fields(value)],
        }
    raise StateError(f"a {type_name(value)} in it has no form in a document")


# --- reading ----------------------------------------------------------------------------------------------------------


def check_context(node: Json) -> None:
    """Check that `node` is one of a context.

    Raises
    ------
    Malformed
        If it is not.
    """
    decode_context(node, None)


def decode_context(node: Json, find: Find | None, depth: int = 0) -> Any:
    """Return the value of a node.

    Parameters
    ----------
    find
        Returns the class of a name; without it, ``None`` stands for what would need a class.

    Raises
    ------
    Malformed
        If it is no such node. What `find` and the classes raise is raised.
    """
    if depth > MAX_DEPTH:
        raise Malformed("a context is nested too deeply")
    if node is None or isinstance(node, (bool, int, str)):
        return node
    if not isinstance(node, dict):
        raise Malformed(f"not a node: {excerpt(node)}")
    if len(node) == 1:
        ((tag, payload),) = node.items()
        return _decode_one(tag, payload, find, depth)
    members = frozenset(node)
    if members == {"numpy.scalar", "dtype"}:
        return decode_numpy_scalar(node)
    if members == {"enum", "member"}:
        name, member = as_text(node["enum"]), as_text(node["member"])
        return None if find is None else _member(find(name), name, member)
    if members == {"instance", "fields"}:
        name = as_text(node["instance"])
        fields = {as_text(field): decode_context(item, find, depth + 1) for field, item in _pairs(node["fields"])}
        return None if find is None else _instance(find(name), name, fields)
    raise Malformed(f"unknown kind of node: {excerpt(node)}; update incckpt", FormatError)


def _decode_one(tag: str, payload: Json, find: Find | None, depth: int) -> Any:
    if tag in DECODERS:
        try:
            return DECODERS[tag](payload)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise Malformed(f"not a {tag}: {excerpt(payload)} ({error})") from error
    if tag == "dict":
        pairs = _pairs(payload)
        return {
            _hashable(decode_context(key, find, depth + 1)): decode_context(item, find, depth + 1)
            for key, item in pairs
        }
    if tag in ("list", "tuple", "set", "frozenset"):
        items = [decode_context(item, find, depth + 1) for item in as_list(payload)]
        if tag == "list":
            return items
        return tuple(items) if tag == "tuple" else {"set": set, "frozenset": frozenset}[tag](map(_hashable, items))
    raise Malformed(f"unknown kind of node: {excerpt({tag: payload})}; update incckpt", FormatError)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError as error:
        raise Malformed(f"not a key: {error}") from error
    return value


def _pairs(node: Json) -> list[tuple[Json, Json]]:
    pairs = as_list(node)
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise Malformed(f"not a list of pairs: {excerpt(node)}")
    return [(pair[0], pair[1]) for pair in pairs]


def _member(cls: Any, name: str, member: str) -> Any:
    found = cls.__members__.get(member) if issubclass(cls, enum.Enum) else None
    if found is None:
        raise FormatError(f"{name} has no member {member!r} here")
    return found


def _instance(cls: Any, name: str, fields: dict[str, Any]) -> Any:
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return cls(**fields)
    if not dataclasses.is_dataclass(cls):
        raise FormatError(f"{name} is no dataclass here")
    known = {field.name: field.init for field in dataclasses.fields(cls)}
    make: Any = cls
    made = make(**{field: value for field, value in fields.items() if known.get(field, True)})
    for field, value in fields.items():
        if not known.get(field, True):
            object.__setattr__(made, field, value)
    return made


def context_difference(stored: Json, here: Json, place: str = "its context") -> str:
    """Return the first place where two nodes of contexts differ, or an empty string.

    Devices, and fields for the device or the gradient, are the target's.
    """
    if isinstance(stored, dict) and isinstance(here, dict) and stored.keys() == here.keys():
        if "torch.device" in stored:
            return ""
        found = (_payload_difference(tag, stored[tag], here[tag], place) for tag in stored)
        return next(filter(None, found), "")
    return "" if stored == here and type(stored) is type(here) else _difference(stored, here, place)


def _payload_difference(tag: str, stored: Json, here: Json, place: str) -> str:
    if tag in ("dict", "fields"):
        before, now = dict(_named(stored)), dict(_named(here))
        if before.keys() != now.keys():
            return _difference(sorted(before), sorted(now), place)
        found = (
            context_difference(before[name], now[name], f"{place}.{name}")
            for name in before
            if name not in _OF_THE_TARGET
        )
        return next(filter(None, found), "")
    if tag in ("list", "tuple") and len(stored) == len(here):
        each = enumerate(zip(stored, here, strict=True))
        return next(filter(None, (context_difference(a, b, f"{place}[{i}]") for i, (a, b) in each)), "")
    return "" if stored == here else _difference(stored, here, place)


def _named(pairs: Json) -> list[tuple[str, Json]]:
    return [(key if isinstance(key, str) else shown(key), item) for key, item in pairs]


def _difference(stored: Json, here: Json, place: str) -> str:
    return f"{place} is {excerpt(here)} here and {excerpt(stored)} in the checkpoint"
