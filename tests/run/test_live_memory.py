"""Memory that changes while it is saved costs a checkpoint its consistency, never its readability."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import incckpt
from incckpt.backends.base import Backend, Entry, ReadableBuffer
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError
from incckpt.run.session import Session
from incckpt.staging.baseline import live_contents
from incckpt.staging.content import compute_digests
from incckpt.staging.layout import Layout
from incckpt.state.flatten import flatten

pytestmark = pytest.mark.slow

MIB = 1 << 20


class Disturbing(WrapperBackend):
    """Calls `disturb` at every request for an object: between the hash of its content and its encoding, and later."""

    def __init__(self, inner: Backend, disturb: Callable[[], None]) -> None:
        super().__init__(inner)
        self._disturb = disturb

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self.about(prefix)
        return super().list(prefix)

    def head(self, key: str) -> Entry:
        self.about(key)
        return super().head(key)

    def put(self, key: str, data: ReadableBuffer) -> None:
        self.about(key)
        super().put(key, data)

    def about(self, key: str) -> None:
        if key.startswith(("objects/", "deltas/")):
            self._disturb()


class FailsOnce(Disturbing):
    """Fails once an object is put."""

    failed = False

    def put(self, key: str, data: ReadableBuffer) -> None:
        super().put(key, data)
        if key.startswith("objects/") and not self.failed:
            self.failed = True
            raise BackendError("no")


@contextmanager
def written_to(tensor: torch.Tensor) -> Iterator[None]:
    """Have a thread write to a tensor all the while."""
    stop, writing = threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            tensor.add_(1e-3)
            writing.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert writing.wait(60)
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("wrapper", [Disturbing, FailsOnce])
@pytest.mark.parametrize("pieces", [1, 3])
def test_memory_that_changes_between_hash_and_encode(tmp_path: Path, wrapper: type[Disturbing], pieces: int) -> None:
    """`pieces` of 200 KiB lie in one chunk."""
    state = {str(index): torch.randn(50_000 if pieces > 1 else 1 << 20) for index in range(pieces)}
    twin = state["0"].clone()  # the same content twice is put once

    def disturb() -> None:
        for tensor in state.values():
            tensor.add_(1.0)

    backend = wrapper(LocalBackend(tmp_path), disturb)
    session = Session(backend, "default", None)
    for step in range(3):
        try:
            session.save(flatten(state | {"twin": twin}), step, {})
        except BackendError:
            session.save(flatten(state | {"twin": twin}), step, {})
    session.close()
    assert torch.equal(incckpt.load(tmp_path)["twin"], twin)
    assert incckpt.verify(tmp_path, level="hashes").ok


def test_a_managers_save_is_of_the_moment_of_the_call(tmp_path: Path) -> None:
    state = {"w": torch.zeros(MIB), "small": torch.zeros(3)}

    def disturb() -> None:
        state["w"].add_(1.0)
        state["small"].add_(1.0)

    with incckpt.CheckpointManager(Disturbing(LocalBackend(tmp_path), disturb)) as manager:
        for step in range(1, 4):
            before = {"w": state["w"].clone(), "small": state["small"].clone()}
            manager.save(step, state).result()
            loaded = incckpt.load(tmp_path)
            assert all(torch.equal(loaded[name], value) for name, value in before.items())
    assert incckpt.verify(tmp_path, level="hashes").ok


@pytest.mark.parametrize("threshold", [0.0, 1e-4])
def test_saves_while_a_thread_writes(tmp_path: Path, threshold: float) -> None:
    state = {"w": torch.randn(MIB), "strided": torch.randn(300, 300)[:, ::2]}
    with written_to(state["w"]), written_to(state["strided"]):
        for _ in range(3):
            incckpt.save(state, tmp_path / "save")
            incckpt.load(tmp_path / "save")
        with incckpt.CheckpointManager(tmp_path / "manager", threshold=threshold) as manager:
            for step in range(5):
                manager.save(step, state)
    for store in ("save", "manager"):
        assert incckpt.verify(tmp_path / store, level="hashes").ok


def _write_until(tensor: torch.Tensor, writing: threading.Event, stop: threading.Event) -> None:
    while not stop.is_set():
        tensor.add_(1e-3)
        writing.set()


def test_saves_while_another_process_writes(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    weights = torch.randn(MIB).share_memory_()  # type: ignore[no-untyped-call]
    writing, stop = context.Event(), context.Event()
    process = context.Process(target=_write_until, args=(weights, writing, stop))
    process.start()
    try:
        assert writing.wait(120)
        for _ in range(3):
            incckpt.save({"w": weights}, tmp_path / "save")
            incckpt.load(tmp_path / "save")
    finally:
        stop.set()
        process.join()
    assert process.exitcode == 0


def test_live_contents_are_copied_for_as_long_as_they_are_held() -> None:
    state = {"a": torch.arange(3 * MIB, dtype=torch.int32), "b": torch.zeros(9)}
    flat = flatten(state)
    contents = live_contents(flat, Layout.of(flat.sizes, flat.kinds, MIB))
    assert [content.raw for content in contents] == [None] * 13
    content = contents[1]
    content.hold()
    compute_digests([content])
    first, identity = content.raw, content.identity
    assert first is not None
    state["a"].zero_()
    assert first.any(), "a copy"
    content.release()
    assert content.raw is None
    content.hold()
    compute_digests([content])
    assert content.raw is not None
    assert not content.raw.any()
    assert content.identity != identity


def test_a_save_holds_no_more_than_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 MiB in chunks of 16: what is copied at one time stays below the bound of bytes in flight."""
    from incckpt.run import upload
    from incckpt.staging import hostmem

    monkeypatch.setattr(upload, "_IN_FLIGHT", 64 * MIB)
    most = 0
    take = hostmem.HostPool.take

    def noting(pool: hostmem.HostPool, nbytes: int) -> hostmem.Bytes:
        nonlocal most
        array = take(pool, nbytes)
        most = max(most, pool.used_bytes)
        return array

    monkeypatch.setattr(hostmem.HostPool, "take", noting)
    session = Session(MemoryBackend("in-flight"), "default", None)
    session.save(flatten({"w": torch.zeros(128 * MIB)}), None, {})
    session.close()
    assert 0 < most <= 64 * MIB
