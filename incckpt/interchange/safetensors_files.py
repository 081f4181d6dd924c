"""Files of the safetensors format, and folders of shards with an index, as Hugging Face lays them out.

Read by the library. Written here, since the library takes tensors in memory only: eight bytes of length, a JSON header
and the tensors' bytes (https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from incckpt.errors import CorruptionError, MissingExtraError, OptionError, StateError
from incckpt.interchange.source import CheckpointBytes, NamedTensor
from incckpt.outputs import Outputs

__all__ = ["INDEX_SUFFIX", "check_dtypes", "files_of_index", "read_safetensors", "write_safetensors"]

log = logging.getLogger(__name__)

INDEX_SUFFIX: Final = ".safetensors.index.json"

_TORCH_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_NUMPY_DTYPES: Final = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<c8": "C64", "|b1": "BOOL",
    "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8", "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8",
}  # fmt: skip
_RESERVED: Final = "__metadata__"


def check_dtypes(tensors: Sequence[NamedTensor]) -> None:
    """Check that the format has every tensor's dtype and name.

    Raises
    ------
    StateError
        Naming the tensor.
    """
    for tensor in tensors:
        if _code(tensor) is None:
            raise StateError(
                f"safetensors has no {tensor.entry.kind} dtype {tensor.entry.dtype}, which tensor {tensor.name!r} has; "
                "choose other tensors with keys=, or export to .pt"
            )
        if tensor.name == _RESERVED:
            raise StateError(f"a tensor named {_RESERVED!r} cannot be written to a safetensors file; rename it")


def write_safetensors(
    path: Path, tensors: Sequence[NamedTensor], source: CheckpointBytes, outputs: Outputs, *, shard_bytes: int
) -> dict[str, str]:
    """Write tensors to one file; or, if they are more than `shard_bytes`, to several beside an index.

    Parameters
    ----------
    path
        Of the file, named ``….safetensors``. Shards and index are named after it.

    Returns
    -------
    tied
        By the name of each tensor that is another one under a second name, the name that it is written under. The
        files' metadata say the same, as ``safetensors.torch.save_model`` has it.
    """
    kept, tied = _without_ties(tensors)
    shards = _shards(kept, shard_bytes)
    if len(shards) == 1:
        _write_file(path, shards[0], tied, source, outputs)
        return tied
    stem, places = path.name.removesuffix(".safetensors"), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        names = {tensor.name for tensor in shard}
        ties = {one: other for one, other in tied.items() if other in names}
        _write_file(path.with_name(name), shard, ties, source, outputs)
        places.update(dict.fromkeys((tensor.name for tensor in shard), name))
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in kept)}, "weight_map": places}
    with outputs.open(path.with_name(stem + INDEX_SUFFIX)) as file:
        file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
    return tied


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a file, or of the shards that an index names; mapped, not read. Ties are made again.

    Raises
    ------
    MissingExtraError
        Without the package safetensors.
    CorruptionError
        If a file is damaged or missing.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return _read_file(path)
    tensors: dict[str, Any] = {}
    for shard in files_of_index(path):
        tensors.update(_read_file(shard))
    return tensors


def files_of_index(path: Path) -> list[Path]:
    """Return the shards that an index names, of safetensors or of torch files.

    Raises
    ------
    CorruptionError
        If it is no index, or a shard is missing.
    """
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        names = list(dict.fromkeys(places.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{path} is no index of the files of a model: {error!r:.200}") from error
    for name in names:
        if not path.with_name(name).is_file():
            raise CorruptionError(f"{path} names the shard {name!r}, which is not there")
    return [path.with_name(name) for name in names]


def _code(tensor: NamedTensor) -> str | None:
    return (_TORCH_DTYPES if tensor.entry.kind == "torch" else _NUMPY_DTYPES).get(tensor.entry.dtype)


def _without_ties(tensors: Sequence[NamedTensor]) -> tuple[list[NamedTensor], dict[str, str]]:
    """Return the tensors without those that are another one under a second name, and which one that is.

    The name kept is the first in the order of the state: of a model, what it ties the others to.
    """
    same: dict[object, list[str]] = {}
    for tensor in tensors:
        if tensor.nbytes and tensor.name != "format":  # which has a meaning in the metadata
            same.setdefault(tensor.entry._replace(name="", parameter=False, requires_grad=False), []).append(
                tensor.name
            )
    tied = {name: names[0] for names in same.values() for name in names[1:]}
    return [tensor for tensor in tensors if tensor.name not in tied], tied


def _shards(tensors: Sequence[NamedTensor], shard_bytes: int) -> list[list[NamedTensor]]:
    """Cut a list of tensors into shards of at most `shard_bytes`, or of one tensor."""
    if shard_bytes < 1:
        raise OptionError(f"shard_bytes must be at least 1, not {shard_bytes}")
    shards: list[list[NamedTensor]] = [[]]
    nbytes = 0
    for tensor in tensors:
        if shards[-1] and nbytes + tensor.nbytes > shard_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(tensor)
        nbytes += tensor.nbytes
    return shards


def _write_file(
    path: Path, tensors: Sequence[NamedTensor], tied: Mapping[str, str], source: CheckpointBytes, outputs: Outputs
) -> None:
    header: dict[str, Any] = {_RESERVED: {"format": "pt", **tied}}
    offsets: dict[str, int] = {}
    offset = 0
    # Wide elements first, as the library has it: so each tensor lies at a multiple of its element size.
    for tensor in sorted(tensors, key=lambda one: (-one.entry.itemsize, one.name)):
        offsets[tensor.name] = offset
        places = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _code(tensor), "shape": list(tensor.entry.shape), "data_offsets": places}
        offset += tensor.nbytes
    document = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    document += b" " * (-len(document) % 8)
    begin = 8 + len(document)
    by_range: dict[int, list[NamedTensor]] = {}
    for tensor in tensors:
        if tensor.nbytes:
            by_range.setdefault(tensor.entry.range, []).append(tensor)
    with outputs.open(path) as file:
        file.write(struct.pack("<Q", len(document)) + document)
        file.truncate(begin + offset)
        for index in source.in_order(by_range):
            for tensor in sorted(by_range[index], key=lambda one: one.entry.offset):
                file.seek(begin + offsets[tensor.name])
                for piece in tensor.pieces(source):
                    file.write(piece.data)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open  # the optional dependency
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: reading safetensors files needs the package safetensors: pip install 'incckpt[safetensors]'"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CorruptionError(f"{path} is no safetensors file, or it is damaged: {error}") from error
    ties = {name: kept for name, kept in metadata.items() if name not in tensors and kept in tensors}
    return tensors | {name: tensors[kept] for name, kept in ties.items()}
