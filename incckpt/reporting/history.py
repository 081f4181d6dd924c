"""The history of a run, from its refs and manifests: each manifest read once, in order, a few ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from incckpt.backends.base import REMOTE_REQUESTS
from incckpt.errors import CorruptionError, FormatError
from incckpt.reporting.components import Component, components_of
from incckpt.reporting.heatmap import HeatMap, HeatMapBuilder
from incckpt.reporting.tensors import TensorTable, object_sizes
from incckpt.run.checkpoint import Checkpoint, read_refs_at_once
from incckpt.run.choose import not_found
from incckpt.store.lineage import Lineage, Run
from incckpt.store.manifest import Manifest
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store

__all__ = ["Branch", "Column", "History", "read_history"]

_AHEAD_BYTES = 8 << 20  # stored bytes of the manifests that are read ahead; parsed, they take some fifty times as much

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Column:
    """A checkpoint of the lineage.

    Attributes
    ----------
    checkpoint
        What its ref says.
    new_bytes
        Stored bytes of the objects that it needs and no earlier checkpoint of the lineage does, and of its manifest;
        ``None`` if its manifest could not be read.
    blocked
        Seconds that its caller waited, by phase, where the save recorded it.
    since
        The step that the relative changes compare with, where it has any.
    """

    checkpoint: Checkpoint
    new_bytes: int | None = None
    blocked: Mapping[str, float] | None = None
    since: int | None = None


@dataclass(frozen=True)
class Branch:
    """The abandoned checkpoints of an attempt, by step.

    Attributes
    ----------
    parent
        The step of the checkpoint that the first of them continued, if there is one.
    """

    attempt: int
    parent: int | None
    checkpoints: Sequence[Checkpoint]


@dataclass
class History:
    """What is known of a run.

    Attributes
    ----------
    url, run
        Which; the URL without what may be secret.
    columns
        The checkpoints of the lineage, by step.
    branches
        What was abandoned.
    heat_map
        Which tensors changed, and how far.
    components
        What the last checkpoint consists of, the largest first.
    problems
        What could not be read, for people.
    """

    url: str
    run: str
    columns: list[Column] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    heat_map: HeatMap = field(default_factory=HeatMap)
    components: list[Component] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_history(store: Store, name: str, progress: Progress | None = None) -> History:
    """Read the history of a run.

    Checkpoints that are pruned meanwhile are left out; those that are damaged are kept, and `problems` name them.

    Parameters
    ----------
    progress
        Called with how many of how many manifests are read.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no store, or no process has ever written the run.
    """
    store.check()
    run = store.run(name)
    lineage = run.lineage()
    if lineage.attempt == 0:
        raise not_found(run)
    history = History(store.backend.url, name)
    refs = _refs(store, run, lineage, lineage.live, history.problems)
    history.branches = _branches(store, run, lineage, history.problems)
    heat = HeatMapBuilder(len(refs))
    seen: set[int] = set()
    last: Manifest | None = None
    for done, (ref, read) in enumerate(_in_order(store, refs), 1):
        checkpoint = Checkpoint.of(name, ref)
        if isinstance(read, _Read):
            last = read.manifest
            new = {key: size for key, size in read.objects.items() if key not in seen}
            seen.update(new)
            heat.add(read.table)
            stored = sum(new.values()) + ref.manifest_size
            history.columns.append(Column(checkpoint, stored, last.blocked, last.norms_since))
        elif run.stands(ref.name):
            history.problems.append(str(read))
            heat.add(None)
            history.columns.append(Column(checkpoint))
        if progress is not None:
            progress(done, len(refs))
    history.heat_map = heat.finish()
    history.components = [] if last is None else components_of(last)
    return history


@dataclass(frozen=True)
class _Read:
    """A manifest, and what of it outlives it."""

    manifest: Manifest
    table: TensorTable
    objects: Mapping[int, int]

    @classmethod
    def of(cls, store: Store, ref: Ref) -> _Read:
        manifest = store.manifest(ref)
        return cls(manifest, TensorTable.of(manifest), object_sizes(manifest))


def _in_order(store: Store, refs: Sequence[Ref]) -> Iterator[tuple[Ref, _Read | Exception]]:
    """Yield each ref with its manifest, or with the error that reading it met; a few are read ahead."""
    requests = REMOTE_REQUESTS if store.backend.remote else 2
    ahead: deque[tuple[Ref, Future[_Read]]] = deque()
    nbytes = 0
    with ThreadPoolExecutor(requests, "incckpt-report") as pool:
        for ref in refs:
            while ahead and (len(ahead) >= 2 * requests or nbytes + ref.manifest_size > _AHEAD_BYTES):
                nbytes -= ahead[0][0].manifest_size
                yield _outcome(*ahead.popleft())
            ahead.append((ref, pool.submit(_Read.of, store, ref)))
            nbytes += ref.manifest_size
        while ahead:
            yield _outcome(*ahead.popleft())


def _outcome(ref: Ref, future: Future[_Read]) -> tuple[Ref, _Read | Exception]:
    try:
        return ref, future.result()
    except (CorruptionError, FormatError) as error:
        return ref, error


def _refs(store: Store, run: Run, lineage: Lineage, names: Sequence[RefName], problems: list[str]) -> list[Ref]:
    """Return the contents of refs, without those that were pruned meanwhile; unreadable ones become `problems`."""

    def note(name: RefName, error: Exception) -> None:
        problems.append(f"step {name.step}: {error}")

    return read_refs_at_once(store, run, lineage, names, note)


def _branches(store: Store, run: Run, lineage: Lineage, problems: list[str]) -> list[Branch]:
    """Return what was abandoned, by attempt."""
    by_attempt: dict[int, list[Ref]] = {}
    for ref in _refs(store, run, lineage, lineage.abandoned, problems):
        by_attempt.setdefault(ref.name.attempt, []).append(ref)

    def branch(refs: list[Ref]) -> Branch:
        before = run.ancestry(lineage, refs[0].name)[:-1]
        parent = before[-1].step if before else None
        return Branch(refs[0].name.attempt, parent, [Checkpoint.of(run.name, ref, abandoned=True) for ref in refs])

    return store.each(branch, list(by_attempt.values()))
