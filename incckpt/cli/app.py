"""The verbs by name, and how one of them is run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib import import_module

import click

from incckpt import __version__
from incckpt.cli.errors import EXIT_CODES
from incckpt.cli.options import global_options
from incckpt.cli.output import Output

__all__ = ["command", "run", "verbs"]

# Verb -> the module that has it, and what it does. A verb's module is imported when the verb is used.
_VERBS = {
    "list": ("look", "The checkpoints of a store or a run."),
    "info": ("look", "What a checkpoint holds."),
    "stats": ("space", "How much a store or a run holds, and saves."),
    "du": ("space", "Which bytes each run and checkpoint needs, shared and own."),
    "blobs": ("space", "The objects of a store, a run or a checkpoint."),
    "diff": ("look", "What changed from one checkpoint to another, by tensor."),
    "verify": ("check", "Whether checkpoints restore."),
    "doctor": ("check", "Whether a store can be used from here, and what a save costs."),
    "copy": ("change", "Copy checkpoints to another store or run: what is missing there."),
    "export": ("files", "Write a checkpoint as a .pt or .safetensors file, or as a folder."),
    "import": ("files", "Save .pt, .safetensors and other files as checkpoints."),
    "prune": ("change", "Delete what a policy does not keep; a plan unless --no-dry-run."),
    "rm": ("change", "Delete checkpoints."),
    "gc": ("space", "Delete what no checkpoint needs; a plan unless --no-dry-run."),
    "report": ("report", "A page about a run for a browser."),
    "recover": ("repair", "Make a damaged run usable again; a plan unless --no-dry-run."),
    "completion": ("shell", "Completion for bash, zsh or fish."),
}


class _Verbs(click.Group):
    """The verbs, imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = import_module(f"incckpt.cli.{_VERBS[cmd_name][0]}")
        found = getattr(module, f"{cmd_name}_command")
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@global_options
@click.version_option(__version__, prog_name="incckpt", message="%(prog)s %(version)s")
def command() -> None:
    """Look into stores of checkpoints, and look after them.

    A URL is a store, a run in it, or a checkpoint: s3://bucket/store,
    s3://bucket/store#run, s3://bucket/store#run@500, ...@latest, ...@best. A path
    is a local folder. Without '#' the run is "default" where one is needed.
    """


def verbs() -> dict[str, str]:
    """Return what each verb does."""
    return {name: text for name, (_, text) in _VERBS.items()}


def run(arguments: Sequence[str]) -> int:
    """Run a command line, given without the program's name, and return its exit code."""
    if "_INCCKPT_COMPLETE" in os.environ:
        import_module("incckpt.cli.shell")  # answers the shell, and nothing else may be printed
        logging.disable()
    output = Output()
    output.json = "--json" in arguments  # for errors of the command line itself
    try:
        code = command.main(list(arguments), prog_name="incckpt", standalone_mode=False, obj=output)

    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 -- told in one line
        return output.error(error)
    return code if isinstance(code, int) else 0
