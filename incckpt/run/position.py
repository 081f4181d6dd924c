"""Where a process stands in its run: what it has read of it, and the attempt that goes on from there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar

from incckpt.errors import StoreNotFoundError
from incckpt.retention import Policy
from incckpt.run.attempt import Attempt, IfExists, Origin
from incckpt.run.choose import Which, checked_which
from incckpt.run.reader import Reader
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot
from incckpt.run.transfer import Transfer
from incckpt.run.view import RunView
from incckpt.staging.baseline import Baseline
from incckpt.store.lineage import Lineage
from incckpt.store.manifest import Manifest
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store
from incckpt.threads import shielded

__all__ = ["Position"]

_T = TypeVar("_T")


class Position:
    """Where a process stands in its run. It is moved by reading a checkpoint, while nothing is written.

    What an interruption could leave half done is done by another thread than the main one, one such act at a time.

    Parameters
    ----------
    store
        Of the run; it stays open.
    view
        What the run is read through.
    policy, threads, baseline
        Of the attempts, see `Attempt`.
    read_only
        Whether nothing will be written.

    Attributes
    ----------
    took
        What the save of the checkpoint took that was read last, by its manifest (`Manifest.took`).
    """

    def __init__(
        self, store: Store, view: RunView, *, policy: Policy | None, threads: int, baseline: Baseline, read_only: bool
    ) -> None:
        self._store = store
        self._view = view
        self._policy = policy
        self._threads = threads
        self._baseline = baseline
        self._read_only = read_only
        self.took: tuple[int, float, float] | None = None
        self._attempt: Attempt | None = None
        self._turn = threading.Lock()

    def read(self, step: Which | None, read: Callable[[Reader, Manifest], _T]) -> tuple[RefName, _T] | None:
        """Read a checkpoint, and go on from it; return its name and what `read` made of it.

        Without `step` it is the latest that is sound; ``None`` if there is none.
        """
        checked_which(step)
        try:
            lineage, found = self._view.read(step, read, fall_back=step is None, continues=not self._read_only)
        except StoreNotFoundError:
            if step is not None:
                raise
            lineage, found = Lineage.empty(), None
        if not self._read_only:
            nothing = Origin.nothing(lineage)
            self.go_on_from(nothing if found is None else Origin.restored(self._view.run, lineage, *found[:2]))
        self.took = None if found is None else found[1].took
        return None if found is None else (found[0], found[2])

    def existing(self, step: int) -> Ref | None:
        """Return the checkpoint of `step`; see `Attempt.existing`."""
        return self._with_attempt(lambda attempt: attempt.existing(step))

    def check_step(self, step: int, if_exists: IfExists, pending: Collection[int]) -> None:
        """Check that a checkpoint of `step` can be saved; see `Attempt.check_step`."""
        attempt = self._attempt or self._with_attempt(lambda attempt: attempt)
        attempt.check_step(step, if_exists, pending)

    @property
    def placed(self) -> bool:
        """Whether it is known where to go on from."""
        return self._attempt is not None

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of `step` in what the attempt continues, as far as is known."""
        return self._attempt is not None and self._attempt.holds(step)

    @property
    def latest(self) -> RefName | None:
        """The latest checkpoint of what the attempt continues and has saved, as far as is known."""
        return None if self._attempt is None else self._attempt.latest

    def take_over(self) -> int:
        """Start the attempt, if it has not; return its number. See `Attempt.start`."""

        def start(attempt: Attempt) -> int:
            attempt.start()
            return attempt.number

        return self._with_attempt(start)

    def write(self, snapshot: Snapshot | Transfer, report: SaveReport, if_exists: IfExists) -> Ref:
        """Write and commit a checkpoint; see `Attempt.write`."""
        return self._with_attempt(lambda attempt: attempt.write(snapshot, report, if_exists))

    def delete(self, step: int) -> bool:
        """Delete the checkpoints of `step`; see `Attempt.delete`."""

        def delete(attempt: Attempt) -> bool:
            with self._store.backend.freeing():
                return attempt.delete(step)

        return self._with_attempt(delete)

    @staticmethod
    def wake() -> None:
        """Nobody waits here."""

    def finish(self, deadline: float | None = None, *, last: bool = False) -> bool:
        """Return that nothing is left to be done: what was written is where it belongs."""
        return True

    def close(self) -> None:
        """Let go of threads."""
        if self._attempt is not None:
            self._attempt.close()

    def _with_attempt(self, act: Callable[[Attempt], _T]) -> _T:
        """Do something with the attempt that goes on from here: from the latest checkpoint, where none was read."""
        return shielded(partial(self._with_attempt_here, act))

    def _with_attempt_here(self, act: Callable[[Attempt], _T]) -> _T:
        with self._turn:
            return act(self._attempt or self.go_on_from(Origin.latest(self._view.run.lineage())))

    def go_on_from(self, origin: Origin) -> Attempt:
        """Return a new attempt that goes on from `origin`; it takes the run over when its first save is written."""
        self.close()
        self._attempt = Attempt(
            self._store,
            self._view.run.name,
            origin,
            policy=self._policy,
            threads=self._threads,
            baseline=self._baseline,
        )
        return self._attempt
