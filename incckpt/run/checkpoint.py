"""A committed checkpoint, as a caller sees it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.options import checked_mapping
from incckpt.retention import Record
from incckpt.store.lineage import Lineage, Run
from incckpt.store.refs import Ref, RefName
from incckpt.store.store import Store
from incckpt.store.untrusted import RECORD_BYTES

__all__ = ["Checkpoint", "checked_metrics", "log_unreadable", "read_refs", "read_refs_at_once", "to_record"]

log = logging.getLogger(__name__)

_MOST_METRICS = RECORD_BYTES // 2  # bytes


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
    ref
        Its exact name, ``<attempt>-<step>-<nonce>``: for ``step=``, or after the ``@`` of a URL.
    abandoned
        Whether it was abandoned by rewinding.
    """

    run: str
    step: int
    attempt: int
    time: float
    metrics: Mapping[str, float] = field(hash=False)
    nbytes: int
    written: int
    ref: str
    abandoned: bool = False

    @classmethod
    def of(cls, run: str, ref: Ref, *, abandoned: bool = False) -> Checkpoint:
        """Return what a ref says."""
        name = ref.name
        return cls(run, name.step, name.attempt, ref.time, ref.metrics, ref.nbytes, ref.written, str(name), abandoned)


def to_record(ref: Ref) -> Record:
    """Return what a retention policy sees of a checkpoint."""
    return Record(ref.step, ref.time, ref.metrics)


def read_refs(
    run: Run,
    lineage: Lineage,
    names: Iterable[RefName],
    on_unreadable: Callable[[RefName, Exception], None] | None = None,
) -> list[Ref]:
    """Return the contents of refs: from the lineage where it lists them, else with a request each.

    Refs pruned meanwhile, and those reported to `on_unreadable`, are left out.
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


def read_refs_at_once(
    store: Store,
    run: Run,
    lineage: Lineage,
    names: Sequence[RefName],
    on_unreadable: Callable[[RefName, Exception], None] | None = None,
) -> list[Ref]:
    """Do what `read_refs` does, with many requests at once where they cross a network."""
    found = store.each(lambda name: read_refs(run, lineage, [name], on_unreadable), names)
    return [ref for refs in found for ref in refs]


def log_unreadable(name: RefName, error: Exception) -> None:
    """Log that the ref of a checkpoint cannot be read: the `on_unreadable` of lists that leave it out."""
    log.error("the ref of step %d is unreadable: %s", name.step, error)


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return the metrics as floats.

    Raises
    ------
    OptionError
        Naming what is not a number.
    """
    checked: dict[str, float] = {}
    for name, value in checked_mapping("metrics", metrics).items():
        try:
            checked[name] = float(value)  # a 0-dim tensor, too
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise OptionError(f"metric {name!r} is not a number: {shown(value)}") from error
    if len(json.dumps(checked)) > _MOST_METRICS:
        raise OptionError(f"metrics: {len(checked):,} are too many for a ref; save them as a part of the state")
    return checked
