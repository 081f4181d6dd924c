"""From what ``resume_from_checkpoint`` says, a URL or a folder, to a checkpoint in a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from incckpt.errors import FormatError
from incckpt.integrations._pointer import Place, Pointer, find, place_of, store_name, write_pointer
from incckpt.manager import CheckpointManager

__all__ = [
    "POINTER_NAME",
    "PREFIX",
    "STATE_NAME",
    "Reading",
    "Resumed",
    "named",
    "place_in",
    "plain_folder",
    "point_at",
    "step_of",
]

PREFIX = "checkpoint"
STATE_NAME = "trainer_state.json"
POINTER_NAME = "tensors.json"

Reading = Callable[[str, str], CheckpointManager]
"""Opens a run of a store, to read it."""


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

    source: Pointer
    folder: str
    parts: frozenset[str]
    world_size: int
    rng: Mapping[str, Any] = field(default_factory=dict)
    restored: bool = False


def named(resume: str | os.PathLike[str], own: str, read: Reading) -> Pointer | str:
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
    StoreNotFoundError, CheckpointNotFoundError
        If there is none.
    FormatError
        If the folder's pointer is damaged.
    """
    text = os.fspath(resume)
    folder = Path(text)
    place: Place | None
    if "://" not in text and folder.is_dir() and not (folder / "incckpt.json").exists():
        place = place_in(folder, own)
    elif "://" not in text and not folder.exists() and "#" not in text:
        return text  # the `Trainer` says what is wrong with it
    else:
        place = place_of(resume)
    if place is None:
        return text
    with read(place.store, place.run) as reader:
        found = find(reader, place)
    return Pointer(place.store, place.run, found.step, found.ref)


def point_at(folder: Path, pointer: Pointer) -> None:
    """Say in `folder` where the checkpoint's tensors are."""
    write_pointer(str(folder / POINTER_NAME), pointer)


def place_in(folder: str | os.PathLike[str], own: str = "") -> Place | None:
    """Return where the tensors of the checkpoint in `folder` are; ``None`` if it is no thin folder.

    Pointers hold no passwords. A pointer to the store `own` gets that URL, with what is secret in it.

    Raises
    ------
    FormatError
        If the pointer is damaged.
    """
    path = Path(folder) / POINTER_NAME
    if not path.is_file():
        return None
    place = place_of(str(path))
    if place is None:
        raise FormatError(f"{path} does not say where the checkpoint is; resume by URL instead")
    return replace(place, store=own) if own and store_name(own) == place.store else place


def step_of(folder: object) -> int | None:
    """Return the step in the name of a ``checkpoint-N`` folder."""
    prefix, _, step = os.path.basename(str(folder)).rpartition("-")
    return int(step) if prefix == PREFIX and step.isdecimal() else None


def plain_folder(folder: str | None) -> str | None:
    """Return `folder` if it is that of a plain `Trainer`'s checkpoint, and complete."""
    if folder is None or Path(folder, POINTER_NAME).exists() or not Path(folder, STATE_NAME).exists():
        return None
    return folder
