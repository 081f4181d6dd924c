"""Retention policies are pure functions: their definitions, checked against histories of every kind."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.errors import OptionError
from incckpt.retention import KeepAll, KeepBest, KeepEvery, KeepLast, Policy, Record, best, policy_of

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
    assert kept <= set(losses)
    assert len(kept) == min(n, len(losses))
    for step in kept:
        for other in set(losses) - kept:
            better = losses[step] < losses[other] if mode == "min" else losses[step] > losses[other]
            assert better or (losses[step] == losses[other] and step > other)


@given(histories)
def test_the_best_record_is_the_one_kept(history: list[Record]) -> None:
    record = best(history, "loss", "min")
    assert set(KeepBest(1, "loss")(history)) == (set() if record is None else {record.step})


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
