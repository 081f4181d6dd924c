"""Rebuilding the lineage of a run from the checkpoints that are whole: planned by reading alone, and carried out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from incckpt.errors import CheckpointNotFoundError, OptionError, SupersededError
from incckpt.run.choose import place
from incckpt.run.inventory import check_all, lineage_or_damage
from incckpt.run.verify import Checked, Checker
from incckpt.store.refs import Ref, RefName
from incckpt.store.remains import Remains
from incckpt.store.store import Store

__all__ = ["Recoverer", "RecoveryPlan"]

log = logging.getLogger(__name__)

_EXAMPLES = 8


@dataclass(frozen=True)
class RecoveryPlan:
    """What a recovery would make of a run, and once it is carried out, what it made. ``print`` it.

    Attributes
    ----------
    url, run
        Which run.
    damage
        What is wrong with the store's marker or the run's lineage; ``None`` if both can be read.
    needed
        Whether there is anything to do.
    lineage
        Exact names of the checkpoints that the run will have, by step.
    abandoned
        Those of checkpoints that stay beside the lineage. They can be loaded, and are pruned once the run has passed
        their steps.
    lost
        What is wrong with the abandoned ones that are not whole, by exact name.
    in_flight
        Exact names of checkpoints that saves in flight, or killed ones, are about to commit: these saves are stopped.
    attempt
        The attempt that has the lineage; ``None`` as long as this is only a plan.
    """

    url: str
    run: str
    damage: str | None
    needed: bool
    lineage: tuple[str, ...]
    abandoned: tuple[str, ...]
    lost: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_flight: tuple[str, ...] = ()
    attempt: int | None = None

    def __str__(self) -> str:
        where = f"run {self.run!r} at {self.url}"
        if not self.needed:
            return f"A recovery of {where} finds nothing to do: its {len(self.lineage)} checkpoints are in its lineage."
        if self.attempt is None:
            lines = [f"A recovery of {where} would start a new attempt at it, which continues:"]
        else:
            lines = [f"A recovery of {where} has started attempt {self.attempt} at it, which continues:"]
        if self.damage is not None:
            lines.insert(0, f"Damaged: {self.damage}")
        lines += _listed(f"{len(self.lineage)} checkpoints in the lineage", self.lineage)
        whole = [name for name in self.abandoned if name not in self.lost]
        if whole:
            lines += _listed(f"{len(whole)} abandoned ones, which can be loaded by name", whole)
        if self.lost:
            lines += _listed(f"{len(self.lost)} that are not whole, abandoned as well", self.lost, self.lost)
        if self.in_flight:
            lines += _listed(f"{len(self.in_flight)} saves in flight, which are stopped", self.in_flight)
        return "\n".join(lines)


def _listed(title: str, names: Collection[str], problems: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    lines = [f"  {title}:"]
    shown = list(names)[-_EXAMPLES:]
    if len(shown) < len(names):
        lines.append("    …")
    for name in shown:
        parsed = RefName.parse(name)
        lines.append(f"    {name}" if parsed is None else f"    step {parsed.step}: {name}")
        lines += [f"      {problem}" for problem in (problems or {}).get(name, ())[:_EXAMPLES]]
    return lines


@dataclass(frozen=True)
class _Found:
    """What a look at the run gave: what is left, what is wrong with its lineage, and what was found of each ref."""

    remains: Remains
    damage: str | None
    checked: Mapping[RefName, Checked]


class Recoverer:
    """Rebuilds the lineage of one run.

    Parameters
    ----------
    store, run
        Which run.
    checker
        Tells which checkpoints are whole.
    refs
        Exact names of the checkpoints to be the lineage; by default all that are whole, as far as one lineage can have
        them.
    progress
        Called with how many of how many checkpoints are checked, from any thread.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        checker: Checker,
        refs: Collection[RefName] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._store = store
        self._run = store.run(run)
        self._checker = checker
        self._refs = refs
        self._progress = progress

    def plan(self) -> RecoveryPlan:
        """Find out what a recovery would make of the run; nothing is written.

        Raises
        ------
        CheckpointNotFoundError
            If nothing stands from which the run could be recovered.
        OptionError
            If the refs given are not whole, or several are of one step.
        FormatError, CorruptionError
            If a later version of incckpt has written to the run.
        """
        return self._plan(self._look())[0]

    def carry_out(self) -> RecoveryPlan:
        """Look at the run, and if there is anything to do, start an attempt that continues what is whole.

        What stands is looked at again once the attempt has stopped all saves of earlier ones. Nothing is deleted.

        Raises
        ------
        SupersededError
            If another process starts an attempt at the same time. Nothing was changed; recovering again is safe.
        CheckpointNotFoundError, OptionError, FormatError, CorruptionError
            As for `plan`.
        ReadOnlyError, BackendError
            If the store cannot be written, or failed; recovering again is safe.
        """
        found = self._look()
        plan, _ = self._plan(found)
        if not plan.needed:
            return plan
        self._store.restore_marker()
        self._store.create()
        try:
            attempt, _ = self._run.start_attempt(self._run.new_attempt(), found.remains.attempt)
        except SupersededError as error:
            raise SupersededError(
                f"{place(self._run)} was not recovered: another process has just started an attempt at it. Look at "
                "the plan again"
            ) from error
        done, chosen = self._plan(self._look({name: one for name, one in found.checked.items() if not one.lost}))
        self._run.seal(attempt, *chosen)
        count = len(done.lineage)
        log.warning("%s was recovered: attempt %d continues %d checkpoints", place(self._run), attempt, count)
        return replace(done, damage=plan.damage, needed=True, in_flight=plan.in_flight, attempt=attempt)

    def _look(self, known: Mapping[RefName, Checked] | None = None) -> _Found:
        """Look at the run; of refs that are known already only whether they stand."""
        known = known or {}
        damage = self._store.damage() or lineage_or_damage(self._run)[1]
        remains = Remains.of(self._run)
        unknown = [name for name in remains.standing if name not in known]
        checked = check_all(self._store, self._run, unknown, self._checker, self._progress)
        checked |= {name: known[name] for name in remains.standing if name in known}
        return _Found(replace(remains, standing=tuple(sorted(checked))), damage, checked)

    def _plan(self, found: _Found) -> tuple[RecoveryPlan, tuple[list[Ref | RefName], list[Ref | RefName]]]:
        """Return the plan, and what a new attempt would inherit and abandon."""
        checked = found.checked
        if not checked:
            raise CheckpointNotFoundError(
                f"{place(self._run)} cannot be recovered: it has no checkpoint. Is the run's name right? To start "
                "afresh, save to another run"
            )
        whole = {name: one.ref for name, one in checked.items() if not one.lost}
        if self._refs is not None:
            self._check_given(self._refs, whole)
            whole = {name: whole[name] for name in self._refs}
            live = sorted(whole, key=lambda name: name.step)
            abandoned = [name for name in found.remains.standing if name not in whole]
        else:
            live, abandoned = found.remains.rebuilt(whole)
        as_it_is = [set(names) for names in found.remains.as_read({name: one.ref for name, one in checked.items()})]
        plan = RecoveryPlan(
            self._store.backend.url,
            self._run.name,
            found.damage,
            found.damage is not None or as_it_is != [set(live), set(abandoned)],
            tuple(map(str, live)),
            tuple(map(str, abandoned)),
            {str(name): checked[name].problems for name in abandoned if checked[name].lost},
            tuple(map(str, found.remains.in_flight)),
        )
        inherited, left = ([checked[name].ref or name for name in names] for names in (live, abandoned))
        return plan, (inherited, left)

    def _check_given(self, refs: Collection[RefName], whole: Mapping[RefName, Ref | None]) -> None:
        missing = [str(name) for name in refs if name not in whole]
        if missing:
            raise OptionError(f"refs: {place(self._run)} has no checkpoint {', '.join(missing)} that is whole")
        steps = [name.step for name in refs]
        twice = sorted({step for step in steps if steps.count(step) > 1})
        if twice:
            raise OptionError(f"refs: a lineage has one checkpoint of each step, not several of {twice}")
