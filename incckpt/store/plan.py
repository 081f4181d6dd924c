"""What a collection is going to delete, and why: made by reading alone, printed, and carried out by `Collector`."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Collected", "CollectionPlan", "Reason", "Removal"]

_EXAMPLES = 3


class Reason(enum.Enum):
    """Why something is to be deleted."""

    UNREFERENCED = "objects that no checkpoint needs"
    CONDEMNED = "objects that an earlier collection has condemned"
    STALE_PIN = "pins of saves that are given up, without a heartbeat for too long"
    FINISHED_PIN = "pins of saves that are over"
    LIST = "lists of earlier collections"
    LEFTOVER = "temporary files, unfinished uploads, empty folders and probes of processes that are gone"


_OBJECTS = frozenset({Reason.UNREFERENCED, Reason.CONDEMNED})


@dataclass(frozen=True, slots=True)
class Removal:
    """One thing to be deleted.

    Attributes
    ----------
    name
        Its key, or the backend's name for what is not a key.
    reason
        Why.
    nbytes
        Its size in bytes, where known.
    age
        Seconds since it was last changed, where known.
    """

    name: str
    reason: Reason
    nbytes: int | None = None
    age: float | None = None

    def __str__(self) -> str:
        facts = [text for text in (_size(self.nbytes), _duration(self.age)) if text]
        return f"{self.name} ({', '.join(facts)})" if facts else self.name


@dataclass
class Collected:
    """What a collection did.

    Attributes
    ----------
    deleted
        Keys of the objects deleted.
    waiting
        How many condemned keys wait for saves in flight to end.
    leftovers
        How many leftovers of dead processes were removed.
    """

    deleted: set[str] = field(default_factory=set)
    waiting: int = 0
    leftovers: int = 0


@dataclass(frozen=True)
class CollectionPlan:
    """What a collection would delete and why, and once it is carried out, what it did. ``print`` it.

    Attributes
    ----------
    url
        Of the store.
    removals
        What is to be deleted.
    in_flight
        Keys of the refs that saves in flight will commit. While there are any, objects are condemned and not deleted;
        the next collection deletes them.
    min_age
        Objects younger than this, in seconds, are left alone.
    young, young_bytes
        How many unneeded objects are left alone for their age, and their total bytes.
    lists
        The lists of other collectors, by name, with what still exists of each.
    done
        What was done; ``None`` as long as this is only a plan.
    """

    url: str
    removals: tuple[Removal, ...]
    in_flight: frozenset[str] = frozenset()
    min_age: float = 0.0
    young: int = 0
    young_bytes: int = 0
    lists: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    done: Collected | None = None

    def of(self, *reasons: Reason) -> list[Removal]:
        """Return what is to be deleted for one of these reasons."""
        return [removal for removal in self.removals if removal.reason in reasons]

    @property
    def objects(self) -> frozenset[str]:
        """Keys of the objects to be deleted."""
        return frozenset(removal.name for removal in self.of(*_OBJECTS))

    @property
    def nbytes(self) -> int:
        """Bytes that deleting them frees."""
        return sum(removal.nbytes or 0 for removal in self.removals)

    def __str__(self) -> str:
        if self.done is None:
            verb = "would delete"
        elif self.done.waiting:
            verb = "has condemned, and deletes when no save is in flight,"
        else:
            verb = "has deleted"
        count = len(self.objects)
        lines = [f"A collection of {self.url} {verb} {count} objects, {_size(self.nbytes)} in all:"]
        for reason in Reason:
            found = self.of(reason)
            if found:
                size = _size(sum(removal.nbytes or 0 for removal in found))
                lines.append(f"  {len(found)} {reason.value}: {size}")
                lines += _examples(found)
        if not self.removals:
            lines = [f"A collection of {self.url} finds nothing to delete."]
        if self.young:
            lines.append(
                f"  {self.young} objects that no checkpoint needs stay, being younger than {_duration(self.min_age)}: "
                f"{_size(self.young_bytes)}"
            )
        if self.in_flight:
            lines.append(f"  {len(self.in_flight)} saves in flight: objects are deleted by a collection after them")
            lines += (f"    {key}" for key in sorted(self.in_flight)[:_EXAMPLES])
        return "\n".join(lines)


def _examples(found: Iterable[Removal]) -> list[str]:
    largest = sorted(found, key=lambda removal: (-(removal.nbytes or 0), removal.name))
    lines = [f"    {removal}" for removal in largest[:_EXAMPLES]]
    return [*lines, "    …"] if len(largest) > _EXAMPLES else lines


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    size = float(nbytes)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
