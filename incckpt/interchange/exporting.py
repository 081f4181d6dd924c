"""`export`: a checkpoint as a file or folder that other programs read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from incckpt.backends.base import Backend
from incckpt.errors import OptionError, StateError
from incckpt.interchange.safetensors_files import check_dtypes, write_safetensors
from incckpt.interchange.source import CheckpointBytes, NamedTensor, named_tensors, subtree
from incckpt.interchange.torch_files import takes_weights_only, write_torch_file
from incckpt.options import check_function
from incckpt.outputs import Outputs
from incckpt.retention import Mode
from incckpt.run.choose import Which, checked_which, not_found
from incckpt.run.contents import Contents, read_packed
from incckpt.run.progress import OnProgress, counter
from incckpt.run.reader import Reader
from incckpt.run.view import RunView
from incckpt.staging.detect import chosen_threads
from incckpt.state.tree import references
from incckpt.store.location import locate
from incckpt.store.manifest import Manifest
from incckpt.store.store import Store

__all__ = ["FORMATS", "Exported", "Format", "export"]

log = logging.getLogger(__name__)

Format: TypeAlias = Literal["pt", "safetensors", "huggingface", "dcp"]

FORMATS: Final[tuple[Format, ...]] = get_args(Format)

_BY_SUFFIX: Final[dict[str, Format]] = {
    ".pt": "pt", ".pth": "pt", ".bin": "pt", ".ckpt": "pt", ".safetensors": "safetensors",
}  # fmt: skip
_WEIGHTS: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".distcp"}
)
_NOT_COPIED: Final = frozenset({"trainer_state.json"})


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes
    ----------
    run, step
        Which checkpoint it was.
    files
        In the order that they appeared: an index comes after what it names.
    nbytes
        Bytes of the files.
    tensors
        How many tensors are in them.
    left_out
        Names of values that the format does not hold, where leaving them out was asked for.
    tied
        safetensors: by the name of each tensor that is another one under a second name, the name it is written under.
    needs_pickle
        .pt: whether ``torch.load(weights_only=True)`` refuses the file, for something else than tensors in it.
    """

    run: str
    step: int
    files: tuple[Path, ...]
    nbytes: int
    tensors: int
    left_out: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    needs_pickle: bool = False


