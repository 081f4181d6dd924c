"""Which files and folders are checkpoints, and of which step."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from incckpt.errors import OptionError
from incckpt.interchange.folders import is_model_folder
from incckpt.interchange.safetensors_files import INDEX_SUFFIX

__all__ = ["Kind", "Source", "find_sources"]

Kind: TypeAlias = Literal["torch", "safetensors", "folder", "dcp"]

_TORCH: Final = frozenset({".pt", ".pth", ".bin", ".ckpt"})
_STEP: Final = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt|epoch)s?[=_-]?(\d+)", re.IGNORECASE)
_NUMBER: Final = re.compile(r"\d+")


@dataclass(frozen=True)
class Source:
    """A checkpoint in another format.

    Attributes
    ----------
    path, kind
        The file or folder, and what it is.
    step
        By its name; ``None`` if that has no number.
    """

    path: Path
    kind: Kind
    step: int | None = None


def find_sources(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Return the checkpoints that `paths` name, by step, or in natural order where their names have no numbers.

    Parameters
    ----------
    paths
        Files, folders that are checkpoints, and folders of such; or one of these.

    Raises
    ------
    OptionError
        If there is none, one is of an unknown kind, or their steps are not clear.
    """
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    sources = [source for path in listed for source in _sources(Path(path))]
    if not sources:
        raise OptionError("no file to import was named")
    if len(sources) == 1:
        return sources
    without = [source for source in sources if source.step is None]
    if len(without) == len(sources):
        return sources if len(listed) > 1 else sorted(sources, key=lambda source: _natural(source.path.name))
    if without:
        raise OptionError(f"{without[0].path} has no step in its name, and others of the series have; leave it out")
    by_step: dict[int, Source] = {}
    for source in sources:
        assert source.step is not None
        if source.step in by_step:
            raise OptionError(
                f"{by_step[source.step].path} and {source.path} are both of step {source.step}; choose one"
            )
        by_step[source.step] = source
    return [by_step[step] for step in sorted(by_step)]


def kind_of(path: Path) -> Kind | None:
    """Return what a file or folder is; ``None`` if it is no checkpoint."""
    if path.is_dir():
        if (path / ".metadata").is_file():
            return "dcp"
        return "folder" if is_model_folder(path) else None
    if path.suffix in _TORCH:
        return "torch"
    return "safetensors" if path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX) else None


def _sources(path: Path) -> Iterator[Source]:
    if not path.exists():
        raise OptionError(f"there is no file or folder {path}")
    kind = kind_of(path)
    if kind is not None:
        yield Source(path, kind, _step(path))
        return
    found = [] if path.is_file() else [child for child in path.iterdir() if kind_of(child) is not None]
    if not found:
        raise OptionError(
            f"{path} is no checkpoint that can be imported: a file of torch.save or Lightning (.pt, .pth, .bin, .ckpt) "
            "or of safetensors, the index of its shards, a folder of the Hugging Face Trainer or of "
            "torch.distributed.checkpoint, or a folder of several of these"
        )
    for child in found:
        kind = kind_of(child)
        assert kind is not None
        yield Source(child, kind, _step(child))


def _step(path: Path) -> int | None:
    """Return the number after the last word for a step in a name, or else the last number in it."""
    stem = path.name if path.is_dir() else path.name.removesuffix(INDEX_SUFFIX).removesuffix(path.suffix)
    words = list(_STEP.finditer(stem))
    steps = [word for word in words if not word[0].lower().startswith("epoch")] or words
    numbers = _NUMBER.findall(stem)
    if steps:
        return int(steps[-1][1])
    return int(numbers[-1]) if numbers else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
