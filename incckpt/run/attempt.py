"""One process's tenure as the writer of a run: what it continues, what it commits, prunes and collects. Synchronous."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist

from incckpt.backends.base import FULL
from incckpt.errors import BackendError, CollectionError, DistributedError, IncckptError, OptionError, SupersededError
from incckpt.retention import KeepAll, Policy, steps_kept, undecided
from incckpt.run.checkpoint import read_refs, to_record
from incckpt.run.discards import Discards
from incckpt.run.pipeline import Pipeline
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot
from incckpt.run.writer import Writer
from incckpt.staging.baseline import Baseline
from incckpt.store.gc import Collector
from incckpt.store.lineage import Lineage
from incckpt.store.manifest import Manifest
from incckpt.store.objects import manifest_keys
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store

__all__ = ["Attempt", "refuse_other_ranks"]

log = logging.getLogger(__name__)


class Attempt:
    """A new attempt at a run; starting it takes the run over from whoever wrote it before.

    Once made, `number` is the attempt's, and `lineage` shows what there is to continue; `continue_from` decides,
    and only then can `write` be called.

    Parameters
    ----------
    store, run
        Which run; the store is made if it is not there.
    policy
        Which checkpoints to keep.
    threads
        For hashing and encoding.
    baseline, pipeline
        See `Writer`.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        policy: Policy | None = None,
        threads: int = 1,
        baseline: Baseline | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        store.create()
        self.run = run
        self._store = store
        self._run = store.run(run)
        self._policy: Policy = policy or KeepAll()
        # Killed predecessors leave pins, and collectors lists: then one full sweep after the first commit.
        lists = store.condemned.read()
        self.number, unfinished = self._run.start_attempt()
        self._sweep = unfinished or bool(lists)
        # Without exclusive creation no collector can stop a save that it took for dead: nothing may be collected.
        self._collects = store.backend.exclusive
        self.lineage: Lineage = self._run.lineage()
        self._history: dict[RefName, Ref] = {}
        self._abandoned: dict[RefName, Ref | None] = {}  # None: unreadable
        self._unreadable: set[RefName] = set()
        self._sealed = False
        self._said: set[str] = set()  # why nothing was pruned; each reason is told once
        self._discards = Discards(store.backend)
        self._writer = Writer(
            store, self._run, self.number, self._discards, threads=threads, baseline=baseline, pipeline=pipeline
        )
        self._collector = Collector(store, discard=self._discards.spend)

    @property
    def last_step(self) -> int | None:
        """The step of the lineage's latest checkpoint; the next save's has to be beyond it."""
        return max((name.step for name in (*self._history, *self._unreadable)), default=None)

    def continue_from(self, name: RefName | None, manifest: Manifest | None = None) -> None:
        """Decide what this attempt continues: the lineage up to checkpoint `name`, or nothing.

        Parameters
        ----------
        manifest
            Of that checkpoint, where it was read: what it holds need not be put again.
        """
        assert not self._sealed
        refs = self._read(self.lineage.live)
        earlier = {other: ref for other, ref in refs.items() if name is not None and other.step <= name.step}
        later = {other: ref for other, ref in refs.items() if other not in earlier}
        self._history = {other: ref for other, ref in earlier.items() if ref is not None}
        self._unreadable = {other for other, ref in earlier.items() if ref is None}
        self._abandoned = self._read(self.lineage.abandoned) | later
        self._run.seal(
            self.number,
            [ref or other for other, ref in earlier.items()],
            [ref or other for other, ref in self._abandoned.items()],
        )
        if name is not None:
            if manifest is None and name in self._history:
                manifest = self._manifest_if_readable(self._history[name])
            if manifest is not None:
                self._writer.continue_from(name, manifest)
        self._sealed = True

    def _read(self, names: Sequence[RefName]) -> dict[RefName, Ref | None]:
        """Return the refs that still stand; ``None`` for an unreadable one, which stays in the lineage by its name."""
        unreadable: dict[RefName, Ref | None] = {}

        def skip(name: RefName, error: Exception) -> None:
            unreadable[name] = None
            log.error("the ref of step %d is unreadable; delete that step to be rid of it: %s", name.step, error)

        return {ref.name: ref for ref in read_refs(self._run, self.lineage, names, skip)} | unreadable

    def _manifest_if_readable(self, ref: Ref) -> Manifest | None:
        try:
            return self._store.manifest(ref)
        except ValueError as error:
            log.warning("the next save stores everything, since step %d cannot be continued: %s", ref.step, error)
            return None

    def check_step(self, step: int, last: int | None) -> None:
        """Check that a checkpoint of `step` can follow one of step `last`.

        Raises
        ------
        OptionError
        """
        RefName.new(self.number, step)
        if last is not None and step <= last:
            raise OptionError(
                f"run {self._run.name!r} at {self._store.backend.url} is at step {last} already; step {step} is not "
                "beyond it. Restore an earlier step to go on from there, or save to another run"
            )

    def write(self, snapshot: Snapshot, report: SaveReport) -> Ref:
        """Write and commit a checkpoint, then prune and collect.

        Raises
        ------
        SupersededError, BackendError
            If the checkpoint was not committed. Trouble with pruning or collecting is logged; the next save goes on.
        """
        assert self._sealed
        for ref, manifest in self._writer.settle_commits():
            # An earlier save that was said to have failed is there after all.
            self._take_up(ref, manifest)
            if ref.step >= snapshot.step:
                self._expire([ref.name])
        self.check_step(snapshot.step, self.last_step)
        try:
            ref, manifest = self._writer.write(snapshot, report)
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
        return ref

    def _take_up(self, ref: Ref, manifest: Manifest) -> None:
        self._history[ref.name] = ref
        self._collector.note(self._run.ref_key(ref.name), manifest_keys(manifest) | {ref.manifest})

    def _leave(self) -> None:
        """Leave the run to its new writer, with a list of what this one has put for nothing."""
        if self._condemn_wasted():
            self._discards.delete_spent()

    def _condemn_wasted(self) -> bool:
        try:
            self._collector.condemn_keys(self._discards.wasted)
        except BackendError as error:
            log.warning("could not tell what failed saves have put; their pins stay for now, as a sign: %s", error)
            return False
        self._discards.note_condemned()
        return True

    def _free_wasted(self) -> None:
        """Delete what a save has put that found the store full: it would be in the next one's way."""
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
        except Exception as error:  # whatever it is: the checkpoint is committed, and has to be announced
            message = "pruning or collecting after step %d failed; nothing needed was touched: %s"
            log.warning(message, step, error, exc_info=None if isinstance(error, IncckptError) else error)
        self._discards.spend(self._run.take_tombstones())
        self._discards.delete_spent()

    def _prune(self, step: int) -> None:
        """Expire what the policy does not keep, and what was abandoned and is passed by now."""
        kept = self._kept()
        doomed = [ref.name for ref in self._history.values() if kept is not None and ref.step not in kept | {step}]
        doomed += [name for name in self._abandoned if name.step <= step]
        self._expire(doomed)

    def _kept(self) -> set[int] | None:
        """Return the steps that the policy keeps; ``None``, and a word in the log, where it cannot be told."""
        if self._unreadable:
            steps = ", ".join(str(name.step) for name in sorted(self._unreadable))
            self._say_once("unreadable", f"delete step {steps}, which cannot be read")
            return None
        history = [to_record(ref) for ref in self._history.values()]
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
        self._run.check_not_superseded(self.number)
        try:
            # Before they are expired: killed in between, the list tells the next attempt that there is garbage.
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
        self._unreadable.difference_update(doomed)

    def _collect(self) -> None:
        if self._sweep:
            self._discards.delete_spent()  # the pins of failed saves would be waited for
        if not self._collects:
            return
        collected = self._collector.sweep() if self._sweep else self._collector.finish()
        self._sweep = False
        self._writer.forget(collected.deleted)

    def delete(self, step: int) -> bool:
        """Delete the checkpoints of `step`, readable or not, abandoned ones included; return whether there were any.

        Raises
        ------
        BackendError, CollectionError
            If not everything could be deleted; a later save collects the rest.
        """
        names = {name for name in (*self._history, *self._abandoned) if name.step == step}
        names |= {name for name in self._unreadable if name.step == step}
        self._expire(sorted(names))
        try:
            self._collect()
        finally:
            if self._condemn_wasted():
                self._discards.delete_spent()
        return bool(names)

    def close(self) -> None:
        """Let go of threads."""
        self._writer.close()


def refuse_other_ranks() -> None:
    """Refuse to write to a run that every process of a job would write to: one whose name none of them has given.

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
            "To read on every rank, pass read_only=True. Sharded state is not supported yet"
        )
