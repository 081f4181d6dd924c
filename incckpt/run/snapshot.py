"""A state as staged: all that the background needs to write it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from incckpt.run.report import SaveReport
from incckpt.staging.baseline import Baseline
from incckpt.staging.content import Content
from incckpt.staging.layout import Layout
from incckpt.staging.packed import NOTHING_PACKED, PackedChunks
from incckpt.state.entries import TensorEntry, entry_to_json
from incckpt.state.flatten import flatten
from incckpt.store.document import Json
from incckpt.store.manifest import Chunk, Manifest, Range
from incckpt.store.refs import RefName

if TYPE_CHECKING:
    from incckpt.run.upload import Known, Uploader

__all__ = ["Snapshot", "Source", "stage"]


class Source(Protocol):
    """What a writer can write besides a snapshot: a dataclass that stores its chunks itself, and makes its manifest."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def step(self) -> int:
        """The step of the checkpoint."""

    @property
    def time(self) -> float:
        """Seconds since the epoch."""

    def store(self, uploader: Uploader, nonce: str, known: Known, report: SaveReport) -> Sequence[Chunk]:
        """Make sure that every chunk is stored, once the pin is put; return where."""

    def manifest_as(self, run: str, name: RefName, chunks: Sequence[Chunk]) -> Manifest:
        """Return the manifest of the checkpoint `name`."""


@dataclass(frozen=True)
class Snapshot:
    """A state as staged: all that the background needs to write it.

    Attributes
    ----------
    layout, contents
        How its ranges are cut into chunks, and one content per chunk.
    packed
        Its packed values; their chunks follow those of the layout.
    entries
        What `tensors` are the JSON of.
    """

    step: int
    metrics: Mapping[str, float]
    time: float
    structure: Json
    tensors: tuple[Mapping[str, Json], ...]
    layout: Layout
    contents: Sequence[Content]
    norms: Mapping[str, tuple[float, float]] | None = None
    packed: PackedChunks = NOTHING_PACKED
    entries: Sequence[TensorEntry] = ()

    @property
    def packed_ranges(self) -> tuple[Range, ...]:
        """The ranges of the packed values, chunks numbered as in the manifest."""
        first = len(self.contents)
        return tuple(
            replace(item, pieces=tuple((chunk + first, offset, nbytes) for chunk, offset, nbytes in item.pieces))
            for item in self.packed.ranges
        )

    @classmethod
    def of(
        cls,
        step: int,
        metrics: Mapping[str, float],
        time: float,
        structure: Json,
        tensors: Sequence[TensorEntry],
        layout: Layout,
        contents: Sequence[Content],
        norms: Mapping[str, tuple[float, float]] | None = None,
        packed: PackedChunks = NOTHING_PACKED,
    ) -> Snapshot:
        """Make a snapshot from the results of flattening and staging."""
        items = tuple(entry_to_json(entry) for entry in tensors)
        return cls(step, metrics, time, structure, items, layout, contents, norms, packed, tensors)


def stage(
    step: int,
    app: Any,
    metrics: Mapping[str, float],
    report: SaveReport,
    *,
    base: Baseline,
    allow_pickle: bool,
    given: frozenset[int] = frozenset(),
) -> Callable[[], Snapshot]:
    """Flatten a state and copy what changed; return a function that makes the snapshot, to be called later.

    Parameters
    ----------
    given
        Addresses of storages that are given away: they may be kept, not copied, and must never be written to.
    """
    started = time.perf_counter()
    flat = flatten(app, allow_pickle=allow_pickle)
    flattened = time.perf_counter()
    layout, contents = base.stage(flat, report, given=given)
    packed = base.stage_packed(flat, report)
    report.spent("flatten", flattened - started)
    report.spent("stage", time.perf_counter() - flattened)
    structure, tensors, now, norms = flat.structure, flat.tensors, time.time(), report.norms or None
    return lambda: Snapshot.of(step, metrics, now, structure, tensors, layout, contents, norms, packed)
