"""From a checkpoint to a state: in new memory, or in place."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm import tqdm

from incckpt.options import checked_flag
from incckpt.run.contents import Contents, read_packed
from incckpt.run.reader import Bytes, Reader, reads_for
from incckpt.staging.baseline import Baseline
from incckpt.staging.content import Content
from incckpt.staging.hostmem import new_buffer
from incckpt.state.assign import Assignment
from incckpt.state.build import MapLocation, build
from incckpt.state.entries import range_kinds
from incckpt.state.selection import Patterns
from incckpt.store.manifest import Manifest
from incckpt.store.untrusted import reading

__all__ = ["MapLocation", "load_state", "restore_into"]

log = logging.getLogger(__name__)


@contextmanager
def progress_bar(total: int, step: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` bytes are read, if asked to or on a terminal; yield a function that counts them."""
    if show is not None:
        checked_flag("progress", show)
    watched = sys.stderr is not None and sys.stderr.isatty()  # a service has no stderr
    shown = watched if show is None else show and sys.stderr is not None
    if not shown:
        yield lambda nbytes: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=f"step {step}") as bar:
        yield bar.update


def load_state(
    reader: Reader,
    manifest: Manifest,
    *,
    keys: str | Sequence[str] | None = None,
    map_location: MapLocation = None,
    allow_pickle: bool = False,
    progress: bool | None = None,
) -> Any:
    """Return the state of a checkpoint, or the part of it that `keys` match, in new memory."""
    contents = Contents.of(manifest, keys, fetch=partial(read_packed, reader, manifest))
    reader.memory.check(contents.new_bytes(), f"the state of step {manifest.step}")
    with reading(f"the state of step {manifest.step}"):
        buffers = [
            new_buffer(item.nbytes) if index in contents.wanted else None for index, item in enumerate(manifest.ranges)
        ]
    reads = reads_for(manifest, manifest.ranges, buffers, contents.names())
    with progress_bar(sum(read.chunk.nbytes for read in reads.values()), manifest.step, progress) as count:
        reader.read(reads.values(), count)
    return build(contents.tree, contents.entries, buffers, map_location=map_location, allow_pickle=allow_pickle)


def restore_into(
    reader: Reader,
    manifest: Manifest,
    target: Any,
    *,
    base: Baseline,
    keys: Patterns = None,
    ignore: Patterns = None,
    allow_pickle: bool = False,
    progress: bool | None = None,
) -> None:
    """Restore a checkpoint into `target`, in place, and keep its contents as `base` if that keeps contents.

    Parameters
    ----------
    keys, ignore
        Globs of dotted names: only what `keys` match is restored, and nothing that `ignore` matches; see `Assignment`.

    Raises
    ------
    StateMismatchError
        If it does not fit, or `target` is not writable; nothing was changed.
    MissingObjectError, CorruptionError
        If it is damaged; `target` is undefined until another restore succeeds.
    Exception
        Whatever an object's own ``load_state_dict`` raises, with a note of its path; `target` is undefined then too.
    """
    contents = Contents.of(manifest, fetch=partial(read_packed, reader, manifest))
    sizes = [(item.nbytes, item.itemsize) for item in manifest.ranges]
    assignment = Assignment(
        contents.tree,
        contents.entries,
        [nbytes for nbytes, _ in sizes],
        target,
        keys=keys,
        ignore=ignore,
        allow_pickle=allow_pickle,
    )
    buffers: list[Bytes | None] = [None] * len(sizes)
    for index in assignment.ranges:
        buffers[index] = assignment.destination(index)
    new = [index for index in assignment.ranges if buffers[index] is None]
    reader.memory.check(contents.new_bytes(new), f"the state of step {manifest.step}")
    with reading(f"the state of step {manifest.step}"):
        for index in new:
            buffers[index] = new_buffer(sizes[index][0])
    reads = reads_for(manifest, manifest.ranges, buffers, contents.names())
    base.forget()
    layout = None
    if base.keep and len(assignment.ranges) == len(sizes):
        layout = base.layout_for(sizes, range_kinds(contents.entries, len(sizes)), contents.entries)
    if layout is not None and not layout.describes(manifest):
        log.warning(
            "the first save will copy everything: the checkpoint was cut into other chunks (here of up to %d bytes)",
            base.chunk_bytes,
        )
        layout = None
    chunks = manifest.chunks[: len(layout.table.chunk_nbytes)] if layout else ()  # those of packed values come after
    kept = {index: base.pool.take(chunk.nbytes) for index, chunk in enumerate(chunks)}
    for index, buffer in kept.items():
        if manifest.chunks[index].base is None:
            reads[index].out = buffer
        else:
            reads[index].base_out = buffer
    with progress_bar(sum(read.chunk.nbytes for read in reads.values()), manifest.step, progress) as count:
        reader.read(reads.values(), count)
    for index in assignment.ranges:
        delivered, buffers[index] = buffers[index], None
        assert delivered is not None
        assignment.deliver(index, delivered)
    assignment.finish()
    damaged = [index for index, read in reads.items() if read.base_damaged]
    if damaged:
        names = ", ".join(dict.fromkeys(name for index in damaged for name in reads[index].names[:3]))
        log.error(
            "step %d is whole, but the bases of %d of its chunks are damaged, in parts that their deltas do not use "
            "(tensors: %s); the next save stores these chunks in full",
            manifest.step, len(damaged), names,
        )  # fmt: skip
    if layout is not None:
        base.adopt(
            layout,
            [None if index in damaged else Content.of_full(kept[index], chunk) for index, chunk in enumerate(chunks)],
        )
