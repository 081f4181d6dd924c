"""`DistributedCheckpointManager`: what every rank of a job calls to save and restore a sharded state."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from incckpt.errors import CorruptionError, IncckptError, SaveError, StoreNotFoundError
from incckpt.integrations.dcp.reader import IncrementalReader
from incckpt.integrations.dcp.writer import IncrementalWriter
from incckpt.retention import Mode, Policy
from incckpt.run.attempt import IfExists, Origin
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.choose import Which, checked_which
from incckpt.run.view import RunView
from incckpt.staging.detect import chosen_threads
from incckpt.staging.layout import DEFAULT_CHUNK_BYTES
from incckpt.state.targets import is_stateful
from incckpt.store.location import locate
from incckpt.store.manifest import Manifest
from incckpt.store.refs import RefName
from incckpt.store.store import Store

__all__ = ["DistributedCheckpointManager"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class DistributedCheckpointManager:
    """Saves and restores the sharded state of a job. Every rank makes every call, in the same order.

    It talks over a gloo group of its own, so a save in the background does not get in the way of training. In a process
    without ``torch.distributed`` it works by itself.

    Parameters
    ----------
    url
        Of the store; a fragment names the run, as in ``s3://bucket/sweep#lr3e-4``. Every rank has to reach it.
    process_group
        The ranks that hold the state; all by default.
    run
        Name of the run, in place of the fragment.
    keep_last_n, keep_best_n, metric, mode, retention
        Which checkpoints to keep, as for `CheckpointManager`; all by default.
    timeout
        How long ranks wait for each other, at most.
    threads, chunk_bytes, delta
        As for `IncrementalWriter`.
    verify
        Whether to check the digests of all that is read.
    storage_options
        For fsspec.

    Raises
    ------
    OptionError
        If an argument is not usable.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
        *,
        run: str | None = None,
        keep_last_n: int | None = None,
        keep_best_n: int | None = None,
        metric: str | None = None,
        mode: Mode = "min",
        retention: Policy | None = None,
        timeout: timedelta = timedelta(minutes=30),
        threads: int | None = None,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        delta: bool = True,
        verify: bool = True,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        location = locate(url, run=run)
        location.check_whole_run()
        self._url, self._run = location.store, location.run
        self._ranking: tuple[str | None, Mode] = metric, mode
        self._threads = chosen_threads(threads)
        self._verify = verify
        self._options = storage_options
        self._store: Store | None = None
        self._writer = IncrementalWriter(
            location.store,
            run=location.run,
            keep_last_n=keep_last_n,
            keep_best_n=keep_best_n,
            metric=metric,
            mode=mode,
            retention=retention,
            threads=threads,
            chunk_bytes=chunk_bytes,
            delta=delta,
            storage_options=storage_options,
        )
        self._alone = not (dist.is_available() and dist.is_initialized())
        self._group = None if self._alone else _own_group(process_group, timeout)
        self._leads = self._alone or dist.get_rank(self._group) == 0
        self._background = ThreadPoolExecutor(1, "incckpt-joint-save")
        self._pending: Future[Checkpoint] | None = None

    # -- saving

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        if_exists: IfExists = "error",
    ) -> Future[Checkpoint]:
        """Save a checkpoint; return when the state may change again. A save before it is waited for.

        Parameters
        ----------
        step
            Beyond that of the run's latest checkpoint, unless it replaces one.
        state
            As for ``dcp.save``: a dict of sharded and other tensors, plain values, and objects with ``state_dict()``.
        metrics
            Metrics of this checkpoint; the coordinator's count.
        if_exists
            As for `IncrementalWriter`.

        Returns
        -------
        Future[Checkpoint]
            Resolves when the checkpoint is committed; raises the same error on every rank if it is not.

        Raises
        ------
        IncckptError
            If the save before failed, whether or not its future was asked: every rank has to hear it. Nothing was saved
            now; calling again saves.
        """
        self.wait()
        named = {name: value.state_dict() if is_stateful(value) else value for name, value in state.items()}
        staged = self._writer.stage(named)
        self._pending = self._background.submit(self._save, step, staged, metrics, if_exists)
        return self._pending

    def wait(self) -> None:
        """Wait until the save in flight is over.

        Raises
        ------
        IncckptError
            If it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, step: int, staged: Any, metrics: Mapping[str, float] | None, if_exists: IfExists) -> Checkpoint:
        writer = self._writer
        writer.step, writer.metrics, writer.if_exists = step, metrics, if_exists
        try:
            metadata = _unwrapped(
                lambda: save(staged, storage_writer=writer, process_group=self._group, **self._no_dist(save))
            )
        except BaseException as error:
            writer.give_up(error)  # a rank that died has told no one
            raise
        found = metadata.storage_data
        assert isinstance(found, Checkpoint)
        return found

    # -- restoring

    def restore(self, state: dict[str, Any], step: Which | None = None) -> int | None:
        """Restore a checkpoint into `state`, in place, as ``dcp.load`` does, and go on from it.

        The coordinator chooses the checkpoint, and every rank reads that one. Without `step`, damaged ones are passed
        over for those before them, by all ranks together.

        Parameters
        ----------
        state
            Sharded in any way, over any number of ranks.
        step
            A step, ``"latest"`` (the default) or ``"best"``.

        Returns
        -------
        int or None
            The step restored; ``None`` if the run has no checkpoint yet and no step was asked for.

        Raises
        ------
        CheckpointNotFoundError
            If the step asked for is not there.
        CorruptionError
            If the checkpoint is damaged. `state` is undefined until another restore succeeds.
        """
        self.wait()
        wanted = checked_which(step)
        names: list[RefName] = self._agreed(lambda: self._candidates(wanted))
        for index, name in enumerate(names):
            reader = IncrementalReader(
                self._url, run=self._run, step=str(name), verify=self._verify, threads=self._threads
            ).over(self._opened())
            try:
                _unwrapped(
                    partial(load, state, storage_reader=reader, process_group=self._group, **self._no_dist(load))
                )
            except CorruptionError as error:
                if index + 1 == len(names):
                    raise
                log.error("step %d cannot be read, falling back to the one before it: %s", name.step, error)
                continue
            self._agreed(partial(self._go_on_from, name))
            named = {key: value.state_dict() if is_stateful(value) else value for key, value in state.items()}
            reader.adopt_into(self._writer.shards, named)
            return name.step
        return None

    def _candidates(self, wanted: int | str | RefName | None) -> list[RefName]:
        """Return, on the coordinator, the checkpoints to try: the one that is meant, or else all, newest first."""
        store = self._opened()
        if wanted is None:
            try:
                store.check()
            except StoreNotFoundError:
                return []
            return list(reversed(store.run(self._run).lineage().live))
        metric, mode = self._ranking
        with RunView(store, self._run, threads=1, metric=metric, mode=mode) as view:
            _, found = view.read(wanted, lambda reader, manifest: None)
        return [] if found is None else [found[0]]

    def _go_on_from(self, name: RefName) -> None:
        store = self._opened()
        with RunView(store, self._run, threads=1) as view:
            lineage, found = view.read(name, lambda reader, manifest: None, continues=True)
        manifest: Manifest | None = None if found is None else found[1]
        self._writer.go_on_from(Origin.restored(store.run(self._run), lineage, name, manifest))

    def _opened(self) -> Store:
        """Return the store as this rank reads it, which stays open."""
        if self._store is None:
            self._store = Store.open(self._url, self._options)
        return self._store

    # -- the run

    def checkpoints(self) -> list[Checkpoint]:
        """Return the run's checkpoints by step, as the coordinator sees them."""

        def look() -> list[Checkpoint]:
            with RunView(self._opened(), self._run, threads=1) as view:
                return view.checkpoints()

        self.wait()
        return self._agreed(look)

    def delete(self, step: int) -> bool:
        """Delete all checkpoints of `step`, and what only they need; return whether there were any."""
        self.wait()
        return self._agreed(lambda: self._writer.delete(step))

    def agree(self, notice: bool) -> bool:
        """Return whether any rank has given notice, on every rank: ask it at each step, and save if so."""
        if self._alone:
            return notice
        told = torch.tensor([int(notice)])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        return bool(told.item())

    def close(self) -> None:
        """Wait for the save in flight, and let go of memory, threads and connections."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._writer.close()
            if self._store is not None:
                self._store.close()
                self._store = None
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
                self._group = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _no_dist(self, act: Callable[..., Any]) -> dict[str, bool]:
        """Return the argument that keeps DCP from talking to other processes; torch before 2.7 finds out by itself."""
        return {"no_dist": self._alone} if "no_dist" in inspect.signature(act).parameters else {}

    def _agreed(self, act: Callable[[], _T]) -> _T:
        """Return what `act` gives on the coordinator, or raise what it raises there, on every rank."""
        told: list[Any] = [None, None]
        if self._leads:
            try:
                told[0] = act()
            except IncckptError as error:
                told[1] = error
        if not self._alone:
            source = dist.get_global_rank(self._group, 0) if self._group is not None else 0
            dist.broadcast_object_list(told, src=source, group=self._group, device=torch.device("cpu"))
        if told[1] is not None:
            raise told[1]
        found: _T = told[0]
        return found


def _own_group(group: dist.ProcessGroup | None, timeout: timedelta) -> dist.ProcessGroup:
    """Return a new gloo group of the same ranks."""
    ranks = None if group is None else dist.get_process_group_ranks(group)
    local = group is not None  # the other ranks do not take part
    made = dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=local)
    assert isinstance(made, dist.ProcessGroup)
    return made


def _unwrapped(act: Callable[[], _T]) -> _T:
    """Return what `act` gives; raise the cause instead of DCP's exception, which is no `Exception`.

    Raises
    ------
    IncckptError
    """
    try:
        return act()
    except CheckpointException as error:
        failures = sorted(error.failures.items())
        for _, (cause, *_rest) in failures:
            if isinstance(cause, IncckptError):
                raise cause from None
        rank, (cause, *_rest) = failures[0]
        raise SaveError(f"rank {rank}: {type(cause).__name__}: {cause}") from cause
    except RuntimeError as error:
        if isinstance(error, IncckptError):
            raise
        raise SaveError(f"the ranks have lost each other: {error}") from error
