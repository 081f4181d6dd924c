"""The verb `recover`."""

from __future__ import annotations

from typing import Any

import click

import incckpt
from incckpt.cli.errors import as_commands
from incckpt.cli.options import STORE, storage_option, url_argument, verb
from incckpt.cli.output import Output


@verb("recover")
@url_argument("url", metavar=STORE)
@click.option("--no-dry-run", is_flag=True, help="Do it; without, say only what would be done.")
@click.option("--level", type=click.Choice(["list", "sizes", "hashes"]), default="sizes", help="As for verify (sizes).")
@storage_option()
def recover_command(output: Output, url: str, no_dry_run: bool, level: Any, option: dict[str, Any] | None) -> None:
    """Make a run usable again whose lineage is damaged or lost.

    A new attempt continues the checkpoints that are whole; nothing is deleted.
    """
    with output.progress("checking", unit="checkpoints") as progress:
        plan = incckpt.recover(url, dry_run=not no_dry_run, level=level, progress=progress, storage_options=option)

    def show() -> None:
        output.line(as_commands(str(plan)))
        if not no_dry_run and plan.needed:
            output.line("Nothing was changed; --no-dry-run does it.")

    output.result(plan, show)
