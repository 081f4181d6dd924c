"""The pipeline's bounds, and that nothing is under way any more when it returns, whatever ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from incckpt.pipeline import Pipeline


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    pipeline = Pipeline(requests=32, threads=2, bytes_in_flight=100, name="test")
    yield pipeline
    pipeline.close()


def test_bytes_in_flight_are_bounded_and_a_heavy_item_goes_alone(pipeline: Pipeline) -> None:
    lock = threading.Lock()
    under_way: list[int] = []
    most: list[int] = []

    def work(nbytes: int) -> None:
        with lock:
            under_way.append(nbytes)
            most.append(sum(under_way))
            assert sum(under_way) <= 100 or len(under_way) == 1
        with lock:
            under_way.remove(nbytes)

    pipeline.each([10, 30, 60, 250, 99, 1] * 50, lambda nbytes: nbytes, work)
    assert len(most) == 300
    assert max(most) == 250


def test_the_first_error_is_raised_and_the_rest_left_out(pipeline: Pipeline) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise ValueError("three")
        done.append(item)

    with pytest.raises(ValueError, match="three"):
        pipeline.each(range(1000), lambda item: 50, work)
    assert len(done) < 100
    pipeline.each([7], lambda item: 50, done.append)
    assert done[-1] == 7, "it can be used again"


def test_an_interrupted_caller_waits_for_what_is_under_way(pipeline: Pipeline) -> None:
    begun, finish, finished = threading.Event(), threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.set()
        finish.wait()
        finished.set()

    def items() -> Iterator[int]:
        yield 0
        begun.wait()
        finish.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.each(items(), lambda item: 1, work)
    assert finished.is_set(), "it was writing to the caller's memory"
