"""Build a new state from a parsed structure, its entries and the bytes of its ranges."""

from __future__ import annotations

import logging
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from incckpt.errors import CorruptionError, FormatError, IncckptError, OptionError, PickleRefusedError
from incckpt.messages import shown
from incckpt.state.contexts import Classes
from incckpt.state.entries import TensorEntry, byte_extent, byte_strides, packed_shape
from incckpt.state.ranges import CARRIERS
from incckpt.state.subclasses import make
from incckpt.state.tree import (
    DEFAULT_FACTORIES,
    GeneratorRef,
    MappingNode,
    PackedRef,
    Pickled,
    Plain,
    PlainItems,
    SequenceNode,
    SubclassRef,
    TensorRef,
    Tree,
)

__all__ = ["Buffer", "Builder", "MapLocation", "build", "device_available", "device_for", "set_generator_state"]

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")

Bytes: TypeAlias = npt.NDArray[np.uint8]
Buffer: TypeAlias = Bytes | torch.Tensor
"""The bytes of a range: a writable ``uint8[nbytes]`` array, aligned to 64 bytes; or a flat ``uint8`` tensor."""

Location: TypeAlias = str | torch.device
MapLocation: TypeAlias = (
    Location
    | Mapping[str, Location]
    | Callable[[torch.UntypedStorage, str], torch.UntypedStorage | torch.TypedStorage | None]
    | None
)
"""Where torch tensors go, as for ``torch.load``: one device for all; the new device by the name of the saved one; or a
function that is given each storage, on the CPU, and the name of its device, and returns the storage to use. What a
mapping lacks, or a function returns ``None`` for, goes to where it was."""


def device_available(device: torch.device) -> bool:
    """Whether tensors can be created on `device` here."""
    if device.type in ("cpu", "meta"):
        return True
    try:
        torch.empty(0, device=device)
    except Exception:  # noqa: BLE001 -- each kind of device fails in a way of its own, some for want of a module
        return False
    return True


def device_for(saved: str, chosen: Location | None) -> torch.device:
    """Return the device `chosen` for a tensor saved on the device `saved`; by default that one.

    Raises
    ------
    OptionError
        If that device is not available here.
    """
    try:
        device = torch.device(saved if chosen is None else chosen)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"map_location gives no device for {saved!r}: {error}") from error
    if not device_available(device):
        raise OptionError(f"tensors saved on {saved} would go to {device}, not available here; pass map_location='cpu'")
    return device


def build(
    tree: Tree,
    entries: Sequence[TensorEntry],
    buffers: Sequence[Buffer | None],
    *,
    map_location: MapLocation = None,
    allow_pickle: bool = False,
) -> Any:
    """Return a new state.

    Parameters
    ----------
    tree
        What to build: a parsed structure (:func:`incckpt.state.tree.parse`), or a selected part of it.
    entries
        All entries of the document, checked by :func:`incckpt.state.entries.check_entries`.
    buffers
        The bytes of each range, or ``None`` for those that `tree` does not need. Tensors on the CPU, and arrays, are
        views of these, nothing is copied; so they are writable, and belong to the new state from here on.
    map_location
        Where torch tensors go, as for ``torch.load``; by default where they were. Arrays stay on the host.
    allow_pickle
        Whether pickled objects are loaded. Loading a pickle can run any code.

    Raises
    ------
    OptionError
        If a device is not available.
    PickleRefusedError
        If the state has pickled objects and `allow_pickle` is not set.
    FormatError, CorruptionError
        If a tensor cannot be represented here, or its bytes are not those of a value of its type.
    """
    given = {index: buffer for index, buffer in enumerate(buffers) if buffer is not None}
    return Builder(entries, given, map_location=map_location, allow_pickle=allow_pickle).value(tree)


