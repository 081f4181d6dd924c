"""Files that appear whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from incckpt.errors import OptionError

__all__ = ["Outputs"]

_PARTIAL = ".partial"


class Outputs:
    """Files that belong together: written beside their places, and moved there by `publish`.

    Parameters
    ----------
    overwrite
        Whether files that are there already are replaced.
    """

    def __init__(self, *, overwrite: bool) -> None:
        self._overwrite = overwrite
        self._paths: list[Path] = []
        self._made: list[Path] = []

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in the order they were opened."""
        return tuple(self._paths)

    def check(self, path: Path) -> None:
        """Refuse a file that is there.

        Raises
        ------
        OptionError
            If it is, and is not to be replaced; or if it is a folder.
        """
        if path.is_dir():
            raise OptionError(f"{path} is a folder; name a file in it")
        if path.exists() and not self._overwrite:
            raise OptionError(f"{path} exists; give another target, or overwrite=True")

    @contextmanager
    def open(self, path: Path) -> Iterator[IO[bytes]]:
        """Open a file for writing; on success it waits for `publish`."""
        self.check(path)
        self.folder(path.parent)
        with open(_partial(path), "w+b") as file:
            if path not in self._paths:
                self._paths.append(path)
            yield file
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def whole_folder(self, path: Path) -> Iterator[Path]:
        """Give a folder to write to, which is not there yet; on success it waits for `publish`.

        Raises
        ------
        OptionError
            If a file or a folder with something in it is there already; a folder is never replaced.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OptionError(f"{path} exists; give another target, or remove it")
        self.folder(path.parent)
        self._paths.append(path)
        shutil.rmtree(_partial(path), ignore_errors=True)
        yield _partial(path)

    def copy(self, source: Path, path: Path) -> None:
        """Add a copy of a file."""
        with open(source, "rb") as original, self.open(path) as file:
            shutil.copyfileobj(original, file)

    def place(self, path: Path) -> Path:
        """Return where a file's bytes are until `publish`."""
        return _partial(path)

    def folder(self, path: Path) -> None:
        """Make a folder, and those above it."""
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def publish(self) -> int:
        """Move all files to their places, in the order they were opened; return their bytes together."""
        nbytes = 0
        for path in self._paths:
            os.replace(_partial(path), path)
            nbytes += sum(one.stat().st_size for one in (path.iterdir() if path.is_dir() else [path]))
        self._paths, self._made = [], []
        return nbytes

    def discard(self) -> None:
        """Remove what was written and not published."""
        for path in self._paths:
            if _partial(path).is_dir():
                shutil.rmtree(_partial(path))
            else:
                _partial(path).unlink(missing_ok=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break  # it is not empty
        self._paths, self._made = [], []


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)
