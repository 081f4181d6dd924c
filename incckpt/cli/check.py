"""Verbs that check: `verify` and `doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import incckpt
from incckpt.backends.base import redact
from incckpt.cli.errors import Exit, code_of
from incckpt.cli.options import STORE, best_options, storage_option, url_argument, verb
from incckpt.cli.output import Output, as_json, duration

if TYPE_CHECKING:
    from incckpt.inspection.diagnosis import Diagnosis
    from incckpt.run.verify import VerifyResult


@verb("verify")
@url_argument("url", metavar=STORE)
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
        with output.progress_by_checkpoint("verifying" if run is None else f"verifying run {run},") as progress:
            results.append(
                incckpt.verify(
                    where,
                    run=run,
                    level=level,
                    metric=metric,
                    mode=mode,
                    skip=results[-1].checkpoints[-1].keys if results else (),
                    progress=progress,
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


@verb("doctor")
@url_argument("url", metavar=STORE)
@click.option("--read-only", is_flag=True, help="Try nothing that writes.")
@storage_option()
def doctor_command(output: Output, url: str, read_only: bool, option: dict[str, Any] | None) -> int:
    """Find out whether a store can be used from here, and what a save to it costs.

    Keys that mean nothing are written below probe/ and deleted again.
    """
    found = incckpt.diagnose(url, write=not read_only, storage_options=option)

    def show() -> None:
        output.line(found.url)
        output.table(
            ["check", "", "found"], [[one.check, one.status, " ".join(one.message.split())] for one in found.findings]
        )
        requests = ", ".join(f"{count} {kind}" for kind, count in sorted(found.save_requests.items()))
        taken = found.save_seconds
        output.line()
        output.line(f"A save of one small tensor makes {sum(found.save_requests.values())} requests: {requests}.")
        if taken is not None:
            output.line(f"One after the other they take {duration(taken)} here; many are made at once.")

    output.result(as_json(found) | {"ok": found.ok, "save_seconds": found.save_seconds}, show)
    return 0 if found else _code(found)


def _code(found: Diagnosis) -> int:
    """Return the exit code for what failed first."""
    failed = next(one for one in found.findings if one.status == "failed")
    return Exit.BACKEND if failed.error is None else code_of(failed.error)
