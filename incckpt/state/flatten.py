"""From a nested state to a JSON structure, tensor entries and byte ranges of live memory."""

from __future__ import annotations

import base64
import dataclasses
import enum
import gc
import os
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from incckpt.errors import PickleRefusedError, StateError
from incckpt.state.contexts import class_name
from incckpt.state.entries import Json, TensorEntry, range_kinds
from incckpt.state.names import join_name
from incckpt.state.packing import HEAVY_BYTES, PackedValue, pack, weighs_much
from incckpt.state.plain import MAX_DEPTH, encode_key, encode_plain, shown, type_name
from incckpt.state.ranges import ByteRange, TensorTable
from incckpt.state.subclasses import encoded_context, flattened, inner_tensors, is_of_tensors
from incckpt.state.targets import is_stateful
from incckpt.state.tree import DEFAULT_FACTORIES, named_tuple_type

__all__ = ["ByteRange", "FlatState", "flatten", "no_garbage_collection"]


@dataclasses.dataclass(slots=True)
class FlatState:
    """A state, taken apart.

    Attributes
    ----------
    structure
        The nesting and the plain values, as JSON (``docs/structure.md``).
    tensors
        One entry per tensor or array; the structure refers to them by index.
    ranges
        The live memory that holds them: what is written to the state's tensors after `flatten` shows here.
    packed
        Plain values stored beside the structure, which refers to them by index; copies, or immutable.
    inner
        Indexes of the tensors that are part of another one: together they mean something, each alone does not.
    """

    structure: Json
    tensors: list[TensorEntry]
    ranges: list[ByteRange]
    packed: list[PackedValue] = dataclasses.field(default_factory=list)
    inner: frozenset[int] = frozenset()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """``(bytes, element size)`` of each range."""
        return [(item.nbytes, item.itemsize) for item in self.ranges]

    @property
    def kinds(self) -> list[str]:
        """The kind of each range; see `range_kinds`."""
        return range_kinds(self.tensors, len(self.ranges))

    @property
    def layout(self) -> tuple[tuple[TensorEntry, ...], tuple[tuple[int, int], ...]]:
        """Everything about the tensors except their memory; equal layouts are cut into equal chunks.

        Keeps no tensor alive. Comparing 10,000 tensors takes a few milliseconds.
        """
        return tuple(self.tensors), tuple(self.sizes)


def flatten(state: object, *, allow_pickle: bool = False) -> FlatState:
    """Take a state apart.

    Parameters
    ----------
    state
        Any nesting of dicts, lists, tuples and the like with torch tensors, numpy arrays, plain values and objects that
        have ``state_dict()`` and ``load_state_dict()``. ``docs/structure.md`` lists every type.
    allow_pickle
        Whether to pickle objects of other types.

    Returns
    -------
    flat
        Refers to the state's memory; only tensors with gaps between their elements are copied. A list or dict that
        occurs twice is stored twice; tensors that share memory still do after a restore.

    Raises
    ------
    StateError
        If something cannot be saved; names its path in the state and says what to do.
    PickleRefusedError
        If it can be saved only with `allow_pickle`.
    """
    walker = _Walker(allow_pickle)
    with no_garbage_collection():
        try:
            structure = walker.node(state, "")
        except _Refused as refused:
            where = "".join(reversed(refused.path))
            raise refused.kind(f"cannot save state{where}: {refused}") from refused.__cause__
        return FlatState(structure, *walker.table.finish(), walker.packed, frozenset(walker.inner))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn Python's cycle collector off: flattening makes many small objects, none of them garbage, and so set off full
    collections, which took two thirds of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Refused(Exception):
    """A reason and a path, which grows by a segment per level on the way up, so that a successful walk builds none."""

    def __init__(self, reason: str, kind: type[StateError] = StateError) -> None:
        super().__init__(reason)
        self.kind = kind
        self.path: list[str] = []


