"""Repeating what may pass, with injected faults and a clock that only the test moves."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incckpt.backends import Backend, Entry
from incckpt.backends.base import PagedListing
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.retry import RetryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, BackendPermissionError, BackendTimeoutError, KeyExistsError, KeyNotFoundError
from incckpt.testing.conformance import BackendConformance
from incckpt.testing.faults import Call, CountingBackend, Fail, Fault, FaultyBackend
from tests.effort import tries


class Clock:
    """Time passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def memory() -> MemoryBackend:
    return MemoryBackend(str(uuid.uuid4()))


def retrying(inner: Backend, clock: Clock | None = None, limit: float = 1_000.0) -> RetryBackend:
    clock = clock if clock is not None else Clock()
    return RetryBackend(inner, limit=limit, sleep=clock.sleep, clock=clock)


@pytest.mark.slow
class TestConformanceUnderFaults(BackendConformance):
    """Every third operation fails before its work, and every fifth after it: the caller does not notice."""

    @pytest.fixture
    def backend(self) -> Backend:
        before = [Fault(nth=n, do=Fail()) for n in range(3, 300, 3)]
        after = [Fault(nth=n, do=Fail(after_work=True)) for n in range(5, 300, 5)]
        return retrying(FaultyBackend(memory(), before + after))


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("failures", [1, 2, 5])
def test_each_operation_is_repeated(failures: int, after_work: bool) -> None:
    inner = memory()
    inner.put("k", b"value")
    inner.put("old", b"value")
    operations: dict[str, Callable[[Backend], bool]] = {
        "get": lambda store: store.get("k", 1, 3) == b"al",
        "put": lambda store: store.put("new", b"1") is None,
        "create": lambda store: store.create("created", b"1") is None,
        "delete": lambda store: store.delete(["old"]) is None,
        "list": lambda store: [entry.key for entry in store.list("k")] == ["k"],
        "head": lambda store: store.head("k").size == 5,
    }
    for name, operation in operations.items():
        faulty = FaultyBackend(inner, [Fault(name, times=failures, do=Fail(after_work=after_work))])
        assert operation(retrying(faulty)), name
        # the second create finds the key, which ends it
        assert faulty.struck == (min(failures, 2) if name == "create" and after_work else failures)
    assert inner.get("new") == inner.get("created") == b"1"
    assert sorted(entry.key for entry in inner.list()) == ["created", "k", "new"]


@pytest.mark.parametrize(
    "error", [BackendPermissionError("403"), BackendError("no such bucket"), KeyNotFoundError("k")]
)
def test_permanent_errors_pass_at_once(error: BackendError) -> None:
    clock = Clock()
    counting = CountingBackend(FaultyBackend(memory(), [Fault(times=None, do=Fail(error))]))
    store = retrying(counting, clock)
    for operation in (
        lambda: store.get("k"),
        lambda: store.put("k", b""),
        lambda: store.create("k", b""),
        lambda: store.delete(["k"]),
        lambda: list(store.list()),
        lambda: store.head("k"),
    ):
        counting.reset()
        with pytest.raises(type(error)) as caught:
            operation()
        assert caught.value is error
        assert counting.calls.total() == 1
    assert clock.sleeps == []


@settings(max_examples=tries(60))
@given(limit=st.floats(0.1, 300), first=st.floats(0.01, 5), longest=st.floats(5, 60))
def test_waits_grow_within_bounds_and_end(limit: float, first: float, longest: float) -> None:
    clock = Clock()
    counting = CountingBackend(FaultyBackend(memory(), [Fault(times=None)]))
    store = RetryBackend(counting, limit=limit, first_wait=first, longest_wait=longest, sleep=clock.sleep, clock=clock)
    with pytest.raises(BackendTimeoutError, match="gave up after") as caught:
        store.get("k")
    assert caught.value.transient
    assert isinstance(caught.value.__cause__, BackendError)
    assert sum(clock.sleeps) < limit
    assert counting.calls["get"] == len(clock.sleeps) + 1
    for number, wait in enumerate(clock.sleeps):
        assert 0 <= wait <= min(longest, first * 2**number)


def test_waits_differ_between_clients() -> None:
    """Clients that failed together do not come back together."""
    waits = set()
    for _ in range(20):
        clock = Clock()
        retrying(FaultyBackend(memory(), [Fault(times=3)]), clock).put("k", b"")
        waits.add(tuple(clock.sleeps))
    assert len(waits) == 20


