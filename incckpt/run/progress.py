"""How far the work on checkpoints has come, for whoever shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["OnProgress", "Progress", "counter"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far `export`, `import_files` or `verify` has come.

    Attributes
    ----------
    name
        What is worked on: the file or folder that is read or written, the step that is verified.
    done, total
        Its bytes: dealt with, and altogether.
    index, count
        Which checkpoint of a series it is, from 0, and how many there are.
    """

    name: str
    done: int
    total: int
    index: int = 0
    count: int = 1


OnProgress = Callable[[Progress], None]


def counter(report: OnProgress | None, name: str, total: int, index: int = 0, count: int = 1) -> Callable[[int], None]:
    """Return what adds bytes to those that are done, and reports them."""
    if report is None:
        return lambda nbytes: None
    done = 0
    lock = threading.Lock()

    def add(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            report(Progress(name, min(done, total), total, index, count))

    return add