class _Walker:
    def __init__(self, allow_pickle: bool) -> None:
        self.table = TensorTable()
        self.packed: list[PackedValue] = []
        self.inner: set[int] = set()
        self._allow_pickle = allow_pickle
        self._open: set[int] = set()  # containers and objects around the current value

    def node(self, value: Any, name: str) -> Json:
        kind = type(value)
        try:
            if kind is torch.Tensor:
                return {"tensor": self.table.add_torch(value, name)}
            if kind is torch.nn.Parameter:
                return {"tensor": self.table.add_torch(value, name, parameter=True)}
            container = _CONTAINERS.get(kind)
            if container is not None:
                return self._packed(value, name) or self._inside(value, name, container)
            if kind is np.ndarray or kind is np.memmap:
                return {"tensor": self.table.add_numpy(value, name)}
            plain = (self._packed(value, name) if kind in _PACKED_ALONE else None) or encode_plain(value)
        except StateError as error:
            raise _Refused(str(error), type(error)) from error
        return plain if plain is not None or value is None else self._object(value, name)

    def _packed(self, value: Any, name: str) -> Json:
        """Return the node of a packed value; ``None`` if the value belongs in the structure itself."""
        kind = type(value)
        depth = len(self._open)
        if kind is bytes or kind is str or kind is bytearray:
            if len(value) < HEAVY_BYTES:
                return None
            blocks: list[bytes] | bytes | str = bytes(value) if kind is bytearray else value
        elif not weighs_much(value, depth) or getattr(value, "_metadata", None) is not None:
            return None
        else:
            try:
                blocks = pack(value, depth)
            except RuntimeError as error:
                raise _Refused(f"this {kind.__name__} was changed by another thread while it was saved") from error
        node = self._beside(blocks, name, _KINDS[kind])
        if kind is deque:
            node["maxlen"] = value.maxlen
        elif kind is defaultdict:
            node["factory"] = self._factory(value)
        return node

    def _beside(self, blocks: list[bytes] | bytes | str, name: str, kind: str) -> dict[str, Json]:
        self.packed.append(PackedValue(name, blocks))
        return {"packed": len(self.packed) - 1, "kind": kind}

    def mapping(self, value: Mapping[Any, Any], name: str) -> list[Json]:
        items: list[Json] = []
        for key, child in value.items():
            try:
                items.append([encode_key(key), self.node(child, join_name(name, key))])
            except StateError as error:
                raise _Refused(f"key {shown(key)}: {error}") from error
            except _Refused as refused:
                refused.path.append(f"[{shown(key)}]")
                raise
        return items

    def sequence(self, value: Iterable[Any], name: str) -> list[Json]:
        items: list[Json] = []
        for index, child in enumerate(value):
            try:
                items.append(self.node(child, join_name(name, index)))
            except _Refused as refused:
                refused.path.append(f"[{index}]")
                raise
        return items

    def ordered_dict(self, value: OrderedDict[Any, Any], name: str) -> Json:
        node = {"ordereddict": self.mapping(value, name)}
        metadata = getattr(value, "_metadata", None)  # nn.Module's: the versions of its submodules
        if metadata is not None:
            node["metadata"] = self._at("._metadata", metadata, join_name(name, "_metadata"))
        return node

    def default_dict(self, value: defaultdict[Any, Any], name: str) -> Json:
        return {"defaultdict": self.mapping(value, name), "factory": self._factory(value)}

    def _factory(self, value: defaultdict[Any, Any]) -> str:
        for factory, known in DEFAULT_FACTORIES.items():
            if value.default_factory is known:
                return factory
        raise _Refused(
            f"a defaultdict with the factory {value.default_factory!r} cannot be saved; "
            f"use dict(...), or one of the factories {', '.join(DEFAULT_FACTORIES)}"
        )

    def named_tuple(self, value: Any, name: str) -> Json:
        names, values, kind = value._fields, tuple(value), type(value).__name__
        try:
            if type(names) is not tuple or any(type(field) is not str for field in names) or len(names) != len(values):
                raise ValueError("its _fields do not name its elements")
            named_tuple_type(kind, names)
        except ValueError as error:
            raise _Refused(f"a {type_name(value)} cannot be read back; save tuple(value): {error}") from error
        fields = [
            [field, self._at(f".{field}", child, join_name(name, field))]
            for field, child in zip(names, values, strict=True)
        ]
        return {"namedtuple": fields, "name": kind}

    def generator(self, value: torch.Generator, name: str) -> Json:
        index = self.table.add_torch(value.get_state(), name)
        return {"torch.Generator": index, "device": str(value.device)}

    def subclass(self, value: torch.Tensor, name: str) -> Json:
        if not is_of_tensors(value) or value.is_nested:
            raise _Refused(_tensor_subclass(value))
        inner = []
        before = len(self.table)
        try:
            parts = list(inner_tensors(value))
            context = encoded_context(value)
        except StateError as error:
            raise _Refused(str(error) if _is_sharded(value) else f"{_tensor_subclass(value)}; {error}") from error
        for attribute, tensor in parts:
            inner.append([attribute, self._at(f".{attribute}", tensor, join_name(name, attribute))])
        self.inner.update(range(before, len(self.table)))
        parameter = isinstance(value, torch.nn.Parameter)
        flags = [flag for flag, on in (("parameter", parameter), ("requires_grad", value.requires_grad)) if on]
        return {
            "subclass": class_name(type(value)),
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "inner": inner,
            "context": context,
            "flags": flags,
        }

    def stateful(self, value: Any, name: str) -> Json:
        return self._at(".state_dict()", value.state_dict(), name)

    def _at(self, segment: str, value: Any, name: str) -> Json:
        try:
            return self.node(value, name)
        except _Refused as refused:
            refused.path.append(segment)
            raise

    def _inside(self, value: Any, name: str, form: Callable[[_Walker, Any, str], Json]) -> Json:
        if id(value) in self._open:
            raise _Refused(f"this {type(value).__name__} contains itself; a state must be a tree")
        if len(self._open) >= MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep; store it flatter")
        self._open.add(id(value))
        node = form(self, value, name)
        self._open.remove(id(value))
        return node

    def _object(self, value: Any, name: str) -> Json:
        """Return the node of a value whose type is in no table: a subclass, an object with a state, anything else."""
        if isinstance(value, torch.Tensor):
            return self.subclass(value, name)
        if isinstance(value, torch.Generator):
            return self.generator(value, name)
        if is_stateful(value):
            return self._inside(value, name, _Walker.stateful)
        if isinstance(value, tuple) and hasattr(type(value), "_fields"):
            return self._inside(value, name, _Walker.named_tuple)
        if not self._allow_pickle:
            raise _Refused(_unknown(value), PickleRefusedError)
        try:
            data = pickle.dumps(value)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            raise _Refused(f"a {type_name(value)} cannot be pickled: {error}") from error
        if len(data) >= HEAVY_BYTES:
            return self._beside(data, name, "pickle") | {"type": type_name(value)}
        return {"pickle": base64.b64encode(data).decode("ascii"), "type": type_name(value)}