def export(
    url: str | os.PathLike[str] | Backend,
    target: str | os.PathLike[str],
    *,
    format: Format | None = None,  # noqa: A002 -- what a user would call it
    step: Which | None = None,
    run: str | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    keys: str | Sequence[str] | None = None,
    root: str | None = None,
    shard_bytes: int = 5_000_000_000,
    beside: str | os.PathLike[str] | None = None,
    leave_out: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    verify: bool = True,
    progress: OnProgress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a checkpoint to a file or folder that other programs read; it appears whole, or not at all.

    The bytes go through memory a part at a time, so the state may be larger than memory. Tensors are bit for bit those
    of the checkpoint, all on the CPU.

    Parameters
    ----------
    url, step, run, metric, mode
        Which checkpoint, as for `incckpt.load`.
    target
        The file, or for ``"huggingface"`` and ``"dcp"`` the folder.
    format
        ``"pt"``: as ``torch.save`` writes it. ``"safetensors"``: one file, or shards and an index named after it.
        ``"huggingface"``: a folder for ``from_pretrained``. ``"dcp"``: a folder for ``torch.distributed.checkpoint``.
        By default what the target's suffix says.
    keys
        Globs of dotted names, as ``"model.*"``: only what matches is exported.
    root
        Dotted name of the part to export, as ``"model"``. Names in the file are relative to it.
    shard_bytes
        The most that a safetensors file holds, unless one tensor is larger.
    beside
        For ``"huggingface"``: a folder whose other files (configuration, tokenizer) are copied along.
    leave_out
        Whether to leave out what the format does not hold: in safetensors, all that is no tensor.
    overwrite
        Whether to replace files that are there.
    allow_pickle
        Whether to unpickle what was pickled at save. Only for stores that you trust.
    threads, verify, storage_options
        As for `incckpt.load`.
    progress
        Called again and again, from any thread.

    Raises
    ------
    OptionError
        If an argument is not usable, or the target exists.
    StateError
        If the format does not hold something; names it.
    StoreNotFoundError, CheckpointNotFoundError, StateMismatchError, CorruptionError
        As for `incckpt.load`.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> from incckpt.interchange import export
    >>> folder = tempfile.mkdtemp()
    >>> _ = incckpt.save({"model": {"w": torch.arange(3.0)}, "epoch": 1}, f"{folder}/store")
    >>> export(f"{folder}/store", f"{folder}/all.pt").tensors
    1
    >>> torch.load(f"{folder}/all.pt")
    {'model': {'w': tensor([0., 1., 2.])}, 'epoch': 1}
    """
    path = Path(target)
    chosen = _format(path, format)
    if progress is not None:
        check_function("progress", progress)
    location = locate(url, run=run, step=checked_which(step))
    options = _Options(
        chosen, path, keys, root, shard_bytes, _folder(beside, chosen), leave_out, overwrite, allow_pickle
    )
    with ExitStack() as stack:
        store = stack.enter_context(Store.lent(url, location.store, storage_options))
        view = stack.enter_context(
            RunView(store, location.run, threads=chosen_threads(threads), verify=verify, metric=metric, mode=mode)
        )
        _, found = view.read(location.step, partial(_export, options, progress))
        if found is None:
            raise not_found(view.run)
        return found[2]


@dataclass(frozen=True)
class _Options:
    format: Format
    target: Path
    keys: str | Sequence[str] | None
    root: str | None
    shard_bytes: int
    beside: Path | None
    leave_out: bool
    overwrite: bool
    allow_pickle: bool


def _format(path: Path, given: Format | None) -> Format:
    if given is not None and given not in FORMATS:
        raise OptionError(f"format must be one of {', '.join(map(repr, FORMATS))}, not {given!r}")
    chosen = given or _BY_SUFFIX.get(path.suffix.lower())
    if chosen is None:
        raise OptionError(
            f"{path}: its name does not say in which format to export; give format=, one of {', '.join(FORMATS)}"
        )
    if chosen == "safetensors" and path.suffix != ".safetensors":
        raise OptionError(f"{path}: name the file ….safetensors, or give format='huggingface' for a folder")
    return chosen


def _folder(beside: str | os.PathLike[str] | None, chosen: Format) -> Path | None:
    if beside is None:
        return None
    if chosen != "huggingface":
        raise OptionError(f"beside= is for format='huggingface', not {chosen!r}")
    if not Path(beside).is_dir():
        raise OptionError(f"beside={os.fspath(beside)!r} is no folder")
    return Path(beside)


def _export(options: _Options, progress: OnProgress | None, reader: Reader, manifest: Manifest) -> Exported:
    contents = Contents.of(manifest, options.keys, fetch=partial(read_packed, reader, manifest))
    if options.root is not None:
        contents = replace(contents, tree=subtree(contents.tree, options.root))
    total = CheckpointBytes(reader, contents, lambda nbytes: None).nbytes
    source = CheckpointBytes(reader, contents, counter(progress, options.target.name, total))
    outputs = Outputs(overwrite=options.overwrite)
    try:
        done = _WRITERS[options.format](options, contents, source, outputs)
        return replace(done, files=outputs.files, nbytes=outputs.publish())
    finally:
        outputs.discard()


def _to_torch(options: _Options, contents: Contents, source: CheckpointBytes, outputs: Outputs) -> Exported:
    write_torch_file(options.target, contents, source, outputs, allow_pickle=options.allow_pickle)
    needs_pickle = not takes_weights_only(outputs.place(options.target))
    if needs_pickle:
        log.warning(
            "%s holds more than tensors and plain values: torch.load reads it only with weights_only=False",
            options.target,
        )
    tensors = len(references(contents.tree))
    return _exported(contents, tensors=tensors, needs_pickle=needs_pickle)


def _to_safetensors(options: _Options, contents: Contents, source: CheckpointBytes, outputs: Outputs) -> Exported:
    tensors, left_out = _tensors(options, contents)
    check_dtypes(tensors)
    tied = write_safetensors(options.target, tensors, source, outputs, shard_bytes=options.shard_bytes)
    return _exported(contents, tensors=len(tensors), left_out=left_out, tied=tied)


def _to_hugging_face(options: _Options, contents: Contents, source: CheckpointBytes, outputs: Outputs) -> Exported:
    names = () if options.beside is None else sorted(_files_beside(options.beside))
    if "config.json" not in names:
        log.warning("%s gets no config.json, which from_pretrained needs: name a folder with beside=", options.target)
    done = _to_safetensors(replace(options, target=options.target / "model.safetensors"), contents, source, outputs)
    for name in names:
        assert options.beside is not None
        outputs.copy(options.beside / name, options.target / name)
    return done


def _to_dcp(options: _Options, contents: Contents, source: CheckpointBytes, outputs: Outputs) -> Exported:
    from incckpt.interchange.distributed import write_dcp  # which takes half a second to import

    with outputs.whole_folder(options.target) as folder:
        write_dcp(folder, contents, source, allow_pickle=options.allow_pickle)
    return _exported(contents, tensors=len(references(contents.tree)))


def _tensors(options: _Options, contents: Contents) -> tuple[list[NamedTensor], tuple[str, ...]]:
    """Return the tensors by name, and the names of what is none.

    Raises
    ------
    StateError
        If there is something else, and leaving it out was not asked for; or no tensor.
    """
    tensors, others = named_tensors(contents.tree, contents.entries)
    if others and not options.leave_out:
        raise StateError(
            f"the format {options.format!r} holds tensors alone, and {_some(others)} no tensor; choose what to export "
            "with keys= or root=, or pass leave_out=True"
        )
    if not tensors:
        raise StateError("there is no tensor to export")
    if others:
        log.warning("left out, since the format %r holds tensors alone: %s", options.format, ", ".join(others[:20]))
    return tensors, tuple(others)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more + (" is" if len(names) == 1 else " are")


def _files_beside(folder: Path) -> Iterator[str]:
    """Yield the names of the files of a model's folder that are not its weights."""
    for path in folder.iterdir():
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in _NOT_COPIED and not path.name.startswith("."):
            yield path.name


def _exported(
    contents: Contents,
    *,
    tensors: int,
    left_out: tuple[str, ...] = (),
    tied: Mapping[str, str] | None = None,
    needs_pickle: bool = False,
) -> Exported:
    manifest = contents.manifest
    return Exported(manifest.run, manifest.step, (), 0, tensors, left_out, tied or {}, needs_pickle)


_WRITERS: Final[dict[Format, Callable[[_Options, Contents, CheckpointBytes, Outputs], Exported]]] = {
    "pt": _to_torch,
    "safetensors": _to_safetensors,
    "huggingface": _to_hugging_face,
    "dcp": _to_dcp,
}
