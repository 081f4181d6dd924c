"""Verbs that look: `list`, `info` and `diff`."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any

import click

import incckpt
from incckpt.cli.options import STORE, best_options, storage_option, url_argument, verb
from incckpt.cli.output import Output, number, plural, shape, size, when
from incckpt.cli.urls import beside

if TYPE_CHECKING:
    from incckpt.inspection.description import Description
    from incckpt.inspection.difference import Difference, TensorDifference
    from incckpt.run.checkpoint import Checkpoint

_SHOWN = 20


@verb("list")
@url_argument("url", metavar=STORE)
@click.option("--abandoned", is_flag=True, help="Also those that were abandoned by going back behind them.")
@storage_option()
def list_command(output: Output, url: str, abandoned: bool, option: dict[str, Any] | None) -> None:
    """List the checkpoints of a store, or of the run that URL names."""
    found = incckpt.list_checkpoints(url, abandoned=abandoned, storage_options=option)
    output.result({"checkpoints": found}, lambda: _show_list(output, found))


def _show_list(output: Output, found: list[Checkpoint]) -> None:
    if not found:
        output.line("There is no checkpoint to list.")
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
@url_argument("url", metavar=STORE)
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


@verb("diff")
@url_argument("before", metavar="A")
@url_argument("after", metavar="B")
@click.option("--all", "all_tensors", is_flag=True, help="Every tensor that differs, not the 20 that moved most.")
@best_options
@storage_option()
def diff_command(
    output: Output,
    before: str,
    after: str,
    all_tensors: bool,
    metric: str | None,
    mode: Any,
    option: dict[str, Any] | None,
) -> None:
    """Say what changed from checkpoint A to B, by tensor.

    B may be a fragment alone, of A's store: store#run@100 '#run@200', or a step of
    A's run: store#run@100 @200. Only tensors that differ are read.
    """
    with output.progress("comparing") as progress:
        after = beside(before, after)
        found = incckpt.diff(before, after, metric=metric, mode=mode, progress=progress, storage_options=option)
    output.result(found, lambda: _show_diff(output, found, all_tensors))


def _show_diff(output: Output, found: Difference, all_tensors: bool) -> None:
    one, other = found.before, found.after
    output.line(f"from step {one.step} of run {one.run} to step {other.step} of run {other.run}")
    if not found:
        output.line(f"nothing differs: {plural(found.same_tensors, 'tensor')}, {size(found.same_bytes)}")
        return
    tensors = list(found.tensors)
    if not all_tensors and len(tensors) > _SHOWN:
        tensors = sorted(tensors, key=_moved, reverse=True)[:_SHOWN]
    output.line()
    if tensors:
        titles = ["tensor", "change", ">relative", ">norm", ">largest", ">bytes"]
        output.table(titles, [_tensor_row(item) for item in tensors])
    if len(tensors) < len(found.tensors):
        output.line(f"and {len(found.tensors) - len(tensors)} more; --all shows them")
    if found.values:
        output.line()
        rows = [[item.name, item.before or "", item.after or ""] for item in found.values]
        output.table(["value", "before", "after"], rows)
    output.line()
    same = f"{plural(found.same_tensors, 'tensor')} of {size(found.same_bytes)}"
    output.line(
        f"{plural(len(found.tensors), 'tensor')} differ, {same} do not; objects of {size(found.new_bytes)} are new"
    )


def _moved(item: TensorDifference) -> float:
    return item.measure.relative if item.measure else inf


def _tensor_row(item: TensorDifference) -> list[str]:
    norms = ["", "", ""]
    if item.measure is not None:
        norms = [f"{item.measure.relative:.2g}", f"{item.measure.after:.4g}", f"{item.measure.largest:.2g}"]
    part = f" of {size(item.nbytes)}" if item.changed_bytes < item.nbytes else ""
    return [item.name or "(all)", item.change, *norms, f"{size(item.changed_bytes)}{part}"]
