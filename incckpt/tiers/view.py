"""A run as a reader of both tiers sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from incckpt.errors import (
    BackendError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    OptionError,
    StoreNotFoundError,
)
from incckpt.retention import Mode
from incckpt.run.checkpoint import Checkpoint, log_unreadable, read_refs
from incckpt.run.choose import Which, best_step, checked_which, listed, not_found, place
from incckpt.run.reader import Reader
from incckpt.run.view import RunView
from incckpt.store.lineage import Lineage, Run
from incckpt.store.manifest import Manifest
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store
from incckpt.threads import shielded
from incckpt.tiers.follows import Follows
from incckpt.tiers.mixed import MixedObjects

__all__ = ["Sight", "TieredView", "check_apart"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sight:
    """What both tiers have, as seen at one time.

    Attributes
    ----------
    local
        The run in the local tier; empty where that cannot be read.
    bucket
        The run in the bucket; ``None`` if it cannot be reached.
    follows
        What the local checkpoints go on from.
    """

    local: Lineage
    bucket: Lineage | None
    follows: Follows | None

    @property
    def moved_on(self) -> bool:
        """Whether the bucket's run was written from elsewhere since, so that it is the one that counts."""
        return self.bucket is not None and self.follows is not None and not self.follows.continues(self.bucket)

    @property
    def live(self) -> list[tuple[bool, RefName]]:
        """The checkpoints, each with whether it is the local tier's: those to be restored first come first."""
        bucket = () if self.bucket is None else self.bucket.live
        found = [*((True, name) for name in self.local.live), *((False, name) for name in bucket)]
        return sorted(found, key=lambda item: (self.moved_on and item[0], -item[1].step, not item[0]))

    def at(self, step: int) -> list[tuple[bool, RefName]]:
        """The checkpoints of `step`, those of the lineage first."""
        live = [item for item in self.live if item[1].step == step]
        bucket = () if self.bucket is None else self.bucket.at(step)
        every = [*((True, name) for name in self.local.at(step)), *((False, name) for name in bucket)]
        return live + [item for item in every if item not in live]


