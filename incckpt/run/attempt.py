"""One process's tenure as the writer of a run: what it continues, commits, prunes and collects. Synchronous."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch.distributed as dist

from incckpt.backends.base import FULL
from incckpt.errors import BackendError, CollectionError, DistributedError, IncckptError, OptionError, SupersededError
from incckpt.options import check_choice
from incckpt.retention import KeepAll, Policy, steps_kept, undecided
from incckpt.run.checkpoint import read_refs, to_record
from incckpt.run.discards import Discards
from incckpt.run.pipeline import Pipeline
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot, Source
from incckpt.run.space import SpaceGuard
from incckpt.run.writer import Writer
from incckpt.staging.baseline import Baseline
from incckpt.store.gc import Collector
from incckpt.store.lineage import Lineage, Run
from incckpt.store.manifest import Manifest
from incckpt.store.objects import manifest_keys
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store

__all__ = ["Attempt", "IfExists", "Origin", "check_if_exists", "refuse_other_ranks"]

log = logging.getLogger(__name__)


IfExists: TypeAlias = Literal["error", "skip", "replace"]


@dataclass(frozen=True)
class Origin:
    """What an attempt will continue. Making one writes nothing.

    Attributes
    ----------
    lineage
        The run as it was seen.
    history
        The checkpoints that precede the attempt's own, by step.
    manifest
        That of the last of them, if it was read: its objects need not be put again.
    appends
        Whether the attempt continues from whatever is the run's latest checkpoint when it starts, since nothing was
        restored. Otherwise it refuses to start if the run has moved on.
    """

    lineage: Lineage
    history: tuple[RefName, ...]
    manifest: Manifest | None = None
    appends: bool = False

    @classmethod
    def latest(cls, lineage: Lineage) -> Origin:
        """Continue from whatever is the latest checkpoint."""
        return cls(lineage, lineage.live, appends=True)

    @classmethod
    def restored(cls, run: Run, lineage: Lineage, name: RefName, manifest: Manifest | None) -> Origin:
        """Continue from checkpoint `name`, abandoned or not."""
        return cls(lineage, run.ancestry(lineage, name), manifest)

    @classmethod
    def nothing(cls, lineage: Lineage) -> Origin:
        """Start afresh: the run was seen, but nothing was restored from it."""
        return cls(lineage, ())


class Attempt:
    """An attempt at a run: `start` takes the run over from its last writer. Making one writes nothing.

    Parameters
    ----------
    store, run
        The run to write.
    origin
        What the attempt continues.
    policy
        Decides which checkpoints to keep.
    threads
        Threads for hashing and encoding.
    baseline, pipeline
        See `Writer`.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        origin: Origin,
        *,
        policy: Policy | None = None,
        threads: int = 1,
        baseline: Baseline | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.run = run
        self._store = store
        self._run = store.run(run)
        self._origin = origin
        self._policy: Policy = policy or KeepAll()
        self._document = self._run.new_attempt()
        self._history: dict[RefName, Ref | None] = dict.fromkeys(origin.history)  # None: unreadable, or not read yet
        self._abandoned: dict[RefName, Ref | None] = {}
        self._number = 0
        self._collects = False
        self._sweep = False
        self._said: set[str] = set()  # why nothing was pruned; each reason is told once
        self._discards = Discards(store.backend)
        self._writer = Writer(store, self._run, self._discards, threads=threads, baseline=baseline, pipeline=pipeline)
        self._space = SpaceGuard(store.backend)
        self._collector = Collector(store, discard=self._discards.spend)

    @property
    def number(self) -> int:
        """The attempt's number; 0 before it has started."""
        return self._number

    @property
    def latest(self) -> RefName | None:
        """The latest checkpoint; a new one must have a higher step."""
        return max(tuple(self._history), key=lambda name: name.step, default=None)

    @property
    def last_step(self) -> int | None:
        """The step of the latest checkpoint."""
        latest = self.latest
        return None if latest is None else latest.step

    def holds(self, step: int) -> bool:
        """Whether this attempt has a checkpoint of `step`, its own or one that it continues."""
        return any(name.step == step for name in tuple(self._history))

    def existing(self, step: int) -> Ref | None:
        """Return this attempt's checkpoint of `step`, unless it was pruned (one request).

        Raises
        ------
        CorruptionError, FormatError
            If its ref is unreadable.
        StoreNotFoundError, StoreReplacedError
            If the store is gone.
        """
        for name in tuple(self._history):
            if name.step == step:
                found = self._run.read(name)  # the store may have been removed since
                if isinstance(found, Ref):
                    return found
                self._store.check_unchanged()
        return None

    # -- the beginning

    def start(self) -> None:
        """Take the run over and record what this attempt continues, unless that is already done.

        Raises
        ------
        SupersededError
            If the run has moved on since it was restored; nothing was saved, and nothing of the run is abandoned.
        StoreNotFoundError, StoreReplacedError, CorruptionError
            If the store or the lineage is gone.
        BackendError
            If the store failed; calling this again continues.
        """
        if self._number:
            return
        origin, store = self._origin, self._store
        store.create()  # which finds out whether it is the store that was restored from
        if not origin.appends:
            self._run.standing(origin.lineage)  # refuse before anything stops the run's writer
        # Killed writers leave pins, killed collectors lists: sweep once after the first commit.
        self._sweep |= bool(store.condemned.read())
        # Without exclusive creation a save taken for dead cannot be stopped, so nothing may be collected.
        self._collects = store.backend.exclusive
        number, unfinished = self._run.start_attempt(self._document, None if origin.appends else origin.lineage.attempt)
        self._sweep |= unfinished
        history, abandoned = self._chosen()
        self._run.seal(
            number,
            [ref or name for name, ref in history.items()],
            [ref or name for name, ref in abandoned.items()],
        )
        self._history, self._abandoned = history, abandoned
        self._writer.begin(number, takes_up=unfinished)
        self._continue_latest()
        self._number = number

    def _chosen(self) -> tuple[dict[RefName, Ref | None], dict[RefName, Ref | None]]:
        """Return what the attempt continues, and what it abandons; call it after aborting the saves of others."""
        lineage, history = self._origin.lineage, self._origin.history
        if self._origin.appends:
            lineage = self._run.lineage(twice=True)
            return self._read(lineage, lineage.live), self._read(lineage, lineage.abandoned)
        standing = self._run.standing(lineage)
        inherited = [name for name in history if name in standing]
        left = [name for name in (*lineage.live, *lineage.abandoned) if name in standing and name not in inherited]
        return self._read(lineage, inherited), self._read(lineage, left)

    def _continue_latest(self) -> None:
        """Let the writer reuse objects of the checkpoint that the attempt continues, as long as its ref lives."""
        name = max(self._history, key=lambda name: name.step, default=None)
        if not self._origin.appends:
            name = self._origin.history[-1] if self._origin.history else None
        if name is None:
            return
        manifest = self._origin.manifest
        if manifest is None:
            ref = self._history.get(name)
            manifest = None if ref is None else self._manifest_if_readable(ref)
        if manifest is not None:
            self._writer.continue_from(name, manifest)

    def _read(self, lineage: Lineage, names: Sequence[RefName]) -> dict[RefName, Ref | None]:
        """Return the refs that still exist; ``None`` for an unreadable one, which stays in the lineage by name."""
        unreadable: dict[RefName, Ref | None] = {}

        def skip(name: RefName, error: Exception) -> None:
            unreadable[name] = None
            log.error("the ref of step %d is unreadable; delete that step to get rid of it: %s", name.step, error)

        return {ref.name: ref for ref in read_refs(self._run, lineage, names, skip)} | unreadable

    def _manifest_if_readable(self, ref: Ref) -> Manifest | None:
        try:
            return self._store.manifest(ref)
        except ValueError as error:
            log.warning("the next save stores everything, since step %d cannot be continued: %s", ref.step, error)
            return None

    # -- checkpoints

    def check_step(self, step: int, if_exists: IfExists = "error", pending: Collection[int] = ()) -> None:
        """Check that a checkpoint of `step` can be saved after those in the queue, of the steps `pending`.

        Raises
        ------
        OptionError
        """
        RefName.new(self._number, step)
        last = max((one for one in (self.last_step, *pending) if one is not None), default=None)
        if last is None or step > last:
            return
        where = f"run {self._run.name!r} at {self._store.backend.url}"
        there = step in pending or self.holds(step)
        if there and if_exists == "replace":
            return
        if there:
            raise OptionError(
                f"{where} has a checkpoint of step {step} already; give if_exists='replace' to replace it or 'skip' to "
                "keep it, restore an earlier step to go on from there, or save to another run"
            )
        raise OptionError(
            f"{where} is at step {last} already; step {step} is not beyond it. Restore an earlier step to go on from "
            "there, or save to another run"
        )

    def write(self, snapshot: Snapshot | Source, report: SaveReport, if_exists: IfExists = "error") -> Ref:
        """Write and commit a checkpoint, then prune and collect.

        Parameters
        ----------
        if_exists
            With ``"replace"``, an existing checkpoint of the step expires once the new one is committed.

        Raises
        ------
        SupersededError, BackendError
            If the checkpoint was not committed. Errors of pruning and collecting are only logged; the next save
            continues both.
        OptionError
            If the step is not higher than the last one, and replaces none.
        """
        self.start()
        replaces = if_exists == "replace"
        for ref, manifest in self._writer.settle_commits():
            # A save reported as failed was committed after all.
            took_the_place = self.holds(ref.step)
            self._take_up(ref, manifest)
            wanted = took_the_place or (replaces and ref.step == snapshot.step)
            if ref.step >= snapshot.step and not wanted:
                self._expire([ref.name])
        self.check_step(snapshot.step, if_exists)
        try:
            if isinstance(snapshot, Snapshot):
                contents = [*snapshot.contents, *snapshot.packed.contents]
                self._space.check(snapshot.step, contents, first=not self._history)
            ref, manifest = self._writer.write(self._after_the_replaced(snapshot), report)
        except SupersededError:
            self._leave()
            raise
        except BackendError as error:
            if error.errno in FULL:
                self._free_wasted()
            raise
        self._take_up(ref, manifest)
        with self._store.backend.freeing():
            self._tidy(ref.step)
        self._space.learn(report)
        return ref

    def _after_the_replaced(self, snapshot: Snapshot | Source) -> Snapshot | Source:
        """Return the snapshot with a later time than the checkpoint it replaces; readers rely on that order."""
        times = [ref.time for ref in self._history.values() if ref is not None and ref.step == snapshot.step]
        return replace(snapshot, time=max([snapshot.time, *(math.nextafter(time, math.inf) for time in times)]))

    def _take_up(self, ref: Ref, manifest: Manifest) -> None:
        for name in [name for name in self._history if name.step == ref.step]:
            self._abandoned[name] = self._history.pop(name)  # replaced: pruned next
        self._history[ref.name] = ref
        self._collector.note(self._run.ref_key(ref.name), manifest_keys(manifest) | {ref.manifest})

    def _leave(self) -> None:
        """Leave the run to its new writer, and condemn the objects that this one wasted."""
        if self._condemn_wasted():
            self._discards.delete_spent()

    def give_up(self) -> None:
        """After a failed save of several processes: condemn what is known of it, unpin it, and sweep next time."""
        self._sweep = True
        self._leave()

    def _condemn_wasted(self) -> bool:
        try:
            self._collector.condemn_keys(self._discards.wasted)
        except BackendError as error:
            log.warning("could not condemn the objects of failed saves; their pins stay until that works: %s", error)
            return False
        self._discards.note_condemned()
        return True

    def _free_wasted(self) -> None:
        """Delete the objects of a save that found the store full, to make room for the next one."""
        with self._store.backend.freeing():
            try:
                if self._condemn_wasted():
                    self._discards.delete_spent()
                    self._collect()
            except IncckptError as error:
                log.warning("could not free what failed saves have put: %s", error)

    def _tidy(self, step: int) -> None:
        if not self._condemn_wasted():
            return
        try:
            self._prune(step)
            self._collect()
        except Exception as error:  # the checkpoint is committed: announce it, whatever went wrong since
            message = "pruning or collecting after step %d failed; nothing needed was touched: %s"
            log.warning(message, step, error, exc_info=None if isinstance(error, IncckptError) else error)
        self._discards.spend(self._run.take_tombstones())
        self._discards.delete_spent()

    def _prune(self, step: int) -> None:
        """Expire what the policy does not keep, and abandoned checkpoints up to `step`."""
        kept = self._kept()
        doomed = [name for name in self._history if kept is not None and name.step not in kept | {step}]
        doomed += [name for name in self._abandoned if name.step <= step]
        self._expire(doomed)

    def _kept(self) -> set[int] | None:
        """Return the steps that the policy keeps; warn and return ``None`` if that is unknown."""
        unreadable = sorted(name.step for name, ref in self._history.items() if ref is None)
        if unreadable:
            steps = ", ".join(map(str, unreadable))
            self._say_once("unreadable", f"delete step {steps}, which cannot be read")
            return None
        refs = [ref for ref in self._history.values() if ref is not None]
        history = [to_record(ref) for ref in sorted(refs, key=lambda ref: ref.step)]
        try:
            kept = steps_kept(self._policy, history)
            reason = undecided(self._policy, history)
        except Exception as error:  # noqa: BLE001 -- a policy is anybody's code; the checkpoint is committed
            self._say_once("policy", f"the retention policy failed: {error!r}")
            return None
        if reason is not None:
            self._say_once("undecided", reason)
        return kept

    def _say_once(self, what: str, reason: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning("run %r: nothing is pruned for now: %s", self._run.name, reason)

    def _expire(self, doomed: Sequence[RefName]) -> None:
        if not doomed:
            return
        self._run.check_not_superseded(self._number)
        try:
            # List first: if this process is killed in between, the list tells the next attempt of the garbage.
            if self._collects:
                self._collector.condemn([self._run.ref_key(name) for name in doomed])
        except CollectionError as error:
            self._sweep = True
            log.warning("pruning without collecting for now: %s", error)
        self._run.expire(doomed)
        self._collector.expired([self._run.ref_key(name) for name in doomed])
        for name in doomed:
            self._history.pop(name, None)
            self._abandoned.pop(name, None)

    def _collect(self) -> None:
        if self._sweep:
            self._discards.delete_spent()  # a sweep would wait for the pins of failed saves
        if not self._collects:
            return
        collected = self._collector.sweep() if self._sweep else self._collector.finish()
        self._sweep = False
        self._writer.forget(collected.deleted)

    def delete(self, step: int) -> bool:
        """Delete all checkpoints of `step`, even unreadable and abandoned ones; return whether there were any.

        An attempt that has not started takes the run over only if it has seen such a checkpoint.

        Raises
        ------
        SupersededError
            See `start`.
        BackendError, CollectionError
            If something could not be deleted; a later save collects the rest.
        """
        if not self._number and not self._origin.lineage.at(step):
            return False
        self.start()
        names = [name for name in (*self._history, *self._abandoned) if name.step == step]
        self.delete_all(names)
        return bool(names)

    def delete_all(self, names: Collection[RefName]) -> None:
        """Delete these checkpoints, and collect once for all of them; those that are gone already do not matter.

        Raises
        ------
        SupersededError, BackendError, CollectionError
            See `delete`.
        """
        self.start()
        self._expire(sorted(name for name in (*self._history, *self._abandoned) if name in names))
        try:
            self._collect()
        finally:
            if self._condemn_wasted():
                self._discards.delete_spent()

    def interrupt(self) -> None:
        """End a save under way in another thread early, with `KeyboardInterrupt`, unless it is nearly over."""
        self._writer.interrupt()

    def close(self) -> None:
        """Stop the threads."""
        self._writer.close()


def refuse_other_ranks() -> None:
    """Refuse to write to a run without a given name on ranks other than 0: all ranks would write to the same run.

    Raises
    ------
    DistributedError
        On ranks other than 0 of a ``torch.distributed`` job.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        rank = dist.get_rank()
        raise DistributedError(
            f"rank {rank} of a torch.distributed job would write to the same run as rank 0. Save on rank 0 alone, if "
            f"its state is whole; or give each rank a run of its own, as run='rank{rank}' or '#rank{rank}' in the URL. "
            "To read on every rank, pass read_only=True. For sharded state there is "
            "incckpt.integrations.dcp.DistributedCheckpointManager"
        )


def check_if_exists(if_exists: str) -> None:
    """Check that the argument is an `IfExists`.

    Raises
    ------
    OptionError
        If it is not.
    """
    check_choice("if_exists", if_exists, get_args(IfExists))
