"""One process's part of a checkpoint that several processes save: what it copies, stores and tells the coordinator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from incckpt.errors import StoreReplacedError
from incckpt.run.parts import Parts, Place
from incckpt.run.pipeline import Pipeline
from incckpt.run.report import SaveReport
from incckpt.run.scrub import Scrubber
from incckpt.run.snapshot import Snapshot, stage
from incckpt.run.upload import Known, Uploader
from incckpt.staging.baseline import Baseline
from incckpt.staging.content import compute_digests
from incckpt.state.entries import TensorEntry
from incckpt.store.document import Json
from incckpt.store.encoded import EncodedChunks
from incckpt.store.manifest import Chunk, Manifest, Range
from incckpt.store.objects import chunk_sizes
from incckpt.store.refs import Ref, RefName, new_nonce
from incckpt.store.store import Store

__all__ = ["Brief", "Shard", "ShardWriter", "Source"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Brief:
    """What the coordinator tells every process once the pin is put.

    Attributes
    ----------
    save
        The number of the save, counted by every process for itself too: a plan that was cached brings an old one.
    store
        The store's id.
    run
        Name of the run.
    previous
        The number of the attempt's last save that was committed, and its ref.
    turn
        The number of the process, and how many there are.
    """

    save: int
    store: str
    run: str
    previous: tuple[int, RefName] | None = None
    turn: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Shard:
    """What a process has stored.

    Attributes
    ----------
    nodes
        The structure's node of each value that is not a part of a tensor, by key.
    tensors, ranges
        What they refer to, by number within the shard.
    packed
        The packed values that they refer to.
    parts
        The parts of tensors.
    chunks
        Where the bytes are.
    chunk_bytes
        The most that a chunk holds.
    tried
        Keys that the process has put or tried to put.
    put_objects, put_bytes
        What the save put.
    """

    nodes: Mapping[str, Json]
    tensors: Mapping[int, TensorEntry]
    ranges: Mapping[int, Range]
    packed: Sequence[Range]
    parts: Parts
    chunks: EncodedChunks
    chunk_bytes: int
    tried: Sequence[str] = ()
    put_objects: int = 0
    put_bytes: int = 0

    @classmethod
    def of(cls, snapshot: Snapshot, places: Mapping[str, Place], chunks: Sequence[Chunk], report: SaveReport) -> Shard:
        """Return what is to be told of a snapshot whose `chunks` are stored.

        Parameters
        ----------
        places
            Where the values belong that are parts of tensors, by key.

        Raises
        ------
        StateError
            If a part is not a plain tensor.
        """
        nodes = dict(snapshot.structure["dict"])
        entries, ranges = snapshot.entries, snapshot.layout.ranges
        parts = Parts.of(places, nodes, entries, ranges)
        others = set(range(len(entries))) - {nodes[key]["tensor"] for key in places}
        return cls(
            nodes={key: node for key, node in nodes.items() if key not in places},
            tensors={index: entries[index] for index in sorted(others)},
            ranges={
                entries[index].range: ranges[entries[index].range] for index in others if entries[index].range >= 0
            },
            packed=snapshot.packed_ranges,
            parts=parts,
            chunks=EncodedChunks.of(chunks, chunk_sizes(chunks)),
            chunk_bytes=snapshot.layout.chunk_bytes,
            put_objects=report.put_objects,
            put_bytes=report.put_bytes,
        )

    @classmethod
    def empty(cls) -> Shard:
        """Return what a process tells that has stored nothing."""
        chunks = EncodedChunks((), np.zeros(0, np.int64), {})
        return cls({}, {}, {}, (), Parts.of({}, {}, (), ()), chunks, 1 << 20)


@dataclass(frozen=True)
class Source:
    """Where the bytes of a tensor are in a checkpoint.

    Attributes
    ----------
    range
        The range that has them.
    start
        The first of them among the bytes of the range as they are stored.
    """

    range: Range
    start: int


class ShardWriter:
    """Stores a process's part of one checkpoint after the other.

    Nothing here is the coordinator's: neither the pin nor the ref. Each process looks for itself what may be reused,
    after the coordinator has put the pin, and puts the rest under keys with a nonce of its own.

    Parameters
    ----------
    store
        Opened by this process; closed with the writer.
    threads
        For comparing, copying, hashing and coding.
    chunk_bytes
        The most that a chunk holds.
    delta
        Whether changed chunks may be stored as deltas.
    pipeline
        Hashes, encodes and puts chunks; by default a new one with 256 MiB in flight.
    """

    def __init__(
        self, store: Store, *, threads: int, chunk_bytes: int, delta: bool = True, pipeline: Pipeline | None = None
    ) -> None:
        self.store = store
        self.base = Baseline(chunk_bytes, delta=delta, threads=threads)
        self._uploader = Uploader(store, threads=threads, baseline=self.base, pipeline=pipeline)
        self._scrubber = Scrubber(store.objects)
        self._last: tuple[int, frozenset[str]] = 0, frozenset()

    def stage(self, values: Mapping[str, Any], *, given: frozenset[int] = frozenset()) -> Snapshot:
        """Copy what changed of `values` since the last save; after this returns, they may change.

        Parameters
        ----------
        given
            Addresses of storages that are given away: they may be kept, not copied, and must never be written to.

        Raises
        ------
        StateError
            If one cannot be saved.
        """
        return stage(0, dict(values), {}, SaveReport(), base=self.base, allow_pickle=False, given=given)()

    def adopt(self, values: Mapping[str, Any], sources: Mapping[str, Source], manifest: Manifest) -> None:
        """Take tensors that were restored as what the next save is compared with, and its deltas are against.

        Nothing is relied on: whether a chunk is as the manifest says is found out by hashing it, and the save looks
        whether its object is there.

        Parameters
        ----------
        values
            The tensors, by key.
        sources
            Where the bytes of each are in the checkpoint; those without are copied all the same.
        manifest
            Of the checkpoint.
        """
        snapshot = self.stage(values)
        layout = snapshot.layout
        nodes, origin = dict(snapshot.structure["dict"]), dict[int, Source]()
        for key, source in sources.items():
            entry = snapshot.entries[nodes[key]["tensor"]]
            if entry.range >= 0 and not entry.packed and layout.ranges[entry.range].nbytes == entry.nbytes:
                origin[entry.range] = source
        table = layout.table
        numbers: list[set[int]] = [set() for _ in snapshot.contents]
        columns = (table.seg_chunk, table.seg_range, table.seg_range_offset, table.seg_nbytes)
        for chunk, index, offset, nbytes in zip(*(column.tolist() for column in columns), strict=True):
            if index in origin:
                start = origin[index].start + offset
                numbers[chunk].update(number for number, _, _ in origin[index].range.stored(start, start + nbytes))
            else:
                numbers[chunk].add(-1)
        chunks = [manifest.chunks[min(one)] if len(one) == 1 and min(one) >= 0 else None for one in numbers]
        alike = [
            (content, chunk)
            for content, chunk in zip(snapshot.contents, chunks, strict=True)
            if chunk is not None and chunk.nbytes == content.nbytes
        ]
        compute_digests([content for content, _ in alike])
        for content, chunk in alike:
            if content.identity == chunk.identity:
                content.stored = replace(chunk, itemsize=content.itemsize)
        self.base.settle_full(layout, snapshot.contents)

    def put(
        self, snapshot: Snapshot, brief: Brief, save: int, places: Mapping[str, Place] = MappingProxyType({})
    ) -> Shard:
        """Store what `stage` has made; return what the coordinator needs to know.

        Parameters
        ----------
        brief
            What the coordinator says; where plans are cached it may be of an earlier save.
        save
            The number of this save.
        places
            Where the values belong that are parts of tensors, by key.

        Raises
        ------
        StoreNotFoundError, StoreReplacedError
            If this process does not reach the coordinator's store.
        BackendError
            If the store failed; `tried` has what was put.
        """
        self._uploader.tried = []
        self._check_store(brief)
        known = self._look_around(brief if brief.save == save else None)
        report = SaveReport()
        chunks = self._uploader.store(snapshot, new_nonce(), known, report, turn=brief.turn)
        self.base.settle(snapshot.layout, snapshot.contents)
        shard = Shard.of(snapshot, places, chunks, report)
        sizes = shard.chunks.sizes
        same = {key: key for key in sizes}  # one string each, which is pickled once
        shard = replace(shard, tried=[same.get(key, key) for key in self._uploader.tried])
        self._scrubber.rely_on(sizes)
        self._last = save, frozenset(sizes)
        return shard

    def _check_store(self, brief: Brief) -> None:
        self.store.check()
        if self.store.id != brief.store:
            raise StoreReplacedError(
                f"{self.store.backend.url} is another store here than where the coordinator is; give a URL that leads "
                "every process to the same"
            )
        self.store.create()  # which finds out whether it creates exclusively, and that it is still the same

    def _look_around(self, brief: Brief | None) -> Known:
        """Return what may be reused. What is condemned is asked twice: the coordinator may have condemned it."""
        known_lost = self._scrubber.lost
        looks: list[Callable[[], frozenset[str]]]
        looks = [partial(self.store.condemned.keys, twice=True), partial(self._vouched, brief)]
        looks += [partial(self._scrub, key) for key in self._scrubber.due()]
        condemned, vouched, *_ = self._uploader.pipeline.together(lambda look: look(), looks)
        lost = self._scrubber.lost
        if lost - known_lost:
            log.warning(
                "%d objects are gone from %s, or not of the size that was put: the checkpoints that need them are "
                "damaged. Their content is stored again", len(lost - known_lost), self.store.backend.url,
            )  # fmt: skip
        return Known(condemned | lost, vouched - lost, sure=True)

    def _scrub(self, key: str) -> frozenset[str]:
        self._scrubber.look(key)
        return frozenset()

    def _vouched(self, brief: Brief | None) -> frozenset[str]:
        """Return the keys that this process relied on in the previous checkpoint, if its ref still lives."""
        save, keys = self._last
        if brief is None or brief.previous is None or brief.previous[0] != save:
            return frozenset()
        try:
            found = self.store.run(brief.run).read(brief.previous[1])
        except ValueError as error:
            log.error("the previous ref is unreadable; what it needs is looked up one by one: %s", error)
            return frozenset()
        return keys if isinstance(found, Ref) else frozenset()

    @property
    def tried(self) -> Sequence[str]:
        """Keys that the last save has put or tried to put."""
        return self._uploader.tried

    def rest(self) -> None:
        """Let go of threads and buffers until the next save."""
        self._uploader.close()

    def close(self) -> None:
        """Let go of connections, too."""
        self.rest()
        self.store.close()
