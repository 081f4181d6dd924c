"""What happens in the caller's thread of a save: find the chunks that changed, copy them into host buffers, return.

The *base* is the content of each chunk's last full object, kept in host memory. Contents are immutable: a buffer is
never written while anything refers to it, so saves that wait behind one another cannot see each other's data.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from incckpt.staging import detect
from incckpt.staging.content import Bytes, Content
from incckpt.staging.device import DeviceCopies
from incckpt.staging.hostmem import HostPool
from incckpt.staging.layout import Addresses, ChunkTable, Layout, check_chunk_bytes
from incckpt.staging.threshold import RangeThresholds, Thresholds
from incckpt.state.flatten import ByteRange, FlatState

__all__ = ["Base", "StageReport", "contents_of"]

log = logging.getLogger(__name__)

_DEVICE_BATCH = 256 << 20  # bytes copied from a device at once, before they are compared


@dataclass
class StageReport:
    """What the caller of a save waited for.

    Attributes
    ----------
    chunks, changed
        Chunks there are, and chunks staged.
    nbytes, changed_bytes
        Their bytes.
    norms
        By tensor with a threshold: its relative change and the norm of what is stored.
    """

    chunks: int = 0
    changed: int = 0
    nbytes: int = 0
    changed_bytes: int = 0
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class _Slot:
    """A chunk's place in the base.

    `full` is the content of the last full object; `latest` a later content that is not (yet) one.
    """

    full: Content | None = None
    latest: Content | None = None

    def rebase(self, content: Content) -> None:
        """Take the content of a new full object."""
        content.deltas.first = self.full is None
        self.full = content

    @property
    def comparable(self) -> Content | None:
        for content in (self.latest, self.full):
            if content is not None and content.raw is not None:
                return content
        return None


@dataclass
class Base:
    """The base of a run's writer.

    Parameters
    ----------
    chunk_bytes
        Chunk size.
    keep
        Whether contents are kept to compare with. If not, every save stages everything.
    threads
        For comparing and copying.
    thresholds
        How far tensors may move without being stored.
    """

    chunk_bytes: int
    keep: bool = True
    threads: int = 1
    thresholds: Thresholds = field(default_factory=Thresholds)
    _layout: Layout | None = None
    _slots: list[_Slot] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    pool: HostPool = field(default_factory=HostPool)
    _pinned: HostPool = field(default_factory=lambda: HostPool(pinned=torch.cuda.is_available()))
    _copies: DeviceCopies = field(default_factory=DeviceCopies)

    def __post_init__(self) -> None:
        check_chunk_bytes(self.chunk_bytes)

    @property
    def host_bytes(self) -> tuple[int, int]:
        """Host memory held: bytes in use, and bytes kept for recycling."""
        pools = (self.pool, self._pinned)
        return sum(pool.used_bytes for pool in pools), sum(pool.free_bytes for pool in pools)

    def trim(self, keep_bytes: int) -> None:
        """Give recycled memory beyond `keep_bytes` back."""
        self.pool.trim(keep_bytes)
        self._pinned.trim(keep_bytes)

    def layout_for(self, sizes: list[tuple[int, int]], kinds: list[str]) -> Layout:
        """Return the layout of ranges of these ``(bytes, element size)``; another than the last forgets the base."""
        if self._layout is None or sizes != self._layout.sizes or kinds != self._layout.kinds:
            layout = Layout.of(sizes, kinds, self.chunk_bytes)
            with self._lock:
                self._layout = layout
                self._slots = [_Slot() for _ in range(len(layout.table.chunk_nbytes))]
        return self._layout

    def forget(self) -> None:
        """Let go of all contents."""
        with self._lock:
            self._slots = [_Slot() for _ in self._slots]

    def adopt(self, layout: Layout, contents: Sequence[Content]) -> None:
        """Take a restored checkpoint's contents as the base, so that the next save is incremental already.

        Parameters
        ----------
        layout
            Given by `layout_for` for the checkpoint's ranges.
        contents
            One per chunk; those whose object is a delta come with the content of the full object it is against.
        """
        if self.keep and layout is self._layout:
            with self._lock:
                self._slots = [_Slot(full=content) for content in contents]

    def stage(self, flat: FlatState) -> tuple[Layout, list[Content], StageReport]:
        """Compare the state with the base and copy what changed.

        Returns
        -------
        layout, contents, report
            One content per chunk of the layout. What is in device memory is copied before it is compared; when this
            returns the state may change.
        """
        layout = self.layout_for(flat.sizes, flat.kinds)
        table = layout.table
        with self._lock:
            held = [slot.comparable for slot in self._slots]
        on_device = np.fromiter((item.tensor is not None for item in flat.ranges), np.bool_, len(flat.ranges))
        device_chunks = np.unique(table.seg_chunk[on_device[table.seg_range]])
        host = np.ones(len(held), np.bool_)
        host[device_chunks] = False

        report = StageReport(chunks=len(held), nbytes=int(table.chunk_nbytes.sum()))
        limits = None
        if self.thresholds.active:
            limits = self.thresholds.by_range(flat.tensors, [item.nbytes for item in flat.ranges])
            if len(device_chunks):
                _warn_exact_on_device()
        contents: list[Content | None] = list(held)
        source = layout.addresses(flat.ranges)
        staged = self._stage_host(table, source, held, host, limits, report)
        staged.update(self._stage_device(table, source, held, device_chunks.tolist(), flat.ranges))
        for index, content in staged.items():
            contents[index] = content
        if self.keep:
            with self._lock:
                for index, content in staged.items():
                    self._slots[index].latest = content
        complete = [content for content in contents if content is not None]
        assert len(complete) == len(held)
        report.changed = len(staged)
        report.changed_bytes = sum(content.nbytes for content in staged.values())
        return layout, complete, report

    def settle(self, layout: Layout, index: int, content: Content) -> None:
        """Note that `content` of chunk `index` is stored: a full object becomes the base, a delta is let go of.

        `layout` is that of the save; what was staged since may have another, with other chunks.
        """
        stored = content.stored
        assert stored is not None
        with self._lock:
            if layout is not self._layout:
                return
            slot = self._slots[index]
            if slot.latest is content:
                slot.latest = None
                if stored.base is None:
                    slot.rebase(content)
            elif slot.latest is not None and stored.base is None and slot.full is not content:
                slot.rebase(content)

    def full(self, layout: Layout, index: int) -> Content | None:
        """Return the content of the last full object of chunk `index` of `layout`, if that is the layout still."""
        with self._lock:
            return self._slots[index].full if layout is self._layout else None

    def _stage_host(
        self,
        table: ChunkTable,
        source: Addresses,
        held: Sequence[Content | None],
        chunks: npt.NDArray[np.bool_],
        limits: RangeThresholds | None,
        report: StageReport,
    ) -> dict[int, Content]:
        """Stage those of `chunks` whose memory is on the host."""
        known = np.fromiter((content is not None for content in held), np.bool_, len(held))
        changed = chunks & ~known
        compared = (chunks & known)[table.seg_chunk]
        addresses = np.fromiter((_address(content) for content in held), np.uintp, len(held))
        base = addresses[table.seg_chunk] + table.seg_chunk_offset.astype(np.uintp)
        if limits is not None:
            lossy = limits.lossy[table.seg_range] & chunks[table.seg_chunk]
            moved = self._moved(table, source, base, compared & lossy, lossy & ~compared, limits, report)
            changed[table.seg_chunk[lossy & moved[table.seg_range]]] = True
            compared &= ~lossy
        if compared.any():
            pick = slice(None) if compared.all() else compared
            changed |= detect.changed_exact(
                source[pick],
                base[pick],
                table.seg_nbytes[pick],
                table.seg_chunk[pick],
                len(held),
                threads=self.threads,
            )
        indexes = np.flatnonzero(changed).tolist()
        buffers = {index: self.pool.take(int(table.chunk_nbytes[index])) for index in indexes}
        if indexes:
            starts = np.zeros(len(held), np.uintp)
            starts[indexes] = [buffer.ctypes.data for buffer in buffers.values()]
            copied = changed[table.seg_chunk]
            target = starts[table.seg_chunk] + table.seg_chunk_offset.astype(np.uintp)
            detect.copy(source[copied], target[copied], table.seg_nbytes[copied], threads=self.threads)
        return {index: Content(buffer, int(table.chunk_itemsize[index])) for index, buffer in buffers.items()}

    def _moved(
        self,
        table: ChunkTable,
        source: Addresses,
        base: Addresses,
        compared: npt.NDArray[np.bool_],
        new: npt.NDArray[np.bool_],
        limits: RangeThresholds,
        report: StageReport,
    ) -> npt.NDArray[np.bool_]:
        """Say which ranges moved too far, given the segments to compare and those that are new; ``bool[r]``."""
        ranges = table.seg_range[compared]
        diff, norm = detect.relative_l2(
            source[compared],
            base[compared],
            table.seg_nbytes[compared],
            ranges,
            limits.dtype_code[ranges],
            len(limits.names),
            threads=self.threads,
        )
        moved = np.ones(len(limits.names), np.bool_)
        for threshold in np.unique(limits.threshold[limits.lossy]).tolist():
            same = limits.threshold == threshold
            moved[same] = ~detect.within(diff[same], norm[same], threshold)
        moved[table.seg_range[new]] = True
        measured = np.setdiff1d(ranges, table.seg_range[new])
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.sqrt(diff) / np.sqrt(norm)
        report.norms = {
            limits.names[index]: (float(relative[index]), math.sqrt(norm[index])) for index in measured.tolist()
        }
        return moved

    def _stage_device(
        self,
        table: ChunkTable,
        source: Addresses,
        held: Sequence[Content | None],
        chunks: Sequence[int],
        ranges: Sequence[ByteRange],
    ) -> dict[int, Content]:
        """Stage chunks that lie, at least in part, in device memory: copy to the host, then compare there."""
        staged: dict[int, Content] = {}
        if not chunks:
            return staged
        first = np.searchsorted(table.seg_chunk, np.arange(len(held) + 1))
        batch: list[tuple[int, Bytes]] = []
        pending = 0
        for position, index in enumerate(chunks):
            buffer = self._pinned.take(int(table.chunk_nbytes[index]))
            host = torch.from_numpy(buffer)
            for segment in range(int(first[index]), int(first[index + 1])):
                offset, nbytes = int(table.seg_chunk_offset[segment]), int(table.seg_nbytes[segment])
                item = ranges[int(table.seg_range[segment])]
                if item.tensor is None:
                    one = slice(segment, segment + 1)
                    target = np.array([buffer.ctypes.data + offset], np.uintp)
                    detect.copy(source[one], target, table.seg_nbytes[one], threads=1)
                else:
                    start = int(table.seg_range_offset[segment])
                    self._copies.copy(host[offset : offset + nbytes], item.tensor[start : start + nbytes])
            batch.append((index, buffer))
            pending += buffer.nbytes
            if pending >= _DEVICE_BATCH or position == len(chunks) - 1:
                self._copies.synchronize()
                staged.update(self._keep_changed(table, held, batch))
                batch, pending = [], 0
        return staged

    def _keep_changed(
        self, table: ChunkTable, held: Sequence[Content | None], batch: Sequence[tuple[int, Bytes]]
    ) -> dict[int, Content]:
        staged: dict[int, Content] = {}
        for index, buffer in batch:
            before = held[index]
            if before is not None:
                pair = (np.array([buffer.ctypes.data], np.uintp), np.array([_address(before)], np.uintp))
                size, group = table.chunk_nbytes[index : index + 1], np.zeros(1, np.int64)
                if not detect.changed_exact(*pair, size, group, 1, threads=self.threads)[0]:
                    continue
            staged[index] = Content(buffer, int(table.chunk_itemsize[index]))
        return staged


@functools.cache
def _warn_exact_on_device() -> None:
    log.warning("thresholds do not apply to tensors on a device yet: these are stored whenever a bit of them changed")


def contents_of(flat: FlatState, layout: Layout, pool: HostPool) -> list[Content]:
    """Return the contents of a state that does not change while they are in use; one segment alone is not copied."""
    table = layout.table
    first = np.searchsorted(table.seg_chunk, np.arange(len(table.chunk_nbytes) + 1))
    return [
        _content_of(flat, table, index, int(first[index]), int(first[index + 1]), pool)
        for index in range(len(first) - 1)
    ]


def _content_of(flat: FlatState, table: ChunkTable, index: int, first: int, last: int, pool: HostPool) -> Content:
    itemsize = int(table.chunk_itemsize[index])
    pieces: list[Bytes] = []
    for segment in range(first, last):
        item = flat.ranges[int(table.seg_range[segment])]
        start, nbytes = int(table.seg_range_offset[segment]), int(table.seg_nbytes[segment])
        if item.tensor is not None:
            pieces.append(item.tensor[start : start + nbytes].cpu().numpy())
        else:
            pieces.append(_view(item.address + start, nbytes))
    if len(pieces) == 1:
        return Content(pieces[0], itemsize, flat)
    buffer = pool.take(int(table.chunk_nbytes[index]))
    np.concatenate(pieces, out=buffer)
    return Content(buffer, itemsize)


def _view(address: int, nbytes: int) -> Bytes:
    """Return the memory at `address` as an array; whoever uses it keeps the memory alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def _address(content: Content | None) -> int:
    return 0 if content is None or content.raw is None else content.raw.ctypes.data
