"""The pipeline's bounds, and that nothing is under way any more when it returns, whatever ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from incckpt.run.pipeline import Pipeline


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


def test_requests_are_under_way_together(pipeline: Pipeline) -> None:
    arrived = threading.Barrier(8)

    def request(item: int) -> int:
        arrived.wait(60)
        return item * item

    assert pipeline.together(request, range(8)) == [item * item for item in range(8)]
    assert pipeline.together(request, []) == []


def test_a_failed_request_waits_for_the_others(pipeline: Pipeline) -> None:
    failed, finished = threading.Event(), threading.Event()

    def request(item: int) -> None:
        if item == 0:
            failed.set()
            raise ValueError("no")
        failed.wait()
        finished.set()

    with pytest.raises(ValueError, match="no"):
        pipeline.together(request, range(2))
    assert finished.is_set(), "it was reading the caller's memory"


def test_where_requests_are_work_each_thread_does_its_own() -> None:
    pipeline = Pipeline(requests=2, threads=2, bytes_in_flight=100, name="test")
    assert set(pipeline.together(lambda _: threading.get_ident(), range(5))) == {threading.get_ident()}
    pipeline.close()
