"""Where a process stands in a run of two tiers: it saves to the local one, and that is copied to the bucket."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TypeVar

from incckpt.errors import (
    BackendError,
    CheckpointNotFoundError,
    CorruptionError,
    DeadlineError,
    FormatError,
    IncckptError,
    OptionError,
    ReadOnlyError,
    StoreNotFoundError,
    SupersededError,
)
from incckpt.retention import KeepLast, Mode, Policy, Union
from incckpt.run.attempt import IfExists, Origin
from incckpt.run.choose import Which, checked_which, place
from incckpt.run.position import Position
from incckpt.run.reader import Reader
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot
from incckpt.run.transfer import Transfer
from incckpt.run.view import RunView
from incckpt.staging.baseline import Baseline
from incckpt.store.lineage import Lineage
from incckpt.store.location import locate
from incckpt.store.manifest import Manifest
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store
from incckpt.tiers.copies import Copies, PendingCopy
from incckpt.tiers.follows import Follows
from incckpt.tiers.local import LocalTier
from incckpt.tiers.view import Sight, TieredView, check_apart

__all__ = ["TieredPosition"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_LOST = (BackendError, StoreNotFoundError, CorruptionError, FormatError, ReadOnlyError)
"""What the local tier may fail with that the bucket can make up for."""


class TieredPosition:
    """Where a process stands in its run, in both tiers; does what `Position` does.

    Parameters
    ----------
    tier
        The local tier.
    store, bucket_view
        The bucket, and its run.
    policy
        What to keep in the bucket.
    threads, baseline, read_only
        See `Position`.
    verify, max_bytes, metric, mode
        For the local tier, as for the bucket.
    deadline
        See `Copies`.

    Raises
    ------
    OptionError
        If both tiers are one.

    Attributes
    ----------
    view
        The run as both tiers have it.
    copies
        What is on its way to the bucket.
    took
        See `Position`.
    """

    def __init__(
        self,
        tier: LocalTier,
        store: Store,
        bucket_view: RunView,
        *,
        policy: Policy | None,
        threads: int,
        baseline: Baseline,
        read_only: bool,
        verify: bool,
        max_bytes: int | None,
        metric: str | None,
        mode: Mode,
        deadline: Callable[[], float | None] = lambda: None,
    ) -> None:
        run = bucket_view.run.name
        self._store = store
        self._local_store = Store.open(locate(tier.path).store, max_bytes=max_bytes)
        check_apart(self._local_store.backend.url == store.backend.url, store)
        local_view = RunView(self._local_store, run, threads=threads, verify=verify, metric=metric, mode=mode)
        self.view = TieredView(self._local_store, local_view, store, bucket_view, metric, mode)
        self.copies = Copies(
            self._copy, bucket=store.backend.url, run=run, max_pending=tier.max_pending, deadline=deadline
        )
        kept = Union((tier.retention or KeepLast(tier.keep_last_n), self.copies.keep))
        self._local = Position(
            self._local_store, local_view, policy=kept, threads=threads, baseline=baseline, read_only=read_only
        )
        self._bucket = Position(
            store, bucket_view, policy=policy, threads=threads, baseline=baseline, read_only=read_only
        )
        self.took: tuple[int, float, float] | None = None
        self._read_only = read_only
        self._lost = False  # the local tier, so that saves go to the bucket
        self._begun = False  # whether the local tier says what it goes on from
        self._sight: Sight | None = None
        self._restored: RefName | None = None  # of the local tier, and not in the bucket
        self._step = -1  # that was restored
        self._follows: Follows | None = None
        self._placing = threading.Lock()

    # -- reading

    def read(self, step: Which | None, read: Callable[[Reader, Manifest], _T]) -> tuple[RefName, _T] | None:
        """Read a checkpoint, and go on from it; return its name and what `read` made of it.

        Without `step` it is the newest that is sound in a tier; ``None`` if there is none. What the bucket has and does
        not give, since it cannot be reached, is not passed over for an earlier one: that would abandon it.
        """
        wanted = checked_which(step)
        self._finish_copying()
        sight = self.view.look()
        candidates = self.view.candidates(sight, wanted)
        failed: IncckptError | None = None
        for is_local, name in candidates:
            try:
                lineage, found = self.view.read(is_local, name, read, continues=not self._read_only)
            except (CorruptionError, CheckpointNotFoundError, StoreNotFoundError, BackendError) as error:
                if not isinstance(wanted, RefName):
                    log.error("step %d of the %s: %s", name.step, "local tier" if is_local else "bucket", error)
                if isinstance(error, BackendError) and not is_local:
                    raise
                failed = failed or error
                continue
            if not self._read_only:
                self._go_on_from(sight, is_local, lineage, found[0], found[1])
            self.took = found[1].took
            return found[0], found[2]
        if failed is not None:
            raise failed
        if not self._read_only:
            self._local.go_on_from(Origin.nothing(sight.local))
            assert sight.bucket is not None
            self._bucket.go_on_from(Origin.nothing(sight.bucket))
            self._note(sight, -1)
        return None

    def _go_on_from(self, sight: Sight, is_local: bool, lineage: Lineage, name: RefName, manifest: Manifest) -> None:
        own, view = (self._local, self.view.local) if is_local else (self._bucket, self.view.bucket)
        own.go_on_from(Origin.restored(view.run, lineage, name, manifest))
        if not is_local:
            self._local.go_on_from(_up_to(sight.local, name.step))
        elif sight.bucket is not None:
            self._bucket.go_on_from(_up_to(sight.bucket, name.step))
        self._note(sight, name.step)
        if is_local and not self._bucket_holds(name.step):
            self._restored = name

    def _note(self, sight: Sight, step: int) -> None:
        self._sight, self._follows, self._step = sight, sight.follows, step
        self._restored, self._begun, self._lost = None, False, False

    def _bucket_holds(self, step: int) -> bool:
        return self._sight is not None and self._sight.bucket is not None and self._bucket.holds(step)

    # -- writing

    def existing(self, step: int) -> Ref | None:
        """Return the checkpoint of `step` that a tier has; see `Attempt.existing`."""
        found = self._try_local(lambda: self._local.existing(step))
        if found is None and (self._lost or self._bucket.placed):
            found = self._bucket.existing(step)
        return found

    def check_step(self, step: int, if_exists: IfExists, pending: Collection[int]) -> None:
        """Check that a checkpoint of `step` can be saved; see `Attempt.check_step`.

        Raises
        ------
        SupersededError, OptionError
            Also if the bucket takes no copies of this manager's checkpoints any more.
        """
        self.copies.raise_superseded()
        self._try_local(lambda: self._local.check_step(step, if_exists, pending))
        if self._lost:
            self._place_in_bucket()
            self._bucket.check_step(step, if_exists, pending)
        elif self._bucket.placed and step not in pending and not self._local.holds(step):
            self._bucket.check_step(step, "error", ())

    def write(self, snapshot: Snapshot, report: SaveReport, if_exists: IfExists) -> Ref:
        """Write and commit a checkpoint, and let it be copied; see `Attempt.write`."""
        ref = self._try_local(lambda: self._write_locally(snapshot, report, if_exists))
        if ref is not None:
            report.reached("local")
            self._count("local", report, report)
            self.copies.add(PendingCopy(ref, report, if_exists))
            return ref
        report.tier("local").state = "failed"
        self.copies.drop()
        self._place_in_bucket()
        ref = self._bucket.write(snapshot, report, if_exists)
        report.reached("bucket")
        self._count("bucket", report, report)
        return ref

    def _write_locally(self, snapshot: Snapshot, report: SaveReport, if_exists: IfExists) -> Ref:
        if not self._begun:
            self._local.take_over()
            if self._sight is not None and self._sight.bucket is not None:
                self._put_follows(_followed(self._sight.bucket, self._follows, self._store))
                self._go_back(self._sight.bucket)
            self._begun = True
        if self._restored is not None:
            name, self._restored = self._restored, None
            found = self.view.local.run.read(name)
            if isinstance(found, Ref):
                self.copies.add(PendingCopy(found, SaveReport(step=name.step), "skip"))
        return self._local.write(snapshot, report, if_exists)

    def _go_back(self, bucket: Lineage) -> None:
        """If this goes on from an earlier checkpoint than the bucket's latest, abandon that there before anything else.

        Otherwise a restart before the first copy would find the later step in the bucket, and go on from that.
        """
        if bucket.latest == self._bucket.latest:
            return
        try:
            self._take_bucket_over()
        except BackendError as error:
            log.warning("%s cannot be reached; until it can, step %d counts there: %s",
                        self._store.backend.url, 0 if bucket.latest is None else bucket.latest.step, error)  # fmt: skip

    def _try_local(self, act: Callable[[], _T]) -> _T | None:
        """Do something with the local tier, unless it is lost, or turns out to be."""
        if self._lost:
            return None
        try:
            return act()
        except _LOST as error:
            self._lost = True
            log.error(
                "the local tier at %s is full or lost; saves go to %s alone from now on: %s",
                self._local_store.backend.url, self._store.backend.url, error,
            )  # fmt: skip
            return None

    @staticmethod
    def _count(tier: str, report: SaveReport, put: SaveReport) -> None:
        found = report.tier(tier)
        found.put_objects, found.put_bytes = put.put_objects, put.put_bytes

    def delete(self, step: int) -> bool:
        """Delete the checkpoints of `step` in both tiers; see `Attempt.delete`."""
        self._finish_copying()
        found = self._try_local(lambda: self._local.delete(step))
        self._place_in_bucket()
        return self._bucket.delete(step) or bool(found)

    def close(self) -> None:
        """Finish copying, and let go of threads.

        Raises
        ------
        SaveError, SupersededError, OptionError
            If the bucket does not have the newest checkpoint.
        """
        with ExitStack() as stack:
            for close in (self._local_store.close, self._bucket.close, self._local.close):
                stack.callback(close)
            self.copies.stop()

    # -- copying

    def wake(self) -> None:
        """Have a call that waits look at the deadline, see `Copies.wake`."""
        self.copies.wake()

    def finish(self, deadline: float | None = None, *, last: bool = False) -> bool:
        """Wait until the bucket has what the local tier has, or for a deadline, see `Copies.finish`."""
        return self.copies.finish(deadline, last=last)

    def _finish_copying(self) -> None:
        if not self.copies.finish():
            raise DeadlineError(
                f"{self._store.backend.url} was still being written when the time was over that this process has left"
            )

    def _copy(self, item: PendingCopy) -> bool:
        """Copy a checkpoint to the bucket, unless that has it or is beyond it; return whether it is there."""
        self._place_in_bucket()
        self._take_bucket_over()
        replaces = item.if_exists == "replace"
        if self._bucket.holds(item.ref.step) and not replaces:
            return True
        manifest = self._local_store.manifest(item.ref)
        report = SaveReport(step=item.ref.step)
        transfer = Transfer(self._local_store, manifest, item.ref.step, manifest.time)
        try:
            self._bucket.write(transfer, report, "replace" if replaces else "error")
        except OptionError:
            if not replaces:
                raise
            return False  # what it replaces was skipped
        self._count("bucket", item.report, report)
        return True

    def _take_bucket_over(self) -> None:
        """Start the attempt at the bucket's run, and let the local tier name it."""
        attempt = self._bucket.take_over()
        follows = self._follows or Follows()
        if attempt != follows.attempt or self._store.id != follows.store:
            # Before the first commit: whoever finds that checkpoint has to know that it came from here.
            self._put_follows(Follows(self._store.id, attempt, str(self._bucket.latest or "")))

    def _place_in_bucket(self) -> None:
        """Find out where to go on from in a bucket that could not be reached when the run was restored.

        Raises
        ------
        SupersededError
            If its run was written from elsewhere since.
        """
        with self._placing:
            if self._sight is None or self._sight.bucket is not None:
                return
            sight = self.view.look()
            assert sight.bucket is not None or sight.local.live
            if sight.bucket is None:
                raise BackendError(f"{self._store.backend.url} cannot be reached", transient=True)
            follows = self._follows or Follows()
            if not follows.continues(sight.bucket):
                raise SupersededError(
                    f"{place(self.view.run)} was written from elsewhere while it could not be reached: it is at step "
                    f"{sight.bucket.live[-1].step}, which the local tier does not follow. Restore again, to go on from "
                    "there"
                )
            self._bucket.go_on_from(_up_to(sight.bucket, self._step))
            self._sight = Sight(self._sight.local, sight.bucket, self._follows)

    def _put_follows(self, follows: Follows) -> None:
        if follows != self._follows:
            follows.put(self._local_store, self.view.run.name)
            self._follows = follows


def _up_to(lineage: Lineage, step: int) -> Origin:
    """Go on after `step`, which another tier has."""
    return Origin(lineage, tuple(name for name in lineage.live if name.step <= step))


def _followed(bucket: Lineage, before: Follows | None, store: Store) -> Follows:
    """Return what says that a local tier goes on from the bucket's latest checkpoint."""
    attempt = before.attempt if before is not None and before.continues(bucket) else 0
    return Follows(store.id if bucket.attempt else "", attempt, str(bucket.latest or ""))
