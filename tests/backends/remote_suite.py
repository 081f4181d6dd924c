"""What every backend over a network must stand, as a test class: requests broken by a proxy in every way."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pytest

from incckpt.backends import Backend
from incckpt.backends.retry import RetryBackend
from incckpt.errors import BackendError, BackendTimeoutError, KeyExistsError
from incckpt.testing.conformance import BackendConformance
from tests.forks import exit_code, fork, forks
from tests.servers.fault_proxy import FaultProxy, Rule


class MakeBackend(Protocol):
    """Makes a backend over an empty root, whose requests go through the proxy; one attempt each."""

    def __call__(self, root: str, **limits: float) -> Backend: ...


def patient(backend: Backend) -> RetryBackend:
    """Return a backend that repeats without waiting."""
    return RetryBackend(backend, sleep=lambda _: None)


def get_into(backend: Backend, key: str, sizes: tuple[int, ...]) -> tuple[int, bytes]:
    """Return what `get_into` does, and what is in the parts together after it."""
    parts = [memoryview(bytearray(size)) for size in sizes]
    return backend.get_into(key, parts), b"".join(parts)


ONE_OF_EACH: dict[str, Callable[[Backend], object]] = {
    "get": lambda store: store.get("there") == b"value",
    "get_into": lambda store: get_into(store, "there", (2, 3)) == (5, b"value"),
    "head": lambda store: store.head("there").size == 5,
    "put": lambda store: store.put("put", b"x" * 200_000) is None and store.get("put") == b"x" * 200_000,
    "create": lambda store: store.create("created", b"y" * 200_000) is None and store.get("created") == b"y" * 200_000,
    "list": lambda store: [entry.key for entry in store.list("th")] == ["there"],
    "delete": lambda store: store.delete(["a", "b"]) is None,
}
"""An operation of each kind and whether it did what it should; they need ``there`` to be ``value``."""


class RemoteFaults:
    """Needs the fixtures `shared_proxy`, in front of the server, and `make`, of class or module scope."""

    has_body = frozenset({"get", "get_into", "list"})
    """The operations whose replies have a body to break off."""

    rounds = 30
    """Values put, created, read and deleted while a tenth of the requests breaks."""

    @pytest.fixture
    def proxy(self, shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
        """Return the proxy with no rules."""
        shared_proxy.rules = []
        shared_proxy.seen.clear()
        yield shared_proxy
        shared_proxy.rules = []

    @pytest.mark.parametrize("do", ["status", "reset", "lose_reply", "cut_upload", "truncate"])
    def test_a_tenth_of_the_requests_broken_in_one_way(self, proxy: FaultProxy, make: MakeBackend, do: str) -> None:
        """Every operation many times, each kind of fault at 10 %: all ends as if nothing had happened."""
        values = {f"k/{number:02d}": bytes([number]) * (1 + number * 1_000) for number in range(self.rounds)}
        with make(str(uuid.uuid4())) as backend:
            rule = Rule(do, times=None, chance=0.1)
            proxy.rules = [rule]
            store = patient(backend)
            for key, value in values.items():
                store.create(key, value)
                store.put(f"again/{key}", b"old")
                store.put(f"again/{key}", value)
                with pytest.raises(KeyExistsError):
                    store.create(key, value + b"other")
            assert {key: store.get(key) for key in values} == values
            assert {key: store.get(f"again/{key}", 5, 500) for key in values} == {
                k: v[5:500] for k, v in values.items()
            }
            for key, value in values.items():
                assert get_into(store, key, (len(value) // 3, len(value) - len(value) // 3)) == (len(value), value)
            found = {entry.key: entry.size for entry in store.list("k/")}
            assert found == {key: len(value) for key, value in values.items()}
            store.delete([f"again/{key}" for key in values])
            store.delete(list(values)[:10])
            assert sorted(entry.key for entry in store.list()) == sorted(values)[10:]
            assert rule.struck > 3

    @pytest.mark.parametrize("do", ["page", "blank"])
    def test_what_is_no_answer_of_the_service_is_asked_for_again(
        self, proxy: FaultProxy, make: MakeBackend, do: str
    ) -> None:
        """A portal's page, or an empty answer, is neither a value nor an empty listing nor a success."""
        with make(str(uuid.uuid4())) as backend:
            store = patient(backend)
            store.put("there", b"value")
            for name, operation in ONE_OF_EACH.items():
                rule = Rule(do)
                proxy.rules = [rule]
                assert operation(store), name
                assert rule.struck == 1, name
            for keys in (["one"], ["two", "three"]) if do == "page" else ():  # a delete's own answer may be empty
                for key in keys:
                    store.put(key, b"to be deleted")
                rule = Rule(do)
                proxy.rules = [rule]
                store.delete(keys)
                assert rule.struck == 1
                assert not {entry.key for entry in store.list()} & set(keys), "what was not deleted counts as deleted"
            proxy.rules = [Rule(do, times=None)]
            with pytest.raises(BackendError, match=r"cannot list") as caught:
                list(backend.list())
            assert caught.value.transient

    @pytest.mark.parametrize("do", ["hang", "hang_upload", "hang_reply", "hang_download"])
    def test_hangs_end_at_our_deadline(self, proxy: FaultProxy, make: MakeBackend, do: str) -> None:
        """Before 100 Continue, after the body, after the work, in the middle of the reply."""
        with make(str(uuid.uuid4()), timeout=0.3, min_rate=10 << 20) as backend:
            store = patient(backend)
            store.put("there", b"value")
            for name, operation in ONE_OF_EACH.items():
                if do != "hang_download" or name in self.has_body:
                    rule = Rule(do)
                    proxy.rules = [rule]
                    assert operation(store), name
                    assert rule.struck == 1
            proxy.rules = [Rule(do, times=None)]
            with pytest.raises(BackendTimeoutError, match=r"get 'there': no answer in time \(0\.3 s") as caught:
                backend.get("there")
            assert caught.value.transient

    @forks
    def test_use_after_a_fork(self, proxy: FaultProxy, make: MakeBackend) -> None:
        """A child goes on with its parent's backend, and neither disturbs the other."""
        with make(str(uuid.uuid4())) as backend:
            backend.put("parent", b"1")
            assert get_into(backend, "parent", (1,)) == (1, b"1")

            def child() -> None:
                backend.put("child", backend.get("parent"))
                assert get_into(backend, "parent", (1,)) == (1, b"1")
                backend.close()

            assert exit_code(fork(child)) == 0
            assert backend.get("child") == b"1"
            backend.put("parent", b"2")
            assert get_into(backend, "parent", (1,)) == (1, b"2")

    @forks
    def test_use_in_a_child_forked_while_requests_are_under_way(self, proxy: FaultProxy, make: MakeBackend) -> None:
        with make(str(uuid.uuid4())) as backend, ThreadPoolExecutor(4) as pool:
            backend.put("parent", b"1")
            proxy.rules = [Rule("hang_reply", times=4)]
            waiting = [pool.submit(patient(backend).get, "parent") for _ in range(4)]
            while len(proxy.seen) < 5:
                threading.Event().wait(0.01)
            assert exit_code(fork(lambda: backend.put("child", b"1"))) == 0
            assert backend.get("child") == b"1"
            proxy.release()
            assert [future.result() for future in waiting] == [b"1"] * 4


class ConformanceUnderFaults(BackendConformance):
    """The whole suite while a tenth of all requests breaks, in all ways in which one can without hanging."""

    large_value = 1 << 20
    many_keys = 60

    @pytest.fixture
    def backend(self, shared_proxy: FaultProxy, make: MakeBackend) -> Iterator[Backend]:
        with patient(make(str(uuid.uuid4()))) as backend:
            kinds = ("status", "reset", "lose_reply", "cut_upload", "truncate")
            shared_proxy.rules = [Rule(do, times=None, chance=0.02) for do in kinds]
            yield backend
            shared_proxy.rules = []
