"""`import_files`: checkpoints of other programs into a run, the files of a series one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, SupportsIndex

from incckpt.errors import OptionError, StateError
from incckpt.interchange.folders import read_folder
from incckpt.interchange.foreign import Foreign
from incckpt.interchange.mapped import FileBaseline, Mappings, file_contents
from incckpt.interchange.safetensors_files import INDEX_SUFFIX, files_of_index, read_safetensors
from incckpt.interchange.series import Kind, Source, find_sources
from incckpt.interchange.torch_files import read_torch_file
from incckpt.options import check_function
from incckpt.run.attempt import Attempt, IfExists, Origin, check_if_exists, refuse_other_ranks
from incckpt.run.checkpoint import Checkpoint, checked_metrics
from incckpt.run.progress import OnProgress, counter
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot
from incckpt.staging.detect import chosen_threads
from incckpt.state.flatten import flatten
from incckpt.store.location import locate
from incckpt.store.refs import checked_step
from incckpt.store.store import Store

__all__ = ["Imported", "import_files"]


@dataclass(frozen=True)
class Imported:
    """A checkpoint that `import_files` made.

    Attributes
    ----------
    checkpoint, source
        What was made, and of which file or folder.
    left_out
        Names of files in the folder that were not read.
    """

    checkpoint: Checkpoint
    source: Path
    left_out: tuple[str, ...] = ()


def import_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    url: str | os.PathLike[str],
    *,
    run: str | None = None,
    step: SupportsIndex | None = None,
    metrics: Mapping[str, float] | None = None,
    if_exists: IfExists = "error",
    allow_pickle: bool = False,
    threads: int | None = None,
    progress: OnProgress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Imported]:
    """Save checkpoints of other programs to a run: one, or a series, each of which costs what is new in it.

    Files are read a part at a time, so they may be larger than memory, and are not changed.

    Parameters
    ----------
    paths
        A file of ``torch.save`` or Lightning, of safetensors or the index of its shards; a folder of the Hugging Face
        Trainer or of ``torch.distributed.checkpoint``; a folder of several of these; or a list.
    url, run
        Of the store, and the run. A fragment may name the step of a single file.
    step
        Of a single file. By default the number in its name (``checkpoint-500``, ``epoch=3-step=1200``); without one,
        the step after the run's last.
    metrics
        Of a single file.
    if_exists
        What to do if the run has a checkpoint of a step, as for `incckpt.save`. With ``"skip"`` an import that was
        broken off goes on where it stopped.
    allow_pickle
        Whether to unpickle what is more than tensors, arrays and plain values, and to pickle what cannot be represented
        otherwise. To unpickle a file can run any code.
    threads
        For hashing and coding; by default all cores that this process may use.
    progress
        Called again and again, from any thread.
    storage_options
        For fsspec.

    Returns
    -------
    list[Imported]
        By step.

    Raises
    ------
    OptionError
        If an argument is not usable, or a file is of no known kind.
    PickleRefusedError
        If a file needs `allow_pickle`.
    CorruptionError
        If a file is damaged.
    StateError
        If a file holds what cannot be saved; names its path.
    MissingExtraError
        If a package is missing that reads it.
    SupersededError, BackendError
        As for `incckpt.save`.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> from incckpt.interchange import import_files
    >>> folder = tempfile.mkdtemp()
    >>> for step in (5, 10):
    ...     torch.save({"w": torch.full((2,), float(step))}, f"{folder}/checkpoint-{step}.pt")
    >>> [one.checkpoint.step for one in import_files(folder, f"{folder}/store")]
    [5, 10]
    >>> incckpt.load(f"{folder}/store#@5")
    {'w': tensor([5., 5.])}
    """
    sources = find_sources(paths)
    location = locate(url, run=run, step=None if step is None else checked_step(step))
    if location.step is not None and not isinstance(location.step, int):
        raise OptionError(f"an import needs a number after '@' in the URL, not {str(location.step)!r}")
    if len(sources) > 1 and (location.step is not None or metrics is not None):
        raise OptionError(f"step and metrics are for a single file, and {len(sources)} are to be imported")
    check_if_exists(if_exists)
    if progress is not None:
        check_function("progress", progress)
    if not location.named:
        refuse_other_ranks()
    numbers = None if metrics is None else checked_metrics(metrics)
    steps = [source.step for source in sources] if location.step is None else [location.step]
    threads = chosen_threads(threads)
    with Store.open(location.store, storage_options) as store:
        origin = Origin.latest(store.run(location.run).lineage())
        attempt = Attempt(store, location.run, origin, threads=threads, baseline=(baseline := FileBaseline()))
        importer = _Importer(attempt, baseline, if_exists, allow_pickle, progress, len(sources))
        try:
            return [importer.save(source, wanted, numbers) for source, wanted in zip(sources, steps, strict=True)]
        finally:
            attempt.close()


class _Importer:
    """Saves the files of a series, one after the other."""

    def __init__(
        self,
        attempt: Attempt,
        baseline: FileBaseline,
        if_exists: IfExists,
        allow_pickle: bool,
        progress: OnProgress | None,
        count: int,
    ) -> None:
        self._attempt = attempt
        self._baseline = baseline
        self._if_exists = if_exists
        self._allow_pickle = allow_pickle
        self._progress = progress
        self._count = count
        self._index = 0

    def save(self, source: Source, step: int | None, metrics: Mapping[str, float] | None) -> Imported:
        """Save a file as a checkpoint of `step`, or of the one after the run's last."""
        attempt, index = self._attempt, self._index
        self._index += 1
        if step is not None:
            if self._if_exists == "skip" and (existing := attempt.existing(step)) is not None:
                return Imported(Checkpoint.of(attempt.run, existing), source.path)
            attempt.check_step(step, self._if_exists)
        foreign = _READERS[source.kind](source.path, self._allow_pickle)
        try:
            flat = flatten(foreign.state, allow_pickle=self._allow_pickle)
        except StateError as error:
            raise type(error)(f"{source.path}: {error}") from error
        if step is None:
            attempt.start()
            step = 0 if attempt.last_step is None else attempt.last_step + 1
        report = SaveReport(step=step)
        layout = self._baseline.layout_for(flat.sizes, flat.kinds, flat.tensors)
        total = sum(nbytes for nbytes, _ in flat.sizes)
        count = counter(self._progress, source.path.name, total, index, self._count)
        contents = file_contents(flat, layout, foreign.mappings or Mappings(foreign.files), count)
        packed = self._baseline.stage_packed(flat, report)
        numbers = foreign.metrics if metrics is None else metrics
        snapshot = Snapshot.of(
            step, numbers, time.time(), flat.structure, flat.tensors, layout, contents, packed=packed
        )
        ref = attempt.write(snapshot, report, self._if_exists)
        return Imported(Checkpoint.of(attempt.run, ref), source.path, foreign.left_out)


def _read_torch(path: Path, allow_pickle: bool) -> Foreign:
    return Foreign(read_torch_file(path, allow_pickle=allow_pickle), (path,))


def _read_safetensors(path: Path, allow_pickle: bool) -> Foreign:
    files = files_of_index(path) if path.name.endswith(INDEX_SUFFIX) else [path]
    return Foreign(read_safetensors(path), tuple(files))


def _read_folder(path: Path, allow_pickle: bool) -> Foreign:
    return read_folder(path, allow_pickle=allow_pickle)


def _read_dcp(path: Path, allow_pickle: bool) -> Foreign:
    from incckpt.interchange.distributed import read_dcp  # which takes half a second to import

    return read_dcp(path, allow_pickle=allow_pickle)


_READERS: Final[dict[Kind, Callable[[Path, bool], Foreign]]] = {
    "torch": _read_torch,
    "safetensors": _read_safetensors,
    "folder": _read_folder,
    "dcp": _read_dcp,
}
