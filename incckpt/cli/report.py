"""The verb that writes a page: `report`."""

from __future__ import annotations

from typing import Any

import click

import incckpt
from incckpt.cli.options import STORE, storage_option, url_argument, verb
from incckpt.cli.output import Output, size


@verb("report")
@url_argument("url", metavar=STORE)
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(),
    metavar="FILE",
    default="report.html",
    show_default=True,
    help="The file.",
)
@storage_option(short=None)
def report_command(output: Output, url: str, path: str, option: dict[str, Any] | None) -> None:
    """Write a page about a run for a browser: metrics, bytes, waits, changes.

    The page is one file that loads nothing, so it can be mailed or put anywhere.
    """
    with output.progress("reading manifests", unit="checkpoints") as progress:
        nbytes = incckpt.write_report(url, path, progress=progress, storage_options=option)
    output.result({"path": path, "bytes": nbytes}, lambda: output.line(f"{path}: {size(nbytes)}"))
