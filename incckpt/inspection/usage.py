"""Who needs which bytes of a store: by checkpoint, by run, by object."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from incckpt.backends.base import REMOTE_REQUESTS, Backend
from incckpt.errors import CorruptionError, FormatError, OptionError
from incckpt.options import check_function
from incckpt.retention import Mode
from incckpt.run.choose import Which, checked_which, choose, not_found
from incckpt.store.location import Location, locate
from incckpt.store.manifest import Manifest
from incckpt.store.objects import DELTAS, OBJECTS, chunk_keys, is_object
from incckpt.store.refs import Ref, RefName, list_refs
from incckpt.store.store import Store

__all__ = ["CheckpointUsage", "Kind", "RunUsage", "StoredObject", "Usage", "needs_of", "usage"]

Kind: TypeAlias = Literal["full", "delta", "manifest", "unneeded"]

_AT_ONCE = 4 * REMOTE_REQUESTS  # checkpoints whose manifests are in memory together


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of a store.

    Attributes
    ----------
    key
        Its name.
    kind
        A full object, a delta, a manifest; or an object that no checkpoint needs.
    nbytes
        Its size, as stored.
    raw_bytes
        Bytes of the chunk that it holds, as far as a checkpoint tells.
    checkpoints, runs
        How many need it.
    """

    key: str
    kind: Kind
    nbytes: int
    raw_bytes: int | None
    checkpoints: int
    runs: int


@dataclass(frozen=True, slots=True)
class CheckpointUsage:
    """What a checkpoint needs.

    Attributes
    ----------
    run, step, attempt
        Which it is.
    abandoned
        Whether it was abandoned by rewinding; it needs its objects as long as it stands.
    nbytes
        Bytes of the state.
    needed_bytes
        Stored bytes that it needs.
    own_bytes
        Those that no other checkpoint needs: what deleting it alone would free.
    """

    run: str
    step: int
    attempt: int
    abandoned: bool
    nbytes: int
    needed_bytes: int
    own_bytes: int


@dataclass(frozen=True, slots=True)
class RunUsage:
    """What the checkpoints of a run need together.

    Attributes
    ----------
    run, checkpoints
        Its name, and how many checkpoints it has, abandoned ones included.
    nbytes
        Bytes of their states.
    needed_bytes
        Stored bytes that they need.
    own_bytes
        Those that no other run needs.
    """

    run: str
    checkpoints: int
    nbytes: int
    needed_bytes: int
    own_bytes: int


@dataclass(frozen=True)
class Usage:
    """Who needs which bytes of a store.

    Attributes
    ----------
    url
        Of the store.
    runs, checkpoints
        Those that were asked for.
    objects
        Those that the checkpoints asked for need; every object where the whole store was asked for.
    store_objects, store_bytes
        How many objects the store holds, and their bytes.
    unneeded_objects, unneeded_bytes
        Those that no checkpoint needs: garbage, or of saves in flight.
    missing
        Keys of objects that are needed and not there.
    unreadable
        Why checkpoints could not be read; what they need counts as unneeded here.
    """

    url: str
    runs: tuple[RunUsage, ...]
    checkpoints: tuple[CheckpointUsage, ...]
    objects: tuple[StoredObject, ...] = field(repr=False)
    store_objects: int
    store_bytes: int
    unneeded_objects: int
    unneeded_bytes: int
    missing: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


@dataclass
class _Object:
    """What is known of an object that a checkpoint needs."""

    kind: Kind
    nbytes: int
    raw_bytes: int
    users: int = 0
    selected: bool = False


def usage(
    url: str | os.PathLike[str] | Backend,
    *,
    run: str | None = None,
    step: Which | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    progress: Callable[[int, int], None] = lambda done, total: None,
    storage_options: Mapping[str, Any] | None = None,
) -> Usage:
    """Find out who needs which bytes of a store. Every manifest of the store is read, and its objects are listed.

    Parameters
    ----------
    url, run, step, metric, mode, storage_options
        As for `load`; of the whole store where neither a run nor a step is named.
    progress
        Called with the number of checkpoints read, and of all.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store, run or step.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> for step in range(3):
    ...     _ = incckpt.save({"frozen": torch.randn(10_000), "step": step}, store)
    >>> found = incckpt.usage(store)
    >>> [checkpoint.step for checkpoint in found.checkpoints], found.unneeded_objects
    ([0, 1, 2], 0)
    """
    check_function("progress", progress)
    location = locate(url, run=run, step=checked_which(step))
    with Store.lent(url, location.store, storage_options) as store:
        store.check()
        selects = _selection(store, location, metric, mode)
        tally = _Tally()
        unreadable: list[str] = []
        for owner, ref, abandoned, needs in needs_of(store, unreadable.append, progress):
            tally.add(owner, ref, abandoned, needs, selects(owner, ref.name))
        listed = {
            entry.key: entry.size
            for space in (OBJECTS, DELTAS)
            for entry in store.backend.list(space)
            if is_object(entry.key)
        }
        if location.named and not any(found[0] == location.run for found in tally.checkpoints) and not unreadable:
            raise not_found(store.run(location.run))
        whole = not location.named and location.step is None
        return tally.result(store.backend.url, listed, tuple(unreadable), whole)


