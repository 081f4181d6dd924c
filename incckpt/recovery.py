"""`inventory` and `recover`: what stands in a store, whatever became of its runs, and a new lineage made of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any, get_args

from incckpt.backends.base import Backend, redact
from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.options import check_choice, check_function, checked_flag, checked_strings
from incckpt.run.inventory import Inventory, take_inventory
from incckpt.run.reader import Reader
from incckpt.run.recovery import Recoverer, RecoveryPlan
from incckpt.run.verify import Checker, Level
from incckpt.staging.detect import chosen_threads
from incckpt.store.location import locate
from incckpt.store.refs import RefName, list_refs
from incckpt.store.store import Store

__all__ = ["inventory", "recover"]


def inventory(
    url: str | os.PathLike[str] | Backend,
    *,
    run: str | None = None,
    level: Level = "sizes",
    threads: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Inventory:
    """List every checkpoint that stands in a store, in a lineage or not, and whether all that it needs is there.

    Works whatever has become of the runs' lineages: each ref is read on its own. Nothing is written.

    Parameters
    ----------
    url
        Of the store; with a fragment, as in ``s3://bucket/sweep#lr3e-4``, of one run. Or a `Backend`, which stays open.
    run
        In place of the fragment. By default all runs of the store.
    level
        How closely to look, as for `verify`: ``"list"`` and ``"sizes"`` list the store's objects once and read every
        manifest, ``"hashes"`` reads every object.
    threads
        For decoding; by default all cores that this process may use.
    storage_options
        For fsspec.

    Returns
    -------
    Inventory
        What stands; ``print`` it.

    Raises
    ------
    StoreNotFoundError
        If there is no store at `url`.
    BackendError
        If a request failed.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> saved = incckpt.save({"w": torch.zeros(3)}, store, step=7)
    >>> (found,) = incckpt.inventory(store).items
    >>> found.step, found.standing, found.ok, found.ref == saved.ref
    (7, 'lineage', True, True)
    >>> incckpt.load(store, step=found.ref)
    {'w': tensor([0., 0., 0.])}
    """
    check_choice("level", level, get_args(Level))
    location = locate(url, run=run)
    if location.step is not None:
        raise OptionError(f"{redact(location.store)}: an inventory is of a store or a run; leave out the '@…'")
    with ExitStack() as stack:
        store = stack.enter_context(Store.lent(url, location.store, storage_options))
        store.damage()
        runs = [location.run]
        if not location.named:
            owners = {owner for owner, _, _, _ in list_refs(store.backend)}
            owners |= {entry.key.split("/")[1] for entry in store.backend.list("runs/") if entry.key.count("/") > 1}
            runs = sorted(owners)
        reader = stack.enter_context(Reader(store, threads=chosen_threads(threads)))
        return take_inventory(store, runs, level, Checker(store, reader, level, set()))


def recover(
    url: str | os.PathLike[str] | Backend,
    *,
    run: str | None = None,
    refs: Collection[str] | None = None,
    dry_run: bool = True,
    level: Level = "sizes",
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    storage_options: Mapping[str, Any] | None = None,
) -> RecoveryPlan:
    """Find out how a damaged run can be had back, and with ``dry_run=False`` do it.

    For a run whose lineage was damaged or lost: files of ``runs/<run>/`` were deleted, garbled or put back from an old
    backup. A new attempt is started that continues what is whole. No checkpoint is deleted or changed. A writer of the
    run that is alive gets `SupersededError` at its next save, as by any new attempt; what it has committed is
    continued.

    Parameters
    ----------
    url
        Of the store, with the run as a fragment where wanted: ``s3://bucket/sweep#lr3e-4``. Or a `Backend`, which stays
        open.
    run
        Name of the run, in place of the fragment; ``"default"`` where neither is given.
    refs
        Exact names of the checkpoints that are to be the lineage. By default all that are whole: as the attempts that
        wrote down what they continued say, and for an attempt whose word is lost, those before its own first step.
    dry_run
        Whether to stop at the plan, writing nothing.
    level
        How closely to look whether a checkpoint is whole, as for `verify`.
    threads
        For decoding; by default all cores that this process may use.
    progress
        Called with how many of how many checkpoints are checked, from any thread.
    storage_options
        For fsspec.

    Returns
    -------
    RecoveryPlan
        What the run would be made of, or is; ``print`` it. Where there is nothing to do, nothing is written.

    Raises
    ------
    OptionError
        If an argument is not usable, or `refs` are not whole or of one step.
    StoreNotFoundError, CheckpointNotFoundError
        If there is no store at `url`, or no checkpoint of the run stands in it.
    SupersededError
        If another process has started an attempt at the same time. Nothing was changed.
    FormatError, CorruptionError
        If a later version of incckpt has written to the run.
    ReadOnlyError
        If the store cannot be written, unless `dry_run`.
    BackendError
        If a request failed; recovering again is safe.

    Examples
    --------
    >>> import incckpt, pathlib, shutil, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> for step in range(3):
    ...     saved = incckpt.save({"w": torch.full((3,), float(step))}, store)
    >>> shutil.rmtree(pathlib.Path(store, "runs"))
    >>> plan = incckpt.recover(store, dry_run=False)
    >>> len(plan.lineage)
    3
    >>> incckpt.load(store)
    {'w': tensor([2., 2., 2.])}
    >>> incckpt.recover(store).needed
    False
    """
    check_choice("level", level, get_args(Level))
    location = locate(url, run=run)
    if location.step is not None:
        raise OptionError(
            f"{redact(location.store)}: a recovery concerns a whole run; leave out the '@…', and give refs= to choose"
        )
    stops = checked_flag("dry_run", dry_run)
    check_function("progress", progress)
    chosen = None if refs is None else [_parsed(name) for name in checked_strings("refs", refs)]
    with ExitStack() as stack:
        store = stack.enter_context(Store.lent(url, location.store, storage_options))
        reader = stack.enter_context(Reader(store, threads=chosen_threads(threads)))
        recoverer = Recoverer(store, location.run, Checker(store, reader, level, set()), chosen, progress)
        return recoverer.plan() if stops else recoverer.carry_out()


def _parsed(name: str) -> RefName:
    found = RefName.parse(name)
    if found is None:
        raise OptionError(f"refs: not the exact name of a checkpoint: {shown(name)}; `inventory` lists them")
    return found
