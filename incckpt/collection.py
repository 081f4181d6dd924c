"""`collect`: frees what no checkpoint of a store needs, planned first and carried out on demand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from incckpt.backends.base import Backend, redact
from incckpt.errors import CollectionError, OptionError
from incckpt.options import check_function, checked_flag, checked_seconds
from incckpt.store.gc import Collector
from incckpt.store.location import locate
from incckpt.store.plan import CollectionPlan
from incckpt.store.store import Store

__all__ = ["collect"]


def collect(
    url: str | os.PathLike[str] | Backend,
    *,
    dry_run: bool = True,
    min_age: float | timedelta = 3600.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    storage_options: Mapping[str, Any] | None = None,
) -> CollectionPlan:
    """Find what no checkpoint of a store needs, whichever the run, and with ``dry_run=False`` delete it.

    Managers collect what they prune. This finds the rest: objects of saves that were killed,
    of runs that ended, lists of collectors that were killed, temporary files, unfinished uploads. Writers
    and readers of the store need not stop.

    Parameters
    ----------
    url
        Of the store, without a fragment: a collection concerns all of its runs. Or a `Backend`, which stays open.
    dry_run
        Whether to stop at the plan, writing nothing.
    min_age
        Leave objects younger than this: seconds, or a `timedelta`. Safety does not depend on it. Ages are by the
        server's clock; those of a dry run by this machine's, since the server's takes a put to find out.
    progress
        Called with how many of how many manifests are read, from any thread.
    storage_options
        For fsspec.

    Returns
    -------
    CollectionPlan
        What would be deleted, or was, and why; ``print`` it.

    Raises
    ------
    OptionError
        If an argument is not usable.
    StoreNotFoundError
        If there is no store at `url`.
    CollectionError
        If it cannot be told what is needed: a checkpoint is unreadable, which the message names. Or if the store cannot
        create exclusively, so that it cannot be told whether a save in flight is over. Nothing was deleted.
    ReadOnlyError
        If the store cannot be written, unless `dry_run`.
    BackendError
        If a request failed; collecting again goes on where it stopped.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> checkpoint = incckpt.save({"w": torch.zeros(3)}, store)
    >>> len(incckpt.collect(store).removals)
    0
    """
    location = locate(url)
    if location.named or location.step is not None:
        raise OptionError(f"{redact(location.store)}: a collection concerns the whole store; leave out the '#…'")
    checked_flag("dry_run", dry_run)
    check_function("progress", progress)
    min_age = checked_seconds("min_age", min_age)
    with ExitStack() as stack:
        store = stack.enter_context(Store.lent(url, location.store, storage_options))
        store.check()
        collector = Collector(store, progress=progress)
        if dry_run:
            return collector.plan(min_age=min_age, clock=time.time)
        with store.backend.freeing():
            store.create()
            if not store.backend.exclusive:
                raise CollectionError(
                    f"nothing was collected at {store.backend.url}: without exclusive creation it cannot be told "
                    "whether a save in flight is over"
                )
            return collector.carry_out(collector.plan(min_age=min_age))
