"""What a save did, in figures."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, TypeAlias

from incckpt.codec.objects import Encoded, WayBytes
from incckpt.staging.baseline import StageReport
from incckpt.store.document import Json, encode_float

__all__ = ["SaveReport", "TierReport", "TierState"]

_BLOCKING = ("wait", "flatten", "stage")


TierState: TypeAlias = Literal["none", "waiting", "copying", "durable", "skipped", "failed"]


@dataclass
class TierReport:
    """How far a save has come in a tier.

    Attributes
    ----------
    state
        ``"durable"``: the tier has the checkpoint. ``"waiting"`` and ``"copying"``: it will. ``"skipped"``: it will
        not, since newer ones waited to be copied. ``"failed"``: see `error`.
    durable_after
        Seconds from the call of ``save`` until the tier had it.
    seconds
        Seconds that copying took.
    put_objects, put_bytes
        What was put there for it, the manifest not counted.
    error
        Why it is not there.
    """

    state: TierState = "none"
    durable_after: float | None = None
    seconds: float | None = None
    put_objects: int = 0
    put_bytes: int = 0
    error: str | None = None


@dataclass
class SaveReport(StageReport):
    """What a save did.

    Attributes
    ----------
    chunks, changed_chunks
        Number of chunks in the state, and of those that differed from the base.
    nbytes, changed_bytes
        Their raw bytes.
    put_objects, put_bytes
        Objects put, the manifest not counted, and their stored bytes.
    manifest_bytes
        Stored size of the manifest.
    norms
        By tensor, its relative change since the checkpoint before (L2 norm) and the norm that it had then: with
        thresholds exactly, and of every tensor compared; otherwise estimated from a sample, and of those in which
        something changed. Empty after a manager's first save, and after one that `incckpt.save` makes.
    expected_seconds
        How long ``store`` and ``commit`` were expected to take together when the save was put into the background, from
        what the saves before took; ``None`` if nothing was known.
    expected_by_another
        Whether that is from what the save of the restored checkpoint took, in another process.
    by_way
        Raw and stored bytes of the put objects' frames, by the way they are coded.
    seconds
        By phase. ``flatten``, ``stage`` and ``wait`` (for the backlog) block the caller. ``hash``, ``encode`` and
        ``put`` are summed over threads; ``store`` is the time they took together; ``measure`` is that of `norms`;
        ``commit`` is the protocol's part.
    tiers
        How far the save has come in each tier, ``"local"`` and ``"bucket"``, where the manager has a local one; what is
        counted above is what was put into the tier that the save went to first.
    """

    step: int = 0
    put_objects: int = 0
    put_bytes: int = 0
    manifest_bytes: int = 0
    expected_seconds: float | None = None
    expected_by_another: bool = False
    by_way: dict[str, WayBytes] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tiers: dict[str, TierReport] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def restart(self) -> None:
        """Reset what was put: the save starts again under another name."""
        with self._lock:
            self.put_objects = self.put_bytes = 0
            self.by_way = {}

    def spent(self, phase: str, seconds: float) -> None:
        """Add to the time of a phase."""
        with self._lock:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def put(self, encoded: Encoded) -> None:
        """Count an object."""
        with self._lock:
            self.put_objects += 1
            self.put_bytes += len(encoded.data)
            for way, one in encoded.ways.items():
                total = self.by_way.get(way, WayBytes(0, 0))
                self.by_way[way] = WayBytes(total.raw + one.raw, total.stored + one.stored)

    def put_copy(self, nbytes: int) -> None:
        """Count an object that was put as it is in another store."""
        with self._lock:
            self.put_objects += 1
            self.put_bytes += nbytes

    def tier(self, name: str) -> TierReport:
        """Return the part about a tier."""
        with self._lock:
            return self.tiers.setdefault(name, TierReport())

    def reached(self, name: str) -> None:
        """Note that a tier has the checkpoint now."""
        tier = self.tier(name)
        tier.durable_after = time.perf_counter() - self._began
        tier.state = "durable"

    def to_json(self) -> dict[str, Json]:
        """Return the report as JSON-able values."""
        document: dict[str, Json] = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in ("_began", "_lock", "by_way", "norms", "tiers")
        }
        document["by_way"] = {way: one._asdict() for way, one in self.by_way.items()}
        document["tiers"] = {name: asdict(tier) for name, tier in self.tiers.items()}
        document["norms"] = {name: [encode_float(value) for value in pair] for name, pair in self.norms.items()}
        return document

    @property
    def blocked(self) -> dict[str, float]:
        """How long the caller waited, by phase, in seconds."""
        return {phase: self.seconds[phase] for phase in _BLOCKING if phase in self.seconds}

    @property
    def blocked_seconds(self) -> float:
        """How long the caller waited."""
        return sum(self.blocked.values())
