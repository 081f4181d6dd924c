"""What changed from one checkpoint to another: by tensor, with norms and bytes, and the plain values.

Chunks with one identity hold the same bytes, so only tensors that differ are read, a part at a time: memory does not
grow with the state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from incckpt.backends.base import Backend
from incckpt.inspection.tally import Layout, Measure, NumberTally
from incckpt.options import check_function
from incckpt.retention import Mode
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.choose import not_found
from incckpt.run.contents import Contents
from incckpt.run.reader import Bytes, ChunkRead, Reader, reads_for
from incckpt.run.view import RunView
from incckpt.staging.detect import chosen_threads
from incckpt.staging.hostmem import new_buffer
from incckpt.state.build import build
from incckpt.state.entries import TensorEntry
from incckpt.state.names import join_name
from incckpt.state.tree import (
    MappingNode,
    PackedRef,
    Pickled,
    Plain,
    SequenceNode,
    SubclassRef,
    TensorRef,
    Tree,
    children,
)
from incckpt.store.location import locate
from incckpt.store.manifest import Chunk, Manifest, Range
from incckpt.store.refs import RefName
from incckpt.store.store import Store

__all__ = ["Difference", "TensorDifference", "ValueDifference", "diff"]

Change: TypeAlias = Literal["added", "removed", "changed", "reshaped"]

_BATCH = 128 << 20  # raw bytes of chunks in memory together
_SHOWN = 60  # characters of a plain value


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How a tensor or array differs.

    Attributes
    ----------
    name
        Dotted path in the state.
    change
        ``"added"``, ``"removed"``, ``"changed"``, or ``"reshaped"``: another shape or dtype.
    dtype, shape
        After the change; before it, if it was removed.
    nbytes
        Bytes of its elements.
    changed_bytes
        Bytes of the elements that differ; all of them but for ``"changed"``.
    measure
        Norms, if it has changed and its elements are numbers.
    """

    name: str
    change: Change
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    changed_bytes: int
    measure: Measure | None = None


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """How a plain value, or the kind of a container, differs.

    Attributes
    ----------
    name
        Dotted path in the state.
    before, after
        What it was and is, as short text; ``None`` if it was or is not there.
    """

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Difference:
    """What changed from one checkpoint to another; false if nothing did.

    Attributes
    ----------
    before, after
        Which checkpoints.
    tensors
        Those that differ, in the order of the state.
    values
        Plain values that differ.
    same_tensors, same_bytes
        How many tensors are the same, and the bytes of their elements.
    new_bytes
        Stored bytes of the objects that `after` needs and `before` does not, deltas as they are.
    """

    before: Checkpoint
    after: Checkpoint
    tensors: tuple[TensorDifference, ...]
    values: tuple[ValueDifference, ...]
    same_tensors: int
    same_bytes: int
    new_bytes: int

    def __bool__(self) -> bool:
        return bool(self.tensors or self.values)


def diff(
    before: str | os.PathLike[str] | Backend,
    after: str | os.PathLike[str] | Backend,
    *,
    metric: str | None = None,
    mode: Mode = "min",
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    storage_options: Mapping[str, Any] | None = None,
    after_options: Mapping[str, Any] | None = None,
) -> Difference:
    """Compare two checkpoints, of one run or of different stores.

    Parameters
    ----------
    before, after
        URLs, as for `load`.
    metric, mode
        What ``@best`` goes by, see `load`.
    threads
        For decoding; by default all cores that this process may use.
    progress
        Called with raw bytes compared, and of all that are to be.
    storage_options, after_options
        For fsspec; the second for `after`, in place of the first.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store, run or step.
    CorruptionError
        If a checkpoint is damaged where they differ.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> for step in range(2):
    ...     _ = incckpt.save({"w": torch.tensor([3.0, 4.0 + step]), "b": torch.zeros(2), "step": step}, store)
    >>> found = incckpt.diff(f"{store}#@0", f"{store}#@1")
    >>> [(one.name, one.change, one.changed_bytes, one.measure.relative) for one in found.tensors]
    [('w', 'changed', 4, 0.2)]
    >>> found.values
    (ValueDifference(name='step', before='0', after='1'),)
    """
    check_function("progress", progress)
    start, end = locate(before), locate(after)
    count = chosen_threads(threads)
    with (
        Store.lent(before, start.store, storage_options) as one,
        Store.lent(after, end.store, after_options or storage_options) as other,
        RunView(one, start.run, threads=count, metric=metric, mode=mode) as first,
        RunView(other, end.run, threads=count, metric=metric, mode=mode) as second,
    ):

        def compare_with(reader: Reader, manifest: Manifest) -> Difference:
            def compare(other_reader: Reader, other_manifest: Manifest) -> Difference:
                return _Comparison(_Side(manifest, reader), _Side(other_manifest, other_reader), progress).result()

            _, found = second.read(end.step, compare)
            if found is None:
                raise not_found(second.run)
            return found[2]

        _, found = first.read(start.step, compare_with)
        if found is None:
            raise not_found(first.run)
        return found[2]


