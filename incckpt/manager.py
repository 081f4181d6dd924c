"""`CheckpointManager`: the checkpoints of one run, saved in the background, restored in place, pruned by policy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self, SupportsIndex, get_args

from incckpt.backends.base import Backend
from incckpt.errors import IncckptError, OptionError, ReadOnlyError
from incckpt.options import check_choice, checked_flag
from incckpt.preemption.preemption import Preemption, chosen_preemption
from incckpt.retention import Mode, Policy, policy_of
from incckpt.run.attempt import IfExists, check_if_exists, refuse_other_ranks
from incckpt.run.cadence import Cadence, Every, cadence_of
from incckpt.run.calls import OneAtATime, one_at_a_time
from incckpt.run.checkpoint import Checkpoint, checked_metrics
from incckpt.run.choose import Which, not_found
from incckpt.run.pending import OnBacklog, PendingSaves, resolved
from incckpt.run.position import Position
from incckpt.run.report import SaveReport
from incckpt.run.restore import MapLocation, load_state, restore_into
from incckpt.run.snapshot import Snapshot, stage
from incckpt.run.view import RunView
from incckpt.staging.baseline import Baseline
from incckpt.staging.detect import chosen_threads
from incckpt.staging.layout import DEFAULT_CHUNK_BYTES
from incckpt.staging.threshold import Thresholds
from incckpt.state.selection import Patterns
from incckpt.store.location import locate
from incckpt.store.refs import checked_step
from incckpt.store.store import Store
from incckpt.threads import Future
from incckpt.tiers.local import LocalTier, Tier, local_tier
from incckpt.tiers.position import TieredPosition
from incckpt.tiers.view import TieredView

__all__ = ["CheckpointManager"]

log = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run.

    >>> with incckpt.CheckpointManager("s3://bucket/exp7", keep_last_n=5) as manager:   # doctest: +SKIP
    ...     app = {"model": model, "optimizer": optimizer}
    ...     start = manager.restore(app)
    ...     for step in range((start or 0) + 1, steps + 1):
    ...         loss = train_step()
    ...         if step % 100 == 0:
    ...             manager.save(step, app, metrics={"loss": loss})

    Parameters
    ----------
    url
        Of the store; a path is a local directory. A fragment names the run, as in ``s3://bucket/sweep#lr3e-4``. Or a
        `Backend`, which is closed with the manager.
    run
        Name of the run, in place of the fragment; ``"default"`` where neither is given.
    local
        A folder on a local disk, or a `LocalTier`. Saves go there, and are copied to `url` in the background; restores
        take the newest checkpoint that either has.
    keep_last_n, keep_best_n, metric, mode
        Which checkpoints to keep: the last `keep_last_n`, and the `keep_best_n` with the lowest (``mode="min"``) or
        highest (``"max"``) value of `metric`. All of them where neither is given, and until `keep_best_n` checkpoints
        have a number for the metric.
    retention
        A policy in place of those four, see :mod:`incckpt.retention`.
    save_every
        How often `due` says to save: a number of steps, a `timedelta`, ``"auto"``, or a `Cadence` that says more.
    max_pending
        Saves that may wait in the background; the next one blocks.
    on_backlog
        ``"wait"``, or ``"skip"``: the save is not made, and its future raises `BacklogFullError`.
    threads
        For comparing, copying, hashing and coding; by default all cores that this process may use.
    chunk_bytes
        Size of the chunks that large tensors are cut into, a multiple of 1 MiB.
    threshold
        How far a floating-point tensor may move, relative to what is stored of it (L2 norm), before it is stored again:
        a number, or numbers by glob of the dotted name. 0 is exact, bit for bit.
    delta
        Whether a changed chunk may be stored as its difference from the last full copy. Lossless, several times
        smaller in most training, and at most one more object to read per chunk. Not used with a threshold.
    base
        Whether to keep a copy of the state in host memory to compare with. Without it every save copies everything.
    allow_pickle
        Whether to pickle what cannot be represented otherwise; has to be repeated at restore.
    read_only
        For evaluators: `restore`, `load` and `checkpoints` work, `save` and `delete` are refused.
    verify
        Whether to check the digests of all that is read. What becomes the base of later saves is checked in any case.
    max_bytes
        Most memory that `restore` and `load` may take for a state besides that of its target, or for one object; by
        default what is available, or what the environment variable ``INCCKPT_MAX_BYTES`` says.
    preemption
        Whether to watch for what announces the end of this process: ``True`` for ``SIGTERM``, or a `Preemption` that
        says what else. See `preempted` and `deadline`.
    storage_options
        For fsspec.

    Raises
    ------
    OptionError
        If an argument is not usable.
    DistributedError
        On ranks other than 0 of a ``torch.distributed`` job, unless `read_only` or given a run of their own by name.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Backend,
        *,
        run: str | None = None,
        local: str | os.PathLike[str] | LocalTier | None = None,
        keep_last_n: int | None = None,
        keep_best_n: int | None = None,
        metric: str | None = None,
        mode: Mode = "min",
        retention: Policy | None = None,
        save_every: Every | Cadence | None = None,
        max_pending: int = 2,
        on_backlog: OnBacklog = "wait",
        threads: int | None = None,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        threshold: float | Mapping[str, float] = 0.0,
        delta: bool = True,
        base: bool = True,
        allow_pickle: bool = False,
        read_only: bool = False,
        verify: bool = True,
        max_bytes: int | None = None,
        preemption: bool | Preemption = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        location = locate(url, run=run)
        location.check_whole_run()
        flags = {"delta": delta, "base": base, "allow_pickle": allow_pickle, "read_only": read_only}
        for option, value in flags.items():
            checked_flag(option, value)
        if not (read_only or location.named):
            refuse_other_ranks()
        self.read_only = read_only
        self._cadence = cadence_of(save_every)
        policy = policy_of(keep_last_n, keep_best_n, metric, mode, retention)
        threads = chosen_threads(threads)
        self._allow_pickle = allow_pickle
        watch = self._preemption = chosen_preemption(preemption)
        self._saves = PendingSaves(
            location.run, max_pending=max_pending, on_backlog=on_backlog, deadline=lambda: watch.deadline
        )
        thresholds = Thresholds(threshold)
        if thresholds.active and not base:
            raise OptionError("a threshold needs base=True: a copy of what is stored, to compare with")
        self._base = Baseline(
            chunk_bytes,
            keep=base and not read_only,
            delta=delta and not thresholds.active,
            threads=threads,
            thresholds=thresholds,
        )
        self._store = (
            Store(url, max_bytes=max_bytes)
            if isinstance(url, Backend)
            else Store.open(location.store, storage_options, max_bytes=max_bytes)
        )
        view = RunView(self._store, location.run, threads=threads, verify=verify, metric=metric, mode=mode)
        self._view: RunView | TieredView = view
        if local is None:
            self._position: Position | TieredPosition = Position(
                self._store, view, policy=policy, threads=threads, baseline=self._base, read_only=read_only
            )
        else:
            self._position = TieredPosition(
                local_tier(local), self._store, view, policy=policy, threads=threads, baseline=self._base,
                read_only=read_only, verify=verify, max_bytes=max_bytes, metric=metric, mode=mode,
                deadline=lambda: watch.deadline,
            )  # fmt: skip
            self._view = self._position.view
        self._calls = OneAtATime(self._saves.works_here)
        wakes = self._saves.wake, self._position.wake
        self._wake = lambda: [wake() for wake in wakes]  # no cycle: what is dropped is freed at once
        self._preemption.start(self._wake)

    # -- restoring

    @one_at_a_time
    def restore(
        self,
        app: Any,
        step: Which | None = None,
        *,
        keys: Patterns = None,
        ignore: Patterns = None,
        progress: bool | None = None,
    ) -> int | None:
        """Restore a checkpoint into `app`, in place, and go on from it.

        Nothing is written, and no other process is disturbed, until the first `save`, which goes on from here.
        That save abandons checkpoints beyond the step restored. They can still be restored by step, until the run
        has passed their steps and prunes them.

        Parameters
        ----------
        app
            A dict or list of modules, optimizers, other objects with ``load_state_dict``, tensors and plain values.
        step
            A step, ``"latest"`` (the default) or ``"best"``.
        keys, ignore
            Globs of dotted names, as ``"model.*"``: only what `keys` match is restored, not what `ignore` matches.
        progress
            Whether to show a progress bar; by default if a terminal watches.

        Returns
        -------
        int or None
            The step restored; ``None`` if the run has no checkpoint yet and no step was asked for.

        Raises
        ------
        StoreNotFoundError, CheckpointNotFoundError
            If the step asked for is not there.
        CorruptionError
            If the checkpoint is damaged. Without `step`, earlier ones are tried first.
        StateMismatchError
            If the checkpoint does not fit `app`, or `app` cannot be written to: nothing was touched.
        """
        self.wait()
        found = self._position.read(
            step,
            lambda reader, manifest: restore_into(
                reader, manifest, app, base=self._base, keys=keys, ignore=ignore, allow_pickle=self._allow_pickle,
                progress=progress,
            ),
        )  # fmt: skip
        self._saves.carry_over(self._position.took)
        return None if found is None else found[0].step

    @one_at_a_time
    def load(
        self,
        step: Which | None = None,
        *,
        keys: Patterns = None,
        map_location: MapLocation = None,
        progress: bool | None = None,
    ) -> Any:
        """Return the state of a checkpoint in new memory, and go on from it, as `restore` does.

        Parameters
        ----------
        step
            A step, ``"latest"`` (the default) or ``"best"``.
        keys, map_location, progress
            As for `incckpt.load`.

        Raises
        ------
        StoreNotFoundError, CheckpointNotFoundError
            If there is no store, no checkpoint in it, or no such step.
        CorruptionError
            If the checkpoint is damaged. Without `step`, earlier ones are tried first.
        StateMismatchError
            If `keys` match nothing.

        Examples
        --------
        >>> import incckpt, tempfile, torch
        >>> with incckpt.CheckpointManager(tempfile.mkdtemp()) as manager:
        ...     _ = manager.save(1, {"w": torch.zeros(2)})
        ...     manager.load()
        {'w': tensor([0., 0.])}
        """
        self.wait()
        found = self._position.read(
            step,
            lambda reader, manifest: load_state(
                reader, manifest, keys=keys, map_location=map_location, allow_pickle=self._allow_pickle,
                progress=progress,
            ),
        )  # fmt: skip
        if found is None:
            self._store.check()
            raise not_found(self._view.run)
        self._saves.carry_over(self._position.took)
        self._base.forget()
        return found[1]

    # -- saving

    @one_at_a_time
    def save(
        self,
        step: SupportsIndex,
        app: Any,
        metrics: Mapping[str, float] | None = None,
        *,
        if_exists: IfExists = "error",
    ) -> Future[Checkpoint]:
        """Save a checkpoint; return when the state may change again.

        The first save takes the run over: another process that writes it gets `SupersededError` at its next one. If
        the run has moved on since it was restored here, it is this save that gets it, and the other is not disturbed.

        Parameters
        ----------
        step
            Beyond that of the run's latest checkpoint, unless it replaces one.
        app
            Any state, see :mod:`incckpt.state.flatten`.
        metrics
            Metrics of this checkpoint; retention and ``"best"`` use them.
        if_exists
            What to do if the run has a checkpoint of this step: raise an ``"error"``, ``"skip"`` the save (the future
            resolves to that checkpoint), or ``"replace"`` it (the new one is committed before the old one goes).

        Returns
        -------
        Future[Checkpoint]
            Resolves when the checkpoint is durable and committed; raises what went wrong. It can be awaited
            (`asyncio.wrap_future`) and has no effect when cancelled: the save is made.

        Raises
        ------
        SaveError
            If an earlier save failed in the background (once; the state given now is saved by calling again).
        StateError
            If something in the state cannot be saved.
        OptionError
            If the step is not beyond the last, or a metric is not a number.
        SupersededError
            If another process has taken over the run.
        """
        check_if_exists(if_exists)
        if self.read_only:
            raise ReadOnlyError("this manager is read-only; saving needs one without read_only=True")
        self._saves.check(self._store.backend.url)
        step = checked_step(step)
        numbers = checked_metrics(metrics)
        if if_exists == "skip":
            if (pending := self._saves.future(step)) is not None:
                return pending
            if (ref := self._position.existing(step)) is not None:
                return resolved(Checkpoint.of(self._view.run.name, ref))
        self._position.check_step(step, if_exists, self._saves.steps)
        report = SaveReport(step=step)
        if (skipped := self._saves.make_room(report)) is not None:
            return skipped
        make_snapshot = stage(step, app, numbers, report, base=self._base, allow_pickle=self._allow_pickle)
        future = self._saves.put(partial(self._write, make_snapshot, report, if_exists), report)
        if self._cadence is not None:
            self._cadence.saved(report, future)
        return future

    def _write(self, make_snapshot: Callable[[], Snapshot], report: SaveReport, if_exists: IfExists) -> Checkpoint:
        ref = self._position.write(make_snapshot(), report, if_exists)
        self._base.trim(report.changed_bytes)
        return Checkpoint.of(self._view.run.name, ref)

    def due(self, step: SupportsIndex) -> bool:
        """Return whether to save after `step`, by `save_every`. Ask after every step: ``"auto"`` measures them."""
        if self._cadence is None:
            raise OptionError("due() needs a manager with save_every=: 'auto', a number of steps, or a timedelta")
        return self._cadence.due(checked_step(step))

    @one_at_a_time
    def delete(self, step: SupportsIndex) -> bool:
        """Delete the checkpoints of `step`, abandoned and unreadable ones included, and what only they need.

        Returns
        -------
        bool
            Whether there were any.

        Raises
        ------
        SupersededError
            If another process has taken over the run.
        BackendError, CollectionError
            If not everything could be deleted; the next save collects the rest.
        """
        if self.read_only:
            raise ReadOnlyError("this manager is read-only; deleting needs one without read_only=True")
        self.wait()
        return self._position.delete(checked_step(step))

    def wait(self, tier: Tier | None = None) -> None:
        """Wait until no save is pending; failures show at the next `save` or `close`.

        Parameters
        ----------
        tier
            ``"bucket"`` to wait until everything is copied there, too. By default saves are waited for until they are
            durable where they go first: in the local tier, if there is one.
        """
        if tier is not None:
            check_choice("tier", tier, get_args(Tier))
        self._saves.flush()
        if tier == "bucket":
            self._position.finish()

    def flush(self, deadline: float | None = None) -> Checkpoint | None:
        """Finish the pending saves by a deadline: what can be made is made, the newest first of all.

        How long each takes is estimated from earlier ones. If not all can be made, those in between are left out in
        favour of the newest that can; their futures raise `DeadlineError`, and the log tells. What is under way at the
        deadline is given up, and the manager takes no more saves. Whatever was committed before stands. With a local
        tier and a deadline, copying the newest to the bucket is waited for, too.

        Parameters
        ----------
        deadline
            By `time.monotonic`; by default that of an announced preemption, if any, as in `wait` and `close`.

        Returns
        -------
        Checkpoint or None
            The last one made.
        """
        made = self._saves.flush(deadline)
        if deadline is not None or self.preempted:
            self._position.finish(deadline)
        return made

    # -- the end of the process

    @property
    def preempted(self) -> bool:
        """Whether the end of this process was announced (see `Preemption`): save once more, and leave the loop."""
        return self._preemption.preempted

    @property
    def deadline(self) -> float | None:
        """When saves will be given up, by `time.monotonic`, if the process's end was announced; otherwise ``None``."""
        return self._preemption.deadline

    # -- inspecting

    def checkpoints(self, *, abandoned: bool = False) -> list[Checkpoint]:
        """Return the run's committed checkpoints by step, oldest first; those `abandoned` by rewinding if asked."""
        return self._view.checkpoints(abandoned=abandoned)

    @property
    def latest(self) -> Checkpoint | None:
        """The checkpoint with the highest step, as the store has it now; ``None`` if there is none."""
        return self._view.find("latest")

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint by the manager's `metric` and `mode`; ``None`` if none has that metric.

        Raises
        ------
        OptionError
            If the manager was given no metric, and the checkpoints have several.
        """
        return self._view.find("best")

    @property
    def history(self) -> list[SaveReport]:
        """What the last saves of this manager did, oldest first."""
        return list(self._saves.reports)

    @property
    def host_bytes(self) -> tuple[int, int]:
        """Host memory held: bytes in use (the base, and what is in flight), and bytes kept for recycling."""
        return self._base.host_bytes

    # -- closing

    def close(self) -> None:
        """Finish pending saves, and let go of threads and connections. Closing twice is no error.

        Raises
        ------
        SaveError, SupersededError
            If a save failed and no call has reported it yet, or the bucket does not have the newest checkpoint.
        """
        if self._calls.closed or self._calls.forked:  # what there is to let go of is the parent's
            return
        self._close()
        self._saves.raise_failure(self._store.backend.url)

    @one_at_a_time
    def _close(self) -> None:
        with ExitStack() as stack:
            for close in (self._store.close, self._view.close, self._position.close):  # the last one first
                stack.callback(close)
            self._saves.stop()
            copied = self._position.finish(last=True)
            self._preemption.stop(self._wake)
            if self._saves.abandoned or not copied or self.preempted:
                stack.pop_all()  # they are still in use, or there is no time
            self._calls.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except IncckptError as error:
            if exc is None:
                raise
            log.error("while leaving after %r: %s", exc, error)  # the user should see the exception under way

    def __repr__(self) -> str:
        return f"CheckpointManager({self._store.backend.url!r}, run={self._view.run.name!r})"
