"""`save` and `load`: the drop-ins for ``torch.save`` and ``torch.load``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, SupportsIndex

from incckpt.backends.base import Backend
from incckpt.options import checked_flag
from incckpt.retention import Mode
from incckpt.run.attempt import IfExists, check_if_exists, refuse_other_ranks
from incckpt.run.checkpoint import Checkpoint, checked_metrics
from incckpt.run.choose import Which, checked_which, not_found
from incckpt.run.reader import Reader
from incckpt.run.restore import MapLocation, load_state
from incckpt.run.session import save_state
from incckpt.run.view import RunView
from incckpt.staging.detect import chosen_threads
from incckpt.state.flatten import flatten
from incckpt.store.location import locate
from incckpt.store.manifest import Manifest
from incckpt.store.refs import checked_step
from incckpt.store.store import Store

__all__ = ["load", "save"]


def save(
    state: Any,
    url: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    run: str | None = None,
    metrics: Mapping[str, float] | None = None,
    if_exists: IfExists = "error",
    allow_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Save `state` as a new checkpoint at `url`, and return when it is durable. Only what is new there is written.

    Nothing is pickled, and no copy of the state is kept: what changed is found by hashing. Training loops are better
    off with a `CheckpointManager`, which does not make them wait. A state that other threads write to meanwhile is
    saved as it was read, a part at a time: readable, but not of one moment.

    Parameters
    ----------
    state
        Any nesting of dicts, lists and tuples of tensors, arrays, plain values, and objects with ``state_dict()``.
    url
        Of the store; a path is a local directory. A fragment names the run and the step, as in
        ``s3://bucket/sweep#lr3e-4@500``.
    step
        Beyond the run's last; by default the one after it, or 0.
    run
        Name of the run, in place of the fragment.
    metrics
        Metrics of this checkpoint.
    if_exists
        What to do if the run has a checkpoint of `step`: raise an ``"error"``, ``"skip"`` the save and return that
        checkpoint, or ``"replace"`` it.
    allow_pickle
        Whether to pickle what cannot be represented otherwise; has to be repeated at load.
    storage_options
        For fsspec.

    Raises
    ------
    StateError
        If the state holds what cannot be saved; names its path.
    OptionError
        If an argument is not usable.
    SupersededError
        If another process has taken over the run since this one's last save.
    BackendError
        If the store failed; nothing is lost, and saving again goes on where it stopped.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> incckpt.save({"w": torch.zeros(3), "epoch": 1}, store).step
    0
    >>> incckpt.load(store)
    {'w': tensor([0., 0., 0.]), 'epoch': 1}
    """
    location = locate(url, run=run, step=None if step is None else checked_step(step))
    new_step = location.new_step()
    check_if_exists(if_exists)
    if not location.named:
        refuse_other_ranks()
    numbers = checked_metrics(metrics)
    flat = flatten(state, allow_pickle=checked_flag("allow_pickle", allow_pickle))
    return save_state(location.store, location.run, storage_options, flat, new_step, numbers, if_exists)


def load(
    url: str | os.PathLike[str] | Backend,
    *,
    step: Which | None = None,
    run: str | None = None,
    keys: str | Sequence[str] | None = None,
    map_location: MapLocation = None,
    verify: bool = True,
    metric: str | None = None,
    mode: Mode = "min",
    allow_pickle: bool = False,
    threads: int | None = None,
    max_bytes: int | None = None,
    progress: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Return the state of a checkpoint, from any machine that reaches the store. Its writer is not disturbed.

    Parameters
    ----------
    url
        Of the store, with run and step as a fragment where wanted: ``s3://bucket/sweep#lr3e-4@500``, ``…@latest``,
        ``…@best``. Or a `Backend`, which stays open.
    step, run
        In place of the fragment. By default the latest checkpoint of the run ``"default"``. `step` may also be the
        exact name of a checkpoint (`Checkpoint.ref`), be it abandoned or orphaned: that is read even where the run is
        damaged, see `recover`.
    keys
        Globs of dotted names, as ``"model.*"``: only what matches is fetched and returned.
    map_location
        As for ``torch.load``.
    verify
        Whether to check the digests of all that is read.
    metric, mode
        What ``"best"`` goes by, and whether the lowest (``"min"``) or highest (``"max"``) is best; the name can be left
        out if there is only one metric.
    allow_pickle
        Whether to unpickle what was pickled at save. Only for stores that you trust.
    threads
        For decoding; by default all cores that this process may use.
    max_bytes
        Most memory that the state, or one of its objects, may take; by default what is available, or what the
        environment variable ``INCCKPT_MAX_BYTES`` says.
    progress
        Whether to show a progress bar; by default if a terminal watches.
    storage_options
        For fsspec.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store, run or step.
    CorruptionError
        If the checkpoint is damaged; names the object and the tensors.
    MemoryLimitError
        If it would take more memory than `max_bytes`; nothing was read.
    StateMismatchError
        If `keys` match nothing.
    """
    location = locate(url, run=run, step=checked_which(step))
    checked_flag("allow_pickle", allow_pickle)
    with ExitStack() as stack:
        store = stack.enter_context(Store.lent(url, location.store, storage_options, max_bytes=max_bytes))
        view = stack.enter_context(
            RunView(store, location.run, threads=chosen_threads(threads), verify=verify, metric=metric, mode=mode)
        )

        def read(reader: Reader, manifest: Manifest) -> Any:
            return load_state(
                reader, manifest, keys=keys, map_location=map_location, allow_pickle=allow_pickle, progress=progress
            )

        _, found = view.read(location.step, read)
        if found is None:
            raise not_found(view.run)
        return found[2]