_CONTAINERS: dict[type, Callable[[_Walker, Any, str], Json]] = {
    dict: lambda walker, value, name: {"dict": walker.mapping(value, name)},
    list: lambda walker, value, name: {"list": walker.sequence(value, name)},
    tuple: lambda walker, value, name: {"tuple": walker.sequence(value, name)},
    deque: lambda walker, value, name: {"deque": walker.sequence(value, name), "maxlen": value.maxlen},
    Counter: lambda walker, value, name: {"counter": walker.mapping(value, name)},
    OrderedDict: _Walker.ordered_dict,
    defaultdict: _Walker.default_dict,
}


_KINDS: dict[type, str] = {
    Counter: "counter",
    **{kind: kind.__name__ for kind in (bytes, bytearray, str, list, tuple, set, frozenset, dict, deque, defaultdict)},
    OrderedDict: "ordereddict",
}
_PACKED_ALONE = frozenset((bytes, bytearray, str, set, frozenset))


def _tensor_subclass(tensor: torch.Tensor) -> str:
    name = type_name(tensor)
    match type(tensor).__name__:
        case "DTensor" | "ShardedTensor":
            return f"a {name} is sharded over processes; save sharded state with incckpt.integrations.dcp"
        case "UninitializedParameter" | "UninitializedBuffer":
            return f"a {name} has no shape yet; run the module once before saving it"
        case "FakeTensor":
            return f"a {name} has no data; save outside of FakeTensorMode"
        case "NestedTensor":
            return f"a {name} cannot be saved; save a list of its components: tensor.unbind()"
    advice = []
    if type(tensor).dequantize is not torch.Tensor.dequantize:
        advice.append("save tensor.dequantize()")
    if is_of_tensors(tensor):
        inner = ", ".join(f"tensor.{name}" for name in flattened(tensor)[0])
        advice.append(f"save the tensors that it consists of: {inner}")
    if not advice and _has_plain_memory(tensor):
        advice.append("save a plain tensor: tensor.as_subclass(torch.Tensor)")
    return f"tensor subclass {name} cannot be saved; {', or '.join(advice) or 'save the tensors that it consists of'}"


def _is_sharded(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ in ("DTensor", "ShardedTensor")


def _has_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether ``tensor.as_subclass(torch.Tensor)`` is a tensor that can be saved."""
    try:
        TensorTable().add_torch(tensor.as_subclass(torch.Tensor), "")
    except (StateError, RuntimeError, TypeError):  # raised by the class
        return False
    return True


def _unknown(value: object) -> str:
    if callable(getattr(value, "state_dict", None)):
        advice = "give it a load_state_dict() beside its state_dict()"
    elif isinstance(value, dict):
        advice = "save dict(value)"
    elif isinstance(value, np.ndarray):
        advice = "save numpy.asarray(value)"
    elif isinstance(value, enum.Enum):
        advice = "save its name or value"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        advice = "save dataclasses.asdict(value)"
    elif isinstance(value, os.PathLike):
        advice = "save str(value)"
    elif isinstance(value, (str, int, float, bytes, list, tuple, set, frozenset)):
        base = next(kind for kind in type(value).__mro__ if kind.__module__ == "builtins")
        advice = f"save {base.__name__}(value)"
    else:
        advice = "save plain values, or give it state_dict() and load_state_dict()"
    return f"a {type_name(value)} cannot be saved; {advice}, or pass allow_pickle=True"
