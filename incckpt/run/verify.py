"""Checking a run's checkpoints: that their objects are there, have the right sizes, and hold the right bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from incckpt.backends.base import Backend
from incckpt.errors import CorruptionError, FormatError
from incckpt.run.checkpoint import read_refs
from incckpt.run.contents import Contents
from incckpt.run.reader import ChunkRead, Reader
from incckpt.staging.detect import default_threads
from incckpt.store.location import DEFAULT_RUN, Location, parse_location
from incckpt.store.manifest import Chunk, Manifest
from incckpt.store.objects import DELTAS, OBJECTS, chunk_keys
from incckpt.store.refs import Ref
from incckpt.store.store import Store

__all__ = ["Level", "Verified", "verify"]

Level: TypeAlias = Literal["list", "sizes", "hashes"]


@dataclass(frozen=True)
class Verified:
    """What was found out about a checkpoint.

    Attributes
    ----------
    step
        Its step.
    problems
        What is wrong with it; empty if nothing is.
    keys
        Keys of the objects found good, those that were skipped included; give them as `skip` to go on after a break.
    """

    step: int
    problems: tuple[str, ...]
    keys: frozenset[str] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the checkpoint restores, as far as was looked."""
        return not self.problems


def verify(
    url: str | os.PathLike[str] | Backend,
    *,
    level: Level = "hashes",
    step: int | None = None,
    run: str | None = None,
    skip: Collection[str] = (),
    threads: int | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Verified]:
    """Check the checkpoints of a run, the latest first; yield what was found out about each as it is known.

    Parameters
    ----------
    url, run, step
        As for `load`; every checkpoint of the run where no step is given.
    level
        ``"list"``: every object that a checkpoint needs is there; ``"sizes"``: and of the right size (both by listing
        the store's objects once); ``"hashes"``: every object is read, decoded and hashed, each once.
    skip
        Keys of objects that need not be looked at again.
    progress
        Called with the raw bytes of what was checked, at level ``"hashes"``.

    Raises
    ------
    StoreNotFoundError
        If there is no store.
    """
    location = Location(url.url) if isinstance(url, Backend) else parse_location(os.fspath(url))
    wanted = location.step if step is None else step
    with ExitStack() as stack:
        if isinstance(url, Backend):
            store = Store(url)
        else:
            store = stack.enter_context(Store.open(location.store, storage_options))
        store.check()
        owner = store.run(run or location.run or DEFAULT_RUN)
        lineage = owner.lineage()
        reader = stack.enter_context(Reader(store, threads=threads or default_threads()))
        sizes = None if level == "hashes" else _listed(store)
        good = set(skip)
        for name in reversed(lineage.live):
            if wanted not in (None, "latest", name.step):
                continue
            try:
                refs = read_refs(owner, lineage, [name])
            except (CorruptionError, FormatError) as error:
                yield Verified(name.step, (str(error),), frozenset(good))
                continue
            for ref in refs:
                problems = _check(store, reader, ref, sizes, level, good, progress)
                yield Verified(ref.step, tuple(problems), frozenset(good))
            if wanted == "latest":
                return


def _listed(store: Store) -> dict[str, int]:
    return {entry.key: entry.size for space in (OBJECTS, DELTAS) for entry in store.backend.list(space)}


def _check(
    store: Store,
    reader: Reader,
    ref: Ref,
    sizes: Mapping[str, int] | None,
    level: Level,
    good: set[str],
    progress: Callable[[int], None],
) -> list[str]:
    """Return what is wrong with a checkpoint; add the keys of its good objects to `good`."""
    try:
        manifest = store.manifest(ref)
    except (CorruptionError, FormatError) as error:
        return [str(error)]
    problems: list[str] = []
    try:
        Contents.of(manifest)
    except (CorruptionError, FormatError) as error:
        problems.append(str(error))
    for chunk in _distinct(manifest):
        keys = [str(key) for key in chunk_keys(chunk)]
        if all(key in good for key in keys):
            continue
        if sizes is None:
            found = _read(reader, chunk, progress)
        else:
            stored = [chunk.size] if chunk.base is None else [chunk.size, chunk.base.size]
            found = [
                f"object {key} " + ("is missing" if key not in sizes else f"has {sizes[key]} bytes, not {size}")
                for key, size in zip(keys, stored, strict=True)
                if key not in sizes or (level == "sizes" and sizes[key] != size)
            ]
        problems += found
        if not found:
            good.update(keys)
    return problems


def _distinct(manifest: Manifest) -> list[Chunk]:
    return list({chunk_keys(chunk)[0]: chunk for chunk in manifest.chunks}.values())


def _read(reader: Reader, chunk: Chunk, progress: Callable[[int], None]) -> list[str]:
    try:
        reader.read([ChunkRead(chunk)], progress)
    except CorruptionError as error:
        return [str(error)]
    return []
