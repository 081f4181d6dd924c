"""Pointer files: what stands where a framework expects a checkpoint file, and names a checkpoint in a store."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from incckpt.backends.base import redact
from incckpt.errors import CheckpointNotFoundError, FormatError
from incckpt.integrations._files import file_exists, write_file
from incckpt.manager import CheckpointManager
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.restore import MapLocation
from incckpt.store.location import locate

__all__ = [
    "Place",
    "Pointer",
    "absolute",
    "find",
    "place_of",
    "read_pointer",
    "read_state",
    "store_name",
    "write_pointer",
]

log = logging.getLogger(__name__)

_MARK = b'{"incckpt": '
_FORMAT = 1
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a pointer file names.

    Attributes
    ----------
    store
        URL of the store; in the file without what is secret in it.
    run, step
        Of the checkpoint.
    ref
        The checkpoint's exact name; ``None`` as long as its save was not committed.
    """

    store: str
    run: str
    step: int
    ref: str | None = None

    def __str__(self) -> str:
        return f"{redact(self.store)}#{self.run}@{self.step}"


@dataclass(frozen=True, slots=True)
class Place:
    """A checkpoint, as a path or URL names it.

    Attributes
    ----------
    store, run
        Where it is.
    which
        A step, an exact name, ``"latest"`` or ``"best"``.
    at
        For an exact name: its step. If that very checkpoint is gone, the one that its writer replaced it with at this
        step will do.
    announced
        Whether the save that was to make the checkpoint may never have been committed. Then the last one before it
        will do.
    """

    store: str
    run: str
    which: int | str
    at: int | None = None
    announced: bool = False


def place_of(path: str | os.PathLike[str]) -> Place | None:
    """Return what `path`, a pointer file or a URL as ``store#run@step``, names; ``None`` if it is another file.

    Raises
    ------
    OptionError
        If it is no URL.
    FormatError
        If it is a damaged pointer file.
    """
    text = os.fspath(path)
    if file_exists(text):
        pointer = read_pointer(text)
        if pointer is None:
            return None
        if pointer.ref is None:
            return Place(pointer.store, pointer.run, pointer.step, announced=True)
        return Place(pointer.store, pointer.run, pointer.ref, at=pointer.step)
    location = locate(path)
    which = "latest" if location.step is None else location.step
    return Place(absolute(location.store), location.run, which if isinstance(which, int) else str(which))


def read_state(place: Place, *, map_location: MapLocation = None, **options: Any) -> tuple[Any, Checkpoint]:
    """Return the state at `place`, and which checkpoint that was. Nothing is written, and no run taken over.

    Parameters
    ----------
    map_location
        As for ``torch.load``.
    options
        For a read-only `CheckpointManager`.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such store, run or checkpoint.
    CorruptionError
        If it is damaged.
    """
    with CheckpointManager(place.store, run=place.run, read_only=True, **options) as manager:
        found = find(manager, place)
        return manager.load(found.ref, map_location=map_location), found


def find(manager: CheckpointManager, place: Place) -> Checkpoint:
    """Return the checkpoint at `place`, which is in the manager's run.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is none.
    """
    there = manager.checkpoints(abandoned=True)
    live = [checkpoint for checkpoint in there if not checkpoint.abandoned]
    where = f"run {place.run!r} at {redact(place.store)}"
    if place.which == "latest" and live:
        return live[-1]
    if place.which == "best" and (best := manager.best) is not None:
        return best
    for checkpoint in (*reversed(live), *reversed(there)):
        if place.which in (checkpoint.step, checkpoint.ref):
            return checkpoint
    for checkpoint in reversed(live):
        if checkpoint.step == place.at and str(place.which).startswith(f"{checkpoint.attempt:06d}-"):
            log.warning("%s: %s was replaced by %s, of the same step", where, place.which, checkpoint.ref)
            return checkpoint
        if place.announced and isinstance(place.which, int) and checkpoint.step < place.which:
            log.warning(
                "%s: step %d was announced but never committed, its writer must have died; this is step %d",
                where,
                place.which,
                checkpoint.step,
            )
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in live[-12:]) or "none"
    raise CheckpointNotFoundError(f"{where} has no checkpoint {place.which}; it has (the last twelve): {steps}")


def absolute(store: str) -> str:
    """Return the URL of a store: of a folder its ``file://`` URL, which does not depend on the current directory."""
    return store if "://" in store else Path(store).expanduser().absolute().as_uri()


def store_name(store: str) -> str:
    """Return how pointer files name a store."""
    return redact(absolute(store))


def read_pointer(path: str) -> Pointer | None:
    """Return what the file at `path`, local or of any fsspec protocol, points to; ``None`` if it is no pointer file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FormatError
        If it is a pointer file that this version cannot read.
    """
    filesystem, name = url_to_fs(path)
    with filesystem.open(name, "rb") as file:
        text = file.read(_MOST_BYTES)
    if not text.startswith(_MARK):
        return None
    try:
        document: dict[str, Any] = json.loads(text)
        version = document.pop("incckpt")
        pointer = Pointer(**document) if version == _FORMAT else None
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path} is a damaged pointer file; name the checkpoint by its URL instead") from error
    if pointer is None:
        raise FormatError(f"{path} was written by a later version of incckpt; upgrade to read it")
    return pointer


def write_pointer(path: str, pointer: Pointer) -> None:
    """Write a pointer file, whole or not at all."""
    document = asdict(replace(pointer, store=store_name(pointer.store)))
    write_file(path, json.dumps({"incckpt": _FORMAT} | document).encode())
