"""What stands in a run, whichever lineage has it: every ref, what it says, and whether all that it needs is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from incckpt.errors import CorruptionError
from incckpt.run.verify import Checked, Checker, Level
from incckpt.store.lineage import Lineage, Run
from incckpt.store.refs import RefName, list_refs
from incckpt.store.store import Store

__all__ = ["Inventory", "InventoryItem", "Standing", "check_all", "lineage_or_damage", "take_inventory"]

Standing: TypeAlias = Literal["lineage", "abandoned", "orphaned"]


@dataclass(frozen=True, slots=True)
class InventoryItem:
    """A checkpoint that stands.

    Attributes
    ----------
    run, step, attempt
        Which.
    ref
        Its exact name: ``load(url, run=run, step=ref)`` reads it, whatever its standing.
    standing
        ``"lineage"``, ``"abandoned"`` (by rewinding, or replaced), or ``"orphaned"``: no readable lineage has it.
    time
        Seconds since the epoch by the writer's clock; ``None`` if the ref cannot be read.
    metrics
        As given to ``save``.
    nbytes
        Bytes of the state; ``None`` if the ref cannot be read.
    problems
        What is wrong with it, as far as was looked.
    """

    run: str
    step: int
    attempt: int
    ref: str
    standing: Standing
    time: float | None
    metrics: Mapping[str, float] = field(hash=False)
    nbytes: int | None
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether it restores, as far as was looked."""
        return not self.problems

    @classmethod
    def of(cls, run: str, name: RefName, standing: Standing, checked: Checked) -> InventoryItem:
        """Return what was found out about a ref."""
        ref = checked.ref
        time, metrics, nbytes = (None, {}, None) if ref is None else (ref.time, ref.metrics, ref.nbytes)
        return cls(run, name.step, name.attempt, str(name), standing, time, metrics, nbytes, checked.problems)


@dataclass(frozen=True)
class Inventory:
    """What stands in a store or a run; ``print`` it.

    Attributes
    ----------
    url, level
        What was looked at, and how closely.
    items
        The checkpoints, by run, step and attempt.
    damage
        What is wrong with the lineage of a run, by its name; see `recover`.
    """

    url: str
    level: Level
    items: tuple[InventoryItem, ...]
    damage: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every checkpoint restores, as far as was looked, and every lineage can be read."""
        return not self.damage and all(item.ok for item in self.items)

    def __str__(self) -> str:
        lines: list[str] = []
        for run in sorted({item.run for item in self.items} | self.damage.keys()):
            items = [item for item in self.items if item.run == run]
            whole = sum(item.ok for item in items)
            lines.append(f"run {run!r} at {self.url}: {whole} of {len(items)} checkpoints whole (level {self.level!r})")
            if run in self.damage:
                lines.append(f"  damaged: {self.damage[run]}")
            for item in items:
                standing = "" if item.standing == "lineage" else f", {item.standing}"
                metrics = "".join(f", {name}={value:g}" for name, value in item.metrics.items())
                lines.append(f"  step {item.step}{standing}{metrics}: {item.ref}")
                lines += [f"    {problem}" for problem in item.problems]
        return "\n".join(lines) or f"{self.url} holds no checkpoint."


def take_inventory(store: Store, runs: Sequence[str], level: Level, checker: Checker) -> Inventory:
    """Look at every ref of some runs."""
    items: list[InventoryItem] = []
    damage: dict[str, str] = {}
    for run in map(store.run, runs):
        lineage, wrong = lineage_or_damage(run)
        if wrong is not None:
            damage[run.name] = wrong
        listed = list_refs(store.backend, run.name)
        names = sorted({name for _, name, _, tombstone in listed if name is not None and not tombstone})
        for name, checked in check_all(store, run, names, checker).items():
            standing: Standing = "orphaned"
            if name in lineage.live:
                standing = "lineage"
            elif name in lineage.abandoned:
                standing = "abandoned"
            items.append(InventoryItem.of(run.name, name, standing, checked))
    items.sort(key=lambda item: (item.run, item.step, item.attempt, item.ref))
    return Inventory(store.backend.url, level, tuple(items), damage)


def lineage_or_damage(run: Run) -> tuple[Lineage, str | None]:
    """Return the lineage of a run, or an empty one and what is wrong with it."""
    try:
        return run.lineage(), None
    except (CorruptionError, FileNotFoundError) as error:
        return Lineage.empty(), str(error)


def check_all(
    store: Store,
    run: Run,
    names: Sequence[RefName],
    checker: Checker,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[RefName, Checked]:
    """Check refs, many at once where requests cross a network; those that are pruned meanwhile are left out."""
    nowhere = Lineage.empty()  # read each ref: what a lineage says of it does not prove that it can be read
    done = itertools.count(1)

    def check(name: RefName) -> Checked | None:
        checked = checker.check(run, nowhere, name)
        progress(next(done), len(names))
        return checked

    found = store.each(check, names)
    return {name: checked for name, checked in zip(names, found, strict=True) if checked is not None}
