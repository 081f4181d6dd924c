"""The writing half of DCP's storage: `IncrementalWriter`."""

from __future__ import annotations

import logging
import os
import pickle
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from incckpt.errors import IncckptError, OptionError, SaveError, StateError
from incckpt.integrations.dcp.gathering import Failed, gathered
from incckpt.integrations.dcp.places import step_of
from incckpt.integrations.dcp.staging import (
    Copy,
    Staged,
    copied,
    is_plain,
    keys_of,
    places_of,
    plans_with,
    staged,
    stored_form,
)
from incckpt.options import checked_flag
from incckpt.retention import Mode, Policy, policy_of
from incckpt.run.attempt import Attempt, IfExists, Origin, check_if_exists
from incckpt.run.checkpoint import Checkpoint, checked_metrics
from incckpt.run.joint import OpenSave
from incckpt.run.merging import merge
from incckpt.run.shards import Brief, ShardWriter
from incckpt.staging.detect import chosen_threads
from incckpt.staging.layout import DEFAULT_CHUNK_BYTES, check_chunk_bytes
from incckpt.store.location import locate
from incckpt.store.refs import RefName, checked_step
from incckpt.store.store import Store

__all__ = ["IncrementalWriter"]

log = logging.getLogger(__name__)


class IncrementalWriter(StorageWriter, AsyncStager):
    """Saves the states that DCP plans, incrementally: only what changed on each rank is written.

    Give one to ``dcp.save(state, storage_writer=writer)`` or ``dcp.async_save``, the same one each time: it remembers
    what is stored. A rank that fails fails the checkpoint on every rank.

    Parameters
    ----------
    url
        Of the store; a fragment names the run, as in ``s3://bucket/sweep#lr3e-4``.
    run
        Name of the run, in place of the fragment.
    step
        Of the next checkpoint; by default the one after the run's last. A ``checkpoint_id`` that ends in a step
        (``…#run@500``, ``…/step-500``) comes first. Can be set between saves.
    metrics
        Of the next checkpoint. Can be set between saves.
    if_exists
        What to do if the run has a checkpoint of the step: raise an ``"error"``, or ``"replace"`` it.
    keep_last_n, keep_best_n, metric, mode, retention
        Which checkpoints to keep, as for `CheckpointManager`; all by default.
    threads
        For comparing, copying, hashing and coding, on each rank; by default all cores that the process may use.
    chunk_bytes
        Size of the chunks that large shards are cut into, a multiple of 1 MiB.
    delta
        Whether a changed chunk may be stored as its difference from the last full copy.
    storage_options
        For fsspec.

    Raises
    ------
    OptionError
        If an argument is not usable.

    Examples
    --------
    On every rank, in a loop::

        writer = IncrementalWriter("s3://bucket/run")
        dcp.save(state, storage_writer=writer, checkpoint_id=f"step-{step}")

    and after a restart, with as many ranks as there are now::

        dcp.load(state, storage_reader=IncrementalReader("s3://bucket/run"))
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        run: str | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        if_exists: IfExists = "error",
        keep_last_n: int | None = None,
        keep_best_n: int | None = None,
        metric: str | None = None,
        mode: Mode = "min",
        retention: Policy | None = None,
        threads: int | None = None,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        delta: bool = True,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        location = locate(url, run=run)
        named = location.new_step()
        check_if_exists(if_exists)
        if if_exists == "skip":
            raise OptionError(
                "if_exists='skip' is not for torch.distributed.checkpoint: ask for the step before saving"
            )
        self.step = named if step is None else checked_step(step)
        self.metrics = metrics
        self.if_exists: IfExists = if_exists
        self._url, self._run = location.store, location.run
        self._options = storage_options
        self._policy = policy_of(keep_last_n, keep_best_n, metric, mode, retention)
        self._threads = chosen_threads(threads)
        self._chunk_bytes = check_chunk_bytes(chunk_bytes)
        self._delta = checked_flag("delta", delta)
        self._shards: ShardWriter | None = None
        self._store: Store | None = None  # of the attempt, on the coordinator
        self._attempt: Attempt | None = None
        self._origin: Origin | None = None
        self._open: OpenSave | None = None
        self._previous: tuple[int, RefName] | None = None
        self._count = 0
        self._planned: Sequence[WriteItem] | None = None  # of the last save, for the next one to stage
        self._staged: Staged | None = None
        self._copy: Copy | None = None  # of a state that was copied whole

    # -- what DCP calls on every rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a checkpoint; `checkpoint_id` may end in its step."""
        if checkpoint_id is not None:
            self.step = step_of(checkpoint_id, self._url, self._run)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether `checkpoint_id` may name a checkpoint."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: a checkpoint says itself what it is."""
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save.

        Raises
        ------
        OptionError
            With ``use_collectives=False``: a checkpoint is one, and needs a coordinator.
        """
        if kwargs.get("use_collectives", True) is False:
            raise OptionError("use_collectives=False makes a checkpoint of every rank's part; leave it out")
        self._count += 1
        self.give_up(SaveError("the save before did not end, and was given up"))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Store this rank's part; what goes wrong is told to the coordinator, which raises it on every rank."""
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        try:
            results = self._stored(plan, planner)
        except BaseException as error:  # noqa: BLE001 -- DCP takes any and does not tell the coordinator's writer
            tried = () if self._shards is None else tuple(self._shards.tried)
            results = [WriteResult(MetadataIndex(""), 0, Failed(_picklable(error), tried))]
        future.set_result(results)
        return future

    @property
    def shards(self) -> ShardWriter:
        """What stores this rank's part."""
        if self._shards is None:
            store = Store.open(self._url, self._options)
            self._shards = ShardWriter(store, threads=self._threads, chunk_bytes=self._chunk_bytes, delta=self._delta)
        return self._shards

    def _stored(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        brief = plan.storage_data
        if not isinstance(brief, Brief):
            raise SaveError(
                f"{type(planner).__name__} has not passed on what the coordinator's writer put into the plan"
            )
        shards = self.shards
        if not plan.items:
            return []
        staged, copy, self._staged, self._copy, self._planned = self._staged, self._copy, None, None, None
        of_state = staged is not None and plans_with(planner, staged.objects)
        if staged is not None and of_state and list(staged.items) == plan.items:
            snapshot = staged.snapshot
        else:
            before = staged if of_state else None
            snapshot = shards.stage(
                {key: _value(item, planner, before) for key, item in zip(keys_of(plan.items), plan.items, strict=True)},
                given=copy.storages if copy is not None and plans_with(planner, copy.objects) else frozenset(),
            )
        shard = shards.put(snapshot, brief, self._count, places_of(plan.items))
        shards.rest()
        if is_plain(planner):
            self._planned = tuple(plan.items)
        told = [shard, *[None] * (len(plan.items) - 1)]
        return [WriteResult(item.index, _nbytes(item), one) for item, one in zip(plan.items, told, strict=True)]

    # -- what DCP calls on the coordinator

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Announce the checkpoint, before any rank looks what it may rely on.

        Raises
        ------
        IncckptError
            If the checkpoint cannot be saved; nothing is left of it.
        """
        attempt, store = self._started_or_new()
        step = self.step
        if step is None:
            attempt.start()
            step = 0 if attempt.last_step is None else attempt.last_step + 1
        attempt.check_step(step, self.if_exists)
        metrics = checked_metrics(self.metrics)
        self._open = OpenSave(attempt, step, time.time(), metrics, self.if_exists)
        brief = Brief(self._count, store.id, self._run, self._previous)
        turns = [replace(brief, turn=(rank, len(plans))) for rank in range(len(plans))]
        return [replace(plan, storage_data=own) for plan, own in zip(plans, turns, strict=True)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the checkpoint that the ranks have stored the parts of.

        Raises
        ------
        IncckptError
            If a rank has failed, or a part is missing; nothing is committed.
        """
        assert self._open is not None
        save, self._open = self._open, None
        tried: list[str] = []
        try:
            leaves, shards = gathered(metadata, results, tried)
            merged = merge(leaves, shards)
        except BaseException as error:
            save.abort(error, tried)
            raise
        ref = save.commit(merged, tried)
        self.step = None
        self._previous = self._count, ref.name
        metadata.storage_data = Checkpoint.of(self._run, ref)

    def _started_or_new(self) -> tuple[Attempt, Store]:
        """Return the attempt, and its store; until it has started, one that knows what the run holds now."""
        if self._attempt is None or not self._attempt.number:
            if self._store is None:
                self._store = Store.open(self._url, self._options)
            self._store.create()
            origin = self._origin or Origin.latest(self._store.run(self._run).lineage())
            self._attempt = Attempt(self._store, self._run, origin, policy=self._policy, threads=self._threads)
        assert self._store is not None
        return self._attempt, self._store

    def go_on_from(self, origin: Origin) -> None:
        """Let the next save, on the coordinator, continue what was restored."""
        if self._attempt is not None:
            self._attempt.close()
        self._attempt, self._origin = None, origin

    def delete(self, step: int) -> bool:
        """Delete all checkpoints of `step`, on the coordinator; return whether there were any."""
        attempt, _ = self._started_or_new()
        return attempt.delete(step)

    def give_up(self, error: BaseException) -> None:
        """End a save in flight, because of `error`, where DCP has not called `finish`."""
        if self._open is not None:
            save, self._open = self._open, None
            save.abort(error)

    # -- staging

    def stage(self, state_dict: Any) -> Any:
        """Return a state that DCP can plan with, and that does not change any more, for ``dcp.async_save``.

        From the second save on, what this rank is to write is compared with what is stored, and copied only if it has
        changed. What is returned belongs to the writer, which may keep it for comparing: never write to it.
        """
        self._staged = self._copy = None
        if self._planned is not None and self._shards is not None:
            found = staged(state_dict, self._planned, self._shards)
            if found is not None:
                state, self._staged = found
                return state
        state = copied(state_dict)
        self._copy = Copy.of(state_dict, state)
        return state

    def __getstate__(self) -> dict[str, Any]:
        """Return what DCP's process executor sends to the other process: not the copy, which goes with the state."""
        return {**self.__dict__, "_copy": None}

    def synchronize_staging(self) -> None:
        """Return at once: `stage` has made the copy."""
        return

    def close(self) -> None:
        """Give up a save in flight, and let go of memory, threads and connections."""
        self.give_up(SaveError("the writer was closed"))
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._shards is not None:
            self._shards.close()
            self._shards = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _value(item: WriteItem, planner: SavePlanner, before: Staged | None) -> Any:
    """Return what is to be stored for an item: a tensor in plain memory, or a value; perhaps from what was staged."""
    if item.type is WriteItemType.BYTE_IO:
        look = getattr(planner, "lookup_object", None)
        if look is None:
            raise StateError(
                f"{item.index.fqn!r} is no tensor, and {type(planner).__name__} has no lookup_object() to get it from; "
                "derive the planner from DefaultSavePlanner. Nothing is pickled"
            )
        return look(item.index)
    tensor = planner.resolve_data(item)
    if not isinstance(tensor, torch.Tensor):
        raise StateError(f"{type(planner).__name__} gives {type(tensor).__name__} for tensor {item.index.fqn!r}")
    if tensor.is_meta and before is not None:
        tensor = before.value(item)
    return stored_form(item, tensor)


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _picklable(error: BaseException) -> IncckptError:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 -- whatever the class of an error makes of it
        copy = None
    if not isinstance(error, IncckptError):
        where = "".join(traceback.format_exception(error))
        return SaveError(f"{type(error).__name__}: {error}\n{where}")
    return error if type(copy) is type(error) else SaveError(f"{type(error).__name__}: {error}")
