"""The verb `completion`, and what a shell is answered at the press of a key."""

from __future__ import annotations

import os
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from incckpt.cli.options import verb
from incckpt.cli.output import Output

_PLACES = {
    "bash": "~/.local/share/bash-completion/completions/incckpt",
    "zsh": "a folder of your $fpath, as _incckpt",
    "fish": "~/.config/fish/completions/incckpt.fish",
}

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line type value
    for line in $(%(complete_var)s=bash_complete COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_CWORD=9999 \\
        COMP_WORDBREAKS="$COMP_WORDBREAKS" "$1" 2>/dev/null); do
        IFS=, read -r type value <<<"$line"
        case $type in
            dir) compopt -o dirnames -o filenames ;;
            file) compopt -o default -o filenames ;;
            *) COMPREPLY+=("$value") ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class _Bash(BashComplete):
    """Completion of URLs too: bash takes ``:`` and ``@`` for the ends of words."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words, _ = super().get_completion_args()  # all of them, uncut
        typed = "" if line[-1:].isspace() or not words else words.pop()
        raw = line.split()[-1] if line.split() else ""
        breaks = set(":=@") & set(os.environ.get("COMP_WORDBREAKS", ""))
        ends = [index for index, character in enumerate(typed) if character in breaks and raw[:1] not in ("'", '"')]
        self._before = ""  # what bash leaves as it is; of an '@' it takes the word to begin with it
        if ends:
            self._before = typed[: ends[-1] + (typed[ends[-1]] != "@")]
        return words, typed

    def format_completion(self, item: CompletionItem[Any]) -> str:
        return f"{item.type},{str(item.value).removeprefix(self._before)}"


@verb("completion")
@click.argument("shell", type=click.Choice(list(_PLACES)))
def completion_command(output: Output, shell: str) -> None:
    """Print what completes verbs, options, URLs, runs and steps in a shell.

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
