"""Which checkpoints of a run to keep: pure functions from its history to the set kept.

Policies compose: ``KeepLast(3) | KeepBest(2, "loss")`` keeps what either keeps. Anything callable with a sequence of
:class:`Record` (oldest first) that returns the steps to keep is a policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from incckpt.errors import OptionError

__all__ = ["KeepAll", "KeepBest", "KeepEvery", "KeepLast", "Mode", "Policy", "Record", "best", "policy_of"]

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
        if self.n < 1:
            raise OptionError(f"KeepLast: n must be at least 1, not {self.n}: the latest checkpoint is always kept")

    def __call__(self, history: Sequence[Record]) -> set[int]:
        return {record.step for record in sorted(history, key=lambda record: record.step)[-self.n :]}


@dataclass(frozen=True)
class KeepBest(_Composable):
    """Keep the `n` best checkpoints by `metric`.

    A checkpoint without the metric, or with a NaN, is never among the best; of equal ones the later step is.
    """

    n: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if self.n < 0:
            raise OptionError(f"KeepBest: n must not be negative, got {self.n}")
        if self.mode not in ("min", "max"):
            raise OptionError(f"KeepBest: mode must be 'min' or 'max', not {self.mode!r}")

    def __call__(self, history: Sequence[Record]) -> set[int]:
        return {record.step for record in _ranked(history, self.metric, self.mode)[: self.n]}


@dataclass(frozen=True)
class KeepEvery(_Composable):
    """Keep checkpoints at multiples of `steps`, or the first of each period of `seconds`."""

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise OptionError("KeepEvery: give either steps or seconds")
        if (self.steps is not None and self.steps < 1) or (self.seconds is not None and not self.seconds > 0):
            raise OptionError("KeepEvery: the interval must be positive")

    def __call__(self, history: Sequence[Record]) -> set[int]:
        if self.steps is not None:
            return {record.step for record in history if record.step % self.steps == 0}
        assert self.seconds is not None
        kept: dict[int, int] = {}
        for record in sorted(history, key=lambda record: record.step):
            kept.setdefault(math.floor(record.time / self.seconds), record.step)
        return set(kept.values())


def best(history: Sequence[Record], metric: str, mode: Mode) -> Record | None:
    """Return the best record by `metric`, or ``None`` if no record has it."""
    ranked = _ranked(history, metric, mode)
    return ranked[0] if ranked else None


def _ranked(history: Sequence[Record], metric: str, mode: Mode) -> list[Record]:
    sign = 1.0 if mode == "min" else -1.0
    eligible = [record for record in history if not math.isnan(record.metrics.get(metric, math.nan))]
    return sorted(eligible, key=lambda record: (sign * record.metrics[metric], -record.step))


def policy_of(
    keep_last_n: int | None, keep_best_n: int | None, metric: str | None, mode: Mode, retention: Policy | None
) -> Policy | None:
    """Return the policy that the keyword shorthands stand for; ``None`` keeps everything.

    Raises
    ------
    OptionError
        If they do not go together.
    """
    if mode not in ("min", "max"):
        raise OptionError(f"mode must be 'min' or 'max', not {mode!r}")
    if retention is not None:
        if keep_last_n is not None or keep_best_n is not None:
            raise OptionError("give either retention= or keep_last_n= and keep_best_n=")
        return retention
    if keep_best_n is not None:
        if metric is None:
            raise OptionError("keep_best_n needs metric=, the name of a metric given to save()")
        return KeepLast(1 if keep_last_n is None else keep_last_n) | KeepBest(keep_best_n, metric, mode)
    return None if keep_last_n is None else KeepLast(keep_last_n)
