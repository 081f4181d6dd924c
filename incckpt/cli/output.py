"""What the command prints: tables or JSON on standard output; progress, warnings and errors on standard error."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from incckpt.cli.errors import as_commands, code_of, message_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from incckpt.run.progress import Progress

__all__ = ["Output", "as_json", "duration", "number", "plural", "shape", "size", "when"]

_WIDTH = 80
_UNITS = ("KB", "MB", "GB", "TB")


class Output:
    """Where the results of one command go, and how.

    Attributes
    ----------
    json
        Whether results and errors are JSON.
    debug
        Whether errors come with their traceback, and logs with all they have.
    quiet
        Whether progress and warnings are left out.
    flags
        The options of the verb, by what Python calls them.
    """

    def __init__(self) -> None:
        self.json = False
        self.debug = False
        self.quiet = False
        self.flags: dict[str, str] = {}

    # -- results

    def result(self, value: object, show: Callable[[], None]) -> None:
        """Print `value` as JSON if that was asked for; else call `show`."""
        if self.json:
            print(json.dumps(as_json(value), ensure_ascii=False, allow_nan=False))
        else:
            show()

    def line(self, text: str = "") -> None:
        """Print a line."""
        print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table. A column whose title begins with ``>`` is aligned to the right."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in columns:
            table.add_column(title.lstrip(">"), justify="right" if title[:1] == ">" else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._print(table)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Print names and values, aligned."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(name, value)
        self._print(table)

    def _print(self, table: Table) -> None:
        console = self._console(sys.stdout)
        with console.capture() as capture:
            console.print(table)
        for line in capture.get().splitlines():
            print(line.rstrip())

    @staticmethod
    def _console(file: Any) -> Console:
        from rich.console import Console

        width = None if file.isatty() else _WIDTH
        return Console(file=file, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)

    # -- progress, warnings, errors

    @property
    def watched(self) -> bool:
        """Whether somebody watches standard error: only then is progress shown."""
        return not (self.quiet or self.json) and sys.stderr is not None and sys.stderr.isatty()

    @contextmanager
    def progress(self, what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
        """Show a progress bar; give what is told how much of how much is done, from any thread."""
        with self._bar(what) as update:
            if unit == "bytes":
                yield lambda done, total: update(done / total if total else 0.0, f"{size(done)} of {size(total)}", "")
            else:
                yield lambda done, total: update(done / total if total else 0.0, f"{done} of {total}", "")

    @contextmanager
    def progress_by_checkpoint(self, what: str) -> Iterator[Callable[[Progress], None]]:
        """Show a progress bar over one checkpoint or several; give what is told of each, from any thread."""
        with self._bar(what) as update:

            def show(at: Progress) -> None:
                part = at.done / at.total if at.total else 0.0
                amount = f"{size(at.done)} of {size(at.total)}" if at.total else ""
                place = f"{at.index + 1} of {at.count}" if at.count > 1 else ""
                update((at.index + part) / at.count, ", ".join(filter(None, (place, amount))), at.name)

            yield show

    @contextmanager
    def _bar(self, what: str) -> Iterator[Callable[[float, str, str], None]]:
        """Show a bar, if somebody watches; give what is told which part of all is done, how much, and of what."""
        if not self.watched:
            yield lambda part, amount, name: None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
        console = self._console(sys.stderr)
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
            task = bars.add_task(what, total=None, amount="")

            def update(part: float, amount: str, name: str) -> None:
                bars.update(task, completed=part, total=1.0, amount=amount, description=f"{what} {name}".rstrip())

            yield update

    def warn(self, text: str) -> None:
        """Tell of something to know, in one line."""
        if not self.quiet:
            print(f"incckpt: warning: {as_commands(' '.join(text.split()))}", file=sys.stderr)

    def error(self, error: BaseException) -> int:
        """Tell of an error in one line, and return the exit code for it."""
        code, message = code_of(error), message_of(error, self.flags)
        if self.debug:
            traceback.print_exception(error)
        if self.json:
            print(json.dumps({"error": type(error).__name__, "message": message, "code": code}), file=sys.stderr)
        else:
            print(f"incckpt: error: {message}", file=sys.stderr)
        return code

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Show what the library logs: warnings, each as a line; with `debug`, everything."""
        log = logging.getLogger("incckpt")
        handler = _Handler(self)
        before = log.level
        log.addHandler(handler)
        if self.debug:
            log.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(before)


class _Handler(logging.Handler):
    """Prints log records as warnings, each once."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.NOTSET)
        self._output = output
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        again = record.name.endswith(".rereading")  # what is wrong for good is told by what gives up
        if self._output.debug:
            print(f"{record.name}: {message}", file=sys.stderr)
        elif record.levelno >= logging.WARNING and not again and message not in self._told:
            self._told.add(message)
            self._output.warn(message)


# -- values as text


def size(nbytes: float) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    power = 0
    while nbytes >= 999.95 and power < len(_UNITS):
        nbytes /= 1000
        power += 1
    return f"{nbytes:.1f} {_UNITS[power - 1]}"


def plural(count: int, noun: str) -> str:
    """Return a count of things."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shape(sizes: Sequence[int]) -> str:
    """Return the shape of a tensor."""
    return "×".join(map(str, sizes)) or "scalar"


def number(value: float) -> str:
    """Return a number with the digits that matter."""
    return f"{value:.6g}"


def when(seconds: float) -> str:
    """Return a time, given in seconds since the epoch, by the local clock."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # another machine's clock, or a damaged one
        return number(seconds)


def duration(seconds: float) -> str:
    """Return a length of time."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"


def as_json(value: object) -> Any:
    """Return `value` as what JSON can express: records as objects, sets sorted, NaN and infinities as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.repr]  # not the ones that are too long to print
        return {field.name: as_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(as_json, value))
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
