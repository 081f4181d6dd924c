"""From what ``resume_from_checkpoint`` says, a URL or a folder, to a checkpoint in a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from incckpt.backends.base import redact
from incckpt.errors import CheckpointNotFoundError
from incckpt.integrations._thin_folder import STATE_NAME, Source, absolute, read_pointer
from incckpt.manager import CheckpointManager
from incckpt.store.location import locate

__all__ = ["Reading", "Resumed", "named", "plain_folder"]

log = logging.getLogger(__name__)

Reading = Callable[[Source], CheckpointManager]
"""Opens the run of a checkpoint, to read it."""


@dataclass
class Resumed:
    """What a training resumes from.

    Attributes
    ----------
    source, folder
        The checkpoint, and its thin folder.
    parts
        The parts of the state that it has.
    world_size
        The number of processes that saved it.
    rng
        The generators' states, by rank.
    restored
        Whether the tensors have been restored.
    """

    source: Source
    folder: str
    parts: frozenset[str]
    world_size: int
    rng: Mapping[str, Any] = field(default_factory=dict)
    restored: bool = False


def named(resume: str | os.PathLike[str], own: str, read: Reading) -> Source | str:
    """Return the checkpoint that a folder or URL means; the folder itself, if it is a plain `Trainer`'s.

    Parameters
    ----------
    resume
        As given.
    own
        URL of the trainer's own store, with what is secret in it.
    read
        Opens a run.

    Raises
    ------
    CheckpointNotFoundError
        If the run has none.
    """
    text = os.fspath(resume)
    folder = Path(text)
    if "://" not in text:
        if folder.is_dir() and not (folder / "incckpt.json").exists():
            source = read_pointer(folder, own)
            return text if source is None else _finished(source, folder, read)
        if not folder.exists() and "#" not in text:
            return text  # the `Trainer` says what is wrong with it
    location = locate(resume)
    store = absolute(location.store, resume)
    if isinstance(location.step, int):
        return Source(store, location.run, location.step)
    with read(Source(store, location.run, 0)) as reader:
        found = reader.best if location.step == "best" else reader.latest
    if found is None:
        raise CheckpointNotFoundError(f"run {location.run!r} at {redact(store)} has no checkpoint to resume from")
    return Source(store, location.run, found.step)


def _finished(source: Source, folder: Path, read: Reading) -> Source:
    """Return `source`; if its save was cut off before it was committed, the checkpoint before it."""
    with read(source) as reader:
        latest = reader.latest
    if latest is None or source.step <= latest.step:
        return source
    log.warning("the save of %s was not finished: resuming from step %d instead", folder, latest.step)
    return Source(source.store, source.run, latest.step)


def plain_folder(folder: str | None) -> str | None:
    """Return `folder` if it is that of a plain `Trainer`'s checkpoint, and complete."""
    if folder is None or read_pointer(folder) is not None or not (Path(folder) / STATE_NAME).exists():
        return None
    return folder
