"""Which checkpoints of a run to keep: pure functions from its history to the set kept.

Policies compose: ``KeepLast(3) | KeepBest(2, "loss")`` keeps what either keeps. Anything callable with a sequence of
:class:`Record` (oldest first) that returns the steps to keep is a policy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, TypeAlias, get_args

from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.options import check_choice, checked_count, checked_name, checked_seconds

__all__ = [
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Mode",
    "Policy",
    "Record",
    "best",
    "check_ranking",
    "policy_of",
    "steps_kept",
    "undecided",
]

Mode: TypeAlias = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Record:
    """What a policy may know of a checkpoint.

    Attributes
    ----------
    step
        Training step, unique within the lineage.
    time
        Seconds since the epoch by the writer's clock; for display and `KeepEvery(seconds=...)` only.
    metrics
        As given to ``save``.
    """

    step: int
    time: float
    metrics: Mapping[str, float] = field(default_factory=dict)


Policy: TypeAlias = Callable[[Sequence[Record]], Iterable[int]]


class _Composable:
    """A policy object that `|` joins with any other."""

    def __call__(self, history: Sequence[Record]) -> Iterable[int]:
        raise NotImplementedError

    def undecided(self, history: Sequence[Record]) -> str | None:
        """Say what information is missing, if that is why everything is kept."""
        return None

    def __or__(self, other: Policy) -> Union:
        return Union((self, other))

    def __ror__(self, other: Policy) -> Union:
        return Union((other, self))


@dataclass(frozen=True)
class Union(_Composable):
    """Keep what any of the policies keeps."""

    policies: tuple[Policy, ...]

    def __call__(self, history: Sequence[Record]) -> set[int]:
        return {step for policy in self.policies for step in policy(history)}

    def undecided(self, history: Sequence[Record]) -> str | None:
        """Return the first reason that one of the policies gives."""
        return next(filter(None, (undecided(policy, history) for policy in self.policies)), None)


@dataclass(frozen=True)
class KeepAll(_Composable):
    """Keep everything."""

    def __call__(self, history: Sequence[Record]) -> set[int]:
        return {record.step for record in history}


@dataclass(frozen=True)
class KeepLast(_Composable):
    """Keep the `n` checkpoints with the highest steps."""

    n: int

    def __post_init__(self) -> None:
        checked_count("KeepLast: n", self.n, 1)

    def __call__(self, history: Sequence[Record]) -> set[int]:
        return {record.step for record in sorted(history, key=lambda record: record.step)[-self.n :]}


@dataclass(frozen=True)
class KeepBest(_Composable):
    """Keep the `n` best checkpoints by `metric`.

    A missing metric says nothing about a checkpoint, and neither does a NaN. So everything is kept until `n`
    checkpoints have a number for the metric. From then on only those that have one can be among the best: a loop that
    saves often and evaluates rarely keeps its `n` best evaluated checkpoints. Of equal ones the later step is better.
    """

    n: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        checked_count("KeepBest: n", self.n, 0)
        if not isinstance(self.metric, str):
            raise OptionError(f"KeepBest: metric must be a metric's name, not {shown(self.metric)}")
        check_choice("KeepBest: mode", self.mode, get_args(Mode))

    def __call__(self, history: Sequence[Record]) -> set[int]:
        ranked = _ranked(history, self.metric, self.mode)
        return {record.step for record in (ranked[: self.n] if len(ranked) >= self.n else history)}

    def undecided(self, history: Sequence[Record]) -> str | None:
        """Tell of a metric that too few checkpoints have, and of the metrics that there are."""
        having = len(_ranked(history, self.metric, self.mode))
        if having >= self.n or len(history) <= self.n:
            return None
        names = sorted({name for record in history for name in record.metrics})
        return (
            f"{having} of {len(history)} checkpoints have a number for the metric {self.metric!r}, and {self.n} are "
            f"needed to tell the best; their metrics are {', '.join(map(repr, names)) or 'none'}"
        )


@dataclass(frozen=True)
class KeepEvery(_Composable):
    """Keep checkpoints at multiples of `steps`, or the first of each period of `seconds`."""

    steps: int | None = None
    seconds: float | timedelta | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise OptionError("KeepEvery: give either steps or seconds")
        if self.steps is not None:
            checked_count("KeepEvery: steps", self.steps, 1)
        else:
            object.__setattr__(self, "seconds", checked_seconds("KeepEvery: seconds", self.seconds, positive=True))

    def __call__(self, history: Sequence[Record]) -> set[int]:
        if self.steps is not None:
            return {record.step for record in history if record.step % self.steps == 0}
        assert isinstance(self.seconds, float)
        kept: dict[int, int] = {}
        for record in sorted(history, key=lambda record: record.step):
            kept.setdefault(math.floor(record.time / self.seconds), record.step)
        return set(kept.values())


def undecided(policy: Policy, history: Sequence[Record]) -> str | None:
    """Return what information `policy` lacks, if that is why it keeps everything; ``None`` where it does not say."""
    return policy.undecided(history) if isinstance(policy, _Composable) else None


def steps_kept(policy: Policy, history: Sequence[Record]) -> set[int]:
    """Return the steps that `policy` keeps.

    Raises
    ------
    TypeError
        If it did not return a series of steps. Custom policies may raise anything.
    """
    kept: set[int] = set()
    for step in policy(history):
        if isinstance(step, bool):
            raise TypeError(f"a retention policy returns the steps to keep, not {step!r}")
        kept.add(operator.index(step))
    return kept


def best(history: Sequence[Record], metric: str, mode: Mode) -> Record | None:
    """Return the best record by `metric`, or ``None`` if no record has it."""
    ranked = _ranked(history, metric, mode)
    return ranked[0] if ranked else None


def _ranked(history: Sequence[Record], metric: str, mode: Mode) -> list[Record]:
    sign = 1.0 if mode == "min" else -1.0
    eligible = [record for record in history if not math.isnan(record.metrics.get(metric, math.nan))]
    return sorted(eligible, key=lambda record: (sign * record.metrics[metric], -record.step))


def check_ranking(metric: str | None, mode: Mode) -> None:
    """Check what ``"best"`` goes by.

    Raises
    ------
    OptionError
    """
    check_choice("mode", mode, get_args(Mode))
    checked_name("metric", metric)


def policy_of(
    keep_last_n: int | None, keep_best_n: int | None, metric: str | None, mode: Mode, retention: Policy | None
) -> Policy | None:
    """Return the policy that the keyword shorthands stand for; ``None`` keeps everything.

    Raises
    ------
    OptionError
        If they do not go together.
    """
    check_ranking(metric, mode)
    if keep_last_n is not None:
        checked_count("keep_last_n", keep_last_n, 1)
    if keep_best_n is not None:
        checked_count("keep_best_n", keep_best_n, 0)
    if retention is not None:
        if keep_last_n is not None or keep_best_n is not None:
            raise OptionError("give either retention= or keep_last_n= and keep_best_n=")
        if not callable(retention):
            raise OptionError(f"retention must be a policy such as KeepLast(5), not {retention!r}")
        return retention
    if keep_best_n is not None:
        if metric is None:
            raise OptionError("keep_best_n needs metric=, the name of a metric given to save()")
        return KeepLast(1 if keep_last_n is None else keep_last_n) | KeepBest(keep_best_n, metric, mode)
    return None if keep_last_n is None else KeepLast(keep_last_n)