class Builder:
    """Builds values from parsed structures; see :func:`build` for the parameters.

    Parameters
    ----------
    buffers
        By range.
    live
        Existing tensors to use instead of building new ones, by entry.
    lenient
        Whether to load onto the CPU, and log it, if the saved device is not available here.
    classes
        The tensor subclasses that may be made; by default those that torch is told are safe.

    Raises
    ------
    OptionError
        If `map_location` is of another type.
    """

    def __init__(
        self,
        entries: Sequence[TensorEntry],
        buffers: Mapping[int, Buffer],
        *,
        map_location: MapLocation = None,
        allow_pickle: bool = False,
        live: Mapping[int, Any] | None = None,
        lenient: bool = False,
        classes: Classes | None = None,
    ) -> None:
        if not (
            map_location is None or isinstance(map_location, (str, torch.device, Mapping)) or callable(map_location)
        ):
            raise OptionError(
                f"map_location must be a device, a mapping of devices or a function of a storage and the name of its "
                f"device, not {shown(map_location)}"
            )
        self._entries = entries
        self._buffers = buffers
        self._map_location = map_location
        self._allow_pickle = allow_pickle
        self._live = {} if live is None else live
        self._lenient = lenient
        self._classes = Classes() if classes is None else classes
        self._callers: Exception | None = None  # raised by what the caller gave or allowed
        self._devices: dict[str, torch.device] = {}
        self._memory: dict[tuple[int, torch.device], Buffer] = {}
        self._storages: dict[tuple[int, torch.device, int], torch.UntypedStorage] = {}
        self._relocated: dict[tuple[int, str, int], torch.UntypedStorage] = {}

    def value(self, tree: Tree) -> Any:
        """Return the value of `tree`.

        Raises
        ------
        FormatError
            If it cannot be made here. What `map_location` and pickles raise is raised.
        """
        try:
            return self._value(tree)
        except IncckptError:
            raise
        except Exception as error:
            if error is self._callers:
                raise
            raise FormatError(f"the state cannot be made here: {type(error).__name__}: {error}") from error

    def _value(self, tree: Tree) -> Any:
        match tree:
            case Plain(value):
                return value
            case TensorRef(index):
                return self._live[index] if index in self._live else self.tensor(index)
            case SubclassRef(inner=inner):
                return make(tree, {name: self._value(child) for name, child in inner}, self._classes)
            case MappingNode("dict", PlainItems() as items) | SequenceNode("list", PlainItems() as items):
                return items.value
            case MappingNode(kind, PlainItems() as items, extra):
                return self._mapping(kind, items.value, extra)
            case SequenceNode(kind, PlainItems() as items, extra):
                return self._sequence(kind, items.value, extra)
            case PackedRef(index):
                raise OptionError(f"no bytes were given for packed range {index}")
            case MappingNode(kind, items, extra):
                return self._mapping(kind, [(key, self._value(child)) for key, child in items], extra)
            case SequenceNode(kind, items, extra):
                return self._sequence(kind, [self._value(child) for child in items], extra)
            case GeneratorRef(index, device):
                return self._generator(index, device)
            case Pickled(data, name):
                return self._unpickle(data, name)

    def tensor(self, index: int) -> torch.Tensor | npt.NDArray[Any]:
        """Return the tensor or array of entry `index`, new, over the memory of its range."""
        entry = self._entries[index]
        if entry.kind == "torch" and callable(self._map_location):
            self._relocate(entry)  # whatever the function raises is raised
        try:
            return self._numpy(entry) if entry.kind == "numpy" else self._torch(entry)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            if isinstance(error, (OptionError, CorruptionError, FormatError)):
                raise
            raise FormatError(f"tensor {entry.name!r} cannot be made here: {error}") from error

    def _mapping(self, kind: str, items: list[tuple[Any, Any]] | dict[Any, Any], extra: Any) -> dict[Any, Any]:
        if kind == "dict":
            return dict(items)
        if kind == "counter":
            return Counter(dict(items))
        if kind == "defaultdict":
            return defaultdict(DEFAULT_FACTORIES[extra], items)
        ordered = OrderedDict(items)
        if extra is not None:
            ordered._metadata = self._value(extra)  # type: ignore[attr-defined]
        return ordered

    def _sequence(self, kind: str, items: Any, extra: Any) -> Any:
        if kind == "list":
            return items
        if kind == "tuple":
            return tuple(items)
        return deque(items, extra) if kind == "deque" else extra(*items)

    def _generator(self, index: int, saved: str) -> torch.Generator:
        asked = self._call(_no_storage(), saved) if callable(self._map_location) else None
        device = self._device(saved) if asked is None else asked.device
        generator = torch.Generator(_CPU if device.type == "meta" else device)
        state = Builder(self._entries, self._buffers, map_location="cpu").tensor(index)
        set_generator_state(generator, state, saved, self._entries[index].name)
        return generator

    def _unpickle(self, data: bytes, name: str) -> Any:
        if not self._allow_pickle:
            raise PickleRefusedError(
                f"the checkpoint holds a pickled {name}; loading it can run any code. If you trust whoever wrote it, "
                "pass allow_pickle=True"
            )
        try:
            return pickle.loads(data)
        except Exception as error:
            error.add_note(f"while unpickling a {name} of the checkpoint")
            self._callers = error
            raise

    # -- tensors

    def _device(self, saved: str) -> torch.device:
        device = self._devices.get(saved)
        if device is None:
            chosen: Location | None = None
            if isinstance(self._map_location, (str, torch.device)):
                chosen = self._map_location
            elif isinstance(self._map_location, Mapping):
                chosen = self._map_location.get(_tag(saved))
            if self._lenient and not device_available(torch.device(saved if chosen is None else chosen)):
                log.warning("tensors saved on %s go to the CPU where nothing in the target tells their device", saved)
                chosen = _CPU
            device = self._devices[saved] = device_for(saved, chosen)
        return device

    def _numpy(self, entry: TensorEntry) -> npt.NDArray[Any]:
        if entry.range < 0:
            return np.ndarray(entry.shape, entry.numpy_dtype, bytearray(), 0, entry.stride)
        memory = self._bytes(entry, _CPU)
        return np.ndarray(entry.shape, entry.numpy_dtype, memory, _offset(entry), entry.stride)  # type: ignore[arg-type]

    def _torch(self, entry: TensorEntry) -> torch.Tensor:
        # All views of a range share one storage, except those at unaligned offsets: each has its own, over
        # the same bytes.
        shift = _offset(entry) % entry.itemsize if entry.range >= 0 else 0
        storage = self._relocated.get((entry.range, entry.device, shift))
        device = self._device(entry.device) if storage is None else storage.device
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise FormatError(f"tensor {entry.name!r}: torch {torch.__version__} has no dtype {entry.dtype}")
        # Created as integers: creating a complex32 tensor triggers a warning.
        tensor = torch.empty(0, dtype=CARRIERS[entry.itemsize], device=device).view(dtype)
        if entry.range < 0:
            tensor.as_strided_(entry.shape, entry.stride)
        else:
            if storage is None:
                storage = self._storage(entry, device, shift)
            tensor.set_(storage, _offset(entry) // entry.itemsize, entry.shape, entry.stride)
        if entry.conj:
            tensor = tensor.conj()
        if entry.neg:
            tensor = torch._neg_view(tensor)
        if entry.parameter:
            return torch.nn.Parameter(tensor, requires_grad=entry.requires_grad)
        return tensor.requires_grad_() if entry.requires_grad else tensor

    def _relocate(self, entry: TensorEntry) -> None:
        """Ask the function `map_location` for the storage of `entry`, once for all views of it."""
        shift = _offset(entry) % entry.itemsize if entry.range >= 0 else 0
        key = (entry.range, entry.device, shift)
        if key not in self._relocated:
            given = self._storage(entry, _CPU, shift) if entry.range >= 0 else _no_storage()
            placed = self._call(given, entry.device)
            if placed.nbytes() < given.nbytes():
                raise OptionError(
                    f"map_location returned a storage of {placed.nbytes()} bytes for one of {given.nbytes()}, which "
                    f"tensor {entry.name!r} needs"
                )
            self._relocated[key] = placed

    def _call(self, storage: torch.UntypedStorage, saved: str) -> torch.UntypedStorage:
        assert callable(self._map_location)
        try:
            placed = self._map_location(storage, _tag(saved))
        except Exception as error:
            self._callers = error
            raise
        if placed is None:
            device = device_for(saved, None)
            return storage if device.type == "cpu" else storage.to(device=device)
        if isinstance(placed, torch.TypedStorage):
            placed = placed._untyped_storage
        if not isinstance(placed, torch.UntypedStorage):
            raise OptionError(
                f"map_location is called as torch.load calls it, with a storage and its device ({saved!r}), and "
                f"returns a storage or None; it returned {shown(placed)}"
            )
        return placed

    def _storage(self, entry: TensorEntry, device: torch.device, shift: int) -> torch.UntypedStorage:
        key = (entry.range, device, shift)
        storage = self._storages.get(key)
        if storage is None:
            memory = self._bytes(entry, device)
            if isinstance(memory, np.ndarray):
                storage = torch.from_numpy(memory[shift:]).untyped_storage()
            else:
                if shift:
                    log.warning("tensor %r is restored as a copy, no longer an alias: it is misaligned", entry.name)
                storage = (memory[shift:].clone() if shift else memory).untyped_storage()
            self._storages[key] = storage
        return storage

    def _bytes(self, entry: TensorEntry, device: torch.device) -> Buffer:
        """Return the bytes of the range of `entry` as they lay in memory: an array on the CPU, else a flat tensor."""
        key = (entry.range, device)
        memory = self._memory.get(key)
        if memory is None:
            given = self._buffers.get(entry.range)
            if given is None:
                raise OptionError(f"no bytes were given for range {entry.range}, which tensor {entry.name!r} needs")
            if device.type == "cpu":
                host = given.cpu().numpy() if isinstance(given, torch.Tensor) else given
                memory = _unpack(entry, host) if entry.packed else host
            else:
                flat = (given if isinstance(given, torch.Tensor) else torch.from_numpy(given)).to(device)
                memory = _unpack_on_device(entry, flat) if entry.packed else flat
            self._memory[key] = memory
        return memory


def _no_storage() -> torch.UntypedStorage:
    return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]


