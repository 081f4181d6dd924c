"""Verbs to and from the files of other programs: `export` and `import`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from incckpt.cli.options import STORE, best_options, storage_option, url_argument, verb
from incckpt.cli.output import Output, plural, size


@verb("export")
@url_argument("url", metavar=STORE)
@click.argument("target", metavar="TARGET", type=click.Path())
@click.option("--format", "form", help="pt, safetensors, huggingface or dcp; by default as TARGET's suffix says.")
@click.option("--keys", multiple=True, metavar="GLOB", help="Only what matches, as 'model.*'; may be repeated.")
@click.option("--root", metavar="NAME", help="The part to export; names become relative to it.")
@click.option("--shard-bytes", type=click.IntRange(1), default=5_000_000_000, help="Of files of safetensors (5 GB).")
@click.option("--beside", type=click.Path(), metavar="FOLDER", help="huggingface: copy config and tokenizer from here.")
@click.option("--leave-out", is_flag=True, help="Leave out what the format cannot hold.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--allow-pickle", is_flag=True, help="Unpickle what the checkpoint holds as pickles.")
@best_options
@storage_option()
def export_command(
    output: Output, url: str, target: str, form: Any, keys: Sequence[str], option: dict[str, Any] | None, **rest: Any
) -> None:
    """Write a checkpoint to a file or folder that other programs read."""
    from incckpt.interchange import export

    with output.progress_by_checkpoint("exporting") as progress:
        done = export(url, target, format=form, keys=keys or None, progress=progress, storage_options=option, **rest)

    def show() -> None:
        for path in done.files:
            output.line(f"wrote {path}")
        output.line(f"step {done.step} of run {done.run}: {plural(done.tensors, 'tensor')}, {size(done.nbytes)}")
        if done.left_out:
            output.line(f"left out: {', '.join(done.left_out)}")
        if done.needs_pickle:
            output.line("torch.load takes weights_only=False for this file: there is more in it than tensors.")

    document = {
        "run": done.run,
        "step": done.step,
        "files": [str(path) for path in done.files],
        "nbytes": done.nbytes,
        "tensors": done.tensors,
        "left_out": done.left_out,
        "needs_pickle": done.needs_pickle,
    }
    output.result(document, show)


@verb("import")
@url_argument("paths", metavar="PATH... URL", nargs=-1, required=True)
@click.option("--step", type=click.IntRange(0), help="Of one file; by default as its name says, or the next.")
@click.option(
    "--if-exists", type=click.Choice(["error", "skip", "replace"]), default="error", help="If the run has the step."
)
@click.option("--allow-pickle", is_flag=True, help="Unpickle files that need it: only files that you trust.")
@storage_option()
def import_command(output: Output, paths: Sequence[str], option: dict[str, Any] | None, **rest: Any) -> None:
    """Save files of other programs as checkpoints.

    PATH is a file (.pt, .safetensors, .ckpt), a checkpoint folder, or a folder of
    several; a series becomes a run in which each costs what is new in it.
    """
    from incckpt.interchange import import_files

    *sources, url = paths
    if not sources:
        raise click.UsageError("give the files first, then the URL of the store")
    with output.progress_by_checkpoint("importing") as progress:
        done = import_files(sources, url, progress=progress, storage_options=option, **rest)

    def show() -> None:
        for one in done:
            made = one.checkpoint
            where = f"step {made.step} of run {made.run}"
            output.line(f"{one.source}: {where}, {size(made.written)} of {size(made.nbytes)} written")
            if one.left_out:
                output.line(f"  not read: {', '.join(one.left_out)}")

    document = [{"source": str(one.source), "checkpoint": one.checkpoint, "left_out": one.left_out} for one in done]
    output.result({"imported": document}, show)
