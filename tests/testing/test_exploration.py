"""The explorer tries every order, goes on where it can, and runs programs again where it has to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from incckpt.errors import BackendError, KeyExistsError
from incckpt.testing.exploration import Explorer
from incckpt.testing.simulation import Process, Program, Server, Violation


def taker(process: Process) -> None:
    """Take a key, and say whether it was free."""
    process.pause()
    try:
        process.backend.create("key", process.name.encode())
    except KeyExistsError:
        process.emit((process.name, "late"))
    except BackendError:
        process.emit((process.name, "failed"))
    else:
        process.emit((process.name, "first"))


def reading(key: str) -> Program:
    """Return a program that says what it reads at a key, twice."""

    def program(process: Process) -> None:
        process.pause()
        for time in range(2):
            found = tuple(entry.key for entry in process.backend.list(key))
            process.emit((process.name, time, found))

    return program


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def outcomes(faults: int, **programs: Program) -> set[frozenset[object]]:
    """Return the sets of events with which an order can end."""
    seen: set[frozenset[object]] = set()
    explored = Explorer(Server(), programs, check=lambda _, told: seen.add(told), faults=faults).explore()
    assert explored.complete
    return {told for told in seen if not any(told < other for other in seen)}


def test_every_order_is_tried() -> None:
    assert outcomes(0, a=taker, b=taker) == {
        frozenset({("a", "first"), ("b", "late")}),
        frozenset({("b", "first"), ("a", "late")}),
    }


def test_what_one_process_reads_between_the_steps_of_another() -> None:
    found = outcomes(0, a=taker, r=reading("key"))
    assert found == {
        frozenset({("a", "first"), ("r", 0, first), ("r", 1, second)})
        for first, second in [((), ()), ((), ("key",)), (("key",), ("key",))]
    }


def test_every_fault_is_tried() -> None:
    found = outcomes(1, a=taker, b=taker)
    assert frozenset({("a", "failed"), ("b", "late")}) in found, "done, and its reply was lost"
    assert frozenset({("a", "failed"), ("b", "first")}) in found, "not done"
    assert frozenset({("a", "failed"), ("b", "failed")}) not in found


def test_a_broken_promise_is_told_with_the_steps_that_led_there() -> None:
    def check(_: Server, told: frozenset[object]) -> None:
        if ("b", "first") in told:
            raise Violation("b was first")

    with pytest.raises(Violation, match=r"b was first, after:\n  b: create key"):
        Explorer(Server(), {"a": taker, "b": taker}, check=check).explore()


def test_an_error_of_a_program_comes_out() -> None:
    def fails(process: Process) -> None:
        process.pause()
        process.backend.put("key", b"")
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        Explorer(Server(), {"a": fails}, check=lambda _, told: None).explore()


def test_a_program_that_depends_on_more_than_its_replies_is_found() -> None:
    runs = itertools.count()

    def program(process: Process) -> None:
        process.pause()
        run = next(runs)
        for key in ("x", "y"):
            try:
                process.backend.put(key if run < 1 else f"{key}{run}", b"")
            except BackendError:
                process.emit("failed")

    with pytest.raises(AssertionError, match="p is not deterministic"):
        Explorer(Server(), {"p": program}, check=lambda _, told: None, faults=2).explore()
