"""What a store says is not trusted: neither how much memory to take for it, nor that Python can make anything of it."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from incckpt.backends.base import Backend
from incckpt.errors import CorruptionError, IncckptError, MemoryLimitError, OptionError
from incckpt.options import checked_count

__all__ = ["LIST_BYTES", "RECORD_BYTES", "MemoryLimit", "available_memory", "fetch", "reading"]

RECORD_BYTES = 16 << 20
"""Most bytes of a document of fixed fields and metrics: a marker, ref, pin or attempt."""

LIST_BYTES = 1 << 30
"""Most bytes of a document that lists others: a manifest, a lineage, what is condemned. A million tensors take about a
quarter of it."""

VARIABLE = "INCCKPT_MAX_BYTES"

_ALWAYS = 64 << 20  # too little to be worth asking the system how much there is
_JSON_VALUE = 64  # about the bytes of memory that a value of a JSON document takes


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Replace every exception that is not ours while something that a store holds is read and understood.

    Raises
    ------
    MemoryLimitError
        If there is not enough memory.
    CorruptionError
        For any other exception.
    """
    try:
        yield
    except IncckptError:
        raise
    except MemoryError as error:
        raise MemoryLimitError(f"{what} takes more memory than there is") from error
    except Exception as error:
        raise CorruptionError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def fetch(backend: Backend, key: str, most: int = RECORD_BYTES) -> bytes:
    """Return the bytes of a document; no more than `most` are ever read.

    Raises
    ------
    KeyNotFoundError
        If the key does not exist.
    CorruptionError
        If it is longer.
    """
    data = backend.get(key, 0, most + 1)
    if len(data) > most:
        raise CorruptionError(f"{key} is not a document of incckpt: it is longer than {most:,} bytes")
    return data


class MemoryLimit:
    """How much memory may be taken for what a store says, checked before any is.

    Parameters
    ----------
    max_bytes
        Bytes; by default those of the environment variable ``INCCKPT_MAX_BYTES``, or else what is available.

    Raises
    ------
    OptionError
        If one of them is not a number of bytes.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        given = os.environ.get(VARIABLE) if max_bytes is None else None
        if given:
            if not re.fullmatch(r"[0-9]{1,18}", given):
                raise OptionError(f"the environment variable {VARIABLE} must be a number of bytes, not {given!r:.80}")
            max_bytes = int(given)
        self._given = None if max_bytes is None else checked_count("max_bytes", max_bytes, 0)

    def check(self, nbytes: int, what: str) -> None:
        """Check that `nbytes` of memory may be taken.

        Parameters
        ----------
        what
            For which they are.

        Raises
        ------
        MemoryLimitError
            If not; says how to raise the limit.
        """
        limit = self._given
        if limit is None:
            if nbytes <= _ALWAYS:
                return
            limit = available_memory()
        if limit is not None and nbytes > limit:
            why = "are available here" if self._given is None else "are allowed"
            raise MemoryLimitError(
                f"{what} takes {nbytes:,} bytes of memory, and {limit:,} {why}. If you trust the store and have the "
                f"memory, give max_bytes={nbytes} or more, or set {VARIABLE}"
            )

    def fetch_list(self, backend: Backend, key: str) -> bytes:
        """Return the bytes of a document that lists others; no more than the limit and `LIST_BYTES` are ever read.

        Raises
        ------
        KeyNotFoundError
            If the key does not exist.
        CorruptionError
            If it is longer than `LIST_BYTES`.
        MemoryLimitError
            If it would take more memory than allowed.
        """
        if self._given is None or self._given >= LIST_BYTES:
            data = fetch(backend, key, LIST_BYTES)
        else:
            data = backend.get(key, 0, self._given + 1)
        self.check_json(data, key)
        return data

    def check_json(self, data: bytes, what: str) -> None:
        """Check that the values of a JSON document may be made.

        Raises
        ------
        MemoryLimitError
            If they would take too much memory.
        """
        values = data.count(b",") + data.count(b"[") + data.count(b"{")
        self.check(len(data) + _JSON_VALUE * values, what)


def available_memory() -> int | None:
    """Return about how many bytes this process can still take without any being swapped out; ``None`` if unknown."""
    return min([*_of_system(), *_of_process(), *_of_control_groups()], default=None)


def _of_system() -> Iterator[int]:
    try:
        fields = _fields(Path("/proc/meminfo"))
        yield (fields["MemAvailable"] + fields["SwapFree"]) << 10
    except (OSError, KeyError, ValueError):  # not Linux
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_process() -> Iterator[int]:
    """Yield what is left of the address space, where that is limited (``ulimit -v``)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            used = 0
        yield max(0, limit - used)


def _of_control_groups() -> Iterator[int]:
    """Yield what the limits of containers leave; a file's cached pages are given back on demand."""
    try:
        path = Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    except OSError:
        return
    root = Path("/sys/fs/cgroup")
    for folder in (root / path, *(root / path).parents):
        if not folder.is_relative_to(root):
            return
        try:
            most, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            pages = _fields(folder / "memory.stat")
            yield max(0, int(most) - int(used) + pages["inactive_file"] + pages["active_file"])
        except (OSError, KeyError, ValueError):  # no limit, or none that is shown
            continue


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers in a file of lines that begin with a name."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
