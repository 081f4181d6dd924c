"""Retention: the policies' definitions against histories of every kind, and what a manager does with their answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import incckpt
from incckpt.errors import OptionError
from incckpt.retention import (
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    Policy,
    Record,
    best,
    policy_of,
    steps_kept,
    undecided,
)
from tests.stores import orphans

values = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0, 2.0])
histories = st.lists(
    st.builds(
        Record,
        st.integers(0, 1000),
        st.floats(0, 1e9),
        st.dictionaries(st.sampled_from(["loss", "accuracy"]), values),
    ),
    max_size=20,
    unique_by=lambda record: record.step,
).map(lambda records: sorted(records, key=lambda record: record.step))
policies = st.one_of(
    st.just(KeepAll()),
    st.builds(KeepLast, st.integers(1, 5)),
    st.builds(KeepBest, st.integers(0, 5), st.just("loss"), st.sampled_from(["min", "max"])),
    st.builds(KeepEvery, steps=st.integers(1, 100)),
    st.builds(KeepEvery, seconds=st.floats(1, 1e6)),
)


@given(histories, policies, policies)
def test_policies_select_from_the_history_and_join(history: list[Record], one: Policy, other: Policy) -> None:
    steps = {record.step for record in history}
    assert set(one(history)) <= steps
    assert set((one | other)(history)) == set(one(history)) | set(other(history))  # type: ignore[operator]
    assert set(one(list(reversed(history)))) == set(one(history))


@given(histories, st.integers(1, 5))
def test_last(history: list[Record], n: int) -> None:
    assert set(KeepLast(n)(history)) == {record.step for record in history[-n:]}


@given(histories, st.integers(0, 5), st.sampled_from(["min", "max"]))
def test_best(history: list[Record], n: int, mode: str) -> None:
    kept = set(KeepBest(n, "loss", mode)(history))  # type: ignore[arg-type]
    losses = {r.step: r.metrics["loss"] for r in history if not math.isnan(r.metrics.get("loss", math.nan))}
    if len(losses) < n:
        assert kept == {record.step for record in history}  # it cannot be told which are the best
        return
    assert kept <= set(losses)
    assert len(kept) == n
    for step in kept:
        for other in set(losses) - kept:
            better = losses[step] < losses[other] if mode == "min" else losses[step] > losses[other]
            assert better or (losses[step] == losses[other] and step > other)


@given(histories)
def test_the_best_record_is_the_one_kept(history: list[Record]) -> None:
    record = best(history, "loss", "min")
    assert set(KeepBest(1, "loss")(history)) == ({r.step for r in history} if record is None else {record.step})


@given(histories, st.integers(0, 5))
def test_the_best_are_kept_among_few_that_were_evaluated(history: list[Record], n: int) -> None:
    evaluated = [record for record in history if not math.isnan(record.metrics.get("loss", math.nan))]
    policy = KeepBest(n, "loss")
    if len(evaluated) >= n:
        assert policy(history) == policy(evaluated)
        assert undecided(policy, history) is None
    else:
        assert (undecided(policy, history) is None) == (len(history) <= n)


def test_every() -> None:
    history = [Record(step, time=10.0 * step) for step in range(1, 13)]
    assert set(KeepEvery(steps=5)(history)) == {5, 10}
    assert set(KeepEvery(seconds=50)(history)) == {1, 5, 10}


def test_a_plain_function_joins() -> None:
    def even(history: object) -> list[int]:
        return [2, 4]

    history = [Record(step, 0.0) for step in range(6)]
    assert (KeepLast(1) | even)(history) == {2, 4, 5}
    assert (even | KeepLast(1))(history) == {2, 4, 5}


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepBest(-1, "loss"),
        lambda: KeepBest(1, "loss", "least"),  # type: ignore[arg-type]
        lambda: KeepEvery(),
        lambda: KeepEvery(steps=1, seconds=1),
        lambda: KeepEvery(steps=0),
        lambda: KeepEvery(seconds=math.nan),
        lambda: policy_of(None, 1, None, "min", None),
        lambda: policy_of(1, None, None, "min", KeepAll()),
        lambda: policy_of("3", None, None, "min", None),  # type: ignore[arg-type]
        lambda: policy_of(True, None, None, "min", None),
        lambda: policy_of(None, 2.0, "loss", "min", None),  # type: ignore[arg-type]
        lambda: policy_of(None, 2, ["loss"], "min", None),  # type: ignore[arg-type]
        lambda: policy_of(None, None, None, "min", "KeepAll"),  # type: ignore[arg-type]
        lambda: KeepLast("3"),  # type: ignore[arg-type]
        lambda: KeepBest(2, None),  # type: ignore[arg-type]
        lambda: KeepEvery(steps="10"),  # type: ignore[arg-type]
        lambda: KeepEvery(seconds="1h"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: object) -> None:
    with pytest.raises(OptionError):
        make()  # type: ignore[operator]


def test_shorthands() -> None:
    history = [Record(step, 0.0, {"loss": -step}) for step in range(6)]
    assert policy_of(None, None, None, "min", None) is None
    last = policy_of(2, None, None, "min", None)
    both = policy_of(2, 1, "loss", "max", None)
    assert last is not None
    assert both is not None
    assert set(last(history)) == {4, 5}
    assert set(both(history)) == {0, 4, 5}


def test_what_a_policy_returns_has_to_be_steps() -> None:
    history = [Record(1, 0.0), Record(2, 0.0)]
    assert steps_kept(lambda _: np.array([2]), history) == {2}
    for answer in (None, ["2"], [True, False], [2.0], [Record(2, 0.0)]):
        with pytest.raises(TypeError):
            steps_kept(lambda _, answer=answer: answer, history)  # type: ignore[misc]


# -- in a manager


def steps(manager: incckpt.CheckpointManager) -> list[int]:
    return [checkpoint.step for checkpoint in manager.checkpoints()]


def test_nothing_is_pruned_by_a_metric_that_no_checkpoint_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with incckpt.CheckpointManager(tmp_path, keep_best_n=3, metric="val_loss") as manager:
        for step in range(7):
            manager.save(step, {"step": step}, metrics={"val/loss": 1 / (step + 1)}).result()
        assert steps(manager) == list(range(7))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "'val_loss'" in warnings[0]
    assert "'val/loss'" in warnings[0]


def test_the_best_are_kept_where_every_third_save_is_evaluated(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path, keep_last_n=2, keep_best_n=2, metric="loss") as manager:
        for step in range(20):
            loss = {"loss": abs(step - 7) if step != 9 else math.nan}
            manager.save(step, {"step": step}, metrics=loss if step % 3 == 0 else None).result()
        assert steps(manager) == [3, 6, 18, 19]


def raises(history: Sequence[Record]) -> list[int]:
    raise KeyError("loss")


def raises_midway(history: Sequence[Record]) -> Iterator[int]:
    yield history[-1].step
    raise RuntimeError("midway")


def masks(history: Sequence[Record]) -> list[bool]:
    return [record.step > 1 for record in history]


@pytest.mark.parametrize("policy", [raises, raises_midway, masks, lambda history: None])
def test_a_policy_that_fails_prunes_nothing_and_fails_no_save(
    tmp_path: Path, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    with incckpt.CheckpointManager(tmp_path, retention=policy) as manager:
        for step in (1, 2, 3):
            assert manager.save(step, {"step": step}).result().step == step
            assert [file for file in (tmp_path / "pins").rglob("*") if file.is_file()] == []
        assert steps(manager) == [1, 2, 3]
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    with incckpt.CheckpointManager(tmp_path, keep_last_n=1) as manager:
        manager.save(4, {"step": 4}).result()
        assert steps(manager) == [4]
    assert orphans(tmp_path) == set()


def test_nothing_is_pruned_as_long_as_a_checkpoint_is_unreadable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"step": step}, metrics={"loss": step}).result()
    (damaged,) = (tmp_path / "refs").rglob("*000002-*")
    damaged.write_bytes(b"not a checkpoint")
    with incckpt.CheckpointManager(tmp_path, keep_last_n=1, keep_best_n=1, metric="loss") as manager:
        manager.save(4, {"step": 4}, metrics={"loss": 4}).result()
        manager.save(5, {"step": 5}, metrics={"loss": 5}).result()
        assert steps(manager) == [1, 3, 4, 5]
        assert len([record for record in caplog.records if "nothing is pruned" in record.getMessage()]) == 1
        assert manager.delete(2)
        manager.save(6, {"step": 6}, metrics={"loss": 6}).result()
        assert steps(manager) == [1, 6]
    assert orphans(tmp_path) == set()


@pytest.mark.parametrize("value", [10**400, "high", None, 1j])
def test_a_metric_that_is_not_a_number(tmp_path: Path, value: object) -> None:
    with pytest.raises(OptionError, match="'loss'"):
        incckpt.save({}, tmp_path, metrics={"loss": value})  # type: ignore[dict-item]