class _Tally:
    """Adds up what checkpoints need, one after the other: memory grows with objects, not with checkpoints."""

    def __init__(self) -> None:
        self._objects: dict[str, _Object] = {}
        self._sole: dict[str, int] = {}  # by key, the checkpoint that needs it first; only asked of those needed once
        self._runs: dict[str, set[str]] = {}
        self.checkpoints: list[tuple[str, Ref, bool, int, bool]] = []

    def add(self, run: str, ref: Ref, abandoned: bool, needs: Mapping[str, _Object], selected: bool) -> None:
        for key, found in needs.items():
            known = self._objects.setdefault(key, found)
            known.users += 1
            known.selected |= selected
            self._sole.setdefault(key, len(self.checkpoints))
        self._runs.setdefault(run, set()).update(needs)
        needed = sum(found.nbytes for found in needs.values())
        self.checkpoints.append((run, ref, abandoned, needed, selected))

    def result(self, url: str, listed: Mapping[str, int], unreadable: tuple[str, ...], whole: bool) -> Usage:
        own: Counter[int] = Counter()
        for key, found in self._objects.items():
            if found.users == 1:
                own[self._sole[key]] += found.nbytes
        run_users: Counter[str] = Counter(key for keys in self._runs.values() for key in keys)
        checkpoints = [
            CheckpointUsage(run, ref.step, ref.name.attempt, abandoned, ref.nbytes, needed, own[index])
            for index, (run, ref, abandoned, needed, selected) in enumerate(self.checkpoints)
            if selected
        ]
        counts: Counter[str] = Counter(run for run, *_ in self.checkpoints)
        states: Counter[str] = Counter()
        for run, ref, *_ in self.checkpoints:
            states[run] += ref.nbytes
        asked = {checkpoint.run for checkpoint in checkpoints}
        runs = [
            RunUsage(
                run=run,
                checkpoints=counts[run],
                nbytes=states[run],
                needed_bytes=sum(self._objects[key].nbytes for key in keys),
                own_bytes=sum(self._objects[key].nbytes for key in keys if run_users[key] == 1),
            )
            for run, keys in sorted(self._runs.items())
            if run in asked
        ]
        unneeded = {key: size for key, size in listed.items() if key not in self._objects}
        objects = [
            StoredObject(key, found.kind, found.nbytes, found.raw_bytes, found.users, run_users[key])
            for key, found in self._objects.items()
            if found.selected
        ]
        if whole:
            objects += [StoredObject(key, "unneeded", size, None, 0, 0) for key, size in unneeded.items()]
        return Usage(
            url=url,
            runs=tuple(runs),
            checkpoints=tuple(sorted(checkpoints, key=lambda item: (item.run, item.step, item.attempt))),
            objects=tuple(objects),
            store_objects=len(listed),
            store_bytes=sum(listed.values()),
            unneeded_objects=len(unneeded),
            unneeded_bytes=sum(unneeded.values()),
            missing=tuple(sorted(self._objects.keys() - listed.keys())),
            unreadable=unreadable,
        )


def needs_of(
    store: Store,
    on_unreadable: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, Ref, bool, dict[str, _Object]]]:
    """Yield ``(run, ref, abandoned, needs)`` of every checkpoint of a store, `needs` by key, its manifest included.

    Parameters
    ----------
    on_unreadable
        Called with the reason why one could not be read.
    progress
        Called with the number of checkpoints read, and of all.
    """
    names = [(run, name) for run, name, _, tombstone in list_refs(store.backend) if name is not None and not tombstone]
    left: dict[str, frozenset[RefName]] = {}
    for run in sorted({run for run, _ in names}):
        try:
            live = frozenset(store.run(run).lineage().live)
        except (CorruptionError, FormatError) as error:
            on_unreadable(str(error))
            live = frozenset(name for owner, name in names if owner == run)  # all stand, whatever they are
        left[run] = frozenset(name for owner, name in names if owner == run) - live

    def read(item: tuple[str, RefName]) -> tuple[Ref, dict[str, _Object]] | str | None:
        run, name = item
        try:
            ref = store.run(run).read(name)
            return (ref, _needs(ref, store.manifest(ref))) if isinstance(ref, Ref) else None
        except (CorruptionError, FormatError) as error:
            return f"run {run!r}: {error}"

    for start in range(0, len(names), _AT_ONCE):
        batch = names[start : start + _AT_ONCE]
        for (run, name), found in zip(batch, store.each(read, batch), strict=True):
            if isinstance(found, str):
                on_unreadable(found)
            elif found is not None:
                yield run, found[0], name in left[run], found[1]
        progress(start + len(batch), len(names))


def _needs(ref: Ref, manifest: Manifest) -> dict[str, _Object]:
    needs = {ref.manifest: _Object("manifest", ref.manifest_size, 0)}
    for chunk in manifest.chunks:
        own, *bases = map(str, chunk_keys(chunk))
        needs[own] = _Object("delta" if bases else "full", chunk.size, chunk.nbytes)
        for base in bases:
            assert chunk.base is not None
            needs.setdefault(base, _Object("full", chunk.base.size, chunk.nbytes))
    return needs


def _selection(store: Store, location: Location, metric: str | None, mode: Mode) -> Callable[[str, RefName], bool]:
    """Return what says whether a checkpoint was asked for."""
    if location.step is not None:
        if not isinstance(location.step, (int, str)):
            raise OptionError(f"not a step: {location.step!r}")
        run = store.run(location.run)
        name = choose(run, run.lineage(), location.step, metric, mode)
        return lambda owner, other: (owner, other) == (location.run, name)
    if location.named:
        return lambda owner, _: owner == location.run
    return lambda owner, _: True
