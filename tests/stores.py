"""Looking into a store from below, for tests."""

from __future__ import annotations

import os

from incckpt.backends.base import Backend
from incckpt.backends.registry import open_backend
from incckpt.store.objects import DELTAS, OBJECTS, manifest_keys
from incckpt.store.refs import Ref, list_refs
from incckpt.store.store import Store

__all__ = ["needed_keys", "object_keys", "orphans"]


def object_keys(backend: Backend) -> set[str]:
    """Return the keys of all objects."""
    return {entry.key for space in (OBJECTS, DELTAS) for entry in backend.list(space)}


def needed_keys(backend: Backend) -> set[str]:
    """Return the keys of all objects that a ref of any run needs."""
    store = Store(backend)
    needed: set[str] = set()
    for run, name, _, tombstone in list_refs(backend):
        assert name is not None
        if not tombstone:
            ref = store.run(run).read(name)
            assert isinstance(ref, Ref)
            needed |= manifest_keys(store.manifest(ref)) | {ref.manifest}
    return needed


def orphans(url: str | os.PathLike[str] | Backend) -> set[str]:
    """Return the objects that no checkpoint needs, after checking that every one that is needed is there."""
    backend = url if isinstance(url, Backend) else open_backend(url)
    there, needed = object_keys(backend), needed_keys(backend)
    assert needed <= there, f"missing: {sorted(needed - there)}"
    return there - needed
