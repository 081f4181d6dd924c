"""A parsed structure, its entries and the bytes of its ranges to a new state."""

from __future__ import annotations

import logging
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from incckpt.errors import CorruptionError, FormatError, OptionError, PickleRefusedError
from incckpt.state.entries import TensorEntry, byte_extent, byte_strides, packed_shape
from incckpt.state.ranges import CARRIERS
from incckpt.state.tree import (
    DEFAULT_FACTORIES,
    GeneratorRef,
    MappingNode,
    Pickled,
    Plain,
    SequenceNode,
    TensorRef,
    Tree,
)

__all__ = ["Buffer", "Builder", "MapLocation", "build", "device_available", "device_for", "set_generator_state"]

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")

Bytes: TypeAlias = npt.NDArray[np.uint8]
Buffer: TypeAlias = Bytes | torch.Tensor
"""The bytes of a range: a writable ``uint8[nbytes]`` array, aligned to 64 bytes; or a flat ``uint8`` tensor."""

MapLocation: TypeAlias = (
    str | torch.device | Mapping[str, str | torch.device] | Callable[[str], str | torch.device] | None
)
"""Where torch tensors go: one device for all, or the new device by (or a function of) the saved one's name."""


def device_available(device: torch.device) -> bool:
    """Whether tensors can be made on `device` here."""
    if device.type in ("cpu", "meta"):
        return device.type == "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def device_for(saved: str, map_location: MapLocation) -> torch.device:
    """Return where a tensor saved on the device `saved` goes.

    Raises
    ------
    OptionError
        If that device is not available here.
    """
    chosen: str | torch.device | None = None
    if isinstance(map_location, (str, torch.device)):
        chosen = map_location
    elif isinstance(map_location, Mapping):
        chosen = map_location.get(saved, saved)
    elif callable(map_location):
        chosen = map_location(saved)
    elif map_location is not None:
        raise OptionError(f"map_location must be a device, a mapping or a function, not {map_location!r}")
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
    """Builds values out of parsed structures; see :func:`build` for the parameters.

    Parameters
    ----------
    buffers
        By range.
    live
        Tensors that exist already, by entry: they stand in for what would be built.
    """

    def __init__(
        self,
        entries: Sequence[TensorEntry],
        buffers: Mapping[int, Buffer],
        *,
        map_location: MapLocation = None,
        allow_pickle: bool = False,
        live: Mapping[int, Any] | None = None,
    ) -> None:
        self._entries = entries
        self._buffers = buffers
        self._map_location = map_location
        self._allow_pickle = allow_pickle
        self._live = {} if live is None else live
        self._devices: dict[str, torch.device] = {}
        self._memory: dict[tuple[int, torch.device], Buffer] = {}
        self._storages: dict[tuple[int, torch.device, int], torch.UntypedStorage] = {}

    def value(self, tree: Tree) -> Any:
        """Return the value of `tree`."""
        match tree:
            case Plain(value):
                return value
            case TensorRef(index):
                return self._live[index] if index in self._live else self.tensor(index)
            case MappingNode(kind, items, extra):
                return self._mapping(kind, [(key, self.value(child)) for key, child in items], extra)
            case SequenceNode(kind, items, extra):
                return self._sequence(kind, [self.value(child) for child in items], extra)
            case GeneratorRef(index, device):
                return self._generator(index, device)
            case Pickled(data, name):
                return self._unpickle(data, name)

    def tensor(self, index: int) -> torch.Tensor | npt.NDArray[Any]:
        """Return the tensor or array of entry `index`, new, over the memory of its range."""
        entry = self._entries[index]
        try:
            return self._numpy(entry) if entry.kind == "numpy" else self._torch(entry)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            if isinstance(error, (OptionError, CorruptionError, FormatError)):
                raise
            raise FormatError(f"tensor {entry.name!r} cannot be made here: {error}") from error

    def _mapping(self, kind: str, items: list[tuple[Any, Any]], extra: Any) -> dict[Any, Any]:
        if kind == "dict":
            return dict(items)
        if kind == "counter":
            return Counter(dict(items))
        if kind == "defaultdict":
            return defaultdict(DEFAULT_FACTORIES[extra], items)
        ordered = OrderedDict(items)
        if extra is not None:
            ordered._metadata = self.value(extra)  # type: ignore[attr-defined]
        return ordered

    def _sequence(self, kind: str, items: list[Any], extra: Any) -> Any:
        if kind == "list":
            return items
        if kind == "tuple":
            return tuple(items)
        return deque(items, extra) if kind == "deque" else extra(*items)

    def _generator(self, index: int, saved: str) -> torch.Generator:
        generator = torch.Generator(self._device(saved))
        set_generator_state(generator, self.tensor(index), saved, self._entries[index].name)
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
            raise

    # -- tensors

    def _device(self, saved: str) -> torch.device:
        device = self._devices.get(saved)
        if device is None:
            device = self._devices[saved] = device_for(saved, self._map_location)
        return device

    def _numpy(self, entry: TensorEntry) -> npt.NDArray[Any]:
        if entry.range < 0:
            return np.ndarray(entry.shape, entry.numpy_dtype, bytearray(), 0, entry.stride)
        memory = self._bytes(entry, _CPU)
        return np.ndarray(entry.shape, entry.numpy_dtype, memory, _offset(entry), entry.stride)  # type: ignore[arg-type]

    def _torch(self, entry: TensorEntry) -> torch.Tensor:
        device = self._device(entry.device)
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise FormatError(f"tensor {entry.name!r}: torch {torch.__version__} has no dtype {entry.dtype}")
        # Made as integers: to make a complex32 tensor sets off a warning.
        tensor = torch.empty(0, dtype=CARRIERS[entry.itemsize], device=device).view(dtype)
        if entry.range < 0:
            tensor.as_strided_(entry.shape, entry.stride)
        else:
            # All views of a range share one storage, but for those at an odd place in it: these get one of their own,
            # over the same bytes.
            shift = _offset(entry) % entry.itemsize
            storage = self._storage(entry, device, shift)
            tensor.set_(storage, _offset(entry) // entry.itemsize, entry.shape, entry.stride)
        if entry.conj:
            tensor = tensor.conj()
        if entry.neg:
            tensor = torch._neg_view(tensor)
        if entry.parameter:
            return torch.nn.Parameter(tensor, requires_grad=entry.requires_grad)
        return tensor.requires_grad_() if entry.requires_grad else tensor

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


def _offset(entry: TensorEntry) -> int:
    """Return where the first element of `entry` is in its range, or in what its range is unpacked to."""
    if not entry.packed:
        return entry.offset
    return -byte_extent(entry.shape, byte_strides(entry), entry.itemsize)[0]


def _unpack(entry: TensorEntry, packed: Bytes) -> Bytes:
    """Spread a packed range out over the bytes it was packed from; pages of gaps are never touched."""
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
    """Set the state of `generator` to one saved on the device `saved`; log it if that is another kind of device."""
    if generator.device.type != torch.device(saved).type:
        log.warning("generator %r was saved on %s; on %s it starts from a fresh state", name, saved, generator.device)
        return
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise CorruptionError(f"the state of generator {name!r} is not a uint8 tensor")
    try:
        generator.set_state(state.cpu())
    except RuntimeError as error:
        raise CorruptionError(f"the state of generator {name!r} is not one that torch accepts: {error}") from error