def test_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    error = BackendError(5, "s3://b/x: cannot put 'k': 503 SlowDown", transient=True)
    with caplog.at_level(logging.WARNING):
        retrying(FaultyBackend(memory(), [Fault(times=2, do=Fail(error))])).put("k", b"")
    assert [record.getMessage().partition("; ")[0] for record in caplog.records] == [error.strerror] * 2
    assert "attempt 2 failed, the next in" in caplog.text


# -- create -----------------------------------------------------------------------------------------------------------


def test_a_create_whose_reply_was_lost_is_a_success() -> None:
    inner = memory()
    faulty = FaultyBackend(inner, [Fault("create", do=Fail(after_work=True))])
    retrying(faulty).create("k", b"mine, with a nonce")
    assert faulty.struck == 1
    assert inner.get("k") == b"mine, with a nonce"


def test_a_create_that_lost_the_race_after_an_error_is_a_conflict() -> None:
    """The first attempt did nothing, and meanwhile someone else took the key."""
    inner = memory()
    other = Call(lambda _: inner.create("k", b"theirs"))
    faulty = FaultyBackend(inner, [Fault("create", do=Fail()), Fault("create", nth=2, do=other)])
    with pytest.raises(KeyExistsError):
        retrying(faulty).create("k", b"mine")
    assert inner.get("k") == b"theirs"


def test_a_create_repeated_on_the_way_is_a_success() -> None:
    """Aiohttp and proxies repeat a PUT by themselves, and then the only answer is a conflict with ourselves."""
    inner = memory()
    twice = Call(lambda _: inner.create("k", b"mine"))
    retrying(FaultyBackend(inner, [Fault("create", do=twice)])).create("k", b"mine")
    assert inner.get("k") == b"mine"


def test_the_reading_back_is_repeated_too() -> None:
    inner = memory()
    faulty = FaultyBackend(inner, [Fault("create", do=Fail(after_work=True)), Fault("get", times=3)])
    retrying(faulty).create("k", memoryview(b"mine"))
    assert faulty.struck == 4


def test_a_key_deleted_before_the_reading_back_is_a_conflict() -> None:
    """Someone deleted what we may have created: that it was ours cannot be known any more."""
    inner = memory()
    faulty = FaultyBackend(
        inner,
        [Fault("create", do=Fail(after_work=True)), Fault("get", do=Call(lambda _: inner.delete(["k"])))],
    )
    with pytest.raises(KeyExistsError):
        retrying(faulty).create("k", b"mine")


# -- listings and deletes ---------------------------------------------------------------------------------------------


class _Paged(WrapperBackend):
    """Lists in pages of ten, every second request of which fails."""

    requests = 0

    def list(self, prefix: str = "") -> Iterator[Entry]:
        entries = list(self.inner.list(prefix))

        def fetch(token: str | None) -> tuple[Sequence[Entry], str | None]:
            self.requests += 1
            if self.requests % 2:
                raise BackendError("injected", transient=True)
            start = int(token or 0)
            return entries[start : start + 10], str(start + 10) if start + 10 < len(entries) else None

        return PagedListing(fetch)


@pytest.mark.parametrize("keys", [0, 1, 10, 95])
def test_a_listing_goes_on_at_the_page_that_failed(keys: int) -> None:
    inner = memory()
    for number in range(keys):
        inner.put(f"{number:03d}", b"")
    paged = _Paged(inner)
    assert sorted(entry.key for entry in retrying(paged).list()) == [f"{number:03d}" for number in range(keys)]
    assert paged.requests == 2 * max(1, -(-keys // 10))


def test_a_listing_that_cannot_go_on_starts_again() -> None:
    class Breaking(WrapperBackend):
        listings = 0

        def list(self, prefix: str = "") -> Iterator[Entry]:
            self.listings += 1
            for number, entry in enumerate(self.inner.list(prefix)):
                if number == 5 and self.listings < 4:
                    raise BackendError("injected", transient=True)
                yield entry

    inner = memory()
    for number in range(20):
        inner.put(f"{number:03d}", b"")
    found = [entry.key for entry in retrying(Breaking(inner)).list()]
    assert sorted(found) == [f"{number:03d}" for number in range(20)]


def test_many_keys_are_deleted_in_batches_that_are_repeated_alone() -> None:
    inner = memory()
    counting = CountingBackend(FaultyBackend(inner, [Fault("delete", nth=2, times=2)]))
    retrying(counting).delete(f"k/{number}" for number in range(2_500))
    assert [len(operation.keys) for operation in counting.operations] == [1_000, 1_000, 1_000, 1_000, 500]


def test_probing_through_retries() -> None:
    faulty = FaultyBackend(memory(), [Fault("create", do=Fail(after_work=True)), Fault("delete", times=2)])
    assert retrying(faulty).probe_exclusive()
    assert list(faulty.list()) == []
