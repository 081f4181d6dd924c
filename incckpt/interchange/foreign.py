"""A checkpoint of another program, read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from incckpt.interchange.mapped import Mappings

__all__ = ["Foreign"]


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another program, read.

    Attributes
    ----------
    state
        Its state; the memory of its tensors is that of mapped files, where it can be.
    files
        The files.
    mappings
        Where the memory is, if not in these.
    left_out
        Names of files of the folder that were not read.
    metrics
        Metrics of its step that it holds.
    """

    state: Any
    files: tuple[Path, ...]
    mappings: Mappings | None = None
    left_out: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
