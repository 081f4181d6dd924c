"""The part of a save in the caller's thread: find the chunks that changed, copy them into host buffers, return.

The *base* is the content of each chunk's last full object, kept in host memory. Contents are immutable: a buffer is
never written while anything refers to it, so saves in the queue cannot see each other's data.

The state's memory is read once to find what changed, and again to copy it. Another thread may write to it meanwhile:
the copy is what is stored, and everything else about it is computed from the copy.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from incckpt.staging import detect
from incckpt.staging.content import Bytes, Content, LiveContent
from incckpt.staging.device import DeviceCopies
from incckpt.staging.hostmem import HostPool
from incckpt.staging.layout import Addresses, ChunkTable, Layout, batches, check_chunk_bytes
from incckpt.staging.packed import PackedChunks, PackedStage
from incckpt.staging.threshold import RangeThresholds, Thresholds
from incckpt.state.entries import TensorEntry, range_names
from incckpt.state.flatten import ByteRange, FlatState

__all__ = ["Baseline", "ChunkSegments", "Slot", "StageReport", "live_contents"]

log = logging.getLogger(__name__)

_DEVICE_BATCH = 256 << 20  # bytes copied from a device at once, then compared


@dataclass
class StageReport:
    """What staging found.

    Attributes
    ----------
    chunks, changed_chunks
        Number of chunks in the state, and of those that differed from the base.
    nbytes, changed_bytes
        Their raw bytes.
    norms
        With thresholds: tensor -> its relative change, and the norm of its stored value.
    """

    chunks: int = 0
    changed_chunks: int = 0
    nbytes: int = 0
    changed_bytes: int = 0
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Slot:
    """A chunk's place in the base.

    `full` is the content of the last full object, `latest` a later content that is not (yet) stored as one.
    """

    full: Content | None = None
    latest: Content | None = None

    def settle(self, content: Content) -> None:
        """Note that `content` is stored."""
        assert content.stored is not None
        is_full = content.stored.base is None
        if self.latest is content:
            self.latest = None
            if is_full:
                self._rebase(content)
        elif self.latest is not None and is_full and self.full is not content:
            self._rebase(content)

    def _rebase(self, content: Content) -> None:
        content.deltas.first = self.full is None
        self.full = content

    @property
    def comparable(self) -> Content | None:
        for content in (self.latest, self.full):
            if content is not None and content.raw is not None:
                return content
        return None


@dataclass
class Baseline:
    """The base of a run's writer: what it compares each save with, and takes deltas against.

    Parameters
    ----------
    chunk_bytes
        Chunk size.
    keep
        Whether to keep contents for comparison. If not, every save stages everything.
    delta
        Whether changed chunks may be stored as deltas.
    threads
        For comparing and copying.
    thresholds
        How far tensors may move without being stored.
    """

    chunk_bytes: int
    keep: bool = True
    delta: bool = True
    threads: int = 1
    thresholds: Thresholds = field(default_factory=Thresholds)
    _packed: PackedStage = field(init=False)
    _current: tuple[Layout, list[Slot]] = field(init=False)  # one attribute: an interrupt cannot tear it
    _lock: threading.Lock = field(default_factory=threading.Lock)
    pool: HostPool = field(default_factory=HostPool)
    _pinned: HostPool = field(default_factory=lambda: HostPool(pinned=torch.cuda.is_available()))
    _copies: DeviceCopies = field(default_factory=DeviceCopies)

    def __post_init__(self) -> None:
        self._packed = PackedStage(self.chunk_bytes, keep=self.keep)
        self._current = Layout.of([], [], check_chunk_bytes(self.chunk_bytes)), []

    @property
    def host_bytes(self) -> tuple[int, int]:
        """Host memory held: bytes in use, and bytes kept for reuse."""
        pools = (self.pool, self._pinned)
        return sum(pool.used_bytes for pool in pools), sum(pool.free_bytes for pool in pools)

    def trim(self, keep_bytes: int) -> None:
        """Release memory kept for reuse beyond `keep_bytes`."""
        self.pool.trim(keep_bytes)
        self._pinned.trim(keep_bytes)

    def layout_for(self, sizes: list[tuple[int, int]], kinds: list[str], entries: Sequence[TensorEntry] = ()) -> Layout:
        """Return the layout of ranges of these ``(bytes, element size)``.

        If it is a new one, only the base of chunks that are made of the same bytes of the same tensors stays.

        Parameters
        ----------
        entries
            The tensors in the ranges.
        """
        layout, _ = self._current
        if sizes != layout.sizes or kinds != layout.kinds:
            layout = Layout.of(sizes, kinds, self.chunk_bytes, range_names(entries, len(sizes)))
            with self._lock:
                self._current = layout, _moved(*self._current, layout)
        return layout

    def forget(self) -> None:
        """Drop all contents."""
        with self._lock:
            layout, _ = self._current
            self._current = layout, _slots_of(layout)

    def adopt(self, layout: Layout, contents: Sequence[Content | None]) -> None:
        """Take a restored checkpoint's contents as the base, so that the next save is already incremental.

        Parameters
        ----------
        layout
            From `layout_for`, for the checkpoint's ranges.
        contents
            One per chunk; for a chunk stored as a delta, the content of the full object behind it. A chunk with
            ``None`` has no base: the next save stores it in full.
        """
        with self._lock:
            if self.keep and layout is self._current[0]:
                self._current = layout, [Slot(full=content) for content in contents]

    def stage(
        self, flat: FlatState, report: StageReport, *, given: frozenset[int] = frozenset()
    ) -> tuple[Layout, list[Content]]:
        """Compare the state with the base and copy what changed. After this returns, the state may change.

        Parameters
        ----------
        report
            Filled in.
        given
            Addresses of storages that are given away, so that nobody ever writes to them again: one that would be
            copied as a whole is kept instead.

        Returns
        -------
        layout, contents
            One content per chunk of the layout.
        """
        layout = self.layout_for(flat.sizes, flat.kinds, flat.tensors)
        table = layout.table
        with self._lock:
            slots = self._current[1]
            held = [slot.comparable for slot in slots]
        on_device = np.fromiter((item.tensor is not None for item in flat.ranges), np.bool_, len(flat.ranges))
        device_chunks = np.unique(table.seg_chunk[on_device[table.seg_range]])
        host = np.ones(len(held), np.bool_)
        host[device_chunks] = False

        report.chunks, report.nbytes = len(held), int(table.chunk_nbytes.sum())
        limits = None
        if self.thresholds.active:
            limits = self.thresholds.by_range(flat.tensors, [item.nbytes for item in flat.ranges], flat.inner)
            if len(device_chunks):
                _warn_exact_on_device()
        contents: list[Content | None] = list(held)
        source = layout.addresses(flat.ranges)
        own = _kept(table, flat.ranges, given) if given else {}
        staged = self._stage_host(table, source, held, host, limits, report, own)
        staged.update(self._stage_device(table, source, held, device_chunks.tolist(), flat.ranges))
        for index, content in staged.items():
            contents[index] = content
        if self.keep:
            with self._lock:
                for index, content in staged.items():
                    slots[index].latest = content
        complete = [content for content in contents if content is not None]
        assert len(complete) == len(held)
        report.changed_chunks = len(staged)
        report.changed_bytes = sum(content.nbytes for content in staged.values())
        return layout, complete

    def stage_packed(self, flat: FlatState, report: StageReport) -> PackedChunks:
        """Cut the packed values into chunks, reusing those of the last save, and add them to `report`."""
        packed = self._packed.stage(flat.packed)
        changed, nbytes = packed.new
        report.chunks += len(packed.contents)
        report.nbytes += sum(content.nbytes for content in packed.contents)
        report.changed_chunks += changed
        report.changed_bytes += nbytes
        return packed

    def settle(self, layout: Layout, contents: Sequence[Content]) -> None:
        """Note that a save's contents are stored: full objects become the base, and deltas are dropped.

        `layout` is that of the save; later saves may have another one, with other chunks.
        """
        with self._lock:
            current, slots = self._current
            if layout is current:
                for slot, content in zip(slots, contents, strict=True):
                    slot.settle(content)

    def settle_full(self, layout: Layout, contents: Sequence[Content]) -> None:
        """Let those of the contents become the base that are known to be stored as full objects."""
        with self._lock:
            current, slots = self._current
            if layout is current:
                for slot, content in zip(slots, contents, strict=True):
                    if content.stored is not None and content.stored.base is None:
                        slot.settle(content)

    def full(self, layout: Layout, index: int) -> Content | None:
        """Return the content of the last full object of chunk `index`, if deltas against it are allowed.

        ``None`` also if `layout` is no longer that of the base.
        """
        if not self.delta:
            return None
        with self._lock:
            current, slots = self._current
            return slots[index].full if layout is current else None

    def _stage_host(
        self,
        table: ChunkTable,
        source: Addresses,
        held: Sequence[Content | None],
        chunks: npt.NDArray[np.bool_],
        limits: RangeThresholds | None,
        report: StageReport,
        own: Mapping[int, Bytes],
    ) -> dict[int, Content]:
        """Stage those of `chunks` whose memory is on the host; those in `own` need not be copied."""
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
        buffers = {
            index: own[index] if index in own else self.pool.take(int(table.chunk_nbytes[index])) for index in indexes
        }
        changed[list(own)] = False
        if changed.any():
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
        """Return which ranges moved too far, given the segments to compare and those that are new; ``bool[r]``."""
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
        """Stage chunks that lie at least in part in device memory: copy them to the host, then compare them there."""
        staged: dict[int, Content] = {}
        if not chunks:
            return staged
        segments = ChunkSegments(table, source, ranges)
        for batch in batches(chunks, table.chunk_nbytes[list(chunks)].tolist(), _DEVICE_BATCH):
            buffers = [(index, self._pinned.take(int(table.chunk_nbytes[index]))) for index in batch]
            try:
                for index, buffer in buffers:
                    segments.copy(index, buffer, self._copies.copy)
            finally:
                self._copies.synchronize()  # even after an error: the buffers may be recycled now
            staged.update(self._keep_changed(table, held, buffers))
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


def _kept(table: ChunkTable, ranges: Sequence[ByteRange], given: frozenset[int]) -> dict[int, Bytes]:
    """Return the memory of each chunk that is all of a given storage; of no less, since all of it stays alive."""
    found: dict[int, Bytes] = {}
    alone = table.seg_nbytes == table.chunk_nbytes[table.seg_chunk]
    for index, number in zip(table.seg_chunk[alone].tolist(), table.seg_range[alone].tolist(), strict=True):
        item = ranges[number]
        storage = item.owner
        if not isinstance(storage, torch.UntypedStorage) or storage.data_ptr() not in given or item.tensor is not None:
            continue
        if storage.nbytes() == item.nbytes == int(table.chunk_nbytes[index]):
            found[index] = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return found


def _slots_of(layout: Layout) -> list[Slot]:
    return [Slot() for _ in range(len(layout.table.chunk_nbytes))]


def _moved(before: Layout, slots: Sequence[Slot], layout: Layout) -> list[Slot]:
    """Return the slots of a new layout: those of the one before, where chunks are made of the same."""
    held = dict(zip(before.compositions(), slots, strict=True))
    return [held.pop(made_of, Slot()) for made_of in layout.compositions()]


@functools.cache
def _warn_exact_on_device() -> None:
    log.warning("thresholds do not apply to tensors on a device yet: these are stored whenever a bit of them changed")


class ChunkSegments:
    """Copies single chunks of a state out of its memory.

    Parameters
    ----------
    source
        ``uintp[m]``: the address of each segment; meaningless for those in device memory.
    """

    def __init__(self, table: ChunkTable, source: Addresses, ranges: Sequence[ByteRange]) -> None:
        self._table = table
        self._source = source
        self._ranges = ranges
        self._first = np.searchsorted(table.seg_chunk, np.arange(len(table.chunk_nbytes) + 1))
        self._on_device = np.fromiter((item.tensor is not None for item in ranges), np.bool_, len(ranges))

    def copy(self, index: int, out: Bytes, copy_device: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        """Copy chunk `index` to `out`, calling ``copy_device(target, source)`` for each part on a device."""
        table = self._table
        segments = np.arange(self._first[index], self._first[index + 1])
        on_device = self._on_device[table.seg_range[segments]]
        for segment in segments[on_device].tolist():
            offset, start = int(table.seg_chunk_offset[segment]), int(table.seg_range_offset[segment])
            nbytes = int(table.seg_nbytes[segment])
            tensor = self._ranges[int(table.seg_range[segment])].tensor
            assert tensor is not None
            copy_device(torch.from_numpy(out[offset : offset + nbytes]), tensor[start : start + nbytes])
        segments = segments[~on_device]
        if len(segments):
            target = out.ctypes.data + table.seg_chunk_offset[segments]
            detect.copy(self._source[segments], target.astype(np.uintp), table.seg_nbytes[segments], threads=1)


def live_contents(flat: FlatState, layout: Layout) -> list[Content]:
    """Return contents of a state that copy its memory only while they are held."""
    table = layout.table
    segments = ChunkSegments(table, layout.addresses(flat.ranges), flat.ranges)
    pool = HostPool()
    for device in {item.device for item in flat.ranges if item.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()  # threads with other streams will make the copies

    def read(index: int) -> Bytes:
        out = pool.take(int(table.chunk_nbytes[index]))
        segments.copy(index, out, torch.Tensor.copy_)
        return out

    return [
        LiveContent(nbytes, itemsize, functools.partial(read, index))
        for index, (nbytes, itemsize) in enumerate(
            zip(table.chunk_nbytes.tolist(), table.chunk_itemsize.tolist(), strict=True)
        )
    ]


def _address(content: Content | None) -> int:
    return 0 if content is None or content.raw is None else content.raw.ctypes.data
