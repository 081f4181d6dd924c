"""A run as a reader sees it: its checkpoints, and reading one of them beside a writer that prunes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from incckpt.errors import CheckpointNotFoundError, CorruptionError, StoreNotFoundError
from incckpt.options import checked_flag
from incckpt.retention import Mode, check_ranking
from incckpt.run.checkpoint import Checkpoint, log_unreadable, read_refs
from incckpt.run.choose import Which, checked_which, choose, place
from incckpt.run.reader import Reader
from incckpt.store.lineage import Lineage
from incckpt.store.manifest import Manifest
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store
from incckpt.threads import shielded

__all__ = ["TRIES", "RunView"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

TRIES = 30  # a reader that takes as long as a save meets a pruned checkpoint in a third of its tries


class RunView:
    """A run as a reader sees it. Nothing is written.

    Parameters
    ----------
    store, run
        Which run. The store stays open.
    threads
        Threads for decoding.
    verify
        Whether to check the digests of all that is read.
    metric, mode
        Decide what is ``"best"``; the metric is optional if there is only one.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        threads: int,
        verify: bool = True,
        metric: str | None = None,
        mode: Mode = "min",
    ) -> None:
        self.run = store.run(run)
        self._store = store
        self._threads = threads
        self._verify = checked_flag("verify", verify)
        check_ranking(metric, mode)
        self._metric, self._mode = metric, mode
        self._reader: Reader | None = None

    def read(
        self,
        which: Which | RefName | None,
        read: Callable[[Reader, Manifest], _T],
        *,
        fall_back: bool = False,
        continues: bool = False,
    ) -> tuple[Lineage, tuple[RefName, Manifest, _T] | None]:
        """Choose a checkpoint and `read` it; where it is pruned meanwhile, choose again.

        Parameters
        ----------
        which
            A step, ``"latest"`` (or ``None``), ``"best"``, or the exact name of a ref, which is read whatever the
            lineage says, and where it is damaged.
        fall_back
            Whether a damaged latest one is passed over for the one before it, with an error in the log.
        continues
            Whether a writer is to go on from the checkpoint, for which it needs the lineage in any case. A checkpoint
            that was in none counts as abandoned then.

        Returns
        -------
        lineage, found
            The run as it was seen, and the checkpoint with what `read` returned; ``None`` if the run is empty and
            `which` is ``None``.

        Raises
        ------
        StoreNotFoundError, CheckpointNotFoundError
            If there is no such store or checkpoint, or no checkpoint stands long enough to be read.
        CorruptionError
            If it is damaged. Objects that are missing because it was pruned are no damage.
        """

        def read_manifest(ref: Ref) -> tuple[RefName, Manifest, _T]:
            manifest = shielded(partial(self._store.manifest, ref))
            if self._reader is None:
                self._reader = Reader(self._store, threads=self._threads, verify=self._verify)
            return ref.name, manifest, read(self._reader, manifest)

        shielded(self._store.check)
        return self._read_standing(which, read_manifest, fall_back, continues)

    def checkpoints(self, *, abandoned: bool = False) -> list[Checkpoint]:
        """Return the committed checkpoints by step; unreadable ones are left out and logged."""
        try:
            self._store.check()
        except StoreNotFoundError:
            return []
        lineage = self.run.lineage()
        refs = read_refs(self.run, lineage, lineage.live, log_unreadable)
        found = [Checkpoint.of(self.run.name, ref) for ref in refs]
        if abandoned:
            refs = read_refs(self.run, lineage, lineage.abandoned, log_unreadable)
            found += [Checkpoint.of(self.run.name, ref, abandoned=True) for ref in refs]
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt))

    def find(self, which: Which) -> Checkpoint | None:
        """Return a checkpoint; ``None`` if there is none such."""
        try:
            self._store.check()
            _, ref = self._read_standing(which, lambda ref: ref)
        except (StoreNotFoundError, CheckpointNotFoundError):
            return None
        return None if ref is None else Checkpoint.of(self.run.name, ref)

    def close(self) -> None:
        """Stop the threads."""
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_standing(
        self,
        which: Which | RefName | None,
        read: Callable[[Ref], _T],
        fall_back: bool = False,
        continues: bool = False,
    ) -> tuple[Lineage, _T | None]:
        wanted = checked_which(which)
        exact = wanted if isinstance(wanted, RefName) else None
        pruned: RefName | None = None
        for _ in range(TRIES):
            lineage = Lineage.empty() if exact and not continues else shielded(self.run.lineage)
            if exact and continues:
                lineage = lineage.including(exact)
            if lineage.latest is None and wanted is None and pruned is None:
                return lineage, None
            try:
                name = shielded(partial(choose, self.run, lineage, wanted, self._metric, self._mode))
            except CheckpointNotFoundError as error:
                if pruned is None:
                    raise
                raise CheckpointNotFoundError(f"step {pruned.step} was pruned while it was read; {error}") from error
            candidates = list(reversed(lineage.live)) if fall_back else [name]
            found, pruned = self._first_readable(lineage, candidates, read)
            if pruned is None:
                return lineage, found
            log.debug("step %d of run %r was pruned while it was read; choosing again", pruned.step, self.run.name)
        raise CheckpointNotFoundError(
            f"{place(self.run)}: {TRIES} times the checkpoint was pruned while it was read; let its writer keep more "
            "of them (keep_last_n=)"
        )

    def _first_readable(
        self, lineage: Lineage, candidates: list[RefName], read: Callable[[Ref], _T]
    ) -> tuple[_T | None, RefName | None]:
        """Return what `read` made of the first candidate that is sound, or the candidate that was pruned meanwhile."""
        for candidate in candidates:
            try:
                for ref in read_refs(self.run, lineage, [candidate]):
                    return read(ref), None
            except CorruptionError as error:
                if self.run.stands(candidate):
                    if candidate == candidates[-1]:
                        raise
                    log.error("step %d cannot be read, falling back to the one before it: %s", candidate.step, error)
                    continue
            return None, candidate
        raise AssertionError("unreachable")
