"""The fault-injecting backends themselves: that what a script says happens where it says."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import BackendError, KeyNotFoundError
from incckpt.testing.disk import PowerCut, StopAt, UnsyncedDisk
from incckpt.testing.faults import (
    Call,
    CountingBackend,
    Fail,
    Fault,
    FaultyBackend,
    Kill,
    Operation,
    Pause,
)
from tests.forks import exit_code, fork, forks

pytestmark = forks


def memory() -> MemoryBackend:
    return MemoryBackend(str(uuid.uuid4()))


@given(nth=st.integers(1, 12), times=st.none() | st.integers(1, 12), after_work=st.booleans())
def test_which_operations_are_struck(nth: int, times: int | None, after_work: bool) -> None:
    store = FaultyBackend(memory(), [Fault("put", "refs/*", nth=nth, times=times, do=Fail(after_work=after_work))])
    struck = []
    for number in range(1, 11):
        store.put(f"objects/{number}", b"")
        store.inner.put("refs/seen", b"")
        assert store.get("refs/seen") == b""
        try:
            store.put(f"refs/{number}", b"")
        except BackendError:
            struck.append(number)
    last = 10 if times is None else nth + times - 1
    assert struck == [number for number in range(1, 11) if nth <= number <= last]
    assert store.struck == len(struck)
    done = {entry.key for entry in store.inner.list("refs/")} - {"refs/seen"}
    assert done == {f"refs/{number}" for number in range(1, 11) if after_work or number not in struck}


def test_a_delete_is_struck_by_any_of_its_keys_and_a_listing_by_its_prefix() -> None:
    store = FaultyBackend(memory(), [Fault("delete", "b"), Fault("list", "refs/")])
    store.delete(["a", "c"])
    with pytest.raises(BackendError):
        store.delete(["a", "b"])
    assert list(store.list("objects/")) == []
    with pytest.raises(BackendError):
        list(store.list("refs/"))


def test_an_error_after_the_work_is_a_lost_reply() -> None:
    store = FaultyBackend(memory(), [Fault("create", do=Fail(BackendError("lost"), after_work=True))])
    with pytest.raises(BackendError, match="lost"):
        store.create("k", b"v")
    assert store.get("k") == b"v"


@pytest.mark.parametrize("after_work", [False, True])
def test_pause_holds_an_operation_until_it_is_resumed(after_work: bool) -> None:
    pause = Pause(after_work=after_work)
    inner = memory()
    store = FaultyBackend(inner, [Fault("put", "k", do=pause)])
    thread = threading.Thread(target=store.put, args=("k", b"v"))
    thread.start()
    assert pause.reached.wait(60)
    assert [entry.key for entry in inner.list()] == (["k"] if after_work else [])
    store.put("other", b"")  # others pass
    pause.resume.set()
    thread.join(60)
    assert inner.get("k") == b"v"


def test_call_sees_the_operation() -> None:
    seen: list[Operation] = []
    store = FaultyBackend(memory(), [Fault(times=None, do=Call(seen.append))])
    store.put("k", memory_view := memoryview(bytearray(8)).cast("I"))
    store.delete(["a", "b"])
    assert seen == [Operation("put", ("k",), memory_view.nbytes), Operation("delete", ("a", "b"))]


@pytest.mark.parametrize("after_work", [False, True])
def test_kill_is_a_kill(tmp_path: Path, after_work: bool) -> None:
    store = FaultyBackend(LocalBackend(tmp_path), [Fault("put", nth=2, do=Kill(after_work=after_work))])

    def put_three() -> None:
        for key in ("1", "2", "3"):
            store.put(key, b"")

    assert exit_code(fork(put_three)) == -signal.SIGKILL
    assert sorted(entry.key for entry in LocalBackend(tmp_path).list()) == (["1", "2"] if after_work else ["1"])


def test_counting() -> None:
    store = CountingBackend(memory())
    store.put("a", b"123")
    store.create("b", b"12345")
    assert store.get("a", 1) == b"23"
    with pytest.raises(KeyNotFoundError):
        store.get("missing")
    assert [entry.key for entry in store.list("a")] == ["a"]
    assert store.calls == {"put": 1, "create": 1, "get": 2, "list": 1}
    assert (store.bytes_put, store.bytes_got) == (8, 2)
    assert store.keys("[pc]*") == ["a", "b"]
    store.reset()
    assert (store.operations, store.calls.total(), store.bytes_put) == ([], 0, 0)


def test_after_a_power_cut_no_call_is_made(tmp_path: Path) -> None:
    calls = StopAt(3)
    backend = LocalBackend(tmp_path / "store", calls=calls)
    for _ in range(2):
        with pytest.raises(PowerCut):
            backend.put("k", b"v")
    assert calls.count == 3


def test_the_disk_keeps_what_was_synced_only(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"old")
    disk = UnsyncedDisk(tmp_path)
    for name, sync_file, sync_folder in [("both", True, True), ("file", True, False)]:
        fd = disk.open(str(tmp_path / name), os.O_CREAT | os.O_WRONLY)
        disk.write(fd, memoryview(b"new"))
        if sync_file:
            disk.fsync(fd)
        disk.close(fd)
        if sync_folder:
            folder = disk.open(str(tmp_path), os.O_RDONLY)
            disk.fsync(folder)
            disk.close(folder)
    disk.unlink(str(tmp_path / "before"))
    disk.mkdir(str(tmp_path / "folder"))
    disk.crash()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"before": b"old", "both": b"new"}
