"""Verbs that check: `verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import incckpt
from incckpt.backends.base import redact
from incckpt.cli.errors import Exit
from incckpt.cli.options import STORE, best_options, storage_option, verb
from incckpt.cli.output import Output

if TYPE_CHECKING:
    from incckpt.run.verify import VerifyResult


@verb("verify")
@click.argument("url", metavar=STORE)
@click.option(
    "--level",
    type=click.Choice(["list", "sizes", "hashes"]),
    default="hashes",
    help="How closely to look: that the objects are there; and of the right size; and hold the right bytes (default).",
)
@best_options
@storage_option()
def verify_command(
    output: Output, url: str, level: Any, metric: str | None, mode: Any, option: dict[str, Any] | None
) -> int:
    """Check that checkpoints restore: every one of a store or a run, or the one that URL names."""
    from incckpt.store.location import locate

    location = locate(url)
    checks: list[tuple[str, str | None]] = [(url, None)]
    if not location.named and location.step is None:
        checks = [(location.store, run) for run in incckpt.list_runs(url, storage_options=option)]
    results: list[VerifyResult] = []
    for where, run in checks:
        results.append(
            incckpt.verify(
                where,
                run=run,
                level=level,
                metric=metric,
                mode=mode,
                skip=results[-1].checkpoints[-1].keys if results else (),
                progress=output.watched,
                storage_options=option,
            )
        )
    document = {
        "url": redact(location.store),
        "level": level,
        "ok": all(results),
        "runs": [
            {
                "run": result.run,
                "ok": result.ok,
                "checkpoints": [
                    {"step": one.step, "ok": one.ok, "problems": one.problems} for one in result.checkpoints
                ],
            }
            for result in results
        ],
    }

    def show() -> None:
        for result in results:
            output.line(str(result))
        if not results:
            output.line("The store has no checkpoint.")

    output.result(document, show)
    return 0 if all(results) else Exit.DAMAGED
