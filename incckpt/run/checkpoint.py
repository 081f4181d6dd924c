"""What a run holds, seen from outside: its checkpoints, and choosing one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from incckpt.errors import CheckpointNotFoundError, OptionError
from incckpt.retention import Mode, Record, best
from incckpt.store.lineage import Lineage, Run
from incckpt.store.refs import Ref, RefName

__all__ = ["Checkpoint", "Which", "checked_metrics", "choose", "read_refs", "to_record"]

log = logging.getLogger(__name__)

Which: TypeAlias = int | Literal["latest", "best"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes
    ----------
    run, step
        Which.
    attempt
        The writer's tenure that made it; every restart is a new one.
    time
        Seconds since the epoch by the writer's clock.
    metrics
        As given to ``save``.
    nbytes
        Bytes of the state.
    written
        Bytes that the save put into the store.
    abandoned
        Whether a later attempt went back behind it.
    """

    run: str
    step: int
    attempt: int
    time: float
    metrics: Mapping[str, float]
    nbytes: int
    written: int
    abandoned: bool = False

    @classmethod
    def of(cls, run: str, ref: Ref, *, abandoned: bool = False) -> Checkpoint:
        """Return what a ref says."""
        return cls(run, ref.step, ref.name.attempt, ref.time, ref.metrics, ref.nbytes, ref.written, abandoned)


def to_record(ref: Ref) -> Record:
    """Return what a retention policy may know of a checkpoint."""
    return Record(ref.step, ref.time, ref.metrics)


def read_refs(
    run: Run,
    lineage: Lineage,
    names: Iterable[RefName],
    on_unreadable: Callable[[RefName, Exception], None] | None = None,
) -> list[Ref]:
    """Return the contents of refs: what the lineage lists as it is, the others by a request each.

    A ref that was pruned meanwhile is left out, and so is one that `on_unreadable` was told of.
    """
    refs: list[Ref] = []
    for name in names:
        ref = lineage.known.get(name)
        if ref is None:
            try:
                found = run.read(name)
            except ValueError as error:
                if on_unreadable is None:
                    raise
                on_unreadable(name, error)
                continue
            if not isinstance(found, Ref):
                continue
            ref = found
        refs.append(ref)
    return refs


def choose(run: Run, lineage: Lineage, which: Which | None, metric: str | None, mode: Mode) -> RefName:
    """Return the checkpoint that `which` means: a step, ``"latest"`` (or ``None``) or ``"best"``.

    A step may be that of an abandoned checkpoint, which stands until the run has passed it. Where several attempts have
    one of that step, the lineage's is chosen, or else the latest attempt's, and a warning names the others.

    Parameters
    ----------
    metric
        What ``"best"`` goes by; ``None`` if there is only one metric.

    Raises
    ------
    CheckpointNotFoundError
        If there is none; the message says what there is.
    OptionError
        If ``"best"`` does not say by which metric.
    """
    where = f"run {run.name!r} at {run.backend.url}"
    if lineage.latest is None and not (lineage.abandoned and isinstance(which, int)):
        raise CheckpointNotFoundError(f"{where} has no checkpoint")
    if which == "best":
        return _best(run, lineage, metric, mode, where)
    if which is None or which == "latest":
        assert lineage.latest is not None
        return lineage.latest
    found = lineage.at(which)
    if not found:
        raise CheckpointNotFoundError(f"{where} has no checkpoint of step {which}; it has {_steps(lineage)}")
    name, *others = found
    if others:
        log.warning(
            "step %d of %s: that of attempt %d is read; an abandoned one stands of attempt %s",
            which,
            where,
            name.attempt,
            ", ".join(str(other.attempt) for other in others),
        )
    elif name in lineage.abandoned:
        log.warning("step %d of %s is abandoned: a later attempt went back behind it", which, where)
    return name


def _best(run: Run, lineage: Lineage, metric: str | None, mode: Mode, where: str) -> RefName:
    refs = read_refs(run, lineage, lineage.live)
    if metric is None:
        metrics = sorted({key for ref in refs for key in ref.metrics})
        if len(metrics) != 1:
            raise OptionError(f"'best' of {where} by which metric? Give metric=; there are {metrics or 'none'}")
        metric = metrics[0]
    record = best([to_record(ref) for ref in refs], metric, mode)
    if record is None:
        raise CheckpointNotFoundError(f"no checkpoint of {where} has a metric {metric!r}")
    return lineage.at(record.step)[0]


def _steps(lineage: Lineage) -> str:
    return "; abandoned: ".join(_listed(names) for names in (lineage.live, lineage.abandoned) if names)


def _listed(names: Sequence[RefName]) -> str:
    steps = [str(name.step) for name in names]
    return (
        f"steps {', '.join(steps)}" if len(steps) <= 12 else f"steps {', '.join(steps[:4])}, …, {', '.join(steps[-4:])}"
    )


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return the metrics as floats.

    Raises
    ------
    OptionError
        Naming what is not a number.
    """
    checked: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str):
            raise OptionError(f"metrics: the name {name!r} is not a string")
        try:
            checked[name] = float(value)  # a 0-dim tensor, too
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise OptionError(f"metric {name!r} is not a number: {value!r:.80}") from error
    return checked
