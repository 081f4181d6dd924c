"""What the verbs have in common: their options, and URLs from the command line."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from incckpt.cli.output import Output
from incckpt.cli.urls import complete_url

__all__ = ["STORE", "best_options", "global_options", "storage_option", "url_argument", "verb"]

_F = TypeVar("_F", bound=Callable[..., Any])

STORE = "URL"

url_argument = functools.partial(click.argument, shell_complete=complete_url)


def _set(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            setattr(context.ensure_object(Output), name, True)

    return callback


def global_options(function: _F) -> _F:
    """Add the options that every verb has; they may also stand before the verb."""
    for flag, name, text in (
        ("--debug", "debug", "Show tracebacks, and all that the library logs."),
        ("--quiet", "quiet", "No progress, no warnings."),
        ("--json", "json", "Print JSON, one document."),
    ):
        option = click.option(flag, is_flag=True, expose_value=False, is_eager=True, callback=_set(name), help=text)
        function = option(function)
    return function


def _parse_options(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, Any] | None:
    options: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name or not equals:
            raise click.BadParameter("give NAME=VALUE, as endpoint_url=http://localhost:9000")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options or None


def storage_option(flag: str = "--option", text: str = "", *, short: str | None = "-o") -> Callable[[_F], _F]:
    """Add an option that takes storage options one by one."""
    names = [flag, *([short] if short else [])]
    return click.option(
        *names,
        metavar="NAME=VALUE",
        multiple=True,
        callback=_parse_options,
        help=text or "For the file system, as fsspec names it (endpoint_url, key, ...); may be repeated.",
    )


def best_options(function: _F) -> _F:
    """Add what ``@best`` goes by."""
    function = click.option(
        "--mode", type=click.Choice(["min", "max"]), default="min", help="Whether low or high is best."
    )(function)
    return click.option("--metric", help="What '@best' goes by, if the checkpoints have several metrics.")(function)


def verb(name: str) -> Callable[[Callable[..., int | None]], click.Command]:
    """Make a command of a function that takes an `Output` first; what it returns is the exit code."""

    def decorate(function: Callable[..., int | None]) -> click.Command:
        @click.pass_context
        @functools.wraps(function)
        def call(context: click.Context, *args: Any, **kwargs: Any) -> int:
            output = context.ensure_object(Output)
            flags = [parameter.opts[0] for parameter in context.command.params if isinstance(parameter, click.Option)]
            output.flags = {flag.lstrip("-").replace("-", "_"): flag for flag in flags}
            try:
                with output.logging():
                    code = function(output, *args, **kwargs)
                sys.stdout.flush()
            except BrokenPipeError:
                # The reader has gone, as `head` does. Python would complain when it flushes at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            return code or 0

        context_settings = {"help_option_names": ["-h", "--help"]}
        command: click.Command = click.command(name, context_settings=context_settings)(global_options(call))
        return command

    return decorate
