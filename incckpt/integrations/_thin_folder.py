"""Thin ``checkpoint-N`` folders: the small files of a checkpoint, and a pointer to where its tensors are."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from incckpt.backends.base import Backend, redact
from incckpt.errors import CorruptionError

__all__ = [
    "PREFIX",
    "STATE_NAME",
    "Source",
    "absolute",
    "read_files",
    "read_pointer",
    "step_of",
    "write_files",
    "write_pointer",
]

PREFIX = "checkpoint"
POINTER_NAME = "tensors.json"
STATE_NAME = "trainer_state.json"

# What frameworks write beside the tensors, and what a reader only parses: nothing that holds pickles or code.
_SUFFIXES = frozenset((".json", ".jinja", ".md", ".model", ".txt"))
_INDEXES = (".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint in a store.

    Attributes
    ----------
    store
        URL, without fragment.
    run, step
        Which.
    """

    store: str
    run: str
    step: int

    def __str__(self) -> str:
        return f"{redact(self.store)}#{self.run}@{self.step}"

    @property
    def shown(self) -> Source:
        """The same without user, password and query of the URL."""
        return Source(redact(self.store), self.run, self.step)


def write_pointer(folder: Path, source: Source) -> None:
    """Say in `folder` where the checkpoint's tensors are."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / POINTER_NAME, json.dumps(asdict(source.shown), indent=2).encode())


def read_pointer(folder: str | os.PathLike[str], own: str = "") -> Source | None:
    """Return where the tensors of the checkpoint in `folder` are; ``None`` if it is no thin folder.

    Pointers hold no passwords. A pointer to the store `own` gets that URL, with what is secret in it.

    Raises
    ------
    CorruptionError
        If the pointer is damaged.
    """
    path = Path(folder) / POINTER_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = json.loads(text)
        source = Source(str(found["store"]), str(found["run"]), int(found["step"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(f"{path} does not say where the checkpoint is: {error!r}; resume by URL") from error
    return replace(source, store=own) if source.store == redact(own) else source


def step_of(folder: object) -> int | None:
    """Return the step in the name of a ``checkpoint-N`` folder."""
    prefix, _, step = os.path.basename(str(folder)).rpartition("-")
    return int(step) if prefix == PREFIX and step.isdecimal() else None


def absolute(store: str, given: object) -> str:
    """Return the URL of a store: of a folder its ``file://`` URL, which does not depend on the current directory."""
    if isinstance(given, Backend) or "://" in store:
        return store
    return Path(store).expanduser().absolute().as_uri()


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of a folder and of the folders in it, by name; no pickles, no weights, no pointer."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((*folder.glob("*"), *folder.glob("*/*")))
        if path.is_file() and path.name != POINTER_NAME and _is_small(path.name)
    }


def write_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write what `read_files` returned, each file at once or not at all.

    Raises
    ------
    CorruptionError
        If a name would leave the folder, or is of no file that `read_files` returns.
    """
    for name, content in files.items():
        parts = PurePosixPath(name).parts
        plain = 1 <= len(parts) <= 2 and not {"..", "."}.intersection(parts) and not PurePosixPath(name).is_absolute()
        if not plain or "\\" in name or ":" in name or not _is_small(name) or not isinstance(content, bytes):
            raise CorruptionError(f"the checkpoint has a file {name!r}, which is not one of a trainer's: not written")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)


def _is_small(name: str) -> bool:
    return PurePosixPath(name).suffix in _SUFFIXES and not name.endswith(_INDEXES)


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen half written; ranks of several nodes may write the same one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
