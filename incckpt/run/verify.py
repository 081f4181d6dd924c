"""Checking a run's checkpoints: that they parse, and that their objects are there and hold the right bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from incckpt.backends.base import Backend
from incckpt.errors import CheckpointNotFoundError, CorruptionError, FormatError, KeyNotFoundError, MemoryLimitError
from incckpt.options import check_choice, checked_flag, checked_strings
from incckpt.retention import Mode, check_ranking
from incckpt.run.checkpoint import read_refs
from incckpt.run.choose import Which, checked_which, choose, not_found, place
from incckpt.run.contents import Contents, names_by_chunk
from incckpt.run.progress import OnProgress, Progress, counter
from incckpt.run.reader import ChunkRead, Reader
from incckpt.run.restore import progress_bar
from incckpt.run.view import TRIES
from incckpt.staging.detect import chosen_threads
from incckpt.store.lineage import Lineage, Run
from incckpt.store.location import locate
from incckpt.store.manifest import Chunk, Manifest
from incckpt.store.objects import DELTAS, OBJECTS, chunk_keys
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store

__all__ = ["Checked", "Checker", "Level", "Verified", "VerifyResult", "verify"]

Level: TypeAlias = Literal["list", "sizes", "hashes"]

_Watch: TypeAlias = Callable[[Ref, int], AbstractContextManager[Callable[[int], None]]]
"""Called with a ref and the bytes to read for it; what it gives counts those that are read."""


@dataclass(frozen=True)
class Verified:
    """What a check found of one checkpoint.

    Attributes
    ----------
    step
        Its step.
    problems
        What is wrong with it; empty if nothing is.
    keys
        Keys of the objects found sound so far, those that were skipped included: what `verify` may `skip`.
    """

    step: int
    problems: tuple[str, ...]
    keys: frozenset[str] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the checkpoint restores, as far as `verify` looked."""
        return not self.problems


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found out; true if every checkpoint is sound, and printable.

    Attributes
    ----------
    url, run, level
        What was looked at, and how closely.
    checkpoints
        The results by checkpoint, the latest first; never empty.
    """

    url: str
    run: str
    level: Level
    checkpoints: tuple[Verified, ...]

    @property
    def ok(self) -> bool:
        """Whether every checkpoint restores, as far as `verify` looked."""
        return all(checkpoint.ok for checkpoint in self.checkpoints)

    @property
    def problems(self) -> dict[int, tuple[str, ...]]:
        """What is wrong, by step; only steps that have problems."""
        return {checkpoint.step: checkpoint.problems for checkpoint in self.checkpoints if checkpoint.problems}

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        total = len(self.checkpoints)
        sound = f"{total - len(self.problems)} of {total} checkpoint{'s' if total > 1 else ''} sound"
        lines = [f"run {self.run!r} at {self.url}: {sound} (level {self.level!r})"]
        lines += [f"step {step}: {problem}" for step, found in self.problems.items() for problem in found]
        return "\n".join(lines)


def verify(
    url: str | os.PathLike[str] | Backend,
    *,
    level: Level = "hashes",
    step: Which | None = None,
    run: str | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    skip: Collection[str] = (),
    report: Callable[[Verified], None] = lambda checkpoint: None,
    threads: int | None = None,
    max_bytes: int | None = None,
    progress: bool | OnProgress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> VerifyResult:
    """Check the checkpoints of a run, the latest first.

    Checkpoints that are pruned meanwhile are left out.

    Parameters
    ----------
    url, step, run, metric, mode, storage_options
        As for `load`; every checkpoint of the run where no step is given.
    level
        How closely to look. ``"list"``: the checkpoint parses, and every object that it needs is there; ``"sizes"``:
        and of the right size (both by listing the store's objects once); ``"hashes"``: every object is read, decoded
        and hashed, each once.
    skip
        Keys of objects that need not be looked at again: `Verified.keys` of an earlier call.
    report
        Called with the result of each checkpoint as soon as it is known.
    threads
        For decoding; by default all cores that this process may use.
    max_bytes
        Most memory that one object may take; by default as for `load`.
    progress
        Whether to show a progress bar for each checkpoint, at level ``"hashes"``; by default if a terminal watches. Or
        a function, which is called with a `Progress`: when a checkpoint's turn comes, and as its objects are read, from
        any thread.

    Returns
    -------
    VerifyResult
        True if all is well; printing it says what is not.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store, run or step; never for damage, which is in the result.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> _ = incckpt.save({"w": torch.zeros(3)}, store)
    >>> result = incckpt.verify(store)
    >>> bool(result), result.problems
    (True, {})
    """
    check_choice("level", level, get_args(Level))
    check_ranking(metric, mode)
    sound = set(checked_strings("skip", skip))
    location = locate(url, run=run, step=checked_which(step))
    with ExitStack() as stack:
        store = stack.enter_context(Store.lent(url, location.store, storage_options, max_bytes=max_bytes))
        store.check()
        owner = store.run(location.run)
        reader = stack.enter_context(Reader(store, threads=chosen_threads(threads)))
        for _ in range(TRIES):
            lineage = Lineage.empty() if isinstance(location.step, RefName) else owner.lineage()
            if location.step is None:
                names: Sequence[RefName] = lineage.live[::-1]
                if not names:
                    raise not_found(owner)
            else:
                names = [choose(owner, lineage, location.step, metric, mode)]
            checker = Checker(store, reader, level, set(sound), _watching(progress, names))
            found: list[Verified] = []
            for name in names:
                checked = checker.check(owner, lineage, name)
                if checked is not None:
                    found.append(Verified(name.step, checked.problems, frozenset(checker.good)))
                    report(found[-1])
            if found:
                return VerifyResult(store.backend.url, location.run, level, tuple(found))
    raise CheckpointNotFoundError(f"{place(owner)}: {TRIES} times its checkpoints were pruned before they were checked")


def _watching(progress: bool | OnProgress | None, names: Sequence[RefName]) -> _Watch:
    """Return what shows a bar for each checkpoint, or tells `progress` of it."""
    if not callable(progress):
        show = None if progress is None else checked_flag("progress", progress)
        return lambda ref, nbytes: progress_bar(nbytes, ref.step, show if nbytes else False)
    report, indices = progress, {name: index for index, name in enumerate(names)}

    def watch(ref: Ref, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        what, index, count = f"step {ref.step}", indices[ref.name], len(names)
        report(Progress(what, 0, nbytes, index, count))
        return nullcontext(counter(report, what, nbytes, index, count))

    return watch


@dataclass(frozen=True)
class Checked:
    """What was found out about one ref.

    Attributes
    ----------
    ref
        What it says; ``None`` if it cannot be read.
    problems
        What is wrong with its checkpoint.
    lost
        Whether the checkpoint cannot be restored by any version of incckpt, nor with any other torch or numpy.
    """

    ref: Ref | None
    problems: tuple[str, ...] = ()
    lost: bool = False


class Checker:
    """Checks checkpoints of a store, each object once.

    Parameters
    ----------
    watch
        Called with each ref and the bytes that are to be read for it; what it gives is told of those that were.

    Attributes
    ----------
    good
        Keys of objects found sound.
    """

    def __init__(
        self,
        store: Store,
        reader: Reader,
        level: Level,
        good: set[str],
        watch: _Watch = lambda ref, nbytes: nullcontext(lambda read: None),
    ) -> None:
        self.good = good
        self._store = store
        self._reader = reader
        self._level = level
        self._watch = watch
        self._sizes: dict[str, int] = {}
        if level != "hashes":
            self._sizes = {entry.key: entry.size for space in (OBJECTS, DELTAS) for entry in store.backend.list(space)}

    def check(self, run: Run, lineage: Lineage, name: RefName) -> Checked | None:
        """Return what is wrong with a checkpoint; ``None`` if it was pruned meanwhile."""
        try:
            refs = read_refs(run, lineage, [name])
        except (CorruptionError, FormatError, MemoryLimitError) as error:
            return Checked(None, (str(error),), lost=isinstance(error, CorruptionError))
        if not refs:
            return None
        checked = self._check(refs[0])
        return checked if not checked.problems or run.stands(name) else None

    def _check(self, ref: Ref) -> Checked:
        try:
            manifest = self._store.manifest(ref)
        except (CorruptionError, FormatError, MemoryLimitError) as error:
            return Checked(ref, (str(error),), lost=isinstance(error, CorruptionError))
        problems: list[str] = []
        lost = False
        names: list[list[str]] = [[] for _ in manifest.ranges]
        try:
            names = Contents.of(manifest).names()
        except (CorruptionError, FormatError, MemoryLimitError) as error:
            problems.append(f"the manifest of step {ref.step} cannot be restored: {error}")
            lost = isinstance(error, CorruptionError)
        damage = self._check_objects(ref, _reads(manifest, names))
        # A base that is damaged is found so by itself, and by each delta against it.
        return Checked(ref, (*problems, *dict.fromkeys(damage)), lost or bool(damage))

    def _check_objects(self, ref: Ref, reads: Sequence[ChunkRead]) -> list[str]:
        if self._level != "hashes":
            with self._watch(ref, 0):
                return [problem for read in reads for problem in self._check_listed(read)]
        left = [read for read in reads if not self.good.issuperset(map(str, chunk_keys(read.chunk)))]
        with self._watch(ref, sum(read.chunk.nbytes for read in left)) as count:
            return self._read(left, count)

    def _check_listed(self, read: ChunkRead) -> Iterable[str]:
        chunk = read.chunk
        for key, size in zip(
            map(str, chunk_keys(chunk)),
            [chunk.size] if chunk.base is None else [chunk.size, chunk.base.size],
            strict=True,
        ):
            if key in self.good:
                continue
            needed_by = f" (needed by tensor {', '.join(read.names[:3])})" if read.names else ""
            found = self._sizes.get(key)
            if found is None or (self._level == "sizes" and found != size):
                found = self._look_again(key)
            if found is None:
                yield f"object {key} is missing{needed_by}"
            elif self._level == "sizes" and found != size:
                yield f"object {key} has {found} bytes, not {size}{needed_by}"
            else:
                self.good.add(key)

    def _look_again(self, key: str) -> int | None:
        """Return the size of an object that the listing left out, or gave another; ``None`` if it is not there."""
        try:
            return self._store.backend.head(key).size
        except KeyNotFoundError:
            return None

    def _read(self, reads: Sequence[ChunkRead], count: Callable[[int], None]) -> list[str]:
        """Read and check chunks, all together; one by one only to find out what is wrong."""
        problems: list[str] = []
        try:
            self._reader.read(reads, count)
        except (CorruptionError, MemoryLimitError):
            for read in reads:
                try:
                    self._reader.read([read])
                except (CorruptionError, MemoryLimitError) as error:
                    problems.append(str(error))
                else:
                    self.good.update(map(str, chunk_keys(read.chunk)))
        else:
            self.good.update(str(key) for read in reads for key in chunk_keys(read.chunk))
        return problems


def _reads(manifest: Manifest, names: Sequence[Sequence[str]]) -> list[ChunkRead]:
    """Return how to read every object of a checkpoint: a delta's base on its own, too, since all of it is relied on."""
    reads: dict[str, ChunkRead] = {}
    for chunk, tensors in zip(manifest.chunks, names_by_chunk(manifest, names), strict=True):
        reads[str(chunk_keys(chunk)[0])] = ChunkRead(chunk, names=tensors)
        base = chunk.base
        if base is not None:
            whole = Chunk(base.identity, chunk.nbytes, chunk.itemsize, base.nonce, base.size)
            reads.setdefault(str(chunk_keys(whole)[0]), ChunkRead(whole, names=tensors))
    return list(reads.values())
