"""Verbs about space: `stats`, `du`, `blobs` and `gc`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import incckpt
from incckpt.cli.options import STORE, best_options, storage_option, url_argument, verb
from incckpt.cli.output import Output, as_json, plural, size

if TYPE_CHECKING:
    from incckpt.inspection.usage import Usage


def _usage(output: Output, url: str, option: dict[str, Any] | None, **choice: Any) -> Usage:
    with output.progress("reading manifests", unit="checkpoints") as progress:
        found = incckpt.usage(url, progress=progress, storage_options=option, **choice)
    for problem in found.unreadable:
        output.warn(problem)
    if found.missing:
        output.warn(f"{plural(len(found.missing), 'object')} that checkpoints need are missing; see 'incckpt verify'")
    return found


@verb("stats")
@url_argument("url", metavar=STORE)
@storage_option()
def stats_command(output: Output, url: str, option: dict[str, Any] | None) -> None:
    """Say how much a store or a run holds, and what storing it incrementally saves."""
    found = _usage(output, url, option)
    kinds = {}
    for kind in ("full", "delta", "manifest", "unneeded"):
        of_kind = [one for one in found.objects if one.kind == kind]
        nbytes = sum(one.nbytes for one in of_kind)
        raw = sum(one.raw_bytes or 0 for one in of_kind)
        kinds[kind] = {"objects": len(of_kind), "bytes": nbytes, "raw_bytes": raw}
    states = sum(checkpoint.nbytes for checkpoint in found.checkpoints)
    stored = sum(kind["bytes"] for kind in kinds.values())
    document = {
        "url": found.url,
        "runs": len(found.runs),
        "checkpoints": len(found.checkpoints),
        "state_bytes": states,
        "stored_bytes": stored,
        "kinds": kinds,
        "missing": found.missing,
        "unreadable": found.unreadable,
    }

    def show() -> None:
        output.facts(
            {
                "store": found.url,
                "checkpoints": f"{len(found.checkpoints)} in {plural(len(found.runs), 'run')}",
                "states": f"{size(states)}, each counted in full",
                "stored": f"{size(stored)}" + (f", {states / stored:.1f} times less" if stored and states else ""),
            }
        )
        output.line()
        output.table(
            ["objects", ">count", ">stored", ">raw"],
            [
                [kind, str(one["objects"]), size(one["bytes"]), size(one["raw_bytes"]) if one["raw_bytes"] else ""]
                for kind, one in kinds.items()
            ],
        )
        if kinds["unneeded"]["objects"]:
            output.line("What no checkpoint needs is of saves in flight, or garbage: see 'incckpt gc'.")

    output.result(document, show)


@verb("du")
@url_argument("url", metavar=STORE)
@best_options
@storage_option()
def du_command(output: Output, url: str, metric: str | None, mode: Any, option: dict[str, Any] | None) -> None:
    """Say which bytes each run and checkpoint needs, and which only it needs.

    What only a checkpoint needs is what deleting it alone would free.
    """
    found = _usage(output, url, option, metric=metric, mode=mode)
    document = {
        "url": found.url,
        "runs": found.runs,
        "checkpoints": found.checkpoints,
        "store_bytes": found.store_bytes,
        "unneeded_bytes": found.unneeded_bytes,
        "missing": found.missing,
        "unreadable": found.unreadable,
    }

    def show() -> None:
        rows = []
        for run in found.runs:
            for one in found.checkpoints:
                if one.run == run.run:
                    step = f"@{one.step}{' (abandoned)' if one.abandoned else ''}"
                    shared = size(one.needed_bytes - one.own_bytes)
                    rows.append([f"  {step}", size(one.nbytes), size(one.needed_bytes), shared, size(one.own_bytes)])
            shared = size(run.needed_bytes - run.own_bytes)
            rows.append([f"#{run.run}", size(run.nbytes), size(run.needed_bytes), shared, size(run.own_bytes)])
        rows.append(["store", "", size(found.store_bytes), "", ""])
        output.table(["", ">state", ">needs", ">shared", ">own"], rows)
        if found.unneeded_objects:
            output.line(f"{size(found.unneeded_bytes)} of the store are needed by no checkpoint: see 'incckpt gc'.")

    output.result(document, show)


@verb("blobs")
@url_argument("url", metavar=STORE)
@click.option("--limit", type=click.IntRange(0), default=20, help="How many to show, the largest first; 0 for all.")
@best_options
@storage_option()
def blobs_command(
    output: Output, url: str, limit: int, metric: str | None, mode: Any, option: dict[str, Any] | None
) -> None:
    """List the objects of a store, or those that a run or a checkpoint needs."""
    found = _usage(output, url, option, metric=metric, mode=mode)
    objects = sorted(found.objects, key=lambda one: (-one.nbytes, one.key))
    shown = objects[: limit or None]

    def show() -> None:
        output.table(
            [">stored", "kind", ">raw", ">needed by", "object"],
            [
                [size(one.nbytes), one.kind, size(one.raw_bytes or 0), str(one.checkpoints), _short(one.key)]
                for one in shown
            ],
        )
        rest = len(objects) - len(shown)
        output.line(
            f"{plural(len(objects), 'object')}, {size(sum(one.nbytes for one in objects))}"
            + (f"; {rest} more, of {size(sum(one.nbytes for one in objects[len(shown) :]))}" if rest else "")
        )

    output.result({"url": found.url, "objects": shown, "count": len(objects)}, show)


def _short(key: str) -> str:
    """Return enough of an object's key to find it by."""
    return f"{key[:20]}….{key.rpartition('.')[2]}" if len(key) > 40 else key


@verb("gc")
@url_argument("url", metavar=STORE)
@click.option("--no-dry-run", is_flag=True, help="Delete; without, say only what would be deleted.")
@click.option(
    "--min-age",
    type=click.FloatRange(0),
    default=3600.0,
    metavar="SECONDS",
    help="Leave objects younger than this (3600). Safety does not depend on it.",
)
@storage_option()
def gc_command(output: Output, url: str, no_dry_run: bool, min_age: float, option: dict[str, Any] | None) -> None:
    """Find what no checkpoint of a store needs, and delete it with --no-dry-run.

    Writers and readers need not stop.
    """
    with output.progress("reading manifests", unit="checkpoints") as progress:
        plan = incckpt.collect(url, dry_run=not no_dry_run, min_age=min_age, progress=progress, storage_options=option)
    document = as_json(plan) | {"objects": len(plan.objects), "nbytes": plan.nbytes}

    def show() -> None:
        output.line(str(plan))
        if not no_dry_run and plan.removals:
            output.line("Nothing was deleted; --no-dry-run does it.")

    output.result(document, show)