class TieredView:
    """A run as a reader of both tiers sees it. Nothing is written.

    Parameters
    ----------
    local_store, bucket_store
        The tiers; reading one of them takes from the other what is nearer there, or sound there alone.
    local, bucket
        The run in each.
    metric, mode
        Decide what is ``"best"``.
    """

    def __init__(
        self, local_store: Store, local: RunView, bucket_store: Store, bucket: RunView, metric: str | None, mode: Mode
    ) -> None:
        self.local = local
        self.bucket = bucket
        self._local_store = local_store
        self._bucket_store = bucket_store
        self._metric, self._mode = metric, mode
        own = local_store.objects, bucket_store.objects
        local_store.objects = MixedObjects(local_store.backend, own[1], nearer=False)
        bucket_store.objects = MixedObjects(bucket_store.backend, own[0], nearer=True)

    @property
    def run(self) -> Run:
        """The run in the bucket, whose name messages give."""
        return self.bucket.run

    def look(self) -> Sight:
        """Look at both tiers.

        Raises
        ------
        OptionError
            If the local tier is that of another bucket, or the same store.
        BackendError
            If the bucket cannot be reached, and there is nothing in the local tier.
        """
        local, follows = Lineage.empty(), None
        try:
            local = shielded(partial(_lineage, self._local_store, self.local.run))
            follows = shielded(partial(Follows.read, self._local_store, self.local.run.name))
        except (BackendError, CorruptionError, FormatError) as error:
            log.error("the local tier cannot be read; going by the bucket alone: %s", error)
        try:
            bucket = shielded(partial(_lineage, self._bucket_store, self.bucket.run))
        except BackendError as error:
            if not local.live:
                raise
            log.warning("the bucket cannot be reached; going by the local tier alone: %s", error)
            return Sight(local, None, follows)
        if local.attempt and bucket.attempt:
            check_apart(self._local_store.id == self._bucket_store.id, self._bucket_store)
        if follows is not None and bucket.attempt:
            follows.check(self._local_store, self._bucket_store)
        return Sight(local, bucket, follows)

    def candidates(self, sight: Sight, wanted: int | str | RefName | None) -> list[tuple[bool, RefName]]:
        """Return the checkpoints to try for what is wanted, as `checked_which` returns it, best first.

        Each comes with whether it is the local tier's.

        Raises
        ------
        CheckpointNotFoundError
            If what is asked for is not there.
        """
        if isinstance(wanted, RefName):
            return [(True, wanted), (False, wanted)]
        if not sight.live and wanted is not None:
            raise not_found(self.run)
        if wanted == "best":
            wanted = best_step(self._refs(sight), self.run, self._metric, self._mode)
        if not isinstance(wanted, int):
            if sight.moved_on and sight.local.live:
                self._warn(sight)
            return sight.live
        found = sight.at(wanted)
        if not found:
            steps = sorted({name.step: name for _, name in sight.live}.values())
            raise CheckpointNotFoundError(
                f"{place(self.run)} has no checkpoint of step {wanted}, and neither has its local tier; they have "
                f"{listed(steps)}"
            )
        return found

    def _warn(self, sight: Sight) -> None:
        assert sight.bucket is not None
        latest, local = sight.bucket.latest, sight.local.latest
        assert latest is not None
        assert local is not None
        if local.step > latest.step:
            log.warning(
                "%s was written from elsewhere since: its step %d counts, and step %d of %s is left behind (it can be "
                "restored by its name, %s, until it is pruned)",
                place(self.run), latest.step, local.step, self._local_store.backend.url, local,
            )  # fmt: skip

    def read(
        self, is_local: bool, name: RefName, read: Callable[[Reader, Manifest], _T], continues: bool
    ) -> tuple[Lineage, tuple[RefName, Manifest, _T]]:
        """Read a checkpoint of one tier, see `RunView.read`."""
        lineage, found = (self.local if is_local else self.bucket).read(name, read, continues=continues)
        assert found is not None
        return lineage, found

    def checkpoints(self, *, abandoned: bool = False) -> list[Checkpoint]:
        """Return the checkpoints that either tier has, by step, each once; unreadable ones are left out and logged."""
        sight = self.look()
        found = [Checkpoint.of(self.run.name, ref) for ref in self._refs(sight)]
        if abandoned:
            for view, lineage in ((self.local, sight.local), (self.bucket, sight.bucket)):
                if lineage is not None:
                    refs = read_refs(view.run, lineage, lineage.abandoned, log_unreadable)
                    found += [Checkpoint.of(self.run.name, ref, abandoned=True) for ref in refs]
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt))

    def find(self, which: Which) -> Checkpoint | None:
        """Return a checkpoint; ``None`` if there is none such."""
        wanted = checked_which(which)
        sight = self.look()
        try:
            candidates = self.candidates(sight, wanted)
        except CheckpointNotFoundError:
            return None
        for is_local, name in candidates:
            lineage = sight.local if is_local else sight.bucket
            assert lineage is not None
            view = self.local if is_local else self.bucket
            for ref in read_refs(view.run, lineage, [name], log_unreadable):
                return Checkpoint.of(self.run.name, ref)
        return None

    def _refs(self, sight: Sight) -> list[Ref]:
        """Return what the lineage has, one ref of each step."""
        last = None if sight.bucket is None or not sight.moved_on else sight.bucket.latest
        by_step: dict[int, Ref] = {}
        for is_local, name in sight.live:
            if name.step in by_step or (last is not None and name.step > last.step):
                continue
            lineage = sight.local if is_local else sight.bucket
            assert lineage is not None
            view = self.local if is_local else self.bucket
            for ref in read_refs(view.run, lineage, [name], log_unreadable):
                by_step[name.step] = ref
        return [by_step[step] for step in sorted(by_step)]

    def close(self) -> None:
        """Stop the threads."""
        self.local.close()
        self.bucket.close()


def check_apart(same: bool, bucket: Store) -> None:
    """Refuse tiers that are the `same` store, whose two writers would take the run from each other.

    Raises
    ------
    OptionError
    """
    if same:
        raise OptionError(
            f"local= is the store at {bucket.backend.url} itself, or a copy of its folder; give another folder, or "
            "leave it out"
        )


def _lineage(store: Store, run: Run) -> Lineage:
    try:
        store.check()
    except StoreNotFoundError:
        return Lineage.empty()
    return run.lineage()
