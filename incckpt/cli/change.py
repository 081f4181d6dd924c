"""Verbs that change a store: `rm`, `prune` and `copy`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

import incckpt
from incckpt.backends.base import redact
from incckpt.cli.options import STORE, best_options, storage_option, url_argument, verb
from incckpt.cli.output import Output, as_json, plural, size
from incckpt.errors import CheckpointNotFoundError, OptionError
from incckpt.retention import Union, policy_of


def confirm(output: Output, question: str, yes: bool) -> None:
    """Ask whether to go on, unless `yes`; without a terminal to ask at, refuse.

    Raises
    ------
    click.UsageError, click.Abort
    """
    if yes:
        return
    if output.json or not sys.stdin.isatty():
        raise click.UsageError("cannot ask for confirmation here; pass --yes")
    click.confirm(question, abort=True, err=True)


@verb("rm")
@url_argument("urls", metavar=f"{STORE}...", nargs=-1, required=True)
@click.option("--all", "all_steps", is_flag=True, help="Every checkpoint of the run that URL names.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@best_options
@storage_option()
def rm_command(
    output: Output,
    urls: Sequence[str],
    all_steps: bool,
    yes: bool,
    metric: str | None,
    mode: Any,
    option: dict[str, Any] | None,
) -> None:
    """Delete checkpoints, and what only they need.

    URL names a checkpoint, as store#run@500; with --all a run. Damaged checkpoints
    can be deleted, too. Whoever writes the run is stopped: this takes it over.
    """
    from incckpt.store.location import locate

    doomed: dict[tuple[str, str], dict[int, None]] = {}
    for url in urls:
        location = locate(url)
        if all_steps and (location.step is not None or not location.named):
            raise OptionError(f"{redact(location.store)}: --all takes a run, as store#run, without '@step'")
        if not all_steps and location.step is None:
            raise OptionError(
                f"{redact(location.store)}: which checkpoint? Name its step, as store#run@500, or give --all for a run"
            )
        incckpt.list_runs(url, storage_options=option)  # which finds out whether there is a store
        steps = doomed.setdefault((location.store, location.run), {})
        if isinstance(location.step, int):
            steps[location.step] = None
        elif location.step is not None:
            found = incckpt.describe(url, metric=metric, mode=mode, storage_options=option)
            steps[found.checkpoint.step] = None
        else:
            found_all = incckpt.list_checkpoints(url, abandoned=True, storage_options=option)
            steps.update(dict.fromkeys(checkpoint.step for checkpoint in found_all))
    count = sum(map(len, doomed.values()))
    confirm(output, f"Delete {plural(count, 'checkpoint')}?", yes)
    deleted = []
    for (store, run), steps in doomed.items():
        with (
            incckpt.CheckpointManager(store, run=run, base=False, storage_options=option) as manager,
            output.progress("deleting", unit="checkpoints") as progress,
        ):
            for index, step in enumerate(steps):
                if not manager.delete(step):
                    raise CheckpointNotFoundError(f"run {run!r} has no checkpoint of step {step}; see 'incckpt list'")
                deleted.append({"run": run, "step": step})
                progress(index + 1, len(steps))

    def show() -> None:
        for one in deleted:
            output.line(f"deleted step {one['step']} of run {one['run']}")

    output.result({"deleted": deleted}, show)


@verb("copy")
@url_argument("source", metavar="SOURCE")
@url_argument("destination", metavar="DESTINATION")
@click.option(
    "--if-exists",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    help="What to do about a step that DESTINATION has with other contents.",
)
@click.option("--no-verify", is_flag=True, help="Do not decode and hash what is copied.")
@best_options
@storage_option()
@storage_option("--to-option", "For DESTINATION, in place of --option; may be repeated.", short=None)
def copy_command(
    output: Output,
    source: str,
    destination: str,
    if_exists: Any,
    no_verify: bool,
    metric: str | None,
    mode: Any,
    option: dict[str, Any] | None,
    to_option: dict[str, Any] | None,
) -> None:
    """Copy checkpoints to another store or run: what is missing there.

    SOURCE is a checkpoint, a run, or a store, of which every run is copied. A copy
    that was broken off goes on where it stopped. The copy is a save: it takes the
    run of DESTINATION over from whoever writes it.
    """
    with output.progress("copying") as progress:
        done = incckpt.copy(
            source,
            destination,
            metric=metric,
            mode=mode,
            if_exists=if_exists,
            verify=not no_verify,
            progress=progress,
            source_options=option,
            destination_options=to_option or option,
        )
    lines: list[str] = []
    for one in done.copied:
        where = f"step {one.checkpoint.step} of run {one.checkpoint.run}"
        lines.append(f"copied {where}: {plural(one.objects, 'object')}, {size(one.nbytes)}")
    for what, names in (("was there already", done.skipped), ("was pruned meanwhile", done.pruned)):
        by_run: dict[str, list[int]] = {}
        for run, step in names:
            by_run.setdefault(run, []).append(step)
        lines += [f"{what}: {_steps(steps)} of run {run}" for run, steps in by_run.items()]
    if done.passed:
        steps = ", ".join(f"{run}@{step}" for run, step in done.passed)
        output.warn(f"{steps} cannot be added any more: the destination is beyond. Copy to another run, as '#archive'")
    if not done.copied:
        lines.append("nothing was copied")

    def show() -> None:
        for line in lines:
            output.line(line)

    output.result(as_json(done) | {"nbytes": done.nbytes}, show)


def _steps(steps: Sequence[int]) -> str:
    """Return steps for people, not all where there are many."""
    shown = steps if len(steps) <= 8 else [*steps[:4], "…", *steps[-4:]]
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, shown))}"


@verb("prune")
@url_argument("url", metavar=STORE)
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="Keep the last N.")
@click.option("--keep-best", type=click.IntRange(0), metavar="N", help="Keep the best N by --metric, and the last.")
@click.option("--keep-every", type=click.IntRange(1), metavar="STEPS", help="Keep one of every so many steps.")
@click.option("--no-dry-run", is_flag=True, help="Delete; without, say only what would be deleted.")
@best_options
@storage_option()
def prune_command(
    output: Output,
    url: str,
    keep_last: int | None,
    keep_best: int | None,
    keep_every: int | None,
    no_dry_run: bool,
    metric: str | None,
    mode: Any,
    option: dict[str, Any] | None,
) -> None:
    """Delete the checkpoints of a run that a policy does not keep.

    What one of the --keep options keeps stays. Whoever writes the run is stopped:
    this takes it over.
    """
    if keep_best is not None and metric is None:
        raise click.UsageError("--keep-best needs --metric")
    policies = [policy_of(keep_last, keep_best, metric, mode, None)]
    policies.append(None if keep_every is None else incckpt.KeepEvery(steps=keep_every) | incckpt.KeepLast(1))
    given = [policy for policy in policies if policy is not None]
    if not given:
        raise click.UsageError("what is to be kept? Give --keep-last, --keep-best or --keep-every")
    with output.progress("reading manifests", unit="checkpoints") as progress:
        plan = incckpt.prune(
            url, retention=Union(tuple(given)), dry_run=not no_dry_run, progress=progress, storage_options=option
        )
    if plan.undecided:
        output.warn(f"nothing more is pruned for now: {plan.undecided}")

    def show() -> None:
        verb = "deleted" if plan.done else "would delete"
        freed = f", which frees {size(plan.freed_bytes)}" if plan.doomed else ""
        total = plural(len(plan.doomed) + len(plan.kept), "checkpoint")
        output.line(f"run {plan.run}: {verb} {len(plan.doomed)} of {total}{freed}")
        if plan.doomed:
            output.line(f"{verb}: {_steps([one.step for one in plan.doomed])}")
        if plan.kept:
            output.line(f"kept: {_steps([one.step for one in plan.kept])}")
        if plan.doomed and not plan.done:
            output.line("Nothing was deleted; --no-dry-run does it.")

    output.result(plan, show)