class _Side:
    """One of the two checkpoints."""

    def __init__(self, manifest: Manifest, reader: Reader) -> None:
        self.manifest = manifest
        self.reader = reader
        self.contents = Contents.of(manifest)
        seen: defaultdict[str, int] = defaultdict(int)
        self.entries: dict[tuple[str, int], TensorEntry] = {}  # names need not be unique
        for entry in self.contents.entries:
            self.entries[entry.name, seen[entry.name]] = entry
            seen[entry.name] += 1

    @property
    def checkpoint(self) -> Checkpoint:
        """What the manifest says of it."""
        found = self.manifest
        name = RefName(found.attempt, found.step, found.nonce)
        return Checkpoint(found.run, found.step, found.attempt, found.time, found.metrics, found.nbytes, 0, str(name))

    def pieces(self, entry: TensorEntry) -> list[tuple[Chunk, int, int]]:
        """Return where the bytes are that an entry spans: ``(chunk, offset, bytes)``, end to end."""
        if entry.range < 0:
            return []
        span = Layout.of(entry)
        found = self.manifest.ranges[entry.range].part(span.start, span.stop)
        return [(self.manifest.chunks[index], offset, nbytes) for index, offset, nbytes in found]

    def place(self, ref: PackedRef) -> list[tuple[str, int, int]]:
        """Return where a packed value lies: ``(identity of the chunk, offset, bytes)``; at one place is one content."""
        pieces = self.manifest.packed[ref.index].pieces
        return [(self.manifest.chunks[index].identity, offset, nbytes) for index, offset, nbytes in pieces]

    def shown(self, value: _Value | None, name: str) -> tuple[str, str] | None:
        """Return a value as text, and a digest of what the text leaves out; a packed one is read and hashed."""
        match value:
            case Plain(plain):
                return repr(plain), ""
            case Pickled(data, kind):
                digest = hashlib.sha256(data).hexdigest()
                return f"a pickled {kind} of {len(data)} bytes ({digest[:8]})", digest
            case PackedRef():
                digest = self._digest(self.manifest.packed[value.index], name)
                nbytes = self.manifest.packed[value.index].nbytes
                return f"a packed {value.kind} of {nbytes} bytes ({digest[:8]})", digest
            case str():
                return value, ""
        return None

    def _digest(self, item: Range, name: str) -> str:
        """Return the digest of a packed value, a piece of which is in memory at a time."""
        digest = hashlib.sha256()
        for index, offset, nbytes in item.pieces:
            piece = new_buffer(nbytes)
            self.reader.read([ChunkRead(self.manifest.chunks[index], pieces=[(offset, piece)], names=[name])])
            digest.update(piece.data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of a tensor that lies in one chunk before, and in one after."""

    tensor: int
    before: Chunk
    before_at: int
    after: Chunk
    after_at: int
    nbytes: int


class _Comparison:
    """Compares two checkpoints."""

    def __init__(self, before: _Side, after: _Side, progress: Callable[[int, int], None]) -> None:
        self._before = before
        self._after = after
        self._progress = progress

    def result(self) -> Difference:
        """Return what is different."""
        before, after = self._before, self._after
        found: dict[tuple[str, int], TensorDifference] = {}
        changed: list[tuple[tuple[str, int], TensorEntry, TensorEntry]] = []
        same: list[TensorEntry] = []
        for key, entry in after.entries.items():
            old = before.entries.get(key)
            if old is None:
                found[key] = _whole(entry, "added")
            elif (old.kind, old.dtype, old.shape) != (entry.kind, entry.dtype, entry.shape):
                found[key] = _whole(entry, "reshaped")
            elif self._is_same(old, entry):
                same.append(entry)
            else:
                changed.append((key, old, entry))
        for (key, _, entry), difference in zip(changed, self._measured(changed), strict=True):
            if difference is None:
                same.append(entry)
            else:
                found[key] = difference
        for key, old in before.entries.items():
            if key not in after.entries:
                found[key] = _whole(old, "removed")
        order = {key: index for index, key in enumerate((*after.entries, *before.entries))}
        return Difference(
            before=before.checkpoint,
            after=after.checkpoint,
            tensors=tuple(found[key] for key in sorted(found, key=order.__getitem__)),
            values=tuple(self._values()),
            same_tensors=len(same),
            same_bytes=sum(entry.nbytes for entry in same),
            new_bytes=_new_bytes(before.manifest, after.manifest),
        )

    def _is_same(self, old: TensorEntry, new: TensorEntry) -> bool:
        """Whether two entries surely hold the same, as the identities of their chunks show."""
        if Layout.of(old) != Layout.of(new):
            return not new.nbytes
        windows = self._windows(0, old, new)
        return all(
            window.before.identity == window.after.identity and window.before_at == window.after_at
            for window in windows
        )

    def _windows(self, tensor: int, old: TensorEntry, new: TensorEntry) -> Iterator[_Window]:
        """Cut two tensors of one layout at the ends of the chunks of both."""
        before, after = iter(self._before.pieces(old)), iter(self._after.pieces(new))
        left, right = next(before, None), next(after, None)
        while left is not None and right is not None:
            nbytes = min(left[2], right[2])
            yield _Window(tensor, left[0], left[1], right[0], right[1], nbytes)
            left = next(before, None) if nbytes == left[2] else (left[0], left[1] + nbytes, left[2] - nbytes)
            right = next(after, None) if nbytes == right[2] else (right[0], right[1] + nbytes, right[2] - nbytes)

    def _measured(
        self, changed: Sequence[tuple[tuple[str, int], TensorEntry, TensorEntry]]
    ) -> Iterator[TensorDifference | None]:
        """Yield how tensors differ; ``None`` for one that does not, its bytes being cut or laid out otherwise."""
        total = sum(entry.nbytes for _, _, entry in changed)
        done = 0
        tallies = [NumberTally(entry) for _, _, entry in changed]
        streamed = [Layout.of(old) == Layout.of(new) and Layout.of(new).dense for _, old, new in changed]
        windows = (
            window
            for index, (_, old, new) in enumerate(changed)
            if streamed[index]
            for window in self._windows(index, old, new)
        )
        for batch, chunks in self._batches(windows):
            for window in batch:
                left = chunks[window.before.identity][window.before_at :][: window.nbytes]
                right = chunks[window.after.identity][window.after_at :][: window.nbytes]
                tallies[window.tensor].add(left, right)
                done += window.nbytes
                self._progress(done, total)
        for index, (_, old, new) in enumerate(changed):
            if not streamed[index]:  # other strides: the elements have to be put side by side
                tallies[index].add_tensors(self._tensor(self._before, old), self._tensor(self._after, new))
                done += new.nbytes
                self._progress(done, total)
            tally, entry = tallies[index], new
            if not tally.changed:
                yield None
                continue
            changed_bytes = tally.changed * entry.itemsize
            yield TensorDifference(
                entry.name, "changed", entry.dtype, entry.shape, entry.nbytes, changed_bytes, tally.measure()
            )

    def _batches(self, windows: Iterable[_Window]) -> Iterator[tuple[list[_Window], dict[str, Bytes]]]:
        """Yield windows with the raw bytes of the chunks that they need, as many at once as memory is for."""
        kept: dict[str, Bytes] = {}
        batch: list[_Window] = []
        needed: dict[str, tuple[_Side, Chunk]] = {}
        for window in windows:
            new = {window.before.identity: (self._before, window.before)}
            new.setdefault(window.after.identity, (self._after, window.after))
            if batch and sum(chunk.nbytes for _, chunk in (needed | new).values()) > _BATCH:
                kept = self._read(needed, kept)
                yield batch, kept
                batch, needed = [], {}
            batch.append(window)
            needed = new | needed
        if batch:
            yield batch, self._read(needed, kept)

    @staticmethod
    def _read(needed: Mapping[str, tuple[_Side, Chunk]], kept: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """Return the raw bytes of chunks, some of which are here already."""
        chunks = {identity: kept[identity] for identity in needed if identity in kept}
        reads: defaultdict[Reader, list[ChunkRead]] = defaultdict(list)
        for identity, (side, chunk) in needed.items():
            if identity not in chunks:
                chunks[identity] = new_buffer(chunk.nbytes)
                reads[side.reader].append(ChunkRead(chunk, out=chunks[identity]))
        for reader, items in reads.items():
            reader.read(items)
        return chunks

    def _tensor(self, side: _Side, entry: TensorEntry) -> Any:
        """Return a tensor or array as a restore gives it."""
        index = side.contents.entries.index(entry)
        ranges = side.manifest.ranges
        buffers: list[Bytes | None] = [None] * len(ranges)
        buffers[entry.range] = new_buffer(ranges[entry.range].nbytes)
        side.reader.read(reads_for(side.manifest, ranges, buffers, side.contents.names()).values())
        return build(TensorRef(index), side.contents.entries, buffers)

    def _values(self) -> Iterator[ValueDifference]:
        before, after = dict(_values(self._before.contents.tree)), dict(_values(self._after.contents.tree))
        for name in dict.fromkeys((*after, *before)):
            old, new = before.get(name), after.get(name)
            if (
                isinstance(old, PackedRef)
                and isinstance(new, PackedRef)
                and self._before.place(old) == self._after.place(new)
            ):
                continue  # neither needs to be read
            was, now = self._before.shown(old, name), self._after.shown(new, name)
            if was != now:
                yield ValueDifference(name, _short(was and was[0]), _short(now and now[0]))


_Value: TypeAlias = Plain | Pickled | PackedRef | str


def _values(tree: Tree, name: str = "") -> Iterator[tuple[str, _Value]]:
    """Yield the name of each plain value and what it is, and of each container that is no dict or list its kind."""
    match tree:
        case Plain() | Pickled() | PackedRef():
            yield name, tree
        case SubclassRef(cls, inner=inner, context=context):
            yield name, f"a {cls} with {json.dumps(context)}"
            for attribute, part in inner:
                yield from _values(part, join_name(name, attribute))
        case MappingNode(kind) | SequenceNode(kind):
            if kind not in ("dict", "list"):
                yield name, kind
            elif not tree.items:
                yield name, f"an empty {kind}"
            for key, child in children(tree):
                yield from _values(child, join_name(name, key))


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _whole(entry: TensorEntry, change: Change) -> TensorDifference:
    return TensorDifference(entry.name, change, entry.dtype, entry.shape, entry.nbytes, entry.nbytes)


def _new_bytes(before: Manifest, after: Manifest) -> int:
    """Return the stored bytes of the contents that `after` has and `before` does not."""
    known = {chunk.identity for chunk in before.chunks}
    return sum({chunk.identity: chunk.size for chunk in after.chunks if chunk.identity not in known}.values())
