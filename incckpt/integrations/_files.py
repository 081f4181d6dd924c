"""The files that adapters read and write: one at a path or URL, and the small ones of a checkpoint's folder."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from incckpt.errors import CorruptionError

__all__ = ["file_exists", "make_folder", "read_files", "remove_file", "write_file", "write_files"]

# What frameworks write beside the tensors, and what a reader only parses: nothing that holds pickles or code.
_SUFFIXES = frozenset((".json", ".jinja", ".md", ".model", ".txt"))
_INDEXES = (".safetensors.index.json", ".bin.index.json")


def file_exists(path: str) -> bool:
    """Return whether there is a file, not a folder, at a path or URL."""
    try:
        filesystem, name = url_to_fs(path)
    except ValueError:  # a protocol that fsspec does not know is a store's
        return False
    return bool(filesystem.isfile(name))


def make_folder(path: str) -> None:
    """Make the folder of a file, unless it is there."""
    filesystem, name = url_to_fs(path)
    filesystem.makedirs(filesystem._parent(name), exist_ok=True)


def remove_file(path: str) -> None:
    """Remove a file, if it is there."""
    filesystem, name = url_to_fs(path)
    if isinstance(filesystem, LocalFileSystem):
        if os.path.lexists(name):
            os.remove(name)
    elif filesystem.exists(name):
        filesystem.rm_file(name)


def write_file(path: str, content: bytes) -> None:
    """Write a file, whole or not at all, durable where `path` is local; several ranks may write the same one."""
    make_folder(path)
    filesystem, name = url_to_fs(path)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(name, content)
        return
    folder = os.path.dirname(name)
    temporary = os.path.join(folder, f".{os.path.basename(name)}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)
    finally:
        remove_file(temporary)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of a folder and of the folders in it, by name; no pickles and no weights."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((*folder.glob("*"), *folder.glob("*/*")))
        if path.is_file() and _is_small(path.name)
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
        write_file(str(folder / name), content)


def _is_small(name: str) -> bool:
    return PurePosixPath(name).suffix in _SUFFIXES and not name.endswith(_INDEXES)
