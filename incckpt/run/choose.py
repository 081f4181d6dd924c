"""From what a caller asks for (a step, the latest, the best, an exact name) to a checkpoint of the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, SupportsIndex, TypeAlias

from incckpt.errors import CheckpointNotFoundError, OptionError
from incckpt.messages import shown
from incckpt.retention import Mode, best
from incckpt.run.checkpoint import read_refs, to_record
from incckpt.store.lineage import Lineage, Run
from incckpt.store.refs import Ref, RefName, checked_step

__all__ = ["Which", "best_step", "checked_which", "choose", "listed", "not_found", "place"]

log = logging.getLogger(__name__)

Which: TypeAlias = SupportsIndex | Literal["latest", "best"] | str

_SHOWN = 12


def checked_which(which: object) -> int | str | RefName | None:
    """Return which checkpoint is meant: ``None``, ``"latest"``, ``"best"``, a step as an ``int``, or an exact name.

    Raises
    ------
    OptionError
        If it is none of these.
    """
    if which is None or isinstance(which, RefName) or (isinstance(which, str) and which in ("latest", "best")):
        return which
    if isinstance(which, str):
        name = RefName.parse(which)
        if name is not None:
            return name
        hint = f": give step={int(which)}" if which.isdecimal() else ""
        raise OptionError(
            f"step must be an integer, 'latest', 'best' or the name of a ref, not the string {shown(which)}{hint}"
        )
    return checked_step(which)


def choose(run: Run, lineage: Lineage, which: int | str | RefName | None, metric: str | None, mode: Mode) -> RefName:
    """Return the checkpoint that `which`, as `checked_which` returns it, means; ``None`` means the latest.

    A step may be that of an abandoned checkpoint, which stands until the run has passed it. Where several attempts have
    one of that step, the lineage's is chosen, or else the latest attempt's, and a warning names the others. An exact
    name is that of a ref which stands, whether the lineage has it or not.

    Parameters
    ----------
    metric
        Decides what is ``"best"``; may be ``None`` if there is only one metric.

    Raises
    ------
    CheckpointNotFoundError
        If there is none; the message says what there is.
    OptionError
        If ``"best"`` does not say by which metric.
    """
    if isinstance(which, RefName):
        return _standing(run, which)
    if isinstance(which, int):
        return _at(run, lineage, which)
    if lineage.latest is None:
        raise not_found(run)
    return _best(run, lineage, metric, mode) if which == "best" else lineage.latest


def _at(run: Run, lineage: Lineage, step: int) -> RefName:
    found = lineage.at(step)
    if not found:
        if not lineage.live and not lineage.abandoned:
            raise not_found(run)
        raise CheckpointNotFoundError(f"{place(run)} has no checkpoint of step {step}; it has {_steps(lineage)}")
    name, *others = found
    if others:
        log.warning(
            "step %d of %s: reading that of attempt %d; there is an abandoned one of attempt %s",
            step,
            place(run),
            name.attempt,
            ", ".join(str(other.attempt) for other in others),
        )
    elif name in lineage.abandoned:
        log.warning("step %d of %s is abandoned: a later attempt resumed from before it", step, place(run))
    return name


def _standing(run: Run, name: RefName) -> RefName:
    try:
        found = run.read(name)
    except ValueError:
        return name  # it is there; who reads it is told what is wrong with it
    if not isinstance(found, Ref):
        state = "" if found is None else f": it is {found.value.decode()}"
        raise CheckpointNotFoundError(f"{place(run)} has no checkpoint {name}{state}")
    return name


def _best(run: Run, lineage: Lineage, metric: str | None, mode: Mode) -> RefName:
    return lineage.at(best_step(read_refs(run, lineage, lineage.live), run, metric, mode))[0]


def best_step(refs: Sequence[Ref], run: Run, metric: str | None, mode: Mode) -> int:
    """Return the step of the best of some checkpoints of `run`; see `choose`."""
    if metric is None:
        metrics = sorted({key for ref in refs for key in ref.metrics})
        if not metrics:
            raise CheckpointNotFoundError(f"{place(run)} has no best checkpoint: none was saved with metrics")
        if len(metrics) > 1:
            raise OptionError(f"'best' of {place(run)} needs metric=, one of {', '.join(metrics)}")
        metric = metrics[0]
    record = best([to_record(ref) for ref in refs], metric, mode)
    if record is None:
        raise CheckpointNotFoundError(f"no checkpoint of {place(run)} has a metric {metric!r}")
    return record.step


def not_found(run: Run) -> CheckpointNotFoundError:
    """Return the error for a run without checkpoints; it names the runs that the store has."""
    runs = sorted({entry.key.split("/")[1] for entry in run.backend.list("runs/")} - {run.name})
    others = f"; the store has {'run' if len(runs) == 1 else 'runs'} {_shown(runs)}" if runs else ""
    return CheckpointNotFoundError(f"{place(run)} has no checkpoint{others}")


def place(run: Run) -> str:
    """Return what to call a run in a message."""
    return f"run {run.name!r} at {run.backend.url}"


def _steps(lineage: Lineage) -> str:
    return "; abandoned: ".join(listed(names) for names in (lineage.live, lineage.abandoned) if names)


def listed(names: Sequence[RefName]) -> str:
    """Return the steps of checkpoints for a message; only some of them, where they are many."""
    return f"{'step' if len(names) == 1 else 'steps'} {_shown([str(name.step) for name in names])}"


def _shown(items: Sequence[str]) -> str:
    return ", ".join(items if len(items) <= _SHOWN else (*items[:4], "…", *items[-4:]))
