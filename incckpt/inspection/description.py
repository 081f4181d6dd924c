"""What one checkpoint holds: its tensors, its other values, and the objects that they are stored in."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from incckpt.backends.base import Backend
from incckpt.retention import Mode
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.choose import Which, checked_which, not_found
from incckpt.run.contents import Contents
from incckpt.run.view import RunView
from incckpt.state.entries import TensorEntry
from incckpt.state.tree import GeneratorRef, TensorRef, leaves
from incckpt.store.location import locate
from incckpt.store.manifest import Manifest
from incckpt.store.objects import chunk_keys, manifest_sizes
from incckpt.store.refs import Ref
from incckpt.store.store import Store

__all__ = ["Component", "Description", "TensorInfo", "describe"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor or array of a checkpoint.

    Attributes
    ----------
    name
        Dotted path in the state.
    kind
        ``"torch"`` or ``"numpy"``.
    dtype
        Its name; a structured dtype as JSON text.
    shape
        Elements in each dimension.
    nbytes
        Bytes of its elements.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, entry: TensorEntry) -> TensorInfo:
        """Return what an entry says."""
        return cls(entry.name, entry.kind, entry.dtype, entry.shape, entry.nbytes)


@dataclass(frozen=True, slots=True)
class Component:
    """A top-level part of a state.

    Attributes
    ----------
    name
        Its key; empty if the state is a single tensor.
    tensors, nbytes
        How many tensors it has, and the bytes of their elements.
    """

    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Description:
    """What one checkpoint holds.

    Attributes
    ----------
    url
        Of the store.
    checkpoint
        Which it is.
    tensors
        In the order of the state.
    components
        Its top-level parts that have tensors.
    values
        How many plain values it has; a packed container counts as one.
    chunk_bytes
        Size of the chunks that large tensors are cut into.
    objects, deltas
        How many full objects and deltas it needs, its manifest not counted.
    stored_bytes
        Bytes of all of them, and of the manifest.
    manifest_bytes
        Bytes of the manifest, as stored.
    norms
        Where the save computed them: by tensor, its relative change and the norm of what was stored before.
    """

    url: str
    checkpoint: Checkpoint
    tensors: tuple[TensorInfo, ...]
    components: tuple[Component, ...]
    values: int
    chunk_bytes: int
    objects: int
    deltas: int
    stored_bytes: int
    manifest_bytes: int
    norms: Mapping[str, tuple[float, float]] | None = None


def describe(
    url: str | os.PathLike[str] | Backend,
    *,
    step: Which | None = None,
    run: str | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    storage_options: Mapping[str, Any] | None = None,
) -> Description:
    """Say what a checkpoint holds. Its manifest is read, none of its tensors.

    Parameters
    ----------
    url, step, run, metric, mode, storage_options
        As for `load`.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store, run or step.
    CorruptionError, FormatError
        If its ref or manifest is damaged, or of a later version.

    Examples
    --------
    >>> import incckpt, tempfile, torch
    >>> store = tempfile.mkdtemp()
    >>> _ = incckpt.save({"w": torch.zeros(3), "epoch": 1}, store)
    >>> found = incckpt.describe(store)
    >>> found.tensors
    (TensorInfo(name='w', kind='torch', dtype='float32', shape=(3,), nbytes=12),)
    >>> found.values
    1
    """
    location = locate(url, run=run, step=checked_which(step))
    with (
        Store.lent(url, location.store, storage_options) as store,
        RunView(store, location.run, threads=1, metric=metric, mode=mode) as view,
    ):
        lineage, found = view.read(location.step, lambda _, manifest: manifest)
        if found is None:
            raise not_found(view.run)
        name, manifest, _ = found
        ref = lineage.known.get(name) or view.run.read(name)
        size = ref.manifest_size if isinstance(ref, Ref) else 0  # pruned since
        written = ref.written if isinstance(ref, Ref) else 0
        checkpoint = Checkpoint(
            run=location.run,
            step=name.step,
            attempt=name.attempt,
            time=manifest.time,
            metrics=manifest.metrics,
            nbytes=manifest.nbytes,
            written=written,
            ref=str(name),
            abandoned=name in lineage.abandoned,
        )
        return _describe(store.backend.url, checkpoint, manifest, size)


def _describe(url: str, checkpoint: Checkpoint, manifest: Manifest, manifest_size: int) -> Description:
    contents = Contents.of(manifest)
    tensors = tuple(TensorInfo.of(entry) for entry in contents.entries)
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        top = tensor.name.partition(".")[0]
        counts[top] += 1
        nbytes[top] += tensor.nbytes
    sizes = manifest_sizes(manifest)
    deltas = {str(chunk_keys(chunk)[0]) for chunk in manifest.chunks if chunk.base is not None}
    return Description(
        url=url,
        checkpoint=checkpoint,
        tensors=tensors,
        components=tuple(Component(name, count, nbytes[name]) for name, count in counts.items()),
        values=sum(not isinstance(leaf, (TensorRef, GeneratorRef)) for leaf in leaves(contents.tree)),
        chunk_bytes=manifest.chunk_bytes,
        objects=len(sizes) - len(deltas),
        deltas=len(deltas),
        stored_bytes=sum(sizes.values()) + manifest_size,
        manifest_bytes=manifest_size,
        norms=manifest.norms,
    )
