"""`copy`: checkpoints from one store or run to another, only what is missing there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from incckpt.backends.base import REMOTE_REQUESTS, Backend, redact
from incckpt.errors import CorruptionError, OptionError, StoreNotFoundError
from incckpt.options import check_function, checked_flag
from incckpt.retention import Mode
from incckpt.run.attempt import Attempt, IfExists, Origin, check_if_exists
from incckpt.run.checkpoint import Checkpoint, read_refs, read_refs_at_once
from incckpt.run.choose import choose, not_found, place
from incckpt.run.contents import Contents
from incckpt.run.pipeline import Pipeline
from incckpt.run.report import SaveReport
from incckpt.run.transfer import Transfer
from incckpt.staging.detect import chosen_threads
from incckpt.store.lineage import Lineage, Run
from incckpt.store.location import Location, locate
from incckpt.store.manifest import Manifest, Range
from incckpt.store.refs import Ref, RefName, run_names
from incckpt.store.store import Store

__all__ = ["Copied", "CopyResult", "copy"]

log = logging.getLogger(__name__)

_IN_FLIGHT = 256 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Copied:
    """A checkpoint that was copied.

    Attributes
    ----------
    checkpoint
        The copy.
    objects, nbytes
        Objects that were put for it, its manifest not counted, and their bytes.
    """

    checkpoint: Checkpoint
    objects: int
    nbytes: int


@dataclass(frozen=True)
class CopyResult:
    """What `copy` did.

    Attributes
    ----------
    source, destination
        URLs of the stores.
    copied
        What was copied, by run and step.
    skipped
        Run and step of what was there already.
    passed
        Run and step of what the destination does not have and cannot take any more, since it is beyond that step; it
        was pruned there, say.
    pruned
        Run and step of what was pruned from the source before it was copied.
    """

    source: str
    destination: str
    copied: tuple[Copied, ...]
    skipped: tuple[tuple[str, int], ...]
    passed: tuple[tuple[str, int], ...] = ()
    pruned: tuple[tuple[str, int], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the objects that were put."""
        return sum(item.nbytes for item in self.copied)


@dataclass
class _Plan:
    """What is to be copied of a run."""

    source: Run
    destination: Run
    lineage: Lineage  # of the destination
    refs: list[Ref]
    skipped: list[int]
    passed: list[int]


def copy(
    source: str | os.PathLike[str] | Backend,
    destination: str | os.PathLike[str] | Backend,
    *,
    metric: str | None = None,
    mode: Mode = "min",
    if_exists: IfExists = "error",
    verify: bool = True,
    threads: int | None = None,
    report: Callable[[Copied], None] = lambda copied: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    source_options: Mapping[str, Any] | None = None,
    destination_options: Mapping[str, Any] | None = None,
) -> CopyResult:
    """Copy checkpoints to another store, or to another run.

    Objects are copied as they are, and only those that the destination does not have. A copy that was killed goes on
    where it stopped when it is called again; a second one writes nothing. Memory does not grow with the checkpoints.

    The copy is a save: it takes the destination's run over from whoever writes it, and keeps time and metrics.
    Abandoned checkpoints are not copied.

    Parameters
    ----------
    source
        URL of a checkpoint (``store#run@step``), of a run (``store#run``), or of a store, of which every run is copied.
    destination
        URL of a store, which is made if it is not there; with a run as its fragment the copy has that name.
    metric, mode
        What ``@best`` goes by, see `load`.
    if_exists
        What to do about a step that the destination has with other contents: raise an ``"error"`` before anything is
        written, ``"skip"`` it, or ``"replace"`` it.
    verify
        Whether to decode and hash everything that is copied. For deltas that takes reading their bases again.
    threads
        For decoding; by default all cores that this process may use.
    report
        Called with each checkpoint when it is copied.
    progress
        Called with bytes of states done, and of all that are to be copied, from any thread.
    source_options, destination_options
        For fsspec.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such source.
    OptionError
        If an argument is not usable; or the destination has other contents at a step, or steps beyond the one named.
    CorruptionError
        If an object of the source is missing or damaged. What was copied before stays; this one is not committed.
    SupersededError
        If another process has taken the destination's run over meanwhile.
    ReadOnlyError, BackendError
        If a store cannot be written, or failed; copying again goes on where it stopped.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> source, destination = tempfile.mkdtemp(), tempfile.mkdtemp()
    >>> for step in range(3):
    ...     _ = incckpt.save({"w": torch.arange(5) + step}, source, step=step)
    >>> [item.checkpoint.step for item in incckpt.copy(source, destination).copied]
    [0, 1, 2]
    >>> incckpt.copy(source, destination).copied
    ()
    """
    check_if_exists(if_exists)
    checked_flag("verify", verify)
    check_function("progress", progress)
    threads = chosen_threads(threads)
    start, end = locate(source), locate(destination)
    if end.step is not None:
        raise OptionError(f"{redact(end.store)}: a copy keeps its steps; leave out '@{end.step}' of the destination")
    one_run = start.named or start.step is not None
    if end.named and not one_run:
        raise OptionError(f"{redact(end.store)}: which run of the source is to be {end.run!r}? Name it: source#run")
    with ExitStack() as stack:
        here = stack.enter_context(Store.lent(source, start.store, source_options))
        there = stack.enter_context(Store.lent(destination, end.store, destination_options))
        here.check()
        names = [start.run] if one_run else run_names(here.backend)
        plans = [
            _plan(here, there, start, name, end.run if end.named else name, metric, mode, if_exists) for name in names
        ]
        total = sum(ref.nbytes for plan in plans for ref in plan.refs)
        done = 0
        copied: list[Copied] = []
        pruned: list[tuple[str, int]] = []

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        remote = here.backend.remote or there.backend.remote
        pipeline = Pipeline(
            requests=REMOTE_REQUESTS if remote else threads,
            threads=threads,
            bytes_in_flight=_IN_FLIGHT,
            name="incckpt-copy",
        )
        for plan in plans:
            attempt = Attempt(
                there, plan.destination.name, Origin.latest(plan.lineage), threads=threads, pipeline=pipeline
            )
            try:
                for ref in plan.refs:
                    item = _copy_one(here, plan, ref, attempt, if_exists, verify, count)
                    if item is None:
                        pruned.append((plan.source.name, ref.step))
                    else:
                        copied.append(item)
                        report(item)
            finally:
                attempt.close()
        return CopyResult(
            source=here.backend.url,
            destination=there.backend.url,
            copied=tuple(copied),
            skipped=tuple((plan.destination.name, step) for plan in plans for step in plan.skipped),
            passed=tuple((plan.destination.name, step) for plan in plans for step in plan.passed),
            pruned=tuple(pruned),
        )


