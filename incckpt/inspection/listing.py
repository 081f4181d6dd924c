"""The checkpoints of a whole store, run by run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from incckpt.backends.base import Backend
from incckpt.errors import CorruptionError, FormatError, OptionError
from incckpt.run.checkpoint import Checkpoint, log_unreadable, read_refs_at_once
from incckpt.run.choose import not_found
from incckpt.store.lineage import Run
from incckpt.store.location import locate
from incckpt.store.refs import Ref, run_names
from incckpt.store.store import Store

__all__ = ["list_checkpoints", "list_runs", "refs_of"]

log = logging.getLogger(__name__)


def list_checkpoints(
    url: str | os.PathLike[str] | Backend,
    *,
    run: str | None = None,
    abandoned: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Checkpoint]:
    """Return the checkpoints of a run, or of every run of a store, by run and step.

    Unreadable ones are left out, and the log names them; so are runs whose lineage is damaged, unless one was named.

    Parameters
    ----------
    url
        Of the store. With a run as its fragment (``s3://bucket/sweep#lr3e-4``), of that run alone.
    run
        In place of the fragment.
    abandoned
        Whether to include checkpoints abandoned by rewinding.
    storage_options
        For fsspec.

    Raises
    ------
    OptionError
        If the URL names a step.
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store, or the run that was named has no checkpoint.
    CorruptionError, FormatError
        If the lineage of the run that was named is damaged, or of a later version.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> _ = incckpt.save({"w": torch.zeros(3)}, store, run="a")
    >>> _ = incckpt.save({"w": torch.zeros(3)}, store, run="b", step=7)
    >>> [(checkpoint.run, checkpoint.step) for checkpoint in incckpt.list_checkpoints(store)]
    [('a', 0), ('b', 7)]
    """
    location = locate(url, run=run)
    if location.step is not None:
        raise OptionError(f"a list takes a store or a run; leave out '@{location.step}'")
    with Store.lent(url, location.store, storage_options) as store:
        store.check()
        names = [location.run] if location.named else run_names(store.backend)
        found: list[Checkpoint] = []
        for name in names:
            try:
                refs = list(refs_of(store, store.run(name), abandoned=abandoned))
            except (CorruptionError, FormatError) as error:
                if location.named:
                    raise
                log.error("%s", error)
                continue
            found += (Checkpoint.of(name, ref, abandoned=left) for ref, left in refs)
        if location.named and not found:
            raise not_found(store.run(location.run))
        return found


def list_runs(url: str | os.PathLike[str] | Backend, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of a store's runs that have checkpoints, readable or not, in alphabetical order.

    Parameters
    ----------
    url
        Of the store; a run that its fragment names does not matter.
    storage_options
        For fsspec.

    Raises
    ------
    StoreNotFoundError
        If there is no such store.
    """
    location = locate(url)
    with Store.lent(url, location.store, storage_options) as store:
        store.check()
        return run_names(store.backend)


def refs_of(store: Store, run: Run, *, abandoned: bool = False) -> Iterator[tuple[Ref, bool]]:
    """Yield the refs of a run that can be read, by step, with whether each is abandoned."""
    lineage = run.lineage()
    left = frozenset(lineage.abandoned if abandoned else ())
    names = sorted([*lineage.live, *left], key=lambda name: (name.step, name.attempt))
    for ref in read_refs_at_once(store, run, lineage, names, log_unreadable):
        yield ref, ref.name in left
