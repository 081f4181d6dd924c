"""Files of ``torch.save``: zip archives of a pickle and one record per storage."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import logging
import pickle
import re
import struct
import sys
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from incckpt.errors import CorruptionError, PickleRefusedError, StateError
from incckpt.interchange.source import CheckpointBytes
from incckpt.outputs import Outputs
from incckpt.run.contents import Contents
from incckpt.run.reader import Bytes
from incckpt.staging.hostmem import new_buffer
from incckpt.state.build import Builder
from incckpt.state.entries import TensorEntry
from incckpt.state.names import join_name
from incckpt.state.tree import GeneratorRef, TensorRef, Tree, children, describe, leaves

__all__ = [
    "array_globals",
    "read_torch_file",
    "refusal",
    "takes_weights_only",
    "untouched_state",
    "write_torch_file",
]

log = logging.getLogger(__name__)

_PROTOCOL: Final = 2  # torch.save's, and what the unpickler of weights_only=True knows best
_ALIGNMENT: Final = 64  # torch.save's
_ZIP_MAGIC: Final = b"PK\x03\x04"
_ZIP64: Final = 1 << 31
_LOCAL_HEADER: Final = 30
_ZIP64_EXTRA: Final = 20
_FIELD = struct.Struct("<2sH")  # an extra field's header: mark, length
_PADDING: Final = b"FB"  # the mark that torch.save uses
_CORES: Final = ("numpy._core.multiarray", "numpy.core.multiarray")  # since numpy 2, and before


class _Storage(NamedTuple):
    """A record of the archive: the first `nbytes` bytes at `address`."""

    key: str
    address: int
    nbytes: int


def write_torch_file(
    path: Path, contents: Contents, source: CheckpointBytes, outputs: Outputs, *, allow_pickle: bool
) -> None:
    """Write a state as ``torch.save`` does, all tensors on the CPU; storages go through memory a part at a time.

    The pickle is that of the state over memory that is never touched, which takes none: no byte of a tensor is in it.

    Raises
    ------
    StateError
        If a value cannot be pickled; names it.
    """
    tree = contents.tree
    builder, untouched = _over_untouched_memory(contents, source, allow_pickle)
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, _PROTOCOL)
    value = builder.value(tree)
    try:
        pickler.dump(value)
    except _PICKLE_ERRORS as error:
        raise StateError(
            f"{_culprit(tree, builder) or 'the state'} cannot be written to a torch file: {error}"
        ) from error
    places = [(storage, *untouched.find(storage.address)) for storage in pickler.storages.values()]
    rank = {index: place for place, index in enumerate(source.in_order(contents.wanted))}
    places.sort(key=lambda one: rank.get(one[1], -1))  # as the bytes lie in the checkpoint
    with outputs.open(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        name = path.stem
        _write_record(archive, f"{name}/data.pkl", [np.frombuffer(pickled.getvalue(), np.uint8)])
        _write_record(archive, f"{name}/byteorder", [np.frombuffer(sys.byteorder.encode(), np.uint8)])
        for storage, index, start in places:
            parts: Iterable[Bytes] = (
                [_memory(storage)] if index < 0 else source.pieces(index, start, start + storage.nbytes)
            )
            _write_record(archive, f"{name}/data/{storage.key}", parts, storage.nbytes)
        _write_record(archive, f"{name}/version", [np.frombuffer(b"3\n", np.uint8)])


def untouched_state(contents: Contents, source: CheckpointBytes, *, allow_pickle: bool) -> tuple[Any, dict[int, int]]:
    """Return a state over memory that is never touched, and the entry of each of its tensors by their identity.

    What is not of a tensor's bytes alone is filled: arrays, the states of generators.
    """
    builder, _ = _over_untouched_memory(contents, source, allow_pickle)
    return builder.value(contents.tree), builder.made


def takes_weights_only(path: Path) -> bool:
    """Whether ``torch.load(path, weights_only=True)`` takes a file; the bytes of its tensors are not read.

    Raises
    ------
    StateError
        If no ``torch.load`` does.
    """
    for weights_only in (True, False):
        try:
            torch.load(path, map_location="meta", mmap=True, weights_only=weights_only)
        except pickle.UnpicklingError:
            continue
        except RuntimeError as error:  # float8 that requires a gradient, in some versions of torch
            raise StateError(f"torch {torch.__version__} could not load the file that it would get: {error}") from error
        return weights_only
    return False


_PICKLE_ERRORS = (pickle.PicklingError, TypeError, AttributeError, RecursionError, NotImplementedError, KeyError)


class _Pickler(pickle.Pickler):
    """Pickles a state as ``torch.save`` does, with storages left out.

    Attributes
    ----------
    storages
        What was left out, by the address and the type that the file gives it.
    """

    def __init__(self, file: IO[bytes], protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: dict[tuple[int, object], _Storage] = {}

    def persistent_id(self, value: Any) -> tuple[object, ...] | None:
        if isinstance(value, torch.storage.TypedStorage):
            untyped: torch.UntypedStorage = value._untyped_storage
            kind: Any = getattr(torch, value._pickle_storage_type())  # type: ignore[no-untyped-call]
            count = value._size()  # type: ignore[no-untyped-call]
            nbytes = count * value._element_size()  # type: ignore[no-untyped-call]
        elif isinstance(value, torch.UntypedStorage):
            untyped, kind = value, torch.UntypedStorage
            count = nbytes = untyped.nbytes()
        else:
            return None
        # A file has one type for each storage: memory seen as several types is written once for each.
        storage = _Storage(str(len(self.storages)), untyped.data_ptr(), nbytes)
        storage = self.storages.setdefault((storage.address, kind), storage)
        return ("storage", kind, storage.key, "cpu", count)


class _Recorder(Builder):
    """Builds a state, and notes which tensor is of which entry.

    Attributes
    ----------
    made
        Indexes of entries, by the identity of the tensor.
    """

    def __init__(self, entries: Sequence[TensorEntry], buffers: Mapping[int, Bytes], allow_pickle: bool) -> None:
        super().__init__(entries, buffers, map_location="cpu", allow_pickle=allow_pickle)
        self.made: dict[int, int] = {}

    def tensor(self, index: int) -> torch.Tensor | npt.NDArray[Any]:
        """Return the tensor or array of entry `index`."""
        value = super().tensor(index)
        self.made[id(value)] = index
        return value


def _over_untouched_memory(
    contents: Contents, source: CheckpointBytes, allow_pickle: bool
) -> tuple[_Recorder, _Untouched]:
    """Return what builds a state over memory that takes none, and where that is."""
    filled = _needed_now(contents)
    buffers = {
        index: source.read(index) if index in filled else new_buffer(contents.manifest.ranges[index].nbytes)
        for index in source.in_order(contents.wanted)
    }
    untouched = _Untouched({index: buffer for index, buffer in buffers.items() if index not in filled})
    return _Recorder(contents.entries, buffers, allow_pickle), untouched


class _Untouched:
    """Finds the ranges whose bytes are not in memory, by the addresses that they would have there."""

    def __init__(self, buffers: Mapping[int, Bytes]) -> None:
        self._spans = sorted((buffer.ctypes.data, buffer.nbytes, index) for index, buffer in buffers.items())

    def find(self, address: int) -> tuple[int, int]:
        """Return the range that has `address`, and where in it that is; -1 if none has."""
        place = bisect_right(self._spans, address, key=lambda span: span[0]) - 1
        if place >= 0:
            start, nbytes, index = self._spans[place]
            if address < start + nbytes:
                return index, address - start
        return -1, 0


def _needed_now(contents: Contents) -> set[int]:
    """Return the ranges whose bytes are part of the pickle, or have to be rearranged: arrays, and what is packed."""
    needed: set[int] = set()
    for leaf in leaves(contents.tree):
        if isinstance(leaf, (TensorRef, GeneratorRef)):
            entry = contents.entries[leaf.index]
            if entry.range >= 0 and (entry.kind == "numpy" or entry.packed or isinstance(leaf, GeneratorRef)):
                needed.add(entry.range)
    return needed


def _culprit(tree: Tree, builder: Builder, name: str = "") -> str | None:
    """Return which innermost value cannot be pickled; ``None`` if all can be."""
    try:
        _Pickler(io.BytesIO(), _PROTOCOL).dump(builder.value(tree))
    except _PICKLE_ERRORS:
        inner = (_culprit(child, builder, join_name(name, key)) for key, child in children(tree))
        return next((found for found in inner if found), f"{name!r}, {describe(tree)},")
    return None


def _memory(storage: _Storage) -> Bytes:
    if not storage.nbytes:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes).from_address(storage.address))


def _write_record(archive: zipfile.ZipFile, name: str, parts: Iterable[Bytes], nbytes: int = 0) -> None:
    """Write a record, its bytes at a multiple of 64 in the file: `torch.load` maps storages where they lie."""
    info = zipfile.ZipInfo(name)  # dated 1980: equal states make equal files
    large = nbytes >= _ZIP64
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER + len(info.filename.encode()) + large * _ZIP64_EXTRA + _FIELD.size
    padding = -begin % _ALIGNMENT
    info.extra = _FIELD.pack(_PADDING, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as record:
        for part in parts:
            record.write(part.data)


def read_torch_file(path: Path, *, allow_pickle: bool) -> Any:
    """Return what ``torch.save`` wrote; tensors are mapped, not read, unless the file is of the format before 1.6.

    Raises
    ------
    PickleRefusedError
        If it holds more than tensors, arrays and plain values, and `allow_pickle` is not set.
    CorruptionError
        If it is damaged.
    """
    with open(path, "rb") as file:
        mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if mapped and not zipfile.is_zipfile(path):
        raise CorruptionError(f"{path} is cut short: it begins as a file of torch.save, and does not end as one")
    if not mapped:
        log.warning("%s is of torch's format before 1.6, which cannot be mapped: it is read into memory whole", path)
    try:
        with torch.serialization.safe_globals(array_globals()):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if allow_pickle:
            raise CorruptionError(f"{path} is no file of torch.save, or it is damaged: {error}") from error
        raise refusal(str(path), error) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, ImportError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptionError(f"{path} is no file of torch.save, or it is damaged: {first}") from error


def refusal(what: str, error: pickle.UnpicklingError) -> PickleRefusedError:
    """Return the error for a pickle that ``weights_only=True`` refused."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"{what} holds {named[1]}" if named else f"{what} is damaged, or holds an object ({error!s:.200})"
    return PickleRefusedError(
        f"{reason}: no tensor, array or plain value. To unpickle it can run any code; if you trust whoever wrote it, "
        "pass allow_pickle=True"
    )


def array_globals() -> list[Any]:
    """Return what the pickle of a numpy array or scalar names; none of it does more than make one."""
    core: Any = importlib.import_module(next(name for name in _CORES if importlib.util.find_spec(name)))
    functions = [core._reconstruct, core.scalar]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    return [
        np.ndarray,
        np.dtype,
        *kinds,
        *((function, f"{module}.{function.__name__}") for function in functions for module in _CORES),
    ]
