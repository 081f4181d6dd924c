"""Verbs that look: `list` and `info`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

import incckpt
from incckpt.cli.options import STORE, best_options, storage_option, verb
from incckpt.cli.output import Output, number, plural, shape, size, when

if TYPE_CHECKING:
    from incckpt.inspection.description import Description
    from incckpt.run.checkpoint import Checkpoint


@verb("list")
@click.argument("url", metavar=STORE)
@click.option("--abandoned", is_flag=True, help="Also those that were abandoned by going back behind them.")
@storage_option()
def list_command(output: Output, url: str, abandoned: bool, option: dict[str, Any] | None) -> None:
    """List the checkpoints of a store, or of the run that URL names."""
    found = incckpt.list_checkpoints(url, abandoned=abandoned, storage_options=option)
    output.result({"checkpoints": found}, lambda: _show_list(output, found))


def _show_list(output: Output, found: list[Checkpoint]) -> None:
    if not found:
        output.line("The store has no checkpoint.")
        return
    runs = {checkpoint.run for checkpoint in found}
    output.table(
        ["run", ">step", "time", ">state", ">written", "metrics"],
        [
            [
                checkpoint.run,
                str(checkpoint.step),
                when(checkpoint.time) + (" (abandoned)" if checkpoint.abandoned else ""),
                size(checkpoint.nbytes),
                size(checkpoint.written),
                _metrics(checkpoint.metrics),
            ]
            for checkpoint in found
        ],
    )
    written = size(sum(checkpoint.written for checkpoint in found))
    output.line(f"{plural(len(found), 'checkpoint')} in {plural(len(runs), 'run')}, {written} written")


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in metrics.items())


@verb("info")
@click.argument("url", metavar=STORE)
@click.option("--tensors", is_flag=True, help="Also every tensor, with its dtype and shape.")
@best_options
@storage_option()
def info_command(
    output: Output, url: str, tensors: bool, metric: str | None, mode: Any, option: dict[str, Any] | None
) -> None:
    """Say what a checkpoint holds; the latest where URL names no step."""
    found = incckpt.describe(url, metric=metric, mode=mode, storage_options=option)
    output.result(found, lambda: _show_info(output, found, tensors))


def _show_info(output: Output, found: Description, all_tensors: bool) -> None:
    checkpoint = found.checkpoint
    tensors = plural(len(found.tensors), "tensor")
    objects = f"{plural(found.objects, 'full object')}, {plural(found.deltas, 'delta')}"
    facts = {
        "store": found.url,
        "run": checkpoint.run,
        "step": f"{checkpoint.step}{' (abandoned)' if checkpoint.abandoned else ''}",
        "attempt": str(checkpoint.attempt),
        "time": when(checkpoint.time),
        "metrics": _metrics(checkpoint.metrics) or "none",
        "state": f"{size(checkpoint.nbytes)}: {tensors}, {plural(found.values, 'other value')}",
        "stored": f"{size(found.stored_bytes)} in {objects} and a manifest of {size(found.manifest_bytes)}",
        "written": f"{size(checkpoint.written)} by its save; the rest was there",
    }
    output.facts(facts)
    if found.components:
        output.line()
        rows = [[part.name or "(all)", str(part.tensors), size(part.nbytes)] for part in found.components]
        output.table(["part", ">tensors", ">bytes"], rows)
    if all_tensors:
        output.line()
        output.table(
            ["tensor", "dtype", "shape", ">bytes"],
            [[one.name, one.dtype, shape(one.shape), size(one.nbytes)] for one in found.tensors],
        )
