"""Exit codes, and errors as one line."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

from incckpt import errors

__all__ = ["EXIT_CODES", "Exit", "as_commands", "code_of", "message_of"]


class Exit:
    """What the command's exit codes mean."""

    OTHER = 1
    USAGE = 2
    NOT_FOUND = 3
    DAMAGED = 4
    REFUSED = 5
    BACKEND = 6
    MISSING_EXTRA = 7
    INTERRUPTED = 130


EXIT_CODES = {
    0: "all is well",
    Exit.OTHER: "anything else",
    Exit.USAGE: "the command line or an option is not usable",
    Exit.NOT_FOUND: "there is no such store, run or checkpoint",
    Exit.DAMAGED: "something is damaged, or of a later version",
    Exit.REFUSED: "refused: no permission, read-only, or another process writes the run",
    Exit.BACKEND: "the store could not be reached, or failed",
    Exit.MISSING_EXTRA: "an optional package is not installed",
    Exit.INTERRUPTED: "interrupted",
}

# The first class that fits counts.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (click.exceptions.Abort, Exit.INTERRUPTED),
    (KeyboardInterrupt, Exit.INTERRUPTED),
    (click.ClickException, Exit.USAGE),
    (errors.OptionError, Exit.USAGE),
    (errors.StateMismatchError, Exit.USAGE),
    (errors.MissingExtraError, Exit.MISSING_EXTRA),
    (errors.StoreNotFoundError, Exit.NOT_FOUND),
    (errors.CheckpointNotFoundError, Exit.NOT_FOUND),
    (errors.FormatError, Exit.DAMAGED),
    (errors.CorruptionError, Exit.DAMAGED),
    (errors.CollectionError, Exit.DAMAGED),
    (errors.BackendPermissionError, Exit.REFUSED),
    (errors.ReadOnlyError, Exit.REFUSED),
    (errors.SupersededError, Exit.REFUSED),
    (errors.DistributedError, Exit.REFUSED),
    (errors.BackendError, Exit.BACKEND),
    # Files named on the command line.
    (PermissionError, Exit.REFUSED),
    (FileNotFoundError, Exit.USAGE),
    (FileExistsError, Exit.USAGE),
    (IsADirectoryError, Exit.USAGE),
    (NotADirectoryError, Exit.USAGE),
)


def code_of(error: BaseException) -> int:
    """Return the exit code for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.OTHER)


# Calls that messages of the library advise, and the commands that do the same.
_CALLS = (
    (
        re.compile(r"incckpt\.recover\('([^']+)', run='([^']+)', dry_run=False\)"),
        r"'incckpt recover \1#\2 --no-dry-run'",
    ),
    (re.compile(r"incckpt\.recover\('([^']+)', run='([^']+)'\)"), r"'incckpt recover \1#\2'"),
    (re.compile(r"CheckpointManager\('([^']+)', run='([^']+)'\)\.delete\((\d+)\)"), r"'incckpt rm \1#\2@\3'"),
)


def as_commands(text: str) -> str:
    """Return a message of the library as it is told on the command line: a command in place of a call."""
    for call, command in _CALLS:
        text = call.sub(command, text)
    return text


def message_of(error: BaseException, flags: Mapping[str, str] | None = None) -> str:
    """Return what to tell the user, in one line: what happened, and what to do.

    Parameters
    ----------
    flags
        How to write on the command line what Python calls ``name=``, by name.
    """
    if isinstance(error, (KeyboardInterrupt, click.exceptions.Abort)):
        return "interrupted"
    if isinstance(error, click.ClickException):
        text = error.format_message()
        context = getattr(error, "ctx", None)
        if context is not None:
            text = f"{text.rstrip('.')}; see '{context.command_path} --help'"
    elif isinstance(error, errors.IncckptError):
        # Of a BackendError with an errno, str() shows that number and the path besides the message.
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = as_commands(text)
        text = re.sub(r"\b(\w+)=(True\b)?", lambda match: (flags or {}).get(match[1], match[0]), text)
    elif isinstance(error, OSError):  # of a file that is read or written here
        text = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    else:
        kind = type(error).__name__
        text = f"{kind}: {error}; this is a bug in incckpt, please report it with what --debug shows"
    return " ".join(text.split())