def _tag(device: str) -> str:
    """Return the name that torch gives to storages on `device`: the only MPS device has no number."""
    return "mps" if device.startswith("mps:") else device


def _offset(entry: TensorEntry) -> int:
    """Return the offset of the first element of `entry` in its range, unpacked if it was packed."""
    if not entry.packed:
        return entry.offset
    return -byte_extent(entry.shape, byte_strides(entry), entry.itemsize)[0]


def _unpack(entry: TensorEntry, packed: Bytes) -> Bytes:
    """Unpack a range to its original layout; pages of gaps are never touched."""
    strides = byte_strides(entry)
    shape = packed_shape(entry.shape, strides)
    low, high = byte_extent(entry.shape, strides, entry.itemsize)
    memory = np.zeros(high - low, np.uint8)
    carrier = np.dtype(f"u{entry.itemsize}" if entry.itemsize in (1, 2, 4, 8) else f"V{entry.itemsize}")
    np.ndarray(shape, carrier, memory, -low, strides)[...] = np.ndarray(shape, carrier, packed)
    return memory


def _unpack_on_device(entry: TensorEntry, packed: torch.Tensor) -> torch.Tensor:
    shape = packed_shape(entry.shape, entry.stride)
    high = byte_extent(entry.shape, byte_strides(entry), entry.itemsize)[1]
    memory = torch.zeros(high, dtype=torch.uint8, device=packed.device)
    view = torch.empty(0, dtype=CARRIERS[entry.itemsize], device=packed.device)
    view.set_(memory.untyped_storage(), 0, shape, entry.stride)
    view.copy_(packed.view(view.dtype).reshape(shape))
    return memory


def set_generator_state(generator: torch.Generator, state: object, saved: str, name: str) -> None:
    """Set the state of `generator` to one saved on the device `saved`; log it if the kind of device differs."""
    if generator.device.type != torch.device(saved).type:
        log.warning("generator %r was saved on %s; on %s it starts from a fresh state", name, saved, generator.device)
        return
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise CorruptionError(f"the state of generator {name!r} is not a uint8 tensor")
    try:
        generator.set_state(state.cpu())
    except RuntimeError as error:
        raise CorruptionError(f"the state of generator {name!r} is not one that torch accepts: {error}") from error
