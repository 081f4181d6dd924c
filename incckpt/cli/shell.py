"""The verb `completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from incckpt.cli.options import verb
from incckpt.cli.output import Output

_PLACES = {
    "bash": "~/.local/share/bash-completion/completions/incckpt",
    "zsh": "a folder of your $fpath, as _incckpt",
    "fish": "~/.config/fish/completions/incckpt.fish",
}


@verb("completion")
@click.argument("shell", type=click.Choice(list(_PLACES)))
def completion_command(output: Output, shell: str) -> None:
    """Print what completes verbs and options in a shell.

    Put it where the shell looks for completions:

    \b
    bash  ~/.local/share/bash-completion/completions/incckpt
    zsh   a folder of your $fpath, as _incckpt
    fish  ~/.config/fish/completions/incckpt.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    script = kind(root, {}, "incckpt", "_INCCKPT_COMPLETE").source()
    output.result({"shell": shell, "script": script, "place": _PLACES[shell]}, lambda: output.line(script))