def _copy_one(
    source: Store,
    plan: _Plan,
    ref: Ref,
    attempt: Attempt,
    if_exists: IfExists,
    verify: bool,
    progress: Callable[[int], None],
) -> Copied | None:
    """Copy a checkpoint; return ``None`` if it was pruned meanwhile."""
    report = SaveReport(step=ref.step)
    try:
        manifest = source.manifest(ref)
        Contents.of(manifest)  # a copy of what does not parse could not be restored
        transfer = Transfer(source, manifest, ref.step, manifest.time, verify, progress)
        copy = attempt.write(transfer, report, "replace" if if_exists == "replace" else "error")
    except CorruptionError as error:
        if plan.source.stands(ref.name):
            raise
        log.warning("step %d of run %r was pruned before it was copied: %s", ref.step, plan.source.name, error)
        return None
    return Copied(Checkpoint.of(plan.destination.name, copy), report.put_objects, report.put_bytes)


def _plan(
    source: Store,
    destination: Store,
    start: Location,
    run: str,
    new_name: str,
    metric: str | None,
    mode: Mode,
    if_exists: IfExists,
) -> _Plan:
    """Find out, by reading alone, what is to be copied of a run."""
    owner, target = source.run(run), destination.run(new_name)
    lineage = owner.lineage()
    names = lineage.live
    if not names and start.named:
        raise not_found(owner)
    if start.step is not None:
        names = (choose(owner, lineage, start.step, metric, mode),)
    refs = read_refs_at_once(source, owner, lineage, names)
    try:
        destination.check()
    except StoreNotFoundError:
        return _Plan(owner, target, Lineage.empty(), refs, [], [])
    if destination.id == source.id and run == new_name:
        raise OptionError(f"{place(target)}: the copy would be the original; name another run, as '#copy', or store")
    there = target.lineage()
    plan = _Plan(owner, target, there, [], [], [])
    last = -1 if there.latest is None else there.latest.step
    taken = {name.step: name for name in there.live}
    for ref in refs:
        name = taken.get(ref.step)
        if name is None and ref.step > last:
            plan.refs.append(ref)
        elif name is None and start.step is None:
            plan.passed.append(ref.step)
        elif name is None:
            raise OptionError(
                f"{place(target)} is at step {last} already, and has no step {ref.step}, which cannot be added any "
                f"more; copy to another run, as '#{new_name}-{ref.step}'"
            )
        elif if_exists == "skip" or _same(source, ref, destination, target, there, name):
            plan.skipped.append(ref.step)
        elif if_exists == "replace":
            plan.refs.append(ref)
        else:
            raise OptionError(
                f"{place(target)} has other contents at step {ref.step}; give if_exists='replace' to replace them or "
                "'skip' to keep them, or copy to another run"
            )
    return plan


def _same(source: Store, ref: Ref, destination: Store, target: Run, lineage: Lineage, name: RefName) -> bool:
    """Return whether a checkpoint of the destination holds what `ref` does."""
    found = read_refs(target, lineage, [name])
    return bool(found) and _contents(source.manifest(ref)) == _contents(destination.manifest(found[0]))


def _contents(manifest: Manifest) -> tuple[Any, ...]:
    """Return all of a manifest that a restore depends on."""

    def pieces(ranges: Sequence[Range]) -> list[list[tuple[str, int, int]]]:
        return [
            [(manifest.chunks[index].identity, offset, nbytes) for index, offset, nbytes in item.pieces]
            for item in ranges
        ]

    blocks = [(item.shape, item.blocks) for item in manifest.ranges]
    return manifest.structure, manifest.tensors, pieces(manifest.ranges), blocks, pieces(manifest.packed)
