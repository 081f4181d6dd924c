"""`prune`: deletes the checkpoints of a run that a retention policy does not keep, planned first."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from incckpt.backends.base import Backend, redact
from incckpt.errors import CorruptionError, OptionError, ReadOnlyError
from incckpt.inspection.usage import needs_of
from incckpt.options import check_function, checked_flag
from incckpt.retention import Mode, Policy, policy_of, steps_kept, undecided
from incckpt.run.attempt import Attempt, Origin
from incckpt.run.checkpoint import Checkpoint, read_refs, read_refs_at_once, to_record
from incckpt.run.choose import not_found
from incckpt.store.location import locate
from incckpt.store.store import Store

__all__ = ["PruningPlan", "prune"]


@dataclass(frozen=True)
class PruningPlan:
    """What `prune` would delete, or has deleted.

    Attributes
    ----------
    url, run
        Which run.
    kept, doomed
        The checkpoints that stay, and those that go; by step.
    freed_bytes
        Stored bytes that only those that go need.
    undecided
        Why everything is kept for now, if the policy lacks information.
    done
        Whether it was carried out.
    """

    url: str
    run: str
    kept: tuple[Checkpoint, ...]
    doomed: tuple[Checkpoint, ...]
    freed_bytes: int
    undecided: str | None = None
    done: bool = False


def prune(
    url: str | os.PathLike[str] | Backend,
    *,
    run: str | None = None,
    keep_last_n: int | None = None,
    keep_best_n: int | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    retention: Policy | None = None,
    dry_run: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    storage_options: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Find the checkpoints of a run that a policy does not keep, and with ``dry_run=False`` delete them.

    Managers prune after each save by the policy that they were given. This prunes a run that has no writer; it takes
    the run over from whoever does. Checkpoints that were abandoned go, too, once the run has passed their steps.

    Parameters
    ----------
    url
        Of a store, with a run as its fragment.
    run
        In place of the fragment.
    keep_last_n, keep_best_n, metric, mode, retention
        What to keep, as for `CheckpointManager`; one of them is needed.
    dry_run
        Whether to stop at the plan, writing nothing.
    progress
        Called with the number of manifests read, and of all.
    storage_options
        For fsspec.

    Raises
    ------
    OptionError
        If an argument is not usable.
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store or run.
    CorruptionError
        If a checkpoint of the store is damaged: it cannot be told what is needed. Nothing was deleted.
    ReadOnlyError, BackendError, SupersededError
        If the store cannot be written, failed, or the run was taken over meanwhile; pruning again goes on.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> for step in range(4):
    ...     _ = incckpt.save({"w": torch.arange(5) + step}, store)
    >>> [checkpoint.step for checkpoint in incckpt.prune(store, keep_last_n=1).doomed]
    [0, 1, 2]
    """
    location = locate(url, run=run)
    if location.step is not None:
        raise OptionError(f"{redact(location.store)}: pruning takes a run; leave out '@{location.step}'")
    checked_flag("dry_run", dry_run)
    check_function("progress", progress)
    policy = policy_of(keep_last_n, keep_best_n, metric, mode, retention)
    if policy is None:
        raise OptionError("what is to be kept? Give keep_last_n=, keep_best_n= with metric=, or retention=")
    with Store.lent(url, location.store, storage_options) as store:
        store.check()
        owner = store.run(location.run)
        lineage = owner.lineage()
        refs = read_refs_at_once(store, owner, lineage, lineage.live)
        if not refs:
            raise not_found(owner)
        left = read_refs(owner, lineage, lineage.abandoned)
        records = [to_record(ref) for ref in refs]
        steps = steps_kept(policy, records)
        passed = [ref for ref in left if ref.step <= refs[-1].step]
        doomed = {ref.name: ref for ref in (*(ref for ref in refs if ref.step not in steps), *passed)}
        plan = PruningPlan(
            url=store.backend.url,
            run=owner.name,
            kept=tuple(Checkpoint.of(owner.name, ref) for ref in refs if ref.name not in doomed),
            doomed=tuple(
                Checkpoint.of(owner.name, ref, abandoned=name in lineage.abandoned)
                for name, ref in sorted(doomed.items(), key=lambda item: (item[0].step, item[0].attempt))
            ),
            freed_bytes=_freed(store, owner.name, frozenset(doomed), progress) if doomed else 0,
            undecided=undecided(policy, records),
        )
        if dry_run or not doomed:
            return plan
        if not store.backend.writable:
            raise ReadOnlyError(f"{store.backend.url} can only be read")
        attempt = Attempt(store, owner.name, Origin.latest(lineage))
        try:
            with store.backend.freeing():
                attempt.delete_all(frozenset(doomed))
        finally:
            attempt.close()
        return replace(plan, done=True)


def _freed(store: Store, run: str, doomed: frozenset[Any], progress: Callable[[int, int], None]) -> int:
    """Return the stored bytes that only checkpoints need which are to go."""
    problems: list[str] = []
    staying: set[str] = set()
    sizes: dict[str, int] = {}
    for owner, ref, _, needs in needs_of(store, problems.append, progress):
        if owner == run and ref.name in doomed:
            sizes.update((key, found.nbytes) for key, found in needs.items())
        else:
            staying.update(needs)
    if problems:
        raise CorruptionError(f"nothing was pruned: {problems[0]}; delete that checkpoint if it is lost")
    return sum(size for key, size in sizes.items() if key not in staying)
