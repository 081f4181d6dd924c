"""Reading chunks: shared objects are fetched once, memory is bounded, only what is needed is read."""

from __future__ import annotations

import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

import incckpt
from incckpt.backends.base import Backend
from incckpt.backends.local import LocalBackend
from incckpt.backends.s3 import S3Backend
from incckpt.run.reader import Reader
from incckpt.run.restore import load_state
from incckpt.store.store import Store
from incckpt.testing.compare import assert_same_state
from incckpt.testing.faults import CountingBackend


def save(state: Any, folder: Path) -> None:
    with incckpt.CheckpointManager(folder) as manager:
        manager.save(1, state).result()


@pytest.fixture(params=["local", "s3"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    if request.param == "local":
        yield LocalBackend(tmp_path)
        return
    options = request.getfixturevalue("s3_server")
    s3fs.S3FileSystem(**options).makedirs("restore", exist_ok=True)
    with S3Backend("restore", str(uuid.uuid4()), options) as backend:
        yield backend


@pytest.mark.slow
@pytest.mark.parametrize("content", ["compressible", "deltas", "incompressible"])
def test_memory_beyond_the_destination_is_bounded(backend: Backend, content: str) -> None:
    state = {f"w{i}": torch.randn(6 << 20).bfloat16() for i in range(8)}
    if content == "incompressible":
        state = {name: torch.randint(0, 256, (value.nbytes,), dtype=torch.uint8) for name, value in state.items()}
    with incckpt.CheckpointManager(backend) as manager:
        manager.save(1, state).result()
        if content == "deltas":
            for value in state.values():
                value[::9] += 0.01
            manager.save(2, state).result()
        manager.wait()
        way = {"compressible": "intra", "deltas": "delta", "incompressible": "raw"}[content]
        assert manager.history[-1].by_way[way].raw > 0
    destination = sum(value.nbytes for value in state.values())
    limit = 32 << 20
    store = Store(backend)
    run = store.run("default")
    ref = run.read(run.lineage().live[-1])
    assert ref is not None
    manifest = store.manifest(ref)  # type: ignore[arg-type]
    with Reader(store, threads=2) as reader:
        load_state(reader, manifest, keys="w0", progress=False)  # whatever is imported or connected once
    tracemalloc.start()
    try:
        with Reader(store, threads=2, bytes_in_flight=limit) as reader:
            restored = load_state(reader, manifest, progress=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_same_state(restored, state)
    assert destination < peak < destination + limit + (16 << 20), "what each thread decodes with comes besides"


def test_an_object_that_several_tensors_share_is_fetched_once(tmp_path: Path) -> None:
    one = torch.randn(400_000)
    state = {"a": one.clone(), "b": one.clone(), "c": [one.clone()], "d": torch.zeros(3)}
    save(state, tmp_path)
    backend = CountingBackend(LocalBackend(tmp_path))
    assert_same_state(incckpt.load(backend), state)
    objects = [key for key in backend.keys("get") if key.startswith("objects/")]
    assert len(objects) == len(set(objects)) == 3, "the tensor, the small one, the manifest"
    with incckpt.CheckpointManager(LocalBackend(tmp_path)) as manager:
        target: dict[str, Any] = {
            "a": torch.empty(400_000),
            "b": torch.empty(400_000),
            "c": [torch.empty(400_000)],
            "d": torch.ones(3),
        }
        assert manager.restore(target) == 1
        assert_same_state(target, state)
        target["b"][5] = 1
        manager.save(2, target).result()
    assert_same_state(incckpt.load(tmp_path), target)


def test_a_progress_bar_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save({"w": torch.zeros(1 << 20)}, tmp_path)
    incckpt.load(tmp_path)
    assert capsys.readouterr().err == ""
    incckpt.load(tmp_path, progress=True)
    assert "step 1: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    state = {f"w{i}": torch.randn(300_000 + i) for i in range(5)} | {"small": torch.arange(10)}
    with incckpt.CheckpointManager(tmp_path, threads=threads) as manager:
        manager.save(1, state).result()
    assert_same_state(incckpt.load(tmp_path, threads=threads), state)


def test_map_location(tmp_path: Path) -> None:
    save({"w": torch.ones(3)}, tmp_path)
    assert incckpt.load(tmp_path, map_location="cpu")["w"].device.type == "cpu"
    assert incckpt.load(tmp_path, map_location=lambda storage, device: storage)["w"].tolist() == [1, 1, 1]
